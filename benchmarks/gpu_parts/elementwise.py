"""Part `elementwise`: ops that move bytes and multiply no matrices, against torch, torch.compile and Liger.

The floor is the fewest bytes (each input read once, each output written once, forward and backward) at the measured
copy rate. The sum of kernel times (device ms) is the number to set beside it: at M=512 the host is what is waited for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .bench import Bench, Check, Run, compare, compiled, optional

Op = Callable[..., Any]
EPS = 1e-5


@dataclass(frozen=True)
class Job:
    """One op at one size.

    Attributes:
        make: one set of inputs: tensors; those that require grad get a gradient.
        ours, plain: the contenders, called with a set.
        elements: tensor elements read and written at least, forward and backward.
        truth: the definition for the check, where `plain` draws random numbers.
        liger: imports Liger's op and gives it in the same form.
    """

    name: str
    settings: dict[str, Any]
    make: Callable[[], tuple[Tensor, ...]]
    ours: Op
    plain: Op
    elements: int
    truth: Op | None = None
    liger: Callable[[], Op] | None = None


def run(bench: Bench) -> None:
    for M in bench.small((8192, 2048, 512), (32,)):
        for hidden, inner, heads in bench.small(((4096, 14336, 32), (2048, 8192, 32)), ((48, 40, 4),)):
            for kind in (glu_job, rms_norm_job, residual_job, rope_job, dropout_job, layer_norm_job, magnify_job):
                bench.room()
                job = kind(bench, M, {"hidden": hidden, "inner": inner, "heads": heads})
                measure(bench, job, compile_too=M in (8192, 32))


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def step(op: Op, sets: Sequence[tuple[Tensor, ...]], dys: Sequence[Tensor]) -> Run:
    def work(i: int) -> list[Tensor]:
        inputs = sets[i % len(sets)]
        made = outputs(op(*inputs))
        wanted = [t for t in inputs if t.requires_grad]
        return [*(t.detach() for t in made), *torch.autograd.grad(made, wanted, dys)]

    return work


def copies(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same values in new leaves; what is narrower than `dtype` gets it."""

    def one(t: Tensor) -> Tensor:
        kind = torch.promote_types(t.dtype, dtype) if t.is_floating_point() else t.dtype
        return t.detach().to(kind, copy=True).requires_grad_(t.requires_grad)

    return tuple(one(t) for t in inputs)


def measure(bench: Bench, job: Job, *, compile_too: bool) -> None:
    torch.manual_seed(0)
    first = job.make()
    own_bytes = sum(t.numel() * t.element_size() for t in first)
    sets = [first, *(job.make() for _ in range(bench.sets(own_bytes) - 1))]
    dys = [torch.randn_like(t) for t in outputs(job.plain(*first))]
    contenders = {"ours": step(job.ours, sets, dys), "torch": step(job.plain, sets, dys)}
    if compile_too:
        contenders["compiled"] = step(compiled(bench, job.plain), sets, dys)
    if job.liger:
        # Some of Liger's ops write over what they were given: copies of its own.
        own = [copies(one, bench.dtype) for one in sets]
        contenders |= optional(bench, f"liger {job.name}", lambda: step(job.liger(), own, dys))  # type: ignore[misc]

    def check() -> list[Check]:
        high = torch.float64 if bench.dtype == torch.float32 else torch.float32
        plain = job.truth or job.plain
        wide = step(plain, [copies(first, high)], [t.to(high) for t in dys])(0)
        beside, ours = step(plain, [first], dys)(0), contenders["ours"](0)
        names = [f"{job.name} {i}" for i in range(len(list(wide)))]  # type: ignore[call-overload]
        return [compare(names, wide, beside, ours, torch.finfo(bench.dtype).eps)]  # type: ignore[arg-type]

    moved = job.elements * first[0].element_size()
    bench.cell(
        job.name,
        job.settings,
        contenders,
        check=check,
        versus={"ours": [name for name in contenders if name != "ours"]},
        facts={"floor_ms": bench.floor_ms(0, moved), "bytes": moved},
        memory=True,
    )


def _random(bench: Bench, *shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=bench.dtype).requires_grad_(grad)


