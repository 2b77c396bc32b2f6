"""Compiled loops work wherever they can be kept, or cannot, and however damaged what was kept is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from logit_cache.base import kernels

from tests.conftest import REPOSITORY

MODULE = """
import numpy as np
from logit_cache.base.kernels import compiled, in_threads

@compiled
def total(values):
    sum = 0
    for value in values:
        sum += value
    return sum

if __name__ == "__main__":
    import counted
    print(counted.total(np.arange(10)))
"""


def run(folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "counted.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / ".src"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_loops_are_kept_and_what_is_damaged_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one process; what it has kept is damaged, and read by this one, whose module is new each time."""
    (tmp_path / "counted.py").write_text(MODULE)
    assert run(tmp_path) == "45"
    monkeypatch.syspath_prepend(tmp_path)
    kept = list((tmp_path / "__pycache__").glob("counted.total*"))
    assert {file.suffix for file in kept} == {".nbi", ".nbc"}
    for damage in (
        b"",
        b"nonsense",
        b"cnowhere\nthing\n.",
    ):  # the last is a pickle of what is in a module that is not there
        for file in kept:
            file.write_bytes(damage)
            monkeypatch.delitem(sys.modules, "counted", raising=False)
            counted = import_module("counted")
            assert counted.total(np.arange(10)) == 45
            assert not counted.total.dispatcher.stats.cache_hits


@pytest.mark.slow
def test_no_place_to_keep_them_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(MODULE)
    # A file where the folder would be, so that not even root can make it.
    (tmp_path / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    home = str(tmp_path / "home")
    assert run(tmp_path, HOME=home, XDG_CACHE_HOME=home, PYTHONDONTWRITEBYTECODE="1") == "45"


def test_pieces_are_all_done_and_errors_come_through() -> None:
    import torch
    from logit_cache.base.kernels import in_threads

    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            done: list[int] = []
            in_threads(lambda start, stop, done=done: done.extend(range(start, stop)), 23, 5)
            assert sorted(done) == list(range(23))
            in_threads(lambda start, stop: pytest.fail("nothing to do"), 0, 5)
            with pytest.raises(ZeroDivisionError):
                in_threads(lambda start, stop: start // 0, 23, 5)
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_torch_takes_the_place_of_triton(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton builds what launches its kernels when the first one is launched."""
    runtime = pytest.importorskip("triton.runtime")

    class Driver:
        compiler = False

        @property
        def active(self) -> object:
            if not self.compiler:
                raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")
            return self

    driver = Driver()
    monkeypatch.setattr(runtime, "driver", driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for answer in (False, True):
        driver.compiler = answer
        kernels._triton_launches.cache_clear()
        assert kernels.triton_runs_on.__wrapped__(torch.device("cuda", 0)) is answer
    kernels._triton_launches.cache_clear()
    (told,) = caplog.messages
    assert "Failed to find C compiler" in told and "python3-dev" in told
