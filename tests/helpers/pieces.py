"""Stand-ins for the sections of a check, which fail in every way; their process imports nothing large."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


class Pieces:
    """Each says which process it runs in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str) -> dict[str, Any]:
        if name == "supports":
            raise ValueError("as the driver says:\nnothing")
        if name == "losses":
            os._exit(7)
        if name == "step-1B":
            time.sleep(3600)
        return {"process": os.getpid(), "part": {"right": name != "reduction"}}
