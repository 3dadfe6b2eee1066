"""What a person sees while it trains: a bar on a terminal, plain lines elsewhere, nothing with `--quiet`."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..meters.memory import peak_rss_bytes

LINE_SECONDS = 5.0  # plain mode: at most one line in this time


class ProgressView:
    """Shows loss, learning rate, tokens/s, memory and the time left, on stderr."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self.console = console
        self.quiet = quiet
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = 0.0
        self._first_step: int | None = None

    def __enter__(self) -> "ProgressView":
        if self.console.is_terminal and not self.quiet:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int, total: int, row: dict[str, Any]) -> None:
        if self.quiet:
            return
        if self._first_step is None:
            self._first_step, self._started = step, time.perf_counter()  # the first step itself is not timed
        figures = (
            f"loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"{peak_rss_bytes() / 2**30:.2f} GiB"
        )
        if self._bar:
            if self._task is None:
                self._task = self._bar.add_task("training", total=total, figures="")
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.perf_counter()
        if now - self._last_line >= LINE_SECONDS or step == total:
            self._last_line = now
            done = step - self._first_step
            left = f"  {(now - self._started) / done * (total - step):.0f} s left" if done else ""
            self.console.print(f"step {step}/{total}  {figures}{left}", highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """What must be known even with `--quiet`."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)
