"""Heads of transformers' own: for a number of classes, and which modules a language model's output is."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ..backbone import Backbone, digest_weights, load_model
from ..config import Config
from ..errors import ConfigError
from ..quantised import kind_of, quantised_linears


def name_classes(model_config: Any, names: list[str]) -> None:
    """Give a model's config as many outputs as there are names, in place."""
    model_config.num_labels = len(names)
    model_config.id2label = dict(enumerate(names))
    model_config.label2id = {name: i for i, name in enumerate(names)}


def load_with_head(
    config: Config, auto_class: Any, model_config: Any, device: torch.device, peft_task: str | None
) -> Backbone:
    """The backbone under a head that an Auto class gives it; a head that is not in the checkpoint is a new module.

    Raises:
        ConfigError: the class has no such head, or other tensors are missing (trap 22); the head is stored quantised.
    """
    model, new = load_model(config, auto_class, model_config, device, is_head)
    heads = head_modules(model)
    for name, linear in quantised_linears(model).items():
        if any(f"{name}.".startswith(f"{head}.") for head in heads):
            raise ConfigError(
                f"model.path: {config.model.path} stores {name} in {kind_of(linear)}, and the head is trained.",
                "Give the model in full precision, or quantise it with its head among llm_int8_skip_modules.",
            )
    fresh = [name for name in heads if any(tensor.startswith(f"{name}.") for tensor in new)]
    return Backbone(model, heads, fresh, peft_task, digest_weights(model.base_model))


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules beside the base model that have weights."""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor belongs to the head."""
    return not name.startswith(f"{model.base_model_prefix}.")


def output_names(model: PreTrainedModel) -> list[str]:
    """Full names of the module that makes a language model's logits."""
    output = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is output]


def with_outputs(outputs: int, settings: dict[str, Any]) -> dict[str, Any]:
    """`from_pretrained`'s settings for so many outputs: in the config, where one is given."""
    given = settings.get("config")
    if given is None:
        return {**settings, "num_labels": outputs}
    given.num_labels = outputs
    return settings
