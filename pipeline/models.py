"""What teacher and student models have in common: where they run, their body, their output layer, their layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline import processes
from pipeline.errors import MismatchError, RecipeError
from pipeline.projection import project


@dataclass(frozen=True)
class Placement:
    """Where and how a model runs, with the reason for each choice."""

    device: torch.device
    dtype: torch.dtype
    attention: str
    reason: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def attn_implementation(self) -> str | None:
        """As transformers' loaders take it; None lets them choose what the architecture supports."""
        return None if self.attention == "auto" else self.attention

    def __str__(self) -> str:
        return f"device {self.device}, dtype {self.dtype_name}, attention {self.attention} ({self.reason})"


def choose_placement(device: str = "auto", dtype: str = "auto", attention: str = "auto") -> Placement:
    """Turn "auto" into what runs best here; the attention kernel is settled when a model is loaded.

    Raises RecipeError for a device that is not there.
    """
    why = []
    if device == "auto":
        found = torch.cuda.is_available()
        device = "cuda" if found else "cpu"
        if found and processes.launched():
            device = f"cuda:{processes.local_rank() % torch.cuda.device_count()}"
        why.append(f"{torch.cuda.get_device_name()} found" if found else "no CUDA device found")
    else:
        why.append("device as the recipe says")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"device {device!r}: write auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device {device!r}: no CUDA device is available here: use device = 'auto'")
    if dtype == "auto":
        fast = torch.cuda.is_bf16_supported() if chosen.type == "cuda" else _cpu_has_bf16()
        dtype = "bfloat16" if fast else "float32"
        why.append("bf16 arithmetic in hardware" if fast else "no bf16 arithmetic in hardware")
    else:
        why.append("dtype as the recipe says")
    if attention == "auto":
        why.append("attention as transformers chooses for the architecture, document boundaries checked")
    else:
        why.append("attention as the recipe says")
    return Placement(chosen, getattr(torch, dtype), attention, "; ".join(why))


def _cpu_has_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16 "))


@dataclass(frozen=True)
class OutputHead:
    """A model's output layer: logits = softcap * tanh(scale * (hidden W^T + bias) / softcap)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    layer: Any = None
    """The layer itself, where its weight is not all here: cut over processes, or waiting elsewhere to be fetched."""

    @classmethod
    def of(cls, model: Any) -> OutputHead:
        """Read it off a transformers model, with the scaling and soft-capping that its architecture applies."""
        model = causal_model(model)
        layer = model.get_output_embeddings()
        if layer is None:
            raise RecipeError(f"{type(model).__name__} has no output layer over the vocabulary: it cannot be used here")
        config = model.config.get_text_config()
        scale = 1.0
        if getattr(config, "logit_scale", None) is not None:  # Cohere
            scale = float(config.logit_scale)
        elif getattr(config, "logits_scaling", None) is not None:  # Granite divides
            scale = 1.0 / float(config.logits_scaling)
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        spread = isinstance(layer.weight, DTensor) or layer.weight.is_meta
        bias = getattr(layer, "bias", None)
        return cls(layer.weight, bias, scale, None if softcap is None else float(softcap), layer if spread else None)

    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., V], in the dtype of the model; of [N, D] without gradients perhaps into `out` [N, V].

        A fresh tensor of that size costs a CPU more than half of the product itself: the kernel clears its pages.
        """
        if self.layer is not None:
            logits: Tensor = self.layer(hidden)
        elif out is not None and out.device == self.weight.device:
            logits = project(hidden, self.weight, out, self.bias)
        else:
            logits = nn.functional.linear(hidden.to(self.weight.device), self.weight, self.bias)
        room = logits if logits is out else None
        if self.scale != 1.0:
            logits = torch.mul(logits, self.scale, out=room)
        if self.softcap is not None:
            capped = torch.tanh(torch.div(logits, self.softcap, out=room), out=room)
            logits = torch.mul(capped, self.softcap, out=room)
        return logits


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on another device, without waiting: a GPU fetches it from page-locked memory when it comes to it."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" != tensor.device.type
        else tensor.to(device)
    )


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids, also if it is spread over several devices or partly waits on the CPU or disk."""
    used = [place for place in getattr(model, "hf_device_map", {}).values() if place not in ("cpu", "disk")]
    if used:
        return torch.device(used[0])
    device: torch.device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def is_whole(model: Any) -> bool:
    """Whether every weight is here as a plain tensor: not cut over processes, not waiting elsewhere to be fetched."""
    return not any(isinstance(p, DTensor) or p.is_meta for p in model.parameters())


def causal_model(model: Any) -> Any:
    """The model itself where peft has wrapped it; adapters sit in its layers and stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_masked(model: Any) -> bool:
    """Whether a model fills masks in, seeing both sides, instead of continuing what stands before."""
    return type(causal_model(model)).__name__.endswith("ForMaskedLM")


