"""What a tokenised training split gets that no other split has: its mixture, class weights and augmentation."""

from dataclasses import replace

import numpy as np

from ..config import Config
from ..data.augmenting_images import image_change
from ..data.augmenting_text import text_change
from ..data.encoding import EncodedSet
from ..data.mixing import mixture
from ..data.splitting import Splits
from .base import Task, Templated
from .weighting import weighted


def for_training(data: EncodedSet, splits: Splits, task: Task, config: Config) -> EncodedSet:
    """The training split as the loop takes it.

    Of streamed data nothing is read here: the settings that would need its rows are refused with it.

    Raises:
        ConfigError: `data.class_weights` does not fit the labels, or `data.augment.text` the tokenizer or the rows.
    """
    data = replace(data, mixture=mixture(config, splits.train.sources, data.rows))
    if config.data.class_weights != "none":
        assert splits.labels is not None, "class weights need classes"
        shares = np.ones(len(data)) if data.mixture is None else data.mixture.shares()
        data = weighted(data, splits.labels, config.data.class_weights, shares)
    if any(config.data.augment.text.model_dump().values()):
        written = _written(data, splits, task) if isinstance(task, Templated) else None
        change = text_change(config.data.augment.text, task.processor, config.data.max_length, data, written)
        data = replace(data, change=change)
    if "pixels" in data.columns:
        data = replace(data, change=image_change(config.data.augment.image))
    return data


def _written(data: EncodedSet, splits: Splits, task: Templated) -> np.ndarray | None:
    """Tokens that somebody wrote, bool (total_tokens,); None where no chat template wrote any. A mixture may hold rows
    of both kinds."""
    templated = [task.is_templated(splits.train.examples[int(row)]) for row in data.rows]
    if not any(templated):
        return None
    flags = np.ones(len(data.input_ids), dtype=bool)
    for i, row in enumerate(data.rows):
        if templated[i]:
            start, end = int(data.offsets[i]), int(data.offsets[i + 1])
            example, where = splits.train.examples[int(row)], splits.train.where[int(row)]
            flags[start:end] = task.written(example, where)[: end - start]
    return flags
