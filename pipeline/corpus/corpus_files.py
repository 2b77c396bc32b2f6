"""The files of a corpus directory, and how rows that lie in it become a corpus.

    data-00000-DIGEST.arrow   rows of a portion (`row_file`); the number counts portions, DIGEST begins its sha256
    portions.json             name, rows, size, sha256 and digest of the rows of each of them, in order
    tokenizer/                the tokenizer
    dataset_info.json, state.json   what `datasets.load_from_disk` needs
    sources.json              what was read (`source_record`)
    prepared.json             what the rows are, size and sha256 of all but the first and the last but one; written last

A file of rows is named by its content, so that several processes may write the same portion at once. Files of rows
that `portions.json` does not name, and records of portions (`portion_records`), are those of a corpus in the making.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.durable import TEMPORARY, bytes_digest, json_digest, write_bytes
from ..base.places import Place, files_in
from .source_record import SOURCES
from .tokenizer import TOKENIZER

META = "prepared.json"
PORTIONS = "portions.json"
DATA = "data"
RECORD = "portion-"
"""How names of records begin."""
DATA_NAME = re.compile(r"data-\d{5,}-[0-9a-f]{12}\.arrow")


def data_name(portion: int, digest: str) -> str:
    """The name of a file of rows with this sha256."""
    return f"{DATA}-{portion:05}-{digest[:12]}.arrow"


def size_of(file: Place) -> int:
    """Raises FileNotFoundError where there is no such file."""
    return file.stat().st_size if isinstance(file, Path) else file.size()


def rows_digest(portions: Sequence[dict[str, Any]]) -> str:
    """The digest of a corpus: that of the JSON list of rows and digest of each file of rows."""
    return json_digest([[portion["rows"], portion["digest"]] for portion in portions])


def publish_corpus(
    path: Place,
    meta: dict[str, Any],
    portions: Sequence[dict[str, Any]],
    features: dict[str, Any],
    tokenizer: Path,
    sources: list[dict[str, Any]] | None = None,
) -> None:
    """Make a corpus of files of rows that lie in its directory already.

    `meta` is what `prepared.json` says beside rows, digest and files; `tokenizer` is a local directory, which may be
    missing. Other files of an earlier corpus are deleted.
    """
    digest = rows_digest(portions)
    state: dict[str, Any] = {
        "_data_files": [{"filename": portion["name"]} for portion in portions],
        "_fingerprint": digest[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    contents = {
        PORTIONS: _json(list(portions)),
        "dataset_info.json": _json({"features": features}),
        "state.json": _json(state),
        **{f"{TOKENIZER}/{name}": (tokenizer / name).read_bytes() for name in files_in(tokenizer)},
    }
    (path / META).unlink(missing_ok=True)
    files = {name: {"size": len(data), "sha256": bytes_digest(data)} for name, data in contents.items()}
    if sources is not None:
        contents[SOURCES] = json.dumps(sources, indent=1).encode()  # times of files, which are no part of what it is
    for name, data in contents.items():
        write_bytes(path / name, data)
    rows = sum(portion["rows"] for portion in portions)
    write_bytes(path / META, _json({**meta, "rows": rows, "digest": digest, "files": files}))
    kept = {META, *contents, *(portion["name"] for portion in portions)}
    for name in files_in(path):
        if name not in kept and TEMPORARY not in name and not name.startswith(RECORD):
            (path / name).unlink(missing_ok=True)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
