"""A test on a loaded model: are its logits output layer times hidden states, and do packed documents stay apart?"""

from __future__ import annotations

from typing import Any

import torch

from ..base.errors import RecipeError
from .output_layer import OutputLayer
from .packing import body_hidden, document_mask, is_masked, model_inputs, unwrap_peft
from .placement import input_device


@torch.no_grad()
def check_model(model: Any) -> None:
    """Compare body and output layer with the model's own logits, and a packed document beside two different neighbours.

    Raises RecipeError for an architecture whose logits have another form, or whose attention crosses document
    boundaries.
    """
    model = unwrap_peft(model)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    device = input_device(model)
    ids = torch.arange(24, device=device).mul(7).add(11).remainder(vocab_size).reshape(1, 24)
    one = torch.zeros_like(ids)
    was_training = model.training
    model.eval()
    probe = {"input_ids": ids, "segment_ids": one}
    if is_masked(model) and model.config._attn_implementation != "eager":  # one document needs no mask
        probe["attention_mask"] = document_mask(one)
    expected = model(**model_inputs(probe)).logits.float()
    hidden = body_hidden(model, ids, one)
    actual = OutputLayer.of(model).logits(hidden).float()
    # Both run the same operations on the same numbers: the tolerance is a few roundings of the dtype.
    tolerance = 8 * torch.finfo(hidden.dtype).eps * expected.abs().max().clamp(min=1.0)
    if (expected - actual).abs().max() > tolerance:
        raise RecipeError(
            f"{type(model).__name__} computes its logits in a way that this version does not support: "
            "hidden states and output layer do not give them"
        )
    two = (torch.arange(24, device=device) >= 10).long().reshape(1, 24)
    changed = ids.clone()
    changed[:, :10] = (changed[:, :10] + 1).remainder(vocab_size)
    difference = (body_hidden(model, ids, two) - body_hidden(model, changed, two))[:, 10:]
    model.train(was_training)
    if difference.abs().max() != 0:
        raise RecipeError(
            f"{type(model).__name__} with attention {model.config._attn_implementation!r} does not keep packed "
            "documents apart: use attention = 'sdpa'"
        )
