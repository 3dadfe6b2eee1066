"""What every op shares: may Triton run here, and which path the caller gets. Imports without triton."""

import importlib.util
import os
from functools import cache
from typing import Literal, get_args

import torch

Backend = Literal["auto", "triton", "torch"]


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """fp32 for anything narrower; fp64 stays fp64, so that gradcheck means something."""
    return torch.promote_types(x.dtype, torch.float32)


def interpreted() -> bool:
    """True when TRITON_INTERPRET=1, so kernels run (slowly) on CPU tensors. For the kernel tests only."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def triton_installed() -> bool:
    """Asked once: looking for a package takes as long as a small kernel."""
    return importlib.util.find_spec("triton") is not None


@cache
def tensor_core_dot(device: int) -> bool:
    """Whether Triton's `tl.dot` uses this GPU's tensor cores: from Ampere (sm_80) on. On Turing it is scalar code."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def use_triton(x: torch.Tensor, backend: Backend) -> bool:
    """Pick the path once, from what was asked and where `x` lives. Never falls back in silence."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}.")
    installed = triton_installed()
    if backend == "triton":
        if not installed:
            raise ValueError("backend='triton' needs the triton package, which is not installed. Use backend='torch'.")
        if not (x.is_cuda or interpreted()):
            raise ValueError(
                f"backend='triton' needs a CUDA tensor, got one on {x.device}. Use backend='torch' or 'auto'."
            )
        if x.dtype == torch.float64:
            raise ValueError("backend='triton' computes in float32; use backend='torch' for float64.")
    if backend == "auto":
        return installed and x.is_cuda and x.dtype != torch.float64 and tensor_core_dot(x.get_device())
    return backend == "triton"
