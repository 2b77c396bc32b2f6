"""Both stages on architectures whose packed rows would mix documents: teacher, student, evaluation and audit agree."""

from __future__ import annotations

from pathlib import Path

import pytest
from logit_cache.stages.app import main
from transformers import AutoModelForCausalLM

from tests.helpers.tiny import WORDS, make_recipe
from tests.models.tiny import small_config


@pytest.mark.slow
@pytest.mark.parametrize(("family", "rows"), [("mamba", "documents"), ("gpt_oss", "masks")])
def test_a_run_on_rows_of_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, rows: str) -> None:
    recipe = make_recipe(tmp_path, train__layers=4)
    for file in (tmp_path / "teacher").iterdir():
        if "token" not in file.name:
            file.unlink()
    config = small_config(family)
    config.vocab_size, config.initializer_range = WORDS, 0.2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    for command in ("prepare", "cache", "train", "evaluate"):
        assert main([command, str(recipe)]) == 0, command
        shown = capsys.readouterr()
        if command in ("cache", "train"):
            assert f"; rows {rows} (" in shown.err + shown.out
    assert main(["verify", str(tmp_path / "run/cache"), "--teacher"]) == 0
    assert main(["verify", str(tmp_path / "run/heldout"), "--teacher"]) == 0
