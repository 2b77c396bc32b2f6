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

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.cache import Batch, LogitCache
from pipeline.codec import TargetCodec
from pipeline.commit import CacheWriter
from pipeline.durable import TEMPORARY, file_digest, publish_directory, read_json, write_json
from pipeline.errors import CorruptError, MismatchError, RecipeError
from pipeline.manifest import Manifest
from pipeline.models import document_positions
from pipeline.progress import Meter, say
from pipeline.rows import IGNORE, TOKENIZER, PackedRows, RowWriter, next_token_labels, tokenizer_digest
from pipeline.storage import place
from pipeline.supports import Support
from pipeline.targets import SparseTargets, inverse_temperature

EXPORTS = ("parquet", "jsonl", "axolotl")
IMPORTS = ("auto", "parquet", "jsonl", "vllm", "sglang")
_ABOUT = "exchange.json"
_ROWS_PER_FILE = 4096
_ROWS_PER_READ = 64
_ARROW_ROWS = 1024
# An engine's float32 log-probabilities are right to a few roundings of the largest probability; no tail is resolved below.
_SMALLEST_TAIL = 2.0**-24
# More than rounding: bf16 log-probabilities near 0 are off by up to 2^-9.
_MASS_TOLERANCE = 0.01
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
    say(f"export: {folder}: {len(cache):,} rows as {form}, {size / max(cache.positions, 1):.1f} bytes per position")
    if form == "axolotl":
        say("export: the tail is not part of these columns: Axolotl renormalises over the kept candidates")


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


@dataclass(frozen=True)
class _Sequence:
    """Tokens that belong together, and at each position t what was expected of token t + 1."""

    where: str
    token_ids: list[int]
    segment_ids: list[int] | None
    labels: list[int] | None
    candidates: list[list[tuple[float, int]] | None]
    """(log-probability, id) of position t; None where nothing is known."""
    tail_curve: list[list[float | None]] | None


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
    from pipeline.teacher import load_tokenizer

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
        loaded.save_pretrained(writer.aside / TOKENIZER)
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
    say(f"import: {folder}: {len(done):,} rows, {done.positions:,} positions, top-{k}{ends}")
    if knots == (1.0,):
        say("import: the tail's mass is known at T = 1 only: students train at temperature 1")
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


def _sequences(files: Sequence[Path], form: str, vocab_size: int) -> Iterator[_Sequence]:
    for file in files:
        for where, record in _records(file):
            kind = _kind_of(record, where) if form == "auto" else form
            try:
                sequence = _READERS[kind](record, where)
                _check_sequence(sequence, vocab_size)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise RecipeError(f"{where}: not a record of format {kind}: {error!r}") from error
            yield sequence


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix == ".parquet":
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise RecipeError(f"{file}: cannot be read as parquet ({error})") from error
        number = 0
        for batch in table.iter_batches(batch_size=_ROWS_PER_READ):
            for record in batch.to_pylist():
                yield f"row {number} of {file.name}", record
                number += 1
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise RecipeError(
                    f"{file.name}: line {number} is not valid UTF-8: unpack the file if it is compressed, else convert it"
                ) from error
            except ValueError as error:
                raise RecipeError(f"{file.name}: line {number} cannot be read as JSON ({error})") from error
            if not isinstance(record, dict):
                raise RecipeError(f"{file.name}: line {number} is not an object")
            yield f"line {number} of {file.name}", record


def _kind_of(record: dict[str, Any], where: str) -> str:
    choice = (record.get("choices") or [{}])[0]
    if "meta_info" in record:
        return "sglang"
    if "prompt_logprobs" in record or "prompt_logprobs" in choice:
        return "vllm"
    if "token_ids" in record and "log_probs" in record:
        return "jsonl"
    raise RecipeError(
        f"{where}: its format is not recognised (keys: {', '.join(record) or 'none'}): it must have token_ids and "
        "log_probs, or prompt_logprobs (vLLM), or meta_info (SGLang)"
    )


def _read_own(record: dict[str, Any], where: str) -> _Sequence:
    candidates = [
        [(float(log_p), index(token)) for log_p, token in zip(log_probs, ids, strict=True)] if ids else None
        for ids, log_probs in zip(record["token_ids"], record["log_probs"], strict=True)
    ]
    return _Sequence(
        where,
        [index(token) for token in record["input_ids"]],
        record.get("segment_ids"),
        record.get("labels"),
        candidates,
        record.get("tail_curve"),
    )


