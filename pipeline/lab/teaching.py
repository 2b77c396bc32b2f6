"""A teacher trained on the recipe's own text, as a student is, and saved to the recipe's teacher.model.

It starts from random weights, or from a model without its output layer (a masked model's head, say), with the tokenizer
of that model or a new one: a byte-level BPE of the text (Sennrich et al. 2016, arXiv 1508.07909), which writes every
alphabet.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from ..base.durable import publish_directory, read_json, remove_tree, staging_directory, write_json
from ..base.errors import MismatchError, RecipeError
from ..corpus.documents import texts
from ..corpus.labels import IGNORE
from ..corpus.prepare import prepare_corpus
from ..corpus.rows import PackedRows
from ..corpus.sources import find_sources
from ..corpus.tokenizer import TOKENIZER
from ..distill.stage_two import train_student
from ..distill.student import architecture_config, build_student
from ..models.loading import load_config, load_tokenizer, max_positions, quiet_transformers
from ..recipe.paths import StudentPaths
from ..recipe.schema import CorpusConfig, Recipe
from ..recipe.student import PLACEMENT_KEYS, StudentConfig, TeacherTraining, deciding_settings
from .text_rows import TextRows

logger = logging.getLogger(__name__)

TAUGHT = "taught.json"
"""Record of the settings and the text, in the directories of the teacher and of its training."""
_BLOCK = 256
_SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
    "mask_token": "<mask>",
}


def teach(recipe: Recipe) -> None:
    """Train the recipe's teacher, unless it exists; continues from its last checkpoint.

    The teacher learns from the training documents only, in rows of its own, one for each row of its steps.

    Raises RecipeError for a recipe without teacher.training or a teacher.model that is not a directory, MismatchError
    where the teacher or its training exists with other settings or another text.
    """
    settings, target = recipe.teacher.training, Path(recipe.teacher.model)
    if settings is None:
        raise RecipeError("teacher.training is missing: it says how the teacher is trained")
    if ":" in recipe.teacher.model or target.suffix == ".gguf":
        raise RecipeError(
            f"teacher.model = {recipe.teacher.model!r} is not a directory: a trained teacher is saved to one"
        )
    folder = recipe.paths.teach
    rows_recipe = _rows_recipe(recipe, settings)
    record = _record(recipe, rows_recipe, settings)
    exists = (target / "config.json").exists()
    changed = _changed(target if exists else folder, record)
    if changed and (exists or StudentPaths(folder).record.exists()):
        raise MismatchError(
            f"{target if exists else folder}: this teacher was begun with other settings ({', '.join(changed)} differ)"
            f": give the new one another teacher.model and run_dir, or delete {target} and {folder}"
        )
    if exists:
        logger.info(f"teach: {target} exists")
        return
    if changed:
        remove_tree(folder)  # rows and tokenizer only: no training has begun
    write_json(folder / TAUGHT, record)
    # The keys that teachers share with students.
    config = StudentConfig(**{name: getattr(settings, name) for name in StudentConfig.model_fields})
    if settings.vocabulary is not None:
        tokenizer = _tokenizer(recipe.corpus, settings.vocabulary, folder / TOKENIZER)
    else:
        tokenizer = load_tokenizer(str(settings.model), trust_remote_code=settings.trust_remote_code)
    fresh = settings.architecture
    start_config = (
        load_config(str(settings.model), trust_remote_code=settings.trust_remote_code)
        if fresh is None
        else architecture_config(fresh)
    )
    vocab_size = getattr(start_config.get_text_config(), "vocab_size", None)
    prepare_corpus(rows_recipe, tokenizer, max_positions(start_config), vocab_size)
    rows = TextRows(PackedRows.of_cache(rows_recipe.paths.cache))
    start = _first_weights(config, rows, folder, recipe.seed)
    config = config.model_copy(update={"architecture": None, "model": str(start)})
    train_student(config, "teacher", rows, folder, seed=recipe.seed)
    with staging_directory(target, alone=True) as staged:
        shutil.copytree(StudentPaths(folder).final, staged, dirs_exist_ok=True)
        write_json(staged / TAUGHT, record)
        publish_directory(staged, target)
    logger.info(f"teach: {target}")


def _rows_recipe(recipe: Recipe, settings: TeacherTraining) -> Recipe:
    """The recipe with which the teacher's own rows are prepared, in the directory of its training."""
    limits = {"max_rows": settings.steps * settings.step_rows, "max_heldout_rows": 1}
    return recipe.model_copy(
        update={
            "run_dir": recipe.paths.teach,
            "corpus": recipe.corpus.model_copy(update=limits),
            "cache": recipe.cache.model_copy(update={"location": None}),
        }
    )


def _record(recipe: Recipe, rows_recipe: Recipe, settings: TeacherTraining) -> dict[str, Any]:
    """Everything that determines the teacher."""
    training = deciding_settings(settings.model_dump(mode="json"))
    training = {key: value for key, value in training.items() if key not in PLACEMENT_KEYS}
    return {
        **{f"teacher.training.{key}": value for key, value in training.items()},
        **{f"corpus.{key}": value for key, value in rows_recipe.corpus.model_dump(mode="json").items()},
        "the text": [[part.name, part.version().size] for part in find_sources(recipe.corpus).parts],
        "seed": recipe.seed,
    }


def _changed(folder: Path, record: dict[str, Any]) -> list[str]:
    """Keys of `record` that differ in the record of a directory; none without one."""
    known = read_json(folder / TAUGHT, f"delete {folder}") or {}
    return [key for key, value in record.items() if known.get(key, value) != value]


def _first_weights(config: StudentConfig, rows: TextRows, folder: Path, seed: int) -> Path:
    """Directory of the first weights, made once. A bias of the output layer starts as a unigram model of the rows.

    Adam moves a bias by at most one learning rate a step: this saves the thousands of steps to the token frequencies.
    """
    path = folder / "begin"
    if (path / "config.json").exists():
        return path
    model = build_student(config, StudentPaths(folder), seed, rows.objective, new_head=True)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        counts = torch.ones(len(bias))
        for first in range(0, len(rows), _BLOCK):
            labels = rows.batch(range(first, min(first + _BLOCK, len(rows))))["labels"]
            counts += torch.bincount(labels[labels != IGNORE], minlength=len(bias))
        bias.data.copy_((counts / counts.sum()).log())
    with staging_directory(path, alone=True) as staged:
        with quiet_transformers():
            model.save_pretrained(staged)
        load_tokenizer(str(rows.tokenizer_dir)).save_pretrained(staged)
        publish_directory(staged, path)
    return path


def _tokenizer(corpus: CorpusConfig, size: int, folder: Path) -> Any:
    """A byte-level BPE of the corpus, trained once."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        logger.info(f"teach: byte-level BPE of {size:,} tokens")
        backend = Tokenizer(BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(_SPECIAL.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts(corpus), trainer)
        with staging_directory(folder, alone=True) as staged:
            PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIAL).save_pretrained(staged)
            publish_directory(staged, folder)
    return load_tokenizer(str(folder))
