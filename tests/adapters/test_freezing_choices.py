"""What is frozen and how that is chosen: the bound on errors, formats, `auto`, records of earlier choices."""

import copy
from pathlib import Path

import pytest
import torch
from families import adapt, batch_of, evaluating, make, pair, step
from frozen_models import calibrated, off
from torch import Tensor

from peft_engine.adapters.fusing import fuse
from peft_engine.adapters.fusing.formats import chosen, decide_format
from peft_engine.adapters.fusing.frozen_linear import frozen_of
from peft_engine.adapters.fusing.frozen_record import read_record, write_record
from peft_engine.errors import ConfigError, Diverged, StorageError


def test_layers_above_the_bound_stay_in_full_precision() -> None:
    """A large channel that weighs little in the output rounds all others away: its readers stay, a lever mends them."""
    model = adapt(make("llama"))
    layer = model.base_model.model.model.layers[1]
    with torch.no_grad():
        layer.post_attention_layernorm.weight[5] = 3000.0
        for one in (layer.mlp.gate_proj, layer.mlp.up_proj):
            one.base_layer.weight[:, 5] *= 1e-5
    batch = batch_of("llama")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    fresh = copy.deepcopy(model)
    settings = {"frozen_outliers": "none", "frozen_error_bound": 0.03}
    report = fuse(model, "auto", "int8", calibrate=lambda: model(**inputs), **settings)  # type: ignore[arg-type]
    name = "model.layers.1.mlp.gate_proj"
    errors = report.record.errors
    assert {n for n in report.kept_full if n in errors} == {name, name.replace("gate", "up")}
    assert "above the bound of 0.03" in report.kept_full[name]
    for lever in ("smooth", "columns", "both"):
        other = copy.deepcopy(fresh)
        mended = fuse(
            other,
            "auto",
            "int8",
            frozen_outliers=lever,
            calibrate=lambda other=other: other(**inputs),
            frozen_error_bound=0.03,
        )
        assert mended.record.errors[name] < 0.03
        assert name in mended.frozen


def test_errors_are_those_of_the_layers_on_the_batch() -> None:
    """Computed once more here, by hooks on the plain and the frozen model's own layers."""
    model, plain = pair("llama")
    batch = batch_of("llama")
    report = calibrated(model, batch)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    base = plain.base_model.model
    for name in report.frozen:
        base.get_submodule(f"{name}.base_layer").register_forward_hook(
            lambda _, inputs, y, name=name: seen.__setitem__(name, (inputs[0], y))
        )
    with evaluating(plain, model):
        plain(**batch)
        for name, (x, y) in seen.items():
            got = model.base_model.model.get_submodule(f"{name}.base_layer")(x)
            assert report.record.errors[name] == pytest.approx(off(got, y), rel=1e-3)
    assert set(seen) == set(report.frozen)


def test_without_data_errors_are_measured_on_random_numbers() -> None:
    model = adapt(make("llama"))
    report = fuse(model, frozen_compute="int8")
    assert report.frozen
    assert "on random numbers" in report.told()
    assert all(0 < error < 0.05 for error in report.record.errors.values())
    with pytest.raises(ConfigError, match="frozen_outliers: smooth needs a calibration batch"):
        fuse(adapt(make("llama")), frozen_compute="int8", frozen_outliers="smooth")
    with pytest.raises(ConfigError, match="bf16 has no outliers"):
        calibrated(adapt(make("llama")), batch_of("llama"), "bf16", frozen_outliers="smooth")


def test_a_batch_that_breaks_the_model_is_refused() -> None:
    model = adapt(make("llama"))
    with torch.no_grad():
        model.base_model.model.model.layers[0].input_layernorm.weight[0] = torch.nan
    with pytest.raises(Diverged, match="numbers that are not finite on the calibration batch"):
        calibrated(model, batch_of("llama"), frozen_outliers="none")
    with pytest.raises(Diverged, match=r"1 of 32 input channels of .*q_proj are not finite on the calibration batch"):
        calibrated(model, batch_of("llama"))
    assert not any(frozen_of(m) is not None for m in model.modules())


