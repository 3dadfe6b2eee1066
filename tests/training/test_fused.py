"""Training on a fused model, through the engine: what ran is recorded, and a cut of the batch changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from comparing import changed, small
from safetensors.torch import load_file
from tiny import class_rows, config, write_rows

from peft_engine.config import Config
from peft_engine.errors import ConfigError
from peft_engine.run import train


def losses(settings: Config) -> list[float]:
    rows = [json.loads(line) for line in (Path(settings.output) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def adapter_of(settings: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(settings.output) / "adapter/adapter_model.safetensors")


def test_the_record_says_what_ran(tiny_model, tmp_path):
    settings = small(tiny_model("llama"), tmp_path, steps=2)
    fused = train(settings)
    assert fused["decisions"]["kernels"] == "auto: the model is on cpu"
    assert fused["kernels"]["backend"] == "torch"
    assert fused["kernels"]["skipped"] == {}
    layers = {"rope": 2, "lora_linear, shared input": 10, "lora_linear": 4, "glu": 2, "rms_norm": 5}
    assert fused["kernels"]["swapped"] == layers | {"linear_cross_entropy": 1}
    plain = train(settings.model_copy(update={"kernels": "off", "output": str(tmp_path / "plain")}))
    assert plain["kernels"] is None
    assert plain["decisions"]["kernels"] == "off: plain PEFT"
    assert fused["peak_bytes"] < plain["peak_bytes"]


@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
def test_dropout_does_not_depend_on_the_cut_into_micro_batches(tiny_model, tmp_path, task):
    """A row's masks are named by (seed, step, row): 1, 2 or 5 rows at once give the same run up to rounding."""
    if task == "causal-lm":
        settings = small(tiny_model("llama"), tmp_path, batch_size=5, micro_batch_size=5)
    else:
        rows = write_rows(tmp_path / "rows.jsonl", class_rows(20))
        given = {"steps": 8, "batch_size": 5, "micro_batch_size": 5, "learning_rate": 0.01}
        settings = config(task, tiny_model("bert"), rows, tmp_path / "run", adapter={"dropout": 0.2}, training=given)
    runs = [changed(settings, output=str(tmp_path / str(n)), training__micro_batch_size=n) for n in (5, 2, 1)]
    for each in runs:
        train(each)
    for each in runs[1:]:
        assert losses(each) == pytest.approx(losses(runs[0]), rel=1e-5)
    other = changed(settings, output=str(tmp_path / "other"), training__seed=1)
    train(other)
    assert losses(other) != pytest.approx(losses(runs[0]), rel=1e-3), "dropout or order must depend on the seed"


def test_checkpointing_replays_the_same_masks(tiny_model, tmp_path):
    settings = small(tiny_model("llama"), tmp_path)
    again = changed(settings, output=str(tmp_path / "again"), training__gradient_checkpointing=True)
    train(settings)
    train(again)
    assert losses(again) == losses(settings)
    found, wanted = adapter_of(again), adapter_of(settings)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_triton_asked_for_on_a_cpu_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    settings = small(tiny_model("llama"), tmp_path).model_copy(update={"kernels": "triton"})
    with pytest.raises(ConfigError, match=r"backend 'triton' needs a model on CUDA.*the model is on cpu"):
        train(settings)
