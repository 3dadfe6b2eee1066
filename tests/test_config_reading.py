"""Reading a file, overrides, and reporting all faults at once."""

from pathlib import Path

import pytest

from peft_engine.config_reading import load_config
from peft_engine.errors import ConfigError

GOOD = """\
task: causal-lm
model:
  path: some/model
adapter:
  rank: 8
data:
  train: train.jsonl
training:
  learning_rate: 1e-4
output: runs/x
"""


def write(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(source: object, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def test_reads_a_file_and_fills_in_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert (config.training.learning_rate, config.adapter.rank, config.adapter.alpha) == (1e-4, 8, 32)
    assert load_config(str(tmp_path / "c.yaml")) == config


def test_reads_a_dict() -> None:
    tree = {"task": "causal-lm", "model": {"path": Path("m")}, "data": {"train": "t"}, "output": "o"}
    assert load_config(tree).model.path == "m"
    assert load_config(tree | {"training": {"betas": (0.8, 0.9)}}).training.betas == (0.8, 0.9)
    assert refusal(tree | {"trainig": {}}) == ["settings: trainig: unknown key; nearest: training"]


def test_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_config(path).adapter.rank == 8


def test_all_faults_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "task: causal-lm\n"
        "model: {path: 12}\n"
        "adapter:\n"
        "  method: head\n"
        "  rank: 4\n"
        "data:\n"
        "  train: t\n"
        "training:\n"
        "  learning_rat: 1e-4\n"
        "  seed: 1\n"
        "  seed: 2\n",
    )
    lines = refusal(path, "training.batch_size=none", "adapter.bogus=1")
    starts = [
        f"{path}, line 2: model.path: got 12",
        f"{path}, line 5: adapter.rank: applies to other methods only",
        f"{path}, line 9: training.learning_rat: unknown key; nearest: learning_rate",
        f"{path}, line 11: training.seed: given twice, first on line 10",
        "--set adapter.bogus: unknown key",
        "--set training.batch_size: got none (text), expected a whole number of at least 1",
        f"{path}: output: required, but not given",
    ]
    assert len(lines) == len(starts)
    for start in starts:
        assert any(line.startswith(start) for line in lines), start
    assert [line.startswith(start) for line, start in zip(lines[:4], starts[:4], strict=True)] == [True] * 4


def test_no_message_has_pydantic_in_it(tmp_path: Path) -> None:
    lines = refusal(write(tmp_path, "model: 3\nadapter: [lora]\ntraining: {betas: {a: 1}, epochs: x}\ntask: 1\n"))
    text = "\n".join(lines)
    assert f"{tmp_path / 'c.yaml'}, line 2: adapter: got [lora] (a list), expected a section" in text
    text = text.replace(str(tmp_path), "")
    assert not [sign for sign in ("pydantic", "http", "Input should", "type=", "Error") if sign in text]


def test_required_settings_name_their_section_line(tmp_path: Path) -> None:
    path = write(tmp_path, "task: causal-lm\noutput: o\nmodel:\n  dtype: auto\n")
    lines = refusal(path)
    assert lines[0].startswith(f"{path}, line 3: model.path: required, but not given; expected text. Hub id or local")
    assert lines[1].startswith(f"{path}: data.train: required, but not given")


def test_section_header_with_nothing_below_is_an_empty_section(tmp_path: Path) -> None:
    text = GOOD + "budget:\n  # max_usd: 3\nevaluation:\n"
    assert load_config(write(tmp_path, text)) == load_config(write(tmp_path, GOOD, "d.yaml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "got [a, b]"),
        ("just text\n", "got just text"),
    ],
)
def test_file_without_settings(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    assert refusal(path)[0].startswith(f"{path}: {said}")


def test_missing_file_names_near_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, GOOD, "quickstart.yaml")
    for name in ("quikstart.yaml", "quickstart", "quickstart.yml"):
        line = refusal(tmp_path / name)[0]
        assert line == f"{tmp_path / name}: there is no such file. Near names: {tmp_path / 'quickstart.yaml'}."
    assert "peft-engine init" in refusal(tmp_path / "zzz" / "0.yaml")[0]


def test_missing_file_is_looked_for_in_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs", GOOD, "quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    assert refusal("quickstart.yaml")[0].endswith("Near names: configs/quickstart.yaml.")


def test_folder_instead_of_file(tmp_path: Path) -> None:
    assert "is a folder, expected a YAML file. Name a YAML file." in refusal(tmp_path)[0]
    inside = write(tmp_path, GOOD, "config.yaml")
    assert refusal(tmp_path)[0].endswith(f"Did you mean {inside}?")


def test_not_utf8_names_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"task: causal-lm\noutput: caf\xe9\n")
    assert refusal(path) == [f"{path}, line 2: not UTF-8 (byte 27 is 0xe9). Save the file as UTF-8."]


@pytest.mark.parametrize("source", ["a\0b", "x" * 5000])
def test_impossible_path(source: str) -> None:
    assert "can't be read" in refusal(source)[0]


def test_syntax_error_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "task: [causal-lm\n")
    assert len(refusal(path)) == 1
    assert refusal(path)[0].startswith(f"{path}, line 2, column 1: not valid YAML")


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    config = load_config(
        path,
        [
            "training.learning_rate=3e-5",
            "adapter.targets=[q_proj, v_proj]",
            "training.early_stopping.patience=2",
            "adapter.rank_pattern.q_proj=4",
            "data.split.eval=0.2",
            "data.test=a=b.csv",
            "training.steps=1",
            "training.steps=2",
            "model.revision='1'",
            "data.limit={train: 5}",
        ],
    )
    assert config.training.learning_rate == 3e-5
    assert config.adapter.targets == ["q_proj", "v_proj"]
    assert config.training.early_stopping is not None
    assert config.training.early_stopping.patience == 2
    assert config.adapter.rank_pattern == {"q_proj": 4}
    assert (config.data.split.eval, config.data.split.test) == (0.2, 0.1)
    assert (config.data.test, config.training.steps, config.model.revision) == ("a=b.csv", 2, "1")
    assert config.data.limit.train == 5


def test_override_repairs_what_stands_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("rank: 8", "rank: x").replace("1e-4", "1e-4\n  learning_rate: 1"))
    assert len(refusal(path)) == 2
    assert load_config(path, ["adapter.rank=2", "training.learning_rate=1e-3"]).adapter.rank == 2


def test_override_can_replace_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert "--set 'adapter={method: head}'" in refusal(path, "adapter.method=head")[0]
    assert load_config(path, ["adapter={method: head}"]).adapter.method == "head"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.lr=1", "--set training.lr: unknown key; nearest: learning_rate"),
        ("foo.bar=1", "--set foo.bar: foo: unknown key; "),
        ("task.x=1", "--set task.x: task is no section"),
        ("adapter.targets.0=x", "--set adapter.targets.0: adapter.targets is no section"),
        ("training.warmup", "--set training.warmup: not of the form a.b=value."),
        ("=3", "--set =3: not of the form a.b=value."),
        ("data..train=3", "--set data..train=3: not of the form a.b=value."),
        ("adapter.targets=[a", "--set adapter.targets: not valid YAML"),
        (
            "data={train: t, limit: {train: 0}}",
            "--set data: data.limit.train: got 0 (a number), expected a whole number",
        ),
        ("model.path=", "--set model.path: got nothing (null), expected text"),
    ],
)
def test_override_faults_name_the_option(tmp_path: Path, override: str, said: str) -> None:
    lines = refusal(write(tmp_path, GOOD), override)
    assert len(lines) == 1
    assert lines[0].startswith(said)
