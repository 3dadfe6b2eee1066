"""One cell in a process of its own: train, reopen the run, measure what training doesn't tell, write the record.

`python -m peft_engine.bench.cell SPEC.json RECORD.json [--until-closed]`; SPEC is what `spec_of` makes. With the
flag it ends when its standard input, a pipe that nobody writes to, is closed: with the process that started it.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..cli_tools import calm_libraries
from ..errors import EngineError, Interrupted
from ..faults import explain
from .cells import SCHEMA, Cell
from .records import write_record
from .suite import GeneralText

UNTIL_CLOSED = "--until-closed"


def spec_of(cell: Cell, suite: str, general_text: GeneralText | None, **more: Any) -> dict[str, Any]:
    """What a cell's process is told.

    Args:
        more: `command`, `cells_at_once`, `tuned` (how the learning rate was chosen, or None), `forgetting_before`
            (the untouched model's, or None where it is not known yet), `judged` (a baseline was judged on this
            data) and `probe` (see `trying`).
    """
    text = general_text if cell.kind != "tuning" else None
    return {
        "suite": suite,
        "kind": cell.kind,
        "method": cell.method,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "title": cell.title,
        "key": cell.key,
        "config": dict(cell.config),
        "tokens": cell.tokens,
        "general_text": text and text.model_dump(mode="json"),
        **more,
    }


def run_cell(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Do what a spec says and return the record. Work files stay in `folder`.

    Raises:
        EngineError: as `train` does; VerificationError where the reopened run is not the trained one.
    """
    began, created = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    from . import measuring, trying

    if spec.get("probe"):
        found = trying.tried(spec, folder)
    else:
        found = measuring.baseline(spec, folder) if spec["kind"] == "baseline" else measuring.trained(spec, folder)
    info = {
        "created_at": created,
        "suite": spec["suite"],
        "kind": spec["kind"],
        "method": spec["method"],
        "seed": spec["seed"],
        "learning_rate": spec["learning_rate"],
        "tuned": spec.get("tuned"),
        "experiment_name": spec["title"],
        "config": spec["config"],
        "budget_tokens": spec["tokens"],
        "general_text": spec["general_text"],
        "command": spec.get("command"),
        "cells_at_once": spec.get("cells_at_once", 1),
        "total_seconds": time.perf_counter() - began,
        "error_msg": None,
    }
    return {"schema": SCHEMA, "key": spec["key"], "run_info": info, **found}


def main(arguments: list[str]) -> int:
    """Run one cell; its failure goes to `failure.json` beside the record. Returns the exit code."""
    spec_path, record_path = map(Path, arguments[:2])
    if UNTIL_CLOSED in arguments:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    calm_libraries()
    try:
        spec = json.loads(spec_path.read_text(encoding="utf-8"))
        write_record(record_path, run_cell(spec, spec_path.parent))
    except Exception as error:
        known = error if isinstance(error, EngineError) else explain(error)
        if known is None:
            traceback.print_exc()
            known = EngineError(f"{type(error).__name__}: {error}", "Report this with the log.")
        print(f"error: {known.problem}\n  fix: {known.fix}", file=sys.stderr)
        failure = {"reason": known.problem, "fix": known.fix, "exit_code": known.exit_code}
        record_path.with_name("failure.json").write_text(json.dumps(failure), encoding="utf-8")
        return known.exit_code
    return 0


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(Interrupted.exit_code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
