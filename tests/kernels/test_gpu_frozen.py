"""8-bit products on Triton against fp64 truth and against the same lines in torch."""

from dataclasses import dataclass

import pytest
import torch
from eight_bit import CODES, LAUNCH, SMALL, fenced, poisoned_outputs, quantised  # noqa: F401
from oracle import DEVICE, DTYPES, guarded
from test_gpu_dropout import SALT, SEEDS, philox_keep_reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_kernels import _frozen_ops
from peft_kernels.gpu import _eight_bit_gemm
from peft_kernels.gpu._eight_bit_gemm import DEEPEST, launch_product, launch_product_back
from peft_kernels.gpu._philox import scale_of
from peft_kernels.gpu.lora_forward import Tile

SCALE = 1.7
# rows of a sample, samples, K, N, r, p
SIZES = [
    (1, 1, 8, 16, 8, 0.5),
    (5, 3, 131, 97, 17, 0.05),
    (43, 3, 40, 33, 1, 0.5),
    (17, 1, 200, 129, 64, 0.0),
    (21, 2, 65, 147, 160, 0.5),
]


@dataclass
class Problem:
    """Inputs of both products, each between margins that must not be read, and the name of a mask with the mask."""

    x: Tensor  # (M, K) codes
    x_scale: Tensor  # (M,)
    W: Tensor  # (N, K) codes
    w_scale: Tensor  # (N,)
    dY: Tensor  # (M, N) codes
    dy_scale: Tensor  # (M,)
    factor: Tensor  # (K,)
    bias: Tensor  # (N,)
    S: Tensor  # (M, r)
    dS: Tensor  # (M, r)
    A: Tensor  # (r, K)
    B: Tensor  # (N, r)
    mask: Tensor  # (M, K) 0 or 1 / keep_rate
    p: float
    seeds: Tensor
    rows: int

    def named_mask(self) -> dict:
        return {"p": self.p, "seeds": self.seeds if self.p else None, "rows_per_sample": self.rows, "salt": SALT}

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def problem(size: tuple, dtype: torch.dtype, codes: torch.dtype) -> Problem:
    rows, samples, K, N, r, p = size
    torch.manual_seed(0)
    M, seeds = rows * samples, torch.tensor(SEEDS[:samples], device=DEVICE)

    def random(*shape: int, over: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return guarded((torch.randn(shape, device=DEVICE) / over**0.5).to(kind))

    def coded(*shape: int, over: float = 1.0) -> tuple[Tensor, Tensor]:
        found, scale = quantised(torch.randn(shape, device=DEVICE) / over**0.5, None, codes)
        return fenced(found), guarded(scale)

    (x, x_scale), (W, w_scale), (dY, dy_scale) = coded(M, K), coded(N, K, over=K), coded(M, N)
    kept = philox_keep_reference(M, K, p, seeds, rows, SALT).to(DEVICE)
    return Problem(
        x=x, x_scale=x_scale, W=W, w_scale=w_scale, dY=dY, dy_scale=dy_scale,
        factor=guarded(torch.rand(K, device=DEVICE) + 0.5), bias=random(N), S=random(M, r), dS=random(M, r, over=r),
        A=random(r, K, over=K), B=random(N, r, over=r), mask=kept.double() * scale_of(p), p=p, seeds=seeds, rows=rows,
    )  # fmt: skip


def forward(q: Problem, wide: torch.dtype, narrow: torch.dtype, bias: bool, low: bool) -> Tensor:
    """Frozen part in `wide`, rounded to `narrow`, the rest in `narrow`."""
    y = (q.x.to(wide) @ q.W.to(wide).T) * q.x_scale.to(wide)[:, None] * q.w_scale.to(wide)
    y = y.to(narrow)
    y = y + q.bias.to(narrow) if bias else y
    return y + SCALE * (q.S.to(narrow) @ q.B.to(narrow).T) if low else y


def backward(q: Problem, wide: torch.dtype, narrow: torch.dtype, factor: bool, low: bool) -> Tensor:
    dx = (q.dY.to(wide) @ q.W.to(wide)) * q.dy_scale.to(wide)[:, None]
    dx = (dx * q.factor.to(wide) if factor else dx).to(narrow)
    return dx + q.mask.to(narrow) * (q.dS.to(narrow) @ q.A.to(narrow)) if low else dx


def check(ours: Tensor, truth: Tensor, plain: Tensor) -> None:
    """|ours - truth| ≤ the worst of plain torch in that line + 2 ulps of the line's largest value.

    A line's worst, not each element's own: torch adds a product's terms in another order than a kernel does, and where
    one of the two is right by luck says nothing about the other.
    """
    assert (ours.dtype, ours.shape) == (plain.dtype, truth.shape)
    assert torch.isfinite(ours).all()
    line = int(truth.shape[1] > truth.shape[0])
    worst = (plain.double() - truth).abs().amax(line, keepdim=True)
    allowed = worst + 2 * torch.finfo(ours.dtype).eps * truth.abs().amax(line, keepdim=True)
    error = (ours.double() - truth).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} of what is allowed"


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_products_in_both_layouts_against_truth(size, dtype, codes, monkeypatch):
    """fp32 adapters take the pass behind the kernel, 16-bit ones its epilogue; M ≤ 200 turns no weight by itself."""
    q = problem(size, dtype, codes)
    before = {name: value.clone() for name, value in q.tensors().items()}
    turned_back = fenced(q.W.view(torch.int8).T.contiguous().view(codes)).T
    for W in (q.W, turned_back):
        for bias, low in ((True, True), (False, True), (True, False)):
            ours = launch_product(
                q.x, q.x_scale, W, q.w_scale, q.bias if bias else None, q.S if low else None, q.B if low else None,
                SCALE, dtype,
            )  # fmt: skip
            check(ours, *(forward(q, *kinds, bias, low) for kinds in ((torch.float64,) * 2, (torch.float32, dtype))))
    for rows, W in ((1, q.W), (1, turned_back), (10**9, q.W), (10**9, turned_back)):
        monkeypatch.setattr(_eight_bit_gemm, "TURNED_ROWS", rows)
        for factor, low in ((True, True), (False, True), (True, False)):
            ours = launch_product_back(
                q.dY, q.dy_scale, W, q.dS if low else None, q.A if low else None, dtype,
                factor=q.factor if factor else None, **(q.named_mask() if low else {}),
            )  # fmt: skip
            check(ours, *(backward(q, *kinds, factor, low) for kinds in ((torch.float64,) * 2, (torch.float32, dtype))))
    for name, value in before.items():
        same = [t.view(torch.int8) if t.element_size() == 1 else t for t in (q.tensors()[name], value)]
        assert torch.equal(*same), f"{name} was changed"


