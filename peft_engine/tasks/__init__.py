"""Tasks: what is learned. One file each behind the Protocol in `base`; `TASKS` is the table."""

from ..config import Config
from ..data.labels import Labels
from .base import Task
from .causal_lm import CausalLM
from .image_classification import ImageClassification
from .multiple_choice import MultipleChoice
from .preference import Preference, Reward
from .seq2seq import Seq2Seq
from .text_classification import TextClassification
from .token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    "causal-lm": CausalLM,
    "text-classification": TextClassification,
    "image-classification": ImageClassification,
    "token-classification": TokenClassification,
    "seq2seq": Seq2Seq,
    "dpo": Preference,
    "orpo": Preference,
    "kto": Preference,
    "reward": Reward,
}


def make_task(config: Config, labels: Labels | None = None) -> Task:
    """The task of a config, its tokenizer loaded, its model not yet.

    Args:
        labels: the classes, where the task has some. Those of rows with choices make a MultipleChoice.
    """
    if labels is not None and labels.kind == "choice":
        return MultipleChoice(config, labels)
    return TASKS[config.task](config, labels)
