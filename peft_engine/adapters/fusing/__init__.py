"""Swap the parts of one model for fused ones: `fuse(model)` and `unfuse(model)`.

A part is found by its type and by what it computes, never by a model's name, and gets a subclass of its own class
(`module.__class__`): parameters, hooks, state dict and adapter files stay what they are.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from peft_kernels._launch import Backend, interpreted, tensor_core_dot, triton_installed
from peft_kernels._quantised_products import release

from ... import processes
from ...errors import ConfigError
from ...quantised import keep_codes
from . import attention, freezing, loss, modules, probing, quantised
from .formats import FrozenCompute, passes_status
from .frozen_linear import PREFIX, frozen_of, take_back
from .frozen_record import BOUND, FrozenRecord
from .linears import FusedLoraLinear, fused_class, why_not
from .outliers import Asked
from .reading import shared_inputs
from .sharing import ProjectionForward, SharedInput, SharingForward
from .state import ATTRIBUTE, Fused, RowSeeds, changed_since, give_back, hooked, original_class, salt_of, state_of, swap

HEAD = "the head in the loss"
"""Its name among what stays in full precision."""
__all__ = ["FrozenRecord", "FuseReport", "RowSeeds", "fuse", "fuses_loss", "row_seeds", "unfuse"]


@dataclass
class FuseReport:
    """What `fuse` did.

    Attributes:
        swapped: module name → the op that it runs now.
        skipped: module name → why it was left as it is.
        backend: "triton" or "torch", what the ops of this model run on.
        why: how the backend was chosen.
        frozen: linear → the format that its weight is in, for those that left full precision.
        kept_full: linear → why it did not; empty where full precision was asked for.
        record: all that was decided about frozen linears, None where full precision was asked for.
        quantised: linear → "nf4", "fp4" or "int8", for those that bitsandbytes holds in 4 or 8 bits.
        passes: how the passes round frozen and quantised products run: compiled, Triton or plain torch, and why.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    backend: str = "torch"
    why: str = ""
    frozen: dict[str, str] = field(default_factory=dict)
    kept_full: dict[str, str] = field(default_factory=dict)
    record: FrozenRecord | None = None
    quantised: dict[str, str] = field(default_factory=dict)
    passes: str = ""

    def counts(self) -> dict[str, int]:
        """How often each op was swapped in."""
        return _counted(self.swapped)

    def told(self) -> str:
        """In one line: the format of the frozen linears, how it was chosen, and how many stayed in full precision."""
        record = self.record
        if record is None and self.quantised:
            kinds = " and ".join(f"{n} linears in {kind}" for kind, n in _counted(self.quantised).items())
            return f"as loaded: {kinds}; passes: {self.passes}"
        if record is None:
            return "full: asked for"
        if record.format is None:
            return record.why
        kept = sum(name in record.errors for name in record.kept_full)
        unseen = sum("does not reach" in reason for reason in record.kept_full.values())
        worst = max((record.errors[name] for name in record.frozen), default=0.0)
        seen = f"on {record.rows} rows" if record.rows else "on random numbers"
        rounded = (
            f"{len(record.frozen)} linears, the largest error {worst:.4f} {seen}" if record.frozen else "no linear"
        )
        parts = [f"{record.why}; {rounded}"]
        parts += [f"{kept} above the bound of {record.bound:g} stay in full precision"] if kept else []
        parts += [f"{unseen} are not reached by the calibration batch and stay so too"] if unseen else []
        parts += [f"outliers: {record.lever}"] if record.lever != "none" else []
        if record.head:
            full = record.kept_full.get(HEAD)
            parts.append(f"the head stays in full precision: {full}" if full else "the loss reads the head in int8")
        return "; ".join([*parts, f"passes: {self.passes}"])

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
        found: dict[str, Any] = {"backend": self.backend, "swapped": self.counts(), "skipped": self.skipped}
        if self.quantised:
            found |= {"quantised": _counted(self.quantised), "passes": self.passes}
        if self.record is None:
            return found
        return found | {
            "frozen": _counted(self.frozen),
            "kept_full": self.kept_full,
            "frozen_errors": self.record.errors,
            "passes": self.passes,
        }


def _counted(named: dict[str, str]) -> dict[str, int]:
    """How often each value stands in it."""
    values = list(named.values())
    return {value: values.count(value) for value in dict.fromkeys(values)}


