"""A model that is an adapter of another one (LoRA and its kin), merged with it into one model.

Adapters are a few megabytes beside a base model that their configuration names (Hu et al. 2021, arXiv 2106.09685).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from ..base.digests import known_digests
from ..base.errors import RecipeError
from .loading import load_tokenizer, load_weights, one_line_errors, quiet_transformers
from .weights import weight_files

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base_of_adapter(folder: Path) -> str | None:
    """The base model of a directory that holds an adapter, None where it holds none.

    Raises RecipeError for an adapter that names no base, lies beside a whole model, or has no safetensors.
    """
    file = folder / _CONFIG
    if not file.exists():
        return None
    try:
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"{file}: not a valid adapter configuration ({error})") from error
    if not base:
        raise RecipeError(f"{file}: names no base_model_name_or_path: add it, or merge the adapter yourself")
    if (folder / "config.json").exists():
        raise RecipeError(f"{folder} holds a model and an adapter: move the adapter to a directory of its own")
    if not (folder / _WEIGHTS).exists():
        raise RecipeError(f"{folder} has no {_WEIGHTS}: save the adapter with peft as safetensors")
    return str(base)


def adapter_record(folder: Path, base: str) -> dict[str, Any]:
    """What a merged model is made of: digests of the adapter's files, and of the base's where they are local."""
    local = Path(base)
    files = [*weight_files(local), local / "config.json"] if local.is_dir() else []
    return {
        "adapter": known_digests([folder / _CONFIG, folder / _WEIGHTS]),
        "base": base,
        "base_files": known_digests(files),
    }


def merge_adapter(folder: Path, base: str, target: Path, objective: str, trust_remote_code: bool) -> None:
    """Merge an adapter with its base, in the base's own precision, and save model and tokenizer in `target`.

    Raises RecipeError where peft is not installed, for an adapter of a kind that cannot be merged, and for one that does
    not fit its base.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise RecipeError(
            f"teacher.model: {folder} is an adapter of {base!r}, to merge it needs peft: pip install 'logit-cache[lora]'"
        ) from error
    settings = json.loads((folder / _CONFIG).read_text())
    revision, kind = settings.get("revision"), settings.get("peft_type")
    model = load_weights(base, objective, revision, trust_remote_code, dtype="auto")
    with quiet_transformers(), one_line_errors(str(folder)), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            adapted = PeftModel.from_pretrained(model, str(folder))
        except UserWarning as error:
            raise RecipeError(f"teacher.model: the adapter {folder} does not fit its base {base!r}: {error}") from error
        if not hasattr(adapted.base_model, "merge_and_unload"):
            raise RecipeError(
                f"teacher.model: {folder} is an adapter of type {kind}, which cannot be merged into a model"
            )
        adapted.merge_and_unload(safe_merge=True).save_pretrained(target)
    own = (folder / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(str(folder) if own else base, None if own else revision, trust_remote_code)
    tokenizer.save_pretrained(target)
