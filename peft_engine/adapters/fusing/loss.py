"""The loss of a causal language model from hidden states: logits of a whole batch never exist.

The model's own forward runs, with a head that hands its input on instead of multiplying it out; the loss is
`peft_kernels.linear_cross_entropy`. Only where the forward's source shows what becomes of the logits, the loss is
transformers' own for causal LMs, labels are given, and the model trains; everywhere else its own code runs.
"""

import ast
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_kernels.dropout import dropout
from peft_kernels.frozen_weight import FrozenWeight, freeze
from peft_kernels.linear_cross_entropy import HeadAdapter, linear_cross_entropy

from .frozen_linear import PREFIX
from .linears import FusedLoraLinear, rate_of
from .reading import attribute_of_self, forward_tree, value_of
from .state import RowSeeds, hooked, once_each, original_class, state_of

IGNORED = -100


@dataclass(frozen=True)
class Logits:
    """What a model's forward does between its head and its loss.

    Attributes:
        head: name of the child that makes logits.
        scale: a factor on them, softcap: c of c·tanh(z/c).
    """

    head: str
    scale: float = 1.0
    softcap: float | None = None


def read_logits(model: nn.Module) -> Logits | str:
    """The head and what is done to logits before `self.loss_function`, or why that can't be told."""
    tree = forward_tree(original_class(model))
    if tree is None:
        return "its forward has no source"
    reason = _other_uses(tree)
    if reason:
        return reason
    head: str | None = None
    scale: float = 1.0
    softcap: float | None = None
    for node in sorted(
        (n for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.AugAssign | ast.Call)), key=_position
    ):
        if isinstance(node, ast.Call) and attribute_of_self(node.func) == "loss_function":
            return Logits(head, scale, softcap) if head else "its loss is not computed from the output of its head"
        if not isinstance(node, ast.Assign) or [getattr(t, "id", None) for t in node.targets] != ["logits"]:
            continue
        name = _head_called(node.value)
        if name is not None:
            head = name
        elif "final_logit_softcapping" in ast.unparse(node) or "tanh(logits)" in ast.unparse(node):
            places = [c for c in _configs(model) if hasattr(c, "final_logit_softcapping")]
            if not places or "final_logit_softcapping" not in ast.unparse(tree):
                return f"its logits go through {ast.unparse(node.value)} before the loss"
            softcap = places[0].final_logit_softcapping
        else:
            factor = _factor(model, node.value)
            if factor is None:
                return f"its logits go through {ast.unparse(node.value)} before the loss"
            scale *= factor
    return "its forward calls no loss_function"


def _configs(model: Any) -> list[Any]:
    """The model's config, and that of its text part where it has several parts."""
    whole = model.config
    return [whole, whole.get_text_config()] if hasattr(whole, "get_text_config") else [whole]


def _other_uses(tree: ast.FunctionDef) -> str | None:
    """What else a forward does with its logits than scale them, take their loss and return them."""
    allowed: set[int] = set()
    losses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = [k.value for k in node.keywords if k.arg == "logits"]
            if attribute_of_self(node.func) == "loss_function":
                losses.append(node)
                given = given or node.args[:1]
                if not given or getattr(given[0], "id", None) != "logits":
                    return "its loss is not computed from all of its logits"
            allowed |= {id(value) for value in given}
        elif isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == ["logits"]:
            allowed |= {id(n) for n in ast.walk(node.value)}
        elif isinstance(node, ast.Tuple | ast.Return):
            allowed |= {id(n) for n in ast.iter_child_nodes(node)}
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "logits" and isinstance(n.ctx, ast.Load)]
    changed = [n for n in ast.walk(tree) if isinstance(n, ast.AugAssign) and getattr(n.target, "id", None) == "logits"]
    if len(losses) > 1 or changed or any(id(n) not in allowed for n in uses):
        return "it does more with its logits than take their loss"
    return None


