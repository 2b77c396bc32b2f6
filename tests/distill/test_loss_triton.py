"""The loss as a kernel of Triton, in place over logits: against the definition in float64, and what it takes of a GPU.

Without a GPU Triton's interpreter runs the kernel, from the fused loss on: only the choice by device is replaced.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from logit_cache.corpus.labels import IGNORE
from logit_cache.distill import position_losses
from logit_cache.distill.flat_targets import FlatTargets, TailShape
from logit_cache.distill.fused import fused_distillation_loss, fused_loss, gpu_chunk_size
from logit_cache.distill.loss import distillation_loss
from logit_cache.distill.loss_settings import LossSettings
from logit_cache.distill.position_losses import CompiledLoss, TritonLoss, cached_target, labels_only
from logit_cache.distill.triton_rows import Entries, TritonRows
from logit_cache.models.output_layer import OutputLayer
from logit_cache.targets.basis import TailBasis
from logit_cache.targets.sparse_targets import SparseTargets
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.triton_kernels import DEVICE, compiled_for_h100

# The interpreter is numpy, which warns of -inf - -inf also where the result is not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KNOTS = (0.25, 0.5, 0.75, 2.0)
TEMPERATURES = (0.5, 1.0, 2.0, 8.0)
V, N, K, R = 301, 10, 20, 6  # V is no multiple of a tile, N none of a program's rows
UNIT = 2.0**-24
"""Half the distance of neighbouring float32, relative to them."""


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of a GPU."""
    monkeypatch.setattr(position_losses, "implementation", lambda device: "triton")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.arange(N) % 5 != 2


def some_targets(
    support: str = "topk", rank: int = R, softcap: float | None = None, mask: Tensor = MASK, **numbers: Any
) -> SparseTargets:
    """With a shape for `rank` above 0."""
    numbers = {"k": K} | numbers if support == "topk" else numbers
    targets = SparseTargets.from_logits(3 * normal(0, N, V), support=support, knots=KNOTS, mask=mask, **numbers)
    if not rank:
        return targets
    basis = TailBasis(normal(1, V), normal(2, V, rank) * (R / rank) ** 0.5, softcap)
    return replace(targets, basis=basis, tail_coordinates=normal(3, N, rank))


def some_labels(targets: SparseTargets) -> Tensor:
    """In the head, outside of it and missing, also where there is no target."""
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(4))
    labels[::2] = targets.token_ids[::2, 1].clamp(min=0)
    labels[[3, 7]] = IGNORE
    return labels


def double(targets: SparseTargets) -> SparseTargets:
    wide = targets.map(lambda part: part.double() if part.is_floating_point() else part)
    basis = targets.basis
    if basis is None:
        return wide
    return replace(wide, basis=replace(basis, offset=basis.offset.double(), directions=basis.directions.double()))


def of_logits(x: Tensor, targets: SparseTargets, labels: Tensor, **options: Any) -> tuple[Any, Tensor]:
    """The fused loss with logits as hidden states, and its gradient by them."""
    x = x.detach().to(DEVICE).requires_grad_()
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=DEVICE)
    output = fused_distillation_loss(x, identity, targets.to(DEVICE), labels.to(DEVICE), **options)
    return output, torch.autograd.grad(output.loss, x)[0].cpu()


def by_definition(x: Tensor, targets: SparseTargets, labels: Tensor, **options: Any) -> tuple[Any, Tensor]:
    x = x.detach().double().requires_grad_()
    output = distillation_loss(x, double(targets), labels, **options)
    return output, torch.autograd.grad(output.loss, x)[0]


def assert_equal(found: tuple[Any, Tensor], expected: tuple[Any, Tensor], temperature: float) -> None:
    """To the roundings of float32: values are differences of logarithms of up to 20 nats, and the exponents of the
    gradient, up to 20 nats over T, are rounded to 20 units; the average over tokens is a fraction of that."""
    for name, size in (("loss", temperature**2), ("kd", 1.0), ("ce", 1.0), ("agreement", 1.0)):
        one, other = getattr(found[0], name).item(), getattr(expected[0], name).item()
        assert one == pytest.approx(other, rel=40 * UNIT, abs=20 * UNIT * size), name
    off = found[1] - expected[1]
    assert off.norm() <= 1e-6 * expected[1].norm()
    assert off.abs().max() <= 40 * UNIT * expected[1].abs().max()


