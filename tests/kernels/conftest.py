"""Kernel tests run in a process of their own: Triton's interpreter must be on before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
