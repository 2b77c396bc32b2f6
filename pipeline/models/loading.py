"""transformers' loaders for configuration, tokenizer and model, with this project's settings and one-line errors.

transformers fills weights that a checkpoint lacks with random numbers and asks on the terminal whether to run code that
a repository brings; here the first is refused by name, and the second needs a key of the recipe.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..base import processes
from ..base.errors import IncompleteError, PipelineError, RecipeError, first_line, storage_error
from .placement import Placement

logger = logging.getLogger(__name__)

_NAMED = 3
"""Weights that a message names at most."""


def max_positions(config: Any) -> int | None:
    """The longest sequence that the configuration allows, None where it names no limit."""
    text = config.get_text_config()
    value = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(value) if value else None


def load_tokenizer(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, without the truncation and padding that its files may store.

    Raises RecipeError for one that cannot be loaded.
    """
    from transformers import AutoTokenizer

    with quiet_transformers(), one_line_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def load_config(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a model. Raises RecipeError for one that cannot be loaded."""
    from transformers import AutoConfig

    with quiet_transformers(), one_line_errors(source):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


def auto_class(objective: str, config: Any) -> Any:
    """The transformers class that loads models of causal or masked rows by their configuration.

    A model of text and images has a causal class of its own in few cases; elsewhere the whole model is loaded, whose
    logits without images are those of its text side. Raises RecipeError where transformers has no such class.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForMultimodalLM

    fitting = [AutoModelForMaskedLM] if objective == "masked" else [AutoModelForCausalLM, AutoModelForMultimodalLM]
    own_code = getattr(config, "auto_map", None) or {}
    for candidate in fitting:
        if type(config) in candidate._model_mapping or candidate.__name__ in own_code:
            return candidate
    raise RecipeError(
        f"transformers has no {objective} language model for model_type {config.model_type!r}: use another model, or "
        f"another corpus.objective"
    )


def load_weights(
    source: str,
    objective: str = "causal",
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_head: bool = False,
    **settings: Any,
) -> Any:
    """A language model with the weights of its checkpoint; `settings` are those of `from_pretrained`.

    Raises RecipeError for a model that transformers cannot load, and, by their names, for weights that its files lack
    or have in another shape; heads that the configuration ties, and weights that the architecture can do without, may
    be lacking, and with `new_head` all that is outside the model's body, which is then random.
    """
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    gguf = {key: settings[key] for key in ("gguf_file",) if key in settings}
    with quiet_transformers(), one_line_errors(source):
        from transformers import AutoConfig
        from transformers.utils.peft_utils import find_adapter_config_file

        if find_adapter_config_file(source, revision=revision) is not None:
            raise RecipeError(
                f"model {source!r} is an adapter of another model: merge it first (peft's merge_and_unload); a directory with "
                "an adapter serves as teacher.model as it is"
            )
        config = AutoConfig.from_pretrained(source, **where, **gguf)
        model, report = auto_class(objective, config).from_pretrained(
            source,
            **where,
            use_safetensors=True,  # other formats are pickles
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **settings,
        )
    wrong = [
        f"{name} (of shape {list(found)} instead of {list(own)})" for name, found, own in report["mismatched_keys"]
    ]
    kind = type(model).__name__
    if wrong:
        raise RecipeError(f"model {source!r}: not the weights of a {kind} of this config.json: {_some(wrong)}")
    missing = report["missing_keys"]
    if new_head:
        missing = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    if missing:
        raise RecipeError(
            f"model {source!r} lacks weights of a {kind}: {_some(missing)}: restore the files, or name a "
            f"checkpoint of a {objective} language model"
        )
    if report["unexpected_keys"]:
        logger.info(f"model {source!r}: a {kind} leaves out {_some(report['unexpected_keys'])}")
    return model


def _some(names: Iterable[str]) -> str:
    """The first of several names, and how many more there are."""
    known = sorted(names)
    rest = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
    return ", ".join(known[:_NAMED]) + rest


def load_model(
    source: str | Path,
    placement: Placement,
    revision: str | None = None,
    parallel: str = "none",
    objective: str = "causal",
    trust_remote_code: bool = False,
) -> Any:
    """A language model in evaluation mode, on its device; `parallel` as in TeacherConfig, `objective` causal or masked.

    Raises RecipeError as `load_weights` does.
    """
    spread: dict[str, Any] = {}
    if parallel == "layers":
        spread = {"device_map": "auto"}  # fills the devices first, then the memory of the CPU
    elif parallel == "tensor" and processes.world_size() > 1:
        from transformers.distributed import DistributedConfig

        processes.join()
        spread = {"distributed_config": DistributedConfig(tp_size=processes.world_size())}
    model = load_weights(
        str(source),
        objective,
        revision,
        trust_remote_code,
        dtype=placement.dtype,
        attn_implementation=None if placement.attention == "auto" else placement.attention,  # None: its own choice
        **spread,
    )
    model = model.eval().requires_grad_(False)
    return model if spread else model.to(placement.device)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off the progress bars and advice that transformers prints while loading."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def one_line_errors(source: str) -> Iterator[None]:
    """Turn what transformers raises for a missing or broken model into one line; errors of the disk pass through.

    Raises IncompleteError where the hub does not answer, else RecipeError.
    """
    try:
        yield
    except PipelineError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        RuntimeError,
        SafetensorError,
    ) as error:
        if storage_error(error) is not None or isinstance(error, torch.OutOfMemoryError):
            raise
        if "trust_remote_code=True" in str(error):
            raise RecipeError(
                f"model {source!r} brings its own Python code: read it, then set trust_remote_code = true in [teacher], or "
                "in the table of the student that starts from it"
            ) from error
        kind = IncompleteError if "ConnectionError" in repr(error.__cause__) else RecipeError
        raise kind(f"model {source!r} cannot be loaded: {first_line(error)}") from error
