"""Part `step`: whole training steps (forward, backward, AdamW) with random weights of Llama-3.2-1B's and 8B's shapes.

LoRA r=16 on every linear but the head, bf16 weights. MFU = model FLOPs of a step / time / the card's datasheet peak,
where model FLOPs = tokens · (4·frozen + 6·trained + 6·layers·heads·head_dim·T): two products for each frozen weight
(the input's embedding is looked up, not multiplied), three for each trained one, and causal attention forward and
backward. Recomputation under checkpointing is not counted. `of_matmul` is the same against the matmul rate measured
here. Peak memory is what a step takes above the weights, adapters and optimizer state that were there before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .bench import Bench, Run, compiled
from .training import Subject, adapted, fused, plain, same_training


@dataclass(frozen=True)
class Shape:
    """A Llama, and the batch that it trains on."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv: int
    inner: int
    vocabulary: int
    tied: bool
    samples: int
    length: int


# Llama-3.1-8B and Llama-3.2-1B; the 1B has 8192 tokens a step, the 8B the same
SMALL = Shape("llama-1b", 2048, 16, 32, 8, 8192, 128256, True, 4, 2048)
LARGE = Shape("llama-8b", 4096, 32, 32, 8, 14336, 128256, False, 4, 2048)
TINY = Shape("llama-tiny", 32, 2, 4, 2, 48, 96, True, 2, 16)


def run(bench: Bench) -> None:
    if bench.smoke:
        for p, checkpointing in ((0.0, False), (0.05, True)):
            step_cells(bench, TINY, p, wide=True, checkpointing=(checkpointing,))
        return
    step_cells(bench, SMALL, 0.05, wide=True, checkpointing=(True, False))
    step_cells(bench, SMALL, 0.0, wide=True, checkpointing=(True, False))
    step_cells(bench, LARGE, 0.05, wide=True, checkpointing=(True, False), needs=100)
    step_cells(bench, LARGE, 0.0, wide=True, checkpointing=(True, False), needs=100)
    step_cells(bench, SMALL, 0.05, wide=False, checkpointing=(True, False))
    step_cells(bench, SMALL, 0.05, wide=True, checkpointing=(False,), compile_too=True, needs=150)


def llama(bench: Bench, shape: Shape) -> LlamaForCausalLM:
    """Random weights, made on the device in the working dtype."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max(shape.length, 2048),
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with torch.device(bench.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def step_flops(model: Any, shape: Shape) -> float:
    """See the module's docstring."""
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not shape.tied:
        frozen -= shape.vocabulary * shape.hidden
    return shape.samples * shape.length * (4 * frozen + 6 * trained + 6 * shape.layers * shape.hidden * shape.length)


def step_cells(
    bench: Bench,
    shape: Shape,
    p: float,
    *,
    wide: bool,
    checkpointing: Sequence[bool],
    compile_too: bool = False,
    needs: float = 40,
) -> None:
    """One cell per choice of checkpointing, on one model. `wide`: fp32 adapters under autocast, PEFT's default."""
    bench.room(0 if bench.smoke else needs)
    model = adapted(llama(bench, shape), p, task="CAUSAL_LM", wide=wide)
    ids = torch.randint(0, shape.vocabulary, (shape.samples, shape.length), device=bench.device)
    subject = Subject(bench, model, {"input_ids": ids, "labels": ids.clone()}, wide, step_flops(model, shape), p > 0)
    short = {name: t[:1, :128] for name, t in subject.batch.items()}
    for on in checkpointing:
        bench.room(0 if bench.smoke else needs / 3)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        else:
            model.gradient_checkpointing_disable()  # type: ignore[operator]
        contenders: dict[str, Run] = {
            "peft": plain(subject, subject.step()),
            "ours": fused(subject, subject.step()),
        }
        if compile_too:
            contenders["peft compiled"] = plain(subject, subject.step(compiled(bench, model)))
        bench.cell(
            "training step",
            {
                "model": shape.name,
                "layers": shape.layers,
                "tokens": f"{shape.samples}x{shape.length}",
                "p": p,
                "adapters": "fp32, autocast" if wide else "bf16",
                "checkpointing": on,
            },
            contenders,
            check=lambda: same_training(subject, short),
            versus={"ours": ["peft", "peft compiled"]},
            facts={"floor_ms": bench.floor_ms(subject.flops, 0), "flops": subject.flops},
            memory=True,
            rounds=5,
            more=subject.rates,
        )
    bench.note(f"{shape.name}: {subject.told()}")
