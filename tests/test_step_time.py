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
    command += ["--repeats", "2", "--dropout", "0", "--out", str(tmp_path / "out.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == json.loads(run.stdout)
    assert all(found[side]["peak_bytes"] > 0 and len(found[side]["losses"]) == 4 for side in ("full", "peft", "fused"))
    assert found["fused/peft"]["bytes"] < 1
    assert "--model bert-tiny" in found["command"]
