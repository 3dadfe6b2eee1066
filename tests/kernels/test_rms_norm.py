"""RMSNorm equals transformers' Llama and Gemma modules, saves x and rstd alone, and can be made again."""

import pytest
import torch
from oracle import DEVICE, DTYPES, assert_no_further_from_truth, guarded, value_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import peft_kernels.gpu._rows as gpu
from peft_kernels.recompute import recipe_of
from peft_kernels.rms_norm import rms_norm, rms_norm_reference

BACKENDS = ("triton", "torch")
MODULES = {"llama": (LlamaRMSNorm, 0.0), "gemma": (GemmaRMSNorm, 1.0)}
EPS = 1e-5


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def within_one(*shape, **settings):
    """So that an ulp of a result is no less than an ulp of the products that may cancel in it."""
    return draw(*shape, **settings).tanh()


def module(cast, x, weight):
    """transformers' own module with this weight."""
    norm = MODULES[cast][0](x.shape[-1], eps=EPS).to(x.device)
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


def both(out):
    """(y, h) as one tensor, so that both have gradients to pass on."""
    return torch.cat([t.float() if out[0].dtype != out[1].dtype else t for t in out])


def per_term(grads, sums):
    """Gradients summed over rows, in units of Σ|terms|: where the terms cancel, the rounding of the sum does not."""
    return [(g.double() / s.clamp(min=1)).to(g.dtype) for g, s in zip(grads, sums, strict=True)]


def assert_agree(x, dy, truth, plain, ours, ulps=2):
    """The oracle's rule; the weight's gradient, last, in units of its terms. `x`: what is normed."""
    xhat = rms_norm_reference(x.double(), None, EPS)
    sums = [(dy.double() * xhat).abs().reshape(-1, x.shape[-1]).sum(0)]
    lists = [[*values[:-1], *per_term(values[-1:], sums)] for values in (truth, plain, ours)]
    assert_no_further_from_truth(*lists, ulps=ulps)


