"""What is committed is checked, and how far the check is shows. Damage of all kinds is in tests/stages/test_damage.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from logit_cache.base import progress
from logit_cache.stages.app import main

from tests.helpers.synthetic import make_cache


def test_verify_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path / "cache", rows=8, shard_rows=4)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert main(["verify", str(cache.path)]) == 0
    assert "verify cache: 50 %  1 of 2 shards" in capsys.readouterr().out
