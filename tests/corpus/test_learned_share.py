"""What `prepare` refuses before a teacher runs: nothing to learn, and tokens that the teacher has no embedding for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from logit_cache.base.errors import RecipeError
from logit_cache.corpus.labels import IGNORE
from logit_cache.corpus.prepare import prepare_corpus
from logit_cache.corpus.rows import PackedRows
from logit_cache.recipe.loading import load_recipe
from logit_cache.stages.app import main

from tests.corpus.test_chosen_positions import CONVERSATION, PLAIN, prepare
from tests.corpus.test_prepare import train_tokenizer
from tests.helpers.tiny import WORDS, make_recipe


def records(folder: Path, rows: list[dict[str, object]]) -> Path:
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


NAMED = [{**turn, "role": {"user": "user", "assistant": "robot"}[turn["role"]]} for turn in CONVERSATION]


@pytest.mark.parametrize(
    ("rows", "corpus", "said"),
    [
        (
            [{"m": NAMED}] * 4,
            {"messages_column": "m"},
            "no turn has the role 'assistant', the roles are 'robot', 'user'",
        ),
        (
            [{"m": CONVERSATION[:1]}] * 9,
            {"messages_column": "m"},
            "no turn has the role 'assistant', the roles are 'user'",
        ),
        (
            [{"ids": [*range(10, 40)], "mask": [0] * 30}] * 2,
            {"ids_column": "ids", "mask_column": "mask"},
            "column 'mask' is 1 where a token is learned",
        ),
        ([{"ids": [7]}] * 30, {"ids_column": "ids"}, "every document has one token"),
    ],
    ids=["roles", "users only", "zeros", "single tokens"],
)
def test_nothing_to_learn_is_refused_with_the_reason(
    tmp_path: Path, rows: list[dict[str, object]], corpus: dict[str, object], said: str
) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = PLAIN
    with pytest.raises(RecipeError, match=f"nothing to learn in .* train rows: {re.escape(said)}") as caught:
        prepare(tmp_path, tokenizer, records(tmp_path, rows), **corpus)
    assert len(str(caught.value).splitlines()) == 1 and ("loss_on = 'all'" in str(caught.value)) == ("m" in rows[0])
    assert not list((tmp_path / "run").rglob("*.arrow")), "and nothing is left behind"


def test_held_out_rows_without_anything_to_learn_are_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    documents = [{"ids": [100 + number, *range(10, 39)], "mask": [0, *[1] * 29]} for number in range(40)]
    corpus = {"ids_column": "ids", "mask_column": "mask", "heldout_fraction": 0.3}
    prepare(tmp_path, tokenizer, records(tmp_path, documents), **corpus)
    heldout = PackedRows(tmp_path / "run/heldout/corpus")
    held_out = set(heldout.take(np.arange(heldout.rows))[0].reshape(-1).tolist())
    for document in documents:
        if document["ids"][0] in held_out:
            document["mask"] = [0] * 30
    with pytest.raises(RecipeError, match=r"nothing to learn in .* heldout rows"):
        prepare(tmp_path / "run", tokenizer, records(tmp_path, documents), **corpus)


@pytest.mark.parametrize(("ones", "warned"), [(1, True), (3, False)])
def test_less_than_one_percent_is_warned_of(
    tmp_path: Path, ones: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    mask = [0] * 240
    for number in range(ones):
        mask[5 + 12 * number] = 1
    rows = [{"ids": [*range(10, 250)], "mask": mask}]
    with caplog.at_level("INFO"):
        packed = prepare(tmp_path, train_tokenizer(), records(tmp_path, rows), ids_column="ids", mask_column="mask")
    assert (packed.labels(np.arange(packed.rows)) != IGNORE).sum() == ones
    lines = [line for line in caplog.messages if "warning" in line]
    assert len(lines) == warned
    assert not warned or ("only 1 of 240 positions" in lines[0] and "column 'mask'" in lines[0])


def test_masked_rows_of_special_tokens_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tmp_path, corpus__objective="masked", corpus__special_tokens_in_text="control")
    (tmp_path / "text.txt").write_text("\n\n".join(["[UNK] [SEP] [MASK] [CLS] " * 5] * 9 + ["[UNK] " * 30] * 9))
    assert main(["prepare", str(recipe)]) == 2
    assert "nothing to learn" in " ".join(capsys.readouterr().err.split())


def prepared_with(folder: Path, vocab_size: int, **corpus: object) -> None:
    lines = [f"run_dir = {json.dumps(str(folder / 'run'))}", '[teacher]\nmodel = "none"', "[corpus]"]
    settings = {"source": str(folder / "text.txt"), "row_length": 12, "heldout_fraction": 0.0, **corpus}
    lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    (folder / "recipe.toml").write_text("\n".join(lines))
    prepare_corpus(load_recipe(folder / "recipe.toml"), train_tokenizer(), None, vocab_size)


def test_tokens_beyond_the_embedding_are_refused_where_they_are_used(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 4)
    used = max(tokenizer((tmp_path / "text.txt").read_text())["input_ids"])
    assert used < len(tokenizer)
    prepared_with(tmp_path, used + 1)  # a tokenizer may have more tokens than are used
    with pytest.raises(RecipeError, match=rf"text.txt: the teacher has no embedding for token {used} ") as caught:
        prepared_with(tmp_path, used, row_length=13)
    message = str(caught.value)
    assert (
        len(message.splitlines()) == 1 and repr(tokenizer.decode([used])) in message and f"end at {used - 1}" in message
    )


@pytest.mark.parametrize("kind", ["text", "ids", "masked"])
def test_the_command_refuses_tokens_beyond_the_embedding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    recipe = make_recipe(tmp_path, **({"corpus__objective": "masked"} if kind == "masked" else {}))
    config = tmp_path / "teacher/config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "vocab_size": 3 if kind == "masked" else WORDS - 1}))
    options = []
    if kind == "ids":
        records(tmp_path, [{"ids": [*range(1, WORDS)]}, {"ids": [*range(WORDS - 9, WORDS)]}] * 3)
        options = ["--set", f"corpus.source={tmp_path / 'records.jsonl'}", "--set", "corpus.ids_column=ids"]
        options += ["--set", "corpus.heldout_fraction=0"]
    assert main(["prepare", str(recipe), *options]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "has no embedding for token" in said and ("special tokens of masked rows" in said) == (kind == "masked")
