"""Label types, the order of names, and encoding."""

import json
import random

import pytest

from peft_engine.data.labels import Labels, find_labels
from peft_engine.errors import ConfigError, DataError


def labels_of(values, label_type="auto", given=None):
    return find_labels([{"label": value} for value in values], lambda i: f"row {i + 1}", label_type, given)


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        (["b", "a", "b"], "single", ["a", "b"]),
        (["b", "B", "ä", "a"], "single", ["B", "a", "b", "ä"]),
        ([10, 1, 0, 2], "single", ["0", "1", "2", "10"]),
        (["10", "1", "0", "2"], "single", ["0", "1", "2", "10"]),
        (["10", "1", "x"], "single", ["1", "10", "x"]),
        ([-1, 1], "single", ["-1", "1"]),
        ([True, False], "single", ["False", "True"]),
        ([1.0, 0.0, 3.0], "single", ["0", "1", "3"]),
        (["1.0", "0.0"], "single", ["0.0", "1.0"]),
        ([1.0, 0.5], "regression", []),
        ([1, 0.5], "regression", []),
        (["1.5", "-2", " 3e-1"], "regression", []),
        (["1.5", "2", "high"], "single", ["1.5", "2", "high"]),
        ([["b"], ["a", "b"], []], "multi", ["a", "b"]),
        (['["b"]', '["a", "b"]', "[]"], "multi", ["a", "b"]),
        (["['b']", "['a', 'b']", '["it\'s"]', "[]"], "multi", ["a", "b", "it's"]),
        ([[0], [1], [0]], "multi", ["0", "1"]),
        ([[2], [10, 2]], "multi", ["2", "10"]),
        (["a|b", "a"], "single", ["a", "a|b"]),
        (["[draft", "final"], "single", ["[draft", "final"]),
    ],
)
def test_type_and_names_are_told_from_the_values(values, kind, names):
    labels = labels_of(values)
    assert (labels.kind, labels.names) == (kind, names)


def test_names_do_not_depend_on_the_order_of_rows():
    values = [f"class {i}" for i in range(30)] * 2
    expected = labels_of(values).names
    random.Random(0).shuffle(values)
    assert labels_of(values).names == expected == sorted(expected)


def test_encode():
    assert labels_of(["b", "a"]).encode("b", "") == 1
    assert labels_of([10, 2]).encode("10", "") == labels_of([10, 2]).encode(10.0, "") == 1
    assert labels_of([["a"], ["c", "b"]]).encode('["c", "a"]', "") == [1.0, 0.0, 1.0]
    assert labels_of([["a"], ["c", "b"]]).encode([], "") == [0.0, 0.0, 0.0]
    assert labels_of([0.5, 2.0]).encode("7.25", "") == 7.25
    assert labels_of([["a"], ["c", "b"]]).classes(["c", "a"], "") == ["a", "c"]
    assert labels_of(["b", "a"]).classes("b", "") == ["b"]
    assert labels_of([0.5, 2.0]).classes(7, "") == []


def test_given_names_set_the_order_and_may_be_more_than_are_seen():
    labels = labels_of([1, 0], given=[1, 0, 2])
    assert labels.names == ["1", "0", "2"]
    assert labels.encode(1, "") == 0


def test_an_unseen_label_names_itself_its_place_and_the_known_ones():
    for labels, value in ((labels_of(["a", "b"]), "c"), (labels_of([["a"], ["b"]]), ["a", "c"])):
        with pytest.raises(DataError, match=r"test.csv, line 9: label 'c' .*'a', 'b'"):
            labels.encode(value, "test.csv, line 9")


@pytest.mark.parametrize(
    ("values", "label_type", "given", "error", "expected"),
    [
        (["a"] * 3, "auto", None, DataError, "All 3 labels are 'a'"),
        (["a"] * 3, "auto", ["a", "b"], DataError, "at least two classes"),
        ([0.5, 0.5], "auto", None, DataError, "0.5"),
        ([[], []], "auto", None, DataError, "at least two classes"),
        ([["a"], ["a"]], "auto", None, DataError, "at least two classes"),
        ([[0, 1], [1, 0]], "auto", None, DataError, r"row 1: the label \[0, 1\] is a one-hot vector"),
        ([[0.0, 1.0], [1.0, 0.0]], "multi", None, DataError, "place of the 1, as one number"),
        ([[0, 1, 1], [1, 0, 0]], "auto", None, DataError, "zeros and ones"),
        (["['a' 'b']", "['a']", "c"], "single", None, DataError, "row 1.*a list that was printed"),
        (["[0 1]", "[1]"], "single", None, DataError, "row 1.*Write it as JSON"),
        ([["a"], "b"], "auto", None, DataError, "row 2.*no list"),
        (["a", "b"], "multi", None, DataError, "row 1.*no list"),
        ([["a", None], ["b"]], "auto", None, DataError, "row 1.*None"),
        ([{"x": 1}, "a"], "auto", None, DataError, "row 1"),
        ([["a"], ["b"]], "single", None, DataError, "row 1"),
        (["a ", "b", "a"], "auto", None, DataError, "row 1: label 'a ' differs from 'a' .row 3"),
        ([str(i) + "x" for i in range(1001)], "auto", None, DataError, "1001 different.*regression"),
        ([1.5, float("inf")], "auto", None, DataError, "row 2.*inf"),
        ([1.5, 10**400], "auto", None, DataError, "row 2.*no finite"),
        (["1.5", "high"], "regression", None, DataError, "row 2: label 'high'"),
        ([True, False], "regression", None, DataError, "row 1"),
        (["a", "b"], "auto", ["a"], DataError, r"row 2: label 'b' is not in data\.labels"),
        (["a", "b"], "auto", ["a", "b", "a"], ConfigError, "'a'.* more than once"),
        ([0, 1], "auto", [0, "0", 1], ConfigError, "'0'.* more than once"),
        ([0.5, 1], "auto", ["a"], ConfigError, "labels are numbers"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(values, label_type, given, error, expected):
    with pytest.raises(error, match=expected) as caught:
        labels_of(values, label_type, given)
    assert type(caught.value) is error


def test_many_classes_are_taken_when_named_and_numbers_when_asked_for():
    names = [f"c{i}" for i in range(1001)]
    assert labels_of(names, given=names).names == names
    assert labels_of(list(range(1001)), "regression").kind == "regression"
    assert labels_of([0.5, 1.0], "single").names == ["0.5", "1"]


def test_labels_survive_json():
    labels = labels_of(["ü", "a"])
    again = Labels.from_json(json.loads(json.dumps(labels.to_json())))
    assert again == labels
    assert again.encode("ü", "") == 1


def tags_of(tags, given=None):
    return find_labels([{"tokens": ["w"] * len(tags), "tags": tags}], lambda i: f"row {i + 1}", "auto", given)


def test_numbers_are_places_of_tags_only_where_their_order_was_given():
    found = tags_of(["O", "B-PER", "I-PER"])
    assert found.encode_tags(["O", None], "") == [2, -100]
    for again in (found, Labels.from_json(found.to_json())):
        with pytest.raises(DataError, match="row 9: the tag 0 is a number, and those of the training split are names"):
            again.encode_tags([0, 1, "2"], "row 9")
    given = tags_of([0, 1], ["O", "B-PER", "I-PER"])
    for again in (given, Labels.from_json(json.loads(json.dumps(given.to_json())))):
        assert again.encode_tags([0, "2", "B-PER"], "") == [0, 2, 1]
    assert tags_of([0, 7]).encode_tags([7, "0"], "") == [1, 0]
