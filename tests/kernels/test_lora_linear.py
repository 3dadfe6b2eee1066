"""`lora_linear` on both backends against its definition: outputs, every gradient, what it keeps."""

import itertools

import pytest
import torch
from oracle import DEVICE, DTYPES, guarded
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_kernels.dropout import keep_mask, keep_rate
from peft_kernels.lora_linear import Adapter, Projection, lora_linear, lora_linear_reference, lora_linears
from peft_kernels.recompute import remember

BACKENDS = ("triton", "torch")


def make(
    out: int, features: int, rank: int, *, dtype=torch.float32, p=0.0, salt=0, transposed=False, bias=True, pairs=1
) -> Projection:
    generator = torch.Generator().manual_seed(out * 1000 + features + rank + salt)

    def random(*shape: int, grad: bool = True) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        return values.to(dtype).to(DEVICE).requires_grad_(grad)

    weight = random(features, out, grad=False) if transposed else random(out, features, grad=False)
    adapters = tuple(
        Adapter(random(rank, features), random(out, rank), 0.75, p, salt + place, random(out) if bias else None)
        for place in range(pairs)
    )
    return Projection(weight, random(out) if bias else None, adapters, transposed)


def leaves_of(x: Tensor, projections: list[Projection]) -> list[Tensor]:
    found = [x]
    for one in projections:
        found += [one.bias, *itertools.chain.from_iterable((a.A, a.B, a.bias) for a in one.adapters)]
    return [t for t in found if t is not None]


def as_dtype(projections: list[Projection], dtype: torch.dtype) -> list[Projection]:
    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)

    return [
        Projection(
            cast(one.weight),
            cast(one.bias),
            tuple(Adapter(cast(a.A), cast(a.B), a.scale, a.p, a.salt, cast(a.bias)) for a in one.adapters),
            one.transposed,
        )
        for one in projections
    ]


def masks_of(x: Tensor, one: Projection, seeds: Tensor, backend: str) -> list[Tensor]:
    triton = backend == "triton"
    return [
        keep_mask(x.float(), a.p, seeds, a.salt, backend=backend).to(x.dtype) / keep_rate(a.p, triton)
        for a in one.adapters
        if a.p
    ]


def run(fn, x: Tensor, projections: list[Projection], dys: list[Tensor]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    ys = fn(x, projections)
    grads = torch.autograd.grad(ys, leaves_of(x, projections), [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)])
    return [*(y.detach() for y in ys), *grads]


