"""Any model against a cache: how far it is from the teacher, without the teacher.

What quantised, pruned or distilled copies of a model are ranked by: divergences from the original's distributions,
position by position, and how often the first choice changes. Others keep the original's logits for it, some 100 KB a
position; a cache takes tens of bytes, and every figure has beside it how far the cache's own error may move it
(`measures`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from ..base.errors import RecipeError
from ..base.progress import Meter
from ..models.any_model import bytes_on_disk, check_same_tokens, open_model
from ..models.output_layer import check_vocabulary
from ..models.placement import choose_placement
from ..store.arrays import RowIndices
from ..store.reader import LogitCache
from .evaluation import COLUMNS, Calibration, Column, Positions, compared, perplexity
from .measures import MEASURES

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Measured:
    """A measure over positions."""

    mean: float
    error: float | None
    """How far the mean of full logits may be, to two standard errors; None where the cache cannot tell."""
    median: float
    percentile_99: float
    """That 99 % of the positions are better than or equal to."""
    worst: float


@dataclass(frozen=True)
class Score:
    """One model. The measures without an error need nothing of the teacher but its first choice, which is exact."""

    kl: Measured
    """KL(teacher || model) at T = 1, nats."""
    reverse_kl: Measured
    acceptance: Measured
    """Mean of sum_v min(p_v, q_v), as in `Evaluation`."""
    agreement: float
    """Share of positions where the model's first choice is the teacher's."""
    flip_rate: float
    """Share of positions where one of the two first choices is the label and the other is not (flips of answers, Dutta
    et al. 2024, arXiv 2407.09141, over tokens)."""
    perplexity: float
    calibration_error: float
    positions: int
    bytes: int
    """0 where unknown."""


@dataclass(frozen=True)
class Scores:
    """Several models on the same rows."""

    cache: str
    identity: str
    rows: int
    teacher_perplexity: float | None
    """On these rows; None where the cache does not keep log-probabilities of labels."""
    models: dict[str, Score]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def score_models(
    cache: LogitCache,
    models: list[str],
    *,
    rows: int | None = None,
    seed: int = 0,
    batch_rows: int = 8,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Scores:
    """Score models one after the other on `rows` rows of the cache drawn by `seed`, by default on all.

    `dtype` is by default the teacher's. Raises RecipeError for a cache with samples or without rows and for a model that
    cannot be loaded, MismatchError for a model of another tokenizer or vocabulary.
    """
    if cache.manifest.codec.support.has_samples:
        raise RecipeError(
            f"{cache.path}: a tail known by samples does not serve a score: cache with support topk or topp"
        )
    if not len(cache):
        raise RecipeError(f"{cache.path} has no rows to score on: set corpus.heldout_fraction above 0")
    chosen = np.arange(len(cache))
    if rows is not None and rows < len(cache):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(cache))[:rows])
    placement = choose_placement(device, dtype or cache.manifest.identity["teacher"].get("dtype") or "auto")
    scores: dict[str, Score] = {}
    teacher_nats: Floats | None = None
    for name in models:
        check_same_tokens(name, cache.tokenizer_dir, trust_remote_code)
        model = open_model(name, placement, cache.objective, trust_remote_code)
        check_vocabulary(model, cache.vocab_size, f"model {name!r}", lambda: _tokens(cache))
        sums = _Sums(len(chosen))
        with Meter(f"score {name}", len(chosen) * cache.row_length) as meter:
            for some in compared(model, cache, chosen, batch_rows, partial(_advance, meter, sums)):
                sums.add(some)
        del model  # before the next one takes its place
        scores[name] = sums.score(bytes_on_disk(name))
        teacher_nats = sums.teacher_nats()
    return Scores(
        cache=str(cache.path),
        identity=cache.manifest.digest,
        rows=len(chosen),
        teacher_perplexity=None if teacher_nats is None else perplexity(float(teacher_nats.mean())),
        models=scores,
    )


def _advance(meter: Meter, sums: _Sums, tokens: int) -> None:
    meter.advance(tokens, f"KL {sums.kl / max(sums.positions, 1):.4f}")


def _tokens(cache: LogitCache) -> int:
    from ..models.loading import load_tokenizer

    return len(load_tokenizer(str(cache.tokenizer_dir)))


@dataclass
class _Sums:
    """The positions of one model so far."""

    rows: int
    calibration: Calibration = field(default_factory=Calibration)
    agreed: int = 0
    flipped: int = 0
    positions: int = 0
    kl: float = 0.0
    """Sum over positions."""
    parts: dict[str, list[Floats]] = field(default_factory=dict)

    def add(self, some: Positions) -> None:
        choice_N = self.calibration.add_choices(some.log_q_NV, some.labels_N)
        right_N, teacher_right_N = choice_N == some.labels_N, some.first_N == some.labels_N
        self.agreed += int((choice_N == some.first_N).sum())
        self.flipped += int((right_N != teacher_right_N).sum())
        self.positions += len(some.rows_N)
        self.kl += float(some.cells.measure("kl").sum())
        self._keep("row", some.rows_N)
        self._keep("nats", some.nats)
        for name, (bias_N, variance_N) in some.cells.rounding().items():
            self._keep(name, some.cells.measure(name))
            self._keep(f"{name} bias", bias_N)
            self._keep(f"{name} variance", variance_N)
        if some.label_log_p_N is not None:
            self._keep("teacher", -some.label_log_p_N)
            differences = some.cells.tail_differences(some.labels_N, some.label_log_p_N, some.label_log_q)
            for name, difference_N in differences.items():
                self._keep(f"{name} difference", difference_N)

    def _keep(self, name: str, values_N: Tensor | np.ndarray[Any, Any]) -> None:
        kept = values_N.double().cpu().numpy() if isinstance(values_N, Tensor) else values_N.astype(np.float64)
        self.parts.setdefault(name, []).append(kept)

    def _all(self, name: str) -> Floats:
        return np.concatenate(self.parts[name])

    def teacher_nats(self) -> Floats | None:
        return self._all("teacher") if "teacher" in self.parts else None

    def score(self, size: int) -> Score:
        """Raises RecipeError where no position has a label."""
        if not self.parts:
            raise RecipeError("no position of these rows has a label: score on more rows, or on other ones")
        found = {name: self._measured(name) for name in MEASURES}
        return Score(
            **found,
            agreement=self.agreed / self.positions,
            flip_rate=self.flipped / self.positions,
            perplexity=perplexity(float(self._all("nats").mean())),
            calibration_error=self.calibration.error(),
            positions=self.positions,
            bytes=size,
        )

    def _measured(self, name: str) -> Measured:
        values_N = self._all(name)
        high_is_good = name == "acceptance"
        percentile, worst = (1, values_N.min()) if high_is_good else (99, values_N.max())
        error = None
        if f"{name} difference" in self.parts:
            mean, deviation = _mean_by_rows(
                self._all(f"{name} difference"), self._all("row").astype(np.int64), self.rows
            )
            noise = math.sqrt(self._all(f"{name} variance").sum()) / len(values_N)
            error = abs(mean) + 2 * deviation + float(self._all(f"{name} bias").mean()) + 2 * noise
        return Measured(
            mean=float(values_N.mean()),
            error=error if error is None or math.isfinite(error) else None,
            median=float(np.median(values_N)),
            percentile_99=float(np.percentile(values_N, percentile)),
            worst=float(worst),
        )


def _mean_by_rows(values_N: Floats, row_N: RowIndices, rows: int) -> tuple[float, float]:
    """The mean over positions, and its standard error with rows drawn independently; infinite for a single row."""
    mean = float(values_N.mean())
    counts = np.bincount(row_N, minlength=rows)
    used = counts > 0
    off = (np.bincount(row_N, weights=values_N, minlength=rows) - counts * mean)[used]
    if used.sum() < 2:
        return mean, math.inf
    return mean, float(np.sqrt((off**2).sum() * used.sum() / (used.sum() - 1)) / len(values_N))


def table(scores: Scores) -> list[dict[str, str]]:
    """One row per model, ready to print, with the teacher's own perplexity first."""
    lines = []
    if scores.teacher_perplexity is not None:
        lines.append(
            {"model": "teacher", **dict.fromkeys(_TITLES, "-"), "perplexity": f"{scores.teacher_perplexity:.3f}"}
        )
    for name, score in scores.models.items():
        cells = [f"{show(found.mean)} {_error(found.error, show)}" for _, show, found in _measures(score)]
        cells += [f"{score.agreement:.2%}", f"{score.flip_rate:.2%}", f"{score.perplexity:.3f}"]
        cells += [f"{score.calibration_error:.2%}", COLUMNS["bytes"][1](score.bytes) if score.bytes else "-"]
        lines.append({"model": name, **dict(zip(_TITLES, cells, strict=True))})
    return lines


