"""The loss without logits: value and every gradient against fp64, and what it must not do (GEMMs, memory, state)."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, guarded, value_and_grads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from peft_engine.meters.memory import LiveBytes
from peft_kernels.linear_cross_entropy import HeadAdapter, linear_cross_entropy, linear_cross_entropy_reference

BACKENDS = ("triton", "torch")
H, RANK = 24, 5
EVERYTHING = {"softcap": 5.0, "z_loss": 0.02, "logit_scale": 0.75}


def case(M: int, V: int, dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype | None = None) -> list[Tensor]:
    """hidden, weight, bias, A, B, x; and int64 targets, every seventh ignored; token weights."""
    torch.manual_seed(M + V)
    shapes = (M, H), (V, H), (V,), (RANK, H), (V, RANK), (M, H)
    floats = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    floats[3:] = [t.to(adapter_dtype or dtype) for t in floats[3:]]
    targets = torch.randint(V, (M,), device=DEVICE)
    targets[3::7] = -100
    return [*floats, targets, torch.rand(M, device=DEVICE)]


def with_adapter(op: Callable[..., Tensor], own_input: bool = True, **settings: object) -> Callable[..., Tensor]:
    """`op` as a function of the tensors of `case`, bias and one adapter included."""

    def call(h: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        # an unused x would have no gradient to compare
        unused = 0 if own_input else 0 * x.sum()
        adapter = HeadAdapter(A, B, 0.5, x if own_input else None)
        return op(h, W, t, bias=b, lora=[adapter], token_weights=w.detach(), **settings) + unused

    return call


def assert_close_as_plain(truth: list[Tensor], plain: list[Tensor], ours: list[Tensor], gemm: torch.dtype) -> None:
    """Ours errs in no row more than plain torch does in its worst, plus two ulps of the row's largest value.

    Not element by element: behind three GEMMs in another order, which elements plain torch gets exact is luck. Ulps
    are those of the head's GEMM also where a result is fp32: losses and gradients inherit its rounding of the logits.
    """
    for place, (t, p, o) in enumerate(zip(truth, plain, ours, strict=True)):
        assert o.shape == t.shape, f"{place}: {o.shape}"
        assert o.dtype == p.dtype, f"{place}: {o.dtype}"
        assert torch.isfinite(o).all(), f"{place}: not finite"
        if o.numel():
            t, p, o = (v.double().reshape(-1, v.shape[-1] if v.dim() > 1 else v.numel()) for v in (t, p, o))
            size = torch.finfo(gemm).eps * (1 + t.abs().amax(1))
            worse = (o - t).abs().amax(1) - (p - t).abs().max()
            assert (worse <= 2 * size).all(), f"{place}: {(worse / size).max():.1f} ulps worse than plain torch"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "V", "reduction", "own_input", "settings"),
    [
        (129, 257, "sum", False, {}),
        (17, 1000, "none", True, EVERYTHING),
        (1, 127, "sum", True, {"z_loss": 0.02}),
        (3, 5000, "sum", True, {"softcap": 5.0}),  # more than one block of the kernel's loop
        (0, 17, "none", True, {}),
    ],
    ids=lambda v: str(v) if isinstance(v, int | str) else "",
)
def test_no_further_from_truth_than_torch(M, V, reduction, own_input, settings, dtype, backend):
    inputs = case(M, V, dtype)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    dy = torch.randn(M, device=DEVICE) if reduction == "none" else torch.ones(M, device=DEVICE)

    def ours(*tensors, reduction=reduction):
        chosen = {"chunk_rows": 64, "reduction": reduction, "backend": backend}
        return with_adapter(linear_cross_entropy, own_input, **chosen, **settings)(*tensors)

    def run(op, tensors, dy=dy):
        # token weights are the last input and get no gradient
        return value_and_grads(lambda *t: op(*t, *tensors[6:]), tensors[:6], dy)

    reference = with_adapter(linear_cross_entropy_reference, own_input, **settings)
    truth, plain = run(reference, wide), run(reference, inputs)
    got = run(ours, inputs, dy if reduction == "none" else dy[0])
    if reduction == "sum":
        # losses are held to plain torch row by row: in their sum errors cancel, and how well is luck
        total, got[0] = got[0], ours(*inputs, reduction="none")
        torch.testing.assert_close(total, got[0].sum())
    assert_close_as_plain(truth, plain, got, gemm=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own_input", [True, False])
def test_fp32_adapter_on_a_bf16_head(own_input, backend):
    """PEFT's default: the low-rank branch runs in fp32."""
    inputs = case(33, 257, torch.bfloat16, torch.float32)
    one = torch.ones((), device=DEVICE)

    def run(op, tensors, **settings):
        call = with_adapter(op, own_input, **settings)
        return value_and_grads(lambda *t: call(*t, *inputs[6:]).sum(), tensors[:6], one)

    truth = run(linear_cross_entropy_reference, [t.double() for t in inputs[:6]])
    plain = run(linear_cross_entropy_reference, inputs)
    ours = run(linear_cross_entropy, inputs, chunk_rows=16, backend=backend)
    assert_close_as_plain(truth, plain, ours, gemm=torch.bfloat16)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything"])
