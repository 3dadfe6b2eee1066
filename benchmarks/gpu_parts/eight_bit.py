"""Part `eight_bit`: frozen GEMMs on int8 and fp8 units, in one LoRA linear, in whole steps, and kernel by kernel.

Goals on an H100, beside our own path in bf16: a LoRA linear in fp8, forward and backward, at least 1.6 times as fast; a
step of the 8B's shape at least 1.45 times. The floor is that of `linear`, at the bf16 rate measured here: what eight
bits are to go below. A card without a format's units leaves that format out, and the notes say so.

Green means: a kernel's result is no further from the same product of the same codes in a wider dtype than rounding is;
y and dx of a layer are as near to full precision as the format allows on Gaussian numbers (int8 2%, fp8 5%), and dA and
dB as near as those of `linear`; loss and gradients of a step are within the bounds at `STEP_BOUNDS`, which are the
format's through all layers of a random model, and find what is broken, not what is rounded.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_engine.errors import ConfigError
from peft_kernels.frozen_weight import freeze
from peft_kernels.lora_linear import Adapter, Projection, lora_linear

from .bench import Bench, Check, Run, compare, compiled, optional
from .eight_bit_kernels import CODES, kernel_cells, within
from .linear import RANK, SALT, SCALE, SHAPES, _Inputs, ours, peft_layer, step, wider
from .step import LARGE, SMALL, TINY, Shape, llama, step_flops
from .training import Subject, adapted, fused, loss_and_gradients, plain

LINEAR_BOUNDS = {"int8": 0.02, "fp8": 0.05}
# Of the loss, of gradients. A random Llama of 32 layers, 256 wide, has 0.035 and 0.125 on emulated units, bf16 0.012.
STEP_BOUNDS = {"int8": (0.005, 0.1), "fp8": (0.01, 0.25)}
GOALS = {"lora_linear forward+backward": 1.6, "training step": 1.45}


def run(bench: Bench) -> None:
    try:
        cells(bench)
    finally:  # the budget may end it anywhere
        tell_goals(bench)


def cells(bench: Bench) -> None:
    formats = formats_here(bench)
    shapes = bench.small(SHAPES, ((48, 32),))
    for K, N in shapes[:3]:
        layer_cell(bench, formats, bench.small(8192, 64), K, N, 0.05, torchao=True)
    if bench.smoke:
        step_cell(bench, formats, TINY, 0.05)
    else:
        step_cell(bench, formats, SMALL, 0.05)
        step_cell(bench, formats, LARGE, 0.05, needs=120)
    for K, N in shapes[:3]:
        layer_cell(bench, formats, bench.small(8192, 64), K, N, 0.0)
    for M in bench.small((8192, 2048, 512), (64,)):
        for K, N in shapes[:3]:
            kernel_cells(bench, formats, M, K, N)
    for M in bench.small((2048, 512), ()):
        for K, N in shapes[:3]:
            layer_cell(bench, formats, M, K, N, 0.05)
    for K, N in shapes[3:]:
        kernel_cells(bench, formats, 8192, K, N)
        layer_cell(bench, formats, 8192, K, N, 0.05)


def formats_here(bench: Bench) -> list[str]:
    """The formats that this device multiplies; the notes name the others."""
    if bench.device.type != "cuda":
        bench.note("fp8 left out: it has no units on a CPU")
        return ["int8"]
    major, minor = torch.cuda.get_device_capability(bench.device)
    here = [name for name, least in (("int8", (8, 0)), ("fp8", (8, 9))) if (major, minor) >= least]
    for name in CODES.keys() - here:
        bench.note(f"{name} left out: sm_{major}{minor} has no units for it, or Triton does not use them")
    return here


def tell_goals(bench: Bench) -> None:
    """What came of the goals, in the notes: the least and the most of every green cell's ratio to our bf16."""
    for name, goal in GOALS.items():
        for contender in ("ours int8", "ours fp8"):
            cells = [cell["contenders"].get(contender, {}) for cell in bench.cells if cell["cell"] == name]
            ratios = [one["faster_than"]["ours full"] for one in cells if "ours full" in one.get("faster_than", {})]
            if ratios:
                bench.note(
                    f"{name}, {contender}: {min(ratios):.2f} to {max(ratios):.2f}x ours full; goal {goal}x in fp8"
                )


def layer_cell(bench: Bench, formats: list[str], M: int, K: int, N: int, p: float, *, torchao: bool = False) -> None:
    """One LoRA linear, adapters in the working dtype, against itself with a full weight, PEFT's, and torchao's, which
    take their time to compile."""
    bench.room(0 if bench.smoke else 60 if torchao else 20)
    data = _Inputs(bench, M, K, N)
    full, full_trained = ours(bench, data, p, wide=False)
    theirs, their_trained = peft_layer(bench, data, p, wide=False)
    contenders: dict[str, Run] = {
        "ours full": step(bench, data, full, full_trained, wide=False),
        "peft": step(bench, data, theirs, their_trained, wide=False),
    }
    for name in formats:
        contenders[f"ours {name}"] = step(bench, data, *frozen_layer(bench, data, p, name), wide=False)
    for name, make in (("torchao fp8", torchao_fp8), ("torchao int8", torchao_int8)):
        if torchao and name.split()[1] in formats:
            contenders |= optional(bench, name, lambda make=make: make(bench, data, p))
    flops = 4 * M * N * K + 6 * M * RANK * (K + N)
    bench.cell(
        "lora_linear forward+backward",
        {"M": M, "K": K, "N": N, "r": RANK, "p": p},
        contenders,
        check=lambda: list(layer_checks(bench, data, p, {name: contenders[f"ours {name}"] for name in formats})),
        versus={f"ours {name}": ["ours full", "peft", f"torchao {name}"] for name in formats},
        facts={"floor_ms": bench.floor_ms(flops, 4 * M * K + 2 * M * N), "flops": flops},
        memory=True,
    )


