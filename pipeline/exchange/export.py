"""export."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..base.durable import TEMPORARY, publish_directory, write_json
from ..base.errors import RecipeError
from ..base.places import place
from ..base.progress import Meter
from ..corpus.labels import IGNORE
from ..corpus.tokenizer import TOKENIZER
from ..models.packing import document_positions
from ..store.batch import Batch
from ..store.reader import LogitCache
from ..targets.knots import inverse_temperature

logger = logging.getLogger(__name__)

EXPORTS = ("parquet", "jsonl", "axolotl")
_ABOUT = "exchange.json"
_ROWS_PER_FILE = 4096
_ROWS_PER_READ = 64
_NO_LOG_PROB = -1e9  # Axolotl's collator pads with it, and JSON has no infinity


def export_cache(cache: LogitCache, folder: str | Path, form: str, *, temperature: float = 1.0) -> None:
    """Write every row of a cache to `folder`. Appears as a whole or not at all.

    Raises RecipeError for an unknown form, a folder that is there already or not local, masked rows, or a temperature that
    the cache does not know.
    """
    folder = _local(folder)
    if cache.objective == "masked":
        raise RecipeError(f"{cache.path} holds masked rows: the formats that others read are for causal ones")
    if form not in EXPORTS:
        raise RecipeError(f"--format {form!r}: one of {', '.join(EXPORTS)}")
    if temperature != 1.0 and form != "axolotl":
        raise RecipeError(f"--temperature is for axolotl: {form} carries the targets at every temperature")
    try:
        inverse_temperature(temperature, cache.knots)
    except ValueError as error:
        raise RecipeError(f"--temperature: {error}") from error
    support = cache.manifest.codec.support
    if form == "axolotl" and support.has_samples:
        raise RecipeError(
            f"{cache.path}: support {support.name!r} keeps samples, for which these columns have no place"
        )
    _check_absent(folder)
    aside = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with Meter(f"export {folder.name}", len(cache) * cache.row_length) as meter:
            for number, first in enumerate(range(0, len(cache), _ROWS_PER_FILE)):
                last = min(first + _ROWS_PER_FILE, len(cache))
                blocks = _blocks(cache, first, last, form, temperature, meter)
                file = aside / f"data-{number:05}.{'jsonl' if form == 'jsonl' else 'parquet'}"
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
        write_json(aside / _ABOUT, about)
        shutil.copytree(cache.tokenizer_dir, aside / TOKENIZER)
        publish_directory(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.glob("data-*"))
    logger.info(
        f"export: {folder}: {len(cache):,} rows as {form}, {size / max(cache.positions, 1):.1f} bytes per position"
    )
    if form == "axolotl":
        logger.info("export: the tail is not part of these columns: Axolotl renormalises over the kept candidates")


def _local(folder: str | Path) -> Path:
    found = place(folder)
    if isinstance(found, Path):
        return found.resolve()
    raise RecipeError(f"{folder}: name a local directory, and copy it there when it is written")


def _check_absent(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder}: there is something already: choose another directory, or delete it")


def _blocks(
    cache: LogitCache, first: int, last: int, form: str, temperature: float, meter: Meter
) -> Iterator[dict[str, Any]]:
    """Columns of a few rows at a time."""
    columns = _axolotl_columns if form == "axolotl" else _columns
    for start in range(first, last, _ROWS_PER_READ):
        batch = cache.batch(np.arange(start, min(start + _ROWS_PER_READ, last)))
        yield columns(batch, temperature)
        meter.advance(batch["input_ids"].numel())


def _columns(batch: Batch, temperature: float) -> dict[str, Any]:
    targets = batch["targets"]
    used = targets.token_ids >= 0
    return {
        "input_ids": _lists(batch["input_ids"], pa.int32()),
        "labels": _lists(batch["labels"], pa.int32()),
        "segment_ids": _lists(batch["segment_ids"], pa.int32()),
        "token_ids": _nested(targets.token_ids, used, pa.int32()),
        "log_probs": _nested(targets.log_probs, used, pa.float32()),
        # A sample was drawn so often; an entry of the head never.
        **({} if targets.draws is None else {"draws": _nested(targets.draws, used, pa.int32())}),
        "tail_curve": _nested(
            targets.tail_curve, targets.mask.unsqueeze(-1).expand_as(targets.tail_curve), pa.float32()
        ),
    }


def _axolotl_columns(batch: Batch, temperature: float) -> dict[str, Any]:
    targets = batch["targets"]
    log_p = targets.at_temperature(temperature)[0]
    used = (targets.token_ids >= 0) & targets.mask.unsqueeze(-1)
    log_p = log_p - torch.logsumexp(log_p, -1, keepdim=True)
    log_p = torch.where(used, log_p, _NO_LOG_PROB)
    everywhere = torch.ones_like(used)
    # Its trainer pairs target[t] with the student's output at t, and shifts the labels itself.
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
    """[R, L] -> R lists."""
    rows, length = values.shape
    flat = pa.array(values.reshape(-1).numpy().astype(kind.to_pandas_dtype()), kind)
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * length, pa.int32()), flat)


def _nested(values: torch.Tensor, used: torch.Tensor, kind: Any) -> Any:
    """[R, L, K] -> R lists of L lists of those entries that are used."""
    rows, length, _ = values.shape
    flat = pa.array(values[used].numpy().astype(kind.to_pandas_dtype()), kind)
    ends = np.concatenate([[0], np.cumsum(used.sum(-1).reshape(-1).numpy())])
    inner = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat)
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * length, pa.int32()), inner)


def _write_parquet(file: Path, blocks: Iterable[dict[str, Any]]) -> None:
    writer = None
    for block in blocks:
        batch = pa.record_batch(block)
        if writer is None:
            writer = pq.ParquetWriter(file, batch.schema, compression="zstd")
        writer.write_batch(batch)
    if writer is not None:
        writer.close()


def _write_jsonl(file: Path, blocks: Iterable[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as out:
        for block in blocks:
            for row in pa.record_batch(block).to_pylist():
                # An empty tail has the logarithm -inf, for which JSON has no number.
                row["tail_curve"] = [[None if math.isinf(f) else f for f in curve] for curve in row["tail_curve"]]
                out.write(json.dumps(row) + "\n")