CASES = {
    "plain": ((2, 17, 33), [{"out": 19, "rank": 4}]),
    "no bias, rank 1": ((3, 5, 16), [{"out": 8, "rank": 1, "bias": False}]),
    "wide rank": ((1, 40, 24), [{"out": 31, "rank": 64}]),
    "one row": ((1, 1, 7), [{"out": 5, "rank": 3}]),
    "conv1d": ((2, 9, 21), [{"out": 15, "rank": 5, "transposed": True}]),
    "two adapters": ((2, 15, 20), [{"out": 11, "rank": 8, "pairs": 2}]),
    "shared input": (
        (2, 16, 24),
        [{"out": 24, "rank": 8}, {"out": 9, "rank": 2}, {"out": 9, "rank": 3, "bias": False}],
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_no_further_from_truth_than_torch(name, dtype, p, backend):
    """Against the definition in fp64 with the very masks, not further off than plain torch in the same dtype.

    A sum of many products of mixed sign loses more than its last bit, in another order for each way of adding: the
    bound is in ulps of the largest value of the tensor, for plain torch and ours alike.
    """
    shape, asked = CASES[name]
    torch.manual_seed(1)
    projections = [make(features=shape[-1], dtype=dtype, p=p, salt=7 * i, **one) for i, one in enumerate(asked)]
    x = torch.randn(shape).to(dtype).to(DEVICE)
    seeds = torch.arange(shape[0], device=DEVICE) * 77 - 5
    dys = [torch.randn(*shape[:-1], one["out"], device=DEVICE).to(dtype) for one in asked]

    def plain(x: Tensor, ps: list[Projection]) -> list[Tensor]:
        return [lora_linear_reference(x, one, masks_of(x, one, seeds, backend)) for one in ps]

    truth = run(plain, x.double(), as_dtype(projections, torch.float64), dys)
    theirs = run(plain, x, projections, dys)
    ours = run(lambda x, ps: list(lora_linears(x, ps, seeds, backend=backend)), x, projections, dys)
    for place, (t, p_, o) in enumerate(zip(truth, theirs, ours, strict=True)):
        size = torch.finfo(dtype).eps * (1 + t.abs().max())
        assert o.dtype == p_.dtype
        assert o.shape == t.shape
        worst = (o.double() - t).abs().max() - (p_.double() - t).abs().max()
        assert worst <= 3 * size, f"{place}: {float(worst / size):.1f} ulps worse than plain torch"


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    ones = [make(4, 5, 2, dtype=torch.float64, p=p, pairs=2), make(3, 5, 1, dtype=torch.float64, p=p, transposed=True)]
    ones = as_dtype(ones, torch.float64)
    ones = [
        Projection(
            one.weight.cpu(),
            one.bias.detach().cpu().requires_grad_(),
            tuple(
                Adapter(*(t.detach().cpu().requires_grad_() for t in (a.A, a.B)), a.scale, a.p, a.salt)
                for a in one.adapters
            ),
            one.transposed,
        )
        for one in ones
    ]
    leaves = leaves_of(x, ones)
    assert torch.autograd.gradcheck(lambda *_: lora_linears(x, ones, torch.tensor([3, 4]), backend="torch"), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_leaves_everything_alone_and_can_repeat(backend):
    one = make(12, 16, 4, p=0.2)
    x = torch.randn(2, 8, 16, device=DEVICE, requires_grad=True)
    seeds = torch.tensor([1, 2], device=DEVICE)
    before = [t.detach().clone() for t in leaves_of(x, [one])]
    dy = torch.randn(2, 8, 12, device=DEVICE)
    kept = dy.clone()
    y = lora_linear(x, one, seeds, backend=backend)
    first = torch.autograd.grad(y, leaves_of(x, [one]), dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves_of(x, [one]), dy)
    again = lora_linear(x, one, seeds, backend=backend)
    assert torch.equal(y, again)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, before, leaves_of(x, [one])))
    assert torch.equal(dy, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_and_writes_inside_its_bounds(backend):
    one = make(9, 13, 3, p=0.1)
    parts = Adapter(*(guarded(t.detach()).requires_grad_() for t in (one.adapters[0].A, one.adapters[0].B)), 0.5, 0.1)
    fenced = Projection(guarded(one.weight), guarded(one.bias.detach()), (parts,))
    x = guarded(torch.randn(2, 5, 13, device=DEVICE)).requires_grad_()
    y = lora_linear(x, fenced, torch.tensor([5, 6], device=DEVICE), backend=backend)
    grads = torch.autograd.grad(y.sum(), (x, parts.A, parts.B))
    assert all(torch.isfinite(t).all() for t in (y, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_empty(backend):
    one = make(6, 10, 4)
    x = torch.randn(4, 10, 3, device=DEVICE).transpose(1, 2)
    assert torch.allclose(lora_linear(x, one, backend=backend), lora_linear_reference(x, one), atol=1e-5)
    y = lora_linear(x[:0].requires_grad_(), one, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 3, 6)


def saved_bytes(fn) -> dict[int, int]:
    """Bytes of every distinct storage saved for backward while `fn` runs, by its address."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn()
    return found


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saves_x_once_and_sketches_and_seeds(p):
    """Three projections of one x: x, three S, the seeds; the weights and adapters were there before."""
    ones = [make(48, 64, 4, p=p, salt=s, bias=False) for s in (0, 5, 9)]
    x = torch.randn(2, 32, 64, device=DEVICE, requires_grad=True)
    seeds = torch.tensor([1, 2], device=DEVICE)
    found = saved_bytes(lambda: lora_linears(x, ones, seeds))
    there = {t.untyped_storage().data_ptr() for one in ones for t in (one.weight, one.adapters[0].A, one.adapters[0].B)}
    new = sum(size for address, size in found.items() if address not in there)
    assert new == x.nbytes + 3 * (2 * 32 * 4 * 4) + seeds.nbytes


def test_an_input_that_can_be_made_again_is_not_saved():
    one = make(48, 64, 4, bias=False)
    source = torch.randn(2, 32, 64, requires_grad=True)
    x = remember(source * 2, lambda t: t * 2, source)
    found = saved_bytes(lambda: lora_linear(x, one))
    assert x.untyped_storage().data_ptr() not in found
    assert source.untyped_storage().data_ptr() in found
    a = one.adapters[0].A
    plain = torch.autograd.grad(lora_linear_reference(x, one).square().sum(), (source, a), retain_graph=True)
    ours = torch.autograd.grad(lora_linear(x, one).square().sum(), (source, a))
    assert all(torch.allclose(o, t, rtol=1e-4, atol=1e-4) for o, t in zip(ours, plain, strict=True))


def test_an_input_changed_in_place_is_refused():
    one = make(8, 16, 2)
    source = torch.randn(2, 3, 16, requires_grad=True)
    x = remember(source.clone() * 2, lambda t: t * 2, copy := source.clone())
    y = lora_linear(x, one)
    copy.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_frozen_adapters_and_frozen_x_cost_no_gradient():
    one = make(8, 16, 2, bias=False)
    frozen = Projection(one.weight, None, (Adapter(one.adapters[0].A.detach(), one.adapters[0].B, 1.0),))
    x = torch.randn(2, 3, 16, device=DEVICE)
    y = lora_linear(x, frozen)
    (db,) = torch.autograd.grad(y.square().sum(), frozen.adapters[0].B)
    assert db.shape == frozen.adapters[0].B.shape
    assert saved_bytes(lambda: lora_linear(x, frozen)).get(x.untyped_storage().data_ptr()) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_fake_tensors_past_32_bit_addresses(backend):
    with FakeTensorMode():
        weight, a, b = torch.empty(8192, 4096), torch.empty(16, 4096), torch.empty(8192, 16)
        pair = Adapter(a.requires_grad_(), b.requires_grad_(), 2.0, 0.05)
        x = torch.empty(64, 2**14, 4096, requires_grad=True)
        y = lora_linear(x, Projection(weight, None, (pair,)), torch.empty(64, dtype=torch.int64), backend=backend)
        assert y.numel() > 2**31
        y.sum().backward()
    assert x.grad.shape == x.shape
    assert a.grad.shape == a.shape
    assert b.grad.shape == b.shape


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16])
def test_wide_adapters_on_a_narrow_backbone_compute_as_pefts_do(weight_dtype):
    """Without autocast peft casts x up to the adapter's fp32 and rounds the sum once."""
    one = make(12, 24, 4, bias=False)
    narrow = Projection(one.weight.to(weight_dtype), None, one.adapters)
    x = torch.randn(2, 7, 24, device=DEVICE).to(weight_dtype).requires_grad_()
    dy = torch.randn(2, 7, 12, device=DEVICE).to(weight_dtype)
    low = nn.functional.linear(nn.functional.linear(x.float(), one.adapters[0].A), one.adapters[0].B) * 0.75
    plain = (nn.functional.linear(x, narrow.weight) + low).to(weight_dtype)
    ours = lora_linear(x, narrow, backend="torch")
    leaves = (x, one.adapters[0].A, one.adapters[0].B)
    eps = torch.finfo(weight_dtype).eps
    for o, t in zip(
        [ours, *torch.autograd.grad(ours, leaves, dy)], [plain, *torch.autograd.grad(plain, leaves, dy)], strict=True
    ):
        assert o.dtype == t.dtype
        assert torch.allclose(o.float(), t.float(), rtol=2 * eps, atol=2 * eps)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters():
    one = make(12, 24, 4)
    x = torch.randn(2, 7, 24, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, plain = lora_linear(x, one), lora_linear_reference(x, one)
    assert ours.dtype == plain.dtype == torch.bfloat16
    dy = torch.randn_like(ours)
    got, want = (torch.autograd.grad(y, leaves_of(x, [one]), dy) for y in (ours, plain))
    assert torch.allclose(ours.float(), plain.float(), atol=0.05)
    for o, t in zip(got, want, strict=True):
        assert o.dtype == t.dtype == torch.float32
        assert torch.allclose(o, t, atol=0.03 * float(1 + t.abs().max()))


def test_refusals():
    one, x = make(4, 8, 2), torch.randn(2, 3, 8, device=DEVICE)
    with pytest.raises(ValueError, match="x has 7 features, the weight takes 8"):
        lora_linear(x[..., :7], one)
    with pytest.raises(ValueError, match="requires grad"):
        lora_linear(x, Projection(one.weight.clone().requires_grad_(), None, one.adapters))
    with pytest.raises(ValueError, match=r"A must be \(r, 8\) and B \(4, r\)"):
        lora_linear(x, Projection(one.weight, None, (Adapter(one.adapters[0].B, one.adapters[0].A, 1.0),)))
    dropped = make(4, 8, 2, p=0.5)
    with pytest.raises(ValueError, match=r"seeds must be int64 with shape \(2,\), one per sample; got None"):
        lora_linear(x, dropped)
    with pytest.raises(ValueError, match=r"p must be at least 0 and below 1, got 1\.0"):
        lora_linear(x, make(4, 8, 2, p=1.0), torch.zeros(2, dtype=torch.int64))
