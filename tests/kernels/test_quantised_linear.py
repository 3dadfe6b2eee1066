"""LoRA linears over quantised weights: outputs and every gradient against their definition, what stays in memory."""

import itertools
from typing import Any

import pytest
import torch
from oracle import DEVICE, DTYPES
from quantised import KINDS, held
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_engine.meters.memory import LiveBytes
from peft_kernels import _compiled as compiled
from peft_kernels import _quantised_products as products
from peft_kernels.dora import squared_norm, weight_norm, weight_norm_reference
from peft_kernels.dropout import keep_mask, keep_rate
from peft_kernels.frozen_weight import freeze
from peft_kernels.lora_linear import Adapter, Projection, lora_linear, lora_linear_reference, lora_linears

BACKENDS = ("triton", "torch")


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
    return values.to(dtype).to(DEVICE).requires_grad_(grad)


def make(
    out: int, features: int, rank: int, kind: str | None, *, dtype=torch.float32, p=0.0, salt=0, bias=True, pairs=1,
    **how: Any,
) -> Projection:  # fmt: skip
    """A projection whose weight is quantised, or a tensor where `kind` is None."""
    generator = torch.Generator().manual_seed(out * 1000 + features + rank + salt)
    weight: Any = random(generator, out, features, dtype=dtype, grad=False)
    if kind is not None:
        weight = held((out, features), kind, spread=0.0, seed=salt, **how)
    adapters = tuple(
        Adapter(
            random(generator, rank, features, dtype=dtype),
            random(generator, out, rank, dtype=dtype),
            0.75,
            p,
            salt + place,
            random(generator, out, dtype=dtype) if bias else None,
        )
        for place in range(pairs)
    )
    return Projection(weight, random(generator, out, dtype=dtype) if bias else None, adapters)


def leaves_of(x: Tensor, projections: list[Projection]) -> list[Tensor]:
    found = [x]
    for one in projections:
        found += [one.bias, *itertools.chain.from_iterable((a.A, a.B, a.bias) for a in one.adapters)]
    return [t for t in found if t is not None]


def as_dtype(projections: list[Projection], dtype: torch.dtype) -> list[Projection]:
    """The same with other tensors of `dtype`; codes stay codes."""

    def cast(t: Any) -> Any:
        return t.detach().to(dtype).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    return [
        Projection(
            cast(one.weight),
            cast(one.bias),
            tuple(Adapter(cast(a.A), cast(a.B), a.scale, a.p, a.salt, cast(a.bias)) for a in one.adapters),
        )
        for one in projections
    ]


def run(fn, x: Tensor, projections: list[Projection], dys: list[Tensor]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    ys = fn(x, projections)
    grads = torch.autograd.grad(ys, leaves_of(x, projections), [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)])
    return [*(y.detach() for y in ys), *grads]


def masks_of(x: Tensor, one: Projection, seeds: Tensor, backend: str) -> list[Tensor]:
    return [
        keep_mask(x.float(), a.p, seeds, a.salt, backend=backend).to(x.dtype) / keep_rate(a.p, backend == "triton")
        for a in one.adapters
        if a.p
    ]


