"""Rows as 8-bit codes and matrices turned over, on Triton: every code the nearest, with the bits of torch."""

import pytest
import torch
from eight_bit import CODES, LAUNCH, fenced, poisoned_outputs, quantised  # noqa: F401
from oracle import DEVICE, DTYPES, guarded
from torch import Tensor

from peft_kernels.gpu import _quantise, fp8_gemm, int8_gemm
from peft_kernels.gpu._quantise import LARGEST, turned


def grid(dtype: torch.dtype) -> Tensor:
    """Every number that a code stands for, in fp64."""
    every = torch.arange(-127, 128, dtype=torch.int8) if dtype == torch.int8 else torch.arange(256, dtype=torch.uint8)
    numbers = every.double() if dtype == torch.int8 else every.view(dtype).double()
    return numbers[numbers.isfinite()].to(DEVICE)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K", "factored"), [(1, 1, False), (3, 17, True), (37, 129, True), (5, 200, False)])
def test_every_code_is_the_nearest_and_has_the_bits_of_torch(M, K, factored, dtype, codes):
    torch.manual_seed(0)
    x = guarded((torch.randn(M, K, device=DEVICE) * torch.logspace(-4, 4, M, device=DEVICE)[:, None]).to(dtype))
    factor = guarded(torch.rand(K, device=DEVICE) + 0.1) if factored else None
    before = x.clone()
    got, scale = LAUNCH[codes](x, factor)
    wanted, wanted_scale = quantised(x, factor, codes)
    assert (got.dtype, scale.dtype, got.shape) == (codes, torch.float32, x.shape)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(got.view(torch.int8), wanted.view(torch.int8))
    assert torch.equal(x, before)

    v = (x.double() if factor is None else x.double() * factor.double()) / scale.double()[:, None]
    error = (v - got.double()).abs()
    least = (v[..., None] - grid(codes)).abs().amin(-1)
    assert (error <= least + 1e-6 * v.abs() + 1e-9).all()
    assert torch.equal(got.double().abs().amax(1), torch.full((M,), LARGEST[codes], device=DEVICE).double())


@pytest.mark.parametrize(
    ("codes", "values", "wanted"),
    [
        (torch.int8, [127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5], [127, 0, 2, 2, 0, -2, 126]),
        (
            torch.float8_e4m3fn,
            [448, 17, 19, -17, 240 + 16, 248, 3 * 2**-10, 2**-10, -(2**-9), 31 * 2**-11, 15.5],
            [448, 16, 20, -16, 256, 256, 2**-8, 0, -(2**-9), 2**-6, 16],
        ),
    ],
    ids=["int8", "fp8"],
)
def test_ties_go_to_even(codes, values, wanted):
    """The largest value makes the scale 1."""
    if DEVICE == "cuda" and codes != torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 units")
    got, scale = LAUNCH[codes](torch.tensor([values], device=DEVICE, dtype=torch.float32))
    assert scale.item() == 1
    assert got[0].double().tolist() == wanted


@pytest.mark.parametrize("codes", CODES)
def test_rows_of_zeros_of_nothing_and_of_too_much(codes):
    rows = [[0.0, -0.0, 0.0], [1e-45, -1e-40, 0.0], [3e38, -3.4e38, 1.0], [1.0, float("nan"), 2.0]]
    rows += [[1.0, float("inf"), 2.0], [1.0, -float("inf"), float("nan")], [1e-37, -1e-38, 0.0]]
    x = torch.tensor(rows, device=DEVICE)
    got, scale = LAUNCH[codes](x)
    assert scale[0] == 1
    assert (got[0].double() == 0).all()
    assert scale[3:6].isnan().all(), "what is no number gives none"
    back = got.double() * scale.double()[:, None]
    for row in (1, 2, 6):
        assert scale[row].isfinite()
        assert (back[row] - x[row].double()).abs().max() <= max(0.04 * x[row].abs().max().item(), 2.0**-126)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("factored", [False, True])
def test_long_rows_give_the_same_bits_as_one_block(codes, factored, monkeypatch):
    torch.manual_seed(0)
    x = guarded(torch.randn(5, 150, device=DEVICE))
    x[2, 149] = float("nan")
    factor = guarded(torch.rand(150, device=DEVICE)) if factored else None
    whole = LAUNCH[codes](x, factor)
    loop = {"WHOLE": False, "ROWS": 2, "COLUMNS": 64, "num_warps": 1}
    monkeypatch.setattr(_quantise, "quantise_tile", lambda features: loop)
    pieces = LAUNCH[codes](x, factor)
    keep = torch.tensor([0, 1, 3, 4], device=DEVICE)
    assert torch.equal(pieces[0].view(torch.int8)[keep], whole[0].view(torch.int8)[keep])
    torch.testing.assert_close(pieces[1], whole[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("widths", [(7,), (16, 33), (48, 5, 100), (3, 1, 2, 4)], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["one block", "loop"])
def test_parts_have_the_codes_of_their_concatenation(widths, whole, codes, monkeypatch):
    if not whole:
        loop = {"WHOLE": False, "ROWS": 2, "COLUMNS": 64, "num_warps": 1}
        monkeypatch.setattr(_quantise, "quantise_tile", lambda features: loop)
    torch.manual_seed(0)
    parts = [guarded(torch.randn(5, width, device=DEVICE).to(torch.bfloat16)) for width in widths]
    parts[-1][3] = -0.0
    factor = guarded(torch.rand(sum(widths), device=DEVICE))
    launch = int8_gemm.launch_quantise_parts if codes == torch.int8 else fp8_gemm.launch_quantise_parts
    got, scale = launch(parts, factor)
    wanted, wanted_scale = quantised(torch.cat(parts, 1), factor, codes)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(got.view(torch.int8), wanted.view(torch.int8))


@pytest.mark.parametrize(("features", "whole"), [(1, True), (4096, True), (16384, True), (16385, False)])
def test_rows_of_most_mlps_are_read_once(features, whole):
    tile = _quantise.quantise_tile(features)
    assert tile["WHOLE"] is whole
    assert not whole or tile["COLUMNS"] >= features


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 131), (200, 17), (128, 129), (0, 4)], ids=str)
def test_turned_codes_are_the_transpose(shape, codes):
    torch.manual_seed(0)
    w = fenced(torch.randint(-128, 128, shape, device=DEVICE).to(torch.int8).view(codes))
    out = turned(w)
    assert out.is_contiguous()
    assert torch.equal(out.view(torch.int8), w.view(torch.int8).t())
