"""FSDP2 over a frozen backbone: every process keeps its part of each frozen weight, and a block is whole while it runs.

What the method adds is small and stays whole on every process, out of FSDP's hands: gradients are added up by the step
as without sharding, checkpoints and adapters are written from plain tensors (trap 7), and a run may go on with another
number of processes.
"""

import gc
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..quantised import weights_of
from ..runtime import Runtime, give_back_freed_memory
from .group import Group


def shard(group: Group, runtime: Runtime) -> None:
    """Share the frozen weights of a group's backbone out over all processes, in place; the model moves to the device.

    Each block of the model (an entry of an outermost ModuleList) is a unit: gathered before it runs, let go after.
    What stands outside of them (embeddings, the head) is one more unit, whole from the start of forward to the end of
    backward. Word embeddings before which a method puts virtual tokens stay whole.
    """
    model: Any = group.backbone.model
    kept = {parameter for member in group.members for parameter in member.all_tensors().values()}
    kept |= _read_before_forward(group)
    assert any(parameter not in kept for parameter in model.parameters()), "refused by config_checks"
    for parameter in kept:
        parameter.data = parameter.data.to(runtime.device)
    mesh = init_device_mesh(runtime.device.type, (runtime.world,))
    for block in blocks(model):
        if any(parameter not in kept for parameter in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    model.to(runtime.device)  # buffers that stand outside of every unit
    gc.collect()
    give_back_freed_memory()


def _read_before_forward(group: Group) -> set[nn.Parameter]:
    """Word embeddings that peft looks up itself, to put virtual tokens before them: the model's forward, which gathers
    its weights, has not begun by then.
    """
    model = group.model
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return set()
    if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:  # keys and values; embeds nothing
        return set()
    words: Any = model.word_embeddings
    return set(words.parameters())


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The entries of outermost ModuleLists: the layers of a transformer, of whatever name. A list within a list never
    runs itself, its entries do."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from _entries(child)
        else:
            yield from blocks(child)


def _entries(container: nn.Module) -> Iterator[nn.Module]:
    for entry in container.children():
        if isinstance(entry, nn.ModuleList | nn.ModuleDict):
            yield from _entries(entry)
        else:
            yield entry


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(model: nn.Module) -> int:
    """Bytes of weights and buffers that this process holds between steps, each storage once."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the outermost unit stays whole after an evaluation
    storages = {}
    for tensor in weights_of(model):
        storage = own_part(tensor.detach()).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
