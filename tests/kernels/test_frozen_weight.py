"""Weights as codes: what is kept, what is rounded, how siblings lie."""

import pytest
import torch
from oracle import DEVICE
from torch import Tensor

from peft_kernels.frozen_weight import freeze, freeze_siblings

FORMATS = ("int8", "fp8", "bf16")
# half a step of the codes: of 127 steps, of e4m3's three bits behind the leading one, of bf16's seven
ERROR = {"int8": 0.5 / 127, "fp8": 2.0**-4, "bf16": 2.0**-8}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 129)])
def test_codes_are_within_half_a_step(shape, format, transposed, dtype) -> None:
    weight = random(*shape, dtype=dtype) * torch.logspace(-3, 3, shape[0]).unsqueeze(1).to(DEVICE)
    weight = weight.to(dtype)
    before = weight.clone()
    held = freeze(weight.t().contiguous() if transposed else weight, format, transposed=transposed)
    got = held.dequantised()
    assert (got.dtype, got.shape, held.shape, held.dtype) == (torch.float32, shape, shape, dtype)
    assert held.codes.element_size() == (2 if format == "bf16" else 1)
    size = weight.double().abs() if format != "int8" else weight.double().abs().amax(1, keepdim=True)
    least = 0 if format != "fp8" else weight.double().abs().amax(1, keepdim=True) / 448 * 2.0**-10
    assert ((got.double() - weight.double()).abs() <= ERROR[format] * 1.001 * size + least).all()
    assert torch.equal(weight, before)
    assert torch.equal(held.dequantised(1, 3), got[1:3])
    assert torch.equal(torch.cat(list(held.pieces(2))), got)


def test_a_row_of_zeros_stays_zero() -> None:
    weight = random(3, 8)
    weight[1] = 0
    for format in FORMATS:
        assert not freeze(weight, format).dequantised()[1].any()


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_smoothing_moves_what_is_rounded(format) -> None:
    weight, smooth = random(6, 20), torch.logspace(-2, 2, 20, device=DEVICE)
    held = freeze(weight, format, smooth=smooth)
    other = freeze(weight * smooth, format)
    assert torch.equal(held.codes.view(torch.int8), other.codes.view(torch.int8))
    assert torch.equal(held.scale, other.scale)
    assert torch.equal(held.dequantised(), other.dequantised() / smooth)
    assert torch.equal(held.factor, 1 / smooth)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_columns_keep_all_their_digits(format) -> None:
    weight, columns = random(6, 20), torch.tensor([3, 11, 19], device=DEVICE)
    weight[:, columns] *= 1000
    held = freeze(weight, format, columns=columns)
    rest = weight.index_fill(1, columns, 0)
    assert torch.equal(held.dequantised()[:, columns], weight[:, columns])
    assert not held.codes.view(torch.int8)[:, columns].any()
    assert torch.equal(held.codes.view(torch.int8), freeze(rest, format).codes.view(torch.int8))
    assert held.factor.tolist() == [0.0 if k in (3, 11, 19) else 1.0 for k in range(20)]


def test_both_levers_at_once() -> None:
    weight, smooth, columns = random(6, 20), random(20, seed=1).abs() + 0.1, torch.tensor([0, 7], device=DEVICE)
    held = freeze(weight, "int8", smooth=smooth, columns=columns)
    assert torch.equal(held.dequantised()[:, columns], weight[:, columns])
    other = freeze((weight * smooth).index_fill(1, columns, 0), "int8")
    assert torch.equal(held.codes, other.codes)


@pytest.mark.parametrize("format", FORMATS)
def test_siblings_lie_in_one_stack_and_equal_those_alone(format) -> None:
    weights = [random(n, 12, seed=n) for n in (5, 1, 8)]
    found = freeze_siblings(weights, format)
    assert [one.place for one in found] == [0, 1, 2]
    for one, weight in zip(found, weights, strict=True):
        alone = freeze(weight, format)
        assert torch.equal(one.codes.view(torch.uint8), alone.codes.view(torch.uint8))
        assert one.stack is found[0].stack
        assert alone.stack is None
        assert one.codes.untyped_storage().data_ptr() == found[0].codes.untyped_storage().data_ptr()
        assert (one.scale is None) == (format == "bf16")
    codes, scale = found[0].stack.slice(1, 3)
    assert torch.equal(codes.view(torch.uint8), torch.cat([found[1].codes, found[2].codes]).view(torch.uint8))
    assert scale is None or torch.equal(scale, torch.cat([found[1].scale, found[2].scale]))


def test_moved_codes_stand_alone() -> None:
    one = freeze_siblings([random(4, 6), random(3, 6, seed=1)], "int8", smooth=torch.ones(6, device=DEVICE) * 2)[1]
    other = one.moved(one.codes.clone())
    assert other.stack is None
    assert torch.equal(other.dequantised(), one.dequantised())
    assert sorted(other.tensors()) == ["factor", "scale", "smooth"]


def test_refusals() -> None:
    weight = random(4, 6)
    for settings, told in (
        ({"format": "int4"}, "format must be one of"),
        (
            {"weight": torch.zeros(4, 6, dtype=torch.int8)},
            "a floating-point weight .N, K. is expected, got .4, 6. torch.int8",
        ),
        ({"weight": torch.zeros(4)}, r"got \(4,\) torch.float32"),
        ({"weight": weight.clone().index_fill_(1, torch.tensor([2], device=DEVICE), torch.nan)}, "NaN or infinity"),
        ({"weight": weight.clone().requires_grad_()}, "requires grad"),
        ({"smooth": torch.ones(5, device=DEVICE)}, r"smooth must be 6 positive numbers, got \(5,\)"),
        ({"smooth": torch.zeros(6, device=DEVICE)}, "smooth must be 6 positive numbers"),
        ({"columns": torch.tensor([6], device=DEVICE)}, "different int64 indices below 6"),
        ({"columns": torch.tensor([1, 1], device=DEVICE)}, "different int64 indices below 6"),
        ({"format": "bf16", "columns": torch.tensor([1], device=DEVICE)}, "bf16 has no outliers"),
        ({"format": "bf16", "spare_gradients": True}, "bf16 has no outliers"),
    ):
        with pytest.raises(ValueError, match=told):
            freeze(**({"weight": weight, "format": "int8"} | settings))
    with pytest.raises(ValueError, match="siblings must read 6 features"):
        freeze_siblings([weight, random(4, 5)], "int8")
