"""What the explorer's page knows of some rows: candidates with their probabilities at every temperature.

Of a position the page has a list of candidates: the teacher's best, the label, the best of the tail's shape and each
student's best. With l a log-probability at T = 1, beta = 1/T and O all tokens that are not among the ones whose l is
known, a model's probabilities at T are

    p_T(v) = exp(beta l_v - A(beta)),     A(beta) = log( sum_{v listed} exp(beta l_v) + exp G(beta) )
    G(beta) = log sum_{v in O} exp(beta l_v)

for the teacher with G = F and what of the head is not listed, for a student with all of its vocabulary, so that one
formula serves both. Tokens of the tail have, where there is a shape, p_T(v) = exp(F - A + beta t_v - S), S(beta) = log
sum_{u in R} exp(beta t_u). G, F and S are log n at beta = 0 (n tokens) and smooth, so each is kept as

    h(beta) = (G(beta) - log n) / beta                                         <= 0

at some beta: F at the cache's knots, where the polynomial through them is F itself, the others at Chebyshev points
between 1/8 and the largest knot, at most 2. Behind SmolLM2's 16 best tokens, 16 points give every probability to 7e-5
and 10 points to 1e-3; behind its 6 best, 16 points to 9e-4. Logits [N, V] exist for a few positions at a time.

Shapes: as everywhere; M candidates of a position, N positions with a target.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.progress import Meter
from ..corpus.labels import IGNORE, PADDING
from ..models.loading import load_tokenizer
from ..models.output_layer import OutputLayer
from ..models.placement import input_device
from ..models.rows import body_hidden
from ..store.batch import Batch
from ..store.reader import LogitCache
from ..targets.knots import curve_at
from ..targets.sparse_targets import SparseTargets
from .measures import Cells
from .packed_arrays import PackedArrays
from .token_texts import TokenTexts

LOWEST, HIGHEST = 0.5, 8.0
"""Temperatures of the page's slider; below 1 as far as the cache's knots go."""
_OF_HEAD, _OF_STUDENT, _OF_SHAPE = 16, 6, 4
"""Candidates kept of the teacher's head, of each student, and of the tail's shape.

Four of the shape's show what the tail begins with, at 5 bytes each and 20 for its normaliser.
"""
_POINTS, _SHAPE_POINTS = 16, 10
"""Of a curve; the tail's candidates are improbable, and their error with them."""
_ENTRY_BITS = 14
"""Of a candidate's log-probability: half a step is less than 2e-4 of probability, down to -40 nats."""
_CHUNK = 128
"""Positions whose logits exist at once."""


class Kind(IntEnum):
    """What the page knows of the teacher's probability of a candidate."""

    UNKNOWN = 0
    HEAD = 1
    LABEL = 2
    """Of the tail, but its log-probability is known."""
    SHAPE = 3
    """Its logit in the tail's shape."""
    SAMPLE = 4
    """Its share of the samples' estimate at T = 1, which is none of its probability at another T."""


@dataclass(frozen=True)
class Explored:
    """Rows as the page reads them: facts and texts for JSON, and arrays in `data`, where `facts["arrays"]` says."""

    facts: dict[str, Any]
    data: bytes


