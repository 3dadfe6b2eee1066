"""Frozen weights in bitsandbytes' 4 or 8 bits a number, made numbers again right before they are multiplied.

    nf4, fp4   w_i  = table[code_i] · absmax[i // blocksize]                  (Dettmers et al. 2023, QLoRA, section 3)
    nested     absmax[b] = nested.table[code_b] · nested.absmax[b // nested.blocksize] + nested.offset
    int8       w_nk = code_nk · absmax_n · (1/127)                            (Dettmers et al. 2022, LLM.int8(), eq. 3)

Every product and every sum is rounded to float32, left to right as it stands here, and the result once more to the
dtype that is asked for. These are the bits of bitsandbytes' own functions (0.50), with one exception that a test names:
its AVX-512 kernel takes the wrong absmax where K is a multiple of 16 but not of the blocksize.

Shapes: W (N, K), N out, K in. i counts its numbers row by row; a byte holds two codes, the first in its upper half.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import _compiled as compiled
from ._launch import Backend, triton_installed, use_triton

Kind = Literal["nf4", "fp4", "int8"]
TABLES = {
    # quantiles of N(0, 1), the largest of them 1 (QLoRA, appendix E)
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # a sign and bitsandbytes' order of these, of which the largest is 1
    "fp4": tuple(sign * v / 12 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip
INVERSE = 0.007874015718698502
"""1/127 in float32."""
PASSES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes that the compiled pass writes, and how it calls them."""


