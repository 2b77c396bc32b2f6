"""Caches in and out: to the files that other trainers read, and from the log-probabilities that inference engines return.

Out, one record per row, lists throughout, readable by `datasets`, pyarrow, pandas or a JSON parser:

    parquet, jsonl   input_ids, labels, segment_ids [L]; token_ids, log_probs [L][K], most probable first; tail_curve [L][C].
                     A position without a target has empty lists. labels[t] is the token that follows t, -100 where there
                     is none: what transformers calls shift_labels. `exchange.json` holds knots and identity.
    axolotl          what Axolotl's KD loss reads: input_ids, attention_mask, position_ids, labels (not shifted, as its
                     trainer does that), target_token_ids, target_logprobs, target_mask [L][K], at one temperature and
                     renormalised over the K entries, as that loss assumes; the tail is lost.

In, one record per line (or per Parquet row):

    parquet, jsonl   as above; `tail_curve` and `segment_ids` may be missing
    vllm             a completion or RequestOutput: prompt_token_ids and prompt_logprobs, a list of {id: {logprob, rank}}
                     whose first entry is null; with `token_ids` and `logprobs` of a generated answer where it has one
    sglang           a /generate response: meta_info.input_token_logprobs and input_top_logprobs, lists of
                     [logprob, id, text] whose first entry is null; likewise output_...

Engines say of token t what they expected there; a target of position t is about token t + 1, so their lists are moved by
one. What they return is the head at T = 1: the tail's mass there is the rest to 1, and at any other temperature unknown.
An imported cache therefore has the knot 1.0 alone, and refuses other temperatures.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base.durable import TEMPORARY, file_digest, publish_directory, read_json
from ..base.errors import CorruptError, RecipeError
from ..base.progress import Meter
from ..corpus.labels import IGNORE, next_token_labels
from ..corpus.row_writer import RowWriter
from ..corpus.rows import PackedRows
from ..corpus.tokenizer import TOKENIZER, tokenizer_digest
from ..store.codec import TargetCodec
from ..store.manifest import Manifest
from ..store.reader import LogitCache
from ..store.writer import CacheWriter
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support
from .export import _ABOUT, EXPORTS, _check_absent, _local
from .records import _Sequence, _sequences

logger = logging.getLogger(__name__)

IMPORTS = ("auto", "parquet", "jsonl", "vllm", "sglang")
_ARROW_ROWS = 1024
# An engine's float32 log-probabilities are right to a few roundings of the largest probability; no tail is resolved below.
_SMALLEST_TAIL = 2.0**-24
# More than rounding: bf16 log-probabilities near 0 are off by up to 2^-9.
_MASS_TOLERANCE = 0.01


def import_cache(
    files: Sequence[Path],
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    form: str = "auto",
    k: int | None = None,
    row_length: int | None = None,
    vocab_size: int | None = None,
    shard_rows: int = 128,
    teacher: str = "imported",
) -> LogitCache:
    """Make a cache of log-probabilities that came from elsewhere.

    `files` are JSONL or Parquet, or the directory of an export. Each record is a sequence; several are packed into a row
    of `row_length` (by default the longest sequence), never across its end: longer ones lose their end, which leaves the
    rest valid. `k` candidates are kept per position, by default the fewest that any position has. `tokenizer` names the
    one that made the ids; an export brings its own.

    Raises RecipeError naming file and line for records that cannot be used, among them such whose probabilities sum to
    more than 1, MismatchError for token ids that the tokenizer does not have. `folder` appears as a whole or not at all.
    """
    from ..models.loading import load_tokenizer

    folder = _local(folder)
    about, files = _expand(files)
    _check_absent(folder)
    if tokenizer is None and about is not None:
        tokenizer = str(files[0].parent / TOKENIZER)
    if tokenizer is None:
        raise RecipeError("--tokenizer is needed: the directory or hub name of the tokenizer that made the token ids")
    loaded = load_tokenizer(tokenizer)
    vocab_size = vocab_size or (about or {}).get("vocab_size") or len(loaded)
    support = (about or {}).get("support", {"name": "topk"})
    if support["name"] != "topk":
        raise RecipeError(
            f"{files[0].parent}: an export with support {support['name']!r} cannot be imported, only topk can"
        )
    facts = _survey(files, form, vocab_size)
    k = k or support.get("k") or facts.fewest
    if k > facts.fewest:
        raise RecipeError(f"--k {k}: {facts.where_fewest} has only {facts.fewest} candidates at some position")
    row_length = row_length or facts.longest
    if row_length < 2:
        raise RecipeError(f"--row-length {row_length} must be at least 2")
    knots = tuple(about["knots"]) if about is not None and facts.with_tail else (1.0,)
    identity = {
        "source": teacher,
        "revision": None,
        "weights": None,
        "dtype": None,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer_digest(loaded),
        "imported": [file_digest(file) for file in files],
    }
    if about is not None:
        identity = about["identity"]["teacher"]

    aside = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(aside, ignore_errors=True)
    cut = 0
    try:
        writer = RowWriter(aside / "corpus", row_length, masked=True)
        padding = loaded.eos_token_id if loaded.eos_token_id is not None else 0
        for block in _in_blocks(_rows(_sequences(files, form, vocab_size), row_length, padding), _ARROW_ROWS):
            writer.write_rows(*(np.stack([getattr(row, name) for row in block]) for name in _Row.COLUMNS))
        loaded.save_pretrained(writer.staged / TOKENIZER)
        writer.commit({"imported": identity, "row_length": row_length})
        corpus = PackedRows(aside / "corpus")
        codec = TargetCodec(Support("topk", k=k), knots, vocab_size)
        manifest = Manifest.create(identity, corpus, codec, (about or {}).get("shard_rows") or shard_rows, seed=0)
        cache = CacheWriter(aside, manifest)
        with Meter(f"import {folder.name}", corpus.rows * row_length) as meter:
            rows = _rows(_sequences(files, form, vocab_size), row_length, padding)
            for shard in range(manifest.num_shards):
                start, stop = manifest.shard_range(shard)
                part = [next(rows) for _ in range(stop - start)]
                cut += sum(row.cut for row in part)
                targets = SparseTargets.stack([row.targets(codec) for row in part])
                input_ids = np.stack([row.input_ids for row in part])
                if not cache.begun:
                    cache.begin(codec.learn(targets, input_ids, corpus.rows * row_length))
                cache.write(shard, targets, input_ids, corpus.digest(start, stop), sum(row.nats() for row in part))
                meter.advance((stop - start) * row_length)
        publish_directory(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    done = LogitCache(folder)
    ends = f", {cut:,} tokens beyond row ends left out" if cut else ""
    logger.info(f"import: {folder}: {len(done):,} rows, {done.positions:,} positions, top-{k}{ends}")
    if knots == (1.0,):
        logger.info("import: the tail's mass is known at T = 1 only: students train at temperature 1")
    return done


@dataclass
class _Row:
    """One packed row: sequences end to end, then padding that nothing is learned from."""

    COLUMNS = ("input_ids", "segment_ids", "loss_mask")
    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    segment_ids: np.ndarray[Any, np.dtype[np.int32]]
    loss_mask: np.ndarray[Any, np.dtype[np.int32]]
    candidates: list[list[tuple[float, int]] | None]
    tail_curve: list[list[float | None] | None]
    where: list[str]
    cut: int

    def targets(self, codec: TargetCodec) -> SparseTargets:
        length, k = len(self.input_ids), codec.support.entry_limit
        token_ids = torch.full((length, k), -1)
        log_probs = torch.full((length, k), -math.inf)
        tail_curve = torch.full((length, len(codec.knots)), -math.inf)
        mask = torch.from_numpy(next_token_labels(self.input_ids, self.segment_ids, self.loss_mask) != IGNORE)
        for position in torch.nonzero(mask).squeeze(-1).tolist():
            candidates = self.candidates[position]
            assert candidates is not None
            best = sorted(candidates, key=lambda entry: -entry[0])[:k]
            log_probs[position] = torch.tensor([log_p for log_p, _ in best])
            token_ids[position] = torch.tensor([token for _, token in best])
            curve = self.tail_curve[position]
            if curve is not None and len(codec.knots) == len(curve):
                tail_curve[position] = torch.tensor([-math.inf if f is None else f for f in curve])
            else:
                tail_curve[position] = tail_at_one(best, codec.vocab_size, self.where[position])
        return SparseTargets(token_ids, log_probs, tail_curve, mask, codec.knots, codec.vocab_size)

    def nats(self) -> float:
        """The teacher's loss on the labels, where a label is among the candidates; an upper bound elsewhere."""
        labels = next_token_labels(self.input_ids, self.segment_ids, self.loss_mask)
        total = 0.0
        for position in np.flatnonzero(labels != IGNORE):
            candidates = self.candidates[position] or []
            known = [log_p for log_p, token in candidates if token == labels[position]]
            total -= known[0] if known else min(log_p for log_p, _ in candidates)
        return total


