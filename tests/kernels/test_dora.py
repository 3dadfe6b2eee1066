"""DoRA: the factored norm against the materialised one, the magnitude against PEFT's own layer."""

import pytest
import torch
from oracle import DEVICE, DTYPES, assert_no_further_from_truth, guarded, value_and_grads
from peft.tuners.lora.dora import DoraLinearLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft_kernels.dora as dora
from peft_kernels.dora import (
    magnify,
    magnify_dropped,
    magnify_dropped_reference,
    magnify_reference,
    squared_norm,
    weight_norm,
    weight_norm_reference,
)

BACKENDS = ("triton", "torch")
SHAPES = ((0, 8), (1, 1), (3, 5, 127), (17, 129), (131, 15))
SCALE = 2.0


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def vectors(features, dtype=torch.float32):
    """A magnitude near the norm, as in training, and a bias."""
    norm = 1 + draw(features, seed=7).abs()
    return (norm * (1 + 0.1 * draw(features, seed=8))).to(dtype), norm, draw(features, dtype=dtype, seed=9)


def adapted(outputs, inputs, rank, dtype=torch.float32, size=0.1):
    return draw(outputs, inputs, dtype=dtype), draw(rank, inputs, seed=1), size * draw(outputs, rank, seed=2)


def per_term(grads, *terms):
    """Gradients summed over rows, in units of Σ|terms|: where the terms cancel, the rounding of the sum does not."""
    sums = [t.double().abs().reshape(-1, t.shape[-1]).sum(0).clamp(min=1) for t in terms]
    return [(g.double() / s).to(g.dtype) for g, s in zip(grads, sums, strict=True)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 0.01, 1.0, 100.0])
def test_norm_is_that_of_the_materialised_weight(size, dtype, transposed, monkeypatch):
    """Whichever of W and B·A is the larger. The weight is widened in pieces, here of 16 rows and a rest."""
    monkeypatch.setattr(dora, "CHUNK_ROWS", 16)
    weight, A, B = adapted(49, 100, 6, dtype, size)
    given = weight.T.contiguous() if transposed else weight
    truth = weight_norm_reference(weight.double(), A.double(), B.double(), SCALE)
    plain = weight_norm_reference(weight, A, B, SCALE)
    for squared in (None, squared_norm(given, transposed=transposed)):
        ours = weight_norm(given, A, B, SCALE, squared=squared, transposed=transposed)
        # relative: the norm is far from 1, and three sums of its size make it up, each with a few roundings
        assert_no_further_from_truth(
            [truth / truth], [plain / truth.float()], [(ours.double() / truth).float()], ulps=4
        )


def test_norm_of_an_adapter_that_cancels_the_weight():
    """No NaN from the root of a rounding; the error is of the size of the terms, as the docstring says."""
    A, B = draw(4, 64, seed=1), draw(32, 4, seed=2)
    weight = -SCALE * (B @ A)
    norm = weight_norm(weight, A, B, SCALE)
    assert torch.isfinite(norm).all()
    assert (norm.square() <= 32 * torch.finfo(torch.float32).eps * weight.square().sum(1)).all()