@dataclass(frozen=True, eq=False)
class Nested:
    """How 8-bit absmax are made numbers: table float32 (256,), absmax float32 (blocks,), offset float32 ()."""

    table: Tensor
    absmax: Tensor
    offset: Tensor
    blocksize: int


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A weight (N, K) as bitsandbytes holds it; `from_parameter` makes one that shares its memory.

    Attributes:
        kind: "nf4", "fp4" or "int8".
        codes: uint8 (⌈N·K/2⌉,), or int8 (N, K).
        absmax: float32 (⌈N·K/blocksize⌉,), uint8 where nested; float32 (N,) for int8.
        shape: (N, K).
        blocksize: numbers that share an absmax; K for int8.
        nested: how uint8 absmax are read, else None.
        dtype: that products are computed in; None is that of x.
    """

    kind: Kind
    codes: Tensor
    absmax: Tensor
    shape: torch.Size
    blocksize: int
    nested: Nested | None = None
    dtype: torch.dtype | None = None

    @staticmethod
    def from_parameter(
        parameter: Tensor, dtype: torch.dtype | None = None, scale: Tensor | None = None
    ) -> "QuantisedWeight":
        """What a bitsandbytes parameter holds, in its own memory.

        Args:
            parameter: a quantised Params4bit or Int8Params.
            dtype: of products; None is that of x.
            scale: float32 (N,) of an Int8Params whose layer took it away (Linear8bitLt's state.SCB).

        Raises:
            ValueError: the parameter isn't quantised, or bitsandbytes repacked it for its own CPU kernels.
        """
        with torch._C.DisableTorchFunctionSubclass():  # a Params4bit makes everything that comes from it one
            data = parameter.detach().as_subclass(Tensor)
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            return _of_four_bits(data, state, dtype)
        scale = getattr(parameter, "SCB", None) if scale is None else scale
        if data.dtype != torch.int8 or data.dim() != 2 or scale is None:
            raise ValueError(
                f"QuantisedWeight: a quantised Params4bit or Int8Params is expected, got {type(parameter).__name__} "
                f"{data.dtype} without {'quant_state' if data.dtype != torch.int8 else 'SCB'}. bitsandbytes quantises "
                "a weight when its layer is moved to a device."
            )
        scale = scale.detach().to(data.device)  # Module.to leaves the state of Linear8bitLt behind
        return QuantisedWeight("int8", data.contiguous(), scale, data.shape, data.shape[1], None, dtype)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def requires_grad(self) -> bool:
        return False

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K) of `dtype`, a tensor of its own."""
        nested = self.nested
        given = () if nested is None else (nested.table, nested.absmax, nested.offset)
        blocksize = 0 if nested is None else nested.blocksize
        made: Tensor = _dequantised(
            self.codes, self.absmax, list(given), self.kind, list(self.shape), self.blocksize, blocksize, dtype
        )
        return made

    def dequantise_into(self, out: Tensor, backend: Backend = "auto") -> Tensor:
        """`dequantised` in the memory of `out`, contiguous (N, K), which is returned.

        Args:
            backend: "auto" is Triton on CUDA wherever it is installed (cards before Ampere too), else torch, which has
                a compiled pass on a CPU.
        """
        assert out.is_contiguous()
        assert out.shape == self.shape, f"the weight is {tuple(self.shape)}, its place {tuple(out.shape)}"
        if out.numel():
            _fill(self, out, backend)
        return out

    def pieces(self, rows: int) -> Iterator[Tensor]:
        """`dequantised` in float32, so many rows at a time."""
        yield from self.dequantised().split(rows)


def dequantise_reference(one: QuantisedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The definition, (N, K) of `dtype`, in plain torch."""
    if one.kind == "int8":
        return (one.codes.to(torch.float32) * one.absmax.unsqueeze(1) * INVERSE).to(dtype)
    absmax = one.absmax
    if one.nested is not None:
        blocks = torch.arange(len(absmax), device=absmax.device) // one.nested.blocksize
        absmax = one.nested.table[absmax.long()] * one.nested.absmax[blocks] + one.nested.offset
    count = one.shape.numel()
    codes = torch.stack([one.codes >> 4, one.codes & 15], 1).flatten()[:count]
    numbers = _table(one.kind, one.device)[codes.long()]
    return (numbers * absmax.repeat_interleave(one.blocksize)[:count]).to(dtype).view(one.shape)


def _of_four_bits(data: Tensor, state: Any, dtype: torch.dtype | None) -> QuantisedWeight:
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "QuantisedWeight: bitsandbytes has repacked this weight for its bf16 kernel (its Linear4bit does so at the "
            "first evaluation on this kind of CPU), and its absmax are rounded now. Load the weight anew, and set "
            "support_avx512bf16_for_cpu of the layer to False before it is run."
        )
    if state.quant_type not in TABLES or state.shape is None or len(state.shape) != 2:
        raise ValueError(
            f"QuantisedWeight: nf4 or fp4 codes of a weight (N, K) are expected, got {state.quant_type} of shape "
            f"{None if state.shape is None else tuple(state.shape)}."
        )
    nested = None
    if state.nested:
        inner = state.state2
        nested = Nested(inner.code.float(), inner.absmax.float(), state.offset.float(), int(inner.blocksize))
    absmax = state.absmax if state.nested else state.absmax.float()
    codes = data.reshape(-1).view(torch.uint8)  # whatever dtype they are stored as (FSDP wants a floating one)
    shape = torch.Size(state.shape)
    return QuantisedWeight(state.quant_type, codes, absmax, shape, int(state.blocksize), nested, dtype)


@cache
def _table(kind: str, device: torch.device) -> Tensor:
    """The 16 numbers of a 4-bit code, float32."""
    return torch.tensor(TABLES[kind], device=device)


def _fill(one: QuantisedWeight, out: Tensor, backend: Backend) -> None:
    auto = backend == "auto" and one.codes.is_cuda and triton_installed()
    if auto or (backend != "auto" and use_triton(one.codes, backend)):
        _launch(one, out)
    elif type(out) is Tensor and out.dtype in PASSES and compiled.there(out):
        _fill_compiled(one, out)
    else:
        out.copy_(dequantise_reference(one, torch.float32))


def _launch(one: QuantisedWeight, out: Tensor) -> None:
    from .gpu.dequantise import launch_eight_bits, launch_four_bits

    if one.kind == "int8":
        launch_eight_bits(one.codes, one.absmax, out)
        return
    nested = one.nested
    inner = None if nested is None else (nested.table, nested.absmax, nested.offset, nested.blocksize)
    launch_four_bits(one.codes, _table(one.kind, one.device), one.absmax, one.blocksize, inner, out)


def compiled_arguments(one: QuantisedWeight) -> tuple[Any, ...]:
    """What the compiled passes take of a weight."""
    if one.kind == "int8":
        return one.codes, one.absmax
    nested = one.nested
    given = (None, None, None, 0) if nested is None else (nested.table, nested.absmax, nested.offset, nested.blocksize)
    plain, narrow = (one.absmax, None) if nested is None else (None, one.absmax)
    return one.codes, _table(one.kind, one.device), one.blocksize, plain, narrow, *given


def _fill_compiled(one: QuantisedWeight, out: Tensor) -> None:
    given, sizes = compiled_arguments(one), one.shape if one.kind == "int8" else (one.shape.numel(),)
    name = "dequantise_8bit" if one.kind == "int8" else "dequantise_4bit"
    compiled.call(name, *given, *sizes, PASSES[out.dtype], out)


@torch.library.custom_op("peft_kernels::dequantised", mutates_args=())
def _dequantised(
    codes: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    kind: str,
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    assert kind in get_args(Kind)
    inner = Nested(nested[0], nested[1], nested[2], nested_blocksize) if nested else None
    one = QuantisedWeight(kind, codes, absmax, torch.Size(shape), blocksize, inner)  # type: ignore[arg-type]
    return one.dequantise_into(torch.empty(shape, dtype=dtype, device=codes.device))


@_dequantised.register_fake
def _(
    codes: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    kind: str,
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)
