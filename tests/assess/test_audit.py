"""`verify --teacher`: an honest cache passes, and every way to a wrong one is found by its numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logit_cache.assess.audit import audit_teacher, noise_limit
from logit_cache.capture.shard_pass import fill_shards
from logit_cache.capture.writers import open_writers
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.teacher import Teacher, load_teacher
from logit_cache.recipe.loading import load_recipe
from logit_cache.recipe.schema import TeacherConfig
from logit_cache.stages.app import main
from logit_cache.store.label_log_probs import LABEL_LEVELS, TEACHER_LOSS, LabelCodec
from logit_cache.store.levels import round_to_levels
from logit_cache.store.reader import LogitCache

from tests.helpers.tiny import make_recipe, make_teacher

SUPPORTS = ("topk", "topp", "threshold", "threshold at T = 1", "sampled")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = make_recipe(tmp_path_factory.mktemp("audit_teacher"), cache__draws=20)
    assert main(["prepare", str(file)]) == 0
    return file


def load(folder: Path, dtype: str = "float32") -> Teacher:
    return load_teacher(str(folder), TeacherConfig(model=str(folder), dtype=dtype, device="cpu"))


@pytest.fixture(scope="module")
def teacher(recipe: Path) -> Teacher:
    return load(recipe.parent / "teacher")


def cached_by(teacher: Teacher, recipe: Path, folder: Path, support: str) -> LogitCache:
    """What stage one writes of a teacher."""
    name, _, only = support.partition(" at ")
    plan = load_recipe(recipe, [f"run_dir={folder}", f"cache.support={name}", *(["cache.knots=[1.0]"] if only else [])])
    for side in ("cache", "heldout"):
        shutil.copytree(recipe.parent / "run" / side / "corpus", folder / side / "corpus")
    writer, corpus = open_writers(plan, teacher.facts)[0]
    fill_shards(teacher, corpus, writer, batch_rows=3)
    return LogitCache(folder / "cache")


def another_model(honest: Teacher, other: Teacher) -> Teacher:
    """It says that it is one teacher and is another."""
    return replace(other, identity=honest.identity)


class Shifted(Teacher):
    """Every position inside a document has the target of the position before it."""

    def hidden(self, input_ids: torch.Tensor, segment_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        hidden_BLD = super().hidden(input_ids, segment_ids, *rest)
        same_document_BL = segment_ids == segment_ids.roll(1, 1)
        return torch.where(same_document_BL[..., None], hidden_BLD.roll(1, 1), hidden_BLD)


class WithoutBoundaries(Teacher):
    def hidden(self, input_ids: torch.Tensor, segment_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        return super().hidden(input_ids, torch.zeros_like(segment_ids), *rest)


def slightly_other(teacher: Teacher, recipe: Path) -> Teacher:
    """The same weights but for a thousandth, as after a little more training."""
    other = load(recipe.parent / "teacher")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.mul_(1 + 1e-3 * torch.randn(weight.shape, generator=generator))
    return replace(other, output_layer=OutputLayer.of(other.model))


WRONG: dict[str, Callable[[Teacher, Path], Teacher]] = {
    "teacher": lambda teacher, recipe: another_model(teacher, load(make_teacher(recipe.parent / "other", seed=1))),
    "a little more training": lambda teacher, recipe: another_model(teacher, slightly_other(teacher, recipe)),
    "bfloat16": lambda teacher, recipe: another_model(teacher, load(recipe.parent / "teacher", "bfloat16")),
    "float16": lambda teacher, recipe: another_model(teacher, load(recipe.parent / "teacher", "float16")),
    "shift": lambda teacher, recipe: Shifted(**vars(teacher)),
    "document boundaries": lambda teacher, recipe: WithoutBoundaries(**vars(teacher)),
}


@pytest.mark.slow
@pytest.mark.parametrize("support", SUPPORTS)
def test_an_honest_cache_passes(teacher: Teacher, recipe: Path, tmp_path: Path, support: str) -> None:
    cache = cached_by(teacher, recipe, tmp_path, support)
    result = audit_teacher(cache, teacher)
    assert result.problems == [] and result.rows == 16 and result.positions > 200
    # In one piece or row by row: the same model, sums in another order.
    other = audit_teacher(cache, teacher, batch_rows=1)
    assert other.problems == [] and other.noise < noise_limit("float32", other.size) / 4


@pytest.mark.slow
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_cache_is_found(teacher: Teacher, recipe: Path, tmp_path: Path, support: str, wrong: str) -> None:
    result = audit_teacher(cached_by(WRONG[wrong](teacher, recipe), recipe, tmp_path, support), teacher)
    assert result.fields == () and result.problems, str(result)
    # Not by a hair: what is found this way is ten times what is allowed, or next to nothing is drawn again.
    assert result.noise > 10 * result.noise_limit or (result.redrawn is not None and result.redrawn < 0.5), str(result)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["levels", "losses"])
def test_other_log_probabilities_of_labels_are_found(
    teacher: Teacher, recipe: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing else of the cache is wrong."""
    encode = LabelCodec.encode

    def wrong(self: LabelCodec, *arguments: Any) -> Any:
        arrays = encode(self, *arguments)
        name, change = (LABEL_LEVELS, 1) if what == "levels" else (TEACHER_LOSS, 0.01)
        return {**arrays, name: np.where(arrays[name] > 0, arrays[name] + change, 0)}

    monkeypatch.setattr(LabelCodec, "encode", wrong)
    [problem] = audit_teacher(cached_by(teacher, recipe, tmp_path, "topk"), teacher).problems
    assert {"levels": "log-probabilities of labels", "losses": "the teacher's losses on rows"}[what] in problem


