"""The files of a model's weights: their names, bytes and digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..base.digests import known_digests
from ..base.errors import RecipeError

_ONE, _SEVERAL = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads the weights from, by name; a repository may hold the same weights twice."""
    if (folder / _ONE).exists():
        return [folder / _ONE]
    if (folder / _SEVERAL).exists():
        names = set(json.loads((folder / _SEVERAL).read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return sorted(folder.glob("*.safetensors"))


def model_bytes(folder: Path) -> int:
    """Bytes of a saved model's weights."""
    return sum(file.stat().st_size for file in weight_files(folder))


def weights_digest(source: str, revision: str | None, model: Any) -> str:
    """Digest of the files of a loaded model's weights, else of its tensors.

    Raises RecipeError for a model without files whose tensors are spread over devices.
    """
    folder = model_folder(source, revision)
    files = [] if folder is None else weight_files(folder)
    if files:
        return hashlib.sha256("".join(known_digests(files)).encode()).hexdigest()
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, DTensor) or tensor.is_meta:
            raise RecipeError(
                f"teacher.parallel: download {source!r} to a local directory: spread over devices its weights have no digest"
            )
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def hub_commit(source: str, revision: str | None) -> str | None:
    """The commit of a model of the hub as it has been loaded; None for a directory."""
    folder = None if Path(source).is_dir() else model_folder(source, revision)
    return None if folder is None else folder.name


def model_folder(source: str, revision: str | None) -> Path | None:
    """The directory of a model, for one of the hub where its files have been loaded to; None where there is none."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
