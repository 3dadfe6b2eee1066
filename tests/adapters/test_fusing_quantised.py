"""Fused models over bitsandbytes' linears: what peft computes on them, no more memory, and no weight that changes."""

import copy
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from families import InDouble, Step, adapt, batch_of, check_same, evaluating, make, near, shake, step
from injected import holder, inject
from peft import LoraConfig
from quantised_models import KINDS, as_numbers, quantise, twins, unpacked, wide
from torch import Tensor, nn

from peft_engine.adapters.fusing import fuse, unfuse
from peft_engine.adapters.fusing.quantised import is_quantised, quantised_of
from peft_engine.errors import ConfigError
from peft_engine.meters.memory import LiveBytes
from peft_engine.quantised import keep_codes
from peft_engine.session import Run
from peft_kernels import _quantised_products as products

SHARED, ALONE = "lora_linear, shared input", "lora_linear"
# as test_fusing.py has them for plain linears
COUNTS: dict[str, dict[str, int]] = {
    "llama": {SHARED: 10, ALONE: 4, "glu": 2, "rms_norm": 5, "rope": 2, "linear_cross_entropy": 1},
    "gemma2": {SHARED: 10, ALONE: 4, "glu": 2, "rms_norm": 9, "rope": 2, "linear_cross_entropy": 1},
    "phi3": {ALONE: 8, "glu": 2, "rms_norm": 5, "rope": 2, "linear_cross_entropy": 1},
    "gpt2": {ALONE: 8, "activation": 2, "layer_norm": 5, "linear_cross_entropy": 1},
    "opt": {SHARED: 6, ALONE: 6, "activation": 2, "layer_norm": 5, "linear_cross_entropy": 1},
    "bert": {SHARED: 6, ALONE: 7, "activation": 2, "layer_norm": 5},
    "distilbert": {SHARED: 6, ALONE: 6, "activation": 2, "layer_norm": 5},
}


def bases(model: nn.Module) -> dict[str, Any]:
    """bitsandbytes' linears of a model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)}


def squares_off(one: Step, real: Step) -> dict[str, float]:
    """The squared distance of the logits and of each gradient from the real one, relative to that one's square."""
    pairs = {"logits": (one.logits, real.logits)}
    pairs |= {n: (g, real.grads[n]) for n, g in one.grads.items() if g is not None and real.grads[n].any()}
    return {n: float((got.double() - want).norm() ** 2 / want.norm() ** 2) for n, (got, want) in pairs.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", COUNTS)
def test_a_family_is_fused_whole_and_computes_the_same(family: str, kind: str) -> None:
    model, plain = twins(family, kind)
    before = {name: type(m) for name, m in model.named_modules()}
    report = fuse(model)
    assert report.counts() == COUNTS[family]
    assert report.skipped == {}
    assert set(report.quantised.values()) == {kind}
    assert len(report.quantised) == len(bases(model)) == COUNTS[family].get(SHARED, 0) + COUNTS[family][ALONE]
    assert f"{len(report.quantised)} linears in {kind}" in report.told()
    assert report.to_json()["quantised"] == {kind: len(report.quantised)}
    batch = batch_of(family)
    check_same(step(model, batch), step(plain, batch), 2e-5)
    with evaluating(model):
        logits = model(**batch).logits
    with evaluating(plain), InDouble():
        near(logits.double(), as_numbers(plain)(**batch).logits, 2e-5)
    assert list(model.state_dict()) == list(plain.state_dict())
    unfuse(model)
    assert {name: type(m) for name, m in model.named_modules()} == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_no_further_from_truth_than_peft(family: str, kind: str) -> None:
    """Three ways: in float64 on the unpacked numbers, peft's layers, and fused; the fused one in no tensor further
    off than peft by more than what one order of adding differs from another."""
    model, plain = twins(family, kind)
    truth = as_numbers(plain)
    fuse(model)
    wrong: dict[str, list[float]] = {}
    for seed in range(24):  # the ratio of six batches is off 1 by up to 16%, of 24 by up to 2%
        batch = batch_of(family, seed=seed)
        ours, theirs = step(model, batch), step(plain, batch)
        with InDouble():
            real = step(truth, batch)
        for place, one in enumerate((ours, theirs)):
            for name, off in squares_off(one, real).items():
                wrong.setdefault(name, [0.0, 0.0])[place] += off
    fused, unfused = (torch.tensor([pair[i] for pair in wrong.values()]).sqrt() for i in (0, 1))
    assert fused.mean() <= 1.15 * unfused.mean()
    assert (fused <= 2 * unfused + 1e-7).all()


CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in ("llama", "phi3", "gpt2", "bert")),
    ("llama", {"use_dora": True}),
    ("gpt2", {"lora_bias": True}),
    ("llama", {"use_rslora": True, "lora_dropout": 0.4}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
]


