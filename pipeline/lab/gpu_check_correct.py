"""Whether a device computes what the CPU does in float64: every support, and the loss with its gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..distill.fused import fused_distillation_loss
from ..distill.loss import distillation_loss
from ..models.output_layer import OutputLayer
from ..targets.basis import TailBasis
from ..targets.sparse_targets import SparseTargets
from ..targets.supports import Support, position_seeds
from .gpu_check_inputs import KNOTS, Sizes, peaked_logits

_SAME = {"topk": 1.0, "topp": 0.98, "threshold": 0.98, "sampled": 0.9}
"""Share of positions with the ids of the reference in its order: a rounding moves an entry across a limit, or a draw to
the token beside it."""
_GAP = 2e-5
"""In nats: some roundings of float32 of a log-probability of a few tens."""
_LOSS_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.03}
_WIDTH, _CHUNK = 32, 40
_UNUSED = slice(40, 62)
"""Positions with neither target nor label: all of some programs of a kernel, and some of another."""


def check_supports(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Share of positions with the reference's ids, and the largest gap of log-probabilities and tail curve there."""
    found: dict[str, Any] = {}
    count, size = 16 * sizes.repeats + 16, sizes.vocabularies[0]
    seeds = position_seeds(0, torch.zeros(count, dtype=torch.int64), torch.arange(count))
    cases = [
        (f"{name} {_name(dtype)}", peaked_logits(count, size, dtype, torch.device("cpu")), support)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for name, support in sizes.supports.items()
    ]
    cases.append(("topk, hard", _hard_logits(count, sizes.odd_vocabulary), Support("topk", k=sizes.largest_head)))
    for name, logits_NV, support in cases:
        settings: dict[str, Any] = {"support": support, "knots": KNOTS}
        expected = SparseTargets.from_logits(logits_NV.double(), seed=seeds, **settings)
        given = SparseTargets.from_logits(logits_NV.to(device), seed=seeds.to(device), **settings).to("cpu")
        same_N = (given.token_ids == expected.token_ids).all(-1)
        gap = max(_gap(a[same_N], b[same_N]) for a, b in _numbers(given, expected))
        share = float(same_N.double().mean())
        found[name] = {"right": share >= _SAME[support.name] and gap < _GAP, "same": share, "gap": gap}
    return found


def _hard_logits(count: int, size: int) -> Tensor:
    """Rows of an odd vocabulary: all equal, with a few values, with most tokens impossible, and likely neighbours."""
    logits_NV = peaked_logits(count, size, torch.bfloat16, torch.device("cpu"))
    logits_NV[::4] = -2.0
    logits_NV[1::4] = logits_NV[1::4].round()
    logits_NV[2::4, size // 2 :] = -torch.inf
    logits_NV[3::4, size // 2 : 3 * size // 4] += 20.0
    return logits_NV


def _numbers(given: SparseTargets, expected: SparseTargets) -> list[tuple[Tensor, Tensor]]:
    return [(given.log_probs, expected.log_probs), (given.tail_curve, expected.tail_curve)]


def _gap(given: Tensor, expected: Tensor) -> float:
    """0 where both are -inf."""
    return float(torch.nan_to_num(given.double() - expected.double(), nan=0.0).abs().max()) if len(given) else 0.0


def check_losses(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Relative errors of the loss and of its gradients by states and weights, against the definition in float64."""
    found: dict[str, Any] = {}
    count, size = 96, sizes.vocabularies[0]
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(count, _WIDTH, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(size, _WIDTH, generator=generator, dtype=torch.float64) / 3
    labels_N = torch.randint(0, size, (count,), generator=generator)
    labels_N[::7] = labels_N[_UNUSED] = -100
    for name, support, form, settings in _loss_cases(sizes):
        targets = _targets(sizes, support, count, size, shaped=settings["tail"] == "shape")
        settings = {"kd_weight": 1.0, "ce_weight": 0.1, **settings}
        pair = [part.clone().requires_grad_() for part in (hidden_ND, weight_VD)]
        logits_NV = OutputLayer(pair[1], None, **form).logits(pair[0])
        reference = distillation_loss(logits_NV, targets, labels_N, **settings).loss
        reference.backward()  # type: ignore[no-untyped-call]
        moved, labels = targets.to(device), labels_N.to(device)
        names = {"scale": "logit_scale", "softcap": "softcap"}
        settings |= {"chunk_size": _CHUNK, **{names[key]: value for key, value in form.items()}}
        for dtype, most in _LOSS_ERROR.items():
            own = [part.detach().to(device, torch.float32).requires_grad_() for part in (hidden_ND, weight_VD)]
            loss = fused_distillation_loss(own[0].to(dtype), own[1], moved, labels, **settings).loss
            loss.backward()  # type: ignore[no-untyped-call]
            compared = (loss, reference), (own[0].grad, pair[0].grad), (own[1].grad, pair[1].grad)
            errors = [_relative(a, b) for a, b in compared if a is not None and b is not None]
            found[f"{name} {_name(dtype)}"] = {"right": max(errors) < most, "loss, states, weights": errors}
    return found


def _loss_cases(sizes: Sizes) -> list[tuple[str, Support, dict[str, float], dict[str, Any]]]:
    """Name, support, form of the output layer, and settings of each loss."""
    topk = sizes.supports["topk"]
    both = [
        (f"{tail}, T = {temperature:g}", {"tail": tail, "temperature": temperature})
        for tail in ("bucket", "shape")
        for temperature in (1.0, 2.0)
    ]
    cases: list[tuple[str, Support, dict[str, float], dict[str, Any]]]
    cases = [(name, topk, {}, settings) for name, settings in both]
    cases += [(f"{name}, soft-capped", topk, {"scale": 0.5, "softcap": 5.0}, settings) for name, settings in both]
    cases += [(tail, topk, {}, {"tail": tail}) for tail in ("renormalize", "drop", "uniform", "label")]
    cases += [(name, topk, {}, {"tail": "bucket", "divergence": name}) for name in ("reverse_kl", "jensen_shannon")]
    cases += [(name, sizes.supports[name], {}, {"tail": "bucket"}) for name in ("threshold", "sampled")]
    return cases


def _targets(sizes: Sizes, support: Support, count: int, size: int, *, shaped: bool) -> SparseTargets:
    logits_NV = peaked_logits(count, size, torch.float32, torch.device("cpu"))
    mask_N = torch.ones(count, dtype=torch.bool)
    mask_N[_UNUSED] = False
    targets = SparseTargets.from_logits(logits_NV, support=support, knots=KNOTS, seed=1, mask=mask_N)
    if not shaped:
        return targets
    generator = torch.Generator().manual_seed(1)
    directions_VR = torch.randn(sizes.rank, size, generator=generator).T
    basis = TailBasis(torch.randn(size, generator=generator), directions_VR)
    return replace(targets, tail_coordinates=torch.randn(count, sizes.rank, generator=generator), basis=basis)


def _relative(given: Tensor, expected: Tensor) -> float:
    given, expected = given.detach().cpu().double(), expected.detach().double()
    return float((given - expected).norm() / expected.norm().clamp(min=1e-30))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
