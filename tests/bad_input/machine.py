"""A machine that is full, closed or too small."""

from pathlib import Path

from .case import Case, inside, lines, model, rows_with, swell

CASES = {
    "disk full": Case(
        "train c.yaml --set output=new", 8, ("new", "no space left"), ("Free space",), limits={"file_bytes": 9000}
    ),
    "disk full on resume": Case(
        "train c.yaml --set output=run-paused --resume",
        8,
        ("run-paused", "no space left"),
        ("--resume",),
        limits={"file_bytes": 9000},
        written=("run-paused/config.yaml",),  # its budget is another
    ),
    "disk full at predict": Case(
        "predict run-c --input rows.jsonl --output out.csv",
        8,
        ("out.csv", "no space left"),
        ("Free space",),
        {"out.csv": "kept"},
        limits={"file_bytes": 500},
    ),
    "disk full at merging": Case(
        "export run-c --merged --to out", 8, ("out", "no space left"), ("Free space",), limits={"file_bytes": 9000}
    ),
    "full device": Case(
        "predict run-c --input rows.jsonl --output full.csv",
        8,
        ("full.csv", "No space left"),
        ("Free space",),
        make=inside("full.csv", lambda f: f.symlink_to("/dev/full")),
    ),
    "full standard output": Case("schema", 8, ("No space left",), ("Free space",), stdout="/dev/full", cold=True),
    "read-only output": Case(
        "train c.yaml --set output=sealed/new",
        8,
        ("sealed/new", "Permission denied"),
        ("permissions",),
        make=inside("sealed", Path.mkdir),
        limits={"nobody": True},
    ),
    "read-only run": Case(
        "train c.yaml --set output=run-paused --resume",
        8,
        ("run-paused", "Permission denied"),
        ("permissions",),
        limits={"nobody": True},
    ),
    "read-only place for predictions": Case(
        "predict run-c --input rows.jsonl --output out.csv",
        8,
        ("out.csv", "Permission denied"),
        ("permissions",),
        make=inside("run-c/adapter", lambda at: (at / "adapter_model.safetensors").chmod(0o644)),
        limits={"nobody": True},
    ),
    "model that may not be read": Case(
        "train c.yaml --set model.path=model --set output=open/new",
        8,
        ("model.safetensors", "permission denied"),
        ("who may read",),
        make=lambda folder, models: [
            model("bert", lambda at: (at / "model.safetensors").chmod(0o600))(folder, models),
            (folder / "open").mkdir(),
            (folder / "open").chmod(0o777),
        ],
        limits={"nobody": True},
    ),
    "adapter that may not be read": Case(
        "evaluate run-c",
        8,
        ("adapter_model.safetensors", "Permission denied"),
        ("who may read",),
        make=inside("run-c/adapter", lambda at: (at / "adapter_model.safetensors").chmod(0o600)),
        limits={"nobody": True},
    ),
    "data that may not be read": Case(
        "train c.yaml --set output=open/new --set data.train=secret.jsonl",
        8,
        ("secret.jsonl", "Permission denied"),
        ("who may read",),
        {"secret.jsonl": rows_with(0)},
        make=lambda f, _: [(f / "secret.jsonl").chmod(0o600), (f / "open").mkdir(), (f / "open").chmod(0o777)],
        limits={"nobody": True},
    ),
    "no memory to load": Case(
        "train c.yaml --set model.path=model",
        4,
        ("Memory ran out",),
        ("smaller model",),
        make=model("bert", swell("model.safetensors", 2**28)),
        limits={"memory_bytes": 2**27},
    ),
    "no memory to train": Case(
        "train p.yaml --set data.train=t.jsonl --set training.batch_size=1500 --set training.micro_batch_size=1500 "
        "--set evaluation.batch_size=1 --set kernels=off",
        4,
        ("1500 sequence(s)",),
        ("training.micro_batch_size",),
        {"t.jsonl": lines(*({"prompt": f"{i} fox", "completion": "dog " * 20} for i in range(2000)))},
        limits={"memory_bytes": 200 * 2**20},
    ),
}
