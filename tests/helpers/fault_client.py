"""Commands in forked processes that start at once, and what a test asks of the runs that they leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from logit_cache import LogitCache

from tests.conftest import REPOSITORY, files_of


@dataclass(frozen=True)
class Ended:
    code: int
    calls: int
    output: str
    shards: list[str]
    """"side shard" for each that the teacher ran over."""


class Server:
    """Commands in processes of their own, without the seconds that imports take."""

    def __init__(self, folder: Path, teacher: Path, shim: Path | None = None) -> None:
        folder.mkdir()
        self._folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"LD_PRELOAD": str(shim)} if shim else {})}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fault_server", str(teacher)],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while not (line := self._process.stdout.readline()).startswith("{"):
            assert line, "the server of the tests has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, *command: str, **options: Any) -> int:
        """The id of a new process that runs a command; `wait` for it before the next."""
        assert self._process.stdin is not None
        (self._folder / "trace").write_text("")
        request = {"command": command, "output": str(self._folder / "output"), "trace": str(self._folder / "trace")}
        self._process.stdin.write(json.dumps({**request, **options}) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["pid"])

    def wait(self) -> Ended:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        shards = (self._folder / "trace").read_text().splitlines()
        return Ended(answer["code"], answer["calls"], (self._folder / "output").read_text(), shards)

    def run(self, *command: str, **options: Any) -> Ended:
        self.start(*command, **options)
        return self.wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def records(run: Path) -> dict[str, tuple[int, int]]:
    """Every commit record of a run, and what tells whether it was written again."""
    found = {}
    for side in ("cache", "heldout"):
        for file in (run / side / "shards").glob("*.json"):
            found[f"{side} {int(file.stem)}"] = (file.stat().st_mtime_ns, file.stat().st_ino)
    return found


def prepared_copy(recipe: Path, folder: Path) -> list[str]:
    """The options that send a run to another directory, with its rows there already."""
    for side in ("cache", "heldout"):
        shutil.copytree(recipe.parent / "run" / side / "corpus", folder / side / "corpus")
    return ["--set", f"run_dir={folder}"]


def same_caches(one: Path, other: Path) -> bool:
    return all(files_of(one / side) == files_of(other / side) for side in ("cache", "heldout"))


class Rows:
    """All that a student can see of a cache."""

    def __init__(self, cache: LogitCache) -> None:
        batch = cache.batch(np.arange(len(cache)))
        targets = batch["targets"]
        self.tensors = [batch["input_ids"], batch["labels"], batch["segment_ids"]]
        self.tensors += [targets.token_ids, targets.log_probs, targets.tail_curve, targets.mask]
        self.tensors += [part for part in (targets.label_log_probs, targets.tail_coordinates) if part is not None]
        if targets.basis is not None:
            self.tensors.append(targets.dense(2.0))
        if targets.label_log_probs is not None:
            self.tensors.append(torch.from_numpy(cache.teacher_losses()))

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Rows)
        return all(torch.equal(a, b) for a, b in zip(self.tensors, other.tensors, strict=True))