TAILS = {
    "bucket": {"tail": "bucket"},
    "shape": {"tail": "shape"},
    "soft-capped shape": {"tail": "shape", "softcap": 1.5},
    "shape of many coordinates": {"tail": "shape", "rank": 40},
    "label beside a shape": {"tail": "shape", "known": True},
    "label beside a bucket": {"tail": "label", "known": True},
    "samples": {"tail": "bucket", "support": "threshold", "tau": 0.05},
    "drop": {"tail": "drop"},
    "renormalize_teacher": {"tail": "renormalize_teacher"},
}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", TAILS)
def test_it_is_the_definition(name: str, temperature: float) -> None:
    case = dict(TAILS[name])
    tail, known = case.pop("tail"), case.pop("known", False)
    targets = some_targets(**case)
    labels = some_labels(targets)
    if known:
        log_p = torch.log_softmax(3 * normal(0, N, V), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        targets = replace(targets, label_log_probs=torch.where(labels != IGNORE, log_p, 0.0))
    options = {"temperature": temperature, "kd_weight": 0.7, "ce_weight": 0.3, "tail": tail}
    student = 3 * normal(5, N, V + 5)  # with tokens that the teacher does not have
    expected = by_definition(student, targets, labels, **options)
    assert_equal(of_logits(student, targets, labels, chunk_size=7, **options), expected, temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "shape"])
@pytest.mark.parametrize("form", [{"logit_scale": 0.5}, {"softcap": 4.0}, {"logit_scale": 2.0, "softcap": 5.0}])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_an_output_layer(temperature: float, tail: str, form: dict[str, float], bias: bool) -> None:
    """Bias, scale and soft-cap of the logits, and the gradients of states, weights and bias."""
    targets = some_targets()
    labels = some_labels(targets)
    options = {"temperature": temperature, "kd_weight": 0.7, "ce_weight": 0.3, "tail": tail}
    parts = [normal(6, N, 9), normal(7, V, 9), normal(8, V)][: 3 if bias else 2]
    one = [part.to(DEVICE).requires_grad_() for part in parts]
    other = [part.double().requires_grad_() for part in parts]
    product = other[0] @ other[1].T + (other[2] if bias else 0.0)
    logits = OutputLayer(other[1], None, form.get("logit_scale", 1.0), form.get("softcap")).transform(product)
    exact = distillation_loss(logits, double(targets), labels, **options)
    fused = fused_distillation_loss(
        *one[:2], targets.to(DEVICE), labels.to(DEVICE), bias=one[2] if bias else None, chunk_size=7, **form, **options
    )
    found, expected = torch.autograd.grad(fused.loss, one), torch.autograd.grad(exact.loss, other)
    for some, exactly in zip(found, expected, strict=True):
        assert (some.cpu() - exactly).norm() <= 1e-6 * exactly.norm()
    assert fused.loss.item() == pytest.approx(exact.loss.item(), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_cross_entropy_alone(temperature: float) -> None:
    labels, student = some_labels(some_targets()), 3 * normal(5, N, V)
    x = student.double().requires_grad_()
    exact = nn.functional.cross_entropy(x, labels, ignore_index=IGNORE)
    (expected,) = torch.autograd.grad(exact, x)
    y = student.to(DEVICE).requires_grad_()
    fused = fused_distillation_loss(
        y, torch.eye(V, device=DEVICE), None, labels.to(DEVICE), kd_weight=0.0, ce_weight=1.0
    )
    (found,) = torch.autograd.grad(fused.loss, y)
    assert fused.ce.item() == pytest.approx(exact.item(), rel=40 * UNIT)
    assert (found.cpu() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "shape"])
@pytest.mark.parametrize("k", [1, V - 1, V])
def test_heads_of_any_size(temperature: float, tail: str, k: int) -> None:
    targets = some_targets(k=k)
    labels, student = some_labels(some_targets()), 3 * normal(5, N, V)
    options = {"temperature": temperature, "ce_weight": 0.3, "tail": tail}
    expected = by_definition(student, targets, labels, **options)
    assert_equal(of_logits(student, targets, labels, **options), expected, temperature)


