"""What packing saves on instruction data: padded positions (exact) and seconds of whole training steps.

    python benchmarks/packing.py                          SmolLM2, LoRA r=16, 3 alternating steps of each side
    python benchmarks/packing.py --repeats 0              only the arithmetic of an epoch
    python benchmarks/packing.py --data e2e_nlg --pack-tokens 128 512

Rows are those of the named files of .assets/data, as prompt and completion. Sides: `loose` (rows as they come) and
`grouped` (data.group_by_length), each padded and packed. Padded and packed sides of one order take the same rows at
every step, in turn, in one process with one model, so that noise of the machine meets both; steps are whole: forward,
loss, backward, clipping, AdamW. `padding_share` is the share of computed positions that hold no token, over an epoch.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def rows_of(names: list[str], count: int | None) -> list[dict[str, str]]:
    """Rows of all files as prompt and completion, the first `count` of each."""
    found = []
    for name in names:
        for line in (ROOT / ".assets" / "data" / f"{name}.jsonl").read_text().splitlines()[:count]:
            row = json.loads(line)
            if "messages" in row:
                asked, answer = (message["content"] for message in row["messages"])
                row = {"prompt": f"{asked}\nAnswer:", "completion": f" {answer}"}
            found.append({"prompt": row["prompt"], "completion": row["completion"]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder of .assets/models")
    parser.add_argument("--data", nargs="+", default=["e2e_nlg", "past_tense"], help="files of .assets/data")
    parser.add_argument("--rows", type=int, help="the first so many rows of each file")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, help="default: the batch size")
    parser.add_argument("--pack-tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kernels", default="auto", choices=("auto", "torch", "triton", "off"))
    parser.add_argument("--attention", default="auto", choices=("auto", "sdpa", "eager", "flash_attention_2"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()

    from peft_engine.building import encode_splits
    from peft_engine.config import Config
    from peft_engine.data.batching import BatchPlan, packing_report
    from peft_engine.data.packing import Packing
    from peft_engine.data.splitting import load_splits
    from peft_engine.runtime import hardware, versions
    from peft_engine.tasks import make_task

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows_of(args.data, args.rows)), encoding="utf-8")
        tree: dict[str, Any] = {"task": "causal-lm", "kernels": args.kernels, "output": folder}
        tree["model"] = {"path": str(ROOT / ".assets" / "models" / args.model), "attention": args.attention}
        tree["adapter"] = {"rank": args.rank, "dropout": 0.0}
        tree["data"] = {"train": str(source), "split": {"eval": 0.0, "test": 0.0}, "cache": None, "packing": True}
        tree["data"]["pack_tokens"] = max(args.pack_tokens)
        tree["training"] = {"batch_size": args.batch_size, "learning_rate": 1e-5}
        config = Config.model_validate(tree)
        splits = load_splits(config)
        task = make_task(config, splits.labels)
        data = encode_splits(task, splits, config)
    lengths, size = data["train"].lengths, args.micro_batch_size or args.batch_size
    orders = {"loose": False, "grouped": True}
    plans = {}
    shares: dict[str, Any] = {}
    for name, grouped in orders.items():
        plans[name] = BatchPlan(lengths, args.batch_size, 0, grouped)
        for tokens in args.pack_tokens:
            plan = BatchPlan(lengths, args.batch_size, 0, grouped, Packing(tokens, "flash" not in args.attention))
            plans[f"{name}, packs of {tokens}"] = plan
            told = packing_report(plan, plan.steps_per_epoch, size)
            assert told is not None
            shares[name] = {"padding_share": told.pop("padding_share_unpacked")}
            shares[f"{name}, packs of {tokens}"] = told
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python benchmarks/packing.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": versions(),
        "arguments": vars(args),
        "rows": len(lengths),
        "tokens_per_row": [int(lengths.min()), float(lengths.mean()), int(lengths.max())],
        "epoch": shares,
    }
    if args.repeats:
        result["steps"] = measure(config, task, data, plans, size, args)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")


def measure(config: Any, task: Any, data: Any, plans: dict[str, Any], size: int, args: Any) -> dict[str, Any]:
    """Seconds per step of every side, in turn, and packed over padded on the same rows."""
    import torch

    from peft_engine.building import build_group
    from peft_engine.runtime import start
    from peft_engine.training.step import clip, gradients

    runtime = start(config)
    group = build_group(task, config, runtime, data)
    member = group.members[0]
    tensors = list(member.tensors.values())
    optimizer = torch.optim.AdamW(tensors, lr=1e-5)
    group.activate(member)
    group.model.train()
    train = data["train"]
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    losses: dict[str, list[float]] = {name: [] for name in plans}
    tokens: dict[str, int] = dict.fromkeys(plans, 0)
    for turn in range(args.repeats + 1):
        for name, plan in plans.items():
            began = time.perf_counter()
            pieces = plan.micro_batches(turn + 1, size)
            units = int(train.units[plan.rows(turn + 1)].sum())
            found = gradients(group, task, train, pieces, units, tensors, runtime, 0)
            clip(tensors, found.norm, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[name].append(float(found.loss))
            if turn:  # one to warm up
                seconds[name].append(time.perf_counter() - began)
                tokens[name] += int(train.lengths[plan.rows(turn + 1)].sum())
    told: dict[str, Any] = {}
    for name in plans:
        base = name.split(",")[0]
        told[name] = {
            "step_seconds": statistics.median(seconds[name]),
            "tokens_per_second": tokens[name] / sum(seconds[name]),
            "losses": losses[name],
        }
        if name != base:
            pairs = zip(seconds[name], seconds[base], strict=True)
            told[name]["seconds_over_padded"] = statistics.median(a / b for a, b in pairs)
    return told


if __name__ == "__main__":
    main()
