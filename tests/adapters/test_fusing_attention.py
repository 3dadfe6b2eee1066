"""Dropout of attention probabilities on a CPU: torch's attention with a mask that has a name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import adapt, batch_of, make, near, step
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peft_engine.adapters.fusing import fuse, row_seeds
from peft_engine.adapters.fusing.attention import attend
from peft_engine.adapters.fusing.state import ATTRIBUTE, Fused, RowSeeds
from peft_kernels.dropout import keep_mask, keep_rate

B, H, KV, T, D = 3, 4, 2, 7, 6
SEEDS = torch.tensor([5, 6, 7])


def module_of(groups: int, causal: bool) -> Any:
    state = Fused(torch.nn.Module, "attention dropout", "torch", RowSeeds(SEEDS), 99)
    found = SimpleNamespace(num_key_value_groups=groups, is_causal=causal)
    found.__dict__[ATTRIBUTE] = state
    return found


def masks() -> dict[str, Tensor | None]:
    lengths = torch.tensor([7, 4, 5])
    keys = (torch.arange(T) < lengths[:, None])[:, None, None, :].expand(B, 1, T, T)
    left = (torch.arange(T) >= (T - lengths)[:, None])[:, None, None, :] & torch.ones(T, T, dtype=torch.bool).tril()
    additive = torch.zeros(B, 1, T, T, dtype=torch.float64).masked_fill(~keys, torch.finfo(torch.float64).min)
    return {"none": None, "padding": keys, "blind rows": left, "additive": additive}


@pytest.mark.parametrize("heads", [H, KV])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["none", "padding", "blind rows", "additive"])
def test_equals_torch_without_dropout_and_the_definition_with_it(name: str, causal: bool, heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(B, H, T, D, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(B, heads, T, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask, module = masks()[name], module_of(H // heads, causal)
    leaves, dy = (query, key, value), torch.randn(B, T, H, D, dtype=torch.float64)

    # a rate so small that nothing is dropped: the whole path against torch's attention
    ours, _ = attend(None, module, query, key, value, mask, dropout=1e-12, scaling=0.3)
    plain, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=0.0, scaling=0.3)
    for got, want in zip(
        [ours, *torch.autograd.grad(ours, leaves, dy)], [plain, *torch.autograd.grad(plain, leaves, dy)], strict=True
    ):
        near(got, want, 1e-9)

    ours, _ = attend(None, module_of(H // heads, causal), query, key, value, mask, dropout=0.4)
    wide = [t.repeat_interleave(H // heads, 1) for t in (key, value)]
    scores = query @ wide[0].transpose(2, 3) / D**0.5
    if mask is None and causal:
        mask = torch.ones(T, T, dtype=torch.bool).tril()
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    shares = scores.softmax(-1).nan_to_num(0.0)
    kept = keep_mask(shares, 0.4, SEEDS, 99, backend="torch").double() / keep_rate(0.4, False)
    plain = ((shares * kept) @ wide[1]).transpose(1, 2)
    near(ours, plain, 1e-9)
    if name != "blind rows":  # nan_to_num has no gradient there
        for got, want in zip(
            torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(plain, leaves, dy), strict=True
        ):
            near(got, want, 1e-9)


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "llama", "gpt2"])
def test_in_a_model_it_drops_in_training_and_only_there(family: str) -> None:
    drops = {
        "bert": {"attention_probs_dropout_prob": 0.5},
        "vit": {"attention_probs_dropout_prob": 0.5},
        "llama": {"attention_dropout": 0.5},
        "distilbert": {"attention_dropout": 0.5},
        "gpt2": {"attn_pdrop": 0.5},
    }
    model = adapt(make(family, **drops[family]))
    report = fuse(model)
    wanted = "rope" if family == "llama" else "attention dropout"
    assert report.counts().get(wanted) == 2, report
    batch, rows = batch_of(family), row_seeds(model)
    assert rows is not None
    rows.seeds = torch.arange(3)
    first = step(model, batch)
    rows.seeds = torch.arange(3)
    again = step(model, batch)
    assert torch.equal(first.loss, again.loss)
    rows.seeds = torch.arange(3) + 10
    other = step(model, batch)
    assert abs(float(other.loss - first.loss)) > 1e-6
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
