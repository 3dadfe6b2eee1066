"""Bottleneck adapters: a small network of two layers, down to `rank` numbers and up again, inside every layer of a
transformer. It starts as nothing: the way up is zero.

`houlsby` (Houlsby et al. 2019) sits after every attention and after the MLP, `pfeiffer` (Pfeiffer et al. 2021) after
the MLP, each on what the block gives before it is added to the residual: y + up(act(down(y))). `parallel` (He et al. 2022)
runs beside the MLP on its input: MLP(x) + alpha/rank · up(act(down(x))).

Places are found by structure. A layer is an element of an outermost ModuleList with linears in it; its last linear ends
the MLP; what comes before the MLP and ends in the same width is attention. The linear there gets a subclass and the
adapter as a submodule, so that hooks, gradient checkpointing and the names of the model's own tensors stay.
"""

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..backbone import LINEAR_TYPES, Backbone
from ..config import AdapterConfig, Config
from ..errors import ConfigError
from ..runtime import seed_everything
from .group import Group, Member, MemberSpec, initialise
from .targets import find_modules_to_save, in_layers

ACTIVATION = {"houlsby": "gelu", "pfeiffer": "relu", "parallel": "relu"}
ADAPTER = "bottleneck"


class Bottleneck(nn.Module):
    """scale · up(act(down(x))), computed in its own dtype: (..., width) → (..., width) in the dtype of x."""

    def __init__(self, width: int, rank: int, activation: str, scale: float, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, device=device, dtype=torch.float32)
        self.up = nn.Linear(rank, width, device=device, dtype=torch.float32)
        self.activation = ACT2FN[activation]
        self.scale = scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        own = x.to(self.down.weight.dtype)
        return (self.scale * self.up(self.activation(self.down(own)))).to(x.dtype)


class AfterLinear:
    """Mixin of a linear whose output an adapter adds to."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # type: ignore[misc]
        return y + getattr(self, ADAPTER)(y)


class EntersMLP:
    """Mixin of an MLP's first linear: the linear that ends the MLP hears of its input."""

    def forward(self, x: Tensor) -> Tensor:
        self._mlp_end[0].mlp_input = x  # type: ignore[attr-defined]
        return super().forward(x)  # type: ignore[misc]


class BesideMLP:
    """Mixin of an MLP's last linear: adds what the adapter makes of the MLP's input."""

    mlp_input: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.mlp_input is not None, "the MLP's first linear did not run"
        given, self.mlp_input = self.mlp_input, None
        return super().forward(x) + getattr(self, ADAPTER)(given)  # type: ignore[misc]


@dataclass(frozen=True)
class Layer:
    """Full names of the linears that end the attentions, of those of the MLP in order, and the common width."""

    attention: list[str]
    mlp: list[str]
    width: int


def bottleneck(backbone: Backbone, config: Config, specs: list[MemberSpec]) -> Group:
    """Put the adapters of `adapter.method` into every layer (of `adapter.layers`); all else is frozen but a new head.

    Raises:
        ConfigError: the model has no layers of attention and MLP.
    """
    asked, model, spec = config.adapter, backbone.model, specs[0]
    layers = find_layers(backbone)
    ends = in_layers([layer.mlp[-1] for layer in layers], asked.layers) if asked.layers else None
    chosen = [layer for layer in layers if ends is None or layer.mlp[-1] in ends]
    saved = find_modules_to_save(backbone, asked.modules_to_save)
    model.requires_grad_(False)
    seed_everything(spec.seed, 2)
    settings = describe(asked)
    for layer in chosen:
        places = [*(layer.attention if asked.method == "houlsby" else []), layer.mlp[-1]]
        for name in places:
            _insert(model, name, layer, settings)
    for name, module in model.named_modules():
        if any(name == ending or name.endswith(f".{ending}") for ending in saved):
            module.requires_grad_(True)
    std = getattr(model.config, "initializer_range", 0.02)
    for name in backbone.new_modules:
        initialise(model.get_submodule(name), std, spec.seed)
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for tensor in tensors.values():
        tensor.data = tensor.data.float()
    return Group(backbone, model, asked.method, [Member(spec, tensors)], settings=settings)


def describe(asked: AdapterConfig) -> dict[str, Any]:
    """What, beside the tensors' shapes, decides what they compute."""
    activation = asked.options.get("activation", ACTIVATION[asked.method])
    scale = asked.alpha / asked.rank if asked.method == "parallel" else 1.0
    return {"method": asked.method, "rank": asked.rank, "activation": activation, "scale": scale}


def find_layers(backbone: Backbone) -> list[Layer]:
    """The layers of a transformer, in model order."""
    model = backbone.model
    found = []
    outermost: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{above}.") for above in outermost):
            outermost.append(name)
            for index, element in enumerate(module):
                layer = _read_layer(f"{name}.{index}", element)
                if layer:
                    found.append(layer)
    if not found:
        raise ConfigError(
            f"adapter.method: {type(model).__name__} has no layers of attention and MLP made of linears, between which "
            "bottleneck adapters belong.",
            "Use lora.",
        )
    return found


def _read_layer(name: str, layer: nn.Module) -> Layer | None:
    blocks: dict[str, list[str]] = {}  # linears by the layer's own parts
    sizes: dict[str, int] = {}
    for inner, module in layer.named_modules():
        if isinstance(module, LINEAR_TYPES):
            parts = inner.split(".")
            part = next((i + 1 for i, p in enumerate(parts) if not _is_list(layer, parts[: i + 1])), 1)
            blocks.setdefault(".".join(parts[:part]), []).append(f"{name}.{inner}")
            sizes[f"{name}.{inner}"] = _out(module)
    runs = list(blocks.values())
    if not runs:
        return None
    mlp = runs.pop()
    if len(mlp) == 1 and runs:  # the two linears of the MLP are parts of the layer itself
        mlp = [*runs.pop(), *mlp]
    width = sizes[mlp[-1]]
    attention = [run[-1] for run in runs if len(run) > 1 and sizes[run[-1]] == width]
    return Layer(attention, mlp, width) if attention and len(mlp) > 1 else None


def _is_list(layer: nn.Module, path: list[str]) -> bool:
    return isinstance(layer.get_submodule(".".join(path)), nn.ModuleList)


def _out(linear: nn.Module) -> int:
    return int(linear.nf if isinstance(linear, Conv1D) else linear.out_features)  # type: ignore[arg-type]


def _insert(model: nn.Module, name: str, layer: Layer, settings: dict[str, Any]) -> None:
    place: Any = model.get_submodule(name)
    device = place.weight.device
    new = Bottleneck(layer.width, settings["rank"], settings["activation"], settings["scale"], device)
    place.add_module(ADAPTER, new)
    if settings["method"] != "parallel":
        place.__class__ = _subclass(AfterLinear, type(place))
        return
    entry: Any = model.get_submodule(layer.mlp[0])
    entry._mlp_end = (place,)  # in a tuple, so that it is no submodule
    entry.__class__ = _subclass(EntersMLP, type(entry))
    place.__class__ = _subclass(BesideMLP, type(place))


@functools.cache
def _subclass(mixin: Hashable, cls: Hashable) -> Any:
    assert isinstance(mixin, type)
    assert isinstance(cls, type)
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {})
