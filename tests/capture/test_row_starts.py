"""What a BOS in front of rows is worth to the teacher: measured both ways, with a warning in one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from logit_cache import LogitCache
from logit_cache.base.errors import RecipeError
from logit_cache.capture.prompt_sample import read_prompt_sample, save_prompt_sample
from logit_cache.capture.row_starts import RowStarts, log_row_starts, measure_row_starts
from logit_cache.corpus.row_writer import RowWriter
from logit_cache.corpus.rows import PackedRows
from logit_cache.corpus.tokenizer import TOKENIZER
from logit_cache.models.loading import load_tokenizer
from logit_cache.models.teacher import Teacher, load_teacher
from logit_cache.recipe.schema import TeacherConfig
from logit_cache.stages.app import main
from tokenizers import processors

from tests.helpers.tiny import WORDS, make_recipe, make_teacher

BOS, LENGTH, ROWS = 1, 20, 12


def give_bos(folder: Path) -> None:
    """Make word 1 of a tiny teacher's tokenizer the BOS, which stands in front of every text."""
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["<s>"] = vocabulary.pop("w1")
    file.write_text(json.dumps(definition))
    tokenizer = load_tokenizer(str(folder))
    tokenizer.bos_token = "<s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = make_teacher(tmp_path_factory.mktemp("bos") / "teacher")
    give_bos(folder)
    return load_teacher(str(folder), TeacherConfig(model=str(folder), dtype="float32", device="cpu"))


@torch.no_grad()
def drawn(teacher: Teacher, first: np.ndarray) -> np.ndarray:
    """Texts of the teacher itself behind the tokens `first` [B, 1]: with other tokens before them it does worse."""
    ids = torch.from_numpy(first)
    generator = torch.Generator().manual_seed(0)
    while ids.shape[1] < LENGTH:
        p_BV = teacher.model(ids).logits[:, -1].softmax(-1)
        p_BV[:, BOS] = 0
        ids = torch.cat([ids, torch.multinomial(p_BV, 1, generator=generator)], 1)
    return ids.numpy().astype(np.int32)


def corpus_of(folder: Path, teacher: Teacher, rows: np.ndarray, row_start: list[int]) -> PackedRows:
    mask = np.ones_like(rows)
    mask[:, :2] = 0 if row_start else 1
    writer = RowWriter(folder / "corpus", rows.shape[1], masked=bool(row_start))
    writer.write_rows(rows, np.zeros_like(rows), mask)
    load_tokenizer(teacher.source).save_pretrained(writer.staged / TOKENIZER)
    writer.commit({}, row_start)
    return PackedRows(folder / "corpus")


@torch.no_grad()
def loss(teacher: Teacher, rows: np.ndarray, first: int) -> float:
    """Of the tokens from `first` on."""
    log_p = teacher.model(torch.from_numpy(rows.astype(np.int64))).logits.double().log_softmax(-1)
    labels = torch.from_numpy(rows[:, first:].astype(np.int64)).unsqueeze(-1)
    return float(-log_p[:, first - 1 : -1].gather(-1, labels).mean())


def test_both_ways_are_measured_on_the_same_tokens(teacher: Teacher, tmp_path: Path) -> None:
    rows = drawn(teacher, np.full((ROWS, 1), BOS))
    with_bos, without = loss(teacher, rows, 2), loss(teacher, rows[:, 1:], 1)
    assert without > with_bos + 0.2, "this teacher needs its BOS"
    chosen = measure_row_starts(teacher, corpus_of(tmp_path / "with", teacher, rows, [BOS]), 5)
    assert chosen is not None and chosen.chosen and chosen.labels == ROWS * (LENGTH - 2)
    assert (chosen.nats_with, chosen.nats_without) == pytest.approx((with_bos, without), rel=1e-5)
    assert chosen.cost == pytest.approx(with_bos - without, rel=1e-4)
    # Of rows without it, one token fewer has room behind the BOS.
    bare = measure_row_starts(teacher, corpus_of(tmp_path / "without", teacher, rows[:, 1:], []), 5)
    assert bare is not None and not bare.chosen and bare.cost > 0.2
    assert bare.nats_with == pytest.approx(loss(teacher, rows, 2), rel=1e-5)
    assert bare.nats_without == pytest.approx(loss(teacher, rows[:, 1:], 1), rel=1e-5)


