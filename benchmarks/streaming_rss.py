"""How much more memory a million streamed rows take than a thousand, and where a killed run goes on.

    python benchmarks/streaming_rss.py --rows 1000000

Writes a seeded JSONL file, trains a few steps of it with `data.streaming` in a process of its own, and samples that
process's resident memory (anonymous and file-backed) from /proc the whole time; the same with 1,000 rows is what the
growth is measured against. Then the same run once more (its rows and tokens are made anew), killed with SIGKILL in
training and resumed: its steps must have the very rows of the undisturbed run, and its adapter the same bytes.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SENTENCE = "the quick brown fox jumps over a lazy dog while seven grey cats watch from an old wall near the river"
WORDS = SENTENCE.split(" ")
STEPS, SAVE_EVERY, KILL_AT = 60, 10, 35


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", default=".assets/models/bert-tiny")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        train_noting_rows(json.loads(arguments.run))
        return
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measure(arguments.rows, arguments.model, Path(name)), indent=2))


def measure(rows: int, model: str, folder: Path) -> dict[str, Any]:
    """All runs; numbers as the report prints them."""
    small, large = write(folder / "small.jsonl", 1000, 1), write(folder / "large.jsonl", rows, 1)
    held = write(folder / "eval.jsonl", 512, 2)
    base = watch(settings(model, small, held, folder, "base"), folder)
    whole = watch(settings(model, large, held, folder, "whole"), folder)
    killed = settings(model, large, held, folder, "killed")
    watch(killed, folder, until=lambda: last_step(folder / "killed") >= KILL_AT)
    reached = last_step(folder / "killed")
    resumed = watch(killed | {"resume": True}, folder)
    steps = {name: noted(folder / f"{name}.rows") for name in ("whole", "killed")}
    order = steps["killed"]["order"]
    begins = next(step for before, step in itertools.pairwise(order) if step <= before)
    summary = json.loads((folder / "whole" / "run.json").read_text())
    growth = {key: whole[key] - base[key] for key in ("rss", "anonymous", "file")}
    return {
        "rows": rows,
        "file_mb": large.stat().st_size / 1e6,
        "store_mb": summary["data"]["store_bytes"] / 1e6,
        "peak_mb_of_1000_rows": megabytes(base),
        "peak_mb": megabytes(whole),
        "peak_mb_of_the_resumed_run": megabytes(resumed),
        "growth_mb": {key: round(value / 1e6, 1) for key, value in growth.items()},
        "below_200_mb": growth["rss"] < 200e6,
        "seconds": {"1000 rows": base["seconds"], "whole": whole["seconds"], "resumed": resumed["seconds"]},
        "load_seconds": summary["seconds"]["load"],
        "killed_after_step": reached,
        "resumed_at_step": begins,
        "first_row_there": {name: steps[name]["rows"][begins][0] for name in steps},
        "same_rows_in_every_step": steps["whole"]["rows"] == steps["killed"]["rows"],
        "same_adapter": digest(folder / "whole") == digest(folder / "killed"),
    }


def write(path: Path, rows: int, seed: int) -> Path:
    """Short sentences of two classes, no two alike."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            text = " ".join(draw.choices(WORDS, k=draw.randint(4, 12)))
            file.write(json.dumps({"text": f"{text} {seed} {i}", "label": "even" if i % 2 else "odd"}) + "\n")
    return path


def settings(model: str, train: Path, held: Path, folder: Path, name: str) -> dict[str, Any]:
    data = {"train": str(train), "eval": str(held), "split": {"eval": 0.0, "test": 0.0}, "streaming": True}
    training = {"steps": STEPS, "batch_size": 16, "micro_batch_size": 16, "log_every": 1, "save_every": SAVE_EVERY}
    return {
        "task": "text-classification",
        "device": "cpu",
        "model": {"path": str(Path(model).resolve())},
        "data": data | {"cache": str(folder / f"{name}.cache")},
        "training": training,
        "output": str(folder / name),
    }


def train_noting_rows(given: dict[str, Any]) -> None:
    """The run, with the rows of every step it makes appended to `<output>.rows`."""
    from peft_engine import load_config, train
    from peft_engine.training.loop import Loop

    resume = given.pop("resume", False)
    path = Path(given["output"] + ".yaml")
    path.write_text(json.dumps(given), encoding="utf-8")  # JSON is YAML
    advance = Loop._advance

    def noting(self: Loop, trainee: Any, step: int, factor: float) -> None:
        rows = trainee.plan.rows(step)
        where = [self.where[int(self.data.rows[row])] for row in rows]
        with Path(given["output"] + ".rows").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "rows": where}) + "\n")
        advance(self, trainee, step, factor)

    Loop._advance = noting  # type: ignore[method-assign]  # in this measuring process only
    train(load_config(path), resume=resume)


def watch(given: dict[str, Any], folder: Path, until: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Run it and give its peaks in bytes; killed when `until` holds."""
    began = time.perf_counter()
    log = (folder / "log.txt").open("w+")
    child = subprocess.Popen([sys.executable, __file__, "--run", json.dumps(given)], stdout=log, stderr=log)
    peaks = {"rss": 0, "anonymous": 0, "file": 0}
    while child.poll() is None:
        for name, size in resident(child.pid).items():
            peaks[name] = max(peaks[name], size)
        if until is not None and until():
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        time.sleep(0.05)
    if child.returncode != (0 if until is None else -signal.SIGKILL):
        log.seek(0)
        raise SystemExit(f"exit code {child.returncode}: {log.read()[-3000:]}")
    return {**peaks, "seconds": round(time.perf_counter() - began, 1)}


def resident(process: int) -> dict[str, int]:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return {}
    sizes = dict(line.split(":") for line in status.splitlines() if line.startswith(("VmRSS", "RssAnon", "RssFile")))
    names = {"rss": "VmRSS", "anonymous": "RssAnon", "file": "RssFile"}
    return {name: int(sizes[key].split()[0]) * 1024 for name, key in names.items() if key in sizes}


def last_step(output: Path) -> int:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def noted(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {"order": [line["step"] for line in lines], "rows": {line["step"]: line["rows"] for line in lines}}


def megabytes(peaks: dict[str, Any]) -> dict[str, float]:
    return {name: round(peaks[name] / 1e6, 1) for name in ("rss", "anonymous", "file")}


def digest(output: Path) -> str:
    return hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
