"""What a reviewer broke once: each of these gave wrong numbers, or an error, fused and not plain."""

import copy
import threading
from typing import Any

import pytest
import torch
from families import adapt, batch_of, check_same, make, near, pair, step
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)
from transformers.activations import ACT2FN

from peft_engine.adapters.fusing import fuse, row_seeds
from peft_engine.adapters.fusing.loss import read_logits
from peft_engine.adapters.fusing.probing import activation_kind, gated_mlp, rms_norm_settings
from peft_kernels.dropout import dropout

SHAPE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def test_the_softcap_of_a_text_part_is_found() -> None:
    text = Gemma2Config(**SHAPE, num_hidden_layers=1, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model", "projection_dim": 32}
    config = PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, image_token_index=96)
    found = read_logits(PaliGemmaForConditionalGeneration(config))
    assert isinstance(found, str) or found.softcap == 0.5


def test_an_output_changed_in_place_is_not_made_again() -> None:
    """A hook that scales an activation, as steering does."""
    model, plain = pair("gpt2")
    fuse(model)
    for each in (model, plain):
        for name, module in each.named_modules():
            if name.endswith(("mlp.act", "ln_1")):
                module.register_forward_hook(lambda m, x, y: y.mul_(2))
    check_same(step(model, batch_of("gpt2")), step(plain, batch_of("gpt2")), 1e-5)


@pytest.mark.parametrize("name", ["gelu_10", "relu2", "laplace", "relu6"])
def test_activations_that_differ_far_out_are_left_alone(name: str) -> None:
    assert activation_kind(ACT2FN[name]) is None


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(4, 6, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(6, 4, bias=False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(max=30))


class GatedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return y if gate is None else y * gate


def test_modules_that_do_more_are_left_alone() -> None:
    assert gated_mlp(Clamped()) is None
    assert rms_norm_settings(GatedNorm()) is None


def test_partial_rotation() -> None:
    """GPT-NeoX turns a quarter of each head by default."""
    torch.manual_seed(0)
    model = adapt(GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, num_hidden_layers=2)))
    plain = copy.deepcopy(model)
    fuse(model)
    check_same(step(model, batch_of("llama")), step(plain, batch_of("llama")), 1e-5)


class InPlace(nn.Module):
    """As Longformer's attention: the query is divided where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(1e-9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.q_proj(x), self.k_proj(x)
        q /= 3.0
        h = self.drop(x)
        h += 1.0
        return torch.relu_(q) + k.mul_(2) + h


def test_outputs_may_be_changed_in_place() -> None:
    torch.manual_seed(0)
    model = get_peft_model(InPlace(), LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    plain = copy.deepcopy(model)
    fuse(model)
    results = []
    for each in (model, plain):
        torch.manual_seed(1)
        x = torch.randn(2, 3, 8, requires_grad=True)
        y = each(x)
        trained = [p for p in each.parameters() if p.requires_grad]
        results.append([y.detach(), *torch.autograd.grad(y.sum(), [x, *trained])])
    for got, want in zip(*results, strict=True):
        near(got, want, 1e-5)


def test_threads_in_one_model_do_not_meet() -> None:
    model = adapt(make("llama"))
    fuse(model)
    model.train()
    batches = [batch_of("llama", seed=seed) for seed in range(3)]
    wanted = [float(model(**batch).loss.detach()) for batch in batches]
    wrong: list[Any] = []

    def run(place: int) -> None:
        for _ in range(15):
            loss = float(model(**batches[place]).loss.detach())
            if abs(loss - wanted[place]) > 1e-5:
                wrong.append((place, loss))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.drop(x), self.drop(x)


def test_a_module_called_again_draws_another_mask_and_replays_its_own() -> None:
    model = Twice().train()
    fuse(model)
    rows = row_seeds(model)
    assert rows is not None
    x = torch.ones(2, 4, 16, requires_grad=True)
    rows.seeds = torch.tensor([3, 4])
    first, second = model(x)
    assert not torch.equal(first, second)
    rows.seeds = torch.tensor([3, 4])
    one, two = checkpoint(model, x, use_reentrant=False)
    assert torch.equal(one, first)
    assert torch.equal(two, second)
    (dx,) = torch.autograd.grad((one * 3 + two * 5).sum(), x)
    torch.testing.assert_close(dx, first.detach() * 3 + second.detach() * 5)


def test_gelu_10_trains_as_plain() -> None:
    torch.manual_seed(0)
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**SHAPE, num_hidden_layers=1, hidden_act="gelu_10", initializer_range=2.0, **drops)
    model = adapt(BertForSequenceClassification(config))
    plain = copy.deepcopy(model)
    fuse(model)
    ids = torch.randint(3, 97, (3, 9))
    losses = [each(input_ids=ids, labels=torch.tensor([0, 1, 0])).loss for each in (model, plain)]
    near(losses[0].detach(), losses[1].detach(), 1e-5)


def test_dropout_s_output_may_be_changed_in_place() -> None:
    y = dropout(torch.ones(5, 7, requires_grad=True), 0.5, torch.arange(5), 1)
    y += 1
    assert set(y.unique().tolist()) == {1.0, 3.0}
