"""Figures of the report: the teacher's candidates, tail, coverage and loss, the fidelity table of `plan`, the
training."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..base.errors import RecipeError
from ..capture.prompt_sample import TEMPERATURES
from ..models.loading import load_tokenizer
from ..store.arrays import RowLosses
from ..store.reader import LogitCache
from ..targets.sparse_targets import SparseTargets

_SCRIPTS = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic")
"""Fonts with Hangul; the first installed one stands in for the default font."""
COLOURS = ["#24618e", "#b0542b", "#3f7a45", "#6d5a9c", "#8a6d1a", "#4d5a63"]
"""Of series; a page has its own for each, by `figure_svg`."""
LINES = ["-", "--", ":", "-."]
"""Dashes of series: no colour alone tells them apart."""
_BLUE, _RED, _GREY = COLOURS[0], COLOURS[1], "#7c8992"
_SOFT = "#52606b"
_OF_PAGE = {"#000000": "currentColor", _GREY: "var(--faint)", _SOFT: "var(--soft)"} | {
    colour: f"var(--series{number})" for number, colour in enumerate(COLOURS)
}
"""Colour of a figure -> colour of the page."""
_SAMPLE_ROWS = 64
_NAME = 30
"""Longest name in a figure."""
_BYTE_TICKS = (5, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000)


def use_fonts() -> None:
    """Let figures write Hangul: with a font of this machine, else with that of the plots extra."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    family = next((name for name in _SCRIPTS if name in known), None)
    if family is None and (package := find_spec("koreanize_matplotlib")) is not None:
        # Importing the package would change the settings of every figure: only its font file is taken.
        folder = Path(next(iter(package.submodule_search_locations or ["."]))) / "fonts"
        font_manager.fontManager.addfont(folder / "NanumGothic.ttf")
        family = "NanumGothic"
    mpl.rcParams["font.family"] = ["DejaVu Sans", *([family] if family else [])]


def _sample(cache: LogitCache) -> Any:
    """Targets [N] of a few rows spread over the cache."""
    rows = np.unique(np.linspace(0, len(cache) - 1, min(_SAMPLE_ROWS, len(cache))).astype(int))
    targets = cache.batch(rows)["targets"].flatten()
    return targets[targets.mask]