def tail_at_one(best: Sequence[tuple[float, int]], vocab_size: int, where: str) -> float:
    """log of the mass that `best` leaves at T = 1, from (log-probability, id) pairs, most probable first.

    One minus the head, which float32 log-probabilities resolve to about 1e-7; never more than every token left out could
    have with the last one's probability. Raises RecipeError where the head holds more than 1: those are not
    log-probabilities of a softmax at T = 1.
    """
    mass = math.fsum(math.exp(log_p) for log_p, _ in best)
    if mass > 1 + _MASS_TOLERANCE:
        raise RecipeError(
            f"{where}: the probabilities sum to {mass:.3g}: they are not log-probabilities at T = 1 (vLLM: leave "
            "logprobs_mode at raw_logprobs)"
        )
    left_out = vocab_size - len(best)
    if left_out <= 0:
        return -math.inf
    largest = math.log(left_out) + best[-1][0]
    return min(math.log(max(1 - mass, _SMALLEST_TAIL)), largest)


def _rows(sequences: Iterable[_Sequence], length: int, padding: int) -> Iterator[_Row]:
    """Pack sequences, in order, as many as fit whole."""
    row = _empty_row(length, padding)
    filled = segment = 0
    for sequence in sequences:
        count = min(len(sequence.token_ids), length)
        if filled + count > length:
            yield row
            row, filled, segment = _empty_row(length, padding), 0, 0
        at = slice(filled, filled + count)
        row.input_ids[at] = sequence.token_ids[:count]
        segments = sequence.segment_ids[:count] if sequence.segment_ids is not None else [0] * count
        row.segment_ids[at] = np.asarray(segments) + segment
        known = [candidates is not None for candidates in sequence.candidates[: count - 1]]
        row.loss_mask[filled + 1 : filled + count] = known
        if sequence.labels is not None:
            row.loss_mask[filled + 1 : filled + count] &= np.asarray(sequence.labels[: count - 1]) != IGNORE
        row.candidates[at] = sequence.candidates[:count]
        row.tail_curve[at] = sequence.tail_curve[:count] if sequence.tail_curve is not None else [None] * count
        row.where[at] = [sequence.where] * count
        row.cut += len(sequence.token_ids) - count
        filled += count
        segment = int(row.segment_ids[filled - 1]) + 1
        row.segment_ids[filled:] = segment
    if filled:
        yield row