@pytest.mark.parametrize("tail", ["bucket", "shape"])
@pytest.mark.parametrize("value", [0.0, 7.0, -3e4, 3e4])
def test_rows_of_equal_logits(tail: str, value: float) -> None:
    targets = some_targets()
    labels, student = some_labels(targets), torch.full((N, V), value)
    options = {"temperature": 2.0, "ce_weight": 0.3, "tail": tail}
    assert_equal(
        of_logits(student, targets, labels, **options), by_definition(student, targets, labels, **options), 2.0
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "shape"])
@pytest.mark.parametrize("where", ["one in the head", "some outside", "all outside", "the label"])
def test_logits_of_minus_infinity(temperature: float, tail: str, where: str) -> None:
    """Tokens that the student holds for impossible: the loss is infinite where the teacher does not, and the gradient
    is finite."""
    targets = some_targets()
    labels, student = some_labels(targets), 3 * normal(5, N, V)
    for row, ids in enumerate(targets.token_ids):
        head = ids[ids >= 0]
        if where == "one in the head" and len(head):
            student[row, head[2]] = -math.inf
        elif where == "some outside":
            outside = torch.ones(V, dtype=torch.bool)
            outside[head] = False
            outside[labels[row].clamp(min=0)] = False
            student[row, outside & (torch.arange(V) % 3 == 0)] = -math.inf
        elif where == "all outside" and len(head):
            outside = torch.ones(V, dtype=torch.bool)
            outside[head] = False
            student[row, outside] = -math.inf
        elif where == "the label" and labels[row] != IGNORE:
            student[row, labels[row]] = -math.inf
    if where == "all outside":
        labels = torch.where((targets.token_ids == labels.unsqueeze(-1)).any(-1), labels, IGNORE)
    settings = LossSettings(temperature, 0.7, 0.3, tail)
    kl_N, ce_N, _, found = in_place(student, targets, labels, settings)
    kd, ce = scales(targets, labels)
    wide = FlatTargets.of(double(targets), labels, settings)
    plain = cached_target(wide, labels, settings).plain(student.double(), slice(0, N), kd.double(), ce.double())
    assert plain.kd_C is not None
    assert torch.equal(kl_N.isinf() & targets.mask, plain.kd_C.isinf() & targets.mask)
    assert kl_N.isinf().any() == (tail == "shape" or where != "some outside") or where == "the label"
    assert torch.equal(ce_N.isinf(), plain.ce_C.isinf() & (labels != IGNORE))
    finite = plain.kd_C.isfinite() & targets.mask
    assert (kl_N - plain.kd_C)[finite].abs().sum() <= 40 * UNIT * max(finite.sum(), 1)
    assert (found - plain.grad_CV).norm() <= 1e-6 * plain.grad_CV.norm()


