"""LoRA linears over frozen codes: what they compute, what they keep, how siblings and plain weights mix."""

import itertools

import pytest
import torch
from oracle import DEVICE, guarded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_kernels._frozen_units import Emulated
from peft_kernels.frozen_weight import FrozenWeight, freeze, freeze_siblings
from peft_kernels.int8_linear import Int8, int8_product
from peft_kernels.lora_linear import Adapter, Projection, lora_linear, lora_linear_reference, lora_linears
from peft_kernels.recompute import remember

FORMATS = ("int8", "fp8", "bf16")
LIMIT = {"int8": 127.0, "fp8": 448.0}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def held(weight: Tensor, format: str, **settings) -> FrozenWeight:
    """Codes on units that are here: those of fp8 are emulated where there is no GPU for them."""
    return freeze(weight, format, units=Emulated("fp8") if format == "fp8" else None, **settings)


def adapter(n: int, features: int, rank: int, seed: int, p: float = 0.0, bias: bool = False) -> Adapter:
    a, b = random(rank, features, seed=seed) / features**0.5, random(n, rank, seed=seed + 1)
    tensors = (a.requires_grad_(), b.requires_grad_())
    return Adapter(*tensors, 0.75, p, 256 * seed, random(n, seed=seed + 2).requires_grad_() if bias else None)


def rounded(v: Tensor, format: str) -> Tensor:
    """v (M, K) as its codes stand for it, row by row, in float64: written anew, by division and torch's own casts."""
    if format == "bf16":
        return v.to(torch.bfloat16).double()
    step = v.double().abs().amax(1, keepdim=True) / LIMIT[format]
    step = torch.where(step == 0, 1, step)
    if format == "int8":
        return (v.double() / step).round() * step
    return (v.double() / step).float().to(torch.float8_e4m3fn).double() * step


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool((got.double() - want).norm() <= tolerance * want.norm())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("rows", "features", "out"), [(1, 1, 1), (15, 33, 7), (17, 64, 48), (127, 100, 65), (129, 577, 96)]
)
def test_forward_and_backward_are_those_of_rounded_rows(rows, features, out, format) -> None:
    """A code on the edge of two may fall either way, so a share of a step is allowed in the norm, and bf16 products are
    rounded to bf16."""
    x, weight, dy = random(rows, features), random(out, features, seed=1), random(rows, out, seed=2)
    one = held(weight, format)
    x.requires_grad_()
    y = lora_linear(x, Projection(one), backend="torch")
    (dx,) = torch.autograd.grad(y, x, dy)
    wide = one.dequantised().double()
    scale = torch.ones(out, device=DEVICE) if one.scale is None else one.scale
    tolerance = {"int8": 2e-4, "fp8": 2e-3, "bf16": 4e-3}[format]
    assert close(y, rounded(x.detach(), format) @ wide.t(), tolerance)
    assert close(dx, rounded(dy * scale, format) @ (wide / scale.unsqueeze(1)), tolerance)


@pytest.mark.parametrize(("rows", "features", "out"), [(1, 5, 3), (16, 24, 9), (40, 129, 31)])
def test_int8_units_have_the_bits_of_exact_products(rows, features, out) -> None:
    x, weight, dy = random(rows, features).requires_grad_(), random(out, features, seed=1), random(rows, out, seed=2)
    found = []
    for units in (None, Emulated("int8")):
        y = lora_linear(x, Projection(freeze(weight, "int8", units=units), random(out, seed=3)), backend="torch")
        found.append((y.detach(), *torch.autograd.grad(y, x, dy)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(0, 4, 4), (3, 0, 4), (1, 1, 1), (5, 3, 2), (17, 9, 31), (30, 65, 8)]
)
def test_int8_products_of_any_size_are_exact(rows, inner, columns) -> None:
    draw = torch.Generator().manual_seed(0)
    left = torch.randint(-127, 128, (rows, inner), generator=draw, dtype=torch.int8).to(DEVICE)
    right = torch.randint(-127, 128, (inner, columns), generator=draw, dtype=torch.int8).to(DEVICE)
    want = (left.cpu().long() @ right.cpu().long()).to(DEVICE)
    for form in (right, right.t().contiguous().t()):
        got = int8_product(left, form)
        assert got.dtype == torch.int32
        assert torch.equal(got.long(), want)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("lever", ["none", "smooth", "columns"])
