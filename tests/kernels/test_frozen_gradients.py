"""Gradients through frozen codes: against finite differences where nothing is rounded, against the straight-through
gradient written out in float64 where something is; the same bits every time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from oracle import DEVICE
from torch import Tensor

from peft_kernels._frozen_units import Emulated, Exact
from peft_kernels.dropout import keep_mask, keep_rate
from peft_kernels.frozen_weight import FrozenWeight, freeze, freeze_siblings
from peft_kernels.lora_linear import Adapter, Projection, lora_linears

LEVERS = ("none", "smooth", "columns", "both")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(rows: int, features: int, step: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers whose codes are beyond doubt, float64 (rows, features), and these codes.

    Each row reaches 127 steps of its own size, `step` (rows,), and all other numbers are well inside of a code.
    """
    draw = generator(seed)
    codes = torch.randint(-126, 127, (rows, features), generator=draw).double()
    inside = (torch.rand(rows, features, generator=draw).double() - 0.5) * 0.8
    top = torch.randint(0, features, (rows,), generator=draw)
    sign = torch.randint(0, 2, (rows,), generator=draw).double() * 2 - 1
    codes[torch.arange(rows), top] = 127 * sign
    inside[torch.arange(rows), top] = 0
    return (codes + inside) * step.unsqueeze(1), codes


@dataclass
class Case:
    """Siblings that read one x, all of it float64, and what their codes must be.

    Attributes:
        x: (M, K); weights: (N_i, K); dys: (M, N_i).
        factor: (K,) by which x is multiplied before it is rounded.
        x_codes, x_step: of x ⊙ factor; w_codes, w_steps: of the weights; g_codes, g_step: of all dy_i ⊙ w_step_i,
            beside each other.
    """

    x: Tensor
    weights: list[Tensor]
    dys: list[Tensor]
    smooth: Tensor | None
    columns: Tensor | None
    factor: Tensor
    x_codes: Tensor
    x_step: Tensor
    w_codes: list[Tensor]
    w_steps: list[Tensor]
    g_codes: Tensor
    g_step: Tensor
    projections: list[Projection] = field(default_factory=list)


