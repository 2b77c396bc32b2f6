"""What stage one of a recipe will take, before it runs: bytes, files, hours, disk, and the fidelity table of a sample.

With a probe the teacher runs over a few rows, and bytes and speed are measured; without, they follow from the teacher's
configuration and public figures of a GPU (`assess.cost`).
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from ..base.durable import read_json, write_bytes, write_json
from ..base.errors import IncompleteError, RecipeError, recipe_error
from ..base.places import Place, files_in
from ..base.progress import Meter, duration
from ..capture.row_starts import log_row_starts
from ..capture.writers import training_codec
from ..corpus.labels import LABELS, LOSS_MASK
from ..corpus.row_file import bytes_per_position as stored_bytes
from ..corpus.rows import PackedRows
from ..models.batch_rows import CPU_ROWS, rows_per_pass
from ..models.placement import has_local_weights
from ..models.student_layers import check_layers, layer_list
from ..models.teacher import teacher_of
from ..models.teacher_source import teacher_config
from ..recipe.paths import CachePaths
from ..recipe.schema import Recipe
from ..store.shard_size import TEXT_BYTES, estimated_bytes, shard_rows_of
from ..store.signals import signals_of
from ..targets.supports import Support
from .cost import Estimate, estimate, model_shape
from .fidelity import TEMPERATURES, Fidelity, Measured, expected_seconds, measure_fidelity, pieces
from .grid import Setting, grid
from .large_run import LargeRun
from .unit_costs import measure_unit_costs

logger = logging.getLogger(__name__)

_LEARNED_POSITIONS, _MEASURED_POSITIONS, _MEASURED_ROWS = 8192, 2048, 8
"""Of the sample: as many are learned from as stage one learns from in a small corpus."""


@dataclass(frozen=True)
class Plan:
    """What caching the corpus of a recipe takes."""

    setting: Setting
    """The recipe's own."""
    tokens: int
    bytes_per_position: float
    """Of targets and rows."""
    signals: dict[str, int]
    """Bytes per position of each signal."""
    heldout_bytes: int
    folder: Place
    """Holds the caches."""
    free_bytes: int | None
    """Of the folder's disk; None for an object store."""
    written_bytes: int
    """Of the shards that are committed already."""
    files: int
    fidelity: Fidelity | None
    """Measured on a sample; None without a probe."""
    estimate: Estimate | None
    """From configuration and public figures; None with a probe and no GPU named."""
    large_run: LargeRun | None
    """What many machines take; None likewise."""

    @property
    def bytes(self) -> int:
        """Of the training cache."""
        return round(self.tokens * (self.bytes_per_position + sum(self.signals.values())))

    @property
    def teacher_hours(self) -> float | None:
        """Of stage one on this machine, from the measured speed."""
        return None if self.fidelity is None else self.tokens / self.fidelity.teacher_tokens_per_second / 3600

    def check_disk(self) -> None:
        """Raises RecipeError where the disk has less space than the caches still need."""
        missing = self.bytes + self.heldout_bytes - self.written_bytes
        if self.free_bytes is not None and missing > self.free_bytes:
            raise RecipeError(
                f"{self.folder}: the cache needs {decimal(missing)} more, the disk has {decimal(self.free_bytes)}: "
                "choose another run_dir or cache.location, or a setting with fewer bytes from `logit-cache plan`"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            **self.measured(),
            "signals": self.signals,
            "bytes": self.bytes,
            "heldout_bytes": self.heldout_bytes,
            "free_bytes": self.free_bytes,
            **({} if self.estimate is None else {"estimate": asdict(self.estimate)}),
            **({} if self.large_run is None else {"large_run": self.large_run.to_json()}),
        }

    def measured(self) -> dict[str, Any]:
        """The part that the probe adds."""
        if self.fidelity is None:
            return {}
        return {"fidelity": self.fidelity.to_json(), "teacher_hours": self.teacher_hours}