def test_siblings_in_a_stack_compute_what_each_computes(format, lever) -> None:
    """Forward to the bit; backward to the rounding of one row for all, against the sum of exact products."""
    if format == "bf16" and lever != "none":
        return
    features, widths = 48, (40, 16, 24)
    x = random(2, 9, features).requires_grad_()
    settings = {}
    if lever == "smooth":
        settings["smooth"] = random(features, seed=8).abs() + 0.2
    if lever == "columns":
        settings["columns"] = torch.tensor([4, 30], device=DEVICE)
    weights = [random(n, features, seed=n) for n in widths]
    units = Emulated("fp8") if format == "fp8" else None
    stack = [Projection(one) for one in freeze_siblings(weights, format, units=units, **settings)]
    alone = [Projection(held(one, format, **settings)) for one in weights]
    dys = [random(2, 9, n, seed=n + 1) for n in widths]
    for order in itertools.permutations(range(3)):
        ys = lora_linears(x, [stack[i] for i in order], backend="torch")
        for i, y in zip(order, ys, strict=True):
            want = lora_linear(x, alone[i], backend="torch")
            # oneDNN's bf16 products add up in another order for another width
            assert torch.equal(y, want) if format != "bf16" else torch.allclose(y, want, rtol=2**-7, atol=2**-7)
        (dx,) = torch.autograd.grad(ys, x, [dys[i] for i in order])
        truth = sum(dys[i].double() @ stack[i].weight.dequantised().double() for i in range(3))
        assert close(dx, truth, {"int8": 0.02, "fp8": 0.06, "bf16": 0.01}[format])


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 2), (0, 1), (1, 2)])
def test_outputs_without_a_gradient(missing) -> None:
    features, widths = 32, (16, 8, 24)
    x = random(10, features).requires_grad_()
    weights = [random(n, features, seed=n) for n in widths]
    stack = [Projection(one) for one in freeze_siblings(weights, "int8")]
    ys = lora_linears(x, stack, backend="torch")
    there = [i for i in range(3) if i not in missing]
    (dx,) = torch.autograd.grad([ys[i] for i in there], x, [random(10, widths[i], seed=5 + i) for i in there])
    truth = sum(random(10, widths[i], seed=5 + i).double() @ stack[i].weight.dequantised().double() for i in there)
    assert close(dx, truth, 0.02)


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
def test_adapters_read_x_as_it_is_and_plain_weights_mix_with_codes(p, passes) -> None:
    """Everything but the frozen product of the two sides is the same computation; so are all gradients of adapters."""
    features, widths = 40, (24, 9, 17)
    x, seeds = random(3, 7, features), torch.tensor([3, -4, 99], device=DEVICE)
    pairs = [adapter(n, features, r, n, p, bias=n == 9) for n, r in zip(widths, (4, 2, 8), strict=True)]
    two = (pairs[2], adapter(17, features, 3, 70, p))
    biases = [random(n, seed=n + 3).requires_grad_() for n in widths]
    weights = [random(n, features, seed=n) for n in widths]
    codes = freeze_siblings([weights[0], weights[2]], "int8")
    ours = [
        Projection(codes[0], biases[0], (pairs[0],)),
        Projection(weights[1], biases[1], (pairs[1],)),
        Projection(codes[1], biases[2], two),
    ]
    plain = [
        Projection(codes[0].dequantised(), biases[0], (pairs[0],)),
        ours[1],
        Projection(codes[1].dequantised(), biases[2], two),
    ]
    leaves = [*biases, *(t for a in (pairs[0], pairs[1], *two) for t in (a.A, a.B, a.bias) if t is not None)]
    dys = [random(3, 7, n, seed=n + 9) for n in widths]
    found = []
    for projections in (ours, plain):
        own = x.clone().requires_grad_()
        ys = lora_linears(own, projections, seeds, backend="torch", passes=passes and projections is ours)
        found.append((ys, torch.autograd.grad(ys, [own, *leaves], dys)))
    (ys, grads), (want_ys, want_grads) = found
    for y, want in zip(ys, want_ys, strict=True):
        assert close(y.detach(), want.detach().double(), 0.01)
    assert close(grads[0], want_grads[0].double(), 0.01)
    for got, want in zip(grads[1:], want_grads[1:], strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lever", ["none", "columns"])
def test_dropped_elements_taken_out_behind_a_product_or_before_it(lever) -> None:
    """The two ways to leave them out, over codes: siblings with masks of their own, one of them without an output."""
    features, widths, seeds = 40, (24, 9, 17), torch.tensor([3, -4, 99], device=DEVICE)
    x = random(3, 7, features).requires_grad_()
    settings = {"columns": torch.tensor([4, 30], device=DEVICE)} if lever == "columns" else {}
    stack = freeze_siblings([random(n, features, seed=n) for n in widths], "int8", **settings)
    pairs = [adapter(n, features, r, n, 0.1) for n, r in zip(widths, (4, 2, 8), strict=True)]
    ones = [Projection(codes, None, (pair,)) for codes, pair in zip(stack, pairs, strict=True)]
    leaves = [x, *(t for pair in (pairs[0], pairs[2]) for t in (pair.A, pair.B))]
    dys = [random(3, 7, n, seed=n + 9) for n in (24, 17)]
    found = []
    for passes in (True, False):
        ys = lora_linears(x, ones, seeds, backend="torch", passes=passes)
        found.append([*ys, *torch.autograd.grad([ys[0], ys[2]], leaves, dys)])
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=2e-5)


