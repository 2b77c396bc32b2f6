"""The arms of a study: each is one way to train the same student, over all seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..base.durable import json_digest
from ..base.places import place
from ..recipe.choices import Tail
from ..recipe.schema import Recipe
from ..recipe.student import PLACEMENT_KEYS, StudentConfig, deciding_settings

STUDENT = "student"
"""Name of the student in the recipe that all arms train."""
_LAYOUT_KEYS = {"location", "shard_rows", "profile"}
"""Keys of a cache that do not change what a student learns."""


@dataclass(frozen=True)
class Arm:
    """One way to train the student; `cache` names a cache of the study, None for online and labels alone."""

    name: str
    cache: str | None = None
    mode: str = "cached"
    tail: Tail | None = None
    temperature: float = 1.0
    longer: float = 1.0
    """Times the steps of the others."""
    warm: bool = False
    """Starts from the student of the labels alone, of the same seed, instead of from fresh weights."""

    @property
    def labels_reference(self) -> str:
        """The arm that has closed nothing of the gap."""
        return "warm labels" if self.warm else "labels"

    def online_reference(self, recipe: Recipe) -> str:
        """The arm that has closed all of it; for the labels' own lines that of the first temperature."""
        temperature = recipe.study.temperatures[0] if self.mode == "ce" else self.temperature
        return f"{'warm ' * self.warm}online T={temperature:g}"

    @property
    def file_stem(self) -> str:
        return self.name.replace(" ", "-").replace("=", "")

    def student(self, recipe: Recipe) -> StudentConfig:
        """The settings of its students, before a warm start."""
        config = recipe.student(STUDENT)
        changes = {"mode": self.mode, "temperature": self.temperature, "tail": self.tail}
        return config.model_copy(update={**changes, "steps": round(config.steps * self.longer)})

    def identity(self, recipe: Recipe, seed: int) -> str:
        """Digest of all settings that a result of this arm depends on; not of the teacher's weights, which another
        machine makes with other rounding.

        Keys with their default are left out, so that results outlive a new key.
        """
        teacher, cache = recipe.teacher, None
        if self.cache is not None:
            full = cache_recipe(recipe, self.cache).cache
            cache = full.model_dump(mode="json", exclude_defaults=True, exclude=_LAYOUT_KEYS)
        training = None if teacher.training is None else _given(teacher.training, PLACEMENT_KEYS)
        facts: dict[str, Any] = {
            "student": _given(self.student(recipe)),
            "warm": self.warm,
            "seed": seed,
            "cache": cache,
            "corpus": recipe.corpus.model_dump(mode="json", exclude_defaults=True),
            "teacher": [teacher.model, teacher.revision, teacher.dtype, training, recipe.seed],
            "heldout_k": recipe.cache.heldout_k,
        }
        return json_digest(facts)


def _given(config: StudentConfig, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """What decides the weights of a student or a teacher, without defaults."""
    deciding, default = (
        deciding_settings(each.model_dump(mode="json")) for each in (config, type(config).model_construct())
    )
    return {
        key: value for key, value in deciding.items() if key not in left_out and (key, value) not in default.items()
    }


def arms(recipe: Recipe) -> Iterator[Arm]:
    """Labels alone, online, and every cache with every tail treatment that fits it; labels alone for longer; and some
    caches from a warm start, with references of their own. Caches come in the order of the recipe."""
    study = recipe.study
    yield Arm("labels", mode="ce")
    yield from _with_teacher(recipe, list(study.caches), study.tails)
    if study.longer_labels > 1:
        yield Arm(f"labels {study.longer_labels:g}x", mode="ce", longer=study.longer_labels)
    if study.warm:
        yield Arm("warm labels", mode="ce", warm=True)
        yield from _with_teacher(recipe, study.warm, study.warm_tails, warm=True)


def _with_teacher(recipe: Recipe, caches: list[str], tails: list[Tail], warm: bool = False) -> Iterator[Arm]:
    temperatures, prefix = recipe.study.temperatures, "warm " * warm
    for temperature in temperatures:
        yield Arm(f"{prefix}online T={temperature:g}", None, "online", None, temperature, warm=warm)
    for name in caches:
        cache = cache_recipe(recipe, name).cache
        # A cache with a shape or with samples has a treatment of its own only.
        own = bool(cache.rank) or cache.support not in ("topk", "topp")
        for temperature in recipe.study.only_at.get(name, temperatures):
            for tail in (None,) if own else tails:
                title = name if tail is None else f"{name} {tail}"
                yield Arm(f"{prefix}{title} T={temperature:g}", name, "cached", tail, temperature, warm=warm)


def cache_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe of one cache of the study, a run of its own inside that of the study."""
    settings = recipe.cache.model_dump()
    if recipe.cache.location is not None:
        settings["location"] = str(place(recipe.cache.location) / name)
    cache = type(recipe.cache).model_validate({**settings, **recipe.study.caches[name].model_dump(exclude_unset=True)})
    return recipe.model_copy(update={"run_dir": recipe.run_dir / "caches" / name, "cache": cache})
