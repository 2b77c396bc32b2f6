"""Two tasks that write the same shard or codebook; readers in several processes."""

from __future__ import annotations

import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logit_cache import LogitCache, SparseTargets, collate
from logit_cache.base.places import RemotePath
from logit_cache.store import learned as learned_module
from logit_cache.store import writer as writer_module
from logit_cache.store.manifest import Manifest
from logit_cache.store.verify import verify
from logit_cache.store.writer import CacheWriter
from logit_cache.targets.supports import Support
from torch.utils.data import DataLoader

from tests.conftest import files_of
from tests.helpers.fault_client import Rows
from tests.helpers.synthetic import KNOTS, VOCAB, make_cache, random_rows, teacher_logits

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("store", ["disk", "bucket"])
@pytest.mark.parametrize("moment", ["publish_file", "create_json"])
@pytest.mark.parametrize("after", [False, True])
def test_two_tasks_with_other_bytes_for_one_shard(
    tmp_path: Path, store: str, moment: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two kinds of GPU: whoever is last sees to it that record and files belong together."""
    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "home"))
    place = tmp_path / "cache" if store == "disk" else RemotePath(f"memory://tasks/{uuid.uuid4().hex}")
    make_cache(tmp_path / "made", rows=2, length=8, shard_rows=2, label_log_probs=False)
    for file in sorted(p for p in (tmp_path / "made").rglob("*") if p.is_file()):
        name = file.relative_to(tmp_path / "made").as_posix()
        if not name.startswith("shards/"):
            target = place / name
            if isinstance(target, Path):
                target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    input_ids, segment_ids = random_rows(2, 8)
    manifest = Manifest.read(place)
    mask = LogitCache(tmp_path / "made").batch([0, 1])["targets"].mask

    def write(teacher: int) -> None:
        logits = teacher_logits(
            torch.from_numpy(input_ids).long(), torch.from_numpy(segment_ids).long(), VOCAB, teacher
        )
        targets = SparseTargets.from_logits(logits.float(), k=8, knots=KNOTS, mask=mask)
        columns = LogitCache(tmp_path / "made").columns([0, 1])
        with CacheWriter(place, manifest).draft(0) as draft:
            draft.add(targets, columns, [float(teacher), 0.0])
            writer = CacheWriter(place, manifest)
            writer.pending()  # lists what the other task has begun, to remove it once the shard is committed
            writer.commit(draft)

    real, interrupted = getattr(writer_module, moment), []

    def interfere(*args: Any, **kwargs: Any) -> Any:
        first = not interrupted
        interrupted.append(1)
        if first and not after:
            other()
        result = real(*args, **kwargs)
        if first and after:
            other()
        return result

    def other() -> None:
        write(1)

    monkeypatch.setattr(writer_module, moment, interfere)
    write(2)
    assert interrupted
    assert verify(place) == {}
    found = LogitCache(place)
    assert found.records[0]["teacher_nats"] in (1.0, 2.0)
    reference = Rows(found)
    monkeypatch.undo()
    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "home"))
    assert Rows(LogitCache(place)) == reference
    if isinstance(place, Path):
        assert {p.name for p in (place / "shards").iterdir()} == {"00000.json", "00000.zarr.zip"}


@pytest.mark.parametrize("moment", ["write_group", "publish_directory"])
def test_a_task_whose_codebook_was_discarded_uses_the_other_tasks(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third task, which starts when the cache is begun, discards what the first has staged."""
    made = make_cache(tmp_path / "made", rows=8, length=64, shard_rows=4, support=Support("sampled", draws=40))
    codec, prepared = made.manifest.codec, made.manifest
    assert codec.codebook is not None
    place = tmp_path / "cache"
    shutil.copytree(tmp_path / "made/corpus", place / "corpus")
    real, interrupted = getattr(learned_module, moment), []

    def interfere(*args: Any, **kwargs: Any) -> Any:
        if not interrupted:
            interrupted.append(1)
            CacheWriter(place, prepared).begin(codec)
            CacheWriter(place, prepared).pending()
        return real(*args, **kwargs)

    first = CacheWriter(place, prepared)
    monkeypatch.setattr(learned_module, moment, interfere)
    first.begin(codec)
    assert interrupted and first.begun
    assert files_of(place) == {
        name: data for name, data in files_of(tmp_path / "made").items() if not name.startswith("shards/")
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers(tmp_path: Path, method: str) -> None:
    cache = make_cache(tmp_path / "cache")
    whole = cache.batch(np.arange(len(cache)))  # every file is open before the workers are there
    loader = DataLoader(cache, batch_size=5, num_workers=2, collate_fn=collate, multiprocessing_context=method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forking a process that has threads, as torch's are
        batches = list(loader)
    assert torch.equal(torch.cat([batch["targets"].log_probs for batch in batches]), whole["targets"].log_probs)
    assert torch.equal(cache.batch([3])["targets"].log_probs, whole["targets"].log_probs[3:4])
