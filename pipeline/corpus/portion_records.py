"""The records of portions that are packed: what makes them exist, so that a stopped `prepare` loses only those in work.

A record lies in the directory of the training rows, written after the files that it names, and deleted once both corpora
are whole. It counts only for the same settings and tokenizer, the same portion, and files of the source that are as they
were.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..base.durable import json_digest, write_bytes
from ..base.places import Place, names_in, read_all
from .corpus_files import RECORD, size_of
from .parts import PartSpan, Sources
from .portions import Portion

Limits = dict[str, int | None]
"""Most rows by side, "train" and "heldout"; None: all."""
SIDES = ("train", "heldout")


@dataclass(frozen=True)
class Side:
    """The rows of one side of a portion."""

    file: dict[str, Any]
    """What `portions.json` says of it."""
    limit: int | None
    documents: int
    tokens: int
    left: int
    """Tokens that are in no row."""
    long_documents: int
    learned: int
    padding: int

    @property
    def rows(self) -> int:
        return int(self.file["rows"])

    def serves(self, limit: int | None) -> bool:
        """Whether the same rows would be packed under this limit."""
        if limit == self.limit or limit == 0:  # of a side that is full, nothing is taken
            return True
        return all(most is None or self.rows < most for most in (limit, self.limit))


@dataclass(frozen=True)
class PortionRecord:
    """What is known of a portion that is packed."""

    identity: str
    """Digest of settings and portion."""
    sides: dict[str, Side]
    documents: int
    lowest: float
    """Lowest draw of a document, infinite where there is none."""
    heldout_below: float
    """Documents with a draw below it are held out."""
    begun: int
    """Number of parts of the source up to the last one that was read."""
    whole: bool
    """Whether the portion was read to its end."""
    facts: dict[str, dict[str, Any]]
    """Of the parts whose beginning is in the portion, by number (`source_record`)."""
    versions: list[Any]
    """Of all its parts, as they were found."""
    roles: dict[str, int]
    names: dict[str, int]
    """Documents with the name of a special token."""

    def serves(self, limits: Limits, heldout_below: float) -> bool:
        """Whether the same rows would be packed under these limits and this share of held-out documents."""
        nothing_held = self.sides["heldout"].documents == 0 and self.lowest >= heldout_below > self.heldout_below
        if self.heldout_below != heldout_below and not nothing_held:
            return False
        return all(self.sides[side].serves(limits[side]) for side in SIDES)


def record_name(number: int) -> str:
    return f"{RECORD}{number:05}.json"


class PortionRecords:
    """The records of the portions of one corpus."""

    def __init__(self, paths: dict[str, Place], sources: Sources, settings: dict[str, Any]) -> None:
        """`paths`: the corpus directories of both sides."""
        self._paths, self._sources, self._settings = paths, sources, settings
        self._known: dict[int, PortionRecord] = {}
        self._versions: dict[int, list[Any]] = {}

    def identity(self, portion: Portion) -> str:
        return json_digest([self._settings, [[*span] for span in portion.spans]])

    def versions(self, portion: Portion) -> list[Any]:
        """What is known now of the parts of a portion without reading them."""
        return [self._version(number) for number in dict.fromkeys(span.part for span in portion.spans)]

    def _version(self, number: int) -> list[Any]:
        if number not in self._versions:  # the hub is asked once
            part = self._sources.parts[number]
            self._versions[number] = [part.name, *part.version()]
        return self._versions[number]

    def read(self, portions: list[Portion]) -> dict[int, PortionRecord]:
        """The records of these portions that exist and count."""
        folder = self._paths["train"]
        unknown = [portion for portion in portions if portion.number not in self._known]
        if unknown:
            names = names_in(folder)
            there = [portion for portion in unknown if record_name(portion.number) in names]
            for portion, data in zip(there, _read([folder / record_name(p.number) for p in there]), strict=True):
                record = None if data is None else self._record(data)
                if record is not None and self._counts(record, portion):
                    self._known[portion.number] = record
        return {p.number: self._known[p.number] for p in portions if p.number in self._known}

    def write(self, number: int, record: PortionRecord) -> None:
        value = asdict(record)
        content = {**value, "record_sha256": json_digest(value)}
        write_bytes(self._paths["train"] / record_name(number), json.dumps(content).encode())
        self._known[number] = record

    def _counts(self, record: PortionRecord, portion: Portion) -> bool:
        """Whether a record is of this portion as it is now, and its files are there."""
        if record.identity != self.identity(portion) or not _same(record.versions, self.versions(portion)):
            return False
        try:
            files = [(self._paths[name] / side.file["name"], side.file["size"]) for name, side in record.sides.items()]
            return all(size_of(file) == size for file, size in files)
        except FileNotFoundError:
            return False

    @staticmethod
    def _record(data: bytes) -> PortionRecord | None:
        """The record in a file; None for a damaged one, whose portion is packed again."""
        try:
            value = json.loads(data)
            if value.pop("record_sha256") != json_digest(value):
                return None
            sides = {name: Side(**side) for name, side in value.pop("sides").items()}
            return PortionRecord(sides=sides, **value)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _read(files: list[Place]) -> list[bytes | None]:
    """The contents of files, None for those that another process has deleted."""
    found = list[bytes | None]()
    for file in files:
        if not isinstance(file, Path):
            return read_all(files)
        try:
            found.append(file.read_bytes())
        except FileNotFoundError:
            found.append(None)
    return found


def begins_in(span: PartSpan) -> bool:
    """Whether a span has the beginning of its part."""
    return span.span.first == 0


def _same(before: list[Any], now: list[Any]) -> bool:
    """Whether parts are as they were: by what their system states of their content, else by the times of writing."""
    return len(before) == len(now) and all(
        one[:3] == other[:3] and (one[2] is not None or one[3] == other[3])
        for one, other in zip(before, now, strict=True)
    )
