"""Dropout's masks: what they depend on and what not, how often they drop, what backward does."""

import itertools

import pytest
import torch
from oracle import DEVICE, value_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_kernels.dropout import dropout, dropped, keep_mask, keep_rate, mix

BACKENDS = ("triton", "torch")


def seeds_of(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=DEVICE)


def mask(shape, p, seeds, salt=3, backend="torch"):
    return keep_mask(torch.empty(shape, device=DEVICE), p, seeds, salt, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_samples_mask_is_its_own(backend):
    """Neither its place in the batch, nor its neighbours, nor padding on its right changes it."""
    whole = mask((4, 9, 11), 0.3, seeds_of(5, 6, 7, 8), backend=backend)
    part = mask((2, 6, 11), 0.3, seeds_of(7, 5), backend=backend)
    assert torch.equal(part[0], whole[2, :6])
    assert torch.equal(part[1], whole[0, :6])


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_layer_and_step_change_it(backend):
    base = mask((1, 12, 12), 0.5, seeds_of(5), backend=backend)
    assert torch.equal(base, mask((1, 12, 12), 0.5, seeds_of(5), backend=backend))
    assert not torch.equal(base, mask((1, 12, 12), 0.5, seeds_of(6), backend=backend))
    assert not torch.equal(base, mask((1, 12, 12), 0.5, seeds_of(5), salt=4, backend=backend))
    assert not torch.equal(base, mask((1, 12, 12), 0.5, seeds_of(5 + 2**40), backend=backend))


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_the_rate_holds_per_row_per_column_and_per_sample(p):
    """Within five standard deviations of a binomial count, everywhere; thresholds of 8 bits would miss p=0.05."""
    kept = mask((16, 256, 96), p, torch.arange(16, device=DEVICE) * 1001).float()
    for dims in [(0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        count = kept.numel() / kept.mean(dims).numel()
        off = (kept.mean(dims) - keep_rate(p, False)).abs().max()
        assert off < 5 * (p * (1 - p) / count) ** 0.5, dims


def test_neighbours_are_independent():
    dropped_ = ~mask((8, 256, 64), 0.2, torch.arange(8, device=DEVICE))
    for shift in (1, 2, 63, 64):
        flat = dropped_.flatten(1).float()
        both = (flat[:, shift:] * flat[:, :-shift]).mean()
        assert abs(both - 0.04) < 5 * (0.04 * 0.96 / flat[:, shift:].numel()) ** 0.5, shift


def test_draws_beyond_a_sample_fall_on_nobody():
    places = dropped(seeds_of(1, 2, 3), 9, 7, 0.5)
    assert int(places.max()) == 21, "the spare element at the end"
    assert int(places.min()) >= 0
    assert dropped(seeds_of(), 9, 7, 0.5).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient_are_those_of_the_mask(backend, dtype):
    x = torch.randn(3, 5, 17, device=DEVICE).to(dtype)
    dy, seeds = torch.randn(3, 5, 17, device=DEVICE).to(dtype), seeds_of(1, 2, 3)
    y, dx = value_and_grads(lambda t: dropout(t, 0.25, seeds, 7, backend=backend), [x], dy)
    kept = keep_mask(x, 0.25, seeds, 7, backend=backend)
    keep = keep_rate(0.25, backend == "triton")
    assert torch.equal(y == 0, ~kept | (x == 0))
    for got, source in ((y, x), (dx, dy)):
        torch.testing.assert_close(got, source * kept / keep, rtol=torch.finfo(dtype).eps * 2, atol=0)


def test_saves_the_seeds_only():
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        dropout(torch.randn(2, 100, requires_grad=True), 0.1, torch.tensor([1, 2]), 0)
    assert [tuple(t.shape) for t in found] == [(2,)]


def test_a_transposed_input_keeps_its_logical_mask():
    x, seeds = torch.randn(2, 6, 5, device=DEVICE), seeds_of(1, 2)
    assert torch.equal(
        dropout(x.transpose(1, 2).contiguous().transpose(1, 2), 0.5, seeds, 1), dropout(x, 0.5, seeds, 1)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_fake_tensors(backend):
    with FakeTensorMode():
        x = torch.empty(64, 2**15, 1025, requires_grad=True)
        dropout(x, 0.1, torch.empty(64, dtype=torch.int64), 0, backend=backend).sum().backward()
    assert x.grad.shape == x.shape


def test_seeds_spread():
    """Consecutive seeds and salts give different 32-bit words, and about half of their bits differ."""
    words = [mix(seed, salt) for seed in range(-50, 50) for salt in (0, 1, 256)]
    assert len(set(words)) == len(words)
    differing = [(a ^ b).bit_count() for a, b in itertools.pairwise(words)]
    assert 15 < sum(differing) / len(differing) < 17


def test_refusals():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        dropout(x, 1.5, torch.zeros(2, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"seeds must be int64 with shape \(2,\).*got \(3,\) torch.int64"):
        dropout(x, 0.5, torch.zeros(3, dtype=torch.int64), 0)
    assert dropout(x, 0.0, torch.zeros(2, dtype=torch.int64), 0) is x
