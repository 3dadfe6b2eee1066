"""The `data` verb: what training would see, before it is trained on."""

from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from .config import Config
from .data.augmenting_images import describe
from .data.encoding import EncodedSet, cache_folder
from .data.image_sheets import image_preview, write_sheet
from .data.inspecting import inspect_splits, mask_preview, print_inspection
from .data.loading import encode_split, load_splits
from .data.splitting import Splits
from .errors import ConfigError
from .runtime import combine
from .tasks import Task, make_task
from .tasks.preparing import for_training
from .tasks.weighting import weights_by_class


def inspect_data(
    config: Config, preview_rows: int, sheet: str | None = None
) -> tuple[dict[str, Any], Callable[[Console], None]]:
    """Numbers about a run's data and the mask of its first training rows, and a function that prints both.

    Rows that teach nothing are told and the first of them shown, not refused.

    Args:
        sheet: PNG file to write for images: the first training rows as they are, and as two steps would change them.
    """
    if sheet and config.task != "image-classification":
        raise ConfigError(f"--images is for image-classification, and the task is {config.task}.", "Leave it out.")
    splits = load_splits(config)
    task = make_task(config, splits.labels)
    there = {name: split for name in ("train", "eval", "test") if (split := getattr(splits, name)) is not None}
    cache = cache_folder(config.data.cache)
    encoded = {name: encode_split(split, task.encode, task.fingerprint(), None, cache) for name, split in there.items()}
    encoded["train"] = for_training(encoded["train"], splits, task, config)
    report = inspect_splits(splits, encoded)
    report["class_weights"] = weights_by_class(encoded["train"], splits.labels)
    report["augmentation"] = _augmentation(config)
    report["preview"] = _rows(task, encoded["train"], splits, config, preview_rows)
    if sheet:
        write_sheet(sheet, encoded["train"], config.data.augment.image, config.training.seed)

    def show(console: Console) -> None:
        print_inspection(report, console)
        if report["class_weights"]:
            told = ", ".join(f"{name} {weight:.4g}" for name, weight in report["class_weights"].items())
            console.print(Text(f"Class weights of the training loss: {told}."))
        for row in range(min(preview_rows, len(encoded["train"]))):
            console.print(f"\n{splits.train.where[int(encoded['train'].rows[row])]}", style="bold", highlight=False)
            console.print(Text.from_ansi(_preview(task, encoded["train"], row, console.is_terminal)), soft_wrap=True)
            if encoded["train"].change is not None and "pixels" not in encoded["train"].columns:
                changed = _changed(encoded["train"], row, config)
                console.print("augmented:", style="bold", highlight=False)
                console.print(Text.from_ansi(_preview(task, changed, 0, console.is_terminal)), soft_wrap=True)
        if told := describe(config.data.augment.image):
            console.print(f"\nTraining images are changed: {told}.", highlight=False)
        for row, reason in encoded["train"].dropped[:preview_rows]:
            where = splits.train.where[row]
            console.print(f"\n{where} (dropped: {reason})", style="bold", highlight=False)
            ids, learned = task.mask(splits.train.examples[row], where)
            shown = mask_preview(task.processor, ids, learned, colour=console.is_terminal)
            console.print(Text.from_ansi(shown), soft_wrap=True)

    return report, show


def _augmentation(config: Config) -> dict[str, Any]:
    """What changes training rows, by kind; nothing of what is off."""
    texts = {name: value for name, value in config.data.augment.text.model_dump().items() if value}
    images = describe(config.data.augment.image) if config.task == "image-classification" else ""
    return ({"text": texts} if texts else {}) | ({"image": images} if images else {})


def _rows(task: Task, data: EncodedSet, splits: Splits, config: Config, most: int) -> list[dict[str, Any]]:
    """The first training rows for JSON: where each stands, and of texts what is read, learned between ⟦ and ⟧, with
    what the first step would make of it; then those that are dropped, with their reason."""
    found: list[dict[str, Any]] = []
    for row in range(min(most, len(data))):
        told: dict[str, Any] = {"where": splits.train.where[int(data.rows[row])]}
        if "pixels" not in data.columns:
            told["text"] = _preview(task, data, row, False)
            if data.change is not None:
                told["augmented"] = _preview(task, _changed(data, row, config), 0, False)
        found.append(told)
    found += [{"where": splits.train.where[row], "dropped": reason} for row, reason in data.dropped[:most]]
    return found


def _changed(data: EncodedSet, row: int, config: Config) -> EncodedSet:
    """A row as the first step would have it."""
    changed, _ = data.drawn(np.array([row]), combine(config.training.seed, 4, 1))
    return changed


def _preview(task: Task, data: EncodedSet, row: int, colour: bool) -> str:
    if "pixels" in data.columns:
        return image_preview(data, row, colour=colour)
    ids = data.tokens(row).tolist()
    learned = data.token_column("supervised", row).tolist() if "supervised" in data.columns else [False] * len(ids)
    return mask_preview(task.processor, ids, learned, colour=colour)
