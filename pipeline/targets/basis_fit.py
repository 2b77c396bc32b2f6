"""The fit of a tail basis: which r numbers of a hidden state tell most about the tail, and what they say of each token.

Three steps, from hidden states h of positions spread over a corpus, with the output layer W:

1. The start is the plane of h in which the logits vary most: it minimises E (h - h')' M (h - h') for h' in a plane of r
   dimensions, M = sum_v omega_v (w_v - w_mean)(w_v - w_mean)', omega the teacher's mean distribution at T = 2. An
   eigenproblem of size D.
2. Offset a, directions U and projection P are fitted by maximum likelihood: Adam (Kingma & Ba 2015, arXiv 1412.6980) on
   the KL divergence of the shaped target from the teacher over the tail, at T = 1 and T = 2 together. At its minimum the
   mean of p - p^, and its products with every coordinate, are 0 for each token, which takes the bias out of a student's
   gradient. The coordinates carry noise of the size of their rounding, so that no direction relies on what rounding
   removes.
3. A linear change of the coordinates, which changes no shape, makes them uncorrelated and the tail's Fisher information
   the identity: rounding to one step s then costs s^2 / 24 nats for each coordinate, and no other choice of steps costs
   less at the same number of bytes.

On SmolLM2 (k = 24, r = 64, 10 to 14 bytes) KL(p || p^) at T = 1 and 2 is 0.18 and 0.18 at the start and 0.10 and 0.14
after 600 steps (0.12 and 0.16 after 200); the gradient of a student with 27 of its 30 layers is off by 5.9 and 9.3 %,
then 1.0 and 2.9 %.

At last the mean direction of a head's tokens is related to the coordinates, by least squares: a cache stores the
difference.

Shapes: N positions, D hidden size, V vocabulary, r coordinates (R in names), K kept entries, C chunk, M = r + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.errors import RecipeError
from ..base.kernels import in_threads
from ..base.progress import Meter
from ..models.output_layer import OutputLayer
from .basis import TailBasis, TailProjection
from .basis_kernels import tail_slopes
from .reduction import runs_compiled
from .sparse_targets import SparseTargets
from .supports import Support

TEMPERATURES = (1.0, 2.0)
"""Temperatures that the fit serves; above them a tail is nearly uniform."""
_STEPS, _BATCH = 600, 256
_SOME_POSITIONS = 4096
"""Positions for the means over the vocabulary that the start and the Fisher information need."""
_RATE_OFFSET, _RATE_DIRECTIONS, _RATE_PROJECTION = 0.2, 0.06, 0.02
"""Adam's first rates: nats, nats for a standard deviation of the coordinate, mean magnitudes of the projection."""
_ROWS_AT_ONCE = 16
_CHUNK_LOGITS = 2**24
"""Logits that exist at once."""
_SMALLEST = 1e-9
"""Eigenvalues below this part of the largest are rounding."""


@dataclass(frozen=True)
class _Fit:
    """A basis with its projection: z = P (h - mu), t = softcap(a + U z)."""

    mu_D: Tensor
    projection_RD: Tensor
    offset_V: Tensor
    directions_VR: Tensor
    variance_R: Tensor
    """Of the coordinates, in descending order."""


