"""The cost of stage one from a model's configuration alone: no weights, no device, no measurement.

Work is counted in floating-point operations: two per weight and token in every matrix product, and the attention scores
of a causal model, which see half of the row on average (documents inside a row make that less). Time is work over a
GPU's public peak times a stated utilisation. A probe on the real machine (`assess.plan`) is better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.filesize import decimal

from ..base.errors import RecipeError, first_line
from ..models.sizes import ModelSizes
from ..store.shard_size import automatic_rows


@dataclass(frozen=True)
class Gpu:
    """Public figures of one accelerator."""

    name: str
    peak_flops: float
    """Dense bf16 (fp16 where there is no bf16) operations per second, tensor cores, from the vendor's data sheet."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second of its memory."""
    fused: bool = True
    """Whether the Triton kernel reduces its logits (`targets.reduction`); else operations of torch do."""

    @property
    def moved_per_logit(self) -> float:
        """Bytes that the reduction moves per (position, token): counted, not measured on a GPU.

        The kernel reads a 16-bit logit and leaves a quarter of that for its blocks, which counts as 4 bytes, so that 60 %
        of the bandwidth are enough; torch's operations read and write 84 to 90.
        """
        return 4.0 if self.fused else 90.0


_HELD_PER_LOGIT = 14.0
"""Bytes per (position, token) at once: a 16-bit logit, and three float32 buffers where torch's operations reduce it."""


