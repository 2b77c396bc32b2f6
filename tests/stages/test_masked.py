"""Masked rows: how they are framed and drawn, and both stages on a masked teacher."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logit_cache import DistillationTrainer, LogitCache, ShorterRows, model_inputs
from logit_cache.capture.summary import log_summary, unigram_loss
from logit_cache.corpus.labels import IGNORE, PADDING
from logit_cache.corpus.masking import Framer, Masking, mask_rows
from logit_cache.corpus.row_writer import RowWriter
from logit_cache.corpus.rows import PackedRows
from logit_cache.distill.metrics import read_metrics
from logit_cache.lab import systems
from logit_cache.lab.systems import comparison
from logit_cache.recipe.loading import load_recipe
from logit_cache.stages.app import main
from logit_cache.targets.sparse_targets import SparseTargets
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM, TrainingArguments

from tests.helpers.tiny import WORDS, make_recipe

PAD, UNK, CLS, SEP, MASK = range(5)
MASKING = Masking(CLS, SEP, PAD, MASK, (0, 1, 2, 3, 4), WORDS)


def framed(framer: Framer, tokens: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and segment ids of the rows that a document completes."""
    blocks = framer.add(tokens, np.ones_like(tokens))
    return [(rows[0], segments[0]) for rows, segments, _ in blocks if len(rows) == 1]


def test_a_document_is_cut_into_framed_pieces() -> None:
    framer = Framer(12, MASKING)
    first, second = np.arange(10, 27, dtype=np.int32), np.arange(40, 43, dtype=np.int32)
    rows = [*framed(framer, first), *framed(framer, second)]
    assert rows[0][0].tolist() == [CLS, *range(10, 20), SEP]
    assert rows[0][1].tolist() == [0] * 12
    # The 7 tokens left over take 9 places; 3 are too few for another piece.
    assert len(rows) == 2
    assert rows[1][0].tolist() == [CLS, *range(20, 27), SEP, PAD, PAD, PAD]
    assert rows[1][1].tolist() == [0] * 9 + [PADDING] * 3


def test_every_token_of_every_document_is_in_some_row() -> None:
    framer = Framer(32, MASKING)
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, WORDS, n, np.int32) for n in rng.integers(1, 90, 60)]
    rows = [row for document in documents for row, _ in framed(framer, document)]
    words = [token for row in rows for token in row.tolist() if token > MASK]
    expected = np.concatenate(documents).tolist()
    assert words == expected[: len(words)] and len(expected) - len(words) < 32


def test_a_large_document_takes_linear_time_and_stops_where_the_rows_are_full(tmp_path: Path) -> None:
    """To copy what is left of it for every row takes 12 seconds here, to go on from where the last one ended 0.1."""
    tokens = np.random.default_rng(0).integers(5, WORDS, 500_000, np.int32)
    begun = time.process_time()
    assert len(framed(Framer(16, MASKING), tokens)) == 500_000 // 14
    assert time.process_time() - begun < 3
    writer = RowWriter(tmp_path / "corpus", 16, limit=3, masking=MASKING)
    taken, add = [], writer.packer.add
    writer.packer.add = lambda *document: (taken.append(row) or row for row in add(*document))
    writer.add(tokens)
    writer.commit({})
    assert len(taken) == 3 and PackedRows(tmp_path / "corpus").rows == 3


def test_the_draw_is_80_10_10_of_15_percent() -> None:
    tokens = np.random.default_rng(0).integers(5, WORDS, (400, 100), np.int32)
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    input_ids, labels = mask_rows(tokens, 0, MASKING)
    chosen = labels != IGNORE
    assert (chosen.sum(1) == 15).all(), "15 % of 98, rounded"
    assert not chosen[:, [0, -1]].any()
    assert np.array_equal(labels[chosen], tokens[chosen])
    assert np.array_equal(input_ids[~chosen], tokens[~chosen])
    total = chosen.sum()
    hidden, same = (input_ids == MASK)[chosen].sum(), (input_ids == tokens)[chosen].sum()
    # Binomial standard errors: 0.0052 for 0.8 and 0.0039 for 0.1 of 6,000; a replacement may be the token itself.
    assert hidden / total == pytest.approx(0.8, abs=5 * 0.0052)
    assert same / total == pytest.approx(0.1, abs=5 * 0.0039)
    others = input_ids[chosen & (input_ids != MASK) & (input_ids != tokens)]
    assert others.min() > MASK, "no special token takes a word's place"


