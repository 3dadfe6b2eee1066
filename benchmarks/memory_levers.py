"""Peak memory of a training step, lever by lever, and what fits on which card.

    python benchmarks/memory_levers.py real       SmolLM2-135M on this CPU, fp32
    python benchmarks/memory_levers.py check      the same on fake tensors: does the fake count hold?
    python benchmarks/memory_levers.py fake       Llamas of 1B, 8B and 70B on fake tensors, bf16, as on a card
    python benchmarks/memory_levers.py tables     the tables of docs/MEMORY.md, from what was counted

Counted are the storages of all live tensors (peft_engine.meters.memory) at the peak of a whole step after the first:
forward, loss, backward, clipping, AdamW. Not counted: work space inside of an operator, the allocator's rounding and
gaps, CUDA's own context. A fake tensor has a shape and no memory, so that 70B count here. LoRA r=16 on all linears but
the head, no dropout, every token with a loss.

Two things are added up, not run: codes of nf4 and int8 weights on fake tensors (bitsandbytes' layout, and one scratch
buffer for the largest weight), and layers on the host, of which two are on the card at once.

Cells are kept in --out and counted once, then only printed; --seconds ends a call early, the next one goes on.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_engine import fuse
from peft_engine.levers.activations import ActivationOffload
from peft_engine.levers.checkpointing import checkpoint_layers
from peft_engine.levers.in_backward import StepInBackward
from peft_engine.meters.memory import LiveBytes, storage_bytes
from peft_kernels import linear_cross_entropy as loss_of_hidden

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory_levers.json"
SMOLLM = ROOT / ".assets" / "models" / "smollm2"
RANK = 16
HOST = "cuda"
"""The label of fake tensors that stand for host memory. Those that stand for the card are labelled cpu: a torch without
CUDA runs backward for that label alone. Labels, both; no memory is behind either."""
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True},
    "1B": LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
                   "tie_word_embeddings": True},
    "8B": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70B": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64},
}  # fmt: skip
"""SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B and 70B."""


@dataclass(frozen=True)
class Levers:
    """What a step uses.

    Attributes:
        method: "lora", or "full" fine-tuning with fp32 weights.
        fused: peft_engine's fused model, or plain peft.
        checkpointing: 0 for no layer, k for every k-th.
        weights: of the frozen linears: "" (as stored), "nf4" (double quantisation) or "int8".
        layers: frozen layers on the host.
    """

    method: str = "lora"
    fused: bool = True
    checkpointing: int = 0
    activation_offload: bool = False
    in_backward: bool = False
    weights: str = ""
    layers: bool = False

    def told(self) -> str:
        name = "full fine-tuning" if self.method == "full" else "LoRA" if self.fused else "LoRA, plain peft"
        parts = [name, f"{self.weights} weights" if self.weights else ""]
        parts += [{0: "", 1: "all layers checkpointed"}.get(self.checkpointing, "every second layer checkpointed")]
        parts += ["activations on the host"] if self.activation_offload else []
        parts += ["optimizer in backward"] if self.in_backward else []
        parts += ["layers on the host"] if self.layers else []
        return " + ".join(filter(None, parts))


LORA = Levers()
ALONE = (
    replace(LORA, fused=False),
    LORA,
    replace(LORA, checkpointing=2),
    replace(LORA, checkpointing=1),
    replace(LORA, activation_offload=True),
    replace(LORA, in_backward=True),
    replace(LORA, weights="int8"),
    replace(LORA, weights="nf4"),
    replace(LORA, layers=True),
    Levers("full", checkpointing=1),
    Levers("full", checkpointing=1, in_backward=True),
)
"""Each lever by itself."""
SMALL = replace(LORA, checkpointing=1, activation_offload=True)
LADDER = {
    "no lever": LORA,
    "every second layer checkpointed": replace(LORA, checkpointing=2),
    "all layers checkpointed": replace(LORA, checkpointing=1),
    "nf4": replace(LORA, weights="nf4"),
    "nf4, every second layer checkpointed": replace(LORA, weights="nf4", checkpointing=2),
    "nf4, checkpointed": replace(LORA, weights="nf4", checkpointing=1),
    "nf4, checkpointed, activations on the host": replace(SMALL, weights="nf4"),
    "nf4, checkpointed, activations and layers on the host": replace(SMALL, weights="nf4", layers=True),
}
"""From fast to small."""
ON_CPU = tuple(one for one in ALONE if not (one.activation_offload or one.layers))
CHECKED = tuple(one for one in ON_CPU if not one.weights)
CARDS, ROOM = (8, 12, 16, 24, 40, 48, 80), 0.9  # GB (1e9 bytes), and the share of these that a count may fill
BATCH, FAKE = (4, 256), tuple((shape, tokens) for shape in ("1B", "8B", "70B") for tokens in (2048, 8192))
"""Sequences and tokens of the real counts; models and tokens of the fake ones, one sequence each."""


class OnCard(LiveBytes):
    """Live bytes but for those of the host's label."""

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type != HOST:
            super()._count(tensor)


