"""Rotary embedding: the numbers of transformers' Llama, in the caller's memory layout, with nothing kept but angles."""

import pytest
import torch
from oracle import DEVICE, DTYPES, assert_no_further_from_truth, guarded
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from peft_kernels.rope import rope, rope_reference

BACKENDS = ("triton", "torch")


def angles(batch, positions, head, dtype=torch.float32, equal_halves=True):
    turns = torch.arange(positions)[:, None] * torch.logspace(0, -2, head // 2) + torch.arange(batch)[:, None, None]
    turns = torch.cat((turns, turns if equal_halves else turns * 1.7 + 0.3), dim=-1)
    return turns.cos().to(DEVICE, dtype), turns.sin().to(DEVICE, dtype)


def heads(batch, count, positions, head, dtype=torch.float32, seed=0):
    """(B, T, H, D) in memory, seen as (B, H, T, D), as attention makes them."""
    x = torch.randn(batch, positions, count, head, generator=torch.Generator().manual_seed(seed))
    return guarded(x.to(DEVICE, dtype)).transpose(1, 2)


def values_and_grads(fn, q, k, cos, sin, dq, dk):
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = fn(q, k, cos, sin)
    return [*(y.detach() for y in out), *torch.autograd.grad(out, (q, k), [d.to(out[0].dtype) for d in (dq, dk)])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", [torch.float32, None], ids=["angles fp32", "angles as q"])
def test_no_further_from_truth_than_transformers(table, dtype, backend):
    for batch, many, few, positions, head, tables, equal in (
        (2, 5, 1, 17, 10, 2, True),
        (1, 3, 3, 1, 64, 1, False),
        (2, 1, 4, 5, 2, 1, True),
        (2, 3, 1, 0, 8, 2, True),
    ):
        q, dq = (heads(batch, many, positions, head, dtype, seed) for seed in (0, 1))
        k, dk = (heads(batch, few, positions, head, dtype, seed) for seed in (2, 3))
        cos, sin = (guarded(t) for t in angles(tables, positions, head, table or dtype, equal))
        wide = [t.double() for t in (q, k, cos, sin)]
        truth = values_and_grads(rope_reference, *wide, dq, dk)
        plain = values_and_grads(apply_rotary_pos_emb, q, k, cos, sin, dq, dk)
        ours = values_and_grads(lambda *given: rope(*given, backend=backend), q, k, cos, sin, dq, dk)
        assert_no_further_from_truth(truth, plain, ours)


@pytest.mark.parametrize("equal_halves", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_is_transformers_to_the_bit_or_to_one_rounding_of_a_product(backend, equal_halves):
    """The kernel rounds where eager torch rounds. addcmul may leave one product unrounded (FMA): that is half an ulp
    of the product, after which the sum may round to the other neighbour: an ulp of the result."""
    q, dq, k, dk = (heads(2, count, 33, 16, seed=seed) for seed, count in enumerate((3, 3, 1, 1)))
    cos, sin = angles(2, 33, 16, equal_halves=equal_halves)
    theirs = values_and_grads(apply_rotary_pos_emb, q, k, cos, sin, dq, dk)
    ours = values_and_grads(lambda *given: rope(*given, backend=backend), q, k, cos, sin, dq, dk)
    for ours_, theirs_, x in zip(ours, theirs, (q, k, dq, dk), strict=True):
        turned = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
        largest = torch.maximum(x.abs(), turned.abs())  # |cos| and |sin| are at most 1
        apart = 0.0 if backend == "triton" else torch.finfo(x.dtype).eps
        assert ((ours_ - theirs_).abs() <= apart * (largest / 2 + theirs_.abs())).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_half_precision_is_rounded_once(dtype, backend):
    q, k = heads(1, 3, 9, 32, dtype), heads(1, 1, 9, 32, dtype, seed=1)
    cos, sin = angles(1, 9, 32, dtype)
    wide = rope_reference(*(t.double() for t in (q, k, cos, sin)))
    for ours, truth in zip(rope(q, k, cos, sin, backend=backend), wide, strict=True):
        # the interpreter truncates on fp32 → bf16, where a GPU rounds to nearest
        ulps = 1 if backend == "triton" and DEVICE == "cpu" else 0.5
        if dtype == torch.bfloat16:
            assert ((ours - truth).abs() <= ulps * torch.finfo(dtype).eps * truth.abs() + 1e-6).all()
        else:
            assert ((ours - truth).abs() <= 2 * torch.finfo(dtype).eps * (1 + truth.abs())).all()


def test_gradcheck():
    cos, sin = angles(2, 3, 4, torch.float64, equal_halves=False)
    q, k = (heads(2, count, 3, 4, torch.float64).requires_grad_() for count in (2, 1))
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, backend="torch"), (q, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_in_and_the_same_order_out(backend):
    """Outputs and gradients lie in memory as the inputs do, whatever the layout of the gradients that come in."""
    cos, sin = angles(2, 5, 8)
    packed = torch.randn(2, 5, 7, 8, device=DEVICE)
    many, few = packed[:, :, :4].transpose(1, 2), packed[:, :, 4:6].transpose(1, 2)  # slices of one projection
    expected = rope_reference(many, few, cos, sin)
    layouts = {
        "heads inside": (many, few, (160, 8, 32, 1)),
        "positions inside": (many.contiguous(), few.contiguous(), (160, 40, 8, 1)),
        "head dimension outside": (many.mT.contiguous().mT, few.mT.contiguous().mT, None),
    }
    for name, (q, k, strides) in layouts.items():
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        out = rope(q, k, cos, sin, backend=backend)
        grads = torch.autograd.grad(out, (q, k), (torch.ones(2, 4, 5, 8, device=DEVICE), few.contiguous()))
        for ours, theirs in zip(out, expected, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda message, name=name: f"{name}: {message}")
        turned = rope_reference(torch.ones_like(many), few, cos, -sin)
        for ours, theirs in zip(grads, turned, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda message, name=name: f"{name}: {message}")
        if strides:
            assert out[0].stride() == grads[0].stride() == strides
    shared = packed[:, :, :1].transpose(1, 2).expand(2, 3, 5, 8)
    tables = (cos[:1].expand(2, 5, 8), sin[:1].expand(2, 5, 8))
    for ours, theirs in zip(
        rope(shared, few, *tables, backend=backend), rope_reference(shared, few, *tables), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_the_angles_alone_and_leaves_inputs_alone(backend):
    q, k = (heads(2, count, 5, 8).requires_grad_() for count in (3, 1))
    cos, sin = angles(2, 5, 8)
    dq, dk = heads(2, 3, 5, 8, seed=1), heads(2, 1, 5, 8, seed=2)
    tensors = (q, k, cos, sin, dq, dk)
    before, kept = [t.detach().clone() for t in tensors], []

    def keep(t):
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = rope(q, k, cos, sin, backend=backend)
    assert kept == [cos.data_ptr(), sin.data_ptr()]
    first = torch.autograd.grad(out, (q, k), (dq, dk), retain_graph=True)
    second = torch.autograd.grad(out, (q, k), (dq, dk), retain_graph=True)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, tensors, before))
    (only_q,) = torch.autograd.grad(out[0], q, dq)
    assert torch.equal(only_q, first[0])


def test_runs_on_fake_tensors_of_more_than_2_to_31_elements():
    with FakeTensorMode():
        q, k = (torch.empty(1, 2**20, count, 128, requires_grad=True) for count in (32, 8))
        out = rope(q.transpose(1, 2), k.transpose(1, 2), *torch.empty(2, 1, 2**20, 128), backend="triton")
        (out[0].sum() + out[1].sum()).backward()
    assert q.grad.shape == q.shape
    assert out[0].stride() == q.transpose(1, 2).stride()


def test_rejects_bad_input():
    q, k, (cos, sin) = heads(2, 4, 5, 8), heads(2, 2, 5, 8), angles(2, 5, 8)
    cases = [
        ((q[0], k, cos, sin), r"q and k must be .*got \(4, 5, 8\)"),
        ((q, k[:, :, :4], cos, sin), r"got \(2, 4, 5, 8\) and \(2, 2, 4, 8\)"),
        ((q[..., :7], k[..., :7], cos, sin), "must be even, got 7"),
        ((q, k, cos[..., :4], sin[..., :4]), r"must be \(2 or 1, 5, 8\), got \(2, 5, 4\).*Slice q and k"),
        ((q, k.half(), cos, sin), "float32, torch.float16"),
        ((q, k, cos.long(), sin.long()), "int64"),
        ((q, k, cos.to("meta"), sin), "on one device"),
        ((q, k, cos, sin.clone().requires_grad_()), "pass them detached"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            rope(*given)
    with pytest.raises(ValueError, match="float64"):
        rope(q, k, cos.double(), sin.double(), backend="triton")
