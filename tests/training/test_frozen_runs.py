"""Runs whose frozen linears are codes: what run.json says, resume, and the use of a finished run as it was trained."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import changed, outcome, train_and_crash
from tiny import assemble, class_rows, config, pair_rows, write_rows
from tiny_seq2seq import SEQ2SEQ, copy_rows, make_seq2seq

from peft_engine.adapters.fusing.frozen_linear import frozen_of
from peft_engine.adapters.fusing.frozen_record import FILE, read_record, write_record
from peft_engine.config import Config
from peft_engine.errors import ConfigError, StorageError
from peft_engine.generation import matched
from peft_engine.run import train
from peft_engine.using import evaluate, export, generate, open_run, predict


def settings(tiny_model: Any, folder: Path, task: str = "causal-lm", **model: Any) -> Config:
    lm = task == "causal-lm"
    rows = write_rows(folder / "rows.jsonl", pair_rows(28) if lm else class_rows(28))
    return config(
        task, tiny_model("llama" if lm else "bert"), rows, folder / "run",
        model={"frozen_compute": "int8", **model},
        adapter={"rank": 4, "dropout": 0.1},
        data={"split": {"eval": 0.2, "test": 0.2}},
        training={"steps": 8, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 0.01, "save_every": 3},
    )  # fmt: skip


@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
@pytest.mark.parametrize("lever", ["none", "smooth"])
def test_a_run_says_what_it_froze_and_is_used_as_it_was_trained(task, lever, tiny_model, tmp_path) -> None:
    given = settings(tiny_model, tmp_path, task, frozen_outliers=lever)
    summary = train(given)
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    told, kernels = said["decisions"]["frozen_compute"], said["kernels"]
    assert told.startswith("int8: asked for")
    assert "the largest error 0.0" in told
    assert kernels["frozen"]["int8"] > 8
    known = "model.layers.0.mlp.up_proj" if task == "causal-lm" else "encoder.layer.0.attention.self.query"
    assert any(name.endswith(known) for name in kernels["frozen_errors"])
    assert all(isinstance(reason, str) for reason in kernels["kept_full"].values())
    assert kernels["passes"].startswith(("compiled by", "plain torch"))
    assert read_record(tmp_path / "run" / FILE).lever == lever
    assert said["memory"]["weights"] < 4 * said["total_parameters"]

    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]["after"]
    opened = open_run(tmp_path / "run")
    assert sum(frozen_of(m) is not None for m in opened.group.model.modules()) == kernels["frozen"]["int8"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matched(opened.group.model).fast_dtype == torch.bfloat16  # codes are no dtype to compute in
    full = open_run(tmp_path / "run", ("model.frozen_compute=full", "model.frozen_outliers=none"))
    assert not any(frozen_of(m) is not None for m in full.group.model.modules())
    if task == "causal-lm":
        assert isinstance(generate(tmp_path / "run", "the quick", max_new_tokens=3), str)
    else:
        assert len(predict(tmp_path / "run", str(tmp_path / "rows.jsonl"))) == 28


def test_the_adapter_is_a_plain_one(tiny_model, tmp_path) -> None:
    train(settings(tiny_model, tmp_path))
    names = {path.name for path in (tmp_path / "run" / "adapter").iterdir()}
    assert FILE not in names
    folder, drift = export(tmp_path / "run", target=tmp_path / "copy")
    assert folder == tmp_path / "copy"
    assert drift.relative < 1e-3


@pytest.mark.parametrize("compute", ["int8", "auto", "bf16"])
def test_resume_gives_the_bits_of_an_undisturbed_run(compute, tiny_model, tmp_path, monkeypatch) -> None:
    whole = settings(tiny_model, tmp_path, frozen_compute=compute)
    if compute == "auto":  # which of two formats is faster may change from one second to the next
        monkeypatch.setattr(
            "peft_engine.adapters.fusing.formats.time_formats", lambda *_: {"full": 1.0, "int8": 0.5, "bf16": 0.4}
        )
    train(whole)
    broken = changed(whole, output=str(tmp_path / "broken"))
    train_and_crash(monkeypatch, broken, 5)
    monkeypatch.setattr(
        "peft_engine.adapters.fusing.formats.time_formats", lambda *_: {"full": 1.0, "int8": 0.5, "bf16": 0.9}
    )
    train(broken, resume=True)
    assert outcome(broken.output) == outcome(whole.output)
    kept = read_record(tmp_path / "broken" / FILE)
    assert kept.format == ("bf16" if compute != "int8" else "int8")


def test_what_was_decided_must_be_there(tiny_model, tmp_path, monkeypatch) -> None:
    given = settings(tiny_model, tmp_path)
    train_and_crash(monkeypatch, given, 5)
    record = (tmp_path / "run" / FILE).read_bytes()
    (tmp_path / "run" / FILE).unlink()
    with pytest.raises(StorageError, match="is missing: it says which weights were rounded"):
        train(given, resume=True)
    (tmp_path / "run" / FILE).write_bytes(record)
    train(given, resume=True)
    (tmp_path / "run" / FILE).unlink()
    with pytest.raises(StorageError, match="is missing: it says which weights were rounded"):
        open_run(tmp_path / "run")
    open_run(tmp_path / "run", ("model.frozen_compute=full",))


def test_what_was_decided_is_this_runs(tiny_model, tmp_path, monkeypatch) -> None:
    """A file of another run, or one with a number changed, is told from the run's own, on resume and in use."""
    given = settings(tiny_model, tmp_path)
    train_and_crash(monkeypatch, given, 5)
    own = tmp_path / "run" / FILE
    record = own.read_bytes()
    other = read_record(own)
    name = next(iter(other.outliers))
    assert other.digest() == read_record(own).digest()
    other.outliers[name].smooth[0] *= 1.01
    write_record(other, own)
    with pytest.raises(StorageError, match="is not what this run wrote: it was changed, or is another run's"):
        train(given, resume=True)
    own.write_bytes(record)
    summary = train(given, resume=True)
    assert summary["digests"]["frozen"] == read_record(own, summary["digests"]["frozen"]).digest()
    open_run(tmp_path / "run")
    less = read_record(own)
    less.frozen.remove(less.frozen[-1])
    write_record(less, own)
    with pytest.raises(StorageError, match="is not what this run wrote"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize("init", ["pissa", "eva", "lora-ga", "olora"])
def test_starts_that_are_made_of_the_weights_come_first(init, tiny_model, tmp_path) -> None:
    """The same start as in full precision: the weights are rounded after it."""
    given = settings(tiny_model, tmp_path)
    adapter = given.adapter.model_copy(update={"init": init})
    starts = []
    for compute in ("int8", "full"):
        model = given.model.model_copy(update={"frozen_compute": compute})
        made = assemble(given.model_copy(update={"adapter": adapter, "model": model}))
        starts.append({name: t.detach().clone() for name, t in made.group.members[0].tensors.items()})
        assert (compute == "int8") == any(frozen_of(m) is not None for m in made.group.model.modules())
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(t, starts[1][name]) for name, t in starts[0].items())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_weights_that_a_start_moved_are_moved_again(init, tiny_model, tmp_path) -> None:
    """What was rounded is what the start left of the weight; the adapter file stands on the whole one."""
    given = settings(tiny_model, tmp_path)
    summary = train(given.model_copy(update={"adapter": given.adapter.model_copy(update={"init": init})}))
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]["after"]
    assert export(tmp_path / "run")[1].relative < 1e-3


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("compute", ["int8", "bf16"])
def test_encoder_decoders_compute_nearly_the_same(family, compute, tmp_path) -> None:
    """T5's feed-forward casts x to the dtype of a weight, which would be that of the codes."""
    model, rows = make_seq2seq(family, tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", copy_rows(30))
    losses = {}
    for one in ("full", compute):
        summary = train(config(
            "seq2seq", model, rows, tmp_path / one, model={"frozen_compute": one}, adapter={"rank": 4},
            data={"split": {"eval": 0.2, "test": 0.0}}, training={"steps": 4, "batch_size": 4, "learning_rate": 0.01},
        ))  # fmt: skip
        losses[one] = [summary["metrics"][when]["loss"] for when in ("before", "after")]
    assert losses[compute] == pytest.approx(losses["full"], rel=0.03)
    kept = json.loads((tmp_path / compute / "run.json").read_text())["kernels"]["kept_full"]
    read = [name for name, reason in kept.items() if reason == "the module that it is in reads its weight"]
    assert all(name.endswith(".wo") for name in read)
    assert bool(read) == family.startswith("t5")
    assert evaluate(tmp_path / compute, "eval")["metrics"]["loss"] == losses[compute][1]


@pytest.mark.parametrize("method", ["bitfit", "head", "houlsby", "prompt"])
def test_other_methods_run_over_codes(method, tiny_model, tmp_path) -> None:
    family = {"bitfit": "gpt2"}.get(method, "llama")
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(20))
    given = config(
        "causal-lm", tiny_model(family), rows, tmp_path / "run",
        model={"frozen_compute": "int8"}, adapter={"method": method},
        data={"split": {"eval": 0.2, "test": 0.0}}, training={"steps": 3, "batch_size": 4, "learning_rate": 0.01},
    )  # fmt: skip
    summary = train(given)
    assert summary["kernels"]["frozen"]["int8"] > 0
    assert evaluate(tmp_path / "run", "eval")["metrics"] == summary["metrics"]["after"]


