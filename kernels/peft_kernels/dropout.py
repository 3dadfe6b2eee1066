"""Dropout whose mask is a function of (sample's seed, layer, position, column) and of nothing else.

Inverted dropout, y = x ⊙ mask / (1 - p). Neither the micro-batch, nor gradient accumulation, nor who shares the batch,
nor a replay under gradient checkpointing changes a sample's mask. Backward draws it again; no mask is kept.

    seeds   int64 (samples,), one per index of x's first dimension; a step's number belongs into them
    salt    one integer per layer
    element position·K + column inside a sample; padding a sample on the right leaves its mask alone

The two backends draw different masks of the same distribution. Triton: Philox-4x32, one 16-bit number per element,
keep where it is at least round(p·65536). torch: the gaps between dropped elements are geometric, so only p·M·K random
numbers are drawn: about a tenth of the time of `F.dropout` at p = 0.05.
"""

import math
import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _compiled as compiled
from ._launch import Backend, use_triton

_MASK64 = 2**64 - 1


def keep_rate(p: float, triton: bool) -> float:
    """Share of elements that the backend really keeps; kept values are divided by it."""
    return 1 - round(p * 65536) / 65536 if triton else 1 - p


def mix(seed: int, salt: int) -> int:
    """Two 64-bit numbers to 32 well spread bits (two rounds of splitmix64; Steele, Lea, Flood 2014)."""
    value = (seed + 0x9E3779B97F4A7C15 * (2 * salt + 1)) & _MASK64
    for _ in range(2):
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
        value ^= value >> 31
    return value >> 32


def draws(size: int, p: float) -> int:
    """Gaps to draw so that they cover `size` elements: the mean number of drops and eight standard deviations."""
    count = math.ceil(size * p + 8 * math.sqrt(size * p * (1 - p)) + 16)
    return count + count % 2


_generators = threading.local()


def _generator(device: str) -> torch.Generator:
    """One a thread and device, seeded anew for every sample."""
    if device not in _generators.__dict__:
        _generators.__dict__[device] = torch.Generator(device=device)
    found: torch.Generator = _generators.__dict__[device]
    return found


def dropped(seeds: Tensor, salt: int, size: int, p: float, passes: bool = False) -> Tensor:
    """Flat indices of the dropped elements of samples of `size` elements each, torch's way.

    Args:
        passes: let the compiled passes make places of random words, where they run; their logarithm rounds otherwise,
            which moves a place in a million by one.

    Returns:
        int64 (samples · draws(size, p),) into a buffer of samples·size + 1 elements; surplus draws point at the last,
        which no sample owns. The length depends on shapes only.
    """
    if type(seeds) is Tensor and not torch.compiler.is_compiling():
        if passes and compiled.there(seeds):
            return _draw_compiled(seeds, salt, size, p)
        return _draw(seeds, salt, size, p)  # past the dispatcher: the call would cost a third of the work
    return _dropped_op(seeds, salt, size, p)


