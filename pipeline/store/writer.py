"""Writing a cache: the commit protocol, which needs no locks.

A cache begins with its manifest, and a shard exists once its commit record does; each of the two files is created in
one step, and only where none exists. Any number of tasks may write the same shard:

1. A task stages the arrays of a shard in a directory with a name of its own, and notes size, sha256 and chunk checksums
   of every file.
2. It renames the directory to `shards/00000.zarr`, in one step. On an object store, where nothing can be renamed, it
   uploads the files instead.
3. It creates `shards/00000.json` with those notes. This is the commit: readers look at records alone.
4. Where another task has created the record first, and the record fits the files, the shard is committed. Where it does
   not fit them, the task removes the record and starts again at 1.

A task that is killed before step 3 leaves a staging directory or files without a record. The next task replaces them;
once a shard is committed, any task may discard what others have staged of it. The codebook of a cache has its digest in
its name and is published before the manifest, so a manifest always finds its codebook.
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
from ..recipe.paths import CODEBOOK, CachePaths, record_name, shard_stem
from ..targets.sparse_targets import SparseTargets
from .arrays import Arrays
from .codec import TargetCodec
from .manifest import Manifest, identity_differences
from .records import read_record
from .shards import chunk_checksums, write_group
from .verify import verify_files

ACCEPTABLE = ("teacher.source", "teacher.revision")
"""Fields of the identity that name the origin of a teacher; the digests in the identity determine what it is."""


class CacheWriter:
    """Writes the shards of one cache."""

    def __init__(self, path: Place, manifest: Manifest, *, accept: Sequence[str] = ()) -> None:
        """Start or continue a cache.

        `accept` names fields of ACCEPTABLE in which an existing cache may differ; the cache keeps its own values.
        Raises MismatchError naming the other fields that differ, CorruptError for a corpus that has changed.
        """
        self.path, self.manifest, self._accept = path, manifest, accept
        self._paths = CachePaths(path)
        self._paths.shards.mkdir(parents=True, exist_ok=True)
        self.begun = self._paths.manifest.exists()
        """Whether the manifest exists, with the fitted codec."""
        self._leftovers: dict[str, list[str]] = {}
        if self.begun:
            self._join()

    def begin(self, codec: TargetCodec) -> None:
        """Write the manifest with a fitted codec, or take the codec of the task that was first.

        Raises as `__init__`.
        """
        learned = self.manifest.with_codec(codec)
        book = codec.codebook
        if book is not None:
            folder = self._paths.codebook(book.digest)
            try:
                with staging_directory(folder) as aside:
                    write_group(aside, book.arrays(), codec.profile)
                    # The name has the digest of the content: an existing folder is the same, and may be in use.
                    publish_directory(aside, folder, replace=False)
            except FileNotFoundError:
                if not self._paths.manifest.exists():
                    raise  # otherwise another task began the cache and discarded the staged codebook
        if create_json(self._paths.manifest, learned.to_json()):
            self.manifest = learned
        else:
            self._join()
            used = self.manifest.codec.codebook
            if book is not None and (used is None or used.digest != book.digest):
                remove_tree(self._paths.codebook(book.digest))
        self.begun = True

    def _join(self) -> None:
        existing = Manifest.read(self.path)
        learned = existing.codec
        expected = self.manifest.with_codec(
            replace(self.manifest.codec, tail_prediction=learned.tail_prediction, codebook=learned.codebook)
        )
        differences = identity_differences(existing.identity, expected.identity)
        refused = {field: text for field, text in differences.items() if field not in self._accept}
        if refused:
            safe = [field for field in differences if field in ACCEPTABLE]
            remedy = (
                f"weights and tokenizer are the same, so {' '.join(f'--accept {f}' for f in safe)} continues it"
                if len(safe) == len(differences)
                else "choose another run_dir, or delete the cache"
            )
            raise MismatchError(f"{self.path}: the cache has another identity: {'; '.join(refused.values())}: {remedy}")
        if existing.prepared != expected.prepared:
            raise CorruptError(
                f"{self._paths.corpus}: changed since the cache was begun: delete it and run `prepare` again"
            )
        self.manifest = existing

    def pending(self, task: int = 0, num_tasks: int = 1) -> list[int]:
        """Shards of this task without a commit. Discards what killed processes staged of committed shards."""
        own = range(task, self.manifest.num_shards, num_tasks)
        names = names_in(self._paths.shards)
        missing = [shard for shard in own if record_name(shard) not in names]
        for name in names:
            if TEMPORARY in name:
                self._leftovers.setdefault(name.partition(".")[0], []).append(name)
        for shard in set(own) - set(missing):
            self._clear(shard)
        own_names = (self._paths.manifest.name, CODEBOOK)
        for name in names_in(self.path):
            if TEMPORARY in name and name.startswith(own_names) and (self.begun or abandoned(name)):
                discard(self.path / name)
        return missing

    def _clear(self, shard: int) -> None:
        """Discard what other tasks have staged of a committed shard: they then find the commit."""
        for name in self._leftovers.pop(shard_stem(shard), []):
            discard(self._paths.shards / name)

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
        """Commit one shard: targets and tokens [B, L], the digest of its rows, the teacher's own loss summed.

        `signals`: the arrays of all signals. `labels`: the number of positions in the loss, where that differs from the
        positions with a target. A shard that another task has committed is left as it is.
        """
        start, stop = self.manifest.shard_range(shard)
        final, record_file = self._paths.shard(shard), self._paths.record(shard)
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
                        break  # another task may have discarded a part of the staged files
                    publish_directory(aside, final)
            except FileNotFoundError:
                if not record_file.exists():
                    raise
                break  # another task committed the shard and discarded the staged files
            record = {**facts, "files": files}
            if create_json(record_file, {**record, "record_sha256": json_digest(record)}) or self._fits(shard):
                break
            record_file.unlink(missing_ok=True)
        self._clear(shard)

    def _fits(self, shard: int) -> bool:
        """Whether the record of a shard, created by another task, fits the files of the shard."""
        try:
            record = read_record(self.path, self.manifest, shard)
            if record is not None:
                verify_files(self._paths.shard(shard), record)
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