# rows of x in front; then out, rank, kind and the like
CASES: dict[str, tuple[tuple[int, ...], list[dict[str, Any]]]] = {
    "nf4": ((2, 17, 64), [{"out": 19, "rank": 4, "kind": "nf4"}]),
    "nf4, not nested, odd": ((2, 17, 33), [{"out": 19, "rank": 4, "kind": "nf4", "nested": False}]),
    "fp4, rank 1": ((3, 5, 48), [{"out": 8, "rank": 1, "kind": "fp4", "bias": False}]),
    "int8, wide rank": ((1, 40, 24), [{"out": 31, "rank": 64, "kind": "int8"}]),
    "one row": ((1, 1, 7), [{"out": 5, "rank": 3, "kind": "nf4"}]),
    "127 rows, two adapters": ((1, 127, 20), [{"out": 11, "rank": 8, "kind": "nf4", "pairs": 2}]),
    "shared input": (
        (2, 16, 64),
        [
            {"out": 24, "rank": 8, "kind": "nf4"},
            {"out": 9, "rank": 2, "kind": "int8"},
            {"out": 9, "rank": 3, "kind": None, "bias": False},
            {"out": 12, "rank": 3, "kind": "nf4", "blocksize": 128, "pairs": 0},
        ],
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_no_further_from_truth_than_torch(name, dtype, p, backend) -> None:
    """Against the definition in fp64 with the very masks, as test_lora_linear.py has it: the truth's weight is the
    unpacked one, plain torch's is rounded to the dtype."""
    shape, asked = CASES[name]
    torch.manual_seed(1)
    ones = [make(features=shape[-1], dtype=dtype, p=p, salt=7 * i, **one) for i, one in enumerate(asked)]
    x = torch.randn(shape).to(dtype).to(DEVICE)
    seeds = torch.arange(shape[0], device=DEVICE) * 77 - 5
    dys = [torch.randn(*shape[:-1], one["out"], device=DEVICE).to(dtype) for one in asked]

    def plain(x: Tensor, ps: list[Projection]) -> list[Tensor]:
        return [lora_linear_reference(x, one, masks_of(x, one, seeds, backend)) for one in ps]

    truth = run(plain, x.double(), as_dtype(ones, torch.float64), dys)
    theirs = run(plain, x, ones, dys)
    ours = run(lambda x, ps: list(lora_linears(x, ps, seeds, backend=backend)), x, ones, dys)
    for place, (t, p_, o) in enumerate(zip(truth, theirs, ours, strict=True)):
        size = torch.finfo(dtype).eps * (1 + t.abs().max())
        assert o.dtype == p_.dtype
        assert o.shape == t.shape
        worst = (o.double() - t).abs().max() - (p_.double() - t).abs().max()
        assert worst <= 3 * size, f"{place}: {float(worst / size):.1f} ulps worse than plain torch"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(kind, p) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True, device=DEVICE)
    ones = [
        make(4, 5, 2, kind, dtype=torch.float64, p=p, pairs=2),
        make(3, 5, 1, "nf4", dtype=torch.float64, p=p, salt=9),
    ]
    seeds = torch.tensor([3, 4], device=DEVICE)
    assert torch.autograd.gradcheck(lambda *_: lora_linears(x, ones, seeds, backend="torch"), leaves_of(x, ones))


@pytest.mark.parametrize("kind", KINDS)
def test_backward_leaves_everything_alone_and_can_repeat(kind) -> None:
    one = make(12, 16, 4, kind, p=0.2)
    x = torch.randn(2, 8, 16, device=DEVICE, requires_grad=True)
    seeds = torch.tensor([1, 2], device=DEVICE)
    before = [t.detach().clone() for t in (*leaves_of(x, [one]), one.weight.codes, one.weight.absmax)]
    dy = torch.randn(2, 8, 12, device=DEVICE)
    y = lora_linear(x, one, seeds)
    first = torch.autograd.grad(y, leaves_of(x, [one]), dy, retain_graph=True)
    lora_linear(x, make(30, 16, 4, "int8"))  # another weight goes through the buffer in between
    second = torch.autograd.grad(y, leaves_of(x, [one]), dy)
    assert torch.equal(y, lora_linear(x, one, seeds))
    assert all(map(torch.equal, first, second))
    after = [t.detach() for t in (*leaves_of(x, [one]), one.weight.codes, one.weight.absmax)]
    assert all(map(torch.equal, before, after))


def test_dropped_elements_one_by_one() -> None:
    """`passes`: the compiled passes behind one product with x, in a group of quantised siblings."""
    x = torch.randn(2, 16, 64, device=DEVICE)
    ones = [make(24, 64, 8, "nf4", p=0.1), make(9, 64, 2, "int8", p=0.1, salt=7)]
    seeds = torch.tensor([1, 2], device=DEVICE)
    dys = [torch.randn(2, 16, n, device=DEVICE) for n in (24, 9)]
    plain, passed = (
        run(lambda x, ps, on=on: list(lora_linears(x, ps, seeds, passes=on)), x, ones, dys) for on in (False, True)
    )
    for got, want in zip(passed, plain, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_a_narrower_dtype(kind) -> None:
    """x and adapters in float32 over products in bfloat16: the frozen term alone is rounded."""
    one = make(24, 64, 4, kind, products=torch.bfloat16)
    x = torch.randn(3, 5, 64, device=DEVICE)
    dys = [torch.randn(3, 5, 24, device=DEVICE)]
    got = run(lambda x, ps: [lora_linear(x, ps[0])], x, [one], dys)
    weight = one.weight.dequantised(torch.bfloat16)

    def definition(x: Tensor, ps: list[Projection]) -> list[Tensor]:
        y = torch.nn.functional.linear(x.bfloat16(), weight, ps[0].bias.bfloat16()).float()
        pair = ps[0].adapters[0]
        return [y + torch.nn.functional.linear(torch.nn.functional.linear(x, pair.A), pair.B, pair.bias) * pair.scale]

    want = run(definition, x, [one], dys)
    for place, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == w.dtype == torch.float32
        bound = 1e-5 if place > 2 else 0.02  # y, dx and the definition's bias were in bfloat16
        assert float((g - w).norm() / w.norm()) < bound, place
    assert not torch.equal(got[0], lora_linear(x, make(24, 64, 4, kind)))


def test_under_autocast() -> None:
    """As a plain weight is: everything in autocast's dtype."""
    one = make(24, 64, 4, "nf4", p=0.1)
    plain = Projection(one.weight.dequantised(), one.bias, one.adapters)
    x = torch.randn(2, 5, 64, device=DEVICE)
    seeds, dys = torch.tensor([1, 2], device=DEVICE), [torch.randn(2, 5, 24, device=DEVICE)]
    with torch.autocast(DEVICE, torch.bfloat16):
        got, want = (run(lambda x, ps: [lora_linear(x, ps[0], seeds)], x, [p], dys) for p in (one, plain))
    assert got[0].dtype == torch.bfloat16
    assert all(map(torch.equal, got, want))


def test_empty_and_not_contiguous() -> None:
    one = make(6, 10, 4, "nf4")
    x = torch.randn(4, 10, 3, device=DEVICE).transpose(1, 2)
    assert torch.allclose(lora_linear(x, one), lora_linear_reference(x, one), atol=1e-5)
    y = lora_linear(x[:0].requires_grad_(), one)
    y.sum().backward()
    assert y.shape == (0, 3, 6)


def test_nothing_of_the_weight_is_kept() -> None:
    """Between forward and backward there are x, S and the scratch buffer; saved are no numbers of W."""
    ones = [make(48, 64, 4, kind, salt=s, bias=False) for s, kind in enumerate(KINDS)]
    x = torch.randn(2, 32, 64, device=DEVICE, requires_grad=True)
    there = {t.untyped_storage().data_ptr() for one in ones for t in (one.adapters[0].A, one.adapters[0].B)}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linears(x, ones)
    new = sum(size for address, size in found.items() if address not in there)
    assert new == x.nbytes + 3 * (2 * 32 * 4 * 4)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts tensors on a CPU")
def test_many_layers_take_one_scratch_buffer() -> None:
    ones = [make(256, 256, 2, kind, salt=s, bias=False) for s, kind in enumerate(("nf4", "fp4", "int8", "nf4"))]
    x = torch.randn(1, 4, 256, requires_grad=True)

    def work() -> None:
        y = x
        for one in ones:
            y = lora_linear(y, one)
        y.sum().backward()

    work()
    with LiveBytes([x]) as meter:
        work()
    scratch = sum(buffer.nbytes for buffer in products._OF_THREAD.buffers.values() if buffer.dtype == torch.float32)
    assert 256 * 256 * 4 <= meter.peak <= scratch + 256 * 1024


def test_shapes_are_seen_without_numbers() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        one = make(12, 64, 2, None)
        codes = mode.from_tensor(torch.zeros(12 * 32, dtype=torch.uint8))
        from peft_kernels.quantised_weight import QuantisedWeight

        weight = QuantisedWeight("nf4", codes, torch.empty(12), torch.Size((12, 64)), 64)
        x = torch.randn(2, 3, 64, requires_grad=True)
        y = lora_linear(x, Projection(weight, one.bias, one.adapters), backend="torch")
        y.sum().backward()
    assert (y.shape, x.grad.shape) == ((2, 3, 12), (2, 3, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_graph_computes_the_same(kind) -> None:
    """The whole graph at once; the compiler plans the unpacked weight's memory."""
    one = make(24, 64, 4, kind)
    dys = [torch.randn(2, 5, 24, device=DEVICE)]
    x = torch.randn(2, 5, 64, device=DEVICE)
    torch._dynamo.reset()
    graph = torch.compile(lambda x: lora_linear(x, one), backend="aot_eager", fullgraph=True)
    got, want = (run(lambda x, ps, f=f: [f(x)], x, [one], dys) for f in (graph, lambda x: lora_linear(x, one)))
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_an_adapted_weight(kind) -> None:
    """What DoRA divides by, from codes."""
    one = held((40, 96), kind, spread=0.0)
    A, B = torch.randn(3, 96, device=DEVICE) / 10, torch.randn(40, 3, device=DEVICE)
    want = weight_norm_reference(one.dequantised().double(), A.double(), B.double(), 0.7)
    for squared in (None, squared_norm(one)):
        got = weight_norm(one, A, B, 0.7, squared=squared)
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), want, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    one = make(6, 10, 4, "nf4")
    with pytest.raises(ValueError, match="x has 9 features, the weight takes 10"):
        lora_linear(torch.randn(2, 9, device=DEVICE), one)
    with pytest.raises(ValueError, match="a QuantisedWeight is"):
        lora_linear(torch.randn(2, 6, device=DEVICE), Projection(one.weight, transposed=True))
    with pytest.raises(ValueError, match="must be floating point"):
        lora_linear(torch.ones(2, 10, device=DEVICE, dtype=torch.int64), Projection(one.weight))


def test_frozen_and_quantised_siblings_run_together() -> None:
    """One input, three kinds of weight."""
    generator = torch.Generator().manual_seed(3)
    weight = random(generator, 16, 32, dtype=torch.float32, grad=False)
    ones = [Projection(freeze(weight, "bf16")), make(8, 32, 2, "nf4"), Projection(weight)]
    x = torch.randn(2, 4, 32, device=DEVICE)
    together = lora_linears(x, ones)
    for got, one in zip(together, ones, strict=True):
        assert torch.allclose(got, lora_linear(x, one), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    DEVICE == "cuda" or not compiled.there(torch.empty(0)), reason="the compiled pass runs on a CPU with a compiler"
)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 2), (37, 64), (19, 130), (40, 576), (3, 1000)])
def test_few_rows_are_multiplied_as_they_are_unpacked(shape, kind, threads, monkeypatch) -> None:
    one = held(shape, kind, spread=0.0)
    bias = torch.randn(shape[0])
    before, real, calls = torch.get_num_threads(), products.unpacked, []
    monkeypatch.setattr(products, "unpacked", lambda *given: (calls.append(1), real(*given))[1])
    try:
        torch.set_num_threads(threads)
        for rows in (1, 3, products.FEW_ROWS, products.FEW_ROWS + 1):
            x = torch.randn(rows, shape[1] + 3)[:, : shape[1]]  # rows do not lie end to end
            weight = one.dequantised()
            truth = x.double() @ weight.double().t() + bias
            plain = torch.nn.functional.linear(x, weight, bias)
            calls.clear()
            got = products.product(x, one, bias, torch.float32)
            assert bool(calls) == (rows > products.FEW_ROWS)
            size = torch.finfo(torch.float32).eps * (1 + truth.abs().max())
            assert (got.double() - truth).abs().max() <= (plain.double() - truth).abs().max() + 3 * size
            assert torch.equal(got, products.product(x, one, bias, torch.float32))
    finally:
        torch.set_num_threads(before)


def test_rows_that_begin_inside_a_byte_are_unpacked_first() -> None:
    one = held((6, 33), "nf4", spread=0.0)
    x = torch.randn(1, 33, device=DEVICE)
    assert torch.allclose(products.product(x, one, None, torch.float32), x @ one.dequantised().t(), atol=1e-5)
