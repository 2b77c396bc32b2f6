"""Records of the import formats (`exchange`), read and checked one sequence at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from operator import index
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..base.errors import MismatchError, RecipeError
from ..corpus.labels import IGNORE
from .answers import IMPOSSIBLE, read_sglang, read_vllm, unwrapped
from .export import ROWS_PER_READ
from .sequence import TokenSequence


def read_sequences(files: Sequence[Path], form: str, vocab_size: int) -> Iterator[TokenSequence]:
    """The checked sequences of files of one format ("auto" recognises it record by record).

    A record is kept whole or refused. Raises RecipeError naming the line for records of another format, and as
    `check_sequence` does.
    """
    for file in files:
        for where, record in _records(file):
            kind = _format_of(record, where) if form == "auto" else form
            try:
                sequences = [_without_impossible(sequence) for sequence in _READERS[kind](record, where)]
                for sequence in sequences:
                    check_sequence(sequence, vocab_size)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                problem = error if type(error) is ValueError else repr(error)
                raise RecipeError(f"{where}: not a record of format {kind}: {problem}") from error
            yield from sequences


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix == ".parquet":
        try:
            number = 0
            for batch in pq.ParquetFile(file).iter_batches(batch_size=ROWS_PER_READ):
                for record in batch.to_pylist():
                    yield f"row {number} of {file.name}", record
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise RecipeError(f"{file}: cannot be read as parquet ({error})") from error
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise RecipeError(
                    f"{file.name}: line {number} is not valid UTF-8: unpack a compressed file, else convert it"
                ) from error
            except (ValueError, RecursionError) as error:
                raise RecipeError(f"{file.name}: line {number} cannot be read as JSON ({error})") from error
            # A request for several answers, or with several prompts, may be answered by a list.
            several = isinstance(value, list) and len(value) > 0
            for place, record in enumerate(value if several else [value]):
                where = f"line {number} of {file.name}"
                if not isinstance(record, dict):
                    raise RecipeError(f"{where} is not an object")
                yield f"entry {place} of {where}" if several else where, unwrapped(record, where)


def _format_of(record: dict[str, Any], where: str) -> str:
    if "meta_info" in record:
        return "sglang"
    if any(key in record for key in ("prompt_logprobs", "choices", "outputs")):
        return "vllm"
    if "token_ids" in record and "log_probs" in record:
        return "jsonl"
    raise RecipeError(
        f"{where}: unknown format (keys: {', '.join(record) or 'none'}): a record has token_ids and "
        "log_probs, or prompt_logprobs or choices (vLLM), or meta_info (SGLang)"
    )


def read_export(record: dict[str, Any], where: str) -> list[TokenSequence]:
    """The sequence of a record of an export, or of one's own script."""
    candidates = [
        [(float(log_p), index(token)) for log_p, token in zip(log_probs, ids, strict=True)] if ids else None
        for ids, log_probs in zip(record["token_ids"], record["log_probs"], strict=True)
    ]
    sequence = TokenSequence(
        where,
        [index(token) for token in record["input_ids"]],
        record.get("segment_ids"),
        record.get("labels"),
        candidates,
        record.get("tail_curve"),
        record.get("tail_coordinates"),
        record.get("label_log_probs"),
    )
    for position, label in enumerate(sequence.labels or ()):
        following = sequence.token_ids[position + 1 : position + 2]
        if label != IGNORE and following and [label] != following:
            raise ValueError(
                f"labels[{position}] is {label} and the token after position {position} is {following[0]}: labels[t] is "
                "the token that follows t"
            )
    return [sequence]


_READERS = {"jsonl": read_export, "parquet": read_export, "vllm": read_vllm, "sglang": read_sglang}


def _without_impossible(sequence: TokenSequence) -> TokenSequence:
    """Without candidates of probability 0, such as those that a grammar excludes."""
    candidates = [
        of_position and [entry for entry in of_position if not entry[0] <= IMPOSSIBLE]
        for of_position in sequence.candidates
    ]
    return replace(sequence, candidates=candidates)


def check_sequence(sequence: TokenSequence, vocab_size: int) -> None:
    """Raises RecipeError for an empty sequence, and for lengths or log-probabilities that cannot be, MismatchError for
    token ids outside the vocabulary, TypeError for a value that is not a number."""
    if not sequence.token_ids:
        raise RecipeError(f"{sequence.where}: no tokens: delete the line")
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
        if value <= IMPOSSIBLE:
            raise RecipeError(
                f"{sequence.where}: the teacher gives a token of the text probability 0: is it the right model and "
                "tokenizer for this text?"
            )
        if not value <= 1e-3:
            raise RecipeError(f"{sequence.where}: {value} is not a log-probability")
    if len(sequence.candidates) != len(sequence.token_ids):
        raise RecipeError(
            f"{sequence.where}: {len(sequence.candidates)} positions with candidates for "
            f"{len(sequence.token_ids)} tokens"
        )
    for position, candidates in enumerate(sequence.candidates):
        if candidates == []:
            raise RecipeError(f"{sequence.where}: no candidate of position {position} has a probability above 0")
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
