"""The states that a model's head reads, and what the head makes of them: its own forward pass, cut in two.

The cut is in front of the output layer. So nothing has to be known about an architecture's body, nor about what it does
between body and output layer (the transform of a BERT, the scaling of a MiniCPM) or after it (scaling, soft-capping, a
bias, a narrower vocabulary). Where a model does not call its output layer (MobileBERT puts two matrices together), the
cut is behind the body, and the head is a replay of the forward pass from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..base.errors import RecipeError
from .flash_rows import attention_of_pass
from .packing import Pass, RowLayout, gather, make_passes, plain_inputs
from .placement import input_device


def run_rows(model: Any, layout: RowLayout, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
    """Rows [B, L] through a transformers model in a layout: the states [B, L, D] that its head reads."""
    return run_passes(model, make_passes(model, layout, input_ids, segment_ids, input_device(model)), input_ids.shape)


def run_passes(model: Any, passes: Sequence[Pass], shape: Sequence[int]) -> Tensor:
    """The passes of rows [B, L] through a transformers model: the states [B, L, D] that its head reads."""
    parts = []
    head_replay(model)  # it is found by a plain call, which needs the model's own attention
    for part in passes:
        with attention_of_pass(model, part.attention):
            parts.append(run_to_head(model, part.inputs))
    return gather(parts, passes, shape)


class _ReachedError(Exception):
    """The forward pass has reached the head; the rest of it is not run."""


def run_to_head(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Run a transformers model up to its head: the states [b, l, D] that the head is given. Differentiable.

    Raises RecipeError for a model without a head over the vocabulary.
    """
    states = _states_at(model, inputs, body=head_replay(model) is not None)
    assert states is not None
    return states


def _states_at(model: Any, inputs: dict[str, Any], *, body: bool) -> Tensor | None:
    """What the output layer is given, or with `body` what the body gives; None where it is not called."""
    states: list[Tensor] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else next(iter(kwargs.values())))
        raise _ReachedError

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        states.append(output[0])
        raise _ReachedError

    if body:
        hook = model.base_model.register_forward_hook(after)
    else:  # before the hooks that spread or fetch the layer's weight
        hook = output_module(model).register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    with hook:
        try:
            # The class's own forward: the model's may be a wrapper that computes a loss.
            type(model).forward(model, **inputs)
        except _ReachedError:
            return states[0]
    return None


def after_output_layer(model: Any, inputs: dict[str, Any], product: Callable[[Tensor], Tensor]) -> Tensor:
    """The model's logits [b, l, V] for `inputs` if its output layer gave `product(what it gives)` instead."""
    module = output_module(model)
    with module.register_forward_hook(lambda module, args, output: product(output)):
        logits: Tensor = type(model).forward(model, **inputs).logits
    return logits


def output_module(model: Any) -> Any:
    """The module of a model's output layer. Raises RecipeError for a model without one."""
    module = model.get_output_embeddings()
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise RecipeError(f"{type(model).__name__} has no output layer over the vocabulary: use a language model")
    return module


class HeadReplay(nn.Module):
    """A head as a module: states of the body [..., D] -> logits [..., V], each position by itself."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = ref(model)  # a module that held the model would be a part of its own part
        self._used: list[str] | None = None

    def forward(self, states: Tensor) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        model: Any = self._model()
        flat = states.reshape(1, -1, states.shape[-1])
        given = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=flat)
        own: dict[str, Any] = model.base_model.__dict__
        replaced = {"forward": lambda *args, **kwargs: given, "_compiled_call_impl": None}
        saved = {name: own[name] for name in replaced if name in own}
        own.update(replaced)
        try:
            ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=flat.device)
            logits: Tensor = type(model).forward(model, **plain_inputs(model, ids)).logits
        finally:
            for name in replaced:
                del own[name]
            own.update(saved)
        return logits.reshape(*states.shape[:-1], -1)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters that the head uses and that train."""
        model: Any = self._model()
        if self._used is None:
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
            if named:
                with torch.inference_mode(False), torch.enable_grad():
                    total = self(_first_states(model)).float().sum()
                    slopes = torch.autograd.grad(total, list(named.values()), allow_unused=True)
                named = {name: p for (name, p), slope in zip(named.items(), slopes, strict=True) if slope is not None}
            self._used = list(named)
        return iter([model.get_parameter(name) for name in self._used])


_REPLAYS: WeakKeyDictionary[Any, HeadReplay | None] = WeakKeyDictionary()


def head_replay(model: Any) -> HeadReplay | None:
    """The replay of a model that does not call its output layer, found once; None for all others.

    Raises RecipeError for a model whose body cannot be told from its head.
    """
    if model not in _REPLAYS:
        ids = torch.ones(1, 4, dtype=torch.long, device=input_device(model))
        with torch.no_grad():
            called = _states_at(model, plain_inputs(model, ids), body=False) is not None
        if not called and model.base_model is model:
            raise RecipeError(f"{type(model).__name__} computes its logits without its output layer: use another model")
        _REPLAYS[model] = None if called else HeadReplay(model)
    return _REPLAYS[model]


def _first_states(model: Any) -> Tensor:
    """States [1, 1, D] that the body gives, without a gradient."""
    ids = torch.ones(1, 1, dtype=torch.long, device=input_device(model))
    with torch.no_grad():
        states = _states_at(model, plain_inputs(model, ids), body=True)
    assert states is not None
    return states


def replay_sizes(model: Any) -> tuple[int, int]:
    """Vocabulary size and width of the states of a replayed head."""
    states, replay = _first_states(model), head_replay(model)
    assert replay is not None
    with torch.no_grad():
        return int(replay(states).shape[-1]), int(states.shape[-1])
