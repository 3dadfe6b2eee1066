"""A plain PEFT twin of a fused model that drops exactly what the fused one drops."""

from typing import Any

from torch import Tensor, nn

from peft_engine.adapters.fusing import RowSeeds, row_seeds
from peft_engine.adapters.fusing.linears import FusedLoraLinear
from peft_engine.adapters.fusing.state import CALLS_APART, state_of
from peft_kernels.dropout import keep_mask, keep_rate


class Injected(nn.Module):
    """Dropout with the mask that a fused layer of this salt draws."""

    def __init__(self, p: float, salt: int, rows: RowSeeds) -> None:
        super().__init__()
        self.p, self.salt, self.rows = p, salt, rows
        self.batch, self.calls = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        assert self.rows.seeds is not None
        self.calls = self.calls + 1 if self.batch == self.rows.batch else 0
        self.batch = self.rows.batch
        seeds = self.rows.seeds + self.calls * CALLS_APART  # ViT calls one module twice
        return x * keep_mask(x, self.p, seeds, self.salt, backend="torch") / keep_rate(self.p, False)


def holder(model: nn.Module) -> RowSeeds:
    found = row_seeds(model)
    assert found is not None
    return found


def inject(model: Any, plain: Any) -> None:
    """Give the plain twin of a fused model the masks of each of its dropout modules."""
    rows = holder(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedLoraLinear):
            held: Any = plain.get_submodule(name).lora_dropout
            for place, adapter in enumerate(n for n in module.active_adapters if n in module.lora_A):
                held[adapter] = Injected(held[adapter].p, state_of(module).salt + place, rows)
        elif type(module).__name__ == "Dropout" and hasattr(module, "_peft_engine_fused"):
            plain.set_submodule(name, Injected(module.p, state_of(module).salt, rows))
    plain.train(plain.training)
