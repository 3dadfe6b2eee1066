"""Predictions of a suite of which nothing has run: a probe, and what is made of it."""

import json
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from driver import FAKE
from fake_cell import PROBED
from tiny import class_rows, pair_rows, sentence, write_rows

from peft_engine.bench import probing, running
from peft_engine.bench.cell import run_cell, spec_of
from peft_engine.bench.cells import baseline_cell, final_cells
from peft_engine.bench.forecast import cell_seconds, parts_of
from peft_engine.bench.jobs import launch
from peft_engine.bench.measuring import config_of, prepare
from peft_engine.bench.results import open_results
from peft_engine.bench.suite import suite_of
from peft_engine.cli import cli
from peft_engine.errors import DataError, EngineError
from suites import SUITE, write_suite

DRY = ["bench", "suite.yaml", "--output", "out", "--dry-run"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a suite whose cells are fake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_CELLS", str(tmp_path / "table.json"))
    monkeypatch.setattr(running, "CELL", FAKE)
    write_suite(tmp_path / "suite.yaml")
    (tmp_path / "table.json").write_text("{}")
    return tmp_path


def test_the_arithmetic():
    record = {"train_info": {**PROBED, "eval_curve": [{}, {}]}}
    parts = parts_of(record, wall=20.0)
    # 20 s, but for 300 tokens at 50/s, and what was evaluated and judged, and what the probe itself took
    assert parts["load"] == pytest.approx(20 - 6 - 3 - 4.5 - 0.25)
    assert parts["step"] == pytest.approx(80 / 50)
    assert parts["row"] == pytest.approx(3 / (2 * 5 + 2 * 10))
    assert (parts["reopen"], parts["item"], parts["answer"], parts["window"]) == (1.5, 0.1, 0.5, 0.0)
    whole, load = PROBED["whole"], parts["load"]
    assert cell_seconds(parts, whole, "baseline", 0.5) == pytest.approx(load + 20 * (0.1 + 0.1) + 16 * 0.5)
    assert cell_seconds(parts, whole, "tuning", 0.5) == pytest.approx(load + 3 * 1.6 + (10 + 2 * 8) * 0.1)
    final = load + 6 * 1.6 + (2 * 10 + 2 * 20) * 0.1 + 1.5 + 20 * 0.1 + 16 * 0.5
    assert cell_seconds(parts, whole, "final", 0.5) == pytest.approx(final)
    untimed = {**record["train_info"], "tokens_per_second": None}
    assert parts_of({"train_info": untimed}, 20.0)["step"] == pytest.approx(80 * 7 / 300)
    assert parts_of(record, wall=1.0)["load"] == 0


def test_the_command_predicts_by_a_probe(place):
    outcome = CliRunner().invoke(cli, [*DRY, "--json"])
    assert outcome.exit_code == 0
    assert "timing a few steps of full" in outcome.stderr
    found = json.loads(outcome.stdout)["predicted"]
    final, search, baseline = 27.1, 7.4, 12.0  # as in the arithmetic, where a start takes no time
    assert found["seconds"] == pytest.approx(baseline + 3 * search + 4 * final)
    assert found["of"].startswith("by a probe of full, 3 steps")
    assert "every method taken to be as slow as full" in found["of"]
    assert (found["probe"]["method"], found["probe"]["steps"], found["probe"]["step"]) == ("full", 6, 1.6)
    assert sorted(path.name for path in place.iterdir()) == ["started", "suite.yaml", "table.json"]
    jobs = json.loads(CliRunner().invoke(cli, [*DRY, "--json", "--jobs", "2"]).stdout)["predicted"]
    assert jobs["seconds"] == pytest.approx(found["seconds"] / 2)


def test_what_is_recorded_needs_no_probe(place):
    running.Bench(open_results("suite.yaml", "out"), print, only="full-final-0").run()
    (place / "started").unlink()
    found = json.loads(CliRunner().invoke(cli, [*DRY, "--json"]).stdout)["predicted"]
    assert found["of"].startswith("by the recorded cells of full")
    assert not (place / "started").exists()


def test_a_probe_that_is_killed_leaves_nothing_beside_the_results(place, monkeypatch):
    """What lies there while it runs is what kill -9 leaves."""
    (place / "system").mkdir()
    (place / "out").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place / "system"))
    seen = []

    def look(cell, spec, folder, *more):
        seen.extend(path.relative_to(place) for path in place.rglob("*") if path.is_dir())
        assert folder.parent == place / "system"
        return launch(cell, spec, folder, *more)

    monkeypatch.setattr(probing, "launch", look)
    assert CliRunner().invoke(cli, DRY).exit_code == 0
    out, system, probe = sorted(seen)
    assert (out, system, probe.parent) == (Path("out"), Path("system"), Path("system"))
    assert list((place / "system").iterdir()) == []


