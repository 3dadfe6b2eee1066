"""Runs, adapters and outputs that are not what a command needs."""

from pathlib import Path

from tiny import class_rows

from .case import Case, cut_short, inside, lines, model, without

CASES = {
    "no such run": Case("evaluate run-d", 2, ("run-d",), ("run directory",), cold=True),
    "folder without a run": Case(
        "predict empty --input rows.jsonl",
        2,
        ("empty", "config.yaml"),
        ("run directory",),
        make=inside("empty", Path.mkdir),
        cold=True,
    ),
    "run that did not end": Case(
        "evaluate run-paused", 2, ("run-paused", "did not end"), ("train --resume",), cold=True
    ),
    "split that is not there": Case("evaluate run-c --set data.split.eval=0 --split eval", 2, ("eval",), ("--split",)),
    "output already holds a run": Case(
        "train c.yaml --set output=run-c", 2, ("run-c", "already holds a run"), ("--resume", "--overwrite"), cold=True
    ),
    "overwrite with bad data": Case(
        "train c.yaml --set output=run-c --set data.train=gone.csv --overwrite", 2, ("gone.csv",), ("rows.jsonl",)
    ),
    "output is a file": Case("train c.yaml --set output=rows.jsonl", 2, ("rows.jsonl", "is a file"), ("folder",)),
    "output below a file": Case("train c.yaml --set output=rows.jsonl/run", 2, ("rows.jsonl",), ("another place",)),
    "resume with other settings": Case(
        "train c.yaml --set output=run-paused --set training.learning_rate=1 --resume",
        2,
        ("learning_rate", "0.0002", "1"),
        ("--overwrite",),
    ),
    "resume with other data": Case(
        "train c.yaml --set output=run-paused --resume",
        3,
        ("data", "step-1"),
        ("Restore the data",),
        {"rows.jsonl": lines(*class_rows(30))},
    ),
    "resume from an altered checkpoint": Case(
        "train c.yaml --set output=run-paused --resume",
        8,
        ("adapter.safetensors", "sha256"),
        ("checkpoint before it",),
        make=inside("run-paused/checkpoints/step-1", cut_short("default.adapter.safetensors")),
    ),
    "predict onto the input": Case(
        "predict run-c --input rows.jsonl --output ./rows.jsonl", 2, ("rows.jsonl", "is the input"), ("another file",)
    ),
    "predict to an unknown format": Case(
        "predict run-c --input rows.jsonl --output out.xlsx", 2, ("out.xlsx", ".xlsx"), (".csv or .jsonl",)
    ),
    "predict into no folder": Case(
        "predict run-c --input rows.jsonl --output gone/out.csv", 2, ("gone",), ("no folder",)
    ),
    "generate with a classifier": Case("generate run-c hello", 2, ("run-c", "text-classification"), ("predict",)),
    "prompt that fills the model": Case("generate run-p '" + "dog " * 200 + "'", 3, ("128 positions",), ("Shorten",)),
    "system message without conversations": Case(
        "generate run-p hello --system short", 2, ("--system",), ("into the prompt",)
    ),
    "input longer than the model's positions": Case(
        "predict run-c --input t.jsonl",
        2,
        ("128 positions",),
        ("data.max_length: 128",),
        {"t.jsonl": lines({"text": "dog " * 200})},
    ),
    "empty prompt": Case("generate run-m ''", 2, ("prompt is empty",), ("some text",)),
    "export into a folder that is not empty": Case(
        "export run-c --merged --to full", 2, ("full", "not empty"), ("--to",), {"full/a": "kept"}
    ),
    "export a method that is not peft's": Case("export run-head", 2, ("adapter.method head",), ("--merged",)),
    "corrupt adapter": Case(
        "evaluate run-c",
        8,
        ("run-c/adapter",),
        ("Restore it",),
        make=inside("run-c/adapter", cut_short("adapter_model.safetensors")),
    ),
    "adapter without its settings": Case(
        "evaluate run-c",
        2,
        ("adapter_config.json",),
        ("run directory",),
        make=inside("run-c/adapter", without("adapter_config.json")),
    ),
    "corrupt adapter settings": Case(
        "evaluate run-c",
        8,
        ("adapter_config.json",),
        ("Restore it",),
        make=inside("run-c/adapter", cut_short("adapter_config.json")),
    ),
    "corrupt labels": Case(
        "evaluate run-c",
        8,
        ("labels.json",),
        ("Restore it",),
        make=inside("run-c/adapter", lambda f: (f / "labels.json").write_text("{")),
    ),
    "labels gone": Case(
        "predict run-c --input rows.jsonl",
        8,
        ("labels.json",),
        ("Restore it",),
        make=inside("run-c/adapter", without("labels.json")),
    ),
    "adapter of another shape": Case(
        "evaluate run-c --set model.path=model", 8, ("does not fit this model",), ("trained with",), make=model("gpt2")
    ),
    "diverged": Case(
        "train c.yaml --set training.learning_rate=1e30 --set training.max_grad_norm=null --set training.warmup=0",
        5,
        ("loss",),
        ("learning_rate",),
    ),
}
