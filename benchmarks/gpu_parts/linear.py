"""Part `linear`: forward and backward of one LoRA linear against PEFT's, and each of its kernels against cuBLAS.

The floor is 4MNK + 6Mr(K+N) FLOPs at the measured matmul rate plus (4MK + 2MN) bytes at the measured copy rate: the
frozen products, and the least that the low-rank branch reads and writes beside them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_kernels.dropout import keep_mask, keep_rate
from peft_kernels.lora_linear import Adapter, Projection, lora_linear

from .bench import Bench, Check, Run, compare, compiled

# (K, N) of Llama-3.1-8B and Llama-3.2-1B, the telling ones first
SHAPES = (
    (4096, 4096),
    (2048, 2048),
    (4096, 14336),
    (14336, 4096),
    (2048, 8192),
    (8192, 2048),
    (4096, 1024),
    (2048, 512),
)
RANK, SCALE, SALT = 16, 2.0, 7
ROWS_PER_SAMPLE = 512


def run(bench: Bench) -> None:
    shapes = bench.small(SHAPES, ((48, 32),))
    for K, N in shapes[:4]:
        for p in (0.05, 0.0):
            layer_cell(bench, bench.small(8192, 64), K, N, p, compile_too=True)
    for M in bench.small((8192, 2048, 512), (64,)):
        for K, N in shapes[:2]:
            kernel_cells(bench, M, K, N)
    for M in bench.small((8192, 2048, 512), ()):
        for p in (0.05, 0.0):
            for K, N in shapes[4:] if M == 8192 else shapes:
                layer_cell(bench, M, K, N, p, compile_too=False)
    for M in bench.small((8192, 2048, 512), ()):
        for K, N in shapes[2:]:
            kernel_cells(bench, M, K, N)


class _Inputs:
    """Weights, and enough sets of x and dy that the cache holds none of them."""

    def __init__(self, bench: Bench, M: int, K: int, N: int) -> None:
        torch.manual_seed(0)
        options: Any = {"device": bench.device, "dtype": bench.dtype}
        per_sample = min(ROWS_PER_SAMPLE, M // 2)
        samples, count = M // per_sample, bench.sets(2 * M * (K + N))
        self.weight = torch.randn(N, K, **options) * K**-0.5
        self.A, self.B = torch.randn(RANK, K, **options) * K**-0.5, torch.randn(N, RANK, **options) * RANK**-0.5
        self.xs = [torch.randn(samples, per_sample, K, **options).requires_grad_() for _ in range(count)]
        self.dys = [torch.randn(samples, per_sample, N, **options) for _ in range(count)]
        self.seeds = torch.randint(-(2**62), 2**62, (samples,), device=bench.device)
        self.per_sample = per_sample

    def mask(self, bench: Bench, p: float) -> Tensor:
        """0 or 1/keep_rate, as our backend draws it for the first set; wider than the work, as 1/0.95 fits no bf16."""
        kept = keep_mask(self.xs[0].detach(), p, self.seeds, SALT, backend=bench.backend)
        return kept.to(wider(bench.dtype)) / keep_rate(p, bench.backend == "triton")


def wider(dtype: torch.dtype) -> torch.dtype:
    """What truth is computed in."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def autocast(bench: Bench, on: bool) -> AbstractContextManager[Any]:
    return torch.autocast(bench.device.type, torch.bfloat16) if on else nullcontext()


def ours(bench: Bench, data: _Inputs, p: float, wide: bool) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """Our layer and its trained tensors; `wide`: adapters in fp32 under autocast, PEFT's default."""
    dtype = torch.float32 if wide else bench.dtype
    A, B = (t.to(dtype, copy=True).requires_grad_() for t in (data.A, data.B))
    layer = Projection(data.weight, adapters=(Adapter(A, B, SCALE, p, SALT),))
    return lambda x: lora_linear(x, layer, data.seeds, backend=bench.backend), [A, B]


class _One(nn.Module):
    """The smallest model that PEFT adapts."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.proj.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def peft_layer(bench: Bench, data: _Inputs, p: float, wide: bool) -> tuple[nn.Module, list[Tensor]]:
    """PEFT's Linear with the same weights."""
    config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), lora_dropout=p, target_modules=["proj"])
    layer = get_peft_model(_One(data.weight), config, autocast_adapter_dtype=False).base_model.model.proj
    dtype = torch.float32 if wide else bench.dtype
    trained = []
    for pair, value in ((layer.lora_A, data.A), (layer.lora_B, data.B)):
        pair["default"].weight = nn.Parameter(value.to(dtype, copy=True))
        trained.append(pair["default"].weight)
    return layer.train(), trained


