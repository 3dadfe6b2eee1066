"""The average of the weights against its definition; used for evaluation and the saved adapter, resumed bit by bit."""

import json
from pathlib import Path

import pytest
import torch
from comparing import Crash, changed, crash_at, outcome, small
from safetensors.torch import load_file, save_file
from tiny import assemble
from torch import Tensor

from peft_engine.errors import StorageError
from peft_engine.run import train
from peft_engine.training.checkpoint import MANIFEST, complete_checkpoints, digest_file
from peft_engine.training.loop import Loop
from peft_engine.using import evaluate


def weights_by_step(settings, steps: int) -> list[dict[str, Tensor]]:
    """A member's raw weights after each optimizer step, from runs of a loop that logs every step."""
    run = assemble(settings)
    member = run.group.members[0]
    found: list[dict[str, Tensor]] = []
    trainee = run.trainees[0]
    update = trainee.optimizer.step

    def step(*arguments):
        update(*arguments)
        found.append({name: tensor.detach().double().clone() for name, tensor in member.tensors.items()})

    trainee.optimizer.step = step
    run.train(steps)
    return found


def direct(history: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """Weighted mean with weights decay^(t - i), in fp64."""
    shares = torch.tensor([decay ** (len(history) - 1 - i) for i in range(len(history))], dtype=torch.float64)
    shares /= shares.sum()
    return {
        name: (torch.stack([one[name] for one in history]) * shares.view(-1, *[1] * history[0][name].ndim)).sum(0)
        for name in history[0]
    }


@pytest.mark.parametrize("decay", [0.6, 0.999])
def test_the_average_is_the_weighted_mean_of_all_weights_after_updates(decay, tiny_model, tmp_path):
    settings = small(tiny_model("llama"), tmp_path, steps=6, ema_decay=decay, warmup=0)
    run = assemble(settings)
    history = weights_by_step(settings, 6)
    run.train(6)
    expected = direct(history, decay)
    raw = history[-1]
    for name, tensor in run.group.members[0].tensors.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert any((expected[name] - raw[name]).abs().max() > 1e-3 for name in raw), "nothing was averaged"


def test_an_update_at_rate_zero_is_no_update(tiny_model, tmp_path):
    """Warm-up starts at 0: those weights are not averaged in."""
    settings = small(tiny_model("llama"), tmp_path, steps=5, ema_decay=0.7, warmup=2)
    run = assemble(settings)
    history = weights_by_step(settings, 5)
    run.train(5)
    expected = direct(history[1:], 0.7)
    for name, tensor in run.group.members[0].tensors.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_what_is_saved_and_evaluated_is_the_average(tiny_model, tmp_path):
    settings = small(tiny_model("llama"), tmp_path, ema_decay=0.6, eval_every=4)
    summary = train(settings)
    adapter = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    last = complete_checkpoints(tmp_path / "run/checkpoints")[-1]
    average = load_file(last / "default.average.safetensors")
    raw = load_file(last / "default.adapter.safetensors")
    assert all(torch.equal(adapter[name], average[name]) for name in adapter)
    assert any(not torch.equal(raw[name], average[name]) for name in raw)
    assert summary["evaluations"][-1]["loss"] == pytest.approx(
        evaluate(settings.output, "eval")["metrics"]["loss"], rel=1e-6
    )
    plain = train(changed(settings, output=str(tmp_path / "plain"), training__ema_decay=None))
    assert plain["evaluations"][-1]["loss"] != pytest.approx(summary["evaluations"][-1]["loss"], rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (tmp_path / "plain/metrics.jsonl").read_text().splitlines()]
    assert [row.get("loss") for row in rows] == [row.get("loss") for row in others], "it must not touch training"
    assert summary["peak_bytes"] - plain["peak_bytes"] == sum(t.nbytes for t in average.values())


@pytest.mark.parametrize("step", [3, 6])
def test_resume_gives_the_same_bits(step, tiny_model, tmp_path, monkeypatch):
    whole = small(tiny_model("llama"), tmp_path, ema_decay=0.6, eval_every=2, restore_best=step == 6)
    train(whole)
    broken = changed(whole, output=str(tmp_path / "broken"))
    with monkeypatch.context() as patched:
        crash_at(patched, step)
        with pytest.raises(Crash):
            train(broken)
    train(broken, resume=True)
    assert outcome(broken.output) == outcome(whole.output)
    if step == 6:
        train(broken, resume=True)  # of a finished run
        assert outcome(broken.output) == outcome(whole.output)


def test_the_best_average_is_restored(tiny_model, tmp_path, monkeypatch):
    """What is saved is the average of the best evaluation, not its raw weights, and gives the metric again."""
    monkeypatch.setattr(Loop, "_gain", lambda _, value, before: 0.0 if before else 1.0)  # the first stays the best
    settings = small(tiny_model("llama"), tmp_path, ema_decay=0.6, eval_every=3, restore_best=True)
    summary = train(settings)
    first, last = summary["evaluations"][0]["loss"], summary["evaluations"][-1]["loss"]
    assert summary["best_step"] == 3
    assert evaluate(settings.output, "eval")["metrics"]["loss"] == pytest.approx(first, rel=1e-6)
    assert first != pytest.approx(last, rel=1e-4)


def test_an_altered_average_is_refused(tiny_model, tmp_path, monkeypatch):
    settings = small(tiny_model("llama"), tmp_path, ema_decay=0.6)
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(Crash):
            train(settings)
    last = complete_checkpoints(tmp_path / "run/checkpoints")[-1]
    path = last / "default.average.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, path)
    manifest = json.loads((last / MANIFEST).read_text())
    manifest["files"][path.name] = digest_file(Path(path))  # so that only the tensors' own digests can tell
    (last / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="1 tensors were not restored as saved"):
        train(settings, resume=True)
