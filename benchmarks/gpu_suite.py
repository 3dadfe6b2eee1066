"""What the fused kernels are worth on a GPU, in parts of at most eight minutes each.

    python benchmarks/gpu_suite.py --part NAME [--budget SECONDS] [--out FOLDER]
    python benchmarks/gpu_suite.py --part all --smoke       the same code in small, on a CPU, in under a minute

Parts: correctness (the kernel tests with real CUDA), linear, elementwise, loss, step, encoder, eight_bit, quantised,
levers. Cells run in order of importance; each is checked against the plain computation before it is timed, printed and
written when it is measured, and no cell starts after the budget is spent. Results are appended to
gpu_<date>_<part>.json in benchmarks/results, with a table in Markdown beside it. Without an installed project:
PYTHONPATH=.:kernels:benchmarks.

The exit status is 1 if a cell was red. See benchmarks/results/README.md for what the numbers mean.
"""

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from gpu_parts.bench import Bench, OutOfTimeError

PARTS = ("correctness", "linear", "elementwise", "loss", "step", "encoder", "eight_bit", "quantised", "levers")
RESULTS = Path(__file__).resolve().parent / "results"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", required=True, choices=(*PARTS, "all"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="folder of the results; a scratch folder with --smoke")
    parser.add_argument("--budget", type=float, default=460, help="seconds after which no further cell starts")
    return parser.parse_args(arguments)


def run_part(part: str, *, smoke: bool, out: Path, budget: float) -> int:
    """Number of faults: red cells, and the part itself if it broke off."""
    kind = "smoke" if smoke else "gpu"
    path = out / f"{kind}_{datetime.now(UTC):%Y-%m-%d}_{part}.json"
    print(f"== {part}", flush=True)
    device = torch.device("cpu" if smoke else "cuda")
    bench = Bench(part, smoke, path, budget, device)
    broken = 0
    try:
        importlib.import_module(f"gpu_parts.{part}").run(bench)
    except OutOfTimeError:
        bench.note(f"stopped after {time.monotonic() - bench.start:.0f} s of {budget:.0f}: further cells did not start")
    except Exception:
        bench.note("broke off: " + traceback.format_exc().strip().replace("\n", " / ")[-1500:])
        broken = 1
    bench.write()
    print(f"{len(bench.cells)} cells, {bench.red} red, in {path}", flush=True)
    return bench.red + broken


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not options.smoke and not torch.cuda.is_available():
        print("No CUDA device here. --smoke runs the same code in small on the CPU.", file=sys.stderr)
        return 2
    out = options.out or (Path(tempfile.mkdtemp(prefix="gpu_suite_")) if options.smoke else RESULTS)
    parts = PARTS if options.part == "all" else (options.part,)
    faults = sum(run_part(part, smoke=options.smoke, out=out, budget=options.budget) for part in parts)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
