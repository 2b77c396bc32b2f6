"""Stored tail bases: what is decoded, that the same object is used everywhere, and that damage is found."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import pickle
import shutil
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cache import collate
from logit_cache.base.errors import CorruptError
from logit_cache.base.places import place
from logit_cache.recipe.paths import CachePaths
from logit_cache.store.basis_file import StoredBasis, publish_basis, read_basis, read_stored_basis
from logit_cache.targets.basis import TailBasis, TailProjection
from logit_cache.targets.sparse_targets import SparseTargets
from torch.utils.data import DataLoader, Dataset

VOCAB, RANK, WIDTH = 300, 4, 9


def some_basis(
    seed: int = 0, vocab_size: int = VOCAB, softcap: float | None = None
) -> tuple[TailBasis, TailProjection]:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(vocab_size, RANK, generator=generator) * torch.tensor([4.0, 2.0, 1.0, 0.5])
    basis = TailBasis(5 * torch.randn(vocab_size, generator=generator), directions, softcap)
    projection = torch.randn(WIDTH, generator=generator), torch.randn(RANK, WIDTH, generator=generator)
    basis = replace(basis, prediction=torch.randn(RANK + 1, RANK, generator=generator))
    return basis, TailProjection(*projection)


def some_stored(seed: int = 0, vocab_size: int = VOCAB, softcap: float | None = None) -> StoredBasis:
    return StoredBasis.quantised(*some_basis(seed, vocab_size, softcap), 2.0**-8, [0.04, 0.02, 0.01, 0.005])


@pytest.fixture
def cache(tmp_path: Path) -> tuple[Path, StoredBasis]:
    stored = some_stored()
    publish_basis(tmp_path, stored)
    return tmp_path, stored


@given(seed=st.integers(0, 1000), step=st.floats(1e-3, 1.0), softcap=st.sampled_from([None, 30.0]))
@settings(max_examples=30, deadline=None)
def test_rounding_is_to_the_nearest_step(seed: int, step: float, softcap: float | None) -> None:
    basis, projection = some_basis(seed, softcap=softcap)
    stored = StoredBasis.quantised(basis, projection, step / 4, step)
    decoded = stored.basis()
    assert (decoded.softcap, decoded.rank, decoded.vocab_size) == (softcap, RANK, VOCAB)
    # Half a step, and the rounding of the decoded float32 values, up to 32.
    assert (decoded.offset - basis.offset).abs().max() <= step / 8 + 32 * 2.0**-23
    assert (decoded.directions - basis.directions).abs().max() <= step / 2 + 32 * 2.0**-23
    assert torch.equal(stored.to_coordinates.center, projection.center)
    assert torch.equal(stored.to_coordinates.matrix, projection.matrix)
    # What is decoded is stored again as it is.
    assert StoredBasis.quantised(decoded, projection, step / 4, step).digest == stored.digest == decoded.digest


def test_numbers_beyond_the_steps() -> None:
    basis, projection = some_basis()
    for wrong in (1e-6, [1.0, 1.0, 1e-7, 1.0]):
        with pytest.raises(ValueError, match="more than 32,767 steps"):
            StoredBasis.quantised(basis, projection, 1.0, wrong)
    for broken in (replace(basis, offset=basis.offset * np.nan), replace(basis, directions=basis.directions * np.nan)):
        with pytest.raises(ValueError, match="is no number"):
            StoredBasis.quantised(broken, projection, 1.0, 1.0)
    padded = basis.offset.clone()
    padded[-3:] = torch.tensor([-1e9, -1e30, -torch.inf])
    offset = StoredBasis.quantised(replace(basis, offset=padded), projection, 2.0**-8, 0.1).basis().offset
    assert (offset[-3:] < -8e6).all() and offset.isfinite().all()


def test_a_basis_is_read_as_written(cache: tuple[Path, StoredBasis]) -> None:
    folder, stored = cache
    publish_basis(folder, stored)  # again: it is there
    read = read_stored_basis(folder, stored.digest)
    assert read.digest == stored.digest
    basis = read_basis(str(folder), stored.digest)
    assert torch.equal(basis.offset, stored.basis().offset) and torch.equal(basis.directions, stored.basis().directions)
    assert basis.digest == stored.digest
    assert [path.name for path in folder.iterdir()] == [f"basis-{stored.digest[:12]}.zarr"]
    hidden = torch.randn(5, WIDTH)
    _, projection = some_basis()
    assert torch.equal(read.to_coordinates.coordinates(hidden), projection.coordinates(hidden))


def test_plain_zarr_and_the_specification_give_the_same(cache: tuple[Path, StoredBasis]) -> None:
    """Numbers and digest, by the section "Tail basis" of the format."""
    folder, stored = cache
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(CachePaths(folder).basis(stored.digest), mode="r")
        arrays = {name: array[:] for name, array in group.arrays()}
    directions = arrays["directions"] * arrays["direction_steps"].T
    np.testing.assert_array_equal(directions.T, stored.basis().directions.numpy())
    offset = arrays["offset"][0] * arrays["offset_step"][0].astype(np.float64)
    np.testing.assert_array_equal(offset.astype(np.float32), stored.basis().offset.numpy())
    sha = hashlib.sha256()
    for name in sorted(arrays):
        values = arrays[name].astype(arrays[name].dtype.newbyteorder("<"))
        sha.update(f"{name} [{values.shape[0]}, {values.shape[1]}]".encode() + values.tobytes())
    assert sha.hexdigest() == stored.digest


def test_every_number_is_in_the_digest() -> None:
    stored, digests = some_stored(), {some_stored().digest}
    for name, values in stored.arrays().items():
        changed = values.copy()
        changed.flat[-1] += 1
        digests.add(
            replace(stored, **{name: changed if np.isfinite(changed).all() else np.ones((1, 1), np.float32)}).digest
        )
    assert len(digests) == 1 + len(stored.arrays())
    assert some_stored(softcap=30.0).digest not in digests


def test_damage_is_found_before_a_number_is_used(cache: tuple[Path, StoredBasis]) -> None:
    folder, stored = cache
    group = CachePaths(folder).basis(stored.digest)
    rng = np.random.default_rng(0)
    for file in sorted(path for path in group.rglob("*") if path.is_file()):
        data = file.read_bytes()
        for place_of_bit in rng.integers(0, 8 * len(data), 12).tolist():
            damaged = bytearray(data)
            damaged[place_of_bit // 8] ^= 1 << place_of_bit % 8
            file.write_bytes(bytes(damaged))
            try:
                read = read_stored_basis(folder, stored.digest)
            except CorruptError as error:
                assert str(error).startswith(f"{group}: the tail basis cannot be read")
            else:  # JSON says the same in several ways
                assert file.name == "zarr.json" and read.digest == stored.digest
        file.write_bytes(data[: len(data) // 2])
        with pytest.raises(CorruptError):
            read_stored_basis(folder, stored.digest)
        file.unlink()
        if file.parent != group:
            with pytest.raises(CorruptError):
                read_stored_basis(folder, stored.digest)
        file.write_bytes(data)
    assert read_stored_basis(folder, stored.digest).digest == stored.digest


def test_another_basis_under_the_name_is_refused(tmp_path: Path) -> None:
    one, other = some_stored(0), some_stored(1)
    publish_basis(tmp_path, one)
    with pytest.raises(CorruptError, match="the tail basis cannot be read"):
        read_basis(str(tmp_path), other.digest)
    publish_basis(tmp_path, other)
    paths = CachePaths(tmp_path)
    shutil.rmtree(paths.basis(one.digest))
    paths.basis(other.digest).rename(paths.basis(one.digest))
    with pytest.raises(CorruptError, match="its digest is not that of the manifest"):
        read_basis(str(tmp_path), one.digest)


def test_a_digest_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="is not the digest of a tail basis"):
        read_stored_basis(tmp_path, "../../secret")


def test_arrays_of_other_shapes_are_no_basis() -> None:
    arrays = some_stored().arrays()
    for change in (
        {"offset": arrays["offset"][:, 1:]},
        {"directions": arrays["directions"].astype(np.int32)},
        {"projection": arrays["projection"][1:]},
        {"softcap": arrays["softcap"][0]},
    ):
        with pytest.raises(ValueError, match=f"its array {next(iter(change))}|its array direction"):
            StoredBasis.from_arrays(arrays | change)


def test_a_process_has_one_basis(cache: tuple[Path, StoredBasis], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, stored = cache
    basis = read_basis(str(folder), stored.digest)
    monkeypatch.chdir(folder)
    assert read_basis(".", stored.digest) is basis
    data = pickle.dumps(basis)
    assert len(data) < 500 and pickle.loads(data) is basis
    gone = weakref.ref(basis)
    del basis
    gc.collect()
    assert gone() is None, "nothing holds a basis that is not in use"
    again = pickle.loads(data)
    assert again.digest == stored.digest and read_basis(str(folder), stored.digest) is again


def test_an_object_store_has_bases(cache: tuple[Path, StoredBasis]) -> None:
    _, stored = cache
    remote = place("memory://bucket/cache")
    publish_basis(remote, stored)
    basis = read_basis(str(remote), stored.digest)
    assert torch.equal(basis.directions, stored.basis().directions) and pickle.loads(pickle.dumps(basis)) is basis
    with pytest.raises(CorruptError, match=r"memory://bucket/other/basis-.*the tail basis cannot be read"):
        read_basis("memory://bucket/other", stored.digest)


class Rows(Dataset[SparseTargets]):
    """Rows whose targets have the basis of a cache."""

    def __init__(self, basis: TailBasis) -> None:
        self.basis = basis

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(index))
        targets = SparseTargets.from_logits(logits, k=2)
        shaped = replace(targets, basis=self.basis, tail_coordinates=torch.full((3, RANK), float(index)))
        return {"labels": torch.tensor(index), "targets": shaped}


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_batches_of_workers_have_the_basis_of_this_process(cache: tuple[Path, StoredBasis], start: str) -> None:
    folder, stored = cache
    basis = read_basis(str(folder), stored.digest)
    context = multiprocessing.get_context(start)
    loader = DataLoader(Rows(basis), 2, collate_fn=collate, num_workers=1, multiprocessing_context=context)
    for number, batch in enumerate(loader):
        targets = batch["targets"]
        assert targets.basis is basis
        assert targets.tail_coordinates[1].eq(2 * number + 1).all()
