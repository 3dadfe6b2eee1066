"""Part `quantised`: weights of bitsandbytes' 4 and 8 bits, unpacked, in one LoRA linear, in whole steps, for few rows.

Goals on an H100: unpacking nested NF4 at no less than 80% of the copy rate, so that it adds less than 5% to a linear of
8,192 rows; a LoRA linear over NF4, forward and backward, at least 1.3 times as fast as PEFT's over bitsandbytes'.

Green means: unpacked numbers have bitsandbytes' bits; y, dx, dA and dB are no further than plain torch in the same
dtype from the float32 (float64 in smoke) result on the same unpacked numbers; a step's loss and gradients are as near
to those of PEFT over the same codes as two ways of rounding through all layers are, within `STEP_BOUNDS`.

Few rows, as in generation: unpacking and multiplying beside bitsandbytes' own `gemm_4bit`, which reads codes in its
product: whether a path of its own for few rows pays on CUDA, as it does on a CPU (`_quantised_products.FEW_ROWS`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_kernels.lora_linear import Adapter, Projection, lora_linear
from peft_kernels.quantised_weight import QuantisedWeight

from .bench import Bench, Check, Run, compare, relative_error
from .linear import RANK, SALT, SCALE, SHAPES, _Inputs, ours, step, wider
from .step import LARGE, SMALL, TINY, Shape, llama, step_flops
from .training import Subject, adapted, fused, loss_and_gradients, plain

KINDS = ("nf4", "int8")
STEP_BOUNDS = (0.005, 0.05)  # relative, of the loss and of gradients, against the same codes in PEFT's layers
GOALS = {"lora_linear forward+backward": 1.3}


def run(bench: Bench) -> None:
    try:
        cells(bench)
    finally:  # the budget may end it anywhere
        tell_goals(bench)


def cells(bench: Bench) -> None:
    shapes = bench.small(SHAPES, ((64, 128),))
    for K, N in shapes[:4]:
        for kind in KINDS:
            unpack_cell(bench, kind, K, N)
    for K, N in shapes[:3]:
        layer_cell(bench, bench.small(8192, 64), K, N, 0.05)
    for shape, needs in bench.small(((SMALL, 60), (LARGE, 150)), ((TINY_BLOCKS, 0),)):
        step_cell(bench, shape, 0.05, needs)
    for K, N in shapes[:3]:
        for M in bench.small((1, 4, 16, 64, 256), (1, 4)):
            few_rows_cell(bench, M, K, N)
    for M in bench.small((2048, 512), ()):
        for K, N in shapes[:3]:
            layer_cell(bench, M, K, N, 0.05)


# whole blocks of 64 in every row: bitsandbytes' kernel on a CPU, where smoke runs, is wrong on others
TINY_BLOCKS = Shape("llama-tiny", 64, 2, 4, 2, 128, 96, TINY.tied, TINY.samples, TINY.length)


def tell_goals(bench: Bench) -> None:
    for name, goal in GOALS.items():
        cells = [cell["contenders"].get("ours nf4", {}) for cell in bench.cells if cell["cell"] == name]
        ratios = [one["faster_than"]["peft nf4"] for one in cells if "peft nf4" in one.get("faster_than", {})]
        if ratios:
            bench.note(f"{name}, ours nf4: {min(ratios):.2f} to {max(ratios):.2f}x peft nf4; goal {goal}x")


def quantised(weight: Tensor, kind: str) -> nn.Module:
    """bitsandbytes' linear with this weight (N, K), without bias."""
    import bitsandbytes as bnb

    N, K = weight.shape
    if kind == "int8":
        made: Any = bnb.nn.Linear8bitLt(K, N, False, has_fp16_weights=False, device="meta")
        made.weight = bnb.nn.Int8Params(weight.detach().cpu(), requires_grad=False).to(weight.device)
    else:
        made = bnb.nn.Linear4bit(K, N, False, weight.dtype, compress_statistics=True, quant_type=kind, device="meta")
        made.weight = bnb.nn.Params4bit(
            weight.detach().clone(), requires_grad=False, compress_statistics=True, quant_type=kind, module=made
        ).to(weight.device)
    made.support_avx512bf16_for_cpu = False  # its repacking on a CPU is not what is measured
    return made


