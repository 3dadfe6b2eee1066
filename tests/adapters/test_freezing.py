"""A fused model whose frozen linears are codes: what is frozen and what not, what it computes, every way to run it."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CAUSAL, FAMILIES, adapt, batch_of, evaluating, make, pair, step
from frozen_models import NEAR, calibrated, linears, off
from peft import IA3Config, get_peft_model
from torch import Tensor, nn

from peft_engine.adapters.fusing import FuseReport, fuse, unfuse
from peft_engine.adapters.fusing import freezing as freezing_module
from peft_engine.adapters.fusing.freezing import SMALLEST, decide
from peft_engine.adapters.fusing.frozen_linear import frozen_of
from peft_engine.adapters.fusing.state import state_of
from peft_engine.errors import ConfigError
from peft_kernels._frozen_units import Quantising
from peft_kernels.frozen_weight import FrozenWeight


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["int8", "bf16"])
def test_a_family_computes_nearly_the_same(family: str, format: str) -> None:
    model, plain = pair(family)
    batch = batch_of(family)
    report = calibrated(model, batch, format)
    got, want = step(model, batch), step(plain, batch)
    assert off(got.logits, want.logits) < NEAR[format]
    names = [name for name, g in want.grads.items() if g is not None]
    assert [name for name, g in got.grads.items() if g is not None] == names
    whole, truth = (torch.cat([one.grads[n].flatten() for n in names]) for one in (got, want))
    assert off(whole, truth) < 3 * NEAR[format]
    assert torch.nn.functional.cosine_similarity(whole, truth, 0) > 0.98
    with evaluating(model, plain):
        assert off(model(**batch).logits, plain(**batch).logits) < NEAR[format]
    assert set(report.frozen.values()) == {format}
    frozen = {name for name, module in linears(model).items() if frozen_of(module) is not None}
    assert {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in frozen} == set(report.frozen)
    for name, module in linears(model).items():
        if name in frozen:
            assert module.weight.dtype == (torch.int8 if format == "int8" else torch.int16)
            assert not module.weight.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_every_frozen_linear_is_frozen_or_says_why(family: str) -> None:
    """Adapted ones and those without an adapter; heads, what trains and what is small stay."""
    model = adapt(make(family), **({"target_modules": ["q_proj", "v_proj"]} if family == "llama" else {}))
    before = {n: tuple(m.weight.shape) for n, m in linears(model).items() if "lora_" not in n}
    report = calibrated(model, batch_of(family))
    named = {n.removeprefix("base_model.model.").removesuffix(".base_layer"): shape for n, shape in before.items()}
    assert set(report.frozen) | set(report.kept_full) == set(named)
    assert not set(report.frozen) & set(report.kept_full)
    reasons = ("it trains", "output head", "a copy of it trains", "too small", "no fused form", "does not reach")
    assert all(any(known in reason for known in reasons) for reason in report.kept_full.values()), report.kept_full
    for name, shape in named.items():
        if min(shape) >= SMALLEST and name not in report.frozen:
            assert "too small" not in report.kept_full[name]
    assert report.frozen, report.kept_full
    if family == "llama":
        assert "model.layers.0.mlp.gate_proj" in report.frozen
        assert report.swapped["base_model.model.model.layers.0.mlp.down_proj"] == "frozen_linear"
        assert report.swapped["base_model.model.model.layers.0.mlp.gate_proj"] == "frozen_linear, shared input"


class Counted(Quantising):
    """Units that count how often rows are rounded."""

    dtype = torch.int8

    def __init__(self, units: Any) -> None:
        self.units, self.rounded, self.products = units, 0, 0

    def quantise(self, *given: Any) -> Any:
        self.rounded += 1
        return self.units.quantise(*given)

    def product(self, *given: Any) -> Tensor:
        self.products += 1
        return self.units.product(*given)

    def product_back(self, *given: Any) -> Tensor:
        self.products += 1
        return self.units.product_back(*given)


def counting(model: nn.Module) -> Counted:
    """One counter under all frozen linears of the model."""
    held = [one for module in model.modules() if (one := frozen_of(module)) is not None]
    counter = Counted(held[0].units)
    for one in held:
        object.__setattr__(one, "units", counter)
    return counter


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["k_proj", "up_proj"]])
def test_an_input_is_rounded_once_for_all_that_read_it(targets: Any) -> None:
    """q, k, v are one product, gate and up another, whoever of them has an adapter."""
    model = adapt(make("llama"), target_modules=targets)
    batch = batch_of("llama")
    calibrated(model, batch)
    counter = counting(model)
    step(model, batch)
    # q k v; o; gate up; down: each rounds x in forward and dy in backward. Where no adapter stands below, the first
    # layer's x needs no gradient
    assert counter.rounded == counter.products
    assert counter.rounded == 2 * 2 * 4 - 1


def test_conv1d_and_dora_and_several_adapters() -> None:
    for family, options in (
        ("gpt2", {}),
        ("gpt2", {"use_dora": True}),
        ("llama", {"use_dora": True}),
        ("llama", {"use_dora": True, "lora_dropout": 0.1}),
        ("llama", {"lora_bias": True}),
        ("bert", {"bias": "all"}),
    ):
        model, plain = pair(family, **options)
        batch = batch_of(family)
        report = calibrated(model, batch)
        assert report.frozen
        with evaluating(model, plain):
            assert off(model(**batch).logits, plain(**batch).logits) < NEAR["int8"], options
        if not options.get("lora_dropout"):
            got, want = step(model, batch), step(plain, batch)
            names = [name for name, g in want.grads.items() if g is not None]
            whole, truth = (torch.cat([one.grads[n].flatten() for n in names]) for one in (got, want))
            assert off(whole, truth) < 3 * NEAR["int8"], options


def test_the_norm_of_dora_is_that_of_the_codes() -> None:
    """With B of zero and a magnitude that is the codes' own norm, DoRA changes nothing."""
    model = adapt(make("llama"), use_dora=True)
    batch = batch_of("llama")
    calibrated(model, batch)
    for layer in [m for m in model.modules() if hasattr(m, "lora_magnitude_vector") and len(m.lora_magnitude_vector)]:
        held = frozen_of(layer.get_base_layer())
        with torch.no_grad():
            layer.lora_B["default"].weight.zero_()
            if held is not None:
                layer.lora_magnitude_vector["default"].weight.copy_(held.dequantised().norm(dim=1))
    with evaluating(model):
        got = model(**batch).logits
        with model.disable_adapter():
            want = model(**batch).logits
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3)


