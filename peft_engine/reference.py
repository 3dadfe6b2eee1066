"""The reference model of dpo and kto: the trained model as it was at the start, which TRL makes or copies.

For a peft method TRL adds a second adapter, `ref`, and copies the weights whose names it knows. Here every tensor of
the adapter is copied, and a start that moves the frozen weights (PiSSA, OLoRA) or needs data is not made twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn

from .errors import ConfigError

OWN, REFERENCE = "default", "ref"


@contextmanager
def one_start(model: nn.Module) -> Iterator[None]:
    """While TRL adds its adapter: the one that is there has had its start, and the new one gets its weights."""
    config = model.peft_config[OWN] if isinstance(model, PeftModel) else None
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, bool):
        yield
        return
    config.init_lora_weights = True  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.init_lora_weights = init  # type: ignore[union-attr]


def copy_to_reference(model: nn.Module) -> None:
    """Give TRL's reference adapter, where it added one, every tensor of the trained adapter.

    Raises:
        ConfigError: a tensor has no counterpart.
    """
    if not isinstance(model, PeftModel) or REFERENCE not in model.peft_config:
        return
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        parts = name.split(".")
        if OWN not in parts:
            continue
        twin = tensors.get(".".join(REFERENCE if part == OWN else part for part in parts))
        if twin is None or twin.shape != tensor.shape:
            raise ConfigError(
                f"adapter.method: TRL's reference adapter has no counterpart of {name}.", "Use adapter.method: lora."
            )
        twin.data = tensor.detach().clone()


def reference_numbers(model: nn.Module) -> int:
    """How many numbers TRL's reference adapter holds."""
    return sum(p.numel() for name, p in model.named_parameters() if REFERENCE in name.split("."))