def fuse(
    model: nn.Module,
    backend: Backend = "auto",
    frozen_compute: FrozenCompute = "full",
    *,
    frozen_outliers: Asked = "auto",
    frozen_error_bound: float = BOUND,
    frozen_head: Literal["full", "int8"] = "full",
    dtype: torch.dtype | None = None,
    calibrate: Callable[[], object] | None = None,
    record: FrozenRecord | None = None,
) -> FuseReport:
    """Make this model's training faster and smaller; its results stay, rounding and dropout masks aside.

    LoRA linears (with dropout, bias, rsLoRA, DoRA, Conv1D), siblings that read one input, gated MLPs, RMSNorm,
    LayerNorm, activations, dropout, rotary attention and the causal LM loss. A second call starts anew.

    With `frozen_compute` every frozen linear but the output head, adapted or not, multiplies in a narrow format, x and
    gradients rounded row by row; its weight becomes codes of one byte a number (two for bf16), layer by layer.

    Args:
        model: a PeftModel or any transformers model; changed in place, undone by `unfuse`.
        backend: "triton" (CUDA), "torch", or "auto": Triton where the model lives on CUDA and triton is installed.
        frozen_compute: "full", "bf16", "int8", "fp8", or "auto": what is fastest here, measured, where it pays.
        frozen_outliers: "none", "smooth", "columns" or "both", against input channels that are much larger than the
            others; "auto" is both with `calibrate` in int8 and fp8, else none.
        frozen_error_bound: a linear whose output errs by more, relative to its size, stays in full precision.
        frozen_head: "int8": the causal LM loss reads the output head in int8 too, where that head is frozen.
        dtype: that training computes in, for "auto"; that of the weights by default.
        calibrate: runs the model on data like that of the training, to measure errors and outliers on. Without it
            errors are measured on random numbers.
        record: of an earlier `fuse` of this model (`FuseReport.record`), to be done again as it was; the other
            settings of frozen linears are then not read.

    Raises:
        ConfigError: the backend can't run here, DeepSpeed ZeRO-3 partitions the model, this device lacks a format that
            was asked for by name, or the record is of another model.
        Diverged: the calibration batch gives numbers that are not finite.
    """
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ConfigError(
            "fuse: the model is partitioned by DeepSpeed ZeRO-3, which gathers weights through hooks on the parts that "
            "a fused layer bypasses.",
            "Use FSDP2 or ZeRO-2, or leave the model unfused.",
        )
    if record is None:
        _refuse_settings(frozen_compute, frozen_outliers, frozen_error_bound, frozen_head)
    if (record is not None or frozen_compute != "full") and any(map(quantised.is_quantised, model.modules())):
        raise ConfigError(
            "fuse: linears of the model are quantised by bitsandbytes, so they can't be frozen in another format.",
            "Give frozen_compute full (model.frozen_compute), or load the model without quantization.",
        )
    keep_codes(model)
    unfuse(model)
    report = FuseReport()
    report.backend, report.why = _choose(model, backend)
    chosen: Backend = "triton" if report.backend == "triton" else "torch"
    rows = RowSeeds()
    if record is None and frozen_compute != "full":
        settings: dict[str, Any] = {"lever": frozen_outliers, "bound": frozen_error_bound, "dtype": dtype}
        record = processes.from_first(
            lambda: freezing.decide(model, frozen_compute, **settings, head=frozen_head == "int8", calibrate=calibrate)
        )
    if record is not None:
        report.record, report.kept_full = record, record.kept_full
        report.frozen = freezing.apply(model, record, chosen, rows)
    report.quantised, kept = quantised.apply(model, chosen, rows)
    if record is not None or report.quantised:
        report.passes = passes_status(next(model.parameters()).device)
    named = list(model.named_modules())
    bypassed = _parts_of_adapters(model)
    alone = [(name, m) for name, m in named if id(m) not in bypassed]
    report.swapped |= {name: state_of(m).op for name, m in alone if issubclass(type(m), ProjectionForward)}
    report.skipped |= {name: kept[name] for name, _ in alone if name in kept}
    for name, module in named:
        if id(module) not in bypassed:
            _swap_one(name, module, chosen, rows, report)
            if report.swapped.get(name) == "glu":
                bypassed |= {id(child) for child in module.children() if not isinstance(child, BaseTunerLayer)}
    for name, module in named:
        _share_inputs(name, module, chosen, rows, report)
    for name, module in named:
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            _swap_loss(name, module, chosen, rows, report)
    if record is not None and record.head and "linear_cross_entropy" not in report.swapped.values():
        report.kept_full[HEAD] = "the loss of this model is not fused"
    marks = {"passes": True} if report.frozen or report.quantised else {}
    marks |= {"codes": True} if report.frozen else {}
    for _, module in named:
        if ATTRIBUTE in module.__dict__:
            state_of(module).extra |= marks
        if report.frozen and isinstance(module, PreTrainedModel):
            state = _state_or_new(module, "model", chosen, rows)
            state.extra["codes"] = True
            swap(module, modules.refusing_to_save(type(module)), state)
    return report


