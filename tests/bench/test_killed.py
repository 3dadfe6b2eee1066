"""Real cells of a tiny model: killed in the middle, a record damaged, resumed; and how long they were said to take."""

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
from tiny import class_rows, write_rows

from suites import write_suite

BENCH = [sys.executable, "-m", "peft_engine", "bench", "suite.yaml", "--output"]
SAME = (  # of a method's numbers: what is no time
    "metrics",
    "difference",
    "gain_kept",
    "per_class",
    "train_curves",
    "eval_curves",
    "memory",
    "peak_bytes",
    "optimizer_state_bytes",
    "trainable_parameters",
    "adapter_file_bytes",
    "flops_per_step",
)


@pytest.fixture
def place(tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", class_rows(80))
    config = {
        "task": "text-classification",
        "device": "cpu",
        "model": {"path": str(tiny_model("bert"))},
        "data": {"train": "rows.jsonl", "cache": None, "split": {"eval": 0.2, "test": 0.3}},
        "training": {"batch_size": 8, "log_every": 1},
    }
    methods = {
        "full": {"adapter": {"method": "full"}, "learning_rates": [1e-3]},
        "lora": {"adapter": {"method": "lora", "rank": 2}, "learning_rates": [1e-3, 1e-2]},
    }
    write_suite(tmp_path / "suite.yaml", config=config, methods=methods, budget={"steps": 4}, seeds=[0])
    return tmp_path


def bench(*words: str) -> Any:
    done = subprocess.run([*BENCH, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def killed_in(folder: Path, cell: str) -> None:
    """A bench whose process group is killed while this cell trains; its cell ends with it."""
    process = subprocess.Popen(
        [*BENCH, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + 300
    while not list(folder.glob(f"work/{cell}-*/run/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(children) == 1
    while Path(f"/proc/{children[0]}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def numbers(folder: Path) -> Any:
    """The report without times."""
    found = json.loads((folder / "report.json").read_text())
    rows = [
        {name: row[name] for name in ("name", "place", "places", "not_told_apart_from")}
        | {name: row["train_info"][name] for name in SAME}
        | {"learning_rate": row["run_info"]["learning_rate"], "seeds": row["run_info"]["seeds"]}
        for row in found["results"]
    ]
    kept = ("primary", "before", "learning_rates", "failed", "missing", "left_out")
    cells = sorted((cell["key"], cell["train_info"]["metrics_after"]) for cell in found["cells"])
    return rows, {name: found[name] for name in kept}, json.dumps(cells, sort_keys=True)


@pytest.mark.slow
def test_killed_in_a_real_cell_and_resumed(place):
    predicted = json.loads(bench("whole", "--dry-run", "--json"))["predicted"]
    assert not Path("whole").exists()
    began = time.monotonic()
    bench("whole")
    took = time.monotonic() - began
    assert 0.5 < predicted["seconds"] / took < 2, (predicted, took)

    folder = Path("killed")
    killed_in(folder, "lora-final-0")
    left = sorted(path.name for path in (folder / "cells").glob("*.json"))
    assert len(left) == 4, "all but lora's final cell"
    assert not (folder / "report.json").exists()
    (damaged,) = (folder / "cells").glob("full-final-*.json")
    damaged.write_text(damaged.read_text()[:-100])
    done = subprocess.run([*BENCH, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0
    assert damaged.name in done.stderr
    assert [line.split()[1] for line in done.stderr.splitlines() if line.startswith("[")] == [
        "full/seed-0",
        "lora/seed-0",
    ]
    assert numbers(folder) == numbers(Path("whole"))
    (command,) = json.loads((folder / "report.json").read_text())["run_info"]["commands"]
    assert command == "python -m peft_engine bench suite.yaml --output killed"
    assert not list(folder.rglob("*.part"))