def test_a_row_with_nan_or_infinity_comes_out_as_nan_and_harms_no_other() -> None:
    one = Projection(freeze(random(12, 20), "int8"), None, (adapter(12, 20, 2, 3),))
    x = random(5, 20, seed=1)
    clean = lora_linear(x, one, backend="torch")
    x[1, 4], x[3, 0] = torch.nan, torch.inf
    x.requires_grad_()
    y = lora_linear(x, one, backend="torch")
    assert y[[1, 3]].isnan().all()
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])
    dy = random(5, 12, seed=2)
    dy[2, 3] = torch.nan
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx[2].isnan().all()
    assert dx[[0, 1, 3, 4]].isfinite().all()


def test_a_row_depends_on_no_other() -> None:
    """Neither on who shares its batch: micro-batches and packing change nothing."""
    one = Projection(freeze(random(24, 32), "int8"))
    x, dy = random(20, 32, seed=1).requires_grad_(), random(20, 24, seed=2)
    y = lora_linear(x, one, backend="torch")
    (dx,) = torch.autograd.grad(y, x, dy)
    for rows in (slice(0, 1), slice(3, 11)):
        part = x.detach()[rows].requires_grad_()
        own = lora_linear(part, one, backend="torch")
        assert torch.equal(own, y[rows])
        assert torch.equal(torch.autograd.grad(own, part, dy[rows])[0], dx[rows])


def saved_bytes(fn) -> dict[int, int]:
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn()
    return found


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("passes", [False, True])
def test_keeps_what_a_plain_weight_keeps(p, passes) -> None:
    """x, the sketches, the seeds: no codes of x."""
    x = random(2, 32, 64).requires_grad_()
    seeds = torch.tensor([1, 2], device=DEVICE)
    pairs = [adapter(48, 64, 4, seed, p) for seed in (3, 7)]
    weights = [random(48, 64, seed=seed) for seed in (1, 2)]
    codes = freeze_siblings(weights, "int8")
    there = {t.untyped_storage().data_ptr() for a in pairs for t in (a.A, a.B)}
    there |= {w.untyped_storage().data_ptr() for w in weights}
    sizes = []
    for some in (weights, codes):
        ones = [Projection(w, None, (a,)) for w, a in zip(some, pairs, strict=True)]
        found = saved_bytes(lambda ones=ones: lora_linears(x, ones, seeds, backend="torch", passes=passes))
        sizes.append(sum(size for address, size in found.items() if address not in there))
    assert sizes == [x.nbytes + 2 * (2 * 32 * 4 * 4) + seeds.nbytes] * 2


def test_an_input_that_can_be_made_again_is_not_saved() -> None:
    one = Projection(freeze(random(48, 64), "int8"), None, (adapter(48, 64, 4, 3),))
    source = random(2, 32, 64).requires_grad_()
    x = remember(source * 2, lambda t: t * 2, source)
    found = saved_bytes(lambda: lora_linear(x, one, backend="torch"))
    assert x.untyped_storage().data_ptr() not in found
    assert source.untyped_storage().data_ptr() in found


