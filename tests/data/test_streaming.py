"""Streamed data is the data: the same rows, tokens, faults, report and training as in memory."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from comparing import changed, outcome
from data.test_encoding import same
from datasets import Dataset, DatasetDict
from tiny import chat_rows, class_rows, config, pair_rows, sentence, write_rows

from peft_engine.building import encode_splits
from peft_engine.config import Config
from peft_engine.data import flatfiles, splitting, spooling, token_store
from peft_engine.data.flatfiles import FlatArray
from peft_engine.data.loading import load_splits
from peft_engine.data.reading import read_rows
from peft_engine.data.rowstream import RowStream
from peft_engine.data.streaming import StreamedSplit
from peft_engine.errors import ConfigError, DataError, EngineError, StorageError
from peft_engine.inspection import inspect_data
from peft_engine.run import train
from peft_engine.tasks import make_task
from peft_engine.using import evaluate

NONE = {"split": {"eval": 0.0, "test": 0.0}}


def tools_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of which some have a system turn, keys that others lack, and text beyond ASCII."""
    rows = chat_rows(count)
    for i in range(0, count, 3):
        rows[i]["messages"].insert(0, {"role": "system", "content": f"naïve 😀 \u2028 {i}"})
        rows[i]["messages"][1] |= {"name": None}
    return rows


def numbers(count: int) -> list[dict[str, Any]]:
    return [row | {"label": i * 0.25} for i, row in enumerate(class_rows(count))]


def several(count: int) -> list[dict[str, Any]]:
    sets: list[list[str]] = [[], ["a"], ["a", "b"], ["c"]]
    return [row | {"label": sets[i % 4]} for i, row in enumerate(class_rows(count))]


def sentence_pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"sentence1": r["text"], "sentence2": sentence(i, 4), "label": r["label"]}
        for i, r in enumerate(class_rows(count))
    ]


def choices(count: int) -> list[dict[str, Any]]:
    return [
        {"question": sentence(i, 5), "choices": [f"a {i}", "b", "c d"][: 2 + i % 2], "answer": i % 2}
        for i in range(count)
    ]


@pytest.fixture(autouse=True)
def _no_minhash(monkeypatch):
    """What is streamed is compared with data in which near duplicates are looked for in the same way."""
    monkeypatch.setattr(splitting, "method_for", lambda *_: ("normalised", None))


KINDS: dict[str, tuple[str, str, Any]] = {
    "texts in windows": ("causal-lm", "llama", lambda n: [{"text": sentence(i, 3 + i * 7 % 40)} for i in range(n)]),
    "pairs": ("causal-lm", "llama", pair_rows),
    "conversations": ("causal-lm", "llama", tools_rows),
    "one class": ("text-classification", "bert", class_rows),
    "classes of numbers": ("text-classification", "bert", lambda n: class_rows(n, (10, 9, 2))),
    "sentence pairs": ("text-classification", "bert", sentence_pairs),
    "choices": ("text-classification", "bert", choices),
    "several classes": ("text-classification", "bert", several),
    "numbers": ("text-classification", "bert", numbers),
}


def settings(kind: str, tiny_model: Any, folder: Path, rows: int = 30, **data: Any) -> tuple[Config, Config]:
    """In memory and streamed; evaluation rows in a file of their own, the first two of them training rows too."""
    task, family, make = KINDS[kind]
    made = make(rows + 6)
    write_rows(folder / "train.jsonl", made[:rows] + made[3:5])
    write_rows(folder / "eval.jsonl", made[:2] + made[rows:])
    given = {**NONE, "eval": str(folder / "eval.jsonl"), "max_length": 24, "max_dropped": 1.0, **data}
    whole = config(task, tiny_model(family), folder / "train.jsonl", folder / "whole", data=given)
    cache = str(folder / "cache")
    return whole, changed(whole, data__streaming=True, data__cache=cache, output=str(folder / "streamed"))


def both(whole: Config, streamed: Config) -> list[Any]:
    """Splits and tokens of each."""
    found = []
    for one in (whole, streamed):
        splits = load_splits(one)
        found.append((splits, encode_splits(make_task(one, splits.labels), splits, one)))
    return found


