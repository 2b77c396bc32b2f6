"""A BERT's layers and output layer as a DistilBERT, which has no token types (Sanh et al. 2019, arXiv 1910.01108)."""

from __future__ import annotations

from typing import Any

from ..base.errors import RecipeError

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


def check_bert(model: Any) -> None:
    """Raises RecipeError for a model whose layers cannot be those of a DistilBERT."""
    config = model.config
    if config.model_type != "bert" or config.layer_norm_eps != 1e-12:
        raise RecipeError(
            f"token_types = 'drop' needs a BERT with layer_norm_eps = 1e-12, the value of DistilBERT; this teacher is "
            f"{type(model).__name__}: leave the key out"
        )


def distilbert(bert: Any) -> Any:
    """A DistilBERT of the layers of a BERT: the embedding of token type 0 is added to the positions, so that it
    computes the same. Raises as `check_bert` does.
    """
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    check_bert(bert)
    config = bert.config
    student = DistilBertForMaskedLM._from_config(
        DistilBertConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            n_layers=config.num_hidden_layers,
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
    source = bert.state_dict()
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
