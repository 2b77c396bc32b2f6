"""Teachers that are trained on the text: causal with a tokenizer of its own, and a masked head on a body without one."""

from __future__ import annotations

import html
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from logit_cache import LogitCache
from logit_cache.capture.prompt_sample import read_prompt_sample
from logit_cache.capture.summary import unigram_loss
from logit_cache.corpus.labels import IGNORE
from logit_cache.corpus.rows import PackedRows
from logit_cache.stages.app import main
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertModel

from tests.helpers.tiny import make_masked_teacher, make_recipe

pytestmark = pytest.mark.slow

SHAPE = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
SHAPE |= {"bos_token_id": 1, "eos_token_id": 1}
STEPS = {"steps": 60, "batch_rows": 4, "learning_rate": 1e-2, "warmup_steps": 4, "save_steps": 20, "device": "cpu"}


def test_a_teacher_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text with something to know: after each word comes the next one. The teacher beats the unigram gate, in Hangul."""
    training = {"vocabulary": 320, "architecture": SHAPE, **STEPS, "dtype": "float32"}
    recipe = make_recipe(tmp_path, teacher__training=training, report={"prompt": "아까 밥 먹고"})
    (tmp_path / "text.txt").write_text("\n\n".join("아까 밥 먹고 집에 갔다. " * 20 + str(i) for i in range(60)))
    target = tmp_path / "made"
    where = ["--set", f"teacher.model={target}"]
    assert main(["teach", str(recipe), *where]) == 0
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.decode(tokenizer("아까 밥 먹고")["input_ids"]) == "아까 밥 먹고"
    assert main(["prepare", str(recipe), *where]) == 0 and main(["cache", str(recipe), *where]) == 0
    cache = LogitCache(tmp_path / "run/cache")
    assert cache.teacher_loss < unigram_loss(PackedRows.of_cache(cache.path), cache.vocab_size) / 2
    capsys.readouterr()
    assert main(["teach", str(recipe), *where]) == 0
    assert "made exists" in capsys.readouterr().out
    said = read_prompt_sample(tmp_path / "run/prompt.json")
    assert said is not None and said.prompt == "아까 밥 먹고" and len(said.drawn) == 4
    assert said.tokens[0] == " 집에" and float(said.target.at_temperature(1.0)[0][0].exp()) > 0.5, "as the text goes on"
    assert said.drawn[0].startswith(" 집에 갔다.")
    assert main(["train", str(recipe), *where]) == 0 and main(["evaluate", str(recipe), *where]) == 0
    with warnings.catch_warnings():
        # matplotlib warns of every sign that its fonts do not have, and draws a box.
        warnings.filterwarnings("error", message=".*[Gg]lyph.*")
        assert main(["report", str(recipe), *where]) == 0
    page = (tmp_path / "run/report/index.html").read_text()
    assert "아까 밥 먹고" in page and said.drawn[3] in html.unescape(page)
    assert (tmp_path / "run/report/continuation.png").stat().st_size > 5000


def test_a_head_for_a_body(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, corpus__objective="masked")
    body = make_masked_teacher(tmp_path / "body")
    BertModel.from_pretrained(body).save_pretrained(body)
    settings = ", ".join(f"{key} = {value!r}" for key, value in STEPS.items())
    command = ["teach", str(recipe), "--set", f"teacher.model={tmp_path / 'made'}"]
    assert main([*command, "--set", f'teacher.training={{model = "{body}", {settings}}}']) == 0
    assert (tmp_path / "made/config.json").exists()
    # It starts from the words' frequencies.
    bias = AutoModelForMaskedLM.from_pretrained(tmp_path / "run/teach/begin").get_output_embeddings().bias
    corpus = PackedRows(tmp_path / "run/teach/cache/corpus")
    labels = corpus.labels(np.arange(corpus.rows))
    counts = np.bincount(labels[labels != IGNORE], minlength=len(bias)) + 1
    np.testing.assert_allclose(bias.detach().numpy(), np.log(counts / counts.sum()), rtol=1e-5)


def test_what_cannot_be_taught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(make_recipe(tmp_path))
    assert main(["teach", recipe]) == 2
    assert "teacher.training is missing" in capsys.readouterr().err
    assert main(["teach", recipe, "--set", "teacher.training={layers = 3}"]) == 2
    assert "starts from model or architecture" in capsys.readouterr().err
    assert main(["teach", recipe, "--set", "teacher.training={model = 'x', stepps = 3}"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


def test_a_teacher_is_made_of_what_the_recipe_says_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another recipe makes anew what nothing was trained from, and is refused where something was."""
    training = {"vocabulary": 320, "architecture": SHAPE, **STEPS, "steps": 2, "dtype": "float32"}
    recipe = str(make_recipe(tmp_path, teacher__training=training, cache__location=str(tmp_path / "elsewhere")))
    command = ["teach", recipe, "--set", f"teacher.model={tmp_path / 'made'}"]
    assert main([*command, "--set", "teacher.training.architecture.n_head=3"]) == 2, "32 is no multiple of 3"
    assert main([*command, "--set", "corpus.row_length=65"]) == 2
    assert "exceeds the teacher's 64 positions" in capsys.readouterr().err
    larger = ["--set", "teacher.training.vocabulary=340", "--set", "teacher.training.architecture.vocab_size=340"]
    assert main([*command, *larger]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "made").vocab_size == 340
    assert not (tmp_path / "elsewhere").exists(), "the rows of the teacher are no part of the cache"
    assert main([*command, *larger, "--set", "teacher.training.log_steps=3"]) == 0
    (tmp_path / "text.txt").open("a").write("\n\nw1 w2 w3")
    for changes, difference in ((larger, "(the text differ)"), ([], "teacher.training.vocabulary")):
        capsys.readouterr()
        assert main([*command, *changes]) == 4
        error = capsys.readouterr().err
        assert difference in error and f"delete {tmp_path / 'made'} and {tmp_path / 'run/teach'}" in error
    shutil.rmtree(tmp_path / "made")
    assert main(command) == 4
    shutil.rmtree(tmp_path / "run/teach")
    assert main(command) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "made").vocab_size == 320
