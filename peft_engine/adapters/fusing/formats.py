"""Which format the frozen products run in: what this device has units for, and what `auto` measures."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from peft_kernels import _compiled as compiled
from peft_kernels._frozen_units import Format
from peft_kernels._launch import use_triton
from peft_kernels.fp8_linear import cuda_units
from peft_kernels.frozen_weight import FrozenWeight, freeze
from peft_kernels.int8_linear import cpu_units
from peft_kernels.lora_linear import Projection, lora_linear

from ...errors import ConfigError

FrozenCompute = Literal["full", "bf16", "int8", "fp8", "auto"]
PAYS = 1.2
"""`auto` leaves full precision for a format that is this much faster."""
TIE = 1.05
"""int8, half the bytes of bf16, is taken before it up to this ratio of times."""
ROWS = 1024
ROUNDS = 7


def refuse_missing(format: Format, device: torch.device) -> None:
    """Raise ConfigError where a format was asked for by name and this device can't multiply it."""
    reason = _lacks(format, device)
    if reason:
        raise ConfigError(
            f"model.frozen_compute: got {format}, and {reason}.",
            "Set auto, which takes what pays here, or full.",
        )


def _lacks(format: Format, device: torch.device) -> str | None:
    """Why this device can't multiply a format, None where it can."""
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        major, minor = torch.cuda.get_device_capability(index)
        if format == "fp8" and not cuda_units(index):
            return f"fp8 units begin with sm_89 (Ada, Hopper); this GPU is sm_{major}{minor}"
        if format == "int8" and (major, minor) < (7, 5):
            return f"int8 units begin with sm_75 (Turing); this GPU is sm_{major}{minor}"
        if format == "bf16" and major < 8:
            return f"bf16 units begin with sm_80 (Ampere); this GPU is sm_{major}{minor}"
        return None
    if device.type == "cpu":
        return "CPUs have no fp8 units" if format == "fp8" else None
    return f"it runs on CUDA and on CPUs; the model is on {device.type}"


def _notes(format: Format, device: torch.device) -> str:
    """What is worth knowing of a format that was asked for by name."""
    if device.type != "cpu":
        return ""
    if format == "int8":
        units = cpu_units()
        return (
            f" ({units} units)"
            if units
            else "; this CPU shows no int8 units (VNNI, AMX), so it may be slower than full"
        )
    return "" if "bf16" in _cpu_flags() else "; this CPU shows no bf16 units, so it may be slower than full"


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def decide_format(
    asked: FrozenCompute, device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Format | None, str]:
    """The format, None for full precision, and how it came about.

    Args:
        shape: (N, K) of the model's commonest frozen linear; `auto` times it.
        dtype: that training computes in.

    Raises:
        ConfigError: a format asked for by name that this device can't multiply.
    """
    if asked not in get_args(FrozenCompute):
        raise ConfigError(
            f"frozen_compute must be one of {', '.join(get_args(FrozenCompute))}, got {asked!r}.", "Use auto."
        )
    if asked == "full":
        return None, "full: asked for"
    if asked != "auto":
        refuse_missing(asked, device)
        return asked, f"{asked}: asked for{_notes(asked, device)}"
    formats: list[Format] = [one for one in get_args(Format) if _lacks(one, device) is None]
    if dtype == torch.bfloat16:
        formats = [one for one in formats if one != "bf16"]  # that is what full is
    if not formats:
        return None, f"auto: full, as this device ({device.type}) has no units for another format"
    seconds = time_formats(formats, device, shape, dtype)
    return chosen(seconds, shape)


def chosen(seconds: dict[str, float], shape: tuple[int, int]) -> tuple[Format | None, str]:
    """What `auto` makes of its figures: seconds by format, "full" among them."""
    best = min((one for one in seconds if one != "full"), key=seconds.__getitem__)
    if best == "bf16" and "int8" in seconds and seconds["int8"] <= TIE * seconds["bf16"]:
        best = "int8"
    gain = seconds["full"] / seconds[best]
    figures = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
    told = f"{ROWS} rows through {shape[1]} → {shape[0]} and back: {figures}"
    if gain < PAYS:
        return None, f"auto: full, as {best} would be {gain:.2f} times as fast and {PAYS} is where it pays ({told})"
    return best, f"auto: {best}, {gain:.2f} times as fast as full ({told})"  # type: ignore[return-value]


def time_formats(
    formats: list[Format], device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, float]:
    """Median seconds of one frozen linear, forward and backward with all passes, by format and for "full"; in turn."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    weight, x, dy = random(*shape) / shape[1] ** 0.5, random(ROWS, shape[1]), random(ROWS, shape[0])
    held: dict[str, Tensor | FrozenWeight] = {"full": weight, **{one: freeze(weight, one) for one in formats}}
    seconds: dict[str, list[float]] = {name: [] for name in held}
    x.requires_grad_(True)
    for turn in range(ROUNDS + 2):
        for name, one in held.items():
            taken = _timed(device, lambda one=one: torch.autograd.grad(lora_linear(x, Projection(one)), x, dy))  # type: ignore[misc]
            if turn >= 2:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _timed(device: torch.device, run: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.enable_grad():
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def passes_status(device: torch.device) -> str:
    """How the passes round the products run: compiled or plain, and why; for the record."""
    if device.type == "cpu":
        return compiled.status()
    return "Triton" if use_triton(torch.empty(0, device=device), "auto") else "plain torch"
