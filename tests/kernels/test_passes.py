"""The compiled passes against their definitions in plain torch, and a machine without a compiler."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from peft_kernels import _compiled as compiled
from peft_kernels import _lora_ops as ops
from peft_kernels import _passes as passes
from peft_kernels.dropout import dropout, dropped, keep_mask, keep_rate
from peft_kernels.glu import glu
from peft_kernels.recompute import recipe_of
from peft_kernels.rms_norm import rms_norm, rms_norm_reference

ROWS = (1, 2, 15, 17, 129)
FEATURES = (1, 7, 16, 33, 64, 100, 577)


@pytest.fixture(autouse=True)
def _compiler() -> None:
    """These tests are of the compiled passes: without a compiler there are none. CI has one."""
    if compiled._load()[0] is None:
        pytest.skip(compiled.status())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rows", ROWS)
def test_quantise_has_the_bits_of_plain_torch(rows: int, features: int) -> None:
    x = random(rows, features) * torch.logspace(-20, 20, rows).unsqueeze(1)
    factor = random(features, seed=1).abs() + 0.1
    for f in (None, factor):
        codes, scale = passes.quantise([x], [features], [f], torch.int8)
        want_codes, want_scale = passes.quantise_plain(x if f is None else x * f, torch.int8)
        assert torch.equal(codes, want_codes)
        assert torch.equal(scale, want_scale)
        assert int(codes.abs().max()) == 127


def test_halves_go_to_the_even_code() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes, scale = passes.quantise([x], [7], [None], torch.int8)
    assert scale.tolist() == [1.0]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_rows_of_zeros_of_nan_and_of_tiny_numbers() -> None:
    x = random(6, 40)
    x[0] = 0
    x[1, 3], x[2, 4], x[3, 5] = math.nan, math.inf, -math.inf
    x[4] *= 1e-42
    codes, scale = passes.quantise([x], [40], [None], torch.int8)
    want_codes, want_scale = passes.quantise_plain(x, torch.int8)
    assert torch.equal(scale, want_scale) or torch.equal(scale.isnan(), want_scale.isnan())
    assert scale[0] == 1
    assert scale[1:4].isnan().all()
    assert scale[4] == passes.LEAST
    assert torch.equal(codes[[0, 4, 5]], want_codes[[0, 4, 5]])
    assert not codes[0].any()


def test_parts_lie_end_to_end_and_share_a_scale() -> None:
    wide = random(9, 50)
    parts = [wide[:, 3:20], None, wide[:, 25:49]]
    widths = [17, 5, 24]
    factors = [random(17, seed=1), None, random(24, seed=2)]
    codes, scale = passes.quantise(parts, widths, factors, torch.int8)
    laid = torch.cat([parts[0] * factors[0], torch.zeros(9, 5), parts[2] * factors[2]], 1)
    want_codes, want_scale = passes.quantise_plain(laid, torch.int8)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale, want_scale)


def test_an_expanded_part_is_read_as_it_lies() -> None:
    x = random(1, 24).expand(7, 24)
    codes, scale = passes.quantise([x], [24], [None], torch.int8)
    want = passes.quantise_plain(x.contiguous(), torch.int8)
    assert torch.equal(codes, want[0])
    assert torch.equal(scale, want[1])


@pytest.mark.parametrize("features", [*FEATURES, 256, 257, 1000])
@pytest.mark.parametrize("rows", ROWS)
def test_column_absmax_has_the_bits_of_plain_torch(rows: int, features: int) -> None:
    x = random(rows, features + 3)[:, 1 : features + 1] * torch.logspace(-20, 20, features)
    assert torch.equal(passes.column_absmax(x), x.abs().amax(0))
    x[0, 0], x[-1, features // 2] = -math.inf, math.nan
    torch.testing.assert_close(passes.column_absmax(x), x.abs().amax(0), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(passes.column_absmax(x.double()[:, 1:]).isnan(), x[:, 1:].isnan().any(0))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_rescale_has_the_bits_of_plain_torch(rows: int, features: int, scaled: bool, biased: bool) -> None:
    wide = torch.randint(-(2**30), 2**30, (rows, features + 9), dtype=torch.int32)
    products = wide[:, 4 : 4 + features]
    row_scale, column_scale, bias = random(rows).abs(), random(features, seed=1).abs(), random(features, seed=2)
    given = column_scale if scaled else None, bias if biased else None
    got = passes.rescale(products, row_scale, *given, torch.float32)
    want = products.float() * row_scale.unsqueeze(1)
    want = want * given[0] if given[0] is not None else want
    want = want + given[1] if given[1] is not None else want
    assert torch.equal(got, want)
    assert got.is_contiguous()


@pytest.mark.parametrize("rank", [1, 3, 16, 40])
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (5, 17), (6, 64), (7, 65), (13, 200)])
def test_rescale_with_a_low_rank_term(rows: int, features: int, rank: int) -> None:
    products = torch.randint(-9999, 9999, (rows, features), dtype=torch.int32)
    row_scale, column_scale, bias = random(rows).abs() / 99, random(features, seed=1).abs(), random(features, seed=2)
    low, up = random(rows, rank + 5, seed=3)[:, 2 : 2 + rank], random(features, rank, seed=4)
    for b in (None, bias):
        got = passes.rescale(products, row_scale, column_scale, b, torch.float32, low, up, 0.75)
        added = 0.75 * low.double() @ up.double().t()
        truth = products.double() * row_scale.double().unsqueeze(1) * column_scale.double() + added
        truth = truth if b is None else truth + b.double()
        bound = 1e-6 * (1 + truth.abs() + low.double().abs() @ up.double().abs().t())
        assert ((got.double() - truth).abs() <= bound).all()


def test_other_dtypes_take_plain_torch() -> None:
    products = torch.randint(-999, 999, (4, 6), dtype=torch.int32)
    scale, up = torch.rand(4), torch.rand(6)
    got = passes.rescale(products, scale, up, None, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (products.float() * scale.unsqueeze(1) * up).bfloat16())
    codes, _ = passes.quantise([random(4, 6).bfloat16()], [6], [None], torch.int8)
    assert torch.equal(codes, passes.quantise_plain(random(4, 6).bfloat16().float(), torch.int8)[0])


def test_swiglu_errs_by_a_few_ulps() -> None:
    gate = torch.cat([random(40, 97).mul_(6), torch.linspace(-110, 110, 970).view(10, 97)]).requires_grad_()
    up, dh = random(50, 97, seed=1).requires_grad_(), random(50, 97, seed=2)

    def run(gate: Tensor, up: Tensor, dh: Tensor, **settings: bool) -> list[Tensor]:
        h = glu(gate, up, **settings) if settings else torch.nn.functional.silu(gate) * up
        return [h.detach(), *torch.autograd.grad(h, (gate, up), dh)]

    ours = run(gate, up, dh, passes=True)
    plain = run(gate, up, dh, passes=False)
    truth = run(*(t.detach().double().requires_grad_() for t in (gate, up)), dh.double())
    for o, p, t in zip(ours, plain, truth, strict=True):
        size = torch.finfo(torch.float32).eps * (t.abs() + 1e-30 + (dh.double() * up.double()).abs())
        assert ((o.double() - t).abs() <= (p.double() - t).abs() + 4 * size).all()


def test_swiglu_of_halves_of_one_tensor_and_of_nan() -> None:
    packed = random(2, 5, 24)
    packed[0, 1, 3] = math.nan
    gate, up = packed.chunk(2, -1)
    got, want = glu(gate, up, passes=True), glu(gate, up)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("p", [0.02, 0.2])
@pytest.mark.parametrize("ranks", [(4,), (16, 1, 7)])
def test_dropped_elements_taken_out_one_by_one(p: float, ranks: tuple[int, ...]) -> None:
    """Against masks made whole: S, dA and dx of adapters that each have a mask of their own."""
    samples, tokens, features = 3, 11, 37
    x, seeds = random(samples, tokens, features), torch.tensor([5, -7, 2**40])
    flat = x.view(-1, features)
    salted = [(rank, 100 + 256 * place) for place, rank in enumerate(ranks)]
    a, d_low = random(sum(ranks), features, seed=1), random(len(flat), sum(ranks), seed=2)
    keep = keep_rate(p, False)
    masks = [
        keep_mask(x, p, seeds, salt, backend="torch", passes=True).view(-1, features).double() / keep
        for _, salt in salted
    ]
    pieces = a.double().split(list(ranks))
    want = torch.cat([(flat.double() * mask) @ one.t() for mask, one in zip(masks, pieces, strict=True)], 1)
    got = ops.down_sparse(flat, a, p, seeds, salted)
    assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)

    dx = random(len(flat), features, seed=3)
    parts = list(zip(masks, pieces, d_low.double().split(list(ranks), 1), strict=True))
    want_dx = dx.double() + sum(mask * (low @ one) for mask, one, low in parts)
    want_da = torch.cat([low.t() @ (flat.double() * mask) for mask, _, low in parts])
    kept = d_low.clone()
    got_da = ops.down_back_sparse(d_low, flat, a, dx, p, seeds, salted)
    assert torch.allclose(dx.double(), want_dx, rtol=1e-4, atol=1e-4)
    assert torch.allclose(got_da.double(), want_da, rtol=1e-4, atol=1e-4)
    assert torch.equal(d_low, kept)
    assert ops.down_back_sparse(d_low, None, a, None, p, seeds, salted) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_again(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, seeds = random(2, 30, 64), torch.tensor([1, 2])
        flat, a, d_low = x.view(-1, 64), random(16, 64, seed=1), random(60, 16, seed=2)
        found = []
        for _ in range(2):
            dx = torch.zeros(60, 64)
            da = ops.down_back_sparse(d_low, flat, a, dx, 0.1, seeds, [(16, 3)])
            found.append((ops.down_sparse(flat, a, 0.1, seeds, [(16, 3)]), da, dx))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_everything_is_plain_torch() -> None:
    """In a process of its own, where the switch is off, where no compiler is found, and where it fails."""
    script = (
        "import torch, peft_kernels._compiled as c, peft_kernels._passes as p;"
        "x = torch.randn(3, 8); got = p.quantise([x], [8], [None], torch.int8); want = p.quantise_plain(x, torch.int8);"
        "assert all(map(torch.equal, got, want)); assert not c.usable(x); print(c.status())"
    )
    for environment, told in (
        ({"PEFT_KERNELS_COMPILE": "0"}, "plain torch: PEFT_KERNELS_COMPILE=0"),
        ({"PATH": ""}, "plain torch: no C++ compiler was found"),
        ({"CXX": "false"}, "plain torch: the C++ compiler false gave nothing usable"),
    ):
        import os

        path = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(told)


def test_a_library_is_built_once_and_says_by_what(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compiled._load.__wrapped__()
    (built,) = (tmp_path / "peft-kernels").iterdir()
    when = built.stat().st_mtime_ns
    again = compiled._load.__wrapped__()
    assert built.stat().st_mtime_ns == when
    assert first[1] == again[1]
    assert first[1].startswith("compiled by ")
    assert compiled.status() == first[1]


def test_what_the_passes_do_not_take() -> None:
    x = random(4, 6)
    assert compiled.usable(x, None, x[:, 1:3])
    assert not compiled.usable(x, x.t())
    assert not compiled.usable(x.double())
    assert not compiled.usable(x.to("meta"))
    assert not compiled.usable(torch.nn.Parameter(x).as_subclass(_Tensor))


class _Tensor(Tensor):
    """Somebody's own kind of tensor."""


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.97])
@pytest.mark.parametrize("size", [1, 100, 5000])
def test_places_of_dropped_elements_are_torchs_but_for_rounding(p: float, size: int) -> None:
    seeds = torch.arange(7) * 1000 - 3
    want, got = (dropped(seeds, 11, size, p, passes).view(7, -1) for passes in (False, True))
    assert got.dtype == want.dtype
    assert int((got - want).abs().max()) <= 3 or size == 1
    assert float((got.diff() == want.diff()).double().mean()) >= 0.9999
    inside = got < 7 * size
    assert ((got >= torch.arange(7).unsqueeze(1) * size) & (got < (torch.arange(7).unsqueeze(1) + 1) * size))[
        inside
    ].all()
    assert (got[~inside] == 7 * size).all()
    assert torch.equal(got, dropped(seeds, 11, size, p, True).view(7, -1))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_is_its_mask(p: float) -> None:
    x, seeds, dy = random(3, 11, 37).requires_grad_(), torch.tensor([5, -7, 2**40]), random(3, 11, 37, seed=1)
    mask = keep_mask(x, p, seeds, 9, backend="torch", passes=True)
    y = dropout(x, p, seeds, 9, backend="torch", passes=True)
    assert torch.equal(y, x * (1 / keep_rate(p, False)) * mask)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy * (1 / keep_rate(p, False)) * mask)
    assert dropout(x[:0], p, seeds[:0], 9, backend="torch", passes=True).shape == (0, 11, 37)


