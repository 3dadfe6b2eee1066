"""LayerNorm equals torch's, holds where the mean dwarfs the spread, and can be made again."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, assert_no_further_from_truth, guarded, value_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels.gpu._rows as tiles
from peft_kernels.layer_norm import layer_norm, layer_norm_reference
from peft_kernels.recompute import recipe_of

BACKENDS = ("triton", "torch")
EPS = 1e-5


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def parameters(features, dtype=torch.float32):
    """Within 1, so that an ulp of y is no less than an ulp of its two terms, which may cancel."""
    return draw(features, seed=5).tanh().to(dtype), draw(features, seed=6).tanh().to(dtype)


def module(x, weight, bias):
    return torch.func.functional_call(
        torch.nn.LayerNorm(x.shape[-1], eps=EPS, device=x.device), {"weight": weight, "bias": bias}, (x,)
    )


def per_term(grads, sums):
    """Gradients summed over rows, in units of Σ|terms|: where the terms cancel, the rounding of the sum does not."""
    return [(g.double() / s.clamp(min=1)).to(g.dtype) for g, s in zip(grads, sums, strict=True)]


def assert_agree(x, dy, truth, plain, ours):
    """The oracle's rule; the gradients of weight and bias, last, in units of their terms. `x`: what is normed."""
    dy, xhat = dy.double(), layer_norm_reference(x.double(), None, None, EPS)
    sums = [terms.abs().reshape(-1, x.shape[-1]).sum(0) for terms in (dy * xhat, dy)]
    lists = [[*values[:-2], *per_term(values[-2:], sums)] for values in (truth, plain, ours)]
    assert_no_further_from_truth(*lists)


