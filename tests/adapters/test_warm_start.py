"""`adapter.start_from`: a run begins with exactly another's weights, or is refused with what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import Crash, changed, crash_at, outcome
from safetensors.torch import load_file
from tiny import assemble, class_rows, config, make_model, write_rows

from peft_engine.config import Config
from peft_engine.errors import ConfigError, EngineError, StorageError
from peft_engine.run import train
from peft_engine.using import evaluate

TRAINING = {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "save_every": 2, "eval_every": 3}


def classes(
    model: Path, folder: Path, output: str, adapter: dict[str, Any], labels: tuple[str, ...] = ("no", "yes")
) -> Config:
    rows = write_rows(folder / f"rows-{len(labels)}.jsonl", class_rows(36, labels))
    return config(
        "text-classification", model, rows, folder / output, adapter=adapter, training=TRAINING,
        data={"split": {"eval": 0.2, "test": 0.0}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def rank3(tiny_model, tmp_path_factory) -> Path:
    """The output of a run with rank 3 on two classes. Don't write into it."""
    folder = tmp_path_factory.mktemp("rank3")
    train(classes(tiny_model("bert"), folder, "first", {"rank": 3}))
    return folder / "first"


METHODS = [{"rank": 3}, {"rank": 3, "dora": True, "bias": "all"}, *({"method": m} for m in ("full", "head", "bitfit"))]


