"""Siblings that read one input are computed together: never with what they would not have read themselves."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import InDouble, adapt, batch_of, check_same, near, pair, step
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

from peft_engine.adapters.fusing import fuse


@pytest.fixture(autouse=True)
def _double() -> Any:
    with InDouble():
        yield


def test_siblings_that_read_different_tensors() -> None:
    """Cross-attention of a BERT decoder: its query reads the text, key and value read an encoder's states."""
    config = BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        is_decoder=True, add_cross_attention=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = adapt(BertLMHeadModel(config).train()).double()
    model = copy.deepcopy(plain)
    fuse(model)
    states = torch.randn(3, 5, 32, dtype=torch.float64)
    batch = batch_of("bert_masked")
    for _ in range(2):
        ours, theirs = (step(one, batch, encoder_hidden_states=states) for one in (model, plain))
        check_same(ours, theirs, 1e-9)


class Odd(nn.Module):
    """Siblings by the look of it, called in ways that the source does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.q_proj(x)
        z = self.k_proj(x) if not self.skip else y
        return (y * z).sum(-1, keepdim=True) * self.v_proj(x)


def odd(cls: type[Odd] = Odd, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = adapt(cls(), target_modules=["q_proj", "k_proj", "v_proj"], **options).double()
    model = copy.deepcopy(plain)
    assert fuse(model).counts()["lora_linear, shared input"] >= 2
    return model, plain


def test_no_stale_output_is_used() -> None:
    model, plain = odd()
    ours, theirs = model.base_model.model, plain.base_model.model
    x = torch.randn(3, 5, 8, dtype=torch.float64)

    def check(name: str) -> None:
        near(getattr(ours, name)(x), getattr(theirs, name)(x), 1e-12, name)

    def set_b(one: Any) -> None:
        with torch.no_grad():
            one.base_model.model.k_proj.lora_B.default.weight.add_(1)

    changes: list[Callable[[Any], Any]] = [
        set_b,  # an optimizer's step
        lambda m: m.base_model.model.k_proj.base_layer.weight.data.add_(1),
        lambda m: m.base_model.model.k_proj.scale_layer(3),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: x.mul_(0.5) if m is model else None,
    ]
    for change in changes:
        check("q_proj")  # the group computes k and v as well
        change(model), change(plain)
        check("k_proj")
        check("v_proj")
        check("q_proj")
    with torch.no_grad():
        check("q_proj")
    assert ours.k_proj(x).requires_grad
    x.requires_grad_(True)
    check("q_proj")
    (grad,) = torch.autograd.grad(ours.k_proj(x).sum(), x)
    (want,) = torch.autograd.grad(theirs.k_proj(x).sum(), x)
    near(grad, want, 1e-12)


class Changing(Odd):
    """The variable stays, the tensor does not: changed in place, or another one each time round a loop."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for number, row in enumerate(x.clone().unbind()):
            y = self.q_proj(row) if number != 1 else row
            row.mul_(2.0 if number == 2 else 1.0)
            z = self.k_proj(row) if number != 0 else row
            total = total + (y * z).sum()
        return total


def test_siblings_read_the_tensor_as_it_is_now() -> None:
    model, plain = odd(Changing)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():  # in place: no backward
        near(model(x), plain(x), 1e-12)


@pytest.mark.parametrize("state", ["disabled", "merged", "of another adapter"])
def test_one_sibling_in_another_state(state: str) -> None:
    model, plain = odd()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    before = plain(x)

    def change(one: Any) -> None:
        layer = one.base_model.model.k_proj
        if state == "disabled":
            layer.enable_adapters(False)
        elif state == "merged":
            layer.merge()
        else:
            layer.set_adapter([])

    change(model), change(plain)
    near(model(x), plain(x), 1e-12)
    assert torch.allclose(plain(x), before) == (state == "merged")


def test_stale_masks() -> None:
    """eval() between two siblings: what was computed with dropout must not be used."""
    model, plain = odd(lora_dropout=0.5)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    model.base_model.model.q_proj(x)
    model.eval(), plain.eval()
    near(model.base_model.model.k_proj(x), plain.base_model.model.k_proj(x), 1e-12)


@pytest.mark.parametrize("skip", [False, True], ids=["all", "one_never_called"])
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_kept_alive(skip: bool, grad: bool) -> None:
    model, plain = odd()
    ours, theirs = model.base_model.model, plain.base_model.model
    ours.skip = theirs.skip = skip
    for _ in range(2):
        x = torch.randn(3, 5, 8, dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            got, want = ours(x), theirs(x)
        near(got, want, 1e-12)
        if grad:
            got.sum().backward()
        seen = weakref.ref(x)
        del x, got, want
        gc.collect()
        assert seen() is None
    assert not [t for t in tensors() if t.shape in ((3, 5, 8), (3, 5, 4), (15, 8), (15, 4))]
    copy.deepcopy(model)  # outputs that are still held could not be copied


def tensors() -> list[Tensor]:
    return [o for o in gc.get_objects() if type(o) is Tensor]


def test_a_whole_step_leaves_nothing_behind() -> None:
    model, _ = pair("llama", torch.float64)
    fuse(model)
    batch = batch_of("llama")
    step(model, batch)  # caches fill at the first step
    gc.collect()
    before = {id(t) for t in tensors()}
    loss = model(**batch).loss
    loss.backward()
    del loss
    model.zero_grad()
    gc.collect()
    assert not [t.shape for t in tensors() if id(t) not in before]