def _empty_row(length: int, padding: int) -> _Row:
    ids = np.full(length, padding, np.int32)
    return _Row(
        ids, np.zeros(length, np.int32), np.zeros(length, np.int32), [None] * length, [None] * length, [""] * length, 0
    )


def _in_blocks(rows: Iterator[_Row], size: int) -> Iterator[list[_Row]]:
    block: list[_Row] = []
    for row in rows:
        block.append(row)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


@dataclass(frozen=True)
class _Survey:
    longest: int
    fewest: int
    where_fewest: str
    with_tail: bool


def _survey(files: Sequence[Path], form: str, vocab_size: int) -> _Survey:
    """One pass over everything, so that the shape is known before anything is written."""
    longest, fewest, where, with_tail = 0, 0, "", True
    for sequence in _sequences(files, form, vocab_size):
        longest = max(longest, len(sequence.token_ids))
        with_tail &= sequence.tail_curve is not None
        for candidates in sequence.candidates[:-1]:
            if candidates is not None and (fewest == 0 or len(candidates) < fewest):
                fewest, where = len(candidates), sequence.where
    if fewest == 0:
        raise RecipeError(f"no position of {files[0].name} has candidates: were log-probabilities asked for?")
    return _Survey(longest, fewest, where, with_tail)


def _expand(files: Sequence[Path]) -> tuple[dict[str, Any] | None, list[Path]]:
    """The data files, and what an export says of itself where they are one."""
    about, found = None, []
    for file in files:
        if file.is_dir():
            if not (file / _ABOUT).is_file():
                raise RecipeError(f"{file}: a directory that is no export ({_ABOUT} is missing): name its files")
            about = _read_about(file)
            if about["format"] == "axolotl":
                raise RecipeError(f"{file}: an axolotl export has lost the tail: import a parquet or jsonl one")
            found += sorted(file.glob("data-*"))
        elif file.is_file():
            found.append(file)
        else:
            raise RecipeError(f"no such file: {file}")
    if not found:
        raise RecipeError("nothing to import: name a file")
    if about is not None and len(files) > 1:
        raise RecipeError("import one export at a time: several can be mixed as caches (Mixture)")
    return about, found


def _read_about(folder: Path) -> dict[str, Any]:
    """What an export says of itself. Raises CorruptError where that is not what was written."""
    about = read_json(folder / _ABOUT, "export the cache again")
    try:
        teacher, support = about["identity"]["teacher"], about.get("support", {"name": "topk"})
        numbers = [about.get("vocab_size", 1), about.get("shard_rows", 1), support.get("k", 1)]
        valid = isinstance(teacher, dict) and isinstance(support["name"], str) and about["format"] in EXPORTS
        valid &= all(type(number) is int and number > 0 for number in numbers)
        valid &= all(isinstance(knot, float) for knot in about["knots"]) and 1.0 in about["knots"]
        problem = "" if valid else " (a value of another kind)"
    except (KeyError, TypeError, AttributeError) as error:
        problem = f" ({error!r})"
    if problem:
        raise CorruptError(f"{folder / _ABOUT}: not what `export` writes{problem}: export the cache again")
    checked: dict[str, Any] = about
    return checked