class OnHost(LiveBytes):
    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type == HOST:
            super()._count(tensor)


class FakeLane:
    """Copies of no bytes."""

    def host(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device=HOST)

    def copy(self, source: Tensor, target: Tensor) -> None:
        pass

    def wait(self, ticket: None) -> None:
        pass


class AllFinite(StepInBackward):
    """A fake norm has no value to look at."""

    def _is_finite(self, norm: Tensor) -> bool:
        return True


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention by the operator that sdpa picks for a whole sequence: its choice looks at real devices."""
    if os.environ.get("TRITON_INTERPRET"):  # the card's; it reads fewer key heads than queries
        flash = torch.ops.aten._scaled_dot_product_flash_attention
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, True, scale=scaling)[0].transpose(1, 2).contiguous(), None


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """Let `fuse` and the loss take CUDA's path for fake tensors labelled cpu; no kernel is ever launched."""
    before = loss_of_hidden.CPU_ROWS, loss_of_hidden.CPU_BYTES
    loss_of_hidden.CPU_ROWS, loss_of_hidden.CPU_BYTES = loss_of_hidden.CUDA_ROWS, loss_of_hidden.CUDA_BYTES
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]
        loss_of_hidden.CPU_ROWS, loss_of_hidden.CPU_BYTES = before


def real_model(levers: Levers) -> Any:
    settings: dict[str, Any] = {"dtype": torch.float32}
    if levers.weights:
        from transformers import BitsAndBytesConfig

        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        chosen = {"load_in_8bit": True} if levers.weights == "int8" else four
        settings["quantization_config"] = BitsAndBytesConfig(**chosen)
    return AutoModelForCausalLM.from_pretrained(SMOLLM, **settings)


def fake_model(shape: dict[str, Any], dtype: torch.dtype) -> Any:
    """On `meta`, where modules are made without memory; `filled` makes it fake."""
    AttentionInterface.register("counted", attend)
    AttentionMaskInterface.register("counted", lambda *_, **__: None)
    settings = {"max_position_embeddings": 16384, "use_cache": False, "attn_implementation": "counted"}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": False} | shape, **settings))
    finally:
        torch.set_default_dtype(before)