def _refuse_settings(compute: str, outliers: str, bound: float, head: str) -> None:
    """Raise ConfigError for settings of frozen linears that are none, or have no effect."""
    for name, value, known in (("frozen_outliers", outliers, get_args(Asked)), ("frozen_head", head, ("full", "int8"))):
        if value not in known:
            raise ConfigError(f"fuse: {name} must be one of {', '.join(known)}, got {value!r}.", "Write one of these.")
    if not 0 < bound < math.inf:
        raise ConfigError(f"fuse: frozen_error_bound must be a number above 0, got {bound}.", f"Write {BOUND}.")
    if compute == "full" and (outliers not in ("auto", "none") or head != "full" or bound != BOUND):
        raise ConfigError(
            "fuse: frozen_outliers, frozen_head and frozen_error_bound have no effect with frozen_compute full.",
            "Set frozen_compute to int8 or auto, or leave them out.",
        )


def unfuse(model: nn.Module) -> None:
    """Give every module of the model its own class back, and frozen linears a weight in their own dtype.

    Weights that were rounded come back rounded: a warning says so. Load the model anew for its own.

    Raises:
        ConfigError: another library changed the class of a fused module since; nothing is touched then.
    """
    for name, module in model.named_modules():
        if ATTRIBUTE in module.__dict__ and changed_since(module):
            raise ConfigError(
                f"unfuse: {name or 'the model'} became a {type(module).__name__} after it was fused "
                "(fully_shard does that), and would lose what it got.",
                "Unfuse before sharding, or leave it fused.",
            )
    rounded = sum([take_back(module) for module in model.modules()])
    for module in model.modules():
        if ATTRIBUTE in module.__dict__:
            give_back(module)
            for name in [name for name in module._buffers if name.startswith(PREFIX)]:
                delattr(module, name)
    release()
    if rounded:
        warnings.warn(
            f"peft_engine.unfuse: the weights of {rounded} frozen linears come back as they were rounded; load the "
            "model again for its own.",
            stacklevel=2,
        )


def row_seeds(model: nn.Module) -> RowSeeds | None:
    """The holder through which a training loop names the samples of a batch; None for a model that isn't fused."""
    return next((state_of(m).rows for m in model.modules() if ATTRIBUTE in m.__dict__), None)


def fuses_loss(model: nn.Module) -> bool:
    """Whether a training call with labels computes its loss without making the logits."""
    return any(isinstance(m, loss.CausalLossForward) for m in model.modules())


def _choose(model: nn.Module, backend: Backend) -> tuple[str, str]:
    if backend not in get_args(Backend):
        raise ConfigError(f"fuse: backend must be one of {', '.join(get_args(Backend))}, got {backend!r}.", "Use auto.")
    kinds = {p.device.type for p in model.parameters()}
    installed = triton_installed()
    if backend == "triton":
        if not installed or not (kinds == {"cuda"} or interpreted()):
            where = "triton is not installed" if not installed else f"the model is on {', '.join(sorted(kinds))}"
            raise ConfigError(
                f"fuse: backend 'triton' needs a model on CUDA and the triton package; {where}.", "Use auto or torch."
            )
        return "triton", "asked for"
    if backend == "torch":
        return "torch", "asked for"
    if kinds != {"cuda"}:
        return "torch", f"auto: the model is on {', '.join(sorted(kinds)) or 'no device'}"
    if not installed:
        return "torch", "auto: on CUDA, but triton is not installed"
    if not all(tensor_core_dot(i) for i in {p.get_device() for p in model.parameters()}):
        return "torch", "auto: on CUDA, but Triton has no tensor-core products for GPUs before Ampere (sm_80)"
    return "triton", "auto: the model is on CUDA"


def _parts_of_adapters(model: nn.Module) -> set[int]:
    """Modules inside peft's layers (their dropout, A, B and base): run by the layer, or not at all."""
    found: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            found |= {id(m) for m in layer.modules() if m is not layer}
    return found


def _swap_one(name: str, module: nn.Module, backend: Backend, rows: RowSeeds, report: FuseReport) -> None:
    found = _match(module, backend)
    if found is None:
        return
    op, cls, extra = found
    if isinstance(cls, str):
        report.skipped[name] = cls
        return
    if "forward" in module.__dict__:
        report.skipped[name] = "its forward was replaced on this instance"
        return
    swap(module, cls, Fused(original_class(module), op, backend, rows, salt_of(_plain(name)), {"name": name, **extra}))
    report.swapped[name] = op


def _plain(name: str) -> str:
    """A module's name in the model below peft's wrappers, so that a mask does not depend on how it is wrapped."""
    return name.removeprefix("base_model.model.")


