"""What must hold for every task: any cut into micro-batches gives one gradient, and a resumed run its bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import Crash, changed, crash_at, outcome
from tiny import Assembled, assemble, cut

from peft_engine.config import Config
from peft_engine.run import train
from peft_engine.training.step import gradients


def gradient_of(run: Assembled, rows: np.ndarray, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and flat gradient of one step over `rows` in pieces of `size`."""
    tensors = list(run.group.members[0].tensors.values())
    for tensor in tensors:
        tensor.grad = None
    run.group.model.train()
    units = int(run.data["train"].units[rows].sum())
    found = gradients(run.group, run.task, run.data["train"], cut(rows, size), units, tensors, run.runtime, seed=3)
    return found.loss, torch.cat([t.grad.reshape(-1) for t in tensors if t.grad is not None]).clone()


def pieces_agree(settings: Config, bound: float = 2e-5) -> None:
    """One batch, two uneven pieces and single rows give one loss and one gradient (trap 1), fused dropout included."""
    run = assemble(settings)
    for name, tensor in run.group.members[0].tensors.items():
        if ".lora_B." in name:  # zero at the start, where A would have no gradient
            torch.nn.init.normal_(tensor, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    rows = np.arange(7)
    assert len(set(run.data["train"].units[rows].tolist()) | set(run.data["train"].lengths[rows].tolist())) > 1
    loss, whole = gradient_of(run, rows, 7)
    assert float(whole.abs().max()) > 0
    for size in (4, 1):
        other_loss, other = gradient_of(run, rows, size)
        assert abs(float(other_loss - loss)) <= bound * abs(float(loss)), size
        assert float((other - whole).abs().max()) <= bound * float(whole.abs().max()), size


def resumes_bitwise(settings: Config, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is lost after `step` and resumed ends as the undisturbed one."""
    train(settings)
    broken = changed(settings, output=str(Path(settings.output).parent / "broken"))
    with monkeypatch.context() as patched:
        crash_at(patched, step)
        with pytest.raises(Crash):
            train(broken)
    train(broken, resume=True)
    assert outcome(broken.output) == outcome(settings.output)
