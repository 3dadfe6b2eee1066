"""Seconds and bytes of a whole training step: full fine-tuning, plain HF PEFT, and PEFT fused, also with its frozen
products in a narrow format, on one model.

    python benchmarks/step_time.py                              SmolLM2, 4×256 tokens, LoRA r=16 on all linears, p=0.05
    python benchmarks/step_time.py --dropout 0                  the same without dropout
    python benchmarks/step_time.py --model minilm --rows 32 --tokens 128 --dropout 0.1
    python benchmarks/step_time.py --sides full peft fused int8 int8-head        frozen products in int8, then the head
    python benchmarks/step_time.py --sides nf4-peft nf4 llm-int8-peft llm-int8  over bitsandbytes' linears
    python benchmarks/step_time.py --model llama-1b --rows 1 --tokens 512 --sides full int8
                                                                4 layers of Llama-3.2-1B's shapes without their head

Every side is a process of its own that holds one model; the parent lets them step in turn, so that noise of the machine
meets all sides, and takes medians. Steps are whole: forward, loss, backward, clipping, AdamW, zero_grad. Bytes are live
tensor storages, counted on a step of their own (peft_engine.meters.memory). Targets are real text; llama-1b has random
weights and ids, and the mean square of its outputs for a loss.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from turns import Side

ROOT = Path(__file__).resolve().parents[1]
OURS: dict[str, dict[str, Any]] = {
    "fused": {},
    "auto": {"frozen_compute": "auto"},
    "bf16": {"frozen_compute": "bf16"},
    "int8": {"frozen_compute": "int8", "frozen_outliers": "none"},
    "int8-smooth": {"frozen_compute": "int8", "frozen_outliers": "smooth"},
    "int8-columns": {"frozen_compute": "int8", "frozen_outliers": "columns"},
    "int8-both": {"frozen_compute": "int8", "frozen_outliers": "both"},
    "int8-head": {"frozen_compute": "int8", "frozen_outliers": "none", "frozen_head": "int8"},
}
"""Fused sides and the arguments of `fuse` that make them."""
QUANTISED = {"nf4": "nf4", "nf4-peft": "nf4", "llm-int8": "int8", "llm-int8-peft": "int8"}
"""Sides whose linears bitsandbytes holds in 4 or 8 bits: fused, and as peft runs them."""
SIDES = ("full", "peft", *OURS, *QUANTISED)
LLAMA = "llama-1b"


def build(side: str, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """(model, batch). Imports are here, so that the parent stays light."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    if args.model == LLAMA:
        assert side not in QUANTISED, "quantised sides load a model of .assets/models"
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            vocab_size=4096, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, rope_theta=500000.0,
        )  # fmt: skip
        ids = torch.randint(0, 4096, (args.rows, args.tokens))
        return _with_adapters(side, args, LlamaModel(config), {"input_ids": ids, "use_cache": False}, None)
    path = ROOT / ".assets" / "models" / args.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    loading: dict[str, Any] = {"dtype": torch.float32}
    if side in QUANTISED:
        from transformers import BitsAndBytesConfig

        loading["device_map"] = {"": "cpu"}
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=QUANTISED[side] == "nf4", load_in_8bit=QUANTISED[side] == "int8", bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    causal = "CausalLM" in str(json.loads((path / "config.json").read_text()).get("architectures"))
    rows = (ROOT / ".assets" / "data" / "e2e_nlg.jsonl").read_text().splitlines()[:2000]
    text = " ".join(" ".join(str(v) for v in json.loads(row).values()) for row in rows)
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    size = args.rows * args.tokens
    input_ids = torch.tensor(ids[:size]).view(args.rows, args.tokens)
    if causal:
        model = AutoModelForCausalLM.from_pretrained(path, **loading)
        batch = {"input_ids": input_ids, "labels": input_ids, "use_cache": False}
    else:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, **loading)
        batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        batch["labels"] = torch.arange(args.rows) % 2
    return _with_adapters(side, args, model, batch, "CAUSAL_LM" if causal else "SEQ_CLS")


