"""What the loop does beside plain steps: early stopping, best weights, checkpointed activations, bf16."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import assemble, class_rows, config, make_model, pair_rows, write_rows

from peft_engine.adapters.group import Member
from peft_engine.config import Config
from peft_engine.run import train
from peft_engine.using import evaluate, open_run

LM, CLASSES = "causal-lm", "text-classification"


def settings_of(family: str, model: Path, folder: Path, /, **sections: dict[str, Any]) -> Config:
    rows = write_rows(folder / "rows.jsonl", class_rows(24) if family == "bert" else pair_rows(24))
    training = {"batch_size": 6, "warmup": 0.0, "schedule": "constant", **sections.pop("training", {})}
    adapter = {"rank": 4, "dropout": 0.0, **sections.pop("adapter", {})}
    data = {"split": {"eval": 0.25, "test": 0.0}}
    task = CLASSES if family == "bert" else LM
    return config(task, model, rows, folder / "out", training=training, adapter=adapter, data=data, **sections)


@pytest.mark.parametrize(
    ("values", "stopping", "stops_at"),
    [
        ([5, 4, 3, 2, 1, 0.5], {"patience": 1}, None),
        ([5, 4, 4, 2, 1, 0.5], {"patience": 1}, 6),  # no worse is no better
        ([5, 6, 7, 8, 9, 9], {"patience": 2}, 6),
        ([5, 6, 4, 6, 3, 6], {"patience": 2}, None),  # the count begins again
        ([5, 6, 4, 6, 4, 6], {"patience": 3}, 12),
        ([5, 4.9, 4.8, 4.4, 4.3, 4.3], {"patience": 2, "min_delta": 0.5}, 6),
        ([5, 4.9, 4.4, 4.3, 4.2, 4.2], {"patience": 2, "min_delta": 0.5}, 10),
    ],
)
def test_early_stopping_waits_for_an_improvement(
    values: list[float],
    stopping: dict[str, Any],
    stops_at: int | None,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Losses of evaluations at steps 2, 4, … 12."""
    training = {"steps": 12, "eval_every": 2, "early_stopping": stopping}
    run = assemble(settings_of("llama", tiny_model("llama"), tmp_path, training=training))
    said = iter(values)
    run.train(12, lambda member: {"loss": next(said)})
    (trainee,) = run.trainees
    assert (trainee.stopped, trainee.step) == (stops_at is not None, stops_at or 12)
    assert [row["loss"] for row in trainee.evaluations] == values[: trainee.step // 2]


@pytest.mark.parametrize(
    ("family", "metric", "values", "best", "stopping"),
    [
        ("llama", "loss", [5, 4, 3, 3.5, 3, 6], 3, None),
        ("bert", "accuracy", [0.5, 0.9, 0.6, 0.9, 0.4, 0.1], 2, None),
        (
            "llama",
            "loss",
            [5, 4, 3.9, 3.8, 4.1, 6],
            4,
            {"patience": 9, "min_delta": 0.5},
        ),  # less than patience asks for
        ("bert", "accuracy", [0.5, 0.8, 0.85, 0.9, 0.4, 0.1], 4, {"patience": 9, "min_delta": 0.2}),
    ],
)
def test_the_best_weights_come_back(
    family: str,
    metric: str,
    values: list[float],
    best: int,
    stopping: dict[str, Any] | None,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Of a loss the lowest, of an accuracy the highest; the first of equals."""
    training = {
        "steps": 6, "eval_every": 1, "learning_rate": 1e-2, "restore_best": True, "early_stopping": stopping,
    }  # fmt: skip
    run = assemble(settings_of(family, tiny_model(family), tmp_path, training=training))
    said, seen = iter(values), []

    def evaluate(member: Member) -> dict[str, Any]:
        seen.append({name: t.detach().clone() for name, t in member.tensors.items()})
        return {metric: next(said)}

    run.train(6, evaluate)
    assert run.trainees[0].best_step == best
    now = run.group.members[0].tensors
    assert all(torch.equal(now[name], tensor) for name, tensor in seen[best - 1].items())
    assert not any(torch.equal(now[name], tensor) for name, tensor in seen[-1].items())


@pytest.mark.parametrize(("rate", "steps"), [(1e-9, 6), (1e-3, 8)])
def test_a_run_reports_what_it_stopped_on(
    rate: float, steps: int, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    stopping = {"patience": 2, "min_delta": 1e-5}
    training = {"steps": 8, "eval_every": 2, "learning_rate": rate, "early_stopping": stopping, "restore_best": True}
    summary = train(settings_of("llama", tiny_model("llama"), tmp_path, training=training))
    assert (summary["steps"], summary["stopped_early"]) == (steps, steps < 8)
    losses = {row["step"]: row["loss"] for row in summary["evaluations"]}
    assert list(losses) == list(range(2, steps + 1, 2))
    assert summary["metrics"]["after"]["loss"] == losses[summary["best_step"]]
    assert evaluate(tmp_path / "out", "eval")["metrics"]["loss"] == losses[summary["best_step"]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing_changes_nothing_but_memory(family: str, tmp_path: Path) -> None:
    """With dropout on: what is recomputed must draw what was drawn (and no adapter loses its gradient: trap 6)."""
    model = make_model(family, tmp_path / "model", dropout=0.1)
    found = []
    for switch in (False, True):
        training = {"gradient_checkpointing": switch, "learning_rate": 1e-2, "micro_batch_size": 4}
        run = assemble(settings_of(family, model, tmp_path, adapter={"dropout": 0.1}, training=training))
        calls: list[int] = []
        module = dict(run.group.backbone.model.named_modules())
        first = next(name for name in module if name.endswith(("q_proj", "query", "c_attn")))
        module[first].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        rows = run.train(4)
        curve = [(row["loss"], row["grad_norm"]) for row in rows]
        found.append((curve, {name: t.detach() for name, t in run.group.members[0].tensors.items()}, len(calls)))
    (plain, tensors, once), (checkpointed, again, twice) = found
    assert checkpointed == plain
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert twice == 2 * once, "nothing was recomputed"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bf16_trains_fp32_adapters(dtype: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Trap 17: steps of 1e-5 on weights near 0.1 round to nothing in bf16."""
    training = {"precision": "bf16", "learning_rate": 1e-5, "steps": 4, "save_every": 4}
    adapter, model = {"modules_to_save": ["lm_head"]}, {"dtype": dtype}
    settings = settings_of("llama", tiny_model("llama"), tmp_path, training=training, adapter=adapter, model=model)
    run = assemble(settings)
    (member,) = run.group.members
    before = {name: t.detach().clone() for name, t in member.tensors.items()}
    batch = run.task.collate(run.data["train"], run.trainees[0].plan.rows(1))
    with torch.no_grad(), run.runtime.accelerator.autocast():
        assert run.task.forward(run.group.model, batch).dtype == torch.bfloat16, "no bf16 was computed"
    rows = run.train(4)
    assert {t.dtype for t in member.tensors.values()} == {torch.float32}
    for name, tensor in member.tensors.items():
        moved = (tensor - before[name]).abs()
        assert moved.max() > 0, name
        assert moved.max() < 1e-4
    states = [s for state in run.trainees[0].optimizer.state.values() for s in state.values()]
    assert {s.dtype for s in states} == {torch.float32}

    train(settings)
    file = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert {t.dtype for t in file.values()} == {torch.float32}
    loaded = open_run(tmp_path / "out").group.members[0].tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in member.tensors.items()), "rounded while loading"
    more = {"training": {**training, "precision": "fp32"}, "adapter": adapter}
    other = assemble(settings_of("llama", tiny_model("llama"), tmp_path, **more))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in other.train(4)], rel=2e-2)


def test_an_older_checkpoint_waits_as_it_did(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Before `counted_value` was kept, the best value was the last that had counted."""
    run = assemble(settings_of("llama", tiny_model("llama"), tmp_path, training={"steps": 1}))
    (trainee,) = run.trainees
    saved = {**trainee.to_json(), "best_value": 2.5}
    trainee.restore(saved)
    assert trainee.counted_value is None
    del saved["counted_value"]
    trainee.restore(saved)
    assert (trainee.counted_value, trainee.best_value) == (2.5, 2.5)
