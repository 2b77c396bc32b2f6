"""From text to packed rows: documents -> tokens -> rows of equal length.

Documents are joined end to end, each closed by the tokenizer's end-of-sequence token, and cut into rows. Whole documents are
held out, chosen by a hash of their text: copies of one document land on the same side.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from typing import TYPE_CHECKING, Any

from ..base.durable import read_json
from ..base.errors import MismatchError, RecipeError
from ..base.places import Place
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
    """Write the training and held-out rows of a recipe, or find them done; a side that is there stays as it is.

    Raises RecipeError for text that is missing, empty or not UTF-8, and for rows longer than the teacher's positions;
    MismatchError if other rows are already there and a cache was built on them.
    """
    config = recipe.corpus
    if max_positions is not None and config.row_length > max_positions:
        raise RecipeError(
            f"corpus.row_length = {config.row_length} is beyond the teacher's {max_positions} positions: choose at most that"
        )
    settings = {
        "corpus": config.model_dump(),
        "sources": source_stamp(config),
        "seed": recipe.seed,
        "tokenizer": tokenizer_digest(tokenizer),
    }
    sides = {"train": recipe.paths.cache / "corpus", "heldout": recipe.paths.heldout / "corpus"}
    done = {side: PackedRows(path) for side, path in sides.items() if _already_prepared(path, settings)}
    for side, rows in done.items():
        logger.info(f"prepare: {rows.path} is done, {rows.rows:,} {side} rows of {rows.row_length} tokens")
    if done.keys() == sides.keys():
        return

    masking = Masking.of(tokenizer, config, recipe.seed) if config.objective == "masked" else None
    prefix, suffix = document_frame(tokenizer) if masking is None else ([], [])
    limits = {"train": config.max_rows, "heldout": _heldout_limit(config)}
    masked = config.mask_column is not None or (config.messages_column is not None and config.loss_on == "assistant")
    writers = {side: RowWriter(path, config.row_length, limits[side], masked, masking) for side, path in sides.items()}
    count = 0
    try:
        lowest: tuple[float, str] | None = None
        for document in read_documents(config, tokenizer):
            count += 1
            draw = _heldout_draw(document.key, recipe.seed)
            if lowest is None or draw < lowest[0]:
                lowest = (draw, document.key)
            side = "heldout" if draw < config.heldout_fraction else "train"
            if not writers[side].full:
                writers[side].add(*encode(tokenizer, document, prefix, suffix))
            if all(writer.full for writer in writers.values()):
                break
        if count == 0:
            raise RecipeError(f"corpus.source: no text in {shown_source(config.source)}: every document is empty")
        if config.heldout_fraction > 0 and writers["heldout"].documents == 0:
            # A small corpus may draw nothing: then the document nearest to being drawn is held out.
            if count < 2:
                raise RecipeError(
                    "corpus.source has one document, and held-out rows are split off by document: give several files, "
                    "set corpus.document_separator to cut it, or set corpus.heldout_fraction = 0"
                )
            assert lowest is not None
            for writer in writers.values():
                writer.restart()
            for document in read_documents(config, tokenizer):
                side = "heldout" if document.key == lowest[1] else "train"
                if not writers[side].full:
                    writers[side].add(*encode(tokenizer, document, prefix, suffix))
        for side, writer in writers.items():
            needed = side == "train" or config.heldout_fraction > 0
            if needed and writer.rows == 0:
                raise RecipeError(
                    f"corpus: the {writer.documents} {side} documents hold {writer.tokens:,} tokens, less than one row of "
                    f"{config.row_length}: give more text or a smaller corpus.row_length"
                )
        for side, writer in writers.items():
            if side in done:
                continue
            if done:
                # The same files on both sides: other versions write the same tokenizer in other bytes, and a cache may be
                # built on what was here before.
                (other,) = done.values()
                shutil.copytree(other.local / TOKENIZER, writer.aside / TOKENIZER)
            else:
                tokenizer.save_pretrained(writer.aside / TOKENIZER)
            writer.commit(settings)
            logger.info(
                f"prepare: {writer.path}: {writer.committed_rows:,} {side} rows of {config.row_length} tokens from "
                f"{writer.documents:,} documents ({writer.dropped:,} tokens left over)"
            )
    finally:
        for writer in writers.values():
            writer.discard()


def _heldout_limit(config: CorpusConfig) -> int | None:
    """Held-out rows at most. Where only the training rows are limited, as many as are held out of so many rows: the rest of a
    large corpus need not be read for them."""
    share = config.heldout_fraction
    if share == 0:
        return 0
    if config.max_heldout_rows is None and config.max_rows is not None:
        return math.ceil(config.max_rows * share / (1 - share))
    return config.max_heldout_rows


def _heldout_draw(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the document alone."""
    digest = hashlib.blake2b(text.encode(), key=str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _already_prepared(path: Place, settings: dict[str, Any]) -> bool:
    meta = read_json(path / META, f"delete {path} and run `prepare`")
    if meta is None:
        return False
    if meta["settings"] == settings:
        return True
    if (path.parent / "manifest.json").exists():
        changed = [key for key in settings if meta["settings"].get(key) != settings[key]]
        if "corpus" in changed:
            old, new = meta["settings"]["corpus"], settings["corpus"]
            changed += [f"corpus.{k} ({old.get(k)!r} -> {new[k]!r})" for k in new if old.get(k) != new[k]]
            changed.remove("corpus")
        raise MismatchError(
            f"{path} was prepared with other settings and a cache is built on it: {', '.join(changed)} differ: "
            "choose another run_dir, or delete that one"
        )
    return False
