"""From text to packed rows: documents -> tokens -> rows of equal length.

Documents are joined, each closed by the end-of-sequence token, and cut into rows. Whole documents are held out, chosen
by a hash of their text, so that copies of one document land on the same side.
"""

from __future__ import annotations

import logging
import math
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.durable import TEMPORARY, json_digest, read_json, remove_staged, remove_tree
from ..base.errors import CorruptError, MismatchError, RecipeError
from ..base.lock import locked
from ..base.places import Place, names_in
from ..recipe.paths import CORPUS, CachePaths
from ..recipe.schema import CorpusConfig, Recipe
from .corpus_files import META, RECORD, publish_corpus
from .encoding import Encoder
from .parts import Sources
from .portion_records import PortionRecord, Side
from .portion_work import PortionWork
from .rows import PackedRows
from .source_record import SOURCES, changed_part, record_of
from .sources import find_sources, shown_source
from .tokenizer import TOKENIZER, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FEW = 0.01
"""Share of learned positions under which `prepare` warns."""


def prepare_corpus(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int | None,
    vocab_size: int | None = None,
    *,
    task: int = 0,
    num_tasks: int = 1,
) -> None:
    """Write the training and held-out rows of a recipe; a side that exists with the same settings is kept.

    Task `task` of `num_tasks` packs every `num_tasks`-th portion of the text; a call for all of them packs what is missing
    and makes the corpora of it. Rows are the same whatever was packed by whom.

    Raises RecipeError for text that is missing, empty or not UTF-8, for rows longer than `max_positions` of the
    teacher, for tokens beyond the `vocab_size` rows of its embedding, and where no position has anything to learn,
    MismatchError where a cache was built on rows with other settings.
    """
    config = recipe.corpus
    if not 0 <= task < num_tasks:
        raise RecipeError(f"task {task} is outside 0..{num_tasks - 1}: {num_tasks} tasks share the text")
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
    done = _prepared_sides(sides, settings, sources)
    if done.keys() == sides.keys():
        _say_done(done)
        if any(RECORD in name or TEMPORARY in name for path in sides.values() for name in names_in(path)):
            with locked(_lock_of(recipe)) as alone:  # the last process was killed before its end
                _tidy(sides, alone)
        return
    for line in sources.notes:
        logger.info(f"prepare: {line}")
    if num_tasks > 1:
        try:
            PortionWork(recipe, tokenizer, sources, settings, sides, vocab_size).share(task, num_tasks)
        except FileNotFoundError:
            # Another process has made the corpus meanwhile, and deleted what was staged here.
            done = _prepared_sides(sides, settings, sources)
            if done.keys() != sides.keys():
                raise
            _say_done(done)
        return
    with locked(_lock_of(recipe)) as alone:
        for path in sides.values():
            if alone and isinstance(path, Path):
                remove_staged(path)
        done = _prepared_sides(sides, settings, sources)  # by now another process may have done it
        _say_done(done)
        if done.keys() != sides.keys():
            work = PortionWork(recipe, tokenizer, sources, settings, sides, vocab_size)
            try:
                _Merge(recipe, tokenizer, sources, work, settings, sides, done).run()
                _tidy(sides, alone)
            except RecipeError:
                if len(work.portions) == 1:  # nothing of it is worth keeping
                    _discard(sides, done)
                raise


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


