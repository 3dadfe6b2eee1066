"""What the tests of 8-bit kernels share: the formats that the device has, codes between fences, poisoned outputs."""

from collections.abc import Iterator

import pytest
import torch
from oracle import DEVICE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peft_kernels.gpu import fp8_gemm, int8_gemm
from peft_kernels.gpu._quantise import LARGEST
from peft_kernels.gpu.lora_forward import Tile


def _unit(name: str, dtype: torch.dtype, least: tuple[int, int]):
    missing = DEVICE == "cuda" and torch.cuda.get_device_capability() < least
    return pytest.param(dtype, id=name, marks=pytest.mark.skipif(missing, reason=f"{name} begins with sm_{least}"))


CODES = [_unit("int8", torch.int8, (8, 0)), _unit("fp8", torch.float8_e4m3fn, (8, 9))]
LAUNCH = {torch.int8: int8_gemm.launch_quantise_rows, torch.float8_e4m3fn: fp8_gemm.launch_quantise_rows}
SMALL = Tile(rows=16, columns=32, depth=32)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch) -> Iterator[None]:
    """`torch.empty` gives NaN between margins of NaN, and bytes that no kernel writes (-128, e4m3's NaN) for codes."""
    wholes: list[tuple[Tensor, Tensor]] = []
    plain = torch.empty

    def empty(*args, **options) -> Tensor:
        inner = plain(*args, **options)
        if isinstance(inner, FakeTensor) or inner.is_meta:
            return inner
        if inner.element_size() == 1:
            byte = -128 if inner.dtype == torch.int8 else 0x7F
            whole = torch.full((inner.numel() + 128,), byte, dtype=torch.int8, device=inner.device)
        elif inner.is_floating_point():
            whole = torch.full((inner.numel() + 128,), float("nan"), dtype=inner.dtype, device=inner.device)
        else:
            return inner
        wholes.append((whole, whole.clone()))
        return whole[64 : 64 + inner.numel()].view(inner.dtype).view(inner.shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for whole, before in wholes:
        for margin in (slice(0, 64), slice(-64, None)):
            torch.testing.assert_close(whole[margin], before[margin], rtol=0, atol=0, equal_nan=True)


def fenced(codes: Tensor) -> Tensor:
    """The same codes between margins of the largest byte."""
    whole = torch.full((codes.numel() + 128,), 0x7F, dtype=torch.int8, device=codes.device)
    middle = whole[64 : 64 + codes.numel()].view(codes.dtype).view(codes.shape)
    return middle.copy_(codes)


def quantised(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the kernel computes, in the same order in fp32 torch."""
    x = x.float() if factor is None else x.float() * factor
    most = x.abs().amax(1)
    scale = torch.where(most > 0, (most / LARGEST[dtype]).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    scale = torch.where(most < torch.inf, scale, torch.nan)
    v = x * (1 / scale)[:, None]
    return v.round().to(dtype) if dtype == torch.int8 else v.to(dtype), scale
