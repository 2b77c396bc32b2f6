"""What is learned before the first shard: from the whole corpus, once, and the same wherever a run stops."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cache.base.errors import CorruptError
from logit_cache.capture import learning
from logit_cache.capture.learning import LEAST_POSITIONS, MOST_POSITIONS, SHARE, learning_rows
from logit_cache.capture.shard_pass import fill_shards
from logit_cache.capture.teacher_pass import TeacherPass
from logit_cache.corpus.row_writer import RowWriter
from logit_cache.corpus.rows import PackedRows
from logit_cache.models.teacher import Teacher, load_teacher
from logit_cache.recipe.paths import CachePaths
from logit_cache.recipe.schema import TeacherConfig
from logit_cache.stages.app import main
from logit_cache.store import writer as writer_module
from logit_cache.store.basis_file import StoredBasis, read_stored_basis
from logit_cache.store.codec import TargetCodec
from logit_cache.store.coordinates import CoordinateCodec
from logit_cache.store.manifest import Manifest
from logit_cache.store.reader import LogitCache
from logit_cache.store.writer import CacheWriter
from logit_cache.targets.basis import TailBasis, TailProjection
from logit_cache.targets.supports import Support

from tests.conftest import files_of
from tests.helpers.tiny import WORDS, make_recipe, make_teacher

RANK, STEP = 6, 0.1
KNOTS = (0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared and cached, with a tail shape."""
    file = make_recipe(tmp_path_factory.mktemp("shape"), cache__tail_rank=RANK, cache__tail_step=STEP)
    assert main(["prepare", str(file)]) == 0
    assert main(["cache", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def teacher(recipe: Path) -> Teacher:
    folder = str(recipe.parent / "teacher")
    return load_teacher(folder, TeacherConfig(model=folder, dtype="float32", device="cpu"))


def prepared(recipe: Path, folder: Path) -> list[str]:
    """The rows of a run in another directory, nothing cached: the arguments of commands on it."""
    for side in ("cache", "heldout"):
        shutil.copytree(recipe.parent / "run" / side / "corpus", folder / side / "corpus")
    return [str(recipe), "--set", f"run_dir={folder}"]


def same_caches(recipe: Path, folder: Path) -> None:
    for side in ("cache", "heldout"):
        assert files_of(folder / side) == files_of(recipe.parent / "run" / side)


def digest_of(cache: LogitCache) -> str:
    shape = cache.manifest.codec.coordinates
    assert shape is not None and shape.basis is not None
    return shape.basis.digest


@given(rows=st.integers(0, 3_000_000), length=st.integers(2, 4096))
def test_rows_to_learn_from_are_spread_over_the_whole_corpus(rows: int, length: int) -> None:
    chosen = learning_rows(rows, length)
    assert np.array_equal(chosen, learning_rows(rows, length))
    assert (np.diff(chosen) > 0).all() and (chosen >= 0).all() and (chosen < rows).all()
    wanted = min(max(rows * length // SHARE, LEAST_POSITIONS), MOST_POSITIONS, rows * length)
    assert wanted <= len(chosen) * length < wanted + length
    if rows:
        parts = chosen * len(chosen) // rows
        assert np.abs(parts - np.arange(len(chosen))).max() <= 1, "one row of each part of the corpus"


def test_coordinates_are_those_of_the_teachers_hidden_states(recipe: Path, teacher: Teacher) -> None:
    """The held-out cache has none, so that the teacher's own divergence from it is 0."""
    caches = [LogitCache(recipe.parent / "run" / side) for side in ("cache", "heldout")]
    assert caches[1].manifest.codec.coordinates is None
    for cache in caches[:1]:
        batch = cache.batch(np.arange(len(cache)))
        targets = batch["targets"]
        projection = read_stored_basis(cache.path, digest_of(cache)).to_coordinates
        expected = projection.coordinates(teacher.hidden(batch["input_ids"], batch["segment_ids"]))
        assert targets.basis is not None and targets.basis.digest == digest_of(cache)
        assert targets.tail_coordinates is not None and targets.tail_coordinates.shape[-1] == RANK
        error = (targets.tail_coordinates - expected).abs()
        assert error[targets.mask].max() <= STEP / 2 * (1 + 1e-4)
        assert (targets.tail_coordinates[~targets.mask] == 0).all()
        # Another position's coordinates would not do.
        assert (targets.tail_coordinates.roll(1, 1) - expected).abs()[targets.mask].mean() > STEP


@pytest.mark.parametrize("batch_rows", [1, 5])
def test_the_batch_size_changes_no_byte(recipe: Path, tmp_path: Path, batch_rows: int) -> None:
    assert main(["cache", *prepared(recipe, tmp_path), "--set", f"teacher.batch_rows={batch_rows}"]) == 0
    same_caches(recipe, tmp_path)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_division_into_tasks_changes_no_byte(recipe: Path, tmp_path: Path, order: tuple[int, int]) -> None:
    arguments = prepared(recipe, tmp_path)
    for task in order:
        assert main(["cache", *arguments, "--task", str(task), "--num-tasks", "2"]) == 0
    same_caches(recipe, tmp_path)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", ["publish_learned", "create_json", "publish_file"])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_killed_run_continues_to_the_same_bytes(
    recipe: Path, tmp_path: Path, moment: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, calls = prepared(recipe, tmp_path), []
    real = getattr(writer_module, moment)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > call:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, moment, interrupted)
        with pytest.raises(Killed):
            main(["cache", *arguments])
    assert main(["cache", *arguments]) == 0
    same_caches(recipe, tmp_path)


def test_the_basis_is_there_before_the_manifest_and_learned_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, begun, fits = prepared(recipe, tmp_path), [], []
    create, fit = writer_module.create_json, learning.learn_basis

    def noted(path: Any, value: dict[str, Any]) -> bool:
        if path == tmp_path / "cache/manifest.json":
            digest = value["codec"]["coordinates"]["basis"]
            assert value["identity"]["codec"]["coordinates"] == {
                "rank": RANK,
                "step": STEP,
                "predicted": True,
                "basis": digest,
            }
            begun.append(read_stored_basis(path.parent, digest).digest)
        return bool(create(path, value))

    def counted(*args: Any, **kwargs: Any) -> Any:
        fits.append(1)
        return fit(*args, **kwargs)

    monkeypatch.setattr(writer_module, "create_json", noted)
    monkeypatch.setattr(learning, "learn_basis", counted)
    assert main(["cache", *arguments, "--task", "1", "--num-tasks", "2"]) == 0
    assert main(["cache", *arguments, "--task", "0", "--num-tasks", "2"]) == 0
    assert len(begun) == len(fits) == 1, "the second task fits no basis, and the held-out cache has none"


def other_basis(basis: StoredBasis) -> StoredBasis:
    return replace(basis, offset=basis.offset + 1)


def test_of_two_tasks_that_begin_together_the_first_manifest_counts(recipe: Path, tmp_path: Path) -> None:
    prepared(recipe, tmp_path)
    done = LogitCache(recipe.parent / "run/cache")
    basis = read_stored_basis(done.path, digest_of(done))
    codec, fresh = done.manifest.codec, replace(done.manifest.codec, codebook=None, tail_prediction=())
    assert codec.coordinates is not None
    unlearned = done.manifest.with_codec(replace(fresh, coordinates=replace(codec.coordinates, basis=None)))
    one, two = (CacheWriter(tmp_path / "cache", unlearned) for _ in range(2))
    one.begin(codec, basis)
    other = other_basis(basis)
    two.begin(replace(codec, coordinates=replace(codec.coordinates, basis=other.basis())), other)
    assert one.manifest.digest == two.manifest.digest == done.manifest.digest
    for writer in (one, two):
        kept = writer.basis()
        assert kept is not None and kept.digest == basis.digest
    assert [folder.name for folder in tmp_path.glob("cache/basis-*")] == [
        CachePaths(tmp_path / "cache").basis(basis.digest).name
    ]


def test_what_a_killed_task_learned_goes_once_the_cache_has_begun(recipe: Path, tmp_path: Path) -> None:
    arguments = prepared(recipe, tmp_path)
    left = tmp_path / "cache" / "basis-000000000000.zarr"
    (left / "offset").mkdir(parents=True)
    assert main(["cache", *arguments]) == 0
    assert not left.exists()
    same_caches(recipe, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [("tail_rank", 5, "rank is 6 in the cache and 5 now"), ("tail_step", 0.2, "step is 0.1 in the cache and 0.2 now")],
)
def test_another_rank_or_step_is_another_cache(
    recipe: Path, key: str, value: float, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(recipe.parent / "run")
    assert main(["cache", str(recipe), "--set", f"cache.{key}={value}"]) == 4
    assert f"codec.coordinates.{field}" in capsys.readouterr().err
    assert main(["cache", str(recipe), "--set", "cache.tail_rank=0"]) == 4
    assert "codec.coordinates.rank is 6 in the cache and None now" in capsys.readouterr().err
    assert files_of(recipe.parent / "run") == before


def test_another_basis_is_another_cache(recipe: Path) -> None:
    done = LogitCache(recipe.parent / "run/cache")
    assert done.manifest.codec.coordinates is not None
    other = other_basis(read_stored_basis(done.path, digest_of(done)))
    codec = replace(done.manifest.codec, coordinates=replace(done.manifest.codec.coordinates, basis=other.basis()))
    assert done.manifest.with_codec(codec).digest != done.manifest.digest


@pytest.mark.parametrize("damage", ["missing", "changed", "other"])
def test_damage_to_the_basis_is_found_before_a_number_is_used(
    recipe: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(recipe.parent / "run", run)
    cache = LogitCache(run / "cache")
    folder = CachePaths(run / "cache").basis(digest_of(cache))
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage == "changed":
        chunk = next(
            file for file in sorted((folder / "directions").rglob("*")) if file.is_file() and "c" in file.parts
        )
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)
    else:
        writer_module.publish_learned(
            tmp_path / "other", other_basis(read_stored_basis(run / "cache", digest_of(cache)))
        )
        shutil.rmtree(folder)
        shutil.move(tmp_path / "other", folder)
    del cache
    arguments = [str(recipe), "--set", f"run_dir={run}"]
    for command in (
        ["inspect", str(run / "cache")],
        ["verify", str(run / "cache")],
        ["cache", *arguments],
        ["train", *arguments],
    ):
        assert main(command) == 4, command
        error = capsys.readouterr().err
        assert "the tail basis cannot be read" in error and str(folder) in error
    with pytest.raises(CorruptError):
        LogitCache(run / "cache")


@pytest.mark.parametrize("masked", [False, True])
def test_the_rank_is_at_most_the_hidden_size(tmp_path: Path, masked: bool) -> None:
    changes = {"corpus__objective": "masked"} if masked else {}
    recipe = make_recipe(tmp_path, cache__tail_rank=1000, **changes)
    assert main(["prepare", str(recipe)]) == 0
    assert main(["cache", str(recipe)]) == 0
    targets = LogitCache(tmp_path / "run/cache")[0]["targets"]
    assert targets.tail_coordinates is not None
    assert targets.tail_coordinates.shape[-1] == (24 if masked else 32)
    assert main(["verify", str(tmp_path / "run/cache"), "--teacher"]) == 0


def test_verify_with_the_teacher_finds_other_coordinates(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a cache whose coordinates are those of the position before."""
    arguments = prepared(recipe, tmp_path)
    real = TailProjection.coordinates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TailProjection, "coordinates", lambda self, hidden: real(self, hidden.roll(1, 0)))
        assert main(["cache", *arguments]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "cache")]) == 0
    assert main(["verify", str(tmp_path / "cache"), "--teacher"]) == 4
    output = capsys.readouterr()
    assert "coordinates of the tail's shape differ by" in output.out + output.err
    assert main(["verify", str(recipe.parent / "run/cache"), "--teacher"]) == 0


def test_a_teacher_spread_over_processes_or_offloaded_has_a_whole_output_layer(teacher: Teacher) -> None:
    """The weight comes out of the layer as it is, whatever holds it."""
    torch.manual_seed(0)
    width, layer = teacher.output_layer.weight.shape[1], teacher.output_layer
    module = torch.nn.Linear(width, WORDS)
    spread = replace(
        teacher, output_layer=replace(layer, weight=module.weight, bias=module.bias, module=module, scale=2.0)
    )
    whole = spread.whole_output_layer()
    hidden = torch.randn(5, width)
    assert whole.module is None
    assert whole.bias is not None and torch.equal(whole.bias, module.bias)
    # Of a bias, one rounding.
    torch.testing.assert_close(whole.logits(hidden), spread.output_layer.logits(hidden), rtol=1e-5, atol=1e-5)
    module.bias.data.zero_()
    assert torch.equal(spread.whole_output_layer().weight, module.weight)
    assert teacher.whole_output_layer() is layer


def exact_basis(teacher: Teacher, step: float = 1e-4) -> StoredBasis:
    """All coordinates of the hidden state: the shape is then the teacher's own."""
    layer = teacher.output_layer
    weight, bias = layer.weight.float(), 0.0 if layer.bias is None else layer.bias.float()
    center = torch.linspace(-0.1, 0.1, weight.shape[1])
    basis = TailBasis(layer.scale * (weight @ center + bias), layer.scale * weight, layer.softcap)
    return StoredBasis.quantised(basis, TailProjection(center, torch.eye(weight.shape[1])), step, step)


ARCHITECTURES = ["tied", "softcap", "divided", "bert", "distilbert"]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_coordinates_are_of_the_states_that_the_output_layer_reads(kind: str, teacher: Teacher) -> None:
    """With as many coordinates as the state has numbers, the target is the teacher's whole distribution, at every T."""
    from logit_cache.models.output_layer import OutputLayer
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DistilBertConfig,
        DistilBertForMaskedLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    common = {"vocab_size": 90, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    common |= {"intermediate_size": 32, "initializer_range": 0.5}
    torch.manual_seed(0)
    model: Any
    if kind == "tied":
        model = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=True))
    elif kind == "softcap":
        model = Gemma2ForCausalLM(
            Gemma2Config(**common, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0)
        )
    elif kind == "divided":
        model = GraniteForCausalLM(GraniteConfig(**common, logits_scaling=3.0))
    elif kind == "bert":
        model = BertForMaskedLM(BertConfig(**common))
    else:
        model = DistilBertForMaskedLM(DistilBertConfig(vocab_size=90, dim=16, n_layers=1, n_heads=2, hidden_dim=32))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = model.eval().requires_grad_(False)
    own = replace(teacher, model=model, output_layer=OutputLayer.of(model))
    run = TeacherPass(own, Support("topk", k=4), KNOTS, basis=exact_basis(own))
    ids = torch.randint(0, 90, (2, 12))
    segments = torch.zeros_like(ids)
    targets = run(ids, segments, ids, mask=torch.ones_like(ids, dtype=torch.bool)).targets
    logits = model(input_ids=ids).logits.double()
    for temperature in (1.0, 4.0 / 3, 2.0, 4.0):
        # 16 coordinates of size 4 at most, each direction off by half a step of 1e-4, and float32 sums.
        torch.testing.assert_close(
            targets.dense(temperature).double(), (logits / temperature).softmax(-1), rtol=2e-2, atol=1e-7
        )


def make_rows(folder: Path, ids: np.ndarray[Any, Any]) -> PackedRows:
    writer = RowWriter(CachePaths(folder).corpus, ids.shape[1])
    writer.write_rows(ids, np.zeros_like(ids), np.ones_like(ids))
    writer.commit({})
    return PackedRows(CachePaths(folder).corpus)


@pytest.mark.slow
def test_a_corpus_that_begins_in_another_language_is_as_good_as_a_shuffled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes and KL within 10 %; learned from the first rows alone they would be far off."""
    folder = make_teacher(tmp_path / "teacher", words=1000, layers=1)
    teacher = load_teacher(str(folder), TeacherConfig(model=str(folder), dtype="float32", device="cpu"))
    # What comes next depends most on the last word, as in a language.
    teacher.model.model.layers[0].self_attn.o_proj.weight.mul_(0.05)
    draw = np.random.default_rng(0)
    rows, length = 1000, 64
    words = draw.integers(1, 40, (rows, length))
    words[: rows // 10] += 490  # the first tenth has no word of the others
    words = words.astype(np.int32)
    codec = TargetCodec(Support("topk", k=8), KNOTS, 1000, coordinates=CoordinateCodec(8, 0.2, predicted=True))

    def figures(name: str, ids: np.ndarray[Any, Any]) -> tuple[float, float]:
        """Bytes per position, and KL(p || p^) at T = 2 over rows of the whole corpus."""
        corpus = make_rows(tmp_path / name, ids)
        fill_shards(
            teacher,
            corpus,
            CacheWriter(tmp_path / name, Manifest.create(teacher.identity, corpus, codec, 100, seed=0)),
            batch_rows=50,
        )
        cache = LogitCache(tmp_path / name)
        batch = cache.batch(np.arange(5, rows, 20))
        logits = teacher.output_layer.logits(teacher.hidden(batch["input_ids"], batch["segment_ids"]))
        log_p = (logits.double() / 2).log_softmax(-1)
        kl = (log_p.exp() * (log_p - batch["targets"].dense(2.0).double().log())).sum(-1)
        return cache.bytes / cache.positions, float(kl[batch["targets"].mask].mean())

    begins = figures("begins", words)
    shuffled = figures("shuffled", draw.permutation(words))
    assert begins == pytest.approx(shuffled, rel=0.1)
    monkeypatch.setattr(learning, "learning_rows", lambda rows, length: np.arange(100))
    first = figures("first", words)
    print(begins, shuffled, first)
    assert first[0] > 1.1 * shuffled[0] and first[1] > 1.1 * shuffled[1]
