"""Faults of the settings and of the command line."""

from pathlib import Path

from .case import Case, inside

CASES = {
    "config missing": Case("train c.yml", 2, ("c.yml",), ("c.yaml",), cold=True),
    "config is a folder": Case("train folder", 2, ("folder",), ("YAML file",), make=inside("folder", Path.mkdir)),
    "config empty": Case("validate e.yaml", 2, ("e.yaml", "empty"), ("peft-engine init",), {"e.yaml": "# nothing\n"}),
    "config not UTF-8": Case(
        "validate l.yaml",
        2,
        ("l.yaml, line 2", "0xe9"),
        ("Save the file as UTF-8",),
        {"l.yaml": b"# a\ntask: caf\xe9\n"},
    ),
    "malformed YAML": Case(
        "validate b.yaml",
        2,
        ("b.yaml, line 2", "not valid YAML"),
        ("indentation",),
        {"b.yaml": "task: a\n  b: c\n"},
        cold=True,
    ),
    "key given twice": Case(
        "validate d.yaml",
        2,
        ("d.yaml, line 2", "task", "line 1"),
        ("keep one",),
        {"d.yaml": "task: causal-lm\ntask: causal-lm\nmodel: {path: x}\ndata: {train: x}\noutput: x\n"},
    ),
    "unknown key": Case(
        "train u.yaml",
        2,
        ("u.yaml, line 3", "trainin"),
        ("training",),
        {"u.yaml": "task: causal-lm\nmodel: {path: x}\ntrainin: {epochs: 1}\ndata: {train: x}\noutput: x\n"},
        cold=True,
    ),
    "all faults at once": Case(
        "train f.yaml",
        2,
        ("line 1", "causal", "line 3", "many", "line 4", "lr"),
        ("causal-lm", "learning_rate"),
        {
            "f.yaml": "task: causal\nmodel: {path: x}\nadapter: {rank: many}\ntraining: {lr: 1}\n"
            "data: {train: x}\noutput: x\n"
        },
    ),
    "wrong type": Case(
        "train c.yaml --set training.batch_size=large",
        2,
        ("training.batch_size", "large"),
        ("whole number",),
        cold=True,
    ),
    "peft's name": Case("train c.yaml --set adapter.r=8", 2, ("adapter.r",), ("rank",)),
    "bad --set": Case("train c.yaml --set training.epochs", 2, ("training.epochs",), ("a.b=value",), cold=True),
    "--set of an unknown key": Case("validate c.yaml --set trainng.epochs=1", 2, ("trainng",), ("training",)),
    "unknown verb": Case("trian c.yaml", 2, ("trian",), ("train",), cold=True),
    "unknown option": Case("train c.yaml --overwite", 2, ("--overwite",), ("--overwrite",), cold=True),
    "no config": Case("train", 2, ("CONFIG",), ("--help",), cold=True),
    "contradictory flags": Case(
        "train c.yaml --resume --overwrite", 2, ("--resume", "--overwrite"), ("exclude",), cold=True
    ),
    "unknown split": Case("evaluate run-c --split valid", 2, ("valid",), ("eval",)),
    "budget without price": Case(
        "train c.yaml --set budget.max_usd=1", 2, ("budget.max_usd",), ("budget.usd_per_hour",), cold=True
    ),
    "warm-up longer than the run": Case(
        "train c.yaml --set training.warmup=9", 2, ("training.warmup", "9"), ("smaller",)
    ),
    "shares that leave nothing": Case(
        "train c.yaml --set data.split.eval=0.5 --set data.split.test=0.5", 2, ("0.5", "data.split"), ("below 1",)
    ),
    "setting of another task": Case(
        "train c.yaml --set data.columns.messages=text", 2, ("data.columns.messages",), ("remove it",)
    ),
    "fp16 on a CPU": Case(
        "train c.yaml --set device=cpu --set training.precision=fp16", 2, ("fp16", "cpu"), ("auto, fp32 or bf16",)
    ),
    "no bitsandbytes": Case(
        "train c.yaml --set training.optimizer=adamw8bit",
        2,
        ("adamw8bit", "bitsandbytes"),
        ("Install it, or use adamw",),
        limits={"without": "bitsandbytes"},
    ),
    "nf4 without bitsandbytes": Case(
        "train c.yaml --set model.quantization=nf4",
        2,
        ("model.quantization", "bitsandbytes"),
        ("Install it, or set model.quantization: none",),
        limits={"without": "bitsandbytes"},
    ),
}
