"""Class weights: sum of w·l over sum of w over the whole global batch, in training alone."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from tiny import assemble, class_rows, config, cut, sentence, write_rows

from peft_engine.data.encoding import EncodedSet
from peft_engine.data.labels import Labels
from peft_engine.errors import ConfigError
from peft_engine.evaluation import evaluate_split
from peft_engine.inspection import inspect_data
from peft_engine.run import train
from peft_engine.tasks.weighting import add_weights, class_weights, weighted, weighted_cross_entropy
from peft_engine.training.step import gradients

SKEWED = ["a"] * 17 + ["b"] * 5 + ["c"] * 2


def settings(tiny_model, folder, weights, rows=None, **sections):
    rows = rows or [{"text": sentence(i, 3 + i % 5), "label": label} for i, label in enumerate(SKEWED)]
    data = {"class_weights": weights, "split": {"eval": 0.0, "test": 0.0}, **sections.pop("data", {})}
    path = write_rows(folder / "rows.jsonl", rows)
    return config("text-classification", tiny_model("bert"), path, folder / "run", data=data,
                  adapter={"dropout": 0.0}, **sections)  # fmt: skip


def test_balanced_is_scikit_learns(tiny_model, tmp_path):
    data = assemble(settings(tiny_model, tmp_path, "balanced")).data["train"]
    wanted = dict(zip("abc", compute_class_weight("balanced", classes=np.array(list("abc")), y=SKEWED), strict=True))
    found = {"abc"[i]: w for i, w in zip(data.columns["label"], data.columns["weight"], strict=True)}
    assert found == pytest.approx(wanted)
    assert data.units.dtype == np.float64
    assert data.units.mean() == pytest.approx(1.0)
    counts = np.array([3, 0, 9])
    assert class_weights(list("abc"), counts, "balanced") == pytest.approx([2.0, 1.0, 12 / 18])


def test_balanced_counts_what_a_mixture_shows(tiny_model, tmp_path):
    rows = [{"text": sentence(i, 4), "label": "ab"[i % 2]} for i in range(20)]
    one = write_rows(tmp_path / "one.jsonl", rows[:10])
    two = write_rows(tmp_path / "two.jsonl", [{**row, "label": "a"} for row in rows[10:]])
    sources = [{"path": str(one)}, {"path": str(two), "weight": 2.0}]
    data = assemble(settings(tiny_model, tmp_path, "balanced", data={"train": sources})).data["train"]
    wanted = compute_class_weight("balanced", classes=np.array([0, 1]), y=[0] * 25 + [1] * 5)
    assert sorted(set(data.columns["weight"].tolist())) == pytest.approx(sorted(wanted))


def accumulated(of, size):
    made = assemble(of)
    rows, tensors = np.arange(24), list(made.trainees[0].member.tensors.values())
    made.group.activate(made.trainees[0].member)
    units = made.data["train"].units[rows].sum().item()
    found = gradients(made.group, made.task, made.data["train"], cut(rows, size), units, tensors, made.runtime, 1)
    return made, float(found.loss), [t.grad.clone() for t in tensors]


@pytest.mark.parametrize("weights", ["balanced", {"b": 7.5, "c": 0.25}])
def test_the_loss_is_the_weighted_mean_over_the_global_batch(tiny_model, tmp_path, weights):
    """Against torch's own weighted cross-entropy, in one piece and in uneven ones."""
    of = settings(tiny_model, tmp_path, weights)
    made, loss, whole = accumulated(of, 24)
    batch = made.task.collate(made.data["train"], np.arange(24))
    by_class = torch.tensor(
        [dict(zip(batch["label"].tolist(), batch["weight"].tolist(), strict=True))[i] for i in range(3)]
    )
    tensors = list(made.trainees[0].member.tensors.values())
    for tensor in tensors:
        tensor.grad = None
    wanted = F.cross_entropy(made.task.forward(made.group.model, batch), batch["label"], weight=by_class)
    wanted.backward()
    assert loss == pytest.approx(float(wanted), rel=1e-6)
    for found, tensor in zip(whole, tensors, strict=True):
        torch.testing.assert_close(found, tensor.grad, rtol=1e-5, atol=1e-7)
    for size in (5, 1):
        _, cut_loss, cut_up = accumulated(of, size)
        assert cut_loss == pytest.approx(loss, rel=1e-6)
        for one, other in zip(cut_up, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    _, plain, _ = accumulated(settings(tiny_model, tmp_path, "none"), 24)
    assert abs(plain - loss) > 1e-3


def test_runs_that_accumulate_log_and_learn_the_same(tiny_model, tmp_path):
    found = []
    for micro in (6, 4):
        folder = tmp_path / str(micro)
        training = {"steps": 4, "batch_size": 6, "micro_batch_size": micro, "optimizer": "sgd", "learning_rate": 0.1}
        train(settings(tiny_model, folder, {"a": 0.05, "b": 0.1}, training=training))
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        found.append([row["loss"] for row in rows if "loss" in row])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    made = assemble(settings(tiny_model, tmp_path / "again", {"a": 0.05, "b": 0.1}, training=training))
    first = made.trainees[0].plan.rows(1)
    batch = made.task.collate(made.data["train"], first)
    with torch.no_grad():
        losses = F.cross_entropy(made.task.forward(made.group.model.train(), batch), batch["label"], reduction="none")
    wanted = float((losses * batch["weight"]).sum() / batch["weight"].sum())
    assert found[0][0] == pytest.approx(wanted, rel=1e-5), "a mean, though the weights sum to less than 1"
    assert batch["weight"].sum() < 1 or "c" in {"abc"[i] for i in batch["label"]}


def test_evaluation_knows_no_weights(tiny_model, tmp_path):
    data = {"split": {"eval": 0.3, "test": 0.0}}
    rows = class_rows(30)
    made = [assemble(settings(tiny_model, tmp_path, w, rows, data=data)) for w in ("none", {"yes": 9.0})]
    for split in ("train", "eval"):
        told = [evaluate_split(made[0].group.model.eval(), m.task, m.data[split], 8, m.runtime) for m in made]
        assert told[0] == told[1]
    assert "weight" not in made[1].data["eval"].columns
    assert made[1].data["eval"].units.dtype == np.int64


def test_refused_where_no_row_has_one_class(tiny_model, tmp_path):
    with pytest.raises(
        ConfigError, match=r"the class 'bb', which the data does not have; it has a, b, c.*Did you mean 'b'"
    ):
        assemble(settings(tiny_model, tmp_path, {"bb": 2.0}))
    for labels, kind in (([["x"], ["x", "y"]] * 5, "multi"), ([0.5, 1.5] * 5, "regression")):
        rows = [{"text": sentence(i, 4), "label": label} for i, label in enumerate(labels)]
        with pytest.raises(ConfigError, match=f"the labels are of type {kind}"):
            inspect_data(settings(tiny_model, tmp_path, "balanced", rows), 0)
        with pytest.raises(ValueError, match=f"data.label_type is {kind}"):
            settings(tiny_model, tmp_path, "balanced", data={"label_type": kind})
    with pytest.raises(ValueError, match=r"is no class of data\.labels; did you mean abc"):
        settings(tiny_model, tmp_path, {"abd": 2.0}, data={"labels": ["abc", "b"]})
    with pytest.raises(ValueError, match="applies to tasks"):
        config("causal-lm", "m", "a", "o", data={"class_weights": "balanced"})


def test_weights_of_tagged_tokens():
    """The shared part for token classification: a weight per tagged token, units per sequence."""
    tag = np.array([-100, 0, 1, -100, 1, -100, 2, 2])
    offsets = np.array([0, 4, 8])
    data = EncodedSet(np.arange(8, dtype=np.int32), offsets, np.array([2, 3]), np.arange(2), {"tag": tag})
    found = weighted(data, Labels("tags", list("abc")), {"a": 2.0, "c": 0.5}, np.ones(2))  # type: ignore[arg-type]
    assert found.columns["weight"].tolist() == [0, 2, 1, 0, 1, 0, 0.5, 0.5]
    assert found.units.tolist() == [3.0, 2.0]
    batch = {"tag": torch.from_numpy(tag.reshape(2, 4))}
    add_weights(batch, found, np.array([0, 1]))
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    loss = weighted_cross_entropy(logits, batch["tag"], batch["weight"])
    by_class = torch.tensor([2.0, 1.0, 0.5])
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["tag"].flatten(), weight=by_class, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        loss / found.units.sum(),
        F.cross_entropy(logits.flatten(0, 1), batch["tag"].flatten(), weight=by_class),
        check_dtype=False,
    )
    balanced = weighted(data, Labels("tags", list("abc")), "balanced", np.ones(2))  # type: ignore[arg-type]
    wanted_weights = compute_class_weight("balanced", classes=np.array([0, 1, 2]), y=tag[tag >= 0])
    assert balanced.columns["weight"][[1, 2, 6]] == pytest.approx(wanted_weights)
