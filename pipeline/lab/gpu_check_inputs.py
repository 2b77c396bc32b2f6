"""What a check of a device runs on: models of random weights and known shapes, rows of random tokens, made-up tails.

Nothing is downloaded. The time of a kernel does not depend on what weights say, as long as the distribution is peaked
as a trained model's is, which decides how many candidates a selection has.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..capture.teacher_pass import TeacherPass
from ..corpus.labels import labels_of
from ..corpus.row_writer import RowWriter
from ..corpus.rows import PackedRows
from ..models.output_layer import OutputLayer
from ..models.placement import Placement
from ..models.probe import check_model
from ..models.teacher import Teacher
from ..recipe.choices import DEFAULT_KNOTS
from ..store.basis_file import StoredBasis
from ..store.codec import TargetCodec
from ..store.coordinates import CoordinateCodec
from ..targets.basis import TailBasis, TailProjection
from ..targets.supports import Support
from .scratch_cache import CacheMaker

KNOTS = (*DEFAULT_KNOTS, 1.0)


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


@dataclass(frozen=True)
class Sizes:
    """How much is measured: that of a GPU, or so little that every line runs on a CPU in a moment."""

    shapes: dict[str, Shape]
    vocabularies: tuple[int, ...]
    row_length: int
    rows: int
    batch_rows: int
    student_rows: int
    positions: int
    """Of one reduction."""
    rank: int
    repeats: int
    supports: dict[str, Support]
    odd_vocabulary: int
    """No multiple of what a kernel loads at once."""
    largest_head: int
    """k, of that vocabulary."""


REAL = Sizes(
    shapes={
        "135M": Shape(576, 1536, 30, 9, 3, 49_152),
        "1B": Shape(2048, 8192, 16, 32, 8, 128_256),
    },
    vocabularies=(49_152, 128_256, 151_936, 262_144),
    row_length=1024,
    rows=256,
    batch_rows=32,
    student_rows=8,
    positions=1024,
    rank=32,
    repeats=5,
    supports={
        "topk": Support("topk", k=64),
        "topp": Support("topp", k=64, p=0.9),
        "threshold": Support("threshold", tau=0.05),
        "sampled": Support("sampled", draws=50),
    },
    odd_vocabulary=50_257,
    largest_head=512,
)
DRY = Sizes(
    shapes={"135M": Shape(24, 48, 2, 3, 3, 601), "1B": Shape(32, 64, 2, 4, 2, 1001)},
    vocabularies=(601, 1001, 1201, 2003),
    row_length=32,
    rows=16,
    batch_rows=4,
    student_rows=2,
    positions=16,
    rank=4,
    repeats=1,
    supports={
        "topk": Support("topk", k=8),
        "topp": Support("topp", k=8, p=0.9),
        "threshold": Support("threshold", tau=0.05),
        "sampled": Support("sampled", draws=10),
    },
    odd_vocabulary=607,
    largest_head=100,
)


def peaked_logits(positions: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Logits [N, V] with a head, and in half precision with many ties."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(positions, vocab_size, generator=generator) * 2.2
    logits_NV[:, ::97] *= 3
    return logits_NV.to(device, dtype)


class Inputs:
    """One model's rows, teacher and cache on a device."""

    def __init__(self, name: str, sizes: Sizes, device: torch.device, folder: Path) -> None:
        self.name, self.sizes, self.device, self._folder = name, sizes, device, folder
        self.shape = sizes.shapes[name]
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def model(self, dtype: torch.dtype) -> Any:
        """A Llama of random weights on the device."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            **vars(self.shape),
            max_position_embeddings=4 * self.sizes.row_length,
            attn_implementation="sdpa",
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        with self.device:
            model = LlamaForCausalLM(config)
        model.model.norm.weight.data.mul_(8)  # a peaked distribution
        return model.to(dtype)

    @cached_property
    def corpus(self) -> PackedRows:
        """Rows of random tokens, four documents each on average."""
        draw, shape = np.random.default_rng(0), (self.sizes.rows, self.sizes.row_length)
        input_ids = draw.integers(0, self.shape.vocab_size, shape, dtype=np.int32)
        segment_ids = np.cumsum(draw.random(shape) < 3 / self.sizes.row_length, 1).astype(np.int32)
        shutil.rmtree(self._folder, ignore_errors=True)  # of a process that failed
        writer = RowWriter(self._folder / "rows", self.sizes.row_length)
        writer.write_rows(input_ids, segment_ids - segment_ids[:, :1], np.ones_like(input_ids))
        writer.commit({})
        return PackedRows(self._folder / "rows")

    @cached_property
    def teacher(self) -> Teacher:
        model = self.model(self.dtype).eval().requires_grad_(False)
        probe = check_model(model)
        placement = Placement(self.device, self.dtype, probe.attention, str(probe))
        identity = {
            "source": self.name,
            "revision": None,
            "weights": self.name,
            "dtype": placement.dtype_name,
            "rows": probe.layout.name,
            "vocab_size": self.shape.vocab_size,
            "tokenizer": "",
        }
        return Teacher(model, OutputLayer.of(model), placement, identity, source="")

    @cached_property
    def basis(self) -> StoredBasis:
        """A made-up basis, which costs what a fitted one does."""
        generator, rank = torch.Generator().manual_seed(0), self.sizes.rank
        directions_VR = torch.randn(rank, self.shape.vocab_size, generator=generator).T
        width = self.shape.hidden_size
        projection = TailProjection(torch.zeros(width), torch.randn(rank, width, generator=generator) / width**0.5)
        offset_V = torch.randn(self.shape.vocab_size, generator=generator)
        return StoredBasis.quantised(TailBasis(offset_V, directions_VR), projection, 2.0**-8, 2.0**-8)

    @cached_property
    def codec(self) -> TargetCodec:
        """What a recipe has by default, the top 16 with a tail shape, its codebook learned from a few rows."""
        k = min(16, self.shape.vocab_size - 1)
        shape = CoordinateCodec(self.sizes.rank, 0.15, predicted=True)
        codec = TargetCodec(Support("topk", k=k), KNOTS, self.shape.vocab_size, "compact", coordinates=shape)
        input_ids, segment_ids, labels = self.rows(np.arange(min(4, self.sizes.rows)))
        targets = TeacherPass(self.teacher, codec.support, KNOTS)(input_ids, segment_ids, labels).targets.to("cpu")
        learned = codec.learn(targets, input_ids.numpy(), self.sizes.rows * self.sizes.row_length)
        return replace(learned, coordinates=replace(shape, basis=self.basis.basis()))

    @cached_property
    def maker(self) -> CacheMaker:
        batch_rows = self.sizes.batch_rows
        made = CacheMaker(self.teacher, self.corpus, self.codec, batch_rows, shard_rows=2 * batch_rows)
        made.learned = self.codec, self.basis
        return made

    def rows(self, numbers: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, segment ids and labels [B, L] of rows, on the CPU."""
        columns = self.corpus.columns(numbers)
        input_ids, segment_ids = (torch.from_numpy(columns[name]).long() for name in ("input_ids", "segment_ids"))
        return input_ids, segment_ids, torch.from_numpy(labels_of(columns))