def test_a_method_that_leaves_nothing_to_freeze_is_told(tiny_model, tmp_path) -> None:
    """IA3 on all linears: peft's layers may read their weights, and lm_head is the head."""
    given = settings(tiny_model, tmp_path)
    ia3 = given.adapter.model_validate({"method": "ia3"})
    with pytest.raises(
        ConfigError, match=r"got int8, and none of this model's 15 linears can be rounded.*peft's Linear"
    ):
        train(given.model_copy(update={"adapter": ia3}))
    auto = given.model.model_copy(update={"frozen_compute": "auto"})
    summary = train(given.model_copy(update={"adapter": ia3, "model": auto, "output": str(tmp_path / "auto")}))
    assert summary["decisions"]["frozen_compute"].startswith("auto: full, as none of this model's 15 linears")
    assert evaluate(tmp_path / "auto")["metrics"] == summary["metrics"]["after"]


def test_packing_and_checkpointing_over_codes(tiny_model, tmp_path) -> None:
    given = settings(tiny_model, tmp_path)
    data = given.data.model_copy(update={"packing": True, "max_length": 64})
    training = given.training.model_copy(update={"gradient_checkpointing": True})
    adapter = given.adapter.model_copy(update={"dropout": 0.0})
    packed = train(given.model_copy(update={"data": data, "training": training, "adapter": adapter}))
    plain = train(given.model_copy(update={"adapter": adapter, "output": str(tmp_path / "plain")}))
    assert packed["kernels"]["frozen"] == plain["kernels"]["frozen"]
    assert packed["metrics"]["after"]["loss"] == pytest.approx(plain["metrics"]["after"]["loss"], rel=0.02)


