"""The portions of a corpus: what one task tokenises and packs at a time, and commits as a whole.

A portion is about 64 MB of the source: files one after the other, a range of a large one, or one file of a data set of
the hub. Which they are follows from the list of the files and their sizes alone, so that rows depend neither on the
number of tasks nor on where one was stopped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ..recipe.schema import CorpusConfig
from .parts import HubDataSet, PartSpan, Sources
from .spans import WHOLE

PORTION_BYTES = 2**26


class Portion(NamedTuple):
    """Spans of the parts of a corpus, in their order."""

    number: int
    spans: tuple[PartSpan, ...]
    size: int
    """Bytes as far as they are known, packed ones as they are."""

    def of(self, sources: Sources) -> Sources:
        """What is to be read of the sources."""
        return replace(sources, spans=self.spans, begun=0, whole=False)


def portions_of(sources: Sources, config: CorpusConfig) -> list[Portion]:
    """All portions, in their order. Raises RecipeError for a data set of the hub that cannot be loaded."""
    portions: list[Portion] = []
    spans: list[PartSpan] = []
    size = 0

    def close() -> None:
        nonlocal spans, size
        if spans:
            portions.append(Portion(len(portions), tuple(spans), size))
        spans, size = [], 0

    for number, part in enumerate(sources.parts):
        of_part = part.spans(config, PORTION_BYTES)
        known = None if isinstance(part, HubDataSet) else part.info.get("size")
        if known is None or len(of_part) > 1:
            close()
            for span in of_part:
                spans, size = [PartSpan(number, span)], (known or 0) // len(of_part)
                close()
        else:
            spans.append(PartSpan(number, WHOLE))
            size += known
            if size >= PORTION_BYTES:
                close()
    close()
    return portions
