"""Dropout of a fused model: the masks are ours, what is done with them is peft's, and each sample has its own."""

import copy
from typing import Any

import pytest
import torch
from families import InDouble, batch_of, check_same, evaluating, near, pair, shake, step
from injected import holder, inject
from peft import LoraConfig
from torch import Tensor, nn

from peft_engine.adapters.fusing import fuse
from peft_engine.adapters.fusing.linears import FusedLoraLinear
from peft_engine.adapters.fusing.state import state_of
from peft_kernels.dropout import keep_mask

P = 0.1
SEEDS = torch.tensor([11, -(2**62), 2**63 - 1])
# dropout inside attention is a function's, in fused and plain models alike, and is left out here
BERT = {"dropout": P, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0}


def twins(family: str, dtype: torch.dtype = torch.float64, **lora: Any) -> tuple[Any, Any]:
    """A fused model with dropout 0.1 everywhere and a plain one with the same masks, seeds set."""
    settings = BERT if family in ("bert", "distilbert", "vit") else {}
    model, plain = pair(family, dtype, settings, **({"lora_dropout": P} | lora))
    fuse(model)
    holder(model).seeds = SEEDS
    inject(model, plain)
    return model, plain


CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in ("llama", "qwen2", "phi3", "gpt2", "bert", "distilbert", "vit")),
    *((family, {"use_dora": True}) for family in ("llama", "gpt2", "bert")),
    *((family, {"lora_bias": True}) for family in ("gpt2", "bert")),
    ("llama", {"use_rslora": True, "lora_dropout": 0.4}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("gemma2", {"target_modules": ["v_proj", "down_proj", "lm_head"]}),
]


@pytest.mark.parametrize(("family", "lora"), CASES)
def test_the_same_masks_give_the_same_numbers(family: str, lora: dict[str, Any]) -> None:
    model, plain = twins(family, **lora)
    batch = batch_of(family, dtype=torch.float64)
    with InDouble():
        first = step(model, batch)
        check_same(first, step(plain, batch), 1e-9)
        holder(model).seeds = SEEDS + 1  # the next step
        second = step(model, batch)
        check_same(second, step(plain, batch), 1e-9)
        assert second.loss != first.loss
        with evaluating(model, plain):
            near(model(**batch).logits, plain(**batch).logits, 1e-9)


def test_two_active_adapters_have_masks_of_their_own() -> None:
    model, _ = pair("llama", torch.float64, lora_dropout=P)
    torch.manual_seed(0)
    model.add_adapter("second", LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "o_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "second"])
    shake(model, seed=5, only=".second").double().train()
    plain = copy.deepcopy(model)
    fuse(model)
    holder(model).seeds = SEEDS
    inject(model, plain)
    with InDouble():
        check_same(step(model, batch_of("llama")), step(plain, batch_of("llama")), 1e-9)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_fifty_steps_with_the_same_masks(family: str) -> None:
    model, plain = twins(family, torch.float32)
    curves: list[list[float]] = [[], []]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=3e-3) for m in (model, plain)]
    for number in range(50):
        holder(model).seeds = SEEDS + number
        for one, optimizer, curve in zip((model, plain), optimizers, curves, strict=True):
            loss = one(**batch_of(family, seed=number % 5)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
    assert curves[1][-1] < 0.8 * curves[1][0]
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5, atol=0)


