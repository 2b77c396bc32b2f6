"""A model's output layer: hidden states to logits over the vocabulary.

Shape suffixes as in pipeline/README.md: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..base.errors import MismatchError, RecipeError
from .packing import unwrap_peft


@dataclass(frozen=True)
class OutputLayer:
    """A model's output layer: logits = softcap * tanh(scale * (hidden W^T + bias) / softcap)."""

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    softcap: float | None = None
    module: Any = None
    """The model's own module, where it is more than weight and bias (adapters), or where this process does not hold the
    whole weight (sharded or offloaded)."""

    @classmethod
    def of(cls, model: Any) -> OutputLayer:
        """The output layer of a transformers model, with the scaling and soft-capping of its architecture.

        Raises RecipeError for a model without one.
        """
        model = unwrap_peft(model)
        module = model.get_output_embeddings()
        if module is None:
            raise RecipeError(f"{type(model).__name__} has no output layer over the vocabulary: use a language model")
        config = model.config.get_text_config()
        scale = 1.0
        if getattr(config, "logit_scale", None) is not None:  # Cohere
            scale = float(config.logit_scale)
        elif getattr(config, "logits_scaling", None) is not None:  # Granite divides
            scale = 1.0 / float(config.logits_scaling)
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        plain = type(module).forward is nn.Linear.forward  # peft replaces the module, and shows its weight as its own
        whole = not isinstance(module.weight, DTensor) and not module.weight.is_meta
        own = None if plain and whole else module
        bias = getattr(module, "bias", None)
        return cls(module.weight, bias, scale, None if softcap is None else float(softcap), own)

    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., V], in the dtype of the model.

        For [N, D] without gradients, `out` [N, V] may receive the result: a fresh tensor of that size costs a CPU more
        than half of the product itself, since the kernel clears its pages.
        """
        if self.module is not None:
            logits: Tensor = self.module(hidden)
        elif out is not None and out.device == self.weight.device:
            logits = project(hidden, self.weight, out, self.bias)
        else:
            logits = nn.functional.linear(hidden.to(self.weight.device), self.weight, self.bias)
        return self.transform(logits, in_place=logits is out)

    def transform(self, logits: Tensor, *, in_place: bool = False) -> Tensor:
        """x -> softcap * tanh(scale * x / softcap), for hidden W^T + bias of any shape."""
        out = logits if in_place else None
        if self.scale != 1.0:
            logits = torch.mul(logits, self.scale, out=out)
        if self.softcap is not None:
            capped = torch.tanh(torch.div(logits, self.softcap, out=out), out=out)
            logits = torch.mul(capped, self.softcap, out=out)
        return logits


def check_vocabulary(model: Any, vocab_size: int, what: str, tokens: Callable[[], int] | None = None) -> None:
    """Raise MismatchError if a student cannot score every token id that the cache may hold.

    Teacher and student may pad their output layers to different sizes: a smaller one must still cover the `tokens()`
    ids of the tokenizer. `what` names the student in the message.
    """
    own = int(OutputLayer.of(model).weight.shape[0])
    if own < vocab_size and (tokens is None or own < tokens()):
        raise MismatchError(
            f"{what} has {own} logits and the cache a vocabulary of {vocab_size}: start from a model with the same "
            "tokenizer, or resize its embeddings"
        )


_BLOCK = {torch.float32: 512, torch.float64: 512}
"""Rows of the weight matrix per product.

In float32, the undivided product of 512 positions and 49,152 tokens takes a CPU without AMX 1.25 times as long for D =
576 and 1.4 times for D = 2048: the packed columns no longer fit its caches. In bfloat16 with AMX blocks take twice as
long, so there are none. The results are equal bit for bit.
"""


def project(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """hidden [N, D], weight [V, D], bias [V] -> logits [N, V] in `out`, all of one dtype; no gradients."""
    size = len(weight_VD)
    width = _BLOCK.get(out_NV.dtype, size) if out_NV.device.type == "cpu" else size
    for start in range(0, size, max(width, 1)):
        block = slice(start, min(start + width, size))
        if bias_V is None:
            torch.mm(hidden_ND, weight_VD[block].T, out=out_NV[:, block])
        else:
            torch.addmm(bias_V[block], hidden_ND, weight_VD[block].T, out=out_NV[:, block])
    return out_NV
