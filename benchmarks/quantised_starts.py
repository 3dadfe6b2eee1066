"""What a start of LoRA mends of a quantised backbone's error, and what is left of that after some steps.

    .venv/bin/python benchmarks/quantised_starts.py [--kinds nf4 int8] [--starts default loftq pissa olora] [--steps 24]
        [--seeds 0] [--rank 16] [--json FILE]

SmolLM2-135M on restaurant descriptions as the suite nf4-lm has them, LoRA on every linear, dropout 0. Of each start:

    outputs    ‖y - y_full‖ / ‖y_full‖ of every adapted linear at step 0, on the x that the full-precision model has
               there for one training batch: mean and worst over the linears
    KL         of the whole model's next tokens at step 0 from the full-precision model's, nats per token
    loss       on the test rows before and after --steps steps, beside the full-precision model's own run
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_engine.adapters.quantised_start import lora_layers
from peft_engine.bench.cells import settings_of
from peft_engine.bench.suite import load_suite
from peft_engine.building import build_group, encode_splits
from peft_engine.config import Config
from peft_engine.config_reading import load_config
from peft_engine.data.batching import BatchPlan
from peft_engine.data.loading import load_splits
from peft_engine.drift import judge_batches
from peft_engine.run import train
from peft_engine.runtime import hardware, start, versions
from peft_engine.tasks import make_task

ROOT = Path(__file__).resolve().parents[1]


def config_of(folder: Path, method: dict[str, Any], steps: int, seed: int) -> Config:
    """The suite's run with these settings of the method."""
    suite = load_suite(ROOT / "benchmarks" / "suites" / "nf4-lm.yaml")
    name = "lora" if method["kind"] == "none" else "lora-nf4"
    tree = settings_of(suite, "final", name, seed, 1e-3)
    tree["adapter"] = {**tree["adapter"], "init": method["start"], "rank": method["rank"], "alpha": 2 * method["rank"]}
    tree["model"] = {**tree["model"], "quantization": method["kind"]}
    tree["training"] = {**tree["training"], "steps": steps, "eval_every": None}
    return load_config({**tree, "output": str(folder / "run")})


def opened(config: Config) -> tuple[Any, Any]:
    """The group at step 0 and one training batch."""
    runtime = start(config)
    splits = load_splits(config)
    task = make_task(config, splits.labels)
    data = encode_splits(task, splits, config)
    group = build_group(task, config, runtime, data)
    rows = BatchPlan(data["train"].lengths, config.training.batch_size, 0, True).rows(1)
    return group, (task, task.collate(data["train"], rows))


def captured(model: nn.Module, layers: dict[str, Any], run: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """x and y of every layer in one forward."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _, x, y, name=name: found.__setitem__(name, (x[0], y)))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        run(model.eval())
    for handle in handles:
        handle.remove()
    return found


def at_start(config: Config, full: dict[str, tuple[Tensor, Tensor]], logits: Tensor) -> dict[str, float]:
    """Errors of the layers on the full-precision model's inputs, and of the whole model's logits."""
    group, (task, batch) = opened(config)
    errors = []
    with group.evaluating(group.members[0]) as model, torch.no_grad():
        for name, layer in lora_layers(group.model, "default").items():
            x, y = full[name]
            errors.append(float((layer(x) - y).norm() / y.norm()))
        drift = judge_batches(logits, task.forward(model, batch))
    return {"mean": sum(errors) / len(errors), "worst": max(errors), "kl": drift.kl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["nf4"], choices=["nf4", "fp4", "int8"])
    parser.add_argument("--starts", nargs="+", default=["default", "loftq", "pissa", "olora"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plain = {"kind": "none", "start": "default", "rank": args.rank}
        whole = config_of(folder, plain, args.steps, args.seeds[0])
        group, (task, batch) = opened(whole.model_copy(update={"kernels": "off"}))
        layers = lora_layers(group.model, "default")
        full = captured(group.model, layers, lambda model: task.forward(model, batch))
        with group.evaluating(group.members[0]) as model, torch.no_grad():
            logits = task.forward(model, batch)
        del group
        every = [plain, *({"kind": k, "start": s, "rank": args.rank} for k in args.kinds for s in args.starts)]
        for method in every:
            row: dict[str, Any] = {**method}
            if method["kind"] != "none":
                row |= at_start(config_of(folder, method, args.steps, args.seeds[0]), full, logits)
            for when in ("before", "after"):
                row[when] = []
            for seed in args.seeds:
                metrics = train(config_of(folder, method, args.steps, seed), overwrite=True)["metrics"]
                for when in ("before", "after"):
                    row[when].append(metrics[when]["loss"])
            rows.append(row)
            error = f"outputs {row['mean']:.4f} (worst {row['worst']:.4f}), KL {row['kl']:.4f}, " if "kl" in row else ""
            losses = " → ".join(" ".join(f"{loss:.4f}" for loss in row[when]) for when in ("before", "after"))
            print(f"{method['kind']:>5} {method['start']:<8} {error}loss {losses}", flush=True)
    if args.json:
        found = {"steps": args.steps, "seeds": args.seeds, "rows": rows, "versions": versions(), "hardware": hardware()}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
