"""Splits given and made: one side per input, seeded, in proportion, and told truthfully."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from peft_engine.config import Config
from peft_engine.data.duplicates import input_key
from peft_engine.data.splitting import load_one, load_splits
from peft_engine.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path):
    """Writes rows to files, and makes the config that names them."""

    def make(task="text-classification", **data):
        for name in ("train", "eval", "test"):
            if isinstance(data.get(name), list):
                path = tmp_path / f"{name}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in data[name]))
                data[name] = str(path)
        return Config.model_validate({"task": task, "model": {"path": "m"}, "output": "o", "data": data})

    return make


def labelled(count, classes=("a", "b"), start=0):
    return [{"text": f"text {i}", "label": classes[i % len(classes)]} for i in range(start, start + count)]


def texts(split):
    return [example["text"] for example in split.examples]


def names(split):
    return Counter(example["label"] for example in split.examples)


def lines(split):
    return [int(where.rsplit(" ", 1)[1]) for where in split.where]


def test_made_splits_divide_the_rows_in_proportion_and_keep_their_order(config):
    rows = [{"text": f"text {i}", "label": "rare" if i % 10 == 0 else "common"} for i in range(400)]
    splits = load_splits(config(train=rows))
    assert splits.report.counts == {"train": 320, "eval": 40, "test": 40}
    assert splits.report.made == {"eval": True, "test": True}
    parts = (splits.train, splits.eval, splits.test)
    assert sorted(text for part in parts for text in texts(part)) == sorted(row["text"] for row in rows)
    for part, rare in zip(parts, (32, 4, 4), strict=True):
        assert names(part)["rare"] == rare
        assert lines(part) == sorted(lines(part))
        assert [rows[line - 1]["text"] for line in lines(part)] == texts(part)
    assert splits.report.notes == []


def test_the_data_seed_alone_decides(config):
    rows = labelled(200)
    first, again = load_splits(config(train=rows)), load_splits(config(train=rows))
    assert first == again
    other = load_splits(config(train=rows, seed=1))
    assert texts(other.test) != texts(first.test)
    assert other.digest != first.digest
    renamed = load_splits(config(train=rows, labels=["b", "a"]))
    assert texts(renamed.test) == texts(first.test)
    assert load_splits(config(train=rows, seed=-1)).report.counts == first.report.counts


def test_the_share_of_one_split_does_not_change_the_test_rows(config):
    rows = labelled(200)
    assert texts(load_splits(config(train=rows)).test) == texts(
        load_splits(config(train=rows, split={"eval": 0.3})).test
    )


def test_splits_are_the_same_in_every_process(config, tmp_path):
    rows = labelled(150, classes=("x", "y", "z")) + labelled(30, classes=("x", "y", "z"))
    settings = config(train=rows, limit={"train": 70})
    code = (
        "import sys\nfrom peft_engine.config import Config\nfrom peft_engine.data.splitting import load_splits\n"
        "print(load_splits(Config.model_validate_json(sys.argv[1])).digest)"
    )
    digests = {load_splits(settings).digest}
    for hash_seed in ("0", "1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, settings.model_dump_json(exclude_unset=True)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_the_digest_is_of_the_content_not_of_the_files_name(config, tmp_path):
    rows = labelled(50)
    digest = load_splits(config(train=rows)).digest
    moved = tmp_path / "elsewhere.json"
    moved.write_text(json.dumps(rows))
    assert load_splits(config(train=str(moved))).digest == digest
    rows[7]["text"] += "!"
    assert load_splits(config(train=rows)).digest != digest


def test_duplicates_of_an_input_stay_on_one_side_of_made_splits(config):
    """Trap 26. A third of the inputs stands there three times, with blanks around and with other labels."""
    rows = labelled(300)
    rows += [{"text": f" {row['text']}\n", "label": "b"} for row in rows[:100]] + rows[:100]
    random.Random(0).shuffle(rows)
    for seed in range(5):
        splits = load_splits(config(train=rows, seed=seed, split={"eval": 0.2, "test": 0.2}))
        sides = [set(map(str.strip, texts(part))) for part in (splits.train, splits.eval, splits.test)]
        assert all(sides)
        assert not sides[0] & sides[1]
        assert not sides[0] & sides[2]
        assert not sides[1] & sides[2]
        assert sum(splits.report.counts.values()) == 500
        assert splits.report.contradictory == 50
        assert sum(splits.report.duplicates.values()) == 150
        assert splits.report.leaked == {}


def test_duplicates_of_given_splits_are_removed_from_train(config):
    """Trap 26: of train only, whatever their label, each named with its twin."""
    train = labelled(40)
    test = [{"text": "text 3", "label": "b"}, {"text": "new", "label": "a"}, {"text": " text 5 ", "label": "a"}]
    evaluation = [
        {"text": "text 3", "label": "b"},
        {"text": "text 8", "label": "a"},
        {"text": "TEXT,  9", "label": "b"},
    ]
    splits = load_splits(config(train=train, eval=evaluation, test=test))
    assert [text for text in (row["text"] for row in train) if text not in texts(splits.train)] == [
        "text 3",
        "text 5",
        "text 8",
    ]
    report = splits.report
    assert report.counts == {"train": 37, "eval": 3, "test": 3}
    assert report.made == {"eval": False, "test": False}
    assert report.leaked == {"eval": 2, "test": 2}
    assert len(report.leaked_where) == 3
    assert report.leaked_where[1].endswith("test.jsonl, line 3")
    assert "train.jsonl, line 6 = " in report.leaked_where[1]
    assert report.near == {"eval": 1}
    assert "train.jsonl, line 10 = " in report.near_where[0]
    assert report.contradictory == 1
    assert any("1 inputs stand in both" in note for note in report.notes)
    assert json.loads(json.dumps(report.to_json()))["leaked"] == {"eval": 2, "test": 2}


def test_rows_of_a_given_split_stand_in_no_made_one(config):
    test = labelled(10)
    splits = load_splits(config(train=labelled(100), test=test))
    assert splits.report.made == {"eval": True, "test": False}
    assert splits.report.counts == {"train": 81, "eval": 9, "test": 10}
    assert not set(texts(splits.eval)) & set(texts(splits.test))


def test_train_that_stands_in_test_as_a_whole_is_refused(config):
    rows = labelled(20)
    with pytest.raises(DataError, match=r"All 20 rows .*line 1 = "):
        load_splits(config(train=rows, test=rows))


def test_duplicates_inside_a_split_are_kept_and_counted(config):
    rows = [*labelled(20), {"text": "text 0 ", "label": "a"}, {"text": "text 1", "label": "a"}]
    splits = load_splits(config(train=rows, split={"eval": 0.0, "test": 0.0}))
    assert splits.eval is None
    assert splits.test is None
    assert splits.report.counts == {"train": 22}
    assert splits.report.made == {}
    assert splits.report.duplicates == {"train": 1}
    assert splits.report.contradictory == 1


@pytest.mark.parametrize(
    ("rows", "split", "expected"),
    [
        (4, {}, "No test split can be made.* = 0.1 of 4 different inputs .*is 0"),
        (9, {"eval": 0.05, "test": 0.0}, "No eval split"),
        (2, {"eval": 0.45, "test": 0.5}, "No eval split"),
    ],
)
def test_splits_that_would_be_empty_are_refused_with_the_counts(config, rows, split, expected):
    with pytest.raises(DataError, match=expected):
        load_splits(config("causal-lm", train=[{"text": f"text {i}"} for i in range(rows)], split=split))


def test_rows_that_all_ask_the_same_cannot_be_split(config):
    rows = [{"prompt": "Tell a story.", "completion": f"story {i}"} for i in range(50)]
    with pytest.raises(DataError, match=r"1 different inputs \(50 rows.*data\.columns\.text"):
        load_splits(config("causal-lm", train=rows))


def test_a_class_that_is_too_small_stays_in_train(config):
    rows = [*labelled(100), {"text": "alone", "label": "one"}]
    for seed in range(20):
        splits = load_splits(config(train=rows, seed=seed, split={"eval": 0.3, "test": 0.3}))
        assert "alone" in texts(splits.train)
        assert abs(names(splits.test)["a"] - names(splits.test)["b"]) <= 1
        assert any("'one'" in note for note in splits.report.notes)


def test_more_classes_than_held_out_rows_are_drawn_plainly_and_said(config):
    rows = labelled(60, classes=[f"c{i}" for i in range(20)])
    for seed in range(10):
        splits = load_splits(config(train=rows, seed=seed))
        assert set(names(splits.train)) == {f"c{i}" for i in range(20)}
        assert any("drawn plainly" in note for note in splits.report.notes)
        assert splits.report.counts["test"] > 0


def test_no_held_out_class_is_unknown_to_train_with_several_labels_per_row(config):
    rows = [{"text": f"text {i}", "label": [f"c{i % 15}", "all"]} for i in range(40)]
    for seed in range(10):
        splits = load_splits(config(train=rows, seed=seed, split={"eval": 0.3, "test": 0.3}))
        assert len({name for example in splits.train.examples for name in example["label"]}) == 16
        assert splits.labels.kind == "multi"


def test_labels_are_of_train_and_a_label_that_only_a_given_split_has_is_refused(config):
    splits = load_splits(config(train=labelled(30)))
    assert splits.labels.names == ["a", "b"]
    with pytest.raises(DataError, match=r"test\.jsonl, line 2: label 'c'.*'a', 'b'"):
        load_splits(config(train=labelled(30), test=[{"text": "x", "label": "a"}, {"text": "y", "label": "c"}]))
    only_c = [*labelled(30), {"text": "y", "label": "c"}]
    with pytest.raises(DataError, match=r"test\.jsonl, line 1: label 'c'"):
        load_splits(config(train=only_c, test=[{"text": "y", "label": "c"}]))


def test_one_class_only_is_refused(config):
    with pytest.raises(DataError, match="All 30 labels are 'a'"):
        load_splits(config(train=labelled(30, classes=("a",))))
    with pytest.raises(DataError, match=r"limit\.train = 1 leaves only"):
        load_splits(config(train=labelled(30), limit={"train": 1}))


def test_limits_sample_in_proportion_keep_the_order_and_the_held_out_rows(config):
    rows = [{"text": f"text {i}", "label": "rare" if i % 5 == 0 else "common"} for i in range(500)]
    whole = load_splits(config(train=rows))
    limited = load_splits(config(train=rows, limit={"train": 50, "eval": 10}))
    assert limited.report.counts == {"train": 50, "eval": 10, "test": 50}
    assert names(limited.train) == {"common": 40, "rare": 10}
    assert lines(limited.train) == sorted(lines(limited.train))
    assert set(texts(limited.train)) < set(texts(whole.train))
    assert texts(limited.test) == texts(whole.test)
    assert load_splits(config(train=rows, limit={"train": 10_000})) == whole


def test_a_limit_below_the_number_of_classes_keeps_their_ids_and_says_what_is_missing(config):
    rows = labelled(100, classes=[f"c{i}" for i in range(10)])
    splits = load_splits(config(train=rows, limit={"train": 4}))
    assert len(splits.train.examples) == 4
    assert len(splits.labels.names) == 10
    assert any("classes have no row in the training split" in note for note in splits.report.notes)


def test_regression_is_split_plainly(config):
    rows = [{"text": f"text {i}", "label": i / 7} for i in range(100)]
    splits = load_splits(config(train=rows))
    assert splits.labels.kind == "regression"
    assert splits.report.counts == {"train": 80, "eval": 10, "test": 10}
    assert splits.report.notes == []


def test_causal_rows_are_split_by_what_is_asked(config):
    def talk(i, answer):
        turns = [("system", "s"), ("user", f"question {i}"), ("assistant", answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    rows = [talk(i % 40, f"answer {i}") for i in range(120)]
    splits = load_splits(config("causal-lm", train=rows, split={"eval": 0.2, "test": 0.2}))
    asked = [{e["messages"][1]["content"] for e in part.examples} for part in (splits.train, splits.eval, splits.test)]
    assert list(map(len, asked)) == [24, 8, 8]
    assert len(set.union(*asked)) == 40
    assert splits.report.counts == {"train": 72, "eval": 24, "test": 24}
    assert splits.labels is None
    assert splits.report.contradictory == 40


def test_what_counts_as_the_same_input():
    def key(*turns, **keys):
        return input_key({"messages": [{"role": role, "content": content} for role, content in turns], **keys})

    asked = key(("user", "q"), ("assistant", "a"))
    assert asked == key(("user", " q\n"), ("assistant", "b"))
    assert asked != key(("user", "q"), ("assistant", "a"), ("user", "more"))
    assert asked != key(("user", "q"), ("assistant", "a"), tools=[{"name": "f"}])
    assert key(("system", "s"), ("assistant", "a")) != key(("system", "s"), ("assistant", "b"))
    assert input_key({"prompt": "p ", "completion": "x"}) == input_key({"prompt": "p", "completion": "y"})
    assert input_key({"prompt": [{"role": "user", "content": "p"}]}) != input_key(
        {"prompt": [{"role": "user", "content": "q"}]}
    )


def test_splits_of_two_kinds_are_refused(config):
    with pytest.raises(DataError, match=r"holds text, .*messages"):
        load_splits(
            config(
                "causal-lm",
                train=[{"text": f"text {i}"} for i in range(20)],
                test=[{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
            )
        )


def test_a_missing_file_is_a_config_error(config, tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.csv"):
        load_splits(config(train=labelled(20), test=str(tmp_path / "gone.csv")))


def test_load_one_for_prediction(config, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("id,text\n1,hello\n2,bye\n")
    split, rows = load_one(str(path), config(train="unused.csv"), need_label=False, default_split="test")
    assert split.examples == [{"text": "hello"}, {"text": "bye"}]
    assert split.where[1].endswith("new.csv, line 3")
    assert rows.rows[1] == {"id": "2", "text": "bye"}
    with pytest.raises(DataError, match="label"):
        load_one(str(path), config(train="unused.csv"), need_label=True, default_split="test")


@pytest.mark.assets
def test_the_real_headlines(config, assets):
    """28,614 rows of which 116 repeat another: none stands on two sides."""
    splits = load_splits(config(train=str(assets / "data" / "sarcasm.jsonl")))
    sides = [set(map(str.strip, texts(part))) for part in (splits.train, splits.eval, splits.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 28_498
    assert sum(splits.report.counts.values()) == 28_614
    assert sum(splits.report.duplicates.values()) == 116
    for part in (splits.train, splits.eval, splits.test):
        share = names(part)[splits.train.examples[0]["label"]] / len(part.examples)
        whole = Counter(e["label"] for p in (splits.train, splits.eval, splits.test) for e in p.examples)
        assert share == pytest.approx(whole[splits.train.examples[0]["label"]] / 28_614, abs=0.002)
