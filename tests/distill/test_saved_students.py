"""Trained students open with transformers alone, to the ids of the cache's tokenizer and the logits of this library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from logit_cache.corpus.tokenizer import tokenizer_digest
from logit_cache.models.loading import load_model, load_tokenizer
from logit_cache.models.placement import choose_placement
from logit_cache.stages.app import main
from logit_cache.store.reader import LogitCache
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.conftest import Run
from tests.helpers.tiny import WORDS, make_recipe

TEXT = "w1 w2 <tool> w3\n\nw299 unknown <s> </s>  w4"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PADDED = 320
"""Logits of the teacher, more than its tokenizer has ids."""


def make_elaborate_teacher(folder: Path, *, tied: bool) -> None:
    """Padded vocabulary, added tokens, BOS, chat template, several ends of a text."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, WORDS - 2)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    tokenizer.add_tokens(["<tool>", "<end>"])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=PADDED, **sizes, max_position_embeddings=256, initializer_range=0.5, tie_word_embeddings=tied
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[2, WORDS - 1], bos_token_id=1, max_length=99)
    model.save_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_student_of_layers_opens_with_transformers(tied: bool, tmp_path: Path) -> None:
    recipe = str(make_recipe(tmp_path))
    make_elaborate_teacher(tmp_path / "teacher", tied=tied)
    for stage in ("prepare", "cache", "train"):
        assert main([stage, recipe, "--set", "train.steps=2"]) == 0
    final = tmp_path / "run/students/student/final"
    _check_tokenizer(final, LogitCache(tmp_path / "run/cache"))
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.config.vocab_size == PADDED and model.config.num_hidden_layers == 1
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.generation_config.eos_token_id == [2, WORDS - 1] and model.generation_config.bos_token_id == 1
    assert AutoTokenizer.from_pretrained(final).chat_template == TEMPLATE
    ids = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        ours = load_model(final, choose_placement("cpu", "float32"))(input_ids=ids).logits
        torch.testing.assert_close(model.eval().float()(input_ids=ids).logits, ours)


def test_a_masked_student_opens_with_transformers(tmp_path: Path) -> None:
    recipe = str(make_recipe(tmp_path, corpus__objective="masked"))
    for stage in ("prepare", "cache", "train"):
        assert main([stage, recipe, "--set", "train.steps=2"]) == 0
    final = tmp_path / "run/students/student/final"
    _check_tokenizer(final, LogitCache(tmp_path / "run/cache"))
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        ours = load_model(final, choose_placement("cpu", "float32"), objective="masked")(input_ids=ids).logits
        model = AutoModelForMaskedLM.from_pretrained(final).eval().float()
        torch.testing.assert_close(model(input_ids=ids).logits, ours)


def test_a_student_of_a_gguf_file_opens_with_transformers(small_run: Run) -> None:
    final = next(small_run.dir.glob("students/*/final"))
    _check_tokenizer(final, LogitCache(small_run.dir / "cache"))
    AutoModelForCausalLM.from_pretrained(final)


def _check_tokenizer(final: Path, cache: LogitCache) -> None:
    plain, cached = AutoTokenizer.from_pretrained(final), load_tokenizer(str(cache.tokenizer_dir))
    assert plain(TEXT)["input_ids"] == cached(TEXT)["input_ids"]
    assert plain.get_vocab() == cached.get_vocab()
    assert tokenizer_digest(plain) == cache.tokenizer_digest