def panels(width: float, height: float, count: int = 1, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of a size in inches with `count` panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG; without matplotlib's version stamp, so that equal figures are equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


@dataclass(frozen=True)
class Drawn:
    """A figure as a page has it."""

    title: str
    svg: str


def figure_svg(figure: Figure, title: str = "", about: str = "") -> Drawn:
    """The figure for a page, in whose colours and fonts it is; `about` says what it shows to who cannot see it."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "figure"}):  # equal figures are equal bytes
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for own, of_page in _OF_PAGE.items():
        text = text.replace(own, of_page)
    opening, _, rest = text.partition(">")
    size = re.search(r'viewBox="[^"]*"', opening)
    assert size is not None
    label = html.escape(about or title, quote=True)
    return Drawn(title, f'<svg {size[0]} role="img" aria-label="{label}">{rest}')


def draw_candidates(cache: LogitCache, row: int | None, position: int | None) -> Figure:
    """The ten best candidates of one position at several temperatures, with the mass of all others together."""
    if row is None:
        by_distance = sorted(range(len(cache)), key=lambda number: abs(number - len(cache) // 2))
        row = next((number for number in by_distance if cache[number]["targets"].mask.any()), 0)
    if row >= len(cache):
        raise RecipeError(f"report.row = {row} is outside 0..{len(cache) - 1}, the held-out rows")
    tokenizer = load_tokenizer(str(cache.tokenizer_dir))
    item = cache[row]
    targets = item["targets"]
    if not targets.mask.any():
        raise RecipeError(f"report.row = {row}: no position of this held-out row has a target: choose another")
    if position is None:
        # The position of median entropy.
        log_p = targets.at_temperature(1.0)[0]
        entropy = -(log_p.exp() * torch.where(log_p.isneginf(), 0.0, log_p)).sum(-1)
        candidates = torch.nonzero(targets.mask).squeeze(-1)
        candidates = candidates[len(candidates) // 8 :]
        position = int(candidates[entropy[candidates].argsort()[len(candidates) // 2]])
    if position >= cache.row_length or not targets.mask[position]:
        raise RecipeError(f"report.position = {position} has no target in held-out row {row}")
    target = targets[position]
    first = max(0, position - 24)
    context = tokenizer.decode(item["input_ids"][first : position + 1].tolist())
    words = [tokenizer.decode([token]) for token in target.token_ids[:10].tolist()]
    return draw_target(target, words, f"…{' '.join(context.split())} ▸", int(item["labels"][position]))


def temperature_title(temperature: float | None) -> str:
    return "T = none" if temperature is None else f"T = {temperature:g}"


def draw_target(target: SparseTargets, words: list[str], context: str, label: int | None) -> Figure:
    """The ten best candidates of one target, written as `words`, at several temperatures; `label` is the next token."""
    labels = [repr(word)[1:-1].replace("$", r"\$").replace("\ufffd", "▯") for word in words[:10]]
    figure, axes = panels(12, 4.6, len(TEMPERATURES), sharey=True)
    for axis, temperature in zip(axes, TEMPERATURES, strict=True):
        log_p, log_tail = target.at_temperature(temperature or 1.0)
        values = log_p[:10].exp().tolist()
        rest = float(log_p[10:].exp().sum() + log_tail.exp())
        colours = [_RED if token == label else _BLUE for token in target.token_ids[:10].tolist()]
        axis.barh(range(len(values)), values, color=colours)
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:.2g}", va="center", fontsize=8)
        # Each panel on its own scale: at high temperature nearly all mass is outside, and the shape would vanish.
        axis.set_xlim(0, 1.25 * max(values))
        axis.locator_params(axis="x", nbins=3)  # tick labels of small probabilities are long
        axis.set_title(f"{temperature_title(temperature)}\nall others {rest:.1%}", fontsize=10)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()  # shared, so once
    note = "" if label is None else " (red: the token that follows in the text)"
    figure.supxlabel(f"probability{note}", fontsize=9)
    figure.suptitle(context.replace("$", r"\$"), fontsize=10, fontstyle="italic")
    return figure


def draw_tail(cache: LogitCache) -> Figure:
    """Mass outside the head against temperature: the mean, and the middle 80 % of positions."""
    targets = _sample(cache)
    temperatures = np.linspace(max(1.0, 1 / max(targets.knots)), 8.0, 57)
    masses = torch.stack([targets.at_temperature(float(t))[1].exp() for t in temperatures]).numpy()
    figure, [axis] = panels(6, 3.8)
    axis.fill_between(
        temperatures, *np.quantile(masses, [0.1, 0.9], axis=1), color=_BLUE, alpha=0.2, label="10 % to 90 %"
    )
    axis.plot(temperatures, masses.mean(1), color=_BLUE, label="mean")
    knots = [1 / knot for knot in targets.knots if temperatures[0] <= 1 / knot <= 8]
    axis.plot(knots, np.interp(knots, temperatures, masses.mean(1)), "o", color=_BLUE, label="stored knots")
    axis.set(xlabel="temperature T", ylabel="mass outside the head", ylim=(0, 1))
    axis.legend(frameon=False, loc="lower right")
    return figure


def draw_losses(losses: RowLosses) -> Figure:
    """How the teacher's mean loss is distributed over the rows."""
    figure, [axis] = panels(6, 3.8)
    axis.hist(losses, bins=min(60, max(len(losses) // 4, 10)), color=_BLUE, alpha=0.6)
    for value, style, name in ((losses.mean(), "-", "mean"), (np.quantile(losses, 0.99), ":", "99 % of rows below")):
        axis.axvline(float(value), color=_RED, linestyle=style, linewidth=1.2, label=f"{name} {value:.2f}")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="the teacher's loss on a row, nats per label", ylabel="rows")
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # above: lines would cross it
    return figure


def draw_coverage(cache: LogitCache, kept: int | None) -> Figure:
    """Mass of the k best candidates against k, at several temperatures."""
    targets = _sample(cache)
    count = targets.token_ids.shape[-1]
    figure, [axis] = panels(6, 3.8)
    for colour, temperature in zip(COLOURS, (1.0, 2.0, 3.0, 6.0), strict=False):
        covered = targets.at_temperature(temperature)[0].exp().cumsum(-1).mean(0).numpy()
        axis.plot(np.arange(1, count + 1), covered, color=colour, label=f"T = {temperature:g}")
    if kept is not None and kept <= count:
        axis.axvline(kept, color=_GREY, linestyle="--", linewidth=1)
        axis.text(kept * 1.06, 0.02, f"k = {kept}", color=_SOFT, fontsize=9)
    axis.set_xscale("log", base=2)
    ticks = [2**i for i in range(int(np.log2(count)) + 1)]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set(xlabel="candidates k", ylabel="mean mass covered", ylim=(0, 1), xlim=(1, count))
    axis.legend(frameon=False, loc="upper left")
    return figure


CURVES = {"kd": "KL to the teacher", "ce": "cross-entropy on the text", "agreement": "top-1 agreement"}
"""Measure of a training -> title of its figure."""
ERRORS = {"kl": "KL(p || p^), nats"} | {name: f"error of the gradient, {name} student" for name in ("near", "far")}
"""Kind of error in the fidelity table -> title of its figure."""


def draw_fidelity(lines: list[dict[str, Any]]) -> Figure:
    """The fidelity table of `plan`: error against bytes, a colour for each rank and a line through what nothing beats.

    `lines` are those of plan.json; the first is the recipe's own.
    """
    figure = Figure(figsize=(12, 11.5), layout="constrained")
    axes = figure.subplots(len(ERRORS), 2)
    for (kind, title), row in zip(ERRORS.items(), axes, strict=True):
        for axis, t in zip(row, ("1.0", "2.0"), strict=True):
            _draw_errors(axis, lines, kind, t)
            axis.set_title(f"{title}, T = {float(t):g}", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("bytes per position (small numbers: k)")
    _draw_ranks(axes[0, 0], lines)
    return figure


def draw_error(lines: list[dict[str, Any]], kind: str, t: str) -> Figure:
    """One kind of error at one temperature."""
    figure, [axis] = panels(6, 4.2)
    _draw_errors(axis, lines, kind, t)
    axis.set(xlabel="bytes per position (small numbers: k)", ylabel=ERRORS[kind])
    _draw_ranks(axis, lines)
    return figure


def _rank_colours(lines: list[dict[str, Any]]) -> dict[int, str]:
    ranks = sorted({line["rank"] for line in lines})
    return {rank: _GREY if rank == 0 else COLOURS[place % len(COLOURS)] for place, rank in enumerate(ranks)}


def _rank_markers(lines: list[dict[str, Any]]) -> dict[int, str]:
    """A form for each rank: no colour alone tells them apart."""
    return dict(zip(sorted({line["rank"] for line in lines}), "xos^Dv<>" * 4, strict=False))


def _draw_ranks(axis: Axes, lines: list[dict[str, Any]]) -> None:
    """The legend of ranks."""
    for (rank, colour), marker in zip(_rank_colours(lines).items(), _rank_markers(lines).values(), strict=True):
        axis.plot([], [], marker, color=colour, label=f"rank {rank}" if rank else "no shape")
    axis.plot([], [], "*", color="black", markersize=11, label="this recipe")
    axis.legend(frameon=False, fontsize=8)


def _draw_errors(axis: Axes, lines: list[dict[str, Any]], kind: str, t: str) -> None:
    """One kind of error at one temperature; of a KL without a shape, that of a uniform tail."""
    axis.spines[["top", "right"]].set_visible(False)
    colours, markers = _rank_colours(lines), _rank_markers(lines)
    points = []
    for line in lines:
        errors = line["kl"] if kind == "kl" else line["gradient"][kind]
        if t in errors:
            points.append((line["bytes_per_position"], errors[t], line))
    front = sorted((x, y, line) for x, y, line in points if float(t) in line["front"].get(kind, ()))
    axis.plot([x for x, _, _ in front], [y for _, y, _ in front], color="black", linewidth=1, zorder=1)
    for x, y, line in points:
        axis.plot(
            x,
            y,
            "*" if line is lines[0] else markers[line["rank"]],
            color="black" if line is lines[0] else colours[line["rank"]],
            markersize=12 if line is lines[0] else 5,
        )
    shown: list[tuple[float, float]] = []
    for x, y, line in front:
        place = (math.log(x), math.log(max(y, 1e-12)))
        if any(abs(place[0] - a) < 0.05 and abs(place[1] - b) < 0.12 for a, b in shown):
            continue  # it would lie on another one
        shown.append(place)
        support = line["support"]
        name = f"{support['k']}" if support["name"] == "topk" else line["setting"]
        axis.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, color=_SOFT)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if kind == "kl" else f"{100 * y:g} %")
    axis.yaxis.set_minor_formatter(NullFormatter())
    sizes = [line["bytes_per_position"] for line in lines]
    ticks = [tick for tick in _BYTE_TICKS if min(sizes) * 0.9 <= tick <= max(sizes) * 1.1]
    axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axis.set_xticks([], minor=True)


def draw_training(runs: dict[str, list[dict[str, float]]], key: str) -> Figure | None:
    """A measure of trainings against the step; None where no run has it."""
    rows = -(-len(runs) // 3)
    figure, [axis] = panels(6, 3.4 + 0.2 * rows)
    add_curves(axis, runs, key)
    if not axis.lines:
        return None
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)  # inside it would lie on curves
    return figure


def add_curves(axis: Axes, runs: dict[str, list[dict[str, float]]], key: str) -> None:
    """A measure of trainings against the step, thin as logged and bold as a running mean."""
    for number, (name, lines) in enumerate(runs.items()):
        points = [(line["step"], line[key]) for line in lines if key in line and (key != "kd" or line[key] > 0)]
        if points:
            colour, dashes = series(number)
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
            axis.plot(steps, _smoothed(values), color=colour, linestyle=dashes, label=name)
    axis.set(xlabel="step", ylabel="share of positions" if key == "agreement" else "nats per position")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def series(number: int) -> tuple[str, str]:
    """Colour and dashes of a series; the first ones differ in both."""
    return COLOURS[number % len(COLOURS)], LINES[(number + number // len(LINES)) % len(LINES)]


def _smoothed(values: Sequence[float]) -> list[float]:
    """At each point the mean over the last tenth of all points."""
    window = max(len(values) // 10, 1)
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def draw_bars(values: dict[str, tuple[float, float | None]], axis_title: str) -> Figure:
    """A bar for each name, with a line for its error where it is known."""
    figure, [axis] = panels(6, 0.8 + 0.42 * len(values))
    places = range(len(values))
    means, errors = [mean for mean, _ in values.values()], [error or 0.0 for _, error in values.values()]
    axis.barh(places, means, color=[COLOURS[0]] * len(means), height=0.62)
    if any(errors):
        axis.errorbar(means, places, xerr=errors, fmt="none", ecolor="black", elinewidth=1.2, capsize=3)
    for place, mean, error in zip(places, means, errors, strict=True):
        axis.annotate(
            f"{mean:.3g}", (mean + error, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axis.set_yticks(places, [short_name(name) for name in values])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max((m + e for m, e in zip(means, errors, strict=True)), default=1) or 1)
    axis.set(xlabel=axis_title)
    return figure


def short_name(name: str) -> str:
    """The end of a long name, such as a path."""
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
