"""Pairs of texts for text classification: columns, types, truncation, and a run from end to end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_checks import pieces_agree
from tiny import WORDS, assemble, config, make_model, sentence, write_rows

from peft_engine.config import Config
from peft_engine.data.duplicates import input_key
from peft_engine.data.examples import to_examples
from peft_engine.data.formats import find_layout
from peft_engine.data.reading import Rows
from peft_engine.errors import ConfigError, DataError
from peft_engine.exporting import read_labels
from peft_engine.run import train
from peft_engine.using import evaluate, export, predict

Tiny = Callable[[str], Path]
TASK = "text-classification"


def pair_rows(count: int, one: str = "premise", two: str = "hypothesis") -> list[dict[str, Any]]:
    """The label tells whether the second text's only word stands in the first; lengths are uneven."""
    rows = []
    for i in range(count):
        first = WORDS[i % 6 : i % 6 + 3 + i % 4]
        inside = i // 6 % 2 == 0
        second = first[i % 3] if inside else WORDS[15 + i % 5]
        rows.append({one: f"{' '.join(first)} {i % 10} {i // 10}", two: second, "label": "yes" if inside else "no"})
    return rows


def settings_of(model: Path, folder: Path, /, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Config:
    source = write_rows(folder / "rows.jsonl", pair_rows(60) if rows is None else rows)
    training = {"steps": 10, "batch_size": 7, "learning_rate": 5e-3, **sections.pop("training", {})}
    adapter = {"rank": 4, "dropout": 0.0, **sections.pop("adapter", {})}
    return config(TASK, model, source, folder / "out", training=training, adapter=adapter, **sections)


def layout_of(columns: dict[str, str], *names: str) -> dict[str, str]:
    rows = Rows("data.jsonl", [dict.fromkeys(names, "x")], [1])
    return find_layout(rows, TASK, columns).columns


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("text", "text_pair"),
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("Question", "sentence"),
        ("question1", "question2"),
        ("claim", "evidence"),
    ],
)
def test_pairs_are_found_by_convention(one: str, two: str) -> None:
    assert layout_of({}, "idx", one, two, "label") == {"text": one, "text_pair": two, "label": "label"}


def test_columns_are_named_where_conventions_do_not_help() -> None:
    assert layout_of({"text": "a", "text_pair": "b"}, "a", "b", "label") == {
        "text": "a", "text_pair": "b", "label": "label",
    }  # fmt: skip
    assert layout_of({"text": "premise"}, "premise", "hypothesis", "label") == {"text": "premise", "label": "label"}
    with pytest.raises(DataError, match="could be read as the pair 'premise' and 'hypothesis' or as the text 'text'"):
        layout_of({}, "premise", "hypothesis", "text", "label")
    with pytest.raises(DataError, match="could be read as"):
        layout_of({}, "premise", "hypothesis", "claim", "evidence", "label")
    with pytest.raises(ConfigError, match="both text_pair and choices"):
        layout_of({"text_pair": "a", "choices": "b"}, "a", "b", "label")


def test_a_pair_is_a_duplicate_only_as_a_whole() -> None:
    rows = Rows(
        "data.jsonl", [{"text": "a ", "text_pair": "b", "label": 0}, {"text": "a", "text_pair": "c", "label": 1}]
    )
    one, two = to_examples(rows, find_layout(rows, TASK, {}))
    assert input_key(one) != input_key(two)
    assert input_key(one) == input_key({**one, "text": "a", "label": 1})
    assert input_key({"text": "a b", "text_pair": "c"}) != input_key({"text": "a", "text_pair": "b c"})


def test_types_and_truncation_are_the_tokenizers_own(tiny_model: Tiny, tmp_path: Path) -> None:
    rows = [*pair_rows(58), {"premise": sentence(1, 12), "hypothesis": "fox dog", "label": "no"}]
    run = assemble(settings_of(tiny_model("bert"), tmp_path, rows, data={"max_length": 9, "split": {"test": 0.0}}))
    data, tokenizer = run.data["train"], run.task.processor
    for i in range(len(data)):
        example = run.splits.train.examples[int(data.rows[i])]
        expected = tokenizer(example["text"], example["text_pair"], truncation="longest_first", max_length=9)
        assert data.tokens(i).tolist() == expected["input_ids"]
        assert data.token_column("token_type_ids", i).tolist() == expected["token_type_ids"]
        assert 1 in expected["token_type_ids"]
    assert data.truncated > 0


def test_the_second_text_is_learned_from_end_to_end(tmp_path: Path) -> None:
    """Whether it names the same animal as the first can't be told from either text alone."""
    model = make_model("bert", tmp_path / "bert")
    rows = [
        {"sentence1": f"the {a} {i}", "sentence2": f"the {b}", "label": "dog" if b == "dog" else "fox"}
        for i in range(12)
        for a, b in (("dog", "fox"), ("fox", "dog"), ("dog", "dog"), ("fox", "fox"))
    ]
    training = {"steps": 40, "batch_size": 12, "learning_rate": 1e-2}
    summary = train(settings_of(model, tmp_path, rows, training=training))
    after = summary["metrics"]["after"]
    assert after["accuracy"] == 1.0
    assert evaluate(tmp_path / "out")["metrics"] == after
    labels = read_labels(tmp_path / "out" / "adapter")
    assert labels is not None
    assert labels.pair
    source = write_rows(tmp_path / "new.jsonl", [{"sentence1": "the dog", "sentence2": "the fox"}])
    assert predict(tmp_path / "out", str(source))[0]["predicted"] == "fox"
    alone = write_rows(tmp_path / "alone.jsonl", [{"text": "the dog"}])
    with pytest.raises(DataError, match="this run learned pairs, the row has one text"):
        predict(tmp_path / "out", str(alone))
    _, drift = export(tmp_path / "out")
    assert drift.top1_agreement == 1.0
    _, drift = export(tmp_path / "out", merged=True)
    assert drift.top1_agreement == 1.0


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_pieces_of_a_batch_give_one_gradient(pooling: str, tiny_model: Tiny, tmp_path: Path) -> None:
    pieces_agree(settings_of(tiny_model("bert"), tmp_path, model={"pooling": pooling}, adapter={"dropout": 0.2}))


def test_evaluation_data_of_another_layout_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    single = write_rows(tmp_path / "single.jsonl", [{"text": f"a {i}", "label": "yes"} for i in range(4)])
    with pytest.raises(DataError, match=r"holds pair-label, data.eval .* text-label"):
        assemble(settings_of(tiny_model("bert"), tmp_path, data={"eval": str(single)}))


def test_no_room_is_told(tiny_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_length = 2 has no room"):
        assemble(settings_of(tiny_model("bert"), tmp_path, data={"max_length": 2}))