def by_position(scores: Scores) -> list[dict[str, str]]:
    """One row per model, ready to print: the median position, what 99 % are not worse than, and the worst."""
    lines = []
    for name, score in scores.models.items():
        line = {"model": name}
        for title, show, found in _measures(score):
            line[f"{title}, median"] = show(found.median)
            line |= {f"{title}, 99 %": show(found.percentile_99), f"{title}, worst": show(found.worst)}
        lines.append(line)
    return lines


def _nats(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:.2f}"


def _error(error: float | None, show: Any) -> str:
    return "± ?" if error is None else f"± {show(error)}"


_MEASURES: dict[str, Column] = {
    "kl": ("KL to teacher", _nats),
    "reverse_kl": ("reverse KL", _nats),
    "acceptance": ("acceptance", "{:.2%}".format),
}
_TITLES = [title for title, _ in _MEASURES.values()]
_TITLES += ["top-1 agreement", "flips", "perplexity", "calibration error", "on disk"]


def _measures(score: Score) -> Iterator[tuple[str, Callable[[float], str], Measured]]:
    return ((title, show, getattr(score, name)) for name, (title, show) in _MEASURES.items())


def note(scores: Scores) -> str:
    """What the errors of the table mean."""
    first = next(iter(scores.models.values()))
    return (
        f"{scores.rows:,} rows, {first.positions:,} positions; KL in nats; tokens outside the cached head count as one, "
        "so that both KL are lower bounds and the acceptance an upper one; ±: how far the figure of full logits may be, to "
        "two standard errors; agreement, flips, perplexity and calibration are exact"
    )


def score_page(scores: Scores) -> bytes:
    """The scores as a page: the table, and bars of the measures that the cache knows with an error."""
    from .figures import draw_bars, figure_svg, short_name, use_fonts
    from .page import render_page

    use_fonts()
    axes = {"kl": "nats per position, less is nearer", "acceptance": "share of drafts, more is nearer"}
    bars = {
        _MEASURES[measure][0]: draw_bars(
            {
                name: (found.mean, found.error)
                for name, score in scores.models.items()
                if (found := getattr(score, measure))
            },
            axis,
        )
        for measure, axis in axes.items()
    }
    return render_page(
        "score",
        "How far from the teacher",
        facts=[
            ("cache", scores.cache),
            ("cache identity", scores.identity[:16]),
            ("rows", f"{scores.rows:,}"),
            ("positions", f"{next(iter(scores.models.values())).positions:,}"),
        ],
        rows=[{**row, "model": short_name(row["model"])} for row in table(scores)],
        by_position=[{**row, "model": short_name(row["model"])} for row in by_position(scores)],
        note=note(scores),
        figures=[figure_svg(figure, title) for title, figure in bars.items()],
    )
