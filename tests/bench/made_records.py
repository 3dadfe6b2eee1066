"""Results folders made up for tests: no training, but the shape of real ones and scores that follow from a truth."""

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

SCHEMA = "peft-engine cell 1"
METHODS = {  # share of rows that a method gets right, step seconds, peak MiB, trainable parameters
    "full": (0.90, 0.100, 1000, 22_700_000),
    "lora": (0.90, 0.070, 380, 600_000),
    "bitfit": (0.84, 0.060, 420, 40_000),
    "head": (0.66, 0.025, 190, 1_500),
}
NAMES = ["World", "Sports", "Business", "Sci/Tech"]


def digest(record: dict[str, Any]) -> str:
    """The checksum that a record carries: of all but itself."""
    content = {name: value for name, value in record.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def class_items(share: float, seed: int, rows: int = 400, classes: int = 4, salt: str = "") -> dict[str, Any]:
    """Rows whose difficulty is shared by all methods; a seed moves some of them."""
    label = np.random.default_rng(5).integers(classes, size=rows)
    hardness = np.random.default_rng(6).random(rows)
    random = np.random.default_rng([7, seed, int(share * 1000), zlib.crc32(salt.encode())])
    right = hardness + random.normal(0, 0.05, rows) + random.normal(0, 0.01) < share
    predicted = np.where(right, label, (label + random.integers(1, classes, size=rows)) % classes)
    loss = np.where(right, 0.1, 2.0) + random.random(rows) * 0.1
    return {
        "kind": "classes",
        "rows": list(range(rows)),
        "label": label.tolist(),
        "predicted": predicted.tolist(),
        "loss": loss.tolist(),
        "units": [1] * rows,
    }


def value_items(noise: float, seed: int, rows: int = 300) -> dict[str, Any]:
    label = np.random.default_rng(5).random(rows) * 5
    predicted = label + np.random.default_rng([8, seed]).normal(0, noise, rows) + 3
    loss = (label - predicted) ** 2
    return {
        "kind": "values",
        "rows": [f"row {i}" for i in range(rows)],
        "label": label.tolist(),
        "predicted": predicted.tolist(),
        "loss": loss.tolist(),
        "units": [1] * rows,
    }


def token_items(loss: float, seed: int, rows: int = 200) -> dict[str, Any]:
    units = np.random.default_rng(5).integers(5, 200, size=rows)
    nats = units * (loss + np.random.default_rng([9, seed]).normal(0, 0.05, rows))
    return {
        "kind": "tokens",
        "rows": list(range(rows)),
        "loss": nats.tolist(),
        "units": units.tolist(),
        "bytes": (units * 4 + 1).tolist(),
        "right": (units // 2).tolist(),
    }


def record(method: str, seed: int, items: dict[str, Any], kind: str = "final", **changes: Any) -> dict[str, Any]:
    """A record that checks. `changes`: step_seconds, peak_mib, primary, maximize, learning_rate, metrics_after, …"""
    wobble = np.random.default_rng([seed, zlib.crc32(method.encode())]).normal(0, 0.015)
    step = float(changes.get("step_seconds", 0.1) * (1 + wobble))
    peak = int(changes.get("peak_mib", 1000) * 2**20) + seed
    rate, primary = changes.get("learning_rate", 3e-4), changes.get("primary", "accuracy")
    start, steps = changes.get("start", 1.4), 300
    curve = [[s, start * float(np.exp(-s / 60)) + 0.3 + 0.02 * seed] for s in range(10, steps + 1, 10)]
    values = [
        {"step": s, "loss": start * float(np.exp(-s / 60)) + 0.4, primary: 0.9 - s**-0.5} for s in (100, 200, 300)
    ]
    weights = int(peak * 0.3)
    optimizer = int(peak * 0.25)
    info = {
        "status": "success",
        "primary": primary,
        "maximize": changes.get("maximize", True),
        "metrics_before": changes.get("metrics_before", {"accuracy": 0.25, "loss": 1.4}),
        "metrics_after": changes.get("metrics_after", {"rows": 400}),
        "train_curve": curve,
        "eval_curve": values,
        "steps": steps,
        "tokens": 300 * 16 * 64,
        "seconds": {"load": 2.0, "train": step * steps, "evaluate": 5.0, "save": 0.2},
        "wall_seconds": step * steps + 8,
        "tokens_per_second": 1024 / step,
        "step_seconds": {
            "p10": step * 0.9,
            "p50": step,
            "p90": step * 1.2,
            "p99": step * 1.5,
            "mean": step,
            "count": 300,
        },
        "peak_bytes": peak,
        "peak_bytes_meaning": "live tensors",
        "peak_rss_bytes": peak * 2,
        "memory": {"weights": weights, "gradients": optimizer // 2, "optimizer": optimizer}
        | {"activations": peak - weights - optimizer - optimizer // 2},
        "optimizer_state_bytes": optimizer,
        "trainable_parameters": changes.get("trainable", 1000),
        "total_parameters": 22_700_000,
        "adapter_file_bytes": changes.get("trainable", 1000) * 4,
        "flops_per_step": None,
        "mfu": None,
        "mfu_of": None,
        "energy_joules": None,
        "cost_usd": changes.get("cost_usd", step * steps * 0.1 / 3600),
        "forgetting": changes.get("forgetting"),
        "items": items or None,
        "class_names": changes.get("class_names"),
    }
    made = {
        "schema": SCHEMA,
        "key": hashlib.sha256(f"{method} {seed} {kind} {rate}".encode()).hexdigest()[:16],
        "run_info": {
            "created_at": changes.get("created_at", f"2026-11-20T10:{seed:02d}:00+00:00"),
            "suite": "made-up",
            "kind": kind,
            "method": method,
            "seed": seed,
            "learning_rate": rate,
            "experiment_name": f"{method}/seed-{seed}",
            "config": {"adapter": {"method": changes.get("adapter", method)}} | {"backend": {"kernels": "auto"}},
            "command": "peft-engine bench benchmarks/suites/made-up.yaml",
            "total_seconds": step * steps + 10,
            "error_msg": None,
        },
        "train_info": info,
        "meta_info": {
            "hardware": changes.get("hardware", {"cpu": "Some CPU", "cpu_threads": 1}),
            "versions": {"torch": "2.13.0", "peft-engine": "0.1.0"},
            "git": {"commit": "0123abc", "dirty": False},
            "data_digest": "d" * 8,
            "weights_digest": "w" * 8,
            "kernels": {"backend": "torch", "swapped": changes.get("swapped", {"layer_norm": 13, "lora_linear": 36})},
            "decisions": {},
        },
    }
    return made | {"sha256": digest(made)}


def write(folder: Path, one: dict[str, Any]) -> Path:
    """The record in its place; gives the path."""
    run = one["run_info"]
    name = f"{run['method']}-{run['kind']}-{run['seed']}-{run['learning_rate']:g}-{one['key'][:8]}.json"
    path = folder / "cells" / "".join(c if c.isalnum() or c in "-." else "_" for c in name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(one))
    return path


def write_suite(folder: Path, methods: list[str], seeds: list[int], **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    suite = {
        "name": "made-up",
        "title": "Made-up results",
        "description": "Numbers from a generator, for tests.",
        "budget": {"steps": 300},
        "reference": "full",
        "seeds": seeds,
        "tuning": {"seed": 1000, "share": 0.5},
        "methods": {name: {"adapter": {"method": name}, "learning_rates": [1e-4, 3e-4, 1e-3]} for name in methods},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite | more))


def classes_folder(
    folder: Path, seeds: int = 3, methods: dict[str, Any] | None = None, tuned: bool = True, slower: float = 1.0
) -> Path:
    """A whole folder of a classification suite: baseline, tuning and final cells."""
    methods = methods or METHODS
    write_suite(folder, list(methods), list(range(seeds)))
    write(folder, record("baseline", 0, class_items(0.25, 0), "baseline", class_names=NAMES, learning_rate=0.0))
    for number, (method, (share, step, peak, trainable)) in enumerate(methods.items()):
        common = {"step_seconds": step * slower, "peak_mib": peak, "trainable": trainable, "class_names": NAMES}
        common |= {"start": 1.0 + 0.2 * number}
        if tuned:
            for rate in (1e-4, 3e-4, 1e-3):
                write(folder, record(method, 1000, {}, "tuning", learning_rate=rate, metrics_after=None, **common))
        for seed in range(seeds):
            rate = 1e-3 if method == "head" else 3e-4
            write(folder, record(method, seed, class_items(share, seed, salt=method), learning_rate=rate, **common))
    return folder


def edited(folder: Path, pattern: str, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """The folder, with the records of a pattern changed by hand and given a checksum that fits."""
    paths = list((folder / "cells").glob(pattern))
    assert paths, pattern
    for path in paths:
        one = json.loads(path.read_text())
        edit(one)
        path.write_text(json.dumps(one | {"sha256": digest(one)}))
    return folder
