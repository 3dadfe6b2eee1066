"""Where and with what a measurement was taken; the two ceilings of the card; what a result file looks like."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "liger_kernel", "torchao", "peft-engine")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "from the source tree" if name == "peft-engine" else "not installed"
    return found


def commit() -> str:
    """The commit, with + where the tree differs; for a copy without its history, what PEFT_ENGINE_COMMIT says."""
    if named := os.environ.get("PEFT_ENGINE_COMMIT"):
        return named
    try:
        asked = [["rev-parse", "HEAD"], ["status", "--porcelain"]]
        head, changed = (
            subprocess.run(["git", *one], cwd=ROOT, capture_output=True, text=True, check=True).stdout for one in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git history here"
    return head.strip() + ("+" if changed else "")


def hardware(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    found: dict[str, Any] = {"device": device.type, "cpu": cpu, "cpu_cores": os.cpu_count()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "l2_bytes": card.L2_cache_size,
        }
    return found


def context(device: torch.device, smoke: bool) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "smoke": smoke,
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median of some single runs after a warm-up."""
    work()
    taken = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def ceilings(device: torch.device, smoke: bool) -> dict[str, float]:
    """What this card really does: bytes per second of a large copy (read plus written), FLOP/s of a large matmul."""
    size, side = (1 << 20, 256) if smoke else (1 << 30, 8192)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device, 3 if smoke else 15)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))  # zeros would run faster
    out = torch.empty_like(a)
    matmul = seconds(lambda: torch.mm(a, b, out=out), device, 3 if smoke else 15)
    return {"bytes_per_second": 2 * size / copy, "flops_per_second": 2 * side**3 / matmul}


def append(path: Path, run: dict[str, Any], fresh: bool) -> None:
    """Write `run` as the file's last one: a new one if `fresh`, else in place of the last. Never half a file."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    runs = [*(runs if fresh else runs[:-1]), run]
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, text in ((path, json.dumps({"runs": runs}, indent=1)), (path.with_suffix(".md"), markdown(runs))):
        scratch = file.with_name(file.name + ".part")
        scratch.write_text(text + "\n", encoding="utf-8")
        scratch.replace(file)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if abs(value) < 1e3 else f"{value:,.0f}"


def _line(cell: dict[str, Any], name: str, one: dict[str, Any]) -> str:
    settings = " ".join(f"{key}={value}" for key, value in cell["settings"].items())
    peak = one.get("peak_bytes")
    floor = cell["facts"].get("floor_ms")
    columns = [
        f"{cell['cell']} {settings}".strip(),
        name,
        _number(one.get("ms")),
        _number(one.get("device_ms")),
        _number(floor),
        _number(None if peak is None else peak / 1e6),
        " ".join(f"{key}={_number(value, 4)}" for key, value in one.get("more", {}).items()),
        ", ".join(f"{_number(ratio)}× {other}" for other, ratio in one.get("faster_than", {}).items()),
        one.get("error") or ("" if cell["green"] else "RED"),
    ]
    return "| " + " | ".join(column.replace("|", "/") for column in columns) + " |"


def markdown(runs: list[dict[str, Any]]) -> str:
    """All runs of a file, newest last, one line per measurement."""
    parts = []
    for run in runs:
        about = run["context"]
        card = about["hardware"].get("gpu", about["hardware"]["cpu"])
        parts += [
            f"## {run['part']}, {about['date']}, {card}{' (smoke)' if about['smoke'] else ''}",
            "",
            f"`{about['command']}` at {about['commit']}; "
            + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
            + "; measured here: "
            + ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in run["ceilings"].items()),
            "",
            "| cell | what | ms | device ms | floor ms | peak MB | more | faster than | |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_line(cell, name, one) for cell in run["cells"] for name, one in cell["contenders"].items()),
            "",
            *(f"- {cell['cell']} {cell['settings']}: RED, {cell['why']}" for cell in run["cells"] if not cell["green"]),
            *(f"- {note}" for note in run["notes"]),
            "",
        ]
    return "\n".join(parts)
