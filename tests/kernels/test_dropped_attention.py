"""Attention with dropout against its definition with the very mask: outputs, gradients, what it keeps."""

import pytest
import torch
from torch import Tensor

from peft_kernels import dropped_attention as module
from peft_kernels.dropout import keep_mask, keep_rate
from peft_kernels.dropped_attention import dropped_attention, dropped_attention_reference


def made(B: int, H: int, T: int, S: int, E: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def random(length: int) -> Tensor:  # laid out as a model's projections give it
        t = torch.randn(B, length, H, E, generator=draw, dtype=torch.float64).to(dtype)
        return t.transpose(1, 2).requires_grad_()

    inputs = [random(T), random(S), random(S)]
    return inputs, torch.randn(B, H, T, E, generator=draw, dtype=torch.float64).to(dtype), torch.arange(B) * 31 - 7


def masks(B: int, T: int, S: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None]
    padded = (torch.arange(S) < S - torch.arange(B)[:, None] % 3)[:, None, None]
    blind = padded & causal
    blind[0, 0, 0] = False
    return {
        "none": None,
        "causal": causal,
        "padded": padded,
        "blind": blind,
        "additive": torch.zeros(B, 1, T, S, dtype=dtype).masked_fill(~(padded & causal), torch.finfo(dtype).min),
        "bias": torch.randn(1, 1, T, S, generator=torch.Generator().manual_seed(1)).to(dtype),
    }


SHAPES = [(1, 1, 1, 1, 4), (3, 2, 7, 7, 8), (4, 3, 5, 9, 6), (5, 2, 33, 33, 16)]


@pytest.mark.parametrize("name", ["none", "causal", "padded", "blind", "additive", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("passes", [False, True])
def test_is_the_definition(shape, name, p, dtype, passes, monkeypatch) -> None:
    B, H, T, S, _ = shape
    monkeypatch.setattr(module, "CACHE_BYTES", 2 * H * T * S * dtype.itemsize)  # two samples at a time, or four
    inputs, dy, seeds = made(*shape, dtype)
    mask = masks(B, T, S, dtype)[name]
    keep = keep_mask(torch.empty(B, H, T, S), p, seeds, 5, backend="torch", passes=passes).double() / keep_rate(
        p, False
    )
    y = dropped_attention(*inputs, mask, p, seeds, 5, scale=0.3, passes=passes)
    got = [y.detach(), *torch.autograd.grad(y, inputs, dy)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    truth_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    truth = dropped_attention_reference(*wide, truth_mask, keep, 0.3)
    want = [truth.detach(), *torch.autograd.grad(truth, wide, dy.double())]
    bound = 3e-6 if dtype == torch.float32 else 1e-12
    for place, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        assert (g.double() - w).abs().max() <= bound * (1 + w.abs().max()), place
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("passes", [False, True])
def test_what_is_not_a_number_stays_so_in_its_row(passes) -> None:
    inputs, _, seeds = made(2, 2, 5, 40, 4, torch.float32)
    with torch.no_grad():
        inputs[0][1, 0, 3, 2] = torch.nan
    y = dropped_attention(*inputs, None, 0.1, seeds, 5, scale=0.3, passes=passes)
    assert y[1, 0, 3].isnan().all()
    assert int(y.isnan().sum()) == 4


def test_keeps_no_probabilities() -> None:
    inputs, _, seeds = made(2, 3, 40, 40, 8, torch.float32)
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = dropped_attention(*inputs, None, 0.1, seeds, 5, scale=0.3)
    assert sum(found.values()) == 4 * y.nbytes + 2 * 3 * 40 * 4 + seeds.nbytes


def test_the_same_bits_whatever_stands_in_the_batch() -> None:
    inputs, dy, seeds = made(5, 2, 9, 9, 8, torch.float32)
    y = dropped_attention(*inputs, None, 0.2, seeds, 5, scale=0.3)
    grads = torch.autograd.grad(y, inputs, dy)
    own = [t.detach()[2:4].requires_grad_() for t in inputs]
    part = dropped_attention(*own, None, 0.2, seeds[2:4], 5, scale=0.3)
    assert torch.allclose(part, y[2:4], rtol=1e-6, atol=1e-6)
    for got, want in zip(torch.autograd.grad(part, own, dy[2:4]), grads, strict=True):
        assert torch.allclose(got, want[2:4], rtol=1e-5, atol=1e-6)


def test_refusals() -> None:
    inputs, _, seeds = made(2, 1, 3, 3, 4, torch.float32)
    with pytest.raises(ValueError, match="p must be at least 0 and below 1"):
        dropped_attention(*inputs, None, 1.0, seeds, 5, scale=0.3)
    with pytest.raises(ValueError, match="seeds must be int64"):
        dropped_attention(*inputs, None, 0.1, seeds[:1], 5, scale=0.3)