def model_inputs(batch: Any) -> dict[str, Any]:
    """What a transformers model is called with for a batch of a cache: `model(**model_inputs(batch)).logits`.

    input_ids and position_ids [B, L], the latter restarting at every document, so that attention stays inside each. Masked
    rows need an attention mask for that too, and bring it along.
    """
    inputs = {"input_ids": batch["input_ids"], "position_ids": document_positions(batch["segment_ids"])}
    if "attention_mask" in batch:
        return {**inputs, "attention_mask": batch["attention_mask"]}
    return {**inputs, "use_cache": False}


def document_positions(segment_ids: Tensor) -> Tensor:
    """Position of every token inside its own document [B, L], restarting at each boundary.

    transformers recognises restarting positions as packed documents and confines attention to each of them.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = torch.where(starts, index, 0).cummax(dim=1).values
    return index - first


def document_mask(segment_ids: Tensor) -> Tensor:
    """[B, L] -> [B, 1, L, L] bool: which tokens may see each other where all of a document is seen."""
    return (segment_ids.unsqueeze(-1) == segment_ids.unsqueeze(-2)).unsqueeze(1)


def body_output(model: Any, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
    """Last hidden states [B, L, D] of a model's body, with attention confined to each document."""
    positions = document_positions(segment_ids)
    model = causal_model(model)
    if is_masked(model):
        mask = document_mask(segment_ids)
        if model.config._attn_implementation.endswith("eager"):  # it adds what the others look up
            mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
        output = model.base_model(input_ids=input_ids, position_ids=positions, attention_mask=mask, return_dict=True)
    else:
        output = model.base_model(input_ids=input_ids, position_ids=positions, use_cache=False, return_dict=True)
    hidden: Tensor = output.last_hidden_state
    return hidden


