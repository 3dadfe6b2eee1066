"""Triton kernels of `peft_kernels.layer_norm`; the math is there. x as (rows, features), row-major.

The variance is taken about the mean, in a second look at the row: mean(x²) - mean² loses everything where the mean is
large. Tiles, and the sums over rows for the parameters, are in `_rows`.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case
from ._rows import LOOP, _load_sum, _store_dx, _tiles, column_sums, tile


@triton.jit
def _scaled(centred, rstd, weight_ptr, bias_ptr, cols, features, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=cols < features, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < features, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    h_ptr,
    rows,
    features,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    APPLY: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """APPLY: mean and rstd are given, and y is made from them by the same instructions."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    live = first + row < rows
    x_ptr, y_ptr = x_ptr + first * features, y_ptr + first * features
    residual_ptr, h_ptr = residual_ptr + first * features, h_ptr + first * features
    mean_ptr, rstd_ptr = mean_ptr + first, rstd_ptr + first
    at = row[:, None] * features + cols[None, :]
    if WHOLE:
        mask = live[:, None] & (cols < features)[None, :]
        x = _load_sum(x_ptr, residual_ptr, at, mask, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(h_ptr + at, x, mask=mask)
        if APPLY:
            mean = tl.load(mean_ptr + row, mask=live, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
            centred = x - mean[:, None]
        else:
            mean = tl.sum(x, axis=1) / features
            centred = x - mean[:, None]
            rstd = tl.rsqrt(tl.sum(tl.where(mask, centred * centred, 0.0), axis=1) / features + eps)
            tl.store(mean_ptr + row, mean, mask=live)
            tl.store(rstd_ptr + row, rstd, mask=live)
        y = _scaled(centred, rstd, weight_ptr, bias_ptr, cols, features, HAS_WEIGHT, HAS_BIAS)
        tl.store(y_ptr + at, y, mask=mask)
    else:
        if APPLY:
            mean = tl.load(mean_ptr + row, mask=live, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
        else:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, features, BLOCK_N):
                mask = live[:, None] & (start + cols < features)[None, :]
                x = _load_sum(x_ptr, residual_ptr, at + start, mask, HAS_RESIDUAL)
                if HAS_RESIDUAL:
                    tl.store(h_ptr + at + start, x, mask=mask)
                total += x
            mean = tl.sum(total, axis=1) / features
            squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, features, BLOCK_N):
                mask = live[:, None] & (start + cols < features)[None, :]
                centred = _load_sum(x_ptr, residual_ptr, at + start, mask, HAS_RESIDUAL) - mean[:, None]
                squares += tl.where(mask, centred * centred, 0.0)
            rstd = tl.rsqrt(tl.sum(squares, axis=1) / features + eps)
            tl.store(mean_ptr + row, mean, mask=live)
            tl.store(rstd_ptr + row, rstd, mask=live)
        for start in range(0, features, BLOCK_N):
            mask = live[:, None] & (start + cols < features)[None, :]
            centred = _load_sum(x_ptr, residual_ptr, at + start, mask, HAS_RESIDUAL) - mean[:, None]
            y = _scaled(centred, rstd, weight_ptr, bias_ptr, start + cols, features, HAS_WEIGHT, HAS_BIAS)
            tl.store(y_ptr + at + start, y, mask=mask)


@triton.jit
def _load_pair(dy_ptr, x_ptr, weight_ptr, at, cols, mask, features, mean, rstd, HAS_WEIGHT: tl.constexpr):
    """t = dy ⊙ w and xhat, 0 where the mask is."""
    t = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        t *= tl.load(weight_ptr + cols, mask=cols < features, other=0.0).to(tl.float32)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return t, tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dh_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    rows,
    features,
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
    dh_ptr = dh_ptr + first * features
    at = row[:, None] * features + cols[None, :]
    mean = tl.load(mean_ptr + first + row, mask=live, other=0.0)
    rstd = tl.load(rstd_ptr + first + row, mask=live, other=0.0)
    if WHOLE:
        mask = live[:, None] & (cols < features)[None, :]
        t, xhat = _load_pair(dy_ptr, x_ptr, weight_ptr, at, cols, mask, features, mean, rstd, HAS_WEIGHT)
        mean_t, mean_product = tl.sum(t, axis=1) / features, tl.sum(t * xhat, axis=1) / features
        dx = (t - mean_t[:, None] - xhat * mean_product[:, None]) * rstd[:, None]
        _store_dx(dx_ptr, dh_ptr, at, mask, dx, HAS_DH)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, features, BLOCK_N):
            mask = live[:, None] & (start + cols < features)[None, :]
            t, xhat = _load_pair(
                dy_ptr, x_ptr, weight_ptr, at + start, start + cols, mask, features, mean, rstd, HAS_WEIGHT
            )
            total += t
            products += t * xhat
        mean_t, mean_product = tl.sum(total, axis=1) / features, tl.sum(products, axis=1) / features
        for start in range(0, features, BLOCK_N):
            mask = live[:, None] & (start + cols < features)[None, :]
            t, xhat = _load_pair(
                dy_ptr, x_ptr, weight_ptr, at + start, start + cols, mask, features, mean, rstd, HAS_WEIGHT
            )
            dx = (t - mean_t[:, None] - xhat * mean_product[:, None]) * rstd[:, None]
            _store_dx(dx_ptr, dh_ptr, at + start, mask, dx, HAS_DH)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    given: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, features = x.contiguous(), x.shape[-1]
    rows, y = x.numel() // features, torch.empty_like(x)
    mean, rstd = given or (x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2))
    h = x.new_empty(0) if residual is None else torch.empty_like(x)
    if rows:
        constants = tile(features)
        _forward_kernel[(triton.cdiv(rows, constants["BLOCK_M"]),)](
            x,
            x if residual is None else residual.contiguous(),
            x if weight is None else weight.contiguous(),
            x if bias is None else bias.contiguous(),
            y,
            mean,
            rstd,
            h,
            rows,
            features,
            eps,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            APPLY=given is not None,
            **constants,
        )
    return y, mean, rstd, h


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, h); h is empty without a residual."""
    return _launch(x, residual, weight, bias, None, eps)


def launch_apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y of the forward, bit for bit, from what it saved."""
    return _launch(x, None, weight, bias, (mean.contiguous(), rstd.contiguous()), 0.0)[0]


