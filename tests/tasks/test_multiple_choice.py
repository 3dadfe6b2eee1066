"""Choices: their labels, loss against plain transformers, rows of differing numbers, and a run from end to end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import changed
from task_checks import pieces_agree, resumes_bitwise
from tiny import WORDS, assemble, config, write_rows
from transformers import AutoModelForMultipleChoice

from peft_engine.config import Config
from peft_engine.data.examples import to_examples
from peft_engine.data.formats import find_layout
from peft_engine.data.reading import Rows
from peft_engine.data.splitting import load_splits
from peft_engine.errors import ConfigError, DataError
from peft_engine.run import train
from peft_engine.tasks import make_task
from peft_engine.tasks.multiple_choice import MultipleChoice
from peft_engine.using import evaluate, export, open_run, predict

Tiny = Callable[[str], Path]
TASK = "text-classification"
ABC = ["one fox", "two dogs", "three"]


def choice_rows(count: int, most: int = 4) -> list[dict[str, Any]]:
    """2 to `most` choices of uneven length, of which the one with "fox" is right."""
    rows = []
    for i in range(count):
        number = 2 + i % (most - 1)
        choices = [" ".join([WORDS[5 + (i + k) % 9], *WORDS[15 : 15 + (i + k) % 3]]) for k in range(number)]
        right = i * 3 % number
        choices[right] = f"fox {choices[right]}"
        rows.append({"question": f"who {i % 10} {i // 10}", "choices": choices, "label": right})
    return rows


def settings_of(model: Path, folder: Path, /, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Config:
    source = write_rows(folder / "rows.jsonl", choice_rows(40) if rows is None else rows)
    training = {"steps": 10, "batch_size": 7, "learning_rate": 5e-3, **sections.pop("training", {})}
    adapter = {"rank": 4, "dropout": 0.0, **sections.pop("adapter", {})}
    return config(TASK, model, source, folder / "out", training=training, adapter=adapter, **sections)


def examples_of(row: dict[str, Any], **columns: str) -> list[dict[str, Any]]:
    rows = Rows("data.jsonl", [row], [1])
    return to_examples(rows, find_layout(rows, TASK, columns))


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"question": "q", "choices": ABC, "label": 1}, 1),
        ({"question": "q", "choices": ABC, "label": 2.0}, 2),
        ({"question": "q", "choices": ABC, "answer": "b"}, 1),
        ({"question": "q", "choices": ABC, "answer": "three"}, 2),
        ({"context": "q", "endings": ABC, "label": "0"}, 0),
        ({"question": "q", "choices": '["one fox", "two dogs", "three"]', "label": "1"}, 1),
        ({"question": "q", "choices": {"text": ABC, "label": ["A", "B", "C"]}, "answerKey": "C"}, 2),
        ({"question": "q", "choices": {"text": ABC, "label": ["1", "2", "3"]}, "answerKey": "1"}, 0),
        ({"question": "q", "choices": {"text": ABC, "label": ["1", "2", "3"]}, "answerKey": 3}, 2),
        ({"question": "q", "choices": {"text": ABC, "label": ["1", "2", "3"]}, "answerKey": 1.0}, 0),
        ({"question": "q", "choices": {"text": ABC, "label": ["A", "B", "C"]}, "answerKey": 1}, 1),
        ({"question": "q", "choices": str(ABC), "answer": 1}, 1),
        ({"question": "q", "choices": str({"text": ABC, "label": ["A", "B", "C"]}), "answerKey": "C"}, 2),
        ({"question": "q", "choices": ["7", "1"], "label": "7"}, 0),  # a choice's text, and no place
    ],
)
def test_the_right_choice_in_all_its_forms(row: dict[str, Any], right: int) -> None:
    choices = ["7", "1"] if row.get("label") == "7" else ABC
    assert examples_of(row) == [{"text": "q", "choices": choices, "label": right}]


@pytest.mark.parametrize(
    ("label", "choices", "message"),
    [
        (3, ABC, "with 3 choices it is 0 to 2, A to C"),
        (-1, ABC, "it is 0 to 2"),
        ("d", ABC, "it is 0 to 2"),
        ("zebra", ABC, "a choice's own text"),
        (True, ABC, "it is 0 to 2"),
        ("1", ["7", "8", "1"], "may be choice 1 or 2"),
        (2, ["1", "2", "3"], "may be choice 1 or 2"),
        (0, ["a"], "holds 1 choices"),
        (0, ["a", " "], "holds an empty choice"),
        (0, [], "holds no choices"),
    ],
)
def test_labels_that_name_no_choice(label: Any, choices: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples_of({"question": "q", "choices": choices, "label": label})


@pytest.mark.parametrize("label", [0, 4, "0"])
def test_a_number_that_is_none_of_the_rows_own_numbers_is_refused(label: Any) -> None:
    with pytest.raises(DataError, match=r"one of the row's own keys \(1, 2, 3\)"):
        examples_of({"question": "q", "choices": {"text": ABC, "label": ["1", "2", "3"]}, "answerKey": label})


@pytest.mark.parametrize("cell", ["['one fox' 'two dogs' 'three']", "{'text': array(['a', 'b'], dtype=object)}"])
def test_choices_printed_by_numpy_are_refused(cell: str) -> None:
    with pytest.raises(DataError, match="a list that was printed: write it as JSON"):
        examples_of({"question": "q", "choices": cell, "answer": 0})


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_row_with_choices_tells_the_layout(streaming: bool, tmp_path: Path) -> None:
    rows = choice_rows(12)
    rows[0]["choices"] = None
    data = {"split": {"eval": 0.0, "test": 0.0}, "near_duplicates": "off"}
    settings = settings_of(tmp_path, tmp_path, rows, data=data)
    if streaming:
        settings = changed(settings, data__streaming=True, data__cache=str(tmp_path / "cache"))
        with pytest.raises(DataError, match="line 1: column 'choices' is None, that is empty"):
            load_splits(settings)
        return
    splits = load_splits(changed(settings, data__clean={"empty": "drop"}))
    assert splits.layout.kind == "choices-label"
    assert splits.report.removed == {"train": {"empty": 1}}


def test_a_named_column_must_hold_choices() -> None:
    with pytest.raises(DataError, match="a list of strings was expected"):
        examples_of({"text": "q", "options": "a or b", "label": 0}, choices="options")
    assert examples_of({"text": "q", "choices": "of many", "label": "x"}) == [{"text": "q", "label": "x"}]


@pytest.mark.parametrize("number", [2, 5])
def test_loss_is_that_of_plain_transformers(number: int, tiny_model: Tiny, tmp_path: Path) -> None:
    """Rows with as many choices each, in fp64, in transformers' own (rows, choices, length) form."""
    rows = [{**row, "choices": (row["choices"] * 5)[:number], "label": row["label"] % 2} for row in choice_rows(30)]
    settings = changed(settings_of(tiny_model("bert"), tmp_path, rows), kernels="off", adapter={"method": "full"})
    run = assemble(settings)
    run.group.model.double().eval()
    plain = AutoModelForMultipleChoice.from_pretrained(tiny_model("bert"), dtype=torch.float64).eval()
    plain.load_state_dict(run.group.model.state_dict())
    picked = np.arange(6)
    batch = run.task.collate(run.data["train"], picked)
    shaped = {name: batch[name].view(6, number, -1) for name in ("input_ids", "attention_mask", "token_type_ids")}
    output = plain(**shaped, labels=batch["label"])
    logits = run.task.forward(run.group.model, batch)
    torch.testing.assert_close(logits, output.logits, rtol=1e-9, atol=1e-11)
    assert float(run.task.loss(logits.detach(), batch)) / 6 == pytest.approx(float(output.loss.detach()), rel=1e-6)
    logits.log_softmax(-1).gather(1, batch["label"][:, None]).mean().neg().backward()
    output.loss.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in run.group.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-8, atol=1e-11)


