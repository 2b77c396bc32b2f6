"""The parts of a bench and the figures that it returns."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

PARTS = ("capture", "read", "step", "help")


@dataclass
class BenchResult:
    """Figures of a bench, each the median of its runs, and the machine that they were measured on."""

    machine: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, list[float]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return statistics.median(self.runs[name])

    def to_json(self) -> dict[str, Any]:
        return {**{name: self[name] for name in self.runs}, "runs": self.runs, "machine": self.machine}