@pytest.mark.parametrize("lever", ["none", "smooth", "columns", "both"])
def test_a_record_does_it_again_without_data(lever: str, tmp_path: Path) -> None:
    model, twin = pair("llama")
    with torch.no_grad():
        for one in (model, twin):
            one.base_model.model.model.layers[0].input_layernorm.weight[3] = 40.0
    batch = batch_of("llama")
    report = calibrated(model, batch, frozen_outliers=lever)
    assert bool(report.record.outliers) == (lever != "none")
    write_record(report.record, tmp_path / "frozen.safetensors")
    again = fuse(twin, record=read_record(tmp_path / "frozen.safetensors"))
    assert again.frozen == report.frozen
    spared = {weight.spare_gradients for m in twin.modules() if (weight := frozen_of(m)) is not None}
    assert spared == {lever in ("columns", "both")}
    assert again.kept_full == report.kept_full
    got, want = step(twin, batch), step(model, batch)
    assert torch.equal(got.logits, want.logits)
    assert all(g is None or torch.equal(g, want.grads[name]) for name, g in got.grads.items())

    with pytest.raises(ConfigError, match="linears that were frozen in training can't be here"):
        fuse(adapt(make("bert")), record=read_record(tmp_path / "frozen.safetensors"))
    with pytest.raises(StorageError, match="is missing: it says which weights were rounded"):
        read_record(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "frozen.safetensors").read_bytes()[:40])
    with pytest.raises(StorageError, match="can't be read"):
        read_record(tmp_path / "broken.safetensors")


def test_formats_that_a_cpu_lacks_or_has() -> None:
    with pytest.raises(ConfigError, match="got fp8, and CPUs have no fp8 units"):
        fuse(adapt(make("llama")), frozen_compute="fp8")
    with pytest.raises(ConfigError, match="frozen_compute must be one of"):
        fuse(adapt(make("llama")), frozen_compute="int4")  # type: ignore[arg-type]
    format, why = decide_format("int8", torch.device("cpu"), (64, 64), torch.float32)
    assert format == "int8"
    assert why.startswith("int8: asked for")
    assert decide_format("full", torch.device("cpu"), (64, 64), torch.float32)[0] is None
    with pytest.raises(ConfigError, match="runs on CUDA and on CPUs; the model is on mps"):
        decide_format("int8", torch.device("mps"), (64, 64), torch.float32)
    assert "no units for another format" in decide_format("auto", torch.device("mps"), (8, 8), torch.float32)[1]


@pytest.mark.parametrize(
    ("seconds", "format"),
    [
        ({"full": 1.0, "bf16": 0.5, "int8": 0.51}, "int8"),  # a tie, and half the bytes
        ({"full": 1.0, "bf16": 0.5, "int8": 0.54}, "bf16"),
        ({"full": 1.0, "bf16": 0.5, "int8": 0.4}, "int8"),
        ({"full": 1.0, "bf16": 0.9, "int8": 0.84}, None),
        ({"full": 1.0, "int8": 0.83}, "int8"),
        ({"full": 1.0, "int8": 0.3, "fp8": 0.2}, "fp8"),
    ],
)
def test_what_auto_makes_of_its_figures(seconds: dict[str, float], format: str | None) -> None:
    got, why = chosen(seconds, (8, 4))
    assert got == format
    assert why.startswith(f"auto: {format or 'full'}")
    assert "full 1000.00 ms" in why


def test_auto_measures_and_records() -> None:
    model = adapt(make("llama"))
    report = calibrated(model, batch_of("llama"), "auto")
    assert report.record.why.startswith("auto: ")
    assert "rows through" in report.record.why
    assert (report.record.format is None) == (not report.frozen)


def test_full_leaves_everything_as_it_was() -> None:
    model = adapt(make("llama"))
    report = fuse(model)
    assert (report.record, report.frozen, report.kept_full, report.told()) == (None, {}, {}, "full: asked for")
    assert "frozen" not in report.to_json()
