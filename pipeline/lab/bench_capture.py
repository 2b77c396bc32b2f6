"""Stage one against the bare forward pass, and the decoded targets against the exact ones."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..assess.fidelity import TEMPERATURES
from ..assess.target_error import Group, Shapes, States, target_errors
from ..base.errors import PipelineError
from ..capture.teacher_pass import TeacherPass
from ..corpus.labels import IGNORE
from ..recipe.schema import Recipe
from ..store.reader import LogitCache
from ..targets.knots import serves
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import row_seeds
from .scratch_cache import CacheMaker
from .timing import in_turns, ratios, wait_for


def measure_capture(maker: CacheMaker, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Stage one over `model(input_ids).logits` of the same batches, and its speed."""
    inputs = [torch.from_numpy(maker.corpus.take(rows)[0]).long() for rows in maker.batches()]
    teacher = maker.teacher

    @torch.inference_mode()
    def bare() -> None:
        for input_ids in inputs:
            teacher.model(input_ids=input_ids.to(teacher.placement.device)).logits  # noqa: B018
        wait_for(teacher.placement.device)

    seconds = in_turns({"bare": bare, "stage one": lambda: maker.capture(folder)}, rounds)
    positions = maker.corpus.rows * maker.corpus.row_length
    return {
        "capture_overhead": ratios(seconds["stage one"], seconds["bare"]),
        "capture_tokens_per_second": [positions / s for s in seconds["stage one"]],
    }


def measure_size(recipe: Recipe, cache: LogitCache) -> dict[str, list[float]]:
    """Bytes per position of the recipe's own cache where it is finished, else of `cache`."""
    with suppress(PipelineError):
        cache = LogitCache(recipe.paths.cache)
    return {"bytes_per_position": [cache.bytes / cache.positions]}


def measure_rounding(maker: CacheMaker, cache: LogitCache) -> dict[str, list[float]]:
    """KL and error of the tail's mass of decoded targets against exact ones, and of targets with a shape the KL over
    the whole vocabulary, batch by batch."""
    served = [t for t in TEMPERATURES if serves(t, maker.codec.knots)]
    names = ("kl", "whole_kl") if maker.codec.coordinates is not None else ("kl",)
    figures: dict[str, list[float]] = {f"{name}_T{t:g}": [] for name in names for t in served}
    if 2.0 in served:
        figures["tail_mass_error_T2"] = []
    run = TeacherPass(maker.teacher, maker.codec.support, maker.codec.knots)
    for rows in maker.batches():
        batch = cache.batch(rows)
        # The draws of the cache.
        seeds = row_seeds(cache.manifest.identity.get("seed", 0), rows, cache.row_length)
        result = run(batch["input_ids"], batch["segment_ids"], batch["labels"], seeds=seeds)
        exact = result.targets.to("cpu").flatten()[batch["labels"].flatten() != IGNORE]
        decoded = batch["targets"].flatten()[batch["targets"].mask.flatten()]
        for temperature in served:
            kl_N, error_N = divergence(exact, decoded, temperature)
            figures[f"kl_T{temperature:g}"].append(float(kl_N.mean()))
            if temperature == 2.0:
                figures["tail_mass_error_T2"].append(float(error_N.mean()))
        if decoded.tail_coordinates is not None and decoded.basis is not None:
            device = result.hidden_BLD.device
            shapes = Shapes(decoded.tail_coordinates.to(device), decoded.basis.to(device))
            teacher = States(result.hidden_BLD[result.targets.mask], maker.teacher.output_layer)
            group = Group(shapes, [decoded.to(device)], [])
            for temperature, kl in target_errors(teacher, {}, [group], served)[0][0].kl.items():
                figures[f"whole_kl_T{temperature:g}"].append(kl)
    return figures


def divergence(exact: SparseTargets, decoded: SparseTargets, temperature: float) -> tuple[Tensor, Tensor]:
    """KL_T [N] of exact to decoded targets of the same supports, and the error of the tail's mass [N].

    The head's tokens count one by one and the tail as a whole; samples, which resolve the tail, are left out.
    """
    log_p_NK, log_tail_N = (part.double() for part in exact.at_temperature(temperature))
    log_q_NK, log_q_tail_N = (part.double() for part in decoded.at_temperature(temperature))
    # Decoding orders the entries of a level by id: bring both to one order, entries outside the head last.
    log_p_NK, log_q_NK = (
        log_NK.gather(-1, torch.where(targets.head_mask, targets.token_ids, targets.vocab_size).argsort(-1))
        for log_NK, targets in ((log_p_NK, exact), (log_q_NK, decoded))
    )
    width = min(log_p_NK.shape[-1], log_q_NK.shape[-1])
    log_p_NK, log_q_NK = log_p_NK[:, :width], log_q_NK[:, :width]
    p_NK, p_tail_N = log_p_NK.exp(), log_tail_N.exp()
    on_head = torch.where(p_NK > 0, p_NK * (log_p_NK - log_q_NK), 0.0).sum(-1)
    on_tail = torch.where(p_tail_N > 0, p_tail_N * (log_tail_N - log_q_tail_N), 0.0)
    return on_head + on_tail, (p_tail_N - log_q_tail_N.exp()).abs()