def scales(targets: SparseTargets, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of KL and CE [N]."""
    return targets.mask * 0.7, (labels != IGNORE) * 0.3


def in_place(
    product: Tensor, targets: SparseTargets, labels: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL, CE, agreement, and what is left in the place of the product, whose rows lie apart."""
    targets, labels = targets.to(DEVICE), labels.to(DEVICE)
    loss = cached_target(FlatTargets.of(targets, labels, settings), labels, settings)
    assert isinstance(loss, TritonLoss)
    room = torch.full((N, V + 29), 5.0, dtype=product.dtype, device=DEVICE)
    room[:, :V] = product
    results = loss.rows(room[:, :V], slice(0, N), *scales(targets, labels), OutputLayer(product))
    assert (room[:, -(-V // 16) * 16 :] == 5).all(), "only a row's own places are written"
    assert not any(part.data_ptr() % 16 for part in results), "one kernel, whatever the number of rows"
    kl, ce_N, agreed, gradient = (part.cpu() for part in (*results, room[:, :V]))
    return kl, ce_N, agreed, gradient


@pytest.mark.parametrize("tail", ["bucket", "shape"])
@pytest.mark.parametrize("unused", [[2], [2, 4, 5, 6, 7], list(range(N))])
def test_positions_without_target_and_label_are_not_read(tail: str, unused: list[int]) -> None:
    """Some rows of a program, all rows of one, and all."""
    mask = MASK.clone()
    mask[unused] = False
    targets = some_targets(mask=mask)
    labels, student = some_labels(some_targets()), 3 * normal(5, N, V)
    labels[unused] = IGNORE
    labels[7] = IGNORE if 7 in unused else 5
    settings = LossSettings(2.0, 0.7, 0.3, tail)
    clean = in_place(student, targets, labels, settings)
    student[unused] = math.nan
    for one, other in zip(clean, in_place(student, targets, labels, settings), strict=True):
        assert torch.equal(one, other)
    empty = (clean[3] == 0).all(-1)
    assert empty.nonzero().flatten().tolist() == unused


def test_one_row_of_any_stride() -> None:
    """torch says nothing of the stride of an axis of one row."""
    targets = some_targets()[1:2].to(DEVICE)
    labels, settings = some_labels(some_targets())[1:2].to(DEVICE), LossSettings(2.0, 0.7, 0.3, "bucket")
    loss = cached_target(FlatTargets.of(targets, labels, settings), labels, settings)
    assert isinstance(loss, TritonLoss)
    found = []
    for stride in (V, 1):
        product = (3 * normal(5, 1, V)).to(DEVICE).as_strided((1, V), (stride, 1))
        loss.rows(product, slice(0, 1), *scales(targets, labels), OutputLayer(product))
        found.append(product)
    assert torch.equal(*found)
    assert found[0].norm() > 0


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["bucket", "shape", "label beside a shape", "samples"])
def test_nothing_waits_for_the_gpu(name: str) -> None:
    """No operation whose result the host reads, or whose size depends on values."""
    case = dict(TAILS[name])
    tail, known = case.pop("tail"), case.pop("known", False)
    targets = some_targets(**case)
    labels = some_labels(targets)
    targets = replace(targets, label_log_probs=-torch.ones(N)) if known else targets
    x, identity = (3 * normal(5, N, V)).to(DEVICE).requires_grad_(), torch.eye(V, device=DEVICE)
    targets, labels = targets.to(DEVICE), labels.to(DEVICE)
    with Operations() as operations:
        output = fused_distillation_loss(x, identity, targets, labels, temperature=2.0, ce_weight=0.3, tail=tail)
        output.loss.backward()
    assert "mm" in operations.names
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "index"}
    assert not operations.names & waiting


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_added_in_float32(dtype: torch.dtype) -> None:
    """The gradient of the weights over two chunks and over one: to the roundings of a float32 sum."""
    targets = some_targets().to("cuda")
    labels = some_labels(some_targets()).cuda()
    hidden, weight = normal(6, N, 64).cuda().to(dtype), normal(7, V, 64).cuda()
    gradients = []
    for chunk_size in (5, N):
        layer = weight.clone().requires_grad_()
        loss = fused_distillation_loss(hidden, layer, targets, labels, chunk_size=chunk_size, ce_weight=0.3).loss
        gradients.append(torch.autograd.grad(loss, layer)[0])
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def test_a_bad_logit_or_label_is_seen() -> None:
    """Without waiting for the GPU: the position's loss is NaN, and no other's."""
    targets = some_targets()
    labels, student = some_labels(targets), 3 * normal(5, N, V)
    options = {"kd_weight": 0.7, "ce_weight": 0.3, "tail": "bucket"}
    out_of_range = labels.clone()
    out_of_range[1] = V
    assert of_logits(student, targets, out_of_range, **options)[0].ce.isnan()
    student[1, 5] = math.nan
    output, gradient = of_logits(student, targets, labels, **options)
    assert output.loss.isnan() and gradient[1].isnan().any()
    assert gradient[[row for row in range(N) if row != 1]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "shape"])
def test_half_precision_is_rounded_once(dtype: torch.dtype, temperature: float, tail: str) -> None:
    """Of the same logits: the gradient of float32, rounded; a float16's is of the sum over positions."""
    targets = some_targets()
    labels, student = some_labels(targets), (3 * normal(5, N, V)).to(dtype)
    options = {"temperature": temperature, "kd_weight": 0.7, "ce_weight": 0.3, "tail": tail}
    one, found = of_logits(student, targets, labels, **options)
    other, expected = of_logits(student.float(), targets, labels, **options)
    for name in ("loss", "kd", "ce", "agreement"):
        # A GPU leaves out the last bits of the factors of a shape's logits, up to 10 nats.
        moved = 10 * 2.0**-10 if DEVICE != "cpu" and tail == "shape" else 1e-6
        assert getattr(one, name).item() == pytest.approx(getattr(other, name).item(), rel=moved), name
    unit = torch.finfo(dtype).eps / 2
    assert (found.float() - expected).norm() <= (unit + moved) * expected.norm()


def test_adapters_on_the_output_layer() -> None:
    """A module's logits, and gradients by autograd: the kernel writes over a copy."""
    targets = some_targets()
    labels = some_labels(targets)
    module = nn.Sequential(nn.Linear(9, 5, bias=False), nn.Linear(5, V))
    hidden = normal(6, N, 9)
    settings = LossSettings(2.0, 0.7, 0.3, "shape")
    module, states = module.to(DEVICE), hidden.to(DEVICE).requires_grad_()
    layer = OutputLayer(torch.empty(V, 9, device="meta"), module=module)
    fused = fused_loss(states, layer, targets.to(DEVICE), labels.to(DEVICE), settings, chunk_size=7)
    found = torch.autograd.grad(fused.loss, [states, *module.parameters()])
    module, wide = module.cpu().double(), hidden.double().requires_grad_()
    exact = distillation_loss(
        module(wide), double(targets), labels, temperature=2.0, kd_weight=0.7, ce_weight=0.3, tail="shape"
    )
    for some, exactly in zip(found, torch.autograd.grad(exact.loss, [wide, *module.parameters()]), strict=True):
        assert (some.cpu() - exactly).norm() <= 1e-6 * exactly.norm()


def test_what_the_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, sampled = some_targets(), some_targets("threshold", tau=0.05)
    labels = some_labels(targets)

    def chosen(targets: SparseTargets, **settings: Any) -> type:
        fitted = LossSettings(**settings).fit(targets, V)
        return type(cached_target(FlatTargets.of(targets, labels, fitted), labels, fitted))

    served = [(targets, {"tail_mode": tail}) for tail in ("shape", "bucket", "drop", "renormalize_teacher")]
    served += [(sampled, {"tail_mode": "bucket"}), (sampled, {"tail_mode": "shape"})]
    plain = [(targets, {"tail_mode": tail}) for tail in ("renormalize", "uniform", "label")]
    plain += [
        (targets, {"divergence": "reverse_kl"}),
        (targets, {"divergence": "tail_aware_kl", "tail_mode": "bucket"}),
    ]
    assert all(chosen(some, **settings) is TritonLoss for some, settings in served)
    assert not any(chosen(some, **settings) in (TritonLoss, CompiledLoss) for some, settings in plain)
    assert type(labels_only(labels)) is TritonLoss
    monkeypatch.setattr(position_losses, "implementation", lambda device: "torch")
    assert not any(chosen(some, **settings) in (TritonLoss, CompiledLoss) for some, settings in served)
    monkeypatch.undo()
    assert [chosen(some, **settings) is CompiledLoss for some, settings in served] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]


