"""Schedules and parameter groups."""

import math
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from peft_engine.adapters.group import Member, MemberSpec
from peft_engine.config import AdapterConfig, Config, TrainingConfig
from peft_engine.errors import ConfigError
from peft_engine.training.optim import make_optimizer, make_schedule, page_again, parameter_groups, set_learning_rate

TOTAL = 40
NAMES = ["constant", "linear", "cosine", "wsd"]


def transformers_factors(name: str, warm: int, total: int) -> list[float]:
    """Learning rates of a real optimizer under transformers' own scheduler, stepped once per optimizer step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = {
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warm),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warm, total),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warm, total),
        "wsd": lambda: get_wsd_schedule(optimizer, warm, math.ceil(total / 5), num_training_steps=total),
    }[name]()
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("warmup", "warm"), [(0.0, 0), (0.1, 4), (0.03, 2), (7, 7)])
def test_schedules_are_transformers(name: str, warmup: float, warm: int) -> None:
    schedule = make_schedule(name, warmup, TOTAL)
    assert [schedule(step) for step in range(1, TOTAL + 1)] == transformers_factors(name, warm, TOTAL)


def test_schedules_do_what_their_names_say() -> None:
    at = {name: [make_schedule(name, 4, TOTAL)(step) for step in range(1, TOTAL + 1)] for name in NAMES}
    for factors in at.values():
        assert factors[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert set(at["constant"][4:]) == {1}
    assert at["linear"][4 + 18] == pytest.approx(0.5)
    assert at["cosine"][4 + 18] == pytest.approx(0.5)
    assert at["cosine"][4 + 9] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert set(at["wsd"][4 : TOTAL - 8]) == {1}  # the last fifth decays
    assert sorted(at["wsd"][TOTAL - 8 :], reverse=True) == at["wsd"][TOTAL - 8 :]
    assert at["wsd"][-1] < 0.2


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_trained_at_the_peak(name: str) -> None:
    """Warm-up starts at 0: a run of one step would learn nothing."""
    assert make_schedule(name, 0.03, 1)(1) == 1


def member() -> Member:
    layer = "base_model.model.layers.0.q_proj"
    tensors = {
        f"{layer}.lora_A.weight": nn.Parameter(torch.ones(4, 8)),
        f"{layer}.lora_B.weight": nn.Parameter(torch.ones(8, 4)),
        "base_model.model.wte.lora_embedding_A": nn.Parameter(torch.ones(4, 9)),
        "base_model.model.wte.lora_embedding_B": nn.Parameter(torch.ones(8, 4)),
        f"{layer}.lora_magnitude_vector.weight": nn.Parameter(torch.ones(8)),
        "base_model.model.classifier.modules_to_save.weight": nn.Parameter(torch.ones(2, 8)),
        "base_model.model.classifier.modules_to_save.bias": nn.Parameter(torch.ones(2)),
    }
    return Member(MemberSpec("m", 0, 1e-3), tensors)


def by_name(groups: list[dict]) -> dict[str, tuple[float, float]]:
    """Last parts of the names → (peak learning rate, decay)."""
    names = {id(t): ".".join(name.split(".")[-2:]) for name, t in member_once.tensors.items()}
    return {names[id(t)]: (group["base_lr"], group["weight_decay"]) for group in groups for t in group["params"]}


member_once = member()


def test_lora_plus_and_decay_make_the_groups() -> None:
    found = by_name(parameter_groups(member_once, weight_decay=0.1, lora_plus_ratio=16.0))
    assert found == {
        "lora_A.weight": (1e-3, 0.1),
        "lora_B.weight": (pytest.approx(16e-3), 0.1),
        "wte.lora_embedding_A": (1e-3, 0.1),
        "wte.lora_embedding_B": (pytest.approx(16e-3), 0.1),
        "lora_magnitude_vector.weight": (1e-3, 0.0),
        "modules_to_save.weight": (1e-3, 0.1),
        "modules_to_save.bias": (1e-3, 0.0),
    }
    plain = by_name(parameter_groups(member_once, weight_decay=0.1, lora_plus_ratio=None))
    assert {rate for rate, _ in plain.values()} == {1e-3}
    assert len(plain) == len(member_once.tensors)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "adamw8bit"])
def test_decay_reaches_matrices_only_and_the_schedule_scales_every_group(optimizer: str) -> None:
    """With gradients of zero only the decay moves a weight."""
    one = member()
    training = TrainingConfig(optimizer=optimizer, weight_decay=0.5)
    settings = Config(
        task="causal-lm",
        model={"path": "m"},
        data={"train": "d.jsonl"},
        output="o",
        training=training,
        adapter=AdapterConfig(lora_plus_ratio=4.0),
    )
    made = make_optimizer(one, settings, torch.device("cpu"))
    set_learning_rate(made, 0.5)
    assert sorted({group["lr"] for group in made.param_groups}) == pytest.approx([0.5e-3, 2e-3])
    set_learning_rate(made, 0.25)  # of the peak, not of the last rate
    assert sorted({group["lr"] for group in made.param_groups}) == pytest.approx([0.25e-3, 1e-3])
    for tensor in one.tensors.values():
        tensor.grad = torch.zeros_like(tensor)
    made.step()
    moved = {name for name, t in one.tensors.items() if not torch.equal(t, torch.ones_like(t))}
    assert moved == {name for name, t in one.tensors.items() if t.ndim > 1}


@pytest.mark.parametrize(("name", "cls"), [("paged_adamw", "PagedAdamW"), ("paged_adamw8bit", "PagedAdamW8bit")])
def test_paged_optimizers_are_for_cuda(name: str, cls: str) -> None:
    settings = Config(
        task="causal-lm",
        model={"path": "m"},
        data={"train": "d.jsonl"},
        output="o",
        training=TrainingConfig(optimizer=name, betas=(0.8, 0.95)),
    )
    with pytest.raises(ConfigError, match=f"{name} keeps its state in CUDA's unified memory, and the device is cpu"):
        make_optimizer(member(), settings, torch.device("cpu"))
    made = make_optimizer(member(), settings, torch.device("cuda"))  # makes no tensor before the first step
    assert type(made).__name__ == cls
    assert made.is_paged
    assert made.param_groups[0]["betas"] == (0.8, 0.95)


@pytest.mark.parametrize(("name", "dtype"), [("PagedAdamW", torch.float32), ("PagedAdamW8bit", torch.uint8)])
def test_a_loaded_state_is_paged_again(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card a page is an ordinary tensor with a mark; bitsandbytes' own rule says which tensors get one."""
    large, small = nn.Parameter(torch.ones(400, 300)), nn.Parameter(torch.ones(80, 80))

    def page(self: Any, parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        made = torch.zeros_like(parameter, dtype=dtype)
        if self.is_paged and parameter.numel() >= 1e5:
            made.is_paged = True  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(getattr(bitsandbytes.optim, name), "get_state_buffer", page)
    monkeypatch.setattr(getattr(bitsandbytes.optim, name), "prefetch_state", lambda self, parameter: None)
    first, second = (getattr(bitsandbytes.optim, name)([large, small], lr=0.1) for _ in range(2))
    for parameter in (large, small):
        parameter.grad = torch.randn_like(parameter)
    first.step()
    second.load_state_dict(tree_map_only(torch.Tensor, torch.clone, first.state_dict()))  # as a file brings it back
    assert not hasattr(second.state[large]["state1"], "is_paged"), "loading keeps pages: nothing to do"
    page_again(second)
    for moments in ("state1", "state2"):
        assert second.state[large][moments].is_paged
        assert not hasattr(second.state[small][moments], "is_paged")
        for parameter in (large, small):
            assert second.state[parameter][moments].dtype == first.state[parameter][moments].dtype == dtype
            assert torch.equal(second.state[parameter][moments], first.state[parameter][moments])


def test_other_states_stay_as_they_were_loaded() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    made = torch.optim.AdamW([weight])
    made.step()
    before = made.state[weight]["exp_avg"]
    page_again(made)
    assert made.state[weight]["exp_avg"] is before
