"""A streamed run that is lost while it reads, tokenises or trains goes on to the bits of one that wasn't."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comparing import Crash, changed, crash_at, last_step, newest, outcome, write_config
from processes import Engine, engine
from tiny import config, pair_rows, write_rows

from peft_engine.building import encode_splits
from peft_engine.config import Config
from peft_engine.data import spooling, token_store
from peft_engine.data.loading import load_splits
from peft_engine.run import train
from peft_engine.tasks import make_task

ROOT = Path(__file__).resolve().parents[2]


def settings(model: Path, folder: Path, rows: int, name: str) -> Config:
    made = pair_rows(rows + 6)
    train_file = write_rows(folder / "train.jsonl", made[:rows])
    held = write_rows(folder / "eval.jsonl", made[rows:])
    data = {"eval": str(held), "split": {"eval": 0.0, "test": 0.0}, "streaming": True, "cache": str(folder / "cache")}
    training = {"steps": 12, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01, "save_every": 3}
    adapter = {"rank": 4, "dropout": 0.2}
    return config("causal-lm", model, train_file, folder / name, adapter=adapter, data=data, training=training)


def elsewhere(of: Config, name: str) -> Config:
    """The same run with a store of its own."""
    folder = Path(of.output).parent
    return changed(of, output=str(folder / name), data__cache=str(folder / f"{name}-cache"))


def test_a_lost_pass_begins_anew_and_lost_tokens_go_on(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "PIECE", 4)
    whole = settings(tiny_model("llama"), tmp_path, 30, "whole")
    train(whole)
    lost = elsewhere(whole, "lost")
    seen: list[str] = []

    def crashing(at: int, real: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            seen.append(str(arguments[-1]))
            if len(seen) == at:
                raise Crash
            return real(*arguments)

        return wrapped

    with monkeypatch.context() as patched:
        patched.setattr(spooling, "to_example", crashing(7, spooling.to_example))
        with pytest.raises(Crash):
            load_splits(lost)
    for reached in (11, 6):
        seen.clear()
        splits = load_splits(lost)
        task = make_task(lost, splits.labels)
        with monkeypatch.context() as patched:
            patched.setattr(task, "encode", crashing(reached, task.encode))
            with pytest.raises(Crash):
                encode_splits(task, splits, lost)
    assert seen[0].endswith("line 9"), "it did not go on from its last complete piece"
    with monkeypatch.context() as patched:
        crash_at(patched, 7)
        with pytest.raises(Crash):
            train(lost)
    train(lost, resume=True)
    assert outcome(lost.output) == outcome(whole.output)


def test_another_writers_remains_are_not_gone_on_from(tiny_model, tmp_path, monkeypatch):
    """Files shorter than the last complete piece (a power cut) or without its note begin anew."""
    monkeypatch.setattr(token_store, "PIECE", 4)
    whole = settings(tiny_model("llama"), tmp_path, 30, "whole")
    task = make_task(whole, None)
    splits = load_splits(whole)
    real = task.encode
    for spoil in (
        lambda folder: os.truncate(folder / "units", 8),
        lambda folder: (folder / "progress.json").write_text("{"),
    ):
        count = iter(range(100))
        with monkeypatch.context() as patched:
            patched.setattr(task, "encode", lambda *row, count=count: real(*row) if next(count) < 11 else crash())
            with pytest.raises(Crash):
                encode_splits(task, splits, whole)
        (progress,) = (tmp_path / "cache").rglob("progress.json")
        spoil(progress.parent)
        seen: list[str] = []
        with monkeypatch.context() as patched:
            patched.setattr(
                task, "encode", lambda example, where, seen=seen: seen.append(where) or real(example, where)
            )
            encode_splits(task, splits, whole)
        assert seen[0].endswith("line 1")
        (progress.parent / "manifest.json").unlink()


def crash() -> Any:
    raise Crash


def test_killed_while_it_tokenises_and_while_it_trains(tiny_model, tmp_path):
    whole = settings(tiny_model("llama"), tmp_path, 6000, "whole")
    lost = elsewhere(whole, "lost")
    path = write_config(lost, tmp_path / "lost.yaml")
    child = Engine("train", path, "--quiet", folder=tmp_path)
    cache, metrics = tmp_path / "lost-cache", tmp_path / "lost" / "metrics.jsonl"
    assert child.wait_for(lambda: any(cache.glob("streamed/*/tokens-*/progress.json"))), child.wait().err
    child.send(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    (progress,) = cache.glob("streamed/*/tokens-*/progress.json")
    assert 0 < json.loads(progress.read_text())["state"]["done"] < 6000
    child = Engine("train", path, "--resume", "--quiet", folder=tmp_path)
    assert child.wait_for(lambda: last_step(metrics) >= 5), child.wait().err
    child.send(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    assert not (tmp_path / "lost" / "run.json").exists()
    assert newest(tmp_path / "lost" / "checkpoints") < 12
    ended = engine("train", path, "--resume", "--quiet", folder=tmp_path)
    assert ended.code == 0, ended.err
    assert not progress.exists()
    train(changed(whole, data__streaming=False))
    assert outcome(lost.output) == outcome(whole.output)


def test_two_processes_build_one_store(tiny_model, tmp_path):
    """The second waits for the first and finds what it made."""
    one = settings(tiny_model("llama"), tmp_path, 2000, "one")
    two = changed(one, output=str(tmp_path / "two"))
    children = []
    for settled in (one, two):
        folder = tmp_path / f"at-{Path(settled.output).name}"
        folder.mkdir()
        path = write_config(settled, folder / "run.yaml")
        children.append(Engine("train", path, "--quiet", folder=folder))
    ended = [child.wait() for child in children]
    assert [end.code for end in ended] == [0, 0], [end.err for end in ended]
    assert outcome(one.output) == outcome(two.output)
    assert len(list((tmp_path / "cache" / "streamed").glob("*/tokens-*"))) == 1


def test_a_full_disk_is_exit_8_and_leaves_nothing(tiny_model, tmp_path):
    of = settings(tiny_model("llama"), tmp_path, 3000, "run")
    path = write_config(of, tmp_path / "run.yaml")
    load_splits(changed(of, data__cache=str(tmp_path / "probe")))
    (rows,) = (tmp_path / "probe").rglob("examples.jsonl")
    size = rows.stat().st_size
    for file_bytes in (size // 2, size + 4096):  # in the rows, in the tokens
        ended = engine("train", path, "--quiet", "--overwrite", folder=tmp_path, file_bytes=file_bytes)
        assert ended.code == 8, ended.err
        assert "data.streaming keeps rows and tokens on disk" in ended.err
        left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and ".lock" not in p.name]
        assert {p.parent.name for p in left} <= {"rows"}
        assert bool(left) == (file_bytes > size)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows():
    """100,000 rows within 20 MB of 1,000; the script's own default is a million within 200 MB."""
    script = ROOT / "benchmarks" / "streaming_rss.py"
    model = ROOT / ".assets" / "models" / "bert-tiny"
    if not model.is_dir():
        pytest.skip("needs `make assets`")
    words = [sys.executable, str(script), "--rows", "100000", "--model", str(model)]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert found["growth_mb"]["rss"] < 20, found
    assert found["same_rows_in_every_step"]
    assert found["same_adapter"]
    assert found["first_row_there"]["whole"] == found["first_row_there"]["killed"]
