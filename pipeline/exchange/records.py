"""Records of the import formats (`exchange`), read and checked one sequence at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import index
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..base.errors import MismatchError, RecipeError
from .export import ROWS_PER_READ


@dataclass(frozen=True)
class TokenSequence:
    """The tokens of one record, and at each position t the candidates for token t + 1."""

    where: str
    """Line or row and file, for messages."""
    token_ids: list[int]
    segment_ids: list[int] | None
    labels: list[int] | None
    candidates: list[list[tuple[float, int]] | None]
    """(log-probability, id) pairs of position t; None where the record has none."""
    tail_curve: list[list[float | None]] | None
    """None for formats without a tail; in it None stands for -inf."""
    tail_coordinates: list[list[float]] | None = None
    """None for a tail without a shape; [] at positions without a target."""
    label_log_probs: list[float] | None = None
    """None where the format does not have them."""


def read_sequences(files: Sequence[Path], form: str, vocab_size: int) -> Iterator[TokenSequence]:
    """The checked sequences of files of one format ("auto" recognises it record by record).

    Raises RecipeError naming the line for records of another format, and as `check_sequence` does.
    """
    for file in files:
        for where, record in _records(file):
            kind = _format_of(record, where) if form == "auto" else form
            try:
                sequence = _READERS[kind](record, where)
                check_sequence(sequence, vocab_size)
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
        for batch in table.iter_batches(batch_size=ROWS_PER_READ):
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
                    f"{file.name}: line {number} is not valid UTF-8: unpack a compressed file, else convert it"
                ) from error
            except ValueError as error:
                raise RecipeError(f"{file.name}: line {number} cannot be read as JSON ({error})") from error
            if not isinstance(record, dict):
                raise RecipeError(f"{file.name}: line {number} is not an object")
            yield f"line {number} of {file.name}", record


def _format_of(record: dict[str, Any], where: str) -> str:
    choice = (record.get("choices") or [{}])[0]
    if "meta_info" in record:
        return "sglang"
    if "prompt_logprobs" in record or "prompt_logprobs" in choice:
        return "vllm"
    if "token_ids" in record and "log_probs" in record:
        return "jsonl"
    raise RecipeError(
        f"{where}: unknown format (keys: {', '.join(record) or 'none'}): a record has token_ids and "
        "log_probs, or prompt_logprobs (vLLM), or meta_info (SGLang)"
    )


def read_export(record: dict[str, Any], where: str) -> TokenSequence:
    candidates = [
        [(float(log_p), index(token)) for log_p, token in zip(log_probs, ids, strict=True)] if ids else None
        for ids, log_probs in zip(record["token_ids"], record["log_probs"], strict=True)
    ]
    return TokenSequence(
        where,
        [index(token) for token in record["input_ids"]],
        record.get("segment_ids"),
        record.get("labels"),
        candidates,
        record.get("tail_curve"),
        record.get("tail_coordinates"),
        record.get("label_log_probs"),
    )


def read_vllm(record: dict[str, Any], where: str) -> TokenSequence:
    choice = (record.get("choices") or record.get("outputs") or [{}])[0]
    prompt = record["prompt_logprobs"] if "prompt_logprobs" in record else choice["prompt_logprobs"]
    ids = record["prompt_token_ids"] if "prompt_token_ids" in record else choice.get("prompt_token_ids")
    if ids is None:
        raise ValueError("prompt_token_ids is missing: ask for it with return_token_ids")
    token_ids, entries = [index(token) for token in ids], list(prompt)
    answer = choice.get("logprobs")
    if choice.get("token_ids") and isinstance(answer, list):
        token_ids += [index(token) for token in choice["token_ids"]]
        entries += answer
    of_tokens = [(entry or {}).get(str(token)) for entry, token in zip(entries, token_ids, strict=False)]
    own = [None if value is None else float(value["logprob"]) for value in of_tokens]
    return _shifted(where, token_ids, [_entries(entry) for entry in entries], own)


def _entries(entry: dict[str, Any] | None) -> list[tuple[float, int]] | None:
    if not entry:
        return None
    # The actual token is always among the entries, even outside the k best: its rank shows that.
    values = [(float(value["logprob"]), int(token), value.get("rank")) for token, value in entry.items()]
    ranks = [rank for _, _, rank in values if rank is not None]
    limit = len(values) if len(ranks) == len(values) and max(ranks) > len(values) else math.inf
    return [(log_p, token) for log_p, token, rank in values if rank is None or rank < limit]


def read_sglang(record: dict[str, Any], where: str) -> TokenSequence:
    meta = record["meta_info"]
    token_ids: list[int] = []
    own: list[float | None] = []
    expected: list[list[tuple[float, int]] | None] = []
    for side in ("input", "output"):
        tokens = meta.get(f"{side}_token_logprobs") or []
        tops = meta.get(f"{side}_top_logprobs") or [None] * len(tokens)
        if len(tops) != len(tokens):
            raise ValueError(f"{side}_top_logprobs has {len(tops)} entries and {side}_token_logprobs {len(tokens)}")
        token_ids += [index(entry[1]) for entry in tokens]
        own += [None if entry[0] is None else float(entry[0]) for entry in tokens]
        expected += [[(float(log_p), index(token)) for log_p, token, *_ in top] if top else None for top in tops]
    if not token_ids:
        raise ValueError("no input_token_logprobs: ask for return_logprob with logprob_start_len = 0")
    return _shifted(where, token_ids, expected, own)


def _shifted(
    where: str, token_ids: list[int], expected: list[list[tuple[float, int]] | None], own: list[float | None]
) -> TokenSequence:
    """Engines give the candidates for token t, and its own log-probability, at t; a target of position t is about token
    t + 1."""
    if len(expected) != len(token_ids):
        raise ValueError(f"{len(expected)} log-probabilities for {len(token_ids)} tokens")
    candidates, labels = [*expected[1:], None], [*own[1:], None]
    known = all(value is not None for value, others in zip(labels, candidates, strict=True) if others is not None)
    of_labels = [0.0 if value is None else value for value in labels] if known else None
    return TokenSequence(where, token_ids, None, None, candidates, None, label_log_probs=of_labels)


_READERS = {"jsonl": read_export, "parquet": read_export, "vllm": read_vllm, "sglang": read_sglang}


def check_sequence(sequence: TokenSequence, vocab_size: int) -> None:
    """Raises RecipeError for lengths or log-probabilities that cannot be, MismatchError for token ids outside the
    vocabulary, TypeError for a value that is not a number."""
    for name in ("segment_ids", "labels", "tail_curve", "tail_coordinates", "label_log_probs"):
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
    for value in chain(*(sequence.tail_coordinates or ())):
        if not math.isfinite(value):
            raise RecipeError(f"{sequence.where}: {value} is not a coordinate")
    for value in sequence.label_log_probs or ():
        if not (value <= 1e-3 and math.isfinite(value)):
            raise RecipeError(f"{sequence.where}: {value} is not a log-probability")
    if len(sequence.candidates) != len(sequence.token_ids):
        raise RecipeError(
            f"{sequence.where}: {len(sequence.candidates)} positions with candidates for "
            f"{len(sequence.token_ids)} tokens"
        )
    for candidates in sequence.candidates:
        for log_p, token in candidates or ():
            if not 0 <= token < vocab_size:
                raise MismatchError(
                    f"{sequence.where}: token id {token} is outside the vocabulary of {vocab_size}: name the right "
                    "--tokenizer, or --vocab-size where the teacher's output layer is larger"
                )
            if not log_p <= 1e-3:
                raise RecipeError(f"{sequence.where}: {log_p} is not a log-probability")
        if candidates and len({token for _, token in candidates}) != len(candidates):
            raise RecipeError(f"{sequence.where}: a token id appears twice among the candidates of one position")
    if any(not 0 <= token < vocab_size for token in sequence.token_ids):
        raise MismatchError(f"{sequence.where}: a token id is outside the vocabulary of {vocab_size}")
