"""The check of a GPU: is what it computes right, and what do both stages cost on it beside the bare model?

Without a GPU the same sections run on tiny shapes on the CPU, as a *dry run*: every line of the check runs, and no
figure of it means anything. A section that fails leaves its error in the result, and the others go on (`apart`).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..base.errors import RecipeError
from .apart import Apart

SECTIONS = ("machine", "supports", "losses", "reduction", "stage-one-1B", "step-1B", "stage-one-135M", "step-135M")
"""In this order: what the figures need comes first."""
LIMIT, DRY_LIMIT = 350.0, 3600.0
"""Seconds of all sections on a GPU, and in a dry run; what is not measured by then is left out."""
_PACKAGES = ("torch", "triton", "transformers", "liger_kernel")


@dataclass(frozen=True)
class Figure:
    """A figure with the values that it must and should have."""

    name: str
    must: float
    aim: float
    find: Callable[[dict[str, Any]], float]
    """From the sections' results; KeyError where its section did not run."""


FIGURES = (
    Figure(
        "stage one over the bare forward, 1B teacher, V = 128k",
        1.10,
        1.03,
        lambda found: found["stage-one-1B"]["stage_one_over_bare"],
    ),
    Figure(
        "reduction over the output layer's own product, V = 128k",
        1.0,
        0.3,
        lambda found: found["reduction"]["over_product"],
    ),
    Figure(
        "student step (1B, shape or bucket) over the CE step with the same fused head",
        1.05,
        1.01,
        lambda found: found["step-1B"]["step_over_ce"],
    ),
    Figure("the same over model(labels=...): time", 1.0, 0.8, lambda found: found["step-1B"]["step_over_hf"]),
    Figure("the same over model(labels=...): memory", 0.5, 0.25, lambda found: found["step-1B"]["memory_over_hf"]),
    Figure(
        "host waits per batch of stage one",
        0.0,
        0.0,
        lambda found: float(sum(found["stage-one-1B"]["host_waits"].values())),
    ),
    Figure(
        "host waits per step of a student",
        0.0,
        0.0,
        lambda found: float(sum(found["step-1B"]["host_waits"].values())),
    ),
    Figure("share of a step that waits for the loader", 0.02, 0.002, lambda found: found["step-1B"]["data_wait"]),
)


def check_gpu(
    folder: Path,
    only: Sequence[str] = (),
    on_section: Callable[[dict[str, Any]], None] = lambda result: None,
    limit: float | None = None,
) -> dict[str, Any]:
    """Run the sections, `only` some of them, and give their results, the figures, and whether all is right.

    `folder` takes rows and caches. `on_section` is called with the result so far after every section, and none goes on
    after `limit` seconds, by default `LIMIT` or `DRY_LIMIT`. Raises RecipeError for an unknown section.
    """
    unknown = [name for name in only if name not in SECTIONS]
    if unknown:
        raise RecipeError(f"--only {unknown[0]!r}: one of {', '.join(SECTIONS)}")
    gpu = torch.cuda.is_available()
    limit = (LIMIT if gpu else DRY_LIMIT) if limit is None else limit
    result: dict[str, Any] = {
        "dry_run": not gpu,
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "versions": versions(),
        "sections": {},
    }
    begin = time.perf_counter()
    with Apart(partial(_sections_in, folder)) as apart:
        for name in (name for name in SECTIONS if not only or name in only):
            started = time.perf_counter()
            left = begin + limit - started
            found = apart.run(name, left) if left > 0 else {"error": "not begun: out of time"}
            result["sections"][name] = found | {"seconds": time.perf_counter() - started}
            on_section(result)
    result["figures"] = {figure.name: _value(figure, result["sections"]) for figure in FIGURES}
    result["wrong"] = list(_wrong(result["sections"]))
    result["seconds"] = time.perf_counter() - begin
    return result


def _sections_in(folder: Path) -> Callable[[str], dict[str, Any]]:
    from .gpu_check_sections import Sections  # the process that only waits for them needs no model

    return Sections(folder)


def versions() -> dict[str, str | None]:
    """Package -> version, None where it is not installed."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: installed(name) for name in _PACKAGES}


def _value(figure: Figure, found: dict[str, Any]) -> dict[str, Any]:
    try:
        value: float | None = figure.find(found)
    except KeyError:  # its section did not run, or failed
        value = None
    return {"value": value, "must": figure.must, "aim": figure.aim}


def _wrong(found: Any, where: str = "") -> Iterator[str]:
    """Names of what is not right, and of sections that failed."""
    if isinstance(found, dict):
        if "error" in found:
            yield f"{where}: {found['error']}"
        elif found.get("right") is False:
            yield where
        for name, part in found.items():
            yield from _wrong(part, f"{where}: {name}" if where else name)