def case(rows: int, features: int, widths: Sequence[int], lever: str, seed: int = 0) -> Case:
    draw = generator(seed + 1)
    smooth = columns = None
    factor = torch.ones(features, dtype=torch.float64)
    if lever in ("smooth", "both"):
        smooth = torch.exp(torch.randn(features, generator=draw).double())
        factor = 1 / smooth
    if lever in ("columns", "both"):
        columns = torch.randperm(features, generator=draw)[: max(1, features // 7)].sort().values
    steps = [torch.exp(torch.randn(n, generator=draw).double()) / 127 for n in (rows, *widths, rows)]
    x, x_codes = grid(rows, features, steps[0], seed + 2)
    weights, w_codes = [], []
    for place, n in enumerate(widths):
        weight, codes = grid(n, features, steps[1 + place], seed + 3 + place)
        weights.append(weight * factor)
        w_codes.append(codes)
    g, g_codes = grid(rows, sum(widths), steps[-1], seed + 99)
    dys = [g_i / step for g_i, step in zip(g.split(list(widths), 1), steps[1:-1], strict=True)]
    x = x / factor
    if columns is not None:
        big = torch.randn(rows, len(columns), generator=draw).double() * 50
        x = x.index_copy(1, columns, big)
        x_codes = x_codes.index_fill(1, columns, 0)
        w_codes = [codes.index_fill(1, columns, 0) for codes in w_codes]
        factor = factor.index_fill(0, columns, 0)
        # what a row's scale hangs on must not stand in a column that is taken out
        x_codes, x = _top_up(x_codes, x, steps[0], factor, columns)
        for i in range(len(widths)):
            inverse = torch.where(factor > 0, 1 / factor, 0)
            w_codes[i], weights[i] = _top_up(w_codes[i], weights[i], steps[1 + i], inverse, columns)
    return Case(
        x, weights, dys, smooth, columns, factor, x_codes, steps[0], w_codes, steps[1:-1], g_codes, steps[-1]
    )  # fmt: skip


def _top_up(codes: Tensor, values: Tensor, step: Tensor, factor: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """127 steps in the first column that stays, row by row."""
    free = next(k for k in range(codes.shape[1]) if k not in columns.tolist())
    codes, values = codes.clone(), values.clone()
    codes[:, free], values[:, free] = 127.0, 127.0 * step / factor[free]
    return codes, values


def adapters(n: int, features: int, ranks: Sequence[int], p: float, seed: int, bias: bool) -> tuple[Adapter, ...]:
    draw = generator(seed)
    return tuple(
        Adapter(
            (torch.randn(r, features, generator=draw).double() / features**0.5).requires_grad_(),
            (torch.randn(n, r, generator=draw).double()).requires_grad_(),
            0.75,
            p,
            10 * seed + place,
            torch.randn(n, generator=draw).double().requires_grad_() if bias else None,
        )
        for place, r in enumerate(ranks)
    )


def as_dtype(one: Adapter, dtype: torch.dtype) -> Adapter:
    a, b, bias = (
        None if t is None else t.detach().to(DEVICE, dtype).requires_grad_() for t in (one.A, one.B, one.bias)
    )
    assert a is not None
    assert b is not None
    return Adapter(a, b, one.scale, one.p, one.salt, bias)


def leaves(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    found: list[Tensor | None] = [x]
    for one in projections:
        found += [one.bias, *(t for a in one.adapters for t in (a.A, a.B, a.bias))]
    return [t for t in found if t is not None]


def frozen(of: Case, dtype: torch.dtype, **more) -> list[FrozenWeight]:
    """The case's weights as codes, in one stack."""
    weights = [weight.to(dtype).to(DEVICE) for weight in of.weights]
    smooth = None if of.smooth is None else of.smooth.float().to(DEVICE)
    columns = None if of.columns is None else of.columns.to(DEVICE)
    return freeze_siblings(weights, "int8", smooth=smooth, columns=columns, **more)


# nothing rounded: finite differences


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("format", ["int8", "fp8", "bf16"])
def test_gradcheck_without_rounding(format, lever, p):
    """The layer's own gradient, codes taken as they are: siblings in one stack, one of them alone, several adapters."""
    if format == "bf16" and lever != "none":
        return
    draw = generator(7)
    features, widths = 9, (5, 3, 4)
    smooth = torch.rand(features, generator=draw) + 0.5 if lever in ("smooth", "both") else None
    columns = torch.tensor([1, 6]) if lever in ("columns", "both") else None
    weights = [torch.randn(n, features, generator=draw, dtype=torch.float64) for n in widths]
    levers = {"smooth": smooth, "columns": columns, "units": Exact()}
    held = [*freeze_siblings(weights[:2], format, **levers), freeze(weights[2].t(), format, transposed=True, **levers)]
    projections = [
        Projection(
            one,
            torch.randn(n, generator=draw).double().requires_grad_() if place != 1 else None,
            adapters(n, features, [2] if place != 1 else [1, 3], p, place + 1, bias=place == 2),
        )
        for place, (one, n) in enumerate(zip(held, widths, strict=True))
    ]
    x = torch.randn(2, 3, features, generator=draw, dtype=torch.float64, requires_grad=True)
    seeds = torch.tensor([3, 4])

    def outputs(*_: Tensor) -> tuple[Tensor, ...]:
        return lora_linears(x, projections, seeds, backend="torch")

    assert torch.autograd.gradcheck(outputs, leaves(x, projections))


def test_the_gradient_of_one_sibling_alone():
    """Outputs that nobody uses have no gradient: a part of a stack, or none of it."""
    of = case(6, 12, (4, 5, 3), "smooth")
    held = frozen(of, torch.float64, units=Exact())
    x = of.x.to(DEVICE).requires_grad_()
    for used in ([1], [0, 2], [2]):
        ys = lora_linears(x, [Projection(one) for one in held], backend="torch")
        (dx,) = torch.autograd.grad([ys[i] for i in used], x, [of.dys[i].to(DEVICE) for i in used])
        wanted = sum(of.dys[i].to(DEVICE) @ held[i].dequantised().double() for i in used)
        torch.testing.assert_close(dx, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


# rounded: the straight-through gradient in closed form


def closed_form(of: Case, pairs: Sequence[Sequence[Adapter]], masks: Sequence[Sequence[Tensor]], biases):
    """Outputs, dx, gradients of every bias, A, B and adapter bias, in float64, from the codes that must come out.

    y_i = (c_x·c_wᵢᵀ)·s_x ⊙ s_wᵢ + x[:, columns]·Wᵢ[:, columns]ᵀ + b_i + Σ s·(mask ⊙ x)·Aᵀ·Bᵀ (+ s·bias)
    dx = ((c_g·[c_w₁; c_w₂; …])·s_g) ⊙ factor, at columns Σ dy_i·Wᵢ[:, columns]; + Σ s·mask ⊙ (dy·B·A)
    """
    ys, grads = [], []
    dx = (of.g_codes @ torch.cat(of.w_codes)) * of.g_step.unsqueeze(1) * of.factor
    for i, (weight, dy) in enumerate(zip(of.weights, of.dys, strict=True)):
        y = (of.x_codes @ of.w_codes[i].T) * of.x_step.unsqueeze(1) * of.w_steps[i]
        if of.columns is not None:
            y = y + of.x[:, of.columns] @ weight[:, of.columns].T
            dx[:, of.columns] += dy @ weight[:, of.columns]
        if biases[i] is not None:
            y = y + biases[i]
            grads.append(dy.sum(0))
        for one, mask in zip(pairs[i], masks[i], strict=True):
            a, b = one.A.detach(), one.B.detach()
            low = (of.x * mask) @ a.T
            y = y + one.scale * (low @ b.T)
            d_low = one.scale * (dy @ b)
            grads += [d_low.T @ (of.x * mask), one.scale * (dy.T @ low)]
            if one.bias is not None:
                y = y + one.scale * one.bias.detach()
                grads.append(one.scale * dy.sum(0))
            dx = dx + (d_low @ a) * mask
        ys.append(y)
    return [*ys, dx, *grads]


def ours(of: Case, pairs, biases, seeds, samples: int, units=None) -> list[Tensor]:
    held = frozen(of, torch.float32, units=units)
    projections = [
        Projection(
            one,
            None if bias is None else bias.float().to(DEVICE).requires_grad_(),
            tuple(as_dtype(pair, torch.float32) for pair in own),
        )
        for one, own, bias in zip(held, pairs, biases, strict=True)
    ]
    x = of.x.float().to(DEVICE).view(samples, -1, of.x.shape[1]).requires_grad_()
    ys = lora_linears(x, projections, seeds, backend="torch")
    dys = [dy.float().to(DEVICE).view_as(y) for dy, y in zip(of.dys, ys, strict=True)]
    grads = torch.autograd.grad(ys, leaves(x, projections), dys)
    return [y.detach().flatten(0, 1) for y in ys] + [grads[0].flatten(0, 1), *grads[1:]]


SHAPES = {  # samples, rows of each, features, widths
    "qkv": (2, 17, 40, (24, 8, 8)),
    "odd": (3, 5, 33, (19, 1)),
    "one": (1, 1, 16, (8,)),
    "wide": (1, 130, 129, (127, 65)),
}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("units", [None, Emulated("int8")], ids=["units", "emulated"])
def test_rounded_gradients_are_the_closed_form(units, shape, lever, p):
    samples, rows, features, widths = SHAPES[shape]
    of = case(samples * rows, features, widths, lever, seed=5)
    pairs = [
        adapters(n, features, [3] if i else [2, 1], p, 20 + i, bias=i == 1) for i, n in enumerate(widths)
    ]  # fmt: skip
    biases = [torch.randn(n, generator=generator(i)).double() if i != 1 else None for i, n in enumerate(widths)]
    seeds = torch.arange(samples, device=DEVICE) * 31 - 7
    like = torch.empty(samples, rows, features, device=DEVICE)
    masks = [
        [
            (keep_mask(like, p, seeds, a.salt, backend="torch").double() / keep_rate(p, False)).flatten(0, 1).cpu()
            if p
            else torch.ones(samples * rows, features, dtype=torch.float64)
            for a in own
        ]
        for own in pairs
    ]
    wanted = closed_form(of, pairs, masks, biases)
    found = ours(of, pairs, biases, seeds, samples, units)
    assert len(found) == len(wanted)
    for place, (w, f) in enumerate(zip(wanted, found, strict=True)):
        assert f.dtype == torch.float32
        off = float((f.cpu().double() - w).abs().max() / w.abs().max())
        assert off < 3e-6, f"{place}: {off:.1e} of the largest"


def test_rounding_shows():
    """The closed form is not the gradient of the unrounded layer: a layer that rounds nothing would fail above."""
    of = case(34, 40, (24, 8), "none", seed=5)
    plain = [of.x @ weight.T for weight in of.weights]
    plain.append(sum(dy @ weight for dy, weight in zip(of.dys, of.weights, strict=True)))
    none: list[list[Adapter]] = [[], []]
    for rounded, exact in zip(closed_form(of, none, none, [None, None]), plain, strict=True):
        assert float((rounded - exact).abs().max() / exact.abs().max()) > 1e-3


def test_halves_are_rounded_to_even():
    """Codes of x and dy, seen through a weight that is the identity in codes."""
    halves = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], device=DEVICE)
    even = torch.tensor([[127.0, 0, 2, 2, 0, -2, -2, 126]], device=DEVICE)
    one = freeze(127 * torch.eye(8, device=DEVICE), "int8")
    x = halves.clone().requires_grad_()
    (y,) = lora_linears(x, [Projection(one)], backend="torch")
    assert torch.equal(y, even * 127)
    (dx,) = torch.autograd.grad(y, x, halves)
    assert torch.equal(dx, even * 127)


@pytest.mark.parametrize("shape", ["qkv", "odd"])
def test_bf16_gradients_are_products_of_rounded_factors(shape):
    samples, rows, features, widths = SHAPES[shape]
    draw = generator(3)
    x = torch.randn(samples, rows, features, generator=draw)
    weights = [torch.randn(n, features, generator=draw) for n in widths]
    dys = [torch.randn(samples, rows, n, generator=draw) for n in widths]
    leaf = x.clone().to(DEVICE).requires_grad_()
    held = freeze_siblings([weight.to(DEVICE) for weight in weights], "bf16")
    ys = lora_linears(leaf, [Projection(one) for one in held], backend="torch")
    (dx,) = torch.autograd.grad(ys, leaf, [dy.to(DEVICE) for dy in dys])
    narrow = [t.bfloat16().double() for t in (x, *weights, *dys)]
    x64, w64, d64 = narrow[0], narrow[1 : 1 + len(widths)], narrow[1 + len(widths) :]
    wanted = [x64 @ w.T for w in w64] + [sum(dy @ w for dy, w in zip(d64, w64, strict=True))]
    for place, (w, f) in enumerate(zip(wanted, [*ys, dx], strict=True)):
        off = float((f.detach().cpu().double() - w).abs().max() / w.abs().max())
        assert f.dtype == torch.float32
        assert off < 2**-8, f"{place}: {off:.1e}"  # one rounding of the product to bfloat16


# the same bits


@pytest.mark.parametrize("lever", LEVERS)
def test_bits_repeat(lever):
    of = case(34, 40, (24, 8, 8), lever)
    pairs = [adapters(n, 40, [4], 0.2, 30 + i, bias=False) for i, n in enumerate((24, 8, 8))]
    seeds = torch.tensor([5, 6], device=DEVICE)
    first = ours(of, pairs, [None] * 3, seeds, 2)
    torch.randn(1000, device=DEVICE).sort()
    for again in (ours(of, pairs, [None] * 3, seeds, 2), ours(of, pairs, [None] * 3, seeds, 2, Emulated("int8"))):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_row_has_its_bits_in_every_batch():
    """A row's output and dx depend on no other row: micro-batches and padding change nothing."""
    of = case(40, 32, (16, 8), "smooth")
    held = frozen(of, torch.float32)

    def run(rows: slice) -> list[Tensor]:
        x = of.x[rows].float().to(DEVICE).requires_grad_()
        ys = lora_linears(x, [Projection(one) for one in held], backend="torch")
        (dx,) = torch.autograd.grad(ys, x, [dy[rows].float().to(DEVICE) for dy in of.dys])
        return [*(y.detach() for y in ys), dx]

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(3, 20), slice(20, 40)):
        for a, b in zip(whole, run(rows), strict=True):
            assert torch.equal(a[rows], b)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_stays_so_in_its_row_alone(broken):
    of = case(6, 16, (8, 8), "none")
    held = frozen(of, torch.float32)
    x = of.x.float().to(DEVICE)
    x[2, 5] = broken
    x[4] = 0
    x.requires_grad_()
    ys = lora_linears(x, [Projection(one) for one in held], backend="torch")
    dys = [dy.float().to(DEVICE) for dy in of.dys]
    dys[1][3, 1] = broken
    for dy in dys:
        dy[5] = 0
    (dx,) = torch.autograd.grad(ys, x, dys)
    for y in ys:
        assert not y[2].isfinite().any()
        assert y[[0, 1, 3, 4, 5]].isfinite().all()
        assert not y[4].any()
    assert not dx[3].isfinite().any()
    assert dx[[0, 1, 2, 4, 5]].isfinite().all()
    assert not dx[5].any()
