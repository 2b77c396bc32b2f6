"""A model's output layer: hidden states to logits over the vocabulary.

Shape suffixes as in pipeline/README.md: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..base.errors import MismatchError, RecipeError
from .packing import plain_inputs, unwrap_peft
from .placement import input_device
from .states import HeadReplay, after_output_layer, head_replay, output_module, replay_sizes


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

        Raises RecipeError for a model without one, or whose logits have another form.
        """
        model = unwrap_peft(model)
        replay = head_replay(model)
        if replay is not None:
            form = logits_form(model)
            weight = torch.empty(form.vocab_size, form.width, dtype=model.dtype, device="meta")
            return cls(weight, module=replay)
        module, form = output_module(model), logits_form(model)
        weight, bias = module.weight, getattr(module, "bias", None)
        plain = type(module).forward is nn.Linear.forward  # peft replaces the module, and shows its weight as its own
        whole = plain and not isinstance(weight, DTensor) and not weight.is_meta
        if form.bias is not None:
            own = model.get_parameter(form.bias) if isinstance(form.bias, str) else form.bias
            bias = own if bias is None else bias + own
        narrower = form.vocab_size < weight.shape[0]
        if narrower:
            weight, bias = weight[: form.vocab_size], None if bias is None else bias[: form.vocab_size]
        if not whole and (form.bias is not None or narrower):
            raise RecipeError(
                f"{type(model).__name__} changes what its output layer gives: the layer must lie whole on one device "
                "and be without adapters"
            )
        return cls(weight, bias, form.scale, form.softcap, None if whole else module)

    @property
    def is_linear(self) -> bool:
        """Whether logits are a product with a weight, scaled and soft-capped; a head by replay may be anything."""
        return not isinstance(self.module, HeadReplay)

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


@dataclass(frozen=True)
class LogitsForm:
    """What a model makes of x = hidden W^T: logits = softcap * tanh(scale * (x + bias) / softcap), for the first tokens."""

    vocab_size: int
    """How many of the layer's rows have logits."""
    width: int
    """Size of the states that the layer reads."""
    scale: float = 1.0
    softcap: float | None = None
    bias: str | Tensor | None = None
    """A bias [V] beside that of the layer itself: the name of the parameter, or its value."""


_FORMS: WeakKeyDictionary[Any, LogitsForm] = WeakKeyDictionary()


def logits_form(model: Any) -> LogitsForm:
    """What a model makes of the product of its output layer, measured once: its forward pass is run with given products.

    Raises RecipeError for another form than `LogitsForm`.
    """
    if model not in _FORMS:
        was_training = model.training
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            _FORMS[model] = _measured_form(model)
        model.train(was_training)
    return _FORMS[model]


# Products that reveal the form: 0 the bias, a small one the scale, a huge one the soft-capping; the others check it.
_SMALL, _HUGE = 2.0**-20, 2.0**40
_PRODUCTS = (0.0, _SMALL, _HUGE, -3.0, 0.25, 7.0, 31.0, -150.0)


def _measured_form(model: Any) -> LogitsForm:
    if head_replay(model) is not None:
        return LogitsForm(*replay_sizes(model))
    weight = output_module(model).weight
    # In float64, whatever the model's dtype: what follows the layer keeps it, or has at least float32.
    given_M = torch.tensor(_PRODUCTS, dtype=torch.float64)
    ids = torch.arange(1, len(_PRODUCTS) + 1, device=input_device(model)).remainder(len(weight)).unsqueeze(0)

    def product(output: Tensor) -> Tensor:
        return given_M.to(output.device).view(1, -1, 1).expand(output.shape).contiguous()

    logits_MV = after_output_layer(model, plain_inputs(model, ids), product)[0]
    found_MV = logits_MV.detach().double().cpu()
    zero_V = found_MV[0]
    small = 3 if zero_V.any() else 1  # beside a bias, a small product would be lost in float32
    scale = float((found_MV[small, 0] - zero_V[0]) / _PRODUCTS[small])
    limit = float(found_MV[2, 0])
    softcap = None if limit > scale * _HUGE / 2 else limit
    bias = _bias_after(model, logits_MV, zero_V)
    if abs(scale - 1) < 1e-5:
        scale = 1.0
    expected_MV = scale * given_M.unsqueeze(-1) + zero_V
    if softcap is not None:
        expected_MV = softcap * torch.tanh(expected_MV / softcap)
    error = ((found_MV - expected_MV).abs() / expected_MV.abs().clamp(min=1.0)).max()
    # Some models compute this in float32.
    if not error < 1e-5 or (bias is not None and (scale != 1.0 or softcap is not None)):
        raise RecipeError(
            f"{type(model).__name__} computes its logits in a way that this version does not support: output layer, "
            "scale, bias and soft-capping do not give them"
        )
    return LogitsForm(found_MV.shape[-1], int(weight.shape[-1]), scale, softcap, bias)


def _bias_after(model: Any, logits_MV: Tensor, zero_V: Tensor) -> str | Tensor | None:
    """The bias that a model adds to the product of its output layer; one that trains is found also while it is 0."""
    named = [(name, p) for name, p in model.named_parameters() if p.shape == zero_V.shape]
    trained = [(name, p) for name, p in named if p.requires_grad]
    if trained and logits_MV.requires_grad:
        slopes = torch.autograd.grad(logits_MV[0].sum(), [p for _, p in trained], allow_unused=True)
        for (name, _), slope in zip(trained, slopes, strict=True):
            if slope is not None:
                return str(name)
    if not zero_V.any():
        return None
    for name, parameter in named:
        if torch.equal(parameter.detach().double().cpu(), zero_V):
            return str(name)
    return zero_V.to(logits_MV.device, model.dtype)


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


def room_for_logits(like: Tensor, rows: int, vocab_size: int) -> Tensor:
    """An empty tensor [rows, V] with dtype and device of another. On a GPU each row begins at a multiple of 128 bytes, or
    products and loads of an odd vocabulary take many times as long."""
    width = vocab_size if like.device.type == "cpu" else -(-vocab_size // 64) * 64
    return like.new_empty(rows, width)[:, :vocab_size]


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
