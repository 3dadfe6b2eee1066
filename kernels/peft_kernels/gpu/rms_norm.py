"""Triton kernels of `peft_kernels.rms_norm`; the math is there. x as (rows, features), row-major.

A program owns whole rows: in one block up to `WIDEST` features, in a loop over blocks above, where the second read of
a row comes from cache. Tiles and the sums over rows are in `_rows`.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case
from ._rows import (
    LOOP,
    SUM_ROWS,
    SUM_TILE,
    _column_sums_kernel,
    _load_sum,
    _store_dx,
    _tiles,
    column_sums,
    tile,
)


@triton.jit
def _load_shifted(weight_ptr, cols, features, offset, like_ptr, HAS_WEIGHT: tl.constexpr, ROUND: tl.constexpr):
    """offset + weight as one row, in fp32; 1 without a weight."""
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=cols < features, other=0.0).to(tl.float32) + offset
        if ROUND:  # torch adds in the weight's dtype
            w = w.to(weight_ptr.dtype.element_ty).to(tl.float32)
        return w[None, :]
    else:
        return tl.full((1, cols.shape[0]), 1.0, tl.float32)


@triton.jit
def _scaled(x, rstd, w, x_ptr, LLAMA: tl.constexpr):
    xhat = x * rstd[:, None]
    if LLAMA:
        xhat = xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
    return xhat * w


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    h_ptr,
    rows,
    features,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LLAMA: tl.constexpr,
    APPLY: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """APPLY: rstd is given, and y is made from it by the same instructions."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    live = first + row < rows
    x_ptr, y_ptr, rstd_ptr = x_ptr + first * features, y_ptr + first * features, rstd_ptr + first
    residual_ptr, h_ptr = residual_ptr + first * features, h_ptr + first * features
    at = row[:, None] * features + cols[None, :]
    if WHOLE:
        mask = live[:, None] & (cols < features)[None, :]
        x = _load_sum(x_ptr, residual_ptr, at, mask, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(h_ptr + at, x, mask=mask)
        if APPLY:
            rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
        else:
            rstd = tl.rsqrt(tl.sum(x * x, axis=1) / features + eps)
            tl.store(rstd_ptr + row, rstd, mask=live)
        w = _load_shifted(weight_ptr, cols, features, offset, x_ptr, HAS_WEIGHT, LLAMA)
        tl.store(y_ptr + at, _scaled(x, rstd, w, x_ptr, LLAMA), mask=mask)
    else:
        if APPLY:
            rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
        else:
            squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, features, BLOCK_N):
                mask = live[:, None] & (start + cols < features)[None, :]
                x = _load_sum(x_ptr, residual_ptr, at + start, mask, HAS_RESIDUAL)
                if HAS_RESIDUAL:
                    tl.store(h_ptr + at + start, x, mask=mask)
                squares += x * x
            rstd = tl.rsqrt(tl.sum(squares, axis=1) / features + eps)
            tl.store(rstd_ptr + row, rstd, mask=live)
        for start in range(0, features, BLOCK_N):
            mask = live[:, None] & (start + cols < features)[None, :]
            x = _load_sum(x_ptr, residual_ptr, at + start, mask, HAS_RESIDUAL)
            w = _load_shifted(weight_ptr, start + cols, features, offset, x_ptr, HAS_WEIGHT, LLAMA)
            tl.store(y_ptr + at + start, _scaled(x, rstd, w, x_ptr, LLAMA), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dh_ptr,
    x_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    rows,
    features,
    offset,
    HAS_DH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    live = first + row < rows
    dy_ptr, x_ptr, dx_ptr = dy_ptr + first * features, x_ptr + first * features, dx_ptr + first * features
    dh_ptr, rstd_ptr = dh_ptr + first * features, rstd_ptr + first
    at = row[:, None] * features + cols[None, :]
    rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
    if WHOLE:
        mask = live[:, None] & (cols < features)[None, :]
        w = _load_shifted(weight_ptr, cols, features, offset, x_ptr, HAS_WEIGHT, False)
        t = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32) * w
        xhat = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * rstd[:, None]
        mean = tl.sum(t * xhat, axis=1) / features
        _store_dx(dx_ptr, dh_ptr, at, mask, (t - xhat * mean[:, None]) * rstd[:, None], HAS_DH)
    else:
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, features, BLOCK_N):
            mask = live[:, None] & (start + cols < features)[None, :]
            w = _load_shifted(weight_ptr, start + cols, features, offset, x_ptr, HAS_WEIGHT, False)
            t = tl.load(dy_ptr + at + start, mask=mask, other=0.0).to(tl.float32) * w
            products += t * (tl.load(x_ptr + at + start, mask=mask, other=0.0).to(tl.float32) * rstd[:, None])
        mean = tl.sum(products, axis=1) / features
        for start in range(0, features, BLOCK_N):
            mask = live[:, None] & (start + cols < features)[None, :]
            w = _load_shifted(weight_ptr, start + cols, features, offset, x_ptr, HAS_WEIGHT, False)
            t = tl.load(dy_ptr + at + start, mask=mask, other=0.0).to(tl.float32) * w
            xhat = tl.load(x_ptr + at + start, mask=mask, other=0.0).to(tl.float32) * rstd[:, None]
            _store_dx(dx_ptr, dh_ptr, at + start, mask, (t - xhat * mean[:, None]) * rstd[:, None], HAS_DH)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    offset: float,
    llama: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, features = x.contiguous(), x.shape[-1]
    rows, given = x.numel() // features, rstd
    promoted = x.dtype if weight is None or not llama else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty_like(x, dtype=promoted)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if given is None else given.contiguous()
    h = x.new_empty(0) if residual is None else torch.empty_like(x)
    if rows:
        constants = tile(features)
        _forward_kernel[(triton.cdiv(rows, constants["BLOCK_M"]),)](
            x,
            x if residual is None else residual.contiguous(),
            x if weight is None else weight.contiguous(),
            y,
            rstd,
            h,
            rows,
            features,
            eps,
            offset,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            LLAMA=llama,
            APPLY=given is not None,
            **constants,
        )
    return y, rstd, h


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, llama: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, rstd, h); h is empty without a residual."""
    return _launch(x, residual, weight, None, eps, offset, llama)


def launch_apply(x: Tensor, rstd: Tensor, weight: Tensor | None, offset: float, llama: bool) -> Tensor:
    """y of the forward, bit for bit, from what it saved."""
    return _launch(x, None, weight, rstd, 0.0, offset, llama)[0]


def launch_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor | None, offset: float, trained: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dw); dw in fp32, empty unless `trained`. dx includes dh, the gradient that arrives at h."""
    dy, x, features = dy.contiguous(), x.contiguous(), x.shape[-1]
    dx, rows = torch.empty_like(x), x.numel() // features
    if rows:
        constants = tile(features)
        _backward_kernel[(triton.cdiv(rows, constants["BLOCK_M"]),)](
            dy,
            x if dh is None else dh.contiguous(),
            x,
            rstd,
            x if weight is None else weight.contiguous(),
            dx,
            rows,
            features,
            offset,
            HAS_DH=dh is not None,
            HAS_WEIGHT=weight is not None,
            **constants,
        )
    return dx, column_sums(dy, x, None, rstd, trained, False)[0]


