"""Losses that bring a student's inner states to the teacher's: cosine, hidden states, attention scores.

    cosine      mean over positions of 1 - cos(h_s, h_t)                              (Sanh et al. 2019, arXiv 1910.01108)
    hidden      mean over positions and components of (W h_s + b - h_t)^2             (Jiao et al. 2020, arXiv 1909.10351, eq. 8)
    attention   mean over heads and visible pairs of (a_s - a_t)^2, a = q k^T / sqrt(d) before the softmax    (ibid., eq. 7)

Several layers are summed. Padding is left out of every mean, and of attention every pair that cannot see each other; the
published code of TinyBERT divides by all of them, padding included, so its numbers are smaller on short texts. W and b are
shared by all layers, trained with the student, and no part of it; without them both must have the same width.

Each is summed in float32 and divided by a count that may be that of the whole optimizer step, as in `losses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.errors import RecipeError
from ..models.taps import attention_scores, visible_pairs
from ..store.signals import Signal

Pairs = Sequence[Sequence[int]]
"""Student layer, teacher layer."""


def cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor, positions: Tensor | int | None = None) -> Tensor:
    """1 - cos(student, teacher) over the last axis, averaged over `mask`, or over `positions` where that is given.

    student, teacher [..., D], mask [...] bool. A factor per position of the teacher changes nothing.
    """
    apart = 1 - F.cosine_similarity(_float(student), _float(teacher), dim=-1)
    return _mean(apart, mask, positions)


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor, positions: Tensor | int | None = None) -> Tensor:
    """Mean squared difference of hidden states [..., D] over components and the positions of `mask` [...]."""
    return _mean((_float(student) - _float(teacher)).square().mean(-1), mask, positions)


def attention_loss(student: Tensor, teacher: Tensor, pairs: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Mean squared difference of scores [B, L, H, L] over heads and the visible `pairs` [B, L, L], or over `count` pairs.

    Padding and all other pairs that cannot see each other are left out of sum and mean.
    """
    difference = (_float(student) - _float(teacher)).square().mean(2)
    return _mean(difference, pairs, count)


def _float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _mean(values: Tensor, mask: Tensor, count: Tensor | int | None) -> Tensor:
    count = mask.sum() if count is None else count
    count = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    return torch.where(mask, values, 0.0).sum() / count


@dataclass(frozen=True)
class Matching:
    """Which layers of a student learn from which of the teacher's, and how much each loss weighs."""

    cosine_weight: float = 0.0
    cosine_layers: Pairs = ()
    hidden_weight: float = 0.0
    hidden_layers: Pairs = ()
    attention_weight: float = 0.0
    attention_layers: Pairs = ()

    @property
    def weights(self) -> dict[str, float]:
        """Of the losses that are on."""
        given = {"cosine": self.cosine_weight, "hidden": self.hidden_weight, "attention": self.attention_weight}
        return {name: weight for name, weight in given.items() if weight > 0}

    def student_names(self) -> list[str]:
        """What a `Tap` takes of the student."""
        hidden = [f"hidden.{student}" for student, _ in (*self.cosine_layers, *self.hidden_layers)]
        return list(dict.fromkeys([*hidden, *(f"qk.{student}" for student, _ in self.attention_layers)]))

    def check(self, model_config: Any, signals: dict[str, Signal], row_length: int, where: str = "") -> None:
        """Raises RecipeError for layers that the student does not have, that the cache does not hold, or that see less of
        a row than the scores that they would be matched in."""
        text = model_config.get_text_config()
        layers, heads = int(text.num_hidden_layers), int(text.num_attention_heads)
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
        """The map from the student's width to the teacher's, where they differ."""
        width = int(model_config.get_text_config().hidden_size)
        widths = {signals[f"hidden.{t}"].shape[0] for _, t in (*self.cosine_layers, *self.hidden_layers)} - {width}
        if len(widths) > 1:
            raise RecipeError(
                f"the teacher's hidden states have different widths ({sorted(widths)}): one map serves all"
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
        """Each loss that is on, without its weight, from the values of a `Tap` and a batch with the teacher's signals."""
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
                own = attention_scores(_float(student[f"qk.{s}"]), heads, pairs)
                wanted = batch.get(f"attention.{t}")
                if wanted is None:
                    wanted = attention_scores(batch[f"qk.{t}"], heads, pairs)
                parts.append(attention_loss(own, wanted, pairs, pair_count))
            result["attention"] = torch.stack(parts).sum()
        return result
