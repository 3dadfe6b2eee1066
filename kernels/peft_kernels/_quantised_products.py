"""Both products of a quantised linear: W is made numbers in a scratch buffer right before each, and kept by nobody.

One buffer serves all layers: on a CPU one for each thread and dtype, on CUDA one for each stream and dtype. It is as
large as the largest weight that came by, and stays until `release` or the end of its thread. 2-D tensors: x (M, K),
dy (M, N).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _compiled as compiled
from . import _lora_ops as ops
from .quantised_weight import QuantisedWeight, compiled_arguments


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


_OF_THREAD = _OfThread()
_OF_STREAM: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}
_ONE_AT_A_TIME = threading.RLock()
"""Held on CUDA from the start of unpacking to the launch of the product: two threads may share a stream."""


def _cut(buffers: dict[Any, Tensor], key: Any, one: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """The buffer of this key, (N, K) of it; made, or made larger, where it is too small."""
    count, found = one.shape.numel(), buffers.get(key)
    if found is None or found.numel() < count:
        found = None
        buffers.pop(key, None)
        with torch.inference_mode(False):  # it outlives the evaluation that may ask for it first
            found = buffers[key] = torch.empty(count, dtype=dtype, device=one.device)
    return found[:count].view(one.shape)


def release() -> None:
    """Let go of the buffers of this thread and of all streams; whoever multiplies next makes a new one."""
    _OF_THREAD.buffers.clear()
    with _ONE_AT_A_TIME:
        _OF_STREAM.clear()


@contextmanager
def unpacked(one: QuantisedWeight, dtype: torch.dtype) -> Iterator[Tensor]:
    """W (N, K) of `dtype`, in the scratch buffer: not to be kept, nor is another one to be unpacked inside."""
    if one.codes.is_cuda:
        with _ONE_AT_A_TIME:
            key = (one.device, torch.cuda.current_stream(one.device).cuda_stream, dtype)
            yield one.dequantise_into(_cut(_OF_STREAM, key, one, dtype))
    else:
        yield one.dequantise_into(_cut(_OF_THREAD.buffers, (one.device, dtype), one, dtype))


def _planned(one: QuantisedWeight) -> bool:
    """Whether somebody else plans the memory: a compiler, or a mode that only counts."""
    return torch.compiler.is_compiling() or type(one.codes) is not Tensor or one.codes.is_meta


FEW_ROWS = 8
"""Up to so many rows of x the compiled passes multiply as they unpack, and no weight is written anywhere. With AVX-512,
one thread, 576 → 1536 in nf4, that is 2.1 times as fast for one row, 1.5 times for 8 and 0.9 times for 16."""


def _few_rows(x: Tensor, one: QuantisedWeight) -> Tensor:
    """x·Wᵀ (M, N), fp32 on a CPU."""
    n, k = one.shape
    y, scratch = torch.empty(len(x), n), torch.empty(torch.get_num_threads(), k)
    name = "few_rows_8bit" if one.kind == "int8" else "few_rows_4bit"
    compiled.call(name, *compiled_arguments(one), x, compiled.pitch(x), len(x), n, k, y, scratch)
    return y


def _are_few(x: Tensor, one: QuantisedWeight, dtype: torch.dtype) -> bool:
    """Whether the compiled passes take this product; a row of four-bit codes must begin with a byte."""
    sized = 0 < len(x) <= FEW_ROWS and one.device.type == "cpu" and (one.kind == "int8" or one.shape[1] % 2 == 0)
    return sized and dtype == torch.float32 and compiled.usable(x)


def product(x: Tensor, one: QuantisedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x·Wᵀ + b (M, N), computed in `dtype`, of x's dtype; a buffer of its own."""
    narrow, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if _planned(one):
        return ops.base(narrow, one.dequantised(dtype), bias, False).to(x.dtype)
    if _are_few(narrow, one, dtype):
        y = _few_rows(narrow, one)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    with unpacked(one, dtype) as weight:
        return ops.base(narrow, weight, bias, False).to(x.dtype)


def product_back(dy: Tensor, one: QuantisedWeight, dx: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dx + dy·W (M, K), computed in `dtype`, of dy's dtype; added in place where there is a dx already."""
    if _planned(one):
        return _into(dx, dy, one.dequantised(dtype))
    with unpacked(one, dtype) as weight:
        return _into(dx, dy, weight)


def _into(dx: Tensor | None, dy: Tensor, weight: Tensor) -> Tensor:
    if dx is None or dx.dtype == weight.dtype:
        return ops.base_back(dy.to(weight.dtype), weight, dx, False).to(dy.dtype)
    return dx.add_(torch.mm(dy.to(weight.dtype), weight))
