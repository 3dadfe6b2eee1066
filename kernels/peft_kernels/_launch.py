"""What every op shares: may Triton run here, and which path the caller gets. Imports without triton."""

import importlib.util
import os
from typing import Literal, get_args

import torch

Backend = Literal["auto", "triton", "torch"]


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """fp32 for anything narrower; fp64 stays fp64, so that gradcheck means something."""
    return torch.promote_types(x.dtype, torch.float32)


def interpreted() -> bool:
    """True when TRITON_INTERPRET=1, so kernels run (slowly) on CPU tensors. For the kernel tests only."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(x: torch.Tensor, backend: Backend) -> bool:
    """Pick the path once, from what was asked and where `x` lives. Never falls back in silence."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}.")
    installed = importlib.util.find_spec("triton") is not None
    if backend == "triton":
        if not installed:
            raise ValueError("backend='triton' needs the triton package, which is not installed. Use backend='torch'.")
        if not (x.is_cuda or interpreted()):
            raise ValueError(
                f"backend='triton' needs a CUDA tensor, got one on {x.device}. Use backend='torch' or 'auto'."
            )
        if x.dtype == torch.float64:
            raise ValueError("backend='triton' computes in float32; use backend='torch' for float64.")
    return backend == "triton" or (backend == "auto" and installed and x.is_cuda and x.dtype != torch.float64)
