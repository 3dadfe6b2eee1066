"""fp8 products through torch: `_scaled_mm` has a CPU version, so that sizes and layouts are tried without a GPU."""

import pytest
import torch
from oracle import DEVICE
from torch import Tensor

from peft_kernels.fp8_linear import NEEDS, Fp8, fp8_product

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < NEEDS, reason="no fp8 units on this GPU"
)


def coded(*shape: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw).to(DEVICE).to(torch.float8_e4m3fn)


def check(got: Tensor, truth: Tensor) -> None:
    assert (got.dtype, got.shape) == (torch.float32, truth.shape)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (5, 40, 24), (16, 32, 48), (17, 33, 7), (130, 100, 65)])
def test_products_of_any_size_in_both_directions(M, K, N):
    x, weight, dy = coded(M, K, seed=0), coded(N, K, seed=1), coded(M, N, seed=2)
    check(Fp8().product(x, weight), x.double() @ weight.double().T)
    check(Fp8().product_back(dy, weight), dy.double() @ weight.double())


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_products_of_nothing(empty):
    M, K, N = (0 if place == empty else 16 for place in range(3))
    got = fp8_product(coded(M, K, seed=0), coded(N, K, seed=1).t())
    assert torch.equal(got, torch.zeros(M, N, device=DEVICE))


def test_what_is_no_number_stays_in_its_row():
    x, weight = coded(3, 20, seed=0), coded(6, 20, seed=1)
    x[1, 4] = float("nan")
    y = Fp8().product(x, weight)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