def _read_vllm(record: dict[str, Any], where: str) -> _Sequence:
    choice = (record.get("choices") or record.get("outputs") or [{}])[0]
    prompt = record["prompt_logprobs"] if "prompt_logprobs" in record else choice["prompt_logprobs"]
    ids = record["prompt_token_ids"] if "prompt_token_ids" in record else choice.get("prompt_token_ids")
    if ids is None:
        raise ValueError("prompt_token_ids is missing: ask for it with return_token_ids")
    token_ids, expected = [index(token) for token in ids], [_of_dict(entry) for entry in prompt]
    answer = choice.get("logprobs")
    if choice.get("token_ids") and isinstance(answer, list):
        token_ids += [index(token) for token in choice["token_ids"]]
        expected += [_of_dict(entry) for entry in answer]
    return _moved(where, token_ids, expected)


def _of_dict(entry: dict[str, Any] | None) -> list[tuple[float, int]] | None:
    if not entry:
        return None
    # The token that stands there is always among the entries, also where it is not one of the k best: rank tells.
    values = [(float(value["logprob"]), int(token), value.get("rank")) for token, value in entry.items()]
    ranks = [rank for _, _, rank in values if rank is not None]
    beyond = len(values) if len(ranks) == len(values) and max(ranks) > len(values) else math.inf
    return [(log_p, token) for log_p, token, rank in values if rank is None or rank < beyond]


def _read_sglang(record: dict[str, Any], where: str) -> _Sequence:
    meta = record["meta_info"]
    token_ids: list[int] = []
    expected: list[list[tuple[float, int]] | None] = []
    for side in ("input", "output"):
        tokens = meta.get(f"{side}_token_logprobs") or []
        tops = meta.get(f"{side}_top_logprobs") or [None] * len(tokens)
        if len(tops) != len(tokens):
            raise ValueError(f"{side}_top_logprobs has {len(tops)} entries and {side}_token_logprobs {len(tokens)}")
        token_ids += [index(entry[1]) for entry in tokens]
        expected += [[(float(log_p), index(token)) for log_p, token, *_ in top] if top else None for top in tops]
    if not token_ids:
        raise ValueError("no input_token_logprobs: ask for return_logprob with logprob_start_len = 0")
    return _moved(where, token_ids, expected)


def _moved(where: str, token_ids: list[int], expected: list[list[tuple[float, int]] | None]) -> _Sequence:
    """From what was expected of token t to the target of position t - 1."""
    if len(expected) != len(token_ids):
        raise ValueError(f"{len(expected)} log-probabilities for {len(token_ids)} tokens")
    return _Sequence(where, token_ids, None, None, [*expected[1:], None], None)


_READERS = {"jsonl": _read_own, "parquet": _read_own, "vllm": _read_vllm, "sglang": _read_sglang}


def _check_sequence(sequence: _Sequence, vocab_size: int) -> None:
    """Raises RecipeError or MismatchError for a sequence that cannot be used; TypeError where numbers are none."""
    for name in ("segment_ids", "labels", "tail_curve"):
        column = getattr(sequence, name)
        if column is not None and len(column) != len(sequence.token_ids):
            raise RecipeError(
                f"{sequence.where}: {name} has {len(column)} entries for {len(sequence.token_ids)} tokens"
            )
    for number in (*(sequence.segment_ids or ()), *(sequence.labels or ())):
        index(number)
    for curve in sequence.tail_curve or ():
        for value in curve or ():
            float(0.0 if value is None else value)
    if len(sequence.candidates) != len(sequence.token_ids):
        raise RecipeError(
            f"{sequence.where}: {len(sequence.candidates)} positions with candidates for {len(sequence.token_ids)} tokens"
        )
    for candidates in sequence.candidates:
        for log_p, token in candidates or ():
            if not 0 <= token < vocab_size:
                raise MismatchError(
                    f"{sequence.where}: token id {token} is outside the vocabulary of {vocab_size}: name the right "
                    "--tokenizer, or --vocab-size where the teacher's output layer is larger"
                )
            if not log_p <= 1e-3:
                raise RecipeError(f"{sequence.where}: {log_p} is no log-probability")
        if candidates and len({token for _, token in candidates}) != len(candidates):
            raise RecipeError(f"{sequence.where}: a token id stands twice among the candidates of one position")
    if any(not 0 <= token < vocab_size for token in sequence.token_ids):
        raise MismatchError(f"{sequence.where}: a token id is outside the vocabulary of {vocab_size}")