@torch.inference_mode()
def explore_rows(
    cache: LogitCache, rows: Sequence[int], students: Mapping[str, Any] | None = None, *, title: str = ""
) -> Explored:
    """Collect some rows of a cache, with models that predict beside the teacher.

    A model needs the cache's tokenizer; its output layer may have more tokens or fewer. Raises IndexError for a row out
    of range, RecipeError for a model that cannot be used (`body_hidden`).
    """
    students = students or {}
    texts = TokenTexts(load_tokenizer(str(cache.tokenizer_dir)))
    points = _points(cache.knots)
    layers = {name: OutputLayer.of(model.eval()) for name, model in students.items()}
    arrays = PackedArrays()
    shown, head_is_longer = [], False
    with Meter("explore", len(rows) * cache.row_length) as meter:
        for row in rows:
            batch = cache.batch([row])
            shown.append(_row_text(row, batch, texts, cache.objective))
            arrays.add("described", _described(batch, cache.objective))
            targets, labels_N = _with_target(batch)
            hidden = {name: _states(model, batch) for name, model in students.items()}
            for some in _chunks(len(labels_N)):
                logits = {name: layers[name].logits(states_ND[some]) for name, states_ND in hidden.items()}
                log_q = {name: logits_NV.float().log_softmax(-1).cpu() for name, logits_NV in logits.items()}
                head_is_longer |= _collect(arrays, targets[some], labels_N[some], log_q, points)
            meter.advance(cache.row_length)
    if not head_is_longer:
        arrays.remove("teacher.rest")  # the tail
    token_ids, places = np.unique(arrays.joined("entry.id"), return_inverse=True)
    arrays.replace("entry.id", places.astype(np.uint16 if len(token_ids) <= 0xFFFF else np.uint32))
    directory, data = arrays.packed()
    return Explored(
        {
            "title": title or str(cache.path),
            "teacher": str(cache.manifest.identity["teacher"].get("source", "")),
            "vocab_size": cache.vocab_size,
            "temperatures": [1.0, 1.0] if len(cache.knots) == 1 else [max(LOWEST, 1 / max(cache.knots)), HIGHEST],
            "points": points,
            "labels_known": cache.manifest.codec.label_log_probs,
            "students": [{"name": name, "vocab_size": len(layers[name].weight)} for name in students],
            "rows": shown,
            "texts": [texts.of(int(token)) for token in token_ids],
            "arrays": directory,
        },
        data,
    )


def _points(knots: Sequence[float]) -> dict[str, list[float]]:
    """The inverse temperatures of each curve."""
    highest = min(max(knots), 1 / LOWEST)
    return {
        "teacher.tail": list(knots),
        "teacher.rest": _chebyshev(highest, _POINTS) if len(knots) > 1 else [1.0],
        "teacher.shape": _chebyshev(highest, _SHAPE_POINTS) if len(knots) > 1 else [1.0],
        "student": _chebyshev(1 / LOWEST, _POINTS),
    }


def _chebyshev(highest: float, count: int) -> list[float]:
    low, places = 1 / HIGHEST, (np.arange(count) + 0.5) / count
    return [float(x) for x in (low + highest) / 2 - (highest - low) / 2 * np.cos(math.pi * places)]


def _chunks(count: int) -> Iterator[slice]:
    return (slice(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK))


def _with_target(batch: Batch) -> tuple[SparseTargets, Tensor]:
    """The targets [N] of one row, and their labels."""
    targets = batch["targets"][0]
    return targets[targets.mask], batch["labels"][0][targets.mask]


def _states(model: Any, batch: Batch) -> Tensor:
    """The states [N, D] that a model's output layer reads, at the positions of one row that have a target."""
    device = input_device(model)
    states = body_hidden(model, batch["input_ids"].to(device), batch["segment_ids"].to(device))[0]
    return states[batch["targets"].mask[0].to(states.device)]


def _described(batch: Batch, objective: str) -> np.ndarray[Any, Any]:
    """[L] uint8, the tokens that a target predicts: a causal one the token behind it, a masked one that at its place."""
    mask = batch["targets"].mask[0].numpy().astype(np.uint8)
    return mask if objective == "masked" else np.concatenate([[np.uint8(0)], mask[:-1]])


