"""Sizes of a model from its transformers configuration, whatever the architecture has of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..base.errors import RecipeError


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a language model; of a model of text and images those of its text side."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int | None
    """Attention heads; None where the model has no attention, or another number by layer."""
    key_heads: int | None
    head_size: int | None

    @classmethod
    def of(cls, config: Any) -> ModelSizes:
        """Raises RecipeError for a configuration that does not say how many layers the model has, or how wide it is."""
        text = config.get_text_config()
        layers, hidden_size = _number(text, "num_hidden_layers"), _number(text, "hidden_size")
        if layers is None or hidden_size is None:
            raise RecipeError(
                f"the configuration of {text.model_type} has no num_hidden_layers and hidden_size: use another model"
            )
        heads = _number(text, "num_attention_heads")
        head_size = _number(text, "head_dim")
        if head_size is None and heads is not None:
            head_size = hidden_size // heads
        inner = _number(text, "intermediate_size")
        key_heads = _number(text, "num_key_value_heads") or heads
        return cls(layers, hidden_size, inner or 4 * hidden_size, heads, key_heads, head_size)


def _number(config: Any, name: str) -> int | None:
    """A setting, None where the configuration has none or one by layer."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # it varies by layer
        return None
    return int(value) if isinstance(value, int | float) and value else None
