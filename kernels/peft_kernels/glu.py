"""Gated linear unit product: h = act(gate) · up (Shazeer 2020, GLU Variants Improve Transformer, eqs. 5-6).

Forward keeps gate and up alone. Backward makes h again, for the linear that reads it, in the pass that gives

    dup   = dh · act(gate)
    dgate = dh · up · act'(gate)

Shapes: (..., D), D = features of the MLP. The op is elementwise.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _compiled as compiled
from ._launch import Backend, compute_dtype, use_triton
from .activation import activation_gradient, activation_reference, activation_value
from .recompute import remember

Gate = Literal["silu", "gelu", "gelu_tanh"]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def glu_reference(gate: Tensor, up: Tensor, activation: Gate = "silu") -> Tensor:
    """The definition: computed in fp32 (fp64 for fp64), rounded once at the end."""
    wide = compute_dtype(gate)
    return (activation_reference(gate.to(wide), activation) * up.to(wide)).to(gate.dtype)


# Registered ops: FakeTensorMode and torch.compile see shapes, not kernels.
@torch.library.custom_op("peft_kernels::glu_forward", mutates_args=())
def _forward_op(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    from .gpu.glu import launch_forward

    return launch_forward(gate, up, activation)


@torch.library.custom_op("peft_kernels::glu_backward", mutates_args=())
def _backward_op(dh: Tensor, gate: Tensor, up: Tensor, activation: str, want_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    from .gpu.glu import launch_backward

    return launch_backward(dh, gate, up, activation, want_h)


@_forward_op.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@_backward_op.register_fake
def _(dh: Tensor, gate: Tensor, up: Tensor, activation: str, want_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    h = gate.new_empty(gate.shape if want_h else (0,))
    return h, gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def glu_forward(gate: Tensor, up: Tensor, activation: Gate, triton: bool, passes: bool = False) -> Tensor:
    """act(gate) · up without autograd, for use inside another Function. Arguments as `glu`, unchecked."""
    if triton:
        return _forward_op(gate, up, activation)
    if passes and activation == "silu" and compiled.usable(gate, up):
        return _swiglu_compiled(gate, up)
    return activation_value(gate.to(compute_dtype(gate)), activation).mul_(up).to(gate.dtype)


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: Gate, triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dgate, dup): the forward's output again, bit for bit, and both gradients. Unchecked; inputs are not changed.

    `dh` has the shape and dtype of `gate`. All three results are fresh.
    """
    if triton:
        return _backward_op(dh, gate, up, activation, True)
    h, dgate, dup = _backward_torch(dh, gate, up, activation, want_h=True)
    assert h is not None
    return h, dgate, dup


def _backward_torch(
    dh: Tensor, gate: Tensor, up: Tensor, activation: Gate, *, want_h: bool, value: Tensor | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """`value`: act(gate) in the wide dtype, ours to overwrite, where it was made already."""
    wide = compute_dtype(gate)
    gate_wide = gate.to(wide)
    value = activation_value(gate_wide, activation) if value is None else value
    if want_h:
        dup = (value * dh).to(gate.dtype)
        h = value.mul_(up).to(gate.dtype)
    else:
        dup, h = value.mul_(dh).to(gate.dtype), None
    del value
    # the product with dh first: `up` may be expanded or strided, dgate must be a buffer of its own
    dgate = torch.mul(dh, up) if wide == gate.dtype else dh.to(wide).mul_(up)
    return h, activation_gradient(dgate, gate_wide, activation, out=dgate).to(gate.dtype), dup


def _swiglu_compiled(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up in one pass over memory."""
    features = gate.shape[-1]
    g, u = gate.reshape(-1, features), up.reshape(-1, features)
    h = torch.empty(gate.shape)
    compiled.call("swiglu", g, compiled.pitch(g), u, compiled.pitch(u), len(g), features, h)
    return h


def _swiglu_back_compiled(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup) in one pass over memory."""
    features = gate.shape[-1]
    rows = [t.reshape(-1, features) for t in (dh, gate, up)]
    dgate, dup = torch.empty(gate.shape), torch.empty(gate.shape)
    placed = [part for t in rows for part in (t, compiled.pitch(t))]
    compiled.call("swiglu_back", *placed, len(rows[0]), features, dgate, dup)
    return dgate, dup


class _Again:
    """Makes h again for the linear that reads it, and leaves act(gate) to the product's own backward, which follows."""

    def __init__(self, activation: Gate, triton: bool, passes: bool = False) -> None:
        self.activation, self.triton, self.passes = activation, triton, passes and activation == "silu"
        self.value: Tensor | None = None

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.triton or (self.passes and compiled.usable(gate, up)):
            return glu_forward(gate, up, self.activation, self.triton, self.passes)
        self.value = activation_value(gate.to(compute_dtype(gate)), self.activation)
        return torch.mul(self.value, up).to(gate.dtype)

    def take(self) -> Tensor | None:
        value, self.value = self.value, None
        return value


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, again: _Again) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.again = again
        return glu_forward(gate, up, again.activation, again.triton, again.passes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
        (gate, up), again = ctx.saved_tensors, ctx.again
        if again.triton:
            _, dgate, dup = _backward_op(dh, gate, up, again.activation, False)
        elif again.passes and compiled.usable(dh, gate, up):
            dgate, dup = _swiglu_back_compiled(dh, gate, up)
        else:
            value = None if torch.compiler.is_compiling() else again.take()
            _, dgate, dup = _backward_torch(dh, gate, up, again.activation, want_h=False, value=value)
        return dgate, dup, None


def glu(
    gate: Tensor, up: Tensor, activation: Gate = "silu", *, backend: Backend = "auto", passes: bool = False
) -> Tensor:
    """Gated activation of an MLP, `act(gate) * up`: SwiGLU with "silu", GeGLU with "gelu" or "gelu_tanh".

    Args:
        gate: pre-activation, shape (..., D), float16 | bfloat16 | float32 | float64.
        up: linear branch, same shape and dtype as `gate`.
        activation: "silu" | "gelu" (erf) | "gelu_tanh".
        backend: "triton", "torch", or "auto" (triton where `gate` lives on CUDA).
        passes: let compiled passes compute SwiGLU in fp32 on a CPU, where they run: one pass each way, other rounding.

    Returns:
        Shape (..., D), dtype of `gate`. Differentiable once in both inputs; neither is modified. It carries the
        recipe by which it can be made again from `gate` and `up`.

    Raises:
        ValueError: shapes, dtypes or devices differ, unknown `activation`, or "triton" cannot run here.
    """
    if activation not in get_args(Gate):
        raise ValueError(f"activation must be one of {get_args(Gate)}, got {activation!r}.")
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"gate and up must match, got {tuple(gate.shape)} {gate.dtype} on {gate.device} "
            f"and {tuple(up.shape)} {up.dtype} on {up.device}."
        )
    if gate.dtype not in _FLOATS:
        raise ValueError(f"gate must be float16, bfloat16, float32 or float64, got {gate.dtype}. Convert it first.")
    again = _Again(activation, use_triton(gate, backend), passes)
    h: Tensor = _Glu.apply(gate, up, again)
    return remember(h, again, gate, up)
