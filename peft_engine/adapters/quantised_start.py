"""Starts of LoRA on a quantised backbone, which peft makes of full-precision weights only, or on CUDA only.

loftq         Q is kept, s·B·A is the best approximation of W - Q at that rank (Li et al. 2023, one iteration: more
              would change Q, and the adapter would then be for a base that nobody else has)
pissa, olora  A and B are made of W, by peft, and what is quantised is W - s·B·A (QPiSSA, Meng et al. 2024, section 4)
orthogonal    peft would cast A and B to the dtype of the codes
"""

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import ConfigError
from ..quantised import dequantised, full_weights, kind_of, requantise

BELOW = "base_model.model."  # where peft puts the model


def starts_from_weights(init: str) -> bool:
    """Whether this start needs code of ours on quantised linears."""
    return init.startswith(("pissa", "olora")) or init in ("loftq", "orthogonal")


def start_quantised(model: PeftModel, adapter: str, init: str, settings: LoraConfig, source: ModelConfig) -> None:
    """Give every LoRA pair of a quantised model its start, in place; pissa and olora give the linears another weight.

    Args:
        settings: with the init that peft would be told.
        source: where the full-precision weights are.

    Raises:
        ConfigError: an adapted module is not quantised, or the weights are nowhere in full precision.
    """
    layers = lora_layers(model, adapter)
    other = [name for name, layer in layers.items() if kind_of(layer.get_base_layer()) is None]
    if other or not layers:
        raise ConfigError(
            f"adapter.init: {init} starts quantised linears, and {(other or ['none'])[0]} is not quantised.",
            "Leave it out of adapter.targets (or of model.quantization_skip), or use init: default.",
        )
    weights = {} if init == "orthogonal" else full_weights(_plain_of(model), source, layers)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if init == "loftq":
            down, up = _best_pair(weights[name] - dequantised(base).cpu(), layer.r[adapter], layer.scaling[adapter])
        else:
            twin = _twin(layer, adapter, settings, weights.get(name))
            down, up = (part[adapter].weight.detach() for part in (twin.lora_A, twin.lora_B))
            if init != "orthogonal":
                requantise(base, twin.get_base_layer().weight.detach())
        for part, found in ((layer.lora_A, down), (layer.lora_B, up)):
            own: Any = part[adapter].weight
            own.data = found.to(own.device, torch.float32).contiguous()
        if adapter in layer.lora_variant:  # DoRA: its magnitude is the norm of the start
            layer.lora_variant[adapter].init(layer, adapter_name=adapter, config=settings)


def lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """LoRA layers with this adapter, by their names below peft's wrapper."""
    return {
        name.removeprefix(BELOW): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and (adapter in layer.lora_A or adapter in layer.lora_embedding_A)
    }


def _plain_of(model: PeftModel) -> Any:
    base: Any = model.get_base_model()
    return base


def _best_pair(error: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with scale·B·A nearest to `error`, (out, in) (Eckart, Young 1936)."""
    up, values, down = torch.linalg.svd(error, full_matrices=False)
    some = min(rank, len(values))
    root = (values[:some] / scale).sqrt()
    a, b = error.new_zeros(rank, error.shape[1]), error.new_zeros(error.shape[0], rank)
    a[:some], b[:, :some] = root[:, None] * down[:some], up[:, :some] * root
    return a, b


def _twin(layer: Any, adapter: str, settings: LoraConfig, weight: Tensor | None) -> Any:
    """peft's LoRA layer as it starts on a plain linear with `weight`, (out, in); else with any."""
    base = nn.Linear(layer.in_features, layer.out_features, bias=False)
    if weight is not None:
        base.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return LoraLinear(base, adapter, settings, r=layer.r[adapter], lora_alpha=layer.lora_alpha[adapter])
