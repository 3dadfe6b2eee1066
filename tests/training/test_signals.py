"""SIGINT and SIGTERM: a complete checkpoint, exit 75, and a run that can go on."""

import signal
import subprocess
import sys
import time
import weakref

import pytest
from comparing import changed, last_step, newest, outcome, small, write_config
from processes import Engine, engine

from peft_engine.errors import Interrupted
from peft_engine.run import train
from peft_engine.training.checkpoint import complete_checkpoints, verify_files
from peft_engine.training.guards import Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_leaves_with_75(number, tiny_model, tmp_path):
    settings = small(tiny_model("llama"), tmp_path, steps=60, save_every=60)
    path = write_config(settings, tmp_path / "run.yaml")
    child = Engine("train", path, "--quiet", folder=tmp_path)
    assert child.wait_for(lambda: last_step(tmp_path / "run" / "metrics.jsonl") >= 3)
    child.send(number)
    ended = child.wait()
    assert ended.code == 75, ended.err
    assert f"{number.name}: stopped after a complete checkpoint" in ended.err
    assert "--resume" in ended.err
    assert "Traceback" not in ended.err
    assert 3 <= newest(tmp_path / "run" / "checkpoints") < 60
    verify_files(complete_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert not (tmp_path / "run" / "run.json").exists()
    ended = engine("train", path, "--quiet", "--resume", folder=tmp_path)
    assert ended.code == 0, ended.err
    plain = changed(settings, output=str(tmp_path / "plain"))
    train(plain)
    assert outcome(settings.output) == outcome(plain.output)


def test_the_console_command_itself_leaves_with_75(tiny_model, tmp_path):
    """The same through `python -m peft_engine`, without the server that the other tests fork from."""
    settings = small(tiny_model("llama"), tmp_path, steps=400, save_every=400)
    path = write_config(settings, tmp_path / "run.yaml")
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "peft_engine", "train", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        while child.poll() is None and last_step(metrics) < 2:
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=120)
    assert child.returncode == 75, err
    assert "SIGTERM: stopped after a complete checkpoint" in err
    assert newest(tmp_path / "run" / "checkpoints") >= 2


def test_a_second_signal_stops_at_once(tiny_model, tmp_path):
    """Halted before the first is acted on, the process finds both waiting: no checkpoint, 75, and it can go on."""
    settings = small(tiny_model("llama"), tmp_path, steps=60, save_every=60)
    path = write_config(settings, tmp_path / "run.yaml")
    child = Engine("train", path, "--quiet", folder=tmp_path)
    assert child.wait_for(lambda: last_step(tmp_path / "run" / "metrics.jsonl") >= 3)
    child.send(signal.SIGSTOP)
    child.send(signal.SIGTERM)
    child.send(signal.SIGINT)
    child.send(signal.SIGCONT)
    ended = child.wait()
    assert ended.code == 75, ended.err
    assert ": stopped." in ended.err
    assert "Traceback" not in ended.err
    assert newest(tmp_path / "run" / "checkpoints") == 0
    assert engine("train", path, "--quiet", "--resume", folder=tmp_path).code == 0
    plain = changed(settings, output=str(tmp_path / "plain"))
    train(plain)
    assert outcome(settings.output) == outcome(plain.output)


def test_a_signal_inside_a_finalizer_is_not_lost():
    """The memory meter frees through weak references, whose callbacks swallow exceptions."""

    class Thing:
        pass

    thing = Thing()
    weakref.finalize(thing, signal.raise_signal, signal.SIGTERM)
    with Signals().handled():
        del thing
        with pytest.raises(Interrupted, match="SIGTERM"):
            time.sleep(5)


def test_signals_are_a_request_only_while_deferred():
    signals = Signals()
    with signals.handled():
        with pytest.raises(Interrupted, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)
            assert signals.wanted == "SIGINT"
            with pytest.raises(Interrupted, match="SIGTERM"):
                signal.raise_signal(signal.SIGTERM)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals().handled():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
