"""What every kernel test shares: the device, the three-way oracle, guarded buffers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def value_and_grads(fn: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """fn(*inputs) and its gradients with respect to every floating input, for the output's gradient `dy`."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    y = fn(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def assert_no_further_from_truth(
    truth: Sequence[Tensor], plain: Sequence[Tensor], ours: Sequence[Tensor], ulps: float = 2
) -> None:
    """|ours - truth| ≤ |plain - truth| + some ulps of the value's size, element by element.

    Two ulps by default, not one: the interpreter truncates on fp32 → bf16, where a GPU rounds to nearest.
    """
    for place, (t, p, o) in enumerate(zip(truth, plain, ours, strict=True)):
        got, wanted = (tuple(o.shape), o.dtype), (tuple(t.shape), p.dtype)
        assert got == wanted, f"{place}: got {got}, wanted {wanted}"
        if not o.numel():
            continue
        worse = (o.double() - t.double()).abs() - (p.double() - t.double()).abs()
        size = torch.finfo(o.dtype).eps * (1 + t.double().abs())
        assert torch.isfinite(o).all(), f"{place}: not finite"
        assert (worse <= ulps * size).all(), f"{place}: {(worse / size).max():.1f} ulps worse than plain torch"


def guarded(x: Tensor, margin: int = 64) -> Tensor:
    """The same values in the middle of a buffer of NaN: what is read outside its bounds shows."""
    whole = torch.full((x.numel() + 2 * margin,), float("nan"), dtype=x.dtype, device=x.device)
    middle = whole[margin : margin + x.numel()].view(x.shape)
    middle.copy_(x)
    return middle
