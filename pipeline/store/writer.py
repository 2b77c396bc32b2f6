"""Shards exist once their commit record does: how they are written, checked and taken back.

Tasks need no locks. Each writes a shard where no other does and gives it its name in one step; the record is created where
none is. Whoever finds another's record there checks that it fits what lies there, and else takes it back and writes again.

A cache may lie on an object store (`storage`), where a shard's files are written in place, before its record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base.durable import (
    TEMPORARY,
    abandoned,
    create_json,
    discard,
    file_digest,
    json_digest,
    publish_directory,
    remove_tree,
    staging_directory,
)
from ..base.errors import CorruptError, MismatchError
from ..base.places import Place, files_in, names_in
from ..corpus.labels import IntArray
from ..targets.sparse_targets import SparseTargets
from .arrays import Arrays
from .codec import TargetCodec
from .layout import codebook_path, record_path, shard_path
from .manifest import Manifest, identity_differences
from .records import read_record
from .shards import chunk_checksums, write_group
from .verify import _verify_files

ACCEPTABLE = ("teacher.source", "teacher.revision")
"""Fields of the identity that say where something came from: the digests beside them say what it is."""


class CacheWriter:
    """Writes the shards of one cache, each as a whole."""

    def __init__(self, path: Place, manifest: Manifest, *, accept: Sequence[str] = ()) -> None:
        """Start or continue a cache. Raises MismatchError naming the fields in which the existing one differs.

        `accept` names those of ACCEPTABLE in which it may: the cache keeps what it was begun with.
        """
        self.path, self.manifest, self._accept = path, manifest, accept
        (path / "shards").mkdir(parents=True, exist_ok=True)
        self.begun = (path / "manifest.json").exists()
        """Whether the manifest is written, and with it what the codec has learned."""
        self._leftovers: dict[str, list[str]] = {}
        if self.begun:
            self._join()

    def begin(self, codec: TargetCodec) -> None:
        """Write the manifest with a codec that has learned. Where another task was first, what that one learned holds."""
        learned = self.manifest.with_codec(codec)
        book = codec.codebook
        if book is not None:
            folder = codebook_path(self.path, book.digest)
            try:
                with staging_directory(folder) as aside:
                    write_group(aside, book.arrays(), codec.profile)
                    # Named by its content: one that is there is the same, and may be being read.
                    publish_directory(aside, folder, replace=False)
            except FileNotFoundError:
                if not (self.path / "manifest.json").exists():
                    raise  # else another task began the cache and discarded what this one had staged
        if create_json(self.path / "manifest.json", learned.to_json()):
            self.manifest = learned
        else:
            self._join()
            used = self.manifest.codec.codebook
            if book is not None and (used is None or used.digest != book.digest):
                remove_tree(codebook_path(self.path, book.digest))
        self.begun = True

    def _join(self) -> None:
        existing = Manifest.read(self.path)
        learned = existing.codec
        expected = self.manifest.with_codec(
            replace(self.manifest.codec, tail_prediction=learned.tail_prediction, codebook=learned.codebook)
        )
        differences = identity_differences(existing.identity, expected.identity)
        refused = {field: told for field, told in differences.items() if field not in self._accept}
        if refused:
            safe = [field for field in differences if field in ACCEPTABLE]
            way_out = (
                f"it is the same teacher by its weights and tokenizer, so {' '.join(f'--accept {f}' for f in safe)} continues"
                if len(safe) == len(differences)
                else "choose another run_dir, or delete the cache"
            )
            raise MismatchError(
                f"{self.path}: this cache was begun with another identity: {'; '.join(refused.values())}: {way_out}"
            )
        if existing.prepared != expected.prepared:
            raise CorruptError(
                f"{self.path / 'corpus'}: not as it was when the cache was begun: delete it and run `prepare` again"
            )
        self.manifest = existing

    def pending(self, task: int = 0, num_tasks: int = 1) -> list[int]:
        """Shards of this task that are not committed. What killed processes left beside committed ones is removed."""
        mine = range(task, self.manifest.num_shards, num_tasks)
        names = names_in(self.path / "shards")
        missing = [shard for shard in mine if record_path(self.path, shard).name not in names]
        for name in names:
            if TEMPORARY in name:
                self._leftovers.setdefault(name.partition(".")[0], []).append(name)
        for shard in set(mine) - set(missing):
            self._clear(shard)
        for name in names_in(self.path):
            if (
                TEMPORARY in name
                and name.startswith(("manifest.json", "codebook-"))
                and (self.begun or abandoned(name))
            ):
                discard(self.path / name)
        return missing

    def _clear(self, shard: int) -> None:
        """Once a shard is committed, anyone may remove what others have begun of it: they will find it committed."""
        for name in self._leftovers.pop(f"{shard:05}", []):
            discard(self.path / "shards" / name)

    def write(
        self,
        shard: int,
        targets: SparseTargets,
        input_ids: IntArray,
        rows_digest: str,
        teacher_nats: float,
        signals: Arrays | None = None,
        labels: int | None = None,
    ) -> None:
        """Commit one shard: targets and tokens [rows, L], the digest of its rows, the teacher's own loss over them.

        `signals` are the arrays of all signals' layouts, `labels` the positions that the loss was summed over where those
        are not the positions with a target. Nothing is done where another task has committed the shard.
        """
        start, stop = self.manifest.shard_range(shard)
        final, record_file = shard_path(self.path, shard), record_path(self.path, shard)
        codec = self.manifest.codec
        arrays = codec.encode(targets, input_ids) | (signals or {})
        facts = {
            "shard": shard,
            "rows": [start, stop],
            "rows_sha256": rows_digest,
            "identity_digest": self.manifest.digest,
            "positions": int(targets.mask.sum()),
            **({} if labels is None else {"labels": labels}),
            "teacher_nats": teacher_nats,
        }
        while not record_file.exists():
            try:
                with staging_directory(final) as aside:
                    write_group(aside, arrays, codec.profile)
                    files = _file_facts(aside, stop - start)
                    if record_file.exists():
                        break  # another task has discarded what is staged here, or a part of it
                    publish_directory(aside, final)
            except FileNotFoundError:
                if not record_file.exists():
                    raise
                break  # another task committed the shard and discarded what this one had staged
            record = {**facts, "files": files}
            if create_json(record_file, {**record, "record_sha256": json_digest(record)}):
                break
            if self._fits(shard):
                break
            record_file.unlink(missing_ok=True)
        self._clear(shard)

    def _fits(self, shard: int) -> bool:
        """Whether a shard's record, which another task has written, is that of the files which lie there."""
        try:
            record = read_record(self.path, self.manifest, shard)
            if record is not None:
                _verify_files(shard_path(self.path, shard), record)
        except (CorruptError, OSError):
            return False
        return record is not None


def _file_facts(folder: Path, rows: int) -> dict[str, dict[str, Any]]:
    """What a commit record says of each file of a shard of `rows` rows."""
    facts: dict[str, dict[str, Any]] = {}
    for name, size in files_in(folder).items():
        facts[name] = {"size": size, "sha256": file_digest(folder / name)}
        if "/c/" in name:
            facts[name]["crc32c"] = chunk_checksums((folder / name).read_bytes(), rows)
    return facts
