"""Runs to compare: what must be equal however often one was stopped, and ways to stop one."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import config, pair_rows, write_rows

from peft_engine.config import Config
from peft_engine.config_reading import to_yaml
from peft_engine.run import train
from peft_engine.run_directory import RunDirectory
from peft_engine.training.checkpoint import complete_checkpoints, digest_file, verify_files

TIMED = ("tokens_per_second", "train_seconds", "step_seconds", "window")


class Crash(BaseException):
    """What no code catches: as near to a lost process as one process can play."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the next run end without a word when it logs `step`."""
    append = RunDirectory.append_metrics

    def crash(self: RunDirectory, row: dict[str, Any]) -> None:
        append(self, row)
        if row["step"] == step and "eval" not in row:
            raise Crash

    monkeypatch.setattr(RunDirectory, "append_metrics", crash)


def train_and_crash(monkeypatch: pytest.MonkeyPatch, settings: Config, step: int) -> None:
    """A run that is lost when it logs `step`."""
    with monkeypatch.context() as patched:
        crash_at(patched, step)
        with pytest.raises(Crash):
            train(settings)


def outcome(output: Path | str) -> dict[str, Any]:
    """All of a run that must not depend on how often it was stopped."""
    output = Path(output)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = complete_checkpoints(output / "checkpoints")[-1]
    verify_files(last)
    state = json.loads((last / "state.json").read_text())["members"]["default"]
    window = {k: v for k, v in state["trainee"]["window"].items() if k != "seconds"}
    summary = json.loads((output / "run.json").read_text())
    return {
        "adapter": digest_file(output / "adapter" / "adapter_model.safetensors"),
        "rows": [{k: v for k, v in row.items() if k not in TIMED} for row in rows],
        "checkpoint": last.name,
        "tensors": {path.name: digest_file(path) for path in sorted(last.glob("*.safetensors"))},
        "optimizer": state["optimizer"],
        "state": {k: v for k, v in state["trainee"].items() if k not in TIMED} | {"window": window},
        "summary": {k: summary[k] for k in ("metrics", "steps", "best_step", "stopped_early", "tokens", "evaluations")},
        "timed_steps": len(state["trainee"]["step_seconds"]),
    }


def changed(settings: Config, **new: Any) -> Config:
    """The same settings with `training__steps=3` and the like."""
    tree = settings.model_dump(mode="json", exclude_unset=True)
    for path, value in new.items():
        *above, last = path.split("__")
        place = tree
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value
    return Config.model_validate(tree)


def small(model: Path, folder: Path, steps: int = 8, **training: Any) -> Config:
    """LoRA with dropout under accumulation on 18 pairs, 5 steps an epoch; output is `folder/run`."""
    rows = write_rows(folder / "pairs.jsonl", pair_rows(20))
    given = {"steps": steps, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01, "save_every": 2, **training}
    return config(
        "causal-lm",
        model,
        rows,
        folder / "run",
        adapter={"rank": 4, "dropout": 0.2},
        data={"split": {"eval": 0.1, "test": 0.0}},
        training=given,
    )


def write_config(settings: Config, path: Path) -> Path:
    path.write_text(to_yaml(settings), encoding="utf-8")
    return path


def newest(checkpoints: Path) -> int:
    found = complete_checkpoints(checkpoints)
    return int(found[-1].name[5:]) if found else 0


def last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def everything(folder: Path | str) -> dict[str, bytes]:
    """Content of all files below a folder."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