def _position(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _head_called(value: ast.expr) -> str | None:
    """ "lm_head" for `self.lm_head(…)`, also with `.contiguous()` or `.float()` behind it."""
    while isinstance(value, ast.Call):
        name = attribute_of_self(value.func)
        if name is not None:
            return name if "." not in name else None
        if not (isinstance(value.func, ast.Attribute) and value.func.attr in ("contiguous", "float")):
            return None
        value = value.func.value
    return None


def _factor(model: nn.Module, value: ast.expr) -> float | None:
    """The number in `logits * self.a.b` or `logits / self.a.b`."""
    if not (isinstance(value, ast.BinOp) and getattr(value.left, "id", None) == "logits"):
        return None
    path = attribute_of_self(value.right)
    try:
        number = value_of(model, path) if path else None
    except AttributeError:
        return None
    if not isinstance(number, int | float) or not number:
        return None
    return float(number) if isinstance(value.op, ast.Mult) else 1 / number if isinstance(value.op, ast.Div) else None


# heads and models that are inside a fused forward of this thread, by id: where the head leaves its input
_OPEN: ContextVar[dict[int, list[Tensor]]] = ContextVar("_OPEN", default={})  # noqa: B039 (never changed in place)


class Handover:
    """Mixin of a head: while `open`, its input is noted and no logits are made."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        note = _OPEN.get().get(id(self))
        if note is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        note.append(x)
        return x.new_empty(*x.shape[:-1], 0, dtype=torch.float32)


@dataclass
class LogitsLater:
    """What makes the logits of one training call.

    Attributes:
        autocast: dtype and whether it was on when the model ran.
    """

    head: nn.Module
    asked: Logits
    rows: RowSeeds
    hidden: Tensor
    autocast: tuple[torch.dtype, bool]

    def make(self) -> Tensor:
        """The logits with their graph, as they would have come out of the model."""
        asked, kind = self.asked, self.hidden.device.type
        dtype, enabled = self.autocast
        self.rows.repeating = True  # an adapter on the head drops what it dropped for the loss
        try:
            with torch.autocast(kind, dtype, enabled):
                made: Tensor = self.head(self.hidden)
                made = made if asked.scale == 1 else made * asked.scale
                made = made if asked.softcap is None else asked.softcap * torch.tanh(made / asked.softcap)
        finally:
            self.rows.repeating = False
        # who reads them outside of the model's own autocast gets what Accelerate makes of its outputs
        return made.float() if enabled and not torch.is_autocast_enabled(kind) else made


class LazyLogits:
    """Mixin of a model's output: logits are made when somebody asks for them.

    Until then an empty tensor stands in their place and knows how they are made, so that they survive DDP, FSDP and
    Accelerate, which take outputs apart and put them together again. They are no field of the dataclass: FSDP reads all
    fields after every call.
    """

    @property
    def logits(self) -> Tensor | None:
        given: Tensor | None = self.__dict__.get("logits")
        later: LogitsLater | None = getattr(given, _LATER, None)
        if later is not None:
            given = self.logits = later.make()
        return given

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        self.__dict__["logits"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "logits" and value is not None:
            OrderedDict.__setitem__(self, name, value)  # type: ignore[index]
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        plain = type(self).__mro__[2]
        return plain, tuple(getattr(self, f.name) for f in fields(plain))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            key = list(self)[key]  # type: ignore[call-overload]
        return self.logits if key == "logits" else super().__getitem__(key)  # type: ignore[misc]

    def get(self, key: str, default: Any = None) -> Any:
        held: Any = self
        return held[key] if key in held else default  # noqa: SIM401 (this is `get`)


_LATER = "_peft_engine_logits"


@once_each
def _with_lazy_logits(cls: type) -> type:
    others = {f.name: f for f in fields(cls) if f.name != "logits"}
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__dataclass_fields__": others}
    return type(cls.__name__, (LazyLogits, cls), names)


class CausalLossForward:
    """Mixin of a causal language model."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        model: Any = self
        if labels is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        state = state_of(model)
        asked: Logits = state.extra["logits"]
        head = model.get_submodule(asked.head)
        if not _applies(model, head, kwargs):
            return super().forward(*args, labels=labels, **kwargs)  # type: ignore[misc]
        note: list[Tensor] = []
        # by context, not on the modules: another thread may be in the same model
        token = _OPEN.set({id(head): note, id(model): note})
        try:
            output = super().forward(*args, labels=labels, **kwargs)  # type: ignore[misc]
        finally:
            _OPEN.reset(token)
        kind = note[0].device.type
        autocast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        setattr(output.logits, _LATER, LogitsLater(head, asked, state.rows, note[0], autocast))
        output.__class__ = _with_lazy_logits(type(output))
        return output

    @property
    def loss_function(self) -> Any:
        """What the model's own forward calls, so that terms it adds (the balance of experts) and arguments stay its."""
        model: Any = self
        note = _OPEN.get().get(id(self))
        if note is None:
            return super().loss_function  # type: ignore[misc]
        return partial(self._loss, model.get_submodule(state_of(model).extra["logits"].head), note)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def _loss(
        self,
        head: nn.Module,
        note: list[Tensor],
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Cross-entropy as transformers' ForCausalLMLoss reduces it: the mean, or the sum over `num_items_in_batch`."""
        model: Any = self
        hidden = note[0]
        shifted = (
            nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
        )
        count, targets = num_items_in_batch, shifted.to(hidden.device)
        loss = fused_loss(model, head, hidden, targets, ignore_index, "mean" if count is None else "sum")
        return loss if count is None else loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def fused_loss(
    model: nn.Module, head: nn.Module, hidden: Tensor, targets: Tensor, ignored: int, reduction: Literal["sum", "mean"]
) -> Tensor:
    """`linear_cross_entropy` with the head's weight and whatever adapters are active on it (trap 16)."""
    state = state_of(model)
    logits: Logits = state.extra["logits"]
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    rows = None
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and type(wanted) is Tensor:
        rows = (wanted != ignored).nonzero().squeeze(1)  # costs no synchronisation here, and saves two GEMMs per row
    weight, bias, lora = head_parts(head, hidden)
    plain = bias is None and not lora and not logits.softcap and not weight.requires_grad
    return linear_cross_entropy(
        flat, weight, wanted, bias=bias, lora=lora, rows=rows, ignore_index=ignored, softcap=logits.softcap,
        logit_scale=logits.scale, reduction=reduction, backend=state.backend,
        codes=_codes_of(state.extra, head, weight) if plain and state.extra.get("int8_head") else None,
    )  # fmt: skip


def _codes_of(extra: dict[str, Any], head: nn.Module, weight: Tensor) -> FrozenWeight:
    """The head's weight in int8, made once: again where somebody put another weight in its place or changed it."""
    held = extra.get("head_codes")
    key = (weight.data_ptr(), weight._version, weight.device)
    if held is None or held[0] != key:
        held = (key, freeze(weight.detach(), "int8"))
        extra["head_codes"] = held
        for name, tensor in (("codes", held[1].codes), ("scale", held[1].scale)):
            head.register_buffer(PREFIX + name, tensor, persistent=False)  # where memory is counted
    codes: FrozenWeight = held[1]
    return codes


def why_not_int8(head: nn.Module, logits: Logits) -> str | None:
    """Why a frozen head can't be read in int8 by the loss, None where it can."""
    if isinstance(head, ModulesToSaveWrapper) or any(p.requires_grad for p in head.parameters()):
        return "it trains"
    if getattr(head, "bias", None) is not None:
        return "it has a bias"
    return "its logits are capped" if logits.softcap else None


def head_parts(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None, list[HeadAdapter]]:
    """Weight, bias and adapters of a head as it computes now."""
    if isinstance(head, ModulesToSaveWrapper):
        active = head.active_adapters[0] if head.active_adapters and not head.disable_adapters else ""
        copies = head.modules_to_save
        head = copies[active] if active in copies else head.original_module  # noqa: SIM401 (a ModuleDict has no get)
    if not isinstance(head, PeftLinear):
        return head.weight, head.bias, []  # type: ignore[return-value]
    base: Any = head.get_base_layer()
    if head.disable_adapters and head.merged:
        head.unmerge()  # as peft's own forward does
    if head.disable_adapters or head.merged:
        return base.weight, base.bias, []
    adapters = []
    for place, name in enumerate(n for n in head.active_adapters if n in head.lora_A):
        p, own = rate_of(head.lora_dropout[name]), None
        assert p is not None
        if p:
            state = state_of(head)
            own = dropout(
                hidden, p, state.rows.of(hidden, state.salt), state.salt + place, backend=state.backend
            ).reshape(-1, hidden.shape[-1])
        up: Any = head.lora_B[name]
        low: Any = head.lora_A[name]
        adapters.append(HeadAdapter(low.weight, up.weight, float(head.scaling[name]), own))
    return base.weight, base.bias, adapters


def _applies(model: Any, head: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call is a training step whose loss is transformers' own."""
    if not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False
    logits_to_keep = kwargs.get("logits_to_keep", 0)
    plain = isinstance(logits_to_keep, int) and logits_to_keep == 0 and kwargs.get("return_dict") in (None, True)
    if not plain or model.config.return_dict is False:
        return False
    if getattr(model.loss_function, "__name__", "") != "ForCausalLMLoss":
        return False
    # a head that peft put in place after fusing hands nothing over; a hook on a head needs its call
    return not hooked(head) and head_refusal(head) is None and isinstance(head, Handover)


def head_refusal(head: nn.Module) -> str | None:
    """Why this head's loss can't be fused, None where it can."""
    if isinstance(head, ModulesToSaveWrapper):
        inner = [head.original_module, *head.modules_to_save.values()]
        if len(head.active_adapters) > 1:
            return "several trained copies of the head are active"
        return next((r for r in map(head_refusal, inner) if r), None)
    if any(hooked(m) for m in head.modules() if m is not head):
        return "hooks stand on its head"
    if isinstance(head, PeftLinear):
        if type(head.get_base_layer()) is not nn.Linear:
            return f"its head is a {type(head.get_base_layer()).__name__}"
        if (
            not isinstance(head, FusedLoraLinear)
            or head.lora_variant
            or any(b.bias is not None for b in head.lora_B.values())
        ):
            return "the adapter on its head has no fused form"
        return next(
            ("its head's dropout is none of torch's" for d in head.lora_dropout.values() if rate_of(d) is None), None
        )
    return None if original_class(head) is nn.Linear else f"its head is a {type(head).__name__}"
