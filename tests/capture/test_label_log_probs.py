"""The teacher's log-probability of every label, from its logits to what a cache and `inspect` say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logit_cache import LogitCache
from logit_cache.corpus.labels import IGNORE
from logit_cache.models.teacher import load_teacher
from logit_cache.recipe.schema import TeacherConfig
from logit_cache.stages.app import main
from logit_cache.store.levels import LEVEL_GROWTH, LEVEL_STEP

from tests.helpers.tiny import make_recipe

KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sampled": {"cache__support": "sampled"},
    "masked": {"corpus__objective": "masked", "cache__targets_on": "masked"},
    "masked, targets on all tokens": {"corpus__objective": "masked"},
    "fast": {"cache__profile": "fast"},
}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    recipe = str(make_recipe(folder, **KINDS[request.param]))
    for command in ("prepare", "cache"):
        assert main([command, recipe]) == 0
    return folder


def exact_log_probs(cache: LogitCache, model: Path) -> torch.Tensor:
    """log p of each label [rows, L] in float64, from the teacher's logits; 0 where there is no label."""
    config = TeacherConfig(model=str(model), dtype="float32", device="cpu")
    teacher = load_teacher(str(model), config, cache.objective)
    batch = cache.batch(range(len(cache)))
    with torch.inference_mode():
        hidden = teacher.hidden(batch["input_ids"], batch["segment_ids"]).flatten(0, 1)
        log_p = teacher.output_layer.logits(hidden).double().log_softmax(-1).unflatten(0, batch["labels"].shape)
    of_labels = log_p.gather(-1, batch["labels"].clamp(min=0).unsqueeze(-1))[..., 0]
    return torch.where(batch["labels"] != IGNORE, of_labels, 0.0)


def test_a_cache_has_what_the_teacher_said(run: Path) -> None:
    cache = LogitCache(run / "run/cache")
    exact, batch = exact_log_probs(cache, run / "teacher"), cache.batch(range(len(cache)))
    found, has_label = batch["targets"].label_log_probs, batch["labels"] != IGNORE
    assert found is not None and (batch["targets"].mask | ~has_label).all(), "every label has a target"
    assert has_label.any() and (found[~has_label] == 0).all()
    # A level is right to half a step, and all of a head move by the rounding of one another.
    bound = 2 * (LEVEL_STEP + LEVEL_GROWTH * (-exact)).clamp(min=0.1)
    assert ((found - exact).abs() <= bound).all()
    assert float((found - exact)[has_label].mean().abs()) < 0.02
    losses = -exact.sum(-1) / has_label.sum(-1).clamp(min=1)
    # Logits of a float32 teacher in another batch: sums in another order.
    np.testing.assert_allclose(cache.teacher_losses(), losses.numpy(), rtol=1e-5)
    assert cache.teacher_loss == pytest.approx(float(-exact.sum() / has_label.sum()), rel=1e-6)


def test_inspect_shows_the_teachers_loss(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = LogitCache(run / "run/cache")
    exact = exact_log_probs(cache, run / "teacher")
    row = next(row for row in range(len(cache)) if len(cache[row]["segment_ids"].unique()) > 1)
    assert main(["inspect", str(cache.path), "--row", str(row), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    item = cache[row]
    has_label = item["labels"] != IGNORE
    assert shown["teacher_loss"] == pytest.approx(float(-exact[row][has_label].mean()), abs=1e-4)
    for line in shown["positions"]:
        position = line["position"]
        assert (line["next_probability"] is None) == (not has_label[position])
        if has_label[position]:
            assert line["next_probability"] == pytest.approx(float(exact[row, position].exp()), rel=0.5)
    documents = [number for number in item["segment_ids"].unique().tolist() if number >= 0]
    assert len(shown["documents"]) == len(documents)
    for number, document in zip(documents, shown["documents"], strict=True):
        here = (item["segment_ids"] == number) & has_label
        assert document["labels"] == int(here.sum())
        assert (document["teacher_loss"] is None) == (not here.any())
        if here.any():
            assert document["teacher_loss"] == pytest.approx(float(-exact[row][here].mean()), abs=0.15)
    assert main(["inspect", str(cache.path), "--row", str(row)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"the teacher's loss is {shown['teacher_loss']:.3f} nats per label" in text


def test_the_size_of_batches_changes_nothing(run: Path) -> None:
    recipe, other = str(run / "recipe.toml"), run / "other"
    for command in ("prepare", "cache"):
        assert main([command, recipe, "--set", f"run_dir={other}", "--set", "teacher.batch_rows=1"]) == 0
    one, three = LogitCache(other / "cache"), LogitCache(run / "run/cache")
    np.testing.assert_allclose(one.teacher_losses(), three.teacher_losses(), rtol=1e-5)
    assert one.teacher_loss == pytest.approx(three.teacher_loss, rel=1e-6)


def test_a_recipe_may_do_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(make_recipe(tmp_path, cache__label_log_probs=False))
    for command in ("prepare", "cache"):
        assert main([command, recipe]) == 0
    cache = LogitCache(tmp_path / "run/cache")
    assert cache[0]["targets"].label_log_probs is None
    capsys.readouterr()
    assert main(["inspect", str(cache.path), "--row", "0", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["teacher_loss"] is None and shown["positions"][0]["next_probability"] is None
    assert main(["inspect", str(cache.path), "--row", "0"]) == 0
    assert main(["train", recipe, "--set", "students.student.max_teacher_loss=5"]) == 2
    assert "cache.label_log_probs = true" in capsys.readouterr().err
    # The same rows with them are another cache.
    assert main(["cache", recipe, "--set", "cache.label_log_probs=true"]) == 4
    assert "label_log_probs is False in the cache and True now" in capsys.readouterr().err
