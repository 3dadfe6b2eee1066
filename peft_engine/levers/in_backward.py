"""The optimizer's step inside of backward: a tensor is updated as soon as its gradient is whole, which is let go then.

No two gradients are alive at once, so that full fine-tuning saves a copy of the weights; of adapters there is little to
save. What needs all gradients together (the norm to clip by, several micro-batches, fp16's scaler) can't go with it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class StepInBackward:
    """One optimizer step, taken tensor by tensor.

    Attributes:
        moved: tensors that were updated so far. None is any more once a gradient was not finite.

    Args:
        optimizer: its learning rates are those of this step already.
        tensors: what trains; all are in the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, tensors: Sequence[nn.Parameter]) -> None:
        self.optimizer, self.tensors = optimizer, tensors
        self.moved = 0
        self._groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
        self._norms: dict[int, Tensor] = {}
        self._finite = True

    @contextmanager
    def during(self) -> Iterator[None]:
        """Around forward and backward of the whole step."""
        hooks = [tensor.register_post_accumulate_grad_hook(self._step) for tensor in self.tensors]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def norm(self) -> Tensor:
        """Of the whole gradient, fp32 scalar."""
        return torch.nn.utils.get_total_norm([*self._norms.values()])

    def reached(self) -> Tensor:
        """Which tensors got a gradient, (tensors,), 0 or 1."""
        return torch.tensor([float(id(tensor) in self._norms) for tensor in self.tensors])

    @torch.no_grad()
    def _step(self, tensor: Tensor) -> None:
        assert id(tensor) not in self._norms, "a second backward within the step"
        assert tensor.grad is not None
        self._norms[id(tensor)] = norm = torch.linalg.vector_norm(tensor.grad)
        self._finite = self._finite and self._is_finite(norm)
        if self._finite:
            self._update(tensor)
            self.moved += 1
        tensor.grad = None

    def _is_finite(self, norm: Tensor) -> bool:
        return bool(torch.isfinite(norm))

    def _update(self, tensor: Tensor) -> None:
        """The optimizer's own step with this tensor alone; its state stays where a checkpoint looks for it."""
        whole = self.optimizer.param_groups
        self.optimizer.param_groups = [{**self._groups[id(tensor)], "params": [tensor]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = whole