@pytest.mark.parametrize(
    ("family", "lora", "kind"),
    # over int8 on a CPU peft's own DoRA loses the scales in its first step
    [(*case, kind) for case in CASES for kind in ("nf4", "int8") if not (kind == "int8" and "use_dora" in case[1])],
)
def test_the_same_masks_give_the_same_numbers(family: str, lora: dict[str, Any], kind: str) -> None:
    model, plain = twins(family, kind, **({"lora_dropout": 0.1} | lora))
    report = fuse(model)
    assert set(report.quantised.values()) == {kind}
    rows = holder(model)
    rows.seeds = torch.tensor([11, -(2**62), 2**63 - 1])
    inject(model, plain)
    batch = batch_of(family)
    first = step(model, batch)
    check_same(first, step(plain, batch), 2e-5)
    rows.seeds = rows.seeds + 1
    second = step(model, batch)
    check_same(second, step(plain, batch), 2e-5)
    assert second.loss != first.loss


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dora_without_dropout(kind: str) -> None:
    model, plain = twins("llama", kind, use_dora=True)
    fuse(model)
    check_same(step(model, batch_of("llama")), step(plain, batch_of("llama")), 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_linears_without_an_adapter_run_too(kind: str) -> None:
    """k, v beside an adapted q; gate beside an adapted up: in one group with their siblings."""
    model, plain = twins("llama", kind, target_modules=["q_proj", "up_proj"])
    report = fuse(model)
    ops = {name.rpartition(".")[2]: op for name, op in report.swapped.items()}
    assert ops["q_proj"] == ops["up_proj"] == SHARED
    assert ops["k_proj"] == ops["v_proj"] == ops["gate_proj"] == "quantised_linear, shared input"
    assert ops["o_proj"] == ops["down_proj"] == "quantised_linear"
    check_same(step(model, batch_of("llama")), step(plain, batch_of("llama")), 2e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_without_adapters(kind: str) -> None:
    model = quantise(make("llama", **wide("llama")), kind)
    batch = batch_of("llama")
    with InDouble(), torch.no_grad():
        want = as_numbers(model)(**batch)
    model.requires_grad_(False)
    report = fuse(model)
    assert len(report.quantised) == 14
    with torch.no_grad():
        got = model(**batch)
    near(got.loss.double(), want.loss, 2e-5)
    near(got.logits.double(), want.logits, 2e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_switched_adapters(kind: str) -> None:
    """Disabled, two at once, one of two: as peft, on our products."""
    model, _ = twins("llama", kind)
    torch.manual_seed(0)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    shake(model, seed=5, only=".second").train()
    plain = copy.deepcopy(model)
    truth = as_numbers(plain)
    fuse(model)
    batch = batch_of("llama")
    for names in (["default"], ["second"], ["default", "second"]):
        for one in (model, plain):
            one.base_model.set_adapter(names)
        check_same(step(model, batch), step(plain, batch), 2e-5)
    with model.disable_adapter(), evaluating(model), truth.disable_adapter(), evaluating(truth), InDouble():
        near(model(**batch).logits.double(), truth(**batch).logits, 2e-5)


def test_merging_is_pefts_and_is_seen() -> None:
    """peft quantises the merged weight anew: the fused layer reads that one, and the old one's numbers are gone."""
    model, plain = twins("llama", "nf4")
    fuse(model)
    batch = batch_of("llama")
    with evaluating(model):
        before = model(**batch).logits
    for one in (model, plain):
        with pytest.warns(UserWarning, match="rounding errors"):
            one.merge_adapter()
    for (name, ours), theirs in zip(bases(model).items(), bases(plain).values(), strict=True):
        assert torch.equal(ours.weight.data, theirs.weight.data), name
        assert torch.equal(quantised_of(ours).dequantised(), unpacked(theirs)), name
    with evaluating(model, plain), InDouble():
        got = model(**batch).logits
        near(got.double(), as_numbers(plain)(**batch).logits, 2e-5)
    assert not torch.equal(got, before)


def test_another_weight_in_its_place_is_read() -> None:
    """What LoftQ does to a base."""
    model, _ = twins("llama", "nf4")
    fuse(model)
    name, base = next(iter(bases(model).items()))
    old = quantised_of(base).dequantised()
    base.weight = bnb.nn.Params4bit(-old.clone(), requires_grad=False, quant_type="nf4", module=base).to("cpu")
    assert torch.equal(quantised_of(base).dequantised(), unpacked(base)), name
    assert not torch.equal(unpacked(base), old)
    x = torch.randn(2, old.shape[1])
    near(base(x).detach(), x @ unpacked(base).t(), 1e-5)


def test_another_int8_weight_in_its_place_is_read_with_its_own_scales() -> None:
    model, _ = twins("llama", "int8")
    batch = batch_of("llama")
    step(model, batch)  # bitsandbytes' layers take the old scales to themselves
    fuse(model)
    base = next(iter(bases(model).values()))
    wanted = 3 * unpacked(base)
    base.weight = bnb.nn.Int8Params(wanted.clone(), requires_grad=False).to("cpu")
    x = torch.randn(20, wanted.shape[1])
    near(base(x).detach(), x @ wanted.t(), 0.02)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loaded_scales_are_read_by_everything_made_of_them(kind: str) -> None:
    """DoRA keeps the norms of the weight: they are of the weight that is there now."""
    model, _ = twins("llama", kind, use_dora=True)
    batch = batch_of("llama")
    fuse(model)
    step(model, batch)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for name in state:
        if name.endswith(("SCB", "nested_absmax", "quant_map")) and "nested_quant_map" not in name:
            state[name] *= 2
    model.load_state_dict(state, strict=False)
    truth = as_numbers(model)
    with InDouble():
        wanted = step(truth, batch)
    near(step(model, batch).logits.double(), wanted.logits, 1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_inference_mode_gives_what_no_grad_gives(kind: str) -> None:
    model = adapt(make("llama", **wide("llama"))) if kind == "none" else twins("llama", kind)[0]
    shake(model)
    fuse(model)
    model.eval()
    ids = batch_of("llama")["input_ids"]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    with torch.inference_mode():
        assert torch.allclose(model(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
        again = model.generate(input_ids=ids[:, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(again, model.generate(input_ids=ids[:, :4], max_new_tokens=4, do_sample=False))


def test_a_compute_dtype_is_kept() -> None:
    """Products in bfloat16 under float32 activations, as bitsandbytes runs such a layer."""
    model, plain = twins("llama", "nf4", how={"compute": torch.bfloat16})
    fuse(model)
    assert all(quantised_of(base).dtype == torch.bfloat16 for base in bases(model).values())
    batch = batch_of("llama")
    got, want = step(model, batch), step(plain, batch)
    assert got.logits.dtype == torch.float32
    truth = as_numbers(plain)
    with InDouble():
        real = step(truth, batch)
    ours, theirs = ((one.logits.double() - real.logits).norm() for one in (got, want))
    assert ours <= 1.2 * theirs
    assert theirs <= 1.2 * ours, "the fused products were not rounded to bfloat16"


def test_evaluating_changes_no_weight() -> None:
    """bitsandbytes' own forward would repack its weight for bf16 units in the first evaluation, and from then on
    compute in bfloat16 and give its input no gradient."""
    model, plain = twins("llama", "nf4")
    batch = batch_of("llama")
    want = step(plain, batch)
    for base in bases(model).values():
        base.support_avx512bf16_for_cpu = True  # as on a CPU that has them
    unfused = copy.deepcopy(model)
    keep_codes(unfused)
    fuse(model)
    for one, tolerance in ((model, 2e-5), (unfused, 0.0)):
        codes = {name: base.weight.data.clone() for name, base in bases(one).items()}
        with evaluating(one):
            one(**batch)
        for name, base in bases(one).items():
            assert not base.support_avx512bf16_for_cpu
            assert not getattr(base.weight.quant_state, "packing_format_for_cpu", False), name
            assert torch.equal(base.weight.data, codes[name]), name
        check_same(step(one, batch), want, tolerance)
    unfuse(model)
    with evaluating(model):
        model(**batch)
    check_same(step(model, batch), want, 0.0)


def test_a_repacked_model_is_refused() -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model, _ = twins("llama", "nf4")
    name, base = next(iter(bases(model).items()))
    base.weight.data, base.weight.quant_state = _convert_weight_packed_for_cpu(
        base.weight.data, base.weight.quant_state
    )
    with pytest.raises(ConfigError, match=f"{name}: bitsandbytes has repacked this weight"):
        fuse(model)


def test_no_more_memory_than_peft() -> None:
    model, plain = twins("llama", "nf4", lora_dropout=0.05)
    fuse(model)
    batch = batch_of("llama", rows=8, length=32)
    peaks = []
    for one in (model, plain):
        step(one, batch)
        products.release()  # the scratch buffer counts
        with LiveBytes([*one.parameters(), *one.buffers(), *batch.values()]) as meter:
            step(one, batch)
        peaks.append(meter.peak)
    assert peaks[0] <= peaks[1]


def test_the_scratch_buffer_goes_with_the_model() -> None:
    def used() -> Any:
        model, _ = twins("llama", "nf4")
        fuse(model)
        step(model, batch_of("llama", rows=8))
        assert products._OF_THREAD.buffers
        return model

    model = used()
    unfuse(model)
    assert not products._OF_THREAD.buffers
    used()
    gc.collect()
    assert not products._OF_THREAD.buffers


def test_a_run_tells_of_its_quantised_linears() -> None:
    """As `train` says and writes it, where nothing was frozen in another format; nothing of a plain model."""
    model, _ = twins("llama", "nf4")
    told = [
        Run._frozen(SimpleNamespace(group=SimpleNamespace(fused=report)))  # type: ignore[arg-type]
        for report in (fuse(model), fuse(make("llama")), None)
    ]
    assert told[0]["quantised_linears"].startswith("as loaded: 14 linears in nf4; passes: ")
    assert told[1:] == [{}, {}]


def test_keep_codes_can_be_called_again_and_on_any_model() -> None:
    model, _ = twins("llama", "nf4")
    fused = copy.deepcopy(model)
    fuse(fused)
    found = [model, model.base_model.model, fused, make("llama"), nn.Linear(2, 3), next(iter(bases(model).values()))]
    for one in (model, fused):
        for base in bases(one).values():
            base.support_avx512bf16_for_cpu = True
    for one in found * 2:
        keep_codes(one)
    assert not any(base.support_avx512bf16_for_cpu for one in (model, fused) for base in bases(one).values())


def test_the_report_says_why_a_linear_stays() -> None:
    model, _ = twins("llama", "nf4", target_modules=["q_proj", "v_proj"])
    found = bases(model)
    hooked, trained = (next(n for n in found if n.endswith(end)) for end in ("k_proj", "q_proj.base_layer"))
    found[hooked].register_forward_hook(lambda *_: None)
    fresh = next(n for n in found if n.endswith("o_proj"))
    weight = found[fresh].weight
    found[fresh].weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False)
    odd = next(n for n in found if n.endswith("down_proj"))
    found[odd].weight = bnb.nn.Params4bit(torch.randn(128, 64), requires_grad=False, quant_type="nf4").to("cpu")
    report = fuse(model)
    assert report.skipped[hooked] == "hooks stand on it"
    assert report.skipped[fresh] == "its weight is not quantised yet"
    assert report.skipped[odd] == "its weight was quantised as (128, 64), not as (out, in)"
    assert not any(is_quantised(m) and n in report.swapped for n, m in found.items() if n in (hooked, fresh, odd))
    unfuse(model)
    found[fresh].weight = weight
    found[trained].register_forward_hook(lambda *_: None)
    layer = trained.removesuffix(".base_layer")
    assert fuse(model).skipped[layer] == "its base layer is a Linear4bit: hooks stand on it"


def test_a_second_narrow_format_is_refused() -> None:
    model, _ = twins("llama", "nf4")
    fuse(model)
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ConfigError, match="are quantised by bitsandbytes, so they can't be frozen"):
        fuse(model, frozen_compute="int8")
    assert {name: type(m) for name, m in model.named_modules()} == before, "it was touched"


def test_a_copy_of_a_fused_model_has_weights_of_its_own() -> None:
    model, plain = twins("llama", "nf4")
    fuse(model)
    copied = copy.deepcopy(model)
    for base in bases(model).values():
        base.weight.data.zero_()
    check_same(step(copied, batch_of("llama")), step(plain, batch_of("llama")), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_real_model_as_transformers_loads_it(assets: Path, kind: str) -> None:
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = assets / "models" / "smollm2"
    settings = BitsAndBytesConfig(
        load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8", bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)).train()
    ids = AutoTokenizer.from_pretrained(folder)("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    batch: dict[str, Tensor] = {"input_ids": ids["input_ids"], "labels": ids["input_ids"]}
    truth, theirs = as_numbers(model), step(model, batch)
    with InDouble():
        real = step(truth, batch)
    report = fuse(model)
    assert set(report.quantised.values()) == {kind}
    assert len(report.quantised) == 210
    assert report.skipped == {}
    fused, unfused = (torch.tensor([*squares_off(one, real).values()]).sqrt() for one in (step(model, batch), theirs))
    assert fused.mean() <= unfused.mean()
    assert (fused <= 2 * unfused + 1e-7).all()