def step(bench: Bench, data: _Inputs, layer: Callable[[Tensor], Tensor], trained: list[Tensor], wide: bool) -> Run:
    def work(i: int) -> list[Tensor]:
        x, dy = data.xs[i % len(data.xs)], data.dys[i % len(data.dys)]
        with autocast(bench, wide):
            y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))]

    return work


def layer_cell(bench: Bench, M: int, K: int, N: int, p: float, *, compile_too: bool) -> None:
    bench.room(30 if compile_too and not bench.smoke else 0)
    data = _Inputs(bench, M, K, N)
    contenders: dict[str, Run] = {}
    for wide, kind in ((True, "fp32 adapters, autocast"), (False, "narrow adapters")):
        mine, mine_trained = ours(bench, data, p, wide)
        theirs, their_trained = peft_layer(bench, data, p, wide)
        contenders[f"ours, {kind}"] = step(bench, data, mine, mine_trained, wide)
        contenders[f"peft, {kind}"] = step(bench, data, theirs, their_trained, wide)
        if compile_too:
            contenders[f"peft compiled, {kind}"] = step(bench, data, compiled(bench, theirs), their_trained, wide)
    flops = 4 * M * N * K + 6 * M * RANK * (K + N)
    bench.cell(
        "lora_linear forward+backward",
        {"M": M, "K": K, "N": N, "r": RANK, "p": p},
        contenders,
        check=lambda: list(layer_checks(bench, data, p, contenders)),
        versus={
            name: [name.replace("ours", other) for other in ("peft", "peft compiled")]
            for name in contenders
            if name.startswith("ours")
        },
        facts={"floor_ms": bench.floor_ms(flops, 4 * M * K + 2 * M * N), "flops": flops},
        memory=True,
    )


def layer_checks(bench: Bench, data: _Inputs, p: float, contenders: dict[str, Run]) -> Iterator[Check]:
    """Our timed runs against the definition in a wider dtype with the mask that was drawn; plain torch beside them."""
    mask = data.mask(bench, p) if p else None

    def plain(dtype: torch.dtype, adapter_dtype: torch.dtype, wide: bool) -> list[Tensor]:
        x = data.xs[0].detach().to(dtype).requires_grad_()
        A, B = (t.detach().to(adapter_dtype).requires_grad_() for t in (data.A, data.B))
        with autocast(bench, wide):
            dropped = (x if mask is None else x * mask).to(A.dtype)
            y = F.linear(x, data.weight.to(dtype)) + F.linear(F.linear(dropped, A), B) * SCALE
        return [y.detach(), *torch.autograd.grad(y, [x, A, B], data.dys[0].to(y.dtype))]

    truth = plain(wider(bench.dtype), wider(bench.dtype), False)
    for name, run in contenders.items():
        if name.startswith("ours"):
            wide = "autocast" in name
            beside = plain(bench.dtype, torch.float32 if wide else bench.dtype, wide)
            labels = [f"{what} ({name})" for what in ("y", "dx", "dA", "dB")]
            eps = torch.finfo(torch.bfloat16 if wide else bench.dtype).eps
            yield compare(labels, truth, beside, run(0), eps)  # type: ignore[arg-type]