def test_a_rows_masks_depend_on_seed_and_number_alone() -> None:
    tokens = np.random.default_rng(0).integers(5, WORDS, (6, 40), np.int32)
    whole = mask_rows(tokens, 10, MASKING)
    part = mask_rows(tokens[2:4], 12, MASKING)
    assert all(np.array_equal(a[2:4], b) for a, b in zip(whole, part, strict=True))
    again = mask_rows(np.stack([tokens[0]] * 2), 0, MASKING)
    assert not np.array_equal(*again[1]), "two draws of one text differ"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages on a masked teacher: a DistilBERT with all three losses, a control, a student of its inner states."""
    folder = tmp_path_factory.mktemp("masked")
    small = {"model_type": "bert", "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "intermediate_size": 20, "max_position_embeddings": 64, "pad_token_id": 0}
    recipe = make_recipe(
        folder,
        corpus__objective="masked",
        corpus__mask_draws=2,
        cache__signals=["hidden.0", "hidden.3:direction", "hidden.2:float16", "attention.1", "qk.2"],
        students={
            "student": {
                "layers": [0, 2],
                "token_types": "drop",
                "temperature": 2.0,
                "kd_weight": 5.0,
                "ce_weight": 2.0,
                "cosine_weight": 1.0,
                "cosine_layers": [[2, 3]],
            },
            "control": {"layers": [0, 2], "token_types": "drop", "mode": "ce"},
            "inner": {
                "architecture": small,
                "kd_weight": 0.0,
                "ce_weight": 0.0,
                "hidden_weight": 1.0,
                "hidden_layers": [[0, 0], [2, 2]],
                "attention_weight": 1.0,
                "attention_layers": [[0, 1], [1, 2]],
            },
        },
    )
    for command in ("prepare", "cache", "train", "evaluate", "report"):
        assert main([command, str(recipe)]) == 0, command
    return folder


@pytest.mark.slow
def test_rows_are_frozen_with_their_labels(run: Path) -> None:
    corpus = PackedRows(run / "run/cache/corpus")
    assert corpus.objective == "masked"
    input_ids, segments = corpus.take(np.arange(corpus.rows))
    labels = corpus.labels(np.arange(corpus.rows))
    original = np.where(labels == IGNORE, input_ids, labels)
    assert np.array_equal(original[0::2], original[1::2]), "two draws of the same text stand together"
    assert not np.array_equal(labels[0::2], labels[1::2])
    assert (original[:, 0] == CLS).all() and not np.isin(labels, range(5)).any()
    ends = np.diff(segments, append=-9) != 0
    assert np.isin(original[ends], (SEP, PAD)).all() and (original[segments == PADDING] == PAD).all()


@pytest.mark.slow
def test_targets_are_the_teachers_own_at_every_real_token(run: Path) -> None:
    cache = LogitCache(run / "run/cache")
    assert cache.objective == "masked" and cache.manifest.identity["targets_on"] == "real"
    batch = cache.batch(range(len(cache)))
    assert torch.equal(batch["targets"].mask, batch["segment_ids"] >= 0)
    model = AutoModelForMaskedLM.from_pretrained(run / "teacher").eval()
    with torch.no_grad():
        logits = model(**model_inputs(batch, model)).logits
    exact = SparseTargets.from_logits(logits, k=8, mask=batch["targets"].mask)
    assert torch.equal(exact.token_ids[..., 0], batch["targets"].token_ids[..., 0])
    p, q = (t.at_temperature(2.0)[0].exp().sum(-1) for t in (exact, batch["targets"]))
    torch.testing.assert_close(p, q, atol=0.02, rtol=0)
    # One document alone gives the same: neither padding nor its neighbours were seen.
    row = next(r for r in range(len(cache)) if batch["segment_ids"][r].max() > 0)
    inside = batch["segment_ids"][row] == 1
    with torch.no_grad():
        alone = model(batch["input_ids"][row][inside].unsqueeze(0)).logits[0]
    torch.testing.assert_close(alone, logits[row][inside], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_positions_to_learn_from_are_counted_once(run: Path, tmp_path: Path) -> None:
    """An index by a mask has to count it, for which a GPU is waited for."""
    counted: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            by_mask = func is torch.ops.aten.index.Tensor and any(
                i is not None and i.dtype == torch.bool for i in args[1]
            )
            if by_mask or func is torch.ops.aten.nonzero.default:
                counted.append(str(func))
            return func(*args, **(kwargs or {}))

    cache = LogitCache(run / "run/cache")
    model = AutoModelForMaskedLM.from_pretrained(run / "teacher")
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = DistillationTrainer(model, args, cache)
    with Counting():
        trainer.compute_loss(model, cache.batch([0, 1]))
    assert counted == ["aten.nonzero.default"]


@pytest.mark.slow
def test_the_teachers_loss_is_over_hidden_tokens(run: Path) -> None:
    cache = LogitCache(run / "run/cache")
    batch = cache.batch(range(len(cache)))
    model = AutoModelForMaskedLM.from_pretrained(run / "teacher").eval()
    with torch.no_grad():
        log_p = model(**model_inputs(batch, model)).logits.double().log_softmax(-1)
    chosen = batch["labels"] != IGNORE
    losses = -log_p.gather(-1, batch["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)[chosen]
    assert cache.teacher_loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert cache.positions > chosen.sum()


@pytest.mark.slow
def test_the_gate_counts_hidden_tokens(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A teacher of random weights knows less than the words' frequencies, and stage one says so."""
    cache = LogitCache(run / "run/cache")
    assert cache.teacher_loss > unigram_loss(PackedRows.of_cache(cache.path), cache.vocab_size)
    log_summary(load_recipe(run / "recipe.toml"))
    assert "no better than the rows' own token frequencies" in caplog.text


