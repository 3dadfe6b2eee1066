"""What frozen linears in a narrow format can't be combined with."""

from collections.abc import Iterator, Mapping
from typing import Any

BOUND = 0.05
"""Of the error of a frozen linear, where none is set."""
PREFERENCE = ("dpo", "orpo", "kto", "reward")


def frozen_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(setting of `model`, what is wrong with it).

    Args:
        values: all settings, defaults filled in; required ones may be missing.
    """
    model, method = values.get("model") or {}, (values.get("adapter") or {}).get("method")
    compute, outliers = model.get("frozen_compute"), model.get("frozen_outliers")
    if compute in (None, "full"):
        for name in ("frozen_outliers", "frozen_head", "frozen_error_bound"):
            if model.get(name) not in (None, "auto", "none", "full", BOUND):
                yield name, "has no effect with model.frozen_compute full; set that to int8 or auto, or remove this"
        return
    if values.get("task") in PREFERENCE:
        yield "frozen_compute", f"got {compute}; task {values['task']} trains in the loop of TRL, with full only"
    if method == "full":
        yield "frozen_compute", f"got {compute}, and adapter.method full freezes nothing; write full, or train lora"
    if values.get("kernels") == "off":
        yield (
            "frozen_compute",
            f"got {compute}, which is one of the fused kernels, and kernels is off; set kernels: auto",
        )
    if compute == "bf16" and outliers not in (None, "auto", "none"):
        yield "frozen_outliers", f"got {outliers}, and bf16 has no outliers to mend; write auto, or take int8"
    if model.get("frozen_head") == "int8":
        if values.get("task") != "causal-lm":
            yield "frozen_head", "is read by the loss of task causal-lm only; remove it"
        elif method == "head":
            yield "frozen_head", "got int8, and adapter.method head trains it; write full"
        elif compute == "bf16":
            yield "frozen_head", "got int8 beside frozen_compute bf16; take int8 for both, or write full"