def _match(module: Any, backend: Backend) -> tuple[str, Any, dict[str, Any]] | None:
    """(op, class, what it needs), (op, reason, {}) for what can't be fused, None for what is none of our business."""
    if isinstance(module, LoraLayer):
        reason = why_not(cast(nn.Module, module))
        return ("lora_linear", reason, {}) if reason else ("lora_linear", fused_class(type(module)), {})
    if isinstance(module, BaseTunerLayer):
        return "adapter", f"peft's {type(module).__name__} has no fused form", {}
    if type(module) is nn.Dropout:
        return ("dropout", modules.subclass(nn.Dropout, modules.DropoutForward), {}) if 0 < module.p < 1 else None
    if type(module) is nn.LayerNorm:
        if len(module.normalized_shape) != 1:
            return "layer_norm", "it normalises several dimensions", {}
        return "layer_norm", modules.subclass(nn.LayerNorm, modules.LayerNormForward), {}
    for op, probe, mixin in _PROBES:
        settings = probe(module)
        if settings is not None:
            if op == "glu" and any(hooked(m) for n, m in module.named_children() if n not in settings.values()):
                return op, "hooks stand on its activation", {}
            key = {"rms_norm": "settings", "activation": "kind"}.get(op, "parts")
            return op, modules.subclass(original_class(module), mixin), {key: settings}
    found = attention.attention_class(module, backend)
    return None if found is None else (*found, {})


_PROBES: tuple[tuple[str, Callable[[nn.Module], Any], type], ...] = (
    ("rms_norm", probing.rms_norm_settings, modules.RMSNormForward),
    ("glu", probing.gated_mlp, modules.GatedMLPForward),
    ("glu", probing.packed_mlp, modules.GatedMLPForward),
    ("activation", probing.activation_kind, modules.ActivationForward),
)


def _share_inputs(name: str, parent: nn.Module, backend: Backend, rows: RowSeeds, report: FuseReport) -> None:
    groups: list[SharedInput] = []
    for names in () if "forward" in parent.__dict__ else shared_inputs(original_class(parent)):
        found = [(child, parent._modules.get(child)) for child in names]
        members = [(child, m) for child, m in found if m is not None and _shares(m)]
        widths = {_inputs(m) for _, m in members}
        if len(members) < 2 or len(widths) != 1:
            continue
        groups.append(SharedInput([m for _, m in members]))
        for child, member in members:
            state_of(member).extra["group"] = groups[-1]
            report.swapped[f"{name}.{child}" if name else child] = f"{state_of(member).op}, shared input"
    if groups:
        state = _state_or_new(parent, "parent", backend, rows)
        state.extra["groups"] = groups
        swap(parent, modules.subclass(type(parent), SharingForward), state)


def _shares(module: nn.Module) -> bool:
    """Whether a linear can run together with its siblings."""
    if isinstance(module, FusedLoraLinear):
        return not module.lora_variant
    return isinstance(module, ProjectionForward)


def _inputs(module: Any) -> int:
    """Features that a linear reads."""
    held = frozen_of(module)
    return int(module.in_features if held is None else held.shape[1])


def _state_or_new(module: nn.Module, op: str, backend: Backend, rows: RowSeeds) -> Fused:
    """The state of a module that gets a second mixin, or a new one."""
    if ATTRIBUTE in module.__dict__:
        return state_of(module)
    return Fused(type(module), op, backend, rows, 0)


def _swap_loss(name: str, model: Any, backend: Backend, rows: RowSeeds, report: FuseReport) -> None:
    """The model's class and its head's, where the loss can be computed from hidden states."""
    label = name or "loss"
    if getattr(model.loss_function, "__name__", "") != "ForCausalLMLoss":
        return
    logits = loss.read_logits(model)
    if isinstance(logits, str):
        report.skipped[label] = logits
        return
    if "forward" in model.__dict__:
        report.skipped[label] = (
            "its forward was replaced on this instance (as TRL's fused LM head does): the loss stays its own"
        )
        return
    head = model.get_submodule(logits.head)
    reason = loss.head_refusal(head) or ("hooks stand on its head" if hooked(head) else None)
    if reason:
        report.skipped[label] = reason
        return
    swap(head, modules.subclass(type(head), loss.Handover), _state_or_new(head, "head", backend, rows))
    state = Fused(original_class(model), "linear_cross_entropy", backend, rows, salt_of(label), {"logits": logits})
    if report.record is not None and report.record.head:
        refused = loss.why_not_int8(head, logits)
        state.extra["int8_head"] = refused is None
        if refused:
            report.kept_full[HEAD] = refused
    swap(model, modules.subclass(original_class(model), loss.CausalLossForward), state)
    report.swapped[label] = "linear_cross_entropy"
