"""The queue of a suite's cells, with fake cells: order, learning rates, failures, resume."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from driver import FAKE

from peft_engine.bench.forecast import forecast
from peft_engine.bench.results import Results, open_results
from peft_engine.bench.running import Bench, worst
from peft_engine.bench.suite import load_suite
from peft_engine.errors import ConfigError, EngineError, Interrupted, StorageError
from peft_engine.run_directory import RunDirectory
from suites import SUITE, content, titles, write_suite

ALL = [
    "baseline-baseline-0",
    "full-final-0",
    "full-final-1",
    "lora-final-0",
    "lora-final-1",
    *["lora-tuning-1000"] * 3,
]
Go = Callable[..., Results]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a suite and a table of what its fake cells do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_CELLS", str(tmp_path / "table.json"))
    write_suite(tmp_path / "suite.yaml")
    (tmp_path / "table.json").write_text("{}")
    return tmp_path


@pytest.fixture
def go(place: Path) -> Go:
    def run(table: dict[str, Any] | None = None, **settings: Any) -> Results:
        if table is not None:
            (place / "table.json").write_text(json.dumps(table))
        results = open_results("suite.yaml", "out")
        run.said = []  # type: ignore[attr-defined]
        Bench(results, run.said.append, program=FAKE, **settings).run()  # type: ignore[attr-defined]
        return results

    return run


def started(place: Path) -> list[str]:
    """Titles of the cells that were started since the last look."""
    file = place / "started"
    found = [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def test_the_search_comes_before_the_final_cells_that_need_it(go, place):
    results = go({"lora/rate-0.001": [0.1, 0.9], "lora/rate-0.01": [0.95, 0.8]})
    assert titles(place / "out") == ALL
    order = started(place)
    assert order[0] == "baseline"
    assert order[-4:] == ["full/seed-0", "lora/seed-0", "full/seed-1", "lora/seed-1"], "seed by seed"
    chosen = results.choice("lora")
    assert (chosen["learning_rate"], chosen["edge"]) == (1e-3, None), "by the last evaluation, not the best"
    finals = [cell for cell in results.cells() if (cell.method, cell.kind) == ("lora", "final")]
    assert [cell.learning_rate for cell in finals] == [1e-3, 1e-3]
    records = content(place / "out")
    assert records[f"{finals[0].name}.json"]["run_info"]["tuned"] == chosen
    assert records[f"{finals[0].name}.json"]["train_info"]["forgetting"] == {"before": 3.0}, "the baseline's"
    assert json.loads((place / "out/tuning.json").read_text())["lora"] == chosen
    left = sorted(path.suffix for path in (place / "out/work").iterdir())
    assert left == [".log"] * 8, "work goes, logs stay"


@pytest.mark.parametrize(
    ("values", "maximize", "rate", "edge"),
    [
        ((0.7, 0.7, 0.6), True, 1e-4, "lowest"),
        ((0.6, 0.7, 0.7), True, 1e-3, None),
        ((0.6, 0.7, 0.8), True, 1e-2, "highest"),
        ((0.6, 0.5, 0.5), False, 1e-3, None),
    ],
)
def test_choice_of_a_learning_rate(go, values, maximize, rate, edge):
    names = ("lora/rate-0.0001", "lora/rate-0.001", "lora/rate-0.01")
    table = {name: [0.99, value] for name, value in zip(names, values, strict=True)}
    results = go({**table, "maximize": maximize}, only="lora-tuning")
    chosen = results.choice("lora")
    assert (chosen["learning_rate"], chosen["edge"], chosen["maximize"]) == (rate, edge, maximize)


def test_what_is_there_is_kept(go, place):
    go()
    before = content(place / "out")
    started(place)
    go()
    assert started(place) == []
    assert content(place / "out") == before


def test_a_damaged_record_is_named_and_made_again(go, place):
    go()
    before = content(place / "out")
    started(place)
    broken = sorted((place / "out/cells").glob("full-final-*.json"))
    broken[0].write_text(broken[0].read_text().replace("0.75", "0.95"))
    broken[1].write_text(broken[1].read_text()[:-40])
    results = open_results("suite.yaml", "out")
    assert set(results.damaged) == {path.stem for path in broken}
    assert not set(results.records) & set(results.damaged), "never read as results"
    go()
    assert sorted(started(place)) == ["full/seed-0", "full/seed-1"]
    assert all(any(path.name in line for line in go.said) for path in broken)
    assert content(place / "out") == before


def test_a_damaged_search_record_costs_that_record_only(go, place):
    go({"lora/rate-0.001": [0.1, 0.9]})
    before = content(place / "out")
    started(place)
    broken = sorted((place / "out/cells").glob("lora-tuning-*.json"))[0]
    broken.write_text(broken.read_text()[:-40])
    go(only="full")
    assert started(place) == []
    assert len(list((place / "out/cells").glob("lora-final-*.json"))) == 2, "they wait for the search"
    go()
    assert len(started(place)) == 1
    assert content(place / "out") == before
    assert not (place / "out/other").exists()


def test_a_search_that_chooses_otherwise_puts_the_old_final_cells_aside(go, place):
    go({"lora/rate-0.001": [0.1, 0.9]})
    broken = sorted((place / "out/cells").glob("lora-tuning-1000-0.01-*.json"))[0]
    broken.write_text(broken.read_text()[:-40])
    results = go({"lora/rate-0.001": [0.1, 0.9], "lora/rate-0.01": [0.1, 0.99]})
    assert [cell.learning_rate for cell in results.cells() if cell.name.startswith("lora-final")] == [0.01, 0.01]
    assert titles(place / "out") == ALL
    assert len(list((place / "out/other").glob("lora-final-*.json"))) == 2


@pytest.mark.parametrize("content", ["NaN", "1e999", '"\\ud800"', "[" * 100000])
def test_a_record_that_no_checksum_can_be_made_of_is_damaged(go, place, content):
    go()
    broken = sorted((place / "out/cells").glob("full-final-*.json"))[0]
    broken.write_text(broken.read_text().replace('"key":', f'"x": {content}, "key":', 1))
    assert set(open_results("suite.yaml", "out").damaged) == {broken.stem}


@pytest.mark.parametrize("content", ["[]", "{}", "{"])
def test_a_failure_that_cannot_be_read_is_none(go, place, content):
    go({"full/seed-1": "fail 4"})
    failed = next((place / "out/failed").glob("full-final-1-*.json"))
    failed.write_text(content)
    assert open_results("suite.yaml", "out").failures == {}
    go({})
    assert titles(place / "out") == ALL


def test_a_name_that_no_cell_has_is_refused(place):
    from click.testing import CliRunner

    from peft_engine.cli import cli

    for pattern, told in (("lroa", "has such a name."), ("lora-final", "yet: they wait for their learning rates")):
        outcome = CliRunner().invoke(cli, ["bench", "suite.yaml", "--output", "out", "--only", pattern])
        assert isinstance(outcome.exception, ConfigError)
        assert told in outcome.exception.problem


def test_a_failure_does_not_stop_the_others_and_is_tried_again(go, place):
    results = go({"full/seed-0": "fail 4", "full/seed-1": "die", "lora/seed-1": "lie"})
    assert titles(place / "out") == [
        name for name in ALL if name not in ("full-final-0", "full-final-1", "lora-final-1")
    ]
    assert titles(place / "out", "failed") == ["full-final-0", "full-final-1", "lora-final-1"]
    failures = {"-".join(name.split("-")[:3]): one for name, one in results.failures.items()}
    told = failures["full-final-0"]
    assert (told["reason"], told["exit_code"], told["log_tail"]) == (
        "told to fail with 4",
        4,
        ["a line of the log"],
    )
    assert "SIGKILL" in failures["full-final-1"]["reason"]
    assert "checksum" in failures["lora-final-1"]["reason"]
    started(place)
    go({"full/seed-0": "fail 4"})
    assert sorted(started(place)) == ["full/seed-0", "full/seed-1", "lora/seed-1"]
    assert titles(place / "out", "failed") == ["full-final-0"]


def test_a_rate_that_diverges_is_out_of_the_choice(go, place):
    results = go({"lora/rate-0.01": "fail 5", "lora/rate-0.001": [0.9]})
    assert results.choice("lora")["learning_rate"] == 1e-3
    assert results.choice("lora")["candidates"][2] == {"learning_rate": 1e-2, "value": None}
    assert results.choice("lora")["edge"] is None
    started(place)
    go()
    assert started(place) == [], "it would diverge again"


def test_final_cells_wait_for_every_learning_rate(go, place):
    results = go({"lora/rate-0.01": "fail 1"})
    assert results.choice("lora") is None
    assert results.waiting() == {"lora": 2}
    assert "lora-final-0" not in titles(place / "out")
    go({})
    assert titles(place / "out") == ALL


def test_only_and_limit(go, place):
    go(only="full")
    assert started(place) == ["full/seed-0", "full/seed-1"]
    go(only="*-tuning-1000-0.01-*")
    assert started(place) == ["lora/rate-0.01"]
    go(limit=2)
    assert started(place) == ["baseline", "lora/rate-0.0001"]
    go(limit=2)
    assert started(place) == ["lora/rate-0.001", "lora/seed-0"]


def test_several_cells_at_once_share_the_cores(go, place, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    go(jobs=3)
    threads = {line.split()[2] for line in (place / "started").read_text().splitlines()}
    assert threads == {"2"}
    assert titles(place / "out") == ALL


def test_other_settings_are_put_aside_and_come_back(go, place):
    go()
    before = content(place / "out")
    write_suite(place / "suite.yaml", budget={"steps": 4})
    started(place)
    go()
    assert len(started(place)) == 7, "all but the untouched model"
    assert titles(place / "out") == ALL
    assert len(list((place / "out/other").iterdir())) == 7
    assert any("other settings" in line for line in go.said)
    write_suite(place / "suite.yaml")
    go()
    assert started(place) == []
    assert content(place / "out") == before


def test_changed_data_opens_the_cells_again(go, place):
    (place / "rows.jsonl").write_text("one")
    first = [cell.key for cell in open_results("suite.yaml", "out").cells()]
    (place / "rows.jsonl").write_text("three")
    assert not set(first) & {cell.key for cell in open_results("suite.yaml", "out").cells()}


def test_another_suite_of_the_same_folder_is_refused(go, place):
    go(limit=1)
    write_suite(place / "suite.yaml", name="other")
    with pytest.raises(ConfigError, match="holds the results of the suite tiny"):
        open_results("suite.yaml", "out")


def test_one_bench_at_a_time(go, place):
    with RunDirectory(place / "out"), pytest.raises(StorageError, match="another process"):
        go()
    assert started(place) == []


def test_a_failed_baseline_stops_the_bench(go, place):
    for jobs in (1, 2):
        with pytest.raises(
            EngineError, match="baseline: told to fail with 3 don't No other cell was started"
        ) as caught:
            go({"baseline": "fail 3"}, jobs=jobs)
        assert caught.value.exit_code == 3
        assert "--only METHOD" in caught.value.fix
        assert started(place) == ["baseline"]
        assert titles(place / "out", "failed") == ["baseline-baseline-0"]
    go({"baseline": "fail 3"}, only="full")
    assert started(place) == ["full/seed-0", "full/seed-1"]
    go({}, jobs=2)
    assert titles(place / "out") == ALL


@pytest.mark.parametrize("content", ["name: tiny\nmethods: {full", "", "- 1\n", "name: tiny\nsead: 3\n"])
def test_a_suite_in_the_results_that_cannot_be_read_is_put_aside(go, place, content):
    go()
    started(place)
    (place / "out/suite.yaml").write_text(content)
    go()
    assert started(place) == []
    assert (place / "out/suite.yaml.broken").read_text() == content
    assert sum("put aside as suite.yaml.broken" in line for line in go.said) == 1
    assert load_suite(place / "out/suite.yaml") == load_suite(place / "suite.yaml")
    (place / "out/suite.yaml").write_text(content)
    write_suite(place / "suite.yaml", name="other")
    with pytest.raises(ConfigError, match="holds the results of the suite tiny"):
        open_results("suite.yaml", "out")


def in_background(place: Path, folder: str) -> subprocess.Popen[str]:
    """A bench whose cell `lora/seed-0` sleeps; returns once that has begun."""
    (place / "table.json").write_text(json.dumps({"lora/seed-0": "sleep"}))
    words = [sys.executable, FAKE[1].replace("fake_cell", "driver"), "suite.yaml", folder]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while "lora/seed-0" not in (place / "started").read_text() if (place / "started").exists() else True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    return process


def sleeper(place: Path) -> int:
    return int((place / "started").read_text().splitlines()[-1].split()[1])


def gone(pid: int) -> bool:
    """Whether a process ends within a few seconds."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_killed_and_resumed_it_gives_the_same_records(go, place):
    process = in_background(place, "killed")
    process.kill()
    process.communicate()
    assert gone(sleeper(place)), "a cell ends with its bench"
    assert titles(place / "killed") == [
        name for name in ALL if name not in ("lora-final-0", "full-final-1", "lora-final-1")
    ]
    assert not list((place / "killed").rglob("*.part"))
    (place / "table.json").write_text("{}")
    started(place)
    assert Bench(open_results("suite.yaml", "killed"), print, program=FAKE).run() is None
    assert started(place) == ["lora/seed-0", "full/seed-1", "lora/seed-1"]
    go()
    assert content(place / "killed") == content(place / "out")


