"""Part `correctness`: every kernel test with real CUDA, one file after another, bf16 and fp16 as the card has them."""

import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from .bench import Bench
from .context import ROOT

FIRST = ("test_lora_linear", "test_linear_cross_entropy", "test_dropout")


def run(bench: Bench) -> None:
    files = sorted(
        (ROOT / "tests" / "kernels").glob("test_*.py"), key=lambda path: (not path.stem.startswith(FIRST), path.name)
    )
    if bench.smoke:
        files = [path for path in files if path.name == "test_launch.py"]
    for path in files:
        bench.room()
        bench.add(tests_of(path, limit=bench.budget - (time.monotonic() - bench.start)))


def tests_of(path: Path, limit: float) -> dict[str, Any]:
    """The file's cell: how many tests passed, and the names of those that did not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(path)]
        try:
            done = subprocess.run(
                [*command, f"--junitxml={report}"],
                cwd=ROOT,
                env=environment | {"HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(30, limit),
            )
            status, text = done.returncode, done.stdout
        except subprocess.TimeoutExpired as late:
            status, text = -1, f"{late}"
        counts, failed = read_report(report) if report.is_file() else ({}, [])
    passed = counts.get("tests", 0) - sum(counts.get(name, 0) for name in ("errors", "failures", "skipped"))
    green = status == 0 and passed > 0
    last = re.sub(r"\s+", " ", text.strip()[-600:])
    return {
        "cell": path.stem,
        "settings": {"passed": passed, **{name: counts.get(name, 0) for name in ("failures", "errors", "skipped")}},
        "facts": {},
        "contenders": {},
        "green": green,
        "why": "" if green else f"status {status}; {', '.join(failed[:20])}; {last}",
        "failed": failed,
        "output": "" if green else text[-20000:],
    }


def read_report(path: Path) -> tuple[dict[str, int], list[str]]:
    """Totals of a JUnit file, and its failed tests."""
    root = ElementTree.parse(path).getroot()
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in root.iter("testsuite"))
        for name in ("tests", "failures", "errors", "skipped")
    }
    failed = [
        case.get("name", "")
        for case in root.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts, failed
