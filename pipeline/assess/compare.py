"""Trained students side by side: the settings that differ, the curves of their training, and their evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.durable import read_json
from ..base.errors import IncompleteError, MismatchError
from ..distill.metrics import read_metrics
from ..recipe.paths import RunPaths, StudentPaths
from ..recipe.student import PLACEMENT_KEYS, seeded_name
from .evaluation import COLUMNS, Column, read_evaluation, stale, student_stamp
from .intervals import Interval, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_NOT_COMPARED = (*PLACEMENT_KEYS, "seeds", "layers", "model", "architecture")
"""Settings of places, starts and seeds, which do not change what a student learns."""
_MEASURES: dict[str, Column] = {
    "perplexity": ("perplexity", lambda value: f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"),
    **{key: COLUMNS[key] for key in ("kl_to_teacher", "agreement", "acceptance")},
}
_TITLES = {"kd": "divergence to the teacher"}
"""Titles of curves where students may have other divergences than KL."""
_HELD_OUT = "KL to the teacher, held out"


@dataclass(frozen=True)
class TrainedStudent:
    """The record, metrics and evaluation of one student."""

    name: str
    config: dict[str, Any]
    cache: str
    seed: int
    lines: list[dict[str, float]]
    """Of metrics.jsonl, one per logged step."""
    evaluation: dict[str, float] | None
    heldout: str | None
    """Digest of the held-out cache that the evaluation was made on."""

    def last(self, key: str) -> float | None:
        """Mean of a training measure over the last tenth of the lines that have it, None without any."""
        values = [line[key] for line in self.lines if key in line]
        tail = values[-max(len(values) // 10, 1) :]
        return sum(tail) / len(tail) if tail else None


def read_students(paths: list[Path]) -> list[TrainedStudent]:
    """The students of run directories, all of them, and of single student directories.

    Raises IncompleteError for a directory without students, and for an evaluation that is out of date.
    """
    folders: list[Path] = []
    for path in paths:
        single = StudentPaths(path).record.is_file()
        students_here = [path] if single else sorted(file.parent for file in path.glob("students/*/run.json"))
        if not students_here:
            raise IncompleteError(f"{path}: no trained student: give a run directory or one of its students/NAME")
        folders += students_here
    several = len({folder.parent.parent.resolve() for folder in folders}) > 1
    students = []
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        run = read_json(StudentPaths(folder).record, f"delete {folder} and train again")
        run_dir = folder.parent.parent
        evaluated = read_evaluation(RunPaths(run_dir, run_dir))
        evaluation, stamps = evaluated.get("results", {}).get(folder.name), evaluated.get("stamps", {})
        if evaluation is not None and stamps.get(folder.name) != student_stamp(folder):
            raise stale(RunPaths(run_dir, run_dir).evaluation, folder.name)
        students.append(
            TrainedStudent(
                name=f"{run_dir.name}/{folder.name}" if several else folder.name,
                config=run["config"],
                cache=run["cache"],
                seed=run["seed"],
                lines=read_metrics(StudentPaths(folder).metrics),
                evaluation=evaluation,
                heldout=stamps.get("heldout"),
            )
        )
    return students


def check_comparable(students: list[TrainedStudent]) -> None:
    """Raises MismatchError unless all students learned from one cache and were evaluated on one held-out cache."""
    for kind in ("cache", "heldout"):
        digests = {getattr(student, kind): student.name for student in students if getattr(student, kind)}
        if len(digests) > 1:
            (one, first), (two, second), *_ = digests.items()
            what = "learned from different caches" if kind == "cache" else "were evaluated on different held-out rows"
            raise MismatchError(
                f"{first} and {second} {what} (identities {one[:12]} and {two[:12]}): a difference between them may "
                "come from the data; give --any-cache to compare them all the same"
            )


def differing(students: list[TrainedStudent]) -> list[str]:
    """Settings in which the students differ, as their recipes name them."""
    keys = [key for key in students[0].config if key not in _NOT_COMPARED]
    return [key for key in keys if len({str(student.config.get(key)) for student in students}) > 1]


def comparison(students: list[TrainedStudent]) -> list[dict[str, str]]:
    """One row per student: the settings that differ, the end of the training, and the evaluation if one exists."""
    settings = differing(students)
    several_seeds = len({student.seed for student in students}) > 1
    measured = _MEASURES if any(student.evaluation for student in students) else {}
    trained = [key for key in ("kd", "ce") if any(student.last(key) is not None for student in students)]
    rows = []
    for student in students:
        row = {"student": student.name, **{key: _shown(student.config.get(key)) for key in settings}}
        if several_seeds:
            row["seed"] = str(student.seed)
        row["steps done"] = str(int(student.lines[-1]["step"])) if student.lines else "0"
        for key in trained:
            row[f"train {key}"] = "-" if (value := student.last(key)) is None else f"{value:.4f}"
        for key, (title, show) in measured.items():
            row[title] = show(student.evaluation[key]) if student.evaluation else "-"
        rows.append(row)
    return rows


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def over_seeds(students: list[TrainedStudent]) -> list[dict[str, str]]:
    """One row per setting that several seeds were trained with: mean ± half of the 95 % interval of each measure.

    Empty where no setting has two evaluated seeds.
    """
    settings = differing(students)
    groups: dict[tuple[str, ...], list[TrainedStudent]] = {}
    for student in students:
        if student.evaluation:
            own = [_shown(student.config.get(key)) for key in settings]
            name = student.name.rpartition("/")[2].removesuffix(seeded_name("", student.seed))
            groups.setdefault((name, *own), []).append(student)
    if not any(len({student.seed for student in group}) > 1 for group in groups.values()):
        return []
    rows = []
    for (name, *own), group in groups.items():
        row = {"student": name, **dict(zip(settings, own, strict=True)), "seeds": str(len(group))}
        for key, (title, show) in _MEASURES.items():
            mean, half = interval([student.evaluation[key] for student in group if student.evaluation])
            row[title] = show(mean) if half is None else f"{show(mean)} ± {show(half)}"
        rows.append(row)
    return rows


def draw_comparison(students: list[TrainedStudent]) -> Figure:
    """Curves of the training, thin as logged and bold as a running mean, and bars of the evaluation.

    Raises IncompleteError where no student has logged a step.
    """
    from .figures import CURVES, add_curves, panels, series

    runs = {student.name: student.lines for student in students}
    curves = [key for key in CURVES if any(key in line for lines in runs.values() for line in lines)]
    ends = {student.name: student.evaluation["kl_to_teacher"] for student in students if student.evaluation}
    count = len(curves) + bool(ends)
    if count == 0:
        raise IncompleteError("nothing to draw: no student has logged a step")
    figure, axes = panels(4.4 * count, 4.2, count)
    for axis, key in zip(axes, curves, strict=False):
        add_curves(axis, runs, key)
        axis.set_title(_TITLES.get(key, CURVES[key]))
    if ends:
        axis, colours = axes[-1], {name: series(number)[0] for number, name in enumerate(runs)}
        axis.barh(range(len(ends)), list(ends.values()), color=[colours[name] for name in ends])
        for place, value in enumerate(ends.values()):
            axis.text(value, place, f" {value:.3g}", va="center", fontsize=9)
        axis.set_yticks(range(len(ends)), list(ends))
        axis.invert_yaxis()
        axis.set_xlim(0, 1.2 * max(ends.values()))
        axis.set(xlabel="nats per position", title=_HELD_OUT)
    shown = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=min(len(shown), 6) or 1, frameon=False)
    return figure


def comparison_page(students: list[TrainedStudent]) -> bytes:
    """The page of `compare`: tables, curves and the held-out KL."""
    from .figures import CURVES, draw_bars, draw_training, figure_svg, use_fonts
    from .page import render_page

    use_fonts()
    runs = {student.name: student.lines for student in students}
    drawn = [(draw_training(runs, key), _TITLES.get(key, title)) for key, title in CURVES.items()]
    ends: dict[str, Interval] = {
        student.name: (student.evaluation["kl_to_teacher"], None) for student in students if student.evaluation
    }
    if ends:
        drawn.append((draw_bars(ends, "nats per position"), _HELD_OUT))
    identities = sorted({student.cache[:16] for student in students})
    return render_page(
        "compare",
        "Students side by side",
        facts=[
            ("students", str(len(students))),
            ("differ in", ", ".join(differing(students)) or "nothing but their start"),
            ("seeds", ", ".join(map(str, sorted({student.seed for student in students})))),
            ("cache identity", ", ".join(identities)),
        ],
        rows=comparison(students),
        seeds=over_seeds(students),
        figures=[figure_svg(figure, title) for figure, title in drawn if figure is not None],
    )
