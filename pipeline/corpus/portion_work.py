"""Packing the portions of a corpus: one after the other by one process, or a share of them by each of several tasks."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.errors import RecipeError
from ..base.places import Place
from ..base.progress import Meter
from ..recipe.schema import CorpusConfig, Recipe
from .documents import read_documents
from .encoding import Encoder
from .labels import LABELS, LOSS_MASK
from .masking import Masking
from .packers import EndToEnd, Packer, WholeDocuments
from .packing_pass import pack
from .parts import Sources
from .portion_records import SIDES, Limits, PortionRecord, PortionRecords, Side, begins_in
from .portions import Portion, portions_of
from .row_file import features_of, stored_columns
from .row_writer import RowWriter
from .source_record import facts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class PortionWork:
    """The portions of one recipe's corpus, and what packs them."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sources,
        settings: dict[str, Any],
        paths: dict[str, Place],
        vocab_size: int | None,
    ) -> None:
        """`paths`: the corpus directories by side. Raises RecipeError for rows too short, and as `Encoder`, `portions_of`."""
        self._recipe, self._tokenizer, self._sources, self._paths = recipe, tokenizer, sources, paths
        self.config = recipe.corpus
        self.encoder = Encoder(self.config, tokenizer, vocab_size)
        self.limits: Limits = {"train": self.config.max_rows, "heldout": _heldout_limit(self.config)}
        self._check()
        self._vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.portions = portions_of(sources, self.config)
        self.records = PortionRecords(paths, sources, settings)

    def share(self, task: int, num_tasks: int) -> None:
        """Pack the portions of one of several tasks that are not packed yet, every `num_tasks`-th one.

        Where rows are limited, portions behind those that surely have enough of them are left out.
        """
        own = self.portions[task::num_tasks]
        done = self.records.read(own)
        left = [portion for portion in own if portion.number not in done]
        logger.info(
            f"prepare: task {task} of {num_tasks} has {len(own):,} of {len(self.portions):,} portions of the text, "
            f"{len(own) - len(left):,} are packed"
        )
        with _Progress(left, self.config) as progress:
            for portion in left:
                limits = self.limits
                if limits["train"] is not None:
                    # What is packed of the portions before is at least what they have under the limit.
                    before = self.records.read(self.portions[: portion.number])
                    limits = {
                        side: None if limit is None else max(limit - _rows(before, side), 0)
                        for side, limit in limits.items()
                    }
                    if all(limit == 0 for limit in limits.values()):
                        break
                self._pack(portion, limits, self.config.heldout_fraction, progress)

    def all(self, heldout_below: float) -> list[tuple[PortionRecord, dict[str, bool]]]:
        """Pack what is not packed yet of all portions, up to the limits of rows; documents with a draw below
        `heldout_below` are held out.

        Returns the records in order, and of each whether a side's rows are taken.
        """
        taken: list[tuple[PortionRecord, dict[str, bool]]] = []
        done = self.records.read(self.portions)
        if done:
            logger.info(f"prepare: {len(done):,} of {len(self.portions):,} portions of the text are packed already")
        limits = dict(self.limits)
        with _Progress([p for p in self.portions if p.number not in done], self.config) as progress:
            for portion in self.portions:
                if all(limit == 0 for limit in limits.values()):
                    break
                record = done.get(portion.number)
                if record is None or not record.serves(limits, heldout_below):
                    record = self._pack(portion, limits, heldout_below, progress)
                taken.append((record, {side: limits[side] != 0 for side in SIDES}))
                for side, limit in limits.items():
                    limits[side] = None if limit is None else max(limit - record.sides[side].rows, 0)
        return taken

    def _pack(self, portion: Portion, limits: Limits, heldout_below: float, progress: _Progress) -> PortionRecord:
        """Pack a portion and commit it."""
        sources, versions = portion.of(self._sources), self.records.versions(portion)
        writers = {side: self._writer(side, limits[side], portion.number) for side in SIDES}
        progress.begin(portion)
        self.encoder.restart()
        try:
            seen = pack(
                read_documents(self.config, self._tokenizer, sources),
                self.encoder,
                writers,
                lambda draw: draw < heldout_below,
                self._recipe.seed,
                progress.advance,
            )
            files = {side: writer.publish() for side, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.discard()
        facts = {}
        for span in portion.spans:
            if span.part < sources.begun:
                if begins_in(span):
                    facts[str(span.part)] = facts_of(self._sources, span.part)
                else:
                    self._sources.parts[span.part].check_unchanged()
        record = PortionRecord(
            identity=self.records.identity(portion),
            sides={side: _side(writer, files[side], limits[side]) for side, writer in writers.items()},
            documents=seen.documents,
            lowest=seen.lowest,
            heldout_below=heldout_below,
            begun=sources.begun,
            whole=sources.whole,
            facts=facts,
            versions=versions,
            roles=dict(self.encoder.roles),
            names=dict(self.encoder.special_tokens.documents),
        )
        self.records.write(portion.number, record)
        progress.end()
        return record

    def _check(self) -> None:
        config, start = self.config, self.encoder.row_start
        if start and config.row_length < len(start) + 2:
            raise RecipeError(
                f"corpus.row_length = {config.row_length}: a row that begins with {self._tokenizer.decode(start)!r} needs "
                f"{len(start) + 2} tokens"
            )
        self._masking = None
        if config.objective == "masked":
            self._masking = masking = Masking.of(self._tokenizer, config, self._recipe.seed)
            used = [masking.cls_id, masking.sep_id, masking.pad_id, masking.mask_id]
            self.encoder.check(np.array(used, np.int32), "the special tokens of masked rows")
        if self._cuts:
            self.encoder.check(np.array([self._padding], np.int32), "padding")

    @property
    def _padding(self) -> int:
        tokenizer = self._tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    @property
    def features(self) -> dict[str, Any]:
        """The columns of the rows as `datasets` describes them."""
        third = LABELS if self._masking is not None else LOSS_MASK if self._masked else None
        return features_of(stored_columns(self._vocab_size, third), self.config.row_length)

    @property
    def _masked(self) -> bool:
        """Whether rows have a loss mask. It also leaves out what follows the start of a row, and padding."""
        config = self.config
        of_chat = config.messages_column is not None and config.loss_on == "assistant"
        return of_chat or bool(self.encoder.row_start) or self._cuts or config.mask_column is not None

    @property
    def _cuts(self) -> bool:
        """Whether every document lies in one row."""
        return self.config.long_documents != "whole"

    def _packer(self) -> Packer:
        config = self.config
        if self._cuts:
            return WholeDocuments(config.row_length, self._padding, cut=config.long_documents == "cut")
        return EndToEnd(config.row_length, self.encoder.row_start)

    def _writer(self, side: str, limit: int | None, portion: int) -> RowWriter:
        return RowWriter(
            self._paths[side],
            self.config.row_length,
            limit,
            self._masked,
            self._masking,
            self._packer,
            self._vocab_size,
            portion,
        )


class _Progress:
    """Progress in bytes of the text, for which characters stand until a portion is done; in tokens where rows are limited
    or sizes are unknown."""

    def __init__(self, portions: Sequence[Portion], config: CorpusConfig) -> None:
        size, most = sum(portion.size for portion in portions), config.max_rows
        self._in_tokens = most is not None or size == 0
        total = most * config.row_length if most is not None else size or None
        self._meter = Meter("prepare", total, "tokens" if self._in_tokens else "bytes")
        self._left = self._tokens = 0

    def begin(self, portion: Portion) -> None:
        self._left = portion.size

    def advance(self, characters: int, tokens: int) -> None:
        self._tokens += tokens
        done = min(characters, self._left)
        self._left -= done
        if self._in_tokens:
            self._meter.advance(tokens)
        else:
            self._meter.advance(done, f"{self._tokens / max(self._meter.seconds, 1e-9):,.0f} tokens/s")

    def end(self) -> None:
        if not self._in_tokens:
            self.advance(self._left, 0)

    def __enter__(self) -> _Progress:
        self._meter.__enter__()
        return self

    def __exit__(self, *of: object) -> None:
        self._meter.__exit__(*of)


def _side(writer: RowWriter, file: dict[str, Any], limit: int | None) -> Side:
    long_documents = writer.packer.long_documents if isinstance(writer.packer, WholeDocuments) else 0
    return Side(
        file=file,
        limit=limit,
        documents=writer.documents,
        tokens=writer.tokens,
        left=writer.packer.left,
        long_documents=long_documents,
        learned=writer.learned,
        padding=writer.padding,
    )


def _rows(records: dict[int, PortionRecord], side: str) -> int:
    return sum(record.sides[side].rows for record in records.values())


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