def _row_text(row: int, batch: Batch, texts: TokenTexts, objective: str) -> dict[str, Any]:
    """A row's tokens as text, and where its documents begin."""
    ids, labels, segments = (batch[name][0].numpy() for name in ("input_ids", "labels", "segment_ids"))
    used = int((segments != PADDING).sum())
    hidden = (labels != IGNORE) & (labels != ids) if objective == "masked" else np.zeros(len(ids), bool)
    text = texts.row(np.where(hidden, labels, ids)[:used].tolist())
    notes = {**text.notes, **{int(p): f"the models saw {texts.of(int(ids[p]))}" for p in np.flatnonzero(hidden)}}
    starts = np.flatnonzero(np.diff(segments[:used], prepend=PADDING)).tolist()
    return {"row": int(row), "tokens": text.tokens, "notes": notes, "documents": starts}


def _collect(
    arrays: PackedArrays,
    targets: SparseTargets,
    labels_N: Tensor,
    log_q: Mapping[str, Tensor],
    points: Mapping[str, Sequence[float]],
) -> bool:
    """Add the numbers of some positions; returns whether a head has tokens that are no candidates."""
    shape_NV = _shape(targets)
    ids_NM = _candidates(targets, labels_N, shape_NV, log_q.values())
    used_NM = ids_NM >= 0
    is_label_NM = used_NM & (ids_NM == labels_N.unsqueeze(-1))
    # Its place among the candidates, of which a list may have none at some columns.
    place_N = torch.where(is_label_NM, used_NM.cumsum(-1) - 1, 0).sum(-1)
    kind_NM, value_NM = _teacher_values(targets, ids_NM, is_label_NM, shape_NV)
    arrays.add("entries", used_NM.sum(-1).numpy().astype(np.uint8))
    arrays.add("label", torch.where(is_label_NM.any(-1), place_N, 0xFF).numpy().astype(np.uint8))
    arrays.add("entry.id", ids_NM[used_NM].numpy())
    arrays.add("entry.kind", kind_NM[used_NM].numpy().astype(np.uint8))
    arrays.add_sizes("entry.teacher", value_NM[used_NM], _ENTRY_BITS)
    head_is_longer = _add_teacher(arrays, targets, labels_N, ids_NM, shape_NV, points)
    for number, log_q_NV in enumerate(log_q.values()):
        ids = torch.where(ids_NM < log_q_NV.shape[-1], ids_NM, -1)
        arrays.add_sizes(f"entry.{number}", torch.where(ids >= 0, _at(log_q_NV, ids), -math.inf)[used_NM], _ENTRY_BITS)
        sums = _log_sums(_without(log_q_NV.clone(), ids), points["student"])
        arrays.add_curve(f"{number}.rest", sums, points["student"], log_q_NV.shape[-1] - (ids >= 0).sum(-1))
        arrays.add_sizes(f"{number}.kl", _kl(targets, log_q_NV))
    if len(log_q) > 1:
        pairs = [_total_variation(a, b) for a, b in combinations(log_q.values(), 2)]
        arrays.add_sizes("difference", torch.stack(pairs).amax(0))
    return head_is_longer


def _shape(targets: SparseTargets) -> Tensor | None:
    """The logits [N, V] of the tails' shapes, the largest 0; -inf at tokens of the head. None without shapes."""
    if targets.basis is None or targets.tail_coordinates is None:
        return None
    shape_NV = _without(targets.basis.logits(targets.tail_coordinates), _head_ids(targets))
    return shape_NV - shape_NV.amax(-1, keepdim=True).clamp(min=-1e30)


def _head_ids(targets: SparseTargets) -> Tensor:
    return torch.where(targets.head_mask, targets.token_ids, -1)


