"""torch's thread for `pin_memory=True` on a machine without a GPU; its page-locked copies are plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def pinning_without_a_gpu() -> Iterator[None]:
    """Loaders with `pin_memory=True` whose iterators begin and end inside take their batches through the thread."""
    gpu: dict[str, Any] = {"is_available": lambda: True, "current_accelerator": lambda *_: torch.device("cpu")}
    gpu |= {"current_device_index": lambda: 0, "set_device_index": lambda _: None}
    with patch.multiple(torch.accelerator, **gpu), patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone):
        yield
