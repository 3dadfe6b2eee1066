"""Quantised weights of the frozen backbone: which linears get them, how they are loaded, and what they hold.

bitsandbytes quantises while transformers loads, tensor by tensor. Its linears are told by their weight's class, so that
nothing here needs the library where no weight is quantised.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import Config, ModelConfig
from .errors import ConfigError
from .int8_linear import unround
from .runtime import training_dtype
from .stored_checkpoint import keep_new, refuse_with_stored

OWN = ("nf4", "fp4", "int8")
"""Kinds of bitsandbytes, which the engine can make and read."""
BLOCK = 64
"""Numbers that share an absmax in nf4 and fp4, as transformers makes them."""


def stored_kind(model_config: Any) -> str | None:
    """The format that a checkpoint's config states: nf4, fp4, int8, or another library's name; None for a plain one."""
    found = getattr(model_config, "quantization_config", None)
    if found is None:
        return None
    stated = found if isinstance(found, dict) else found.to_dict()
    if stated.get("load_in_4bit"):
        return str(stated.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if stated.get("load_in_8bit") else str(stated.get("quant_method", "unknown"))


def kind_of(module: nn.Module) -> str | None:
    """nf4, fp4 or int8 for a linear of bitsandbytes with its weight loaded, None for every other module."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    match type(weight).__name__:
        case "Params4bit":
            return str(weight.quant_type)  # type: ignore[union-attr]
        case "Int8Params":
            return "int8"
    return None


def quantised_linears(model: nn.Module) -> dict[str, Any]:
    """bitsandbytes' linears by their full names."""
    return {name: module for name, module in model.named_modules() if kind_of(module)}


def is_quantised(model: nn.Module) -> bool:
    """Whether any weight is, by bitsandbytes or another library."""
    return getattr(model, "hf_quantizer", None) is not None or bool(quantised_linears(model))


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """What products with quantised weights compute in: that of autocast, else of the weights around them."""
    narrow = training_dtype(config.training.precision, device.type)
    asked = config.model.dtype
    return narrow or (torch.float32 if asked == "auto" else getattr(torch, asked))


def load_settings_of(
    config: Config,
    auto_class: Any,
    model_config: Any,
    device: torch.device,
    may_be_new: Callable[[PreTrainedModel, str], bool],
) -> dict[str, Any]:
    """What `from_pretrained` is told beside the usual; nothing for a plain model.

    Args:
        may_be_new: (model, tensor name) → whether the task makes this tensor anew: its module stays as it is.

    Raises:
        ConfigError: the checkpoint is quantised in another way than asked for, or asked to be rounded once more; there
            is no linear to quantise; bitsandbytes is missing.
    """
    settings, stored = config.model, stored_kind(model_config)
    if stored is None and settings.quantization == "none":
        return {}
    where = {"device_map": {"": "cpu" if settings.offload == "layers" else str(device)}}
    if stored is not None:
        refuse_with_stored(config, stored, model_config)
        if stored in OWN:
            keep_new(auto_class, model_config, settings, may_be_new)
        return where
    try:
        import bitsandbytes  # noqa: F401 (transformers needs it)
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise ConfigError(
            f"model.quantization: {settings.quantization} needs bitsandbytes ({error}).",
            "Install it, or set model.quantization: none.",
        ) from error
    with torch.device("meta"):
        skeleton = auto_class.from_config(model_config, trust_remote_code=settings.trust_remote_code)
    kept = names_to_keep(skeleton, settings, may_be_new)
    if settings.quantization == "int8":
        return where | {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)}
    return where | {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantization,
            bnb_4bit_use_double_quant=settings.double_quantization,
            bnb_4bit_compute_dtype=compute_dtype(config, device),
            llm_int8_skip_modules=kept,
        )
    }


def names_to_keep(
    skeleton: PreTrainedModel, settings: ModelConfig, may_be_new: Callable[[PreTrainedModel, str], bool]
) -> list[str]:
    """Linears that are not quantised, as patterns of transformers: heads, what the task makes anew, what the settings
    name, and in 4 bits those whose rows are no multiple of the block: bitsandbytes' CPU kernel misreads these.

    Raises:
        ConfigError: a pattern of `model.quantization_skip` finds no linear, or nothing is left to quantise.
    """
    base, output = skeleton.base_model, skeleton.get_output_embeddings()
    heads = () if base is skeleton else tuple(n for n, child in skeleton.named_children() if child is not base)
    linears = {n: m for n, m in skeleton.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)}
    unused = [p for p in settings.quantization_skip if not any(re.search(p, name) for name in linears)]
    if unused:
        raise ConfigError(
            f"model.quantization_skip: {unused[0]!r} is found in none of the {len(linears)} linears' names.",
            f"They end in: {', '.join(sorted({name.rpartition('.')[2] for name in linears})[:20])}.",
        )
    kept = [
        name
        for name, module in linears.items()
        if module is output
        or name.split(".")[0] in heads
        or may_be_new(skeleton, f"{name}.weight")
        or any(re.search(pattern, name) for pattern in settings.quantization_skip)
        or (settings.quantization != "int8" and _width(module) % BLOCK)
    ]
    if len(kept) == len(linears):
        raise ConfigError(
            f"model.quantization: none of the {len(linears)} linears of {type(skeleton).__name__} is left to quantise: "
            "heads stay as they are, nf4 and fp4 need a width in multiples of 64"
            + (
                f", and quantization_skip {settings.quantization_skip} keeps others."
                if settings.quantization_skip
                else "."
            ),
            "Set model.quantization: none" + (", or skip less." if settings.quantization_skip else "."),
        )
    return [re.escape(name) for name in kept]


