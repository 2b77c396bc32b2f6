"""From text to packed rows: documents -> tokens -> rows of equal length.

Documents are joined, each closed by the end-of-sequence token, and cut into rows. Whole documents are held out, chosen
by a hash of their text, so that copies of one document land on the same side.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.durable import json_digest, read_json, remove_staged
from ..base.errors import CorruptError, MismatchError, RecipeError
from ..base.lock import locked
from ..base.places import Place
from ..recipe.paths import CORPUS, CachePaths
from ..recipe.schema import CorpusConfig, Recipe
from .documents import Document, read_documents
from .encoding import Encoder
from .masking import Masking
from .packers import EndToEnd, Packer, WholeDocuments
from .packing_pass import pack
from .parts import Sources
from .row_writer import RowWriter
from .rows import META, PackedRows
from .source_record import SOURCES, changed_part, part_facts, record_of
from .sources import find_sources, shown_source
from .tokenizer import TOKENIZER, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FEW = 0.01
"""Share of learned positions under which `prepare` warns."""


def prepare_corpus(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_positions: int | None, vocab_size: int | None = None
) -> None:
    """Write the training and held-out rows of a recipe; a side that exists with the same settings is kept.

    Raises RecipeError for text that is missing, empty or not UTF-8, for rows longer than `max_positions` of the
    teacher, for tokens beyond the `vocab_size` rows of its embedding, and where no position has anything to learn,
    MismatchError where a cache was built on rows with other settings.
    """
    config = recipe.corpus
    if max_positions is not None and config.row_length > max_positions:
        raise RecipeError(
            f"corpus.row_length = {config.row_length} exceeds the teacher's {max_positions} positions: set at most {max_positions}"
        )
    sources = find_sources(config)
    settings = {
        "corpus": config.model_dump(),
        "seed": recipe.seed,
        "tokenizer": tokenizer_digest(tokenizer),
    }
    if config.messages_column is not None:
        settings["chat_template"] = json_digest(tokenizer.chat_template)
    sides = {"train": CachePaths(recipe.paths.cache).corpus, "heldout": CachePaths(recipe.paths.heldout).corpus}
    if _prepared_sides(sides, settings, sources).keys() == sides.keys():
        _say_done(sides)
        return
    with locked(_lock_of(recipe)) as alone:
        for path in sides.values():
            if alone and isinstance(path, Path):
                remove_staged(path)
        done = _prepared_sides(sides, settings, sources)  # by now another process may have done it
        _say_done(done)
        if done.keys() != sides.keys():
            _write_sides(recipe, tokenizer, sources, settings, sides, done, vocab_size)


def _prepared_sides(sides: dict[str, Place], settings: dict[str, Any], sources: Sources) -> dict[str, Place]:
    """The sides that exist with these settings. Raises MismatchError as `prepare_corpus`."""
    return {side: path for side, path in sides.items() if _already_prepared(path, settings, sources)}


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
    sources: Sources,
    settings: dict[str, Any],
    sides: dict[str, Place],
    done: dict[str, Place],
    vocab_size: int | None,
) -> None:
    """Write the sides that are not done."""
    config = recipe.corpus
    for line in sources.notes:
        logger.info(f"prepare: {line}")
    encoder = Encoder(config, tokenizer, vocab_size)
    writers = _writers(recipe, tokenizer, encoder, sides)
    try:
        _split_documents(recipe, sources, encoder, writers)
        for side, writer in writers.items():
            _check_learned(writer, side, encoder, config)
        facts = part_facts(sources)
        settings = {**settings, "sources": record_of(facts, sources.whole)}
        for side, writer in writers.items():
            if side in done:
                continue
            (writer.staged / SOURCES).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            if done:
                # Copy the tokenizer of the other side: another version of tokenizers may save it in other bytes.
                (other,) = done.values()
                shutil.copytree(PackedRows(other).local / TOKENIZER, writer.staged / TOKENIZER)
            else:
                tokenizer.save_pretrained(writer.staged / TOKENIZER)
            writer.commit(settings, encoder.row_start if config.long_documents == "whole" else ())
            logger.info(f"prepare: {writer.path}: {_said(writer, side, config)}")
        for line in encoder.said():
            logger.info(f"prepare: {line}")
    finally:
        for writer in writers.values():
            writer.discard()


def _writers(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, encoder: Encoder, sides: dict[str, Place]
) -> dict[str, RowWriter]:
    """A writer for each side. Raises RecipeError for rows too short, and for special tokens that the teacher lacks."""
    config, start = recipe.corpus, encoder.row_start
    length, whole = config.row_length, config.long_documents == "whole"
    if start and length < len(start) + 2:
        raise RecipeError(
            f"corpus.row_length = {length}: a row that begins with {tokenizer.decode(start)!r} needs {len(start) + 2} "
            "tokens"
        )
    masking = Masking.of(tokenizer, config, recipe.seed) if config.objective == "masked" else None
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if masking is not None:
        used = [masking.cls_id, masking.sep_id, masking.pad_id, masking.mask_id]
        encoder.check(np.array(used, np.int32), "the special tokens of masked rows")
    if not whole:
        encoder.check(np.array([padding], np.int32), "padding")
    # A mask also leaves out what follows the start of a row, and padding.
    masked = bool(start) or not whole or config.mask_column is not None
    masked |= config.messages_column is not None and config.loss_on == "assistant"

    def packer() -> Packer:
        return EndToEnd(length, start) if whole else WholeDocuments(length, padding, cut=config.long_documents == "cut")

    limits = {"train": config.max_rows, "heldout": _heldout_limit(config)}
    return {side: RowWriter(path, length, limits[side], masked, masking, packer) for side, path in sides.items()}


def _split_documents(recipe: Recipe, sources: Sources, encoder: Encoder, writers: dict[str, RowWriter]) -> None:
    """Encode every document and give it to the writer of its side, until both writers are full.

    Raises RecipeError where the source is empty, or too small for rows on both sides.
    """
    config = recipe.corpus
    share = config.heldout_fraction

    def documents() -> Iterator[Document]:
        return read_documents(config, encoder.tokenizer, sources)

    count, lowest = pack(documents(), encoder, writers, lambda draw: draw < share, recipe.seed)
    if count == 0:
        raise RecipeError(f"corpus.source: no text in {shown_source(config.source)}: every document is empty")
    if share > 0 and writers["heldout"].documents == 0:
        # No document of a small corpus may fall below the fraction: hold out the one with the lowest draw.
        if count < 2:
            raise RecipeError(
                "corpus.source has one document, and held-out rows are split off by document: give several files, "
                "set corpus.document_separator to cut it, or set corpus.heldout_fraction = 0"
            )
        for writer in writers.values():
            writer.restart()
        encoder.restart()
        pack(documents(), encoder, writers, lambda draw: draw <= lowest, recipe.seed)
    for side, writer in writers.items():
        writer.finish()
        if writer.rows == 0 and (side == "train" or config.heldout_fraction > 0):
            raise RecipeError(
                f"corpus: the {writer.documents} {side} documents hold {writer.tokens:,} tokens, "
                f"{'and none fits' if config.long_documents == 'drop' else 'less than'} one row of {config.row_length}: "
                "give more text or a smaller corpus.row_length"
            )


def _said(writer: RowWriter, side: str, config: CorpusConfig) -> str:
    """What `prepare` prints of a side."""
    positions = max(writer.rows * config.row_length, 1)
    said = (
        f"{writer.rows:,} {side} rows of {config.row_length} tokens from {writer.documents:,} documents "
        f"({writer.packer.left:,} tokens left over), {writer.learned / positions:.0%} of the positions are learned"
    )
    if isinstance(writer.packer, WholeDocuments):
        what = "cut" if config.long_documents == "cut" else "left out"
        said += f"; documents longer than a row: {writer.packer.long_documents:,} {what}"
    return said + (f"; {writer.padding / positions:.0%} padding" if writer.padding else "")


def _check_learned(writer: RowWriter, side: str, encoder: Encoder, config: CorpusConfig) -> None:
    """Warn where few positions of a side have anything to learn. Raises RecipeError where none has."""
    positions = writer.rows * config.row_length
    if writer.learned >= _FEW * positions:
        return
    roles, turns = encoder.roles, sum(encoder.roles.values())
    why = "every document has one token"
    if config.mask_column is not None:
        why = f"column {config.mask_column!r} is 1 where a token is learned"
    elif turns and "assistant" not in roles:
        why = f"no turn has the role 'assistant', the roles are {', '.join(map(repr, sorted(roles)))}: name it by corpus.roles"
    elif turns:
        why = f"of {turns:,} turns only the {roles['assistant']:,} of the role 'assistant' are learned"
    elif config.objective == "masked":
        why = "all tokens are special ones"
    why += ", or set corpus.loss_on = 'all' to learn all turns" if turns else ""
    if writer.learned == 0:
        raise RecipeError(f"corpus: nothing to learn in {writer.rows:,} {side} rows: {why}")
    logger.warning(f"warning: only {writer.learned:,} of {positions:,} positions of the {side} rows are learned: {why}")


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


def _already_prepared(path: Place, settings: dict[str, Any], sources: Sources) -> bool:
    meta = read_json(path / META, f"delete {path} and run `prepare`")
    if meta is None:
        return False
    before = meta["settings"]
    changed = [key for key in settings if before.get(key) != settings[key]]
    if "corpus" in changed:
        old, new = before["corpus"], settings["corpus"]
        changed += [f"corpus.{k} ({old.get(k)!r} -> {new[k]!r})" for k in new if old.get(k) != new[k]]
        changed.remove("corpus")
    if not changed:
        facts = None
        with suppress(CorruptError):
            facts = read_json(path / SOURCES, "it is made again")
        if (part := changed_part(before.get("sources"), facts, sources)) is not None:
            changed.append(f"sources ({part})")
    if changed and CachePaths(path.parent).manifest.exists():
        raise MismatchError(
            f"{path} was prepared with other settings and a cache is built on it: {', '.join(changed)} differ: "
            "choose another run_dir, or delete this one"
        )
    return not changed
