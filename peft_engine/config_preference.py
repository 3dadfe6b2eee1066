"""What preference tuning can't be combined with: TRL's trainers make its loss."""

from collections.abc import Iterator, Mapping
from typing import Any

from peft_engine.config_methods import BOTTLENECK, PROMPTS, WHOLE_TENSORS

REFERRED = ("dpo", "kto")
"""Tasks that compare with the model as it was at the start."""


def preference_faults(task: str, adapter: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(setting of `adapter`, what is wrong with it).

    Args:
        adapter: the settings of `adapter`, defaults filled in.
    """
    method = adapter["method"]
    if method in PROMPTS:
        yield "method", f"got {method}, and TRL's losses of task {task} don't count virtual tokens; take another method"
    if method == "adalora":
        yield (
            "method",
            f"got adalora, whose ranks TRL's trainer of task {task} does not move after each step; take lora",
        )
    if method == "lora" and adapter["init"] == "lora-ga":
        yield "init", f"got lora-ga, which needs gradients of the loss, and TRL makes that of task {task}; take eva"
    if task in REFERRED and adapter["start_from"] is not None and method in (*WHOLE_TENSORS, *BOTTLENECK):
        yield (
            "start_from",
            f"the reference of task {task} would be the model at model.path, not this start, with adapter.method "
            f"{method}; export that run with --merged and give the folder as model.path",
        )
