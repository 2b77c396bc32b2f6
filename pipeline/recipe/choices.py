"""The values that recipe keys choose from, and the defaults that library functions share with the recipe."""

from __future__ import annotations

import re
from typing import Literal, get_args

SupportName = Literal["topk", "topp", "threshold", "sampled"]
Profile = Literal["compact", "fast"]
Mode = Literal["cached", "ce", "online"]
Tail = Literal["shape", "bucket", "renormalize", "renormalize_teacher", "drop", "uniform", "label"]
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
Scheduler = Literal[  # those of transformers that need no arguments of their own
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]

MAX_DRAWS = 4096
"""Maximum of samples per position; its inverse is the smallest tau."""
DEFAULT_KNOTS = (0.25, 0.5, 0.75, 0.875)
"""Inverse temperatures of the tail curve other than 1.

Chosen by the worst error of the tail mass at any T from 1 to 8, on SmolLM2's top 64 to 32: 0.006 to 0.011 at T = 1.1
without 7/8, 0.002 with it.
"""
DEFAULT_TAIL_RANK = 32
"""Coordinates of a tail's shape.

On SmolLM2 and Shakespeare, the top 16 with 32 coordinates take 30 bytes a position and miss 0.16, 0.19 and 0.07 nats of
KL at T = 1, 2 and 4; the gradient of a student near the teacher is off by 2 and 4 % at T = 1 and 2. The top 64 with a
bucket, in 78 bytes: 3 and 17 %.
"""
DEFAULT_TAIL_STEP = 0.15
"""Step of the coordinates."""
DEFAULT_K, DEFAULT_K_OF_BUCKETS = 16, 64
"""Kept tokens of a position, where its tail has a shape and where it is a bucket."""
SignalKind = Literal["hidden", "attention", "qk"]
SIGNAL_CODECS = ("int8", "float16", "direction")


def parse_signal(text: str) -> tuple[str, str]:
    """ "hidden.6" or "hidden.6:float16" -> name and codec, int8 by default. Raises ValueError for anything else."""
    name, _, codec = text.partition(":")
    kind = re.fullmatch(rf"({'|'.join(get_args(SignalKind))})\.(0|[1-9]\d*)", name)
    if kind is None:
        raise ValueError(f"signal {text!r}: write hidden.N, attention.N or qk.N, where N is the number of a layer")
    codec = codec or "int8"
    if codec not in SIGNAL_CODECS or (codec == "direction" and kind[1] != "hidden"):
        raise ValueError(f"signal {text!r}: append :int8 or :float16, or :direction for a hidden state")
    return name, codec