@pytest.mark.parametrize("piece", [4, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_splits_and_tokens(kind, piece, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "PIECE", piece)
    monkeypatch.setattr(spooling, "PIECE", piece)
    whole, streamed = settings(kind, tiny_model, tmp_path)
    (expected, tokens), (found, streamed_tokens) = both(whole, streamed)
    assert isinstance(found.train, StreamedSplit)
    assert list(found.train.examples) == list(expected.train.examples)
    assert list(found.train.where) == list(expected.train.where)
    assert found.train.examples[:3] == expected.train.examples[:3]
    assert found.train.where[1:3] == expected.train.where[1:3]
    assert found.train.take([2, 0]).examples[:] == expected.train.take([2, 0]).examples
    assert found.digest == expected.digest
    assert found.labels == expected.labels
    assert found.layout == expected.layout
    report = found.report.to_json()
    assert report.pop("notes") == [*expected.report.notes, spooling_note(found)]
    assert report == {k: v for k, v in expected.report.to_json().items() if k != "notes"}
    assert report["leaked"] == {"eval": 2}
    for name in tokens:
        assert same(tokens[name], streamed_tokens[name]), name
    picked = np.arange(0, len(tokens["train"]), 3)
    task = make_task(whole, expected.labels)
    for name, tensor in task.collate(tokens["train"], picked).items():
        assert tensor.equal(task.collate(streamed_tokens["train"], picked)[name]), name


def spooling_note(found: Any) -> str:
    return next(note for note in found.report.notes if note.startswith("Near duplicates, streamed"))


def columnar(rows: list[dict[str, Any]], path: Path) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    elif path.name == "stream":
        path = path.with_suffix(".stream.arrow")
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    else:
        Dataset.from_list(rows).save_to_disk(path, num_shards=3)
    return path


def delimited(rows: list[dict[str, Any]], mark: str, end: str) -> bytes:
    lines = [mark.join(("text", "label")), *(f'"{r["text"]}\n""more"""{mark}{r["label"]}' for r in rows)]
    return ("\ufeff" + end.join(lines)).encode()


FORMATS: dict[str, Any] = {
    "a.csv": lambda rows: delimited(rows, ",", "\n"),
    "returns.csv": lambda rows: delimited(rows, ",", "\r\n"),
    "old.csv": lambda rows: delimited(rows, ",", "\r"),
    "a.tsv.gz": lambda rows: gzip.compress(delimited(rows, "\t", "\n\n") + b"\n"),
    "a.ndjson": lambda rows: "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
    "a.jsonl.gz": lambda rows: gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)),
    "a.txt": lambda rows: "\r\n \n".join(row["text"] for row in rows).encode(),
    "a.parquet": columnar,
    "a.arrow": columnar,
    "stream": columnar,
    "folder": columnar,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_same_rows_at_the_same_places(name, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_engine.data.parsing.BATCH_ROWS", 4)
    path = tmp_path / name
    made = FORMATS[name](
        chat_rows(20) if name == "folder" else class_rows(20), *([path] if FORMATS[name] is columnar else [])
    )
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        path = made
    expected, stream = read_rows(str(path)), RowStream(str(path))
    for _ in range(2):
        found = list(stream)
        assert [row for row, _ in found] == expected.rows
        assert [stream.where(number) for _, number in found] == [expected.where(i) for i in range(20)]


FAULTS: dict[str, tuple[str, bytes]] = {
    "no JSON": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label"}\n{"text": "c", "label": 1}\n'),
    "cut": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "la'),
    "cut, then blank": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "la\n\n'),
    "last but whole": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": b}\n'),
    "a list": ("a.jsonl", b'[{"text": "a", "label": 1}]\n'),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud83d", "label": 1}\n'),
    "not UTF-8": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "caf\xe9", "label": 1}\n'),
    "half a character": ("a.csv", b"text,label\na,1\ncaf\xc3\n"),
    "UTF-16": ("a.csv", "text,label\na,1\n".encode("utf-16")),
    "cells": ("a.csv", b'text,label\n"two\nlines",1\nb,2,3\n'),
    "a quote": ("a.csv", b'text,label\na,1\n"b,2\nc,3\n'),
    "columns twice": ("a.csv", b"text,text\na,1\n"),
    "another delimiter": ("a.csv", b"text;label\na;1\n"),
    "only a header": ("a.csv", b"text,label\n"),
    "blank": ("a.jsonl", b"\n \n"),
    "empty": ("a.jsonl", b""),
    "no gzip": ("a.csv.gz", b"text,label\na,1\n"),
    "half a gzip": ("a.csv.gz", gzip.compress(b"text,label\na,1\n", mtime=0)[:-9]),
    "no Parquet": ("a.parquet", b"PAR1 not PAR1"),
    "no Arrow": ("a.arrow", b"ARROW1 not"),
    "another kind": ("a.docx", b"text"),
    "three bad rows": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n{"text": ""}\n{"label": 2}\n'),
    "no column": ("a.jsonl", b'{"words": "a", "label": 1}\n'),
    "two columns": ("a.jsonl", b'{"sentence": "a", "content": "b", "label": 1}\n'),
    "one label": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": 1}\n'),
    "one number": ("a.jsonl", b'{"text": "a", "label": 1.5}\n{"text": "b", "label": 1.5}\n'),
    "lists and none": ("a.jsonl", b'{"text": "a", "label": ["x"]}\n{"text": "b", "label": "x"}\n'),
    "blanks tell classes apart": ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b", "label": "x "}\n'),
    "a label of no type": ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b", "label": {"x": 1}}\n'),
    "no finite number": ("a.jsonl", b'{"text": "a", "label": 0.5}\n{"text": "b", "label": Infinity}\n'),
    "too little": ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_faults(fault, tmp_path):
    name, content = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    share = {"split": {"eval": 0.4, "test": 0.0}} if fault == "too little" else NONE
    whole = config("text-classification", Path("none"), tmp_path / name, tmp_path / "run", data=share)
    streamed = changed(whole, data__streaming=True, data__cache=str(tmp_path / "cache"))
    errors = []
    for one in (whole, streamed):
        with pytest.raises(EngineError) as caught:
            load_splits(one)
        errors.append(caught.value)
    if fault == "too little":
        assert "No eval split can be made" in str(errors[0])
        assert "No eval split can be made" in str(errors[1])
        return
    told = str(errors[0]).replace(", or set data.clean.malformed: drop", "")  # streaming refuses that
    assert (type(errors[1]), str(errors[1])) == (type(errors[0]), told)
    left = [
        path
        for path in (tmp_path / "cache").rglob("rows")
        if path.is_dir() and not (path / flatfiles.MANIFEST).exists()
    ]
    assert not left, "what was written of a faulty file stands"


def test_what_is_not_there_or_cannot_be_streamed(tmp_path):
    def error(source: str) -> str:
        with pytest.raises(ConfigError) as caught:
            RowStream(source)
        return str(caught.value)

    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    assert "There is no file" in error(str(tmp_path / "b.jsonl"))
    assert "one JSON document" in error(str(tmp_path / "a.json"))
    assert "is a folder" in error(str(tmp_path / "empty"))
    assert "it would be a hub data set" in error("imdb")
    DatasetDict({"a": Dataset.from_list(class_rows(2)), "b": Dataset.from_list(class_rows(2))}).save_to_disk(
        tmp_path / "d"
    )
    assert "holds the splits a, b" in error(str(tmp_path / "d"))
    assert len(read_rows(str(tmp_path / "d" / "a")).rows) == 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}, "data.train is a mixture"),
        ({"subset": "en"}, "is for hub data sets"),
        ({"clean": {"duplicates": "drop"}}, "data.streaming does not do"),
        ({"class_weights": "balanced"}, "counts the classes of all rows"),
        ({"augment": {"text": {"token_dropout": 0.1}}}, "changes rows that are held in memory"),
        ({"near_duplicates": "drop"}, "only reports near duplicates"),
    ],
)
def test_what_needs_all_rows_at_once_is_refused(data, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        config("causal-lm", Path("m"), Path("a.jsonl"), tmp_path, data={"streaming": True, **data})


def test_a_column_that_comes_late_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(spooling, "FIRST_ROWS", 5)
    rows = chat_rows(12)
    rows[9]["tools"] = [{"type": "function", "function": {"name": "f"}}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    whole = config("causal-lm", Path("none"), path, tmp_path / "run", data=NONE)
    streamed = changed(whole, data__streaming=True, data__cache=str(tmp_path / "cache"))
    assert list(load_splits(streamed).train.examples) == list(load_splits(whole).train.examples)
    assert load_splits(streamed).layout.columns["tools"] == "tools"
    rows[10]["prompt"], rows[10]["completion"] = "a", "b"
    write_rows(path, rows)
    for one in (whole, streamed):
        with pytest.raises(DataError, match="could be read as messages or as prompt-completion"):
            load_splits(one)
    rows = [{} for _ in range(8)] + [{"text": "a"}]
    write_rows(path, rows)
    for one in (whole, streamed):
        with pytest.raises(DataError, match=r"line 1: column 'text' is not in this row. \(7 more rows"):
            load_splits(one)


def test_duplicates_leaks_and_contradictions_are_counted_alike(tmp_path):
    draw = random.Random(3)
    words = ["Red", "red!", "red", " red ", "blue", "green", "a b", "A, b", "c"]

    def rows(count: int) -> list[dict[str, Any]]:
        return [
            {"text": draw.choice(words) + draw.choice(["", "1", "2"]), "label": draw.choice(["x", "y", 1, "1"])}
            for _ in range(count)
        ]

    for trial in range(8):
        for name, count in (("train", 40), ("eval", 4), ("test", 4)):
            write_rows(tmp_path / f"{name}.jsonl", rows(count))
        given = {name: str(tmp_path / f"{name}.jsonl") for name in ("eval", "test")}
        whole = config("text-classification", Path("m"), tmp_path / "train.jsonl", tmp_path / "run", data=given)
        streamed = changed(whole, data__streaming=True, data__cache=str(tmp_path / "cache"))
        expected, found = load_splits(whole), load_splits(streamed)
        assert list(found.train.where) == list(expected.train.where)
        one, two = expected.report.to_json(), found.report.to_json()
        assert one["contradictory"]
        assert set(one.pop("notes")) <= set(two.pop("notes"))
        assert [p.split(" = ")[0] for p in one.pop("near_where")] == [p.split(" = ")[0] for p in two.pop("near_where")]
        assert one == two, trial


def made_splits(folder: Path, rows: list[dict[str, Any]], seed: int = 0, **data: Any) -> Any:
    path = write_rows(folder / "rows.jsonl", rows)
    given = {
        "split": {"eval": 0.2, "test": 0.1},
        "streaming": True,
        "cache": str(folder / "cache"),
        "seed": seed,
        **data,
    }
    return load_splits(config("text-classification", Path("m"), path, folder / "run", data=given))


def test_made_splits_divide_the_distinct_inputs(tmp_path):
    rows = class_rows(200) * 2 + [{"text": "alone", "label": "rare"}, {"text": "alone", "label": "yes"}]
    splits = made_splits(tmp_path, rows)
    parts = {name: {row["text"] for row in getattr(splits, name).examples} for name in ("train", "eval", "test")}
    assert {name: len(texts) for name, texts in parts.items()} == {"train": 141, "eval": 40, "test": 20}
    assert splits.report.counts == {"train": 282, "eval": 80, "test": 40}
    assert not parts["train"] & (parts["eval"] | parts["test"])
    assert not parts["eval"] & parts["test"]
    assert splits.labels.names == ["no", "rare", "yes"]
    assert splits.report.made == {"eval": True, "test": True}
    assert any("not in proportion to the classes" in note for note in splits.report.notes)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    again = made_splits(tmp_path, shuffled)
    assert {row["text"] for row in again.eval.examples} == parts["eval"], "the order of the rows decided"
    other = made_splits(tmp_path, rows, seed=1)
    assert {row["text"] for row in other.eval.examples} != parts["eval"]
    assert len({row["text"] for row in other.eval.examples} & parts["eval"]) < 20, "a seed that shifts little"


def test_every_class_stays_in_training_whatever_the_seed(tmp_path):
    rows = class_rows(60, ("a", "b")) + [{"text": f"rare {i}", "label": f"r{i}"} for i in range(6)]
    for seed in range(6):
        splits = made_splits(tmp_path, rows, seed)
        assert len(splits.labels.names) == 8
        for part in (splits.eval, splits.test):
            for example, where in zip(part.examples, part.where, strict=True):
                splits.labels.encode(example["label"], where)


def test_limits_are_seeded_and_keep_the_order(tmp_path):
    rows = class_rows(100)
    limit = {"limit": {"train": 30, "eval": 5, "test": None}}
    splits, again = made_splits(tmp_path, rows, **limit), made_splits(tmp_path, rows, **limit)
    assert splits.report.counts == {"train": 30, "eval": 5, "test": 10}
    lines = [int(where.rsplit(" ", 1)[1]) for where in splits.train.where]
    assert lines == sorted(set(lines))
    assert lines != list(range(1, 31))
    assert list(again.train.where) == list(splits.train.where)
    assert any(note.startswith("data.limit.train = 30") for note in splits.report.notes)
    with pytest.raises(DataError, match="leaves only rows of the class"):
        made_splits(tmp_path, rows, limit={"train": 1})


def test_labels_beyond_those_remembered(monkeypatch):
    """Of many different labels the first ones are kept, and every one that shows something new."""
    monkeypatch.setattr(spooling, "MOST_VALUES", 3)
    values = spooling.LabelValues()
    for row, label in enumerate([1, 2, 2, 3, 4, 5, 0.5, 0.75, "x", "y", "7", ["a"], ["a", "b"], ["b"], '["c"]', True]):
        values.note(row, {"label": label})
    assert values.rows == [0, 1, 3, 6, 8, 10, 11, 12, 14, 15]


def test_training_is_the_same_to_the_bit(tiny_model, tmp_path):
    training = {"steps": 9, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 0.01}
    whole, streamed = (
        changed(one, training=training) for one in settings("pairs", tiny_model, tmp_path, max_length=128)
    )
    in_memory, summary = train(whole), train(streamed)
    assert outcome(streamed.output) == outcome(whole.output)
    assert in_memory["data"]["streaming"] is False
    assert summary["data"]["streaming"] is True
    files = [
        path for path in (tmp_path / "cache" / "streamed").rglob("*") if path.is_file() and ".lock" not in path.name
    ]
    assert summary["data"]["store_bytes"] == sum(path.stat().st_size for path in files)
    assert evaluate(streamed.output, split="eval") == evaluate(whole.output, split="eval")
    assert evaluate(streamed.output, split="train")["metrics"] == evaluate(whole.output, split="train")["metrics"]


def test_without_a_cache_the_store_goes_with_the_run(tiny_model, tmp_path):
    _, streamed = settings("pairs", tiny_model, tmp_path, max_length=128)
    streamed = changed(streamed, data__cache=None, training={"steps": 2})
    left = tmp_path / "streamed" / ".stream-of-a-killed-run"
    left.mkdir(parents=True)
    train(streamed)
    assert not list((tmp_path / "streamed").glob(".stream*"))
    assert not (tmp_path / "cache").exists()


def test_a_store_is_found_again_and_a_damaged_one_made_anew(tiny_model, tmp_path, monkeypatch):
    whole, streamed = settings("one class", tiny_model, tmp_path)
    expected = both(whole, streamed)[0][1]["train"]
    with monkeypatch.context() as patched:
        patched.setattr(spooling, "to_example", None)
        patched.setattr(token_store, "_write", None)
        assert same(both(whole, streamed)[1][1]["train"], expected)
    files = sorted(p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size)
    assert len(files) > 10
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert same(both(whole, streamed)[1][1]["train"], expected), path.name
    rows = (tmp_path / "train.jsonl").read_text().replace("fox", "cow")
    (tmp_path / "train.jsonl").write_text(rows)
    (_, one), (_, two) = both(whole, streamed)
    assert same(one["train"], two["train"])
    assert not same(one["train"], expected)


def test_too_many_rows_that_teach_nothing_are_refused(tiny_model, tmp_path):
    whole, streamed = settings("pairs", tiny_model, tmp_path, max_length=4, max_dropped=0.1)
    errors = []
    for one in (whole, streamed):
        with pytest.raises(DataError) as caught:
            both(one, one)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_the_data_verb(tiny_model, tmp_path):
    for kind in ("pairs", "one class", "several classes", "numbers"):
        whole, streamed = settings(kind, tiny_model, tmp_path / kind)
        one, two = inspect_data(whole, 2)[0], inspect_data(streamed, 2)[0]
        assert one.pop("notes") != two.pop("notes")
        assert one == two


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = write_rows(tmp_path / "rows.jsonl", class_rows(20))
    data = {**NONE, "streaming": True, "cache": str(tmp_path / "cache")}
    streamed = config("text-classification", Path("m"), path, tmp_path / "run", data=data)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(f"peft_engine.data.flatfiles.os.{name}", full)
            with pytest.raises(StorageError, match="No space left on device"):
                load_splits(streamed)
        assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and ".lock" not in p.name]
    load_splits(streamed)


def test_a_flat_array_reads_what_was_written(tmp_path):
    values = np.random.default_rng(0).integers(0, 1000, 5000)
    (tmp_path / "a").write_bytes(values.astype(np.int32).tobytes())
    array = FlatArray(tmp_path / "a", np.dtype(np.int32), np.dtype(np.int64))
    assert len(array) == 5000
    for part in (slice(None), slice(3, 3), slice(4990, 6000), slice(17, 100), slice(-3, None)):
        assert np.array_equal(array[part], values[part])
        assert array[part].dtype == np.int64
    assert array[7] == values[7]
    assert array.sum() == values.sum()
    assert np.array_equal(np.asarray(array), values)
    assert np.array_equal(array[np.array([4, 2])], values[[4, 2]])
