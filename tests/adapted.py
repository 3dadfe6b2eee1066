"""Tiny random models of six families as backbones, a plain loss, and every method's settings that fit them."""

import copy
import functools
from typing import Any

import families
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from peft_engine.adapters.group import Group, MemberSpec
from peft_engine.adapters.methods import adapt
from peft_engine.backbone import Backbone
from peft_engine.config import Config
from peft_engine.config_methods import PROMPTS, SETTINGS

FAMILIES = ("llama", "gpt2", "bert", "t5", "vit", "resnet")
RANK, TOKENS, HIDDEN, CLASSES = 4, 4, families.HIDDEN, families.CLASSES
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "moe": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
CLASSIFIERS = ("bert", "vit", "resnet", "swin")
SPEC = MemberSpec("default", 0, 1e-2)
# what the tiny widths need, where peft's own defaults are for large models
OPTIONS: dict[str, dict[str, Any]] = {
    "adamss": {"r": 8, "num_subspaces": 2},
    "adaption-prompt": {"adapter_len": 4, "adapter_layers": 2},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 20},
    "frod": {"progressbar": False},
    "lily": {"r": 4},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4},
    "peanut": {"r": 4},
    "psoft": {"r": 4},
    "pvera": {"r": 8},
    "randlora": {"r": 4},
    "road": {"group_size": 8},
    "trainable-tokens": {"token_indices": [24, 37]},
    "unilora": {"r": 4},
    "vblora": {"num_vectors": 8, "vector_length": 4},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 20},
}


@functools.cache
def _made(family: str) -> Any:
    if family == "t5":
        settings: dict[str, Any] = {"vocab_size": families.VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48}
        settings |= {"num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0}
        model = tf.T5ForConditionalGeneration(tf.T5Config(**settings, pad_token_id=0))
        return families.randomise(model)
    if family == "resnet":
        settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        return families.randomise(tf.ResNetForImageClassification(tf.ResNetConfig(**settings, num_labels=CLASSES)))
    if family == "swin":  # its blocks stand in stages of two widths
        settings = {"image_size": 32, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
        return families.randomise(tf.SwinForImageClassification(tf.SwinConfig(**settings, num_labels=CLASSES)).eval())
    return families.make("mixtral" if family == "moe" else family)


def make(family: str) -> Any:
    """A model in which every matrix, norm and bias is random; the same one at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return copy.deepcopy(_made(family))


def backbone_of(family: str) -> Backbone:
    model = make(family)
    head = ["classifier"] if family in CLASSIFIERS else ["lm_head"]
    return Backbone(model, head, head if family in CLASSIFIERS else [], TASKS.get(family), "digest")


def settings_of(method: str, **adapter: Any) -> Config:
    """A config of this method without dropout; the run's own parts are never read."""
    own = SETTINGS[method]
    given: dict[str, Any] = {"method": method}
    given |= {"rank": RANK} if "rank" in own else {}
    given |= {"dropout": 0.0} if "dropout" in own else {}
    given |= {"options": OPTIONS[method]} if method in OPTIONS else {}
    if method in PROMPTS and method != "cpt":
        given["options"] = {"num_virtual_tokens": TOKENS}
    tree = {"task": "causal-lm", "device": "cpu", "output": "o", "model": {"path": "m"}, "data": {"train": "t"}}
    return Config.model_validate(tree | {"adapter": given | adapter})


def group_of(method: str, family: str, **adapter: Any) -> Group:
    return adapt(backbone_of(family), settings_of(method, **adapter), [SPEC])


def batch_of(family: str) -> dict[str, Tensor]:
    """Six rows; the last text is padded."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6) % CLASSES
    if family in ("vit", "resnet", "swin"):
        side = 8 if family == "vit" else 32
        return {"pixel_values": torch.randn(6, 3, side, side, generator=generator), "labels": labels}
    ids = torch.randint(3, families.VOCAB, (6, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "bert":
        return inputs | {"labels": labels}
    return inputs | ({"decoder_input_ids": ids[:, :7], "labels": ids[:, 1:8]} if family == "t5" else {"labels": ids})


def logits_of(model: nn.Module, family: str) -> Tensor:
    """In eval mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return forward(model, batch_of(family))


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return logits


def loss_of(model: nn.Module, family: str) -> Tensor:
    batch = batch_of(family)
    logits, labels = forward(model, batch), batch["labels"]
    if family in ("llama", "gpt2", "moe"):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def train(group: Group, family: str, steps: int = 4, rate: float = 1e-2) -> list[float]:
    """The loss before each step, and after the last one."""
    member = group.members[0]
    optimizer = torch.optim.AdamW(member.tensors.values(), lr=rate)
    group.train()
    losses = []
    for _ in range(steps):
        loss = loss_of(group.model, family)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss))
    return [*losses, float(loss_of(group.model, family))]
