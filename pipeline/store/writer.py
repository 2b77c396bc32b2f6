"""Writing a cache: the commit protocol, which needs no locks.

A cache begins with its manifest, and a shard exists once its commit record does; each of the two files is created in
one step, and only where none exists. Any number of tasks may write the same shard:

1. A task stages the shard in a file with a name of its own, a block of rows at a time, and notes its size and digests.
2. It publishes the file as `shards/00000.zarr.zip`, in one step: on a disk a link to it is renamed, to an object store
   it is uploaded.
3. It creates `shards/00000.json` with those notes. This is the commit: readers look at records alone.
4. Where another task has created the record first, and the record fits the published file, the shard is committed.
   Where it does not fit, the task removes the record and goes on at 2.

A task that is killed before step 3 leaves a staged file, or a published one without a record. The next task replaces
it; once a shard is committed, any task may discard what others have staged of it. Codebook and tail basis of
a cache have their digests in their names and are published before the manifest, so a manifest always finds them.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..base.durable import (
    TEMPORARY,
    create_json,
    discard,
    json_digest,
    publish_file,
    remove_tree,
)
from ..base.errors import CorruptError, MismatchError
from ..base.places import Place, names_in
from ..recipe.paths import BASIS, CODEBOOK, CachePaths, record_name, shard_stem
from .basis_file import StoredBasis, read_stored_basis
from .codec import TargetCodec
from .draft import ShardDraft
from .learned import Learned, publish_learned
from .manifest import Manifest, identity_differences
from .records import read_record
from .verify import verify_shard

ACCEPTABLE = ("teacher.source", "teacher.revision", "teacher.rows")
"""Fields of the identity that name the origin of a teacher, and the layout in which rows go through it: the digests in
the identity determine what it is, and every layout gives the same but for roundings."""


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

    def begin(self, codec: TargetCodec, basis: StoredBasis | None = None) -> None:
        """Write the manifest with a fitted codec and its tail basis, or take those of the task that was first.

        Raises as `__init__`.
        """
        learned = self.manifest.with_codec(codec)
        own: dict[Place, Learned] = {}
        if codec.codebook is not None:
            own[self._paths.codebook(codec.codebook.digest)] = codec.codebook
        if basis is not None:
            own[self._paths.basis(basis.digest)] = basis
        for folder, value in own.items():
            try:
                publish_learned(folder, value)
            except FileNotFoundError:
                if not self._paths.manifest.exists():
                    raise  # otherwise another task began the cache and discarded what this one staged
        if create_json(self._paths.manifest, learned.to_json()):
            self.manifest = learned
        else:
            self._join()
            for folder in own:
                if folder.name not in self._used():
                    remove_tree(folder)
        self.begun = True

    def basis(self) -> StoredBasis | None:
        """The tail basis of a cache that has begun, with the projection that gives coordinates; None without one.

        Raises CorruptError for a damaged one.
        """
        coordinates = self.manifest.codec.coordinates
        if coordinates is None or coordinates.basis is None:
            return None
        return read_stored_basis(self.path, coordinates.basis.digest)

    def _used(self) -> set[str]:
        """Names of the codebook and the tail basis of the manifest."""
        codec = self.manifest.codec
        used = set()
        if codec.codebook is not None:
            used.add(self._paths.codebook(codec.codebook.digest).name)
        if codec.coordinates is not None and codec.coordinates.basis is not None:
            used.add(self._paths.basis(codec.coordinates.basis.digest).name)
        return used

    def _join(self) -> None:
        existing = Manifest.read(self.path)
        expected = self.manifest.with_codec(self.manifest.codec.learned_as(existing.codec))
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
        """Shards of this task without a commit.

        Discards what killed processes staged of committed shards, and what they learned before another began the cache.
        """
        own = range(task, self.manifest.num_shards, num_tasks)
        names = names_in(self._paths.shards)
        missing = [shard for shard in own if record_name(shard) not in names]
        for name in names:
            if TEMPORARY in name:
                self._leftovers.setdefault(name.partition(".")[0], []).append(name)
        for shard in set(own) - set(missing):
            self._clear(shard)
        if self.begun:  # until then, other tasks may be learning
            learned = (self._paths.manifest.name, CODEBOOK, BASIS)
            for name in {name for name in names_in(self.path) if name.startswith(learned)} - self._used():
                if TEMPORARY in name:
                    discard(self.path / name)
                elif not name.startswith(self._paths.manifest.name):
                    remove_tree(self.path / name)
        return missing

    def _clear(self, shard: int) -> None:
        """Discard what other tasks have staged of a committed shard: they then find the commit."""
        for name in self._leftovers.pop(shard_stem(shard), []):
            discard(self._paths.shards / name)

    def draft(self, shard: int) -> ShardDraft:
        """A shard to fill, for `commit`."""
        return ShardDraft(self.path, self.manifest, shard)

    def commit(self, draft: ShardDraft) -> None:
        """Commit a full draft and close it. A shard that another task has committed is left as it is."""
        final, record_file = self._paths.shard(draft.shard), self._paths.record(draft.shard)
        facts = draft.finish()
        record = {**facts, "record_sha256": json_digest(facts)}
        while not record_file.exists():
            try:
                publish_file(draft.staged, final)
            except FileNotFoundError:
                if not record_file.exists():
                    raise
                break  # another task committed the shard and discarded the staged file
            if create_json(record_file, record) or self._fits(draft.shard):
                break
            record_file.unlink(missing_ok=True)
        draft.close()
        self._clear(draft.shard)

    def _fits(self, shard: int) -> bool:
        """Whether the record of a shard, created by another task, fits its file."""
        try:
            record = read_record(self.path, self.manifest, shard)
            if record is not None:
                verify_shard(self.path, self.manifest, record)
        except (CorruptError, OSError):
            return False
        return record is not None
