"""The digest of a model's weights is of the files that are loaded, wherever they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from logit_cache.models.weights import hub_commit, model_bytes, weight_files, weights_digest
from safetensors.torch import save_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checkpoint(folder: Path) -> Path:
    """Two files, as a large model has them."""
    folder.mkdir(parents=True)
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in names.items():
        save_file({name: torch.full((3,), float(ord(name)))}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_the_same_weights_in_another_form_beside_them_do_not_count(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    digest, size = weights_digest(str(folder), None, None), model_bytes(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "consolidated.safetensors")
    assert [file.name[:11] for file in weight_files(folder)] == ["model-00001", "model-00002"]
    assert weights_digest(str(folder), None, None) == digest and model_bytes(folder) == size
    save_file({"a": torch.zeros(3)}, folder / "model-00001-of-00002.safetensors")
    assert weights_digest(str(folder), None, None) != digest


def test_a_model_of_the_hub_has_the_digest_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub/models--some--model"
    folder = checkpoint(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = weights_digest(str(folder), None, None)
    assert weights_digest("some/model", None, None) == expected
    assert weights_digest("some/model", COMMIT, None) == expected
    assert hub_commit("some/model", None) == COMMIT and hub_commit(str(folder), None) is None


def test_a_model_without_files_has_the_digest_of_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    digest = weights_digest("some/model", None, one)
    assert weights_digest("some/model", None, one) == digest != weights_digest("some/model", None, other)