def _cases() -> list[Case]:
    cases = []
    sizes = {"rows": "i32", "features": "i32"}
    for kind in ("bf16", "fp32"):
        pointer = f"*{kind}"
        forward = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "rstd_ptr", "h_ptr"), pointer)
        backward = dict.fromkeys(("dy_ptr", "dh_ptr", "x_ptr", "rstd_ptr", "weight_ptr", "dx_ptr"), pointer)
        for name, constants, warps in _tiles():
            # what else the flags choose is a few instructions: compiled at the widest tile and in the loop
            rest = ((True, True), (False, False)) if constants["BLOCK_N"] >= LOOP else ()
            for llama, applied in ((True, False), *rest):
                flags = {"HAS_RESIDUAL": not applied, "HAS_WEIGHT": True, "LLAMA": llama, "APPLY": applied}
                cases.append(
                    Case(
                        kernel=_forward_kernel,
                        label=f"{kind} {name} {'llama' if llama else 'gemma'}{' apply' if applied else ''}",
                        signature={**forward, "rstd_ptr": "*fp32", **sizes, "eps": "fp32", "offset": "fp32"},
                        constants={**flags, **constants},
                        num_warps=warps,
                        aligned=(*forward, "features"),
                    )
                )
            cases.append(
                Case(
                    kernel=_backward_kernel,
                    label=f"{kind} {name}",
                    signature={**backward, "rstd_ptr": "*fp32", **sizes, "offset": "fp32"},
                    constants={"HAS_DH": True, "HAS_WEIGHT": True, **constants},
                    num_warps=warps,
                    aligned=(*backward, "features"),
                )
            )
        sums = dict.fromkeys(("mean_ptr", "rstd_ptr", "weight_sums_ptr", "bias_sums_ptr"), "*fp32")
        block = {"ROWS": SUM_ROWS, "BLOCK_M": SUM_TILE[0], "BLOCK_N": SUM_TILE[1]}
        for centred in (False, True):
            cases.append(
                Case(
                    kernel=_column_sums_kernel,
                    label=f"{kind} {'layer_norm' if centred else 'rms_norm'}",
                    signature={"dy_ptr": pointer, "x_ptr": pointer, **sums, **sizes},
                    constants={"CENTRED": centred, "NEED_WEIGHT": True, "NEED_BIAS": centred, **block},
                    aligned=("dy_ptr", "x_ptr", *sums, "features"),
                )
            )
    return cases


CASES = _cases()
