"""Every method of peft by name: it trains what it should, is saved and comes back, or says in peft's words why not."""

import functools
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import (
    CLASSES,
    CLASSIFIERS,
    FAMILIES,
    HIDDEN,
    OPTIONS,
    RANK,
    TOKENS,
    backbone_of,
    group_of,
    logits_of,
    make,
    settings_of,
    train,
)
from peft import PeftModel, PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_engine.adapters.files import load_adapter, save_adapter
from peft_engine.adapters.peft_methods import refuse_failing, trim_prompts
from peft_engine.config_methods import names, peft_type
from peft_engine.errors import ConfigError

Shape = tuple[int, int, int]  # inputs, outputs, elements of the kernel (1 for a linear)
HEADS = {"bert": HIDDEN * CLASSES + CLASSES, "vit": HIDDEN * CLASSES + CLASSES, "resnet": 16 * CLASSES + CLASSES}
# layers whose keys and values, or whose MLP, an adapter sits at; T5 has two stacks of two
STACK = {"llama": 2, "gpt2": 2, "bert": 2, "t5": 2, "vit": 2}
KEYS = {"llama": 16, "gpt2": HIDDEN, "bert": HIDDEN, "t5": HIDDEN}
PROMPTED = ("llama", "gpt2", "bert", "t5")


@functools.cache
def shapes(family: str) -> list[Shape]:
    """Of all linears outside the head, or of all convolutions where there are none."""
    found: list[Shape] = []
    modules = [(n, m) for n, m in make(family).named_modules() if not n.startswith(("classifier", "lm_head"))]
    for _, m in modules:
        if isinstance(m, nn.Linear):
            found.append((m.in_features, m.out_features, 1))
        elif isinstance(m, Conv1D):
            found.append((m.nx, m.nf, 1))
    if not found:
        convolutions = [m for _, m in modules if isinstance(m, nn.Conv2d)]
        found = [(m.in_channels, m.out_channels, m.kernel_size[0] * m.kernel_size[1]) for m in convolutions]
    return found


def per_module(count: Callable[[int, int, int], int]) -> Callable[[str], int]:
    return lambda family: sum(count(*shape) for shape in shapes(family))


def kronecker(i: int, o: int, k: int) -> int:
    """A full left factor of the smaller divisors, a right factor of the larger ones in two parts of rank 4."""

    def divisors(n: int) -> tuple[int, int]:
        small = max(d for d in range(1, int(n**0.5) + 1) if n % d == 0)
        return small, n // small

    (o_small, o_large), (i_small, i_large) = divisors(o), divisors(i)
    right = RANK * (o_large + i_large * k) if max(o_large, i_large) / 2 > RANK else o_large * i_large * k
    return o_small * i_small + right


def parameters(family: str, wanted: Callable[[str, nn.Module, torch.Tensor], bool]) -> int:
    """Over a model's own tensors outside a new head."""
    model = make(family)
    return sum(
        p.numel()
        for n, m in model.named_modules()
        for q, p in m.named_parameters(recurse=False)
        if wanted(f"{n}.{q}", m, p) and not (family in CLASSIFIERS and n.startswith("classifier"))
    )


def embedded(family: str) -> int:
    """Numbers of a prompt's embeddings: T5's prompt goes before both stacks."""
    return TOKENS * HIDDEN * (2 if family == "t5" else 1)