def plan_capture(
    recipe: Recipe,
    *,
    probe: bool = True,
    full: bool = False,
    sample_rows: int | None = None,
    gpu: str | None = None,
    num_gpus: int = 1,
    utilisation: float = 0.4,
    tokens: int | None = None,
    bytes_per_position: float | None = None,
    nodes: int = 1,
    node_cores: int | None = None,
    student_rate: float = 200_000.0,
) -> Plan:
    """Plan stage one of a recipe; with a probe also write run_dir/plan.json and its figure, run_dir/plan.png.

    `full` measures more settings (`grid`), on `sample_rows` rows, a fifth of them to measure on; by default 8,192
    positions are learned from, and eight rows or more measured on. `gpu`, `num_gpus` and `utilisation` are those of `estimate`, `nodes`, `node_cores` and
    `student_rate` those of `LargeRun`. `tokens` replaces the size of the prepared
    corpus, `bytes_per_position` the assumption of a plan without probe.

    Raises IncompleteError where the corpus is not prepared and not replaced by `tokens`, RecipeError for settings that
    the teacher cannot serve and for a probe of a teacher that does not fit one device.
    """
    rows, heldout_rows = _prepared_rows(recipe, needed=probe or tokens is None)
    tokens = rows * recipe.corpus.row_length if tokens is None else tokens
    config = teacher_config(recipe)
    shape = model_shape(config, recipe.corpus.objective, recipe.teacher.trust_remote_code)
    setting = Setting.from_recipe(recipe.cache, min(shape.hidden_size, shape.vocab_size - 1))
    with recipe_error("cache"):
        setting.support.check(shape.vocab_size)
    fidelity = _probe(recipe, setting, full, sample_rows) if probe else None
    if fidelity is not None:
        bytes_per_position = fidelity.lines[0].bytes_per_position
    elif bytes_per_position is None:
        bytes_per_position = (
            estimated_bytes(setting.support, setting.profile, setting.rank) + TEXT_BYTES[setting.profile]
        )
    kept = signals_of(recipe.cache.signals, config, recipe.corpus.row_length)
    signals = {signal.name: signal.bytes_per_position for signal in kept}
    row_length = min(recipe.corpus.row_length, tokens)
    shard_rows = shard_rows_of(recipe, recipe.paths.cache, tokens // row_length)
    cost = estimate(
        shape,
        tokens=tokens,
        row_length=row_length,
        bytes_per_position=bytes_per_position + sum(signals.values()),
        gpu=gpu or "h100",
        num_gpus=num_gpus,
        utilisation=utilisation,
        batch_rows=CPU_ROWS if recipe.teacher.batch_rows == "auto" else recipe.teacher.batch_rows,
        tail_rank=setting.rank,
        shard_rows=shard_rows,
        epochs=_epochs(recipe, tokens),
    )
    large_run = None
    if gpu is not None or not probe:
        large_run = LargeRun.of(
            cost,
            measure_unit_costs(recipe, setting, shape.vocab_size),
            shards=-(-(tokens // row_length) // shard_rows),
            shard_rows=shard_rows,
            corpus_size=tokens * _row_bytes(recipe, shape.vocab_size),
            nodes=nodes,
            node_cores=node_cores,
            student_rate=student_rate,
        )
    folder, heldout = recipe.paths.cache.parent, Support("topk", k=recipe.cache.heldout_k)
    plan = Plan(
        setting=setting,
        tokens=tokens,
        bytes_per_position=bytes_per_position,
        signals=signals,
        heldout_bytes=round(
            heldout_rows
            * recipe.corpus.row_length
            * (estimated_bytes(heldout, "compact", setting.rank) + TEXT_BYTES["compact"])
        ),
        folder=folder,
        free_bytes=_free_bytes(folder),
        written_bytes=sum(sum(files_in(CachePaths(cache).shards).values()) for cache in recipe.paths.sides.values()),
        files=cost.files,
        fidelity=fidelity,
        estimate=None if large_run is None else cost,
        large_run=large_run,
    )
    if probe:
        write_json(recipe.paths.plan, {"tokens": plan.tokens, **plan.measured()})
        if find_spec("matplotlib") is not None:
            from .figures import draw_fidelity, figure_png, use_fonts

            use_fonts()
            lines = read_json(recipe.paths.plan, "run `logit-cache plan` again")["fidelity"]["lines"]
            write_bytes(recipe.paths.plan.with_suffix(".png"), figure_png(draw_fidelity(lines)))
    return plan


def fidelity_table(fidelity: Fidelity) -> list[dict[str, str]]:
    """One row per setting, the recipe's own first."""

    def cell(text: str, line: Measured, kind: str, t: float) -> str:
        return f"{text}{'*' if t in line.front.get(kind, ()) else ' '}"

    def kl(line: Measured, t: float) -> str:
        if t not in line.kl:
            return "- "
        return cell(f"{line.kl[t]:.3f}", line, "kl", t) if line.setting.rank else f"({line.kl[t]:.2f})"

    def gradient(line: Measured, name: str, t: float) -> str:
        errors = line.gradient[name]
        return cell(f"{100 * errors[t]:.1f}", line, name, t) if t in errors else "- "

    return [
        {
            "support": str(line.setting),
            "bytes": f"{line.bytes_per_position:.1f}",
            "mass": f"{line.mass:.2f}",
            "codec": f"{line.rounding[1.0]:.0e}",
            **{f"KL {t:g} ": kl(line, t) for t in TEMPERATURES},
            **{f"{name} {t:g} ": gradient(line, name, t) for name in line.gradient for t in TEMPERATURES},
        }
        for line in fidelity.lines
    ]


def _prepared_rows(recipe: Recipe, needed: bool) -> tuple[int, int]:
    """Rows of the training and the held-out cache; (0, 0) where they are neither prepared nor needed."""
    try:
        return PackedRows.of_cache(recipe.paths.cache).rows, PackedRows.of_cache(recipe.paths.heldout).rows
    except IncompleteError as error:
        if needed:
            raise IncompleteError(f"{error} (or give --no-probe and --tokens)") from error
        return 0, 0


def _probe(recipe: Recipe, setting: Setting, full: bool, sample_rows: int | None) -> Fidelity:
    """The fidelity table."""
    teacher = teacher_of(recipe)
    logger.info(f"teacher: {recipe.teacher.model}, {teacher.placement}")
    if not has_local_weights(teacher.model):
        raise RecipeError("the fidelity table needs a teacher that fits one device: use --no-probe")
    largest_rank = min(teacher.output_layer.weight.shape[1], teacher.vocab_size - 1)
    settings = grid(setting, recipe.cache.tail_step, largest_rank, teacher.vocab_size, full)
    wanted = probe_students(recipe, layer_list(teacher.model)[1])
    students = {name: _possible(teacher.model, layers) for name, layers in wanted.items()}
    corpus = PackedRows.of_cache(recipe.paths.cache)
    batch_rows = rows_per_pass(recipe.teacher.batch_rows, teacher, corpus.row_length)
    log_row_starts(teacher, corpus, batch_rows)
    measured = max(-(-_MEASURED_POSITIONS // corpus.row_length), _MEASURED_ROWS)
    learned = -(-_LEARNED_POSITIONS // corpus.row_length)
    if sample_rows is not None:
        measured = max(sample_rows // 5, 1)
        learned = sample_rows - measured
    seconds = expected_seconds(teacher, corpus, settings, learned, measured, batch_rows)
    logger.info(
        f"plan: {len(settings)} settings on {min(learned + measured, corpus.rows)} rows take about {duration(seconds)} here"
    )
    with Meter("plan", pieces(students, settings), "pieces") as meter:
        return measure_fidelity(
            teacher,
            students,
            corpus,
            training_codec(recipe.cache, teacher.facts),
            settings,
            shard_rows=shard_rows_of(recipe, recipe.paths.cache, corpus.rows),
            seed=recipe.seed,
            learned_rows=learned,
            measured_rows=measured,
            batch_rows=batch_rows,
            targets_on=recipe.cache.targets_on,
            progress=lambda name: meter.advance(1, name),
        )


def probe_students(recipe: Recipe, layers: int) -> dict[str, int | list[int]]:
    """The students whose gradients are compared: one of nine tenths of the teacher's layers, near it, and one far from
    it, of the layers of the recipe's first student that names any, else of half of them."""
    own = next((student.layers for student in recipe.students.values() if student.layers is not None), None)
    return {"near": max(layers - max(round(layers / 10), 1), 1), "far": own or max(layers // 2, 1)}


def _possible(model: Any, layers: int | list[int]) -> int | list[int]:
    """These layers, or as many from the first one on, where an architecture cannot be made of others.

    Raises RecipeError where neither is possible.
    """
    try:
        check_layers(model, layers)
    except RecipeError:
        first = list(range(layers if isinstance(layers, int) else len(layers)))
        check_layers(model, first)
        return first
    return layers


def _row_bytes(recipe: Recipe, vocab_size: int) -> float:
    """Of a position, on disk, as `prepare` writes them."""
    corpus = recipe.corpus
    some_are_left_out = corpus.messages_column is not None or corpus.mask_column is not None
    third = LABELS if corpus.objective == "masked" else LOSS_MASK if some_are_left_out else None
    return stored_bytes(vocab_size, third, corpus.row_length)


def _epochs(recipe: Recipe, tokens: int) -> float:
    """Passes of the first student over `tokens`; 1 without a student."""
    student = next(iter(recipe.students.values()), None)
    if student is None:
        return 1.0
    return student.epochs or student.steps * student.step_rows * recipe.corpus.row_length / tokens


def _free_bytes(folder: Place) -> int | None:
    """Free space of the disk of a directory that may not exist yet; None for an object store."""
    if not isinstance(folder, Path):
        return None
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free
