"""Losses between a student's inner states and the teacher's: cosine, hidden states, attention scores.

    cosine      mean over positions of 1 - cos(h_s, h_t)                              (Sanh et al. 2019, arXiv 1910.01108)
    hidden      mean over positions and components of (W h_s + b - h_t)^2             (Jiao et al. 2020, arXiv 1909.10351, eq. 8)
    attention   mean over attention heads and visible pairs of (a_s - a_t)^2, a = q k^T / sqrt(d) before the softmax (ibid., eq. 7)

Several layers are summed. No mean includes padding, and attention's no pair of positions that cannot see each other;
the published code of TinyBERT divides by all of them, padding included, so its numbers are smaller on short texts. W
and b are shared by all layers and trained with the student, but no part of it; they exist only where the widths differ.

Each is summed in float32 and divided by a count, of the batch or of the whole optimizer step, as in `loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.errors import RecipeError
from ..models.sizes import ModelSizes
from ..models.taps import attention_scores, visible_pairs
from ..store.signals import Signal
from .sums import mean_over, promote

Pairs = Sequence[Sequence[int]]
"""Student layer, teacher layer."""


def cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor, positions: Tensor | int | None = None) -> Tensor:
    """1 - cos(student, teacher) over the last axis, averaged over `mask`, or divided by `positions`.

    student, teacher [..., D], mask [...] bool. A factor per position of the teacher changes nothing.
    """
    return mean_over(1 - F.cosine_similarity(promote(student), promote(teacher), dim=-1), mask, positions)


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor, positions: Tensor | int | None = None) -> Tensor:
    """Mean squared difference of hidden states [..., D] over components and the positions of `mask` [...]."""
    return mean_over((promote(student) - promote(teacher)).square().mean(-1), mask, positions)


def attention_loss(student: Tensor, teacher: Tensor, pairs: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Mean squared difference of scores [B, L, A, L] over the A attention heads and the visible `pairs` [B, L, L].

    The sum excludes padding and all other pairs that cannot see each other; `count` replaces their number as divisor.
    """
    return mean_over((promote(student) - promote(teacher)).square().mean(2), pairs, count)


@dataclass(frozen=True)
class Matching:
    """Pairs of student and teacher layers, and the weight of each loss."""

    cosine_weight: float = 0.0
    cosine_layers: Pairs = ()
    hidden_weight: float = 0.0
    hidden_layers: Pairs = ()
    attention_weight: float = 0.0
    attention_layers: Pairs = ()

    @property
    def weights(self) -> dict[str, float]:
        """Loss -> weight, of the losses with a weight above 0."""
        weights = {"cosine": self.cosine_weight, "hidden": self.hidden_weight, "attention": self.attention_weight}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def student_names(self) -> list[str]:
        """The student's signals that a `Tap` records."""
        hidden = [f"hidden.{student}" for student, _ in (*self.cosine_layers, *self.hidden_layers)]
        return list(dict.fromkeys([*hidden, *(f"qk.{student}" for student, _ in self.attention_layers)]))

    def teacher_names(self) -> list[tuple[str, ...]]:
        """The teacher's signals that the losses read: one of each tuple."""
        hidden = [(f"hidden.{teacher}",) for _, teacher in (*self.cosine_layers, *self.hidden_layers)]
        return [*hidden, *((f"attention.{teacher}", f"qk.{teacher}") for _, teacher in self.attention_layers)]

    def check(self, model_config: Any, signals: dict[str, Signal], row_length: int, where: str = "") -> None:
        """Raises RecipeError for layers missing in student or cache, and for attention windows shorter than the rows.

        `where` begins the message, e.g. "students.small: ".
        """
        text = model_config.get_text_config()
        sizes = ModelSizes.of(model_config)
        layers, heads = sizes.layers, sizes.heads or 0
        hidden = [*self.cosine_layers, *self.hidden_layers]
        for student, teacher, last, names in (
            *((s, t, layers, [f"hidden.{t}"]) for s, t in hidden),
            *((s, t, layers - 1, [f"attention.{t}", f"qk.{t}"]) for s, t in self.attention_layers),
        ):
            if not 0 <= student <= last:
                raise RecipeError(f"{where}the student has no layer {student} to match: its last one is {last}")
            held = next((signals[name] for name in names if name in signals), None)
            if held is None:
                raise RecipeError(
                    f"{where}the cache does not hold {' or '.join(names)}: add it to cache.signals (it has: "
                    f"{', '.join(signals) or 'targets only'})"
                )
            if held.heads not in (0, heads):
                raise RecipeError(
                    f"{held.name} has {held.heads} heads and the student {heads}: their scores do not match"
                )
            if held.codec == "direction" and [student, teacher] in [list(pair) for pair in self.hidden_layers]:
                raise RecipeError(
                    f"{where}{held.name} is kept as a direction, which tells no difference: keep it as int8"
                )

        window = getattr(text, "sliding_window", None)
        kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * layers
        for student, _ in self.attention_layers:
            if window is not None and window < row_length and kinds[student] == "sliding_attention":
                raise RecipeError(
                    f"{where}the student's layer {student} sees {window} tokens back and rows have {row_length}: match a "
                    "layer of full attention, or train on rows no longer than the window (row_length)"
                )

    def projection(self, model_config: Any, signals: dict[str, Signal]) -> nn.Linear | None:
        """The map from the student's width to the teacher's, None for equal widths.

        Raises RecipeError for several widths.
        """
        width = ModelSizes.of(model_config).hidden_size
        widths = {signals[f"hidden.{t}"].shape[0] for _, t in (*self.cosine_layers, *self.hidden_layers)} - {width}
        if len(widths) > 1:
            raise RecipeError(
                f"the teacher's hidden states have several widths {sorted(widths)}, and one map serves all: match layers of one width"
            )
        return nn.Linear(width, widths.pop()) if widths else None

    def losses(
        self,
        student: dict[str, Tensor],
        batch: dict[str, Any],
        heads: int,
        projection: nn.Module | None = None,
        *,
        causal: bool,
        positions: Tensor | int | None = None,
        pair_count: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Loss -> value without its weight, from the student's signals (`Tap.values`) and a batch with the teacher's.

        `heads` is the student's number of attention heads; `positions` and `pair_count` replace the batch's own counts.
        """
        segments = batch["segment_ids"]
        real = segments >= 0

        def projected(layer: int) -> Tensor:
            value = student[f"hidden.{layer}"]
            return value if projection is None else projection(value)

        result = {}
        if self.cosine_weight > 0:
            parts = [cosine_loss(projected(s), batch[f"hidden.{t}"], real, positions) for s, t in self.cosine_layers]
            result["cosine"] = torch.stack(parts).sum()
        if self.hidden_weight > 0:
            parts = [hidden_loss(projected(s), batch[f"hidden.{t}"], real, positions) for s, t in self.hidden_layers]
            result["hidden"] = torch.stack(parts).sum()
        if self.attention_weight > 0:
            pairs = visible_pairs(segments, causal=causal)
            parts = []
            for s, t in self.attention_layers:
                own = attention_scores(promote(student[f"qk.{s}"]), heads, pairs)
                scores = batch.get(f"attention.{t}")
                if scores is None:
                    scores = attention_scores(batch[f"qk.{t}"], heads, pairs)
                parts.append(attention_loss(own, scores, pairs, pair_count))
            result["attention"] = torch.stack(parts).sum()
        return result