def test_disabled_switched_and_mixed_adapters_use_the_codes() -> None:
    model = adapt(make("llama"))
    batch = batch_of("llama")
    calibrated(model, batch)
    names = [name for name, module in linears(model).items() if frozen_of(module) is not None]
    twin = adapt(make("llama"))
    for name in names:  # the same numbers as plain weights
        twin.get_submodule(name).weight.data = frozen_of(model.get_submodule(name)).dequantised()
    with evaluating(model, twin):
        for one in (model, twin):
            one.add_adapter("other", one.peft_config["default"])
            draw = torch.Generator().manual_seed(7)
            for name, p in one.named_parameters():
                if ".other." in name:
                    p.data = torch.randn(p.shape, generator=draw)
        with model.disable_adapter(), twin.disable_adapter():
            assert off(model(**batch).logits, twin(**batch).logits) < NEAR["int8"]
        for one in (model, twin):
            default = one(**batch).logits
            one.set_adapter("other")
            assert off(one(**batch).logits, default) > 5 * NEAR["int8"]
        assert off(model(**batch).logits, twin(**batch).logits) < NEAR["int8"]
        mixed = {"adapter_names": ["default", "other", "__base__"]}
        assert off(model(**batch, **mixed).logits, twin(**batch, **mixed).logits) < NEAR["int8"]


def test_weights_take_one_byte_and_are_never_there_twice() -> None:
    """Freed layer by layer: what lives at most is the model, the codes so far, and one group's work space."""
    from peft_engine.meters.memory import LiveBytes, storage_bytes

    model = adapt(make("llama", hidden_size=64, intermediate_size=160, num_hidden_layers=6, head_dim=16))
    places = freezing_module.find_places(model)[0]
    sizes = {place.name: place.weight.nbytes for place in places}
    outputs = sum(place.weight.shape[0] for place in places)
    before = storage_bytes([*model.parameters(), *model.buffers()])
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    record = decide(model, "int8", bound=1.0)
    report = FuseReport()
    with LiveBytes([*model.parameters(), *model.buffers()]) as meter:
        report = fuse(model, record=record)
    assert set(report.frozen) == set(sizes)
    after = storage_bytes([*model.parameters(), *model.buffers()])
    assert after == before - sum(sizes.values()) * 3 // 4 + outputs * 4  # codes, and a scale for each row
    assert meter.peak <= before + 2 * layer