BOTTLENECK = 2 * RANK * HIDDEN + RANK + HIDDEN
COUNTS: dict[str, Callable[[str], int]] = {
    "lora": per_module(lambda i, o, k: RANK * (i * k + o)),
    "adalora": per_module(lambda i, o, k: 6 * (i * k + o) + 6),  # starts at 1.5 times the rank
    "ia3": per_module(lambda i, o, k: o),
    "vera": per_module(lambda i, o, k: o + 8),
    "oft": per_module(lambda i, o, k: i // 4 * 6),  # 4·3/2 angles per block of 4
    "boft": per_module(lambda i, o, k: 4 * i + o),
    "loha": per_module(lambda i, o, k: 2 * RANK * (i * k + o)),
    "lokr": per_module(kronecker),
    "fourierft": per_module(lambda i, o, k: 20),
    "miss": per_module(lambda i, o, k: 4 * o),
    "hra": per_module(lambda i, o, k: RANK * i * k),
    "randlora": per_module(lambda i, o, k: ceil(min(i, o) / 4) * (4 + min(i, o))),
    "c3a": per_module(lambda i, o, k: i * o // 8),
    "layernorm": lambda family: parameters(family, lambda n, m, p: p.dim() == 1 and "orm" in type(m).__name__),
    "trainable-tokens": lambda family: 2 * HIDDEN,
    "prefix": lambda family: TOKENS * 2 * STACK[family] * KEYS[family],
    "prompt": embedded,
    "p-tuning": lambda family: embedded(family) + 3 * (HIDDEN * HIDDEN + HIDDEN),
    "full": lambda family: sum(p.numel() for p in make(family).parameters()) - HEADS.get(family, 0),
    "head": lambda family: 0 if family in CLASSIFIERS else 97 * HIDDEN,
    "bitfit": lambda family: parameters(family, lambda n, m, p: n.endswith(".bias")),
    "houlsby": lambda family: BOTTLENECK * (2 * 2 + 2 * 3 if family == "t5" else 2 * STACK[family]),
    "pfeiffer": lambda family: BOTTLENECK * (4 if family == "t5" else STACK[family]),
    "parallel": lambda family: BOTTLENECK * (4 if family == "t5" else STACK[family]),
}
NO_CONV1D = ("boft", "c3a", "hra", "miss", "oft")
REFUSED: dict[tuple[str, str], str] = {
    **{(method, "gpt2"): "Target module Conv1D(nf=96, nx=32) is not supported" for method in NO_CONV1D},
    **{(method, "gpt2"): "Conv1D'> not supported" for method in ("loha", "lokr")},
    ("bitfit", "llama"): "LlamaForCausalLM has none",
    ("bitfit", "t5"): "T5ForConditionalGeneration has none",
    **{(method, "vit"): "puts virtual tokens before a text" for method in ("prefix", "prompt", "p-tuning")},
    **{(method, "resnet"): "puts virtual tokens before a text" for method in ("prefix", "prompt", "p-tuning")},
    **{("trainable-tokens", family): "trains nothing else, and classifier of this" for family in CLASSIFIERS},
    **{(method, "resnet"): "has no layers of attention and MLP" for method in ("houlsby", "pfeiffer", "parallel")},
    ("vera", "resnet"): "No layers types compatible with VeRA were found",
    ("randlora", "resnet"): "No layers types compatible with RandLora were found",
    ("boft", "resnet"): "Convolutional kernel dimension (147) must be divisible by boft_block_size (4)",
    ("oft", "resnet"): "would change the model before any training",
    **{(method, "resnet"): "Target module Conv2d(3, 8" for method in ("miss", "c3a", "fourierft")},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", COUNTS)
def test_every_named_method_on_six_families(method: str, family: str, tmp_path: Path) -> None:
    if (method, family) in REFUSED:
        with pytest.raises(ConfigError) as caught:
            group_of(method, family)
        assert REFUSED[method, family] in str(caught.value)
        return
    group = group_of(method, family)
    member = group.members[0]
    assert sum(t.numel() for t in member.tensors.values()) == COUNTS[method](family) + HEADS.get(family, 0)
    assert all(t.dtype == torch.float32 and t.requires_grad for t in member.tensors.values())
    trained = {id(t) for t in member.tensors.values()}
    frozen = {n: t.detach().clone() for n, t in group.model.state_dict(keep_vars=True).items() if id(t) not in trained}
    losses = train(group, family)
    assert losses[-1] < losses[0]
    after = group.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    check_round_trip(method, family, group, tmp_path)


def check_round_trip(method: str, family: str, group: Any, folder: Path) -> None:
    """Equal bits in this engine; in plain peft too, where the method is peft's."""
    member, settings, wanted = group.members[0], settings_of(method), logits_of(group.model, family)
    save_adapter(group, member, folder)
    again = load_adapter(backbone_of(family), settings, folder)
    if method not in ("p-tuning", "cpt", "cartridge"):  # of those the file holds what their encoder made
        assert again.members[0].tensors.keys() == member.tensors.keys()
        assert all(torch.equal(t, member.tensors[name]) for name, t in again.members[0].tensors.items())
    assert torch.equal(logits_of(again.model, family), wanted)
    if peft_type(method):
        plain = PeftModel.from_pretrained(backbone_of(family).model, str(folder))
        trim_prompts(plain)
        assert torch.equal(logits_of(plain, family), wanted)


def test_our_names_are_all_of_pefts_types() -> None:
    assert {peft_type(name) for name in names()} - {None} == {kind.name for kind in PeftType}


# what can't run at all, or not by settings alone, in peft's own words (ours for shadow, whose loss is inside peft)
NEVER = {
    "multitask-prompt": "task_ids cannot be None",
    "poly": "task_ids should not be None.",
    "xlora": "`use_cache` must be False",
    "shadow": "trains its second road by a loss of its own inside peft's forward",
}


@pytest.mark.parametrize("kind", [kind.name for kind in PeftType])
def test_every_type_of_the_installed_peft(kind: str, tmp_path: Path) -> None:
    (method,) = [name for name in names() if peft_type(name) == kind]
    if method in COUNTS:
        return  # above, on six families
    if method in NEVER:
        with pytest.raises(ConfigError) as caught:
            refuse_failing(group_of(method, "llama"), lambda model: logits_of(model, "llama"))
        assert NEVER[method] in str(caught.value)
        return
    group = group_of(method, "llama")
    refuse_failing(group, lambda model: logits_of(model, "llama"))
    losses = train(group, "llama")
    assert losses[-1] < losses[0]
    assert all(t.grad is not None for t in group.members[0].tensors.values())
    check_round_trip(method, "llama", group, tmp_path)


def scaled_inputs(group: Any) -> set[str]:
    return {n for n, m in group.model.get_base_model().named_modules() if getattr(m, "is_feedforward", False)}


@pytest.mark.parametrize("targets", ["all-linear", ".*dense", ["output.dense", "query"]])
def test_feedforward_modules_of_ia3_are_compared_with_the_real_targets(targets: Any) -> None:
    ending = "dense" if isinstance(targets, str) else "output.dense"
    group = group_of("ia3", "bert", targets=targets, options={"feedforward_modules": [ending]})
    named = {n for n, m in make("bert").named_modules() if isinstance(m, nn.Linear) and n.endswith(f".{ending}")}
    assert scaled_inputs(group) == named
    train(group, "bert")


def test_feedforward_modules_that_are_no_targets() -> None:
    with pytest.raises(ConfigError, match="should be a subset of `target_modules`"):
        group_of("ia3", "bert", options={"feedforward_modules": ["densee"]})
    with pytest.raises(ValueError, match="should be a subset of `target_modules`"):
        settings_of("ia3", targets=["query"], options={"feedforward_modules": ["dense"]})


def test_no_settings_stand_for_methods_that_are_gone() -> None:
    assert set(OPTIONS) <= set(names())