def frozen_layer(bench: Bench, data: _Inputs, p: float, name: str) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """Our layer over codes, and its trained tensors."""
    A, B = (t.clone().requires_grad_() for t in (data.A, data.B))
    layer = Projection(freeze(data.weight, name), adapters=(Adapter(A, B, SCALE, p, SALT),))  # type: ignore[arg-type]
    return lambda x: lora_linear(x, layer, data.seeds, backend=bench.backend), [A, B]


def torchao_fp8(bench: Bench, data: _Inputs, p: float) -> Run:
    """PEFT's layer with torchao's row-wise fp8 GEMMs, compiled, as torchao asks for."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    layer, trained = peft_layer(bench, data, p, wide=False)
    config = Float8LinearConfig.from_recipe_name("rowwise")
    convert_to_float8_training(layer, config=config, module_filter_fn=lambda module, name: name == "base_layer")
    work = step(bench, data, compiled(bench, layer), trained, wide=False)
    work(0)
    return work


def torchao_int8(bench: Bench, data: _Inputs, p: float) -> Run:
    """PEFT's layer with torchao's int8 GEMMs in both directions, compiled."""
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_

    layer, trained = peft_layer(bench, data, p, wide=False)
    quantize_(layer, Int8MixedPrecisionTrainingConfig(), filter_fn=lambda module, name: name == "base_layer")
    work = step(bench, data, compiled(bench, layer), trained, wide=False)
    work(0)
    return work


def layer_checks(bench: Bench, data: _Inputs, p: float, runs: dict[str, Run]) -> Iterator[Check]:
    """y and dx beside full precision; dA and dB, which no rounding reaches, beside plain torch in the same dtype."""
    mask = data.mask(bench, p) if p else None

    def definition(dtype: torch.dtype) -> list[Tensor]:
        x = data.xs[0].detach().to(dtype).requires_grad_()
        A, B = (t.detach().to(dtype).requires_grad_() for t in (data.A, data.B))
        dropped = x if mask is None else (x * mask).to(dtype)
        y = F.linear(x, data.weight.to(dtype)) + F.linear(F.linear(dropped, A), B) * SCALE
        return [y.detach(), *torch.autograd.grad(y, [x, A, B], data.dys[0].to(dtype))]

    truth, beside = definition(wider(bench.dtype)), definition(bench.dtype)
    for name, run in runs.items():
        got: Any = run(0)
        for what, wanted, found in zip(("y", "dx"), truth, got, strict=False):
            yield within(f"{what} ({name})", wanted, found, LINEAR_BOUNDS[name])
        labels = [f"{what} ({name})" for what in ("dA", "dB")]
        yield compare(labels, truth[2:], beside[2:], got[2:], torch.finfo(bench.dtype).eps)


def step_cell(bench: Bench, formats: list[str], shape: Shape, p: float, needs: float = 60) -> None:
    """Whole steps without checkpointing: PEFT, ours in full precision, ours in each format, on the same weights."""
    bench.room(0 if bench.smoke else needs)
    model = adapted(llama(bench, shape), p, task="CAUSAL_LM", wide=True)
    ids = torch.randint(0, shape.vocabulary, (shape.samples, shape.length), device=bench.device)
    batch, flops = {"input_ids": ids, "labels": ids.clone()}, step_flops(model, shape)
    full = Subject(bench, model, batch, True, flops, p > 0)
    short = {name: t[:1, :128] for name, t in batch.items()}
    truth = wide_truth(full, short)
    contenders: dict[str, Run] = {"peft": plain(full, full.step()), "ours full": fused(full, full.step())}
    narrow: dict[str, Subject] = {}
    refused: list[str] = []
    for name in formats:
        one = Subject(bench, copy.deepcopy(model), batch, True, flops, p > 0, frozen_compute=name)
        try:
            one.be(True)  # before the next copy is made
        except ConfigError as error:
            refused.append(f"no linear multiplies in {name}: {error}")
            continue
        narrow[name] = one
        contenders[f"ours {name}"] = narrow[name].step()
        bench.note(f"{shape.name}, {name}: {narrow[name].told()}")

    def check() -> list[Check]:
        if refused:
            raise RuntimeError("; ".join(refused))
        found = []
        for name, one in narrow.items():
            loss, gradients = STEP_BOUNDS[name]
            got = loss_and_gradients(one, one.model, short)
            for what, wanted, found_here in zip(("loss", "dA", "dB"), truth, got, strict=True):
                found.append(within(f"{what} ({name})", wanted, found_here, loss if what == "loss" else gradients))
        return found

    bench.cell(
        "training step",
        {"model": shape.name, "tokens": f"{shape.samples}x{shape.length}", "p": p, "checkpointing": False},
        contenders,
        check=check,
        versus={f"ours {name}": ["ours full", "peft"] for name in narrow},
        facts={"floor_ms": bench.floor_ms(flops, 0), "flops": flops},
        memory=True,
        rounds=5,
        more=full.rates,
    )


def wide_truth(subject: Subject, batch: dict[str, Tensor]) -> list[Tensor]:
    """Loss and gradients of the model as it is, in float32 throughout."""
    model = copy.deepcopy(subject.model).float()
    subject.autocast = False
    found = loss_and_gradients(subject, model, batch)
    subject.autocast = True
    return found
