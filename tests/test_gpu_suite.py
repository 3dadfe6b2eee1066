"""The GPU benchmark runs in small on a CPU; its bench refuses ratios on red cells and keeps what was measured."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu_suite
from gpu_parts import context, correctness
from gpu_parts.bench import Bench, Check, OutOfTimeError, Prepared, compare, optional, relative_error

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench("toy", True, tmp_path / "toy.json", 60, torch.device("cpu"))


def right() -> list[Check]:
    return [Check(["y"], [0.01], [0.011], 1e-3)]


def wrong() -> list[Check]:
    return [Check(["y"], [0.01], [0.02], 1e-3)]


def toy(bench: Bench, check=right, **contenders) -> dict:
    contenders = contenders or {"ours": lambda i: time.sleep(0.001), "plain": lambda i: time.sleep(0.02)}
    return bench.cell("toy", {"M": 3}, contenders, check=check, versus={"ours": ["plain"]}, facts={"floor_ms": 0.5})


def test_a_green_cell_has_a_ratio(bench):
    cell = toy(bench)
    assert cell["green"]
    assert cell["contenders"]["ours"]["faster_than"]["plain"] > 2
    assert cell["errors"] == {"y": {"plain": 0.01, "ours": 0.011}}


def test_a_red_cell_has_times_and_no_ratio(bench):
    cell = toy(bench, wrong)
    assert not cell["green"]
    assert "error 0.02, plain torch's is 0.01" in cell["why"]
    assert cell["contenders"]["ours"]["ms"] > 0
    assert "faster_than" not in cell["contenders"]["ours"]
    assert bench.red == 1


def test_a_check_that_raises_or_says_nothing_is_red(bench):
    def raises():
        raise RuntimeError("no such kernel")

    assert "no such kernel" in toy(bench, raises)["why"]
    assert not toy(bench, list)["green"]


def test_a_contender_that_fails_is_recorded_and_the_others_go_on(bench):
    def memory(i):
        raise torch.cuda.OutOfMemoryError

    later = iter(range(1))
    cell = toy(bench, ours=lambda i: None, plain=memory, fragile=lambda i: next(later))
    assert cell["contenders"]["plain"] == {"error": "out of memory"}
    assert "StopIteration" in cell["contenders"]["fragile"]["error"]
    assert "ms" in cell["contenders"]["ours"]
    assert cell["contenders"]["ours"]["faster_than"] == {}


def test_what_a_contender_needs_first_is_not_timed(bench):
    calls = []

    def prepare():
        calls.append("prepare")
        time.sleep(0.05)

    cell = toy(bench, ours=Prepared(lambda i: calls.append("run"), prepare), plain=lambda i: None)
    assert calls[0] == "prepare"
    assert calls.count("prepare") >= 3
    assert cell["contenders"]["ours"]["ms"] < 25


def test_no_cell_starts_after_the_budget(bench):
    bench.budget = 0
    with pytest.raises(OutOfTimeError):
        toy(bench)
    assert bench.cells == []


def test_errors_are_relative_and_nothing_infinite_passes():
    truth = torch.tensor([3.0, 4.0])
    assert relative_error(truth, truth) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.tensor([3.0, torch.inf]), truth))
    assert relative_error(torch.tensor([0.5]), torch.zeros(1)) == 0.5
    close, far, broken = (torch.tensor([3.0, 4.0 + gap]) for gap in (0.01, 0.1, torch.nan))
    assert compare(["y"], [truth], [close], [close], 1e-3).faults() == []
    assert compare(["y"], [truth], [close], [far], 1e-3).faults()
    assert compare(["y"], [truth], [close], [broken], 1e-3).faults()


def test_runs_are_appended_and_tabled(tmp_path):
    path = tmp_path / "deep" / "toy.json"
    for check in (right, wrong):
        bench = Bench("toy", True, path, 60, torch.device("cpu"))
        toy(bench, check)
        toy(bench, check)
    runs = json.loads(path.read_text())["runs"]
    assert [[cell["green"] for cell in run["cells"]] for run in runs] == [[True, True], [False, False]]
    about = runs[0]["context"]
    assert about["date"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["hardware"]["device"] == "cpu"
    assert about["command"].startswith("python ")
    assert runs[0]["ceilings"]["bytes_per_second"] > 0
    table = path.with_suffix(".md").read_text()
    assert table.count("| toy M=3 | ours |") == 4
    assert table.count("RED,") == 2
    assert [found.name for found in path.parent.iterdir() if found.suffix == ".part"] == []


def test_the_commit_can_be_named_where_there_is_no_history(monkeypatch, tmp_path):
    monkeypatch.delenv("PEFT_ENGINE_COMMIT", raising=False)
    assert len(context.commit().rstrip("+")) == 40
    monkeypatch.setattr(context, "ROOT", tmp_path)
    assert context.commit().startswith("unknown")
    monkeypatch.setenv("PEFT_ENGINE_COMMIT", "abc")
    assert context.commit() == "abc"


def test_what_is_not_there_is_noted_once(bench):
    def missing():
        raise ModuleNotFoundError("No module named 'liger_kernel'")

    assert optional(bench, "liger", missing) == {}
    assert optional(bench, "liger", missing) == {}
    assert bench.notes == ["liger left out: ModuleNotFoundError: No module named 'liger_kernel'"]


def test_failing_tests_make_a_red_cell_that_names_them(tmp_path):
    file = tmp_path / "test_toy.py"
    file.write_text("def test_good():\n    pass\n")
    assert correctness.tests_of(file, 60)["settings"] == {"passed": 1, "failures": 0, "errors": 0, "skipped": 0}
    file.write_text("def test_good():\n    pass\n\ndef test_bad():\n    assert 0\n")
    cell = correctness.tests_of(file, 60)
    assert (cell["green"], cell["failed"], cell["settings"]["passed"]) == (False, ["test_bad"], 1)
    file.write_text("import pytest\n\n@pytest.mark.skip\ndef test_good():\n    pass\n")
    assert not correctness.tests_of(file, 60)["green"], "nothing ran, so nothing is right"


def test_a_part_that_breaks_off_keeps_its_cells_and_fails(tmp_path, monkeypatch):
    from gpu_parts import loss

    def breaks(bench):
        toy(bench)
        raise RuntimeError("card fell off")

    monkeypatch.setattr(loss, "run", breaks)
    assert gpu_suite.main(["--part", "loss", "--smoke", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("smoke_*_loss.json")
    (run,) = json.loads(path.read_text())["runs"]
    assert len(run["cells"]) == 1
    assert "card fell off" in run["notes"][0]


def test_a_spent_budget_stops_a_part_cleanly(tmp_path, capsys):
    assert gpu_suite.main(["--part", "loss", "--smoke", "--out", str(tmp_path), "--budget", "0"]) == 0
    assert "further cells did not start" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_suite.main(["--part", "loss"]) == 2
    assert "--smoke" in capsys.readouterr().err


def test_the_loss_part_in_small(tmp_path):
    assert gpu_suite.main(["--part", "loss", "--smoke", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("smoke_*_loss.json")
    cells = json.loads(path.read_text())["runs"][0]["cells"]
    assert [cell["settings"]["head"] for cell in cells] == ["frozen", "trained"]
    assert list(cells[1]["errors"]) == ["loss", "dhidden", "dweight"]


def test_the_eight_bit_part_in_small(tmp_path):
    assert gpu_suite.main(["--part", "eight_bit", "--smoke", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("smoke_*_eight_bit.json")
    (run,) = json.loads(path.read_text())["runs"]
    layer, step, dropless, *kernels = run["cells"]
    assert [cell["settings"]["p"] for cell in (layer, step, dropless)] == [0.05, 0.05, 0.0]
    assert [cell["cell"] for cell in kernels] == ["quantise rows", "product", "product back"]
    for cell in (layer, step, dropless):
        assert set(cell["contenders"]["ours int8"]["faster_than"]) == {"ours full", "peft"}
    assert {"y (int8), bound 0.02", "dA (int8)"} <= set(layer["errors"])
    notes = "\n".join(run["notes"])
    for text in ("fp8 left out", "torchao int8 left out", "linears, the largest error", "training step, ours int8:"):
        assert text in notes


def test_the_quantised_part_in_small(tmp_path):
    assert gpu_suite.main(["--part", "quantised", "--smoke", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("smoke_*_quantised.json")
    (run,) = json.loads(path.read_text())["runs"]
    names = [cell["cell"] for cell in run["cells"]]
    assert names == ["unpack", "unpack", "lora_linear forward+backward", "training step", "few rows", "few rows"]
    _, _, layer, step, *_ = run["cells"]
    assert set(layer["contenders"]["ours nf4"]["faster_than"]) == {"ours full", "peft nf4"}
    assert {"y (nf4)", "dA (int8)"} <= set(layer["errors"])
    assert set(step["contenders"]["ours nf4"]["faster_than"]) == {"peft nf4"}
    assert any("14 linears in nf4" in note for note in run["notes"])


def test_the_levers_part_in_small(tmp_path):
    from gpu_parts.levers import LEVERS

    assert gpu_suite.main(["--part", "levers", "--smoke", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("smoke_*_levers.json")
    cells = json.loads(path.read_text())["runs"][0]["cells"]
    assert [cell["settings"]["lever"] for cell in cells] == list(LEVERS)
    for cell, lever in zip(cells, LEVERS, strict=True):
        assert set(cell["contenders"][lever]["faster_than"]) == {"no lever"}
        held = {name: one["more"]["held"] for name, one in cell["contenders"].items()}
        if lever in ("layers on the host", "all three"):
            assert 0 < held[lever] < held["no lever"], lever
        else:
            assert 0 < held[lever] == held["no lever"], lever


def test_a_step_that_froze_nothing_is_red(bench, monkeypatch):
    from gpu_parts import eight_bit, step, training

    real = training.fuse
    monkeypatch.setattr(training, "fuse", lambda *model, **given: real(*model, **given, frozen_error_bound=1e-9))
    eight_bit.step_cell(bench, ["int8"], step.TINY, 0.05)
    (cell,) = bench.cells
    assert "no linear multiplies in int8" in cell["why"]
    assert "ours int8" not in cell["contenders"]


@pytest.mark.slow
def test_every_part_runs_in_small(tmp_path):
    """As it is run on a machine without an installed project."""
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_suite.py", "--part", "all", "--smoke", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {path.stem.split("_", 2)[2]: json.loads(path.read_text())["runs"][0] for path in tmp_path.glob("*.json")}
    assert set(runs) == set(gpu_suite.PARTS)
    for name, run in runs.items():
        assert run["cells"], name
        assert all(cell["green"] for cell in run["cells"]), name
        assert not any("broke off" in note for note in run["notes"]), name
        for cell in run["cells"]:
            assert not [one for one in cell["contenders"].values() if "error" in one], cell
    steps = runs["step"]["cells"]
    assert {cell["settings"]["checkpointing"] for cell in steps} == {True, False}
    assert {cell["settings"]["p"] for cell in steps} == {0.0, 0.05}
    assert "swapped" in runs["step"]["notes"][0]
