"""A student from some of its teacher's layers, as a model of the same architecture.

A student is first built without memory, so that a layer that would compute something else in it is refused by name
before the teacher runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import PipelineError, RecipeError
from .distilbert import check_bert, distilbert
from .layer_check import check_results, difference
from .placement import has_local_weights
from .student_config import config_of_layers, short


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


def check_layers(teacher: Any, layers: int | list[int], token_types: str = "keep") -> list[int]:
    """Build a student of teacher layers without memory, on the teacher's weights, and compare its layers with the
    teacher's; the layers chosen.

    Raises RecipeError for layers that do not exist or that would compute something else in the student, for quantised
    weights, and for token_types = "drop" of another architecture than BERT.
    """
    chosen = layers_to_copy(layers, layer_list(teacher)[1])
    if token_types == "drop":
        check_bert(teacher)
    _on_teacher_weights(teacher, chosen)
    return chosen


def student_from_layers(teacher: Any, layers: int | list[int], token_types: str = "keep") -> Any:
    """A smaller model of the same architecture: the teacher's embeddings, norms, output layer and some of its layers.

    Works for every architecture whose body holds its layers in one list, each of which computes the same in a smaller
    model. The weights are copies, on the CPU. Of a model of text and images the student is the text side, where
    transformers has a class for it. token_types = "drop" turns BERT layers into a DistilBERT, which has no token types:
    the embedding of type 0 is added to the positions, so that a student with all layers equals the teacher.

    Raises RecipeError as `check_layers` does.
    """
    if token_types == "drop":
        check_bert(teacher)
    student = _on_teacher_weights(teacher, layers_to_copy(layers, layer_list(teacher)[1]))
    student._apply(lambda tensor: tensor.detach().clone() if tensor.is_meta else tensor.detach().to("cpu", copy=True))
    student.tie_weights()  # a copy to another device makes parameters of their own
    student.train(teacher.training)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return distilbert(student) if token_types == "drop" else student


def layer_list(model: Any) -> tuple[str, int]:
    """Name and length of the module list that holds a model's layers. Raises RecipeError where there is none."""
    return _Places.of(model).layers, _Places.of(model).count


_DEPTHS = (
    "decoder_layers",  # BART; its num_hidden_layers are those of the encoder
    "num_decoder_layers",
    "num_layers_per_stack",
    "num_hidden_layers",
    "num_layers",
)
"""Keys of configurations with the number of layers that a text model has, in the order in which they are looked for."""


@dataclass(frozen=True)
class _Places:
    """Where a model keeps the parts of its text side."""

    body: str
    """Name of the module with embeddings and layers."""
    head: str
    """Name of the output layer."""
    layers: str
    """Name of the module list of the layers."""
    count: int
    depth_key: str
    """Key of the configuration with the number of layers."""

    @classmethod
    def of(cls, model: Any) -> _Places:
        """Raises RecipeError for a model without a module list of its layers."""
        modules = list(model.named_modules())
        names = {id(module): name for name, module in reversed(modules)}
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
            decoder = model.base_model  # some call their output layer a decoder
        body = names.get(id(decoder), "")
        text = model.config.get_text_config()
        for key in _DEPTHS:
            count = getattr(text, key, None)
            for name, module in modules:
                inside = name.startswith(f"{body}.") or not body
                if inside and isinstance(module, nn.ModuleList) and len(module) == count:
                    return cls(body, names.get(id(model.get_output_embeddings()), ""), name, int(count), key)
        raise RecipeError(
            f"{type(model).__name__} has no module list with its {getattr(text, 'num_hidden_layers', 'N')} layers: students "
            "cannot copy layers of it: start them from model or architecture"
        )


def _on_teacher_weights(teacher: Any, chosen: list[int]) -> Any:
    """A student that shares the teacher's tensors, after its layers have been compared with the teacher's."""
    if getattr(teacher, "hf_quantizer", None) is not None or getattr(teacher.config, "quantization_config", None):
        raise RecipeError(
            f"layers: the weights of this {type(teacher).__name__} are quantised and cannot be trained: start the student "
            "from model or architecture, or take the teacher without quantisation"
        )
    theirs, attention = _Places.of(teacher), teacher.config.get_text_config()._attn_implementation
    kind, config = _student_kind(teacher, chosen, theirs.depth_key)
    where = f"layers {chosen} of {theirs.count}: in a {kind.__name__} of these layers"
    advice = "choose other layers, or start the student from model or architecture"
    with _refused(where, advice), torch.device("meta"):
        # In the teacher's dtype, so that the copy is exact.
        student = kind._from_config(config, dtype=teacher.dtype, attn_implementation=attention)
        own = _Places.of(student)
    layers, copies = (list(model.get_submodule(at.layers)) for model, at in ((teacher, theirs), (student, own)))
    if len(copies) != len(chosen):
        raise RecipeError(f"{where} there are {len(copies)} layers: {advice}")
    for place, number in enumerate(chosen):
        found = difference(layers[number], copies[place], number, place)
        if found is not None:
            raise RecipeError(f"{where} layer {number} computes something else ({found}): {advice}")
    origin = _Origin(student, teacher, own, theirs, chosen)
    student.load_state_dict(_weights(teacher, student, origin), assign=True)
    student.tie_weights()
    buffers = dict(teacher.named_buffers())
    for name, buffer in list(student.named_buffers()):
        known = buffers.get(origin.name(name))
        if known is not None and known.shape == buffer.shape:
            module, _, key = name.rpartition(".")
            student.get_submodule(module)._buffers[key] = known
    if has_local_weights(teacher):
        with _refused(where, advice):
            wrong = check_results(teacher, student.eval(), layers, copies, chosen)
        if wrong is not None:
            raise RecipeError(f"{where} layer {wrong} gives other results, by its number or the depth: {advice}")
    return student


