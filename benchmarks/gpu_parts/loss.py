"""Part `loss`: cross-entropy from hidden states, forward and backward, against torch and Liger: time and peak memory.

The floor is what every way has to multiply: 4MHV FLOPs with a frozen head (logits, dh), 6MHV with a trained one, at the
measured matmul rate. `of_floor` is the time as a multiple of it; KERNELS' goal is 1.05.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.linear_cross_entropy import linear_cross_entropy

from .bench import Bench, Check, Run, compare, optional

VOCABULARY = 128256
IGNORED = -100


def run(bench: Bench) -> None:
    for M, H, trained in bench.small(
        ((8192, 4096, False), (8192, 2048, False), (8192, 2048, True), (2048, 4096, False), (2048, 2048, False),
         (512, 4096, False), (512, 2048, False)),
        ((40, 16, False), (40, 16, True)),
    ):  # fmt: skip
        bench.room()
        loss_cell(bench, M, H, bench.small(VOCABULARY, 160), trained)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """transformers' causal loss: logits, a float32 copy, the mean over what is not ignored."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=IGNORED)


def chunked_truth(hidden: Tensor, weight: Tensor, targets: Tensor, trained: bool, rows: int = 1024) -> list[Tensor]:
    """Loss and gradients in a wider dtype, some rows at a time: the whole would not fit."""
    high = torch.float64 if hidden.dtype == torch.float32 else torch.float32
    wide = weight.detach().to(high).requires_grad_(trained)
    total, grads = hidden.new_zeros((), dtype=high), []
    count = (targets != IGNORED).sum()
    dW = torch.zeros_like(wide) if trained else None
    for start in range(0, hidden.shape[0], rows):
        h = hidden[start : start + rows].detach().to(high).requires_grad_()
        logits = F.linear(h, wide)
        loss = F.cross_entropy(logits, targets[start : start + rows], ignore_index=IGNORED, reduction="sum") / count
        found = torch.autograd.grad(loss, [h, wide] if trained else [h])
        grads.append(found[0])
        if dW is not None:
            dW += found[1]
        total += loss.detach()
    return [total, torch.cat(grads), *([] if dW is None else [dW])]


def loss_cell(bench: Bench, M: int, H: int, V: int, trained: bool) -> None:
    torch.manual_seed(0)
    options = {"device": bench.device, "dtype": bench.dtype}
    weight = (torch.randn(V, H, **options) * H**-0.5).requires_grad_(trained)  # type: ignore[arg-type]
    hidden = torch.randn(M, H, **options).requires_grad_()  # type: ignore[arg-type]
    targets = torch.randint(0, V, (M,), device=bench.device)
    targets[::7] = IGNORED
    wanted = [hidden, weight] if trained else [hidden]

    def work(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    def ours(i: int) -> list[Tensor]:
        return work(linear_cross_entropy(hidden, weight, targets, reduction="mean", backend=bench.backend))

    def liger() -> Run:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        function = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)
        return lambda i: work(function(weight, hidden, targets))

    contenders: dict[str, Run] = {"ours": ours, "torch": lambda i: work(plain(hidden, weight, targets))}
    contenders |= optional(bench, "liger", liger)
    flops = (6 if trained else 4) * M * H * V

    def check() -> list[Check]:
        truth = chunked_truth(hidden, weight, targets, trained)
        beside, got = work(plain(hidden, weight, targets)), ours(0)
        return [compare(["loss", "dhidden", "dweight"][: len(truth)], truth, beside, got, torch.finfo(bench.dtype).eps)]

    bench.cell(
        "linear_cross_entropy",
        {"M": M, "H": H, "V": V, "head": "trained" if trained else "frozen"},
        contenders,
        check=check,
        versus={"ours": [name for name in contenders if name != "ours"]},
        facts={"floor_ms": bench.floor_ms(flops, 0), "flops": flops},
        memory=True,
        more=lambda name, ms: {"of_floor": ms / bench.floor_ms(flops, 0)},
    )
