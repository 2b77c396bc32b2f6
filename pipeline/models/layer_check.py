"""Whether the layers of a student are those of its teacher: the same modules, weights and settings, the same results.

Some architectures compute with a layer's number or with the number of all layers, so that a copied weight is not yet a
copied layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .packing import plain_inputs

_TOKENS = 8
"""Length of the text on which layers are compared."""
_MAY_END = ("store_full_length_kv",)  # Gemma 3n
"""Settings that say that later layers read what this one leaves; a student may have no such layers."""
_NOT_COMPARED = ("training", "layer_idx", "layer_id", "layer_number")
"""Settings of modules that may differ: what a layer does with its number, its results show."""
_PLAIN = (bool, int, float, str, type(None))


def difference(layer: nn.Module, copy: nn.Module, number: int, place: int) -> str | None:
    """What differs between a teacher's layer `number` and layer `place` of a student, by type, shape or setting; None
    where nothing does.

    Layer numbers may differ. Neither layer needs weights in memory.
    """
    own, other = dict(layer.named_modules()), dict(copy.named_modules())
    for name in sorted(own.keys() ^ other.keys()):
        if next((own | other)[name].parameters(), None) is not None:
            return f"module {name!r} is in one of them only"
    for name in own.keys() & other.keys():
        module, twin = own[name], other[name]
        if type(module) is not type(twin):
            return f"module {name!r} is a {type(module).__name__} and a {type(twin).__name__}"
        for (kind, tensor), (_, copied) in zip(_tensors(module), _tensors(twin), strict=False):
            if tensor.shape != copied.shape:
                return f"{name}.{kind} has the shapes {list(tensor.shape)} and {list(copied.shape)}"
        if [kind for kind, _ in _tensors(module)] != [kind for kind, _ in _tensors(twin)]:
            return f"module {name!r} has other weights"
        for setting, value in vars(module).items():
            if isinstance(value, _PLAIN) and setting not in _NOT_COMPARED and not setting.startswith("_"):
                other_value = vars(twin).get(setting)
                ended = setting in _MAY_END and value and not other_value
                if not ended and not _same(value, other_value, number - place):
                    return f"{name + '.' if name else ''}{setting} is {value} and {other_value}"
    return None


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _same(value: Any, copied: Any, moved: int) -> bool:
    """Whether two settings are equal, or the number of a layer that has moved forward by so many places."""
    if type(value) is float and type(copied) is float:
        return math.isclose(value, copied)
    return bool(value == copied) or (type(value) is int and type(copied) is int and value - copied == moved)


@torch.no_grad()
def check_results(
    teacher: Any, student: Any, layers: list[nn.Module], copies: list[nn.Module], chosen: list[int]
) -> int | None:
    """The first of the `chosen` layers whose copy gives another result than the layer itself, None where all agree.

    `layers` are all layers of the teacher and `copies` those of a student, with the same weights. Both models run over
    a few tokens, and each copy also gets what its layer got. Raises what the student raises.
    """
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
    size = int(teacher.get_input_embeddings().weight.shape[0])
    device = teacher.get_input_embeddings().weight.device
    ids = torch.arange(_TOKENS, device=device).mul(7).add(11).remainder(size).reshape(1, _TOKENS)
    was_training = teacher.training
    teacher.eval()
    try:
        with _recorded(layers, calls):
            teacher(**plain_inputs(teacher, ids))
        student(**plain_inputs(student, ids))
    finally:
        teacher.train(was_training)
    for number, copy in zip(chosen, copies, strict=True):
        if number not in calls:
            continue
        args, kwargs, expected = calls[number]
        # A cache holds already what the layer has put in.
        given = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        if not _equal(copy.eval()(*args, **given), expected):
            return number
    return None


@contextmanager
def _recorded(layers: list[nn.Module], calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Any]]) -> Iterator[None]:
    with ExitStack() as hooks:
        for number, layer in enumerate(layers):

            def keep(_: nn.Module, args: Any, kwargs: Any, output: Any, number: int = number) -> None:
                calls[number] = args, kwargs, output

            hooks.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
        yield


def _equal(actual: Any, expected: Any) -> bool:
    """Whether two results of a layer, tensors or tuples of them, agree to a few roundings."""
    if isinstance(expected, (tuple, list)):
        return len(actual) == len(expected) and all(map(_equal, actual, expected))
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        return True
    room = 64 * torch.finfo(expected.dtype).eps * float(expected.abs().max().clamp(min=1.0))
    return bool((actual.float() - expected.float()).abs().max() <= room)
