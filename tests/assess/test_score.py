"""Scores of models against a cache equal those of full logits, within the error that is printed beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logit_cache import LogitCache
from logit_cache.assess.measures import MEASURES
from logit_cache.assess.score import Scores, score_models, table
from logit_cache.base.errors import MismatchError, RecipeError
from logit_cache.corpus.labels import IGNORE
from logit_cache.models.any_model import open_model
from logit_cache.models.loading import load_model
from logit_cache.models.placement import choose_placement
from logit_cache.models.rows import row_logits
from logit_cache.stages.app import main
from safetensors.torch import load_file, save_file

from tests.helpers.gguf_file import write_gguf
from tests.helpers.tiny import WORDS, make_recipe, make_teacher

pytestmark = pytest.mark.slow
CPU = choose_placement("cpu", "float32")
ROW = 48
SETTINGS: dict[str, dict[str, object]] = {
    "own": {"cache__k": 8},
    "unlabelled": {"cache__k": 8, "cache__label_log_probs": False},
    "sampled": {"cache__support": "sampled", "cache__draws": 8},
}


@torch.inference_mode()
def spoken(teacher: Any, documents: int) -> str:
    """Documents of a row each, drawn from the teacher: labels are then draws of its distributions."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, WORDS, (documents, 1), generator=draw)
    while ids.shape[1] < ROW - 1:
        p = teacher(ids).logits[:, -1].softmax(-1)
        p[:, 0] = 0  # the end of a text
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=draw)], 1)
    return "\n\n".join(" ".join(f"w{token}" for token in row) for row in ids.tolist())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of one teacher over its own text, and the teacher at 8 and 4 bits."""
    folder = tmp_path_factory.mktemp("score")
    teacher = load_model(make_teacher(folder / "teacher"), CPU)
    for kind in ("Q8_0", "Q4_0"):
        write_gguf(teacher, folder / f"{kind}.gguf", kind)
    for name, settings in SETTINGS.items():
        recipe = make_recipe(folder / name, **settings, corpus__row_length=ROW, corpus__long_documents="cut")
        (folder / name / "text.txt").write_text(spoken(teacher, 96))
        more = ["--set", "corpus.max_rows=80", "--set", "corpus.max_heldout_rows=1"]
        assert main(["prepare", str(recipe), *more]) == 0 and main(["cache", str(recipe), *more]) == 0
    return folder


@torch.inference_mode()
def of_full_logits(teacher: Any, model: Any, cache: LogitCache) -> dict[str, float]:
    """Every figure from both models' logits in float64."""
    batch = cache.batch(np.arange(len(cache)))
    keep = batch["labels"] != IGNORE
    labels_N1 = batch["labels"][keep].unsqueeze(-1)
    log_p, log_q = (row_logits(one, batch)[keep].double().log_softmax(-1) for one in (teacher, model))
    p, q, first, choice = log_p.exp(), log_q.exp(), log_p.argmax(-1, keepdim=True), log_q.argmax(-1, keepdim=True)
    return {
        "kl": float((p * (log_p - log_q)).sum(-1).mean()),
        "reverse_kl": float((q * (log_q - log_p)).sum(-1).mean()),
        "acceptance": float(torch.minimum(p, q).sum(-1).mean()),
        "agreement": float((first == choice).double().mean()),
        "flip_rate": float(((first == labels_N1) != (choice == labels_N1)).double().mean()),
        "perplexity": math.exp(-float(log_q.gather(-1, labels_N1).mean())),
        "teacher": math.exp(-float(log_p.gather(-1, labels_N1).mean())),
    }


def scored(home: Path, name: str, models: list[str], **options: Any) -> Scores:
    return score_models(LogitCache(home / name / "run/cache"), models, device="cpu", **options)