def test_rounding_hides_no_difference(teacher: Teacher, recipe: Path, tmp_path: Path) -> None:
    """The mean difference of levels is the mean difference of values, far below the step of a level."""
    rng = np.random.default_rng(0)
    below = rng.uniform(0, 8, 400_000)
    for size in (1e-3, 1e-2, 0.1):
        noise = rng.normal(0, size, len(below))
        found = np.abs(round_to_levels(below + noise) - round_to_levels(below)).mean()
        # A difference shows as a whole step, seldom: sd sqrt(step x size / n), here 3e-5 at most; 6 sd, and 3 % for steps that grow.
        assert float(found) == pytest.approx(
            float(np.abs(noise).mean()), rel=0.03, abs=6 * (0.3 * size / len(below)) ** 0.5
        )


@pytest.mark.parametrize("wrong", ["teacher", "dtype", "tokenizer", "vocabulary"])
def test_what_the_identity_tells_is_named(
    teacher: Teacher, recipe: Path, tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line; the last line of a wrong one says what to do."""
    cache = cached_by(teacher, recipe, tmp_path / "run", "topk").path
    assert main(["verify", str(cache), "--teacher", "--rows", "4"]) == 0
    assert "0.0% of the positions keep other tokens" in capsys.readouterr().out
    other = tmp_path / "other"
    if wrong == "dtype":
        manifest = LogitCache(cache).manifest
        other_dtype = {**manifest.identity["teacher"], "dtype": "bfloat16"}
        result = audit_teacher(LogitCache(cache), replace(teacher, identity=other_dtype))
        assert any(problem.startswith("dtype is float32") for problem in result.problems)
        return
    if wrong == "tokenizer":
        shutil.copytree(recipe.parent / "teacher", other)
        tokenizer = other / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace('"w1"', '"word1"'))
    else:
        make_teacher(other, seed=2, words=300 if wrong == "teacher" else 310)
    assert main(["verify", str(cache), "--teacher-model", str(other)]) == 4
    error = capsys.readouterr().err
    assert {"teacher": "weights is", "tokenizer": "tokenizer is", "vocabulary": "vocab_size is"}[wrong] in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1 and "Traceback" not in error


def test_a_renamed_teacher_continues_where_it_is_accepted(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    for side in ("cache", "heldout"):
        shutil.copytree(recipe.parent / "run" / side / "corpus", folder / side / "corpus")
    shutil.copytree(recipe.parent / "teacher", tmp_path / "renamed")
    here = ["--set", f"run_dir={folder}"]
    assert main(["cache", str(recipe), "--task", "0", "--num-tasks", "2", *here]) == 0
    renamed = [*here, "--set", f"teacher.model={tmp_path / 'renamed'}"]
    assert main(["cache", str(recipe), *renamed]) == 4
    assert "so --accept teacher.source continues" in capsys.readouterr().err
    assert main(["cache", str(recipe), "--accept", "teacher.weights", *renamed]) == 2
    assert "only teacher.source, teacher.revision, teacher.rows may differ" in capsys.readouterr().err
    assert main(["cache", str(recipe), "--accept", "teacher.source", *renamed]) == 0
    assert main(["finalise", str(recipe), "--accept", "teacher.source", *renamed]) == 0
    recorded = LogitCache(folder / "cache").manifest.identity["teacher"]["source"]
    assert recorded == str(recipe.parent / "teacher"), "the cache is the one that was begun"
    # Another model is not accepted under any name.
    make_teacher(tmp_path / "other", seed=3)
    wrong = [*here, "--set", f"teacher.model={tmp_path / 'other'}", "--accept", "teacher.source"]
    assert main(["cache", str(recipe), *wrong]) == 4
    error = capsys.readouterr().err
    assert "teacher.weights is" in error and "choose another run_dir" in error and "--accept" not in error
