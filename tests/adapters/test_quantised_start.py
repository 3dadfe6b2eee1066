"""Starts of LoRA on quantised weights, against what numpy makes of the checkpoint, and the base that they leave."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from comparing import changed, outcome, train_and_crash
from peft import PeftModel
from safetensors.torch import load_file
from tiny import assemble
from transformers import AutoModelForCausalLM
from wide_models import maker, settings

from peft_engine.adapters.quantised_start import lora_layers
from peft_engine.config import Config
from peft_engine.errors import ConfigError, VerificationError
from peft_engine.merging import merge
from peft_engine.quantised import dequantised, kind_of
from peft_engine.run import train
from peft_engine.using import evaluate, export, open_run

STARTS = ["loftq", "pissa", "pissa_niter_8", "olora"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("wide"), pytest.MonkeyPatch())


def at_start(given: Config) -> dict[str, tuple[torch.Tensor, torch.Tensor, Any]]:
    """Linear → base weight and s·B·A in float64, and the layer."""
    found = {}
    for name, layer in lora_layers(assemble(given).group.model, "default").items():
        a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        found[name] = dequantised(layer.get_base_layer()).double(), layer.scaling["default"] * b @ a, layer
    return found


def error(weight: torch.Tensor, found: torch.Tensor) -> float:
    return float((weight - found).norm() / weight.norm())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("rslora", [False, True])
def test_loftq_is_the_best_mending_of_its_rank(kind, rslora, wide, tmp_path) -> None:
    """Errors against numpy's singular values; the base is the one that bitsandbytes makes."""
    adapter = {"init": "loftq", "alpha": 24, "rslora": rslora, "rank_pattern": {"v_proj": 9}}
    given = settings(wide("llama"), tmp_path, model={"quantization": kind}, adapter=adapter)
    plain = at_start(changed(given, adapter__init="default"))
    stored = load_file(wide("llama") / "model.safetensors")
    for name, (base, update, layer) in at_start(given).items():
        weight = stored[f"{name}.weight"].double()
        assert torch.equal(base, plain[name][0])
        values = np.linalg.svd((weight - base).numpy(), compute_uv=False)
        rank = layer.r["default"]
        assert rank == (9 if "v_proj" in name else 4)
        assert float((weight - base - update).norm()) == pytest.approx(float(np.linalg.norm(values[rank:])), rel=1e-3)
        assert error(weight, base + update) < error(weight, base)
        assert {p["default"].weight.dtype for p in (layer.lora_A, layer.lora_B)} == {torch.float32}


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
def test_what_is_quantised_is_what_the_start_left(init, wide, tmp_path) -> None:
    given = settings(wide("llama"), tmp_path, adapter={"init": init, "rank": 8})
    stored = load_file(wide("llama") / "model.safetensors")
    plain = at_start(changed(given, adapter__init="default"))
    better = []
    for name, (base, update, layer) in at_start(given).items():
        weight = stored[f"{name}.weight"].double()
        codes, state = functional.quantize_4bit((weight - update).float(), quant_type="nf4", compress_statistics=True)
        assert kind_of(layer.get_base_layer()) == "nf4"
        wanted = functional.dequantize_4bit(codes, state).double()
        assert error(wanted, base) < 1e-3  # a number at the edge of two codes may fall either way
        better.append(error(weight, base + update) < error(weight, plain[name][0]))
    if init.startswith("pissa"):
        assert all(better)


def test_orthogonal_is_not_cast_to_codes(wide, tmp_path) -> None:
    """peft makes A and B in the dtype of the weight, which is uint8 here."""
    found = at_start(settings(wide("llama"), tmp_path, adapter={"init": "orthogonal"}))
    for _, update, layer in found.values():
        down = layer.lora_A["default"].weight.detach()
        assert float(down.frac().abs().max()) > 0
        assert float(update.norm()) < 1e-4  # A·B = 0 at the start