def _with_adapters(
    side: str, args: argparse.Namespace, model: Any, batch: dict[str, Any], task: str | None
) -> tuple[Any, dict[str, Any]]:
    from peft import LoraConfig, get_peft_model

    if side != "full":
        settings = LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout, target_modules="all-linear",
            task_type=task,
        )  # fmt: skip
        model = get_peft_model(model, settings)
    if side in OURS or (side in QUANTISED and not side.endswith("-peft")):
        from peft_engine import fuse

        inputs = {name: value for name, value in batch.items() if name != "labels"}
        report = fuse(model, **OURS.get(side, {}), calibrate=lambda: model(**inputs))
        print(f"{side}: {report.counts()} {report.told()}", file=sys.stderr)
    if args.allocator == "all" or (args.allocator == "ours" and side != "full" and not side.endswith("peft")):
        from peft_engine.runtime import keep_freed_memory

        keep_freed_memory()
    return model.train(), batch


def worker(side: str, args: argparse.Namespace) -> None:
    """Steps when asked to: "step" → seconds and loss, "bytes" → peak of live bytes, "profile" → a table."""
    import torch

    from peft_engine.meters.memory import LiveBytes
    from peft_kernels._quantised_products import release

    model, batch = build(side, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)  # the default of HF Trainer and of `train`

    def step() -> float:
        output = model(**batch)
        loss = output.last_hidden_state.square().mean() if args.model == LLAMA else output.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    print("ready", flush=True)
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        if line.strip() == "step":
            start = time.perf_counter()
            answer["loss"] = step()
            answer["seconds"] = time.perf_counter() - start
        elif line.strip() == "bytes":
            release()  # else the scratch buffer of quantised weights would be there before the count begins
            states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
            with LiveBytes([*model.parameters(), *model.buffers(), *states]) as meter:
                step()
            answer["peak_bytes"] = meter.peak
        elif line.strip() == "profile":
            from torch.profiler import profile

            with profile() as found:
                step()
            table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50)
            print(table, file=sys.stderr)
        print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help=f"a folder of .assets/models, or {LLAMA}")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--allocator", choices=("none", "ours", "all"), default="ours",
        help="which sides keep freed memory, as `train` does on a CPU (default: ours, as users run each)",
    )  # fmt: skip
    parser.add_argument("--sides", nargs="+", default=["full", "peft", "fused"], choices=SIDES)
    parser.add_argument("--profile", action="store_true", help="also print where the last side's step goes")
    parser.add_argument("--out", help="also write the result to this file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        worker(args.side, args)
        return
    sides = [Side(name, [sys.executable, __file__, *sys.argv[1:], "--side", name]) for name in args.sides]
    for turn in range(args.repeats + 2):
        for side in sides:
            answer = side.ask("step")
            side.losses.append(answer["loss"])
            if turn >= 2:  # two to warm up
                side.seconds.append(answer["seconds"])
    from peft_engine.runtime import hardware, versions

    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python benchmarks/step_time.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": versions(),
        "arguments": {k: v for k, v in vars(args).items() if k != "side"},
    }
    for side in sides:
        result[side.name] = {
            "step_seconds": statistics.median(side.seconds),
            "spread": [min(side.seconds), max(side.seconds)],
            "peak_bytes": side.ask("bytes")["peak_bytes"],
            "losses": side.losses,
        }
    named = {side.name: side for side in sides}
    for ours in (name for name in args.sides if name != "full" and not name.endswith("peft")):
        for other in (name for name in ("peft", "full", "fused", f"{ours}-peft") if name in named and name != ours):
            pairs = zip(named[ours].seconds, named[other].seconds, strict=True)
            result[f"{ours}/{other}"] = {
                "seconds": result[ours]["step_seconds"] / result[other]["step_seconds"],
                "median_of_pairs": statistics.median(a / b for a, b in pairs),
                "bytes": result[ours]["peak_bytes"] / result[other]["peak_bytes"],
            }
    if args.profile:
        sides[-1].ask("profile")
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
