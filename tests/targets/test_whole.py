"""Head and tail's shape as one distribution, against a float64 computation that shares no code with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from logit_cache.targets.basis import TailBasis
from logit_cache.targets.sparse_targets import SparseTargets
from logit_cache.targets.whole import log_whole

V, N, R = 19, 6, 3


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dense_is_exact_on_the_head_and_in_the_tails_mass(k: int, temperature: float, softcap: float | None) -> None:
    logits, coordinates = 2 * normal(0, N, V), normal(1, N, R)
    basis = TailBasis(normal(2, V), normal(3, V, R), softcap)
    mask = torch.arange(N) != 2
    sparse = SparseTargets.from_logits(logits, k=k, knots=(0.25, 0.5, 2.0), mask=mask)
    targets = replace(sparse, tail_coordinates=coordinates, basis=basis)
    p = softmax(logits.numpy() / temperature)
    t = basis.offset.numpy() + coordinates.numpy() @ basis.directions.numpy().T
    t = t if softcap is None else softcap * np.tanh(t / softcap)
    for position in range(N):
        head = np.argsort(-logits[position].numpy())[:k]
        tail = np.setdiff1d(np.arange(V), head)
        expected = np.zeros(V)
        if mask[position]:
            expected[head] = p[position][head]
            expected[tail] = p[position][tail].sum() * softmax(t[position][tail] / temperature) if len(tail) else 0.0
        dense = targets.dense(temperature)[position].numpy()
        np.testing.assert_allclose(dense, expected, rtol=0, atol=1e-12)
    wider = replace(targets, vocab_size=V + 3).dense(temperature) if k == V else None
    if wider is not None:  # an empty tail: nothing is left for tokens that only another teacher has
        assert (wider[:, V:] == 0).all()


def test_an_empty_head_leaves_all_to_the_shape() -> None:
    """Also where other positions of the same call have one, and with unused entries between used ones."""
    shape = normal(4, 3, V)
    ids = torch.tensor([[-1, -1, -1], [-1, 5, -1], [2, -1, 0]])
    log_p = torch.where(ids >= 0, 0.25, 0.0).double().log()
    log_tail = (1 - 0.25 * (ids >= 0).sum(-1)).double().log()
    dense = log_whole(ids, log_p, log_tail, shape.clone()).exp()
    torch.testing.assert_close(dense[0], torch.softmax(shape[0], -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(dense.sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    for position, head in ((1, [5]), (2, [0, 2])):
        assert dense[position, head].tolist() == pytest.approx([0.25] * len(head))
        tail = [v for v in range(V) if v not in head]
        expected = torch.softmax(shape[position, tail], -1) * (1 - 0.25 * len(head))
        torch.testing.assert_close(dense[position, tail], expected, rtol=0, atol=1e-12)


def test_dense_needs_a_shape() -> None:
    with pytest.raises(ValueError, match=r"cache\.tail_rank"):
        SparseTargets.from_logits(normal(5, N, V), k=3).dense(1.0)
