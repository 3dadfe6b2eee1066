"""What the tests of quantised weights share: weights that bitsandbytes made, and its own numbers of them."""

import copy
from typing import Any

import pytest
import torch
from oracle import DEVICE
from torch import Tensor

from peft_kernels.quantised_weight import QuantisedWeight

bnb = pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "fp4", "int8")


def parameter(
    shape: tuple[int, int],
    kind: str,
    *,
    blocksize: int = 64,
    nested: bool = True,
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype = torch.uint8,
    seed: int = 0,
    spread: float = 2.0,
) -> Any:
    """A random weight as a parameter of bitsandbytes; sizes of its rows lie `spread` decades up and down."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-spread, spread, shape[0]) / shape[1] ** 0.5
    weight = torch.randn(shape, generator=generator) * sizes.unsqueeze(1)
    if kind == "int8":
        return bnb.nn.Int8Params(weight.to(dtype), requires_grad=False).to(DEVICE)
    return bnb.nn.Params4bit(
        weight.to(dtype), requires_grad=False, blocksize=blocksize, compress_statistics=nested, quant_type=kind,
        quant_storage=storage,
    ).to(DEVICE)  # fmt: skip


def held(shape: tuple[int, int], kind: str, products: torch.dtype | None = None, **settings: Any) -> QuantisedWeight:
    return QuantisedWeight.from_parameter(parameter(shape, kind, **settings), products)


def bits(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


def theirs(p: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' own numbers of a parameter.

    For four bits on a CPU by its plain torch, which is what it takes itself where K is odd: its C++ kernel reads the
    absmax of the wrong block where K is no multiple of the blocksize (`test_their_cpu_kernel`).
    """
    if not hasattr(p, "quant_state"):
        return bnb.functional.int8_vectorwise_dequant(p.data, p.SCB).to(dtype)
    state = copy.copy(p.quant_state)
    state.dtype = dtype
    if DEVICE == "cuda":
        return bnb.functional.dequantize_4bit(p.data, state)
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = p.data.reshape(-1).view(torch.uint8).as_subclass(Tensor)
    with torch.compiler.set_stance("force_eager"):
        return _dequantize_4bit_compute(packed, absmax, state.code, state.blocksize, state.shape, dtype)
