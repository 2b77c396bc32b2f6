"""Which bytes rows were prepared from, so that `prepare` tells a changed source from one that was only copied.

A record is kept with the rows: names, sizes and content of the parts that were read. The content is what the file system
states of it (a checksum or an ETag), else the sha256 of the file. Beside it, `sources.json` remembers the times at which
the files were written: where size and times are as they were, a file is taken as unchanged; where only the times differ,
its content decides.
"""

from __future__ import annotations

from typing import Any

from ..base.durable import json_digest
from .parts import HubDataSet, Part, Sources

SOURCES = "sources.json"
"""Name of the file with the facts of every part; the digest in the record covers all but `written`."""


def facts_of(sources: Sources, number: int) -> dict[str, Any]:
    """The facts of a part that was read. Reads a file whose system states nothing about its content.

    Raises RecipeError where the file was changed since it was found.
    """
    part = sources.parts[number]
    version = part.version()
    return _facts(part, version.size, version.stated or part.digest(), version.written)


def record_of(facts: list[dict[str, Any]], whole: bool) -> dict[str, Any]:
    """The record of these parts; `whole`: they were read to their end, and there were no others."""
    return {"parts": len(facts), "whole": whole, "digest": _digest(facts)}


def changed_part(record: Any, facts: list[dict[str, Any]] | None, sources: Sources) -> str | None:
    """What differs between the parts of a record and those of now; None where nothing does.

    `facts` are those of `sources.json`, None where it is missing: all files are read then. Parts behind those that the
    record names were not needed.
    """
    if not isinstance(record, dict) or not {"parts", "whole", "digest"} <= set(record):
        return "the form of the record"
    count = record["parts"]
    if len(sources.parts) < count or (record["whole"] and len(sources.parts) > count):
        return f"{len(sources.parts)} parts where there were {count}"
    if facts is not None and (len(facts) != count or _digest(facts) != record["digest"]):
        facts = None  # of another corpus, or damaged
    found = []
    for number, part in enumerate(sources.parts[:count]):
        version, known = part.version(), facts[number] if facts is not None else None
        if known is not None and (part.name, version.size) != (known["name"], known["size"]):
            return part.name
        content = version.stated
        if (
            known is not None
            and content is None
            and (isinstance(part, HubDataSet) or version.written == known["written"])
        ):
            content = known["content"]
        found.append(_facts(part, version.size, content or sources.digest(part), version.written))
        if known is not None and found[-1]["content"] != known["content"]:
            return part.name
    return None if _digest(found) == record["digest"] else "their content"


def _facts(part: Part, size: int | None, content: str, written: list[str]) -> dict[str, Any]:
    return {"name": part.name, "size": size, "content": content, "written": written}


def _digest(facts: list[dict[str, Any]]) -> str:
    return json_digest([[part["name"], part["size"], part["content"]] for part in facts])
