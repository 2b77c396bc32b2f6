"""section."""

from __future__ import annotations

import os.path
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
)

Tail = Literal["bucket", "renormalize", "drop", "uniform", "label"]
Mode = Literal["cached", "ce", "online"]
Name = Annotated[str, AfterValidator(os.path.expanduser)]  # of a directory, or of something else
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as NumPy takes it
Scheduler = Literal[  # those of transformers that need no arguments of their own
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
WHERE = ("device", "dtype", "save_steps", "log_steps", "loader_workers", "report_to")
"""Keys of a student that say where it is trained and how often it tells, not what it learns."""
SupportName = Literal["topk", "topp", "threshold", "sampled"]
Profile = Literal["compact", "fast"]
MAX_DRAWS = 4096
"""Most samples of one position; the smallest tau is its inverse."""
DEFAULT_KNOTS = (0.25, 0.5, 0.75, 0.875)
"""Inverse temperatures of the tail curve other than 1. Chosen by the worst error of the tail mass at any T from 1 to 8, on
SmolLM2's top 64 to 32: 0.006 to 0.011 at T = 1.1 without 7/8, 0.002 with it."""
SIGNAL_CODECS = ("int8", "float16", "direction")
Divergence = Literal[
    "kl",
    "soft_cross_entropy",
    "reverse_kl",
    "jensen_shannon",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
    "tail_aware_kl",
]


def parse_signal(text: str) -> tuple[str, str]:
    """ "hidden.6" or "hidden.6:float16" -> name and codec, int8 by default. Raises ValueError for anything else."""
    name, _, codec = text.partition(":")
    kind = re.fullmatch(r"(hidden|attention|qk)\.(0|[1-9]\d*)", name)
    if kind is None:
        raise ValueError(f"signal {text!r}: write hidden.N, attention.N or qk.N, N the number of a layer")
    codec = codec or "int8"
    if codec not in SIGNAL_CODECS or (codec == "direction" and kind[1] != "hidden"):
        raise ValueError(f"signal {text!r}: write :int8 or :float16 behind it, or :direction behind a hidden state")
    return name, codec


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flags(cls, value: Any) -> Any:
        """TOML tells true from 1; no key of a recipe is a flag, and a flag must not become a number."""
        if isinstance(value, bool):
            raise ValueError("true and false are not values of this key")
        return value