def _width(module: Any) -> int:
    return int(module.weight.shape[0 if isinstance(module, Conv1D) else 1])


def make_ready(model: nn.Module, dtype: torch.dtype) -> None:
    """Let bitsandbytes' linears compute in `dtype`, in training and evaluation with the same weights. In place.

    Of 4 bits see `keep_codes`; its 8-bit linear rounds x, see `int8_linear`.

    Raises:
        ConfigError: weights are stored in blocks that its CPU kernels misread.
    """
    model.__dict__.pop("hf_device_map", None)  # one device: peft and save_pretrained take "cpu" in it for offloading
    keep_codes(model)
    for name, linear in quantised_linears(model).items():
        if kind_of(linear) == "int8":
            unround(linear)
            continue
        linear.compute_dtype, linear.compute_type_is_set = dtype, True
        if linear.weight.device.type == "cpu" and linear.in_features % linear.weight.quant_state.blocksize:
            raise ConfigError(
                f"model.path: {name} is stored in blocks of {linear.weight.quant_state.blocksize} numbers, which its "
                f"{linear.in_features} inputs are no multiple of; bitsandbytes misreads that on a CPU.",
                "Take device: cuda, or the model in full precision with model.quantization.",
            )


def keep_codes(model: nn.Module) -> None:
    """Let no 4-bit linear of bitsandbytes repack its weight, which changes what it computes. In place.

    On CPUs with bf16 units it does so at the first evaluation without gradients, with absmax rounded to bfloat16, and
    computes in bfloat16 from then on, in training too and without a gradient of its input.

    Raises:
        ConfigError: one has done so already.
    """
    for name, linear in quantised_linears(model).items():
        if kind_of(linear) == "int8":
            continue
        if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ConfigError(
                f"{name}: bitsandbytes has repacked this weight for its bf16 kernel, with rounded absmax, when the "
                "model was evaluated.",
                "Load the model anew, and fuse it before it is run.",
            )
        linear.support_avx512bf16_for_cpu = False