@pytest.mark.slow
def test_adapters_with_matched_layers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the teacher's width they learn, and come out as a plain model; a map from another width is refused."""
    shutil.copytree(run / "run/cache", tmp_path / "run/cache")
    shutil.copytree(run / "run/students/student/start", tmp_path / "run/students/student/start")
    options = ["--set", f"run_dir={tmp_path / 'run'}"]
    for name in ("student", "inner"):
        options += ["--set", f"students.{name}.lora={{r=2, target_modules=['q_lin', 'query']}}"]
    assert main(["train", str(run / "recipe.toml"), "--student", "inner", *options]) == 2
    assert "train without lora" in " ".join(capsys.readouterr().err.split())
    assert main(["train", str(run / "recipe.toml"), "--student", "student", *options]) == 0
    lines = read_metrics(tmp_path / "run/students/student/metrics.jsonl")
    assert all(line["cosine"] > 0 for line in lines)
    start, final = (
        load_file(tmp_path / f"run/students/student/{part}/model.safetensors") for part in ("start", "final")
    )
    assert set(start) == set(final)
    changed = {name for name in start if not torch.equal(start[name], final[name])}
    assert changed and all("q_lin" in name for name in changed)


@pytest.mark.slow
def test_students_are_plain_models_that_load(run: Path) -> None:
    students = run / "run/students"
    kinds = {}
    for name in ("student", "control", "inner"):
        config = json.loads((students / name / "final/config.json").read_text())
        kinds[name] = config["architectures"][0]
        _, info = AutoModelForMaskedLM.from_pretrained(students / name / "final", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], "the projection is no part of the student"
    assert kinds == {"student": "DistilBertForMaskedLM", "control": "DistilBertForMaskedLM", "inner": "BertForMaskedLM"}
    metrics = [json.loads(line) for line in (students / "inner/metrics.jsonl").read_text().splitlines()]
    assert {"hidden", "attention"} <= set(metrics[0])
    loss = metrics[-1]["hidden"] + metrics[-1]["attention"]
    assert metrics[-1]["loss"] == pytest.approx(loss, rel=1e-3), "weights of 1, and nothing else"
    first = json.loads((students / "student/metrics.jsonl").read_text().splitlines()[0])
    expected = 5 * 4 * first["kd"] + 2 * first["ce"] + first["cosine"]
    assert first["loss"] == pytest.approx(expected, rel=1e-3)
    results = json.loads((run / "run/evaluation.json").read_text())["results"]
    assert results["student"]["kl_to_teacher"] < results["control"]["kl_to_teacher"]


