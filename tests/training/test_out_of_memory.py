"""Memory that runs out: smaller micro-batches with the same mathematics, or exit 4."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing import changed, outcome, small, write_config
from processes import engine
from tiny import class_rows, config, write_rows
from torch import Tensor, nn

from peft_engine.config import Config
from peft_engine.errors import OutOfMemory
from peft_engine.run import train
from peft_engine.tasks.base import Batch
from peft_engine.tasks.causal_lm import CausalLM
from peft_engine.tasks.text_classification import TextClassification
from peft_engine.training.guards import is_out_of_memory


def losses(settings: Config) -> list[float]:
    rows = [json.loads(line) for line in (Path(settings.output) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def events(settings: Config) -> list[dict]:
    rows = [json.loads(line) for line in (Path(settings.output) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "event" in row]


def short_of_memory(
    monkeypatch: pytest.MonkeyPatch, too_big: Callable[[Batch], bool], task: type = CausalLM, training: bool = True
) -> None:
    """Let forward run out of memory on some batches, in training or in evaluation."""
    name = "training_loss" if training else "forward"
    whole = getattr(task, name)

    def starved(self: CausalLM, model: nn.Module, batch: Batch) -> Tensor:
        result = whole(self, model, batch)
        if model.training == training and too_big(batch):
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return result

    monkeypatch.setattr(task, name, starved)


def roomy(tiny_model: Callable[[str], Path], folder: Path, dropout: float = 0.0) -> Config:
    settings = small(tiny_model("llama"), folder, steps=6, micro_batch_size="auto", batch_size=8)
    return changed(settings, adapter__dropout=dropout)


def test_auto_halves_and_the_losses_stay(tiny_model, tmp_path, monkeypatch):
    settings = roomy(tiny_model, tmp_path)
    train(settings)
    starved = changed(settings, output=str(tmp_path / "starved"))
    with monkeypatch.context() as patched:
        short_of_memory(patched, lambda batch: batch["input_ids"].shape[0] > 2)
        assert train(starved)["micro_batch_size"] == 2
    assert losses(starved) == pytest.approx(losses(settings), rel=1e-5)
    assert events(starved) == [
        {"step": 1, "event": "out_of_memory", "micro_batch_size": 4},
        {"step": 1, "event": "out_of_memory", "micro_batch_size": 2},
    ]
    assert not events(settings)


def test_a_step_begun_again_draws_the_same_dropout(tiny_model, tmp_path, monkeypatch):
    """The bits of a run that had the smaller size from the start."""
    settings = roomy(tiny_model, tmp_path, dropout=0.3)
    asked = changed(settings, output=str(tmp_path / "asked"), training__micro_batch_size=2)
    train(asked)
    with monkeypatch.context() as patched:
        short_of_memory(patched, lambda batch: batch["input_ids"].shape[0] > 2)
        train(settings)
    assert losses(settings) == losses(asked)
    assert outcome(settings.output)["adapter"] == outcome(asked.output)["adapter"]


def test_gradients_of_the_step_that_failed_are_not_kept(tiny_model, tmp_path, monkeypatch):
    """Memory runs out in the third step's second micro-batch, when the first has left its gradients."""
    settings = changed(roomy(tiny_model, tmp_path), training__micro_batch_size=4, data__split__eval=0.2)  # 16 rows
    train(settings)
    starved = changed(settings, output=str(tmp_path / "starved"), training__micro_batch_size="auto")
    forwards: list[int] = []

    def some(batch: Batch) -> bool:
        forwards.append(batch["input_ids"].shape[0])
        return len(forwards) in (1, 7)

    with monkeypatch.context() as patched:
        short_of_memory(patched, some)
        assert train(starved)["micro_batch_size"] == 2
    assert forwards[:11] == [8, 4, 4, 4, 4, 4, 4, 2, 2, 2, 2]
    assert losses(starved) == pytest.approx(losses(settings), rel=1e-5)


def test_one_sequence_that_does_not_fit_is_the_end(tiny_model, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, lambda batch: True)
    with pytest.raises(OutOfMemory, match=r"Memory ran out with 1 sequence\(s\) of up to \d+ tokens.*20.00 GiB"):
        train(roomy(tiny_model, tmp_path))


