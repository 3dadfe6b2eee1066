"""Small models whose linears bitsandbytes holds in 4 or 8 bits, built as transformers' loader builds them."""

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from families import adapt, make
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels.quantised_weight import QuantisedWeight

# families.py's shapes in whole blocks of 64, which bitsandbytes' CPU kernel needs
WIDE: dict[str, dict[str, Any]] = {
    "gpt2": {"hidden_size": 64, "n_inner": 128},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
    "distilbert": {"dim": 64, "hidden_dim": 128},
}
GROUPED = ("llama", "qwen3", "gemma", "gemma2", "gemma3", "mixtral")
KINDS = ("nf4", "fp4", "int8")


def wide(family: str) -> dict[str, Any]:
    own = WIDE.get(family, {"hidden_size": 64, "intermediate_size": 128})
    return own | ({"head_dim": 16} if family in GROUPED else {})


def layer(source: nn.Module, kind: str, *, compute: torch.dtype | None = None, nested: bool = True) -> nn.Module:
    """bitsandbytes' linear in place of a Linear or Conv1D, on the CPU."""
    weight = source.weight.detach()
    weight = weight.t().contiguous() if isinstance(source, Conv1D) else weight
    out, features = weight.shape
    biased = source.bias is not None
    if kind == "int8":
        made: Any = bnb.nn.Linear8bitLt(features, out, biased, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    else:
        made = bnb.nn.Linear4bit(features, out, biased, compute, compress_statistics=nested, quant_type=kind)
        made.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, compress_statistics=nested, quant_type=kind, module=made
        ).to("cpu")
    if biased:
        made.bias = nn.Parameter(source.bias.detach().clone(), requires_grad=False)
    return made


def quantise(model: Any, kind: str, **how: Any) -> Any:
    """Every linear but heads, in place."""
    heads = [
        model.get_output_embeddings(),
        *(getattr(model, n, None) for n in ("score", "pre_classifier", "classifier")),
    ]
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D) and not any(module is head for head in heads):
            model.set_submodule(name, layer(module, kind, **how))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind != "int8", kind == "int8"  # peft's switches
    return model


def twins(family: str, kind: str, *, dropout: float = 0.0, how: dict[str, Any] | None = None, **lora: Any) -> Any:
    """Two adapted models that are equal in every tensor and share none; the second one is left to peft."""
    model = quantise(make(family, dropout=dropout, **wide(family)), kind, **(how or {}))
    one = adapt(model, **lora)
    return one, copy.deepcopy(one)


def unpacked(module: Any) -> Tensor:
    """The numbers (N, K) of a linear of bitsandbytes, in float32."""
    scale = module.state.SCB if hasattr(module, "state") else None
    return QuantisedWeight.from_parameter(module.weight, scale=scale).dequantised()


def as_numbers(model: Any) -> Any:
    """A copy in float64 whose linears are torch's, with the numbers that the codes stand for."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight = nn.Parameter(unpacked(module), requires_grad=False)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
            model.set_submodule(name, plain)
    return model.double()
