"""Batch norms of a pretrained model keep their running statistics."""

import functools
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class KeepsStatistics:
    """Mixin of a batch norm that is always in eval mode."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


def keep_statistics(model: nn.Module) -> list[str]:
    """Make every batch norm of the model, in place, use and keep the statistics that it has.

    In training mode its output would depend on how a step is cut into micro-batches, and the statistics would move with
    the data though no adapter file holds them.

    Returns:
        The names of the batch norms.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.__class__ = _subclass(type(module))
            module.eval()
            found.append(name)
    return found


@functools.cache
def _subclass(cls: type) -> type:
    return cls if issubclass(cls, KeepsStatistics) else type(f"Kept{cls.__name__}", (KeepsStatistics, cls), {})
