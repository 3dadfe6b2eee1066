"""Time, memory and money: against counts by hand."""

import contextlib
import json
import resource
import sys
from pathlib import Path

import pytest
import torch
from comparing import changed, newest, outcome, small, write_config
from processes import engine
from torch import nn

from peft_engine.errors import BudgetReached
from peft_engine.meters import time as clock
from peft_engine.meters.cost import cost_usd
from peft_engine.meters.memory import LiveBytes, peak_rss_bytes
from peft_engine.meters.time import PhaseTimer
from peft_engine.run import train
from peft_engine.training import loop
from peft_engine.training.checkpoint import complete_checkpoints, verify_files


def test_live_bytes_of_tensors_counted_by_hand():
    with LiveBytes() as meter:
        first = torch.zeros(100)  # 400 bytes
        halves = first[:50], first.view(10, 10), first.t()
        assert meter.now == 400, "views share their storage"
        second = torch.ones(10, dtype=torch.float64)  # 80
        assert meter.now == 480
        del first
        assert meter.now == 480, "a view keeps the storage"
        del halves
        assert meter.now == 80
        second.add_(1)
        assert meter.now == 80
        third = second + 1
        assert meter.now == 160
        del second, third
    assert (meter.now, meter.peak) == (0, 480)


def test_resident_tensors_are_counted_once():
    weight = torch.zeros(25)
    meter = LiveBytes([weight, weight[:5], weight.detach(), torch.nn.Parameter(weight)])
    assert meter.now == meter.peak == 100
    with meter:
        weight.mul_(2)
        weight.view(5, 5).t()
    assert meter.peak == 100


def test_what_dies_after_the_mode_ended_is_still_taken_off():
    with LiveBytes() as meter:
        kept = torch.zeros(4)
    assert meter.now == 16
    del kept
    assert meter.now == 0


def test_peak_of_a_small_network_by_hand():
    """x (rows, inner) → Linear → ReLU → Linear → sum, without biases, in fp32.

    The most is alive inside ReLU's backward: its saved output, the gradient that comes in and the one that goes out,
    all (rows, wide), with the second weight's gradient, the loss and the loss's own gradient (one number each).
    """
    rows, inner, wide, outer = 64, 8, 128, 4
    model = nn.Sequential(nn.Linear(inner, wide, bias=False), nn.ReLU(), nn.Linear(wide, outer, bias=False))
    x = torch.randn(rows, inner)
    resident = 4 * (rows * inner + inner * wide + wide * outer)
    with LiveBytes([x, *model.parameters()]) as meter:
        assert meter.now == resident
        model(x).sum().backward()
    assert meter.peak == resident + 4 * (3 * rows * wide + wide * outer) + 8
    assert meter.now == resident + 4 * (inner * wide + wide * outer), "the weights' gradients stay"


def test_saved_tensors_live_until_backward():
    x = torch.randn(50, requires_grad=True)
    with LiveBytes([x]) as meter:
        y = x.exp().exp()  # each exp saves its result: 2 x 200 bytes
        assert meter.now == 200 + 400
        del y
        assert meter.now == 200, "the graph went with its end"
        z = x.exp().exp().sum()
        assert meter.now == 200 + 400 + 4
        z.backward()
        del z
        assert meter.now == 200 + 200, "only x.grad is left"


def test_checkpointing_lowers_the_peak():
    """A meter that misses saved tensors would see no difference."""
    layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()) for _ in range(6))
    x = torch.randn(200, 32)

    def peak(checkpointed: bool) -> int:
        layers.zero_grad(set_to_none=True)
        with LiveBytes([x, *layers.parameters()]) as meter:
            y = x
            for layer in layers:
                y = torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False) if checkpointed else layer(y)
            y.sum().backward()
        return meter.peak

    activation = 4 * 200 * 32
    # 12 saved results of Tanh, or the 5 inputs of later pieces and the 2 inside one; the rest is alike
    assert 4 * activation <= peak(False) - peak(True) <= 6 * activation


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_rss_is_in_bytes():
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert 0.9 * resident <= peak_rss_bytes() < 100 * resident


def test_phases_add_up_and_inner_time_is_taken_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    timer = PhaseTimer()
    with timer.phase("train"):
        now[0] += 1
        with timer.phase("evaluate"):
            now[0] += 10
            with timer.phase("save"):
                now[0] += 100
            now[0] += 20
        now[0] += 2
        with timer.phase("save"):
            now[0] += 300
    now[0] += 5000  # in no phase
    with contextlib.suppress(ValueError), timer.phase("train"):
        now[0] += 4
        raise ValueError("a phase that fails is counted too")
    assert timer.seconds == {"train": 7, "evaluate": 30, "save": 400}
    assert timer.total == 437


def test_cost():
    assert cost_usd(1800, 3.0) == 1.5
    assert cost_usd(1800, 0.0) == 0.0
    assert cost_usd(1800, None) is None


def test_live_bytes_are_counted_on_one_step_that_is_not_timed(tiny_model, tmp_path, monkeypatch):
    counted: list[int] = []

    class Counting(LiveBytes):
        def __enter__(self) -> "Counting":
            counted.append(self.now)
            return super().__enter__()

    monkeypatch.setattr(loop, "LiveBytes", Counting)
    settings = small(tiny_model("llama"), tmp_path, steps=7)
    summary = train(settings)
    assert len(counted) == 1
    last = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    trainee = json.loads((last / "state.json").read_text())["members"]["default"]["trainee"]
    assert len(trainee["step_seconds"]) == 7 - 2, "neither the first step nor the counted one is timed"
    weights = 4 * summary["total_parameters"]
    assert counted[0] >= weights + 2 * 4 * summary["trainable_parameters"], "weights and AdamW's moments are resident"
    assert counted[0] < summary["peak_bytes"] < 50 * weights
    assert summary["tokens_per_second"] == trainee["timed_tokens"] / sum(trainee["step_seconds"])


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"max_hours": 1e-7}, "budget.max_hours: 1e-07 h are used up"),
        ({"max_usd": 1e-6, "usd_per_hour": 100.0}, "budget.max_usd: 0.0"),
    ],
)
def test_budget_stops_with_a_checkpoint_that_goes_on_to_the_same_bits(budget, said, tiny_model, tmp_path):
    settings = changed(small(tiny_model("llama"), tmp_path), training__save_every=100)
    short = changed(settings, budget=budget)
    ended = engine("train", write_config(short, tmp_path / "short.yaml"), "--quiet", folder=tmp_path)
    assert ended.code == BudgetReached.exit_code == 6, ended.err
    assert said in ended.err
    assert "Raise it and run with --resume" in ended.err
    checkpoints = tmp_path / "run" / "checkpoints"
    assert newest(checkpoints) == 1
    verify_files(complete_checkpoints(checkpoints)[0])
    with pytest.raises(BudgetReached):
        train(short, resume=True)
    assert newest(checkpoints) == 2
    summary = train(changed(settings, budget={"usd_per_hour": 3600.0}), resume=True)
    assert summary["cost_usd"] == pytest.approx(summary["wall_seconds"])
    plain = changed(settings, output=str(tmp_path / "plain"))
    train(plain)
    assert outcome(Path(settings.output)) == outcome(Path(plain.output))


def test_a_budget_reached_at_the_last_step_does_not_fail_the_run(tiny_model, tmp_path):
    settings = changed(small(tiny_model("llama"), tmp_path, steps=1), budget={"max_hours": 1e-7})
    assert train(settings)["steps"] == 1
