"""The step benchmark runs from end to end; its numbers are of no interest here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.assets
def test_all_sides_step_in_turn_and_learn_the_same(tmp_path):
    command = [sys.executable, "benchmarks/step_time.py", "--model", "bert-tiny", "--rows", "2", "--tokens", "16"]
    command += ["--repeats", "2", "--dropout", "0", "--sides", "full", "peft", "fused", "int8"]
    command += ["--out", str(tmp_path / "out.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == json.loads(run.stdout)
    assert all(found[side]["peak_bytes"] > 0 and len(found[side]["losses"]) == 4 for side in ("full", "peft", "fused"))
    assert found["int8/peft"]["bytes"] < found["fused/peft"]["bytes"] < 1
    for got, want in zip(found["int8"]["losses"], found["peft"]["losses"], strict=True):
        assert abs(got - want) < 0.05
    assert {"int8/peft", "int8/full", "int8/fused", "fused/peft", "fused/full"} <= found.keys()
    assert "--model bert-tiny" in found["command"]
