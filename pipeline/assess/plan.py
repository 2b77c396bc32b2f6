"""What stage one of a recipe will take, before it runs: bytes, files, hours, disk, and the fidelity table of a sample.

With a probe the teacher runs over a few rows, and bytes and speed are measured; without, they follow from the teacher's
configuration and public figures of a GPU (`assess.cost`).
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from ..base.durable import write_json
from ..base.errors import IncompleteError, RecipeError, recipe_error
from ..base.places import Place, files_in
from ..base.progress import Meter
from ..corpus.rows import PackedRows
from ..models.loading import load_config
from ..models.placement import has_local_weights
from ..models.student_layers import student_from_layers
from ..models.teacher import teacher_of
from ..models.teacher_source import resolve_teacher
from ..recipe.paths import CachePaths
from ..recipe.schema import Recipe
from ..store.shard_size import TEXT_BYTES, estimated_bytes, shard_rows_of
from ..store.signals import signals_of
from ..targets.supports import Support
from .cost import Estimate, estimate, model_shape
from .fidelity import GRADIENT_TEMPERATURES, TEMPERATURES, Fidelity, Measured, Setting, grid, measure_fidelity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What caching the corpus of a recipe takes."""

    setting: Setting
    """The recipe's own."""
    tokens: int
    bytes_per_position: float
    """Of the targets."""
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

    @property
    def bytes(self) -> int:
        """Of the training cache: targets, text and signals."""
        others = TEXT_BYTES[self.setting.profile] + sum(self.signals.values())
        return round(self.tokens * (self.bytes_per_position + others))

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
    sample_rows: int = 16,
    gradient_rows: int = 4,
    gpu: str | None = None,
    num_gpus: int = 1,
    utilisation: float = 0.4,
    tokens: int | None = None,
    bytes_per_position: float | None = None,
) -> Plan:
    """Plan stage one of a recipe; with a probe also write run_dir/plan.json, from which `report` draws a figure.

    `sample_rows` and `gradient_rows` size the probe (`measure_fidelity`); `gpu`, `num_gpus` and `utilisation` are those
    of `estimate`. `tokens` replaces the size of the prepared corpus, `bytes_per_position` the assumption of a plan
    without probe.

    Raises IncompleteError where the corpus is not prepared and not replaced by `tokens`, RecipeError for settings that
    the teacher cannot serve and for a probe of a teacher that does not fit one device.
    """
    setting = Setting.from_recipe(recipe.cache)
    rows, heldout_rows = _prepared_rows(recipe, needed=probe or tokens is None)
    tokens = rows * recipe.corpus.row_length if tokens is None else tokens
    config = load_config(resolve_teacher(recipe), recipe.teacher.revision)
    shape = model_shape(config, recipe.corpus.objective)
    with recipe_error("cache"):
        setting.support.check(shape.vocab_size)
    fidelity = _probe(recipe, setting, sample_rows, gradient_rows) if probe else None
    if fidelity is not None:
        bytes_per_position = fidelity.lines[0].bytes_per_position
    elif bytes_per_position is None:
        bytes_per_position = estimated_bytes(setting.support, setting.profile, recipe.cache.rank)
    kept = signals_of(recipe.cache.signals, config, recipe.corpus.row_length)
    signals = {signal.name: signal.bytes_per_position for signal in kept}
    cost = estimate(
        shape,
        tokens=tokens,
        row_length=min(recipe.corpus.row_length, tokens),
        bytes_per_position=bytes_per_position + TEXT_BYTES[setting.profile] + sum(signals.values()),
        gpu=gpu or "h100",
        num_gpus=num_gpus,
        utilisation=utilisation,
        batch_rows=recipe.teacher.batch_rows,
        tail_rank=recipe.cache.rank,
        shard_rows=shard_rows_of(recipe, recipe.paths.cache, tokens // min(recipe.corpus.row_length, tokens)),
        epochs=_epochs(recipe, tokens),
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
            * (estimated_bytes(heldout, "compact", recipe.cache.rank) + TEXT_BYTES["compact"])
        ),
        folder=folder,
        free_bytes=_free_bytes(folder),
        written_bytes=sum(sum(files_in(CachePaths(cache).shards).values()) for cache in recipe.paths.sides.values()),
        files=cost.files,
        fidelity=fidelity,
        estimate=None if probe and gpu is None else cost,
    )
    if probe:
        write_json(recipe.paths.plan, {"tokens": plan.tokens, **plan.measured()})
    return plan


def fidelity_table(fidelity: Fidelity, tokens: int) -> list[dict[str, str]]:
    """One row per setting, the recipe's own first; `tokens` is the size of the corpus."""

    def gradient(line: Measured, t: float) -> str:
        if t not in line.angle:
            return "- "
        return f"{line.angle[t]:.1f}° x {line.norm_ratio[t]:.2f}{'*' if t in line.front else ' '}"

    return [
        {
            "support": str(line.setting),
            "profile": line.setting.profile,
            "bytes": f"{line.bytes_per_position:.1f}",
            "corpus": decimal(round(line.bytes_per_position * tokens)),
            "mass": f"{line.mass:.3f}",
            **{f"KL T={t:g}": f"{line.kl[t]:.1e}" if t in line.kl else "-" for t in TEMPERATURES},
            **{f"gradient T={t:g} ": gradient(line, t) for t in GRADIENT_TEMPERATURES},
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


def _probe(recipe: Recipe, setting: Setting, sample_rows: int, gradient_rows: int) -> Fidelity:
    """The fidelity table; its student has the layers of the first student that names any, else half of them."""
    teacher = teacher_of(recipe)
    logger.info(f"teacher: {recipe.teacher.model}, {teacher.placement}")
    if not has_local_weights(teacher.model):
        raise RecipeError("the fidelity table needs a teacher that fits one device: use --no-probe")
    others = [
        other for other in grid(setting.knots) if other != setting and (other.support.k or 1) <= teacher.vocab_size
    ]
    layers = next((student.layers for student in recipe.students.values() if student.layers is not None), None)
    half = max(int(teacher.model.config.get_text_config().num_hidden_layers) // 2, 1)
    corpus = PackedRows.of_cache(recipe.paths.cache)
    with Meter("plan", 1 + len(others), "settings") as meter:
        return measure_fidelity(
            teacher,
            student_from_layers(teacher.model, layers or half).float(),
            corpus,
            [setting, *others],
            shard_rows=shard_rows_of(recipe, recipe.paths.cache, corpus.rows),
            seed=recipe.seed,
            sample_rows=sample_rows,
            gradient_rows=gradient_rows,
            batch_rows=recipe.teacher.batch_rows,
            targets_on=recipe.cache.targets_on,
            progress=lambda name: meter.advance(1, name),
        )


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
