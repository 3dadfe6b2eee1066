"""Several processes make the run that one makes: same losses and metrics, one writer, one decision, one end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_samples import chatml
from comparing import changed, last_step, newest, write_config
from ranks import LAST, Ranks, done, end_second, keep_last, ranks, starve_second
from safetensors.torch import load_file
from tiny import class_rows, config, pair_rows, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from peft_engine import evaluation, processes
from peft_engine.config import Config
from peft_engine.errors import ConfigError, EngineError
from peft_engine.launching import _joined
from peft_engine.run import train
from peft_engine.runtime import refuse_processes, start
from peft_engine.training.checkpoint import complete_checkpoints, verify_files

CLOSE = 1e-5  # relative, in fp32: the order of sums is all that differs


def task_of(kind: str, tiny_model: Any, folder: Path, **training: Any) -> Config:
    """17 training rows in batches of 4, so that the last of five is of one row; 7 rows to judge."""
    steps = {"steps": 7, "batch_size": 4, "learning_rate": 0.01, "save_every": 3, "eval_every": 4, **training}
    sections = {"adapter": {"rank": 4, "dropout": 0.2}, "data": {"split": {"eval": 7 / 24, "test": 0.0}}}
    if kind == "text-classification":
        rows = write_rows(folder / "texts.jsonl", class_rows(24))
        return config(kind, tiny_model("bert"), rows, folder / "run", training=steps, **sections)
    rows = write_rows(folder / "rows.jsonl", pair_rows(24))
    answers = {"generate_rows": 5, "max_new_tokens": 4}
    return config(
        "causal-lm", tiny_model("llama"), rows, folder / "run", training=steps, evaluation=answers, **sections
    )


def numbers(tree: Any) -> list[float]:
    """All numbers of nested JSON, in its order."""
    if isinstance(tree, dict):
        return [n for value in tree.values() for n in numbers(value)]
    if isinstance(tree, list):
        return [n for value in tree for n in numbers(value)]
    return [float(tree)] if isinstance(tree, int | float) else []


def rows_of(of: Config) -> list[dict[str, Any]]:
    lines = (Path(of.output) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def same_run(one: Config, several: Config) -> dict[str, Any]:
    """Every logged figure, every metric, every trained tensor. Returns run.json of the second."""
    expected, found = rows_of(one), rows_of(several)
    assert [list(row) for row in found] == [list(row) for row in expected]
    assert numbers(found) == pytest.approx(numbers(expected), rel=CLOSE, abs=1e-9)
    summaries = [json.loads((Path(of.output) / "run.json").read_text()) for of in (one, several)]
    wanted, metrics = (numbers(s["metrics"] | {"all": s["evaluations"]}) for s in summaries)
    assert metrics == pytest.approx(wanted, rel=CLOSE, abs=1e-9)
    assert all(summaries[0][name] == summaries[1][name] for name in ("steps", "tokens", "best_step", "digests"))
    tensors = [load_file(Path(of.output) / "adapter" / "adapter_model.safetensors") for of in (one, several)]
    assert list(tensors[0]) == list(tensors[1])
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-3, atol=2e-6, msg=name)
    return summaries[1]


def begun(of: Config, folder: Path, **new: Any) -> tuple[Config, Path]:
    """The same settings for another run, and their file."""
    other = changed(of, output=str(folder / "several"), **new)
    return other, write_config(other, folder / "several.yaml")


@pytest.mark.parametrize(
    ("kind", "count", "training"),
    [
        ("pairs", 2, {}),
        ("text-classification", 2, {"micro_batch_size": 1}),
        ("text-classification", 3, {"parallel": "fsdp"}),
        ("pairs", 2, {"parallel": "fsdp", "micro_batch_size": 1, "gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_the_run_is_that_of_one_process(kind, count, training, tiny_model, tmp_path):
    """Dropout included; with one row in a batch, all processes but the first have none."""
    one = task_of(kind, tiny_model, tmp_path, **training)
    train(one)
    several, path = begun(one, tmp_path)
    done("train", path, folder=tmp_path, count=count)
    summary = same_run(one, several)
    each = summary["processes"]["each"]
    assert (summary["processes"]["count"], len(each)) == (count, count)
    if one.training.parallel == "fsdp":
        whole = held(tiny_model("bert" if kind == "text-classification" else "llama"))
        assert all(process["model_bytes"] < 0.75 * whole for process in each)
    names = {".".join(p.parts[-1:]) for p in Path(several.output).iterdir()}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "checkpoints", "adapter"}
    for checkpoint in complete_checkpoints(Path(several.output) / "checkpoints"):
        verify_files(checkpoint)


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "adalora"])
def test_methods_that_go_round_the_model_s_forward_are_sharded_too(method, tiny_model, tmp_path):
    """peft embeds by itself before virtual tokens, and calls `forward` by its name in AdaLoRA."""
    of = task_of("pairs", tiny_model, tmp_path, parallel="fsdp")
    adapter = {"method": method} | ({"dropout": 0.0} if method == "adalora" else {})
    one = of.model_copy(update={"adapter": of.adapter.model_validate(adapter)})
    train(one)
    several, path = begun(one, tmp_path)
    done("train", path, folder=tmp_path)
    same_run(one, several)


def test_processes_hold_the_same_ranks_whatever_they_drop(tiny_model, tmp_path):
    """AdaLoRA's dropout is each process's own, which the run says; what it learns from it is that of all."""
    of = task_of("pairs", tiny_model, tmp_path, steps=12)
    phases = {"tinit": 1, "tfinal": 2, "deltaT": 2}
    adapter = of.adapter.model_validate({"method": "adalora", "dropout": 0.4, "rank": 2, "options": phases})
    path = write_config(of.model_copy(update={"adapter": adapter}), tmp_path / "adalora.yaml")
    done("train", path, folder=tmp_path, count=2, first=keep_last)
    first, second = (load_file(tmp_path / f"rank{place}" / LAST) for place in (0, 1))
    assert list(first) == list(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    ranks_left = [int(tensor.ne(0).sum()) for name, tensor in first.items() if "lora_E" in name]
    assert len(set(ranks_left)) > 1, "nothing moved"
    said = json.loads((Path(of.output) / "run.json").read_text())["decisions"]["dropout"]
    assert "drawn per process and micro-batch" in said
    errors = [(tmp_path / f"rank{place}" / "stderr.txt").read_text() for place in (0, 1)]
    assert [text.count(said) for text in errors] == [1, 0]


@pytest.mark.parametrize(
    ("adapter", "training", "told"),
    [
        ({"method": "vera", "dropout": 0.1}, {"micro_batch_size": 2}, True),
        ({"method": "vera", "dropout": 0.0}, {"micro_batch_size": 2}, False),
        ({"method": "vera", "dropout": 0.1}, {}, False),  # one process, and no step is cut
        ({"method": "loha", "options": {"rank_dropout": 0.1}}, {"micro_batch_size": 2}, True),
        ({"method": "boft", "options": {"boft_dropout": 0.1}}, {"micro_batch_size": 2}, True),
        ({"rank": 2, "dropout": 0.1}, {"micro_batch_size": 2}, False),
        (
            {"rank": 2, "dropout": 0.1, "targets": ["embed_tokens"]},
            {"micro_batch_size": 2},
            False,
        ),  # peft drops nothing
    ],
    ids=str,
)
def test_dropout_that_depends_on_the_cut_is_told(adapter, training, told, tiny_model, tmp_path, capsys):
    of = task_of("pairs", tiny_model, tmp_path, steps=1, **training)
    one = of.model_copy(update={"adapter": of.adapter.model_validate(adapter)})
    summary = train(one, quiet=False)
    assert ("dropout" in summary["decisions"]) == told
    assert capsys.readouterr().err.count("drawn per process and micro-batch") == told


def held(model: Path) -> int:
    return sum(t.numel() * t.element_size() for t in load_file(model / "model.safetensors").values())


@pytest.mark.parametrize("before", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(before, tiny_model, tmp_path):
    one = task_of("pairs", tiny_model, tmp_path)
    train(one)
    several, path = begun(one, tmp_path)
    half = write_config(changed(several, budget={"max_hours": 1e-9}), tmp_path / "half.yaml")
    for count in (before, 3 - before):  # the budget ends the first after its first step
        first = half if count == before else path
        arguments = ("train", first, "--quiet", *(["--resume"] if count != before else []))
        codes = [ended.code for ended in ranks(*arguments, folder=tmp_path, count=count)]
        assert codes == [6 if count == before else 0] * count
    assert "processes" in same_run(one, several)["resumed_with_other"]


def test_a_signal_to_one_process_stops_all_at_one_step(tiny_model, tmp_path):
    one = task_of("pairs", tiny_model, tmp_path, steps=40, save_every=40, eval_every=40)
    several, path = begun(one, tmp_path)
    metrics, checkpoints = Path(several.output) / "metrics.jsonl", Path(several.output) / "checkpoints"
    run = Ranks("train", path, "--quiet", folder=tmp_path)
    assert run.engines[0].wait_for(lambda: last_step(metrics) >= 3)
    run.engines[1].send(signal.SIGTERM)
    ended = run.wait()
    assert [one.code for one in ended] == [75, 75], ended[0].err + ended[1].err
    told = "".join(one.err for one in ended)
    assert told.count("SIGTERM: stopped after a complete checkpoint") == 1
    assert "Traceback" not in told
    assert newest(checkpoints) == last_step(metrics) < 40
    verify_files(complete_checkpoints(checkpoints)[-1])
    done("train", path, "--resume", folder=tmp_path)
    train(one)
    same_run(one, several)


def test_memory_that_runs_out_in_one_process(tiny_model, tmp_path):
    """It takes smaller micro-batches, then all do; the run is the same, and says so."""
    one = task_of("pairs", tiny_model, tmp_path, micro_batch_size="auto")
    train(one)
    several, path = begun(one, tmp_path)
    done("train", path, folder=tmp_path, first=starve_second)
    events = [row for row in rows_of(several) if "event" in row]
    assert [(row["event"], row["micro_batch_size"]) for row in events] == [("out_of_memory", 1)]
    kept = [json.dumps(row) for row in rows_of(several) if "event" not in row]
    (Path(several.output) / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert same_run(one, several)["micro_batch_size"] == 1


def test_memory_that_runs_out_in_one_process_of_a_sharded_run(tiny_model, tmp_path):
    one = task_of("pairs", tiny_model, tmp_path, micro_batch_size="auto", parallel="fsdp")
    began = time.monotonic()
    first, second = ranks("train", write_config(one, tmp_path / "f.yaml"), folder=tmp_path, first=starve_second)
    assert time.monotonic() - began < 30
    assert second.code == 4
    assert "Lower training.micro_batch_size" in second.err
    assert first.code == 1
    assert "Traceback" not in first.err + second.err


def test_a_process_that_is_killed_ends_the_others(tiny_model, tmp_path):
    one = task_of("pairs", tiny_model, tmp_path)
    path = write_config(one, tmp_path / "killed.yaml")
    began = time.monotonic()
    first, second = ranks("train", path, "--quiet", folder=tmp_path, first=end_second)
    assert time.monotonic() - began < 30
    assert (first.code, second.code) == (1, -signal.SIGKILL)
    assert "waited for another one that has ended" in first.err
    assert "--resume" in first.err
    assert "Traceback" not in first.err


def test_what_all_meet_is_told_once(tiny_model, tmp_path):
    one = task_of("pairs", tiny_model, tmp_path)
    wrong = write_config(changed(one, adapter__targets=["no_such_layer"]), tmp_path / "wrong.yaml")
    ended = ranks("train", wrong, "--quiet", folder=tmp_path)
    assert [one.code for one in ended] == [2, 2]
    assert "".join(one.err for one in ended).count("no_such_layer") == 1


def test_what_the_first_meets_alone_ends_all(tiny_model, tmp_path):
    """An output that is taken: the others have nothing to say of it, and don't wait for the first."""
    one = task_of("pairs", tiny_model, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    began = time.monotonic()
    first, *others = ranks("train", write_config(one, tmp_path / "taken.yaml"), folder=tmp_path, count=3)
    assert time.monotonic() - began < 30
    assert first.code == 2
    assert "already holds a run" in first.err
    assert [other.code for other in others] == [1, 1]
    assert [other.err for other in others] == ["", ""]


def test_other_verbs_run_in_one_process(tiny_model, tmp_path):
    one = task_of("pairs", tiny_model, tmp_path)
    ended = ranks("validate", write_config(one, tmp_path / "one.yaml"), folder=tmp_path)
    assert ended[0].code == 2
    assert "validate runs in one process" in ended[0].err


def test_the_command_starts_watches_and_stops_its_processes(tiny_model, tmp_path):
    """`train --processes 2`, for real: SIGTERM gives one checkpoint and 75; a killed process gives 1 and its name."""
    one = task_of("pairs", tiny_model, tmp_path, steps=3000, save_every=3000, eval_every=3000)
    path = write_config(one, tmp_path / "run.yaml")
    metrics, checkpoints = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints"
    words = [sys.executable, "-m", "peft_engine", "train", str(path), "--processes", "2", "--quiet"]

    def started(more: list[str], step: int) -> subprocess.Popen[str]:
        child = subprocess.Popen([*words, *more], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while child.poll() is None and last_step(metrics) < step:
            time.sleep(0.02)
        return child

    child = started([], 3)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    assert err.count("SIGTERM: stopped after a complete checkpoint") == 1
    stood = newest(checkpoints)
    assert stood >= 3
    verify_files(complete_checkpoints(checkpoints)[-1])
    child = started(["--resume"], stood + 3)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    second = next(p for p in workers if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
    began = time.monotonic()
    os.kill(int(second), signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert time.monotonic() - began < 25  # those that hang are killed after 30
    assert child.returncode == 1, err
    assert "Process 1 was ended by SIGKILL" in err
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_who_tells_where_the_store_is_gone(tiny_model, tmp_path):
    """It went with the launcher, which told nobody: else all would leave it to another."""
    one = task_of("pairs", tiny_model, tmp_path, steps=400, save_every=400, eval_every=400)
    path = write_config(one, tmp_path / "run.yaml")
    run = Ranks("train", path, "--quiet", folder=tmp_path)
    assert run.engines[0].wait_for(lambda: last_step(tmp_path / "run" / "metrics.jsonl") >= 3)
    del run.store
    for engine in run.engines:
        engine.send(signal.SIGTERM)
    ended = run.wait()
    assert [one.code for one in ended] == [75, 75]
    assert ["SIGTERM: stopped after a complete checkpoint" in one.err for one in ended] == [True, False]


@pytest.mark.slow
def test_a_launcher_that_is_killed_is_told_by_the_first_process(tiny_model, tmp_path):
    """Nobody holds the store any more, so all would leave the telling to another; torch's frames are kept quiet."""
    one = task_of("pairs", tiny_model, tmp_path, steps=3000, save_every=3000, eval_every=3000)
    words = ["train", str(write_config(one, tmp_path / "run.yaml")), "--processes", "2", "--quiet"]
    metrics, errors = tmp_path / "run" / "metrics.jsonl", tmp_path / "errors.txt"
    with errors.open("w") as file:
        child = subprocess.Popen([sys.executable, "-m", "peft_engine", *words], stderr=file, stdout=subprocess.DEVNULL)
        while child.poll() is None and last_step(metrics) < 3:
            time.sleep(0.02)
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        child.kill()
        child.wait()
    limit = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < limit:
        time.sleep(0.05)
    err = errors.read_text()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers), err
    assert err.count("SIGTERM: stopped after a complete checkpoint") == 1, err
    assert "frame #" not in err
    assert "Traceback" not in err
    verify_files(complete_checkpoints(tmp_path / "run" / "checkpoints")[-1])


def test_one_exit_code_of_several():
    assert _joined({}, False) == 0
    assert _joined({0: 1, 1: 4}, False) == 4
    assert _joined({1: 75, 0: -15}, True) == 75
    assert _joined({0: -2, 1: -2}, True) == 75
    assert _joined({0: 1, 1: 1}, False) == 1
    with pytest.raises(EngineError, match="Process 1 was ended by SIGKILL"):
        _joined({0: -15, 1: -9, 2: 1}, False)


def test_processes_that_can_not_make_the_run(tiny_model, tmp_path, monkeypatch):
    one = task_of("pairs", tiny_model, tmp_path)
    with pytest.raises(ConfigError, match=r"5 processes, but training\.batch_size is 4"):
        refuse_processes(one, "cpu", 5, 5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="has 0 GPU"):
        refuse_processes(one, "cuda", 2, 2)
    with pytest.raises(ConfigError, match="serves one"):
        refuse_processes(one, "mps", 2, 2)
    refuse_processes(one, "cpu", 4, 4)


def test_what_accelerate_launch_may_ask_for(tiny_model, tmp_path, monkeypatch):
    one = task_of("pairs", tiny_model, tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert start(one).accelerator.gradient_accumulation_steps == 1  # the loss would be a quarter
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"DeepSpeed.*parallel: fsdp"):
        start(one)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"FSDP.*--multi_gpu"):
        start(one)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="FSDP"):
        start(changed(one, training__parallel="fsdp"))
    monkeypatch.setenv("FSDP_VERSION", "2")
    start(changed(one, training__parallel="fsdp"))
    assert "ACCELERATE_USE_FSDP" not in os.environ  # transformers would load weights in one process only
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but RANK"):
        processes.connect()


class Counter:
    """A meter of numbers and lists."""

    def __init__(self) -> None:
        self.task, self.scale, self.sum, self.seen = "task", 3, 0.0, []

    def add(self, *found: float) -> "Counter":
        self.sum += sum(found)
        self.seen = [*self.seen, *found]
        return self


def test_meters_are_joined(monkeypatch):
    parts = [Counter().add(1.0, 2.0), Counter(), Counter().add(4.0)]
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(processes, "gathered", lambda own: [{k: vars(p)[k] for k in own} for p in parts])
    joined = evaluation.join(parts[0], Counter())
    assert (joined.scale, joined.sum, joined.seen) == (3, 7.0, [1.0, 2.0, 4.0])
    parts[0].task = "another"
    with pytest.raises(AssertionError, match="task: can't be joined"):
        evaluation.join(parts[0], Counter())


@pytest.mark.slow
def test_sharding_takes_memory_off_every_process(tmp_path):
    """A frozen backbone of 25 million weights: same run, and each of two processes holds about half of it."""
    tokenizer = chatml(pad_token="<|endoftext|>")
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 32, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **shape))
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(12))
    steps = {"steps": 8, "batch_size": 4, "learning_rate": 1e-3}
    data = {"split": {"eval": 2 / 12, "test": 0.0}}
    one = config("causal-lm", tmp_path / "model", rows, tmp_path / "run", data=data, training=steps)
    train(one)
    for parallel in ("ddp", "fsdp"):
        several = changed(one, output=str(tmp_path / parallel), training__parallel=parallel)
        path = write_config(several, tmp_path / f"{parallel}.yaml")
        assert [ended.code for ended in Ranks("train", path, folder=tmp_path / f"of-{parallel}").wait(300)] == [0, 0]
    whole, parts = (
        same_run(one, changed(one, output=str(tmp_path / parallel)))["processes"]["each"]
        for parallel in ("ddp", "fsdp")
    )
    for before, after in zip(whole, parts, strict=True):
        assert before["model_bytes"] > weights
        assert after["model_bytes"] < 0.55 * before["model_bytes"]
        assert after["peak_bytes"] < before["peak_bytes"] - 0.3 * weights
