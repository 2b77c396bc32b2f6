"""Figures of a study: how much of the gap every arm closes, and the losses on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .study_results import Line, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORST_SHOWN = -1.0
"""Left edge of the figure: a larger loss of the gap is marked there."""
_LABELS, _ONLINE, _SHAPE, _TOP, _RENORMALISED, _SAMPLES = (
    "#9aa5ad",
    "#22272b",
    "#3a7d44",
    "#2a6f97",
    "#c1533b",
    "#d1933f",
)


def _kind(line: Line) -> tuple[str, str]:
    """What an arm learns from, and its colour."""
    arm = line.arm
    if arm.mode == "ce":
        return "labels alone", _LABELS
    if arm.mode == "online":
        return "the teacher beside the student", _ONLINE
    if arm.tail is None:
        return ("cache: top tokens and the tail's shape", _SHAPE) if line.shaped else ("cache: samples", _SAMPLES)
    if arm.tail.startswith("renormalize"):
        return "cache: top tokens, renormalised", _RENORMALISED
    return "cache: top tokens and the tail's mass", _TOP


def draw_gap(study: Study) -> Figure:
    """Share of the gap closed per arm, with intervals; one panel per temperature.

    An arm more than one gap worse than the labels alone is marked at the edge, with its value.
    """
    from ..assess.figures import panels

    temperatures = sorted({line.arm.temperature for line in study.lines if line.arm.mode != "ce"})
    shown = {t: _of_temperature(study, t, "gap_closed") for t in temperatures}
    most = max(map(len, shown.values()))
    figure, axes = panels(6.4 * len(temperatures), 1.4 + 0.28 * most, len(temperatures))
    kinds: dict[str, str] = {}
    for axis, (temperature, lines) in zip(axes, shown.items(), strict=True):
        names = []
        for height, line in enumerate(lines):
            mean, half = line.values["gap_closed"]
            kind, colour = _kind(line)
            kinds[kind] = colour
            left = max(mean, _WORST_SHOWN)
            axis.barh(height, left, color=colour, alpha=0.85, height=0.7)
            if mean >= _WORST_SHOWN and half is not None:
                axis.errorbar(mean, height, xerr=half, color="black", capsize=2, linewidth=1)
            place = max(mean + (half or 0.0), 0.0) if mean >= _WORST_SHOWN else 0.0
            axis.annotate(f"{mean:.0%}", (place, height), (5, 0), textcoords="offset points", va="center", fontsize=8)
            name = line.arm.name.removesuffix(f" T={temperature:g}").replace(f"_at{temperature:g}", "")
            names.append(name.replace("_", " "))
        axis.axvline(0, color=_LABELS, linewidth=1)
        axis.axvline(1, color=_ONLINE, linewidth=1, linestyle="--")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.set_xlim(_WORST_SHOWN - 0.05, 1.25)
        axis.set_title(f"T = {temperature:g}")
    figure.supxlabel(
        "gap closed: 0 % is the student of the labels alone, 100 % the student beside its teacher", fontsize=9
    )
    _legend(figure, kinds)
    return figure


def draw_curves(study: Study) -> Figure:
    """Cross-entropy on held-out rows against the tokens of the training, means over seeds; a panel per temperature."""
    from ..assess.figures import panels

    temperatures = sorted({line.arm.temperature for line in study.lines if line.arm.mode != "ce"})
    figure, axes = panels(6.4 * len(temperatures), 4.4, len(temperatures), sharey=True)
    kinds: dict[str, str] = {}
    for axis, temperature in zip(axes, temperatures, strict=True):
        labels = [line for line in study.lines if line.arm.mode == "ce" and not line.arm.warm]
        for line in labels + _of_temperature(study, temperature, "perplexity"):
            if line.arm.warm or not line.curve:
                continue
            kind, colour = _kind(line)
            kinds[kind] = colour
            axis.plot(*zip(*((tokens / 1e6, loss) for tokens, loss in line.curve), strict=True), color=colour)
        axis.set_xlabel("million tokens")
        axis.set_title(f"T = {temperature:g}")
    axes[0].set_ylabel("held-out loss, nats per token")
    _legend(figure, kinds)
    return figure


def _of_temperature(study: Study, temperature: float, measure: str) -> list[Line]:
    """The lines of a temperature, kind by kind; with the gap, those of the labels alone that are no reference."""
    some = [
        line
        for line in study.lines
        if measure in line.values
        and (line.arm.temperature == temperature if line.arm.mode != "ce" else measure == "gap_closed")
        and line.arm.name != line.arm.labels_reference
    ]
    order = [_ONLINE, _SHAPE, _SAMPLES, _TOP, _RENORMALISED, _LABELS]
    return sorted(some, key=lambda line: (line.arm.warm, order.index(_kind(line)[1]), line.arm.name))


def _legend(figure: Figure, kinds: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=kind) for kind, colour in kinds.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
