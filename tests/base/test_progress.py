"""The line of a long job: in a log, in a notebook and, with Ctrl-C, on a terminal."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from logit_cache.base import progress
from logit_cache.base.progress import Meter
from logit_cache.stages.app import main

from tests.helpers.tiny import make_recipe

LINE = r"job: 50 %  1,000 of 2,000 tokens  [\d,.e+]+ tokens/s  \d+:\d\d left  loss 1.5"


def test_a_log_has_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Meter("job", 2000) as meter:
        for second in range(1, 101):
            clock[0] = float(second)
            meter.advance(20, "loss 1.5")
    assert [record.getMessage().partition("%")[0] for record in caplog.records] == ["job: 30 ", "job: 60 ", "job: 90 "]
    assert caplog.messages[0] == "job: 30 %  600 of 2,000 tokens  20 tokens/s  1:10 left  loss 1.5"


def test_a_total_that_is_not_known_has_no_share(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Meter("job", None, "rows") as meter:
        meter.advance(7)
    assert re.fullmatch(r"job: 7 rows  [\d,.e+]+ rows/s", caplog.messages[0])


def test_a_notebook_has_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, str]] = []

    class Handle:
        def __init__(self) -> None:
            self.number = len({number for number, _ in shown})

        def update(self, data: dict[str, str], *, raw: bool) -> None:
            shown.append((self.number, data["text/plain"]))

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        handle = Handle()
        handle.update(data, raw=raw)
        return handle

    shell, screen = ModuleType("IPython"), ModuleType("IPython.display")
    shell.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    screen.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", screen)
    with Meter("job", 2000) as meter:
        meter.advance(1000, "loss 1.5")
    assert [number for number, _ in shown] == [0, 0]
    assert re.fullmatch(LINE, shown[0][1]) and shown[1][1] == "job: 1,000 tokens in 0:00"


@pytest.mark.slow
def test_ctrl_c_leaves_the_terminal_clean_and_says_how_to_go_on(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, train__steps=100_000, train__save_steps=100_000)
    for command in ("prepare", "cache"):
        assert main([command, str(recipe)]) == 0
    keyboard, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    command = [sys.executable, "-m", "logit_cache", "train", str(recipe)]
    process = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "140"},
        preexec_fn=_own_terminal,
    )
    screen = b""
    while not re.search(rb"step \d+ of 100000", screen):
        more = _read(keyboard, process)
        assert more, f"the training ended by itself: {screen.decode()}"
        screen += more
    os.write(keyboard, b"\x03")
    while True:
        ready = _read(keyboard, process)
        if not ready:
            break
        screen += ready
    assert process.wait() == 130
    assert termios.tcgetattr(terminal) == before
    text = screen.decode()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > 0  # the cursor was hidden, and is back
    assert "Traceback" not in text
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).strip().splitlines()[-1]
    assert last == f"error: interrupted: what was finished stays; to go on: logit-cache train {recipe}"
    os.close(keyboard)
    os.close(terminal)


def _own_terminal() -> None:
    """Let this process lead a session whose terminal is its standard input, so that Ctrl-C reaches it."""
    import fcntl

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read(keyboard: int, process: Any) -> bytes:
    """What comes next from a terminal; nothing once its process has ended and all is read."""
    import select

    while True:
        if select.select([keyboard], [], [], 0.2)[0]:
            return os.read(keyboard, 4096)
        if process.poll() is not None:
            return b""