def _words(seeds: Tensor, salt: int, count: int) -> Tensor:
    """Random bits, int64 (samples, count / 2), each row from its sample's own generator."""
    words = torch.empty(seeds.numel(), count // 2, dtype=torch.int64, device=seeds.device)
    generator = _generator(str(seeds.device))
    for row, seed in zip(words, seeds.tolist(), strict=True):
        row.random_(-(2**63), None, generator=generator.manual_seed(mix(seed, salt)))
    return words


def _draw_compiled(seeds: Tensor, salt: int, size: int, p: float) -> Tensor:
    samples, count = seeds.numel(), draws(size, p)
    words, places = _words(seeds, salt, count), torch.empty(samples * count, dtype=torch.int64)
    compiled.call("draw_places", words, samples, count, size, 1 / math.log1p(-p), places)
    return places


def _draw(seeds: Tensor, salt: int, size: int, p: float) -> Tensor:
    samples, words = seeds.numel(), _words(seeds, salt, draws(size, p))
    uniform = words.view(torch.int32).to(torch.float32).mul_(2.0**-32).add_(0.5).clamp_(min=2.0**-26)
    gaps = uniform.log_().mul_(1 / math.log1p(-p)).to(torch.int64)  # P(gap ≥ k) = (1 - p)^k
    places = gaps.add_(1).cumsum_(1).sub_(1)
    inside = places < size
    places.add_(torch.arange(samples, device=seeds.device).mul_(size).unsqueeze(1))
    return torch.where(inside, places, samples * size).flatten()


# Registered: FakeTensorMode and torch.compile see the shape; numbers are drawn when it runs.
_dropped_op = torch.library.custom_op("peft_kernels::dropped", _draw, mutates_args=())


@_dropped_op.register_fake
def _(seeds: Tensor, salt: int, size: int, p: float) -> Tensor:
    return seeds.new_empty(seeds.numel() * draws(size, p))


@torch.library.custom_op("peft_kernels::dropout_mask", mutates_args=())
def _triton_mask(x: Tensor, seeds: Tensor, salt: int, p: float) -> Tensor:
    from .gpu.dropout import launch_keep_mask

    features, rows = x.shape[-1], x.numel() // max(1, x.shape[-1])
    mask = launch_keep_mask(rows, features, p, seeds, rows // max(1, seeds.numel()), salt, x.device)
    return mask.view(x.shape)


@_triton_mask.register_fake
def _(x: Tensor, seeds: Tensor, salt: int, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


@torch.library.custom_op("peft_kernels::dropout", mutates_args=())
def _triton_dropout(x: Tensor, seeds: Tensor, salt: int, p: float) -> Tensor:
    from .gpu.dropout import launch_dropout

    features = x.shape[-1]
    flat = x.reshape(-1, features).contiguous()
    return launch_dropout(flat, p, seeds, flat.shape[0] // max(1, seeds.numel()), salt).view(x.shape)


@_triton_dropout.register_fake
def _(x: Tensor, seeds: Tensor, salt: int, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def keep_mask(
    x: Tensor, p: float, seeds: Tensor, salt: int, *, backend: Backend = "auto", passes: bool = False
) -> Tensor:
    """The mask that a backend draws for a tensor like `x`: bool, True where an element is kept."""
    if use_triton(x, backend):
        return _triton_mask(x, seeds, salt, p)
    mask = torch.ones(x.numel() + 1, dtype=torch.bool, device=x.device)
    mask.index_fill_(0, dropped(seeds, salt, _sample_size(x, seeds), p, passes), False)
    return mask[:-1].view(x.shape)


def drop_into(buffer: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """A copy of `x` with zeros at `indices` (see `dropped`), not scaled, in `buffer` (x.numel() + 1,)."""
    out = buffer[:-1].view(x.shape)
    out.copy_(x)
    buffer.index_fill_(0, indices, 0)
    return out


def dropout_reference(x: Tensor, mask: Tensor, keep: float) -> Tensor:
    """The definition, for a mask that was drawn."""
    return x * mask / keep


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seeds: Tensor, salt: int, triton: bool, passes: bool) -> Tensor:
        ctx.save_for_backward(seeds)
        ctx.settings = p, salt, triton, passes
        return _drop(x, p, seeds, salt, triton, passes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (seeds,) = ctx.saved_tensors
        p, salt, triton, passes = ctx.settings
        return _drop(dy, p, seeds, salt, triton, passes), None, None, None, None, None


def _drop(x: Tensor, p: float, seeds: Tensor, salt: int, triton: bool, passes: bool) -> Tensor:
    if triton:
        return _triton_dropout(x, seeds, salt, p)
    out = torch.mul(x, 1 / keep_rate(p, triton), out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
    size = _sample_size(x, seeds)
    places = dropped(seeds, salt, size, p, passes)
    if passes and places.numel() and compiled.usable(out):
        compiled.call("zero_places", places, len(seeds), len(places) // len(seeds), size, out)
        return out
    if type(out) is Tensor and not torch.compiler.is_compiling():
        out.view(-1).index_fill_(0, places[places < out.numel()], 0)
        return out
    whole = torch.cat([out.view(-1), out.new_zeros(1)]).index_fill_(0, places, 0)  # shapes known before the draw
    return whole[:-1].view(x.shape).clone()


def _sample_size(x: Tensor, seeds: Tensor) -> int:
    return x.numel() // max(1, seeds.numel())


def dropout(
    x: Tensor, p: float, seeds: Tensor, salt: int, *, backend: Backend = "auto", passes: bool = False
) -> Tensor:
    """Dropout with a named mask (Srivastava et al. 2014), for training.

    Args:
        x: (samples, …, K), any floating dtype, not modified.
        p: share of elements set to zero, 0 ≤ p < 1.
        seeds: int64 (samples,) on x's device.
        salt: the layer's number.
        passes: as in `dropped`.

    Returns:
        x ⊙ mask / keep_rate, x's shape and dtype. Saves `seeds` only.

    Raises:
        ValueError: p out of range, or seeds that do not fit x.
    """
    check(x, p, seeds)
    return x if p == 0 else _Dropout.apply(x, p, seeds, salt, use_triton(x, backend), passes)


def check(x: Tensor, p: float, seeds: Tensor | None) -> None:
    """Refuse a rate out of range and seeds that do not fit."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p must be at least 0 and below 1, got {p}.")
    if p > 0 and (seeds is None or seeds.dtype != torch.int64 or seeds.shape != x.shape[:1]):
        got = None if seeds is None else f"{tuple(seeds.shape)} {seeds.dtype}"
        raise ValueError(f"dropout: seeds must be int64 with shape {tuple(x.shape[:1])}, one per sample; got {got}.")
