"""Frozen layers on the host: the same numbers, two layers on the card at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import wide_models
from comparing import changed
from delayed import DelayedLane
from peft import LoraConfig, get_peft_model
from tiny import assemble
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    FunnelConfig,
    FunnelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import peft_engine
from peft_engine.adapters.sharding import blocks
from peft_engine.levers.activations import ActivationOffload
from peft_engine.levers.checkpointing import checkpoint_layers
from peft_engine.levers.layers import StreamedLayers
from peft_engine.quantised import quantised_linears

LAYERS = 5
CPU = torch.device("cpu")
Made = tuple[Any, dict[str, Tensor]]


def ids(rows: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(0, 61, (rows, tokens), generator=torch.Generator().manual_seed(1))


def llama() -> Made:
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = LlamaConfig(**shape, intermediate_size=48, num_key_value_heads=2, use_cache=False, initializer_range=0.1)
    return LlamaForCausalLM(config), {"input_ids": ids(), "labels": ids()}


def gpt2() -> Made:
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=LAYERS, n_head=4, use_cache=False, initializer_range=0.1)
    return GPT2LMHeadModel(config), {"input_ids": ids(), "labels": ids()}


def bert() -> Made:
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(**shape, intermediate_size=48, initializer_range=0.1))
    return model, {"input_ids": ids(), "labels": torch.tensor([0, 1])}


def t5() -> Made:
    config = T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), {"input_ids": ids(), "labels": ids(2, 6)}


def albert() -> Made:
    """Two layers, each of which runs twice."""
    config = AlbertConfig(
        vocab_size=61, embedding_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=48, num_hidden_groups=2, initializer_range=0.1,
    )  # fmt: skip
    return AlbertForSequenceClassification(config), {"input_ids": ids(), "labels": torch.tensor([0, 1])}


def funnel() -> Made:
    """Layers in lists within a list; those of the second run twice."""
    config = FunnelConfig(
        vocab_size=61, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[2, 2], block_repeats=[1, 2],
        num_decoder_layers=1,
    )  # fmt: skip
    return FunnelForSequenceClassification(config), {"input_ids": ids(), "labels": torch.tensor([0, 1])}


def built(make: Callable[[], Made], **settings: Any) -> Made:
    torch.manual_seed(0)
    base, batch = make()
    given = {"target_modules": "all-linear", "lora_dropout": 0.1, **settings}
    return get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, **given)).train(), batch


def streamed(model: Any) -> tuple[StreamedLayers, DelayedLane]:
    lane = DelayedLane()
    found = list(blocks(model.base_model.model))
    inside = {p for block in found for p in block.parameters()}
    return StreamedLayers(found, {p for p in model.parameters() if p not in inside}, lane, CPU), lane


class Together(TorchDispatchMode):
    """The most layers that were on the card when an operator began."""

    def __init__(self, layers: StreamedLayers) -> None:
        super().__init__()
        self.layers, self.most, self.trail = layers, 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        here = [i for i, layer in enumerate(self.layers.layers) if any(s.nbytes() for s, _ in layer.pairs)]
        self.most = max(self.most, len(here))
        if not self.trail or self.trail[-1] != here:
            self.trail.append(here)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(layers: StreamedLayers) -> Iterator[Together]:
    together = Together(layers)
    with together:
        yield together


def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("make", "checkpointing"),
    [*product((llama, gpt2, bert, t5), (0, 1, 2)), (albert, 0), (funnel, 0)],  # those two have no checkpointing
)
def test_steps_are_the_same_bit_for_bit(make: Callable[[], Made], fused: bool, checkpointing: int) -> None:
    plain, batch = built(make)
    model, _ = built(make)
    layers, _ = streamed(model)
    for one in (plain, model):
        if fused:
            peft_engine.fuse(one)
        if checkpointing:
            checkpoint_layers(one.base_model.model, checkpointing)
    wanted, gradients = step(plain, batch)
    for _ in range(2):
        with watched(layers) as together:
            loss, found = step(model, batch)
        assert torch.equal(loss, wanted)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(found[name], gradient), name
        assert together.most <= (3 if make in (t5, funnel) else 2), together.trail
    plain.eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_quantised_layers(kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes come and go; what stands beside them, absmax and tables, stays."""
    settings = wide_models.settings(wide_models.make_wide("llama", tmp_path / "model", monkeypatch), tmp_path)
    plain, model = (assemble(changed(settings, kernels="off")).group.model for _ in range(2))
    layers, _ = streamed(model)
    codes = [m.weight for m in quantised_linears(model).values()]
    assert layers.host_bytes == sum(c.numel() for c in codes)
    assert not any(c.untyped_storage().nbytes() for c in codes)
    batch = {"input_ids": ids(), "labels": ids()}
    for one in (plain, model):
        one.train()
        if kernels != "off":
            peft_engine.fuse(one)
    wanted, gradients = step(plain, batch)
    loss, found = step(model, batch)
    assert torch.equal(loss, wanted)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), name
    plain.eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_a_list_within_a_list_is_no_layer() -> None:
    found = list(blocks(funnel()[0]))
    assert [type(block).__name__ for block in found] == ["FunnelLayer"] * 4