def test_norm_never_makes_the_product():
    """Nothing of the size of the weight is allocated, and autocast rounds nothing."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if (
                    isinstance(t, torch.Tensor)
                    and t.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
                ):
                    self.elements = max(self.elements, t.numel())
            return out

    weight, A, B = adapted(60, 50, 4)
    with Largest() as largest:
        norm = weight_norm(weight, A.requires_grad_(), B.requires_grad_(), SCALE)
    assert 0 < largest.elements <= 60 * 4
    assert not norm.requires_grad
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(weight_norm(weight, A, B, SCALE), norm)


def in_dtype(z, magnitude, norm, *bias):
    """Plain torch as PEFT writes it: the base result less its bias, the factor less one."""
    result = z if not bias else z + bias[0]
    g = (magnitude / norm.to(magnitude.dtype)).view(1, -1)
    return (result + (g - 1) * (result - bias[0] if bias else result)).to(z.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_magnify_is_no_further_from_truth(has_bias, dtype, backend):
    for shape in SHAPES:
        z, dy = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
        magnitude, norm, bias = vectors(shape[-1], dtype)
        inputs = [z, magnitude, *([bias] if has_bias else [])]
        truth = value_and_grads(
            lambda z, m, *b, norm=norm: magnify_reference(z, m, norm.double(), *b), [t.double() for t in inputs], dy
        )
        plain = value_and_grads(lambda z, m, *b, norm=norm: in_dtype(z, m, norm, *b), inputs, dy)
        ours = value_and_grads(
            lambda z, m, *b, norm=norm: magnify(guarded(z), guarded(m), guarded(norm), *b, backend=backend),
            inputs,
            guarded(dy),
        )
        terms = [dy * z / norm, dy][: len(inputs) - 1]
        lists = [[*values[:2], *per_term(values[2:], *terms)] for values in (truth, plain, ours)]
        assert_no_further_from_truth(*lists)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnify_dropped_is_no_further_from_truth(dtype, backend):
    for shape in SHAPES:
        tensors = [draw(*shape, dtype=dtype, seed=seed) for seed in (2, 3, 4)]
        dy, (magnitude, norm, _) = draw(*shape, dtype=dtype, seed=1), vectors(shape[-1], dtype)

        def plain(base, dropped, low, magnitude, norm=norm):
            g = (magnitude / norm.to(magnitude.dtype)).view(1, -1)
            return base + ((g - 1) * dropped + g * low)

        def ours(base, dropped, low, magnitude, norm=norm):
            return magnify_dropped(guarded(base), guarded(dropped), guarded(low), magnitude, norm, backend=backend)

        def truth(base, dropped, low, magnitude, norm=norm):
            return magnify_dropped_reference(base, dropped, low, magnitude, norm.double())

        inputs = [*tensors, magnitude]
        found = (
            value_and_grads(truth, [t.double() for t in inputs], dy),
            value_and_grads(plain, inputs, dy),
            value_and_grads(ours, inputs, guarded(dy)),
        )
        terms = dy * (tensors[1].abs() + tensors[2].abs()) / norm
        assert_no_further_from_truth(*([*values[:4], *per_term(values[4:], terms)] for values in found))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_composes_to_the_layer_of_peft(transposed, dropped, backend):
    """Value and every gradient, for Linear and Conv1D weights; what dropout left is handed to both."""
    rows, inputs, outputs, rank = 6, 20, 12, 3
    base = torch.nn.Linear(inputs, outputs, device=DEVICE)
    weight = base.weight.detach()
    if transposed:
        base.weight = torch.nn.Parameter(weight.T.contiguous())
    lora_A = torch.nn.Linear(inputs, rank, bias=False, device=DEVICE)
    lora_B = torch.nn.Linear(rank, outputs, bias=False, device=DEVICE)
    peft = DoraLinearLayer(fan_in_fan_out=transposed)
    peft.update_layer(base_layer=base, lora_A=lora_A.weight, lora_B=0 * lora_B.weight, scaling=SCALE)
    x, dy = draw(rows, inputs).requires_grad_(), draw(rows, outputs, seed=1)
    seen = x * (draw(rows, inputs, seed=2) > -1) / 0.8 if dropped else x
    leaves = (x, lora_A.weight, lora_B.weight, peft.weight)
    A, B = lora_A.weight, lora_B.weight

    result = torch.nn.functional.linear(x, weight, base.bias)
    expected = result + peft(
        seen,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=SCALE,
        base_layer=base,
        base_result=None if dropped else result,
    )
    norm = weight_norm(base.weight, A, B, SCALE, transposed=transposed)
    low = SCALE * (seen @ A.T) @ B.T
    if dropped:
        ours = magnify_dropped(result, seen @ weight.T, low, peft.weight, norm, backend=backend)
    else:
        ours = magnify(x @ weight.T + low, peft.weight, norm, base.bias, backend=backend)
    torch.testing.assert_close(ours, expected)
    for got, want in zip(
        torch.autograd.grad(ours, leaves, dy, retain_graph=True), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_strides(backend):
    z, dropped, low, dy = (draw(33, 7, seed=seed).T for seed in range(4))
    magnitude, norm, bias = (v[::2] for v in vectors(66))
    for ours, expected, inputs in (
        (
            lambda z, m, b: magnify(z, m, norm, b, backend=backend),
            lambda z, m, b: magnify_reference(z, m, norm, b),
            [z, magnitude, bias],
        ),
        (
            lambda z, d, low, m: magnify_dropped(z, d, low, m, norm, backend=backend),
            lambda z, d, low, m: magnify_dropped_reference(z, d, low, m, norm),
            [z, dropped, low, magnitude],
        ),
    ):
        for got, want in zip(value_and_grads(ours, inputs, dy), value_and_grads(expected, inputs, dy), strict=True):
            torch.testing.assert_close(got, want)


def test_gradcheck():
    z, dropped, low = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    magnitude, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm = torch.rand(5, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda z, m, b: magnify(z, m, norm, b, backend="torch"), (z, magnitude, bias))
    assert torch.autograd.gradcheck(
        lambda z, d, low, m: magnify_dropped(z, d, low, m, norm, backend="torch"), (z, dropped, low, magnitude)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_magnitude_saves_no_activation(backend):
    saved = []
    z, (magnitude, norm, bias) = draw(6, 33).requires_grad_(), vectors(33)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        first = magnify(z, magnitude, norm, bias, backend=backend)
        second = magnify_dropped(z, z, z, magnitude, norm, backend=backend)
    assert {tuple(t.shape) for t in saved} == {(33,)}
    for y in (first, second):
        torch.autograd.grad(y.sum(), z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_is_a_constant(backend):
    z, (magnitude, norm, _) = draw(6, 33), vectors(33)
    y = magnify(z, magnitude.requires_grad_(), norm.requires_grad_(), backend=backend)
    y.sum().backward()
    assert magnitude.grad is not None
    assert norm.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit_and_leaves_inputs_alone(backend):
    base, dropped, low, dy = (draw(140, 33, seed=seed) for seed in range(4))
    magnitude, norm, bias = vectors(33)
    everything = (base, dropped, low, dy, magnitude, norm, bias)
    before = [t.clone() for t in everything]

    def run():
        leaves = [t.detach().requires_grad_() for t in (base, dropped, low, magnitude, bias)]
        first = magnify(leaves[0], leaves[3], norm, leaves[4], backend=backend)
        second = magnify_dropped(*leaves[:4], norm, backend=backend)
        twice = [torch.autograd.grad((first, second), leaves, (dy, dy), retain_graph=True) for _ in range(2)]
        assert all(map(torch.equal, *twice))
        return [first, second, *twice[0]]

    assert all(map(torch.equal, run(), run()))
    assert all(map(torch.equal, everything, before))


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_fake_tensors_past_32_bits(backend):
    with FakeTensorMode():
        base, dropped, low = (torch.empty(2**20, 4096, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        magnitude, bias = (torch.empty(4096, requires_grad=True) for _ in range(2))
        norm = weight_norm(torch.empty(4096, 64), torch.empty(8, 64), torch.empty(4096, 8), SCALE)
        y = magnify(base, magnitude, norm, bias, backend=backend)
        other = magnify_dropped(base, dropped, low, magnitude, norm, backend=backend)
        assert (y.shape, y.dtype) == (other.shape, other.dtype) == (base.shape, base.dtype)
        torch.autograd.backward((y, other), (torch.empty_like(y), torch.empty_like(other)))
    for leaf in (base, dropped, low, magnitude, bias):
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


def test_rejects_what_does_not_fit():
    z, (magnitude, norm, bias) = torch.zeros(2, 3), vectors(3)
    weight, A, B = adapted(3, 5, 2)
    for call, message in (
        (lambda: magnify(z, magnitude[:2], norm), r"magnitude must have shape \(3,\).*got \(2,\)"),
        (lambda: magnify(z, magnitude, norm[:2]), r"norm must have shape \(3,\).*got \(2,\)"),
        (lambda: magnify(z, magnitude, norm, bias[:2]), r"bias must have shape \(3,\).*got \(2,\)"),
        (lambda: magnify(z.long(), magnitude, norm), "floating-point.*int64"),
        (lambda: magnify_dropped(z, z[:1], z, magnitude, norm), r"base_dropped must match base.*got \(1, 3\)"),
        (lambda: magnify_dropped(z, z, z.half(), magnitude, norm), r"low must match base.*float16"),
        (lambda: weight_norm(weight, A, B, 1.0, transposed=True), r"got \(3, 5\), \(2, 5\) and \(3, 2\)"),
        (lambda: weight_norm(weight, A, B.T, 1.0), r"got \(3, 5\), \(2, 5\) and \(2, 3\)"),
        (lambda: weight_norm(weight, A, B, 1.0, squared=norm[:2]), r"squared must have shape \(3,\), got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
