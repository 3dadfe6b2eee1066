"""The kernels of part `eight_bit` one by one: quantising rows, and each product, against the vendor's.

Products stand with what belongs to them: rescaling, s·S·Bᵀ in forward, dS·A in backward, and in backward the transposed
copy of the weight that Hopper's 8-bit units need. Codes are given; making them is the cell `quantise rows`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_kernels.frozen_weight import FrozenWeight, freeze

from .bench import Bench, Check, Run, compare, relative_error
from .linear import RANK, SCALE, _Inputs, wider

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FAST_SUMS = 0.02  # relative error that Hopper's short fp8 sums may have


def within(name: str, truth: Tensor, got: Tensor, bound: float) -> Check:
    """Red beyond a relative error of `bound`, whatever plain torch's is."""
    return Check([f"{name}, bound {bound:.3g}"], [bound / 1.5], [relative_error(got, truth)], 0.0)


def kernel_cells(bench: Bench, formats: list[str], M: int, K: int, N: int) -> None:
    bench.room(0 if bench.smoke else 10)
    data = _Inputs(bench, M, K, N)
    x, dy = (t[0].detach().flatten(0, 1) for t in (data.xs, data.dys))
    S, dS = (torch.randn(M, RANK, device=bench.device, dtype=bench.dtype) for _ in range(2))
    frozen = {name: freeze(data.weight, name) for name in formats}  # type: ignore[arg-type]
    settings = {"M": M, "K": K, "N": N}
    quantise_cell(bench, settings, x, frozen)
    forward = {name: Product(x, one, False, S, data.B.t(), SCALE) for name, one in frozen.items()}
    product_cell(
        bench, "product", settings, lambda i: (x @ data.weight.t()).addmm_(S, data.B.t(), alpha=SCALE), forward
    )
    back = {name: Product(dy, one, True, dS, data.A, 1.0) for name, one in frozen.items()}
    product_cell(bench, "product back", settings, lambda i: (dy @ data.weight).addmm_(dS, data.A), back)


def quantise_cell(bench: Bench, settings: dict[str, Any], x: Tensor, frozen: dict[str, FrozenWeight]) -> None:
    width = x.shape[1]
    contenders: dict[str, Run] = {
        f"torch {name}": lambda i, one=one: one.units.quantise([x], [width], [None]) for name, one in frozen.items()
    }
    if bench.device.type == "cuda":
        from peft_kernels import _frozen_ops as ops

        for name in frozen:
            contenders[f"triton {name}"] = lambda i, name=name: ops.quantise_rows(x, None, CODES[name])

    def check() -> list[Check]:
        """Every code and scale of one side is the other's; plain torch is its own truth."""
        found = []
        for label, run in contenders.items():
            other: Any = contenders[f"torch {label.split()[1]}"](0)
            got: Any = run(0)
            pairs = [(a.float(), b.float()) for a, b in zip(got, other, strict=True)]
            found += [
                within(f"{label} {what}", b, a, 1e-6) for what, (a, b) in zip(("codes", "scales"), pairs, strict=True)
            ]
        return found

    bench.cell(
        "quantise rows",
        settings,
        contenders,
        check=check,
        versus={f"triton {name}": [f"torch {name}"] for name in frozen},
        facts={"floor_ms": bench.floor_ms(0, (x.element_size() + 1) * x.numel())},
    )


