"""The loss from hidden states stands where the model's own stood: same terms, same arguments, same output."""

from typing import Any

import pytest
import torch
from families import InDouble, batch_of, check_same, near, pair, step
from torch import Tensor
from torch.utils import _pytree as pytree

from peft_engine.adapters.fusing import fuse


@pytest.fixture(autouse=True)
def _double() -> Any:
    with InDouble():
        yield


def test_the_balance_of_experts_stays_in_the_loss() -> None:
    model, plain = pair("mixtral", torch.float64, {"output_router_logits": True, "router_aux_loss_coef": 5.0})
    fuse(model)
    batch = batch_of("mixtral")
    check_same(step(model, batch), step(plain, batch), 1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_the_output_is_what_others_expect(family: str) -> None:
    """Trainers read `output[0]`, `output["loss"]`, tuples; Accelerate and DDP take an output apart and rebuild it."""
    model, plain = pair(family, torch.float64)
    fuse(model)
    batch = batch_of(family)
    want = plain(**batch, use_cache=False)

    def fresh() -> Any:
        return model(**batch, use_cache=False)

    assert next(iter(fresh())) == "loss"
    near(fresh()[0], want.loss, 1e-9)
    near(fresh()["loss"], want.loss, 1e-9)
    near(fresh().logits, want.logits, 1e-9)
    near(fresh()["logits"], want.logits, 1e-9)
    near(fresh().to_tuple()[1], want.logits, 1e-9)
    near(fresh()[1], want.logits, 1e-9)
    leaves, tree = pytree.tree_flatten(fresh())
    differentiable = [isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in leaves]  # as DDP does
    again = pytree.tree_unflatten(
        [x.clone() if yes else x for x, yes in zip(leaves, differentiable, strict=True)], tree
    )
    near(again.loss, want.loss, 1e-9)
    near(again.logits, want.logits, 1e-9)
    apart = type(fresh())({k: v.float() for k, v in fresh().items() if isinstance(v, Tensor)})  # as Accelerate casts
    near(apart.logits, want.logits, 1e-9)
    as_tuple = model(**batch, use_cache=False, return_dict=False)
    near(as_tuple[0], want.loss, 1e-9)
    near(as_tuple[1], want.logits, 1e-9)


@pytest.mark.parametrize(
    "kwargs",
    [{"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {"shift_labels": True}, {"logits_to_keep": 4}],
)
def test_arguments_of_the_loss(kwargs: dict[str, Any]) -> None:
    model, plain = pair("llama", torch.float64)
    fuse(model)
    batch = batch_of("llama")
    if "shift_labels" in kwargs:
        kwargs = {"shift_labels": torch.roll(batch["labels"], -1, 1)}
    if "logits_to_keep" in kwargs:
        batch["labels"] = batch["labels"][:, -4:]
    check_same(step(model, batch, **kwargs), step(plain, batch, **kwargs), 1e-9)


def test_a_batch_without_labels_has_peft_s_loss() -> None:
    model, plain = pair("llama", torch.float64)
    fuse(model)
    batch = batch_of("llama")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert bool(torch.isnan(model(**batch).loss)) == bool(torch.isnan(plain(**batch).loss)) is True
