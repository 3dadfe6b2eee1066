"""Resume: bit for bit the run that nothing had stopped."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import Crash, changed, crash_at, everything, last_step, newest, outcome, small, write_config
from processes import Engine, engine
from safetensors.torch import load_file
from tiny import chat_rows, class_rows, config, make_model, pair_rows, write_rows

from peft_engine.config import Config
from peft_engine.errors import ConfigError, DataError, StorageError
from peft_engine.run import train
from peft_engine.runtime import machine
from peft_engine.training.checkpoint import complete_checkpoints, verify_files


def settings_for(case: str, tiny_model: Any, folder: Path) -> Config:
    """22 training rows in batches of 4: 6 steps an epoch, the last of 2 rows; 15 steps are two and a half epochs."""
    common = {"steps": 15, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 0.01, "save_every": 4}
    split = {"split": {"eval": 0.2, "test": 0.0}}
    pairs = write_rows(folder / "pairs.jsonl", pair_rows(28))
    texts = write_rows(folder / "texts.jsonl", class_rows(28))
    if case == "lora":
        adapter = {"rank": 4, "dropout": 0.2, "lora_plus_ratio": 4.0}
        return config(
            "causal-lm", tiny_model("llama"), pairs, folder / "run", adapter=adapter, data=split, training=common
        )
    if case == "full":
        model = make_model("gpt2", folder / "gpt2", dropout=0.1)
        training = {**common, "optimizer": "adafactor", "eval_every": 5, "gradient_checkpointing": True}
        return config(
            "causal-lm", model, pairs, folder / "run", adapter={"method": "full"}, data=split, training=training
        )
    if case == "pissa":
        adapter = {"rank": 8, "init": "pissa", "dropout": 0.1, "modules_to_save": ["embed_tokens"]}
        training = {**common, "optimizer": "adamw8bit", "weight_decay": 0.1, "schedule": "wsd"}
        chats = write_rows(folder / "chats.jsonl", chat_rows(28))
        return config(
            "causal-lm", tiny_model("llama"), chats, folder / "run", adapter=adapter, data=split, training=training
        )
    assert case == "stopping"
    training = {**common, "optimizer": "sgd", "eval_every": 2, "save_every": 5, "restore_best": True}
    training |= {"early_stopping": {"patience": 3, "min_delta": 0.5}, "learning_rate": 1e-4, "log_every": 3}
    return config(
        "text-classification",
        tiny_model("bert"),
        texts,
        folder / "run",
        adapter={"rank": 4, "dropout": 0.1, "dora": True},
        data=split,
        training=training,
    )


@pytest.mark.parametrize(("case", "step"), [("lora", 7), ("full", 9), ("pissa", 10), ("stopping", 6)])
def test_resume_gives_the_bits_of_an_undisturbed_run(case, step, tiny_model, tmp_path, monkeypatch):
    whole = settings_for(case, tiny_model, tmp_path)
    train(whole)
    broken = changed(whole, output=str(tmp_path / "broken"))
    with monkeypatch.context() as patched:
        crash_at(patched, step)
        with pytest.raises(Crash):
            train(broken)
    assert not (tmp_path / "broken" / "run.json").exists()
    train(broken, resume=True)
    expected = outcome(whole.output)
    assert outcome(broken.output) == expected
    if case == "stopping":
        assert expected["summary"]["stopped_early"]
        assert expected["summary"]["best_step"] == 2
        assert expected["state"]["step"] == 8
    else:
        assert expected["state"]["step"] == 15
    if case == "pissa":
        last = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
        dtypes = {t.dtype for t in load_file(last / "default.optimizer.safetensors").values()}
        assert torch.uint8 in dtypes, "no tensor was large enough for an 8-bit state"


def test_an_undisturbed_run_repeats_itself_and_another_seed_differs(tiny_model, tmp_path):
    """Else the comparisons above would compare nothing."""
    first = settings_for("lora", tiny_model, tmp_path)
    second = changed(first, output=str(tmp_path / "second"))
    third = changed(first, output=str(tmp_path / "third"), training__seed=1)
    for settings in (first, second, third):
        train(settings)
    one, two, three = outcome(first.output), outcome(second.output), outcome(third.output)
    assert one == two
    assert one["adapter"] != three["adapter"]


def test_ten_kills(tiny_model, tmp_path):
    """kill -9 ten times, each time in training or while a checkpoint is being written, then to the end."""
    draw = random.Random(7)
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(40))
    training = {"steps": 40, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01, "save_every": 3}
    whole = config(
        "causal-lm",
        tiny_model("llama"),
        rows,
        tmp_path / "whole",
        adapter={"rank": 4, "dropout": 0.2},
        data={"split": {"eval": 0.1, "test": 0.0}},
        training=training,
    )
    train(whole)
    killed = changed(whole, output=str(tmp_path / "killed"))
    path = write_config(killed, tmp_path / "killed.yaml")
    checkpoints, metrics = tmp_path / "killed" / "checkpoints", tmp_path / "killed" / "metrics.jsonl"
    reached, halves = [0], 0
    for attempt in range(10):
        every = draw.choice((1, 2, 3))
        words = ("train", path, "--resume", "--quiet", "--set", f"training.save_every={every}")
        child = Engine(*words, folder=tmp_path)
        begins = newest(checkpoints)
        if attempt % 2:
            target = begins + 1 + draw.randrange(3)
            assert child.wait_for(lambda target=target: last_step(metrics) >= target), child.wait().err
        else:
            halves += stop_inside_checkpoint(child, checkpoints)
        child.send(signal.SIGKILL)
        assert child.wait().code == -signal.SIGKILL
        assert not (tmp_path / "killed" / "run.json").exists()
        for one in complete_checkpoints(checkpoints):
            verify_files(one)
        reached.append(newest(checkpoints))
    assert reached == sorted(reached), "a complete checkpoint was lost"
    assert 0 < reached[-1] < 40
    assert halves == 5, "every other kill must land inside the writing of a checkpoint"
    ended = engine("train", path, "--resume", "--quiet", folder=tmp_path)
    assert ended.code == 0, ended.err
    found, expected = outcome(killed.output), outcome(whole.output)
    assert found == expected
    assert not list(checkpoints.glob(".*")), "what the kills left of checkpoints was not cleaned up"


def stop_inside_checkpoint(child: Engine, checkpoints: Path) -> bool:
    """Halt the process while a checkpoint is half written: its folder stands, its manifest or the rename is missing."""

    def half() -> set[Path]:
        return set(checkpoints.glob(".step-*.part"))

    left = half()  # by an earlier kill
    while child.wait_for(lambda: bool(half() - left) or not child.alive) and child.alive:
        child.send(signal.SIGSTOP)
        if half() - left:
            return True
        child.send(signal.SIGCONT)
    return False


def test_resume_of_an_empty_output_begins(tiny_model, tmp_path):
    settings = small(tiny_model("llama"), tmp_path)
    train(settings, resume=True)
    plain = changed(settings, output=str(tmp_path / "plain"))
    train(plain)
    assert outcome(settings.output) == outcome(plain.output)


def test_resume_before_the_first_checkpoint_begins(tiny_model, tmp_path, monkeypatch):
    settings = small(tiny_model("llama"), tmp_path)
    with monkeypatch.context() as patched:
        crash_at(patched, 1)
        with pytest.raises(Crash):
            train(settings)
    train(settings, resume=True)
    plain = changed(settings, output=str(tmp_path / "plain"))
    train(plain)
    assert outcome(settings.output) == outcome(plain.output)


@pytest.mark.parametrize("stopping", [False, True])
def test_resume_of_a_finished_run_gives_it_again(stopping, tiny_model, tmp_path):
    more = {"early_stopping": {"patience": 1, "min_delta": 100.0}, "eval_every": 1} if stopping else {}
    settings = small(tiny_model("llama"), tmp_path, **more)
    first = train(settings)
    assert first["stopped_early"] == stopping
    before = outcome(settings.output)
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"lost")
    again = train(settings, resume=True)
    assert outcome(settings.output) == before
    assert set(again) == set(first)
    assert again["wall_seconds"] > first["seconds"]["train"]


def test_a_finished_run_without_checkpoints_is_not_begun_anew(tiny_model, tmp_path):
    settings = small(tiny_model("llama"), tmp_path, steps=2)
    train(settings)
    for path in sorted((tmp_path / "run" / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    kept = adapter.read_bytes()
    with pytest.raises(ConfigError, match="holds a finished run whose checkpoints are gone"):
        train(settings, resume=True)
    assert adapter.read_bytes() == kept


@pytest.fixture
def stopped(tiny_model, tmp_path, monkeypatch) -> Config:
    """A run that was lost after step 5; checkpoints 2 and 4 stand."""
    settings = small(tiny_model("llama"), tmp_path)
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(Crash):
            train(settings)
    return settings


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"training__learning_rate": 0.02}, "training.learning_rate was 0.01, is 0.02"),
        ({"training__steps": 9}, "training.steps was 8, is 9"),
        ({"training__seed": 1, "adapter__rank": 8}, "adapter.rank was 4, is 8; training.seed was 0, is 1"),
        ({"data__max_length": 64}, "data.max_length was 512, is 64"),
        ({"training__early_stopping": {"patience": 1}}, "training.early_stopping"),
    ],
)
def test_changed_settings_are_refused_by_name(new, said, stopped):
    before = everything(stopped.output)
    with pytest.raises(ConfigError) as caught:
        train(changed(stopped, **new), resume=True)
    assert said in str(caught.value)
    assert everything(stopped.output) == before


def test_free_settings_may_change(stopped, tmp_path):
    """They don't decide the weights: budget, logging, saving, the cache."""
    free = {
        "budget__max_hours": 5.0,
        "data__cache": str(tmp_path / "cache"),
        "training__save_every": 3,
        "training__save_total_limit": 5,
        "evaluation__batch_size": 3,
    }
    train(changed(stopped, **free), resume=True)
    plain = changed(stopped, output=str(tmp_path / "plain"))
    train(plain)
    found, expected = outcome(stopped.output), outcome(plain.output)
    assert found["adapter"] == expected["adapter"]
    assert [row.get("loss") for row in found["rows"]] == [row.get("loss") for row in expected["rows"]]
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == [
        f"step-{step}" for step in (2, 4, 6, 8)
    ]


