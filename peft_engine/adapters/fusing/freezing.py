"""Which linears of a model are frozen into a narrow format, measured on a calibration batch, and the freezing itself.

decide    looks at every linear, runs the model once or twice, changes nothing
apply     layer by layer puts codes in the place of weights; never are there two copies of the model
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_kernels._frozen_products import products
from peft_kernels._frozen_units import Format
from peft_kernels._launch import Backend
from peft_kernels.frozen_weight import freeze, freeze_siblings

from ...backbone import embeddings_of
from ...errors import ConfigError, Diverged
from .formats import FrozenCompute, decide_format, refuse_missing
from .frozen_linear import FrozenForward, put
from .frozen_record import BOUND, FrozenRecord
from .linears import why_not
from .modules import subclass
from .outliers import Asked, Outliers, choose, collect
from .reading import shared_inputs, weights_read
from .state import Fused, RowSeeds, hooked, original_class, salt_of, swap

LINEARS = (nn.Linear, Conv1D)
SMALLEST = 16
"""Linears with fewer inputs or outputs stay as they are: nothing is gained on them."""
MEASURED_ROWS = 1024
"""Rows of a layer's input that its error is measured on, evenly spaced over the batch."""


@dataclass(frozen=True)
class Place:
    """A linear that may be frozen; `name` is that below peft's wrappers."""

    name: str
    full_name: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def weight(self) -> Tensor:
        """(N, K)."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        return weight.t() if self.transposed else weight


def decide(
    model: nn.Module,
    asked: FrozenCompute,
    *,
    lever: Asked = "auto",
    bound: float = BOUND,
    head: bool = False,
    dtype: torch.dtype | None = None,
    calibrate: Callable[[], object] | None = None,
) -> FrozenRecord:
    """Look at a model that is not fused and decide; the model is run, not changed.

    Args:
        lever: against outlying input channels, int8 and fp8; `auto` is both of them, none without `calibrate`.
        bound: linears whose error is larger stay in full precision.
        head: whether the loss is to read the output head in int8.
        dtype: that training computes in; the weights' by default.
        calibrate: runs the model on some of the data that it will be trained on. None measures on random numbers, and
            allows no lever.

    Raises:
        ConfigError: a format asked for by name that this device lacks or that suits no linear, or a lever without data
            or for a format that needs none.
        Diverged: the model gives numbers that are not finite on the calibration batch.
    """
    places, kept = find_places(model)
    if not places:
        return _nothing_to_freeze(asked, kept, FrozenRecord(None, "", "none", bound, kept_full=kept))
    shapes = [tuple(place.weight.shape) for place in places]
    commonest = max(sorted(set(shapes)), key=lambda shape: (shapes.count(shape) * shape[0] * shape[1], shape))
    device, own = places[0].weight.device, places[0].weight.dtype
    format, why = decide_format(asked, device, cast(tuple[int, int], commonest), dtype or own)
    if format is None and (head or lever not in ("auto", "none")):
        why += "; frozen_outliers and frozen_head do nothing then"
    if format == "bf16" and head and asked == "bf16":
        raise ConfigError("frozen_head: got int8 beside frozen_compute bf16.", "Take int8 for both, or write full.")
    if lever == "auto":
        lever = "none" if format in (None, "bf16") or calibrate is None else "both"
    record = FrozenRecord(format, why, lever, bound, head and format is not None, kept_full=kept)
    if format is None:
        return record
    if lever != "none" and (format == "bf16" or calibrate is None):
        if format == "bf16" and asked == "auto":
            record.lever = lever = "none"
            record.why += "; no outliers to mend in bf16"
        else:
            raise ConfigError(
                f"frozen_outliers: {lever} "
                + ("is for int8 and fp8; bf16 has no outliers." if format == "bf16" else "needs a calibration batch."),
                "Set it to none." if format == "bf16" else "Give fuse a `calibrate`.",
            )
    stats: dict[str, Tensor] = {}
    if lever != "none" and calibrate is not None:
        found = collect(model, [place.full_name for place in places], calibrate)
        stats = {place.name: found[place.full_name] for place in places if place.full_name in found}
    chosen = choose(stats, {place.name: place.weight for place in places}, lever)
    record.outliers = {name: one for name, one in chosen.items() if one.smooth is not None or one.columns is not None}
    record.errors, record.rows = measure(model, places, format, record.outliers, calibrate)
    for place in places:
        error = record.errors.get(place.name)
        if error is None:
            record.kept_full[place.name] = "the calibration batch does not reach it"
        elif error > bound:
            record.kept_full[place.name] = f"its error in {format} is {error:.3f}, above the bound of {bound:g}"
        else:
            record.frozen.append(place.name)
    if not record.frozen:
        return _none_within(asked, record)
    record.outliers = {name: _on_cpu(one) for name, one in record.outliers.items() if name in record.frozen}
    return record


def _nothing_to_freeze(asked: FrozenCompute, kept: dict[str, str], record: FrozenRecord) -> FrozenRecord:
    """No linear may be rounded: what was asked for by name is refused, `auto` says so."""
    reasons = [*kept.values()]
    most = max(reasons, key=reasons.count, default="it has none")
    told = f"none of this model's {len(kept)} linears can be rounded, most of them because: {most}"
    if asked != "auto":
        raise ConfigError(f"frozen_compute: got {asked}, and {told}.", "Set it to full, or train lora.")
    record.why = f"auto: full, as {told}"
    return record


def _none_within(asked: FrozenCompute, record: FrozenRecord) -> FrozenRecord:
    """Every linear was measured and none may be rounded: as above."""
    least = min(record.errors.values(), default=None)
    told = (
        "the calibration batch reaches none of them"
        if least is None
        else f"the least error in {record.format} is {least:.2g}, above the bound of {record.bound:g}"
    )
    if asked != "auto":
        raise ConfigError(
            f"frozen_compute: got {asked}, and no linear of this model can be rounded: {told}.",
            "Set it to full, or allow more with frozen_error_bound.",
        )
    record.why = f"auto: full, as {told}"
    record.format, record.head, record.outliers = None, False, {}
    return record


def _on_cpu(one: Outliers) -> Outliers:
    """The record goes to other processes and into a file."""
    return Outliers(*(None if t is None else t.cpu() for t in (one.smooth, one.columns)))


def find_places(model: nn.Module) -> tuple[list[Place], dict[str, str]]:
    """Linears that may be frozen, in the model's order, and name → reason for those that may not."""
    kept: dict[str, str] = {}
    below = _owners(model)
    heads = [
        end for m in model.modules() if isinstance(m, PreTrainedModel) and (end := embeddings_of(m)[1]) is not None
    ]
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    places = []
    for full_name, module in model.named_modules():
        if not isinstance(module, LINEARS):
            continue
        owner = below.get(id(module))
        if owner is None and id(module) in below:
            continue  # an adapter's own A or B
        name = plain_name(full_name)
        reason = _refusal(module, owner, any(end is module or end is owner for end in heads), users)
        above, _, own = full_name.removesuffix(".base_layer").rpartition(".")
        if not reason and own in weights_read(original_class(model.get_submodule(above))):
            reason = "the module that it is in reads its weight"
        if reason:
            kept[name] = reason
        else:
            places.append(Place(name, full_name, module))
    return places, kept


