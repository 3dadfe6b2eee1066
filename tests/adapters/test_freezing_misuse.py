"""Codes taken for numbers, and settings that mean nothing: each is an error, and what was there before still works."""

import copy
import math
from typing import Any

import pytest
import torch
from families import adapt, batch_of, evaluating, make, step
from frozen_models import calibrated, off
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_engine.adapters.fusing import fuse, unfuse
from peft_engine.adapters.fusing.frozen_linear import frozen_of
from peft_engine.errors import ConfigError

LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def halved(**options: Any) -> nn.Module:
    """The same model with weights half as large: the same codes, other scales."""
    model = adapt(make("llama"), **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "base_layer" in name:
                p.mul_(0.5)
    return model


def test_codes_do_not_load_as_weights() -> None:
    fused, plain = adapt(make("llama")), adapt(make("llama"))
    calibrated(fused, batch_of("llama"))
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.load_state_dict(fused.state_dict())
    weights = [name for name in before if name.endswith("base_layer.weight")]
    assert weights
    assert all(torch.equal(plain.state_dict()[name], before[name]) for name in weights)


@pytest.mark.parametrize("lever", ["none", "smooth"])
def test_codes_load_with_all_that_belongs_to_them(lever: str) -> None:
    batch = batch_of("llama")
    first, second = adapt(make("llama")), halved()
    for one in (first, second):
        calibrated(one, batch, frozen_outliers=lever)
    with evaluating(first, second):
        assert off(second(**batch).logits, first(**batch).logits) > 0.1
        second.load_state_dict(first.state_dict())
        assert torch.equal(second(**batch).logits, first(**batch).logits)


def test_the_norm_of_dora_follows_loaded_codes() -> None:
    batch = batch_of("llama")
    first, second = adapt(make("llama"), use_dora=True), halved(use_dora=True)
    for one in (first, second):
        calibrated(one, batch, frozen_outliers="none")
        step(one, batch)  # the norms are kept now
    second.load_state_dict(first.state_dict())
    assert torch.equal(step(second, batch).logits, step(first, batch).logits)


def test_codes_rounded_in_another_way_are_refused() -> None:
    batch = batch_of("llama")
    first, second = adapt(make("llama")), adapt(make("llama"))
    calibrated(first, batch, frozen_outliers="none")
    calibrated(second, batch, frozen_outliers="smooth")
    with pytest.raises(RuntimeError, match="they were rounded in another way"):
        first.load_state_dict(second.state_dict())
    lonely = {name: t for name, t in first.state_dict().items() if "frozen_" not in name}
    with pytest.raises(RuntimeError, match="these codes come with nothing"):
        first.load_state_dict(lonely, strict=False)


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_put_on_codes_is_never_merged_into_them(safe: bool) -> None:
    base = make("llama").requires_grad_(False)
    fuse(base, frozen_compute="int8", frozen_error_bound=1.0)
    model = get_peft_model(base, LoraConfig(**LORA))
    codes = [m.weight.clone() for m in model.modules() if isinstance(m, nn.Linear) and frozen_of(m) is not None]
    with pytest.raises((RuntimeError, ConfigError)):
        model.merge_and_unload(safe_merge=safe)
    after = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and frozen_of(m) is not None]
    assert len(codes) == len(after)
    assert all(torch.equal(one, other) for one, other in zip(codes, after, strict=True))


@pytest.mark.parametrize("more", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_a_start_that_reads_the_weight_fails_on_codes(more: dict[str, Any]) -> None:
    model = adapt(make("llama"))
    calibrated(model, batch_of("llama"))
    with pytest.raises((RuntimeError, ConfigError, ValueError, TypeError, IndexError)):
        model.add_adapter("late", LoraConfig(**{**LORA, **more}))


def test_a_merge_is_refused_before_any_layer_is_merged() -> None:
    batch, model = batch_of("llama"), adapt(make("llama"))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    report = fuse(model, frozen_compute="int8", frozen_outliers="none", calibrate=lambda: model(**inputs))
    errors = sorted(report.record.errors.values())
    unfuse(model)
    report = fuse(
        model, frozen_compute="int8", frozen_outliers="none", calibrate=lambda: model(**inputs),
        frozen_error_bound=errors[len(errors) // 2],
    )  # fmt: skip
    assert report.frozen
    assert any("above the bound" in reason for reason in report.kept_full.values())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match="which peft would take for numbers"):
            merge()
        assert not any(getattr(m, "merged", False) for m in model.modules())
    assert all(g is not None for g in step(model, batch).grads.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", ["int8", "bf16"])
def test_unfused_weights_have_the_dtype_that_the_model_was_cast_to(dtype: torch.dtype, format: str) -> None:
    batch, model = batch_of("llama"), adapt(make("llama"))
    calibrated(model, batch, format)
    model.to(dtype)
    with pytest.warns(UserWarning, match="come back as they were rounded"):
        unfuse(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(**batch).logits.isfinite().all()
    assert not [name for name, _ in model.named_buffers() if "frozen_" in name]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"frozen_outliers": "smooth"}, "have no effect with frozen_compute full"),
        ({"frozen_head": "int8"}, "have no effect with frozen_compute full"),
        ({"frozen_error_bound": 0.001}, "have no effect with frozen_compute full"),
        ({"frozen_compute": "int8", "frozen_outliers": "colums"}, "frozen_outliers must be one of auto, none, smooth"),
        ({"frozen_compute": "int8", "frozen_head": "int4"}, "frozen_head must be one of full, int8, got 'int4'"),
        ({"frozen_compute": "int8", "frozen_error_bound": math.nan}, "must be a number above 0, got nan"),
        ({"frozen_compute": "int8", "frozen_error_bound": -1.0}, r"must be a number above 0, got -1\.0"),
        ({"frozen_compute": "bf16", "frozen_head": "int8"}, "got int8 beside frozen_compute bf16"),
        ({"frozen_compute": "int8", "frozen_error_bound": 1e-9}, "no linear of this model can be rounded: the least"),
        ({"frozen_compute": "int8", "calibrate": lambda: None}, "the calibration batch reaches none of them"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], told: str) -> None:
    model = adapt(make("llama"))
    with pytest.raises(ConfigError, match=told):
        fuse(model, **settings)
    assert not any(frozen_of(m) is not None for m in model.modules())


def test_a_refused_setting_leaves_a_fused_model_as_it_was() -> None:
    model = adapt(make("llama"))
    calibrated(model, batch_of("llama"))
    with pytest.raises(ConfigError, match="frozen_outliers must be one of"):
        fuse(model, frozen_compute="int8", frozen_outliers="colums")  # type: ignore[arg-type]
    assert any(frozen_of(m) is not None for m in model.modules())