def kernel_cells(bench: Bench, M: int, K: int, N: int) -> None:
    """Each Triton kernel against the cuBLAS products that would do its job: what the dispatch table is filled from."""
    data = _Inputs(bench, M, K, N)
    x, dy = (t[0].detach().flatten(0, 1) for t in (data.xs, data.dys))
    S, dS = (torch.randn(M, RANK, device=bench.device, dtype=bench.dtype) for _ in range(2))
    A, B, W = data.A, data.B, data.weight
    for p in (0.0, 0.05):
        mask = data.mask(bench, p).flatten(0, 1) if p else None
        ours_by_name = triton_kernels(bench, data, x, dy, S, dS, p)
        # name → the cuBLAS way, its inputs, FLOPs, bytes
        given: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], float, float]] = {
            "down": (down, (x, A), 2 * M * K * RANK, 2 * M * K),
            "da": (lambda dS, x, mask=None: down(x.T, dS.T, None if mask is None else mask.T).T, (dS, x),
                   2 * M * K * RANK, 2 * M * K),
            "dx": (add_dx, (dy.new_zeros(M, K), dS, A), 2 * M * K * RANK, 4 * M * K),
            "seeded_dgemm": (seeded_dgemm, (dy, W, dS, A), 2 * M * N * K, 2 * M * (N + K)),
        }  # fmt: skip
        if not p:
            given["ds_db"] = (ds_db, (dy, B, S), 4 * M * N * RANK, 2 * M * N)
            given["seeded_gemm"] = (seeded_gemm, (x, W, S, B), 2 * M * N * K, 2 * M * (K + N))
        for name, (plain, inputs, flops, moved) in given.items():
            settings = {"M": M, "K": K, "N": N, "p": p}
            floor = max(bench.floor_ms(flops, 0), bench.floor_ms(0, moved))
            kernel_cell(bench, name, settings, plain, inputs, mask, ours_by_name.get(name), floor)


def down(x: Tensor, A: Tensor, mask: Tensor | None = None) -> Tensor:
    return (x if mask is None else x * mask) @ A.T


def ds_db(dy: Tensor, B: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    return (dy @ B) * SCALE, (dy.T @ S) * SCALE


def seeded_gemm(x: Tensor, W: Tensor, S: Tensor, B: Tensor) -> Tensor:
    return (x @ W.T).addmm_(S, B.T, alpha=SCALE)


def add_dx(dX: Tensor, dS: Tensor, A: Tensor, mask: Tensor | None = None) -> Tensor:
    return dX.addmm_(dS, A) if mask is None else dX.addcmul_(dS @ A, mask)


def seeded_dgemm(dy: Tensor, W: Tensor, dS: Tensor, A: Tensor, mask: Tensor | None = None) -> Tensor:
    return add_dx(dy @ W, dS, A, mask)


def triton_kernels(
    bench: Bench, data: _Inputs, x: Tensor, dy: Tensor, S: Tensor, dS: Tensor, p: float
) -> dict[str, Callable[..., Any]]:
    """Launchers by name, called with the inputs that the plain way takes; none without CUDA."""
    if bench.device.type != "cuda":
        return {}
    from peft_kernels.gpu import lora_linear as gpu

    drawn = (p, data.seeds if p else None, data.per_sample, SALT)
    return {
        "down": lambda x, A: gpu.launch_down(x, A, *drawn),
        "ds_db": lambda dy, B, S: gpu.launch_ds_db(dy, B, S, SCALE),
        "da": lambda dS, x: gpu.launch_da(dS, x, *drawn),
        "dx": lambda dX, dS, A: (gpu.launch_dx(dX, dS, A, *drawn), dX)[1],
        "seeded_gemm": lambda x, W, S, B: gpu.launch_seeded_gemm(x, W, None, S, B, SCALE),
        "seeded_dgemm": lambda dy, W, dS, A: gpu.launch_seeded_dgemm(dy, W, dS, A, *drawn),
    }


def kernel_cell(
    bench: Bench,
    name: str,
    settings: dict[str, Any],
    plain: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    mask: Tensor | None,
    mine: Callable[..., Any] | None,
    floor_ms: float,
) -> None:
    extra = () if mask is None else (mask.to(bench.dtype),)

    def results(function: Callable[..., Any], dtype: torch.dtype, *more: Tensor) -> list[Tensor]:
        got = function(*(t.to(dtype, copy=True) for t in (*inputs, *more)))
        return [t.clone() for t in (got if isinstance(got, tuple) else (got,))]

    def check() -> list[Check]:
        truth = results(plain, wider(bench.dtype), *(() if mask is None else (mask,)))
        beside = results(plain, bench.dtype, *extra)
        ours = results(mine, bench.dtype) if mine else beside
        names = [f"{name} {i}" for i in range(len(truth))]
        return [compare(names, truth, beside, ours, torch.finfo(bench.dtype).eps)]

    # The mask is handed to cuBLAS' side for nothing: a lower bound of what it takes without our kernel.
    contenders: dict[str, Run] = {"cublas": lambda i: plain(*inputs, *extra)}
    if mine:
        contenders["triton"] = lambda i: mine(*inputs)
    bench.cell(name, settings, contenders, check=check, versus={"triton": ["cublas"]}, facts={"floor_ms": floor_ms})