def plain_name(full_name: str) -> str:
    """A linear's name in the model below peft's wrappers."""
    return full_name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _owners(model: nn.Module) -> dict[int, nn.Module | None]:
    """Modules below peft's layers: id → the layer whose base it is, None for the adapter's own parts."""
    found: dict[int, nn.Module | None] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper):
            own, copied = cast(nn.Module, layer), isinstance(layer, ModulesToSaveWrapper)
            base = None if copied else cast(Any, layer).get_base_layer()
            for inner in own.modules():
                if copied or inner is base:
                    found[id(inner)] = own
                elif inner is not own and not isinstance(inner, BaseTunerLayer):
                    found.setdefault(id(inner), None)
    return found


def _refusal(module: Any, owner: Any, head: bool, users: dict[int, int]) -> str | None:
    """Why this linear stays in full precision, None where it may be frozen."""
    weight = module.weight
    if weight.requires_grad:
        return "it trains"
    if isinstance(owner, ModulesToSaveWrapper):
        return "a copy of it trains"
    if head:
        return "it is the output head (model.frozen_head)"
    if owner is not None:
        if not isinstance(owner, LoraLayer):
            return f"peft's {type(owner).__name__} may read its weight as numbers"
        reason = why_not(cast(nn.Module, owner))
        if reason:
            return f"the adapter on it has no fused form: {reason}"
        if owner.merged:
            return "an adapter is merged into it"
    if users[id(weight)] > 1:
        return "its weight is tied to another module's"
    if type(module) not in LINEARS:
        return f"it is a {type(module).__name__} with a forward of its own"
    if hooked(module):
        return "hooks stand on it"
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dim() != 2:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}"
    if min(weight.shape) < SMALLEST:
        return f"with {min(weight.shape)} inputs or outputs it is too small to gain"
    return None