def test_figures_are_those_of_full_logits_within_their_error(home: Path) -> None:
    other = make_teacher(home / "other", seed=1)  # far from the teacher
    models = [str(home / "Q8_0.gguf"), str(home / "Q4_0.gguf"), str(other)]
    cache, teacher = LogitCache(home / "own/run/cache"), load_model(home / "teacher", CPU)
    scores = scored(home, "own", models)
    for model, score in scores.models.items():
        exact = of_full_logits(teacher, open_model(model, CPU), cache)
        for measure in ("kl", "reverse_kl", "acceptance"):
            found = getattr(score, measure)
            assert abs(found.mean - exact[measure]) <= found.error, (model, measure)
        for measure in ("agreement", "flip_rate"):
            assert getattr(score, measure) == exact[measure]
        assert score.perplexity == pytest.approx(exact["perplexity"], rel=1e-5)
    assert scores.teacher_perplexity == pytest.approx(exact["teacher"], rel=0.01)  # log p of labels is rounded
    eight, four, far = scores.models.values()
    assert eight.kl.mean + (eight.kl.error or 0) < four.kl.mean - (four.kl.error or 0)
    assert four.kl.mean < far.kl.mean and eight.acceptance.mean > four.acceptance.mean > far.acceptance.mean
    assert eight.kl.median <= eight.kl.percentile_99 <= eight.kl.worst
    assert eight.acceptance.median >= eight.acceptance.percentile_99 >= eight.acceptance.worst


def test_the_command_prints_and_writes_what_it_found(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, model = str(home / "own/run/cache"), str(home / "Q8_0.gguf")
    arguments = ["--rows", "10", "--device", "cpu", "--json", str(home / "score.json")]
    assert main(["score", cache, model, *arguments]) == 0
    out = capsys.readouterr().out
    written = json.loads((home / "score.json").read_text())
    found = written["models"][model]
    assert written["rows"] == 10 and found["bytes"] == (home / "Q8_0.gguf").stat().st_size
    assert f"{found['kl']['mean']:.4f} ± {found['kl']['error']:.4f}" in out
    again = scored(home, "own", [model], rows=10)
    assert again.to_json() == written
    assert scored(home, "own", [model], rows=10, seed=1).models != again.models


def test_a_cache_without_log_probs_of_labels_cannot_tell_its_error(home: Path) -> None:
    scores = scored(home, "unlabelled", [str(home / "Q8_0.gguf")])
    assert all(getattr(found, name).error is None for found in scores.models.values() for name in MEASURES)
    assert scores.teacher_perplexity is None and "± ?" in table(scores)[0]["KL to teacher"]


def test_what_cannot_be_scored_is_refused(home: Path) -> None:
    with pytest.raises(RecipeError, match="samples"):
        scored(home, "sampled", [str(home / "teacher")])
    with pytest.raises(RecipeError, match="no such file"):
        scored(home, "own", [str(home / "nothing.gguf")])
    with pytest.raises(MismatchError, match="tokenizer gives"):
        scored(home, "own", [str(renamed(home))])
    with pytest.raises(MismatchError, match="has 200 logits"):
        smaller = make_teacher(home / "smaller", words=200)
        for file in smaller.glob("tokenizer*"):
            file.unlink()
        scored(home, "own", [str(smaller)])


def renamed(home: Path) -> Path:
    """The teacher with a tokenizer in which two words have changed places."""
    folder = make_teacher(home / "renamed")
    file = folder / "tokenizer.json"
    text = json.loads(file.read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    file.write_text(json.dumps(text))
    return folder


def make_ternary(teacher: Path, folder: Path) -> Path:
    """The teacher with its layers at 1.58 bits, as transformers' BitNet quantiser stores them."""
    from transformers.integrations.bitnet import pack_weights

    folder.mkdir()
    weights = {}
    for name, tensor in load_file(teacher / "model.safetensors").items():
        if "_proj" in name:
            scale = 1 / tensor.abs().mean()
            weights[name.replace("weight", "weight_scale")] = scale.view(1)
            tensor = pack_weights((tensor * scale).round().clamp(-1, 1))
        weights[name] = tensor.contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((teacher / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_quantised_checkpoint_is_loaded_by_its_own_quantiser(home: Path) -> None:
    folder = make_ternary(home / "teacher", home / "ternary")
    with torch.compiler.set_stance("force_eager"):  # its layers compile themselves, which takes a minute
        model = open_model(str(folder), CPU)
        assert type(model.model.layers[0].mlp.up_proj).__name__ == "BitLinear"
        (score,) = scored(home, "own", [str(folder)]).models.values()
        exact = of_full_logits(load_model(home / "teacher", CPU), model, LogitCache(home / "own/run/cache"))
    assert score.kl.error is not None and abs(score.kl.mean - exact["kl"]) <= score.kl.error
