"""The teacher: where it comes from, what identifies it, and its pass over rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..base import processes
from ..base.durable import file_digest
from ..base.errors import RecipeError
from ..corpus.tokenizer import tokenizer_digest
from ..recipe.schema import TeacherConfig
from .loading import load_model, load_tokenizer
from .output_layer import OutputLayer
from .packing import body_hidden, is_masked
from .placement import Placement, choose_placement, input_device, to_device
from .probe import check_model
from .taps import Tap


@dataclass(frozen=True)
class Teacher:
    """A language model in evaluation mode, causal or masked, ready to run over rows."""

    model: Any
    output_layer: OutputLayer
    placement: Placement
    identity: dict[str, Any]
    """What determines its distribution: source, revision, digests of weights and tokenizer, dtype, vocabulary size."""
    source: str
    """Directory or hub name that transformers loads it from."""
    tensor_parallel: bool = False
    """One model cut over all processes: the first one leads, the others `serve_passes` until it calls `stop_followers`."""

    @property
    def vocab_size(self) -> int:
        return int(self.output_layer.weight.shape[0])

    @property
    def objective(self) -> str:
        """causal or masked."""
        return "masked" if is_masked(self.model) else "causal"

    @torch.inference_mode()
    def hidden(self, input_ids: Tensor, segment_ids: Tensor, tap: Tap | None = None) -> Tensor:
        """[B, L] -> what the output layer reads [B, L, D], on the teacher's device; `tap` takes signals on the way."""
        device = self.placement.device
        rows = to_device(input_ids, device), to_device(segment_ids, device)
        return body_hidden(self.model, *rows) if tap is None else tap.hidden(self.model, *rows)

    @torch.inference_mode()
    def serve_passes(self) -> None:
        """Take part in the passes of a tensor-parallel teacher until the first process stops the others."""
        while (rows := processes.receive()) is not None:
            hidden_ND = self.hidden(*rows).flatten(0, 1)
            chunk = chunk_positions(hidden_ND)
            for start in range(0, len(hidden_ND), chunk):
                self.output_layer.logits(hidden_ND[start : start + chunk])

    def lead_pass(self, input_ids: Tensor, segment_ids: Tensor) -> None:
        """Tell the other processes of a tensor-parallel teacher which rows come next: they are in `serve_passes`."""
        if self.tensor_parallel:
            processes.send((input_ids, segment_ids))

    def stop_followers(self) -> None:
        """End `serve_passes` of the other processes; nothing to do for a teacher that is not tensor-parallel."""
        if self.tensor_parallel:
            processes.send(None)


def load_teacher(source: str, config: TeacherConfig, objective: str = "causal") -> Teacher:
    """Load, place and check a teacher of causal or masked rows. Raises RecipeError for one that cannot be used."""
    shared = config.parallel == "tensor"
    if config.parallel != "none" and config.device != "auto":
        raise RecipeError(f"teacher.parallel = {config.parallel!r} takes all devices: set teacher.device = 'auto'")
    if shared and not processes.launched():
        raise RecipeError("teacher.parallel = 'tensor' needs torchrun, with one process per device")
    if config.parallel == "layers" and processes.world_size() > 1:
        raise RecipeError(
            "teacher.parallel = 'layers' is for one process with several devices: start it without torchrun"
        )
    placement = choose_placement(config.device, config.dtype, config.attention)
    model = load_model(source, placement, config.revision, config.parallel, objective)
    placement = replace(placement, device=input_device(model), attention=model.config._attn_implementation)
    check_model(model)
    identity = {
        "source": config.model,
        "revision": config.revision or getattr(model.config, "_commit_hash", None),
        "weights": _weights_digest(source, model),
        "dtype": placement.dtype_name,
        "vocab_size": int(model.get_output_embeddings().weight.shape[0]),
        "tokenizer": tokenizer_digest(load_tokenizer(source, config.revision)),
    }
    return Teacher(model, OutputLayer.of(model), placement, identity, source, shared and processes.world_size() > 1)


def chunk_positions(hidden_ND: Tensor) -> int:
    """Positions whose logits exist at once: enough for the output layer's weights to be read once for many, and for a CPU's
    cache not more than they need."""
    return 512 if hidden_ND.device.type == "cpu" and hidden_ND.dtype == torch.float32 else 1024


def _weights_digest(source: str, model: Any) -> str:
    """Digest of the weights: of the files where they are local, else of the loaded tensors."""
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    if files:
        return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, DTensor) or tensor.is_meta:
            raise RecipeError(
                f"teacher.parallel: {source!r} must be a local directory: its weights are not all in one place"
            )
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