def compare(cast, shape, dtype, backend, weight_dtype=None, ulps=2):
    offset = MODULES[cast][1]
    x, dy = draw(*shape, dtype=dtype), within_one(*shape, dtype=dtype, seed=1)
    weight = within_one(shape[-1], dtype=weight_dtype or dtype, seed=2)
    truth = value_and_grads(lambda x, w: rms_norm_reference(x, w, EPS, offset, cast), [x.double(), weight.double()], dy)
    plain = value_and_grads(lambda x, w: module(cast, x, w), [x, weight], dy)
    ours = value_and_grads(
        lambda x, w: rms_norm(guarded(x), guarded(w), EPS, offset=offset, cast=cast, backend=backend),
        [x, weight],
        guarded(dy),
    )
    assert_agree(x, dy, truth, plain, ours, ulps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", MODULES)
def test_no_further_from_truth_than_transformers(cast, dtype, backend):
    for shape in ((0, 8), (1, 1), (3, 5, 127), (17, 129), (131, 15)):
        compare(cast, shape, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cast", MODULES)
def test_weight_of_another_dtype(cast, backend):
    """Llama's product has the wider dtype, Gemma's that of x."""
    # Llama's xhat is rounded to bf16 under an fp32 result, and the interpreter truncates there
    ulps = (
        2 * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
        if (cast, backend) == ("llama", "triton")
        else 2
    )
    compare(cast, (5, 33), torch.bfloat16, backend, torch.float32, ulps)


def compare_residual(cast, shape, dtype, backend):
    offset = MODULES[cast][1]
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=3)
    weight, dy = within_one(shape[-1], dtype=dtype, seed=2), within_one(2 * shape[0], shape[-1], dtype=dtype, seed=1)

    def reference(x, residual, weight):
        h = x + residual
        return both((rms_norm_reference(h, weight, EPS, offset, cast), h))

    def ours(x, residual, weight):
        out = rms_norm(guarded(x), weight, EPS, offset=offset, cast=cast, residual=guarded(residual), backend=backend)
        return both(out)

    def plain(x, residual, weight):
        h = x + residual
        return both((module(cast, h, weight), h))

    inputs = [x, residual, weight]
    truth = value_and_grads(reference, [t.double() for t in inputs], dy)
    assert_agree(
        x + residual, dy[: shape[0]], truth, value_and_grads(plain, inputs, dy), value_and_grads(ours, inputs, dy)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", MODULES)
def test_residual_is_added_first_and_returned(cast, dtype, backend):
    compare_residual(cast, (17, 129), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_of_y_and_h_is_used(used, backend):
    x, residual = draw(3, 8).requires_grad_(), draw(3, 8, seed=1).requires_grad_()
    out = rms_norm(x, None, EPS, residual=residual, backend=backend)
    h = x + residual
    expected = (rms_norm_reference(h, None, EPS), h)
    dy = draw(3, 8, seed=2)
    for got, want in zip(
        torch.autograd.grad(out[used], (x, residual), dy),
        torch.autograd.grad(expected[used], (x, residual), dy),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("cast", MODULES)
def test_rows_wider_than_the_widest_block(cast, monkeypatch):
    """The loop over blocks, with a block small enough for the interpreter: whole blocks and a rest."""
    monkeypatch.setattr(gpu, "TILES", {32: (2, 4)})
    monkeypatch.setattr(gpu, "WIDEST", 32)
    monkeypatch.setattr(gpu, "LOOP", 32)
    assert not gpu.tile(65)["WHOLE"]
    for dtype in (torch.float32, torch.bfloat16):
        compare(cast, (3, 65), dtype, "triton")
        compare_residual(cast, (3, 65), dtype, "triton")
        test_recipe_gives_the_same_bits("triton", cast, dtype)


@pytest.mark.parametrize("features", [1, 128, 129, 4096, 5000, 8192, 8193, 16384])
def test_tiles_cover_the_row(features):
    tile = gpu.tile(features)
    assert tile["WHOLE"] == (features <= gpu.WIDEST)
    assert tile["BLOCK_N"] >= features or not tile["WHOLE"]
    assert tile["BLOCK_M"] * tile["BLOCK_N"] == 16 * 32 * tile["num_warps"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cast", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recipe_gives_the_same_bits(backend, cast, dtype):
    x, residual = draw(5, 65, dtype=dtype), draw(5, 65, dtype=dtype, seed=3)
    x.requires_grad_()
    for weight in (None, draw(65, dtype=dtype, seed=2), draw(65, seed=2)):
        for add in (None, residual):
            out = rms_norm(x, weight, EPS, offset=MODULES[cast][1], cast=cast, residual=add, backend=backend)
            y, h = (out, x) if add is None else out
            recipe = recipe_of(y)
            again = recipe.make(*recipe.inputs)
            assert torch.equal(again, y)
            assert again.dtype == y.dtype
            assert recipe.inputs[0].data_ptr() == h.data_ptr(), "the recipe reads a copy"


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_x_and_one_number_a_row(backend):
    saved = []
    x, weight = draw(6, 33).requires_grad_(), draw(33, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS, backend=backend)
    new = [t for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [tuple(t.shape) for t in new] == [(6, 1)]
    assert x.data_ptr() in {t.data_ptr() for t in saved}


def test_llama_order_with_an_offset():
    """No model has it, the definition does: (offset + weight) in the weight's dtype."""
    x, weight = draw(5, 33, dtype=torch.bfloat16), draw(33, dtype=torch.bfloat16, seed=1)
    expected = rms_norm_reference(x, weight, EPS, 1.0, "llama")
    assert torch.equal(rms_norm(x, weight, EPS, offset=1.0, backend="torch"), expected)
    # the interpreter truncates where it narrows, thrice here
    ours = rms_norm(x, weight, EPS, offset=1.0, backend="triton")
    assert ((ours.double() - expected.double()).abs() <= 3 * 2**-7 * expected.double().abs()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_strides(backend):
    x, dy = draw(33, 7).T, draw(33, 7, seed=1).T
    weight = draw(66, seed=2)[::2]
    ours = value_and_grads(lambda x, w: rms_norm(x, w, EPS, backend=backend), [x, weight], dy)
    expected = value_and_grads(lambda x, w: rms_norm_reference(x, w, EPS), [x, weight], dy)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("cast", MODULES)
def test_gradcheck(cast):
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for inputs in ((x, residual, weight), (x, residual)):
        assert torch.autograd.gradcheck(
            lambda x, r, w=None: rms_norm(x, w, EPS, offset=1.0, cast=cast, residual=r, backend="torch"), inputs
        )
        assert torch.autograd.gradcheck(lambda x, r, w=None: rms_norm(x, w, EPS, cast=cast, backend="torch"), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit_and_leaves_inputs_alone(backend):
    x, residual, weight = draw(140, 33).requires_grad_(), draw(140, 33, seed=1), draw(33, seed=2).requires_grad_()
    dy, dh = draw(140, 33, seed=3), draw(140, 33, seed=4)
    before = [t.detach().clone() for t in (x, residual, weight, dy, dh)]
    out = rms_norm(x, weight, EPS, residual=residual, backend=backend)
    first = torch.autograd.grad(out, (x, weight), (dy, dh), retain_graph=True)
    second = torch.autograd.grad(out, (x, weight), (dy, dh))
    fresh = rms_norm(x, weight, EPS, residual=residual, backend=backend)
    third = torch.autograd.grad(fresh, (x, weight), (dy, dh))
    for other in (second, third):
        assert all(map(torch.equal, first, other))
    assert all(map(torch.equal, out, fresh))
    assert all(map(torch.equal, (x, residual, weight, dy, dh), before))


def test_autocast_does_not_round_the_weights_gradient():
    x, weight, dy = draw(64, 33).requires_grad_(), draw(33, seed=1).requires_grad_(), draw(64, 33, seed=2)
    y = rms_norm(x, weight, EPS, backend="torch")
    expected = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(map(torch.equal, torch.autograd.grad(y, (x, weight), dy), expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_fake_tensors_past_32_bits(backend):
    with FakeTensorMode():
        x, residual = (torch.empty(2**20, 4096, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        weight = torch.empty(4096, requires_grad=True)
        y, h = rms_norm(x, weight, EPS, residual=residual, backend=backend)
        assert (y.shape, y.dtype) == (x.shape, torch.float32)
        torch.autograd.backward((y, h), (torch.empty_like(y), torch.empty_like(h)))
        recipe = recipe_of(y)
        assert recipe.make(*recipe.inputs).dtype == y.dtype
    assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
    assert (weight.grad.shape, weight.grad.dtype) == (weight.shape, weight.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4)}, r"weight must have shape \(3,\).*got \(4,\)"),
        ({"residual": torch.zeros(2, 4)}, r"residual must match x.*got \(2, 4\)"),
        ({"residual": torch.zeros(2, 3, dtype=torch.float16)}, r"residual must match x.*float16: cast it"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, r"floating point.*int64"),
        ({"x": torch.zeros(2, 0)}, "at least one feature"),
        ({"cast": "mistral"}, "cast must be one of.*got 'mistral'"),
    ],
)
def test_rejects_what_does_not_fit(change, message):
    arguments = {"x": torch.zeros(2, 3), "weight": torch.zeros(3), "eps": EPS, **change}
    with pytest.raises(ValueError, match=message):
        rms_norm(**arguments)