def test_wide_adapters_under_a_narrow_product():
    """fp32 A and B beside bf16 outputs: added in fp32 to what the product was rounded to, as peft does."""
    q = problem(SIZES[1], torch.float32, torch.int8)
    ours = launch_product(q.x, q.x_scale, q.W, q.w_scale, None, q.S, q.B, SCALE, torch.bfloat16)
    truth = forward(q, torch.float64, torch.float64, False, True)
    check(ours, truth, truth.to(torch.bfloat16))
    ours = launch_product_back(q.dY, q.dy_scale, q.W, q.dS, q.A, torch.bfloat16, **q.named_mask())
    truth = backward(q, torch.float64, torch.float64, False, True)
    check(ours, truth, truth.to(torch.bfloat16))


@pytest.mark.parametrize("tile", [None, SMALL], ids=["default", "small"])
def test_products_of_int8_are_exact(tile):
    torch.manual_seed(0)
    x, W = (torch.randint(-127, 128, shape, device=DEVICE, dtype=torch.int8) for shape in ((37, 190), (45, 190)))
    ones = torch.ones(190, device=DEVICE)
    wanted = (x.cpu().int() @ W.cpu().int().T).float().to(DEVICE)
    y = launch_product(x, ones[:37], W, ones[:45], None, None, None, 1.0, torch.float32, tile=tile)
    assert torch.equal(y, wanted)
    for right in (W.T.contiguous(), W.T):
        dx = launch_product_back(x, ones[:37], right, None, None, torch.float32, tile=tile)
        assert torch.equal(dx, wanted)


