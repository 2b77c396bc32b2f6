"""Caches of a teacher that needs no model: a fixed causal function of the tokens so far of each document."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from logit_cache.corpus.labels import next_token_labels
from logit_cache.corpus.row_writer import RowWriter
from logit_cache.corpus.rows import PackedRows
from logit_cache.corpus.tokenizer import TOKENIZER, tokenizer_digest
from logit_cache.recipe.choices import Profile
from logit_cache.store.basis_file import StoredBasis
from logit_cache.store.codec import TargetCodec
from logit_cache.store.coordinates import CoordinateCodec
from logit_cache.store.levels import LEVEL_GROWTH, LEVEL_STEP
from logit_cache.store.manifest import Manifest
from logit_cache.store.masses import HEAD_MASS_STEP
from logit_cache.store.reader import LogitCache
from logit_cache.store.writer import CacheWriter
from logit_cache.targets.basis import TailBasis, TailProjection
from logit_cache.targets.sparse_targets import SparseTargets
from logit_cache.targets.supports import Support
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

KNOTS = (0.25, 0.5, 0.75, 1.0)
VOCAB = 50


def word_tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Words w0 ... and an end of sequence, the last id."""
    words = {**{f"w{i}": i for i in range(size - 1)}, "<eos>": size - 1}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="w0")


WIDTH = 16
"""Size of the teacher's hidden state."""


def teacher_logits(
    input_ids: torch.Tensor, segment_ids: torch.Tensor, vocab_size: int = VOCAB, seed: int = 0
) -> torch.Tensor:
    """[R, L] -> logits [R, L, V] float64: each depends on its document's tokens up to there, and on nothing else."""
    embed, output = _weights(vocab_size, seed)
    return _states(input_ids, segment_ids, embed) @ output


def _weights(vocab_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embed = torch.randn(4096, WIDTH, generator=generator, dtype=torch.float64)
    return embed, torch.randn(WIDTH, vocab_size, generator=generator, dtype=torch.float64)


def _states(input_ids: torch.Tensor, segment_ids: torch.Tensor, embed: torch.Tensor) -> torch.Tensor:
    """Hidden states [R, L, 16]."""
    state = torch.zeros(len(input_ids), WIDTH, dtype=torch.float64)
    states = []
    for t in range(input_ids.shape[1]):
        fresh = segment_ids[:, t] != segment_ids[:, t - 1] if t else torch.ones(len(input_ids), dtype=torch.bool)
        state = torch.where(fresh.unsqueeze(-1), 0.0, 0.8 * state) + embed[input_ids[:, t]]
        states.append(state)
    return torch.stack(states, 1)


def some_basis(rank: int, vocab_size: int = VOCAB, seed: int = 0) -> StoredBasis:
    """A tail basis of the first numbers of the teacher's state, with a prediction that says nothing."""
    output = _weights(vocab_size, seed)[1].float()
    prediction = 0.1 * torch.arange(rank * (rank + 1)).sin().view(rank + 1, rank)
    basis = TailBasis(torch.zeros(vocab_size), output[:rank].T, prediction=prediction)
    projection = TailProjection(torch.full((WIDTH,), 0.25), torch.eye(rank, WIDTH))
    return StoredBasis.quantised(basis, projection, 2.0**-8, 2.0**-8)


def random_rows(rows: int, length: int, seed: int = 0, vocab_size: int = VOCAB) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and segment ids [rows, length] int32, documents of about length / 4 tokens."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(0, vocab_size, (rows, length), np.int32)
    segment_ids = np.cumsum(rng.random((rows, length)) < 4 / length, axis=1, dtype=np.int32)
    return input_ids, segment_ids - segment_ids[:, :1]


def make_cache(
    folder: Path,
    *,
    rows: int = 12,
    length: int = 16,
    vocab_size: int = VOCAB,
    k: int = 8,
    knots: tuple[float, ...] = KNOTS,
    seed: int = 0,
    teacher: int = 0,
    loss_mask: np.ndarray | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    shard_rows: int = 5,
    support: Support | None = None,
    profile: Profile = "compact",
    tail_rank: int = 0,
    label_log_probs: bool = True,
) -> LogitCache:
    """Write a whole cache as stage one would; `seed` makes the rows, `teacher` the teacher. topk of `k` by default."""
    basis = some_basis(tail_rank, vocab_size, teacher) if tail_rank else None
    support = support or Support("topk", k=k)
    tokenizer = tokenizer or word_tokenizer()
    input_ids, segment_ids = random_rows(rows, length, seed)
    writer = RowWriter(folder / "corpus", length, masked=loss_mask is not None, vocab_size=vocab_size)
    writer.write_rows(input_ids, segment_ids, np.ones_like(input_ids) if loss_mask is None else loss_mask)
    tokenizer.save_pretrained(writer.staged / TOKENIZER)
    writer.commit({})
    corpus = PackedRows(folder / "corpus")
    identity = {"source": f"synthetic-{teacher}", "tokenizer": tokenizer_digest(tokenizer), "vocab_size": vocab_size}
    coordinates = None
    if basis is not None:
        coordinates = CoordinateCodec(tail_rank, 0.125, profile == "compact", basis.basis())
    codec = TargetCodec(support, knots, vocab_size, profile, coordinates=coordinates, label_log_probs=label_log_probs)
    manifest = Manifest.create(identity, corpus, codec, shard_rows, seed=0)
    cache = CacheWriter(folder, manifest)
    labels = next_token_labels(input_ids, segment_ids, loss_mask)
    for shard in cache.pending():
        start, stop = manifest.shard_range(shard)
        part = torch.from_numpy(input_ids[start:stop]).long(), torch.from_numpy(segment_ids[start:stop]).long()
        logits = teacher_logits(*part, vocab_size, teacher)
        mask = torch.from_numpy(labels[start:stop] != -100)
        numbers = {key: value for key, value in support.to_json().items() if key != "name"}
        targets = SparseTargets.from_logits(logits.float(), support=support.name, knots=knots, mask=mask, **numbers)
        if basis is not None:
            states = _states(*part, _weights(vocab_size, teacher)[0])
            z = torch.where(mask.unsqueeze(-1), basis.to_coordinates.coordinates(states), 0.0)
            targets = replace(targets, tail_coordinates=z, basis=basis.basis())
        log_p = logits.log_softmax(-1).gather(-1, torch.from_numpy(labels[start:stop, :, None]).clamp(min=0))[..., 0]
        log_p = torch.where(mask, log_p, 0.0)
        targets = replace(targets, label_log_probs=log_p.float())
        if not cache.begun:
            cache.begin(codec.learn(targets, input_ids[start:stop], rows * length), basis)
        with cache.draft(shard) as draft:
            draft.add(targets, corpus.columns(np.arange(start, stop)), (-log_p.sum(-1)).tolist())
            cache.commit(draft)
    return LogitCache(folder)


def codec_error(log_probs: torch.Tensor) -> torch.Tensor:
    """What rounding may move log-probabilities [..., K] by: half a level each, and half of the widest by setting the
    sum right."""
    finite = torch.where(torch.isfinite(log_probs), log_probs, log_probs[..., :1])
    below = finite.amax(-1, keepdim=True) - finite
    half = (LEVEL_STEP + LEVEL_GROWTH * below) / 2 * math.exp(LEVEL_GROWTH / 2)
    return half + half.amax(-1, keepdim=True) + HEAD_MASS_STEP / 2 + 1e-4
