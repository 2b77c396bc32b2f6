"""The check of a GPU: is what it computes right, and what do both stages cost on it beside the bare model?

Without a GPU the same sections run on tiny shapes on the CPU, as a *dry run*: every line of the check runs, and no
figure of it means anything. A section that fails leaves its error in the result, and the others go on.
"""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..base.errors import RecipeError, first_line
from .gpu_check_capture import check_reduction, check_stage_one
from .gpu_check_correct import check_losses, check_supports
from .gpu_check_inputs import DRY, REAL, Inputs, Sizes
from .gpu_check_step import check_step
from .timing import in_turns, wait_for

SECTIONS = ("machine", "supports", "losses", "reduction", "stage-one-135M", "stage-one-1B", "step-135M", "step-1B")
BUDGET = 340.0
"""Seconds after which no section is begun."""
_PACKAGES = ("torch", "triton", "transformers", "liger_kernel")


@dataclass(frozen=True)
class Figure:
    """A figure with the values that it must and should have."""

    name: str
    must: float
    aim: float
    find: Callable[[dict[str, Any], Sizes], float]
    """From the sections' results; KeyError where its section did not run."""


FIGURES = (
    Figure(
        "stage one over the bare forward, 1B teacher, V = 128k",
        1.10,
        1.03,
        lambda found, _: found["stage-one-1B"]["stage_one_over_bare"],
    ),
    Figure(
        "reduction over the output layer's own product, V = 128k",
        1.0,
        0.3,
        lambda found, sizes: found["reduction"][str(sizes.vocabularies[1])]["over_product"],
    ),
    Figure(
        "student step (1B, shape or bucket) over the CE step with the same fused head",
        1.05,
        1.01,
        lambda found, _: found["step-1B"]["step_over_ce"],
    ),
    Figure("the same over model(labels=...): time", 1.0, 0.8, lambda found, _: found["step-1B"]["step_over_hf"]),
    Figure("the same over model(labels=...): memory", 0.5, 0.25, lambda found, _: found["step-1B"]["memory_over_hf"]),
    Figure(
        "host waits per batch of stage one",
        0.0,
        0.0,
        lambda found, _: float(sum(found["stage-one-1B"]["host_waits"].values())),
    ),
    Figure(
        "host waits per step of a student",
        0.0,
        0.0,
        lambda found, _: float(sum(found["step-1B"]["host_waits"].values())),
    ),
    Figure("share of a step that waits for the loader", 0.02, 0.002, lambda found, _: found["step-1B"]["data_wait"]),
)


def check_gpu(
    folder: Path, only: Sequence[str] = (), on_section: Callable[[dict[str, Any]], None] = lambda result: None
) -> dict[str, Any]:
    """Run the sections, `only` some of them, and give their results, the figures, and whether all is right.

    `folder` takes rows and caches. `on_section` is called with the result so far after every section. Raises
    RecipeError for an unknown section.
    """
    unknown = [name for name in only if name not in SECTIONS]
    if unknown:
        raise RecipeError(f"--only {unknown[0]!r}: one of {', '.join(SECTIONS)}")
    gpu = torch.cuda.is_available()
    device, sizes = (
        torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"),
        REAL if gpu else DRY,
    )
    result: dict[str, Any] = {"dry_run": not gpu, "device": device_name(device), "versions": versions(), "sections": {}}
    begin = time.perf_counter()
    for name, run in _sections(sizes, device, folder):
        if only and name not in only:
            continue
        started = time.perf_counter()
        if started - begin > BUDGET:
            result["sections"][name] = {"error": "not begun: out of time"}
            continue
        try:
            found = run()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {first_line(error)}", "trace": traceback.format_exc()[-2000:]}
        result["sections"][name] = found | {"seconds": time.perf_counter() - started}
        if gpu:
            torch.cuda.empty_cache()
        on_section(result)
    result["figures"] = {figure.name: _value(figure, result["sections"], sizes) for figure in FIGURES}
    result["wrong"] = list(_wrong(result["sections"]))
    result["seconds"] = time.perf_counter() - begin
    return result


def _sections(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "machine", partial(_machine, sizes, device)
    yield "supports", partial(check_supports, sizes, device)
    yield "losses", partial(check_losses, sizes, device)
    yield "reduction", partial(check_reduction, sizes, device)
    # The teacher of a model's rows makes the cache of its student's steps.
    for name in sizes.shapes:
        inputs = Inputs(name, sizes, device, folder / name)
        yield f"stage-one-{name}", partial(check_stage_one, inputs, folder / f"cache-{name}")
        yield f"step-{name}", partial(check_step, inputs, folder / f"cache-{name}")


def _machine(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """What the card itself does: its copies and its products in half precision."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 64
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    memory = torch.ones(2**30 if gpu else 2**12, dtype=torch.uint8, device=device)

    def finished(job: Callable[[], Any]) -> None:
        job()
        wait_for(device)

    jobs: dict[str, Callable[[], Any]] = {
        "product": partial(finished, lambda: matrix @ matrix),
        "copy": partial(finished, memory.clone),
    }
    seconds = {name: min(taken) for name, taken in in_turns(jobs, sizes.repeats).items()}
    found: dict[str, Any] = {
        "TFLOP_per_second": 2 * size**3 / seconds["product"] / 1e12,
        "copied_GB_per_second": 2 * memory.numel() / seconds["copy"] / 1e9,
        "cores": os.cpu_count(),
    }
    if gpu:
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_GiB": properties.total_memory / 2**30, "processors": properties.multi_processor_count}
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Package -> version, None where it is not installed."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: installed(name) for name in _PACKAGES}


def _value(figure: Figure, found: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    try:
        value: float | None = figure.find(found, sizes)
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