def test_another_machine_is_told(stopped, monkeypatch, capfd):
    """Other versions, threads or hardware may give other bits: said, and recorded."""
    here = machine()
    monkeypatch.setattr("peft_engine.session.machine", lambda: here | {"cpu_threads": 99})
    assert train(stopped, resume=True, quiet=False)["resumed_with_other"] == ["cpu_threads"]
    assert "cpu_threads" in capfd.readouterr().err


def test_changed_data_is_refused(stopped):
    before = everything(stopped.output)
    rows = pair_rows(20)
    rows[11]["completion"] += " more"
    write_rows(Path(stopped.data.train), rows)
    with pytest.raises(DataError, match=r"The data is not what .*step-4 was trained on"):
        train(stopped, resume=True)
    assert everything(stopped.output) == before


def test_changed_weights_are_refused(tmp_path, monkeypatch):
    model = make_model("llama", tmp_path / "model")
    settings = small(model, tmp_path)
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(Crash):
            train(settings)
    before = everything(settings.output)
    make_model("llama", model, seed=1)
    with pytest.raises(ConfigError, match=r"weights are not those .*step-4 was trained on"):
        train(settings, resume=True)
    assert everything(settings.output) == before


def test_an_altered_checkpoint_is_refused_and_the_one_before_it_serves(stopped, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step-4" / "default.optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"step-4/default.optimizer.safetensors is altered.*Delete"):
        train(stopped, resume=True)
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    train(stopped, resume=True)
    plain = changed(stopped, output=str(tmp_path / "plain"))
    train(plain)
    assert outcome(stopped.output) == outcome(plain.output)