def test_unfuse_gives_rounded_weights_back_and_says_so() -> None:
    for family in ("llama", "gpt2"):
        model, plain = pair(family)
        batch = batch_of(family)
        classes = {name: type(module) for name, module in model.named_modules()}
        calibrated(model, batch)
        with evaluating(model):
            want = model(**batch).logits
        with pytest.warns(UserWarning, match="come back as they were rounded"):
            unfuse(model)
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert not any(name.startswith("frozen_") for module in model.modules() for name in module._buffers)
        for (name, got), one in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
            assert got.dtype == one.dtype
            assert off(got, one) < 0.02, name
        with evaluating(model):
            assert off(model(**batch).logits, want) < NEAR["int8"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unfuse(plain)


def test_casts_moves_and_copies_of_the_model() -> None:
    """No cast touches codes or scales; a copy computes alike and shares nothing."""
    model = adapt(make("llama"))
    batch = batch_of("llama")
    calibrated(model, batch)
    with evaluating(model):
        want = model(**batch).logits
        model.double().float()
        assert torch.equal(model(**batch).logits, want)
        assert model.dtype == torch.float32
        twin = copy.deepcopy(model)
        for module in model.modules():
            held = frozen_of(module)
            if held is not None:
                held.codes.zero_()
        assert torch.equal(twin(**batch).logits, want)
        assert not torch.equal(model(**batch).logits, want)


def test_what_would_read_codes_as_numbers_is_refused(tmp_path: Path) -> None:
    model = adapt(make("llama"))
    calibrated(model, batch_of("llama"))
    with pytest.raises(ConfigError, match=r"are rounded codes \(frozen_compute\), which peft would take for numbers"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="hold codes, which a file would give for weights"):
        model.get_base_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="this layer holds codes; unfuse before loading weights"):
        model.load_state_dict(adapt(make("llama")).state_dict())
    model.save_pretrained(tmp_path)
    loaded = adapt(make("llama"))
    loaded.load_adapter(tmp_path, "default")
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(loaded.state_dict()[q], model.state_dict()[q])
    model.load_state_dict(model.state_dict())  # its own codes

    other = adapt(make("llama"), use_dora=True)
    calibrated(other, batch_of("llama"))
    layer = other.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="got hooks"), pytest.raises(ConfigError, match="no fused form here"):
        other(**batch_of("llama"))


def test_other_tuners_keep_their_weights() -> None:
    model = get_peft_model(
        make("llama"), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    report = calibrated(model, batch_of("llama"))
    assert "may read its weight as numbers" in report.kept_full["model.layers.0.self_attn.k_proj"]
    assert "model.layers.0.self_attn.q_proj" in report.frozen


def test_tied_hooked_and_unreached_linears_stay() -> None:
    model = make("llama")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    layers[0].self_attn.o_proj.register_forward_hook(lambda *_: None)
    model.unused = nn.Linear(32, 32)
    for p in model.parameters():
        p.requires_grad_(False)
    report = calibrated(model, batch_of("llama"))
    assert report.kept_full["model.layers.0.mlp.up_proj"] == "its weight is tied to another module's"
    assert report.kept_full["model.layers.1.mlp.up_proj"] == "its weight is tied to another module's"
    assert report.kept_full["model.layers.0.self_attn.o_proj"] == "hooks stand on it"
    assert report.kept_full["unused"] == "the calibration batch does not reach it"
    assert "output head" in report.kept_full["lm_head"]
    assert "1 are not reached by the calibration batch" in report.told()


def test_generate_and_gradient_checkpointing() -> None:
    model = adapt(make("llama"))
    batch = batch_of("llama")
    calibrated(model, batch)
    want = step(model, batch)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    got = step(model, batch)
    assert torch.equal(got.logits, want.logits)
    assert all(torch.equal(g, want.grads[n]) for n, g in got.grads.items() if g is not None)
    model.base_model.model.gradient_checkpointing_disable()
    ids = batch["input_ids"][:, :4].clamp(min=3)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        cached, whole = (model.generate(input_ids=ids, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, whole)  # rows are rounded one by one, whatever stands beside them


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_training_lowers_the_loss_as_in_full_precision(family: str) -> None:
    model, plain = pair(family, lora_dropout=0.1)
    batch = batch_of(family)
    calibrated(model, batch)
    fuse(plain)
    ends = []
    for one in (model, plain):
        trained = [p for p in one.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        torch.manual_seed(0)
        losses = []
        for _ in range(25):
            loss = one(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        ends.append(losses)
    ours, theirs = ends
    assert ours[-1] < 0.7 * ours[0]
    assert abs(ours[-1] - theirs[-1]) < 0.1 * theirs[0]


@pytest.mark.parametrize("family", [name for name in CAUSAL if name != "mixtral"])
def test_an_int8_head_in_the_loss_alone(family: str) -> None:
    model, plain = pair(family)
    batch = batch_of(family)
    report = calibrated(model, batch, frozen_head="int8")
    fuse(plain)
    got, want = step(model, batch), step(plain, batch)
    refused = report.kept_full.get("the head in the loss")
    assert (refused is None) == (family not in ("phi", "gemma2"))  # a bias; capped logits
    assert abs(float(got.loss) - float(want.loss)) < 0.05 * float(want.loss)
    head = model.get_base_model().get_output_embeddings()
    assert ("frozen_codes" in head._buffers) == (refused is None)
    with evaluating(model, plain):
        assert off(model(**batch).logits, plain(**batch).logits) < NEAR["int8"]
    assert isinstance(frozen_of(head), FrozenWeight) is False
    with pytest.warns(UserWarning, match="rounded"):
        unfuse(model)
    assert not head._buffers


def test_states_remember_the_passes() -> None:
    model = adapt(make("llama"))
    report = calibrated(model, batch_of("llama"))
    mlp = model.base_model.model.model.layers[0].mlp
    assert state_of(mlp).extra["passes"] is True
    assert report.passes.startswith(("compiled by", "plain torch"))
