"""Stage one on a device: its reduction by the size of the vocabulary, and all of it over the bare forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ..capture.teacher_pass import TeacherPass
from ..models.teacher import chunk_positions
from ..store.reader import LogitCache
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support
from .gpu_check_inputs import KNOTS, Inputs, Sizes, peaked_logits
from .host_waits import host_waits
from .kernel_times import kernel_times
from .timing import device_seconds, in_turns, peak_bytes, ratios, seconds_of, wait_for


def check_reduction(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Microseconds of the device per position, by vocabulary, of logits in half precision; the product is that of the
    largest model's output layer, whose logits these would be, and `over_product` that of its own vocabulary."""
    found: dict[str, Any] = {}
    count, width = sizes.positions, max(shape.hidden_size for shape in sizes.shapes.values())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for size in sizes.vocabularies:
        logits_NV = peaked_logits(count, size, dtype, device)
        hidden_ND = torch.randn(count, width, device=device, dtype=dtype)
        weight_DV = torch.randn(size, width, device=device, dtype=dtype).T
        room_NV, seeds_N = torch.empty_like(logits_NV), torch.arange(count, device=device)

        def reduce(
            support: Support, logits_NV: torch.Tensor = logits_NV, seeds_N: torch.Tensor = seeds_N
        ) -> SparseTargets:
            return SparseTargets.from_logits(logits_NV, support=support, knots=KNOTS, seed=seeds_N)

        supports = sizes.supports | {"topk, k = 16": Support("topk", k=min(16, size - 1))}
        if size > 1024:
            supports |= {"topk, k = 512": Support("topk", k=512)}
        jobs: dict[str, Callable[[], Any]] = {name: partial(reduce, one) for name, one in supports.items()}
        jobs["output layer's product"] = partial(torch.mm, hidden_ND, weight_DV, out=room_NV)
        jobs["log_softmax in float32"] = partial(torch.log_softmax, logits_NV, -1, dtype=torch.float32)
        with torch.inference_mode():
            seconds = in_turns(jobs, sizes.repeats, partial(device_seconds, device=device))
            launching = min(seconds_of(jobs["topk"]) for _ in range(sizes.repeats))
            wait_for(device)
            peak = peak_bytes(jobs["topk"], device)
            waits = host_waits(jobs["topk"], device, [logits_NV])
        told: dict[str, Any] = {name: 1e6 * median(taken) / count for name, taken in seconds.items()}
        told["launching topk"] = 1e6 * launching / count
        told["over_product"] = median(ratios(seconds["topk"], seconds["output layer's product"]))
        found[str(size)] = told | {"peak_MiB": peak / 2**20, "host_waits": dict(waits)}
    found["over_product"] = found[str(sizes.vocabularies[1])]["over_product"]
    with torch.inference_mode():
        found["kernels"] = kernel_times(jobs["topk"], device)
    return found


def check_stage_one(inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Stage one over the forward pass and the logits of the same rows, in the same layout and attention.

    Of stage one it is the second half of the rows: what begins and ends a run takes as long for any corpus, which is
    more than the forward pass of these few rows, and is in `seconds_of_a_run`.
    """
    teacher, sizes, device = inputs.teacher, inputs.sizes, inputs.device
    maker, batches = inputs.maker, [inputs.rows(numbers) for numbers in inputs.maker.batches()]
    codec = maker.learned[0]
    run = TeacherPass(teacher, codec.support, codec.knots, basis=inputs.basis)

    @torch.inference_mode()
    def bare() -> None:
        for input_ids, segment_ids, _ in batches:
            hidden_ND = teacher.hidden(input_ids, segment_ids).flatten(0, 1)
            chunk = chunk_positions(hidden_ND)
            for first in range(0, len(hidden_ND), chunk):
                teacher.output_layer.logits(hidden_ND[first : first + chunk])
        wait_for(device)

    @torch.inference_mode()
    def mixed() -> None:
        for input_ids, _, _ in batches:
            teacher.model.base_model(input_ids=input_ids.to(device, non_blocking=True), use_cache=False)
        wait_for(device)

    def reduced() -> None:
        for batch in batches:
            run(*batch)
        wait_for(device)

    jobs: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "body alone, documents not kept apart": mixed,
        "with reduction": reduced,
        "half of stage one": lambda: maker.capture(folder, num_tasks=2),
        "stage one": lambda: maker.capture(folder),
    }
    seconds = in_turns(jobs, sizes.repeats)
    pairs = zip(seconds["stage one"], seconds.pop("half of stage one"), strict=True)
    run_seconds, seconds["stage one"] = seconds["stage one"], [2 * (whole - half) for whole, half in pairs]
    tokens = sizes.rows * sizes.row_length
    one = partial(run, *batches[0])
    cache = maker.cache(folder)
    return {
        "teacher": str(teacher.placement),
        "tokens_per_second": {name: tokens / median(taken) for name, taken in seconds.items()},
        "reduced_over_bare": median(ratios(seconds["with reduction"], seconds["bare"])),
        "stage_one_over_bare": median(ratios(seconds["stage one"], seconds["bare"])),
        "seconds_of_a_run": run_seconds,
        "runs": seconds,
        "peak_MiB": peak_bytes(reduced, device) / 2**20,
        "host_waits": dict(host_waits(one, device, teacher.model.parameters())),
        "kernels": kernel_times(one, device),
        "bytes_per_position": cache.bytes / cache.positions,
        "read_back": _read_back(inputs, run, folder),
    }


def _read_back(inputs: Inputs, run: TeacherPass, folder: Path) -> dict[str, Any]:
    """Whether the committed cache holds the ids that the teacher gives now."""
    numbers = np.arange(min(inputs.sizes.batch_rows, inputs.sizes.rows))
    targets = run(*inputs.rows(numbers)).targets.to("cpu").flatten()
    stored = LogitCache(folder).batch(numbers)["targets"].flatten()
    kept = stored.mask
    given, read = (part.token_ids[kept].sort(-1).values for part in (targets, stored))
    same = float((given == read).all(-1).double().mean())
    return {"right": same > 0.99, "same": same}
