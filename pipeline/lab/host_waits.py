"""How often the host waits for the device during a job, and at which lines of Python.

A wait empties the queue of launched kernels, so a GPU then idles until the host has launched more. On a GPU torch
itself reports them. Without one, every operation is watched that reads values of a tensor of the device, and each
tensor counts as the device's that was made from one: so a test holds the number at 0 on any machine.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense.default,  # item, tolist, bool, int, float
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
    _aten.unique_dim.default,
}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_MARK = "_of_the_device"
_PACKAGE = Path(__file__).resolve().parents[1]


def host_waits(job: Callable[[], Any], device: torch.device, of_device: Iterable[Tensor] = ()) -> Counter[str]:
    """File and line of this library, or of what it calls -> number of waits in one call of `job`.

    On a CPU `of_device` are the tensors that would be on the device, such as weights and rows.
    """
    if device.type == "cuda":
        return _reported(job)
    for tensor in of_device:
        as_of_device(tensor)
    watch = _Watch()
    with watch:
        job()
    return watch.lines


def as_of_device(tensor: Tensor) -> Tensor:
    """Count this tensor as the device's in `host_waits` on a CPU."""
    setattr(tensor, _MARK, True)
    return tensor


def _reported(job: Callable[[], Any]) -> Counter[str]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            job()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [(one.filename, one.lineno) for one in caught if "synchroniz" in str(one.message)]
    return Counter(f"{'/'.join(Path(file).parts[-2:])}:{line}" for file, line in places)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        of_device = any(hasattr(tensor, _MARK) for tensor in given)
        if of_device and _waits(func, args):
            self.lines[_line()] += 1
        result = func(*args, **kwargs)
        if of_device:
            for value in tree_iter(result):
                if isinstance(value, Tensor):
                    as_of_device(value)
        return result


def _waits(func: Any, args: tuple[Any, ...]) -> bool:
    if func in _READS:
        return True
    if func not in _INDEXED:
        return False
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    # One value under a mask is filled in without counting.
    return masks and (func is _aten.index.Tensor or args[2].numel() > 1)


def _line() -> str:
    """The innermost line of this library, else of its caller outside torch."""
    frames = [
        frame for frame in traceback.extract_stack() if Path(frame.filename).resolve() != Path(__file__).resolve()
    ]
    own = [frame for frame in frames if _PACKAGE in Path(frame.filename).resolve().parents]
    other = [frame for frame in frames if "/torch/" not in frame.filename]
    frame = (own or other or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