def test_the_rate_of_dropped_elements_holds_in_every_column() -> None:
    x, seeds = torch.empty(400, 50, 8), torch.arange(400)
    for p in (0.05, 0.3):
        kept = keep_mask(x, p, seeds, 1, backend="torch", passes=True).double().mean((0, 1))
        assert (kept - (1 - p)).abs().max() < 5 * (p * (1 - p) / 20000) ** 0.5


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 9, 64), (4, 577)])
def test_rms_norm_errs_by_a_few_ulps(shape: tuple[int, ...], offset: float) -> None:
    """Forward, what its recipe makes again, and backward, on rows that lie apart; against float64."""
    wide = random(*shape[:-1], shape[-1] + 3) * 3
    x, weight, dy = wide[..., : shape[-1]].requires_grad_(), random(shape[-1], seed=1), random(*shape, seed=2)
    residual = random(*shape, seed=3)
    for given in ({}, {"residual": residual}):
        got = rms_norm(x, weight, 1e-5, offset=offset, passes=True, **given)
        y, h = got if given else (got, x)
        source = (x.detach() + residual if given else x.detach()).double().requires_grad_()
        want = rms_norm_reference(source, weight.double(), 1e-5, offset)
        ends = [(y, dy), (h, dy)] if given else [(y, dy)]
        (dx,) = torch.autograd.grad([end for end, _ in ends], x, [one for _, one in ends], retain_graph=True)
        (want_dx,) = torch.autograd.grad(want, source, dy.double())
        want_dx = want_dx + dy if given else want_dx
        size = 4 * torch.finfo(torch.float32).eps
        assert ((y.double() - want).abs() <= size * want.abs()).all()
        # terms that cancel in dx are as large as the largest of its row, times 1/rms
        assert ((dx.double() - want_dx).abs() <= 2 * size * want_dx.abs().amax(-1, keepdim=True).clamp_min(1)).all()
        recipe = recipe_of(y)
        assert recipe is not None
        assert torch.equal(recipe.make(*recipe.inputs), y)