@pytest.mark.slow
def test_a_run_has_its_line_among_the_known_systems(run: Path) -> None:
    recipe = load_recipe(run / "recipe.toml")
    [cells] = comparison({"distilbert": recipe})
    results = json.loads((run / "run/evaluation.json").read_text())["results"]
    assert cells["published MB"] == "440 -> 268" and cells["counted M"] == "66.4"
    assert cells["accuracy"] == f"{results['teacher']['accuracy']:.1%}"
    cache = LogitCache(run / "run/cache")
    assert cells["bytes/token"] == f"{cache.bytes / (len(cache) * 16):,.0f}"
    # The teacher's accuracy by its cache is that of the model itself.
    heldout = LogitCache(run / "run/heldout")
    batch = heldout.batch(range(len(heldout)))
    chosen = batch["labels"] != IGNORE
    right = (batch["targets"].token_ids[..., 0] == batch["labels"])[chosen]
    assert results["teacher"]["accuracy"] == pytest.approx(float(right.float().mean()))


@pytest.mark.slow
def test_a_line_of_several_seeds_has_intervals(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(run / "recipe.toml", ["students.student.seeds=[0, 1]", "students.control.seeds=[0, 1]"])
    accuracies = {"teacher": 0.4, "student-seed0": 0.38, "student-seed1": 0.4}
    accuracies |= {"control-seed0": 0.3, "control-seed1": 0.32}
    found = {
        name: {"accuracy": accuracy, "perplexity": 9.0, "parameters": 1e6} for name, accuracy in accuracies.items()
    }
    monkeypatch.setattr(systems, "read_results", lambda recipe: found)
    [cells] = comparison({"distilbert": recipe})
    # Two values have the t of one degree of freedom: 12.706 x .025.
    assert cells["kept"] == "97.5% ± 31.8%" and cells["control"] == "77.5% ± 31.8%"
    assert cells["lead"] == "20.0% ± 0.0%", "seed by seed"
    assert cells["published share"] == "96.9%" and cells["seeds"] == "2"
    found["teacher"]["accuracy"] = 0.0
    assert comparison({"distilbert": recipe})[0]["kept"] == "-", "a teacher of random weights may be right nowhere"


@pytest.mark.slow
def test_masked_rows_go_into_no_causal_format(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run / "run/cache"), str(tmp_path / "out")]) == 2
    assert "holds masked rows" in capsys.readouterr().err
    with pytest.raises(ValueError, match="masked rows cannot be cut"):
        ShorterRows(LogitCache(run / "run/cache"), 8)


@pytest.mark.slow
def test_targets_on_hidden_tokens_only(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, corpus__objective="masked", cache__targets_on="masked")
    assert main(["prepare", str(recipe)]) == 0 and main(["cache", str(recipe)]) == 0
    cache = LogitCache(tmp_path / "run/cache")
    batch = cache.batch(range(len(cache)))
    assert torch.equal(batch["targets"].mask, batch["labels"] != IGNORE)
    assert cache.positions == int((batch["labels"] != IGNORE).sum())
    assert main(["train", str(recipe)]) == 0


@pytest.mark.slow
def test_a_causal_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tmp_path)
    assert main(["prepare", str(recipe), "--set", "corpus.objective=masked"]) == 2
    assert "has no cls_token" in capsys.readouterr().err
