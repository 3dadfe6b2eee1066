"""Which columns play which part, and one shape for every format's rows."""

import json

import pytest

from peft_engine.data.examples import to_examples
from peft_engine.data.formats import Layout, find_layout
from peft_engine.data.reading import Rows
from peft_engine.errors import ConfigError, DataError

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TALK = [USER, ASSISTANT]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {}}}


def rows_of(*rows):
    return Rows("data.jsonl", list(rows), list(range(1, len(rows) + 1)))


def examples_of(*rows, task="causal-lm", columns=None, need_label=True):
    table = rows_of(*rows)
    return to_examples(table, find_layout(table, task, columns or {}, need_label=need_label))


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"messages": TALK, "id": 3}, {"messages": TALK}),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            {"messages": TALK},
        ),
        ({"messages": json.dumps(TALK)}, {"messages": TALK}),
        ({"messages": TALK, "tools": [SCHEMA]}, {"messages": TALK, "tools": [SCHEMA]}),
        ({"messages": TALK, "tools": json.dumps([SCHEMA])}, {"messages": TALK, "tools": [SCHEMA]}),
        ({"messages": TALK, "tools": None}, {"messages": TALK}),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
                    ASSISTANT,
                ]
            },
            {"messages": TALK},
        ),
        ({"prompt": "2+2?", "completion": "4"}, {"prompt": "2+2?", "completion": "4"}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}),
        (
            {"prompt": [USER], "completion": [ASSISTANT], "tools": [SCHEMA]},
            {"prompt": [USER], "completion": [ASSISTANT], "tools": [SCHEMA]},
        ),
        (
            {"instruction": "Add.", "input": "2+2", "output": "4"},
            {"prompt": "Add.\n\n2+2", "completion": "4"},
        ),
        ({"instruction": "Add 2+2.", "input": "", "output": "4"}, {"prompt": "Add 2+2.", "completion": "4"}),
        ({"Instruction": "Add.", "Input": "2+2", "Output": "4"}, {"prompt": "Add.\n\n2+2", "completion": "4"}),
        ({"text": " once "}, {"text": " once "}),
        ({"document": "once", "id": 1}, {"text": "once"}),
        ({"prompt": "p", "messages": TALK}, {"messages": TALK}),
    ],
)
def test_causal_conventions(row, example):
    assert examples_of(row) == [example]


@pytest.mark.parametrize("text", ["text", "sentence", "content", "document", " Text"])
@pytest.mark.parametrize("label", ["label", "labels", "class", "target", "category", "score", "sentiment", "Label"])
def test_classification_conventions(text, label):
    assert examples_of({"id": 7, text: "good", label: 1}, task="text-classification") == [{"text": "good", "label": 1}]


def test_the_parts_own_name_wins_over_its_other_names():
    row = {"content": "c", "text": "t", "score": 0.5, "label": "l"}
    assert examples_of(row, task="text-classification") == [{"text": "t", "label": "l"}]


def test_named_columns_win():
    row = {"text": "t", "body": "b", "label": 0, "stars": 5}
    named = {"text": "body", "label": "stars"}
    assert examples_of(row, task="text-classification", columns=named) == [{"text": "b", "label": 5}]


def test_naming_a_part_of_one_kind_settles_which_kind():
    row = {"instruction": "Add.", "input": "2+2", "output": "4", "text": "Add. 2+2 = 4"}
    with pytest.raises(DataError, match=r"prompt-completion or as text.*data\.columns\.completion=output"):
        examples_of(row)
    assert examples_of(row, columns={"text": "text"}) == [{"text": "Add. 2+2 = 4"}]
    assert examples_of(row, columns={"completion": "output"}) == [{"prompt": "Add.\n\n2+2", "completion": "4"}]


def test_prediction_needs_no_answers_and_leaves_them_out():
    assert examples_of({"text": "t"}, task="text-classification", need_label=False) == [{"text": "t"}]
    labelled = {"text": "t", "label": None}
    assert examples_of(labelled, task="text-classification", need_label=False) == [{"text": "t"}]
    named = {"label": "gone"}
    assert examples_of({"text": "t"}, task="text-classification", columns=named, need_label=False) == [{"text": "t"}]
    assert examples_of({"prompt": "p"}, need_label=False) == [{"prompt": "p"}]
    assert examples_of({"prompt": "p", "completion": ""}, need_label=False) == [{"prompt": "p"}]
    assert examples_of({"messages": [USER]}, need_label=False) == [{"messages": [USER]}]


