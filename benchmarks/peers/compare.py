"""The same LoRA run in the engine and in other trainers: loss by loss, second by second, byte by byte.

    python benchmarks/peers/compare.py configs/causal-lm-text.yaml --peers hf-trainer trl --steps 4 --repeats 5 \\
        --set adapter.dropout=0 --output peers.json

    hf-trainer  transformers' Trainer with a peft model
    trl         TRL's SFTTrainer (task causal-lm)
    liger       transformers' Trainer with Liger's kernels (CUDA only)

All sides hold the same backbone and start from the same adapter, see the same rows in the same batches, and use the
same optimizer and schedule. Each is a process of its own; they train in turn, `--steps` optimizer steps at a time, in
`--repeats` timed blocks after one that warms up. At dropout 0 every step's loss must agree, else the exit code is 7;
with dropout the masks differ, and losses are kept but not compared. Bytes on a CPU are live tensor storages, counted on
the step with the most tokens, which is left out of the times; on CUDA they are the allocator's maximum.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from turns import Side  # noqa: E402

PEERS = ("hf-trainer", "trl", "liger")
OURS = "peft-engine"
# Sums in another order give other last bits, which Adam carries on. fp32: a hundred roundings; bf16: a few of its own.
ROUNDING = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}


def main() -> None:
    from peft_engine.errors import EngineError

    arguments = parse(sys.argv[1:])
    try:
        result = compare(arguments)
        text = json.dumps(result, indent=1)
        print(text)
        if arguments.output:
            Path(arguments.output).write_text(text + "\n", encoding="utf-8")
        refuse_disagreement(result)
    except EngineError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file with adapter.method: lora")
    parser.add_argument("--peers", nargs="+", default=["hf-trainer"], choices=PEERS)
    parser.add_argument("--steps", type=_count, default=4, help="optimizer steps of a block")
    parser.add_argument("--repeats", type=_count, default=5, help="timed blocks of each side")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings that replace the file's")
    parser.add_argument("--output", help="also write the result to this file")
    return parser.parse_args(words)


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return int(text)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all sides and put their numbers together.

    Raises:
        ConfigError: the config can't be trained by a peer as it is, or a peer can't run on this machine.
    """
    from peers.sides import refuse_what_peers_lack
    from peft_engine.config_reading import load_config

    config = load_config(arguments.config, tuple(arguments.set))
    refuse_what_peers_lack(config, arguments.peers)
    names = [OURS, *dict.fromkeys(arguments.peers)]
    script = str(ROOT / "benchmarks" / "peers" / "sides.py")
    given = [arguments.config, str(arguments.steps), str(arguments.repeats + 1), *arguments.set]
    sides = []
    for name in names:
        sides.append(Side(name, [sys.executable, script, name, *given]))
    facts = {side.name: side.ask("facts") for side in sides}
    for turn in range(arguments.repeats + 1):
        for side in sides if turn % 2 else sides[::-1]:
            answer = side.ask("block")
            side.losses += answer["losses"]
            if turn and answer["seconds"]:  # the first warms up; a block may hold only the step that counts bytes
                side.seconds.append(statistics.mean(answer["seconds"]))
    ends = {side.name: side.ask("end") for side in sides}
    for side in sides:
        side.end()
    measured = {
        side.name: {
            "step_seconds": statistics.median(side.seconds) if side.seconds else None,
            "spread": [min(side.seconds), max(side.seconds)] if side.seconds else None,
            "block_seconds": side.seconds,
            "losses": side.losses,
            **facts[side.name],
            **ends[side.name],
        }
        for side in sides
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/peers/compare.py", *sys.argv[1:]]),
        "config": config.model_dump(mode="json", exclude_unset=True),
        **_machine(),
        "steps": arguments.steps * (arguments.repeats + 1),
        "sides": measured,
        "against_peers": {name: ratios(measured[OURS], measured[name]) for name in names[1:]},
        "losses": agreement(measured, config.adapter.dropout == 0 and not _drops(measured)),
    }


def _machine() -> dict[str, Any]:
    from peft_engine.runtime import hardware, versions

    return {"hardware": hardware(), "versions": versions()}


def _drops(measured: dict[str, Any]) -> bool:
    return any(side["model_dropout"] for side in measured.values())


def ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Ours over the peer's: medians of seconds, the median over blocks that ran side by side, and peak bytes."""
    if not ours["block_seconds"] or not peer["block_seconds"]:
        return {"seconds": None, "median_of_blocks": None, "bytes": ours["peak_bytes"] / peer["peak_bytes"]}
    pairs = zip(ours["block_seconds"], peer["block_seconds"], strict=True)
    return {
        "seconds": ours["step_seconds"] / peer["step_seconds"],
        "median_of_blocks": statistics.median(a / b for a, b in pairs),
        "bytes": ours["peak_bytes"] / peer["peak_bytes"],
    }


def agreement(measured: dict[str, Any], comparable: bool) -> dict[str, Any]:
    """Largest relative difference of any step's loss from ours, by peer, and whether all are rounding.

    Args:
        comparable: without dropout. With it, masks differ from side to side, and nothing is compared.
    """
    same = len({(side["start_digest"], side["rows_digest"]) for side in measured.values()}) == 1
    tolerance = ROUNDING[measured[OURS]["precision"]]
    if not comparable:
        return {"compared": False, "why": "dropout is on: masks differ", "same_start": same}
    ours = measured[OURS]["losses"]
    worst = {
        name: max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(ours, side["losses"], strict=True))
        for name, side in measured.items()
        if name != OURS
    }
    return {
        "compared": True,
        "same_start": same,
        "largest_relative_difference": worst,
        "tolerance": tolerance,
        "agree": all(value <= tolerance for value in worst.values()),
    }


def refuse_disagreement(result: dict[str, Any]) -> None:
    """Raises VerificationError where sides began from other weights, or their losses differ by more than rounding."""
    from peft_engine.errors import VerificationError

    found = result["losses"]
    if not found["same_start"]:
        raise VerificationError(
            "The sides did not start from the same adapter weights, or would not see the same rows.",
            "Nothing here is comparable; find what differs.",
        )
    if found["compared"] and not found["agree"]:
        raise VerificationError(
            f"The losses differ by {found['largest_relative_difference']} (relative), expected at most "
            f"{found['tolerance']}: the sides did not train the same.",
            "Don't use the times; find what differs.",
        )


if __name__ == "__main__":
    main()