def test_gradcheck(reduction, settings):
    *floats, targets, weights = case(4, 7)
    floats = [t.double().requires_grad_() for t in floats]
    call = with_adapter(linear_cross_entropy, reduction=reduction, chunk_rows=2, backend="torch", **settings)
    assert torch.autograd.gradcheck(lambda *t: call(*t, targets, weights.double()), floats)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_agree_with_f_cross_entropy(weighted, backend):
    h, W, *_, t, w = case(17, 100)
    settings = {"token_weights": w if weighted else None, "chunk_rows": 8, "backend": backend}
    losses = F.cross_entropy(F.linear(h, W), t, reduction="none") * (w if weighted else 1)
    count = (w if weighted else torch.ones_like(w))[t != -100].sum()
    for reduction, expected in (("none", losses), ("sum", losses.sum()), ("mean", losses.sum() / count)):
        torch.testing.assert_close(linear_cross_entropy(h, W, t, reduction=reduction, **settings), expected)
    leading = linear_cross_entropy(h.view(1, 17, H), W, t.view(1, 17), reduction="none", backend=backend)
    assert leading.shape == (1, 17)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored(backend):
    h, W, *_ = (t.requires_grad_() for t in case(5, 17)[:2])
    t = torch.full((5,), -100, device=DEVICE)
    for reduction, value in (("sum", 0.0), ("mean", float("nan"))):
        ours = linear_cross_entropy(h, W, t, reduction=reduction, backend=backend)
        plain = F.cross_entropy(F.linear(h, W), t, reduction=reduction)
        torch.testing.assert_close(ours, plain, equal_nan=True)
        torch.testing.assert_close(ours.item(), value, equal_nan=True)
        assert all(not g.any() for g in torch.autograd.grad(ours, (h, W)))


