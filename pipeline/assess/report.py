"""The report of a run: its figures as PNG files, and one HTML page that contains them."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ..base.durable import read_json, write_bytes
from ..capture.prompt_sample import TEMPERATURES, read_prompt_sample
from ..distill.metrics import read_metrics
from ..models.loading import load_model, load_tokenizer
from ..models.placement import choose_placement
from ..recipe.loading import resolved_toml
from ..recipe.schema import Recipe
from ..store.arrays import RowLosses
from ..store.reader import LogitCache
from .chosen_rows import chosen_rows
from .evaluation import read_results, table
from .explore import explore_rows
from .explore_page import Fragment, explorer_fragment
from .figures import (
    CURVES,
    ERRORS,
    draw_candidates,
    draw_coverage,
    draw_error,
    draw_fidelity,
    draw_losses,
    draw_tail,
    draw_target,
    draw_training,
    figure_png,
    figure_svg,
    temperature_title,
    use_fonts,
)
from .page import render_page

mpl.use("Agg")  # no display is needed

_IMPLAUSIBLE_ROWS = 5
_SHOWN_TOKENS = 32
_EXPLORED_ROWS = 3


def write_report(recipe: Recipe) -> Path:
    """Write PNG figures and index.html to run_dir/report; returns the page's path. Raises as `read_results` does."""
    use_fonts()
    results = read_results(recipe)
    cache, heldout = LogitCache(recipe.paths.cache), LogitCache(recipe.paths.heldout)
    figures: dict[str, tuple[Figure, str]] = {
        "candidates": (
            draw_candidates(heldout, recipe.report.row, recipe.report.position),
            "Ten best candidates of one position at four temperatures",
        ),
        "tail": (draw_tail(cache), "Tail mass against temperature"),
        "coverage": (draw_coverage(heldout, cache.manifest.codec.support.k), "Coverage of the top k"),
    }
    runs = {name: read_metrics(recipe.paths.student(name).metrics) for name in recipe.students}
    for key, title in CURVES.items():
        curve = draw_training(runs, key)
        if curve is not None:
            figures[f"training-{key}"] = (curve, title)
    losses = cache.teacher_losses() if cache.manifest.codec.label_log_probs else None
    if losses is not None:
        figures["losses"] = (draw_losses(losses), "The teacher's loss over rows")
    plan = read_json(recipe.paths.plan, "run `logit-cache plan` again")
    lines = [] if plan is None else plan["fidelity"]["lines"]
    continuation = read_prompt_sample(recipe.paths.prompt_sample) if recipe.report.prompt is not None else None
    if continuation is not None:
        drawn = draw_target(continuation.target, continuation.tokens, f"{continuation.prompt} ▸", None)
        figures["continuation"] = (drawn, "Ten best candidates after the prompt at four temperatures")
    folder = recipe.paths.report
    for name, (figure, _) in figures.items():
        write_bytes(folder / f"{name}.png", figure_png(figure))
    if lines:
        write_bytes(folder / "plan.png", figure_png(draw_fidelity(lines)))
    explorer = _explorer(recipe, heldout)
    page = render_page(
        "report",
        recipe.report.title,
        style=explorer.style,
        script=explorer.script,
        facts=_facts(recipe, cache, heldout),
        rows=table(results),
        figures={name: figure_svg(figure, about=about) for name, (figure, about) in figures.items()},
        training=[figure_svg(figure, title) for name, (figure, title) in figures.items() if "training" in name],
        plan=[
            figure_svg(draw_error(lines, kind, t), f"{title}, T = {float(t):g}")
            for kind, title in ERRORS.items()
            for t in ("1.0", "2.0")
            if lines
        ],
        explorer=explorer.markup,
        continuation=continuation,
        drawn=[]
        if continuation is None
        else list(zip(map(temperature_title, TEMPERATURES), continuation.drawn, strict=False)),
        implausible=[] if losses is None else _implausible(cache, losses),
        recipe=resolved_toml(recipe),
    )
    write_bytes(folder / "index.html", page)
    return folder / "index.html"


def _explorer(recipe: Recipe, heldout: LogitCache) -> Fragment:
    """A few held-out rows with the teacher, a student that learned from it, and a control where there is one."""
    rows = [] if recipe.report.row is None else [recipe.report.row]
    rows += [row for row in chosen_rows(heldout, f"spread:{_EXPLORED_ROWS}") if row not in rows]
    students = {}
    learned = [name for name in recipe.students if recipe.student(name).mode != "ce"]
    controls = [name for name in recipe.students if name not in learned]
    for name in [*learned[:1], *controls[:1]] if controls else learned[:2]:
        config, folder = recipe.student(name), recipe.paths.student(name).final
        placement, trust = choose_placement(config.device, config.dtype), config.trust_remote_code
        students[name] = load_model(folder, placement, objective=heldout.objective, trust_remote_code=trust)
    return explorer_fragment(explore_rows(heldout, rows, students, title=recipe.report.title))


def _implausible(cache: LogitCache, losses: RowLosses) -> list[tuple[int, str, str]]:
    """The rows on which the teacher's loss is highest: number, loss, and how their text begins."""
    highest = np.argsort(-losses, kind="stable")[:_IMPLAUSIBLE_ROWS]
    tokenizer = load_tokenizer(str(cache.tokenizer_dir))
    texts = tokenizer.batch_decode(cache.columns(highest)["input_ids"][:, :_SHOWN_TOKENS])
    return [
        (row, f"{losses[row]:.2f}", " ".join(text.split())) for row, text in zip(highest.tolist(), texts, strict=True)
    ]


def _facts(recipe: Recipe, cache: LogitCache, heldout: LogitCache) -> list[tuple[str, str]]:
    manifest = cache.manifest
    teacher, support, shape = manifest.identity["teacher"], manifest.codec.support, manifest.codec.coordinates
    kept = f"{support.k} best tokens" if support.name == "topk" else str(support.name)
    students = [f"{name} ({recipe.student(name).mode})" for name in recipe.students]
    return [
        ("students", ", ".join(students)),
        ("teacher", f"{teacher['source']}, {teacher['dtype']}"),
        ("text", str(recipe.corpus.source)),
        ("training rows", f"{len(cache):,} of {cache.row_length} tokens"),
        ("positions with a target", f"{cache.positions:,}"),
        ("kept of each", kept if shape is None else f"{kept}, {shape.rank} coordinates of the tail"),
        ("bytes per position", f"{cache.bytes / max(cache.positions, 1):.1f}"),
        ("cache on disk", f"{cache.bytes / 1e6:,.1f} MB"),
        ("held out", f"{heldout.positions:,} positions, {heldout.manifest.codec.support.k} tokens each"),
        ("cache identity", manifest.digest[:16]),
    ]