@contextmanager
def _refused(where: str, advice: str) -> Iterator[None]:
    """Say in one line that a student cannot be made; architectures check themselves with whatever they like to raise."""
    try:
        yield
    except (PipelineError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RecipeError(f"{where} something is missing ({type(error).__name__}: {short(error)}): {advice}") from error


def _student_kind(teacher: Any, chosen: list[int], depth_key: str) -> tuple[Any, Any]:
    """Class and configuration of a student: of the text side alone, where transformers has a class for it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = teacher.config
    text = config.get_text_config()
    own = config_of_layers(text, chosen, depth_key)
    if text is config:
        return type(teacher), own
    tied = teacher.get_input_embeddings().weight is teacher.get_output_embeddings().weight
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        own.tie_word_embeddings = tied
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], own
    whole = copy.deepcopy(config)
    key = next(name for name in config.sub_configs if getattr(config, name, None) is text)
    setattr(whole, key, own)
    return type(teacher), whole


@dataclass(frozen=True)
class _Origin:
    """Where the weights of a student come from."""

    student: Any
    teacher: Any
    own: _Places
    theirs: _Places
    chosen: list[int]

    def name(self, name: str) -> str:
        """The teacher's name of a student's weight."""
        own, theirs = self.own, self.theirs
        if own.head and name.startswith(f"{own.head}."):
            return theirs.head + name.removeprefix(own.head)
        before = name
        if own.body != theirs.body and name.startswith(f"{own.body}."):
            name = theirs.body + name.removeprefix(own.body)
        parts, parts_before = name.split("."), before.split(".")
        offset = len(parts) - len(parts_before)
        for end in range(1, len(parts_before)):
            # Some architectures keep parts of their layers in further lists of one entry per layer.
            if not parts_before[end].isdecimal() or end + offset < 1:
                continue
            lists = ".".join(parts_before[:end]), ".".join(parts[: end + offset])
            lengths = _length(self.student, lists[0]), _length(self.teacher, lists[1])
            if lengths == (len(self.chosen), theirs.count):
                parts[end + offset] = str(self.chosen[int(parts_before[end])])
                break
        return ".".join(parts)


def _length(model: Any, name: str) -> int | None:
    """Length of a module list, None for any other module."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return len(module) if isinstance(module, (nn.ModuleList, nn.ParameterList)) else None


def _weights(teacher: Any, student: Any, origin: _Origin) -> dict[str, Tensor]:
    """Name of every weight of a student -> the teacher's tensor, without copies where it is whole.

    What the teacher keeps for all layers in one tensor, such as the embeddings of every layer of a Gemma 3n, is cut.
    Raises RecipeError for a weight that the teacher does not have.
    """
    source, found = teacher.state_dict(), {}
    for name, tensor in student.state_dict().items():
        old = origin.name(name)
        if old not in source:
            raise RecipeError(f"layers {origin.chosen}: this {type(teacher).__name__} has no {name} for its student")
        found[name] = _cut(source[old], tensor.shape, origin.theirs.count, origin.chosen)
        if found[name].shape != tensor.shape:
            shapes = f"{list(tensor.shape)} in the student and {list(source[old].shape)} in the teacher"
            raise RecipeError(
                f"layers {origin.chosen}: {name} has the shape {shapes}: start the student from model or architecture"
            )
    return found


def _cut(tensor: Tensor, shape: torch.Size, available: int, chosen: list[int]) -> Tensor:
    """The parts of a tensor that belong to the chosen layers, where one axis holds parts of all layers."""
    axes = [axis for axis, (old, new) in enumerate(zip(tensor.shape, shape, strict=False)) if old != new]
    if len(axes) != 1 or tensor.dim() != len(shape):
        return tensor
    (axis,) = axes
    if tensor.shape[axis] * len(chosen) != shape[axis] * available:
        return tensor
    parts = tensor.reshape(*tensor.shape[:axis], available, -1, *tensor.shape[axis + 1 :])
    return parts.index_select(axis, torch.tensor(chosen, device=tensor.device)).flatten(axis, axis + 1)
