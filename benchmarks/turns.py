"""Sides of a comparison, each a process of its own that holds one model and works only when it is asked to.

The parent lets them work in turn, so that noise of the machine meets all of them. Beside one that works, the others
wait for a line and take no time.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


class Side:
    """A process that says `ready`, then answers each line that it is asked with one line of JSON.

    Args:
        name: of the side, for messages.
        words: its command line.
        environment: what it gets beside this process's environment.
    """

    def __init__(self, name: str, words: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.name = name
        fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **fixed, **(environment or {})}
        )
        self.seconds: list[float] = []
        self.losses: list[float] = []
        while (line := self._line()) != "ready":
            print(line, file=sys.stderr)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            print(f"The side {self.name!r} ended: see its error above.", file=sys.stderr)
            raise SystemExit(code or 1)
        return line.strip()

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def end(self) -> None:
        """Let it end: no more lines come."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