def test_a_signal_ends_the_cells_too(place):
    process = in_background(place, "out")
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == Interrupted.exit_code
    assert "SIGTERM" in told
    assert gone(sleeper(place))
    assert titles(place / "out", "failed") == [], "what was stopped has not failed"
    assert not [path for path in (place / "out/work").iterdir() if path.is_dir()]


def test_forecast(go, place):
    results = open_results("suite.yaml", "out")
    assert forecast(results, results.cells(), results.waiting())["seconds"] is None
    go(only="baseline")
    results.read()
    assert forecast(results, results.cells(), {})["seconds"] is None, "the untouched model trains nothing"
    results = go(only="full-final-0")
    opened = [cell for cell in results.cells() if results.state(cell) == "open"]
    told = forecast(results, opened, results.waiting())
    # full takes 10 s and 6 s of training; lora, not run yet, is taken for as slow: 3 searches of half the steps, 2 runs
    assert told["seconds"] == (10 + 6) + 3 * (10 + 3) + 2 * (10 + 6)
    assert "lora, not run yet" in told["of"]
    assert forecast(results, opened, results.waiting(), jobs=2)["seconds"] == told["seconds"] / 2


def test_worst_exit_code():
    assert [worst(codes) for codes in ([], [5], [5, 4], [3, 2], [4, 1], [8, 4])] == [0, 5, 4, 2, 1, 8]


