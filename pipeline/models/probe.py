"""A test on a loaded model: which row layout keeps its documents apart, and do states and output layer give its logits?

The reference is each document alone. Two rows with different boundaries go through the model in every layout, the
cheapest first, and the first layout that agrees with the reference is the model's.

*Agree*: another batch changes the order of sums, and with it roundings. Per position, the relative difference of the
states is at most sqrt(layers) roundings of the dtype twice over (the roundings of the residual stream are independent),
plus the same of float32 sums of D terms (32 eps sqrt(D), whatever the dtype), plus four times what is measured where
only the batch differs: documents of equal length together. The last is what expert batching needs. Documents that see
each other differ by a tenth and more. So do the positions where a rounding turns a choice of experts or keys: it does
not repeat with other tokens, so one of three trials has to agree, and in less than float32, where every trial has some,
a tenth of the positions is left out; a leak changes more, since the documents are short.

*Thresholds*: windows, chunks and original positions change what happens inside a long document. Documents of the probe
are longer than those up to `_AFFORDABLE`. A longer one costs too much to run: windows and chunks then go through the
same code as short ones, which the test of all families runs; what looks at the positions of a whole pass is known from
the configuration, and such models get documents as rows (`_switch`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..base.errors import RecipeError, first_line
from .output_layer import OutputLayer
from .packing import (
    LayoutName,
    RowLayout,
    document_lengths,
    is_masked,
    layouts_by_cost,
    plain_inputs,
    unwrap_peft,
)
from .placement import input_device
from .sizes import ModelSizes
from .states import run_rows, run_to_head

_AFFORDABLE = 128
"""Documents of the probe grow up to this length to pass the thresholds of a configuration."""
_ORIGINAL = "original_max_position_embeddings"
_THRESHOLDS = ("sliding_window", "attention_chunk_size", "floor_scale", _ORIGINAL)
_MOST_NOISE = 0.03
_TRIALS = 3


@dataclass(frozen=True)
class Probe:
    """What the probe found."""

    layout: RowLayout
    rejected: dict[LayoutName, str]
    """Cheaper layouts, each with what is wrong with it."""
    attention: str
    """The attention kernel that it holds for."""

    def __str__(self) -> str:
        return f"rows {self.layout} ({_reasons(self.rejected) or 'as each document alone'})"


_PROBES: WeakKeyDictionary[Any, Probe] = WeakKeyDictionary()


def check_model(model: Any) -> Probe:
    """Find how rows go through a model, and check that states and output layer give its own logits; once per model.

    Raises RecipeError, in one line, for a model that cannot be used.
    """
    model = unwrap_peft(model)
    attention = str(model.config.get_text_config()._attn_implementation)
    known = _PROBES.get(model)
    if known is None or known.attention != attention:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                known = _probe(model, attention)
        finally:
            model.train(was_training)
        _PROBES[model] = known
    return known


def _probe(model: Any, attention: str) -> Probe:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise RecipeError(f"{name} has an encoder and a decoder: use a causal or masked language model")
    try:
        trials = _Trials(model)
    except (RecipeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the architecture raises for plain text
        raise RecipeError(f"{name} cannot run on text alone: {first_line(error)}") from error
    _check_logits(model, trials[0])
    if not is_masked(model) and not trials.any(partial(_is_causal, model)):
        raise RecipeError(
            f"{name} sees the tokens after a position: it is no causal model, set corpus.objective = 'masked' or use "
            "another one (is_decoder = false in its configuration?)"
        )
    by_pass, switch = _looks_at_passes(model.config)
    rejected: dict[LayoutName, str] = {}
    for layout in layouts_by_cost(model, input_device(model)):
        if by_pass is not None and layout in ("packed", "masks", "flash", "flattened"):
            rejected[layout] = by_pass
            continue
        found = RowLayout(layout, switch if layout == "documents" else None)
        try:
            if trials.any(partial(_agrees, model, found)):
                return Probe(found, rejected, attention)
            rejected[layout] = "mixes documents"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an architecture that does not take these arguments
            rejected[layout] = f"not taken ({first_line(error)[:60]})"
    raise RecipeError(
        f"{name} with attention {attention!r} does not keep documents apart, whatever the layout of their rows "
        f"({_reasons(rejected)}): use attention = 'sdpa' or 'eager', or another model"
    )


@dataclass(frozen=True)
class _Trial:
    """Two rows and what their documents give alone."""

    ids: Tensor
    segments: Tensor
    alone: Tensor
    """[2, L, D]"""
    limit: float
    """The difference up to which states agree; see the module's docstring."""


class _Trials:
    """Trials of other tokens each, made when they are asked for."""

    def __init__(self, model: Any) -> None:
        self._model, self._made = model, [_make_trial(model, 0)]

    def __getitem__(self, number: int) -> _Trial:
        return self._made[number]

    def any(self, holds: Callable[[_Trial], bool]) -> bool:
        """Whether something holds in a trial: a choice of experts or keys that rounding turned does not repeat, what
        documents see of each other does."""
        for number in range(_TRIALS):
            if number == len(self._made):
                self._made.append(_make_trial(self._model, number))
            if holds(self._made[number]):
                return True
        return False


def _make_trial(model: Any, number: int) -> _Trial:
    ids, segments = _rows(model, number)
    alone = run_rows_alone(model, ids, segments)
    together = run_rows(model, RowLayout("equal documents"), ids, segments)
    return _Trial(ids, segments, alone, _limit(model, alone, together))


