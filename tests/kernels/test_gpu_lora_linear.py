"""Launchers of the LoRA linear against fp64 truth with the mask that Philox gives, injected."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from oracle import DEVICE, DTYPES, guarded
from test_gpu_dropout import SALT, SEEDS, philox_keep_reference
from torch import Tensor

from peft_kernels.gpu._philox import scale_of
from peft_kernels.gpu.lora_backward import outer_tile, split_of
from peft_kernels.gpu.lora_forward import Tile
from peft_kernels.gpu.lora_linear import (
    launch_da,
    launch_down,
    launch_ds_db,
    launch_dx,
    launch_seeded_dgemm,
    launch_seeded_gemm,
)

SCALE = 1.7
# (rows of a sample, samples, K, N, r, p)
SIZES = [
    (1, 1, 8, 16, 8, 0.5),
    (5, 3, 131, 97, 17, 0.05),
    (43, 3, 40, 33, 1, 0.5),
    (17, 1, 70, 129, 64, 0.0),
    (21, 2, 65, 47, 200, 0.5),
    (131, 2, 24, 260, 8, 0.05),  # several splits of the rows and several stripes of the columns
]


@dataclass
class Problem:
    """Inputs of every launcher, in the middle of buffers of NaN, and the name of a mask with the mask it must give."""

    x: Tensor  # (M, K)
    A: Tensor  # (r, K)
    B: Tensor  # (N, r)
    W: Tensor  # (N, K)
    bias: Tensor  # (N,)
    dY: Tensor  # (M, N)
    S: Tensor  # (M, r)
    dS: Tensor  # (M, r)
    mask: Tensor  # (M, K) fp64, 0 or 1 / keep_rate
    p: float
    seeds: Tensor
    rows: int

    def named_mask(self) -> tuple[float, Tensor | None, int, int]:
        return self.p, self.seeds if self.p else None, self.rows, SALT


def problem(rows: int, samples: int, K: int, N: int, r: int, p: float, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    M, seeds = rows * samples, torch.tensor(SEEDS[:samples], device=DEVICE)

    def random(*shape: int, over: float = 1.0) -> Tensor:
        return guarded((torch.randn(shape, device=DEVICE) / over**0.5).to(dtype))

    kept = philox_keep_reference(M, K, p, seeds, rows, SALT).to(DEVICE)
    return Problem(
        x=random(M, K), A=random(r, K, over=K), B=random(N, r, over=r), W=random(N, K, over=K), bias=random(N),
        dY=random(M, N), S=random(M, r), dS=random(M, r, over=r), mask=kept.double() * scale_of(p), p=p, seeds=seeds,
        rows=rows,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch) -> Iterator[None]:
    """`torch.empty` gives NaN between margins of NaN; what is written into a margin shows at the end."""
    wholes: list[Tensor] = []
    plain = torch.empty

    def empty(*args, **options) -> Tensor:
        inner = plain(*args, **options)
        if not inner.is_floating_point():
            return inner
        whole = torch.full((inner.numel() + 128,), float("nan"), dtype=inner.dtype, device=inner.device)
        wholes.append(whole)
        return whole[64 : 64 + inner.numel()].view(inner.shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    assert all(whole[:64].isnan().all() and whole[-64:].isnan().all() for whole in wholes)


Formula = Callable[[dict[str, Tensor]], Tensor]


def check(ours: Tensor, formula: Formula, wanted: torch.dtype, problem: Problem) -> None:
    """|ours - truth| ≤ the worst of plain torch in that line + 2 ulps of the line's largest value.

    A line's worst, not each element's own: torch adds a product's terms in another order than a kernel does, and where
    one of the two is right by luck says nothing about the other. A line is the longer of row and column (rank 1 has
    one element in the other). fp32 gradients are held to fp32 torch.
    """
    names = [name for name, value in vars(problem).items() if isinstance(value, Tensor) and name != "seeds"]
    truth = formula({name: getattr(problem, name).double() for name in names})
    plain = formula({name: getattr(problem, name).to(wanted) for name in names}).double()
    assert ours.dtype == wanted
    assert ours.shape == truth.shape
    assert torch.isfinite(ours).all()
    error = (ours.double() - truth).abs()
    line = int(truth.shape[1] > truth.shape[0])
    worst, largest = (plain - truth).abs().amax(line, keepdim=True), truth.abs().amax(line, keepdim=True)
    allowed = worst + 2 * torch.finfo(wanted).eps * largest
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} of what is allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_launcher_against_truth(size, dtype):
    q = problem(*size, dtype)
    before = {name: value.clone() for name, value in vars(q).items() if isinstance(value, Tensor)}

    check(launch_down(q.x, q.A, *q.named_mask()), lambda t: (t["x"] * t["mask"]) @ t["A"].T, dtype, q)

    dS, dB = launch_ds_db(q.dY, q.B, q.S, SCALE)
    check(dS, lambda t: SCALE * (t["dY"] @ t["B"]), dtype, q)
    check(dB, lambda t: SCALE * (t["dY"].T @ t["S"]), torch.float32, q)

    check(launch_da(q.dS, q.x, *q.named_mask()), lambda t: t["dS"].T @ (t["x"] * t["mask"]), torch.float32, q)

    dX = guarded(q.x)
    launch_dx(dX, q.dS, q.A, *q.named_mask())
    check(dX, lambda t: t["x"] + t["mask"] * (t["dS"] @ t["A"]), dtype, q)

    def forward(t: dict[str, Tensor]) -> Tensor:
        return t["x"] @ t["W"].T + SCALE * (t["S"] @ t["B"].T)

    def backward(t: dict[str, Tensor]) -> Tensor:
        return t["dY"] @ t["W"] + t["mask"] * (t["dS"] @ t["A"])

    for W in (q.W, guarded(q.W.T.contiguous()).T):  # nn.Linear's and Conv1D's
        check(launch_seeded_gemm(q.x, W, q.bias, q.S, q.B, SCALE), lambda t: forward(t) + t["bias"], dtype, q)
        check(launch_seeded_gemm(q.x, W, None, q.S, q.B, SCALE), forward, dtype, q)
        check(launch_seeded_dgemm(q.dY, W, q.dS, q.A, *q.named_mask()), backward, dtype, q)

    for name, value in before.items():
        assert torch.equal(getattr(q, name), value), f"{name} was changed"


def every_product(q: Problem, tiles: dict[str, Tile]) -> dict[str, Tensor]:
    dX = q.x.clone()
    launch_dx(dX, q.dS, q.A, *q.named_mask(), tile=tiles.get("gemm"))
    dS, dB = launch_ds_db(q.dY, q.B, q.S, SCALE, tile=tiles.get("outer"))
    return {
        "S": launch_down(q.x, q.A, *q.named_mask(), tile=tiles.get("down")),
        "dS": dS,
        "dB": dB,
        "dA": launch_da(q.dS, q.x, *q.named_mask(), tile=tiles.get("outer")),
        "dX": dX,
        "Y": launch_seeded_gemm(q.x, q.W, q.bias, q.S, q.B, SCALE, tile=tiles.get("gemm")),
        "dX whole": launch_seeded_dgemm(q.dY, q.W, q.dS, q.A, *q.named_mask(), tile=tiles.get("gemm")),
    }


@pytest.mark.parametrize(("rows", "dtype"), [(40, torch.float32), (131, torch.bfloat16)], ids=str)
def test_the_same_bits_from_run_to_run(rows, dtype):
    q = problem(rows, 2, 24, 40, 8, 0.5, dtype)
    first, second = every_product(q, {}), every_product(q, {})
    assert all(torch.equal(first[name], second[name]) for name in first)


SMALL = {
    "down": Tile(rows=16, columns=16, depth=16),
    "outer": Tile(rows=16, columns=16),
    "gemm": Tile(rows=16, columns=32, depth=16),
}


@pytest.mark.parametrize(("tiles", "K", "p"), [({}, 57, 0.5), ({}, 64, 0.05), (SMALL, 57, 0.5), (SMALL, 48, 0.05)])
def test_every_kernel_draws_the_mask_of_the_reference_bit_for_bit(tiles, K, p):
    """Factors of ones and identities make the mask itself come out, whatever the blocks."""
    rows, samples = 19, 3
    M, seeds = rows * samples, torch.tensor(SEEDS, device=DEVICE)
    name = (p, seeds, rows, SALT)
    mask = philox_keep_reference(M, K, p, seeds, rows, SALT).to(DEVICE) * torch.tensor(scale_of(p), device=DEVICE)
    ones, dX = torch.ones(M, K, device=DEVICE), torch.zeros(M, K, device=DEVICE)
    column, row = torch.ones(M, 1, device=DEVICE), torch.ones(1, K, device=DEVICE)
    launch_dx(dX, column, row, *name, tile=tiles.get("gemm"))
    nothing, weight = torch.zeros(M, 5, device=DEVICE), torch.zeros(5, K, device=DEVICE)
    assert torch.equal(dX, mask)
    assert torch.equal(launch_seeded_dgemm(nothing, weight, column, row, *name, tile=tiles.get("gemm")), mask)
    assert torch.equal(launch_down(ones, torch.eye(K, device=DEVICE), *name, tile=tiles.get("down")), mask)
    assert torch.equal(launch_da(torch.eye(M, device=DEVICE), ones, *name, tile=tiles.get("outer")), mask)


def test_a_sample_has_its_mask_alone_and_in_company():
    q = problem(21, 3, 70, 33, 8, 0.5, torch.float32)
    together = launch_down(q.x, q.A, *q.named_mask()).view(3, 21, 8)
    for i, whole in enumerate(together):
        alone = launch_down(q.x[21 * i : 21 * i + 21].contiguous(), q.A, q.p, q.seeds[i : i + 1], 21, SALT)
        torch.testing.assert_close(alone, whole, rtol=0, atol=1e-6)  # one dropped term is a thousand times that


@pytest.mark.parametrize("M", [1, 63, 64, 255, 1000, 8192, 1_000_003])
@pytest.mark.parametrize("stripes", [1, 7, 32, 300])
def test_splits_share_the_rows_out(M, stripes):
    tile = outer_tile(16, torch.bfloat16)
    splits, rows = split_of(M, stripes, tile)
    assert rows % tile.rows == 0
    assert (splits - 1) * rows < M <= splits * rows, "no split is empty and no row is left out"
    assert splits == 1 or splits * stripes <= 264


@pytest.mark.parametrize("empty", ["M", "r", "K"])
def test_empty_sizes(empty):
    M, r, K, N = (0 if name == empty else 4 for name in ("M", "r", "K", "N"))
    x, A, B, dY, S = (torch.ones(shape, device=DEVICE) for shape in ((M, K), (r, K), (N, r), (M, N), (M, r)))
    W, seeds = torch.ones(N, K, device=DEVICE), torch.arange(M, device=DEVICE)
    name = (0.5, seeds, 1, 0)
    assert launch_down(x, A, *name).shape == (M, r)
    dS, dB = launch_ds_db(dY, B, S, 1.0)
    assert (dS.shape, dB.shape) == ((M, r), (N, r))
    assert launch_da(S, x, *name).shape == (r, K)
    assert torch.equal(launch_seeded_gemm(x, W, None, S, B, 1.0), x @ W.T + S @ B.T)
    assert launch_seeded_dgemm(dY, W, S, A, *name).shape == (M, K)
    launch_dx(x, S, A, *name)
    assert (x == 1).all(), "nothing was there to add"


def test_without_dropout_no_philox_is_compiled():
    """Compiled ahead of time in a process of its own, since this one may be interpreting."""
    program = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from peft_kernels.gpu.lora_forward import CASES

for dropout in (True, False):
    case = next(c for c in CASES if c.kernel.__name__ == "_down_kernel" and c.constants["DROPOUT"] is dropout)
    signature = {n: "constexpr" if n in case.constants else case.signature[n] for n in case.kernel.arg_names}
    made = triton.compile(ASTSource(case.kernel, signature, case.constants), target=GPUTarget("cuda", 80, 32))
    print(made.asm["ttir"].count("mulhiui"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    with_dropout, without = (int(line) for line in done.stdout.split())
    assert with_dropout >= 20
    assert without == 0
