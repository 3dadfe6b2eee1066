"""Input channels that are far larger than the others, and what is done about them before a frozen layer is rounded.

x is rounded row by row, with a step of max|row|/127: a few large channels take the resolution from all others. Two
levers, alone or together, chosen once per layer from the largest size of each channel on a calibration batch:

    smooth     s_k = max|x_k|^α / max|W_k|^(1-α), α = 1/2; x/s meets W·s, whose product is the same (SmoothQuant,
               Xiao et al. 2022, eq. 4). The channels that trouble x become columns of W, each row of which has a
               scale of its own.
    columns    channels above 6 times the median one stay in full precision (the idea of LLM.int8(), Dettmers et al.
               2022, section 3.2, with a threshold that moves with the layer's own scale). In backward the largest
               1/64 of the columns of dy do too, which each call chooses for itself (`FrozenWeight.spare_gradients`).
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import Diverged

Lever = Literal["none", "smooth", "columns", "both"]
Asked = Literal["auto", "none", "smooth", "columns", "both"]
"""`auto`: both in int8 and fp8 where there is data to calibrate on, else none."""
ALPHA = 0.5
"""How much of a channel's size goes over into the weight."""
QUIET = 0.1
"""Channels below this share of the median one are smoothed as if they had it: what a batch shows of a channel that
hardly fired says little, and a small s_k would blow it up when it does."""
THRESHOLD = 6.0
"""From so many times the median channel on, a channel is an outlier."""
MOST = 1 / 32
"""Share of the channels that stay in full precision at most, the largest ones: they cost a GEMM of their own."""


@dataclass(frozen=True, eq=False)
class Outliers:
    """What a frozen layer does about the large channels of its input.

    Attributes:
        smooth: float32 (K,), positive; x is divided by it, the columns of W are multiplied.
        columns: int64 (C,), rising; input channels that are not rounded.
    """

    smooth: Tensor | None = None
    columns: Tensor | None = None


def choose(stats: Mapping[str, Tensor], weights: Mapping[str, Tensor], lever: Lever) -> dict[str, Outliers]:
    """What each layer does about its outliers.

    Layers whose statistics are one and the same tensor object read one input: they get the same `Outliers` object, so
    that their input is rounded once for all of them.

    Args:
        stats: layer → max|x| per input channel (K,), as `collect` gives them. A layer without any gets no lever.
        weights: layer → (N, K).

    Raises:
        Diverged: statistics that are not finite.
    """
    found = dict.fromkeys(weights, Outliers())
    if lever == "none":
        return found
    together: dict[int, list[str]] = {}
    for name in weights:
        if name in stats:
            together.setdefault(id(stats[name]), []).append(name)
    for names in together.values():
        absmax = stats[names[0]]
        _refuse_not_finite(absmax, names[0])
        columns = None if lever == "smooth" else outlier_columns(absmax)
        rest = absmax if columns is None else absmax.index_fill(0, columns, 0)
        smooth = None if lever == "columns" else smooth_vector(rest, [weights[name] for name in names])
        found |= dict.fromkeys(names, Outliers(smooth, columns))
    return found


def smooth_vector(absmax: Tensor, weights: Iterable[Tensor], alpha: float = ALPHA) -> Tensor:
    """SmoothQuant's s, float32 (K,), from max|x| per channel (K,) and the weights (N_i, K) that read this x.

    A channel that x or every weight leaves at zero keeps its scale.
    """
    own = torch.stack([_column_absmax(weight) for weight in weights]).amax(0)
    x = absmax.float()
    alive = (x > 0) & (own > 0)
    if not alive.any():
        return torch.ones_like(x)
    x = x.clamp_min(QUIET * x[alive].median())
    return torch.where(alive, x**alpha / own ** (1 - alpha), 1.0)


def outlier_columns(absmax: Tensor, threshold: float = THRESHOLD, most: float = MOST) -> Tensor | None:
    """Channels of max|x| above `threshold` times the median of those that are not zero, int64 (C,), rising; the largest
    ones where they are more than `most` of all. None where there are none."""
    alive = absmax[absmax > 0]
    if not len(alive):
        return None
    large = absmax > threshold * alive.median()
    count = min(int(large.sum()), int(most * len(absmax)))
    return absmax.topk(count).indices.sort().values if count else None


def collect(model: nn.Module, names: Iterable[str], run: Callable[[], object]) -> dict[str, Tensor]:
    """max|x| of every input channel of the named linears, over all that `run` calls the model on.

    Gradients are off and every module is in eval mode meanwhile; modes are put back. The statistics of siblings,
    linears of one parent that were always called with one and the same tensor, are one tensor object.

    Args:
        model: not yet fused: fused layers don't call their parts.
        names: full names of linears; below peft's layers those of their `base_layer`.
        run: calls the model on the calibration batch.

    Returns:
        name → float32 (K,). Linears that were not called, or on no row, are missing.
    """
    seen = _Seen()
    modes = [(module, module.training) for module in model.modules()]
    handles = [model.get_submodule(name).register_forward_pre_hook(seen.hook(name)) for name in names]
    try:
        model.eval()
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
        for module, was in modes:
            module.training = was
    return seen.shared()


@dataclass
class _Seen:
    """What the hooks saw.

    Attributes:
        absmax: by layer.
        inputs: by layer the numbers of the inputs that it was called with, a number for each tensor.
        last: by parent its newest input: the tensor, while it lives, its version, its number.
    """

    absmax: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, list[int]] = field(default_factory=dict)
    last: dict[str, tuple["weakref.ref[Tensor]", int, int]] = field(default_factory=dict)
    count: int = 0

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x: Tensor = inputs[0]
            rows = x.detach().reshape(-1, x.shape[-1])
            if not len(rows):
                return
            low, high = rows.aminmax(dim=0)
            largest = torch.maximum(high, -low).float()
            before = self.absmax.get(name)
            self.absmax[name] = largest if before is None else torch.maximum(before, largest)
            self.inputs.setdefault(name, []).append(self.number(_parent(name), x))

        return note

    def number(self, parent: str, x: Tensor) -> int:
        """The same for calls below one parent with the same tensor. It is held weakly: the next tensor may get the
        memory, and even the id, of one that is gone."""
        if parent in self.last:
            held, version, number = self.last[parent]
            if held() is x and version == x._version:
                return number
        self.count += 1
        self.last[parent] = weakref.ref(x), x._version, self.count
        return self.count

    def shared(self) -> dict[str, Tensor]:
        """The statistics, with one tensor object for layers that had the very same inputs."""
        first: dict[tuple[int, ...], Tensor] = {}
        return {name: first.setdefault(tuple(self.inputs[name]), absmax) for name, absmax in self.absmax.items()}


def _parent(name: str) -> str:
    return name.removesuffix(".base_layer").rpartition(".")[0]


def _column_absmax(weight: Tensor) -> Tensor:
    """max|w| per input channel, float32 (K,), of a weight (N, K)."""
    low, high = weight.detach().aminmax(dim=0)
    return torch.maximum(high, -low).float()


def _refuse_not_finite(absmax: Tensor, name: str) -> None:
    broken = int((~torch.isfinite(absmax)).sum())
    if broken:
        raise Diverged(
            f"model.frozen_outliers: {broken} of {len(absmax)} input channels of {name} are not finite on the "
            "calibration batch.",
            "Look for what breaks the model with model.frozen_compute: full, on the same data.",
        )
