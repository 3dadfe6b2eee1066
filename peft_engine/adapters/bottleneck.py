"""Bottleneck adapters: a small network of two layers, down to `rank` numbers and up again, inside every layer of a
transformer. It starts as nothing: the way up is zero.

`houlsby` (Houlsby et al. 2019) sits after every attention and after the MLP, `pfeiffer` (Pfeiffer et al. 2021) after
the MLP, each on what the block gives before it is added to the residual: y + up(act(down(y))). `parallel` (He et al.
2022) runs beside the MLP on its input: MLP(x) + alpha/rank · up(act(down(x))).

Places are found by structure. A layer is an element of a ModuleList with linears in it, of the innermost such list
that reads as layers (Swin keeps them in stages); its last linear ends the MLP; what comes before the MLP and ends in
the same width is attention. A model in which part of a list can't be read so is refused. The linear at a place gets a
subclass and the adapter as a submodule, so that hooks, gradient checkpointing and the names of the model's own tensors
stay.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..backbone import LINEAR_TYPES, Backbone
from ..config import AdapterConfig, Config
from ..errors import ConfigError
from ..runtime import seed_everything
from .fusing.state import once_each
from .group import Group, Member, MemberSpec, initialise
from .targets import find_modules_to_save, in_layers

ACTIVATION = {"houlsby": "gelu", "pfeiffer": "relu", "parallel": "relu"}
ADAPTER = "bottleneck"

LAYER_LINEARS = 4
"""A module with so many linears may be a layer: three of attention and one more."""


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
    """The layers of a transformer, in model order, those of all its stages.

    Raises:
        ConfigError: there are none, or elements beside them have linears and can't be read.
    """
    model = backbone.model
    found = _layers_below("", model)
    if not found:
        raise ConfigError(
            f"adapter.method: {type(model).__name__} has no layers of attention and MLP made of linears, between which "
            "bottleneck adapters belong.",
            "Use lora.",
        )
    return found


def _layers_below(name: str, module: nn.Module) -> list[Layer] | None:
    """Layers of the outermost ModuleLists in a module; none where there are none, None where part can't be read."""
    found: list[Layer] = []
    outermost: list[str] = []
    unread = False  # a list of what may well be layers
    for inner, part in module.named_modules(prefix=name):
        if not isinstance(part, nn.ModuleList) or any(inner.startswith(f"{above}.") for above in outermost):
            continue
        outermost.append(inner)
        own: list[Layer] = []
        odd = False  # an element with linears that is neither a layer nor a stage of layers
        for index, element in enumerate(part):
            place = f"{inner}.{index}"
            layers = _layers_below(place, element)
            if layers is None:
                return None
            if not layers and (layer := _read_layer(place, element)):
                layers = [layer]
            own += layers
            odd = odd or (not layers and _linears(element) > 0)
        if own and odd:
            return None
        unread = unread or (odd and all(_linears(element) >= LAYER_LINEARS for element in part))
        found += own
    return None if found and unread else found


def _linears(module: nn.Module) -> int:
    return sum(isinstance(m, LINEAR_TYPES) for m in module.modules())


def _read_layer(name: str, layer: nn.Module) -> Layer | None:
    """None where its attentions and its MLP are not told apart for certain."""
    if _holds_more(layer):
        return None
    blocks: dict[str, list[str]] = {}  # linears by the layer's own parts
    sizes: dict[str, tuple[int, int]] = {}
    for inner, module in layer.named_modules():
        if isinstance(module, LINEAR_TYPES):
            parts = inner.split(".")
            part = next((i + 1 for i, p in enumerate(parts) if not _is_list(layer, parts[: i + 1])), 1)
            blocks.setdefault(".".join(parts[:part]), []).append(f"{name}.{inner}")
            sizes[f"{name}.{inner}"] = _sizes(module)
    runs = list(blocks.values())
    if not runs:
        return None
    mlp = runs.pop()
    if len(mlp) == 1 and runs and len(runs[-1]) == 1:  # the two linears of the MLP are parts of the layer itself
        mlp = [*runs.pop(), *mlp]
    width = sizes[mlp[-1]][1]
    entered, inner_width = sizes[mlp[0]]
    if len(mlp) not in (2, 3) or entered != width or inner_width not in (n := sizes[mlp[-1]][0], 2 * n):
        return None  # 2 * n: gate and values are one matrix
    attention = [run for run in runs if len(run) > 1]
    for run in attention:
        is_mlp = len(run) < 4 and sizes[run[0]][1] == sizes[run[-1]][0]
        if is_mlp or sizes[run[-1]][1] != width:
            return None
    return Layer([run[-1] for run in attention], mlp, width) if attention else None


def _holds_more(layer: nn.Module) -> bool:
    """Experts in one tensor, or a list of parts of one kind: this is more than attention and one MLP."""
    for module in layer.modules():
        if isinstance(module, nn.ModuleList):
            kinds = [type(part) for part in module if any(isinstance(m, LINEAR_TYPES) for m in part.modules())]
            if kinds and (len(kinds) == 1 or len({*kinds}) < len(kinds)):
                return True
        own = [] if isinstance(module, _ConvNd) else list(module.parameters(recurse=False))
        if any(sum(n > 1 for n in p.shape) > 2 for p in own):
            return True
    return False


def _is_list(layer: nn.Module, path: list[str]) -> bool:
    return isinstance(layer.get_submodule(".".join(path)), nn.ModuleList)


def _sizes(linear: Any) -> tuple[int, int]:
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


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


@once_each
def _subclass(mixin: Any, cls: Any) -> Any:
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {})
