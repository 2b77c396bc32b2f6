"""A model to be measured, by any name that transformers loads it under: a directory, a name on the hub, a GGUF file, or a
quantised checkpoint of either kind."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from ..base.errors import MismatchError, PipelineError, RecipeError
from .loading import load_config, load_tokenizer, load_weights
from .placement import Placement
from .teacher_source import package_file
from .weights import model_bytes, model_folder


def open_model(name: str, placement: Placement, objective: str = "causal", trust_remote_code: bool = False) -> Any:
    """A language model in evaluation mode, on its device; `objective` causal or masked.

    The weights of a GGUF file are taken as they are rounded, in the placement's dtype. A checkpoint that names its
    quantisation is loaded by transformers' own quantiser. Raises RecipeError for a model that does not exist or cannot be
    loaded.
    """
    file = _local(name)
    settings: dict[str, Any] = {"dtype": placement.dtype}
    source = str(file) if file.exists() else name
    if file.suffix == ".gguf":
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise RecipeError("a GGUF file needs the gguf package: pip install 'logit-cache[gguf]'") from error
        from transformers import GgufConfig

        source = str(file.parent)
        settings |= {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    elif getattr(load_config(source, trust_remote_code=trust_remote_code), "quantization_config", None) is not None:
        # The layers of some quantisers cannot be moved afterwards.
        settings["device_map"] = {"": placement.device}
    with redirect_stderr(io.StringIO()):  # the GGUF reader draws its own bar; transformers has no switch for it
        model = load_weights(source, objective, trust_remote_code=trust_remote_code, **settings)
    model = model.eval().requires_grad_(False)
    return model if "device_map" in settings else model.to(placement.device)


def check_same_tokens(name: str, tokenizer_dir: Path, trust_remote_code: bool = False) -> None:
    """Raise MismatchError where a model has a tokenizer of its own that gives a token of the cache's another id.

    A model without tokenizer files, and a GGUF file, are taken to have the cache's.
    """
    file = _local(name)
    if file.suffix == ".gguf":
        return
    try:
        own = load_tokenizer(str(file) if file.exists() else name, trust_remote_code=trust_remote_code).get_vocab()
    except PipelineError:
        return
    for token, number in load_tokenizer(str(tokenizer_dir)).get_vocab().items():
        if own.get(token) != number:
            raise MismatchError(
                f"model {name!r}: its tokenizer gives {token!r} the id {own.get(token)}, that of the cache {number}: "
                "take models that share the teacher's tokenizer"
            )


def bytes_on_disk(name: str) -> int:
    """Size of a model's weights; 0 where its files are not known."""
    file = _local(name)
    if file.is_file():
        return file.stat().st_size
    folder = model_folder(name, None)
    return 0 if folder is None else model_bytes(folder)


def _local(name: str) -> Path:
    """The path of a file or directory, also inside an installed package; of a hub name a path that does not exist.

    Raises RecipeError for a path that does not exist and is no hub name.
    """
    file = package_file(name) if name.startswith("package:") else Path(name)
    missing = file.suffix == ".gguf" or "/" not in name or name.startswith((".", "/", "~", "package:"))
    if missing and not file.exists():
        raise RecipeError(f"model {name!r}: no such file or directory")
    return file
