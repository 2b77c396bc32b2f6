"""Packed rows through a transformers model, each document as if it were alone, in the layout that is right for the
model (`probe`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..base.errors import RecipeError
from .flash_rows import attention_of_pass
from .packing import Pass, gather, make_passes, unwrap_peft
from .probe import check_model
from .states import run_rows


def body_hidden(model: Any, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
    """Hidden states [B, L, D] that the output layer reads; 0 at padding, where documents are run as rows.

    Rows on a CPU serve a model on any device, and no host then waits for it. Raises RecipeError for a model that cannot be used (`probe.check_model`, which runs once per model).
    """
    model = unwrap_peft(model)
    return run_rows(model, check_model(model).layout, input_ids, segment_ids)


def row_passes(model: Any, input_ids: Tensor, segment_ids: Tensor, device: torch.device) -> list[Pass]:
    """The passes of rows [B, L] through a model, also in a wrapper, for `states.run_passes` on a device.

    Raises as `body_hidden`.
    """
    model = _inside(model)
    return make_passes(model, check_model(model).layout, input_ids, segment_ids, device)


def row_logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logits [B, L, V] of any transformers model for a batch of a cache, each document as if it were alone.

    Differentiable; a model in a wrapper (`DistributedDataParallel`, peft, `torch.compile`) is called through it. Raises
    RecipeError for a model that cannot be used.
    """
    passes, logits = _passes(model, batch), []
    for part in passes:
        with attention_of_pass(_inside(model), part.attention):
            logits.append(model(**part.inputs).logits)
    return gather(logits, passes, batch["input_ids"].shape)


def model_inputs(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Keyword arguments of a model for a batch of a cache: `model(**model_inputs(batch, model))`.

    input_ids [B, L], and position_ids [B, L] that restart at each document, or attention masks: what confines attention
    to documents in this model. Raises RecipeError for a model that takes no such arguments: `row_logits` runs it.
    """
    passes = _passes(model, batch)
    if passes[0].places_M is not None:
        raise RecipeError(
            f"{type(_inside(model)).__name__} mixes the documents of packed rows: take row_logits(model, batch) for "
            "model(**model_inputs(batch, model)).logits"
        )
    return passes[0].inputs


def _passes(model: Any, batch: Mapping[str, Any]) -> list[Pass]:
    inside = _inside(model)
    return make_passes(inside, check_model(inside).layout, batch["input_ids"], batch["segment_ids"])


def _inside(model: Any) -> Any:
    """The transformers model inside wrappers."""
    while hasattr(model, "_orig_mod") or not hasattr(model, "get_output_embeddings"):
        model = getattr(model, "_orig_mod", None) or model.module  # compiled; data parallel
    return unwrap_peft(model)
