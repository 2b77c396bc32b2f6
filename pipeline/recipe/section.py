"""The base class of all recipe tables: unknown keys are errors, values are immutable."""

from __future__ import annotations

import os.path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Name = Annotated[str, AfterValidator(os.path.expanduser)]
"""A directory, or the name of something that is no directory; `~` is expanded."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed, in the range of NumPy."""


class Section(BaseModel):
    """One table of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a key is no flag: pydantic would take them for 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are not values of this key")
        return value
