"""Files that somebody wrote to do harm: one line, exit 4; no pickle is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logit_cache import LogitCache
from logit_cache.base.durable import json_digest
from logit_cache.base.errors import CorruptError, MismatchError
from logit_cache.stages.app import main

from tests.helpers.fault_client import Rows, prepared_copy
from tests.helpers.synthetic import make_cache

pytestmark = pytest.mark.slow


def changed(path: str, value: object) -> Callable[[Any], Any]:
    """Set one value of a JSON document, by its keys."""

    def change(document: Any) -> Any:
        node = document
        *parents, last = path.split("/")
        for key in parents:
            node = node[key]
        node[last] = value
        return document

    return change


def deep(document: Any) -> bytes:
    return b'{"a":' * 100_000 + b"1" + b"}" * 100_000


HOSTILE_MANIFESTS: dict[str, Callable[[Any], Any]] = {
    "rows of 2^60": changed("layout/rows", 2**60),
    "shards of 2^60 rows": changed("layout/shard_rows", 2**60),
    "rows below 0": changed("layout/rows", -1),
    "rows as a flag": changed("layout/rows", True),
    "a row of 2^60 tokens": changed("layout/row_length", 2**60),
    "a vocabulary of 2^60": changed("codec/vocab_size", 2**60),
    "k of 2^60": changed("codec/support/k", 2**60),
    "another codec": changed("codec/name", "pickle"),
    "another profile": changed("codec/profile", "pickle"),
    "other chunk codecs": changed("chunk_codecs", [{"name": "numcodecs.pickle"}]),
    "codebook elsewhere": changed("codec/codebook", "../../../../etc"),
    "knots that are text": changed("codec/knots", ["../x"]),
    "a key that no manifest has": changed("shards", 7),
    "rows of 2^70": changed("layout/rows", 2**70),
    "identity that is no table": changed("identity", []),
    "a list": lambda document: [document],
    "deep": deep,
    "a number of 5,000 digits": lambda document: b'{"format_version": ' + b"9" * 5000 + b"}",
    "not UTF-8": lambda document: b'{"\xff": 1}',
}
HOSTILE_RECORDS: dict[str, Callable[[Any], Any]] = {
    "a size of 2^60": changed("size", 2**60),
    "a size that is text": changed("size", "1"),
    "an index at 2^60": changed("index/offset", 2**60),
    "an index at 2^70": lambda document: {**document, "size": 2**80, "index": {**document["index"], "offset": 2**70}},
    "an index before the file": changed("index/offset", -1),
    "an index of 2^60 bytes": lambda document: {
        **document,
        "size": 2**61,
        "index": {**document["index"], "length": 2**60},
    },
    "an index elsewhere": changed("index/offset", 0),
    "a digest that is none": changed("index/sha256", 7),
    "no index": changed("index", {}),
    "an index that is a list": changed("index", []),
    "positions as text": changed("positions", "7"),
    "NaN": changed("teacher_nats", float("nan")),
    "of another shard": changed("shard", 1),
    "deep": deep,
    "a list": lambda document: [],
}


def replace_json(file: Path, change: Callable[[Any], Any]) -> None:
    """As somebody does it who knows the format: digests are made to fit."""
    value = change(json.loads(file.read_text()))
    if isinstance(value, dict) and "record_sha256" in value:
        value["record_sha256"] = json_digest({k: v for k, v in value.items() if k != "record_sha256"})
    if isinstance(value, dict) and "identity_digest" in value and isinstance(value.get("identity"), dict):
        value["identity"] = {**value["identity"], "codec": value.get("codec")}
        value["identity_digest"] = json_digest(value["identity"])
    file.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


@pytest.mark.parametrize("which", ["manifest", "record"])
def test_hostile_files_are_refused(tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit 4, and nothing is read elsewhere or made as large as they say."""
    cache = tmp_path / "cache"
    make_cache(cache, rows=6, length=8, shard_rows=2)
    file = cache / ("manifest.json" if which == "manifest" else "shards/00000.json")
    original = file.read_bytes()
    for name, change in (HOSTILE_MANIFESTS if which == "manifest" else HOSTILE_RECORDS).items():
        replace_json(file, change)
        capsys.readouterr()
        code = main(["verify", str(cache)])
        shown = capsys.readouterr()
        errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert code == 4 and len(errors) == 1 and len(errors[0]) < 1500, f"{name}: {code} {shown.err[:500]}"
        with pytest.raises((CorruptError, MismatchError)):
            reader = LogitCache(cache)
            reader.batch(np.arange(len(reader)))
        file.write_bytes(original)
    assert main(["verify", str(cache)]) == 0


def test_no_pickle_is_read(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a cache; and of the checkpoints that are the run's own, with torch's restricted reader only."""
    import pickle

    def refuse(*args: object, **kwargs: object) -> object:
        raise AssertionError("a pickle is read")

    loaded: list[bool] = []
    load = torch.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        loaded.append(kwargs.get("weights_only") is True)
        return load(*args, **kwargs)

    shutil.copytree(recipe.parent / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/students/student/final")
    shutil.rmtree(tmp_path / "run/students/student/checkpoints/checkpoint-10")
    for file in (tmp_path / "run").rglob("*"):
        if file.suffix in (".bin", ".pkl", ".pickle", ".npy"):
            assert file.name == "training_args.bin", f"{file} is a pickle"
            file.write_bytes(b"not read")
    monkeypatch.setattr(torch, "load", watched)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    Rows(LogitCache(tmp_path / "run/cache"))
    assert main(["train", str(recipe), "--set", f"run_dir={tmp_path / 'run'}"]) == 0
    assert loaded and all(loaded)


def test_weights_that_are_pickles_are_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Teacher and student."""
    other = tmp_path / "other"
    shutil.copytree(recipe.parent / "teacher", other)
    weights = other / "model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), other / "pytorch_model.bin")
    weights.unlink()
    options = ["--set", f"run_dir={tmp_path / 'run'}"]
    prepared_copy(recipe, tmp_path / "run")
    assert main(["cache", str(recipe), *options, "--set", f"teacher.model={other}"]) == 2
    assert "safetensors" in capsys.readouterr().err
    shutil.copytree(recipe.parent / "run/cache", tmp_path / "run/cache", dirs_exist_ok=True)
    assert main(["train", str(recipe), *options, "--set", f"students.student.model={other}"]) == 2
    assert "safetensors" in capsys.readouterr().err
