"""The loss scale of fp16, with torch's own scaler on CPU in fp32: scales are powers of two, so bits must not change."""

import json
from pathlib import Path

import pytest
import torch
from comparing import Crash, changed, crash_at, outcome, small

from peft_engine import session as run
from peft_engine.config import Config
from peft_engine.errors import Diverged
from peft_engine.run import train
from peft_engine.runtime import Runtime
from peft_engine.tasks.causal_lm import CausalLM
from peft_engine.training import loop
from peft_engine.training.checkpoint import complete_checkpoints, read_state

FITS, OVERFLOWS = 2.0**10, 2.0**127


def with_scaler(monkeypatch: pytest.MonkeyPatch, scale: float, **more: float) -> None:
    """Give the runs that follow what Accelerate gives them on a GPU with `precision: fp16`."""
    start = run.start

    def scaled(config: Config) -> Runtime:
        runtime = start(config)
        runtime.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, **more)  # type: ignore[arg-type]
        return runtime

    monkeypatch.setattr(run, "start", scaled)


def with_large_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """So large that gradients at the largest scale overflow in fp32, as ordinary ones do in fp16."""
    loss = CausalLM.training_loss
    monkeypatch.setattr(CausalLM, "training_loss", lambda self, model, batch: loss(self, model, batch) * 2.0**20)


def rows_of(settings: Config) -> list[dict]:
    rows = [json.loads(line) for line in (Path(settings.output) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_a_scale_that_fits_changes_no_bit(tiny_model, tmp_path, monkeypatch):
    """Losses, and norms and clipping, which come after the scale is taken out."""
    plain = changed(small(tiny_model("llama"), tmp_path), training__max_grad_norm=0.05)
    scaled = changed(plain, output=str(tmp_path / "scaled"))
    train(plain)
    with_scaler(monkeypatch, FITS)
    train(scaled)
    assert min(row["grad_norm"] for row in rows_of(plain)) > 0.05, "nothing was clipped"
    found, wanted = outcome(scaled.output), outcome(plain.output)
    extra = found["state"].pop("live_bytes") - wanted["state"].pop("live_bytes")
    assert 0 <= extra <= 8, "the scale itself is one number"
    assert found == wanted


def test_steps_that_overflow_are_skipped_and_counted_as_no_update(tiny_model, tmp_path, monkeypatch):
    """Two of them at the start: LoRA's B is still zero after them, which is no fault (trap 6)."""
    settings = small(tiny_model("llama"), tmp_path, warmup=0)
    with_large_losses(monkeypatch)
    with_scaler(monkeypatch, OVERFLOWS, backoff_factor=2.0**-10)
    train(settings)
    norms = [row["grad_norm"] for row in rows_of(settings)]
    assert norms[:2] == [None, None]
    assert None not in norms[4:]
    last = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    saved = read_state(last)["members"]["default"]["trainee"]
    assert saved["updates"] == 8 - norms.count(None)
    assert saved["skipped"] == 0


def test_the_scale_is_resumed(tiny_model, tmp_path, monkeypatch):
    """One that began again would skip other steps."""
    settings = small(tiny_model("llama"), tmp_path, warmup=0)
    with_large_losses(monkeypatch)
    with_scaler(monkeypatch, OVERFLOWS, backoff_factor=2.0**-40, growth_interval=2)
    plain = changed(settings, output=str(tmp_path / "plain"))
    train(plain)
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(Crash):
            train(settings)
    train(settings, resume=True)
    assert outcome(settings.output) == outcome(plain.output)
    states = [
        read_state(complete_checkpoints(Path(s.output) / "checkpoints")[-1])["run"]["scaler"] for s in (settings, plain)
    ]
    assert states[0] == states[1]
    assert states[0]["scale"] != OVERFLOWS


def test_no_finite_gradient_in_many_steps_is_a_divergence(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SKIPS_IN_A_ROW", 4)
    settings = small(tiny_model("llama"), tmp_path)
    with_large_losses(monkeypatch)
    with_scaler(monkeypatch, OVERFLOWS, backoff_factor=0.999)
    with pytest.raises(Diverged, match=r"Step 4: loss .*, gradient norm (inf|nan)"):
        train(settings)
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-2", "step-3"]
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["step"] == 4
