"""Launchers of `peft_kernels.lora_linear`: forward kernels in `lora_forward`, backward kernels in `lora_backward`."""

from .lora_backward import launch_da, launch_ds_db, launch_dx, launch_seeded_dgemm
from .lora_forward import launch_down, launch_seeded_gemm

__all__ = ["launch_da", "launch_down", "launch_ds_db", "launch_dx", "launch_seeded_dgemm", "launch_seeded_gemm"]
