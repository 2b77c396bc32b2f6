"""transformers' loaders for configuration, tokenizer and model, with this project's settings and one-line errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..base import processes
from ..base.errors import IncompleteError, RecipeError, storage_error
from .placement import Placement


def max_positions(config: Any) -> int | None:
    """The longest sequence that the configuration allows, None where it names no limit."""
    text = config.get_text_config()
    value = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(value) if value else None


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer of a model, without the truncation and padding that its files may store."""
    from transformers import AutoTokenizer

    with quiet_transformers(), one_line_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def load_config(source: str, revision: str | None = None) -> Any:
    from transformers import AutoConfig

    with one_line_errors(source):
        return AutoConfig.from_pretrained(source, revision=revision)


def auto_class(objective: str) -> Any:
    """The transformers class that loads models of causal or masked rows."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM


def load_model(
    source: str | Path,
    placement: Placement,
    revision: str | None = None,
    parallel: str = "none",
    objective: str = "causal",
) -> Any:
    """A language model in evaluation mode, on its device; `parallel` as in TeacherConfig, `objective` causal or masked.

    Raises RecipeError for a model that transformers cannot load.
    """
    spread: dict[str, Any] = {}
    if parallel == "layers":
        spread = {"device_map": "auto"}  # fills the devices first, then the memory of the CPU
    elif parallel == "tensor" and processes.world_size() > 1:
        from transformers.distributed import DistributedConfig

        processes.join()
        spread = {"distributed_config": DistributedConfig(tp_size=processes.world_size())}
    with quiet_transformers(), one_line_errors(str(source)):
        model = auto_class(objective).from_pretrained(
            str(source),
            revision=revision,
            dtype=placement.dtype,
            attn_implementation=None if placement.attention == "auto" else placement.attention,  # None: its own choice
            use_safetensors=True,  # other formats are pickles
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
    except (OSError, ValueError, KeyError) as error:
        if storage_error(error) is not None:
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = IncompleteError if "ConnectionError" in repr(error.__cause__) else RecipeError
        raise kind(f"model {source!r} cannot be loaded: {first}") from error
