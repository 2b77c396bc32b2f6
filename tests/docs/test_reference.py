"""The recipe reference is that of the schema."""

from __future__ import annotations

import pytest
from logit_cache.recipe.section import Section
from logit_cache.stages.reference import README, SECTIONS, written


def sections(section: type[Section] = Section) -> list[type[Section]]:
    return [inner for direct in section.__subclasses__() for inner in (direct, *sections(direct))]


def test_the_reference_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert written(text) == text, "run python -m logit_cache.stages.reference"


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_key_is_described(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no description"
        assert not field.description.endswith("."), f"{section.__name__}.{name}: the reference adds the full stop"


def test_every_key_is_in_the_reference() -> None:
    """JobConfig has no table of its own: its keys are those of [cluster]."""
    shown = {name for section, _ in SECTIONS.values() for name in section.model_fields}
    assert shown >= {name for section in sections() for name in section.model_fields}
