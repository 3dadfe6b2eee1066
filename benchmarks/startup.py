"""How long a user waits before anything happens: `import peft_engine` and `peft-engine --help`, as cold processes.

    .venv/bin/python benchmarks/startup.py [RUNS]

Prints the median of RUNS (11) of each, after one run that fills the disk's cache. Exits with 1 above the bounds.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "import peft_engine": (["-c", "import peft_engine"], 0.3),
    "peft-engine --help": (["-m", "peft_engine", "--help"], 0.5),
}
"""What runs, and the most seconds it may take."""


def median_seconds(words: list[str], runs: int) -> float:
    """Median wall seconds of this Python with these words, process start included."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    found = {name: median_seconds(words, runs) for name, (words, _) in COMMANDS.items()}
    bounds = {name: bound for name, (_, bound) in COMMANDS.items()}
    print(json.dumps({"median_seconds": found, "bounds": bounds, "runs": runs}, indent=2))
    sys.exit(any(found[name] > bounds[name] for name in found))


if __name__ == "__main__":
    main()
