"""A student from some of its teacher's layers, as a model of the same architecture."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..base.errors import RecipeError


def layers_to_copy(layers: int | list[int], available: int) -> list[int]:
    """Indices of the layers to copy; a number n means n layers, evenly spaced from the first to the last.

    Raises RecipeError for layers outside the `available` ones.
    """
    if isinstance(layers, int):
        if not 1 <= layers <= available:
            raise RecipeError(f"layers = {layers}: the teacher has {available} layers")
        if layers == 1:
            return [0]
        return [round(i * (available - 1) / (layers - 1)) for i in range(layers)]
    wrong = [layer for layer in layers if not 0 <= layer < available]
    if wrong or not layers:
        raise RecipeError(f"layers = {layers}: the teacher has layers 0 to {available - 1}")
    return list(layers)


def student_from_layers(teacher: Any, layers: int | list[int], token_types: str = "keep") -> Any:
    """A smaller model of the same architecture: the teacher's embeddings, norms, output layer and some of its layers.

    Works for every architecture whose body holds its layers in one list. The weights are copies. token_types = "drop"
    turns BERT layers into a DistilBERT, which has no token types: the embedding of type 0 is added to the positions, so
    that a student with all layers equals the teacher.

    Raises RecipeError for layers that do not exist, and for token_types = "drop" of another architecture than BERT.
    """
    prefix, available = layer_list(teacher)
    chosen = layers_to_copy(layers, available)
    if token_types == "drop":
        return _distilbert(teacher, chosen)
    config = copy.deepcopy(teacher.config)
    text = config.get_text_config()
    for name, value in list(text.to_dict().items()):
        # Settings with one entry per layer (layer types, rope switches) follow the chosen layers.
        if isinstance(value, list) and len(value) == available:
            setattr(text, name, [value[layer] for layer in chosen])
    text.num_hidden_layers = len(chosen)
    # In the teacher's dtype, so that the copy is exact.
    student = type(teacher)._from_config(config, dtype=teacher.dtype)
    source = teacher.state_dict()
    renamed = {}
    for name in student.state_dict():
        origin = name
        if name.startswith(prefix + "."):
            index, _, rest = name.removeprefix(prefix + ".").partition(".")
            origin = f"{prefix}.{chosen[int(index)]}.{rest}"
        renamed[name] = source[origin].clone()
    student.load_state_dict(renamed)
    student.tie_weights()
    return student


_AS_DISTILBERT = {
    "bert.embeddings.": "distilbert.embeddings.",
    "bert.encoder.layer.": "distilbert.transformer.layer.",
    "attention.self.query.": "attention.q_lin.",
    "attention.self.key.": "attention.k_lin.",
    "attention.self.value.": "attention.v_lin.",
    "attention.output.dense.": "attention.out_lin.",
    "attention.output.LayerNorm.": "sa_layer_norm.",
    "intermediate.dense.": "ffn.lin1.",
    "output.dense.": "ffn.lin2.",
    "output.LayerNorm.": "output_layer_norm.",
    "cls.predictions.transform.dense.": "vocab_transform.",
    "cls.predictions.transform.LayerNorm.": "vocab_layer_norm.",
    "cls.predictions.decoder.": "vocab_projector.",
}
"""Weight names of BERT -> DistilBERT. Replaced in this order: a name precedes the names that are its suffix."""


def _distilbert(bert: Any, layers: list[int]) -> Any:
    """The layers and output layer of a BERT as a DistilBERT, which computes the same without token types."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    config = bert.config
    if config.model_type != "bert" or config.layer_norm_eps != 1e-12:
        raise RecipeError(
            f"token_types = 'drop' needs a BERT with layer_norm_eps = 1e-12, the value of DistilBERT; this teacher is "
            f"{type(bert).__name__}: leave the key out"
        )
    small = bert if layers == list(range(config.num_hidden_layers)) else student_from_layers(bert, layers)
    student = DistilBertForMaskedLM._from_config(
        DistilBertConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            n_layers=len(layers),
            n_heads=config.num_attention_heads,
            dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            dropout=config.hidden_dropout_prob,
            attention_dropout=config.attention_probs_dropout_prob,
            activation=config.hidden_act,
            initializer_range=config.initializer_range,
            pad_token_id=config.pad_token_id,
        ),
        dtype=bert.dtype,
    )
    source = small.state_dict()
    types = "bert.embeddings.token_type_embeddings.weight"
    renamed = {}
    for name, tensor in source.items():
        if name in (types, "cls.predictions.bias"):  # the latter is the same tensor as the decoder's bias
            continue
        value = tensor.clone()
        if name == "bert.embeddings.position_embeddings.weight":
            value += source[types][0]
        for old, new in _AS_DISTILBERT.items():
            name = name.replace(old, new)
        renamed[name] = value
    student.load_state_dict(renamed)
    student.tie_weights()
    return student


def layer_list(model: Any) -> tuple[str, int]:
    """Name and length of the module list that holds a model's layers. Raises RecipeError where there is none."""
    count = int(model.config.get_text_config().num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, count
    raise RecipeError(
        f"{type(model).__name__} has no module list with its {count} layers: students cannot copy layers of it"
    )
