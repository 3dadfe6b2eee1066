"""bitsandbytes' 8-bit linears as a run has them: one product, in training and in evaluation, fused or not."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from comparing import changed
from quantised_models import layer
from tiny import assemble
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from wide_models import maker, settings

from peft_engine.adapters.fusing.quantised import is_quantised, quantised_of
from peft_engine.int8_linear import unround
from peft_engine.quantised import dequantised, quantised_linears
from peft_engine.run import train
from peft_engine.using import evaluate


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("wide"), pytest.MonkeyPatch())


def made(out: int, features: int, bias: bool) -> Any:
    torch.manual_seed(out)
    source = nn.Linear(features, out, bias)
    source.weight.data[0] *= 30
    return layer(source, "int8")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "out", "bias"), [((2, 5, 37), 21, True), ((3, 64), 5, False), ((7,), 1, True)])
def test_it_is_the_dequantised_weight_that_is_multiplied(shape, out, bias, training) -> None:
    linear = made(out, shape[-1], bias).train(training)
    weight = dequantised(linear).double()
    unround(linear)
    x = torch.randn(shape, requires_grad=True)
    y = linear(x)
    wanted = x.detach().double() @ weight.T + (linear.bias.double() if bias else 0)
    assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    dy = torch.randn_like(y)
    y.backward(dy)
    grad = dy.double() @ weight
    assert torch.allclose(x.grad.double(), grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()))
    assert type(linear).__name__ == "Linear8bitLt"
    assert isinstance(linear, bnb.nn.Linear8bitLt)
    assert is_quantised(linear)
    assert torch.equal(dequantised(linear).double(), weight)


def test_bitsandbytes_itself_rounds_x_in_evaluation() -> None:
    """The trap, so that the test above is known to see it."""
    linear = made(21, 37, False).eval()
    x = torch.randn(5, 37)
    wanted = x @ dequantised(linear).T
    assert float((linear(x) - wanted).abs().max()) > 1e-3 * float(wanted.abs().max())


def test_nothing_but_the_codes_is_kept_for_the_way_back() -> None:
    linear = made(64, 96, True)
    unround(linear)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(torch.randn(4, 96, requires_grad=True))
    assert {t.data_ptr() for t in kept} == {linear.weight.data_ptr(), linear.weight.SCB.data_ptr()}


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_products_are_in_its_dtype(training) -> None:
    linear = made(21, 37, True).train(training)
    unround(linear)
    x = torch.randn(5, 37, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    weight = dequantised(linear).bfloat16()
    assert torch.equal(x.grad, (torch.ones(5, 21).bfloat16() @ weight).float())


def dequantised_checkpoint(source, folder):
    """A plain model with the numbers that int8 makes of its linears."""
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not model.lm_head:
            turned = isinstance(module, Conv1D)
            weight = module.weight.data.T if turned else module.weight.data
            codes, scale, _ = functional.int8_vectorwise_quant(weight.contiguous().half())
            numbers = functional.int8_vectorwise_dequant(codes, scale)
            module.weight.data = numbers.T.contiguous() if turned else numbers
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kernels", "adapter"),
    [("off", {"dropout": 0.0}), ("auto", {"method": "houlsby"}), ("auto", {"method": "pfeiffer"})],
)
def test_unfused_linears_compute_what_the_dequantised_model_computes(kernels, adapter, wide, tmp_path) -> None:
    given = settings(wide("llama"), tmp_path, model={"quantization": "int8"}, adapter=adapter)
    found = train(changed(given, kernels=kernels))
    folder = dequantised_checkpoint(wide("llama"), tmp_path / "plain")
    plain = settings(folder, tmp_path / "real", model={"quantization": "none"}, adapter=adapter)
    wanted = train(changed(plain, kernels=kernels))
    for when in ("before", "after"):
        assert found["metrics"][when]["loss"] == pytest.approx(wanted["metrics"][when]["loss"], rel=2e-6), when
    assert evaluate(tmp_path / "run")["metrics"] == found["metrics"]["after"]


def test_those_of_a_run_are_fused_as_ever(wide, tmp_path) -> None:
    group = assemble(settings(wide("gpt2"), tmp_path, model={"quantization": "int8"})).group
    linears = quantised_linears(group.model)
    assert len(linears) == 8
    assert all(quantised_of(linear) is not None for linear in linears.values())
