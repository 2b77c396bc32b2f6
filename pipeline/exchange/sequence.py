"""A record of another tool as a sequence of tokens: what the readers of all formats make."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenSequence:
    """The tokens of one record, and at each position t the candidates for token t + 1."""

    where: str
    """Line or row and file, for messages."""
    token_ids: list[int]
    segment_ids: list[int] | None
    labels: list[int] | None
    candidates: list[list[tuple[float, int]] | None]
    """(log-probability, id) pairs of position t; None where the record has none."""
    tail_curve: list[list[float | None]] | None
    """None for formats without a tail; in it None stands for -inf."""
    tail_coordinates: list[list[float]] | None = None
    """None for a tail without a shape; [] at positions without a target."""
    label_log_probs: list[float] | None = None
    """None where the format does not have them."""
