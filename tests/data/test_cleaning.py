"""Cleaning: refused as ever by default, dropped where asked, and every dropped row told."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny import class_rows, config, pair_rows, write_rows

from peft_engine.config import Config
from peft_engine.data.cleaning import without_contradictory, without_repeated
from peft_engine.data.duplicates import contradictory, repeated
from peft_engine.data.inspecting import _warnings, inspect_splits
from peft_engine.data.reading import read_rows
from peft_engine.data.splitting import load_one, load_splits
from peft_engine.data.spooling import hashes_of
from peft_engine.errors import DataError
from peft_engine.inspection import inspect_data
from peft_engine.run import train

NOTHING_HELD = {"split": {"eval": 0.0, "test": 0.0}}
DROP = {"malformed": "drop", "empty": "drop"}


@pytest.fixture
def of(tmp_path):
    """Writes text to a file, and makes the config that trains on it."""

    def make(text, name="rows.jsonl", task="text-classification", **data):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        given = {"train": str(path), "cache": None, **NOTHING_HELD, **data}
        return Config.model_validate({"task": task, "model": {"path": "m"}, "output": "o", "data": given})

    return make


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def told(splits):
    return [(row.where.rsplit("/", 1)[-1], row.kind) for row in splits.dropped]


FAULTY = [
    ('{"text": "x", "label": }', "malformed", "not valid JSON"),
    ('["text", "x"]', "malformed", "not a JSON object"),
    ('{"text": "\\ud83d", "label": "a"}', "malformed", "surrogate"),
    ('{"label": "a"}', "malformed", "is not in this row"),
    ('{"text": 7, "label": "a"}', "malformed", "a string was expected"),
    ('{"text": "x"}', "malformed", "is not in this row"),
    ('{"text": null, "label": "a"}', "empty", "None"),
    ('{"text": "  ", "label": "a"}', "empty", "blank"),
    ('{"text": "", "label": "a"}', "empty", "is empty"),
    ('{"text": "x", "label": ""}', "empty", "missing"),
    ('{"text": "x", "label": null}', "empty", "missing"),
]
TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
CHOICES = {"question": "q", "choices": ["a", "b"], "label": 0}
TAGGED = {"tokens": ["a", "b"], "tags": ["X", "O"]}
EMPTY = [
    ("token-classification", TAGGED, {"tokens": [], "tags": []}),
    ("token-classification", TAGGED, {"tokens": None}),
    ("token-classification", TAGGED, {"tokens": "  "}),
    ("token-classification", TAGGED, {"tags": []}),
    ("token-classification", TAGGED, {"tags": None}),
    ("text-classification", CHOICES, {"choices": ["a", " "]}),
    ("text-classification", CHOICES, {"choices": []}),
    ("text-classification", CHOICES, {"choices": None}),
    ("causal-lm", TALK, {"messages": None}),
    ("causal-lm", TALK, {"messages": ""}),
    ("kto", {"prompt": "p", "completion": "c", "label": True}, {"label": None}),
]


@pytest.mark.parametrize(("line", "kind", "reason"), FAULTY)
def test_faulty_rows_are_refused_by_default_and_dropped_where_asked(of, line, kind, reason):
    good = [json.dumps(row) for row in class_rows(10)]
    text = "\n".join([*good[:4], line, *good[4:]]) + "\n"
    for clean in ({}, {k: v for k, v in DROP.items() if k != kind}):
        with pytest.raises(DataError, match=reason) as refused:
            load_splits(of(text, clean=clean))
        assert "line 5" in str(refused.value)
    splits = load_splits(of(text, clean={kind: "drop"}))
    assert told(splits) == [("rows.jsonl, line 5", kind)]
    assert reason in splits.dropped[0].reason
    assert splits.report.removed == {"train": {kind: 1}}
    assert [row["text"] for row in splits.train.examples] == [json.loads(row)["text"] for row in good]
    assert [where.rsplit(" ", 1)[1] for where in splits.train.where] == [str(n) for n in range(1, 12) if n != 5]


@pytest.mark.parametrize(("task", "row", "change"), EMPTY)
def test_parts_that_hold_nothing_are_empty(of, task, row, change):
    rows = [row, row | change, row]
    splits = load_splits(of(lines(rows), task=task, clean={"empty": "drop"}, near_duplicates="off"))
    assert told(splits) == [("rows.jsonl, line 2", "empty")]
    del rows[1][next(iter(change))]
    with pytest.raises(DataError, match=r"line 2: .*clean\.malformed"):
        load_splits(of(lines(rows), task=task, clean={"empty": "drop"}))


def test_broken_lines_of_csv(of):
    text = 'text,label\ngood one,a\ngood,b,too many\n"open quote,a\ngood two,b\n'
    text += '"bad" quote,a\ngood three,a\nfew\n"two\nlines",b\n'
    with pytest.raises(DataError, match=r"line 3: 3 cells"):
        load_splits(of(text, "rows.csv"))
    splits = load_splits(of(text, "rows.csv", clean=DROP))
    assert [row["text"] for row in splits.train.examples] == ["good one", "good two", "good three", "two\nlines"]
    assert [where.rsplit(" ", 1)[1] for where in splits.train.where] == ["2", "5", "7", "9"]
    assert told(splits) == [(f"rows.csv, line {n}", "malformed") for n in (3, 4, 6, 8)]


def test_rows_of_a_json_list_keep_their_numbers(of):
    splits = load_splits(of(json.dumps([{"text": "x", "label": "a"}, 3, {"text": "y", "label": "b"}]), "rows.json",
                            clean=DROP))  # fmt: skip
    assert [where.rsplit(", ", 1)[1] for where in splits.train.where] == ["row 1", "row 3"]
    assert told(splits) == [("rows.json, row 2", "malformed")]


def test_a_file_that_is_faulty_as_a_whole_is_refused(of, tmp_path):
    mostly = lines(class_rows(3)) + "{\n" * 4
    with pytest.raises(DataError, match=r"4 of 7 rows are malformed or empty, more than half"):
        load_splits(of(mostly, clean=DROP))
    with pytest.raises(DataError, match=r"No row of .* can be read"):
        load_splits(of("{\n{\n", clean=DROP))
    with pytest.raises(DataError, match=r"not valid JSON"):
        load_splits(of("[{]", "rows.json", clean=DROP))
    (tmp_path / "latin.jsonl").write_bytes(lines(class_rows(3)).encode() + b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"not UTF-8"):
        load_splits(of("x", "unused.jsonl", train=str(tmp_path / "latin.jsonl"), clean=DROP))


def test_given_splits_are_cleaned_of_faulty_rows_too(of, tmp_path):
    held = write_rows(tmp_path / "test.jsonl", [*class_rows(40)[30:], {"text": "", "label": "no"}])
    splits = load_splits(of(lines(class_rows(20)), test=str(held), clean=DROP))
    assert splits.report.removed == {"test": {"empty": 1}}
    assert len(splits.test.examples) == 10


def test_rows_to_predict_are_never_dropped(of, tmp_path):
    asked = of(lines(class_rows(4)), clean=DROP)
    path = tmp_path / "new.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(DataError, match="line 2"):
        load_one(str(path), asked, need_label=False, default_split="test")
    judged, _ = load_one(str(tmp_path / "rows.jsonl"), asked, need_label=True, default_split="test")
    assert judged.dropped == []


def row(text, label):
    return {"text": text, "label": label}


CONTRARY = [row("p", "a"), row("p", "a"), row("p ", "b"), row("q", "a"), row("q", "b"), row("r", "b"), row("r", "b"),
            row("s", "a"), row("t", 1), row("t", 1.0), row("t", "1")]  # fmt: skip


def test_contradictory_rows():
    where = [f"f, line {i + 1}" for i in range(len(CONTRARY))]
    assert without_contradictory(CONTRARY, where, "keep") == (list(range(11)), [])
    kept, gone = without_contradictory(CONTRARY, where, "drop")
    assert kept == [5, 6, 7, 8, 9, 10]
    assert [row.where for row in gone] == where[:5]
    kept, gone = without_contradictory(CONTRARY, where, "majority")
    assert kept == [0, 1, 5, 6, 7, 8, 9, 10]
    assert [row.where for row in gone] == where[2:5]
    assert "no majority" in gone[1].reason
    assert "no majority" not in gone[0].reason
    pairs = [
        {"prompt": "p", "completion": "x"},
        {"prompt": "p", "completion": " x"},
        {"prompt": "p", "completion": "y"},
    ]
    assert without_contradictory(pairs, where, "majority")[0] == [0, 1]
    multi = [row("p", ["a", "b"]), row("p", ["b", "a"]), row("p", [])]
    assert without_contradictory(multi, where, "majority")[0] == [0, 1]


def test_repeated_rows():
    where = [f"f, line {i + 1}" for i in range(len(CONTRARY))]
    kept, gone = without_repeated(CONTRARY[:8], where, "eval")
    assert kept == [0, 2, 3, 4, 5, 7]
    assert [(row.split, row.where, row.reason) for row in gone] == [
        ("eval", "f, line 2", "repeats f, line 1"),
        ("eval", "f, line 7", "repeats f, line 6"),
    ]


@pytest.mark.parametrize(
    ("one", "two", "alike"),
    [
        (row("t", 1), row("t", "1"), True),
        (row("t", 1.0), row("t ", 1), True),
        (row("t", ["a", "b"]), row("t", ["b", "a"]), True),
        (row("t", '["a", "b"]'), row("t", ["b", "a"]), True),
        (row("t", ["a", "b"]), row("t", ["b"]), False),
        (row("t", "1"), row("t", "2"), False),
        ({"tokens": ["a"], "tags": [1]}, {"tokens": ["a"], "tags": ["1"]}, True),
        ({"tokens": ["a"], "tags": [None]}, {"tokens": ["a"], "tags": ["None"]}, False),
        ({"source": "s", "target": "t"}, {"source": "s", "target": " t"}, True),
        ({"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": "b"}, False),
    ],
)
def test_counts_and_what_is_dropped_agree_on_what_is_one_answer(one, two, alike):
    rows, where = [one, two], ["1", "2"]
    assert repeated(rows) == len(without_repeated(rows, where, "train")[1]) == (1 if alike else 0)
    assert contradictory(rows) == (0 if alike else 1)
    assert len(without_contradictory(rows, where, "drop")[1]) == (0 if alike else 2)
    hashes = [hashes_of(row) for row in rows]
    assert hashes[0][0] == hashes[1][0]
    assert (hashes[0][1] == hashes[1][1]) == alike


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"text": "a\nb", "text_pair": "c"}, {"text": "a", "text_pair": "b\nc"}),
        ({"text": "a\x1f\x1eb", "text_pair": "c"}, {"text": "a", "text_pair": "b\x1f\x1ec"}),
        ({"tokens": ["a\x1f", "\x1ec"]}, {"tokens": ["a", "\x1f\x1ec"]}),
        ({"tokens": ["a", "b c"]}, {"tokens": ["a b", "c"]}),
        ({"text": "q", "choices": ["a\nb", "c"]}, {"text": "q", "choices": ["a", "b\nc"]}),
    ],
)
def test_different_rows_are_no_duplicates(one, two):
    assert without_repeated([one, two], ["1", "2"], "train")[1] == []
    assert hashes_of(one)[:2] != hashes_of(two)[:2]


@pytest.mark.parametrize(
    ("task", "parts"), [("causal-lm", ("prompt", "completion")), ("seq2seq", ("source", "target"))]
)
def test_prompts_with_several_answers_are_a_note(of, tmp_path, task, parts):
    rows = [dict(zip(parts, (f"q {i // 2}", f"a {i % 3}"), strict=True)) for i in range(30)]
    kept = load_splits(of(lines([*rows, *rows]), task=task))
    assert kept.report.contradictory == 15
    assert kept.report.notes[0] == "15 prompts have several answers."
    streamed = load_splits(of(lines([*rows, *rows]), task=task, streaming=True, cache=str(tmp_path / "cache")))
    assert (streamed.report.contradictory, streamed.report.notes[0]) == (15, kept.report.notes[0])
    told = "\n".join(_warnings(inspect_splits(kept, {})))
    assert "Note: 15 prompts have several answers." in told
    assert "Contradictory" not in told
    rows.append(dict(zip(parts, ("alone", "b"), strict=True)))
    gone = load_splits(of(lines(rows), task=task, clean={"contradictory": "drop"}))
    assert gone.report.removed == {"train": {"contradictory": 30}}
    assert gone.report.notes[0] == "15 prompts have several answers before data.clean.contradictory."


def test_contradictory_rows_of_training_alone_and_before_repetitions(of, tmp_path):
    rows = [*class_rows(20), row("two of three", "no"), row("two of three", "no"), row("two of three", "yes")]
    held = write_rows(tmp_path / "eval.jsonl", [row("here", "no"), row("here", "yes"), row("here", "yes")])
    clean = {"contradictory": "majority", "duplicates": "drop"}
    splits = load_splits(of(lines(rows), eval=str(held), clean=clean))
    assert Counter(row["text"] for row in splits.train.examples)["two of three"] == 1
    assert splits.report.counts == {"train": 21, "eval": 2}
    assert splits.report.removed == {"train": {"contradictory": 1, "duplicate": 1}, "eval": {"duplicate": 1}}
    assert splits.report.contradictory == 2, "told as they stood"
    kept = load_splits(of(lines(rows), eval=str(held)))
    assert kept.report.counts == {"train": 23, "eval": 3}
    assert kept.dropped == []


def test_nothing_left_is_refused(of):
    rows = [row(f"t{i}", label) for i in range(5) for label in ("a", "b")]
    with pytest.raises(DataError, match=r"data\.clean\.contradictory leaves no row of train"):
        load_splits(of(lines(rows), clean={"contradictory": "drop"}))


def test_made_splits_are_the_same_with_and_without_repetitions(of):
    rows = class_rows(60)
    text, split = lines(rows + rows[:30]), {"eval": 0.2, "test": 0.2}
    whole, once = load_splits(of(text, split=split)), load_splits(of(text, split=split, clean={"duplicates": "drop"}))
    for name in ("train", "eval", "test"):
        have, had = ({row["text"] for row in getattr(s, name).examples} for s in (once, whole))
        assert have == had
        assert len(getattr(once, name).examples) == len(have)
    assert sum(kinds["duplicate"] for kinds in once.report.removed.values()) == 30


def test_every_row_that_is_not_used_stands_in_dropped_jsonl(tiny_model, tmp_path):
    rows = [
        *pair_rows(12),
        {"prompt": "p", "completion": ""},
        pair_rows(1)[0],
        {"prompt": "x " * 90, "completion": "y"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    held = write_rows(tmp_path / "test.jsonl", [pair_rows(3)[2], {"prompt": "other", "completion": "answer"}])
    data = {"clean": {"empty": "drop", "duplicates": "drop"}, "test": str(held), "split": {"eval": 0.0},
            "max_length": 64, "max_dropped": 0.5, "near_duplicates": "off"}  # fmt: skip
    of = config("causal-lm", tiny_model("llama"), path, tmp_path / "run", data=data, training={"steps": 1})
    summary = train(of)
    found = [json.loads(line) for line in (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()]
    assert [(Path(row["where"]).name, row["kind"], row["split"]) for row in found] == [
        ("rows.jsonl, line 13", "empty", "train"),
        ("rows.jsonl, line 3", "leaked", "train"),
        ("rows.jsonl, line 14", "duplicate", "train"),
        ("rows.jsonl, line 15", "teaches nothing", "train"),
    ]
    assert all(row["reason"] for row in found)
    assert summary["data"]["removed"] == {"train": {"empty": 1, "leaked": 1, "duplicate": 1}}
    assert summary["data"]["dropped"]["train"] == 1
    report, _ = inspect_data(of, 0)
    assert report["removed"] == summary["data"]["removed"]
    assert [row["kind"] for row in report["removed_first"]] == ["empty", "leaked", "duplicate"]
    plain = config("causal-lm", tiny_model("llama"), write_rows(tmp_path / "good.jsonl", pair_rows(12)),
                   tmp_path / "run", data=NOTHING_HELD, training={"steps": 1})  # fmt: skip
    train(plain, overwrite=True)
    assert not (tmp_path / "run" / "dropped.jsonl").exists()


def test_many_open_quotes_do_not_read_the_file_again_and_again(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + '"open,a\nclosed,b\n' * 1500)
    rows = read_rows(str(path), skip_malformed=True)
    assert len(rows.rows) + len(rows.skipped) == 3000
    assert len(rows.rows) == 1500
