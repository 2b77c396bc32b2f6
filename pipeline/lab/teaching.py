"""A teacher where none is to be had: trained on the recipe's own text, as a student is, and saved where the recipe looks for it.

It starts fresh, or from a model whose output layer is missing (a masked model's head, say), and it may bring its own
tokenizer: a byte-level BPE of the text (Sennrich et al. 2016, arXiv 1508.07909), which writes every alphabet.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..base.durable import TEMPORARY, publish_directory, read_json, remove_tree, write_json
from ..base.errors import MismatchError, RecipeError
from ..corpus.documents import texts
from ..corpus.labels import IGNORE
from ..corpus.prepare import prepare_corpus
from ..corpus.rows import PackedRows
from ..corpus.sources import source_stamp
from ..corpus.tokenizer import TOKENIZER, tokenizer_digest
from ..distill.stage_two import train_student
from ..distill.student import build_student
from ..models.loading import load_config, load_tokenizer, max_positions, one_line_errors, quiet_transformers
from ..models.packing import document_mask
from ..recipe.paths import StudentPaths
from ..recipe.schema import CorpusConfig, Recipe
from ..recipe.student import PLACEMENT_KEYS, StudentConfig, TeacherTraining
from ..store.batch import Batch, IndexArray, split
from ..store.signals import Signal
from ..targets.sparse_targets import SparseTargets

logger = logging.getLogger(__name__)

TAUGHT = "taught.json"
"""Beside the teacher and what it is made of: the settings and the text that made it."""
_BLOCK = 256
_SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
    "mask_token": "<mask>",
}


class TextRows(Dataset[Batch]):
    """Rows with labels and no targets: what is left of a cache for those who learn from the text alone."""

    def __init__(self, corpus: PackedRows) -> None:
        self._corpus = corpus
        tokenizer = load_tokenizer(str(self.tokenizer_dir))
        self.vocab_size = len(tokenizer)
        self.tokenizer_digest = tokenizer_digest(tokenizer)
        self.row_length, self.objective, self.digest = corpus.row_length, corpus.objective, str(corpus.meta["digest"])
        self.knots: tuple[float, ...] = (1.0,)
        self.signals: dict[str, Signal] = {}

    @property
    def tokenizer_dir(self) -> Path:
        return self._corpus.local / TOKENIZER

    def __len__(self) -> int:
        return self._corpus.rows

    def __getitem__(self, index: int) -> Batch:
        return split(self.batch([index]))[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        return split(self.batch(indices))

    def segment_ids(self, indices: IndexArray) -> np.ndarray[Any, Any]:
        return self._corpus.take(indices)[1]

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        """Rows in the order asked for; no position has a target."""
        rows = np.asarray(indices, np.int64)
        input_ids, segments = (torch.from_numpy(part).long() for part in self._corpus.take(rows))
        nothing = torch.full((*input_ids.shape, 1), -1)
        targets = SparseTargets(
            token_ids=nothing,
            log_probs=torch.full(nothing.shape, -torch.inf),
            tail_curve=torch.full(nothing.shape, -torch.inf),
            mask=torch.zeros_like(input_ids, dtype=torch.bool),
            knots=self.knots,
            vocab_size=self.vocab_size,
        )
        labels = torch.from_numpy(self._corpus.labels(rows))
        batch = Batch(input_ids=input_ids, labels=labels, segment_ids=segments, targets=targets)
        if self.objective == "masked":
            batch["attention_mask"] = document_mask(segments)
        return batch


def teach(recipe: Recipe) -> None:
    """Train the recipe's teacher, unless it is there; continues from its last checkpoint.

    It learns from the training documents only, in rows of its own, as many as it takes steps for. Raises RecipeError
    where the recipe does not say how, or names no directory for it; MismatchError for a teacher that was made, or whose
    training was begun, with other settings or from another text.
    """
    settings, target = recipe.teacher.training, Path(recipe.teacher.model)
    if settings is None:
        raise RecipeError("teacher.training is missing: it says how the teacher is trained")
    if ":" in recipe.teacher.model or target.suffix == ".gguf":
        raise RecipeError(
            f"teacher.model = {recipe.teacher.model!r}: a teacher that is trained needs a directory to go to"
        )
    folder = recipe.paths.teach
    needed = settings.steps * settings.step_rows
    limits = {"max_rows": needed, "max_heldout_rows": 1}
    own = recipe.model_copy(
        update={
            "run_dir": folder,
            "corpus": recipe.corpus.model_copy(update=limits),
            "cache": recipe.cache.model_copy(update={"location": None}),  # that is for the run's own rows
        }
    )
    training = settings.model_dump(mode="json", exclude=set(PLACEMENT_KEYS))
    made_of = {
        **{f"teacher.training.{key}": value for key, value in training.items()},
        **{f"corpus.{key}": value for key, value in own.corpus.model_dump(mode="json").items()},
        "the text": source_stamp(recipe.corpus),
        "seed": recipe.seed,
    }
    there = (target / "config.json").exists()
    changed = _changed(target if there else folder, made_of)
    if changed and (there or StudentPaths(folder).record.exists()):
        raise MismatchError(
            f"{target if there else folder}: this teacher was begun with other settings ({', '.join(changed)} differ): "
            f"give the new one another teacher.model and run_dir, or delete {target} and {folder}"
        )
    if there:
        logger.info(f"teach: {target} is there")
        return
    if changed:
        remove_tree(folder)  # nothing was trained from it
    write_json(folder / TAUGHT, made_of)
    # None of what a recipe allows beyond training on labels is for teachers.
    config = StudentConfig(**{name: getattr(settings, name) for name in StudentConfig.model_fields})
    if settings.vocabulary is not None:
        tokenizer = _tokenizer(recipe.corpus, settings.vocabulary, folder / TOKENIZER)
    else:
        tokenizer = load_tokenizer(str(settings.model))
    prepare_corpus(own, tokenizer, max_positions(_start_config(settings)))
    rows = TextRows(PackedRows(own.paths.cache / "corpus"))
    config = config.model_copy(update={"architecture": None, "model": str(_begin(config, rows, folder, recipe.seed))})
    train_student(config, "teacher", rows, folder, seed=recipe.seed)
    aside = target.with_name(target.name + TEMPORARY)
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(StudentPaths(folder).final, aside)
    write_json(aside / TAUGHT, made_of)
    publish_directory(aside, target)
    logger.info(f"teach: {target}")


def _changed(folder: Path, made_of: dict[str, Any]) -> list[str]:
    """What differs from that of which a directory says it was made; nothing where it does not say."""
    known = read_json(folder / TAUGHT, f"delete {folder}") or {}
    return [key for key, value in made_of.items() if known.get(key, value) != value]


def _start_config(settings: TeacherTraining) -> Any:
    """The configuration of the model that a teacher starts from."""
    from transformers import AutoConfig

    if settings.architecture is None:
        return load_config(str(settings.model))
    architecture = dict(settings.architecture)
    with one_line_errors("architecture"):
        return AutoConfig.for_model(architecture.pop("model_type"), **architecture)


def _begin(config: StudentConfig, rows: TextRows, folder: Path, seed: int) -> Path:
    """The first weights, saved once. An output layer with a bias starts as a unigram model of the rows.

    Adam moves a bias by one learning rate a step at most; the thousands of steps to the words' frequencies are spared.
    """
    path = folder / "begin"
    if (path / "config.json").exists():
        return path
    model = build_student(config, StudentPaths(folder), seed, rows.objective)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        counts = torch.ones(len(bias))
        for first in range(0, len(rows), _BLOCK):
            labels = rows.batch(range(first, min(first + _BLOCK, len(rows))))["labels"]
            counts += torch.bincount(labels[labels != IGNORE], minlength=len(bias))
        bias.data.copy_((counts / counts.sum()).log())
    aside = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(aside, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(aside)
    load_tokenizer(str(rows.tokenizer_dir)).save_pretrained(aside)
    publish_directory(aside, path)
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
        aside = folder.with_name(folder.name + TEMPORARY)
        shutil.rmtree(aside, ignore_errors=True)
        PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIAL).save_pretrained(aside)
        publish_directory(aside, folder)
    return load_tokenizer(str(folder))
