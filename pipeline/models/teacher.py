"""The teacher: a loaded, checked model with its output layer and identity, on one device or over several processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..base import processes
from ..base.errors import RecipeError
from ..corpus.tokenizer import tokenizer_digest
from ..recipe.schema import Recipe, TeacherConfig
from .loading import load_model, load_tokenizer
from .output_layer import OutputLayer
from .packing import is_masked
from .placement import Placement, choose_placement, input_device
from .probe import check_model
from .rows import body_hidden
from .taps import Tap
from .teacher_source import resolve_teacher
from .weights import hub_commit, weights_digest

_OUTPUT_LAYER = "output layer"
"""The message that asks for the whole weight of the output layer."""


@dataclass(frozen=True)
class TeacherFacts:
    """What a cache is opened with: known of a teacher also where its model is not loaded."""

    identity: dict[str, Any]
    width: int
    """Size of the states that the output layer reads."""
    config: Any
    """transformers' configuration, which names the layers of signals; None for a cache without them."""
    tensor_parallel: bool = False

    @property
    def vocab_size(self) -> int:
        return int(self.identity["vocab_size"])


@dataclass(frozen=True)
class Teacher:
    """A causal or masked language model in evaluation mode, ready to run over rows."""

    model: Any
    output_layer: OutputLayer
    placement: Placement
    identity: dict[str, Any]
    """What determines its distribution: source, revision, digests of weights and tokenizer, dtype, row layout, vocabulary
    size."""
    source: str
    """Directory or hub name that transformers loads it from."""
    tensor_parallel: bool = False
    """One model sharded over all processes: the first leads, the others `serve_passes`."""

    @property
    def vocab_size(self) -> int:
        return int(self.output_layer.weight.shape[0])

    @property
    def facts(self) -> TeacherFacts:
        return TeacherFacts(
            self.identity, int(self.output_layer.weight.shape[1]), self.model.config, self.tensor_parallel
        )

    @property
    def objective(self) -> str:
        """causal or masked."""
        return "masked" if is_masked(self.model) else "causal"

    @torch.inference_mode()
    def hidden(self, input_ids: Tensor, segment_ids: Tensor, tap: Tap | None = None) -> Tensor:
        """[B, L] -> states that the output layer reads [B, L, D], on the teacher's device; `tap` records signals."""
        run = body_hidden if tap is None else tap.hidden
        return run(self.model, input_ids, segment_ids)

    def whole_output_layer(self) -> OutputLayer:
        """The output layer with its whole weight [V, D] in this process, wherever the model keeps it."""
        if self.output_layer.module is None or not self.output_layer.is_linear:
            return self.output_layer
        self.lead(_OUTPUT_LAYER)
        return self._gathered_output_layer()

    @torch.inference_mode()
    def _gathered_output_layer(self) -> OutputLayer:
        """The weight of a layer that is spread over processes or offloaded: what it gives for the unit vectors.

        Each element is a sum of one term, so it is exact; with a bias it has the rounding of one addition.
        """
        layer, width = self.output_layer, self.output_layer.weight.shape[1]
        inputs_MD = torch.eye(width + 1, width, dtype=self.placement.dtype, device=self.placement.device)
        columns_MV = torch.cat([layer.module(part) for part in torch.split(inputs_MD, chunk_positions(inputs_MD))])
        bias_V = columns_MV[width]  # for the zero vector
        weight_VD = (columns_MV[:width] - bias_V).T.contiguous()
        return OutputLayer(weight_VD, None if layer.bias is None else bias_V, layer.scale, layer.softcap)

    @torch.inference_mode()
    def serve_passes(self) -> None:
        """Take part in the passes of a tensor-parallel teacher until the first process sends None (`lead`)."""
        while (sent := processes.broadcast()) is not None:
            if sent == _OUTPUT_LAYER:
                self._gathered_output_layer()
                continue
            hidden_ND = self.hidden(*sent).flatten(0, 1)
            chunk = chunk_positions(hidden_ND)
            for start in range(0, len(hidden_ND), chunk):
                self.output_layer.logits(hidden_ND[start : start + chunk])

    def lead(self, message: tuple[Tensor, Tensor] | str | None) -> None:
        """Send the next rows, or None at the end, to the other processes of a tensor-parallel teacher, which are in
        `serve_passes`; does nothing for any other teacher."""
        if self.tensor_parallel:
            processes.broadcast(message)


def load_teacher(source: str, config: TeacherConfig, objective: str = "causal") -> Teacher:
    """Load, place and check a teacher for causal or masked rows.

    `source` is what `resolve_teacher` returns. Raises RecipeError for a model that cannot be used, or a placement that
    contradicts itself.
    """
    tensor_parallel = config.parallel == "tensor"
    if config.parallel != "none" and config.device != "auto":
        raise RecipeError(f"teacher.parallel = {config.parallel!r} takes all devices: set teacher.device = 'auto'")
    if tensor_parallel and not processes.launched():
        raise RecipeError("teacher.parallel = 'tensor' needs torchrun, with one process per device")
    if config.parallel == "layers" and processes.world_size() > 1:
        raise RecipeError("teacher.parallel = 'layers' uses the devices of one process: start it without torchrun")
    placement = choose_placement(config.device, config.dtype, config.attention)
    trust = config.trust_remote_code
    model = load_model(source, placement, config.revision, config.parallel, objective, trust)
    probe = check_model(model)
    placement = replace(
        placement, device=input_device(model), attention=probe.attention, reason=f"{placement.reason}; {probe}"
    )
    layer = OutputLayer.of(model)
    identity = {
        "source": config.model,
        "revision": config.revision or hub_commit(source, None),
        "weights": weights_digest(source, config.revision, model),
        "dtype": placement.dtype_name,
        "rows": probe.layout.name,
        "vocab_size": int(layer.weight.shape[0]),
        "tokenizer": tokenizer_digest(load_tokenizer(source, config.revision, trust)),
    }
    return Teacher(model, layer, placement, identity, source, tensor_parallel and processes.world_size() > 1)


def teacher_of(recipe: Recipe) -> Teacher:
    """Load a recipe's teacher for the rows of its corpus; raises as `load_teacher` and `resolve_teacher` do."""
    return load_teacher(resolve_teacher(recipe), recipe.teacher, recipe.corpus.objective)


def chunk_positions(hidden_ND: Tensor) -> int:
    """Positions whose logits exist at once: many, so that the output layer's weights are read once for all of them, but
    no more than the caches of a CPU hold.
    """
    return 512 if hidden_ND.device.type == "cpu" and hidden_ND.dtype == torch.float32 else 1024