def body_hidden(model: Any, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
    """Hidden states [B, L, D] that the output layer reads, with attention confined to each document."""
    return head_input(model, body_output(model, input_ids, segment_ids))


def head_input(model: Any, hidden: Tensor) -> Tensor:
    """What the output layer reads of the body's hidden states: themselves, or what a masked model's head makes of them."""
    model = causal_model(model)
    if not is_masked(model):
        return hidden
    if hasattr(model, "vocab_transform"):  # DistilBERT
        hidden = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
    elif hasattr(model, "cls"):  # BERT
        hidden = model.cls.predictions.transform(hidden)
    return hidden


@torch.no_grad()
def check_model(model: Any) -> None:
    """Prove on a probe that body and output head give the model's own logits, and that packed documents are kept apart.

    Raises RecipeError for an architecture that does something else with its hidden states, or that ignores positions.
    """
    model = causal_model(model)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    device = input_device(model)
    ids = torch.arange(24, device=device).mul(7).add(11).remainder(vocab_size).reshape(1, 24)
    one = torch.zeros_like(ids)
    was_training = model.training
    model.eval()
    probe = {
        "input_ids": ids,
        "segment_ids": one,
        **({"attention_mask": document_mask(one)} if is_masked(model) else {}),
    }
    if model.config._attn_implementation == "eager":
        probe.pop("attention_mask", None)  # one document: nothing to hide
    expected = model(**model_inputs(probe)).logits.float()
    hidden = body_hidden(model, ids, one)
    actual = OutputHead.of(model).logits(hidden).float()
    # Both run the same operations on the same numbers; the tolerance is a few roundings of the model's dtype.
    tolerance = 8 * torch.finfo(hidden.dtype).eps * expected.abs().max().clamp(min=1.0)
    if (expected - actual).abs().max() > tolerance:
        raise RecipeError(
            f"{type(model).__name__} transforms its logits in a way that this version does not know: "
            "its distribution cannot be taken from hidden states and output layer"
        )
    two = (torch.arange(24, device=device) >= 10).long().reshape(1, 24)
    changed = ids.clone()
    changed[:, :10] = (changed[:, :10] + 1).remainder(vocab_size)
    difference = (body_hidden(model, ids, two) - body_hidden(model, changed, two))[:, 10:]
    model.train(was_training)
    if difference.abs().max() != 0:
        raise RecipeError(
            f"{type(model).__name__} with attention {model.config._attn_implementation!r} lets packed documents see each "
            "other: use attention = 'sdpa'"
        )


def max_positions(config: Any) -> int | None:
    """The longest sequence a model was made for, if its configuration says."""
    text = config.get_text_config()
    value = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(value) if value else None


def layers_to_copy(layers: int | list[int], available: int) -> list[int]:
    """Indices of the layers to copy; a number means so many, evenly spaced from the first to the last."""
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
    """A smaller model of the same architecture: the teacher's embeddings, norms and head, and some of its layers.

    Works for every architecture whose body holds its layers in one list. The weights are copies. token_types = "drop" makes
    a DistilBERT of a BERT's layers: it has no token types, and that of a single text is added to the positions, so that
    with all layers the student is the teacher.

    Raises RecipeError for layers that are not there, or token types of a model that is no BERT.
    """
    if token_types == "drop":
        return _distilbert(teacher, layers_to_copy(layers, layer_list(teacher)[1]))
    prefix, available = layer_list(teacher)
    chosen = layers_to_copy(layers, available)
    config = copy.deepcopy(teacher.config)
    text = config.get_text_config()
    for name, value in list(text.to_dict().items()):
        # Settings per layer (layer types, rope switches) follow their layers.
        if isinstance(value, list) and len(value) == available:
            setattr(text, name, [value[layer] for layer in chosen])
    text.num_hidden_layers = len(chosen)
    # Built in the teacher's dtype, so that copying changes no bit.
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
"""BERT's names of its parts, as DistilBERT has them; longer ones first where one ends as another does."""


def _distilbert(bert: Any, layers: list[int]) -> Any:
    """A BERT's layers and masked-LM head as a DistilBERT, which computes the same without token types."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    config = bert.config
    if config.model_type != "bert" or config.layer_norm_eps != 1e-12:
        raise RecipeError(
            f"token_types = 'drop' is for a BERT with layer_norm_eps = 1e-12, as DistilBERT has it; {type(bert).__name__} "
            "is another: leave it out"
        )
    small = bert
    if layers != list(range(config.num_hidden_layers)):
        small = student_from_layers(bert, layers)
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
        if name in (types, "cls.predictions.bias"):  # the latter is the decoder's, once more
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
    """Name and length of the module list that holds a model's layers."""
    count = int(model.config.get_text_config().num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, count
    raise RecipeError(f"{type(model).__name__} keeps its layers in no list that could be found")


def check_vocabulary(model: Any, vocab_size: int, what: str, tokens: Callable[[], int] | None = None) -> None:
    """Raises MismatchError if a student cannot score every token id that the cache may hold.

    Teacher and student may pad their output layers to different sizes: where the student's is the smaller one, it must
    still hold the `tokens()` ids that the tokenizer has.
    """
    own = int(OutputHead.of(model).weight.shape[0])
    if own < vocab_size and (tokens is None or own < tokens()):
        raise MismatchError(
            f"{what} has {own} logits and the cache a vocabulary of {vocab_size}: start from a model with the same "
            "tokenizer, or resize its embeddings"
        )
