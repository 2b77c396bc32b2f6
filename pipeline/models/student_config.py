"""The configuration of a model that has some layers of another one: settings of single layers follow the layers.

Architectures whose layers differ say in several ways which layer is what. Lists with one value per layer and tables by
layer number are known by their form; numbers that count layers from either end, periods, and lists of layer numbers are
known by their names. What a name here does not cover, `layer_check` finds in the student that comes of it.
"""

from __future__ import annotations

import math
from typing import Any

from ..base.errors import RecipeError

_NUMBERS = (
    "attn_layer_indices",  # Bamba
    "cross_attention_layers",  # Llama 3.2 Vision
    "full_attn_idxs",  # LFM2
    "global_attn_layers",
    "hybrid_layer_ids",  # Zamba 2
    "mlp_only_layers",  # Qwen MoE
    "moe_layers",  # Llama 4
    "ple_layer_ids",
)
"""Keys with a list of layer numbers."""
_FIRST = (
    "dense_mlp_idx",
    "first_k_dense_replace",  # DeepSeek
    "moe_layer_start_index",  # ERNIE 4.5
    "num_dense_layers",  # LFM2-MoE
    "n_dense_layers",
)
"""Keys with a number of layers that come first."""
_LAST = ("num_kv_shared_layers",)  # Gemma 3n
"""Keys with a number of layers that come last."""
_PERIODS = (
    ("attn_layer_period", "attn_layer_offset"),  # Jamba
    ("expert_layer_period", "expert_layer_offset"),
)
"""Keys with the distance between layers of a kind, and the first of them."""
_DEPTHS = (
    "num_hidden_layers",  # of the encoder, where a decoder has been taken from an encoder and a decoder
    "num_blocks",  # xLSTM
)
"""Keys with the number of layers, beside the one that a model is built by."""
_REPEATED = ("block_types",)  # RecurrentGemma
"""Keys with a list of kinds that the layers go through again and again."""
_ROOT_OF_DEPTH = ("scale_depth",)  # MiniCPM
"""Keys with a factor that the architecture divides by the square root of the number of layers."""


def config_of_layers(config: Any, chosen: list[int], depth_key: str) -> Any:
    """The configuration of a model with the layers `chosen` of one with this configuration of a text model.

    `depth_key` is the key of its number of layers. Raises RecipeError for layers that no configuration of this class
    can describe.
    """
    available = int(getattr(config, depth_key))
    values = config.to_dict()
    for period, offset in _PERIODS:
        if values.get(period):
            values[period], values[offset] = _period(values[period], values[offset], chosen)
    for name, value in list(values.items()):
        values[name] = _of_layers(name, value, chosen, available)
    for key in (depth_key, *_DEPTHS):
        stored = config.attribute_map.get(key, key)
        if stored in values:
            values[stored] = len(chosen)
    kind = type(config)
    try:
        return kind.from_dict(values)
    except Exception as error:  # the class's own checks raise what they like
        raise RecipeError(
            f"layers {chosen}: no {kind.__name__} has these layers of the teacher's: "
            f"{short(error)}: choose other layers"
        ) from error


def short(error: Exception) -> str:
    """The beginning of an error's message, in one line."""
    return " ".join(str(error).split())[:200]


def _of_layers(name: str, value: Any, chosen: list[int], available: int) -> Any:
    """The value of one key for the chosen layers of `available` ones."""
    if name in _NUMBERS and isinstance(value, list):
        return [place for place, layer in enumerate(chosen) if layer in value]
    if name in _REPEATED and isinstance(value, list):
        return [value[layer % len(value)] for layer in chosen]
    if isinstance(value, list) and len(value) == available:
        return [value[layer] for layer in chosen]
    if isinstance(value, dict) and value and all(str(key).isdecimal() for key in value):
        by_layer = {int(key): item for key, item in value.items()}
        return {str(place): by_layer[layer] for place, layer in enumerate(chosen) if layer in by_layer}
    if isinstance(value, int) and name in _FIRST:
        return sum(layer < value for layer in chosen)
    if isinstance(value, int) and name in _LAST:
        return sum(layer >= available - value for layer in chosen)
    if isinstance(value, (int, float)) and name in _ROOT_OF_DEPTH:
        return value * math.sqrt(len(chosen) / available)
    return value


def _period(period: int, offset: int, chosen: list[int]) -> tuple[int, int]:
    """Period and offset that pick the same of the chosen layers, where there are any; else those of the teacher."""
    wanted = [layer % period == offset for layer in chosen]
    for new_period in range(1, len(chosen) + 2):
        for new_offset in range(new_period):
            if [place % new_period == new_offset for place in range(len(chosen))] == wanted:
                return new_period, new_offset
    return period, offset