def filled(model: Any, mode: FakeTensorMode) -> None:
    """Fake tensors for those on `meta`, in place; tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None and id(old) not in made:
                    with mode:
                        new = torch.empty(old.shape, dtype=old.dtype)
                        made[id(old)] = nn.Parameter(new, old.requires_grad) if table is module._parameters else new
                if old is not None:
                    table[name] = made[id(old)]


def prepared(model: Any, levers: Levers, backend: Any, mode: FakeTensorMode | None = None) -> Any:
    """With adapters, fused and checkpointed as asked, in training mode."""
    from peft import LoraConfig, get_peft_model

    base = model
    if levers.method == "lora":
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    if mode is not None:
        filled(model, mode)
    if levers.fused:
        fuse(model, backend)
    if levers.checkpointing:
        checkpoint_layers(base, levers.checkpointing if levers.checkpointing > 1 else True)
        for module in base.modules() if mode is not None else ():
            if hasattr(module, "gradient_checkpointing"):  # a fake generator has no state to put back
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return model.train()


def step(model: Any, ids: Tensor, optimizer: Any, levers: Levers, narrow: bool, offload: Any) -> None:
    """One training step, as the engine's loop makes it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    early = (StepInBackward if type(ids) is Tensor else AllFinite)(optimizer, trained) if levers.in_backward else None
    with early.during() if early else nullcontext():
        autocast = torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext()
        with autocast, offload.during() if offload else nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    del loss
    if early is None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def counted(model: Any, levers: Levers, ids: Tensor, narrow: bool) -> dict[str, int]:
    """Bytes at the peak of a second step, what of them are weights, gradients and optimizer, and those on the host."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    offload = ActivationOffload(model, FakeLane()) if levers.activation_offload else None
    step(model, ids, optimizer, levers, narrow, offload)
    held = [*model.parameters(), *model.buffers(), *_beside(model)]
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    card, host = OnCard([*held, *states, ids]), OnHost()
    with host, card:
        step(model, ids, optimizer, levers, narrow, offload)
    return {
        "peak": card.peak,
        "weights": storage_bytes(held),
        "gradients": 0 if levers.in_backward else storage_bytes(trained),
        "optimizer": storage_bytes(states),
        "host": host.peak,
    }


def _beside(model: Any) -> Iterator[Tensor]:
    """What belongs to bitsandbytes' weights and is no parameter."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None), parameter):
            named = vars(part).values() if part is not None and part is not parameter else (getattr(part, "SCB", None),)
            yield from (value for value in named if isinstance(value, Tensor))


def count_real(levers: Levers) -> dict[str, int]:
    from transformers import AutoTokenizer

    rows = (ROOT / ".assets" / "data" / "e2e_nlg.jsonl").read_text().splitlines()[:400]
    text = " ".join(str(v) for row in rows for v in json.loads(row).values())
    tokens = AutoTokenizer.from_pretrained(SMOLLM)(text, verbose=False)["input_ids"]
    ids = torch.tensor(tokens[: BATCH[0] * BATCH[1]]).view(BATCH)
    torch.manual_seed(0)
    return counted(prepared(real_model(levers), levers, "torch"), levers, ids, False)


def count_fake(name: str | dict[str, Any], rows: int, tokens: int, levers: Levers, card: bool) -> dict[str, int]:
    """`card`: bf16 weights and products on a card's path, else fp32 on a CPU's. `name`: of SHAPES, or a shape."""
    mode, shape = FakeTensorMode(), SHAPES[name] if isinstance(name, str) else name
    with as_on_a_card() if card else nullcontext():
        stored = torch.bfloat16 if card and levers.method == "lora" else torch.float32
        model = prepared(fake_model(shape, stored), levers, "triton" if card else "torch", mode)
        with mode:
            ids = torch.zeros(rows, tokens, dtype=torch.int64)
            return counted(model, levers, ids, card)


def linears(shape: dict[str, Any]) -> list[int]:
    """Numbers of each linear of a layer."""
    width, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    return [width * q, width * kv, width * kv, q * width, *[width * inner] * 3]