def launch_backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db); dw, db in fp32, empty unless needed. dx includes dh, the gradient that arrives at h."""
    dy, x, features = dy.contiguous(), x.contiguous(), x.shape[-1]
    dx, rows = torch.empty_like(x), x.numel() // features
    if rows:
        constants = tile(features)
        _backward_kernel[(triton.cdiv(rows, constants["BLOCK_M"]),)](
            dy,
            x if dh is None else dh.contiguous(),
            x,
            mean,
            rstd,
            x if weight is None else weight.contiguous(),
            dx,
            rows,
            features,
            HAS_DH=dh is not None,
            HAS_WEIGHT=weight is not None,
            **constants,
        )
    return dx, *column_sums(dy, x, mean, rstd, need_weight, need_bias)


def _cases() -> list[Case]:
    cases = []
    sizes = {"rows": "i32", "features": "i32"}
    statistics = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    for kind in ("bf16", "fp32"):
        forward = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr", "h_ptr")
        backward = ("dy_ptr", "dh_ptr", "x_ptr", "weight_ptr", "dx_ptr")
        for name, constants, warps in _tiles():
            # with the statistics given there is less to do: compiled at the widest tile and in the loop
            for applied in (False, True) if constants["BLOCK_N"] >= LOOP else (False,):
                flags = {"HAS_RESIDUAL": not applied, "HAS_WEIGHT": True, "HAS_BIAS": True, "APPLY": applied}
                cases.append(
                    Case(
                        kernel=_forward_kernel,
                        label=f"{kind} {name}{' apply' if applied else ''}",
                        signature={**dict.fromkeys(forward, f"*{kind}"), **statistics, **sizes, "eps": "fp32"},
                        constants={**flags, **constants},
                        num_warps=warps,
                        aligned=(*forward, *statistics, "features"),
                    )
                )
            cases.append(
                Case(
                    kernel=_backward_kernel,
                    label=f"{kind} {name}",
                    signature={**dict.fromkeys(backward, f"*{kind}"), **statistics, **sizes},
                    constants={"HAS_DH": True, "HAS_WEIGHT": True, **constants},
                    num_warps=warps,
                    aligned=(*backward, *statistics, "features"),
                )
            )
    return cases


CASES = _cases()
