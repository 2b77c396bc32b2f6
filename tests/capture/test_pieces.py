"""What waits between the teacher and the encoding is bounded in bytes, and a thread's GPU is the teacher's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from logit_cache.base.background import Background
from logit_cache.models.placement import choose_placement
from logit_cache.stages.app import main
from logit_cache.store.draft import ShardDraft

from tests.conftest import files_of
from tests.helpers.tiny import make_recipe


@pytest.mark.parametrize("signals", ['["hidden.1", "qk.0:float16"]'])
def test_a_piece_is_as_large_as_its_bytes_allow_and_the_cache_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: str
) -> None:
    recipe, rows = str(make_recipe(tmp_path)), []
    add = ShardDraft.add

    def noted(self: ShardDraft, targets: Any, *rest: Any) -> None:
        rows.append(len(targets))
        add(self, targets, *rest)

    monkeypatch.setattr(ShardDraft, "add", noted)
    largest = []
    for size in (2**28, 1):
        monkeypatch.setattr("logit_cache.capture.shard_pass._PIECE_BYTES", size)
        settings = ["--set", f"run_dir={tmp_path / str(size)}", "--set", f"cache.signals={signals}"]
        assert main(["prepare", recipe, *settings]) == 0
        assert main(["cache", recipe, *settings, "--set", "teacher.batch_rows=2"]) == 0
        largest.append(max(rows))
        rows.clear()
    assert largest == [4, 2], "a whole shard, and one batch"
    assert files_of(tmp_path / str(2**28) / "cache") == files_of(tmp_path / "1/cache")


def test_the_thread_begins_with_what_it_is_given() -> None:
    seen: list[str] = []
    with Background(lambda: seen.append("begin")) as background:
        background.add(lambda: seen.append("first"))
        background.add(lambda: seen.append("second"))
    assert seen == ["begin", "first", "second"]


@pytest.mark.parametrize("hardware", [True, False])
def test_a_gpu_has_bfloat16_where_its_hardware_does(monkeypatch: pytest.MonkeyPatch, hardware: bool) -> None:
    """torch calls emulation support. The chosen GPU becomes the process's own: kernels of Triton go to that one."""
    current: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or hardware
    )
    placement = choose_placement("cuda:1")
    assert placement.dtype == (torch.bfloat16 if hardware else torch.float32)
    assert current == [torch.device("cuda:1")]
