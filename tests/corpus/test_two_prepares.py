"""Several `prepare` of one run at once: the corpus is whole, whatever host names, process numbers and locks say."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from logit_cache.corpus.prepare import prepare_corpus
from logit_cache.corpus.rows import PackedRows
from logit_cache.models.loading import load_tokenizer
from logit_cache.recipe.loading import load_recipe

from tests.base.test_durable import FORK, in_processes, without_locks
from tests.conftest import files_of
from tests.helpers.tiny import make_recipe


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "a file system without locks"])
@pytest.mark.parametrize("killed", [False, True], ids=["clean", "after a killed one"])
def test_several_prepares_at_once(
    tmp_path: Path, locks: bool, killed: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(make_recipe(tmp_path))
    tokenizer = load_tokenizer(recipe.teacher.model)
    prepare_corpus(recipe.model_copy(update={"run_dir": tmp_path / "alone"}), tokenizer, None)
    leftover = tmp_path / "run/cache/corpus.tmp-0123"
    if killed:
        leftover.mkdir(parents=True)
        (leftover / "data-00000-of-00001.arrow").write_bytes(b"half")
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")  # as in containers
    monkeypatch.setattr(os, "getpid", lambda: 1)
    if not locks:
        monkeypatch.setattr(fcntl, "flock", without_locks)
    gate = FORK.Barrier(4)

    def prepare(_: int) -> None:
        gate.wait()
        prepare_corpus(recipe, tokenizer, None)

    assert in_processes(4, prepare) == [0] * 4, capfd.readouterr().err
    for side in ("cache", "heldout"):
        PackedRows(tmp_path / "run" / side / "corpus").verify()
    made = {n: b for n, b in files_of(tmp_path / "run").items() if leftover.name not in n}
    assert made == files_of(tmp_path / "alone")
    assert leftover.exists() == (killed and not locks), "the one who holds the lock cleans up"
