"""A finished run in use: evaluated, predicting, generating, for every kind of label."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import config, sentence, write_rows

from peft_engine.cli import cli
from peft_engine.errors import DataError
from peft_engine.run import train
from peft_engine.using import evaluate, export, generate, predict

LM, CLASSES = "causal-lm", "text-classification"
Tiny = Callable[[str], Path]


def learned(
    task: str, model: Path, rows: list[dict[str, Any]], folder: Path, steps: int, /, **more: Any
) -> dict[str, Any]:
    training = {"steps": steps, "batch_size": 8, "learning_rate": 5e-3, "warmup": 0.1, **more.pop("training", {})}
    settings = config(task, model, write_rows(folder / "rows.jsonl", rows), folder / "out", training=training, **more)
    return train(settings)


def animals(count: int) -> list[dict[str, Any]]:
    """Which animals a text names: its labels; how many: its number."""
    rows = []
    for i in range(count):
        names = [name for bit, name in enumerate(("cats", "dog", "fox")) if i >> bit & 1]
        rows.append({"text": " ".join([*names, *(["wall", "river"][: 1 + i % 2]), str(i)]), "names": names})
    return rows


def test_several_labels_from_end_to_end(tiny_model: Tiny, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "labels": row["names"]} for row in animals(64)]
    summary = learned(CLASSES, tiny_model("bert"), rows, tmp_path, 60, adapter={"dropout": 0.0})
    after = summary["metrics"]["after"]
    assert summary["metrics"]["primary"] == "f1_micro"
    assert after["f1_micro"] > 0.75 > summary["metrics"]["before"]["f1_micro"]
    assert set(after["per_class"]) == {"cats", "dog", "fox"}
    assert evaluate(tmp_path / "out")["metrics"] == after

    source = write_rows(tmp_path / "new.jsonl", [{"text": "cats fox wall 90"}, {"text": "dog river 91"}])
    found = predict(tmp_path / "out", str(source), tmp_path / "found.csv")
    for one in found:
        assert set(one["probabilities"]) == {"cats", "dog", "fox"}
        assert one["predicted"] == [name for name, share in one["probabilities"].items() if share > 0.5]
    with (tmp_path / "found.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["text"] for row in written] == ["cats fox wall 90", "dog river 91"]
    assert [json.loads(row["predicted"]) for row in written] == [one["predicted"] for one in found]
    assert float(written[0]["probability.dog"]) == found[0]["probabilities"]["dog"]


def test_numbers_from_end_to_end(tiny_model: Tiny, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "score": len(row["names"]) - 1.5} for row in animals(64)]
    summary = learned(CLASSES, tiny_model("bert"), rows, tmp_path, 60, adapter={"dropout": 0.0})
    after = summary["metrics"]["after"]
    assert summary["metrics"]["primary"] == "pearson"
    assert after["pearson"] > 0.8
    assert after["mean_squared_error"] < summary["metrics"]["before"]["mean_squared_error"]
    assert evaluate(tmp_path / "out")["metrics"] == after

    source = tmp_path / "new.csv"
    source.write_text("id,text\n7,cats dog fox wall 90\n8,river 91\n", encoding="utf-8")
    found = predict(tmp_path / "out", str(source), tmp_path / "found.jsonl")
    assert found[0]["predicted"] > found[1]["predicted"] + 1
    written = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == found
    assert [row["id"] for row in written] == ["7", "8"]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_one_label_from_end_to_end(family: str, tiny_model: Tiny, tmp_path: Path) -> None:
    rows = [{"text": f"{sentence(i, 1 + i % 5)} {('cats', 'wall')[i % 2]}", "label": i % 2} for i in range(48)]
    summary = learned(CLASSES, tiny_model(family), rows, tmp_path, 50, adapter={"dropout": 0.0})
    assert summary["metrics"]["after"]["accuracy"] == 1.0
    found = predict(tmp_path / "out", str(tmp_path / "rows.jsonl"))
    assert [one["predicted"] for one in found] == [str(i % 2) for i in range(48)]
    assert all(sum(one["probabilities"].values()) == pytest.approx(1) for one in found)
    assert evaluate(tmp_path / "out", data=str(tmp_path / "rows.jsonl"))["metrics"]["accuracy"] == 1.0


ANSWERS = ["wall", "lazy dog", "seven grey cats", "river"]


def test_answers_learned_by_heart_are_generated(tiny_model: Tiny, tmp_path: Path) -> None:
    """Mask, stop token, template, generation and exact match agree with one another, or this could not come out."""
    asked = [f"{sentence(i, 2 + i)}?" for i in range(4)]
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(asked, ANSWERS, strict=True)
    ]
    summary = learned(
        LM,
        tiny_model("llama"),
        rows,
        tmp_path,
        70,
        adapter={"method": "full"},
        data={"split": {"eval": 0.0, "test": 0.0}},
        evaluation={"generate_rows": 4, "max_new_tokens": 24},
        training={"batch_size": 4},
    )
    assert summary["metrics"]["before"]["exact_match"] == 0
    assert summary["metrics"]["after"]["exact_match"] == 1
    assert summary["metrics"]["after"]["generated_rows"] == 4
    assert [generate(tmp_path / "out", question) for question in asked] == ANSWERS
    questions = write_rows(tmp_path / "new.jsonl", [{"messages": row["messages"][:1]} for row in rows])
    assert [one["predicted"] for one in predict(tmp_path / "out", str(questions))] == ANSWERS


def test_predictions_never_replace_a_column(tiny_model: Tiny, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": "cats" in row["names"]} for row in animals(32)]
    learned(CLASSES, tiny_model("bert"), rows, tmp_path, 2)
    for name in ("predicted", "probabilities", "probability.cats"):
        source = write_rows(tmp_path / "own.jsonl", [{"text": "a dog", name: "mine"}])
        with pytest.raises(DataError, match=f"'{name}'.*replace"):
            predict(tmp_path / "out", str(source))


def test_the_card_of_a_mean_pooled_merge_loads_it(tiny_model: Tiny, tmp_path: Path) -> None:
    """The snippet in merged/README.md, run as it stands, gives the class that `predict` gives."""
    rows = [{"text": row["text"], "label": str("cats" in row["names"])} for row in animals(64)]
    learned(CLASSES, tiny_model("bert"), rows, tmp_path, 10, model={"pooling": "mean"})
    folder, _ = export(tmp_path / "out", merged=True)
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    text = rows[5]["text"]
    names: dict[str, Any] = {}
    exec(snippet.replace("THIS_FOLDER", str(folder)).replace("some text", text), names)
    source = write_rows(tmp_path / "one.jsonl", [{"text": text}])
    wanted = predict(tmp_path / "out", str(source))[0]["probabilities"]
    assert names["logits"].softmax(-1)[0].tolist() == pytest.approx(list(wanted.values()), abs=1e-5)


def test_an_evaluation_says_what_it_left_out(tiny_model: Tiny, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": str("cats" in row["names"])} for row in animals(32)]
    data = {"clean": {"malformed": "drop", "empty": "drop"}, "near_duplicates": "off"}
    learned(CLASSES, tiny_model("bert"), rows, tmp_path, 2, data=data)
    source = write_rows(
        tmp_path / "own.jsonl", [*rows[:9], {"text": 5, "label": "True"}, *[{"text": "", "label": "True"}] * 4]
    )
    asked = ["evaluate", str(tmp_path / "out"), "--data", str(source)]
    printed = CliRunner().invoke(cli, asked)
    assert printed.exit_code == 0
    lines = printed.stdout.splitlines()
    assert lines[0] == "5 of 14 rows were left out: 1 malformed, 4 empty."
    assert "own.jsonl, line 10: malformed: column 'text' is 5" in lines[1]
    assert "own.jsonl, line 11: empty: column 'text' is empty" in lines[2]
    assert "left out" not in lines[3]
    found = json.loads(CliRunner().invoke(cli, [*asked, "--json"]).stdout)
    assert (found["rows"], found["dropped"], found["dropped_kinds"]) == (9, 5, {"malformed": 1, "empty": 4})
    assert [Path(row["where"]).name for row in found["dropped_first"]] == [f"own.jsonl, line {n}" for n in (10, 11)]
    assert "left out" not in CliRunner().invoke(cli, asked[:2]).stdout
