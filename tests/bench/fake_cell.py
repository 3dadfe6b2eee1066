"""Stands in for `peft_engine.bench.cell`: writes a record at once, from a table of what each cell shall do.

The table, $FAKE_CELLS, maps titles to "fail CODE", "die", "sleep", "lie" (a record that doesn't check) or the values
that the primary metric takes on the evaluation split. Only the standard library: it starts in no time.
"""

import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path

PROBED = {  # what a cell tells of itself as a probe
    "seconds": {"load": 0.0, "train": 7.0, "evaluate": 3.0, "save": 0.0},
    "tokens": 300,
    "tokens_per_second": 50.0,
    "judging_seconds": {"reopen": 1.0, "machine": 0.5, "items": 1.0, "answers": 2.0, "forgetting": 0.0},
    "whole": {
        "steps": 6,
        "steps_per_epoch": 9,
        "eval_every": 4,
        "tokens_per_step": 80.0,
        "eval": 10,
        "test": 20,
        "answers": 16,
        "windows": 0,
    },
    "tried": {"steps": 3, "eval": 5, "test": 10, "answers": 4, "windows": 0},
    "extra_seconds": 0.25,
}


def end_with_parent() -> None:
    os.read(0, 1)
    os._exit(75)


def main() -> int:
    threading.Thread(target=end_with_parent, daemon=True).start()
    spec_path, record_path = Path(sys.argv[1]), Path(sys.argv[2])
    spec = json.loads(spec_path.read_text())
    table = json.loads(Path(os.environ["FAKE_CELLS"]).read_text())
    todo = table.get(spec["title"], [0.5, 0.6])
    with Path(os.environ["FAKE_CELLS"]).with_name("started").open("a") as started:
        started.write(f"{spec['title']} {os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")
    print("a line of the log")
    if todo == "sleep":
        time.sleep(600)
    if todo == "die":
        os.kill(os.getpid(), 9)
    if isinstance(todo, str) and todo.startswith("fail"):
        code = int(todo.split()[1])
        failure = {"reason": f"told to fail with {code}", "fix": "don't", "exit_code": code}
        record_path.with_name("failure.json").write_text(json.dumps(failure))
        return code
    values = todo if isinstance(todo, list) else [0.5]
    info = {name: spec[name] for name in ("suite", "kind", "method", "seed", "learning_rate", "tuned")}
    found = dict.fromkeys(("accuracy", "loss"), 0.75) | table.get("metrics", {})
    steps = spec["config"]["training"].get("steps") or 1
    record = {
        "schema": "peft-engine cell 1",
        "key": spec["key"],
        "run_info": {**info, "created_at": "2026-01-01", "total_seconds": 10.0 + steps},
        "train_info": {
            "primary": table.get("primary", "accuracy"),
            "maximize": table.get("maximize", True),
            "metrics_before": found,
            "metrics_after": None if spec["kind"] != "final" else found,
            "eval_curve": [{"step": i, "accuracy": v, "loss": v} for i, v in enumerate(values)],
            "seconds": {"train": float(steps)},
            "forgetting": {"before": 3.0} if spec["kind"] == "baseline" else {"before": spec["forgetting_before"]},
        },
        "meta_info": {},
    }
    if spec.get("probe"):
        record["train_info"] |= PROBED
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    record["sha256"] = hashlib.sha256(text.encode()).hexdigest() if todo != "lie" else "0" * 64
    record_path.write_text(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
