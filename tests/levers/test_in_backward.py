"""The optimizer's step inside of backward: the same weights, no gradients kept."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from comparing import changed, small
from tiny import assemble
from torch import Tensor, nn

from peft_engine import building
from peft_engine.config import Config
from peft_engine.errors import ConfigError, Diverged, OutOfMemory
from peft_engine.levers.in_backward import StepInBackward
from peft_engine.meters.memory import LiveBytes
from peft_engine.run import train
from peft_engine.runtime import Runtime, start
from peft_engine.training.checkpoint import complete_checkpoints
from peft_engine.training.loop import Hooks

Models = Callable[[str], Path]


def settings(model: Path, folder: Path, early: bool, **more: Any) -> Config:
    given = small(model, folder, steps=4, max_grad_norm=None, micro_batch_size=4, weight_decay=0.1)
    return changed(given, training__optimizer_in_backward=early, output=str(folder / f"early-{early}"), **more)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "adamw8bit"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_same_weights_bit_for_bit(optimizer: str, method: str, tiny_model: Models, tmp_path: Path) -> None:
    more = {"training__optimizer": optimizer, "adapter": {"method": method}}
    if method == "full":
        more["training__learning_rate"] = 1e-3
    found = []
    for early in (False, True):
        run = assemble(settings(tiny_model("llama"), tmp_path, early, **more))
        rows = run.train(4)
        found.append((rows, run.group.members[0].tensors, run.trainees[0].optimizer.state_dict()))
    (rows, tensors, state), (early_rows, early_tensors, early_state) = found
    for name, tensor in tensors.items():
        assert torch.equal(tensor, early_tensors[name]), name
    assert _equal(state, early_state), "a checkpoint would hold another state"
    for row, other in zip(rows, early_rows, strict=True):
        assert (row["loss"], row["learning_rate"]) == (other["loss"], other["learning_rate"])
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def test_two_gradients_are_never_there_at_once() -> None:
    layers, width = 8, 64
    peaks = {}
    for early in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, weights = torch.randn(2, width), list(model.parameters())
        with LiveBytes([x, *weights]) as meter:
            if early:
                with StepInBackward(optimizer, weights).during():
                    model(x).sum().backward()
            else:
                model(x).sum().backward()
                optimizer.step()
        peaks[early] = meter.peak
    assert all(p.grad is None for p in weights)
    saved = peaks[False] - peaks[True]
    assert saved >= 0.9 * (layers - 2) * width * width * 4, saved


def test_hooks_go_with_the_step() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    stepping = StepInBackward(optimizer, [weight])
    with stepping.during():
        (weight * 2).sum().backward()
    assert torch.equal(weight.detach(), torch.zeros(3))
    assert (stepping.moved, weight.grad) == (1, None)
    assert float(stepping.norm()) == pytest.approx(math.sqrt(12))
    assert stepping.reached().tolist() == [1.0]
    (weight * 2).sum().backward()
    assert torch.equal(weight.detach(), torch.zeros(3))
    assert weight.grad is not None


def test_a_tensor_that_backward_does_not_reach_is_told() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    stepping = StepInBackward(torch.optim.SGD(weights, lr=0.5), weights)
    with stepping.during():
        (weights[0] + weights[2]).sum().backward()
    assert stepping.reached().tolist() == [1.0, 0.0, 1.0]
    assert torch.equal(weights[1].detach(), torch.ones(3))


class Poisoned(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * float("inf")


def test_nothing_moves_once_a_gradient_is_not_finite() -> None:
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    stepping = StepInBackward(torch.optim.SGD([first, second, third], lr=0.1), [first, second, third])
    with stepping.during():
        (Poisoned.apply(first * second) * third).sum().backward()
    assert stepping.moved == 1
    assert not math.isfinite(float(stepping.norm()))
    assert not torch.equal(third.detach(), torch.ones(2))
    assert all(torch.equal(t.detach(), torch.ones(2)) for t in (first, second))


@pytest.mark.parametrize(
    ("save_every", "saves", "words"),
    [
        (1, [1], "tensors of this run were updated in this step already: the checkpoint of step 1 has good weights."),
        (9, [], "already, and it has no checkpoint: start anew; training.save_every says how often one is written."),
    ],
)
def test_a_run_that_diverges_says_what_moved(
    save_every: int,
    saves: list[int],
    words: str,
    tiny_model: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Poison in the middle of the model: what stands above it was updated already, so no checkpoint is written."""
    saved: list[int] = []
    monkeypatch.setattr(tiny, "Hooks", lambda **given: Hooks(**{**given, "save": saved.append}))
    run = assemble(settings(tiny_model("llama"), tmp_path, True, training__save_every=save_every))
    layer: Any = dict(run.group.model.named_modules())["base_model.model.model.layers.0.mlp"]
    begun: list[int] = []

    def poison(_: Any, __: Any, y: Tensor) -> Tensor:
        begun.extend([1] * torch.is_grad_enabled())
        return Poisoned.apply(y) if len(begun) > 1 else y

    layer.register_forward_hook(poison)
    with pytest.raises(Diverged, match=r"Step 2: .*gradient norm (nan|inf)") as found:
        run.train(3)
    assert words in found.value.fix
    assert saved == saves


def test_a_resumed_run_names_the_checkpoint_it_began_at(tiny_model: Models, tmp_path: Path) -> None:
    run = assemble(settings(tiny_model("llama"), tmp_path, True, training__save_every=9))
    run.train(1)
    layer: Any = dict(run.group.model.named_modules())["base_model.model.model.layers.0.mlp"]
    layer.register_forward_hook(lambda _, __, y: Poisoned.apply(y))
    with pytest.raises(Diverged) as found:
        run.train(2)
    assert "the checkpoint of step 1 has good weights" in found.value.fix


def test_memory_that_runs_out(tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In backward of step 2, when tensors were updated: no smaller pieces, no checkpoint, and advice that is taken."""
    given = settings(tiny_model("llama"), tmp_path, True, training__micro_batch_size="auto", training__save_every=1)
    steps: list[int] = []

    def starved(self: StepInBackward, tensor: Tensor) -> None:
        steps.append(1)
        if len(steps) > 28 + 7:  # 28 tensors train
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        update(self, tensor)

    update = StepInBackward._update
    monkeypatch.setattr(StepInBackward, "_update", starved)
    with pytest.raises(OutOfMemory) as found:
        train(given)
    assert found.value.fix.startswith("Lower training.batch_size or data.max_length, set ")
    assert "micro_batch_size" not in found.value.fix
    assert [path.name for path in complete_checkpoints(Path(given.output) / "checkpoints")] == ["step-1"]


def test_run_json(tiny_model: Models, tmp_path: Path) -> None:
    given = settings(tiny_model("llama"), tmp_path, True, adapter={"method": "full"})
    summary = train(given)
    assert summary["memory"]["gradients"] == 0
    assert "optimizer_in_backward" in summary["decisions"]
    plain = train(settings(tiny_model("llama"), tmp_path, False, adapter={"method": "full"}))
    assert "optimizer_in_backward" not in plain["decisions"]
    assert summary["metrics"] == plain["metrics"]
    assert summary["peak_bytes"] < plain["peak_bytes"]
    assert json.loads((tmp_path / "early-True" / "run.json").read_text())["memory"] == summary["memory"]


def test_processes_are_refused(tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(tiny_model("llama"), tmp_path, True)
    runtime = start(given)
    monkeypatch.setattr(Runtime, "world", property(lambda _: 2))
    with pytest.raises(ConfigError, match=r"optimizer_in_backward .*processes add up theirs"):
        building.refuse_levers(given, runtime)
