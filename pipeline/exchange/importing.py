"""A cache from log-probabilities made elsewhere: an export, or an inference engine's answers (formats: `exchange`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..base.durable import file_digest, publish_directory, read_json, staging_directory
from ..base.errors import CorruptError, RecipeError
from ..base.progress import Meter
from ..corpus.row_writer import RowWriter
from ..corpus.rows import PackedRows
from ..corpus.tokenizer import TOKENIZER, tokenizer_digest
from ..models.loading import load_tokenizer
from ..recipe.choices import DEFAULT_TAIL_STEP
from ..recipe.paths import CachePaths
from ..store.codec import TargetCodec
from ..store.coordinates import CoordinateCodec
from ..store.manifest import Manifest
from ..store.reader import LogitCache
from ..store.shard_size import TEXT_BYTES, automatic_rows, estimated_bytes
from ..store.writer import CacheWriter
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support
from .basis_table import BASIS_TABLE, read_basis_table
from .export import ABOUT, EXPORTS, new_directory
from .packing import ImportedRow, pack_rows
from .records import read_sequences

logger = logging.getLogger(__name__)

IMPORTS = ("auto", "parquet", "jsonl", "vllm", "sglang")
_ARROW_ROWS = 1024
_PIECE_POSITIONS = 2**17
"""Positions that are encoded together; the codec learns from the first ones."""


def import_cache(
    files: Sequence[Path],
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    form: str = "auto",
    k: int | None = None,
    row_length: int | None = None,
    vocab_size: int | None = None,
    shard_rows: int | None = None,
    teacher: str = "imported",
) -> LogitCache:
    """Make a cache of log-probabilities made elsewhere; `folder` appears as a whole or not at all.

    `files` are JSONL or Parquet, or the directory of an export. Each record is a sequence; whole sequences are packed
    into rows of `row_length` (by default the longest sequence), and a longer one loses its end. Of every position the
    `k` best candidates are kept, by default all; where some positions have fewer, the support is `topp` with p = 1.
    `shard_rows` is by default as for `cache`. `tokenizer` names the tokenizer of the ids; an export brings its own.

    Raises RecipeError for an unknown `form`, and naming file and line for records that cannot be used, for example with
    probabilities that sum to more than 1, MismatchError for token ids outside the tokenizer's vocabulary.
    """
    if form not in IMPORTS:
        raise RecipeError(f"--format {form!r}: one of {', '.join(IMPORTS)}")
    folder = new_directory(folder)
    about, files = _expand(files)
    if tokenizer is None and about is not None:
        tokenizer = str(files[0].parent / TOKENIZER)
    if tokenizer is None:
        raise RecipeError("--tokenizer is needed: the directory or hub name of the tokenizer that made the token ids")
    loaded = load_tokenizer(tokenizer)
    vocab_size = vocab_size or (about or {}).get("vocab_size") or len(loaded)
    support = (about or {}).get("support", {"name": "topk"})
    if support["name"] not in ("topk", "topp"):
        raise RecipeError(
            f"{files[0].parent}: an export with support {support['name']!r} cannot be imported: its samples are of one "
            "cache: export a topk or topp cache"
        )
    stored, coordinates = None, None
    if about is not None and "tail_basis" in about:
        stored = read_basis_table(files[0].parent / BASIS_TABLE, about["tail_basis"])
        # With the step of the cache that was exported, its coordinates are stored again as they were.
        step = float(about.get("tail_step", DEFAULT_TAIL_STEP))
        coordinates = CoordinateCodec(stored.rank, step, predicted=True, basis=stored.basis())
    basis = None if coordinates is None else coordinates.basis
    longest, fewest, most, with_tail, with_labels = _survey(files, form, vocab_size)
    if k is not None and k > most:
        raise RecipeError(f"--k {k}: no position has more than {most} candidates")
    rule = _support(support, k, fewest, most)
    row_length = row_length or longest
    if row_length < 2:
        raise RecipeError(f"--row-length {row_length} must be at least 2")
    knots = tuple(about["knots"]) if about is not None and with_tail else (1.0,)
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

    cut = 0
    with staging_directory(folder, alone=True) as staged:
        writer = RowWriter(CachePaths(staged).corpus, row_length, masked=True, vocab_size=vocab_size)
        padding = loaded.eos_token_id if loaded.eos_token_id is not None else 0
        rows = pack_rows(read_sequences(files, form, vocab_size), row_length, padding)
        while block := list(islice(rows, _ARROW_ROWS)):
            writer.write_rows(*(np.stack([getattr(row, name) for row in block]) for name in ImportedRow.COLUMNS))
        loaded.save_pretrained(writer.staged / TOKENIZER)
        writer.commit({"imported": identity, "row_length": row_length})
        corpus = PackedRows.of_cache(staged)
        codec = TargetCodec(rule, knots, vocab_size, coordinates=coordinates, label_log_probs=with_labels)
        size = estimated_bytes(codec.support, codec.profile) + TEXT_BYTES[codec.profile]
        shard_rows = (about or {}).get("shard_rows") or shard_rows or automatic_rows(corpus.rows, row_length, size)
        manifest = Manifest.create(identity, corpus, codec, shard_rows, seed=0)
        cache = CacheWriter(staged, manifest)
        piece_rows = -(-_PIECE_POSITIONS // row_length)
        with Meter(f"import {folder.name}", corpus.rows * row_length) as meter:
            rows = pack_rows(read_sequences(files, form, vocab_size), row_length, padding)
            for shard in range(manifest.num_shards):
                start, stop = manifest.shard_range(shard)
                draft = None
                for first in range(start, stop, piece_rows):
                    last = min(first + piece_rows, stop)
                    part = list(islice(rows, last - first))
                    cut += sum(row.cut for row in part)
                    targets = SparseTargets.stack([row.targets(codec, basis) for row in part])
                    columns = corpus.columns(np.arange(first, last))
                    if not cache.begun:
                        cache.begin(codec.learn(targets, columns["input_ids"], corpus.rows * row_length), stored)
                    draft = draft or cache.draft(shard)
                    draft.add(targets, columns, [row.nats() for row in part])
                    meter.advance((last - first) * row_length)
                if draft is not None:
                    cache.commit(draft)
        publish_directory(staged, folder)
    done = LogitCache(folder)
    done.records.mark()
    ends = f", {cut:,} tokens beyond row ends left out" if cut else ""
    kept = f"{fewest} to {rule.k}" if rule.varies else f"{rule.k}"
    logger.info(
        f"import: {folder}: {len(done):,} rows, {done.positions:,} positions, {rule.name} of {kept} candidates{ends}"
    )
    if knots == (1.0,):
        logger.info("import: the tail's mass is known at T = 1 only: students train at temperature 1")
    return done


def _survey(files: Sequence[Path], form: str, vocab_size: int) -> tuple[int, int, int, bool, bool]:
    """Read every sequence once, before anything is written.

    Returns the longest length, the fewest and the most candidates of a position, and whether all have tail curves, and
    all log-probabilities of their labels.
    """
    longest, counts, with_tail, with_labels = 0, set[int](), True, True
    for sequence in read_sequences(files, form, vocab_size):
        longest = max(longest, len(sequence.token_ids))
        with_tail &= sequence.tail_curve is not None
        with_labels &= sequence.label_log_probs is not None
        counts.update(len(candidates) for candidates in sequence.candidates[:-1] if candidates is not None)
    if not counts:
        raise RecipeError(f"no position of {files[0].name} has candidates: ask the engine for log-probabilities")
    return longest, min(counts), max(counts), with_tail, with_labels


def _support(exported: dict[str, Any], k: int | None, fewest: int, most: int) -> Support:
    """The support of an import: that of the cache which was exported, as far as `k` leaves it."""
    limit = k or exported.get("k") or most
    if fewest < limit or exported["name"] == "topp":
        return Support("topp", k=limit, p=exported.get("p", 1.0))
    return Support("topk", k=limit)


def _expand(files: Sequence[Path]) -> tuple[dict[str, Any] | None, list[Path]]:
    """Replace the directory of an export by its data files; returns its description, None for other files."""
    about, data = None, []
    for file in files:
        if file.is_dir():
            if not (file / ABOUT).is_file():
                raise RecipeError(f"{file}: not the directory of an export ({ABOUT} is missing): name its files")
            about = _read_about(file)
            if about["format"] == "axolotl":
                raise RecipeError(f"{file}: an axolotl export has lost the tail: import a parquet or jsonl one")
            data += sorted(file.glob("data-*"))
        elif file.is_file():
            data.append(file)
        else:
            raise RecipeError(f"no such file: {file}")
    if not data:
        raise RecipeError("nothing to import: name a file")
    if about is not None and len(files) > 1:
        raise RecipeError("import one export at a time, and mix the caches (Mixture)")
    return about, data


def _read_about(folder: Path) -> dict[str, Any]:
    """The description of an export. Raises CorruptError for one that `export` does not write."""
    about = read_json(folder / ABOUT, "export the cache again")
    try:
        teacher, support = about["identity"]["teacher"], about.get("support", {"name": "topk"})
        numbers = [about.get("vocab_size", 1), about.get("shard_rows", 1), support.get("k", 1)]
        valid = isinstance(teacher, dict) and isinstance(support["name"], str) and about["format"] in EXPORTS
        valid &= all(type(number) is int and number > 0 for number in numbers)
        valid &= isinstance(about.get("tail_basis", ""), str)
        valid &= isinstance(support.get("p", 1.0), float) and 0 < support.get("p", 1.0) <= 1
        valid &= isinstance(about.get("tail_step", 1.0), float) and 0 < about.get("tail_step", 1.0) < math.inf
        valid &= all(isinstance(knot, float) for knot in about["knots"]) and 1.0 in about["knots"]
        problem = "" if valid else " (a value of another type)"
    except (KeyError, TypeError, AttributeError) as error:
        problem = f" ({error!r})"
    if problem:
        raise CorruptError(f"{folder / ABOUT}: not what `export` writes{problem}: export the cache again")
    checked: dict[str, Any] = about
    return checked
