"""Row layouts: how packed rows go through a transformers model so that each document is computed as if it were alone.

A layout turns rows into *passes*, the keyword arguments of one forward pass each, and `gather` puts what the passes
give back in the rows' order. Layouts differ in cost, and no one is right for every architecture; `probe` finds the
cheapest that is right for a model:

| layout | what the model gets |
|---|---|
| `packed` | the rows, with positions that restart; transformers confines attention itself |
| `masks` | the same, with attention masks; masked models read masks and need no positions |
| `flash` | all rows as one, and where documents begin, for `flash_rows` |
| `flattened` | all rows as one, with positions that restart and, for flash attention, where documents begin |
| `documents` | each document as a row, padded on the right, which no causal model sees |
| `equal documents` | documents of one length at a time, for models that see their padding |

Shape suffixes as in pipeline/README.md: B rows, L positions of a row, N = B L.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .flash_rows import ATTENTION, can_flash
from .placement import to_device

LayoutName = Literal["packed", "masks", "flash", "flattened", "documents", "equal documents"]
_PASS_TOKENS = 64
"""A pass costs about as much as this many tokens of padding: every pass reads the weights once."""
_PADDED_SHARE = 1 / 8
"""Padding of a pass, over its tokens, that is cheaper than another pass whatever a pass costs."""


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a peft wrapper; its adapters stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_masked(model: Any) -> bool:
    """Whether a model predicts hidden tokens from both sides (masked) rather than the next token (causal)."""
    name = type(unwrap_peft(model)).__name__
    return name.endswith("ForMaskedLM") or (name.endswith("WithLMHeadModel") and not model.config.causal)  # XLM


@dataclass(frozen=True)
class RowLayout:
    """How rows go through one model."""

    name: LayoutName
    switch: int | None = None
    """For `documents`: documents up to this length and longer ones never share a pass. Rotary embeddings of the type
    longrope have other factors beyond it, and transformers chooses them by the longest position of a pass."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Pass:
    """One forward pass over some of the tokens of rows."""

    inputs: dict[str, Any]
    """Keyword arguments of the model."""
    places_M: Tensor | None = None
    """Place of each of its positions in the flattened rows, N for padding; None: the rows themselves."""
    attention: str | None = None
    """The model's attention function in this pass (`flash_rows.attention_of_pass`); None: its own."""


def document_positions(segment_ids: Tensor) -> Tensor:
    """Position of every token inside its own document [B, L], restarting at each boundary.

    transformers recognises restarting positions as packed documents and confines attention to each of them.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    first = torch.where(_starts(segment_ids), index, 0).cummax(dim=1).values
    return index - first


def document_mask(segment_ids: Tensor) -> Tensor:
    """[B, L] -> [B, 1, L, L] bool: the token pairs of the same document, as bidirectional attention sees them."""
    return (segment_ids.unsqueeze(-1) == segment_ids.unsqueeze(-2)).unsqueeze(1)


def document_lengths(segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[B, L] -> place of the first token in the flattened rows, and length, of every document; padding is none."""
    starts = _starts(segment_ids).flatten().nonzero().squeeze(-1)
    lengths = torch.diff(starts, append=starts.new_tensor([segment_ids.numel()]))
    real = segment_ids.flatten()[starts] >= 0
    return starts[real], lengths[real]


def _starts(segment_ids: Tensor) -> Tensor:
    """[B, L] bool: whether a token is the first of its document."""
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return starts


def plain_inputs(model: Any, input_ids: Tensor) -> dict[str, Any]:
    """Keyword arguments of a transformers model for whole documents [b, l] of one length."""
    return {"input_ids": input_ids, **({} if is_masked(model) else {"use_cache": False})}


def layouts_by_cost(model: Any, device: torch.device) -> tuple[LayoutName, ...]:
    """The layouts that a model may have, the cheapest first.

    transformers looks at the positions of `packed` rows to see whether there are several documents, and the host waits
    for a GPU to tell; `masks` that are made beforehand cost the same attention and no wait.
    """
    causal: list[LayoutName] = [] if is_masked(model) else ["packed"]
    first: list[LayoutName] = [*causal, "masks"] if device.type == "cpu" else ["masks", *causal]
    if causal and can_flash(model, device):
        first = ["flash", *first]
    return (*first, "flattened", "documents", "equal documents")


