"""Runs a suite with fake cells in a process of its own, to be killed: `driver.py SUITE FOLDER`."""

import sys
from pathlib import Path

from peft_engine.bench.results import open_results
from peft_engine.bench.running import Bench
from peft_engine.errors import EngineError

FAKE = (sys.executable, str(Path(__file__).with_name("fake_cell.py")))

if __name__ == "__main__":
    try:
        Bench(open_results(sys.argv[1], sys.argv[2]), print, program=FAKE).run()
    except EngineError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
