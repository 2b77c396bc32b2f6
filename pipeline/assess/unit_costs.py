"""What one position costs a core of this machine: to tokenise, to write, to read and to verify.

Each is measured in seconds of processor time, all threads together, so that it holds for one core however many there
are and whatever else runs. Targets are drawn at random, with the sizes of the real ones: no teacher is needed.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

from ..base.durable import json_digest
from ..base.errors import PipelineError
from ..corpus.documents import texts
from ..corpus.labels import labels_of
from ..models.teacher_source import teacher_tokenizer
from ..recipe.paths import CachePaths
from ..recipe.schema import Recipe
from ..store.codec import TargetCodec
from ..store.draft import ShardDraft
from ..store.manifest import Manifest
from ..store.shard_reader import ShardReader, read_rows
from ..store.verify import verify_shard
from ..targets.basis import TailBasis
from ..targets.sparse_targets import SparseTargets
from .grid import Setting

_POSITIONS, _DIFFERENT = 2**13, 2**9
"""Of the sample of targets, which repeats some different ones."""
_VOCABULARY = 2**15
"""Largest vocabulary of the sample: what is stored grows with what is kept, not with the vocabulary."""
_CHARACTERS = 2**19
"""Of the sample of text."""
_RUNS = 3


@dataclass(frozen=True)
class UnitCosts:
    """Costs of one core of this machine."""

    tokenizer: str
    """Which one was measured, on which text."""
    tokens_per_second: float
    """Of the bare tokenizer, in batches."""
    write_seconds: float
    """Per position: encoding, checksums and writing of targets and text."""
    read_seconds: float
    """Per position: reading, checking and decoding of the same, several rows at a time."""
    arrays: int
    """Of a shard: the chunks of a row."""
    verify_bytes_per_second: float
    """Of `verify`: every byte of a shard, and the text of its rows."""


def measure_unit_costs(recipe: Recipe, setting: Setting, vocab_size: int) -> UnitCosts:
    """The costs of a recipe's rows and targets, in some seconds; `vocab_size` is the teacher's.

    The recipe's text and the teacher's tokenizer are used where they are here, else texts of Python's documentation and
    a BPE that is trained on them.
    """
    name, tokens_per_second = _tokenizer_speed(recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return UnitCosts(name, tokens_per_second, *_shard_costs(setting, recipe, min(vocab_size, _VOCABULARY)))
    finally:
        torch.set_num_threads(threads)


def _cost(action: Callable[[], Any]) -> float:
    """Least processor time of some runs, in seconds."""
    seconds = []
    for _ in range(_RUNS):
        begin = time.process_time()
        action()
        seconds.append(time.process_time() - begin)
    return max(min(seconds), 1e-9)


def _tokenizer_speed(recipe: Recipe) -> tuple[str, float]:
    try:
        sample, source = list(_cut(texts(recipe.corpus))) if recipe.corpus.format != "hub" else [], "the corpus"
    except PipelineError:
        sample = []
    if not sample:
        sample, source = list(_cut(iter(topics.values()))), "Python's documentation"
    try:
        tokenizer = teacher_tokenizer(recipe)
        backend, name = getattr(tokenizer, "backend_tokenizer", None), "the teacher's tokenizer"
    except PipelineError:
        backend, name = _trained(sample), "a BPE (the teacher's tokenizer is not here)"

    def encoded() -> list[Any]:
        if backend is None:
            return list(tokenizer(sample)["input_ids"])
        return list(backend.encode_batch_fast(sample, add_special_tokens=False))

    tokens = sum(len(ids) for ids in encoded())
    return f"{name} on {source}", tokens / _cost(encoded)


def _cut(documents: Iterator[str]) -> Iterator[str]:
    """Documents, until they are long enough together; the last one may be cut."""
    left = _CHARACTERS
    for text in documents:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _trained(sample: list[str]) -> Any:
    """A byte-level BPE of 16,384 tokens."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sample, vocab_size=2**14, show_progress=False)
    return tokenizer._tokenizer