@pytest.mark.parametrize("needed", [True, False])
def test_the_costly_choice_is_warned_of_in_one_line(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture, needed: bool
) -> None:
    if needed:
        rows = drawn(teacher, np.full((ROWS, 1), BOS))
        wrong, right = (rows[:, 1:], []), (rows, [BOS])
    else:
        rows = drawn(teacher, np.random.default_rng(0).integers(2, WORDS, (ROWS, 1)))
        behind = np.concatenate([np.full((ROWS, 1), BOS, np.int32), rows], 1)
        wrong, right = (behind, [BOS]), (rows, [])
    with caplog.at_level(logging.INFO):
        log_row_starts(teacher, corpus_of(tmp_path / "right", teacher, *right), 8)
        assert "warning" not in caplog.text and "nats with '<s>'" in caplog.text
        log_row_starts(teacher, corpus_of(tmp_path / "wrong", teacher, *wrong), 8)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and "\n" not in warned[0]
    assert f"set corpus.row_bos = '{'always' if needed else 'never'}'" in warned[0]


def test_conversations_without_the_bos_of_texts_are_measured_too(teacher: Teacher, tmp_path: Path) -> None:
    """Their template decides, so that no row begins with what `prepare` would have put there."""
    rows = drawn(teacher, np.full((ROWS, 1), BOS))[:, 1:]
    found = measure_row_starts(teacher, corpus_of(tmp_path, teacher, rows, [BOS]), 5)
    assert found is not None and not found.chosen and found.cost > 0.2


def test_nothing_is_measured_where_there_is_no_choice(teacher: Teacher, tmp_path: Path) -> None:
    rows = drawn(teacher, np.full((ROWS, 1), BOS))
    assert measure_row_starts(teacher, corpus_of(tmp_path / "own", teacher, rows, []), 4) is None, "all begin a text"
    (tmp_path / "bare/corpus").mkdir(parents=True)
    bare = make_teacher(tmp_path / "teacher")
    other = load_teacher(str(bare), TeacherConfig(model=str(bare), dtype="float32", device="cpu"))
    assert measure_row_starts(other, corpus_of(tmp_path / "bare", other, rows[:, 1:], []), 4) is None, "no BOS"
    assert RowStarts("b", 1, 1, True, 2.0, 1.5).cost == 0.5 == RowStarts("b", 1, 1, False, 1.5, 2.0).cost


def test_the_commands_measure_and_the_identity_has_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = []
    for choice in ("auto", "never"):
        recipe = make_recipe(tmp_path / choice, corpus__row_bos=choice)
        give_bos(tmp_path / choice / "teacher")
        assert main(["prepare", str(recipe)]) == 0
        assert ("begin with '<s>'" in capsys.readouterr().out) == (choice == "auto")
        assert main(["cache", str(recipe)]) == 0
        assert "nats with '<s>' in front of the row" in " ".join(capsys.readouterr().out.split())
        cache = LogitCache(tmp_path / choice / "run/cache")
        assert main(["inspect", str(cache.path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["row_start"] == ("<s>" if choice == "auto" else None)
        assert cache.manifest.identity.get("row_start") == ([BOS] if choice == "auto" else None)
        digests.append(cache.digest)
    assert digests[0] != digests[1]
    batch = LogitCache(tmp_path / "auto/run/cache").batch(range(10))
    assert (batch["input_ids"][:, 0] == BOS).all()
    assert torch.equal(batch["targets"].mask, batch["labels"] >= 0) and not batch["targets"].mask[:, 0].all()
    assert main(["train", str(tmp_path / "auto/recipe.toml")]) == 0


def test_plan_measures_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*of: object, **settings: object) -> None:
        raise RecipeError("far enough")

    monkeypatch.setattr("logit_cache.assess.plan.measure_fidelity", stop)
    recipe = make_recipe(tmp_path, corpus__row_bos="never")
    give_bos(tmp_path / "teacher")
    assert main(["prepare", str(recipe)]) == 0 and main(["plan", str(recipe)]) == 2
    assert "nats with '<s>' in front of the row" in " ".join(capsys.readouterr().out.split())


def test_the_reports_prompt_begins_as_a_text_does(teacher: Teacher, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(teacher.source)
    save_prompt_sample(teacher, tokenizer, "w7 w8", tmp_path / "prompt.json", seed=0)
    sample = read_prompt_sample(tmp_path / "prompt.json")
    assert sample is not None
    with torch.no_grad():
        best = teacher.model(torch.tensor([[BOS, 7, 8]])).logits[0, -1].argmax()
    assert sample.target.token_ids[0] == best
