"""Which path an op takes is asked for or recorded, never guessed."""

import pytest
import torch

from peft_kernels._launch import compute_dtype, use_triton


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_compute_dtype_never_narrows(dtype, wide):
    assert compute_dtype(torch.zeros(1, dtype=dtype)) == wide


def test_auto_stays_with_torch_on_cpu():
    assert use_triton(torch.zeros(2), "auto") is False
    assert use_triton(torch.zeros(2), "torch") is False


def test_triton_runs_on_cpu_only_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(torch.zeros(2), "triton") is True
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"needs a CUDA tensor, got one on cpu.*backend='torch'"):
        use_triton(torch.zeros(2), "triton")


def test_refusals_name_what_was_got(monkeypatch):
    with pytest.raises(ValueError, match="got 'cuda'"):
        use_triton(torch.zeros(2), "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="float64"):
        use_triton(torch.zeros(2, dtype=torch.float64), "triton")


def test_triton_asked_for_and_not_installed(monkeypatch):
    monkeypatch.setattr("peft_kernels._launch.triton_installed", lambda: False)
    assert use_triton(torch.zeros(2), "auto") is False
    with pytest.raises(ValueError, match="not installed"):
        use_triton(torch.zeros(2), "triton")