def compare(shape, dtype, backend):
    x, dy = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    inputs = [x, *parameters(shape[-1], dtype)]
    truth = value_and_grads(lambda x, w, b: layer_norm_reference(x, w, b, EPS), [t.double() for t in inputs], dy)
    plain = value_and_grads(module, inputs, dy)
    ours = value_and_grads(
        lambda x, w, b: layer_norm(guarded(x), guarded(w), guarded(b), EPS, backend=backend), inputs, guarded(dy)
    )
    assert_agree(x, dy, truth, plain, ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_further_from_truth_than_torch(dtype, backend):
    for shape in ((0, 8), (1, 1), (3, 5, 127), (17, 129), (131, 15)):
        compare(shape, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_path_has_the_bits_of_layer_norm(dtype):
    x = draw(17, 129, dtype=dtype)
    for weight, bias in (parameters(129, dtype), (None, None), (parameters(129, dtype)[0], None)):
        expected = value_and_grads(lambda x, w=weight, b=bias: F.layer_norm(x, (129,), w, b, EPS), [x], x)
        ours = value_and_grads(lambda x, w=weight, b=bias: layer_norm(x, w, b, EPS, backend="torch"), [x], x)
        assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean_and_small_spread(backend):
    """The mean has half an ulp of 1000 at best, divided by the spread; mean(x²) - mean² would have no digit left."""
    x = (1000 + 0.05 * draw(17, 129).double()).float()
    weight, bias = parameters(129)
    truth = layer_norm_reference(x.double(), weight.double(), bias.double(), EPS)
    ours = layer_norm(x, weight, bias, EPS, backend=backend)
    spread = x.double().std(-1, correction=0, keepdim=True)
    allowed = 2 * torch.finfo(torch.float32).eps * (1000 / spread * weight.abs().double() + truth.abs())
    assert ((ours.double() - truth).abs() <= allowed).all()
    naive = (x.square().mean(-1) - x.mean(-1).square() + EPS).rsqrt()
    assert ((naive * spread.squeeze(-1) - 1).abs() > 0.1).any(), "the input does not tell the formulas apart"


def compare_residual(shape, dtype, backend):
    inputs = [draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=3), *parameters(shape[-1], dtype)]
    dy = draw(2 * shape[0], shape[-1], dtype=dtype, seed=1)

    def summed(norm):
        return lambda x, r, w, b: torch.cat([norm(x + r, w, b), x + r])

    truth = value_and_grads(
        summed(lambda x, w, b: layer_norm_reference(x, w, b, EPS)), [t.double() for t in inputs], dy
    )
    ours = value_and_grads(
        lambda x, r, w, b: torch.cat(layer_norm(guarded(x), w, b, EPS, residual=guarded(r), backend=backend)),
        inputs,
        dy,
    )
    assert_agree(inputs[0] + inputs[1], dy[: shape[0]], truth, value_and_grads(summed(module), inputs, dy), ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_is_added_first_and_returned(dtype, backend):
    compare_residual((17, 129), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_of_y_and_h_is_used(used, backend):
    x, residual = draw(3, 8).requires_grad_(), draw(3, 8, seed=1).requires_grad_()
    dy, h = draw(3, 8, seed=2), x + residual
    ours = torch.autograd.grad(
        layer_norm(x, None, None, EPS, residual=residual, backend=backend)[used], (x, residual), dy
    )
    expected = torch.autograd.grad((layer_norm_reference(h, None, None, EPS), h)[used], (x, residual), dy)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_rows_wider_than_the_widest_block(monkeypatch):
    """The loop over blocks, with a block small enough for the interpreter: whole blocks and a rest."""
    monkeypatch.setattr(tiles, "TILES", {32: (2, 4)})
    monkeypatch.setattr(tiles, "WIDEST", 32)
    monkeypatch.setattr(tiles, "LOOP", 32)
    for dtype in (torch.float32, torch.bfloat16):
        compare((3, 65), dtype, "triton")
        compare_residual((3, 65), dtype, "triton")
        test_recipe_gives_the_same_bits(dtype, "triton")
    test_large_mean_and_small_spread("triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recipe_gives_the_same_bits(dtype, backend):
    x, residual = draw(5, 65, dtype=dtype).requires_grad_(), draw(5, 65, dtype=dtype, seed=3)
    weight, bias = parameters(65, dtype)
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None), (weight.float(), bias.float())):
        for add in (None, residual):
            out = layer_norm(x, w, b, EPS, residual=add, backend=backend)
            y, h = (out, x) if add is None else out
            recipe = recipe_of(y)
            again = recipe.make(*recipe.inputs)
            assert torch.equal(again, y)
            assert again.dtype == y.dtype == dtype
            assert recipe.inputs[0].data_ptr() == h.data_ptr(), "the recipe reads a copy"


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_x_and_two_numbers_a_row(backend):
    saved = []
    x, (weight, bias) = draw(6, 33).requires_grad_(), parameters(33)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer_norm(x, weight, bias, EPS, backend=backend)
    known = [t.data_ptr() for t in (x, weight, bias)]
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(6, 1)] * 2
    assert x.data_ptr() in {t.data_ptr() for t in saved}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_one_parameter_trained(trained, backend):
    x, dy, (weight, bias) = draw(140, 33), draw(140, 33, seed=1), parameters(33)
    leaf = (weight if trained == "weight" else bias).requires_grad_()
    (got,) = torch.autograd.grad(layer_norm(x, weight, bias, EPS, backend=backend), leaf, dy)
    (want,) = torch.autograd.grad(layer_norm_reference(x, weight, bias, EPS), leaf, dy)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_strides(backend):
    x, dy = draw(33, 7).T, draw(33, 7, seed=1).T
    inputs = [x, *(p[::2] for p in parameters(66))]
    ours = value_and_grads(lambda x, w, b: layer_norm(x, w, b, EPS, backend=backend), inputs, dy)
    expected = value_and_grads(lambda x, w, b: layer_norm_reference(x, w, b, EPS), inputs, dy)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck():
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x, r, w, b: layer_norm(x, w, b, EPS, residual=r, backend="torch"), (x, residual, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda x: layer_norm(x, None, None, EPS, backend="torch"), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit_and_leaves_inputs_alone(backend):
    x, residual = draw(140, 33).requires_grad_(), draw(140, 33, seed=1)
    weight, bias = (p.requires_grad_() for p in parameters(33))
    dy, dh = draw(140, 33, seed=3), draw(140, 33, seed=4)
    everything, leaves = (x, residual, weight, bias, dy, dh), (x, weight, bias)
    before = [t.detach().clone() for t in everything]
    out = layer_norm(x, weight, bias, EPS, residual=residual, backend=backend)
    first = torch.autograd.grad(out, leaves, (dy, dh), retain_graph=True)
    second = torch.autograd.grad(out, leaves, (dy, dh))
    fresh = layer_norm(x, weight, bias, EPS, residual=residual, backend=backend)
    third = torch.autograd.grad(fresh, leaves, (dy, dh))
    for other in (second, third):
        assert all(map(torch.equal, first, other))
    assert all(map(torch.equal, out, fresh))
    assert all(map(torch.equal, everything, before))


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_fake_tensors_past_32_bits(backend):
    with FakeTensorMode():
        x, residual = (torch.empty(2**20, 4096, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        weight, bias = (torch.empty(4096, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        y, h = layer_norm(x, weight, bias, EPS, residual=residual, backend=backend)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        torch.autograd.backward((y, h), (torch.empty_like(y), torch.empty_like(h)))
        recipe = recipe_of(y)
        assert recipe.make(*recipe.inputs).shape == y.shape
    for leaf in (x, residual, weight, bias):
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4)}, r"weight must have shape \(3,\).*got \(4,\)"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(3,\).*got \(4,\)"),
        ({"weight": torch.zeros(3, dtype=torch.float16)}, r"weight must have x's dtype.*got torch.float16"),
        ({"x": torch.zeros(2, 3, dtype=torch.float16), "bias": torch.zeros(3, dtype=torch.float16)}, "one dtype"),
        ({"residual": torch.zeros(2, 4)}, r"residual must match x.*got \(2, 4\)"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, r"floating point.*int64"),
        ({"x": torch.zeros(2, 0)}, "at least one feature"),
    ],
)
def test_rejects_what_does_not_fit(change, message):
    arguments = {"x": torch.zeros(2, 3), "weight": torch.zeros(3), "bias": torch.zeros(3), "eps": EPS, **change}
    with pytest.raises(ValueError, match=message):
        layer_norm(**arguments)
