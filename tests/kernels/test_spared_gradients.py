"""The largest columns of dy stay out of the rounding: against float64, beside the layer that rounds everything."""

import pytest
import torch
from oracle import DEVICE
from test_frozen_products import adapter, close, held, random, rounded
from torch import Tensor

from peft_kernels._frozen_units import Emulated, Exact
from peft_kernels.frozen_weight import FrozenWeight, freeze, freeze_siblings
from peft_kernels.lora_linear import Projection, lora_linears

FEATURES, WIDTHS = 48, (130, 64, 20)
COUNTS = (2, 1, 0)
"""A 64th of each width."""
BACKENDS = ("torch", "triton")
SEEDS = torch.tensor([3, -4], device=DEVICE)


def heavy(rows: int, n: int, seed: int) -> Tensor:
    """dy (rows, n) with columns that are forty times the others: as many as may be spared, 5 and 40 at most."""
    dy = random(rows, n, seed=seed)
    dy[:, [5, 40][: n // 64]] *= 40
    return dy


def weights(lever: str, format: str, spare: bool, units: object = None) -> list[FrozenWeight]:
    settings: dict[str, object] = {"spare_gradients": spare, "units": units}
    if lever in ("smooth", "both"):
        settings["smooth"] = random(FEATURES, seed=8).abs() + 0.2
    if lever in ("columns", "both"):
        settings["columns"] = torch.tensor([4, 30], device=DEVICE)
    return freeze_siblings([random(n, FEATURES, seed=n) for n in WIDTHS], format, **settings)


def gradient(ones: list[FrozenWeight], dys: list[Tensor | None], backend: str = "torch") -> Tensor:
    x = random(len(next(dy for dy in dys if dy is not None)), FEATURES, seed=1).requires_grad_()
    ys = lora_linears(x, [Projection(one) for one in ones], backend=backend)
    there = [i for i, dy in enumerate(dys) if dy is not None]
    (dx,) = torch.autograd.grad([ys[i] for i in there], x, [dys[i] for i in there])
    return dx


def closed_form(ones: list[FrozenWeight], dys: list[Tensor], format: str) -> Tensor:
    """dx in float64: columns chosen anew, what is left rounded as one row."""
    rest, dx = [], torch.zeros(len(dys[0]), FEATURES, dtype=torch.float64, device=DEVICE)
    for one, dy, count in zip(ones, dys, COUNTS, strict=True):
        scaled = dy.double() * one.scale.double()
        size = scaled.abs().amax(0)
        for j in sorted(range(len(size)), key=lambda j: -float(size[j]))[:count]:
            dx += dy.double()[:, [j]] @ one.dequantised().double()[[j]]
            if one.columns is not None:  # their rows of the weight are counted below
                dx[:, one.columns] -= dy.double()[:, [j]] @ one.column_weight.double()[[j]]
            scaled[:, j] = 0
        if one.columns is not None:
            dx[:, one.columns] += dy.double() @ one.column_weight.double()
        rest.append(scaled.float())
    factor = 1 if ones[0].factor is None else ones[0].factor.double()
    return dx + rounded(torch.cat(rest, 1), format) @ torch.cat([one.codes for one in ones]).double() * factor


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("lever", ["none", "smooth", "columns", "both"])
@pytest.mark.parametrize(("format", "backend"), [("int8", "torch"), ("fp8", "torch"), ("int8", "triton")])
def test_dx_is_that_of_columns_set_aside(format, backend, lever, rows) -> None:
    ones = weights(lever, format, True, Emulated("fp8") if format == "fp8" else None)
    dys = [heavy(rows, n, seed=n + 1) for n in WIDTHS]
    assert close(gradient(ones, dys, backend), closed_form(ones, dys, format), {"int8": 2e-4, "fp8": 2e-3}[format])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_columns_cost_the_others_nothing(backend) -> None:
    """The error beside the exact product with the codes is that of the small columns."""
    dys = [heavy(40, n, seed=n + 1) for n in WIDTHS]
    found = []
    for spare in (False, True):
        ones = weights("both", "int8", spare)
        truth = sum(dy.double() @ one.dequantised().double() for dy, one in zip(dys, ones, strict=True))
        found.append(float((gradient(ones, dys, backend).double() - truth).norm() / truth.norm()))
    assert found[1] < found[0] / 5


def test_the_forward_is_left_alone() -> None:
    x = random(6, FEATURES)
    for one, other in zip(weights("both", "int8", False), weights("both", "int8", True), strict=True):
        (y,), (z,) = (lora_linears(x, [Projection(w)], backend="torch") for w in (one, other))
        assert torch.equal(y, z)


def test_narrow_outputs_have_nothing_to_spare() -> None:
    dy = heavy(7, 63, seed=2)
    weight = random(63, FEATURES)
    a, b = (gradient([freeze(weight, "int8", spare_gradients=spare)], [dy]) for spare in (False, True))
    assert torch.equal(a, b)


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 2), (1, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_without_a_gradient(missing, backend) -> None:
    ones = weights("both", "int8", True)
    zeros = [heavy(9, n, seed=n + 1) * (i not in missing) for i, n in enumerate(WIDTHS)]
    dys = [None if i in missing else dy for i, dy in enumerate(zeros)]
    torch.testing.assert_close(gradient(ones, dys, backend), gradient(ones, zeros, backend), rtol=1e-5, atol=1e-4)


def test_adapters_and_autocast_beside_it() -> None:
    """Gradients of adapters don't know of it; a bfloat16 dx is the float32 one, rounded."""
    ones = weights("both", "int8", True)
    layers = [Projection(one, None, (adapter(n, FEATURES, 2, n, 0.2),)) for one, n in zip(ones, WIDTHS, strict=True)]
    plain = [
        Projection(one, None, layer.adapters) for one, layer in zip(weights("both", "int8", False), layers, strict=True)
    ]
    leaves = [t for layer in layers for t in (layer.adapters[0].A, layer.adapters[0].B)]
    dys = [heavy(8, n, seed=n + 1).view(2, 4, n) for n in WIDTHS]
    found = []
    for these in (layers, plain):
        x = random(2, 4, FEATURES, seed=1).requires_grad_()
        found.append(torch.autograd.grad(lora_linears(x, these, SEEDS, backend="torch"), [x, *leaves], dys))
    assert not torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1:], found[1][1:]))
    x = random(8, FEATURES, seed=1).bfloat16().requires_grad_()
    ys = lora_linears(x, [Projection(one) for one in ones], backend="torch")
    (dx,) = torch.autograd.grad(ys, x, [dy.view(8, -1).bfloat16() for dy in dys])
    assert dx.dtype == torch.bfloat16
    assert close(dx, closed_form(ones, [dy.view(8, -1).bfloat16().float() for dy in dys], "int8"), 1e-2)


