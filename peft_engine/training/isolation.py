"""Whether a model keeps packed samples apart: what is known to leak is refused, the rest is proved on the model itself.

transformers (5.13 and later) builds the mask of a packed batch from positions that begin anew, where a model hands them
to its mask functions, no mask is given and no cache is kept: block by block for sdpa and eager, windows and chunks
counted inside of a block; for flash attention as a list of ends, in batches of one row only. Which models and attention
functions do all that can't be read from their names, so one small forward tells (traps 8 and 9).
"""

import inspect
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from ..adapters.group import Group, Member
from ..backbone import positions_of
from ..data.packing import lay_out
from ..errors import ConfigError
from ..runtime import Runtime
from ..tasks.base import Task, to_device

ATTENDING = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers, by transformers' names, in which a token sees what its mask shows and nothing else."""
SAMPLES = ((11, 6), (5, 9, 2))
"""Tokens per sample of the proof's packs; the second pack ends before the first."""
MOVED, ALONE = 1e-5, 1e-3
"""Differences that are rounding, as a share of the largest logit: shapes are the same in the first comparison (only
experts' batches may differ), others in the second."""
NARROW_MOVED, NARROW_ALONE = 1e-2, 5e-2
"""The same where the model computes in fp16 or bf16."""
FIX = "Set data.packing: false."


def refuse_leaky(model: Any, tokens: int) -> None:
    """Refuse models that can't keep packed samples apart, by their structure.

    Args:
        model: a transformers model.
        tokens: of a pack at most.
    """
    name = type(model).__name__
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    other = sorted({str(kind) for kind in kinds} - set(ATTENDING))
    reason = None
    if getattr(model, "_is_stateful", False):
        reason = "it carries a state from token to token, which goes on from one sample to the next"
    elif other:
        reason = f"it has {', '.join(other)} layers, which do not follow the mask between samples"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        reason = "its forward takes no position_ids, which tell one sample from the next"
    if reason:
        raise ConfigError(f"data.packing: {name} can't keep packed samples apart: {reason}.", FIX)
    positions = positions_of(model)
    if positions is not None and tokens > positions:
        raise ConfigError(
            f"data.pack_tokens: packs of {tokens} tokens, and the model has {positions} positions.",
            f"Set data.pack_tokens: {positions}, or less.",
        )


def batches_packs(model: Any) -> bool:
    """Whether several packs may stand in one batch: flash attention tells samples apart in a batch of one row only."""
    return "flash" not in str(model.config._attn_implementation)


def prove_isolation(group: Group, member: Member, task: Task, runtime: Runtime) -> None:
    """One small packed forward of the model as it will train: no sample may see another, and each must get the logits
    that it gets alone.

    Raises:
        ConfigError: a sample's logits move with another's tokens, or are not those that it has alone.
    """
    model = group.backbone.model
    if isinstance(group.model, PeftModel) and group.model.active_peft_config.is_prompt_learning:
        raise ConfigError(
            f"data.packing: {group.method} puts its prompt before a whole sequence, not before each sample.", FIX
        )
    with torch.no_grad(), group.evaluating(member) as running:
        moved, alone, dtype = _differences(running, model, task, runtime)
    narrow = dtype in (torch.float16, torch.bfloat16)
    which = f"{type(model).__name__} with {model.config._attn_implementation} attention"
    fix = f"{FIX[:-1]}, or try another model.attention."
    if not moved <= (NARROW_MOVED if narrow else MOVED):
        raise ConfigError(
            f"data.packing: {which} lets packed samples see each other: other tokens in the first one move a later "
            f"one's logits by {moved:.2%} of the largest.",
            fix,
        )
    if not alone <= (NARROW_ALONE if narrow else ALONE):
        raise ConfigError(
            f"data.packing: {which} gives a packed sample other logits than alone, by {alone:.2%} of the largest: "
            "it does not count positions from the sample's start.",
            fix,
        )


def _differences(running: nn.Module, model: Any, task: Task, runtime: Runtime) -> tuple[float, float, torch.dtype]:
    """(what other tokens in the first sample change in later ones, what packing changes in any, dtype of the logits),
    each as a share of the largest logit."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    lengths = SAMPLES if batches_packs(model) else SAMPLES[:1]
    packs = [[_tokens(vocabulary, n, 10 * line + i) for i, n in enumerate(pack)] for line, pack in enumerate(lengths)]
    others = [[_tokens(vocabulary, len(pack[0]), 100), *pack[1:]] for pack in packs]
    packed = _logits(running, task, runtime, lay_out(packs, 0))
    other = _logits(running, task, runtime, lay_out(others, 0))
    moved = alone = 0.0
    for line, pack in enumerate(packs):
        for place, (sample, end) in enumerate(zip(pack, accumulate(map(len, pack)), strict=True)):
            own = slice(end - len(sample), end)
            if place:
                moved = _worse(moved, other[line, own], packed[line, own])
            batch = {"input_ids": sample[None], "attention_mask": np.ones((1, len(sample)), np.int64)}
            alone = _worse(alone, packed[line, own], _logits(running, task, runtime, batch)[0])
    return moved, alone, packed.dtype


def _tokens(vocabulary: int, length: int, number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, vocabulary, length)


def _logits(model: nn.Module, task: Task, runtime: Runtime, batch: dict[str, np.ndarray]) -> Tensor:
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    with runtime.accelerator.autocast():
        return task.forward(model, to_device(tensors, runtime.device))


def _worse(worst: float, found: Tensor, wanted: Tensor) -> float:
    """The larger of the two differences; NaN where one of them is."""
    share = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    return worst if worst >= share or worst != worst else share
