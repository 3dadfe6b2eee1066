"""Where a run runs: device, precision, processes (through Accelerate), seeds, versions."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from . import processes
from .config import Config
from .config_checks import PREFERENCE
from .errors import ConfigError

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "triton",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
)


@dataclass(frozen=True)
class Runtime:
    """The machine a run was given.

    Attributes:
        accelerator: Accelerate's handle on device placement, autocast, the fp16 scaler and processes.
        precision: autocast dtype in use, "fp32" for none.
        why: how `auto` settings were decided; recorded in run.json.
        sharded: whether the backbone's frozen weights are shared out over the processes (FSDP2).
    """

    accelerator: Accelerator
    precision: str
    why: dict[str, str]
    sharded: bool = False

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process


def start(config: Config) -> Runtime:
    """Resolve `device` and `precision`, join the other processes of the run, and start Accelerate.

    Raises:
        ConfigError: the device or the precision that was asked for by name isn't there, or the processes were started
            in a way that this run can't go.
    """
    device, why_device = _device(config.device)
    precision, why_precision = _precision(config.training.precision, device)
    refuse_processes(config, device, processes.world(), int(os.environ.get("LOCAL_WORLD_SIZE", processes.world())))
    _refuse_launcher(config)
    processes.form(device)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over every new tensor
    torch.use_deterministic_algorithms(config.training.deterministic)
    allocator = "glibc keeps freed blocks" if device == "cpu" and keep_freed_memory() else "the library's defaults"
    AcceleratorState._reset_state()  # a second run in this process may want another precision
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=PRECISIONS[precision],
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1
        ),  # else a launcher's variable divides losses
    )
    if accelerator.num_processes != processes.world():
        raise ConfigError(
            f"{accelerator.num_processes} processes were started in a way that does not set WORLD_SIZE (MPI?).",
            "Use train --processes N, torchrun or accelerate launch.",
        )
    why = {"device": why_device, "precision": why_precision, "allocator": allocator}
    sharded = config.training.parallel == "fsdp" and processes.world() > 1
    if config.training.parallel == "fsdp" and not sharded:
        why["parallel"] = "fsdp was asked for; one process has nobody to share the backbone with"
    return Runtime(accelerator, precision, why, sharded)


def refuse_processes(config: Config, device: str, count: int, here: int) -> None:
    """Can `count` processes, `here` of them on this machine, make this run?

    Raises:
        ConfigError: fewer GPUs than processes, fewer sequences in a step than processes, or a device or a task that
            runs in one process.
    """
    if count == 1:
        return
    if device == "mps":
        raise ConfigError(f"{count} processes: Apple's GPU serves one.", "Start one, or set device: cpu.")
    if device == "cuda" and here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} processes, but this machine has {torch.cuda.device_count()} GPU(s): each needs its own.",
            "Start fewer, or set device: cpu.",
        )
    if count > config.training.batch_size:
        raise ConfigError(
            f"{count} processes, but training.batch_size is {config.training.batch_size} sequences over all of them.",
            "Start fewer, or raise training.batch_size.",
        )
    if config.task in PREFERENCE:
        raise ConfigError(f"Task {config.task} runs in one process, got {count}.", "Start one.")


def _refuse_launcher(config: Config) -> None:
    """What `accelerate launch` was told and the engine would not do."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError(
            "accelerate launch asks for DeepSpeed, which this engine does not use.",
            "Shard the backbone with training.parallel: fsdp, and launch with --multi_gpu instead of --use_deepspeed.",
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        asked = {name: os.environ.get(name, "") for name in ("FSDP_VERSION", "FSDP_OFFLOAD_PARAMS")}
        if config.training.parallel != "fsdp" or asked["FSDP_VERSION"] == "1" or asked["FSDP_OFFLOAD_PARAMS"] == "true":
            raise ConfigError(
                f"accelerate launch asks for FSDP ({asked}); the engine shards by itself, with FSDP2 and no offload.",
                "Set training.parallel: fsdp, and launch with --multi_gpu instead of --use_fsdp.",
            )
        # transformers would load the weights in one process only, for a wrapper that is never made
        del os.environ["ACCELERATE_USE_FSDP"]


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed for the next tensor, instead of giving it back to the kernel.

    A training step asks for the same large blocks again and again; fresh ones cost a page fault for every 4 KiB, about
    5% of a step on a CPU. The process keeps its peak. True where the C library took the settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # macOS, Windows, musl
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # of glibc's malloc.h
    limit = 2**31 - 1  # mallopt takes an int; 32 MiB is the most that it takes for mmap_threshold
    return bool(mallopt(mmap_threshold, 2**25) and mallopt(trim_threshold, limit) and mallopt(top_pad, 2**26))


def _device(asked: str) -> tuple[str, str]:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked != "auto":
        if not there[asked]:
            have = ", ".join(name for name, is_there in there.items() if is_there)
            raise ConfigError(f"device: got {asked!r}, but this machine has only: {have}.", "Set device: auto.")
        return asked, "asked for"
    return next((name, "auto: first of cuda, mps, cpu that is there") for name, is_there in there.items() if is_there)


def give_back_freed_memory() -> None:
    """Let glibc return to the kernel what is free now, in every thread's heap."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def device_of(config: Config) -> str:
    """The kind of device that `device` means here."""
    return _device(config.device)[0]


def _precision(asked: str, device: str) -> tuple[str, str]:
    if asked == "auto":
        if device != "cuda":
            return "fp32", f"auto: fp32 on {device}"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "auto: this GPU computes bf16"
        return "fp16", "auto: this GPU has no bf16 units"
    if asked == "fp16" and device == "cpu":
        raise ConfigError(
            "training.precision: got 'fp16' on cpu, which has no fp16 training.", "Use auto, fp32 or bf16."
        )
    return asked, "asked for"


def training_dtype(asked: str, device: str) -> torch.dtype | None:
    """The dtype of autocast that `training.precision` means on a kind of device; None where there is no autocast."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(_precision(asked, device)[0])


def seed_everything(*parts: int) -> None:
    """Seed Python, NumPy and torch (every device) from a tuple such as (seed, step, rank).

    Called before initialisation and at each optimizer step, so random state is a function of the position in the run:
    nothing has to be saved, and a resumed, retried or grouped step draws what the plain one drew.
    """
    word = combine(*parts)
    random.seed(word)
    np.random.seed(word % 2**32)  # noqa: NPY002 (libraries under us draw from it)
    torch.manual_seed(word % 2**63)


def combine(*parts: int) -> int:
    """One 64-bit number from several, well mixed."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "peft_engine": _version("peft-engine"),
    }
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def hardware() -> dict[str, Any]:
    """Name and size of what computes here."""
    found: dict[str, Any] = {"cpu": _cpu_name(), "cpu_threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "gpus": torch.cuda.device_count()}
    return found


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def memory_bytes() -> int | None:
    """Memory that this process may use: the machine's, or its container's limit; None where nothing says so."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(Path(name).read_text().strip()))
    return found


def machine() -> dict[str, Any]:
    """All of `versions` and `hardware`: what must stay for a run to give the same bits."""
    return {**versions(), **hardware()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_state() -> dict[str, Any] | None:
    """Commit of the current directory and whether it has changes; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
