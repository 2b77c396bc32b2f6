"""A teacher of random weights with 300 words, and a recipe for it: both stages in well under a second."""

from __future__ import annotations

import random
from pathlib import Path

import tomli_w

WORDS = 300


def make_teacher(folder: Path, *, seed: int = 0, words: int = WORDS, dtype: str = "float32", layers: int = 2) -> Path:
    """A small Llama and its word tokenizer, saved as transformers saves them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, **{f"w{number}": number for number in range(1, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=256,
        # Wide enough that the distribution is peaked, as that of a trained teacher is.
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make_masked_teacher(folder: Path, *, layers: int = 3, heads: int = 2) -> Path:
    """A BERT of random weights whose tokenizer file stores truncation and padding, as published ones do."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    words = [*special.values(), *(f"w{number}" for number in range(1, WORDS - 4))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def make_recipe(folder: Path, **changes: object) -> Path:
    """Teacher, text and recipe in `folder`; the run goes to folder/run. `changes` as section__key=value."""
    folder.mkdir(parents=True, exist_ok=True)
    masked = changes.get("corpus__objective") == "masked"
    (make_masked_teacher if masked else make_teacher)(folder / "teacher")
    draw = random.Random(0)
    documents = [" ".join(f"w{draw.randrange(1, WORDS)}" for _ in range(draw.randrange(4, 60))) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    recipe: dict[str, dict[str, object] | object] = {
        "run_dir": str(folder / "run"),
        "teacher": {"model": str(folder / "teacher"), "device": "cpu", "dtype": "float32", "batch_rows": 3},
        "corpus": {
            "source": str(folder / "text.txt"),
            "document_separator": "\n\n",
            "row_length": 16,
            "max_rows": 40,
            "heldout_fraction": 0.2,
            "max_heldout_rows": 6,
        },
        "cache": {"k": 8, "heldout_k": 16, "shard_rows": 4},
        "train": {
            "layers": 1,
            "steps": 6,
            "batch_rows": 2,
            "save_steps": 2,
            "log_steps": 1,
            "warmup_steps": 0,
            "device": "cpu",
            "dtype": "float32",
        },
        "students": {"student": {"mode": "cached"}},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            recipe.setdefault(section, {})[name] = value  # type: ignore[index]
        else:
            recipe[section] = value
    file = folder / "recipe.toml"
    file.write_text(tomli_w.dumps(recipe))
    return file
