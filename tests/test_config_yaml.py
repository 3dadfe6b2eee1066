"""What YAML becomes: types, lines, syntax errors."""

from typing import Any

import pytest

from peft_engine.config_yaml import dump, from_python, parse
from peft_engine.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e5", 2e5),
        (".5e-3", 0.5e-3),
        ("1E+3", 1000.0),
        ("-3.", -3.0),
        ("3", 3),
        ("010", 10),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("1e-4x", "1e-4x"),
        ("'1e-4'", "1e-4"),
        ("!!str 12", "12"),
        ("[1e-4, on]", [1e-4, "on"]),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    read = parse(f"a: {text}", "f").tree["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        *("1e-4", "yes", "null", "~", "", " a ", "12", "1_0", "a: b", "# c", "=", "<<", "2024-01-01"),
        *("a\nb", "é☃", "\t", "*x", 1e-5, 2e-4, 1e300, 3, 0.1 + 0.2, True, None, {}, []),
        [1, "1", 1.0],
        {"1": {"yes": ["no"]}},
    ],
    ids=repr,
)
def test_what_is_written_is_read_back(value: Any) -> None:
    read = parse(dump({"key": value}), "f").tree["key"]
    assert read == value
    assert type(read) is type(value)


def test_lines_of_keys_and_list_items() -> None:
    parsed = parse("# head\na:\n  b: 1\n\n  c:\n  - x\n  - y: 2\n", "f")
    lines = {path: origin.label for path, origin in parsed.origins.items()}
    assert lines == {
        ("a",): "line 2",
        ("a", "b"): "line 3",
        ("a", "c"): "line 5",
        ("a", "c", 0): "line 6",
        ("a", "c", 1): "line 7",
        ("a", "c", 1, "y"): "line 7",
    }
    assert parsed.origins["a", "b"].written == "1"


def test_duplicate_key_is_a_fault_with_both_lines() -> None:
    parsed = parse("a: 1\nb: 2\na: 3\n", "f")
    assert [(fault.path, fault.text) for fault in parsed.faults] == [(("a",), "given twice, first on line 1; keep one")]
    assert parsed.origins["a",].label == "line 3"


def test_key_that_is_no_text_is_a_fault() -> None:
    assert [fault.path for fault in parse("1: a\n? [x]\n: b\n", "f").faults] == [("1",), ("a list or a mapping",)]


@pytest.mark.parametrize(
    ("text", "place", "advice"),
    [
        ("a: 1\nb: [1, 2\n", "line 3, column 1", "Correct it"),
        ("a:\n\tb: 1\n", "line 2, column 1", "spaces, not tabs"),
        ("a: b: c\n", "line 1, column 5", "needs quotes"),
        ("a: *x\n", "line 1, column 4", "begins with *"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1", "one configuration per file"),
        ("a: !!python/object/apply:os.system [x]\n", "line 1, column 4", "Correct it"),
        ("a: 1\nb: !foo y\n", "line 2, column 4", "Correct it"),
        ("a: !!int x\n", "line 1, column 4", "Correct it"),
        ("a: &a [*a]\n", "line 1, column 4", "Correct it"),
        ("a: 1\nb: \x07\n", "line 2, column 4", "Remove it"),
    ],
)
def test_syntax_errors_have_line_column_and_advice(text: str, place: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "c.yaml")
    assert str(caught.value).startswith(f"c.yaml, {place}: not valid YAML: ")
    assert advice in caught.value.fix


def test_deep_nesting_and_multiplying_aliases_are_refused() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 8))
    for text in ("[" * 5000, bomb):
        with pytest.raises(ConfigError, match=r"nested too deep|multiplies"):
            parse(text, "f")


def test_python_values_become_plain_ones(tmp_path: Any) -> None:
    parsed = from_python({"a": (1, 2), "b": tmp_path, 3: "c", "d": {"e": object()}})
    assert parsed.tree == {"a": [1, 2], "b": str(tmp_path), "d": {"e": None}}
    assert [fault.path for fault in parsed.faults] == [("3",), ("d", "e")]
