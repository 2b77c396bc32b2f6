"""Losses of sparse targets with their gradients by the logits, written over the logits: the arithmetic of `fused`.

The definitions are in `loss` and `divergences`. R is the tail, all tokens outside the head; q(j) / q(R), the softmax
over R, is computed with R's own maximum and so stays finite where q(R) rounds to 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..corpus.labels import IGNORE
from .divergences import DIVERGENCES, MODES, modes_first
from .flat_targets import FlatTargets
from .sums import fill_unused, weighted


def sparse_kl(
    z_NV: Tensor, target: FlatTargets, labels_N: Tensor, kd_scale_N: Tensor, ce_scale_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL_T [N] against a sparse target, and CE(z, label) [N], from one exponential of each logit.

    Returns KL_T, CE, whether both have the same first choice [N] (a tie counts), and over z = beta * x [N, V] the
    gradient of kd_scale * KL + ce_scale * CE with respect to z.

    With total mass m of the target, the gradient of KL is m q(j) - p(j). The bucket differs outside the head, where q
    is pulled as a whole: m q(j) - p(R) q(j) / q(R).
    """
    dtype, tail_mode = z_NV.dtype, target.tail_mode
    log_p_NK, log_tail_N = target.log_p_NK.to(dtype), target.log_tail_N.to(dtype)
    used_NK, ids_NK = target.token_ids_NK >= 0, fill_unused(target.token_ids_NK)
    # An empty head counts as one token of probability 0.
    inside_NK = torch.cat([torch.ones_like(used_NK[:, :1]), used_NK[:, 1:]], -1)
    p_NK, p_tail_N = log_p_NK.exp(), log_tail_N.exp()
    label_column_N1 = labels_N.clamp(min=0).unsqueeze(-1)
    z_NK = z_NV.gather(-1, ids_NK).masked_fill(~inside_NK, -math.inf)
    z_label_N = z_NV.gather(-1, label_column_N1).squeeze(-1)
    left_out_N = (z_NV.shape[-1] - inside_NK.sum(-1)).clamp(min=1)
    if tail_mode == "uniform":
        mean_z_N = (z_NV.sum(-1) - torch.where(inside_NK, z_NK, 0.0).sum(-1)) / left_out_N

    outside_NV = z_NV.scatter_(-1, ids_NK, -math.inf)
    max_N = outside_NV.amax(-1)
    agreed_N = used_NK[:, 0] & (z_NK[:, 0] >= torch.maximum(z_NK.amax(-1), max_N))
    max_N = torch.where(torch.isneginf(max_N), 0.0, max_N)
    exps_NV = outside_NV.sub_(max_N.unsqueeze(-1)).exp_()
    sum_N = exps_NV.sum(-1)
    log_outside_N = sum_N.log() + max_N
    log_inside_N = torch.logsumexp(z_NK, -1)
    log_total_N = torch.logaddexp(log_inside_N, log_outside_N)
    log_q_NK = z_NK - log_total_N.unsqueeze(-1)
    log_q_tail_N = log_outside_N - log_total_N
    sum_N = torch.where(sum_N > 0, sum_N, 1.0)
    # q(j) = q(R) * exps(j) / sum(exps) for j outside the head.
    q_NK, q_tail_N = log_q_NK.exp(), log_q_tail_N.exp()

    if tail_mode in ("renormalize", "renormalize_teacher"):
        # A position without a target has nothing to normalise, and -inf - -inf would be NaN.
        log_mass_N = torch.where(used_NK[:, 0], torch.logsumexp(log_p_NK, -1), 0.0)
        log_p_NK = log_p_NK - log_mass_N.unsqueeze(-1)
        p_NK = log_p_NK.exp()
    if tail_mode == "renormalize":
        log_q_NK = z_NK - log_inside_N.unsqueeze(-1)
        kl_N = weighted(p_NK, log_p_NK - log_q_NK).sum(-1)
        mass_N, pull_tail_N = used_NK[:, 0].to(dtype), torch.zeros_like(kl_N)
    else:
        mass_N = p_NK.sum(-1)
        if tail_mode == "label":
            is_label_NK = used_NK & (ids_NK == labels_N.unsqueeze(-1))
            given_N = torch.where(labels_N != IGNORE, p_tail_N, 0.0)
            mass_N = mass_N + given_N
            p_NK = p_NK + is_label_NK * given_N.unsqueeze(-1)
            log_p_NK = torch.where(is_label_NK, p_NK.clamp(min=torch.finfo(dtype).tiny).log(), log_p_NK)
            given_N = torch.where(is_label_NK.any(-1), 0.0, given_N)
        kl_N = weighted(p_NK, log_p_NK - log_q_NK).sum(-1)
        if tail_mode == "bucket":
            mass_N = mass_N + p_tail_N
            kl_N = kl_N + weighted(p_tail_N, log_tail_N - log_q_tail_N)
        elif tail_mode == "uniform":
            mass_N = mass_N + p_tail_N
            kl_N = kl_N + weighted(p_tail_N, log_tail_N - left_out_N.to(dtype).log() - (mean_z_N - log_total_N))
        elif tail_mode == "label":
            kl_N = kl_N + weighted(given_N, log_tail_N - (z_label_N - log_total_N))
        pull_tail_N = mass_N * q_tail_N - (p_tail_N if tail_mode == "bucket" else 0.0)

    # The gradient of the logarithm that normalises q is q itself: all of CE's gradient but the label's entry.
    grad_NV = exps_NV.mul_(((kd_scale_N * pull_tail_N + ce_scale_N * q_tail_N) / sum_N).unsqueeze(-1))
    if tail_mode == "uniform":
        grad_NV.sub_((kd_scale_N * p_tail_N / left_out_N).unsqueeze(-1))
    grad_NK = kd_scale_N.unsqueeze(-1) * (mass_N.unsqueeze(-1) * log_q_NK.exp() - p_NK)
    grad_NK = grad_NK + ce_scale_N.unsqueeze(-1) * q_NK
    # Unused entries point at the first one, so they must carry its value.
    grad_NV.scatter_(-1, ids_NK, torch.where(inside_NK, grad_NK, grad_NK[:, :1]))
    pull_label_N = ce_scale_N + kd_scale_N * given_N if tail_mode == "label" else ce_scale_N
    grad_NV.scatter_add_(-1, label_column_N1, -pull_label_N.unsqueeze(-1))
    return kl_N, log_total_N - z_label_N, agreed_N, grad_NV