def unpack_cell(bench: Bench, kind: str, K: int, N: int) -> None:
    """The unpacking alone, beside bitsandbytes' own."""
    import bitsandbytes as bnb

    weights = [quantised(torch.randn(N, K, device=bench.device, dtype=bench.dtype), kind).weight for _ in range(4)]
    held = [QuantisedWeight.from_parameter(p) for p in weights]  # type: ignore[arg-type]
    out = torch.empty(N, K, device=bench.device, dtype=bench.dtype)

    def theirs(i: int) -> Tensor:
        p: Any = weights[i % 4]
        if kind == "int8":
            return bnb.functional.int8_vectorwise_dequant(p.data, p.SCB).to(bench.dtype)
        return bnb.functional.dequantize_4bit(p.data, p.quant_state)

    def check() -> list[Check]:
        got, want = held[0].dequantise_into(out).clone(), theirs(0)
        return [Check(["numbers"], [0.0], [0.0 if torch.equal(got, want) else 1.0], 0.0)]

    moved = N * K * ((0.5 if kind == "nf4" else 1) + out.element_size())
    bench.cell(
        "unpack",
        {"kind": kind, "K": K, "N": N},
        {"ours": lambda i: held[i % 4].dequantise_into(out), "bitsandbytes": theirs},
        check=check,
        versus={"ours": ["bitsandbytes"]},
        facts={"floor_ms": bench.floor_ms(0, moved)},
        more=lambda _, ms: {"of_copy_rate": moved / ms * 1e3 / bench.ceilings["bytes_per_second"]},
    )


def peft_over(base: nn.Module, data: _Inputs, p: float) -> tuple[nn.Module, list[Tensor]]:
    """PEFT's LoRA layer on bitsandbytes' linear, adapters in the working dtype."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = base
            self.is_loaded_in_8bit = hasattr(base, "state")
            self.is_loaded_in_4bit = not self.is_loaded_in_8bit

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x)

    config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), lora_dropout=p, target_modules=["proj"])
    layer = get_peft_model(One(), config, autocast_adapter_dtype=False).base_model.model.proj
    trained = []
    for pair, value in ((layer.lora_A, data.A), (layer.lora_B, data.B)):
        pair["default"].weight = nn.Parameter(value.clone())
        trained.append(pair["default"].weight)
    return layer.train(), trained


def layer_cell(bench: Bench, M: int, K: int, N: int, p: float) -> None:
    """One LoRA linear against PEFT's over the same codes, and against ours over the weight itself."""
    bench.room(0 if bench.smoke else 20)
    data = _Inputs(bench, M, K, N)
    full, trained = ours(bench, data, p, wide=False)
    contenders: dict[str, Run] = {"ours full": step(bench, data, full, trained, wide=False)}
    checks: list[Callable[[], Iterator[Check]]] = []
    for kind in KINDS:
        base = quantised(data.weight, kind)
        held = QuantisedWeight.from_parameter(base.weight)  # type: ignore[arg-type]
        contenders[f"peft {kind}"] = step(bench, data, *peft_over(base, data, p), wide=False)
        A, B = (t.clone().requires_grad_() for t in (data.A, data.B))
        one = Projection(held, adapters=(Adapter(A, B, SCALE, p, SALT),))
        layer = lambda x, one=one: lora_linear(x, one, data.seeds, backend=bench.backend)  # noqa: E731
        contenders[f"ours {kind}"] = step(bench, data, layer, [A, B], wide=False)
        run = contenders[f"ours {kind}"]
        checks.append(lambda held=held, kind=kind, run=run: layer_check(bench, data, p, held, kind, run))
    flops = 4 * M * N * K + 6 * M * RANK * (K + N)
    bench.cell(
        "lora_linear forward+backward",
        {"M": M, "K": K, "N": N, "r": RANK, "p": p},
        contenders,
        check=lambda: [found for check in checks for found in check()],
        versus={f"ours {kind}": ["ours full", f"peft {kind}"] for kind in KINDS},
        facts={"floor_ms": bench.floor_ms(flops, 4 * M * K + 2 * M * N + 2 * N * K * 3), "flops": flops},
        memory=True,
    )


def layer_check(bench: Bench, data: _Inputs, p: float, held: QuantisedWeight, kind: str, run: Run) -> Iterator[Check]:
    """Our timed run against the definition in a wider dtype on the same unpacked numbers, plain torch beside it."""
    mask = data.mask(bench, p) if p else None

    def definition(dtype: torch.dtype) -> list[Tensor]:
        x = data.xs[0].detach().to(dtype).requires_grad_()
        A, B = (t.detach().to(dtype).requires_grad_() for t in (data.A, data.B))
        dropped = x if mask is None else (x * mask).to(dtype)
        y = F.linear(x, held.dequantised(dtype)) + F.linear(F.linear(dropped, A), B) * SCALE
        return [y.detach(), *torch.autograd.grad(y, [x, A, B], data.dys[0].to(dtype))]

    names = [f"{what} ({kind})" for what in ("y", "dx", "dA", "dB")]
    eps = torch.finfo(bench.dtype).eps
    yield compare(names, definition(wider(bench.dtype)), definition(bench.dtype), run(0), eps)  # type: ignore[arg-type]


