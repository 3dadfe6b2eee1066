"""Triton kernels and their launchers, imported only when they run."""
