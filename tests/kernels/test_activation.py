"""Activations keep their input alone, and equal the modules of torch and transformers."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, assert_no_further_from_truth, guarded, value_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.activations import ACT2FN

from peft_kernels.activation import activate, activation_reference
from peft_kernels.recompute import recipe_of

BACKENDS = ("triton", "torch")
PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}
KINDS = tuple(PLAIN)


def draw(shape, dtype=torch.float32):
    """Normal numbers, three times as wide as usual: the tails are where formulas cancel."""
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)


def draw_dy(shape, dtype=torch.float32):
    """Within 1, so that an ulp of dx is no less than an ulp of the slope, whose terms cancel where it crosses zero."""
    return (2 * torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 1).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_further_from_truth_than_torch(kind, dtype, backend):
    for shape in ((0, 8), (1,), (17, 129), (1025,)):
        x, dy = draw(shape, dtype), draw_dy(shape, dtype)
        truth = value_and_grads(lambda x: activation_reference(x, kind), [x.double()], dy)
        plain = value_and_grads(PLAIN[kind], [x], dy)
        ours = value_and_grads(lambda x: activate(guarded(x), kind, backend=backend), [x], guarded(dy))
        assert_no_further_from_truth(truth, plain, ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_rounded_once(kind, dtype):
    """Hardly a number differs from fp32's rounded result; where aten rounds in between, a tenth of them would."""
    x, dy = draw((64, 65), dtype), draw_dy((64, 65), dtype)
    ours = value_and_grads(lambda x: activate(x, kind, backend="torch"), [x], dy)
    wide = value_and_grads(lambda x: activation_reference(x, kind), [x.float()], dy)
    for o, w in zip(ours, wide, strict=True):
        assert (o != w.to(dtype)).float().mean() < 0.01


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("silu", "silu"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
    ],
)
def test_equals_the_module_of_transformers(name, kind):
    x = draw((64, 65))
    ours, theirs = activate(x, kind, backend="torch"), ACT2FN[name](x)
    if name == "gelu_new":  # the same formula written out: it rounds at each of its steps
        assert (ours - theirs).abs().max() <= 4 * torch.finfo(x.dtype).eps
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    x = draw((5, 7), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: activate(x, kind, backend="torch"), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind, backend):
    """Slices, transposed and expanded tensors, and the expanded gradient of a sum."""
    fused = draw((3, 2, 32))
    for x in (fused[..., 7:20], fused.transpose(0, 2), fused[:, :, :1].expand(3, 2, 5)):
        for dy in (draw_dy(x.shape), torch.ones((), device=DEVICE).expand(x.shape)):
            truth = value_and_grads(lambda x: activation_reference(x, kind), [x.double()], dy)
            plain = value_and_grads(PLAIN[kind], [x], dy)
            ours = value_and_grads(lambda x: activate(x, kind, backend=backend), [x], dy)
            assert_no_further_from_truth(truth, plain, ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_keeps_x_alone_and_leaves_it_alone(kind, backend):
    x, dy = draw((4, 33)).requires_grad_(), draw_dy((4, 33))
    before, kept = (x.detach().clone(), dy.clone()), []

    def keep(t):
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = activate(x, kind, backend=backend)
    assert kept == [x.data_ptr()]
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(first, second)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_gives_the_same_bits(kind, dtype, backend):
    x = draw((5, 131), dtype).requires_grad_()
    y = activate(x, kind, backend=backend)
    recipe = recipe_of(y)
    again = recipe.make(*recipe.inputs)
    assert torch.equal(again, y)
    assert again.dtype == y.dtype
    assert not again.requires_grad
    assert [t.data_ptr() for t in recipe.inputs] == [x.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_and_large_values_stay_finite(kind, backend):
    x = torch.tensor([float("nan"), -1e4, 1e4, -100.0, 0.0], device=DEVICE)
    y, dx = value_and_grads(lambda x: activate(x, kind, backend=backend), [x], torch.ones_like(x))
    assert y[0].isnan()
    torch.testing.assert_close(y[1:], torch.tensor([0.0, 1e4, 0.0, 0.0], device=DEVICE))
    half = 0.0 if kind == "relu" else 0.5
    torch.testing.assert_close(dx[1:], torch.tensor([0.0, 1.0, 0.0, half], device=DEVICE))


def test_runs_on_fake_tensors_of_more_than_2_to_31_elements():
    with FakeTensorMode():
        x = torch.empty(2**20, 4096, requires_grad=True)
        activate(x, "gelu", backend="triton").sum().backward()
    assert x.grad.shape == x.shape


def test_rejects_bad_input():
    with pytest.raises(ValueError, match=r"kind must be one of .*got 'mish'"):
        activate(torch.zeros(2), "mish")
    with pytest.raises(ValueError, match=r"got torch.int64\. Convert"):
        activate(torch.zeros(2, dtype=torch.int64), "gelu")
    with pytest.raises(ValueError, match="float64"):
        activate(torch.zeros(2, dtype=torch.float64, device=DEVICE), "gelu", backend="triton")
