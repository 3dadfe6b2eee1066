"""The `data` verb: what training would see, before it is trained on."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from .config import Config
from .data.encoding import EncodedSet, cache_folder
from .data.inspecting import inspect_splits, mask_preview, print_inspection
from .data.loading import encode_split, load_splits
from .tasks import Task, make_task


def inspect_data(config: Config, preview_rows: int) -> tuple[dict[str, Any], Callable[[Console], None]]:
    """Numbers about a run's data, and a function that prints them with the mask of its first training rows.

    Rows that teach nothing are told and the first of them shown, not refused.
    """
    splits = load_splits(config)
    task = make_task(config, splits.labels)
    there = {name: split for name in ("train", "eval", "test") if (split := getattr(splits, name)) is not None}
    cache = cache_folder(config.data.cache)
    encoded = {name: encode_split(split, task.encode, task.fingerprint(), None, cache) for name, split in there.items()}
    report = inspect_splits(splits, encoded)

    def show(console: Console) -> None:
        print_inspection(report, console)
        for row in range(min(preview_rows, len(encoded["train"]))):
            console.print(f"\n{splits.train.where[int(encoded['train'].rows[row])]}", style="bold", highlight=False)
            console.print(Text.from_ansi(_preview(task, encoded["train"], row, console.is_terminal)), soft_wrap=True)
        for row, reason in encoded["train"].dropped[:preview_rows]:
            where = splits.train.where[row]
            console.print(f"\n{where} (dropped: {reason})", style="bold", highlight=False)
            ids, learned = task.mask(splits.train.examples[row], where)
            shown = mask_preview(task.processor, ids, learned, colour=console.is_terminal)
            console.print(Text.from_ansi(shown), soft_wrap=True)

    return report, show


def _preview(task: Task, data: EncodedSet, row: int, colour: bool) -> str:
    ids = data.tokens(row).tolist()
    learned = data.token_column("supervised", row).tolist() if "supervised" in data.columns else [False] * len(ids)
    return mask_preview(task.processor, ids, learned, colour=colour)
