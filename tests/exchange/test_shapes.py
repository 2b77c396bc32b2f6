"""Exports with a tail shape: other programs can use it, and what is read back is what the cache holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from logit_cache import LogitCache
from logit_cache.base.errors import CorruptError, RecipeError
from logit_cache.exchange.basis_table import BASIS_TABLE, read_basis_table
from logit_cache.exchange.export import export_cache
from logit_cache.exchange.importing import import_cache
from logit_cache.exchange.packing import pack_rows
from logit_cache.exchange.records import read_sequences
from logit_cache.store.basis_file import StoredBasis
from logit_cache.targets.basis import TailBasis, TailProjection
from logit_cache.targets.sparse_targets import SparseTargets
from logit_cache.targets.supports import Support

from tests.helpers.shapes import ShapedCache
from tests.helpers.synthetic import VOCAB, make_cache

RANK = 3


def some_stored(softcap: float | None = None) -> StoredBasis:
    generator = torch.Generator().manual_seed(0)
    basis = TailBasis(
        3 * torch.randn(VOCAB, generator=generator), torch.randn(VOCAB, RANK, generator=generator), softcap
    )
    projection = TailProjection(torch.randn(9, generator=generator), torch.randn(RANK, 9, generator=generator))
    basis = replace(basis, prediction=torch.randn(RANK + 1, RANK, generator=generator))
    return StoredBasis.quantised(basis, projection, 2.0**-8, [0.03, 0.02, 0.01])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ShapedCache:
    folder = tmp_path_factory.mktemp("exchange") / "cache"
    make_cache(folder, k=8)
    return ShapedCache(folder, some_stored())


def read_back(cache: LogitCache, folder: Path, basis: TailBasis) -> SparseTargets:
    files = sorted(folder.glob("data-*"))
    rows = pack_rows(read_sequences(files, "auto", VOCAB), cache.row_length, 0)
    return SparseTargets.stack([row.targets(cache.manifest.codec, basis) for row in rows])


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_targets_come_back_bit_for_bit(cache: ShapedCache, tmp_path: Path, form: str) -> None:
    export_cache(cache, tmp_path / "out", form)
    about = json.loads((tmp_path / "out/exchange.json").read_text())
    stored = read_basis_table(tmp_path / "out" / BASIS_TABLE, about["tail_basis"])
    for name, values in some_stored().arrays().items():
        assert np.array_equal(values, stored.arrays()[name]) and values.dtype == stored.arrays()[name].dtype, name
    basis = stored.basis()
    assert basis.digest == cache.basis.digest
    assert torch.equal(basis.offset, cache.basis.offset) and torch.equal(basis.directions, cache.basis.directions)
    found, expected = read_back(cache, tmp_path / "out", basis), cache.batch(np.arange(len(cache)))["targets"]
    for name in ("token_ids", "log_probs", "tail_curve", "mask", "tail_coordinates", "label_log_probs"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.knots, found.vocab_size) == (expected.knots, expected.vocab_size)
    assert torch.equal(found.dense(2.0), expected.dense(2.0))


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_another_program_computes_the_tail(tmp_path: Path, softcap: float | None) -> None:
    """From the files alone, with pyarrow and NumPy, by the formulas of `basis_table`."""
    make_cache(tmp_path / "cache")
    cache = ShapedCache(tmp_path / "cache", some_stored(softcap))
    export_cache(cache, tmp_path / "out", "parquet")
    table = pq.read_table(tmp_path / "out" / BASIS_TABLE)
    about = json.loads(table.schema.metadata[b"tail_basis"])
    offset, directions = table["offset"].to_numpy(), np.array(table["directions"].to_pylist())
    row = pq.read_table(sorted((tmp_path / "out").glob("data-*"))).to_pylist()[2]
    targets = cache.batch([2])["targets"][0]
    dense = targets.dense(1.0)
    for position in np.flatnonzero(targets.mask):
        logits = offset + directions @ np.array(row["tail_coordinates"][position])
        if about["softcap"] is not None:
            logits = about["softcap"] * np.tanh(logits / about["softcap"])
        logits[row["token_ids"][position]] = -np.inf
        tail = np.exp(row["tail_curve"][position][-1]) * np.exp(logits) / np.exp(logits).sum()
        head = np.exp(row["log_probs"][position])
        tail[row["token_ids"][position]] = head
        # Float32 logits of up to 20 nats, in a few roundings; the head is normalised by itself and the tail.
        np.testing.assert_allclose(dense[position].numpy(), tail, rtol=8 * 20 * 2.0**-23)
        assert row["label_log_probs"][position] == float(targets.label_log_probs[position])  # type: ignore[index]
    center, projection = np.array(about["center"], np.float32), np.array(about["projection"], np.float32)
    assert np.array_equal(center, some_stored().center[0]) and np.array_equal(projection, some_stored().projection)


def test_an_import_is_the_same_cache_and_its_loss_exact(cache: ShapedCache, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out", "parquet")
    back = import_cache([tmp_path / "out"], tmp_path / "back")
    one, two = (source.batch(np.arange(len(cache))) for source in (cache, back))
    assert torch.equal(one["targets"].token_ids, two["targets"].token_ids)
    values = one["targets"].label_log_probs
    assert values is not None
    assert back.teacher_loss == pytest.approx(-float(values.double().sum()) / cache.positions, rel=1e-6)


def test_a_cache_with_a_shape_keeps_it_through_an_export(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", support=Support("topk", k=8), tail_rank=5)
    export_cache(cache, tmp_path / "out", "parquet")
    back = import_cache([tmp_path / "out"], tmp_path / "back")
    one, two = (source.batch(np.arange(len(cache)))["targets"] for source in (cache, back))
    assert one.tail_coordinates is not None and two.tail_coordinates is not None
    assert one.basis is not None and two.basis is not None and one.basis.digest == two.basis.digest
    assert torch.equal(one.tail_coordinates, two.tail_coordinates)


def test_axolotl_has_no_shape(cache: ShapedCache, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out", "axolotl")
    assert not (tmp_path / "out" / BASIS_TABLE).exists()
    assert "tail_basis" not in json.loads((tmp_path / "out/exchange.json").read_text())


def test_a_broken_basis_is_not_imported(cache: ShapedCache, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out", "parquet")
    file, about = tmp_path / "out" / BASIS_TABLE, tmp_path / "out/exchange.json"
    data, facts = file.read_bytes(), about.read_text()
    rng = np.random.default_rng(0)
    for bit in rng.integers(0, 8 * len(data), 60).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(damaged))
        try:
            stored = read_basis_table(file, cache.basis.digest)
        except CorruptError as error:
            assert str(error).startswith(f"{file}: not the tail basis") and len(str(error).splitlines()) == 1
        else:
            assert stored.digest == cache.basis.digest
    for content in (b"", data[:100], None):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(CorruptError, match=r"tail_basis\.parquet: not the tail basis"):
            import_cache([tmp_path / "out"], tmp_path / "back")
    file.write_bytes(data)
    about.write_text(facts.replace(cache.basis.digest, "0" * 64))
    with pytest.raises(CorruptError, match="its digest is another one"):
        import_cache([tmp_path / "out"], tmp_path / "back")
    about.write_text(json.dumps({**json.loads(facts), "tail_basis": 1}))
    with pytest.raises(CorruptError, match=r"exchange\.json: not .* export the cache again"):
        import_cache([tmp_path / "out"], tmp_path / "back")


def test_coordinates_that_cannot_be_are_named(cache: ShapedCache, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out", "jsonl")
    file = next((tmp_path / "out").glob("data-*"))
    lines = file.read_text().splitlines()
    record = json.loads(lines[1])
    position = next(place for place, entry in enumerate(record["tail_coordinates"]) if entry)

    def refused(name: str, value: object) -> str:
        changed = [*record[name]]
        changed[position] = value
        file.write_text("\n".join([lines[0], json.dumps({**record, name: changed}), *lines[2:]]))
        with pytest.raises(RecipeError) as caught:
            import_cache([tmp_path / "out"], tmp_path / "back")
        return str(caught.value)

    assert "line 2" in refused("tail_coordinates", [1.0, float("nan"), 0.0])
    assert "line 2" in refused("tail_coordinates", [1.0, 2.0])
    assert "line 2" in refused("tail_coordinates", ["x", 1.0, 2.0])
    assert "line 2" in refused("tail_coordinates", 3.0)
    assert "line 2" in refused("label_log_probs", float("inf"))
    assert "line 2" in refused("label_log_probs", 0.5)
    file.write_text("\n".join([lines[0], json.dumps({**record, "label_log_probs": [0.0]}), *lines[2:]]))
    with pytest.raises(RecipeError, match="label_log_probs has 1 entries"):
        import_cache([tmp_path / "out"], tmp_path / "back")


def test_labels_that_are_not_known_everywhere(cache: ShapedCache, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out", "jsonl")
    file = next((tmp_path / "out").glob("data-*"))
    sequences = list(read_sequences([file], "jsonl", VOCAB))
    without = [replace(sequences[0], label_log_probs=None), *sequences[1:]]
    rows = [row.targets(cache.manifest.codec, cache.basis) for row in pack_rows(without, cache.row_length, 0)]
    assert rows[0].label_log_probs is None and rows[1].label_log_probs is not None
    assert SparseTargets.stack(rows).label_log_probs is None
