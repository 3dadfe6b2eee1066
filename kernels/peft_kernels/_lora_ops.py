"""The products of `lora_linear`, each on both backends. 2-D tensors, x (M, K); see `lora_linear` for the math."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _compiled as compiled
from .dropout import drop_into, dropped, keep_rate


def base(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x·Wᵀ + b (M, N) by the vendor's GEMM, in a buffer of our own."""
    right = weight if transposed else weight.t()
    return torch.mm(x, right) if bias is None else torch.addmm(bias, x, right)


def base_back(dy: Tensor, weight: Tensor, dx: Tensor | None, transposed: bool) -> Tensor:
    """dx + dy·W (M, K), added in place where there is a dx already."""
    right = weight.t() if transposed else weight
    return torch.mm(dy, right) if dx is None else dx.addmm_(dy, right)


def down(x: Tensor, a: Tensor, p: float, seeds: Tensor | None, salt: int, triton: bool) -> Tensor:
    """S = dropout(x)·Aᵀ (M, r)."""
    if triton:
        return _down(x, a, p, seeds, salt)
    if p == 0:
        return torch.mm(x, a.t())
    assert seeds is not None
    buffer = x.new_empty(x.numel() + 1)
    kept = drop_into(buffer, x, dropped(seeds, salt, x.numel() // max(1, seeds.numel()), p))
    return torch.mm(kept, a.t()).mul_(1 / keep_rate(p, triton))


def add_up(y: Tensor, low: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + s·S·Bᵀ: into y itself where the dtypes agree, else in the adapter's dtype and rounded once."""
    if y.dtype == low.dtype:
        return y.addmm_(low, b.t(), alpha=scale)
    return torch.addmm(y.to(low.dtype), low, b.t(), alpha=scale).to(y.dtype)


def up_back(
    dy: Tensor, b: Tensor, low: Tensor | None, scale: float, triton: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """dS = s·dy·B (M, r), into `out` where given; dB = s·dyᵀ·S (N, r), None without S."""
    if triton and low is not None:
        d_low, db = _ds_db(dy, b, low, scale)
        return (d_low if out is None else out.copy_(d_low)), db
    d_low = (torch.mm(dy, b) if out is None else torch.mm(dy, b, out=out)).mul_(scale)
    if low is None:
        return d_low, None
    return d_low, torch.mm(low.t(), dy).t().mul(scale)  # (r, N) runs twice as fast here as (N, r)


def down_back(
    d_low: Tensor,
    x: Tensor | None,
    a: Tensor,
    dx: Tensor | None,
    p: float,
    seeds: Tensor | None,
    salt: int,
    triton: bool,
) -> Tensor | None:
    """dA = dSᵀ·dropout(x) (r, K), None without x; adds mask ⊙ (dS·A) / keep_rate into dx where there is one."""
    if triton:
        da = None if x is None else _da(d_low, x, p, seeds, salt)
        if dx is not None:
            _add_dx(dx, d_low, a, p, seeds, salt)
        return da
    if p == 0:
        da = None if x is None else torch.mm(d_low.t(), x)
        if dx is not None:
            dx.addmm_(d_low, a) if dx.dtype == a.dtype else dx.add_(torch.mm(d_low, a))
        return da
    assert seeds is not None
    rows, features = d_low.shape[0], a.shape[1]
    buffer = a.new_empty(rows * features + 1)
    indices = dropped(seeds, salt, rows // max(1, seeds.numel()) * features, p)
    d_low = d_low / keep_rate(p, triton)
    da = None if x is None else torch.mm(d_low.t(), drop_into(buffer, x, indices))
    if dx is not None:
        torch.mm(d_low, a, out=buffer[:-1].view(rows, features))
        buffer.index_fill_(0, indices, 0)
        dx.add_(buffer[:-1].view(rows, features))
    return da


def down_sparse(x: Tensor, a: Tensor, p: float, seeds: Tensor | None, ranks: Sequence[tuple[int, int]]) -> Tensor:
    """S (M, R) of adapters with masks of their own: x·Aᵀ of all, less what the dropped elements gave.

    Args:
        a: (R, K), the A's above each other; fp32 on a CPU with compiled passes, as x.
        ranks: (rank, salt) of each.
    """
    assert seeds is not None
    low, up, first = torch.mm(x, a.t()), a.t().contiguous(), 0
    for rank, salt in ranks:
        own, places = slice(first, first + rank), _places(x.shape[0], x.shape[1], p, seeds, salt)
        compiled.call(
            "drop_down", places, seeds.numel(), places.numel() // max(1, seeds.numel()), *x.shape, x, compiled.pitch(x),
            up[:, own], up.shape[1], rank, low[:, own], low.shape[1],
        )  # fmt: skip
        first += rank
    return low.mul_(1 / keep_rate(p, False))


def down_back_sparse(
    d_low: Tensor,
    x: Tensor | None,
    a: Tensor,
    dx: Tensor | None,
    p: float,
    seeds: Tensor | None,
    ranks: Sequence[tuple[int, int]],
) -> Tensor | None:
    """`down_back` of such adapters: dA (R, K), None without x; adds Σ mask ⊙ (dS·A) / keep_rate into dx."""
    assert seeds is not None
    d_low = d_low / keep_rate(p, False)
    rows, features = d_low.shape[0], a.shape[1]
    da = None if x is None else torch.mm(d_low.t(), x)
    if dx is not None:
        dx.addmm_(d_low, a)
    up, first = a.t().contiguous(), 0
    pieces = min(torch.get_num_threads(), max(1, seeds.numel()))
    for rank, salt in ranks:
        own, places = slice(first, first + rank), _places(rows, features, p, seeds, salt)
        sums = None if x is None else torch.zeros(pieces, features, rank)
        compiled.call(
            "drop_back", places, seeds.numel(), places.numel() // max(1, seeds.numel()), rows, features,
            x, 0 if x is None else compiled.pitch(x), d_low[:, own], d_low.shape[1], up[:, own], up.shape[1], rank,
            dx, 0 if dx is None else compiled.pitch(dx), sums, pieces,
        )  # fmt: skip
        if da is not None and sums is not None:
            da[own] -= sums.sum(0).t()
        first += rank
    return da


def _places(rows: int, features: int, p: float, seeds: Tensor, salt: int) -> Tensor:
    return dropped(seeds, salt, rows // max(1, seeds.numel()) * features, p, True)


@torch.library.custom_op("peft_kernels::lora_down", mutates_args=())
def _down(x: Tensor, a: Tensor, p: float, seeds: Tensor | None, salt: int) -> Tensor:
    from .gpu.lora_linear import launch_down

    return launch_down(x.contiguous(), a.contiguous(), p, seeds, _rows_per_sample(x, seeds), salt)


@_down.register_fake
def _(x: Tensor, a: Tensor, p: float, seeds: Tensor | None, salt: int) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("peft_kernels::lora_ds_db", mutates_args=())
def _ds_db(dy: Tensor, b: Tensor, low: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from .gpu.lora_linear import launch_ds_db

    return launch_ds_db(dy.contiguous(), b.contiguous(), low.contiguous(), scale)


@_ds_db.register_fake
def _(dy: Tensor, b: Tensor, low: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return low.new_empty(low.shape), torch.empty(b.shape, dtype=torch.float32, device=b.device)


@torch.library.custom_op("peft_kernels::lora_da", mutates_args=())
def _da(d_low: Tensor, x: Tensor, p: float, seeds: Tensor | None, salt: int) -> Tensor:
    from .gpu.lora_linear import launch_da

    return launch_da(d_low.contiguous(), x.contiguous(), p, seeds, _rows_per_sample(x, seeds), salt)


@_da.register_fake
def _(d_low: Tensor, x: Tensor, p: float, seeds: Tensor | None, salt: int) -> Tensor:
    return torch.empty(d_low.shape[1], x.shape[1], dtype=torch.float32, device=x.device)


@torch.library.custom_op("peft_kernels::lora_add_dx", mutates_args=("dx",))
def _add_dx(dx: Tensor, d_low: Tensor, a: Tensor, p: float, seeds: Tensor | None, salt: int) -> None:
    from .gpu.lora_linear import launch_dx

    launch_dx(dx, d_low.contiguous(), a.contiguous(), p, seeds, _rows_per_sample(dx, seeds), salt)


def _rows_per_sample(x: Tensor, seeds: Tensor | None) -> int:
    return x.shape[0] // max(1, 1 if seeds is None else seeds.numel())