def summed(model: Any, family: str, rows: slice, trim: bool = False) -> dict[str, Tensor]:
    """Gradients of the loss, summed over tokens or samples, of some rows of the batch under their own seeds."""
    batch = {k: v[rows] for k, v in batch_of(family, dtype=torch.float64).items()}
    if trim:
        length = int(batch["attention_mask"].sum(1).max())
        batch = {k: v[:, :length] if v.dim() == 2 else v for k, v in batch.items()}
    holder(model).seeds = SEEDS[rows]
    causal = batch["labels"].dim() == 2
    out = step(model, batch, **({"num_items_in_batch": 1} if causal else {}))
    factor = 1 if causal else batch["labels"].shape[0]
    return {n: g * factor for n, g in out.grads.items() if g is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_sample_s_masks_do_not_depend_on_its_batch(family: str) -> None:
    """Neither on who shares it nor on padding: accumulation over single rows gives the whole batch's gradient."""
    model, _ = twins(family)
    with InDouble():
        whole = summed(model, family, slice(0, 3))
        single = [summed(model, family, slice(i, i + 1), trim=True) for i in range(3)]
        other = [summed(model, family, slice(0, 2)), summed(model, family, slice(2, 3))]
    largest = max(float(g.abs().max()) for g in whole.values())
    for name, wanted in whole.items():
        for parts in (single, other):
            near(torch.stack([part[name] for part in parts]).sum(0), wanted, 1e-9, name, floor=largest / 1000)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_without_seeds_torch_s_generator_names_the_masks(family: str) -> None:
    model, _ = twins(family)
    batch = batch_of(family)
    holder(model).seeds = None
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(step(model, batch))
    assert torch.equal(results[0].loss, results[1].loss)
    assert all(g is None or torch.equal(g, results[1].grads[n]) for n, g in results[0].grads.items())
    assert results[0].loss != results[2].loss
    assert results[0].loss != step(model.eval(), batch).loss


def test_two_runs_are_equal_bit_for_bit() -> None:
    model, _ = twins("llama", torch.float32)
    first = step(model, batch_of("llama"))
    holder(model).seeds = SEEDS
    second = step(model, batch_of("llama"))
    assert torch.equal(first.loss, second.loss)
    assert all(g is None or torch.equal(g, second.grads[n]) for n, g in first.grads.items())


# embeddings and the classifier's; in each layer bert drops attention's and the MLP's output (and holds an attention's)
@pytest.mark.parametrize(("family", "count"), [("bert", 1 + 2 * 3 + 1), ("distilbert", 1 + 2 * 2 + 1)])
def test_dropout_of_the_model_is_swapped(family: str, count: int) -> None:
    model, plain = pair(family, model={"dropout": P}, lora_dropout=0.3)
    own = [n for n, m in plain.named_modules() if type(m) is nn.Dropout and "lora_" not in n]
    report = fuse(model)
    assert report.counts()["dropout"] == len(own) == count
    assert {n for n, op in report.swapped.items() if op == "dropout"} == set(own)
    still, _ = pair(family, lora_dropout=0.3)  # rates of 0
    assert "dropout" not in fuse(still).counts()


def test_every_mask_has_a_name_of_its_own() -> None:
    """peft draws independent masks in q, k and v; rates are those that were asked for."""
    model, _ = pair("llama", lora_dropout=0.25)
    fuse(model)
    layers = [m for m in model.modules() if isinstance(m, FusedLoraLinear)]
    assert len({state_of(layer).salt for layer in layers}) == len(layers) == 14
    x = torch.ones(3, 40, 50)
    masks = [keep_mask(x, 0.25, SEEDS, state_of(layer).salt, backend="torch") for layer in layers]
    for i, mask in enumerate(masks):
        # 6000 draws: the standard deviation of a rate is 0.0056, of agreement between two masks 0.0063
        assert abs(float(mask.float().mean()) - 0.75) < 5 * 0.0056
        for other in masks[:i]:
            assert abs(float((mask == other).float().mean()) - (0.75**2 + 0.25**2)) < 5 * 0.0063
        assert not torch.equal(mask[0], mask[1])


def test_masks_do_not_depend_on_peft_s_wrappers() -> None:
    """Names of layers make the salts, and a PeftModel only puts its own before them."""
    model, _ = pair("llama", torch.float64, lora_dropout=P)
    bare = copy.deepcopy(model).base_model.model
    fuse(model), fuse(bare)
    batch = batch_of("llama")
    for one in (model, bare):
        holder(one).seeds = SEEDS
    got, want = step(bare, batch), step(model, batch)
    assert torch.equal(got.loss, want.loss)
