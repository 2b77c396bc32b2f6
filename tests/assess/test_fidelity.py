"""The figures of the fidelity table by themselves: rounding, gradients, the settings that nothing beats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from logit_cache import SparseTargets
from logit_cache.assess.fidelity import Measured, mark_fronts, rounding_kl
from logit_cache.assess.grid import Setting, grid
from logit_cache.assess.sample import split_rows
from logit_cache.targets.supports import Support


def test_rounding_kl_is_the_divergence_of_the_kept_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(50, 300, generator=generator)
    exact = SparseTargets.from_logits(x, k=20)
    noise = 0.1 * torch.randn(50, 20, generator=generator)
    moved = SparseTargets(
        exact.token_ids, exact.log_probs + noise, exact.tail_curve, exact.mask, exact.knots, exact.vocab_size
    )
    for temperature in (1.0, 3.0):
        p = (exact.log_probs.double().numpy() / temperature).astype(np.float64)
        q = (moved.log_probs.double().numpy() / temperature).astype(np.float64)
        p, q = (np.exp(v - np.log(np.exp(v).sum(-1, keepdims=True))) for v in (p, q))
        expected = (p * np.log(p / q)).sum(-1).mean()
        assert rounding_kl(exact, moved, temperature) == pytest.approx(expected, rel=1e-9)
        # In whatever order the entries stand.
        order = torch.randperm(20, generator=generator)
        shuffled = SparseTargets(
            moved.token_ids[:, order], moved.log_probs[:, order], moved.tail_curve, moved.mask, moved.knots, 300
        )
        assert rounding_kl(exact, shuffled, temperature) == pytest.approx(expected, rel=1e-9)


def test_the_front_is_what_nothing_beats() -> None:
    def line(size: float, error: float, rank: int = 0) -> Measured:
        kl = {1.0: 1 - error}
        return Measured(
            Setting(Support("topk", k=1), rank=rank), size, 1.0, {}, kl, {"far": {1.0: error, 2.0: 1 - error}}
        )

    lines = mark_fronts([line(10, 0.5), line(20, 0.1), line(30, 0.3), line(10, 0.6), line(9, 0.7, rank=4)])
    assert [1.0 in line.front["far"] for line in lines] == [True, True, False, False, True]
    assert [2.0 in line.front["far"] for line in lines] == [False, False, False, False, True]
    # The KL of a uniform tail competes with none.
    assert [line.front["kl"] for line in lines] == [[], [], [], [], [1.0]]


@pytest.mark.parametrize("full", [False, True])
def test_settings_are_named_apart(full: bool) -> None:
    for knots in ((0.5, 1.0), (1.0,)):
        own = Setting(Support("topk", k=64), knots, rank=32, step=0.07)
        settings = grid(own, 0.07, 24, 100, full)
        assert settings[0] == own and len({str(setting) for setting in settings}) == len(settings)
        assert {setting.rank for setting in settings[1:]} == {0, 16}, "no more coordinates than the teacher has"
        assert max(setting.support.k or 1 for setting in settings) <= 100
        assert {setting.step for setting in settings if setting.rank} == (
            {0.07, 0.1, 0.15, 0.2} if full else {0.07, 0.1}
        )


@pytest.mark.parametrize(("rows", "learned", "measured"), [(1, 8, 1), (2, 1, 1), (7, 2, 1), (100, 24, 6), (60, 80, 20)])
def test_rows_to_learn_from_and_rows_to_measure_on(rows: int, learned: int, measured: int) -> None:
    one, other = (set(some.tolist()) for some in split_rows(rows, learned, measured))
    count = min(rows, learned + measured)
    assert one and other and (rows == 1 or not one & other)
    assert one | other <= set(range(rows)) and len(one | other) == count
    assert len(other) == max(count * measured // (learned + measured), 1)
