"""Students against their teacher on held-out rows; the teacher is known from its held-out cache."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.durable import file_digest, read_json, write_json
from ..base.errors import IncompleteError, RecipeError
from ..base.progress import Meter
from ..corpus.labels import IGNORE
from ..models.loading import load_model
from ..models.output_layer import OutputLayer
from ..models.placement import choose_placement, input_device
from ..models.rows import body_hidden
from ..models.speed import CHUNK_POSITIONS, forward_speed
from ..models.weights import model_bytes
from ..recipe.paths import RunPaths, StudentPaths
from ..recipe.schema import Recipe
from ..store.arrays import RowIndices
from ..store.manifest import Manifest
from ..store.reader import LogitCache
from .measures import Cells

logger = logging.getLogger(__name__)

_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """One line of the result table; means are over positions with a label."""

    perplexity: float
    accuracy: float
    """Share of positions where the model's first choice is the label."""
    kl_to_teacher: float
    """KL(teacher || model) at T = 1 in nats; tokens outside the cached head count as one, which makes it a lower bound."""
    agreement: float
    """Share of positions where the model's first choice is the teacher's."""
    calibration_error: float
    """Expected calibration error of the first choice, 15 equal bins (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    acceptance: float
    """Mean of sum_v min(p_v, q_v): the acceptance rate as a draft in speculative decoding (Leviathan et al. 2023, arXiv
    2211.17192, corollary 3.6). Tokens outside the cached head count as one, which makes it an upper bound.
    """
    parameters: int
    bytes: int
    tokens_per_second: float


class Calibration:
    """Expected calibration error and accuracy, accumulated over batches."""

    def __init__(self) -> None:
        self._sums = np.zeros((_BINS, 3))  # positions, summed confidence, correct

    def add(self, confidence: Tensor, correct: Tensor) -> None:
        bins = (confidence * _BINS).long().clamp(0, _BINS - 1).cpu().numpy()
        for column, values in enumerate((np.ones(len(bins)), confidence.cpu().numpy(), correct.cpu().numpy())):
            self._sums[:, column] += np.bincount(bins, weights=values, minlength=_BINS)

    def add_choices(self, log_q_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Add a model's first choices, which are returned [N]."""
        confidence_N, choice_N = log_q_NV.exp().max(-1)
        self.add(confidence_N, choice_N == labels_N)
        return choice_N

    def accuracy(self) -> float:
        return float(self._sums[:, 2].sum() / max(self._sums[:, 0].sum(), 1))

    def error(self) -> float:
        count, confidence, correct = self._sums.T
        return float(np.abs(confidence - correct).sum() / max(count.sum(), 1))


@dataclass(frozen=True)
class Positions:
    """A model at the N positions of some rows that have labels."""

    rows_N: np.ndarray[Any, np.dtype[np.int64]]
    """The row of each, from 0."""
    labels_N: Tensor
    label_log_p_N: Tensor | None
    """The teacher's log-probability of the label, where the cache keeps it."""
    first_N: Tensor
    """The teacher's first choice."""
    log_q_NV: Tensor
    cells: Cells

    @property
    def nats(self) -> Tensor:
        """[N] -log q of the label."""
        return -self.label_log_q

    @property
    def label_log_q(self) -> Tensor:
        """[N] log q of the label."""
        return self.log_q_NV.gather(-1, self.labels_N.unsqueeze(-1)).squeeze(-1)