def code_bytes(count: int, out: int, weights: str) -> tuple[int, int]:
    """Bytes of a quantised weight's codes, and of what belongs to them: absmax in 8 bits for each 64 numbers, the
    absmax of 256 of these and their tables in fp32; for int8 one fp32 scale for each of `out` rows."""
    if weights == "int8":
        return count, 4 * out
    blocks = -(-count // 64)
    return count // 2, blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def added_up(found: dict[str, int], shape: dict[str, Any], levers: Levers, size: int = 2) -> dict[str, int]:
    """With weights in codes, and with layers on the host; before, a number took `size` bytes."""
    each, layers = linears(shape), shape["num_hidden_layers"]
    moving, staying, scratch = size * sum(each), 0, 0
    if levers.weights:
        width, inner = shape["hidden_size"], shape["intermediate_size"]
        outs = [each[0] // width, each[1] // width, each[2] // width, width, inner, inner, width]
        both = [code_bytes(count, out, levers.weights) for count, out in zip(each, outs, strict=True)]
        moving, staying, scratch = sum(c for c, _ in both), sum(b for _, b in both), size * max(each)
    here = 2 if levers.layers else layers
    weights = here * moving + layers * staying - size * layers * sum(each)
    return found | {
        "peak": found["peak"] + weights + scratch,
        "weights": found["weights"] + weights,
        "host": found["host"] + (layers * moving if levers.layers else 0),
    }


def added_up_from(cells: dict[str, Any], name: str, tokens: int, levers: Levers) -> dict[str, int]:
    """Levers that are added up share a count, which is a cell of its own."""
    run = replace(levers, weights="", layers=False)
    if tokens == BATCH[1]:
        return added_up(cells[f"check {run.told()}"], SHAPES[name], levers, 4)
    key = f"{name} {tokens} {run.told()}"
    if key not in cells:
        cells[key] = count_fake(name, 1, tokens, run, True) | {"levers": asdict(run)}
    return added_up(cells[key], SHAPES[name], levers)


def jobs(what: str, cells: dict[str, Any]) -> list[tuple[str, Levers, Any]]:
    """(key, levers, what counts them)."""
    if what == "real":
        return [(f"real {one.told()}", one, partial(count_real, one)) for one in ON_CPU]
    if what == "check":
        codes = [one for one in ON_CPU if one.weights]
        found = [(f"check {one.told()}", one, partial(count_fake, "135M", *BATCH, one, False)) for one in CHECKED]
        return found + [(f"check {o.told()}", o, partial(added_up_from, cells, "135M", BATCH[1], o)) for o in codes]
    return [
        (f"{shape} {tokens} {one.told()}", one, partial(added_up_from, cells, shape, tokens, one))
        for wanted in (LADDER.values(), ALONE)
        for shape, tokens in FAKE
        for one in sorted(wanted, key=lambda one: one.told().replace("nf4 weights + ", ""))
    ]


def tables(cells: dict[str, Any]) -> str:
    """Markdown: real beside fake, memory by lever, what fits."""
    lines = ["| 135M, 4×256 tokens, fp32, CPU | weights | optimizer | peak, real | peak, fake | |", "|---" * 6 + "|"]
    for one in ON_CPU:
        real, fake = cells[f"real {one.told()}"], cells[f"check {one.told()}"]
        apart = f"{100 * fake['peak'] / real['peak'] - 100:+.1f}%".replace("-", "−")
        parts = [real["weights"], real["optimizer"], real["peak"], fake["peak"]]
        shown = " | ".join(f"{v / 1e6:,.0f} MB" for v in parts)
        lines.append(f"| {one.told()} | {shown} | {apart} |")
    head = " | ".join(f"{shape}, {tokens // 1024}k" for shape, tokens in FAKE)
    lines += ["", f"| GB on the card | {head} |", "|---" * (1 + len(FAKE)) + "|"]
    for one in dict.fromkeys((*ALONE, *LADDER.values())):
        found = [cells[f"{shape} {tokens} {one.told()}"] for shape, tokens in FAKE]
        shown = " | ".join(f"{c['peak'] / 1e9:.1f}" + (f" ({c['host'] / 1e9:.1f})" if c["host"] else "") for c in found)
        lines.append(f"| {one.told()} | {shown} |")
    lines += ["", "| card | " + head + " |", "|---" * (1 + len(FAKE)) + "|"]
    lines += [f"| {card} GB | " + " | ".join(fits(cells, card, *place) for place in FAKE) + " |" for card in CARDS]
    return "\n".join(lines)


def fits(cells: dict[str, Any], card: int, shape: str, tokens: int) -> str:
    """The fastest rung of the ladder that fits a card of so many GB."""
    sizes = {name: cells[f"{shape} {tokens} {one.told()}"]["peak"] for name, one in LADDER.items()}
    return next((name for name, size in sizes.items() if size <= ROOM * card * 1e9), "none of these")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("real", "check", "fake", "tables"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no cell after so long")
    options = parser.parse_args(arguments)
    cells: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.what == "tables":
        every = {key: 0 for what in ("real", "check", "fake") for key, *_ in jobs(what, cells)}
        if missing := [key for key in every if key not in cells]:
            parser.error(f"{options.out} lacks {len(missing)} cells, {missing[0]} first: count by real, check and fake")
        print(tables(cells))
    begun = time.monotonic()
    for key, levers, run in jobs(options.what, cells) if options.what != "tables" else ():
        if key not in cells and time.monotonic() - begun <= options.seconds:
            cells[key] = run() | {"levers": asdict(levers)}
            options.out.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
        if key in cells:
            print(f"{key}: {cells[key]['peak'] / 1e9:.3f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