@dataclass
class Product:
    """One product of given codes in every way that there is.

    Attributes:
        rows: (M, D) what is quantised; back: whether D is the weight's N.
        low: (M, r), up: (r, …), scale: the low-rank product that is added.
    """

    rows: Tensor
    weight: FrozenWeight
    back: bool
    low: Tensor
    up: Tensor
    scale: float

    def __post_init__(self) -> None:
        factor = self.weight.scale if self.back else None
        codes, scales = self.weight.units.quantise([self.rows], [self.rows.shape[1]], [factor])
        assert scales is not None
        self.codes, self.row_scale = codes, scales
        self.column_scale = None if self.back else self.weight.scale

    def truth(self, dtype: torch.dtype) -> Tensor:
        """The product of the same codes in a wider dtype."""
        weight = self.weight.codes.to(dtype)
        y = self.codes.to(dtype) @ (weight if self.back else weight.t()) * self.row_scale.to(dtype)[:, None]
        y = y if self.column_scale is None else y * self.column_scale.to(dtype)
        return y.addmm_(self.low.to(dtype), self.up.to(dtype), alpha=self.scale)

    def ways(self, bench: Bench) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """(which kernel, what runs it)."""
        yield "torch", self.by_torch
        if bench.device.type != "cuda":
            return
        fp8, hopper = self.weight.format == "fp8", torch.cuda.get_device_capability(bench.device)[0] >= 9
        if fp8:
            yield "scaled_mm", self.by_scaled_mm
        yield "triton", partial(self.by_triton, exact=False)
        if fp8 and hopper:
            yield "triton exact", partial(self.by_triton, exact=True)
        if hopper:
            yield "triton pointers", partial(self.by_triton, exact=False, descriptors=False)

    def by_torch(self) -> Tensor:
        """The bare product, then passes of plain torch."""
        multiply = self.weight.units.product_back if self.back else self.weight.units.product
        y = multiply(self.codes, self.weight.codes) * self.row_scale[:, None]
        y = y if self.column_scale is None else y * self.column_scale
        return y.to(self.low.dtype).addmm_(self.low, self.up, alpha=self.scale)

    def by_scaled_mm(self) -> Tensor:
        """cuBLASLt or CUTLASS with the scales inside."""
        codes = self.weight.codes
        right = codes.t().contiguous().t() if self.back else codes.t()
        columns = torch.ones(right.shape[1], device=codes.device) if self.column_scale is None else self.column_scale
        y = torch._scaled_mm(
            self.codes, right, scale_a=self.row_scale[:, None], scale_b=columns[None, :], out_dtype=self.low.dtype,
            use_fast_accum=True,
        )  # fmt: skip
        return y.addmm_(self.low, self.up, alpha=self.scale)

    def by_triton(self, *, exact: bool, descriptors: bool | None = None) -> Tensor:
        from peft_kernels.gpu._eight_bit_gemm import launch_product, launch_product_back

        one, dtype, options = self.weight, self.low.dtype, {"exact": exact, "descriptors": descriptors}
        if self.back:
            return launch_product_back(self.codes, self.row_scale, one.codes, self.low, self.up, dtype, **options)
        up = self.up.t()
        return launch_product(
            self.codes, self.row_scale, one.codes, one.scale, None, self.low, up, self.scale, dtype, **options
        )


def product_cell(bench: Bench, name: str, settings: dict[str, Any], full: Run, products: dict[str, Product]) -> None:
    """All formats beside the vendor's product in the working dtype."""
    ways = {f"{way} {form}": run for form, product in products.items() for way, run in product.ways(bench)}
    contenders: dict[str, Run] = {"full": full}
    contenders |= {label: lambda i, run=run: run() for label, run in ways.items()}

    def check() -> list[Check]:
        found = []
        for form, product in products.items():
            truth = product.truth(wider(bench.dtype))
            for label, run in ways.items():
                if label.endswith(form):
                    short = form == "fp8" and label not in ("torch fp8", "triton exact fp8")
                    found.append(
                        within(label, truth, run(), FAST_SUMS)
                        if short
                        else compare([label], [truth], [truth.to(bench.dtype)], [run()], torch.finfo(bench.dtype).eps)
                    )
        return found

    M, K, N = settings["M"], settings["K"], settings["N"]
    triton = [label for label in contenders if label.startswith("triton")]
    others = [label for label in contenders if not label.startswith("triton")]
    bench.cell(
        name,
        settings,
        contenders,
        check=check,
        versus=dict.fromkeys(triton, others),
        facts={"floor_ms": bench.floor_ms(2 * M * N * K, 0)},
    )