def cross_entropy(x_NV: Tensor, labels_N: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """CE(x, label) [N], and over x the gradient of scale * CE with respect to it [N, V]."""
    labels_N1 = labels_N.clamp(min=0).unsqueeze(-1)
    max_N1, x_label_N1 = x_NV.amax(-1, keepdim=True), x_NV.gather(-1, labels_N1)
    exps_NV = x_NV.sub_(max_N1).exp_()
    sum_N1, scale_N1 = exps_NV.sum(-1, keepdim=True), scale_N.unsqueeze(-1)
    grad_NV = exps_NV.mul_(scale_N1 / sum_N1).scatter_add_(-1, labels_N1, -scale_N1)
    return (sum_N1.log() + max_N1 - x_label_N1).squeeze(-1), grad_NV


def sampled_kl(z_NV: Tensor, target: FlatTargets, samples: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """sum over entries of w (log p - log q) [N], and over z its gradient m q - w [N, V], m the sum of the weights w.

    w is p on the head and the sample's share of the tail's mass on a sample; no entry is both.
    """
    dtype = z_NV.dtype
    weights_NK = (target.log_p_NK.exp() + samples[0]).to(dtype)
    log_p_NK = torch.maximum(target.log_p_NK, samples[1]).to(dtype)
    ids_NK = target.token_ids_NK.clamp(min=0)  # unused entries have weight 0: any id serves
    log_q_NV = F.log_softmax(z_NV, -1)
    kl_N = weighted(weights_NK, log_p_NK - log_q_NV.gather(-1, ids_NK)).sum(-1)
    grad_NV = log_q_NV.exp_().mul_(weights_NK.sum(-1, keepdim=True))
    return kl_N, grad_NV.scatter_add_(-1, ids_NK, -weights_NK)


def cell_divergence(z_NV: Tensor, target: FlatTargets, divergence: str, alpha: float) -> tuple[Tensor, Tensor]:
    """A divergence [N] against a sparse target, and over z = beta * x its gradient with respect to z [N, V].

    With g the derivative by log q of the cells and G its sum, the gradient is g(v) - G q(v) in the head; for v in R it
    is the bucket's g(R) - G q(R), shared out by the softmax over R.
    """
    dtype = z_NV.dtype
    used_NK, ids_NK = target.token_ids_NK >= 0, fill_unused(target.token_ids_NK)
    z_NK = z_NV.gather(-1, ids_NK).masked_fill(~used_NK, -math.inf)
    outside_NV = z_NV.scatter_(-1, ids_NK, -math.inf)
    max_N = outside_NV.amax(-1)
    max_N = torch.where(torch.isneginf(max_N), 0.0, max_N)
    exps_NV = outside_NV.sub_(max_N.unsqueeze(-1)).exp_()
    sum_N = exps_NV.sum(-1)
    z_NM = torch.cat([z_NK, (sum_N.log() + max_N).unsqueeze(-1)], -1)
    log_q_NM = z_NM - torch.logsumexp(z_NM, -1, keepdim=True)
    log_p_NM = torch.cat([target.log_p_NK, target.log_tail_N.unsqueeze(-1)], -1).to(dtype)
    value_N, slope_NM = DIVERGENCES[divergence](log_p_NM, log_q_NM, alpha, target.scale_N)
    grad_NM = slope_NM - slope_NM.sum(-1, keepdim=True) * log_q_NM.exp()
    grad_NV = exps_NV.mul_((grad_NM[:, -1] / torch.where(sum_N > 0, sum_N, 1.0)).unsqueeze(-1))
    grad_NK = grad_NM[:, :-1]
    # Unused entries point at the first one, so they must carry its value.
    grad_NV.scatter_(-1, ids_NK, torch.where(used_NK, grad_NK, grad_NK[:, :1]))
    return value_N, grad_NV


def whole_divergence(z_NV: Tensor, log_p_NV: Tensor, divergence: str, alpha: float) -> tuple[Tensor, Tensor]:
    """A divergence [N] against distributions over the whole vocabulary, and its gradient with respect to z = beta * x
    [N, V]: for KL q - p, for others g(v) - G q(v) with g the derivative by log q and G its sum."""
    log_q_NV = F.log_softmax(z_NV, -1)
    if divergence == "kl":
        p_NV = log_p_NV.exp()
        return weighted(p_NV, log_p_NV - log_q_NV).sum(-1), log_q_NV.exp_().sub_(p_NV)
    value_N, slope_NV = DIVERGENCES[divergence](log_p_NV, log_q_NV, alpha, None)
    return value_N, slope_NV - slope_NV.sum(-1, keepdim=True) * log_q_NV.exp()


def ordered_divergence(
    z_NV: Tensor, log_p_NV: Tensor, target: FlatTargets, divergence: str, alpha: float
) -> tuple[Tensor, Tensor]:
    """`whole_divergence` for one that needs the teacher's best tokens in order (`divergences.modes_first`)."""
    ids_NK = target.token_ids_NK[:, :MODES]
    log_q_NV = F.log_softmax(z_NV, -1)
    log_p_NM, log_q_NM = (modes_first(log_NV, ids_NK) for log_NV in (log_p_NV, log_q_NV))
    value_N, slope_NM = DIVERGENCES[divergence](log_p_NM, log_q_NM, alpha, target.scale_N)
    slope_NK = torch.where(ids_NK >= 0, slope_NM[:, : ids_NK.shape[-1]], 0.0)
    slope_NV = slope_NM[:, MODES:].scatter_add(-1, ids_NK.clamp(min=0), slope_NK)
    return value_N, slope_NV - slope_NV.sum(-1, keepdim=True) * log_q_NV.exp()
