"""Provenance of a run: versions, commit, command and time, for whoever reads its directory years later."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "logit-cache",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "pyarrow",
    "zarr",
    "numcodecs",
    "pcodec",
    "numpy",
    "peft",
)


def provenance() -> dict[str, Any]:
    """Versions of the packages that compute, the commit of this code (None outside a checkout), command and time."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_clean": None if changes is None else not changes,
        "command": sys.argv,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the checkout of this file; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