def test_an_explicit_size_is_kept(tiny_model, tmp_path, monkeypatch):
    settings = changed(roomy(tiny_model, tmp_path), training__micro_batch_size=4)
    short_of_memory(monkeypatch, lambda batch: batch["input_ids"].shape[0] > 2)
    with pytest.raises(OutOfMemory, match=r"Memory ran out with 4 sequence\(s\)") as caught:
        train(settings)
    assert "Lower training.micro_batch_size" in caught.value.fix
    assert OutOfMemory.exit_code == 4


def test_other_errors_are_not_taken_for_memory(tiny_model, tmp_path, monkeypatch):
    def broken(*_: object) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(CausalLM, "loss", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        train(roomy(tiny_model, tmp_path))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("where", ["forward", "metrics"])
@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
def test_evaluation_halves_too(task, where, tiny_model, tmp_path, monkeypatch):
    """Also where the metrics, which copy the logits, run out: what they had added is not added twice."""
    settings = changed(roomy(tiny_model, tmp_path), data__split__eval=0.4, training__steps=1)
    kind: type = CausalLM
    if task == "text-classification":
        rows = write_rows(tmp_path / "texts.jsonl", class_rows(30))
        settings = config(
            task,
            tiny_model("bert"),
            rows,
            tmp_path / "run",
            data={"split": {"eval": 0.4, "test": 0.0}},
            training={"steps": 1},
        )
        kind = TextClassification
    before = train(settings)["metrics"]
    if where == "forward":
        short_of_memory(monkeypatch, lambda batch: batch["input_ids"].shape[0] > 3, kind, training=False)
    else:
        loss, module = kind.loss, "causal_lm" if kind is CausalLM else "class_metrics"

        def starved(self: CausalLM, logits: Tensor, batch: Batch) -> Tensor:
            value = loss(self, logits, batch)
            if not logits.requires_grad and len(logits) > 3:
                raise torch.OutOfMemoryError(module)
            return value

        monkeypatch.setattr(kind, "loss", starved)
    found = train(settings, overwrite=True)["metrics"]
    for stage in ("before", "after"):
        assert set(found[stage]) == set(before[stage])
        for name, value in before[stage].items():
            if isinstance(value, int | float):
                assert found[stage][name] == pytest.approx(value, rel=1e-5), (stage, name)


def test_metrics_that_fail_late_change_nothing(tiny_model, tmp_path):
    """`argmax` comes after the loss: with a batch that can't do it, nothing may have been added."""
    settings = small(tiny_model("llama"), tmp_path)
    meter = CausalLM(settings).meter()

    class Late(Tensor):
        def argmax(self, *_: object) -> Tensor:  # type: ignore[override]
            raise torch.OutOfMemoryError("late")

    batch = {"labels": torch.ones(1, 4, dtype=torch.long), "text_bytes": torch.tensor(4)}
    with pytest.raises(torch.OutOfMemoryError):
        meter.update(torch.zeros(1, 4, 8).as_subclass(Late), batch)
    meter.update(torch.zeros(1, 4, 8), batch)
    assert meter.compute()["tokens"] == 3
    assert meter.compute()["loss"] == pytest.approx(2.0794415)


def test_memory_that_really_runs_out(tiny_model, tmp_path):
    """An address space that holds a few sequences, not 256: exit 4 for the size asked for, a smaller one for auto."""
    rows = [{"text": " ".join(f"{i}{j}" for j in range(60))} for i in range(256)]
    settings = config(
        "causal-lm",
        tiny_model("llama"),
        write_rows(tmp_path / "long.jsonl", rows),
        tmp_path / "run",
        data={"split": {"eval": 0.0, "test": 0.0}, "max_length": 128, "max_dropped": 1.0},
        training={"steps": 1, "batch_size": 256, "micro_batch_size": 256},
        evaluation={"batch_size": 4},
    )
    limit = {"memory_bytes": 100 * 2**20}  # 256 sequences take three times as much, 4 a half
    path = write_config(settings, tmp_path / "asked.yaml")
    ended = engine("train", path, "--quiet", folder=tmp_path, **limit)
    assert ended.code == 4, ended.err
    assert "Memory ran out with 256 sequence(s) of up to 128 tokens" in ended.err
    assert "Traceback" not in ended.err
    auto = changed(settings, output=str(tmp_path / "auto"), training__micro_batch_size="auto")
    ended = engine("train", write_config(auto, tmp_path / "auto.yaml"), "--quiet", folder=tmp_path, **limit)
    assert ended.code == 0, ended.err
    assert events(auto)
    train(changed(settings, output=str(tmp_path / "room")))
    assert losses(auto) == pytest.approx(losses(changed(settings, output=str(tmp_path / "room"))), rel=1e-5)