@pytest.mark.parametrize("format", FORMATS)
def test_narrow_rows_and_autocast(format) -> None:
    one = held(random(24, 40), format)
    pair = adapter(24, 40, 4, 3)
    x = random(2, 7, 40, seed=1)
    truth = lora_linear_reference(x, Projection(one, random(24, seed=9), (pair,)))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = lora_linear(x.requires_grad_(), Projection(one, random(24, seed=9), (pair,)), backend="torch")
        grads = torch.autograd.grad(y, (x, pair.A, pair.B), torch.ones_like(y))
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.float32] * 3
    assert close(y.detach(), truth.detach().double(), 0.05)
    narrow = lora_linear(
        x.detach().bfloat16(), Projection(one, random(24, seed=9).bfloat16(), (pair,)), backend="torch"
    )
    assert narrow.dtype == torch.bfloat16
    assert close(narrow.detach(), truth.detach().double(), 0.05)


def test_backward_leaves_everything_alone_and_can_repeat() -> None:
    one = Projection(freeze(random(12, 16), "int8"), random(12, seed=5).requires_grad_(), (adapter(12, 16, 4, 3, 0.1),))
    x, seeds, dy = random(2, 8, 16).requires_grad_(), torch.tensor([1, 2], device=DEVICE), random(2, 8, 12, seed=6)
    leaves = [x, one.bias, one.adapters[0].A, one.adapters[0].B]
    before = [t.detach().clone() for t in (*leaves, dy, one.weight.codes, one.weight.scale)]
    for passes in (False, True):
        y = lora_linear(x, one, seeds, backend="torch", passes=passes)
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        second = torch.autograd.grad(y, leaves, dy)
        assert torch.equal(y, lora_linear(x, one, seeds, backend="torch", passes=passes))
        assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, before, (*leaves, dy, one.weight.codes, one.weight.scale)))


def test_reads_and_writes_inside_its_bounds() -> None:
    one = freeze(random(9, 13), "int8")
    pair = adapter(9, 13, 3, 2, 0.1)
    fenced = Adapter(*(guarded(t.detach()).requires_grad_() for t in (pair.A, pair.B)), 0.5, 0.1)
    x = guarded(random(2, 5, 13)).requires_grad_()
    y = lora_linear(
        x, Projection(one, guarded(random(9)), (fenced,)), torch.tensor([5, 6]), backend="torch", passes=True
    )
    grads = torch.autograd.grad(y.sum(), (x, fenced.A, fenced.B))
    assert all(torch.isfinite(t).all() for t in (y, *grads))


def test_strided_empty_and_single_rows() -> None:
    one = Projection(freeze(random(6, 10), "int8"), None, (adapter(6, 10, 4, 3),))
    x = random(4, 10, 3).transpose(1, 2)
    want = lora_linear(x.contiguous(), one, backend="torch")
    assert torch.equal(lora_linear(x, one, backend="torch"), want)
    y = lora_linear(x[:0].requires_grad_(), one, backend="torch")
    y.sum().backward()
    assert y.shape == (0, 3, 6)
    # S of a single row is a product of a vector, which adds up in another order
    assert torch.allclose(lora_linear(x[1, 2], one, backend="torch"), want[1, 2], rtol=1e-5, atol=1e-6)
    bare = Projection(one.weight)
    assert torch.equal(lora_linear(x[1, 2], bare, backend="torch"), lora_linear(x, bare, backend="torch")[1, 2])


def test_runs_on_fake_tensors() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        codes = torch.empty(256, 128, dtype=torch.int8)
        one = FrozenWeight("int8", codes, torch.empty(256), torch.float32, units=Int8())
        a, b = torch.empty(16, 128, requires_grad=True), torch.empty(256, 16, requires_grad=True)
        x = torch.empty(4, 32, 128, requires_grad=True)
        seeds = torch.empty(4, dtype=torch.int64)
        y = lora_linear(x, Projection(one, None, (Adapter(a, b, 2.0, 0.05),)), seeds, backend="torch", passes=True)
        y.sum().backward()
    assert (y.shape, x.grad.shape, a.grad.shape, b.grad.shape) == ((4, 32, 256), x.shape, a.shape, b.shape)


def test_refusals() -> None:
    one = freeze(random(4, 8), "int8")
    with pytest.raises(ValueError, match="x has 7 features, the weight takes 8"):
        lora_linear(random(2, 7), Projection(one))
    with pytest.raises(ValueError, match="a FrozenWeight is"):
        lora_linear(random(2, 8), Projection(one, transposed=True))
    with pytest.raises(ValueError, match="x must be floating point"):
        lora_linear(torch.ones(2, 8, dtype=torch.int8, device=DEVICE), Projection(one))
