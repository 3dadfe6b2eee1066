"""Row by row against the metrics of the whole: what is added up over rows is what `evaluate_split` says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics
from tiny import Assembled, assemble, class_rows, config, pair_rows, sentence, write_rows
from tiny_images import make_image_model, write_folder
from tiny_seq2seq import copy_rows, make_seq2seq

from peft_engine.errors import ConfigError
from peft_engine.evaluation import evaluate_items, evaluate_split
from peft_engine.tasks.items import item_kind

SPLIT = {"split": {"eval": 0.2, "test": 0.3}}


def tagged(count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        tokens = sentence(i, 3 + i % 5).split()
        rows.append({"tokens": tokens, "tags": [("noun", "verb", None)[(i + j) % 3] for j in range(len(tokens))]})
    return rows


def judged(folder: Path, task: str, model: Path, rows: Any, **sections: Any) -> tuple[Assembled, dict, dict]:
    """The parts of a run, its items and its metrics on the test rows."""
    data = rows if isinstance(rows, Path) else write_rows(folder / "rows.jsonl", rows)
    given = {"data": SPLIT | sections.pop("data", {}), "adapter": {"method": "head"}, **sections}
    parts = assemble(config(task, model, data, folder / "out", **given))
    with parts.group.evaluating(parts.group.members[0]) as found:
        items = evaluate_items(found, parts.task, parts.data["test"], 5, parts.runtime)
        whole = evaluate_split(found, parts.task, parts.data["test"], 5, parts.runtime)
    assert items["rows"] == sorted(set(parts.data["test"].rows.tolist()))
    assert {len(values) for name, values in items.items() if name != "kind"} == {len(items["rows"])}
    assert sum(items["loss"]) / sum(items["units"]) == pytest.approx(whole["loss"], rel=1e-5)
    return parts, items, whole


def test_classes(tmp_path, tiny_model):
    parts, items, whole = judged(tmp_path, "text-classification", tiny_model("bert"), class_rows(60, ("a", "b", "c")))
    assert items["kind"] == "classes"
    wanted = [parts.task.labels.names.index(example["label"]) for example in parts.splits.test.examples]
    assert items["label"] == wanted, "in the order of the rows, though longest were judged first"
    assert whole["confusion"] == metrics.confusion_matrix(wanted, items["predicted"], labels=[0, 1, 2]).tolist()
    # one row at a time, by torch's own cross-entropy
    data = parts.data["test"]
    with parts.group.evaluating(parts.group.members[0]) as model, torch.no_grad():
        for i in (0, 7):
            logits = parts.task.forward(model, parts.task.collate(data, np.array([i])))
            nats = float(-torch.log_softmax(logits, -1)[0, wanted[i]])
            assert items["loss"][i] == pytest.approx(nats, abs=1e-5)


def test_several_classes(tmp_path, tiny_model):
    rows = [{**row, "label": [["x"], ["x", "y"], ["y"], []][i % 4]} for i, row in enumerate(class_rows(60))]
    _, items, whole = judged(tmp_path, "text-classification", tiny_model("bert"), rows)
    assert set(np.ravel(items["label"])) == {0, 1}
    assert whole["f1_micro"] == pytest.approx(metrics.f1_score(items["label"], items["predicted"], average="micro"))
    assert whole["accuracy"] == np.mean([a == b for a, b in zip(items["label"], items["predicted"], strict=True)])


def test_numbers(tmp_path, tiny_model):
    rows = [{**row, "label": i * 0.25} for i, row in enumerate(class_rows(60))]
    _, items, whole = judged(tmp_path, "text-classification", tiny_model("bert"), rows)
    assert items["kind"] == "values"
    assert whole["pearson"] == pytest.approx(np.corrcoef(items["label"], items["predicted"])[0, 1], abs=1e-6)
    assert items["loss"] == pytest.approx(np.square(np.subtract(items["label"], items["predicted"])), rel=1e-4)


def test_tags(tmp_path, tiny_model):
    parts, items, whole = judged(tmp_path, "token-classification", tiny_model("bert"), tagged(60))
    assert items["kind"] == "tags"
    names = parts.task.labels.names
    wanted = [[names.index(t) for t in e["tags"] if t is not None] for e in parts.splits.test.examples]
    assert items["label"] == wanted
    assert items["units"] == [len(row) for row in wanted]
    assert whole["accuracy"] == np.mean(np.concatenate(items["predicted"]) == np.concatenate(items["label"]))


def test_images(tmp_path):
    model = make_image_model("vit", tmp_path / "model")
    _, items, whole = judged(tmp_path, "image-classification", model, write_folder(tmp_path / "images", 45))
    assert items["kind"] == "classes"
    assert whole["accuracy"] == np.mean(np.equal(items["label"], items["predicted"]))


def test_language(tmp_path, tiny_model):
    _, items, whole = judged(tmp_path, "causal-lm", tiny_model("llama"), pair_rows(60))
    assert items["kind"] == "tokens"
    assert sum(items["units"]) == whole["tokens"]
    assert sum(items["right"]) == pytest.approx(whole["token_accuracy"] * whole["tokens"])
    bits = sum(items["loss"]) / np.log(2) / sum(items["bytes"])
    assert bits == pytest.approx(whole["bits_per_byte"], rel=1e-5)


def test_windows_of_a_text_are_one_item(tmp_path, tiny_model):
    rows = [{"text": sentence(i, 40)} for i in range(20)]
    parts, items, whole = judged(
        tmp_path, "causal-lm", tiny_model("llama"), rows, data={"max_length": 16, "max_dropped": 1.0}
    )
    assert len(parts.data["test"]) > len(items["rows"]) == 6
    assert sum(items["units"]) == whole["tokens"]


def test_targets(tmp_path):
    _, items, whole = judged(tmp_path, "seq2seq", make_seq2seq("t5", tmp_path / "model"), copy_rows(60))
    assert sum(items["units"]) == whole["tokens"]
    assert sum(items["right"]) == pytest.approx(whole["token_accuracy"] * whole["tokens"])
    assert set(items["bytes"]) == {None}


def test_choices(tmp_path, tiny_model):
    rows = [
        {"text": sentence(i, 3), "choices": [sentence(i + k, 2) for k in range(2 + i % 2)], "label": i % 2}
        for i in range(60)
    ]
    parts, items, whole = judged(tmp_path, "text-classification", tiny_model("bert"), rows)
    assert items["label"] == [example["label"] for example in parts.splits.test.examples]
    assert whole["accuracy"] == np.mean(np.equal(items["label"], items["predicted"]))


def test_a_task_that_is_not_judged_by_rows():
    with pytest.raises(ConfigError, match="not judged row by row"):
        item_kind(object())  # type: ignore[arg-type]