def side_tensors(module: Any) -> dict[str, Tensor]:
    """What a quantised linear holds beside its codes, by name."""
    kind = kind_of(module)
    if kind is None:
        return {}
    if kind == "int8":
        scale = _scale(module)
        return {} if scale is None else {"SCB": scale}
    state = module.weight.quant_state
    found = {"absmax": state.absmax, "code": state.code}
    if state.nested:
        found |= {"offset": state.offset, "nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def all_side_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same of all linears of a model, by full names."""
    for name, module in model.named_modules():
        for part, tensor in side_tensors(module).items():
            yield f"{name}.weight.{part}", tensor


def weights_of(model: nn.Module) -> list[Tensor]:
    """All that a model holds between steps: parameters, buffers, and what quantised linears have beside them."""
    return [*model.parameters(), *model.buffers(), *(tensor for _, tensor in all_side_tensors(model))]


def count_of(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: 4-bit ones hold two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def _scale(module: Any) -> Tensor | None:
    """The rows' largest magnitudes, which bitsandbytes moves from the weight to its state at the first forward."""
    found = module.state.SCB if module.state.SCB is not None else getattr(module.weight, "SCB", None)
    assert found is None or isinstance(found, Tensor)
    return found


@dataclass(frozen=True)
class Format:
    """All that decides how a weight is rounded: of a linear that is there, to round another weight alike."""

    kind: str
    blocksize: int
    nested: bool
    storage: torch.dtype
    dtype: torch.dtype

    @classmethod
    def of(cls, module: Any) -> "Format":
        kind = kind_of(module)
        assert kind is not None
        if kind == "int8":
            return cls(kind, 0, False, torch.int8, torch.float16)
        state = module.weight.quant_state
        return cls(kind, state.blocksize, state.nested, module.weight.quant_storage, state.dtype)

    def parameter(self, weight: Tensor, module: Any = None) -> Any:
        """A bitsandbytes parameter on the device of `weight`, (out, in)."""
        import bitsandbytes

        device = weight.device
        if self.kind == "int8":
            rows: Any = bitsandbytes.nn.Int8Params(weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
            return rows.to(device)
        blocks: Any = bitsandbytes.nn.Params4bit(
            weight.detach().to(self.dtype),
            requires_grad=False,
            blocksize=self.blocksize,
            compress_statistics=self.nested,
            quant_type=self.kind,
            quant_storage=self.storage,
            module=module,
        )
        return blocks.to(device)

    def rounded(self, weight: Tensor) -> Tensor:
        """What becomes of `weight`, (out, in): float32 of its shape."""
        parameter = self.parameter(weight)
        return _numbers(parameter, parameter.SCB if self.kind == "int8" else None)


def dequantised(module: Any) -> Tensor:
    """The weight of a bitsandbytes linear: float32 (out, in), as its codes and absmax say."""
    return _numbers(module.weight, _scale(module) if kind_of(module) == "int8" else None)


def _numbers(parameter: Any, scale: Tensor | None) -> Tensor:
    from bitsandbytes import functional

    if scale is not None:
        found: Tensor = functional.int8_vectorwise_dequant(parameter.data, scale)
        return found.float()
    state = copy.copy(parameter.quant_state)
    shape = state.shape
    # in one row: bitsandbytes' CPU kernel takes a wrong absmax where rows are no multiple of the block
    state.dtype, state.shape = torch.float32, torch.Size([1, shape.numel()])
    flat: Tensor = functional.dequantize_4bit(parameter.data.reshape(-1, 1), state)
    return flat.reshape(shape)


def requantise(module: Any, weight: Tensor) -> None:
    """Give a bitsandbytes linear another weight, (out, in), rounded as its own was. In place."""
    module.weight = Format.of(module).parameter(weight.to(module.weight.device), module)
    if kind_of(module) == "int8":
        module.state.reset_grads()


def dequantise(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Format]:
    """Turn bitsandbytes' linears into those of the model's own code, with the numbers that they stood for. In place.

    Returns:
        How each was rounded, by name.
    """
    formats = {}
    for name, module in quantised_linears(model).items():
        formats[name] = Format.of(module)
        weight = dequantised(module).to(dtype)
        own: Any
        if getattr(module, "source_cls", nn.Linear) is Conv1D:
            own = Conv1D(module.out_features, module.in_features)
            own.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
        else:
            own = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            own.weight = nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            own.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, own)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    loaded: Any = getattr(model, "_weight_conversions", None)
    if loaded:  # saving would undo what made codes of a stored checkpoint
        plain = [one for one in loaded if not any(hasattr(op, "hf_quantizer") for op in getattr(one, "operations", ()))]
        setattr(model, "_weight_conversions", plain or None)  # noqa: B010
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, flag, False):
            setattr(model, flag, False)
    return formats


def full_weights(model: PreTrainedModel, settings: ModelConfig, names: Iterable[str]) -> dict[str, Tensor]:
    """The checkpoint's own weights of some linears: float32 (out, in) on the CPU.

    Raises:
        ConfigError: the checkpoint holds them quantised.
    """
    stated, _ = type(model.config).get_config_dict(settings.path, revision=settings.revision)
    if "quantization_config" in stated:  # codes would be taken for numbers, or left out for their shape
        raise ConfigError(
            f"adapter.init: it is made of the model's own weights, and {settings.path} holds quantised ones only.",
            "Give the model in full precision, with model.quantization, or use init: default.",
        )
    model_config = copy.deepcopy(model.config)
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    own = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("peft_engine"))
    plain: Any = own.from_pretrained(  # type: ignore[attr-defined]
        settings.path, config=model_config, revision=settings.revision, dtype="auto", ignore_mismatched_sizes=True
    )
    found = {}
    for name in names:
        module: Any = plain.get_submodule(name)
        weight = module.weight.detach().float()
        found[name] = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    return found


def told(model: PreTrainedModel, settings: ModelConfig, dtype: torch.dtype) -> str | None:
    """For run.json: what is quantised, how, and what its products compute in; None for a plain model."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    linears = quantised_linears(model)
    how = "as the checkpoint stores it" if getattr(quantizer, "pre_quantized", True) else "asked for"
    if not linears:
        return (
            f"{stored_kind(model.config)}: {how}; trained by peft's own layers, nothing of it fused; "
            f"precision {str(dtype).removeprefix('torch.')}"
        )
    kinds = sorted({str(kind_of(module)) for module in linears.values()})
    nested = any(kind_of(m) != "int8" and m.weight.quant_state.nested for m in linears.values())
    whole = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n not in linears]
    held = sum(t.numel() * t.element_size() for m in linears.values() for t in (m.weight, *side_tensors(m).values()))
    numbers = sum(count_of(m.weight) for m in linears.values())
    return (
        f"{', '.join(kinds)}: {how}; {len(linears)} linears in {8 * held / numbers:.2f} bits a number"
        + (", their absmax in 8 bits" if nested else "")
        + f"; products in {str(dtype).removeprefix('torch.')}; {len(whole)} linears as they are"
        + (f" ({', '.join(whole[:3])}{', …' if len(whole) > 3 else ''})" if whole else "")
    )
