"""The command line as a user meets it: help, settings and data, then train, evaluate, predict, generate and export."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from processes import Ended, engine
from tiny import chat_rows, class_rows, sentence, write_rows

from peft_engine.cli import cli

ROOT = Path(__file__).resolve().parents[1]
VERBS = list(cli.commands)
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "pydantic", "numpy", "sklearn", "scipy", "rich"}


def fine(*words: str, folder: Path) -> Ended:
    """A command that must succeed."""
    done = engine(*words, folder=folder)
    assert done.code == 0, done.err
    return done


def as_json(*words: str, folder: Path) -> dict[str, object]:
    """What `--json` prints: one object on one line of stdout, and nothing else there."""
    done = fine(*words, "--json", folder=folder)
    assert done.out.count("\n") == 1
    assert done.out.endswith("}\n")
    return json.loads(done.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Path:
    """A folder with a trained classifier and a trained chat model, `classes` and `chat`, made by `train`."""
    folder = tmp_path_factory.mktemp("cli")
    write_rows(folder / "rows.jsonl", class_rows(40))
    write_rows(folder / "chats.jsonl", chat_rows(40))
    for name, task, family, data in (
        ("classes", "text-classification", "bert", "rows.jsonl"),
        ("chat", "causal-lm", "llama", "chats.jsonl"),
    ):
        settings = {
            "task": task,
            "device": "cpu",
            "model": {"path": str(tiny_model(family))},
            "adapter": {"rank": 2},
            "data": {"train": data, "cache": None},
            "training": {"steps": 20, "batch_size": 8, "learning_rate": 1e-2},
            "output": name,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        (folder / f"{name}.json").write_text(json.dumps(as_json("train", f"{name}.yaml", folder=folder)))
    return folder


@pytest.mark.parametrize("words", [["-c", "import peft_engine"], ["-m", "peft_engine", "--help"]])
def test_nothing_heavy_is_imported_for(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "peft_engine" in seen
    assert not seen & HEAVY


@pytest.mark.parametrize("words", ["validate bad.yaml", "train bad.yaml", "data bad.yaml", "evaluate nothing-here"])
def test_a_fault_of_the_settings_is_told_without_waiting_for_torch(tmp_path: Path, words: str) -> None:
    (tmp_path / "bad.yaml").write_text("tusk: 1\n")
    code = f"import sys; sys.argv = ['peft-engine', *{words.split()!r}]; from peft_engine.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr


def test_help_lists_the_verbs_in_order_with_whole_sentences() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    listed = re.findall(r"^  (\w+) {2,}(\S.*)$", text.partition("Commands:")[2], flags=re.MULTILINE)
    assert [verb for verb, _ in listed] == VERBS
    assert all(about.endswith(".") and not about.endswith("...") for _, about in listed)
    assert all(f"{code} " in text for code in (0, 1, 2, 3, 4, 5, 6, 7, 8, 75))


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_its_help(verb: str) -> None:
    text = CliRunner().invoke(cli, [verb, "--help"], terminal_width=100).output
    assert cli.commands[verb].help
    options = [p for p in cli.commands[verb].params if p.param_type_name == "option"]
    assert [p.name for p in options if not p.help] == []
    assert all(p.opts[0] in text for p in options)
    assert " TEXT" not in text.replace("--system TEXT", ""), "say what is to be given"
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_what_init_prints_is_valid(tmp_path: Path, task: str) -> None:
    done = fine("init", "--task", task, "--model", "org/name", folder=tmp_path)
    (tmp_path / "my.yaml").write_text(done.out)
    assert fine("validate", "my.yaml", folder=tmp_path).out == "my.yaml is valid.\n"
    found = as_json("validate", "my.yaml", "--set", "adapter.rank=3", folder=tmp_path)
    assert found["valid"] is True
    assert found["config"]["model"]["path"] == "org/name"
    assert found["config"]["adapter"]["rank"] == 3


def test_schema_is_a_json_schema_that_our_configs_fit(tmp_path: Path) -> None:
    schema = json.loads(fine("schema", folder=tmp_path).out)
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert not validator.is_valid({"task": "causal-lm"})
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert fine("validate", str(path), folder=tmp_path)


def test_env_names_what_decides_results(tmp_path: Path) -> None:
    found = as_json("env", folder=tmp_path)
    assert {"python", "torch", "transformers", "peft", "cpu"} <= found.keys()
    assert f"torch: {found['torch']}\n" in fine("env", folder=tmp_path).out


def test_data_shows_counts_and_what_is_learned(place: Path) -> None:
    found = as_json("data", "chat.yaml", folder=place)
    assert sum(split["rows"] for split in found["splits"].values()) == 40
    assert [row["where"].startswith("chats.jsonl, line ") for row in found["preview"]] == [True] * 3
    assert all("⟦" in row["text"] for row in found["preview"])
    assert as_json("data", "chat.yaml", "--rows", "0", folder=place)["preview"] == []
    text = fine("data", "chat.yaml", "--rows", "2", folder=place).out
    assert text.count("⟦") >= 2
    assert text.count("chats.jsonl, line ") == 2


def test_train_prints_what_run_json_holds(place: Path) -> None:
    for name in ("classes", "chat"):
        printed, written = (
            json.loads((place / f"{name}.json").read_text()),
            json.loads((place / name / "run.json").read_text()),
        )
        assert printed == written
        assert printed["steps"] == 20
    metrics = printed["metrics"]  # of the chat model; the tiny classifier's labels follow no rule
    assert metrics["after"]["loss"] < metrics["before"]["loss"] - 0.1


def test_train_tells_a_person_the_same(place: Path) -> None:
    done = fine("train", "classes.yaml", "--set", "output=seen", "--set", "training.steps=3", folder=place)
    for part in ("lora on text-classification, 3 steps, test split", "accuracy", "→", "tokens/s", "seen/adapter"):
        assert part in done.out
    assert "step 3/3  loss" in done.err
    quiet = fine("train", "classes.yaml", "--set", "output=seen", "--overwrite", "--quiet", folder=place)
    assert "step " not in quiet.err
    assert "20 steps" in quiet.out


def test_set_overrides_and_is_recorded(place: Path) -> None:
    words = ("--set", "output=other", "--set", "training.steps=2", "--set", "adapter={method: head}")
    found = as_json("train", "classes.yaml", *words, folder=place)
    assert (found["method"], found["steps"]) == ("head", 2)
    written = yaml.safe_load((place / "other" / "config.yaml").read_text())
    assert written["adapter"]["method"] == "head"
    assert written["training"]["steps"] == 2


@pytest.mark.parametrize("run", ["classes", "classes.yaml"])
def test_evaluate_gives_the_metrics_of_training(place: Path, run: str) -> None:
    trained = json.loads((place / "classes.json").read_text())["metrics"]
    found = as_json("evaluate", run, folder=place)
    assert found["split"] == trained["split"] == "test"
    assert found["metrics"] == trained["after"]


def test_evaluate_on_a_file_and_on_another_split(place: Path) -> None:
    write_rows(place / "more.jsonl", class_rows(6))
    assert as_json("evaluate", "classes", "--data", "more.jsonl", folder=place)["rows"] == 6
    text = fine("evaluate", "classes", "--split", "eval", folder=place).out
    assert "accuracy" in text
    assert "confusion" in text


@pytest.mark.parametrize("given", ["csv", "jsonl", "txt"])
@pytest.mark.parametrize("wanted", ["csv", "jsonl"])
def test_predict_labels_every_row(place: Path, given: str, wanted: str) -> None:
    """The source's columns are kept, in its order; probabilities add up to 1 and the largest is the prediction."""
    texts = [sentence(i, 4) + ", so" for i in range(9)]
    source = place / f"new.{given}"
    if given == "csv":
        with source.open("w", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    elif given == "jsonl":
        write_rows(source, [{"id": i, "text": text} for i, text in enumerate(texts)])
    else:
        source.write_text("".join(f"{text}\n" for text in texts))
    target = place / f"labelled.{wanted}"
    done = fine("predict", "classes", "--input", source.name, "--output", target.name, folder=place)
    assert done.out == ""
    assert "9 rows" in done.err
    if wanted == "csv":
        with target.open(newline="") as file:
            rows = list(csv.DictReader(file))
        shares = [{name: float(row[f"probability.{name}"]) for name in ("no", "yes")} for row in rows]
    else:
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        shares = [row["probabilities"] for row in rows]
    assert [row["text"] for row in rows] == texts
    if given != "txt":
        assert [int(row["id"]) for row in rows] == list(range(9))
    for row, share in zip(rows, shares, strict=True):
        assert sum(share.values()) == pytest.approx(1)
        assert row["predicted"] == max(share, key=share.__getitem__)


def test_predict_without_output_prints_json_lines(place: Path) -> None:
    write_rows(place / "two.jsonl", class_rows(2))
    out = fine("predict", "classes", "--input", "two.jsonl", folder=place).out
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 2
    found = as_json("predict", "classes", "--input", "two.jsonl", folder=place)
    assert found == {"rows": 2, "output": None, "predictions": rows}


def test_predict_answers_conversations(place: Path) -> None:
    rows = [{"messages": row["messages"][:1]} for row in chat_rows(3)]
    write_rows(place / "asked.jsonl", rows)
    words = ("--output", "answered.jsonl", "--set", "evaluation.max_new_tokens=4")
    found = as_json("predict", "chat", "--input", "asked.jsonl", *words, folder=place)
    assert found == {"rows": 3, "output": "answered.jsonl"}
    answered = [json.loads(line) for line in (place / "answered.jsonl").read_text().splitlines()]
    assert [row["messages"] for row in answered] == [row["messages"] for row in rows]
    assert all(isinstance(row["predicted"], str) for row in answered)


def test_generate_streams_what_json_gives(place: Path) -> None:
    words = ("generate", "chat", "the quick fox", "--max-new-tokens", "8")
    streamed = fine(*words, folder=place).out
    found = as_json(*words, folder=place)
    assert found.keys() == {"text"}
    assert streamed.strip() == str(found["text"]).strip() != ""
    system = as_json(*words, "--system", "answer with cats", folder=place)
    assert system["text"] != found["text"]


def test_export_verifies_copies_and_merges(place: Path) -> None:
    found = as_json("export", "classes", "--to", "copy", folder=place)
    assert found["folder"] == "copy"
    assert found["relative"] < 1e-3
    assert found["top1_agreement"] == 1
    copied = {path.name: path.read_bytes() for path in (place / "copy").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in (place / "classes" / "adapter").iterdir()}
    text = fine("export", "chat", "--merged", folder=place).out
    assert text.startswith("chat/merged: reloaded in plain transformers;")
    assert (place / "chat" / "merged" / "model.safetensors").is_file()


def test_version(tmp_path: Path) -> None:
    assert re.fullmatch(r"peft-engine, version \d+\.\d+\.\d+\S*\n", fine("--version", folder=tmp_path).out)