def _rows(model: Any, number: int) -> tuple[Tensor, Tensor]:
    """Token ids and documents [2, L] of the probe: four documents a row, one of a single token, of lengths that both rows
    have."""
    config = model.config.get_text_config()
    settings = {**model.config.to_dict(), **config.to_dict()}
    passed = [value for name in _THRESHOLDS if isinstance(value := settings.get(name), int) and value <= _AFFORDABLE]
    passed += [
        value for rope in _ropes(config) if isinstance(value := rope.get(_ORIGINAL), int) and value <= _AFFORDABLE
    ]
    first, long, last = 5, max([12, *(value + 6 for value in passed)]), 7
    lengths = torch.tensor([[first, long, 1, last], [last, first, 1, long]])
    segments = torch.stack([torch.arange(4).repeat_interleave(row) for row in lengths])
    # Plain tokens: special ones have meanings (padding, an image).
    special = {value for name, value in settings.items() if name.endswith("token_id") and isinstance(value, int)}
    plain = [token for token in range(min(model.get_input_embeddings().weight.shape[0], 4096)) if token not in special]
    ids = torch.tensor(plain)[torch.arange(segments.numel()).mul(7).add(11 + 5 * number) % len(plain)].view(
        segments.shape
    )
    device = input_device(model)
    return ids.to(device), segments.to(device)


def run_rows_alone(model: Any, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
    """The states [B, L, D] of rows without padding, from a pass for each document: what every layout must give."""
    starts, lengths = document_lengths(segment_ids)
    flat_N = input_ids.flatten()
    parts = []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        states = run_to_head(model, plain_inputs(model, flat_N[start : start + length].unsqueeze(0)))
        if states.shape[:2] != (1, length):
            raise RecipeError(f"{type(model).__name__}: its output layer reads more than one state a position")
        parts.append(states[0])
    return torch.cat(parts).view(*input_ids.shape, -1)


def _difference(states: Tensor, alone: Tensor) -> float:
    """Relative difference of states [B, L, D], the largest of all positions; in less than float32 of nine tenths."""
    alone_BLD = alone.double()
    apart_BL = (states.double() - alone_BLD).norm(dim=-1) / alone_BLD.norm(dim=-1).clamp(min=1e-30)
    if alone.dtype in (torch.float32, torch.float64):
        return float(apart_BL.nan_to_num(torch.inf).max())
    return float(apart_BL.nan_to_num(torch.inf).flatten().sort().values[int(apart_BL.numel() * 0.9)])


def _limit(model: Any, alone: Tensor, together: Tensor) -> float:
    """The difference up to which states agree; see the module's docstring."""
    layers = ModelSizes.of(model.config).layers
    unit, sums = torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps * math.sqrt(alone.shape[-1])
    noise = _difference(together, alone)
    # More is no rounding: the documents of a pass see each other.
    noise = noise if noise < _MOST_NOISE else 0.0
    return math.sqrt(layers) * (2 * unit + 32 * sums) + 4 * noise


def _check_logits(model: Any, trial: _Trial) -> None:
    """Raises RecipeError where states and output layer do not give the logits of the model's own forward pass."""
    length = int((trial.segments[0] == 0).sum())
    expected = type(model).forward(model, **plain_inputs(model, trial.ids[:1, :length])).logits.float()
    actual = OutputLayer.of(model).logits(trial.alone[:1, :length]).float().to(expected.device)
    # Both run the same operations on the same numbers: the tolerance is a few roundings of the dtype.
    tolerance = 8 * torch.finfo(trial.alone.dtype).eps * expected.abs().max().clamp(min=1.0)
    if expected.shape != actual.shape or not (expected - actual).abs().max() <= tolerance:
        raise RecipeError(
            f"{type(model).__name__} computes its logits in a way that this version does not support: "
            "hidden states and output layer do not give them"
        )


def _agrees(model: Any, layout: RowLayout, trial: _Trial) -> bool:
    """Whether a layout gives the states of the documents alone."""
    states = run_rows(model, layout, trial.ids, trial.segments)
    return states.shape == trial.alone.shape and _difference(states, trial.alone) <= trial.limit


def _is_causal(model: Any, trial: _Trial) -> bool:
    """Whether the last token of a document leaves the states before it alone."""
    length = int((trial.segments[0] == 0).sum())
    changed = trial.ids[:1, :length].clone()
    changed[0, -1] = trial.ids[0, length]
    states = run_to_head(model, plain_inputs(model, changed))
    return _difference(states[:, :-1], trial.alone[:1, : length - 1]) <= trial.limit


def _looks_at_passes(config: Any) -> tuple[str | None, int | None]:
    """What in a configuration makes a pass more than its documents, and the length at which it does for documents."""
    text = config.get_text_config()
    if getattr(text, "attn_temperature_tuning", False):
        return "the temperature of attention follows the place in a row", None  # Llama 4
    for rope in _ropes(text):
        if rope.get("rope_type") == "longrope":
            switch = rope.get(_ORIGINAL) or getattr(text, _ORIGINAL, None)
            return "rotary factors follow the longest position of a batch", None if switch is None else int(switch)
    return None, None


def _ropes(text: Any) -> list[dict[str, Any]]:
    """The settings of rotary embeddings: one for all layers, or one by type of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))] if isinstance(rope, dict) else []


def _reasons(rejected: dict[LayoutName, str]) -> str:
    layouts: dict[str, list[str]] = {}
    for layout, why in rejected.items():
        layouts.setdefault(why, []).append(layout)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in layouts.items())