@dataclass(frozen=True)
class _Sample:
    """What a basis is learned from."""

    hidden_ND: Tensor
    order_N: Tensor
    """A random order of the positions."""
    output_layer: OutputLayer
    support: Support

    def batch(self, first: int, count: int) -> Tensor:
        """Hidden states of the positions `first` to `first + count` in random order, over and over, on the device."""
        places = torch.arange(first, first + count) % len(self.order_N)
        return self.hidden_ND[self.order_N[places]].to(self.output_layer.weight.device)

    def chunks(self, hidden_ND: Tensor) -> tuple[Tensor, ...]:
        return torch.split(hidden_ND, max(_CHUNK_LOGITS // len(self.output_layer.weight), 1))


def learn_basis(
    hidden_ND: Tensor,
    output_layer: OutputLayer,
    support: Support,
    rank: int,
    *,
    step: float,
    seed: int = 0,
    title: str = "tail basis",
) -> tuple[TailBasis, TailProjection]:
    """The basis of rank `rank` for the tails that `support` leaves, and the projection that gives its coordinates.

    hidden_ND: states [N, D] that the output layer reads, of positions spread over the corpus; they are moved to the
    output layer's device a batch at a time. `step`: that to which coordinates will be rounded. The result is float32 on
    the CPU, and depends on the arguments alone, up to the rounding of matrix products. `title` begins the lines of progress.

    Raises RecipeError for an output layer that is not linear, ValueError for a rank outside 1..min(D, V - 1), no positions, and a support without a head.
    """
    if not output_layer.is_linear:
        raise RecipeError(
            "this teacher's logits are no product of an output layer with hidden states, so their tail has no shape: set "
            "cache.tail_rank = 0 (with plan: --no-probe)"
        )
    largest = min(output_layer.weight.shape[1], output_layer.weight.shape[0] - 1)
    if not 1 <= rank <= largest:
        raise ValueError(f"rank {rank}: a tail basis of this teacher has 1 to {largest} coordinates")
    if not len(hidden_ND):
        raise ValueError("a tail basis is learned from one position at least")
    if not support.has_head:
        raise ValueError(f"support {support.name!r} has no head beside which a tail has a shape")
    generator = torch.Generator().manual_seed(seed)
    order_N = torch.randperm(len(hidden_ND), generator=generator)
    sample = _Sample(hidden_ND, order_N, output_layer, support)
    with torch.no_grad():
        mu_D, covariance_DD = _moments(sample)
        fit = _standardised(_start(sample, mu_D, covariance_DD, rank), covariance_DD, sample)
        fit = _standardised(_most_likely(fit, sample, step, generator, title), covariance_DD, sample)
        prediction_MR = _prediction(fit, sample)
    basis = TailBasis(
        fit.offset_V.cpu(), fit.directions_VR.cpu(), output_layer.softcap, prediction=prediction_MR.float().cpu()
    )
    return basis, TailProjection(fit.mu_D.cpu(), fit.projection_RD.cpu())


def _start(sample: _Sample, mu_D: Tensor, covariance_DD: Tensor, rank: int) -> _Fit:
    """Step 1."""
    layer = sample.output_layer
    weight_VD = layer.weight.float()
    omega_V = torch.zeros(len(weight_VD), dtype=torch.float64, device=weight_VD.device)
    for hidden_CD in sample.chunks(sample.batch(0, min(_SOME_POSITIONS, len(sample.order_N)))):
        omega_V += torch.softmax(layer.logits(hidden_CD).float() / 2.0, -1).sum(0)
    omega_V = (omega_V / omega_V.sum()).float()
    centred_VD = weight_VD - omega_V @ weight_VD
    metric_DD = ((centred_VD * omega_V.unsqueeze(-1)).T @ centred_VD).double()
    root_DD, inverse_DD = _roots(metric_DD)
    variance_D, vectors_DD = _descending(root_DD @ covariance_DD @ root_DD)
    plane_DR = vectors_DD[:, :rank]
    bias_V = 0.0 if layer.bias is None else layer.bias.float()
    return _Fit(
        mu_D.float(),
        (root_DD @ plane_DR).T.float(),
        layer.scale * (weight_VD @ mu_D.float() + bias_V),
        layer.scale * (weight_VD @ (inverse_DD @ plane_DR).float()),
        variance_D[:rank].float(),
    )


def _most_likely(fit: _Fit, sample: _Sample, step: float, generator: torch.Generator, title: str) -> _Fit:
    """Step 2, from standardised coordinates."""
    deviation_R = (fit.variance_R + step**2 / 12).sqrt()  # with the noise
    offset_V, scaled_VR, projection_RD = fit.offset_V, fit.directions_VR * deviation_R, fit.projection_RD.clone()
    rates = {offset_V: _RATE_OFFSET, scaled_VR: _RATE_DIRECTIONS}
    rates[projection_RD] = _RATE_PROJECTION * float(projection_RD.abs().mean())
    optimizer = torch.optim.Adam(
        [{"params": [x], "lr": rate} for x, rate in rates.items()], betas=(0.9, 0.99), eps=1e-12
    )
    # Few positions are seen three times at most: more would fit their rare tokens.
    steps = max(min(_STEPS, 3 * len(sample.order_N) // _BATCH), 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with Meter(title, steps * _BATCH, "positions") as meter:
        for number in range(steps):
            gradients = [torch.zeros_like(weights) for weights in rates]
            directions_VR = scaled_VR / deviation_R
            for hidden_CD in sample.chunks(sample.batch(number * _BATCH, _BATCH)):
                centred_CD = hidden_CD.float() - fit.mu_D
                noise_CR = torch.rand(len(hidden_CD), len(deviation_R), generator=generator) - 0.5
                z_CR = centred_CD @ projection_RD.T + step * noise_CR.to(centred_CD.device)
                slope_CV = _likelihood_slope(offset_V + z_CR @ directions_VR.T, hidden_CD, sample) / _BATCH
                gradients[0] += slope_CV.sum(0)
                gradients[1] += slope_CV.T @ (z_CR / deviation_R)
                gradients[2] += (slope_CV @ directions_VR).T @ centred_CD
            for weights, gradient in zip(rates, gradients, strict=True):
                weights.grad = gradient
            optimizer.step()
            schedule.step()
            meter.advance(_BATCH)
    return _Fit(fit.mu_D, projection_RD, offset_V, scaled_VR / deviation_R, fit.variance_R)


def _likelihood_slope(linear_CV: Tensor, hidden_CD: Tensor, sample: _Sample) -> Tensor:
    """The derivative of sum_T p_T(R) KL(true tail, shape) by a + U z [C, V], 0 on the head; overwrites a + U z."""
    logits_CV, heads_CK, masses_CT = _tails(hidden_CD, sample)
    softcap = sample.output_layer.softcap
    slope_CV = shape_CV = linear_CV if softcap is None else softcap * torch.tanh(linear_CV / softcap)
    if runs_compiled(shape_CV):
        shape, logits, heads, masses = (x.numpy() for x in (shape_CV, logits_CV, heads_CK, masses_CT))

        def work(start: int, stop: int) -> None:
            tail_slopes(shape[start:stop], logits[start:stop], heads[start:stop], masses[start:stop])

        in_threads(work, len(shape), _ROWS_AT_ONCE)
    else:
        slope_CV = torch.zeros_like(shape_CV)
        for temperature, mass_C in zip(TEMPERATURES, masses_CT.unbind(-1), strict=True):
            difference_CV = _shares(shape_CV, heads_CK, temperature) - _shares(logits_CV, heads_CK, temperature)
            slope_CV += difference_CV * (mass_C / temperature).unsqueeze(-1)
    return slope_CV if softcap is None else slope_CV * (1 - (linear_CV / softcap).tanh().square())


def _shares(logits_CV: Tensor, heads_CK: Tensor, temperature: float) -> Tensor:
    """softmax of logits / T over the tail [C, V], 0 on the head."""
    return torch.softmax(logits_CV.scatter(-1, heads_CK, -torch.inf) / temperature, -1).nan_to_num_(0.0)


def _tails(hidden_CD: Tensor, sample: _Sample) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's logits [C, V] float32, the ids of heads [C, K], and p_T(R) at each temperature [C, T].

    Unused ids repeat the first one.
    """
    logits_CV = sample.output_layer.logits(hidden_CD).to(hidden_CD.device)
    knots = [1 / temperature for temperature in TEMPERATURES]
    targets = SparseTargets.from_logits(logits_CV, support=sample.support, knots=knots)
    heads_CK = torch.where(targets.head_mask, targets.token_ids, targets.token_ids[:, :1])
    masses_CT = torch.stack([targets.at_temperature(temperature)[1].exp() for temperature in TEMPERATURES], -1)
    return logits_CV.float(), heads_CK, masses_CT


def _standardised(fit: _Fit, covariance_DD: Tensor, sample: _Sample) -> _Fit:
    """Step 3: the same shapes in coordinates that are uncorrelated, their Fisher information the identity."""
    fisher_RR = _fisher_information(fit, sample)
    root_RR, inverse_RR = _roots(fisher_RR)
    projection_RD = fit.projection_RD.double()
    covariance_RR = projection_RD @ covariance_DD @ projection_RD.T
    variance_R, turn_RR = _descending(root_RR @ covariance_RR @ root_RR)
    return _Fit(
        fit.mu_D,
        (turn_RR.T @ root_RR @ projection_RD).float(),
        fit.offset_V,
        fit.directions_VR @ (inverse_RR @ turn_RR).float(),
        variance_R.float(),
    )


def _fisher_information(fit: _Fit, sample: _Sample) -> Tensor:
    """Mean over positions and temperatures of p_T(R) Cov_R(dt/dz) / T^2 [R, R]: twice the KL that a small error
    costs."""
    hidden_ND = sample.batch(0, min(_SOME_POSITIONS // 2, len(sample.order_N)))
    directions_VR, softcap = fit.directions_VR, sample.output_layer.softcap
    fisher_RR = torch.zeros(
        directions_VR.shape[1], directions_VR.shape[1], dtype=torch.float64, device=hidden_ND.device
    )
    for hidden_CD in sample.chunks(hidden_ND):
        logits_CV, heads_CK, masses_CT = _tails(hidden_CD, sample)
        for temperature, mass_C in zip(TEMPERATURES, masses_CT.unbind(-1), strict=True):
            mass_C1 = mass_C.unsqueeze(-1)
            p_CV = _shares(logits_CV, heads_CK, temperature) * mass_C1
            squares_V = p_CV.sum(0)
            if softcap is not None:
                z_CR = (hidden_CD.float() - fit.mu_D) @ fit.projection_RD.T
                gain_CV = 1 - ((fit.offset_V + z_CR @ directions_VR.T) / softcap).tanh().square()
                squares_V, p_CV = (p_CV * gain_CV.square()).sum(0), p_CV * gain_CV
            mean_CR = p_CV @ directions_VR
            among = (directions_VR * squares_V.unsqueeze(-1)).T @ directions_VR
            fisher_RR += (among - (mean_CR / mass_C1.clamp(min=1e-30)).T @ mean_CR).double() / temperature**2
    return fisher_RR / (len(hidden_ND) * len(TEMPERATURES))


def _prediction(fit: _Fit, sample: _Sample) -> Tensor:
    """The prediction of coordinates [R + 1, R] from the heads of some positions."""
    hidden_ND = sample.batch(0, min(_SOME_POSITIONS, len(sample.order_N)))
    means = []
    for hidden_CD in sample.chunks(hidden_ND):
        logits_CV = sample.output_layer.logits(hidden_CD).to(hidden_CD.device)
        targets = SparseTargets.from_logits(logits_CV, support=sample.support, knots=())
        means.append(head_means(targets, fit.directions_VR))
    return prediction_from_heads(torch.cat(means), (hidden_ND.float() - fit.mu_D) @ fit.projection_RD.T)


def head_means(targets: SparseTargets, directions_VR: Tensor) -> Tensor:
    """The mean direction [N, R] of the tokens of each head, 0 where a head is empty."""
    heads_NK1, ids_NK = targets.head_mask.unsqueeze(-1), targets.token_ids.clamp(min=0)
    sums_NR: Tensor = (directions_VR[ids_NK] * heads_NK1).sum(1)
    return sums_NR / heads_NK1.sum(1).clamp(min=1)


def prediction_from_heads(means_NR: Tensor, z_NR: Tensor) -> Tensor:
    """The weights [R + 1, R] by which coordinates follow from 1 and the mean direction of a head, by least squares.

    float64; 0 where positions are too few: they would be fitted exactly.
    """
    rank = z_NR.shape[1]
    if len(z_NR) < 8 * (rank + 1):
        return torch.zeros(rank + 1, rank, dtype=torch.float64)
    known_NM = torch.nn.functional.pad(means_NR, (1, 0), value=1.0).double()
    square_MM = known_NM.T @ known_NM
    ridge_M = square_MM.diagonal() * 1e-6 + 1e-12
    weights_MR: Tensor = torch.linalg.solve(square_MM + ridge_M.diag(), known_NM.T @ z_NR.double())
    return weights_MR


def _moments(sample: _Sample) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of the hidden states, float64."""
    size, count, batch = sample.hidden_ND.shape[1], len(sample.order_N), 4096
    device = sample.output_layer.weight.device
    mean_D = torch.zeros(size, dtype=torch.float64, device=device)
    for first in range(0, count, batch):
        mean_D += sample.batch(first, min(batch, count - first)).sum(0, dtype=torch.float64) / count
    covariance_DD = torch.zeros(size, size, dtype=torch.float64, device=device)
    for first in range(0, count, batch):
        centred = sample.batch(first, min(batch, count - first)).float() - mean_D.float()
        covariance_DD += (centred.T @ centred).double() / count
    return mean_D, covariance_DD


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a symmetric matrix, and its inverse, with eigenvalues of rounding's size raised."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=max(float(values[-1]), 1e-30) * _SMALLEST)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a symmetric matrix in descending order, at least 0, and their eigenvectors as columns.

    Signs are fixed: the largest entry of each eigenvector is positive.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * torch.where(largest < 0, -1.0, 1.0)
