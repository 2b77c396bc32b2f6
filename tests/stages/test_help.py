"""What a newcomer reads first: the first commands, and an example in every command's help that its own parser accepts."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer
from logit_cache.stages.app import EXAMPLES, app, main
from typer.testing import CliRunner

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_without_arguments_the_first_commands_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().err
    first = [line.split()[1] for line in shown.splitlines() if line.startswith("  logit-cache ")]
    assert first == ["prepare", "cache", "train", "evaluate"]
    assert "Traceback" not in shown and set(first) <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_parses(name: str) -> None:
    shown = " ".join(CliRunner().invoke(app, [name, "--help"]).output.split())
    assert f"Usage: logit-cache {name}" in shown or f"Usage: root {name}" in shown
    example = shown.rpartition("Example: logit-cache ")[2]
    command, *arguments = shlex.split(example)
    assert command == name
    context = COMMANDS[name].make_context(name, arguments)  # raises for what the command does not take
    assert context.params


def test_every_command_is_there_once() -> None:
    assert len(COMMANDS) == len(EXAMPLES)
