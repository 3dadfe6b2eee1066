"""AdaLoRA (Zhang et al. 2023): ranks that move between modules during training.

peft adds the orthogonality term where a model's own forward returns a loss, and moves ranks when it is called after
each optimizer step. The engine computes losses outside, so it asks here for the term, once per step, and calls peft
itself.
"""

from dataclasses import replace
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor

from ..errors import ConfigError

KEPT = ("ipt", "exp_avg_ipt", "exp_avg_unc")
PATTERN = "rank_pattern"
SEPARATOR = "::"


class CalledAdaLora:
    """Mixin of peft's AdaLoraModel, which runs the model's `forward` by its name and so goes past the hooks on it: a
    sharded model would not be gathered. The term that it adds to a loss is the engine's.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # type: ignore[attr-defined]


class RankAllocation:
    """The part of AdaLoRA that is neither a weight nor a gradient, of one member.

    Attributes:
        weight: of the orthogonality term; peft's own is switched off while the engine adds it.
    """

    def __init__(self, model: PeftModel, adapter: str) -> None:
        found = model.peft_config[adapter]
        assert isinstance(found, AdaLoraConfig)
        self.model, self.adapter, self.config = model, adapter, found
        self.tuner: Any = model.base_model
        self.tuner.__class__ = type("CalledAdaLora", (CalledAdaLora, type(self.tuner)), {})
        self.weight, found.orth_reg_weight = found.orth_reg_weight, 0.0

    def begin(self, total_steps: int) -> None:
        """Tell peft the number of optimizer steps. Raises ConfigError where its phases don't fit into them."""
        try:
            replace(self.config, total_step=total_steps)
        except ValueError as error:
            raise ConfigError(
                f"adapter.method: peft refuses adalora for {total_steps} steps: {error}",
                "Train longer, or lower tinit and tfinal under adapter.options.",
            ) from error
        self.config.total_step = total_steps

    def penalty(self) -> Tensor | None:
        """weight × the mean over all A and B of ‖P·Pᵀ - I‖ (for B: Pᵀ·P), a scalar; None without a weight."""
        if not self.weight:
            return None
        norms = []
        for name, p in self.tuner.model.named_parameters():
            if self.adapter in name.split(".") and ("lora_A" in name or "lora_B" in name):
                product = p @ p.T if "lora_A" in name else p.T @ p
                norms.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=p.device)))
        return self.weight * torch.stack(norms).mean()

    def after_step(self, step: int) -> None:
        """Judge and move ranks; gradients of the step must still be there."""
        self.tuner.update_and_allocate(step)

    def settle(self) -> None:
        """Before saving: forget the final ranks where the weights are of an earlier step (the best one), which they
        would cut.
        """
        for name, kept in (self.config.rank_pattern or {}).items():
            values = self.tuner.model.get_parameter(self._live(name)).detach().reshape(-1)
            if bool(values[~torch.tensor(kept, device=values.device)].any()):
                self.config.rank_pattern = None
                return

    def to_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the weights."""
        allocator = self.tuner.rankallocator
        found = {f"{kind}{SEPARATOR}{n}": t for kind in KEPT for n, t in getattr(allocator, kind).items()}
        for name, kept in (self.config.rank_pattern or {}).items():
            found[f"{PATTERN}{SEPARATOR}{name}"] = torch.tensor(kept)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `to_tensors` gave."""
        allocator = self.tuner.rankallocator
        allocator.reset_ipt()
        pattern: dict[str, list[bool]] = {}
        for key, tensor in tensors.items():
            kind, name = key.split(SEPARATOR)
            if kind == PATTERN:
                pattern[name] = tensor.tolist()
            else:
                getattr(allocator, kind)[name] = tensor.to(self.tuner.model.get_parameter(name).device)
        self.config.rank_pattern = pattern or None

    def _live(self, name: str) -> str:
        """The parameter of a name of the pattern, from which saving takes the adapter's name."""
        return name if name.endswith(f".{self.adapter}") else f"{name}.{self.adapter}"
