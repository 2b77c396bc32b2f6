"""A second reader of the format, written from pipeline/README.md alone: zarr-python, pyarrow and NumPy, nothing of this
library.

Each part names the section of the specification that it implements. The test holds it against LogitCache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
import zarr
from logit_cache import LogitCache
from logit_cache.stages.app import main

from tests.helpers.tiny import make_recipe
from tests.store.test_golden import CAPTURED, KINDS, folder_of

Array = np.ndarray[Any, np.dtype[Any]]


def digest(value: Any) -> str:
    """Section "Digests"."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def group_arrays(folder: Path | zarr.storage.ZipStore) -> dict[str, Array]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: array[:] for name, array in zarr.open_group(folder, mode="r").arrays()}


class SecondReader:
    """All rows of a cache, decoded."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.manifest = json.loads((cache / "manifest.json").read_bytes())
        assert self.manifest["format_version"] == 4
        assert self.manifest["identity_digest"] == digest(self.manifest["identity"])
        self.codec = self.manifest["codec"]
        self.support = self.codec["support"]
        self.has_head = self.support["name"] != "sampled"
        self.has_samples = self.support["name"] in ("threshold", "sampled")
        self.samples_have_levels = len(self.codec["knots"]) > 1
        self.read_corpus()
        self.read_codebook()
        self.read_basis()
        self.read_rows()

    def read_corpus(self) -> None:
        """Section "Corpus"."""
        folder = self.cache / "corpus"
        prepared = (folder / "prepared.json").read_bytes()
        assert hashlib.sha256(prepared).hexdigest() == self.manifest["prepared_sha256"]
        files = json.loads(prepared)["files"]
        portions = json.loads((folder / "portions.json").read_bytes())
        for name, facts in [*files.items(), *((portion["name"], portion) for portion in portions)]:
            data = (folder / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["size"], facts["sha256"])
        tables = [pa.ipc.open_stream((folder / portion["name"]).read_bytes()).read_all() for portion in portions]
        assert [table.num_rows for table in tables] == [portion["rows"] for portion in portions]
        table, length = pa.concat_tables(tables), self.manifest["layout"]["row_length"]
        stored = {
            name: np.array(table[name].combine_chunks().flatten().to_pylist()).reshape(-1, length)
            for name in table.schema.names
            if name != "crc32c"
        }
        segments = np.cumsum(stored.pop("document_starts"), 1)
        segments[stored.pop("padding", np.zeros(segments.shape, bool))] = -1
        columns = {"input_ids": stored.pop("input_ids"), "segment_ids": segments, **stored}
        columns = {name: values.astype("<i4") for name, values in columns.items()}
        self.columns = columns
        self.input_ids, self.segment_ids = columns["input_ids"], columns["segment_ids"]
        row_bytes = [b"".join(part[row].tobytes() for part in columns.values()) for row in range(len(segments))]
        assert [google_crc32c.value(data) for data in row_bytes] == table["crc32c"].to_pylist()
        first = 0
        for portion in portions:
            rows = row_bytes[first : first + portion["rows"]]
            assert hashlib.sha256(b"".join(rows)).hexdigest() == portion["digest"]
            first += portion["rows"]
        found = [[portion["rows"], portion["digest"]] for portion in portions]
        assert digest(found) == json.loads(prepared)["digest"] == self.manifest["identity"]["corpus"]
        if "labels" in columns:
            self.labels = columns["labels"].astype(np.int64)
        else:
            follows = self.segment_ids[:, 1:] == self.segment_ids[:, :-1]
            if "loss_mask" in columns:
                follows &= columns["loss_mask"][:, 1:] != 0
            self.labels = np.full(self.input_ids.shape, -100, np.int64)
            self.labels[:, :-1] = np.where(follows, self.input_ids[:, 1:], -100)
        real = self.manifest["identity"].get("targets_on") == "real"
        self.mask = self.segment_ids != -1 if real else self.labels != -100

    def read_codebook(self) -> None:
        """Section "Codebook"."""
        vocab_size = self.codec["vocab_size"]
        self.order, self.lists = np.arange(vocab_size), {}
        if self.codec["codebook"] is None:
            return
        arrays = group_arrays(self.cache / f"codebook-{self.codec['codebook'][:12]}.zarr")
        sha = hashlib.sha256(str(vocab_size).encode())
        for name in sorted(arrays):
            sha.update(name.encode() + arrays[name].astype("<u4").tobytes())
        assert sha.hexdigest() == self.codec["codebook"]
        first, contexts, lengths, entries = (
            arrays[n][0, :-1].astype(int) for n in ("order", "contexts", "lengths", "entries")
        )
        self.order = np.concatenate([first, np.setdiff1d(np.arange(vocab_size), first)])
        ends = np.cumsum(lengths)
        for context, length, end in zip(contexts, lengths, ends, strict=True):
            self.lists[context] = self.order[entries[end - length : end]]

    def read_basis(self) -> None:
        """Section "Tail basis"."""
        self.shape = self.codec["coordinates"]
        if self.shape is None:
            return
        self.basis = arrays = group_arrays(self.cache / f"basis-{self.shape['basis'][:12]}.zarr")
        sha = hashlib.sha256()
        for name in sorted(arrays):
            sha.update(f"{name} {list(arrays[name].shape)}".encode() + arrays[name].tobytes())
        assert sha.hexdigest() == self.shape["basis"]
        assert arrays["directions"].shape == (self.shape["rank"], self.codec["vocab_size"])
        self.offset = (arrays["offset"][0] * arrays["offset_step"][0].astype(float)).astype(np.float32)
        self.directions = (arrays["directions"] * arrays["direction_steps"].T.astype(float)).astype(np.float32).T

    def coordinates(self, steps: Array, head: list[int]) -> Array:
        """Section "Coordinates"."""
        z = steps.astype(float) * self.shape["step"]
        if self.shape["predicted"]:
            mean = self.directions[head].mean(0, dtype=float) if head else np.zeros(self.shape["rank"])
            z += self.basis["prediction"][0] + mean @ self.basis["prediction"][1:].astype(float)
        return z.astype(np.float32)

    def token_of(self, code: int, context: int) -> int:
        listed = self.lists.get(context, ())
        return int(listed[code] if code < len(listed) else self.order[code - len(listed)])

    def shard(self, number: int, start: int, stop: int) -> dict[str, Array]:
        """Sections "Shards" and "Commit records"."""
        record = json.loads((self.cache / f"shards/{number:05}.json").read_bytes())
        assert record.pop("record_sha256") == digest(record)
        assert (record["shard"], record["rows"]) == (number, [start, stop])
        assert record["identity_digest"] == self.manifest["identity_digest"]
        assert record["positions"] == self.mask[start:stop].sum()
        rows = np.stack([self.columns[name][start:stop] for name in self.columns], 1)
        assert record["rows_sha256"] == hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest()
        assert record["labels"] == (self.labels[start:stop] != -100).sum()
        file = self.cache / f"shards/{number:05}.zarr.zip"
        data, begin, length = file.read_bytes(), record["index"]["offset"], record["index"]["length"]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record["size"], record["sha256"])
        assert hashlib.sha256(data[begin : begin + length]).hexdigest() == record["index"]["sha256"]
        store = zarr.storage.ZipStore(file, mode="r")
        arrays = group_arrays(store)
        names = zarr.open_group(store, mode="r")["index"].attrs["arrays"]
        index = arrays.pop("index")
        assert data[begin : begin + length - 4] == index.tobytes()
        assert set(names) == set(arrays)
        for row in index.reshape(-1, len(names), 3).tolist():
            for name, (offset, size, checksum) in zip(names, row, strict=True):
                chunk = data[offset : offset + size]
                assert int.from_bytes(chunk[-4:], "little") == checksum == google_crc32c.value(chunk[:-4]), name
        return arrays

    def read_rows(self) -> None:
        rows, length = self.input_ids.shape
        self.signals: dict[str, Array] = {}
        self.entries: list[list[tuple[list[int], list[float], list[int]]]] = []
        self.z = np.zeros((rows, length, 0 if self.shape is None else self.shape["rank"]), np.float32)
        self.label_log_probs = np.zeros((rows, length))
        self.teacher_losses = np.zeros(rows)
        self.curve = np.full((rows, length, len(self.codec["knots"])), -np.inf)
        shard_rows = self.manifest["layout"]["shard_rows"]
        for number, start in enumerate(range(0, rows, shard_rows)):
            stop = min(start + shard_rows, rows)
            arrays = self.shard(number, start, stop)
            self.compare_text(arrays, start, stop)
            for row in range(start, stop):
                self.read_row(row, {name: values[row - start] for name, values in arrays.items()})
            for signal in self.manifest["identity"]["signals"][1:]:
                self.read_signal(signal, arrays, rows, start, stop)

    def compare_text(self, arrays: dict[str, Array], start: int, stop: int) -> None:
        """Section "Text"."""
        assert self.manifest["identity"]["columns"] == list(self.columns)
        text: dict[str, Array] = {"segment_ids": np.cumsum(arrays["segment_steps"], 1)}
        if self.codec["profile"] == "fast":
            text["input_ids"] = arrays["input_ids"]
        else:
            text["input_ids"] = np.empty(arrays["input_codes"].shape, np.int64)
            for row, codes in enumerate(arrays["input_codes"].tolist()):
                context = 0
                for position, code in enumerate(codes):
                    context = text["input_ids"][row, position] = self.token_of(code, context)
        if "loss_mask" in self.columns:
            text["loss_mask"] = np.cumsum(arrays["loss_steps"], 1)
        if "labels" in self.columns:
            text["labels"] = arrays["labels"]
        for name, values in self.columns.items():
            np.testing.assert_array_equal(values[start:stop], text.pop(name))
        assert not text

    def read_signal(self, signal: dict[str, Any], arrays: dict[str, Array], rows: int, start: int, stop: int) -> None:
        """Section "Signals"."""
        name, values = signal["name"], arrays[signal["name"]].astype(np.float32)
        if signal["codec"] == "int8":
            values = values * arrays[name + ".scale"].astype(np.float32)[..., None]
        assert values.shape[2:] == tuple(signal["shape"])
        self.signals.setdefault(name, np.empty((rows, *values.shape[1:]), np.float32))[start:stop] = values

    def read_row(self, row: int, stored: dict[str, Array]) -> None:
        """Section "Entries"."""
        places = dict.fromkeys(("codes", "top_steps", "rest_steps", "token_ids", "levels", "draws"), 0)

        def take(name: str, count: int) -> list[int]:
            values = stored[name][places[name] : places[name] + count]
            places[name] += count
            return [int(value) for value in values]

        positions = []
        for position in range(self.input_ids.shape[1]):
            has_target = bool(self.mask[row, position])
            heads = (
                int(stored["head_counts"][position])
                if "head_counts" in stored
                else self.support.get("k", 0) * has_target
            )
            samples = int(stored["sample_counts"][position]) if self.has_samples else 0
            leveled = heads + samples if self.samples_have_levels else heads
            if self.codec["profile"] == "fast":
                ids, levels = take("token_ids", heads + samples), take("levels", leveled)
            else:
                steps = take("top_steps", min(leveled, 8))
                steps += take("rest_steps", leveled - len(steps))
                levels = [int(level) for level in np.cumsum(steps)]
                codes = take("codes", heads + samples)
                for rank in range(1, heads + samples):
                    begins = (rank == 1 and heads > 0) or rank == heads or (rank < leveled and steps[rank] > 0)
                    codes[rank] += 0 if begins else codes[rank - 1]
                ids = [self.token_of(code, int(self.input_ids[row, position])) for code in codes]
            draws = take("draws", samples) if self.has_samples else []
            log_head, log_tail = self.masses(int(stored["head_mass"][position]) if self.has_head else None, sum(draws))
            log_probs = self.log_probs(levels, heads, log_head)
            log_probs += [np.log(count) + log_tail - np.log(sum(draws)) for count in draws[len(levels) - heads :]]
            positions.append((ids, log_probs, [0] * heads + draws))
            if has_target and self.shape is not None:
                self.z[row, position] = self.coordinates(stored["coordinates"][position], ids[:heads])
            self.read_label(row, position, stored, ids[:leveled], log_probs, log_tail)
            if has_target:
                self.curve[row, position] = self.tail_curve(log_tail, stored, position)
        self.entries.append(positions)
        if self.codec["label_log_probs"]:
            self.teacher_losses[row] = stored["teacher_loss"][0]

    def read_label(
        self, row: int, position: int, stored: dict[str, Array], ids: list[int], log_probs: list[float], tail: float
    ) -> None:
        """Section "Labels' log-probabilities"."""
        label = int(self.labels[row, position])
        if not self.codec["label_log_probs"] or label == -100 or not self.mask[row, position]:
            return
        if label in ids:
            self.label_log_probs[row, position] = log_probs[ids.index(label)]
        else:
            below = -self.log_probs([int(stored["label_levels"][position])], 0, 0.0)[0]
            self.label_log_probs[row, position] = (0.0 if tail == -np.inf else tail) - below

    def masses(self, head_mass: int | None, draws: int) -> tuple[float, float]:
        """Section "Masses": log of the head's and of the tail's probability."""
        if head_mass is None:
            return -np.inf, 0.0
        if head_mass == 32767:
            return 0.0, -np.inf
        log_odds = head_mass * self.codec["head_mass_step"]
        if self.has_samples:
            tau = self.support["tau"]
            tail = min(max(draws - 0.5, 0.5) * tau, 1 - tau / 4)
            log_odds += np.log1p(-tail) - np.log(tail)
        return -np.logaddexp(0, -log_odds), -np.logaddexp(0, log_odds)

    def log_probs(self, levels: list[int], heads: int, log_head: float) -> list[float]:
        """Section "Levels"."""
        a, b = self.codec["level_step"], self.codec["level_growth"]
        below = [a / b * np.expm1(b * level) for level in levels]
        if heads == 0:
            return [-x for x in below]
        offset = log_head - np.log(sum(np.exp(-x) for x in below[:heads]))
        return [offset - x for x in below]

    def tail_curve(self, log_tail: float, stored: dict[str, Array], position: int) -> list[float]:
        """Section "Tail curve"."""
        knots = self.codec["knots"]
        if log_tail == -np.inf:
            return [-np.inf] * len(knots)
        known = [1.0, log_tail]
        found = {1.0: log_tail}
        for place, knot in enumerate(sorted((k for k in knots if k != 1.0), key=lambda knot: (abs(knot - 1), knot))):
            weights = self.codec["tail_prediction"][place] if self.codec["tail_prediction"] else []
            predicted = sum(weight * value for weight, value in zip(weights, known, strict=False))
            found[knot] = predicted + int(stored["tail_steps"][position, place]) * self.codec["tail_step"]
            known.append(found[knot])
        return [found[knot] for knot in knots]


def compare(folder: Path) -> None:
    second, cache = SecondReader(folder), LogitCache(folder)
    batch = cache.batch(np.arange(len(cache)))
    for name in ("input_ids", "segment_ids", "labels"):
        np.testing.assert_array_equal(batch[name].numpy(), getattr(second, name))  # type: ignore[literal-required]
    targets = batch["targets"]
    np.testing.assert_array_equal(targets.mask.numpy(), second.mask)
    np.testing.assert_allclose(targets.tail_curve.numpy(), second.curve, atol=1e-5, rtol=1e-6)
    if targets.tail_coordinates is None:
        assert second.shape is None
    else:
        assert targets.basis is not None
        np.testing.assert_allclose(targets.tail_coordinates.numpy(), second.z, atol=1e-5, rtol=1e-6)
        np.testing.assert_array_equal(targets.basis.offset.numpy(), second.offset)
        np.testing.assert_array_equal(targets.basis.directions.numpy(), second.directions)
        if targets.basis.softcap is None:
            assert np.isinf(second.basis["softcap"])
        else:
            assert second.basis["softcap"] == np.float32(targets.basis.softcap)
    if second.codec["label_log_probs"]:
        assert targets.label_log_probs is not None
        np.testing.assert_allclose(targets.label_log_probs.numpy(), second.label_log_probs, atol=1e-5, rtol=1e-6)
        np.testing.assert_array_equal(cache.teacher_losses(), second.teacher_losses.astype(np.float32))
        exact = second.teacher_losses * ((second.labels != -100) & second.mask).sum(-1)
        assert exact.sum() == pytest.approx(cache.teacher_loss * (second.labels != -100).sum(), rel=1e-6)
    for row, positions in enumerate(second.entries):
        for position, (ids, log_probs, draws) in enumerate(positions):
            width = len(ids)
            assert targets.token_ids[row, position].tolist() == ids + [-1] * (targets.token_ids.shape[-1] - width)
            np.testing.assert_allclose(
                targets.log_probs[row, position, :width].numpy(), log_probs, atol=1e-5, rtol=1e-6
            )
            if targets.draws is not None:
                assert targets.draws[row, position, :width].tolist() == draws
    for name, values in second.signals.items():
        np.testing.assert_array_equal(batch[name].numpy(), values)  # type: ignore[literal-required]
    assert second.signals.keys() == cache.signals.keys()


@pytest.mark.parametrize("kind", [*KINDS, *CAPTURED])
def test_a_reader_written_from_the_specification_reads_the_kept_caches(kind: str, tmp_path: Path) -> None:
    shutil.copytree(folder_of(kind), tmp_path / "cache")
    compare(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("targets_on", ["real", "masked"])
def test_it_reads_masked_rows_and_signals(targets_on: str, tmp_path: Path) -> None:
    signals = ["hidden.1:float16", "hidden.3:direction", "attention.0", "qk.2"]
    recipe = make_recipe(
        tmp_path,
        corpus__objective="masked",
        cache__signals=signals,
        cache__targets_on=targets_on,
        cache__tail_rank=4,
    )
    for command in ("prepare", "cache"):
        assert main([command, str(recipe)]) == 0
    compare(tmp_path / "run/cache")
