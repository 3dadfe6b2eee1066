"""Gated activations keep gate and up alone, and make their product again in backward."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, assert_no_further_from_truth, guarded, value_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_kernels.glu import glu, glu_backward, glu_forward, glu_reference
from peft_kernels.recompute import recipe_of

BACKENDS = ("triton", "torch")
PLAIN = {
    "silu": lambda g, u: F.silu(g) * u,
    "gelu": lambda g, u: F.gelu(g) * u,
    "gelu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
}
ACTIVATIONS = tuple(PLAIN)


def draw(shape, dtype=torch.float32, count=3):
    """gate, normal and twice as wide as usual, then up and dh within 1, so that an ulp of dgate is no less than one of
    act'(gate), whose terms cancel where it crosses zero."""
    generator = torch.Generator().manual_seed(0)
    drawn = [2 * torch.randn(shape, generator=generator)]
    drawn += [2 * torch.rand(shape, generator=generator) - 1 for _ in range(count - 1)]
    return [t.to(DEVICE, dtype) for t in drawn]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_further_from_truth_than_torch(activation, dtype, backend):
    for shape in ((0, 8), (1, 8), (15, 127), (17, 129)):
        gate, up, dh = draw(shape, dtype)
        truth = value_and_grads(lambda g, u: glu_reference(g, u, activation), [gate.double(), up.double()], dh)
        plain = value_and_grads(PLAIN[activation], [gate, up], dh)
        ours = value_and_grads(
            lambda g, u: glu(guarded(g), guarded(u), activation, backend=backend), [gate, up], guarded(dh)
        )
        assert_no_further_from_truth(truth, plain, ours)
        inside = glu_backward(guarded(dh), guarded(gate), guarded(up), activation, backend == "triton")
        assert_no_further_from_truth(truth, plain, inside)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    inputs = [t.requires_grad_() for t in draw((3, 5), torch.float64, count=2)]
    assert torch.autograd.gradcheck(lambda g, u: glu(g, u, activation, backend="torch"), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_h_has_the_same_bits_each_time_it_is_made(activation, dtype, backend):
    """In forward, by the recipe, and in backward; of halves of one fused projection as well."""
    fused, dh = draw((3, 2 * 131), dtype, count=1)[0], draw((3, 131), dtype, count=1)[0]
    pairs = [
        fused.chunk(2, dim=-1),
        (fused[:, :131].contiguous(), fused[:, 131:]),
        (fused[:, :131].T, fused[:, 131:].T),
    ]
    for gate, up in pairs:
        h = glu(gate, up, activation, backend=backend)
        recipe = recipe_of(h)
        in_backward = glu_backward(dh.reshape(gate.shape), gate, up, activation, backend == "triton")[0]
        for other in (recipe.make(*recipe.inputs), glu_forward(gate, up, activation, backend == "triton"), in_backward):
            assert torch.equal(other, h)
            assert other.dtype == dtype
        assert [t.data_ptr() for t in recipe.inputs] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_keeps_gate_and_up_alone_and_leaves_them_alone(activation, dtype, backend):
    gate, up, dh = draw((4, 33), dtype)
    given = [t.clone() for t in (gate, up, dh)]
    kept = []

    def keep(t):
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        h = glu(gate.requires_grad_(), up.requires_grad_(), activation, backend=backend)
    assert kept == [gate.data_ptr(), up.data_ptr()]
    grads = [torch.autograd.grad(h, (gate, up), dh, retain_graph=True) for _ in range(2)]
    grads.append(glu_backward(dh, gate.detach(), up.detach(), activation, backend == "triton")[1:])
    for one, other in pairwise(grads):
        assert all(map(torch.equal, one, other))
    assert all(map(torch.equal, (gate, up, dh), given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    """Halves of one projection, transposed, expanded, and the expanded gradient of a sum."""
    fused = draw((3, 2, 48), count=2)[1]
    pairs = [
        fused.chunk(2, dim=-1),
        (fused.transpose(0, 2), fused.transpose(0, 2)),
        (fused[:1].expand(3, 2, 48), fused),
    ]
    pairs.append((fused[:, :, :1].expand(3, 2, 5), fused[:, :, 1:2].expand(3, 2, 5)))
    for gate, up in pairs:
        for dh in (torch.linspace(-1, 1, gate.numel(), device=DEVICE).view(gate.shape), torch.ones(()).to(gate)):
            dh = dh.expand(gate.shape)
            truth = value_and_grads(glu_reference, [gate.double(), up.double()], dh)
            plain = value_and_grads(PLAIN["silu"], [gate, up], dh)
            ours = value_and_grads(lambda g, u: glu(g, u, backend=backend), [gate, up], dh)
            assert_no_further_from_truth(truth, plain, ours)
            inside = glu_backward(dh, gate, up, "silu", backend == "triton")
            assert_no_further_from_truth(truth, plain, inside)


def test_one_triton_launch_reads_strided_halves_without_copies():
    """gate and up as halves of one projection (Phi-3): rows are addressed by their stride."""
    from peft_kernels.gpu.activation import as_rows

    gate, up = draw((2, 5, 64), count=1)[0].chunk(2, dim=-1)
    rows, cols, flat = as_rows(gate, up)
    assert (rows, cols) == (10, 32)
    assert [t.data_ptr() for t in flat] == [gate.data_ptr(), up.data_ptr()]


def test_runs_on_fake_tensors_of_more_than_2_to_31_elements():
    with FakeTensorMode():
        gate, up = (torch.empty(2**20, 4096, requires_grad=True) for _ in range(2))
        glu(gate, up, backend="triton").sum().backward()
        h, dgate, dup = glu_backward(gate, gate, up, "silu", True)
    assert gate.grad.shape == up.grad.shape == h.shape == dgate.shape == dup.shape == gate.shape


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float16), torch.zeros(2, 3, device="meta")]
)
def test_rejects_mismatch(bad):
    with pytest.raises(ValueError, match=r"must match, got \(2, 3\) torch.float32 on cpu and"):
        glu(torch.zeros(2, 3), bad)


def test_rejects_bad_names_and_dtypes():
    with pytest.raises(ValueError, match=r"activation must be one of .*got 'relu'"):
        glu(torch.zeros(2, 3), torch.zeros(2, 3), "relu")
    with pytest.raises(ValueError, match=r"got torch.int32\. Convert"):
        glu(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32))