def _shard_costs(setting: Setting, recipe: Recipe, vocab_size: int) -> tuple[float, float, int, float]:
    """Seconds per position to write, and to read, number of arrays, and bytes per second of `verify`, of one shard."""
    length = recipe.corpus.row_length
    rows = max(_POSITIONS // length, 2)
    columns, targets, codec = _sample(setting, recipe, vocab_size, rows, length)
    labels = labels_of(columns)
    identity = {"objective": "causal", "columns": list(columns), "signals": ["targets"]}
    manifest = Manifest(identity, codec.learn(targets, columns["input_ids"], 2**30), rows, length, rows, "")
    layout, profile, positions = manifest.layout(), codec.profile, rows * length
    with tempfile.TemporaryDirectory() as scratch:
        file, kept = CachePaths(Path(scratch)).shard(0), dict[str, Any]()

        def write() -> None:
            with ShardDraft(Path(scratch), manifest, 0) as draft:
                draft.add(targets, columns, [0.0] * rows)
                kept.update(draft.finish())
                draft.staged.rename(file)

        def read() -> None:
            reader = ShardReader(file, layout, profile, rows, kept)
            for first in range(0, rows, 8):
                some = range(first, min(first + 8, rows))
                stored = read_rows([(reader, row) for row in some])
                text = manifest.text.decode(stored)
                mask = manifest.target_mask(labels_of(text), text["segment_ids"])
                manifest.codec.decode(stored, text["input_ids"], mask, labels[some.start : some.stop])
            reader.close()

        costs = _cost(write) / positions, _cost(read) / positions, len(layout)
        record = {**kept, "record_sha256": json_digest(kept)}
        return *costs, kept["size"] / _cost(lambda: verify_shard(Path(scratch), manifest, record))


def _sample(
    setting: Setting, recipe: Recipe, vocab_size: int, rows: int, length: int
) -> tuple[dict[str, Any], SparseTargets, TargetCodec]:
    """Rows and targets [rows, length]: logits like those of a language model, rarer tokens less likely."""
    random = torch.Generator().manual_seed(0)
    rarity_V = torch.arange(1, vocab_size + 1).log()
    drawn_N = torch.multinomial(1 / torch.arange(1.0, vocab_size + 1), rows * length, True, generator=random)
    input_ids = drawn_N.view(rows, length).int().numpy()
    segment_ids = np.cumsum(np.arange(rows * length).reshape(rows, length) % 500 == 0, 1, dtype=np.int32)
    columns = {"input_ids": input_ids, "segment_ids": segment_ids - segment_ids[:, :1]}
    logits = 3 * torch.randn(_DIFFERENT, vocab_size, generator=random) - rarity_V
    different = torch.arange(rows * length).remainder(_DIFFERENT).view(rows, length)
    targets = SparseTargets.from_logits(logits, support=setting.support, knots=setting.knots)[different]
    mask = torch.from_numpy(labels_of(columns) >= 0)
    without = {"token_ids": -1, "log_probs": -math.inf, "tail_curve": -math.inf, "draws": 0}
    kept = {name: values for name in without if (values := getattr(targets, name)) is not None}
    cleared = {name: values.where(mask[..., None], without[name]) for name, values in kept.items()}
    targets = replace(targets, **cleared, mask=mask, label_log_probs=torch.where(mask, -3.0, 0.0))
    shape = None
    if setting.rank:
        directions = 0.1 * torch.randn(vocab_size, setting.rank, generator=random)
        zero = torch.zeros(setting.rank + 1, setting.rank)
        basis = TailBasis(torch.zeros(vocab_size), directions.T.contiguous().T, prediction=zero)
        z = torch.randn(rows, length, setting.rank, generator=random) * 0.3
        targets = replace(targets, tail_coordinates=z * targets.mask[..., None], basis=basis)
        shape = basis
    base = TargetCodec(setting.support, setting.knots, vocab_size, label_log_probs=recipe.cache.label_log_probs)
    codec = setting.codec(base)
    if shape is not None and codec.coordinates is not None:
        codec = replace(codec, coordinates=replace(codec.coordinates, basis=shape))
    return columns, targets, codec
