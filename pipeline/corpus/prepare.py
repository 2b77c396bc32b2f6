"""From text to packed rows: documents -> tokens -> rows of equal length.

Documents are joined, each closed by the end-of-sequence token, and cut into rows. Whole documents are held out, chosen
by a hash of their text, so that copies of one document land on the same side.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.durable import read_json, remove_staged
from ..base.errors import MismatchError, RecipeError
from ..base.lock import locked
from ..base.places import Place
from ..recipe.paths import CORPUS, CachePaths
from ..recipe.schema import CorpusConfig, Recipe
from .documents import encode, read_documents
from .masking import Masking
from .row_writer import RowWriter
from .rows import META, PackedRows
from .sources import shown_source, source_stamp
from .tokenizer import TOKENIZER, document_frame, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def prepare_corpus(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> None:
    """Write the training and held-out rows of a recipe; a side that exists with the same settings is kept.

    Raises RecipeError for text that is missing, empty or not UTF-8, and for rows longer than `max_positions` of the
    teacher, MismatchError where a cache was built on rows with other settings.
    """
    config = recipe.corpus
    if max_positions is not None and config.row_length > max_positions:
        raise RecipeError(
            f"corpus.row_length = {config.row_length} exceeds the teacher's {max_positions} positions: set at most {max_positions}"
        )
    settings = {
        "corpus": config.model_dump(),
        "sources": source_stamp(config),
        "seed": recipe.seed,
        "tokenizer": tokenizer_digest(tokenizer),
    }
    sides = {"train": CachePaths(recipe.paths.cache).corpus, "heldout": CachePaths(recipe.paths.heldout).corpus}
    if _prepared_sides(sides, settings).keys() == sides.keys():
        _say_done(sides)
        return
    with locked(_lock_of(recipe)) as alone:
        for path in sides.values():
            if alone and isinstance(path, Path):
                remove_staged(path)
        done = _prepared_sides(sides, settings)  # by now another process may have done it
        _say_done(done)
        if done.keys() != sides.keys():
            _write_sides(recipe, tokenizer, settings, sides, done)


def _prepared_sides(sides: dict[str, Place], settings: dict[str, Any]) -> dict[str, Place]:
    """The sides that exist with these settings. Raises MismatchError as `prepare_corpus`."""
    return {side: path for side, path in sides.items() if _already_prepared(path, settings)}


def _say_done(done: dict[str, Place]) -> None:
    for side, path in done.items():
        rows = PackedRows(path)
        logger.info(f"prepare: {path} is done, {rows.rows:,} {side} rows of {rows.row_length} tokens")


def _lock_of(recipe: Recipe) -> Path:
    """What a process locks that writes the rows of a recipe; of rows in an object store, the run's directory."""
    corpus = CachePaths(recipe.paths.cache).corpus
    return corpus if isinstance(corpus, Path) else recipe.run_dir / CORPUS


def _write_sides(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    sides: dict[str, Place],
    done: dict[str, Place],
) -> None:
    """Write the sides that are not done."""
    config = recipe.corpus
    masking = Masking.of(tokenizer, config, recipe.seed) if config.objective == "masked" else None
    limits = {"train": config.max_rows, "heldout": _heldout_limit(config)}
    masked = config.mask_column is not None or (config.messages_column is not None and config.loss_on == "assistant")
    writers = {side: RowWriter(path, config.row_length, limits[side], masked, masking) for side, path in sides.items()}
    try:
        _split_documents(recipe, tokenizer, writers)
        for side, writer in writers.items():
            if side in done:
                continue
            if done:
                # Copy the tokenizer of the other side: another version of tokenizers may save it in other bytes.
                (other,) = done.values()
                shutil.copytree(PackedRows(other).local / TOKENIZER, writer.staged / TOKENIZER)
            else:
                tokenizer.save_pretrained(writer.staged / TOKENIZER)
            writer.commit(settings)
            logger.info(
                f"prepare: {writer.path}: {writer.rows:,} {side} rows of {config.row_length} tokens from "
                f"{writer.documents:,} documents ({writer.dropped:,} tokens left over)"
            )
    finally:
        for writer in writers.values():
            writer.discard()


def _split_documents(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, writers: dict[str, RowWriter]) -> None:
    """Encode every document and give it to the writer of its side, until both writers are full.

    Raises RecipeError where the source is empty, or too small for rows on both sides.
    """
    config = recipe.corpus
    frame = document_frame(tokenizer) if config.objective == "causal" else ([], [])
    count = 0
    lowest: tuple[float, str] | None = None
    for document in read_documents(config, tokenizer):
        count += 1
        draw = _heldout_draw(document.text, recipe.seed)
        if lowest is None or draw < lowest[0]:
            lowest = (draw, document.text)
        writer = writers["heldout" if draw < config.heldout_fraction else "train"]
        if not writer.full:
            writer.add(*encode(tokenizer, document, *frame))
        if all(writer.full for writer in writers.values()):
            break
    if lowest is None:
        raise RecipeError(f"corpus.source: no text in {shown_source(config.source)}: every document is empty")
    if config.heldout_fraction > 0 and writers["heldout"].documents == 0:
        # No document of a small corpus may fall below the fraction: hold out the one with the lowest draw.
        if count < 2:
            raise RecipeError(
                "corpus.source has one document, and held-out rows are split off by document: give several files, "
                "set corpus.document_separator to cut it, or set corpus.heldout_fraction = 0"
            )
        for writer in writers.values():
            writer.restart()
        for document in read_documents(config, tokenizer):
            writer = writers["heldout" if document.text == lowest[1] else "train"]
            if not writer.full:
                writer.add(*encode(tokenizer, document, *frame))
    for side, writer in writers.items():
        if writer.rows == 0 and (side == "train" or config.heldout_fraction > 0):
            raise RecipeError(
                f"corpus: the {writer.documents} {side} documents hold {writer.tokens:,} tokens, less than one row of "
                f"{config.row_length}: give more text or a smaller corpus.row_length"
            )


def _heldout_limit(config: CorpusConfig) -> int | None:
    """Maximum of held-out rows.

    Where only the training rows are limited, the same share of that number, so that a large corpus need not be read to
    its end.
    """
    share = config.heldout_fraction
    if share == 0:
        return 0
    if config.max_heldout_rows is None and config.max_rows is not None:
        return math.ceil(config.max_rows * share / (1 - share))
    return config.max_heldout_rows


def _heldout_draw(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on text and seed only."""
    digest = hashlib.blake2b(text.encode(), key=str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _already_prepared(path: Place, settings: dict[str, Any]) -> bool:
    meta = read_json(path / META, f"delete {path} and run `prepare`")
    if meta is None:
        return False
    if meta["settings"] == settings:
        return True
    if CachePaths(path.parent).manifest.exists():
        changed = [key for key in settings if meta["settings"].get(key) != settings[key]]
        if "corpus" in changed:
            old, new = meta["settings"]["corpus"], settings["corpus"]
            changed += [f"corpus.{k} ({old.get(k)!r} -> {new[k]!r})" for k in new if old.get(k) != new[k]]
            changed.remove("corpus")
        raise MismatchError(
            f"{path} was prepared with other settings and a cache is built on it: {', '.join(changed)} differ: "
            "choose another run_dir, or delete this one"
        )
    return False
