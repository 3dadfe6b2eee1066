"""What the project says of its exact LoRA against full fine-tuning, held against what was measured."""

from typing import Any

from .scoring import Results
from .statistics import gain_kept

GAIN, STEP, MEMORY = ("gain kept", 0.95), ("step time", 0.75), ("peak memory", 0.4)


def claims(found: Results, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per plain LoRA of the suite three lines: gain kept ≥ 0.95, step time ≤ 0.75, peak memory ≤ 0.4 of the reference.
    None where the reference is no full fine-tuning.

    Args:
        rows: the table's rows.

    Returns:
        method, claim, limit, value, low, high, verdict, cells: [{cell, value}] that miss by themselves. Verdicts:
        `met`; `met on average` (the interval, or a seed, reaches past the limit); `missed`; `unknown` with `why`.
    """
    lines: list[dict[str, Any]] = []
    if _reference_kind(found) != "full":
        return lines
    for row in rows:
        if not _claimed_of(found, row):
            continue
        if not _fused(row["meta_info"]["kernels"]):
            why = "none of its LoRA layers ran fused (meta_info.kernels)"
            lines += [_line(row, *of) | _unknown(why) for of in (GAIN, STEP, MEMORY)]
            continue
        lines.append(_gain(found, row))
        lines.append(_share(found, row, "step_seconds", STEP))
        lines.append(_share(found, row, "peak_bytes", MEMORY))
    return lines


def unclaimed(found: Results, rows: list[dict[str, Any]]) -> str | None:
    """A sentence why nothing is claimed of these results; None where something is."""
    kind = _reference_kind(found)
    if kind != "full":
        return (
            f"The claims for LoRA are about full fine-tuning. The reference here, {found.reference}, is something "
            f"else (method: {kind}), so nothing is claimed of these results."
        )
    if any(_claimed_of(found, row) for row in rows):
        return None
    return "No plain LoRA with fused kernels is among the methods, so its claim is not measured here."


def _reference_kind(found: Results) -> str:
    """The adapter method of the reference: as its cells ran it, else as the suite says."""
    for record in found.finals.get(found.reference, {}).values():
        return str(((record["run_info"].get("config") or {}).get("adapter") or {}).get("method", "unknown"))
    entry = (found.suite.get("methods") or {}).get(found.reference) or {}
    return str((entry.get("adapter") or {}).get("method", "unknown"))


def _claimed_of(found: Results, row: dict[str, Any]) -> bool:
    return row["name"] != found.reference and _plain_lora(row["run_info"]["config"] or {})


def _fused(kernels: dict[str, Any] | None) -> bool:
    """Whether a LoRA layer was swapped for the fused one, by what the run recorded."""
    return any(name.startswith("lora") and count for name, count in ((kernels or {}).get("swapped") or {}).items())


def _line(row: dict[str, Any], claim: str, limit: float) -> dict[str, Any]:
    return {"method": row["name"], "claim": claim, "limit": limit, "least": claim == GAIN[0], "cells": []}


def _plain_lora(config: dict[str, Any]) -> bool:
    """LoRA itself, none of its variants, its kernels not switched off, nothing frozen rounded."""
    adapter = config.get("adapter") or {}
    varied = adapter.get("rslora") or adapter.get("dora") or adapter.get("init", "default") not in ("default", True)
    varied = varied or adapter.get("lora_plus_ratio") or (adapter.get("options") or {})
    model = config.get("model") or {}
    varied = varied or model.get("frozen_compute", "full") != "full" or model.get("quantization", "none") != "none"
    return adapter.get("method") == "lora" and not varied and config.get("kernels", "auto") != "off"


def _gain(found: Results, row: dict[str, Any]) -> dict[str, Any]:
    line = _line(row, *GAIN)
    kept = (row["train_info"]["gain_kept"] or {}).get(found.primary)
    if found.reference not in found.finals:
        return line | _unknown(f"{found.reference} has no finished cell")
    if kept is None:
        return line | _unknown(f"{found.reference}'s own gain over the untouched model is not told apart from none")
    one = found.samples[row["name"]][found.primary]
    whole, before = found.samples[found.reference][found.primary], found.before[found.primary]
    for seed in (seed for seed in one.seeds if seed in whole.seeds):
        alone = gain_kept(one.only([seed]), whole, before)
        if alone is not None and alone.mean < GAIN[1]:
            line["cells"].append({"cell": f"{row['name']}/seed-{seed}", "value": alone.mean})
    sure = kept["low"] is not None and kept["low"] >= GAIN[1]
    verdict = "missed" if kept["mean"] < GAIN[1] else "met" if sure else "met on average"
    return line | {"value": kept["mean"], "low": kept["low"], "high": kept["high"], "verdict": verdict}


def _share(found: Results, row: dict[str, Any], name: str, of: tuple[str, float]) -> dict[str, Any]:
    line, (words, limit) = _line(row, *of), of
    shared = row["train_info"]["shares"][name]
    if shared is None:
        return line | _unknown(f"{found.reference} or {row['name']} has no measured {words}")
    ours, theirs = found.measured(row["name"], name), found.measured(found.reference, name)
    for seed in (seed for seed in sorted(ours) if seed in theirs):
        if ours[seed] / theirs[seed] > limit:
            line["cells"].append({"cell": f"{row['name']}/seed-{seed}", "value": ours[seed] / theirs[seed]})
    verdict = "missed" if shared["ratio"] > limit else "met" if shared["high"] <= limit else "met on average"
    return line | {"value": shared["ratio"], "low": shared["low"], "high": shared["high"], "verdict": verdict}


def _unknown(why: str) -> dict[str, Any]:
    return {"value": None, "low": None, "high": None, "verdict": "unknown", "why": why}


def told_claim(line: dict[str, Any], reference: str) -> str:
    """One sentence."""
    sign = "≥" if line["least"] else "≤"
    wanted = f"{sign} {line['limit']:.2f}× of {reference}'s"
    if line["verdict"] == "unknown":
        return f"{line['method']}, {line['claim']} {wanted}: unknown, because {line['why']}."
    span = "95% interval" if line["least"] else "range over seeds"
    low, high = (f"{bound:.3f}" if bound is not None else "no bound" for bound in (line["low"], line["high"]))
    text = (
        f"{line['method']}, {line['claim']} {wanted}: {line['verdict']}, {line['value']:.3f}× ({span} {low} to {high})."
    )
    if line["cells"]:
        text += " Cells that miss: " + ", ".join(f"{one['cell']} {one['value']:.3f}×" for one in line["cells"]) + "."
    return text