class GemmShapes(TorchDispatchMode):
    """Shapes of the operands of every matrix product that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.shapes.append((*left.shape, right.shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_head_costs_two_gemms_and_no_more(backend):
    h, W, *_, t, _ = case(6, 50)
    h.requires_grad_()
    with GemmShapes() as seen:
        linear_cross_entropy(h, W, t, backend=backend).backward()
    assert seen.shapes == [(6, H, 50), (6, 50, H)]
    assert W.grad is None
    with GemmShapes() as seen:
        linear_cross_entropy(h, W.requires_grad_(), t, backend=backend).backward()
    assert seen.shapes == [(6, H, 50), (6, 50, H), (50, 6, H)]
    with GemmShapes() as seen, torch.no_grad():
        linear_cross_entropy(h, W, t, backend=backend)
    assert seen.shapes == [(6, H, 50)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_count_cost_nothing(backend):
    h, W, *_, t, w = case(20, 50)
    h.requires_grad_()
    rows = torch.tensor([1, 4, 5, 19], device=DEVICE)
    with GemmShapes() as seen:
        some = linear_cross_entropy(h, W, t, rows=rows, token_weights=w, backend=backend)
    assert seen.shapes == [(4, H, 50), (4, 50, H)]
    masked = torch.full_like(t, -100).index_copy(0, rows, t[rows])
    full = linear_cross_entropy(h, W, masked, token_weights=w, backend=backend)
    torch.testing.assert_close(some, full)
    torch.testing.assert_close(torch.autograd.grad(some, h), torch.autograd.grad(full, h))
    one_by_one = linear_cross_entropy(h, W, t, rows=rows, token_weights=w, reduction="none", backend=backend)
    torch.testing.assert_close(one_by_one, F.cross_entropy(F.linear(h, W), masked, reduction="none") * w)


def test_logits_never_all_live():
    M, V = 512, 4096
    h, W = torch.randn(M, 32, requires_grad=True), torch.randn(V, 32)
    t = torch.randint(V, (M,))
    with LiveBytes(resident=(h, W, t)) as live:
        before = live.now
        linear_cross_entropy(h, W, t, chunk_rows=32, backend="torch").backward()
    chunk, small = 32 * V * 4, 4 * M * 32 * 4
    assert chunk <= live.peak - before <= chunk + small < M * V * 4 / 8


def test_fake_tensors_past_int32():
    with FakeTensorMode():
        h, W = torch.empty(512, 8, requires_grad=True), torch.empty(2**24, 8, requires_grad=True)
        t = torch.zeros(512, dtype=torch.int64)
        for backend in BACKENDS:
            linear_cross_entropy(h, W, t, chunk_rows=256, backend=backend).backward()
    assert h.grad is not None
    assert h.grad.shape == h.shape
    assert W.grad is not None
    assert W.grad.shape == W.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [{}, {"softcap": 30.0}], ids=["plain", "softcap"])
def test_huge_logits_stay_finite(settings, backend):
    h, W, *_, t, _ = case(9, 300)
    for sign in (1e4, -1e4):
        leaf = (sign * h).requires_grad_()
        loss = linear_cross_entropy(leaf, W, t, backend=backend, **settings)
        expected = linear_cross_entropy_reference(leaf.detach().double(), W.double(), t, **settings).sum()
        torch.testing.assert_close(loss.double(), expected)
        assert torch.isfinite(torch.autograd.grad(loss, leaf)[0]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeats_bit_for_bit_and_leaves_inputs_alone(reduction, backend):
    *floats, t, w = case(19, 300, torch.bfloat16)
    for leaf in floats:
        leaf.requires_grad_()
    before = [leaf.detach().clone() for leaf in floats]
    call = with_adapter(linear_cross_entropy, reduction=reduction, chunk_rows=8, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        loss, again = call(*floats, t, w), call(*floats, t, w)
        first = torch.autograd.grad(loss.sum(), floats, retain_graph=True)
        second = torch.autograd.grad(loss.sum(), floats)
        third = torch.autograd.grad(again.sum(), floats)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, again)
    for one, two, three, leaf, old in zip(first, second, third, floats, before, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        assert torch.equal(leaf, old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_size_changes_rounding_only(backend):
    *floats, t, w = case(37, 100)
    for leaf in floats:
        leaf.requires_grad_()
    results = []
    for chunk_rows in (1, 16, None):
        call = with_adapter(linear_cross_entropy, chunk_rows=chunk_rows, backend=backend)
        results.append(torch.autograd.grad(call(*floats, t, w), floats))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


def test_autocast_picks_the_gemm_dtype_and_leaves_gradients_wide():
    h, W, *_, t, _ = case(17, 100)
    h, W = h.requires_grad_(), W.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(h, W, t, chunk_rows=8, backend="torch")
    narrow_h, narrow_W = (v.detach().bfloat16().requires_grad_() for v in (h, W))
    narrow = linear_cross_entropy(narrow_h, narrow_W, t, chunk_rows=8, backend="torch")
    assert torch.equal(loss, narrow)
    dh, dW = torch.autograd.grad(loss, (h, W))
    narrow_dh, narrow_dW = torch.autograd.grad(narrow, (narrow_h, narrow_W))
    assert torch.equal(dh, narrow_dh.float())
    assert dW.dtype == torch.float32
    assert torch.equal(dW.bfloat16(), narrow_dW)
    assert not torch.equal(dW, narrow_dW.float())


def test_fp16_gradient_of_a_mean_survives_with_a_loss_scale():
    """Divided by the count before the loss scale, these gradients would be zero in fp16."""
    M = 4096
    torch.manual_seed(0)
    h, W = torch.randn(M, 8).half().requires_grad_(), (0.003 * torch.randn(16, 8)).half()
    t = torch.randint(16, (M,))
    scaled = 65536 * linear_cross_entropy(h, W, t, reduction="mean", backend="torch")
    (dh,) = torch.autograd.grad(scaled, h)
    truth = h.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(65536 * F.cross_entropy(F.linear(truth, W.double()), t), truth)
    torch.testing.assert_close(dh.double(), expected, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_between_nan(backend):
    h, W, b, *_, t, _ = case(10, 30)
    grads = []
    for hidden, weight in ((h, W), (guarded(h.t().contiguous()).t(), guarded(W.t().contiguous()).t())):
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = linear_cross_entropy(*leaves, t, bias=guarded(b), chunk_rows=4, backend=backend)
        grads.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("target", [-1, 17])
def test_targets_outside_the_vocabulary(target):
    h, W = torch.randn(2, H, requires_grad=True), torch.randn(17, H)
    t = torch.tensor([0, target])
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(h, W, t, backend="torch")
    loss = linear_cross_entropy(h, W, t, reduction="none", backend="triton")
    assert torch.isfinite(loss[0])
    assert torch.isnan(loss[1])


def test_rejects_bad_input_naming_every_fault():
    h, W, t = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(7, 5\)"):
        linear_cross_entropy(h, torch.zeros(7, 5), t)
    with pytest.raises(ValueError, match=r"targets must be int64 \(3,\), got torch.float32 \(2,\).*softcap.*'median'"):
        linear_cross_entropy(h, W, torch.zeros(2), softcap=-1.0, reduction="median")
    with pytest.raises(ValueError, match=r"dtype torch.float32 outside autocast, got torch.bfloat16"):
        linear_cross_entropy(h, W.bfloat16(), t)
    with pytest.raises(ValueError, match=r"bias must be .*\(7,\), got .*\(4,\)"):
        linear_cross_entropy(h, W, t, bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"A \(r, 4\) and B \(7, r\).*got \(2, 4\).*and \(7, 3\)"):
        linear_cross_entropy(h, W, t, lora=[HeadAdapter(torch.zeros(2, 4), torch.zeros(7, 3), 1.0)])
    with pytest.raises(ValueError, match=r"rows must be .*int64.*bool"):
        linear_cross_entropy(h, W, t, rows=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="multiply reduction='none'"):
        linear_cross_entropy(h, W, t, token_weights=torch.ones(3, requires_grad=True))