def test_an_int8_head_is_told(tiny_model, tmp_path) -> None:
    summary = train(settings(tiny_model, tmp_path, frozen_head="int8"))
    assert "the loss reads the head in int8" in summary["decisions"]["frozen_compute"]
    assert read_record(tmp_path / "run" / FILE).head
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]["after"]


def test_a_head_that_can_not_be_read_in_int8_is_told(tiny_model, tmp_path) -> None:
    given = settings(tiny_model, tmp_path, frozen_head="int8")
    adapter = given.adapter.model_copy(update={"targets": ["q_proj", "lm_head"]})
    told = train(given.model_copy(update={"adapter": adapter}))["decisions"]["frozen_compute"]
    assert "the head stays in full precision: it trains" in told


def test_hardware_that_lacks_a_format_is_named(tiny_model, tmp_path) -> None:
    with pytest.raises(ConfigError, match="got fp8, and CPUs have no fp8 units"):
        train(settings(tiny_model, tmp_path, frozen_compute="fp8"))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("model.frozen_compute=auto", "model.frozen_compute: got auto, and the run was trained with int8"),
        ("model.frozen_outliers=columns", "model.frozen_outliers: got columns, and the run was trained with smooth"),
        ("model.frozen_error_bound=0.001", "model.frozen_error_bound: got 0.001"),
    ],
)
def test_a_run_is_not_used_in_another_rounding(other, told, tiny_model, tmp_path) -> None:
    train(settings(tiny_model, tmp_path, frozen_outliers="smooth", frozen_head="int8"))
    with pytest.raises(ConfigError, match=told):
        evaluate(tmp_path / "run", overrides=(other,))
    (tmp_path / "run" / FILE).unlink()
    with pytest.raises(StorageError, match=r"--set model\.frozen_compute=full the model's own weights"):
        evaluate(tmp_path / "run")
    assert evaluate(tmp_path / "run", overrides=("model.frozen_compute=full",))["metrics"]["loss"] > 0


def test_a_merge_without_rows_is_held_against_the_rounded_model(tiny_model, tmp_path) -> None:
    train(settings(tiny_model, tmp_path))
    (tmp_path / "rows.jsonl").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, drift = export(tmp_path / "run", merged=True)
    assert drift.relative < 1e-4  # the reloaded model is the merged one
    assert drift.held_out is not None
    assert drift.held_out.split == "probe"
    assert drift.held_out.relative > 1e-3  # and rounding is seen
    assert drift.held_out.kl > 0
