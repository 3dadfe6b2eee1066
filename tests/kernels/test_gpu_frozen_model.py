"""Whole models with frozen int8 linears on Triton compute what they compute on torch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DEVICE
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_engine.adapters.fusing import fuse


def llama() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=64, **heads)
    )


def gpt2() -> nn.Module:
    """Conv1D with biases."""
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, **off, **ends))


@pytest.mark.parametrize(
    ("make", "settings"),
    [(llama, {}), (llama, {"use_dora": True}), (gpt2, {"fan_in_fan_out": True})],
    ids=["llama", "llama dora", "gpt2"],
)
def test_loss_and_gradients_are_those_of_the_torch_backend(make: Callable[[], nn.Module], settings: dict[str, Any]):
    """A number on the edge of two codes may fall either way, and then all behind it differs by what a code is worth: in
    most models none does, and beside full precision even then both are far off."""
    apart = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **settings
        )
        model = get_peft_model(make(), config).to(DEVICE).train()
        ids = torch.randint(0, 64, (2, 9), device=DEVICE)
        (_, full), (told, plain), (loss, found) = (one_step(model, b, ids) for b in ("full", "torch", "triton"))
        torch.testing.assert_close(loss, told, rtol=1e-5, atol=0)
        off, rounding = (found - plain).norm(), (found - full).norm()
        assert rounding > 1e-3 * full.norm()
        assert off < 0.1 * rounding
        apart.append(float(off / full.norm()))
    assert sorted(apart)[1] < 1e-5, apart


def one_step(model: nn.Module, backend: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and all gradients in one row."""
    one = copy.deepcopy(model)
    if backend != "full":
        report = fuse(one, backend, frozen_compute="int8")
        assert report.backend == backend
        assert len(report.frozen) >= 8, report.kept_full
    loss = one(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None])