@pytest.mark.parametrize("adapter", METHODS, ids=str)
def test_it_begins_where_the_other_ended(adapter, tiny_model, tmp_path):
    first = classes(tiny_model("bert"), tmp_path, "first", adapter)
    train(first)
    found = evaluate(tmp_path / "first", "eval")["metrics"]
    second = changed(first, output=str(tmp_path / "second"), adapter__start_from=str(tmp_path / "first"))
    run = assemble(second)
    saved = load_file(tmp_path / "first/adapter/adapter_model.safetensors")
    live = list(run.group.members[0].tensors.values())
    assert sum(t.numel() for t in saved.values()) == sum(t.numel() for t in live)
    assert sum(float(t.double().sum()) for t in saved.values()) == pytest.approx(
        sum(float(t.detach().double().sum()) for t in live), rel=1e-9
    )
    summary = train(second)
    assert summary["metrics"]["before"]["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert summary["started_from"]["path"] == str(tmp_path / "first")
    assert summary["started_from"]["same_backbone"] is True
    assert summary["metrics"]["after"] != found


def test_an_adapter_folder_does_too(rank3, tiny_model, tmp_path):
    shutil.copytree(rank3 / "adapter", tmp_path / "alone")
    second = classes(tiny_model("bert"), tmp_path, "second", {"rank": 3, "start_from": str(tmp_path / "alone")})
    summary = train(second)
    assert summary["started_from"]["same_backbone"] is None
    found = evaluate(rank3, "eval")["metrics"]
    assert summary["metrics"]["before"]["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_another_backbone_is_recorded(rank3, tmp_path):
    other = make_model("bert", tmp_path / "other", seed=5)
    second = classes(other, tmp_path, "second", {"rank": 3, "start_from": str(rank3)})
    assert train(second)["started_from"]["same_backbone"] is False


def test_resume_gives_the_same_bits_and_checks_where_it_began(tiny_model, tmp_path, monkeypatch):
    first = classes(tiny_model("bert"), tmp_path, "first", {"rank": 3})
    train(first)
    again = {"adapter__start_from": str(tmp_path / "first"), "training__frozen": ["lora_B"]}
    whole = changed(first, output=str(tmp_path / "whole"), **again)
    train(whole)
    broken = changed(whole, output=str(tmp_path / "broken"))
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(Crash):
            train(broken)
    shutil.copytree(tmp_path / "broken", tmp_path / "lost")
    train(broken, resume=True)
    assert outcome(broken.output) == outcome(whole.output)
    train(changed(first, training__seed=3), overwrite=True)
    with pytest.raises(ConfigError, match=r"does not hold the weights that the run of .*step-4 began with"):
        train(changed(whole, output=str(tmp_path / "lost")), resume=True)


@pytest.mark.parametrize(
    ("adapter", "labels", "error", "said"),
    [
        ({"method": "head"}, ("no", "yes"), ConfigError, "holds a lora adapter, and adapter.method is head"),
        ({"rank": 4}, ("no", "yes"), ConfigError, "adapter.rank was 3, is 4"),
        ({"rank": 3, "alpha": 7}, ("no", "yes"), ConfigError, "adapter.alpha was 32.0, is 7.0"),
        ({"rank": 3, "rslora": True}, ("no", "yes"), ConfigError, "adapter.rslora was False, is True"),
        ({"rank": 3, "targets": ["query"]}, ("no", "yes"), StorageError, "does not fit this model: unexpected"),
        ({"rank": 3, "modules_to_save": ["pooler"]}, ("no", "yes"), StorageError, "does not fit this model: missing"),
        ({"rank": 3}, ("a", "b", "c"), ConfigError, r"head for 2 classes \(no, yes\).*needs one for 3 classes \(a, b"),
        ({"rank": 3}, ("nay", "yes"), ConfigError, r"head for 2 classes \(no, yes\), single, this run needs"),
    ],
)
def test_what_does_not_fit_is_refused(adapter, labels, error, said, rank3, tiny_model, tmp_path):
    second = classes(tiny_model("bert"), tmp_path, "second", {**adapter, "start_from": str(rank3)}, labels)
    with pytest.raises(error, match=said):
        train(second)
    assert not (tmp_path / "second/metrics.jsonl").exists(), "training time was spent"


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no folder"), ({}, "holds no adapter"), ({"adapter_config.json": "{"}, "holds no adapter")],
)
def test_what_is_not_there_is_told(content, said, tiny_model, tmp_path):
    if content is not None:
        (tmp_path / "first").mkdir()
        for name, text in content.items():
            (tmp_path / "first" / name).write_text(text)
    with pytest.raises(EngineError, match=said):
        train(classes(tiny_model("bert"), tmp_path, "second", {"rank": 3, "start_from": str(tmp_path / "first")}))


def test_moved_weights(tiny_model, tmp_path):
    """PiSSA's file holds the update for the original weights at twice the rank: said, and usable like that."""
    first = classes(tiny_model("bert"), tmp_path, "first", {"rank": 3, "init": "pissa"})
    train(first)
    start = {"start_from": str(tmp_path / "first")}
    with pytest.raises(ValueError, match=r"adapter.start_from: can't be combined with adapter.init pissa"):
        classes(tiny_model("bert"), tmp_path, "second", {"rank": 3, "init": "pissa", **start})
    with pytest.raises(ConfigError, match=r"with adapter.init: pissa.*Set adapter.rank: 6 and adapter.alpha: 64"):
        train(classes(tiny_model("bert"), tmp_path, "second", {"rank": 3, **start}))
    summary = train(classes(tiny_model("bert"), tmp_path, "third", {"rank": 6, "alpha": 64, **start}))
    found = evaluate(tmp_path / "first", "eval")["metrics"]
    assert summary["metrics"]["before"]["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_the_record_names_the_very_file(tiny_model, tmp_path):
    from peft_engine.training.checkpoint import digest_file

    train(classes(tiny_model("bert"), tmp_path, "first", {"method": "head"}))
    train(classes(tiny_model("bert"), tmp_path, "second", {"method": "head", "start_from": str(tmp_path / "first")}))
    written = json.loads((tmp_path / "second/run.json").read_text())["started_from"]
    assert written["sha256"] == digest_file(tmp_path / "first/adapter/adapter_model.safetensors")
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("first", "second"))
    assert not any(torch.equal(one[name], two[name]) for name in one)
