"""A probe: one cell with few steps and rows, measured to tell how long whole cells take (`forecast`)."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..meters.time import PhaseTimer
from .measuring import config_of, prepare, refuse_unjudged, tokens_of_steps, trained, with_steps

MOST = {"steps": 3, "eval": 32, "test": 32, "answers": 4, "windows": 4}


def tried(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`measuring.trained` with at most so many steps and rows as `MOST` says, on all of the training data.

    Returns:
        A record's parts, with these in train_info: `whole`, what the cell has by the suite: {"steps",
        "steps_per_epoch", "eval_every" (steps), "tokens_per_step" (mean, padding not counted), "eval", "test",
        "answers", "windows" (rows)}; `tried`, of these "steps" and the last four as they were run; `extra_seconds`,
        what this function itself took.

    Raises:
        EngineError: as `trained` does.
    """
    timer = PhaseTimer()
    with timer.phase("whole"):
        whole = _whole(spec, folder)
    most = {name: min(whole[name], count) for name, count in MOST.items()}
    found = trained(_small(spec, most), folder)
    answered = (found["train_info"]["metrics_after"] or {}).get("generated_rows", 0)
    found["train_info"] |= {"whole": whole, "tried": most | {"answers": answered}, "extra_seconds": timer.total}
    return found


def _whole(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    config = config_of(spec, folder)
    splits, task, data = prepare(config)
    answers = refuse_unjudged(spec, splits, task)
    if spec["tokens"]:
        config = with_steps(config, data["train"], spec["tokens"])
    each = tokens_of_steps(config, data["train"])
    settings, counts = config.training, splits.report.counts
    return {
        "steps": settings.steps or max(1, round(settings.epochs * len(each))),
        "steps_per_epoch": len(each),
        "eval_every": settings.eval_every or len(each),
        "tokens_per_step": float(each.mean()),
        "eval": counts["eval"],
        "test": counts["test"],
        "answers": answers,
        "windows": (spec["general_text"] or {}).get("rows", 0),
    }


def _small(spec: Mapping[str, Any], most: Mapping[str, int]) -> dict[str, Any]:
    """The spec of the probe."""
    config = copy.deepcopy(spec["config"])
    config["training"] |= {"steps": most["steps"], "eval_every": None, "warmup": 0.0}
    config["data"]["limit"] = (config["data"].get("limit") or {}) | {name: most[name] for name in ("eval", "test")}
    if most["answers"]:
        config["evaluation"]["generate_rows"] = most["answers"]
    text = spec["general_text"] and {**spec["general_text"], "rows": most["windows"]}
    # what the untouched model is has been measured by the time a final cell runs
    return {**spec, "config": config, "general_text": text, "tokens": None, "judged": True, "forgetting_before": 0.0}