def _teacher_values(
    targets: SparseTargets, ids_NM: Tensor, is_label_NM: Tensor, shape_NV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The `Kind` of each candidate and its number [N, M] in float64, -inf where unknown; what is known best comes
    last."""
    kind_NM, value_NM = torch.zeros_like(ids_NM), torch.full(ids_NM.shape, -math.inf, dtype=torch.float64)

    def know(kind: Kind, some_NM: Tensor, values: Tensor) -> None:
        nonlocal kind_NM, value_NM
        kind_NM, value_NM = torch.where(some_NM, kind, kind_NM), torch.where(some_NM, values.double(), value_NM)

    used_NM, same_NMK = ids_NM >= 0, ids_NM.unsqueeze(-1) == targets.token_ids.unsqueeze(-2)
    if shape_NV is not None:
        know(Kind.SHAPE, used_NM & (ids_NM < shape_NV.shape[-1]), _at(shape_NV, ids_NM))
    if targets.draws is not None:
        drawn_NMK = same_NMK & (targets.draws > 0).unsqueeze(-2)
        know(Kind.SAMPLE, used_NM & drawn_NMK.any(-1), targets.weights.log().gather(-1, drawn_NMK.int().argmax(-1)))
    if targets.label_log_probs is not None:
        know(Kind.LABEL, is_label_NM, targets.label_log_probs.unsqueeze(-1))
    head_NMK = same_NMK & targets.head_mask.unsqueeze(-2)
    know(Kind.HEAD, used_NM & head_NMK.any(-1), targets.log_probs.gather(-1, head_NMK.int().argmax(-1)))
    return kind_NM, value_NM


def _add_teacher(
    arrays: PackedArrays,
    targets: SparseTargets,
    labels_N: Tensor,
    ids_NM: Tensor,
    shape_NV: Tensor | None,
    points: Mapping[str, Sequence[float]],
) -> bool:
    """Add the teacher's curves and what else is known of it at each position; returns as `_collect`."""
    head_ids, head_NK, size = _head_ids(targets), targets.head_mask, targets.vocab_size
    listed_NK = ((ids_NM.unsqueeze(-1) == head_ids.unsqueeze(-2)) & (ids_NM >= 0).unsqueeze(-1)).any(-2)
    l_NK = torch.where(head_NK, targets.log_probs, -math.inf).double()
    left_NK = torch.where(listed_NK, -math.inf, l_NK)
    tail_n = size - head_NK.sum(-1)

    def tail(beta: float) -> Tensor:
        return curve_at(targets.tail_curve.double(), targets.knots, beta, tail_n)

    arrays.add("heads", head_NK.sum(-1).numpy().astype(np.uint16))
    arrays.add_curve("teacher.tail", [tail(beta) for beta in points["teacher.tail"]], points["teacher.tail"], tail_n)
    rest = [torch.logaddexp(tail(beta), torch.logsumexp(beta * left_NK, -1)) for beta in points["teacher.rest"]]
    arrays.add_curve("teacher.rest", rest, points["teacher.rest"], size - listed_NK.sum(-1))
    if shape_NV is not None:
        count_N, own = tail_n.clamp(max=shape_NV.shape[-1]), points["teacher.shape"]
        arrays.add_curve("teacher.shape", _log_sums(shape_NV, own), own, count_N)
    is_label_NK = head_NK & (head_ids == labels_N.unsqueeze(-1))
    rank_N = torch.where(is_label_NK.any(-1), is_label_NK.int().argmax(-1) + 1, 0)
    arrays.add("rank", rank_N.numpy().astype(np.uint16))
    arrays.add_sizes("entropy", _entropy(targets, l_NK, tail_n))
    return bool((head_NK & ~listed_NK).any())


def _candidates(targets: SparseTargets, labels_N: Tensor, shape_NV: Tensor | None, log_q: Iterable[Tensor]) -> Tensor:
    """Token ids [N, M] of the candidates, each once; -1 elsewhere."""
    # By weight: a sample stands for more than its own probability.
    best_NK = targets.weights.topk(min(_OF_HEAD, targets.token_ids.shape[-1])).indices
    lists = [targets.token_ids.gather(-1, best_NK), torch.where(labels_N >= 0, labels_N, -1).unsqueeze(-1)]
    if shape_NV is not None:
        lists.append(shape_NV.topk(min(_OF_SHAPE, shape_NV.shape[-1])).indices)
    lists += [log_q_NV.topk(min(_OF_STUDENT, log_q_NV.shape[-1])).indices for log_q_NV in log_q]
    ids_NM = torch.cat(lists, -1)
    again = (ids_NM.unsqueeze(-1) == ids_NM.unsqueeze(-2)).tril(-1).any(-1)
    return ids_NM.masked_fill(again, -1)


def _at(values_NV: Tensor, ids_NM: Tensor) -> Tensor:
    return values_NV.gather(-1, ids_NM.clamp(0, values_NV.shape[-1] - 1)).double()


def _without(values_NV: Tensor, ids_NM: Tensor) -> Tensor:
    """`values_NV`, overwritten with -inf at some tokens; -1: none."""
    positions, places = ((ids_NM >= 0) & (ids_NM < values_NV.shape[-1])).nonzero(as_tuple=True)
    values_NV[positions, ids_NM[positions, places]] = -math.inf
    return values_NV


def _log_sums(values_NV: Tensor, points: Sequence[float]) -> list[Tensor]:
    """log sum_v exp(beta x_v) [N] at each of some beta."""
    largest = values_NV.amax(-1, keepdim=True).clamp(min=-1e30)
    shifted_NV, scaled_NV = values_NV - largest, torch.empty_like(values_NV)
    sums = []
    for beta in points:  # three passes over memory each, of which logsumexp takes twice as many
        sums.append(torch.mul(shifted_NV, beta, out=scaled_NV).exp_().sum(-1).double().log() + beta * largest[:, 0])
    return sums


def _entropy(targets: SparseTargets, l_NK: Tensor, tail_n: Tensor) -> Tensor:
    """The teacher's entropy [N] at T = 1, nats: - dA/dbeta there, with the slope of the tail curve.

    Where the curve has one knot, its slope is unknown: the tail then counts as one token, which gives a lower bound.
    """
    p_NK = l_NK.exp()
    head_N = -(p_NK * torch.where(p_NK > 0, l_NK, 0.0)).sum(-1)
    curve, knots = targets.tail_curve.double(), targets.knots
    log_tail = curve_at(curve, knots, 1.0, tail_n)
    if len(knots) == 1:
        slope = log_tail
    else:
        step = 1e-3
        above, below = (curve_at(curve, knots, 1.0 + sign * step, tail_n) for sign in (1, -1))
        slope = (above - below) / (2 * step)
    tail_N = torch.where(log_tail.isneginf(), 0.0, -log_tail.exp() * slope)
    return (head_N + tail_N).clamp(min=0.0)


def _kl(targets: SparseTargets, log_q_NV: Tensor) -> Tensor:
    """KL(teacher || student) [N] at T = 1 in nats: over the vocabulary with a tail shape, else with the tail as one
    token; NaN where there is no head."""
    targets = targets.restrict_vocabulary(log_q_NV.shape[-1])
    if targets.basis is not None:
        p_NV = targets.dense(1.0)
        cross_N = (p_NV * log_q_NV[:, : targets.vocab_size].clamp(min=-1e30)).sum(-1)
        entropy_N: Tensor = -torch.special.xlogy(p_NV, p_NV).sum(-1)
        return -entropy_N - cross_N
    head_ids = torch.where(targets.head_mask, targets.token_ids, -1)
    log_probs = torch.where(targets.head_mask, targets.log_probs, -math.inf)
    heads = replace(targets, token_ids=head_ids, log_probs=log_probs, draws=None)
    return torch.where(head_ids[:, 0] >= 0, Cells.of(heads, log_q_NV).measure("kl"), math.nan)


def _total_variation(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """1/2 sum |a - b| [N]."""
    width = max(log_a_NV.shape[-1], log_b_NV.shape[-1])
    a, b = (torch.nn.functional.pad(x.exp(), (0, width - x.shape[-1])) for x in (log_a_NV, log_b_NV))
    difference: Tensor = 0.5 * (a - b).abs().sum(-1)
    return difference
