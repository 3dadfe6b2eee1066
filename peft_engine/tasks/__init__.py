"""Tasks: what is learned. One file each behind the Protocol in `base`; `TASKS` is the table."""

from ..config import Config
from ..data.labels import Labels
from .base import Task
from .causal_lm import CausalLM
from .preference import Preference, Reward
from .text_classification import TextClassification

TASKS: dict[str, type[Task]] = {
    "causal-lm": CausalLM,
    "text-classification": TextClassification,
    "dpo": Preference,
    "orpo": Preference,
    "kto": Preference,
    "reward": Reward,
}


def make_task(config: Config, labels: Labels | None = None) -> Task:
    """The task of a config, its tokenizer loaded, its model not yet.

    Args:
        labels: the classes, where the task has some.
    """
    return TASKS[config.task](config, labels)