class _Merge:
    """Makes corpora of packed portions."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sources,
        work: PortionWork,
        settings: dict[str, Any],
        sides: dict[str, Place],
        done: dict[str, Place],
    ) -> None:
        self._recipe, self._config, self._tokenizer, self._sources = recipe, recipe.corpus, tokenizer, sources
        self._work, self._settings, self._sides, self._done = work, settings, sides, done

    def run(self) -> None:
        """Pack what is missing, and publish the sides that are not done."""
        taken = self._packed()
        first = taken[0][0]
        totals = {
            side: _Total([record.sides[side] for record, of in taken if of[side]], first.sides[side])
            for side in self._sides
        }
        for side, total in totals.items():
            if total.rows == 0 and (side == "train" or self._config.heldout_fraction > 0):
                raise RecipeError(
                    f"corpus: the {total.documents} {side} documents hold {total.tokens:,} tokens, "
                    f"{'and none fits' if self._config.long_documents == 'drop' else 'less than'} one row of "
                    f"{self._config.row_length}: give more text or a smaller corpus.row_length"
                )
        records = [record for record, _ in taken]
        self._count_names(records)
        for side, total in totals.items():
            _check_learned(total, side, self._work.encoder, self._config)
        self._publish(records, totals)
        for line in self._work.encoder.said():
            logger.info(f"prepare: {line}")

    def _packed(self) -> list[tuple[PortionRecord, dict[str, bool]]]:
        """All portions that are needed. Raises RecipeError where there is no text, or too little to hold some out."""
        share, work = self._config.heldout_fraction, self._work
        taken = work.all(share)
        documents = sum(record.documents for record, _ in taken)
        if documents == 0:
            source = shown_source(self._config.source)
            raise RecipeError(f"corpus.source: no text in {source}: every document is empty")
        if share > 0 and not any(record.sides["heldout"].documents for record, _ in taken):
            # No document may fall below the fraction: hold out the one with the lowest draw.
            if documents < 2:
                raise RecipeError(
                    "corpus.source has one document, and held-out rows are split off by document: give several files, "
                    "set corpus.document_separator to cut it, or set corpus.heldout_fraction = 0"
                )
            taken = work.all(math.nextafter(min(record.lowest for record, _ in taken), math.inf))
        return taken

    def _count_names(self, records: list[PortionRecord]) -> None:
        """Count roles and names of special tokens over all portions, for the encoder to tell of."""
        self._work.encoder.restart()
        for record in records:
            self._work.encoder.roles.update(record.roles)
            self._work.encoder.special_tokens.documents.update(record.names)

    def _publish(self, records: list[PortionRecord], totals: dict[str, _Total]) -> None:
        known = {number: facts for record in records for number, facts in record.facts.items()}
        begun = max(record.begun for record in records)
        facts = [known[str(number)] for number in range(begun)]
        whole = len(records) == len(self._work.portions) and all(record.whole for record in records)
        settings = {**self._settings, "sources": record_of(facts, whole)}
        config, row_start = self._config, self._work.encoder.row_start
        with tempfile.TemporaryDirectory() as folder:
            if self._done:
                # Copy the tokenizer of the other side: another version of tokenizers may save it in other bytes.
                (other,) = self._done.values()
                tokenizer = PackedRows(other).local / TOKENIZER
            else:
                tokenizer = Path(folder)
                self._tokenizer.save_pretrained(tokenizer)
            for side, total in totals.items():
                if side in self._done:
                    continue
                meta = {
                    "settings": settings,
                    "row_length": config.row_length,
                    "documents": total.documents,
                    "row_start": list(row_start) if config.long_documents == "whole" else [],
                }
                publish_corpus(self._sides[side], meta, total.files, self._work.features, tokenizer, facts)
                logger.info(f"prepare: {self._sides[side]}: {_said(total, side, config)}")


class _Total:
    """What the portions of one side hold together."""

    def __init__(self, sides: list[Side], first: Side) -> None:
        self.rows = sum(side.rows for side in sides)
        self.documents = sum(side.documents for side in sides)
        self.tokens = sum(side.tokens for side in sides)
        self.left = sum(side.left for side in sides)
        self.long_documents = sum(side.long_documents for side in sides)
        self.learned = sum(side.learned for side in sides)
        self.padding = sum(side.padding for side in sides)
        # One file at least, so that the columns are known.
        self.files = [side.file for side in sides if side.rows] or [first.file]


def _tidy(sides: dict[str, Place], alone: bool) -> None:
    """Delete the records of portions that are in a corpus, and, for the one that may write it, what killed processes have
    left staged."""
    for path in sides.values():
        for name in names_in(path):
            if name.startswith(RECORD) and TEMPORARY not in name:
                (path / name).unlink(missing_ok=True)
        if alone and isinstance(path, Path):
            for leftover in list(path.rglob(f"*{TEMPORARY}-*")):
                remove_tree(leftover)


def _discard(sides: dict[str, Place], done: dict[str, Place]) -> None:
    """Delete what was packed for corpora that are not made."""
    _tidy(sides, alone=False)
    for side, path in sides.items():
        if side not in done and not (path / META).exists():
            remove_tree(path)


def _said(total: _Total, side: str, config: CorpusConfig) -> str:
    """What `prepare` prints of a side."""
    positions = max(total.rows * config.row_length, 1)
    said = (
        f"{total.rows:,} {side} rows of {config.row_length} tokens from {total.documents:,} documents "
        f"({total.left:,} tokens left over), {total.learned / positions:.0%} of the positions are learned"
    )
    if config.long_documents != "whole":
        what = "cut" if config.long_documents == "cut" else "left out"
        said += f"; documents longer than a row: {total.long_documents:,} {what}"
    return said + (f"; {total.padding / positions:.0%} padding" if total.padding else "")


def _check_learned(total: _Total, side: str, encoder: Encoder, config: CorpusConfig) -> None:
    """Warn where few positions of a side have anything to learn. Raises RecipeError where none has."""
    positions = total.rows * config.row_length
    if total.learned >= _FEW * positions:
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
    if total.learned == 0:
        raise RecipeError(f"corpus: nothing to learn in {total.rows:,} {side} rows: {why}")
    logger.warning(f"warning: only {total.learned:,} of {positions:,} positions of the {side} rows are learned: {why}")


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