def make_passes(
    model: Any, layout: RowLayout, input_ids: Tensor, segment_ids: Tensor, device: torch.device | None = None
) -> list[Pass]:
    """The passes of rows [B, L], for a model that reads its tokens on `device`, by default that of the rows.

    What depends on where documents begin is computed where the rows are: from rows on a CPU, no host waits for a GPU.
    """
    device = input_ids.device if device is None else device
    masked = is_masked(model)
    if layout.name in ("packed", "masks", "flash", "flattened"):
        positions = document_positions(segment_ids)
        if layout.name in ("flash", "flattened"):
            tokens = plain_inputs(model, to_device(input_ids.reshape(1, -1), device))
            row: dict[str, Any] = {"position_ids": to_device(positions.reshape(1, -1), device)}
            places_M = torch.arange(input_ids.numel(), device=device)
            if layout.name == "flash" or "flash" in model.config.get_text_config()._attn_implementation:
                row |= _document_ends(segment_ids, device)
            return [Pass({**tokens, **row}, places_M, ATTENTION if layout.name == "flash" else None)]
        inputs = {**plain_inputs(model, to_device(input_ids, device)), "position_ids": to_device(positions, device)}
        if layout.name == "masks":
            inputs["attention_mask"] = _masks(model, to_device(segment_ids, device), masked)
        return [Pass(inputs)]
    filler = getattr(model.config.get_text_config(), "pad_token_id", None)
    padded_ids = torch.cat([input_ids.flatten(), input_ids.new_tensor([filler if isinstance(filler, int) else 0])])
    passes = []
    for places in _document_batches(layout, segment_ids):
        inputs = plain_inputs(model, to_device(padded_ids[places], device))
        if masked:
            inputs["attention_mask"] = to_device((places < input_ids.numel()).long(), device)
        passes.append(Pass(inputs, to_device(places.flatten(), device)))
    return passes


def gather(parts: Sequence[Tensor], passes: Sequence[Pass], shape: Sequence[int]) -> Tensor:
    """What the passes give, [b, l, ...] each, in the order of the rows: [B, L, ...], 0 at padding. Differentiable."""
    if passes[0].places_M is None:
        return parts[0]
    places_M = torch.cat([part.places_M for part in passes if part.places_M is not None])
    values_M = torch.cat([part.flatten(0, 1) for part in parts])
    zero = values_M.new_zeros(1, *values_M.shape[1:])
    count = shape[0] * shape[1]
    source_N = torch.full((count + 1,), len(values_M), device=places_M.device)
    source_N[places_M] = torch.arange(len(values_M), device=places_M.device)
    return torch.cat([values_M, zero])[source_N[:count].to(values_M.device)].view(*shape, *values_M.shape[1:])


def _document_batches(layout: RowLayout, segment_ids: Tensor) -> Iterator[Tensor]:
    """Places [documents, longest] in the flattened rows, N for padding, of documents that go through the model
    together: long ones first, until their padding would cost more than another pass."""
    starts, lengths = document_lengths(segment_ids)
    lengths, order = lengths.sort(descending=True, stable=True)
    starts, first = starts[order], 0
    while first < len(lengths):
        longest = int(lengths[first])
        rest = lengths[first:]
        if layout.name == "equal documents":
            fits = rest == longest
        else:
            padding = (longest - rest).cumsum(0)
            fits = padding <= (rest.cumsum(0) * _PADDED_SHARE).clamp(min=_PASS_TOKENS)
            if layout.switch is not None and longest > layout.switch:
                fits &= rest > layout.switch
        count = int(fits.int().cumprod(0).sum())
        offsets = torch.arange(longest, device=starts.device)
        places = starts[first : first + count, None] + offsets
        yield torch.where(offsets < rest[:count, None], places, segment_ids.numel())
        first += count


def _document_ends(segment_ids: Tensor, device: torch.device) -> dict[str, Any]:
    """What flash attention takes of flattened rows; without it, transformers asks the device in every layer."""
    starts = _starts(segment_ids).flatten().nonzero().squeeze(-1)
    ends = torch.cat([starts, starts.new_tensor([segment_ids.numel()])])
    longest, ends = int(ends.diff().max()), to_device(ends.int(), device)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _masks(model: Any, segment_ids: Tensor, masked: bool) -> Any:
    """The attention masks of rows: one [B, 1, L, L], or one by type of layer."""
    implementation = model.config.get_text_config()._attn_implementation
    if masked:
        mask = document_mask(segment_ids)
        if implementation.endswith("eager"):  # eager attention adds the mask to the scores
            return torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
        return mask
    from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function

    shape = torch.empty(*segment_ids.shape, 0, dtype=model.dtype, device=segment_ids.device)
    # From positions, transformers would ask the device whether there are several documents.
    same_document = packed_sequence_mask_function(segment_ids)
    return create_masks_for_generate(model.config, shape, None, None, and_mask_function=same_document)