@torch.inference_mode()
def compared(
    model: Any, cache: LogitCache, rows: RowIndices, batch_rows: int, advance: Callable[[int], None]
) -> Iterator[Positions]:
    """Run a model over rows of a cache, and give it beside the teacher, some hundred positions at a time.

    `advance` is called with the number of tokens after every batch.
    """
    model.eval()
    device = input_device(model)
    layer = OutputLayer.of(model)
    for first in range(0, len(rows), batch_rows):
        batch = cache.batch(rows[first : first + batch_rows])
        hidden = body_hidden(model, batch["input_ids"].to(device), batch["segment_ids"].to(device))
        keep = torch.nonzero(batch["labels"].flatten() != IGNORE).squeeze(-1)
        places = first + keep.numpy() // cache.row_length
        hidden_ND = hidden.flatten(0, 1)[keep.to(hidden.device)]
        labels_N = batch["labels"].flatten()[keep].to(device)
        targets = batch["targets"].flatten()[keep].to(device).restrict_vocabulary(layer.weight.shape[0])
        for start in range(0, len(labels_N), CHUNK_POSITIONS):
            part = slice(start, start + CHUNK_POSITIONS)
            target, of_labels = targets[part], targets.label_log_probs
            log_q_NV = layer.logits(hidden_ND[part]).to(device).float().log_softmax(-1)
            yield Positions(
                places[part],
                labels_N[part],
                None if of_labels is None else of_labels[part],
                target.token_ids[:, 0],
                log_q_NV,
                Cells.of(target, log_q_NV),
            )
        advance(batch["input_ids"].numel())


def evaluate_student(model: Any, cache: LogitCache, *, batch_rows: int, size: int, title: str) -> Evaluation:
    """Run a model over the held-out rows of `cache`. `size` is its size on disk in bytes."""
    calibration = Calibration()
    sums = torch.zeros(3, dtype=torch.float64)  # cross-entropy, KL, acceptance
    agreed = positions = 0
    with Meter(f"evaluate {title}", len(cache) * cache.row_length) as meter:

        def advance(tokens: int) -> None:
            meter.advance(tokens, f"KL {float(sums[1]) / max(positions, 1):.4f}")

        for some in compared(model, cache, np.arange(len(cache)), batch_rows, advance):
            choice_N = calibration.add_choices(some.log_q_NV, some.labels_N)
            agreed += int((choice_N == some.first_N).sum())
            values = some.nats, some.cells.measure("kl"), some.cells.measure("acceptance")
            sums += torch.stack([value.double().sum() for value in values]).cpu()
            positions += len(some.labels_N)
    ce, kl, acceptance = (sums / max(positions, 1)).tolist()
    return Evaluation(
        perplexity=perplexity(ce),
        accuracy=calibration.accuracy(),
        kl_to_teacher=kl,
        agreement=agreed / max(positions, 1),
        calibration_error=calibration.error(),
        acceptance=acceptance,
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=size,
        tokens_per_second=forward_speed(model, cache.columns(np.arange(min(4, len(cache))))),
    )


def perplexity(nats: float) -> float:
    """exp of a mean of nats; infinite for a model that diverged."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def evaluate_teacher(cache: LogitCache, facts: dict[str, Any]) -> Evaluation:
    """The teacher's line, from its held-out cache and the size and speed that stage one recorded (`facts`)."""
    calibration = Calibration()
    for first in range(0, len(cache), 64):
        batch = cache.batch(np.arange(first, min(first + 64, len(cache))))
        targets, labels = batch["targets"], batch["labels"]
        mask = targets.mask & (labels != IGNORE)
        confidence = targets.at_temperature(1.0)[0][..., 0].exp()
        calibration.add(confidence[mask], (targets.token_ids[..., 0] == labels)[mask])
    return Evaluation(
        perplexity=perplexity(cache.teacher_loss),
        accuracy=calibration.accuracy(),
        kl_to_teacher=0.0,
        agreement=1.0,
        calibration_error=calibration.error(),
        acceptance=1.0,
        parameters=facts["parameters"],
        bytes=facts["bytes"],
        tokens_per_second=facts["tokens_per_second"],
    )


Column = tuple[str, Callable[[float], str]]
"""Title of a measure, and its value as text."""
COLUMNS: dict[str, Column] = {
    "perplexity": ("perplexity", "{:.2f}".format),
    "kl_to_teacher": ("KL to teacher", "{:.4f}".format),
    "agreement": ("top-1 agreement", "{:.1%}".format),
    "calibration_error": ("calibration error", "{:.2%}".format),
    "acceptance": ("acceptance", "{:.1%}".format),
    "parameters": ("parameters", lambda value: f"{value / 1e6:.1f} M"),
    "bytes": ("on disk", lambda value: f"{value / 1e6:,.0f} MB"),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
}