@pytest.mark.parametrize(("todo", "code", "said"), [("fail 3", 3, "told to fail with 3"), ("die", 4, "SIGKILL")])
def test_a_probe_that_fails(place, todo, code, said):
    (place / "table.json").write_text(json.dumps({"full/seed-0": todo}))
    outcome = CliRunner().invoke(cli, DRY)
    assert isinstance(outcome.exception, EngineError)
    assert outcome.exception.exit_code == code
    assert "The probe of full failed" in str(outcome.exception)
    assert said in str(outcome.exception)
    assert "8 cells, 8 of them to run" in outcome.stdout
    assert "time: unknown. The probe of full failed" in outcome.stdout
    assert sorted(path.name for path in place.iterdir()) == ["started", "suite.yaml", "table.json"]


def language(folder: Path, model: Path, rows, **changes):
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "general.jsonl", [{"text": sentence(i, 20)} for i in range(99)])
    config = {
        "task": "causal-lm",
        "device": "cpu",
        "model": {"path": str(model)},
        "data": {"train": str(folder / "rows.jsonl"), "cache": None, "split": {"eval": 0.2, "test": 0.3}},
        "training": {"batch_size": 8, "eval_every": 2},
        "evaluation": {"generate_rows": 6, "max_new_tokens": 4},
    }
    text = {"path": str(folder / "general.jsonl"), "rows": 9, "max_length": 32}
    return suite_of({**SUITE, "config": config, "general_text": text, **changes})


def test_a_real_probe(tmp_path, tiny_model):
    """What it says of the whole cell is what the whole cell is; what it ran is little."""
    made = language(tmp_path, tiny_model("llama"), pair_rows(200), budget={"tokens": 3000})
    cell = final_cells(made, "full", 1e-3)[0]
    spec = json.loads(json.dumps(spec_of(cell, made.name, made.general_text, probe=True)))
    record = run_cell(spec, tmp_path / "probe")
    info = record["train_info"]
    whole = run_cell({**spec, "probe": False}, tmp_path / "whole")["train_info"]
    assert info["whole"]["steps"] == whole["steps"]
    assert whole["steps"] > 3
    assert len(whole["eval_curve"]) == -(-whole["steps"] // info["whole"]["eval_every"])
    assert info["whole"]["steps_per_epoch"] == 13, "100 rows by 8"
    assert info["whole"]["eval"] == whole["eval_curve"][-1].get("rows", 40)
    assert info["whole"]["test"] == len(whole["items"]["rows"])
    assert info["whole"]["answers"] == whole["metrics_after"]["generated_rows"] == 6
    assert info["whole"]["windows"] == 9
    assert info["tried"] == {"steps": 3, "eval": 32, "test": 32, "answers": 4, "windows": 4}
    assert info["steps"] == 3
    assert len(info["items"]["rows"]) == 32
    assert [value is None for value in info["items"]["exact"]].count(False) == 4
    lengths = prepare(config_of(spec, tmp_path))[2]["train"].lengths
    assert info["whole"]["tokens_per_step"] == pytest.approx(lengths.sum() / info["whole"]["steps_per_epoch"])
    assert set(whole["judging_seconds"]) == {"reopen", "items", "answers", "forgetting", "machine"}
    parts = parts_of(record, record["run_info"]["total_seconds"])
    assert all(value > 0 for value in parts.values())
    assert cell_seconds(parts, info["whole"], "final", 1.0) > sum(whole["judging_seconds"].values()) / 4


@pytest.mark.parametrize("kind", ["baseline", "final", "probe"])
def test_data_without_answers_is_found_before_the_training(tmp_path, tiny_model, kind):
    plain = [{"text": sentence(i, 9)} for i in range(60)]
    made = language(tmp_path, tiny_model("llama"), plain)
    cell = baseline_cell(made) if kind == "baseline" else final_cells(made, "full", 1e-3)[0]
    spec = json.loads(json.dumps(spec_of(cell, made.name, made.general_text, probe=kind == "probe")))
    with pytest.raises(DataError, match="got 6, and the test rows have no answers") as caught:
        run_cell(spec, tmp_path / "work")
    assert caught.value.fix.startswith("Set evaluation.generate_rows to 0")
    assert not (tmp_path / "work").exists(), "no run was begun"


def test_too_little_general_text_is_found_before_the_training(tmp_path, tiny_model):
    made = language(tmp_path, tiny_model("llama"), pair_rows(60))
    write_rows(tmp_path / "general.jsonl", class_rows(4))
    spec = spec_of(final_cells(made, "full", 1e-3)[0], made.name, made.general_text)
    with pytest.raises(DataError, match="expected 9 windows of 32"):
        run_cell(spec, tmp_path / "work")
    assert not (tmp_path / "work").exists(), "no run was begun"
