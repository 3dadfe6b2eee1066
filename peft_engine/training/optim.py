"""Optimizers and learning-rate schedules, from torch, bitsandbytes and transformers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from ..adapters.group import Member
from ..config import Config
from ..errors import ConfigError

HF_SCHEDULES = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "wsd": "warmup_stable_decay",
}
WSD_DECAY = 0.2  # share of all steps that decay


def make_optimizer(member: Member, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over a member's tensors, in groups by learning rate (LoRA+) and weight decay.

    Each parameter group carries `base_lr`, its peak learning rate; `set_learning_rate` scales it.
    """
    settings = config.training
    groups = parameter_groups(member, settings.weight_decay, config.adapter.lora_plus_ratio)
    lr = member.spec.learning_rate
    match settings.optimizer:
        case "adamw":
            fused = device.type in ("cpu", "cuda")
            return torch.optim.AdamW(groups, lr=lr, betas=settings.betas, fused=fused)
        case "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=settings.betas[0])
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=lr)
        case "adamw8bit" | "paged_adamw" | "paged_adamw8bit":
            return _of_bitsandbytes(settings.optimizer, groups, lr, settings.betas, device)


def parameter_groups(member: Member, weight_decay: float, lora_plus_ratio: float | None) -> list[dict[str, Any]]:
    """Tensors by (learning-rate factor, decayed or not), in a stable order.

    Biases and norms (one-dimensional) don't decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, tensor in member.tensors.items():
        is_b = ".lora_B." in name or ".lora_embedding_B" in name
        factor = lora_plus_ratio if lora_plus_ratio and is_b else 1.0
        decay = weight_decay if tensor.ndim > 1 else 0.0
        groups.setdefault((factor, decay), []).append(tensor)
    lr = member.spec.learning_rate
    return [
        {"params": tensors, "lr": lr * factor, "base_lr": lr * factor, "weight_decay": decay}
        for (factor, decay), tensors in groups.items()
    ]


def make_schedule(name: str, warmup: float, total_steps: int) -> Callable[[int], float]:
    """transformers' schedule as a function: optimizer step (from 1) → factor on the peak learning rate.

    A function of the step alone: nothing to save, and the number of processes or micro-batches can't enter (trap 20).
    Warm-up never takes all steps: a run of one step would otherwise train at learning rate 0.
    """
    warm = min(warmup_steps(warmup, total_steps), total_steps - 1)
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    special = {"num_decay_steps": math.ceil(WSD_DECAY * total_steps)} if name == "wsd" else None
    scheduler = get_scheduler(HF_SCHEDULES[name], dummy, warm, total_steps, scheduler_specific_kwargs=special)
    factor = scheduler.lr_lambdas[0]
    return lambda step: float(factor(step - 1))


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Below 1 a share of all steps (rounded up), else a number of steps."""
    return math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)


def page_again(optimizer: torch.optim.Optimizer) -> None:
    """Put the state of a paged optimizer back into pages, in place, after bitsandbytes' `load_state_dict`, which makes
    ordinary tensors of it."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            buffer = optimizer.get_state_buffer(parameter, state[name].dtype)  # type: ignore[attr-defined]
            state[name] = buffer.copy_(state[name])


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _of_bitsandbytes(
    name: str, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], device: torch.device
) -> torch.optim.Optimizer:
    if name.startswith("paged") and device.type != "cuda":
        raise ConfigError(
            f"training.optimizer: {name} keeps its state in CUDA's unified memory, and the device is {device.type}.",
            "Use adamw8bit.",
        )
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ConfigError(
            f"training.optimizer: {name} needs bitsandbytes ({error}).", "Install it, or use adamw."
        ) from error
    cls = {"adamw8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw8bit": optim.PagedAdamW8bit}[name]
    return cls(groups, lr=lr, betas=betas)
