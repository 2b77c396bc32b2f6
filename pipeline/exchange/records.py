"""records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..base.errors import MismatchError, RecipeError
from .export import _ROWS_PER_READ


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