def test_one_ahead_in_both_directions() -> None:
    model, batch = built(llama)
    layers, lane = streamed(model)
    moved = lane.out
    with watched(layers) as together:
        step(model, batch)
    pairs = [here for here in together.trail if len(here) == 2]
    assert pairs[: LAYERS - 1] == [[i, i + 1] for i in range(LAYERS - 1)], together.trail
    assert [0, 1] in pairs[LAYERS - 1 :]
    assert lane.out == moved, "weights are never copied out again"
    each = sum(len(layer.pairs) for layer in layers.layers) / LAYERS
    assert lane.back == each * (2 * LAYERS - 1), "the last layer is fetched once: backward begins with it"


def test_what_is_moved() -> None:
    model, _ = built(llama)
    base = model.base_model.model
    expected = sum(
        p.numel() * p.element_size() for p in base.model.layers.parameters() if p.ndim > 1 and not p.requires_grad
    )
    layers, _ = streamed(model)
    assert layers.host_bytes == expected
    stays = {n for n, p in model.named_parameters() if p.untyped_storage().nbytes()}
    assert all("lora_" in n or "norm" in n or "embed" in n or "lm_head" in n for n in stays)
    gone = {n for n, p in model.named_parameters() if not p.untyped_storage().nbytes()}
    assert all(".layers." in n and "base_layer.weight" in n for n in gone)
    assert len(gone) == 7 * LAYERS


def test_layers_without_a_gradient_are_not_fetched_for_backward() -> None:
    last = {"layers_to_transform": [LAYERS - 1], "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model, batch = built(llama, **last)
    plain, _ = built(llama, **last)
    layers, lane = streamed(model)
    before = lane.back
    loss, found = step(model, batch)
    wanted, gradients = step(plain, batch)
    assert torch.equal(loss, wanted)
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
    each = sum(len(layer.pairs) for layer in layers.layers) / LAYERS
    assert lane.back - before == each * LAYERS


def test_generation_and_training_in_turn() -> None:
    model, batch = built(llama)
    plain, _ = built(llama)
    streamed(model)
    for _ in range(2):
        loss, _ = step(model, batch)
        assert torch.equal(loss, step(plain, batch)[0])
        made = []
        for one in (model, plain):
            one.eval()
            made.append(one.generate(input_ids=ids(), max_new_tokens=4, do_sample=False, pad_token_id=0))
            one.train()
        assert torch.equal(*made)


def test_with_activations_on_the_host_too() -> None:
    model, batch = built(llama)
    plain, _ = built(llama)
    streamed(model)
    offload = ActivationOffload(model, DelayedLane(), 512)
    torch.manual_seed(3)
    with offload.during():
        loss = model(**batch).loss
    loss.backward()
    assert offload.moved_bytes
    _, gradients = step(plain, batch)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, gradients[name]), name


def test_weights_shared_by_two_layers_stay() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, second).requires_grad_(False)
    assert StreamedLayers([*model], set(), DelayedLane(), CPU).host_bytes == 0


def test_a_forward_pass_that_breaks_off() -> None:
    model, batch = built(llama)
    plain, _ = built(llama)
    layers, _ = streamed(model)
    hook = model.base_model.model.model.layers[2].mlp.register_forward_hook(_fail)
    with pytest.raises(KeyError):
        model(**batch)
    hook.remove()
    with watched(layers) as together:
        loss, _ = step(model, batch)
    assert torch.equal(loss, step(plain, batch)[0])
    assert together.most <= 3


def _fail(*_: Any) -> None:
    raise KeyError("broken off")