def test_the_command_line(place, monkeypatch):
    from click.testing import CliRunner

    from peft_engine.bench import running
    from peft_engine.cli import cli

    reported: list[Path] = []
    monkeypatch.setattr(running, "CELL", FAKE)
    monkeypatch.setattr("peft_engine.bench.report.write_report", reported.append)
    (place / "table.json").write_text(json.dumps({"lora/rate-0.01": [0.9], "full/seed-1": "fail 4"}))
    call = ["bench", "suite.yaml", "--output", "out"]
    dry = CliRunner().invoke(cli, [*call, "--dry-run"])
    assert "8 cells, 8 of them to run" in dry.stdout
    assert "time: about 2.4 minutes; the suite states 5 (by a probe of full, 3 steps: " in dry.stdout
    assert sorted(path.name for path in place.iterdir()) == ["started", "suite.yaml", "table.json"], "it writes nothing"
    done = CliRunner().invoke(cli, call)
    assert isinstance(done.exception, EngineError)
    assert done.exception.exit_code == 4
    assert "full/seed-1: told to fail with 4" in str(done.exception)
    assert "lora's learning rate 0.01 is the highest of its grid" in done.stdout
    found = json.loads(CliRunner().invoke(cli, [*call, "--dry-run", "--json"]).stdout)
    assert found["at_the_edge"] == {"lora": "highest"}
    assert [cell["state"] for cell in found["cells"]].count("done") == 7
    assert len(found["open"]) == 1
    assert found["predicted"]["seconds"] == 16
    (place / "table.json").write_text("{}")
    assert CliRunner().invoke(cli, call).exit_code == 0
    assert reported == [Path("out")] * 2, "also of what is there beside a failure"


def test_suite_is_unchanged_by_reading(go, place):
    go(limit=1)
    assert load_suite(place / "out/suite.yaml") == load_suite(place / "suite.yaml")
    assert load_suite("suite.yaml").methods["lora"].adapter == SUITE["methods"]["lora"]["adapter"]