def glu_job(bench: Bench, M: int, sizes: dict[str, int]) -> Job:
    from peft_kernels.glu import glu

    def liger() -> Op:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply

    inner = sizes["inner"]
    return Job(
        name="glu",
        settings={"M": M, "D": inner},
        make=lambda: (_random(bench, M, inner), _random(bench, M, inner)),
        ours=lambda gate, up: glu(gate, up, backend=bench.backend),
        plain=lambda gate, up: F.silu(gate) * up,
        elements=8 * M * inner,
        liger=liger,
    )


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    """transformers' LlamaRMSNorm: normalised in fp32, rounded, then weighted."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rms_norm_job(bench: Bench, M: int, sizes: dict[str, int]) -> Job:
    from peft_kernels.rms_norm import rms_norm

    def liger() -> Op:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)

    hidden = sizes["hidden"]
    return Job(
        name="rms_norm",
        settings={"M": M, "H": hidden},
        make=lambda: (_random(bench, M, hidden), _random(bench, hidden, grad=False)),
        ours=lambda x, w: rms_norm(x, w, EPS, backend=bench.backend),
        plain=llama_norm,
        elements=5 * M * hidden,
        liger=liger,
    )


def residual_job(bench: Bench, M: int, sizes: dict[str, int]) -> Job:
    from peft_kernels.rms_norm import rms_norm

    def plain(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return llama_norm(total, w), total

    hidden = sizes["hidden"]
    return Job(
        name="rms_norm of a sum",
        settings={"M": M, "H": hidden},
        make=lambda: (_random(bench, M, hidden), _random(bench, M, hidden), _random(bench, hidden, grad=False)),
        ours=lambda x, residual, w: rms_norm(x, w, EPS, residual=residual, backend=bench.backend),
        plain=plain,
        elements=8 * M * hidden,
    )


def layer_norm_job(bench: Bench, M: int, sizes: dict[str, int]) -> Job:
    from peft_kernels.layer_norm import layer_norm

    def liger() -> Op:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS)

    hidden = sizes["hidden"]
    return Job(
        name="layer_norm",
        settings={"M": M, "H": hidden},
        make=lambda: (_random(bench, M, hidden), *(_random(bench, hidden, grad=False) for _ in range(2))),
        ours=lambda x, w, b: layer_norm(x, w, b, EPS, backend=bench.backend),
        plain=lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS),
        elements=5 * M * hidden,
        liger=liger,
    )


def rope_job(bench: Bench, M: int, sizes: dict[str, int]) -> Job:
    from peft_kernels.rope import rope

    def liger() -> Op:
        from liger_kernel.ops.rope import LigerRopeFunction

        return LigerRopeFunction.apply

    heads, width = sizes["heads"], sizes["hidden"] // sizes["heads"]
    shared, length = max(1, heads // 4), min(M, 2048)

    def make() -> tuple[Tensor, ...]:
        angle = torch.rand(1, length, width // 2, device=bench.device).mul_(6.3).repeat(1, 1, 2)
        q, k = (
            _random(bench, M // length, length, count, width, grad=False).transpose(1, 2).requires_grad_()
            for count in (heads, shared)
        )
        return q, k, angle.cos().to(bench.dtype), angle.sin().to(bench.dtype)

    return Job(
        name="rope",
        settings={"B": M // length, "T": length, "heads": heads, "kv": shared, "D": width},
        make=make,
        ours=lambda q, k, cos, sin: rope(q, k, cos, sin, backend=bench.backend),
        plain=apply_rotary_pos_emb,
        elements=4 * M * (heads + shared) * width,
        liger=liger,
    )


def dropout_job(bench: Bench, M: int, sizes: dict[str, int]) -> Job:
    from peft_kernels.dropout import dropout, keep_mask, keep_rate

    hidden, p, salt = sizes["hidden"], 0.05, 3
    samples = max(1, M // 512)

    def make() -> tuple[Tensor, ...]:
        seeds = torch.randint(-(2**62), 2**62, (samples,), device=bench.device)
        return _random(bench, samples, M // samples, hidden), seeds

    def truth(x: Tensor, seeds: Tensor) -> Tensor:
        like = x.detach().to(bench.dtype)
        return x * keep_mask(like, p, seeds, salt, backend=bench.backend) / keep_rate(p, bench.backend == "triton")

    return Job(
        name="dropout",
        settings={"M": M, "K": hidden, "p": p},
        make=make,
        ours=lambda x, seeds: dropout(x, p, seeds, salt, backend=bench.backend),
        plain=lambda x, seeds: F.dropout(x, p),
        elements=4 * M * hidden,
        truth=truth,
    )


def magnify_job(bench: Bench, M: int, sizes: dict[str, int]) -> Job:
    from peft_kernels.dora import magnify

    hidden = sizes["hidden"]

    def make() -> tuple[Tensor, ...]:
        norm = torch.rand(hidden, device=bench.device).add_(0.5)
        return _random(bench, M, hidden), norm.clone().mul_(1.1).requires_grad_(), norm

    def plain(z: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
        return (z * (magnitude / norm)).to(z.dtype)

    return Job(
        name="dora magnify",
        settings={"M": M, "N": hidden},
        make=make,
        ours=lambda z, magnitude, norm: magnify(z, magnitude, norm, None, backend=bench.backend),
        plain=plain,
        elements=5 * M * hidden,
    )