def test_rows_of_differing_numbers_are_as_each_alone(tiny_model: Tiny, tmp_path: Path) -> None:
    run = assemble(settings_of(tiny_model("bert"), tmp_path))
    data = run.data["train"]
    with run.group.evaluating(run.group.members[0]) as model, torch.no_grad():
        whole = run.task.forward(model, run.task.collate(data, np.arange(6)))
        for i in range(6):
            alone = run.task.forward(model, run.task.collate(data, np.array([i])))
            torch.testing.assert_close(whole[i, : alone.shape[1]], alone[0], rtol=1e-5, atol=1e-6)
            assert torch.isneginf(whole[i, alone.shape[1] :]).all()
    assert {int(torch.isfinite(row).sum()) for row in whole} == {2, 3, 4}


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_pieces_of_a_batch_give_one_gradient(pooling: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """With dropout: every reading has masks of its own, whatever stands beside it in the batch."""
    pieces_agree(settings_of(tiny_model("bert"), tmp_path, model={"pooling": pooling}, adapter={"dropout": 0.2}))


def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"steps": 9, "save_every": 3, "micro_batch_size": 3}
    settings = settings_of(tiny_model("bert"), tmp_path, training=training, adapter={"dropout": 0.2})
    resumes_bitwise(settings, 5, monkeypatch)


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_run_from_end_to_end(pooling: str, tiny_model: Tiny, tmp_path: Path) -> None:
    training = {"steps": 40, "batch_size": 12, "learning_rate": 1e-2}
    settings = settings_of(tiny_model("bert"), tmp_path, choice_rows(60), model={"pooling": pooling}, training=training)
    assert isinstance(make_task(settings, load_splits(settings).labels), MultipleChoice)
    summary = train(settings)
    after = summary["metrics"]["after"]
    assert after["accuracy"] == 1.0
    assert 0.25 < after["chance"] < 0.5
    assert evaluate(tmp_path / "out")["metrics"] == after
    assert isinstance(open_run(tmp_path / "out").task, MultipleChoice)
    source = write_rows(
        tmp_path / "new.jsonl",
        [
            {"question": "who", "choices": ["old", "fox near", "the", "an"]},
            {"question": "who", "choices": ["fox", "a"]},
        ],
    )
    found = predict(tmp_path / "out", str(source), tmp_path / "found.csv")
    assert [one["predicted"] for one in found] == [1, 0]
    assert [list(one["probabilities"]) for one in found] == [["0", "1", "2", "3"], ["0", "1"]]
    assert all(sum(one["probabilities"].values()) == pytest.approx(1) for one in found)
    alone = write_rows(tmp_path / "alone.jsonl", [{"text": "who"}])
    with pytest.raises(DataError, match="this run learned to choose"):
        predict(tmp_path / "out", str(alone))
    _, drift = export(tmp_path / "out")
    assert drift.relative < 1e-4
    folder, drift = export(tmp_path / "out", merged=True)
    assert drift.relative < 1e-4
    expected = "AutoModelForMultipleChoice" if pooling == "model" else "AutoModel"
    assert f"{expected}.from_pretrained" in (folder / "README.md").read_text()
    assert f"{expected}.from_pretrained" in (tmp_path / "out" / "adapter" / "README.md").read_text()


def test_settings_of_classes_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    for data in ({"labels": ["a", "b"]}, {"label_type": "single"}):
        with pytest.raises(ConfigError, match="has no use with choices"):
            load_splits(settings_of(tiny_model("bert"), tmp_path, data=data))
