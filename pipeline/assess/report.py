"""The report of a run: its figures as PNG files, and one HTML page that contains them."""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2
import matplotlib as mpl
import numpy as np

from ..base.durable import read_json, write_bytes
from ..capture.prompt_sample import TEMPERATURES, read_prompt_sample
from ..distill.metrics import read_metrics
from ..models.loading import load_tokenizer
from ..recipe.loading import resolved_toml
from ..recipe.schema import Recipe
from ..store.arrays import RowLosses
from ..store.reader import LogitCache
from .evaluation import read_results, table
from .figures import (
    draw_candidates,
    draw_coverage,
    draw_fidelity,
    draw_losses,
    draw_tail,
    draw_target,
    draw_training,
    figure_png,
    temperature_title,
    use_fonts,
)

mpl.use("Agg")  # no display is needed

_IMPLAUSIBLE_ROWS = 5
_SHOWN_TOKENS = 32


def write_report(recipe: Recipe) -> Path:
    """Write PNG figures and index.html to run_dir/report; returns the page's path. Raises as `read_results` does."""
    use_fonts()
    results = read_results(recipe)
    cache, heldout = LogitCache(recipe.paths.cache), LogitCache(recipe.paths.heldout)
    figures = {
        "candidates": draw_candidates(heldout, recipe.report.row, recipe.report.position),
        "tail": draw_tail(cache),
        "coverage": draw_coverage(heldout, cache.manifest.codec.support.k),
        "training": draw_training({name: read_metrics(recipe.paths.student(name).metrics) for name in recipe.students}),
    }
    losses = cache.teacher_losses() if cache.manifest.codec.label_log_probs else None
    if losses is not None:
        figures["losses"] = draw_losses(losses)
    plan = read_json(recipe.paths.plan, "run `logit-cache plan` again")
    if plan is not None:
        figures["plan"] = draw_fidelity(plan["fidelity"]["lines"])
    continuation = read_prompt_sample(recipe.paths.prompt_sample) if recipe.report.prompt is not None else None
    if continuation is not None:
        figures["continuation"] = draw_target(
            continuation.target, continuation.tokens, f"{continuation.prompt} ▸", None
        )
    folder = recipe.paths.report
    images = {}
    for name, figure in figures.items():
        png = figure_png(figure)
        write_bytes(folder / f"{name}.png", png)
        images[name] = base64.b64encode(png).decode()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    )
    rows = table(results)
    page = template.render(
        title=recipe.report.title,
        rows=rows,
        images=images,
        continuation=continuation,
        drawn=[]
        if continuation is None
        else list(zip(map(temperature_title, TEMPERATURES), continuation.drawn, strict=False)),
        facts=_facts(cache, heldout),
        implausible=[] if losses is None else _implausible(cache, losses),
        teacher=cache.manifest.identity["teacher"],
        identity=cache.manifest.digest,
        recipe=resolved_toml(recipe),
    )
    write_bytes(folder / "index.html", page.encode())
    return folder / "index.html"


def _implausible(cache: LogitCache, losses: RowLosses) -> list[tuple[int, str, str]]:
    """The rows on which the teacher's loss is highest: number, loss, and how their text begins."""
    highest = np.argsort(-losses, kind="stable")[:_IMPLAUSIBLE_ROWS]
    tokenizer = load_tokenizer(str(cache.tokenizer_dir))
    texts = tokenizer.batch_decode(cache.columns(highest)["input_ids"][:, :_SHOWN_TOKENS])
    return [
        (row, f"{losses[row]:.2f}", " ".join(text.split())) for row, text in zip(highest.tolist(), texts, strict=True)
    ]


def _facts(cache: LogitCache, heldout: LogitCache) -> list[tuple[str, str]]:
    return [
        ("training rows", f"{len(cache):,} of {cache.row_length} tokens"),
        ("positions with a target", f"{cache.positions:,}"),
        ("cache on disk", f"{cache.bytes / 1e6:,.1f} MB"),
        ("bytes per position", f"{cache.bytes / max(cache.positions, 1):.1f}"),
        ("held-out positions", f"{heldout.positions:,}, {heldout.manifest.codec.support.k} candidates each"),
    ]