def test_float64_has_operations_of_torch() -> None:
    targets = some_targets()
    labels, student = some_labels(targets), 3 * normal(5, N, V).double()
    options = {"temperature": 2.0, "ce_weight": 0.3}
    found, expected = (
        of_logits(student, double(targets), labels, **options),
        by_definition(student, targets, labels, **options),
    )
    assert (found[1] - expected[1]).norm() <= 1e-13 * expected[1].norm()


GIB = 2**30


@pytest.mark.parametrize(
    ("memory", "vocab_size", "size", "expected"),
    [
        (80 * GIB, 128_256, 2, 4096),
        (80 * GIB, 49_152, 2, 4096),
        (80 * GIB, 262_144, 2, 2048),
        (80 * GIB, 128_256, 4, 2048),
        (24 * GIB, 128_256, 2, 1024),
        (8 * GIB, 262_144, 4, 256),
    ],
)
def test_a_chunk_takes_a_64th_of_the_memory(memory: int, vocab_size: int, size: int, expected: int) -> None:
    assert gpu_chunk_size(memory, vocab_size * size) == expected
    assert expected == 256 or expected * vocab_size * size <= memory / 64


def launch(dtype: str, rank: int, capped: bool, by_tokens: bool = False) -> None:
    """The kernel for logits of a large vocabulary, with the directions of a shape as a cache gives them, one after the
    other, or those of each token together; `capped`: with all that can be done to logits, and T = 2."""
    product = torch.empty(2, 128_256, dtype=getattr(torch, dtype))
    empty = torch.empty(2, 17)
    entries = Entries(empty.long(), empty, empty, empty[:, 0].contiguous())
    shape = None
    if rank:
        directions = torch.empty(128_256, rank) if by_tokens else torch.empty(rank, 128_256).T
        basis = TailBasis(torch.empty(128_256), directions, 30.0 if rank > 100 else None)
        shape = TailShape(torch.empty(2, rank), basis, 1.0)
    layer = OutputLayer(product, torch.empty(128_256), 0.5, 30.0) if capped else OutputLayer(product)
    rows = TritonRows(entries, shape, torch.zeros(2, dtype=torch.int64), 2.0 if capped else 1.0)
    rows(product, slice(0, 2), torch.ones(2), torch.ones(2), layer)


@pytest.mark.slow
def test_it_compiles_for_an_h100(record_property: Any) -> None:
    """Nothing is spilled, and a multiprocessor takes a program."""
    cases: list[tuple[Any, ...]] = [
        ("bfloat16", 0, True),
        ("bfloat16", 32, False),
        ("bfloat16", 32, True),
        ("bfloat16", 32, True, True),
        ("bfloat16", 128, False),
        ("bfloat16", 128, True),
        ("float32", 32, True),
        ("float32", 128, True),
    ]
    for case, taken in zip(cases, compiled_for_h100(launch, *cases), strict=True):
        record_property(str(case), str(taken))
        assert taken.spilled_bytes == taken.stack_bytes == 0, (case, taken)
        assert taken.shared_bytes <= 227 * 1024
        programs = 1 if case[1] else 8
        assert taken.registers * 32 * taken.warps * programs <= 65536, (case, taken)