def table(results: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """One row per model, ready to print: title of a column -> text."""
    return [
        {"model": name, **{title: show(values[key]) for key, (title, show) in COLUMNS.items()}}
        for name, values in results.items()
    ]


def evaluate_run(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Evaluate the teacher and every student of a run; writes evaluation.json and skips students that have not changed.

    Raises RecipeError without held-out rows, IncompleteError for a student that is not trained.
    """
    cache = LogitCache(recipe.paths.heldout)
    if not len(cache):
        raise RecipeError("there are no held-out rows to evaluate on: set corpus.heldout_fraction above 0")
    facts_file = recipe.paths.teacher_facts
    facts = read_json(facts_file, "delete it and run `logit-cache cache`")
    if facts is None:
        raise IncompleteError(f"{facts_file} is missing: run `logit-cache cache` first")
    teacher = asdict(evaluate_teacher(cache, facts))
    known = read_evaluation(recipe.paths)
    same_rows = known.get("stamps", {}).get("heldout") == cache.manifest.digest
    stamps: dict[str, str] = {**(known["stamps"] if same_rows else {}), "heldout": cache.manifest.digest}
    results: dict[str, dict[str, float]] = {**(known["results"] if same_rows else {}), "teacher": teacher}
    write_json(recipe.paths.evaluation, {"stamps": stamps, "results": results})
    for name in recipe.students:
        config = recipe.student(name)
        folder = recipe.paths.student(name).final
        if not recipe.paths.student(name).finished:
            raise IncompleteError(f"{folder}: student {name!r} is not trained: run `logit-cache train` first")
        stamp = student_stamp(recipe.paths.student(name).folder)
        if stamps.get(name) == stamp and results.get(name, {}).keys() == teacher.keys():
            logger.info(f"evaluate {name}: done")
            continue
        placement = choose_placement(config.device, config.dtype)
        trust = config.trust_remote_code
        model = load_model(folder, placement, objective=cache.objective, trust_remote_code=trust)
        size = model_bytes(folder)
        evaluation = evaluate_student(model, cache, batch_rows=recipe.evaluation.batch_rows, size=size, title=name)
        results[name], stamps[name] = asdict(evaluation), stamp
        write_json(recipe.paths.evaluation, {"stamps": stamps, "results": results})
    return {name: results[name] for name in ("teacher", *recipe.students)}


def student_stamp(folder: Path) -> str:
    """Identifies a trained student by the digests of its weight files."""
    return "".join(file_digest(file) for file in sorted(StudentPaths(folder).final.glob("*.safetensors")))


def read_results(recipe: Recipe) -> dict[str, dict[str, float]]:
    """The results of `evaluate_run`: the teacher, then the students in the order of the recipe.

    Raises IncompleteError where a result is missing or out of date, because the student or the held-out rows have
    changed.
    """
    known = read_evaluation(recipe.paths)
    results, stamps = known.get("results", {}), known.get("stamps", {})
    names = ["teacher", *recipe.students]
    missing = [name for name in names if name not in results]
    if missing:
        raise IncompleteError(f"{missing[0]!r} is not in {recipe.paths.evaluation}: run `logit-cache evaluate` first")
    now = {name: student_stamp(recipe.paths.student(name).folder) for name in recipe.students}
    now["heldout"] = Manifest.read(recipe.paths.heldout).digest
    changed = [name for name, stamp in now.items() if stamps.get(name) != stamp]
    if changed:
        raise stale(recipe.paths.evaluation, changed[0])
    return {name: results[name] for name in names}


def stale(file: Path, what: str) -> IncompleteError:
    """The error for results of a student, or on held-out rows, that have changed since."""
    return IncompleteError(f"{file}: {what!r} has changed since it was evaluated: run `logit-cache evaluate` again")


def read_evaluation(paths: RunPaths) -> dict[str, Any]:
    """The results of a run, and the stamps of the students and rows that they are of; empty before an evaluation."""
    known: dict[str, Any] = read_json(paths.evaluation, "delete it and run `logit-cache evaluate`") or {}
    return known
