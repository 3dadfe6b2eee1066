"""LoRA linears over frozen codes on Triton: quantised rows, both products and the low-rank terms put together."""

import pytest
import torch
from eight_bit import CODES, poisoned_outputs  # noqa: F401
from oracle import DEVICE
from test_frozen_products import adapter, close, random, rounded
from test_gpu_dropout import philox_keep_reference
from torch import Tensor

from peft_kernels.frozen_weight import FrozenWeight, freeze, freeze_siblings
from peft_kernels.gpu._philox import scale_of
from peft_kernels.lora_linear import Adapter, Projection, lora_linear, lora_linears

NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
SAMPLES, ROWS, FEATURES, WIDTHS, RANKS = 3, 5, 48, (40, 16, 24), (4, 2, 8)
SEEDS = torch.tensor([3, -4, 99], device=DEVICE)


def stack(format: str, lever: str) -> list[FrozenWeight]:
    settings = {}
    if lever == "smooth":
        settings["smooth"] = random(FEATURES, seed=8).abs() + 0.2
    if lever == "columns":
        settings["columns"] = torch.tensor([4, 30], device=DEVICE)
    return freeze_siblings([random(n, FEATURES, seed=n) for n in WIDTHS], format, **settings)


def of_dtype(one: Adapter, dtype: torch.dtype) -> Adapter:
    A, B = (t.detach().to(dtype).requires_grad_() for t in (one.A, one.B))
    return Adapter(A, B, one.scale, one.p, one.salt)


def truth(x: Tensor, layers: list[Projection], dys: list[Tensor], format: str) -> dict[str, Tensor]:
    """Everything in float64 from rows rounded anew; siblings' dy are one row."""
    one = layers[0].weight
    factor = torch.ones(FEATURES, device=DEVICE) if one.factor is None else one.factor
    found, low_dx = {}, torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
    wide = x.double()
    for place, (layer, dy) in enumerate(zip(layers, dys, strict=True)):
        held, (pair,), dy = layer.weight, layer.adapters, dy.double()
        y = rounded(x.float() * factor, format) @ held.codes.double().T * held.scale.double() + layer.bias.double()
        if held.columns is not None:
            y += wide[:, held.columns] @ held.column_weight.double().T
            low_dx[:, held.columns] += dy @ held.column_weight.double()
        kept = philox_keep_reference(*x.shape, pair.p, SEEDS, ROWS, pair.salt).to(DEVICE)
        mask = kept.double() * scale_of(pair.p)
        A, B = pair.A.detach().double(), pair.B.detach().double()
        low, d_low = (wide * mask) @ A.T, pair.scale * dy @ B
        found |= {
            f"y{place}": y + pair.scale * low @ B.T,
            f"dA{place}": d_low.T @ (wide * mask),
            f"dB{place}": pair.scale * dy.T @ low,
        }
        low_dx += mask * (d_low @ A)
    whole = torch.cat([dy.float() * layer.weight.scale for layer, dy in zip(layers, dys, strict=True)], 1)
    codes = torch.cat([layer.weight.codes for layer in layers]).double()
    found["dx"] = rounded(whole, format) @ codes * factor.double() + low_dx
    return found


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("lever", ["none", "smooth", "columns"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "adapters"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16", "bf16 under fp32 adapters"],
)
def test_siblings_against_rows_rounded_anew(kind, adapters, p, lever, codes):
    """A code on the edge of two may fall either way: a share of a step is allowed in the norm. No rounding but that of
    the dtype reaches dA and dB."""
    format = NAMES[codes]
    layers = [
        Projection(one, random(n, seed=n + 3).to(kind), (of_dtype(adapter(n, FEATURES, r, n, p), adapters),))
        for n, r, one in zip(WIDTHS, RANKS, stack(format, lever), strict=True)
    ]
    x = random(SAMPLES, ROWS, FEATURES).to(kind).requires_grad_()
    dys = [random(SAMPLES, ROWS, n, seed=n + 9).to(kind) for n in WIDTHS]
    ys = lora_linears(x, layers, SEEDS, backend="triton")
    leaves = {"dx": x}
    for place, layer in enumerate(layers):
        leaves |= {f"dA{place}": layer.adapters[0].A, f"dB{place}": layer.adapters[0].B}
    got = dict(zip(leaves, torch.autograd.grad(ys, list(leaves.values()), dys), strict=True))
    got |= {f"y{place}": y.detach() for place, y in enumerate(ys)}
    flat = [dy.flatten(0, 1) for dy in dys]
    wanted = truth(x.detach().flatten(0, 1), layers, flat, format)
    narrow = kind != torch.float32
    edge = {"int8": 2e-4, "fp8": 2e-3}[format]
    for name, want in wanted.items():
        exact = name.startswith(("dA", "dB"))
        tolerance = 1e-2 if narrow else 1e-5 if exact else edge
        assert close(got[name].reshape(want.shape), want, tolerance), name
        assert got[name].dtype == (adapters if exact else kind), name


def both_backends(x: Tensor, layers: list[Projection], there: list[int]) -> None:
    """int8 has the same codes and the same sums on both; what is added to them has another order."""
    leaves = [
        x,
        *(t for i in there for pair in layers[i].adapters for t in (pair.A, pair.B, pair.bias) if t is not None),
    ]
    leaves += [layers[i].bias for i in there if layers[i].bias is not None]
    found = []
    for backend in ("triton", "torch"):
        ys = lora_linears(x, layers, SEEDS, backend=backend)
        dys = [random(*ys[i].shape, seed=i) for i in there]
        found.append((*ys, *torch.autograd.grad([ys[i] for i in there], leaves, dys)))
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "none"])
@pytest.mark.parametrize("there", [(0, 1, 2), (1, 2), (0, 2), (0, 1), (1,)], ids=str)
def test_outputs_without_a_gradient(there, adapted):
    x = random(SAMPLES, ROWS, FEATURES).requires_grad_()
    layers = [
        Projection(one, None, (adapter(n, FEATURES, r, n),) if adapted else ())
        for n, r, one in zip(WIDTHS, RANKS, stack("int8", "columns"), strict=True)
    ]
    both_backends(x, layers, list(there))


