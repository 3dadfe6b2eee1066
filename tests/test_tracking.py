"""`report_to`: each tracker gets the rows of metrics.jsonl, keeps its files in the run directory, and never ends a run.

TensorBoard is run in the quick tests, the other three in slow ones, where they are installed.
"""

import importlib.util
import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comparing import Crash, changed, crash_at, outcome, small
from processes import engine

from peft_engine import tracking
from peft_engine.config import Config
from peft_engine.config_reading import to_yaml
from peft_engine.errors import ConfigError
from peft_engine.run import train
from peft_engine.tracking import numbers


def reporting(model: Path, folder: Path, *names: str, **training: Any) -> Config:
    return changed(small(model, folder, eval_every=4, **training), report_to=list(names))


def expected(output: Path | str) -> dict[str, dict[int, float]]:
    """Name → step → number, read from metrics.jsonl and run.json alone."""
    found: dict[str, dict[int, float]] = {}
    for line in (Path(output) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        inner = {f"eval/{k}": v for k, v in row.get("eval", {}).items()}
        for name, value in (inner or {f"train/{k}": v for k, v in row.items() if k != "step"}).items():
            if isinstance(value, int | float):
                found.setdefault(name, {})[row["step"]] = value
    summary = json.loads((Path(output) / "run.json").read_text())
    for name, value in summary["metrics"]["after"].items():
        if isinstance(value, int | float):
            found[f"final/{name}"] = {summary["steps"]: value}
    return found


def check(found: dict[str, dict[int, float]], output: Path | str, rel: float = 1e-12) -> None:
    wanted = expected(output)
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert found[name] == pytest.approx(points, rel=rel), name


def tensorboard_points(output: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "trackers" / "tensorboard")).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_every_number_also_over_a_crash(tiny_model, tmp_path, monkeypatch):
    settings = reporting(tiny_model("llama"), tmp_path, "tensorboard")
    with monkeypatch.context() as patched:
        crash_at(patched, 6)
        with pytest.raises(Crash):
            train(settings)
    summary = train(settings, resume=True)
    check(tensorboard_points(tmp_path / "run"), settings.output, rel=1e-6)  # it stores 32 bits
    assert summary["trackers"]["tensorboard"]["failed"] is None
    assert summary["trackers"]["tensorboard"]["where"] == str(tmp_path / "run/trackers/tensorboard")
    plain = changed(settings, output=str(tmp_path / "plain"), report_to="none")
    train(plain)
    assert not (tmp_path / "plain/trackers").exists()
    assert outcome(plain.output) == outcome(settings.output), "a tracker changed the run"
    train(changed(settings, report_to="none"), overwrite=True)
    assert not (tmp_path / "run/trackers").exists(), "another run's trackers were left"


def test_a_missing_package_is_told_before_anything_else(tmp_path):
    rest = {"task": "causal-lm", "model": {"path": str(tmp_path / "no")}, "data": {"train": "no.jsonl"}}
    settings = Config.model_validate({**rest, "report_to": ["wandb"], "output": str(tmp_path / "run")})
    (tmp_path / "my.yaml").write_text(to_yaml(settings))
    done = engine("train", "my.yaml", folder=tmp_path, without="wandb")
    assert done.code == 2
    assert "report_to: wandb is not installed" in done.err
    assert "pip install wandb" in done.err


class Failing:
    """A tracker whose disk fills up, say, at its third row."""

    def __init__(self) -> None:
        self.rows = 0

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert values["adapter.rank"] == 4

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows += 1
        if self.rows == 3:
            raise OSError("no room left")

    def finish(self) -> None:
        raise AssertionError("it was switched off")


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tiny_model, tmp_path, monkeypatch, capfd):
    failing = Failing()
    monkeypatch.setitem(tracking.OPENERS, "tensorboard", lambda *_: (failing, "one", "there"))
    summary = train(reporting(tiny_model("llama"), tmp_path, "tensorboard"))
    assert summary["steps"] == 8
    assert summary["trackers"]["tensorboard"]["failed"] == "log: no room left"
    assert capfd.readouterr().err.count("tensorboard failed (log: no room left) and is off from here") == 1
    assert failing.rows == 3


def test_a_tracker_that_does_not_start_stops_the_run_before_training(tiny_model, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setitem(tracking.OPENERS, "tensorboard", refuse)
    with pytest.raises(ConfigError, match="tensorboard does not start: not logged in"):
        train(reporting(tiny_model("llama"), tmp_path, "tensorboard"))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_only_finite_numbers_are_sent_and_names_are_plain():
    row = {"step": 3, "loss": 0.5, "event": "x", "grad_norm": float("nan"), "on": True, "none": None}
    assert numbers(row) == {"train/loss": 0.5}
    row = {"step": 3, "member": "a", "eval": {"f1": 1, "per_class": {"ja?": {"f1": 0.2}}, "confusion": [[1]]}}
    assert numbers(row) == {"a/eval/f1": 1, "a/eval/per_class/ja_/f1": 0.2}


def needs(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install {name}, then run this test again")


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Records of wandb's transaction log: LevelDB's log format, blocks of 32 KiB, behind a header of 7 bytes."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        if kind == 0:
            return
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_stays_offline_and_goes_on(tiny_model, tmp_path, monkeypatch):
    needs("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.delenv("WANDB_MODE", raising=False)
    settings = reporting(tiny_model("llama"), tmp_path, "wandb")
    with monkeypatch.context() as patched:
        crash_at(patched, 6)
        with pytest.raises(Crash):
            train(settings)
    first = json.loads((tmp_path / "run/trackers/runs.json").read_text())
    summary = train(settings, resume=True)
    assert summary["trackers"]["wandb"] == {
        "run": first["wandb"], "where": str(tmp_path / "run/trackers/wandb"), "failed": None,
    }  # fmt: skip
    assert "WANDB_SILENT" not in os.environ
    found: dict[str, dict[int, float]] = {}
    names: set[str] = set()
    for path in sorted((tmp_path / "run/trackers/wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                names.add(record.run.run_id)
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    found.setdefault(name, {})[items["_step"]] = value
    assert names == {first["wandb"]}
    check(found, settings.output)


@pytest.mark.slow
def test_trackio_writes_its_own_data_base(tiny_model, tmp_path):
    """In a process of its own: it reads its folder once, when it is imported."""
    needs("trackio")
    settings = reporting(tiny_model("llama"), tmp_path, "trackio")
    (tmp_path / "my.yaml").write_text(to_yaml(settings))
    done = engine("train", "my.yaml", "--json", folder=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["trackers"]["trackio"]["failed"] is None
    (path,) = (tmp_path / "run/trackers/trackio").glob("*.db")
    with sqlite3.connect(path) as base:
        rows = [(step, json.loads(text)) for step, text in base.execute("select step, metrics from metrics")]
    found: dict[str, dict[int, float]] = {}
    for step, values in rows:
        for name, value in values.items():
            found.setdefault(name, {})[step] = value
    check(found, settings.output)


@pytest.mark.slow
def test_mlflow_keeps_one_run_in_sqlite(tiny_model, tmp_path, monkeypatch):
    needs("mlflow")
    import mlflow

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    settings = reporting(tiny_model("llama"), tmp_path, "mlflow")
    with monkeypatch.context() as patched:
        crash_at(patched, 6)
        with pytest.raises(Crash):
            train(settings)
    assert train(settings, resume=True)["trackers"]["mlflow"]["failed"] is None
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/trackers/mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'peft-engine'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["adapter.rank"] == "4"
    found = {
        name: {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }
    check(found, settings.output)