@pytest.mark.parametrize(
    ("row", "task", "columns", "expected"),
    [
        ({"headline": "x", "label": 1}, "text-classification", {}, ["'headline'", "data.columns.text=COLUMN"]),
        ({"text": "x", "y": 1}, "text-classification", {}, ["label", "'text', 'y'", "data.columns.label=COLUMN"]),
        ({"text": "x", "target": 1, "category": 2}, "text-classification", {}, ["several", "'target'", "'category'"]),
        ({"sentence": "x", "content": "y", "label": 1}, "text-classification", {}, ["several", "'sentence'"]),
        ({"Text": "x", "TEXT": "y", "label": 1}, "text-classification", {}, ["several", "'Text'", "'TEXT'"]),
        ({"body": "x"}, "causal-lm", {}, ["'body'", "messages"]),
        ({"text": "x", "messages": TALK}, "causal-lm", {}, ["messages or as text", "data.columns.messages=messages"]),
        ({"prompt": "x", "output": "y"}, "causal-lm", {}, ["two conventions", "data.columns.prompt"]),
        ({"headline": "x"}, "causal-lm", {"text": "headlin"}, ["'headlin'", "Did you mean 'headline'?"]),
    ],
)
def test_columns_that_cannot_be_told_are_data_errors(row, task, columns, expected):
    with pytest.raises(DataError) as caught:
        find_layout(rows_of(row), task, columns)
    for part in ["data.jsonl", *expected]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("task", "columns", "expected"),
    [
        ("causal-lm", {"label": "b"}, "data.columns.label = 'b' has no use in task causal-lm"),
        ("causal-lm", {"text": "a", "prompt": "b"}, "prompt-completion and of text"),
        ("causal-lm", {"text": "a", "tools": "b"}, "tools"),
        ("causal-lm", {"prompt": "a", "completion": "a"}, "two parts"),
        ("text-classification", {"text": "a", "label": "a"}, "two parts"),
    ],
)
def test_settings_that_make_no_sense_are_config_errors(task, columns, expected):
    with pytest.raises(ConfigError, match=expected):
        find_layout(rows_of({"a": "x", "b": "y"}), task, columns)


def assistant(**keys):
    return {"messages": [USER, {"role": "assistant", **keys}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": 5}, "'text' is 5, a string was expected"),
        ({"text": None}, "string was expected"),
        ({"text": ""}, "'text' is empty"),
        ({"text": " \n"}, "blank"),
        ({"other": 1}, "not in this row"),
        ({"text": "t", "label": None}, "None, that is missing"),
        ({"text": "t", "label": ""}, "'', that is missing"),
        ({"text": "t", "label": " NaN"}, "that is missing"),
        ({"text": "t", "label": float("nan")}, "nan, that is missing"),
        ({"text": "t"}, "'label' is not in this row"),
    ],
)
def test_malformed_labelled_rows(row, expected):
    table = rows_of({"text": "fine", "label": "a"}, row)
    layout = Layout("text-label", {"text": "text", "label": "label"})
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: ") as caught:
        to_examples(table, layout)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, "a list of messages"),
        ({"messages": "hello"}, "a list of messages"),
        ({"messages": []}, "no messages"),
        ({"messages": ["hi"]}, "message 1 is"),
        ({"messages": [{"content": "hi"}]}, "no role"),
        ({"messages": [{"role": "bot", "content": "hi"}]}, "'bot'"),
        ({"messages": [{"role": None, "content": "hi"}]}, "None"),
        ({"messages": [{"from": ["x"], "value": "hi"}]}, "known are human"),
        ({"messages": [USER]}, "no assistant turn"),
        (assistant(content=" "), "says nothing"),
        (assistant(), "message 2 (assistant) has no content"),
        (assistant(content=None), "has no content"),
        (assistant(content=4), "a string was expected"),
        (assistant(content=[{"type": "image_url", "image_url": "x"}]), "image_url"),
        (assistant(content=None, tool_calls=[]), "no content"),
        (assistant(content=None, tool_calls=["add"]), "tool_calls of message 2"),
        ({"messages": TALK, "tools": "calculator"}, "JSON schemas"),
    ],
)
def test_malformed_conversations(row, expected):
    table = rows_of({"messages": TALK}, row)
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: ") as caught:
        to_examples(table, Layout("messages", {"messages": "messages", "tools": "tools"}))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": ""},
        {"prompt": "p", "completion": "  "},
        {"prompt": "", "completion": "c"},
        {"prompt": "p", "completion": None},
        {"prompt": "p", "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": [USER]},
        {"prompt": [], "completion": [ASSISTANT]},
    ],
)
def test_malformed_completions(row):
    with pytest.raises(DataError, match="line 2"):
        examples_of({"prompt": "p", "completion": "c"}, row)


def test_the_first_faulty_row_is_named_and_the_others_counted():
    with pytest.raises(DataError, match=r"line 2: .*2 more rows"):
        examples_of({"text": "a"}, {"text": ""}, {"text": "b"}, {"text": 3}, {"text": " "})


def test_tool_calls_may_have_no_content_and_arguments_as_json_are_decoded():
    written = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    tool = {"role": "tool", "content": "4", "tool_call_id": "1"}
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [written]}, tool, ASSISTANT]}
    [example] = examples_of(row)
    assert example["messages"] == [USER, {"role": "assistant", "tool_calls": [CALL]}, tool, ASSISTANT]
    assert row["messages"][1]["tool_calls"] == [written]


def test_further_keys_of_messages_stay():
    row = {"messages": [USER, {**ASSISTANT, "reasoning_content": "two and two", "weight": 0}]}
    assert examples_of(row) == [row]


def test_sharegpt_functions_become_tools():
    said = [{"from": "system", "value": "s"}, {"from": "function", "value": "4"}, {"from": "gpt", "value": "4"}]
    assert [turn["role"] for turn in examples_of({"conversations": said})[0]["messages"]] == [
        "system",
        "tool",
        "assistant",
    ]


def test_examples_stand_in_the_order_of_the_rows():
    assert [e["text"] for e in examples_of(*({"text": str(i)} for i in range(20)))] == [str(i) for i in range(20)]