@pytest.mark.parametrize("init", STARTS)
def test_the_base_that_results_is_trained_used_and_exported(init, wide, tmp_path, monkeypatch) -> None:
    given = settings(wide("llama"), tmp_path, adapter={"init": init})
    summary = train(given)
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]["after"]
    trained = assemble(given).group
    opened = open_run(tmp_path / "run").group
    here, there = (lora_layers(one.model, "default") for one in (trained, opened))
    for name, layer in here.items():
        assert torch.equal(dequantised(layer.get_base_layer()), dequantised(there[name].get_base_layer())), name
        assert there[name].lora_A["default"].weight.shape == layer.lora_A["default"].weight.shape
    folder, drift = export(tmp_path / "run", merged=True)
    held = drift.bases["full precision"]
    monkeypatch.setattr("peft_engine.drift.MIN_TOP1", 0.0)
    alone = export(tmp_path / "run")[1]
    assert alone.relative < 1e-3
    if init == "loftq":
        assert alone.held_out is None
    else:  # the file is for the model's own weights, what was trained had a rounded rest: told, and bounded
        assert alone.held_out.kl == pytest.approx(held.kl, rel=1e-3)
        assert alone.held_out.kl > 1e-4
        monkeypatch.setattr("peft_engine.drift.MIN_TOP1", 1.1)
        with pytest.raises(VerificationError, match="The adapter on the model's own weights is not what was trained"):
            export(tmp_path / "run")
        with pytest.raises(ConfigError, match=f"began with {init} over rounded weights"):
            merge([(str(tmp_path / "run"), 1.0), (str(tmp_path / "run"), 0.0)], tmp_path / "sum")
        assert "This file is for the model's own weights" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert drift.base == "dequantised"
    assert drift.bases["dequantised"].kl < 1e-4
    assert (folder / "merge.json").is_file()
    broken = changed(given, output=str(tmp_path / "broken"))
    train_and_crash(monkeypatch, broken, 5)
    train(broken, resume=True)
    assert outcome(broken.output) == outcome(given.output)


@pytest.mark.parametrize("init", STARTS)
def test_the_file_loads_in_plain_peft_without_a_start_of_its_own(init, wide, tmp_path) -> None:
    train(settings(wide("llama"), tmp_path, adapter={"init": init}))
    base: Any = AutoModelForCausalLM.from_pretrained(wide("llama"))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    assert plain.peft_config["default"].init_lora_weights is True
    after = plain.get_base_model().state_dict()
    for name, tensor in before.items():
        assert torch.equal(after.get(name, after.get(f"{name.removesuffix('.weight')}.base_layer.weight")), tensor)


def test_dora_starts_from_the_norms_of_its_start(wide, tmp_path) -> None:
    found = at_start(settings(wide("llama"), tmp_path, adapter={"init": "pissa", "dora": True}))
    for base, update, layer in found.values():
        scales = layer.lora_magnitude_vector["default"].weight.detach().double()
        assert torch.allclose(scales, (base + update).norm(dim=1), rtol=1e-4)


def test_what_does_not_go_is_told(wide, tmp_path) -> None:
    given = settings(wide("llama"), tmp_path, adapter={"init": "loftq"})
    with pytest.raises(ConfigError, match="this one is in full precision"):
        assemble(changed(given, model__quantization="none"))
    with pytest.raises(ConfigError, match="lm_head is not quantised"):
        assemble(changed(given, adapter__targets=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="lora-ga reads the gradient of weights"):
        changed(given, adapter__init="lora-ga")


def test_eva_reads_inputs_and_goes(wide, tmp_path) -> None:
    summary = train(settings(wide("llama"), Path(tmp_path), adapter={"init": "eva"}))
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]["after"]


def test_a_start_from_other_roundings_is_told(wide, tmp_path, caplog) -> None:
    """The tensors are the same, what they were trained over is not here."""
    train(settings(wide("llama"), tmp_path, adapter={"init": "pissa", "alpha": 8}))
    Path(tmp_path / "run").rename(tmp_path / "first")
    for kind, told in (
        ("nf4", "over what pissa had left of the weights in nf4"),
        ("none", "quantization nf4, and this"),
    ):
        start = {"start_from": str(tmp_path / "first"), "rank": 8, "alpha": 16}
        given = changed(settings(wide("llama"), tmp_path, adapter=start), output=str(tmp_path / kind))
        found = train(given.model_copy(update={"model": given.model.model_copy(update={"quantization": kind})}))
        assert found["started_from"]["same_backbone"] is False
        assert told in caplog.text
