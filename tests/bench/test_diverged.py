"""A method all of whose learning rates diverge: what the bench says of it, and how it goes on."""

import json

import pytest
from click.testing import CliRunner
from driver import FAKE

from peft_engine.bench import running
from peft_engine.bench.results import open_results
from peft_engine.cli import cli
from peft_engine.errors import ConfigError, EngineError
from suites import SUITE, titles, write_suite

CALL = ["bench", "suite.yaml", "--output", "out"]
DIVERGE = {f"lora/rate-{rate}": "fail 5" for rate in ("0.0001", "0.001", "0.01")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which lora diverged, whatever its rate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_CELLS", str(tmp_path / "table.json"))
    monkeypatch.setattr(running, "CELL", FAKE)
    monkeypatch.setattr("peft_engine.bench.report.write_report", lambda folder: None)
    write_suite(tmp_path / "suite.yaml")
    (tmp_path / "table.json").write_text(json.dumps(DIVERGE))
    return tmp_path


def failure(*more):
    outcome = CliRunner().invoke(cli, [*CALL, *more])
    assert isinstance(outcome.exception, EngineError)
    return outcome.exception


def test_it_says_that_the_grid_must_be_another(place):
    for _ in range(2):  # the second call has nothing to run
        error = failure()
        assert error.exit_code == 5
        assert error.problem == "Every learning rate diverged of lora (0.0001, 0.001, 0.01)."
        assert error.fix.startswith("Lower tuning.learning_rates, or give own learning_rates to lora: ")
    assert len((place / "started").read_text().splitlines()) == 1 + 3 + 2
    assert open_results("suite.yaml", "out").waiting() == {}


def test_a_dry_run_counts_none_of_its_final_cells(place):
    failure()
    outcome = CliRunner().invoke(cli, [*CALL, "--dry-run"])
    assert outcome.exit_code == 0
    assert "lora-final: can't run, every learning rate of its grid diverged (0.0001, 0.001, 0.01)" in outcome.stdout
    assert "6 cells, 0 of them to run" in outcome.stdout
    assert "about 0.0 minutes" in outcome.stdout
    found = json.loads(CliRunner().invoke(cli, [*CALL, "--dry-run", "--json"]).stdout)
    assert (found["waiting_for_learning_rate"], found["failed"]) == ({}, [])
    assert found["diverged"] == {"lora": [1e-4, 1e-3, 1e-2]}
    assert found["predicted"]["seconds"] == 0


def test_by_its_name(place):
    failure()
    error = failure("--only", "lora-final")
    assert isinstance(error, ConfigError)
    assert "--only lora-final: none can run: Every learning rate diverged of lora (0.0001" in error.problem
    assert CliRunner().invoke(cli, [*CALL, "--only", "full"]).exit_code == 0


def test_a_lower_grid_goes_on(place):
    methods = {**SUITE["methods"], "lora": {**SUITE["methods"]["lora"], "learning_rates": [1e-4, 1e-3]}}
    write_suite(place / "suite.yaml", methods=methods)
    assert failure().fix.startswith("Lower methods.lora.learning_rates: the same rates would diverge again")
    methods["lora"]["learning_rates"] = [1e-5, 1e-4]
    write_suite(place / "suite.yaml", methods=methods)
    assert CliRunner().invoke(cli, CALL).exit_code == 0
    finals = ["lora-final-0", "lora-final-1"]
    assert titles(place / "out") == ["baseline-baseline-0", "full-final-0", "full-final-1", *finals, "lora-tuning-1000"]


def test_beside_a_cell_that_failed(place):
    (place / "table.json").write_text(json.dumps(DIVERGE | {"full/seed-1": "fail 4"}))
    error = failure()
    assert error.exit_code == 4
    assert error.problem.splitlines()[:2] == ["1 cell failed:", "  full/seed-1: told to fail with 4"]
    assert "Every learning rate diverged of lora" in error.problem
    assert "the same command tries again. Lower tuning" in error.fix