def test_gradcheck_without_rounding() -> None:
    ones = [
        freeze(random(64, 3, dtype=torch.float64), "int8", spare_gradients=True, units=Exact(), **levers)
        for levers in ({}, {"smooth": random(3).abs() + 0.5, "columns": torch.tensor([1], device=DEVICE)})
    ]
    x = random(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lora_linears(x, [Projection(w) for w in ones], backend="torch"), (x,))


def test_the_same_bits_again() -> None:
    ones, dys = weights("both", "int8", True), [heavy(40, n, seed=n + 1) for n in WIDTHS]
    assert torch.equal(gradient(ones, dys), gradient(ones, dys))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_stays_so_in_its_row_alone(broken, backend) -> None:
    dys = [heavy(9, n, seed=n + 1) for n in WIDTHS]
    dys[0][2, 77] = broken
    dx = gradient(weights("both", "int8", True), dys, backend)
    assert not dx[2].isfinite().any()
    assert dx[[0, 1, *range(3, 9)]].isfinite().all()


def test_no_rows_and_a_moved_weight() -> None:
    one = held(random(64, FEATURES), "int8", spare_gradients=True)
    assert gradient([one], [random(0, 64)]).shape == (0, FEATURES)
    assert one.moved(one.codes.clone()).spare_gradients
