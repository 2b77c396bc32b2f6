"""The loss inside the model's own forward pass, for the time of a training."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from .student_loss import DeviceBatch

# accelerate replaces `forward` for mixed precision, and keeps what it replaced under the second name.
_ATTRIBUTES = ("forward", "_original_forward")


class LossForward(AbstractContextManager[None]):
    """While entered, `model(distillation=rows, positions=counts)` computes a loss; all other calls are the model's
    own.

    The loss needs hidden states and output layer together. Inside forward, wrappers of the model (data parallel,
    autocast, compile) act on all of it. On exit, also by an exception, the model has its own forward again; a wrapper
    that was put around the loss returns with the next entry. Entries may be nested.
    """

    def __init__(self, model: Any, loss: Callable[[Any, DeviceBatch, Tensor | None], dict[str, Tensor]]) -> None:
        own = model.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if "distillation" not in kwargs:
                return own(*args, **kwargs)
            return loss(self, kwargs["distillation"], kwargs["positions"])

        self._model, self._depth = model, 0
        self._other: dict[str, Any] = {"forward": types.MethodType(forward, model)}
        """The attributes that the next swap sets: those of the loss outside, the model's own inside."""

    def __enter__(self) -> None:
        if self._depth == 0:
            self._swap()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._swap()

    def _swap(self) -> None:
        attributes = vars(self._model)
        current = {name: attributes.pop(name) for name in _ATTRIBUTES if name in attributes}
        attributes.update(self._other)
        self._other = current