def step_cell(bench: Bench, shape: Shape, p: float, needs: float) -> None:
    """Whole steps over NF4, fused beside PEFT's layers; fp32 adapters, gradient checkpointing as QLoRA has it."""
    bench.room(0 if bench.smoke else needs)
    made: Any = llama(bench, shape)
    for name, module in list(made.named_modules()):
        if type(module) is nn.Linear and module is not made.get_output_embeddings():
            made.set_submodule(name, quantised(module.weight, "nf4"))
    made.is_loaded_in_4bit = True
    model = adapted(made, p, task="CAUSAL_LM", wide=True)
    ids = torch.randint(0, shape.vocabulary, (shape.samples, shape.length), device=bench.device)
    flops = step_flops(_Counts(model), shape)
    subject = Subject(bench, model, {"input_ids": ids, "labels": ids.clone()}, True, flops, p > 0)
    short = {name: t[:1, :128] for name, t in subject.batch.items()}
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    bench.cell(
        "training step",
        {"model": shape.name, "tokens": f"{shape.samples}x{shape.length}", "p": p, "weights": "nf4"},
        {"peft nf4": plain(subject, subject.step()), "ours nf4": fused(subject, subject.step())},
        check=lambda: step_check(subject, short),
        versus={"ours nf4": ["peft nf4"]},
        facts={"floor_ms": bench.floor_ms(flops, 0), "flops": flops},
        memory=True,
        rounds=5,
        more=subject.rates,
    )
    bench.note(f"{shape.name}, nf4: {subject.told()}")


class _Counts:
    """Parameters of a model by what trains, codes counted as the weights that they stand for."""

    def __init__(self, model: nn.Module) -> None:
        self.found = []
        for parameter in model.parameters():
            state = getattr(parameter, "quant_state", None)
            count = parameter.numel() if state is None else state.shape.numel()
            self.found.append(torch.empty(count, device="meta", requires_grad=parameter.requires_grad))

    def parameters(self) -> list[Tensor]:
        return self.found


def step_check(subject: Subject, batch: dict[str, Tensor]) -> list[Check]:
    """Loss and gradients without dropout beside PEFT's over the same codes."""
    subject.be(False)
    theirs = loss_and_gradients(subject, subject.model, batch)
    subject.be(True)
    mine = loss_and_gradients(subject, subject.model, batch)
    names = ["loss", "dA", "dB", "other"][: len(theirs)]
    bounds = [STEP_BOUNDS[0], *[STEP_BOUNDS[1]] * (len(theirs) - 1)]
    labels = [f"{name}, bound {bound}" for name, bound in zip(names, bounds, strict=True)]
    off = [relative_error(got, want) for got, want in zip(mine, theirs, strict=True)]
    return [Check(labels, [bound / 1.5 for bound in bounds], off, 0.0)]


def few_rows_cell(bench: Bench, M: int, K: int, N: int) -> None:
    """x·Wᵀ of few rows over nested NF4, without gradients."""
    base: Any = quantised(torch.randn(N, K, device=bench.device, dtype=bench.dtype) * K**-0.5, "nf4").eval()
    held = QuantisedWeight.from_parameter(base.weight)
    xs = [torch.randn(M, K, device=bench.device, dtype=bench.dtype) for _ in range(4)]

    @torch.no_grad()
    def mine(i: int) -> Tensor:
        return lora_linear(xs[i % 4], Projection(held), backend=bench.backend)

    @torch.no_grad()
    def theirs(i: int) -> Tensor:
        return base(xs[i % 4])

    def check() -> list[Check]:
        wide = wider(bench.dtype)
        truth = F.linear(xs[0].to(wide), held.dequantised(wide))
        beside = F.linear(xs[0], held.dequantised(bench.dtype))
        return [compare(["y"], [truth], [beside], [mine(0)], torch.finfo(bench.dtype).eps)]

    bench.cell(
        "few rows",
        {"M": M, "K": K, "N": N},
        {"unpack and multiply": mine, "bitsandbytes": theirs},
        check=check,
        versus={"unpack and multiply": ["bitsandbytes"]},
        facts={"floor_ms": bench.floor_ms(0, N * K / 2)},
    )