def test_plain_weights_several_adapters_and_biases_beside_codes():
    x = random(SAMPLES, ROWS, FEATURES).requires_grad_()
    codes, lonely = stack("int8", "none"), freeze(random(33, FEATURES, seed=33), "int8")
    layers = [
        Projection(random(20, FEATURES, seed=20), random(20).requires_grad_(), (adapter(20, FEATURES, 3, 20),)),
        Projection(
            codes[2], random(24).requires_grad_(), tuple(adapter(24, FEATURES, r, r, bias=True) for r in (2, 5))
        ),
        Projection(lonely, None, (adapter(33, FEATURES, 7, 33),)),
        Projection(codes[1]),
        Projection(codes[0], None, (adapter(40, FEATURES, 1, 40, bias=True),)),
    ]
    both_backends(x, layers, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("codes", CODES)
def test_autocast_computes_as_narrow_tensors_do_and_leaves_all_alone(codes):
    one, pair = freeze(random(24, 40), NAMES[codes]), adapter(24, 40, 4, 3, 0.3)
    x, dy = random(SAMPLES, ROWS, 40, seed=1).requires_grad_(), random(SAMPLES, ROWS, 24, seed=2).bfloat16()
    held = (x, pair.A, pair.B, dy, one.codes.view(torch.int8), one.scale)
    before = [t.detach().clone() for t in held]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = lora_linear(x, Projection(one, None, (pair,)), SEEDS, backend="triton")
    grads = torch.autograd.grad(y, (x, pair.A, pair.B), dy)
    narrow = of_dtype(pair, torch.bfloat16)
    own = x.detach().bfloat16().requires_grad_()
    other = lora_linear(own, Projection(one, None, (narrow,)), SEEDS, backend="triton")
    others = torch.autograd.grad(other, (own, narrow.A, narrow.B), dy)
    assert torch.equal(y, other)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    for ours, narrowed in zip(grads, others, strict=True):
        torch.testing.assert_close(ours.bfloat16(), narrowed, rtol=2**-7, atol=0)
    assert all(map(torch.equal, held, before))


@pytest.mark.parametrize("codes", CODES)
def test_a_row_with_nan_comes_out_as_nan_and_harms_no_other(codes):
    settings = {"columns": torch.tensor([3], device=DEVICE)}
    layer = Projection(freeze(random(12, 20), NAMES[codes], **settings), None, (adapter(12, 20, 2, 3),))
    x = random(5, 20, seed=1)
    clean = lora_linear(x, layer, backend="triton")
    x[1, 4], x[3, 3] = torch.nan, torch.inf
    y = lora_linear(x.requires_grad_(), layer, backend="triton")
    assert y[1].isnan().all()
    assert not y[3].isfinite().any()
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])
    dy = random(5, 12, seed=2)
    dy[2, 3] = torch.nan
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx[2].isnan().all()
    assert dx[[0, 1, 3, 4]].isfinite().all()


def test_strided_empty_and_single_rows():
    layer = Projection(freeze(random(6, 10), "int8"), None, (adapter(6, 10, 4, 3),))
    x = random(4, 10, 3).transpose(1, 2)
    want = lora_linear(x.contiguous(), layer, backend="triton")
    assert torch.equal(lora_linear(x, layer, backend="triton"), want)
    torch.testing.assert_close(lora_linear(x[1, 2], layer, backend="triton"), want[1, 2])
    none = x[:0].clone().requires_grad_()
    y = lora_linear(none, layer, backend="triton")
    y.sum().backward()
    assert (y.shape, none.grad.shape) == ((0, 3, 6), none.shape)
    assert all((t.grad == 0).all() for t in (layer.adapters[0].A, layer.adapters[0].B))
