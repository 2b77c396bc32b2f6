"""Bases of one fit for several heads: each token's mass in the tails is right, and coordinates follow from the head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from logit_cache.assess.grid_bases import grid_bases
from logit_cache.models.teacher import load_teacher
from logit_cache.recipe.schema import TeacherConfig
from logit_cache.store.basis_file import StoredBasis
from logit_cache.targets.basis_fit import TEMPERATURES, head_means
from logit_cache.targets.sparse_targets import SparseTargets
from torch import Tensor

from tests.helpers.tiny import make_teacher


def test_offsets_and_predictions_are_those_of_the_head(tmp_path: Path) -> None:
    folder = str(make_teacher(tmp_path / "teacher"))
    teacher = load_teacher(folder, TeacherConfig(model=folder, device="cpu", dtype="float32"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 300, (40, 64), generator=generator)
    states_ND = teacher.hidden(ids, torch.zeros_like(ids)).flatten(0, 1).clone()
    logits_NV = teacher.output_layer.logits(states_ND).detach()
    heads = [SparseTargets.from_logits(logits_NV, k=k) for k in (4, 60)]
    bases = grid_bases(teacher, states_ND, 8, 0.1, heads, 100_000)
    assert all(np.array_equal(bases[0].directions, basis.directions) for basis in bases)

    def wrong(basis: StoredBasis, targets: SparseTargets) -> float:
        """Mean error of the log of each token's mass outside the heads, at the temperatures of the fit together."""
        shaped = replace(targets, tail_coordinates=basis.to_coordinates.coordinates(states_ND), basis=basis.basis())
        masses: list[Tensor] = []
        for whole in (lambda t: shaped.dense(t), lambda t: (logits_NV / t).softmax(-1)):
            outside = [whole(t).scatter(-1, targets.token_ids, 0.0).sum(0) / t for t in TEMPERATURES]
            masses.append(torch.stack(outside).sum(0))
        return float((masses[0] / masses[1]).log().abs().mean())

    def unpredicted(basis: StoredBasis, targets: SparseTargets) -> float:
        """What a prediction leaves of the coordinates' variance."""
        z_NR = basis.to_coordinates.coordinates(states_ND)
        means_NR = head_means(targets, basis.basis().directions)
        known_NM = torch.nn.functional.pad(means_NR, (1, 0), value=1.0)
        left_NR = z_NR - known_NM @ torch.from_numpy(basis.prediction)
        return float(left_NR.square().sum() / (z_NR - z_NR.mean(0)).square().sum())

    for own, other, targets in ((bases[0], bases[1], heads[0]), (bases[1], bases[0], heads[1])):
        assert wrong(own, targets) < min(0.1, 0.5 * wrong(other, targets)), (wrong(own, targets), wrong(other, targets))
        assert unpredicted(own, targets) < min(0.9, unpredicted(other, targets))
