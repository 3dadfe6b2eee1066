"""Tiny models whose widths are multiples of 64, as nf4 and fp4 need them, and runs on them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tiny
from tiny import class_rows, config, pair_rows, write_rows

from peft_engine.config import Config

TRAINING = {"steps": 8, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 0.01, "save_every": 3}


def make_wide(family: str, folder: Path, monkeypatch: Any) -> Path:
    """`tiny.make_model`, 64 wide; feed-forward layers 128."""
    with monkeypatch.context() as patched:
        patched.setattr(tiny, "HIDDEN", 64)
        patched.setattr(tiny, "INNER", 128)
        return tiny.make_model(family, folder)


def maker(folder: Path, monkeypatch: Any) -> Callable[[str], Path]:
    return cache(lambda family: make_wide(family, folder / family, monkeypatch))


def settings(model: Path, folder: Path, task: str = "causal-lm", /, **more: Any) -> Config:
    """A run of 8 steps with LoRA and dropout, in nf4; blocks of settings in `more` add to it."""
    lm = task == "causal-lm"
    rows = write_rows(folder / "rows.jsonl", pair_rows(28) if lm else class_rows(28))
    blocks: dict[str, Any] = {
        "model": {"quantization": "nf4"},
        "adapter": {"rank": 4, "dropout": 0.1},
        "data": {"split": {"eval": 0.2, "test": 0.2}},
        "training": TRAINING,
    }
    for name, block in more.items():
        whole = isinstance(block, dict) and name in blocks and "method" not in block
        blocks[name] = {**blocks[name], **block} if whole else block
    return config(task, model, rows, folder / "run", **blocks)
