"""The states that a model's output layer reads, and what the model makes of the layer's product: its own forward pass
is run up to that layer, and from it on.

So nothing has to be known about an architecture's body, nor about what it does between body and output layer (the
transform of a BERT, the scaling of a MiniCPM) or after it (scaling, soft-capping, a bias, a narrower vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..base.errors import RecipeError
from .packing import RowLayout, gather, make_passes


def run_rows(model: Any, layout: RowLayout, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
    """Rows [B, L] through a transformers model in a layout: the states [B, L, D] that its output layer reads."""
    passes = make_passes(model, layout, input_ids, segment_ids)
    return gather([run_to_output_layer(model, part.inputs) for part in passes], passes, input_ids.shape)


class _ReachedError(Exception):
    """The forward pass has reached the output layer; the rest of it is not run."""


def run_to_output_layer(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Run a transformers model up to its output layer: the states [b, l, D] that the layer is given. Differentiable.

    Raises RecipeError for a model whose forward pass does not call its output layer.
    """
    states: list[Tensor] = []

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else next(iter(kwargs.values())))
        raise _ReachedError

    # Before the hooks that spread or fetch the layer's weight.
    layer = output_module(model)
    with layer.register_forward_pre_hook(stop, prepend=True, with_kwargs=True):
        try:
            # The class's own forward: the model's may be a wrapper that computes a loss.
            type(model).forward(model, **inputs)
        except _ReachedError:
            return states[0]
    raise RecipeError(f"{type(model).__name__} computes its logits without its output layer: use another model")


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
