"""Saved tensors on the host: the same gradients, little on the card between forward and backward."""

import gc
import weakref
from typing import Any

import pytest
import torch
from delayed import DelayedLane
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import peft_engine
from peft_engine.levers.activations import AHEAD, LEAVING, ActivationOffload
from peft_engine.levers.checkpointing import checkpoint_layers
from peft_engine.meters.memory import LiveBytes

LAYERS, WIDTH, TOKENS = 4, 32, 40
LEAST = 1024


class OnCard(LiveBytes):
    """Live bytes but for what a lane calls host memory."""

    def __init__(self, lane: DelayedLane, resident: Any) -> None:
        self.lane = lane
        super().__init__(resident)

    def _count(self, tensor: Tensor) -> None:
        if tensor.untyped_storage()._cdata not in self.lane.hosts:
            super()._count(tensor)


def llama(fused: bool, checkpointing: int, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=48, num_key_value_heads=2, use_cache=False))
    settings = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, settings).train()
    if fused:
        peft_engine.fuse(model)
    if checkpointing:
        checkpoint_layers(base, checkpointing)
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 61, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def gradients(model: Any, offload: ActivationOffload | None) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    if offload is None:
        loss = model(**batch()).loss
    else:
        with offload.during():
            loss = model(**batch()).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [0, 1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_the_same_bit_for_bit(fused: bool, checkpointing: int, dropout: float) -> None:
    plain = gradients(llama(fused, checkpointing, dropout), None)
    model, lane = llama(fused, checkpointing, dropout), DelayedLane()
    offload = ActivationOffload(model, lane, LEAST)
    for _ in range(2):  # a second step begins anew
        found = gradients(model, offload)
        for name, gradient in plain.items():
            assert torch.equal(found[name], gradient), name
    assert offload.moved_bytes > 2 * LAYERS * 2 * TOKENS * WIDTH * 4 / max(1, checkpointing)


def phi3() -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    base = Phi3ForCausalLM(Phi3Config(**shape, intermediate_size=48, num_key_value_heads=2, pad_token_id=0))
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()


def test_views_of_packed_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come back without the gaps between their rows, which changes the order of sums alone."""
    plain, model, lane = gradients(phi3(), None), phi3(), DelayedLane()
    gaps: list[bool] = []
    host = lane.host

    def watched(like: Tensor) -> Tensor:
        made = host(like)
        gaps.append(made.stride() != like.stride())
        return made

    monkeypatch.setattr(lane, "host", watched)
    found = gradients(model, ActivationOffload(model, lane, LEAST))
    assert any(gaps)
    assert not all(gaps)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_next_to_nothing_stays_between_forward_and_backward(fused: bool) -> None:
    """Above all nothing that a fused linear remembers to make its input again."""
    stays, peaks = {}, {}
    for on in (False, True):
        model, lane = llama(fused, 0), DelayedLane()
        offload = ActivationOffload(model, lane, LEAST if on else 2**60)
        gradients(model, offload)
        model.zero_grad()
        meter = OnCard(lane, [*model.parameters(), *model.buffers()])
        resident = meter.now
        with meter:
            with offload.during():
                loss = model(**batch()).loss
            stays[on] = meter.now - resident
            loss.backward()
        peaks[on] = meter.peak - resident
        del loss
    saved = 2 * TOKENS * WIDTH * 4
    assert stays[False] > 6 * LAYERS * saved
    assert stays[True] < 0.2 * stays[False], stays
    assert peaks[True] < 0.6 * peaks[False], peaks


def test_what_several_nodes_save_is_copied_once() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    lane = DelayedLane()
    offload = ActivationOffload(nn.Linear(1, 1), lane, LEAST)
    with offload.during():
        y = x.exp()  # saves y
        z = y * y + y.sin()  # saves it three times more
    del y
    z.sum().backward()
    assert (lane.out, lane.back) == (1, 1)
    y = x.detach().exp()
    torch.testing.assert_close(x.grad, (2 * y + y.cos()) * y)


def test_what_stays_on_the_card() -> None:
    model = nn.Linear(64, 64)
    model.register_buffer("table", torch.randn(64, 64))
    lane = DelayedLane()
    small = torch.randn(4, requires_grad=True)
    repeated = torch.randn(64, 1).expand(64, 64)
    x = torch.randn(64, 64, requires_grad=True)
    with ActivationOffload(model, lane, LEAST).during():
        y = (x * model.table).sum() + (x * repeated).sum() + (small * small).sum() + (x @ model.weight.t()).sum()
    before = lane.out
    y.backward()
    assert before == 1, "x alone, which a weight's gradient needs"


def test_few_are_on_their_way_at_once() -> None:
    """Forward waits for the oldest of so many; backward fetches so many ahead."""
    lane, seen = DelayedLane(), []
    offload = ActivationOffload(nn.Linear(1, 1), lane, LEAST)
    x = torch.randn(64, 64, requires_grad=True)
    with offload.during():
        y = x
        for _ in range(20):
            y = y.exp().sin()
            seen.append(len(offload._leaving))
    assert max(seen) == LEAVING
    assert not offload._leaving
    fetched: list[int] = []
    fetch = offload._fetch
    offload._fetch = lambda away: (fetch(away), fetched.append(len(offload._coming)))[0]  # type: ignore[method-assign]
    y.sum().backward()
    assert max(fetched) == AHEAD + 1
    assert not offload._coming


def test_a_backward_pass_that_breaks_off_leaves_nothing_behind() -> None:
    lane = DelayedLane()
    offload = ActivationOffload(nn.Linear(1, 1), lane, LEAST)
    x = torch.randn(64, 64, requires_grad=True)

    def run(fails: bool) -> weakref.ref[Any]:
        def fail(_: Tensor) -> None:
            if fails:
                raise KeyError("broken off")

        with offload.during():
            y = x
            for number in range(8):
                y = y.sin()
                if number == 5:
                    y.register_hook(fail)
        away = next(place for place in offload._order if place() is not None)
        if fails:
            with pytest.raises(KeyError):
                y.sum().backward()
        else:
            y.sum().backward()
        return away

    run(True)
    assert offload._coming, "nothing was on its way: the test shows nothing"
    x.grad = None
    away = run(False)
    expected = x.detach().clone().requires_grad_()
    y = expected
    for _ in range(8):
        y = y.sin()
    y.sum().backward()
    assert torch.equal(x.grad, expected.grad)
    gc.collect()
    assert away() is None