def measure(
    model: nn.Module,
    places: Iterable[Place],
    format: Format,
    outliers: dict[str, Outliers],
    calibrate: Callable[[], object] | None,
) -> tuple[dict[str, float], int]:
    """‖y_format − y‖ / ‖y‖ of every linear that is reached, over all its calls; and the rows of the longest input.

    One layer's codes at a time are in memory. Without data: on rows of random numbers.
    """
    sums: dict[str, list[Tensor]] = {}
    rows = 0

    def note(place: Place, x: Tensor, y: Tensor) -> None:
        nonlocal rows
        flat, want = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        stride = max(1, len(flat) // MEASURED_ROWS)
        flat, want = flat[::stride], want[::stride]
        if not len(flat):
            return
        rows = max(rows, len(flat))
        one = outliers.get(place.name, Outliers())
        frozen = freeze(place.weight, format, smooth=one.smooth, columns=one.columns)
        (got,) = products(flat, [frozen], [place.module.bias], [None], False)  # type: ignore[list-item]
        off, size = (got.double() - want.double()).square().sum(), want.double().square().sum()
        before = sums.setdefault(place.name, [off.new_zeros(()), off.new_zeros(())])
        before[0] += off
        before[1] += size

    if calibrate is None:
        for place in places:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(256, place.weight.shape[1], generator=generator).to(place.weight.device, place.weight.dtype)
            with torch.no_grad():
                note(place, x, place.module(x))
        rows = 0
    else:
        handles = [
            place.module.register_forward_hook(lambda _, inputs, y, place=place: note(place, inputs[0], y))
            for place in places
        ]
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with torch.no_grad():
                calibrate()
        finally:
            for handle in handles:
                handle.remove()
            for module, was in modes:
                module.training = was
    found = {name: float((off / size.clamp_min(1e-300)).sqrt()) for name, (off, size) in sums.items()}
    broken = [name for name, error in found.items() if not error < float("inf")]
    if broken:
        raise Diverged(
            f"frozen_compute: {broken[0]} and {len(broken) - 1} other linears give numbers that are not finite on the "
            "calibration batch.",
            "Look for what breaks the model with frozen_compute full, on the same data.",
        )
    return found, rows


def apply(model: nn.Module, record: FrozenRecord, backend: Backend, rows: RowSeeds) -> dict[str, str]:
    """Freeze what the record says, in place, and give the linears their class. Returns name → format.

    Raises:
        ConfigError: the record is of another model.
    """
    if record.format is None:
        return {}
    places = {place.name: place for place in find_places(model)[0]}
    missing = [name for name in record.frozen if name not in places]
    if missing:
        raise ConfigError(
            f"frozen_compute: {len(missing)} linears that were frozen in training can't be here, {missing[0]} first.",
            "Use the model and the adapter settings of the run.",
        )
    wanted = {name: places[name] for name in record.frozen}
    for place in list(wanted.values())[:1]:
        refuse_missing(record.format, place.weight.device)
    for group in _together(model, wanted, record):
        one = record.outliers.get(group[0].name, Outliers())
        with torch.no_grad():
            frozen = freeze_siblings(
                [place.weight for place in group],
                record.format,
                smooth=one.smooth,
                columns=one.columns,
                spare_gradients=record.lever in ("columns", "both"),
            )
        for place, weight in zip(group, frozen, strict=True):
            module, cls = place.module, original_class(place.module)
            state = Fused(cls, "frozen_linear", backend, rows, salt_of(place.name), {"name": place.name})
            swap(module, subclass(cls, FrozenForward), state)
            put(module, weight)
    return dict.fromkeys(record.frozen, record.format)


def _together(model: nn.Module, wanted: dict[str, Place], record: FrozenRecord) -> Iterator[list[Place]]:
    """The linears in groups whose codes lie in one stack: siblings that read one input and treat it alike."""
    done: set[str] = set()
    for full_name, parent in model.named_modules():
        name = plain_name(full_name)
        for children in shared_inputs(original_class(parent)):
            names = [f"{name}.{child}" if name else child for child in children]
            members = [wanted[n] for n in names if n in wanted and n not in done]
            alike = [m for m in members if _alike(m, members[0], record)]
            if len(alike) > 1:
                done |= {m.name for m in alike}
                yield alike
    for name, place in wanted.items():
        if name not in done:
            yield [place]


def _alike(one: Place, first: Place, record: FrozenRecord) -> bool:
    same = one.weight.shape[1] == first.weight.shape[1] and one.weight.dtype == first.weight.dtype
    mine, its = record.outliers.get(one.name), record.outliers.get(first.name)
    return same and one.weight.device == first.weight.device and _same_outliers(mine, its)


def _same_outliers(one: Outliers | None, other: Outliers | None) -> bool:
    if one is other or one is None or other is None:
        return one is other
    pairs = ((one.smooth, other.smooth), (one.columns, other.columns))
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