GPUS = {
    "b200": Gpu("NVIDIA B200", 2250e12, 180e9, 8.0e12),
    "h200": Gpu("NVIDIA H200 SXM", 989e12, 141e9, 4.8e12),
    "h100": Gpu("NVIDIA H100 SXM", 989e12, 80e9, 3.35e12),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 756e12, 80e9, 2.0e12),
    "a100": Gpu("NVIDIA A100 80 GB", 312e12, 80e9, 2.04e12),
    "a100-40gb": Gpu("NVIDIA A100 40 GB", 312e12, 40e9, 1.56e12),
    "l40s": Gpu("NVIDIA L40S", 362e12, 48e9, 864e9),
    "l4": Gpu("NVIDIA L4", 121e12, 24e9, 300e9),
    "a10": Gpu("NVIDIA A10", 125e12, 24e9, 600e9),
    "v100": Gpu("NVIDIA V100 (fp16)", 125e12, 32e9, 900e9, fused=False),
    "t4": Gpu("NVIDIA T4 (fp16)", 65e12, 16e9, 320e9, fused=False),
    "rtx4090": Gpu("NVIDIA RTX 4090", 165e12, 24e9, 1008e9),
    "rtx3090": Gpu("NVIDIA RTX 3090", 71e12, 24e9, 936e9),
    "mi300x": Gpu("AMD MI300X", 1307e12, 192e9, 5.3e12, fused=False),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model from its configuration."""

    parameters: int
    """All weights; tied ones once."""
    products: int
    """Weights in the matrix products of one token: all but the input embeddings, of experts only the chosen ones."""
    layers: int
    attention_width: int
    """Heads times their size: queries per token and layer."""
    hidden_size: int
    intermediate_size: int
    vocab_size: int

    def forward_flops(self, row_length: int) -> float:
        """Operations per token of one pass over rows of `row_length`."""
        scores = 4 * self.layers * self.attention_width * row_length / 2
        return 2.0 * self.products + scores

    def inference_memory(self, batch_tokens: int) -> float:
        """Bytes of 16-bit weights, the widest activations of one layer, and the logits of at most 1024 positions with
        what their reduction holds."""
        activations = batch_tokens * (4 * self.hidden_size + 3 * self.intermediate_size)
        return 2 * (self.parameters + activations) + _HELD_PER_LOGIT * min(1024, batch_tokens) * self.vocab_size


def model_shape(config: Any, objective: str = "causal", trust_remote_code: bool = False) -> ModelShape:
    """Count the weights of a transformers configuration on the meta device.

    Raises RecipeError for a configuration without a language model of this objective.
    """
    from ..models.loading import auto_class, quiet_transformers

    try:
        with torch.device("meta"), quiet_transformers():
            model = auto_class(objective, config).from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise RecipeError(f"no {objective} language model has this configuration: {first_line(error)}") from error
    text = config.get_text_config()
    chosen = _expert_share(text)
    embeddings = model.get_input_embeddings().weight
    output = model.get_output_embeddings().weight
    parameters = products = 0.0
    for name, tensor in model.named_parameters():  # names tied weights once
        parameters += tensor.numel()
        if tensor.dim() >= 2 and tensor is not embeddings:
            products += tensor.numel() * (chosen if ".experts." in name else 1.0)
    if output is embeddings:
        products += output.numel()
    sizes = ModelSizes.of(config)
    return ModelShape(
        parameters=int(parameters),
        products=int(products),
        layers=sizes.layers,
        attention_width=(sizes.heads or 0) * (sizes.head_size or 0),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        vocab_size=int(output.shape[0]),
    )


def _expert_share(text: Any) -> float:
    """Share of a mixture's experts that process one token; 1 for a dense model."""
    chosen = getattr(text, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((value for name in names if (value := getattr(text, name, None))), None)
    return float(chosen) / float(total) if chosen and total else 1.0


@dataclass(frozen=True)
class Estimate:
    """One job: the teacher once over `tokens`."""

    tokens: int
    gpu: str
    num_gpus: int
    utilisation: float
    parameters: int
    capture_overhead: float
    flops_per_token: float
    """Of the teacher's forward pass."""
    teacher_flops: float
    teacher_hours: float
    """Wall time on all GPUs together, capture included."""
    gpu_hours: float
    memory: float
    """Bytes of one copy of the teacher during capture, over all GPUs that hold it."""
    gpus_per_copy: int
    storage: float
    """Bytes of the cache."""
    files: int
    break_even: int
    """Number of students from which caching costs less than running the teacher with each of them."""

    def facts(self) -> dict[str, str]:
        """Quantity -> value, ready to print."""
        gpu = GPUS[self.gpu]
        return {
            "teacher": f"{self.parameters / 1e9:,.2f} billion parameters, "
            f"{self.flops_per_token / 1e9:,.2f} GFLOP per token",
            "work of stage one": f"{self.teacher_flops:.3g} FLOP over {self.tokens:,} tokens",
            "time of stage one": f"{self.teacher_hours:,.2f} h on {self.num_gpus} x {gpu.name} ({self.gpu_hours:,.2f} "
            f"GPU hours, at {self.utilisation:.0%} of {gpu.peak_flops / 1e12:,.0f} TFLOP/s and "
            f"{self.capture_overhead:.2f} forward passes; `bench` measures 1.0)",
            "teacher memory": f"{self.memory / 1e9:,.1f} GB, {self.gpus_per_copy} GPU per copy",
            "cache": f"{decimal(round(self.storage))} at {self.storage / self.tokens:.1f} bytes a position in {self.files:,} files",
            "worth it from": f"{self.break_even} student{'s' if self.break_even > 1 else ''}",
        }


def estimate(
    teacher: ModelShape,
    *,
    tokens: int,
    row_length: int,
    bytes_per_position: float,
    gpu: str = "h100",
    num_gpus: int = 1,
    utilisation: float = 0.4,
    batch_rows: int = 8,
    shard_rows: int | None = None,
    tail_rank: int = 0,
    capture_overhead: float | None = None,
    epochs: float = 1.0,
) -> Estimate:
    """Work, time, memory, storage and files of caching a teacher over `tokens`, and the number of students from which
    it pays.

    `capture_overhead` is stage one over the bare forward pass (`bench` measures it); by default the reduction adds the
    time in which the GPU moves its bytes, which grow with the vocabulary. `epochs` are the passes of each student over
    the rows. `shard_rows` is chosen by default (`automatic_rows`). A student that trains online pays the
    teacher's forward pass at every step; from the cache, once. Raises RecipeError for a GPU outside `GPUS`, and for
    sizes that are not positive.
    """
    if gpu not in GPUS:
        raise RecipeError(f"gpu {gpu!r} is not in the table: one of {', '.join(GPUS)}")
    if not 0 < utilisation <= 1:
        raise RecipeError(f"utilisation {utilisation} must lie between 0 and 1")
    if min(tokens, row_length, num_gpus, shard_rows or 1, batch_rows) < 1 or min(bytes_per_position, epochs) <= 0:
        raise RecipeError(
            "tokens, row_length, num_gpus, shard_rows, batch_rows, bytes_per_position and epochs must be positive"
        )
    speed = GPUS[gpu].peak_flops * utilisation * num_gpus
    per_token = teacher.forward_flops(row_length)
    bare = tokens * per_token
    if capture_overhead is None:
        reduction = teacher.vocab_size * GPUS[gpu].moved_per_logit / GPUS[gpu].bandwidth
        capture_overhead = 1 + reduction * GPUS[gpu].peak_flops * utilisation / per_token
    hours = bare * capture_overhead / speed / 3600
    memory = teacher.inference_memory(batch_rows * row_length)
    rows = tokens // row_length
    shards = -(-rows // (shard_rows or automatic_rows(rows, row_length, bytes_per_position)))
    return Estimate(
        tokens=tokens,
        gpu=gpu,
        num_gpus=num_gpus,
        utilisation=utilisation,
        capture_overhead=capture_overhead,
        parameters=teacher.parameters,
        flops_per_token=per_token,
        teacher_flops=bare,
        teacher_hours=hours,
        gpu_hours=hours * num_gpus,
        memory=memory,
        # A tenth is left for the runtime and fragmentation.
        gpus_per_copy=math.ceil(memory / (0.9 * GPUS[gpu].memory)),
        storage=tokens * bytes_per_position,
        # A shard has its file and its record; a cache the manifest, the codebook's nine and the tail basis's seventeen.
        files=2 * shards + 1 + 9 + (17 if tail_rank else 0),
        # n students cost n * epochs teacher passes online, and capture_overhead of them cached.
        break_even=math.floor(capture_overhead / epochs) + 1,
    )