@pytest.mark.parametrize("codes", CODES)
def test_the_same_bits_whatever_the_blocks_and_from_run_to_run(codes):
    q = problem((37, 2, 72, 80, 8, 0.5), torch.bfloat16, codes)

    def products(tile: Tile | None) -> list[Tensor]:
        return [
            launch_product(q.x, q.x_scale, q.W, q.w_scale, q.bias, q.S, q.B, SCALE, torch.bfloat16, tile=tile),
            launch_product_back(
                q.dY, q.dy_scale, q.W, q.dS, q.A, torch.bfloat16, factor=q.factor, tile=tile, **q.named_mask()
            ),
        ]

    first, second = products(None), products(None)
    assert all(map(torch.equal, first, second))
    if codes == torch.int8:  # sums of integers have no order
        for ours, other in zip(first, products(SMALL), strict=True):
            torch.testing.assert_close(ours, other, rtol=2**-7, atol=0)  # the low-rank sums have one: an ulp


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("tile", [Tile(rows=64, columns=64, depth=64, num_warps=4), SMALL], ids=["default", "small"])
def test_descriptors_read_what_pointers_read(tile, codes):
    """Rows that begin at multiples of 16 bytes; neither M, N nor K fills its last block."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA begins with sm_90")
    q = problem((19, 2, 80, 112, 8, 0.5), torch.bfloat16, codes)
    back = fenced(q.W.view(torch.int8).T.contiguous().view(codes)).T
    results = [
        (
            launch_product(
                q.x, q.x_scale, q.W, q.w_scale, q.bias, q.S, q.B, SCALE, torch.bfloat16, tile=tile, descriptors=use
            ),
            launch_product_back(
                q.dY, q.dy_scale, back, q.dS, q.A, torch.bfloat16, tile=tile, descriptors=use, **q.named_mask()
            ),
        )
        for use in (False, True)
    ]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("tile", "K", "p"), [(None, 57, 0.5), (None, 64, 0.05), (SMALL, 57, 0.5), (SMALL, 48, 0.05)])
def test_the_mask_is_that_of_the_reference_bit_for_bit(tile, K, p):
    """Zeros as codes and ones as factors make the mask itself come out, whatever the blocks."""
    rows, samples = 19, 3
    M, seeds = rows * samples, torch.tensor(SEEDS, device=DEVICE)
    mask = philox_keep_reference(M, K, p, seeds, rows, SALT).to(DEVICE) * torch.tensor(scale_of(p), device=DEVICE)
    codes, weight = (torch.zeros(shape, dtype=torch.int8, device=DEVICE) for shape in ((M, 5), (5, K)))
    column, row = (torch.ones(shape, dtype=torch.float16, device=DEVICE) for shape in ((M, 1), (1, K)))
    one = torch.ones(M, device=DEVICE)
    named = {"p": p, "seeds": seeds, "rows_per_sample": rows, "salt": SALT}
    assert torch.equal(launch_product_back(codes, one, weight, column, row, torch.float32, tile=tile, **named), mask)


@pytest.mark.parametrize("codes", CODES)
def test_what_is_no_number_stays_in_its_row_and_zeros_give_the_rest(codes):
    q = problem((6, 1, 33, 20, 4, 0.0), torch.float32, codes)
    x = torch.randn(6, 33, device=DEVICE)
    x[1], x[2, 5], x[4, 7] = 0, float("nan"), float("inf")
    found, scale = LAUNCH[codes](x)
    y = launch_product(found, scale, q.W, q.w_scale, q.bias, None, None, 1.0, torch.float32)
    assert y[[2, 4]].isnan().all()
    assert y[[0, 1, 3, 5]].isfinite().all()
    assert torch.equal(y[1], q.bias)
    dy = torch.randn(6, 20, device=DEVICE)
    dy[0, 3], dy[5] = -float("inf"), 0
    found, scale = LAUNCH[codes](dy, q.w_scale)
    dx = launch_product_back(found, scale, q.W, None, None, torch.float32)
    assert dx[0].isnan().all()
    assert dx[1:].isfinite().all()
    assert (dx[5] == 0).all()


@pytest.mark.parametrize("codes", CODES)
def test_a_frozen_linear_is_as_near_as_its_format_allows(codes):
    """Quantise, multiply, rescale, both ways: the relative error of Gaussian data, per GEMM."""
    torch.manual_seed(0)
    x, w, dy = (torch.randn(shape, device=DEVICE) for shape in ((70, 180), (90, 180), (70, 90)))
    W, w_scale = quantised(w, None, codes)
    y = launch_product(*LAUNCH[codes](x), W, w_scale, None, None, None, 1.0, torch.float32)
    dx = launch_product_back(*LAUNCH[codes](dy, w_scale), W, None, None, torch.float32)
    bound = 0.015 if codes == torch.int8 else 0.045
    for got, truth in ((y, x.double() @ w.double().T), (dx, dy.double() @ w.double())):
        error = (got.double() - truth).norm() / truth.norm()
        assert bound / 4 < error < bound


@pytest.mark.parametrize("empty", ["M", "N", "K", "r"])
@pytest.mark.parametrize("codes", CODES)
def test_empty_sizes(empty, codes):
    M, N, K, r = (0 if name == empty else 4 for name in ("M", "N", "K", "r"))
    x, scale = LAUNCH[codes](torch.ones(M, K, device=DEVICE))
    assert (x.shape, scale.shape) == ((M, K), (M,))
    W, w_scale = torch.zeros(N, K, device=DEVICE).to(codes), torch.ones(N, device=DEVICE)
    S, A, B = (torch.ones(shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((M, r), (r, K), (N, r)))
    bias = torch.ones(N, device=DEVICE)
    y = launch_product(x, scale, W, w_scale, bias, S, B, 0.5, torch.float32)
    assert torch.equal(y, torch.full((M, N), 1 + 0.5 * r, device=DEVICE))
    dY, dy_scale = LAUNCH[codes](torch.ones(M, N, device=DEVICE))
    dx = launch_product_back(dY, dy_scale, W, S, A, torch.float32)
    assert torch.equal(dx, torch.full((M, K), float(r), device=DEVICE))


def test_an_adapter_scaled_by_nothing_adds_nothing():
    q = problem(SIZES[1], torch.bfloat16, torch.int8)
    y = launch_product(q.x, q.x_scale, q.W, q.w_scale, None, q.S, q.B, 0.0, torch.bfloat16)
    assert torch.equal(y, launch_product(q.x, q.x_scale, q.W, q.w_scale, None, None, None, 1.0, torch.bfloat16))


def test_more_products_than_an_int32_holds_are_refused():
    x, one = torch.zeros(1, DEEPEST + 1, dtype=torch.int8, device=DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="133144 products of int8, got 133145"):
        launch_product(x, one, x, one, None, None, None, 1.0, torch.float32)


@pytest.mark.parametrize(("codes", "arch", "least"), [(torch.int8, 75, 80), (torch.float8_e4m3fn, 86, 89)], ids=str)
def test_a_card_on_which_triton_lacks_the_units_is_refused(codes, arch, least, monkeypatch):
    monkeypatch.setattr(_eight_bit_gemm, "architecture", lambda device: arch)
    monkeypatch.setattr(_eight_bit_gemm, "interpreted", lambda: False)
    x, one = torch.zeros(1, 16, device=DEVICE).to(codes), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match=f"{codes} from sm_{least} on, got sm_{arch}. Use backend='torch'"):
        launch_product(x, one, x, one, None, None, None, 1.0, torch.float32)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("M", [1, 64, 512, 8192])
@pytest.mark.parametrize("kind", [{}, {"exact": True}, {"dropout": True}], ids=str)
def test_tiles_fit_shared_memory(arch, M, kind):
    tile = _eight_bit_gemm.product_tile(M, 4096, arch, **kind)
    limit = {80: 163, 90: 227, 100: 227}.get(arch, 99) << 10
    assert (tile.rows + tile.columns) * tile.depth * tile.num_stages <= limit


@pytest.mark.parametrize("codes", CODES)
def test_registered_ops_are_the_launchers(codes):
    q = problem(SIZES[1], torch.bfloat16, codes)
    M = q.x.shape[0]
    wide = torch.randn(M, q.W.shape[1], device=DEVICE).to(torch.bfloat16)
    given = (wide.T.contiguous().T, None, codes)  # strided as a view may be
    for ours, other in zip(_frozen_ops.quantise_rows(*given), LAUNCH[codes](wide), strict=True):
        assert torch.equal(ours.float(), other.float())
    parts = [wide[:, :40], wide[:, 40:]]
    for ours, other in zip(_frozen_ops.quantise_parts(parts, None, codes), LAUNCH[codes](wide), strict=True):
        assert torch.equal(ours.float(), other.float())
    given = (q.x, q.x_scale, q.W, q.w_scale, q.bias, q.S, q.B, SCALE, torch.bfloat16)
    assert torch.equal(_frozen_ops.product(*given), launch_product(*given))
    salt = 2**40 + 9
    given = (q.dY, q.dy_scale, q.W, q.factor, q.dS, q.A, torch.bfloat16, q.p, q.seeds, salt)
    ours = launch_product_back(
        q.dY, q.dy_scale, q.W, q.dS, q.A, torch.bfloat16, factor=q.factor, **q.named_mask() | {"salt": salt}
    )  # fmt: skip
    assert torch.equal(_frozen_ops.product_back(*given), ours)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_fake_tensors_see_shapes_and_dtypes(codes):
    with FakeTensorMode():
        M, N, K, r = 2**20, 4096, 14336, 16
        x, low, bias = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((M, K), (M, r), (N,)))
        W, scale = torch.empty(N, K).to(codes), torch.empty(N)
        A, B, seeds = torch.empty(r, K), torch.empty(N, r), torch.empty(8, dtype=torch.int64)
        found, row_scale = _frozen_ops.quantise_rows(x, None, codes)
        y = _frozen_ops.product(found, row_scale, W, scale, bias, low, B, 2.0, torch.bfloat16)
        both, _ = _frozen_ops.quantise_parts([y, y], None, codes)
        grads, grad_scale = _frozen_ops.quantise_rows(y, scale, codes)
        dx = _frozen_ops.product_back(grads, grad_scale, W, None, low, A, torch.bfloat16, 0.05, seeds, 7)
    assert [(tuple(t.shape), t.dtype) for t in (found, row_scale, both, y, dx)] == [
        ((M, K), codes), ((M,), torch.float32), ((M, 2 * N), codes), ((M, N), torch.bfloat16),
        ((M, K), torch.bfloat16),
    ]  # fmt: skip
