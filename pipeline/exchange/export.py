"""A cache as files that other trainers read: Parquet, JSON lines, or the columns of Axolotl (formats: `exchange`)."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..base.durable import publish_directory, staging_directory, write_json
from ..base.errors import RecipeError, recipe_error
from ..base.places import place
from ..base.progress import Meter
from ..corpus.labels import IGNORE
from ..corpus.tokenizer import TOKENIZER
from ..models.packing import document_positions
from ..store.basis_file import StoredBasis, read_stored_basis
from ..store.batch import Batch
from ..store.reader import LogitCache
from ..targets.knots import inverse_temperature
from .basis_table import BASIS_TABLE, write_basis_table

logger = logging.getLogger(__name__)

EXPORTS = ("parquet", "jsonl", "axolotl")
ABOUT = "exchange.json"
"""File of an export that describes it."""
ROWS_PER_FILE = 4096
ROWS_PER_READ = 64
_NO_LOG_PROB = -1e9  # Axolotl's collator pads with it, and JSON has no infinity


def export_cache(cache: LogitCache, folder: str | Path, form: str, *, temperature: float = 1.0) -> None:
    """Write every row of a cache to `folder`, which appears as a whole or not at all.

    Raises RecipeError for an unknown form, a folder that exists or is not local, masked rows, and a temperature that
    the cache does not serve.
    """
    folder = new_directory(folder)
    if cache.objective == "masked":
        raise RecipeError(f"{cache.path} holds masked rows: the exchange formats are for causal rows")
    if form not in EXPORTS:
        raise RecipeError(f"--format {form!r}: one of {', '.join(EXPORTS)}")
    if temperature != 1.0 and form != "axolotl":
        raise RecipeError(f"--temperature is for axolotl: {form} carries the targets at every temperature")
    with recipe_error("--temperature"):
        inverse_temperature(temperature, cache.knots)
    support = cache.manifest.codec.support
    if form == "axolotl" and support.has_samples:
        raise RecipeError(
            f"{cache.path}: support {support.name!r} keeps samples, which the axolotl columns cannot hold"
        )
    with staging_directory(folder, alone=True) as staged:
        with Meter(f"export {folder.name}", len(cache) * cache.row_length) as meter:
            for number, first in enumerate(range(0, len(cache), ROWS_PER_FILE)):
                blocks = _blocks(cache, first, min(first + ROWS_PER_FILE, len(cache)), form, temperature, meter)
                file = staged / f"data-{number:05}.{'jsonl' if form == 'jsonl' else 'parquet'}"
                _write_jsonl(file, blocks) if form == "jsonl" else _write_parquet(file, blocks)
        about = {
            "format": form,
            "temperature": temperature,
            "rows": len(cache),
            "row_length": cache.row_length,
            "knots": list(cache.knots),
            "vocab_size": cache.vocab_size,
            "support": support.to_json(),
            "shard_rows": cache.manifest.shard_rows,
            "identity": cache.manifest.identity,
            "identity_digest": cache.digest,
        }
        if (basis := _tail_basis(cache)) is not None and form != "axolotl":
            about["tail_basis"] = basis.digest
            if cache.manifest.codec.coordinates is not None:
                about["tail_step"] = cache.manifest.codec.coordinates.step
            write_basis_table(staged / BASIS_TABLE, basis)
        write_json(staged / ABOUT, about)
        shutil.copytree(cache.tokenizer_dir, staged / TOKENIZER)
        publish_directory(staged, folder)
    size = sum(file.stat().st_size for file in folder.glob("data-*"))
    logger.info(
        f"export: {folder}: {len(cache):,} rows as {form}, {size / max(cache.positions, 1):.1f} bytes per position"
    )
    if form == "axolotl":
        logger.info("export: these columns have no tail: Axolotl renormalises over the kept candidates")


def _tail_basis(cache: LogitCache) -> StoredBasis | None:
    basis = cache.batch([0])["targets"].basis if len(cache) else None
    return None if basis is None else read_stored_basis(cache.path, basis.digest)


def new_directory(folder: str | Path) -> Path:
    """The directory as an absolute path. Raises RecipeError for one of an object store, and where a file or a directory
    that is not empty has this name."""
    local = place(folder)
    if not isinstance(local, Path):
        raise RecipeError(f"{folder}: not a local directory: write to a local one, then copy it")
    if local.exists() and (not local.is_dir() or any(local.iterdir())):
        raise RecipeError(f"{local.resolve()}: exists already: choose another directory, or delete it")
    return local.resolve()


def _blocks(
    cache: LogitCache, first: int, last: int, form: str, temperature: float, meter: Meter
) -> Iterator[dict[str, Any]]:
    """Columns of a few rows at a time."""
    for start in range(first, last, ROWS_PER_READ):
        batch = cache.batch(np.arange(start, min(start + ROWS_PER_READ, last)))
        yield _axolotl_columns(batch, temperature) if form == "axolotl" else _columns(batch)
        meter.advance(batch["input_ids"].numel())


def _columns(batch: Batch) -> dict[str, Any]:
    targets = batch["targets"]
    used = targets.token_ids >= 0
    with_target = targets.mask.unsqueeze(-1)
    columns = {
        "input_ids": _lists(batch["input_ids"], pa.int32()),
        "labels": _lists(batch["labels"], pa.int32()),
        "segment_ids": _lists(batch["segment_ids"], pa.int32()),
        "token_ids": _nested(targets.token_ids, used, pa.int32()),
        "log_probs": _nested(targets.log_probs, used, pa.float32()),
        # 0 marks an entry of the head.
        **({} if targets.draws is None else {"draws": _nested(targets.draws, used, pa.int32())}),
        "tail_curve": _nested(targets.tail_curve, with_target.expand_as(targets.tail_curve), pa.float32()),
    }
    if (coordinates := targets.tail_coordinates) is not None:
        columns["tail_coordinates"] = _nested(coordinates, with_target.expand_as(coordinates), pa.float32())
    if targets.label_log_probs is not None:
        columns["label_log_probs"] = _lists(targets.label_log_probs, pa.float32())
    return columns


def _axolotl_columns(batch: Batch, temperature: float) -> dict[str, Any]:
    targets = batch["targets"]
    log_p = targets.at_temperature(temperature)[0]
    used = (targets.token_ids >= 0) & targets.mask.unsqueeze(-1)
    log_p = log_p - torch.logsumexp(log_p, -1, keepdim=True)
    log_p = torch.where(used, log_p, _NO_LOG_PROB)
    everywhere = torch.ones_like(used)
    # Axolotl's trainer pairs target[t] with the student's output at t, and shifts the labels itself.
    labels = torch.full_like(batch["labels"], IGNORE)
    labels[:, 1:] = batch["labels"][:, :-1]
    return {
        "input_ids": _lists(batch["input_ids"], pa.int32()),
        "attention_mask": _lists(torch.ones_like(batch["input_ids"]), pa.int8()),
        "position_ids": _lists(document_positions(batch["segment_ids"]), pa.int32()),
        "labels": _lists(labels, pa.int32()),
        "target_token_ids": _nested(targets.token_ids.clamp(min=0), everywhere, pa.int32()),
        "target_logprobs": _nested(log_p, everywhere, pa.float32()),
        "target_mask": _nested(used.long(), everywhere, pa.int8()),
    }


def _lists(values: torch.Tensor, kind: Any) -> Any:
    """[B, L] -> B lists."""
    rows, length = values.shape
    flat = pa.array(values.reshape(-1).numpy().astype(kind.to_pandas_dtype()), kind)
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * length, pa.int32()), flat)


def _nested(values: torch.Tensor, used: torch.Tensor, kind: Any) -> Any:
    """[B, L, K] -> B lists of L lists of the used entries."""
    rows, length, _ = values.shape
    flat = pa.array(values[used].numpy().astype(kind.to_pandas_dtype()), kind)
    ends = np.concatenate([[0], np.cumsum(used.sum(-1).reshape(-1).numpy())])
    inner = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat)
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * length, pa.int32()), inner)


def _write_parquet(file: Path, blocks: Iterable[dict[str, Any]]) -> None:
    batches = map(pa.record_batch, blocks)
    first = next(batches)
    with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        for batch in chain([first], batches):
            writer.write_batch(batch)


def _write_jsonl(file: Path, blocks: Iterable[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as out:
        for block in blocks:
            for row in pa.record_batch(block).to_pylist():
                # An empty tail has the logarithm -inf, and JSON has no infinity.
                row["tail_curve"] = [[None if math.isinf(f) else f for f in curve] for curve in row["tail_curve"]]
                out.write(json.dumps(row) + "\n")
