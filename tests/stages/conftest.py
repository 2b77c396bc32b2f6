"""A run that nothing happens to, and a server that runs commands beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from logit_cache.stages.app import main

from tests.helpers.fault_client import Server
from tests.helpers.tiny import make_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards and a held-out one, cached and trained by one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("faults")
    changes = {"cache__shard_rows": 8, "train__steps": 10, "train__batch_rows": 4, "train__save_steps": 2}
    file = make_recipe(folder, **changes)
    for command in ("prepare", "cache", "train"):
        assert main([command, str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def server(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "one", recipe.parent / "teacher")
    yield running
    running.close()
