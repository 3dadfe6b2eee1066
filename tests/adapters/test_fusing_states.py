"""Trap 27: a fused path must see that an adapter was disabled, switched, merged, hooked, or read something else."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import InDouble, adapt, batch_of, check_same, evaluating, make, near, pair, shake, step
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from peft_engine.adapters.fusing import fuse, fuses_loss, unfuse

SECOND: dict[str, Any] = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj", "down_proj"]}
SECOND_OF = {
    "llama": SECOND,
    "gpt2": SECOND | {"target_modules": ["c_attn", "c_fc"]},
    "bert": SECOND | {"target_modules": ["query", "dense"]},
}
HEAD: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "gate_proj", "lm_head"]}


@pytest.fixture(autouse=True)
def _double() -> Any:
    with InDouble():
        yield


def two(family: str = "llama", **options: Any) -> tuple[Any, Any]:
    """A fused model and a plain one, each with adapters "default" and "second" of other targets, rank and alpha."""
    plain = adapt(make(family, dtype=torch.float64), **options)
    plain.add_adapter("second", LoraConfig(**SECOND_OF[family]))
    shake(plain, seed=5, only=".second").double()
    plain.train()
    model = copy.deepcopy(plain)
    fuse(model)
    return model, plain


def same(model: Any, plain: Any, family: str = "llama", **kwargs: Any) -> None:
    """Training step and evaluation agree."""
    batch = batch_of(family)
    check_same(step(model, batch, **kwargs), step(plain, batch, **kwargs), 1e-9)
    with evaluating(model, plain):
        near(model(**batch).logits, plain(**batch).logits, 1e-9)


def both(model: Any, plain: Any, change: Callable[[Any], Any]) -> None:
    for one in (model, plain):
        change(one)


def add_late(model: Any, config: LoraConfig) -> None:
    torch.manual_seed(6)
    model.add_adapter("late", config)
    shake(model, seed=6, only=".late").double().train()
    model.set_adapter("late")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_trap_27_disabled_switched_and_merged_adapters(family: str) -> None:
    model, plain = two(family)
    seen = []

    def look() -> None:
        same(model, plain, family)
        seen.append(step(model, batch_of(family)).loss)

    look()
    with model.disable_adapter(), plain.disable_adapter(), evaluating(model, plain):
        batch = batch_of(family)
        near(model(**batch).logits, plain(**batch).logits, 1e-9)
        seen.append(model(**batch).loss)
    look()
    both(model, plain, lambda m: m.set_adapter("second"))
    look()
    if family != "bert":  # peft takes one adapter at a time where a classifier is saved with it
        both(model, plain, lambda m: m.base_model.set_adapter(["default", "second"]))
        look()
        both(model, plain, lambda m: m.base_model.set_adapter(["second", "default"]))
        same(model, plain, family)
    both(model, plain, lambda m: m.set_adapter("default"))
    both(model, plain, lambda m: m.merge_adapter())
    with evaluating(model, plain):
        near(model(**batch).logits, plain(**batch).logits, 1e-9)
    both(model, plain, lambda m: m.unmerge_adapter())
    look()
    assert seen[0] == seen[2]
    near(seen[-1], seen[0], 1e-9)
    # default (three times), disabled, second, both
    assert len({round(float(loss), 9) for loss in seen}) == (3 if family == "bert" else 4)


def test_gradients_flow_to_the_active_adapters_only() -> None:
    model, plain = two()
    for names in (["second"], ["default", "second"], ["default"]):
        both(model, plain, lambda m, names=names: m.base_model.set_adapter(names))
        ours = step(model, batch_of("llama"))
        assert {n.split(".")[-2] for n, g in ours.grads.items() if g is not None} == set(names)
        check_same(ours, step(plain, batch_of("llama")), 1e-9)


@pytest.mark.parametrize("options", [{}, HEAD, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_training_with_the_adapter_disabled_or_merged(options: dict[str, Any]) -> None:
    """Also where the head carries an adapter or is a copy: the loss is the fused one."""
    model, plain = pair("llama", torch.float64, **options)
    fuse(model)
    for one in (model, plain):  # a norm trains, so that there is a gradient
        one.base_model.model.model.norm.weight.requires_grad_(True)
    same(model, plain)
    with model.disable_adapter(), plain.disable_adapter():
        same(model, plain)
    same(model, plain)
    both(model, plain, lambda m: m.merge_adapter())
    same(model, plain)
    with model.disable_adapter(), plain.disable_adapter():  # peft unmerges here
        same(model, plain)
    both(model, plain, lambda m: m.unmerge_adapter() if any(getattr(x, "merged", False) for x in m.modules()) else None)
    same(model, plain)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, HEAD])
def test_merge_and_unload(options: dict[str, Any]) -> None:
    model, plain = pair("llama", torch.float64, **options)
    fuse(model)
    ours, theirs = model.merge_and_unload(), plain.merge_and_unload()
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    batch = batch_of("llama")
    with evaluating(ours, theirs):
        near(ours(**batch).logits, theirs(**batch).logits, 1e-9)
    near(ours(**batch).loss, theirs(**batch).loss, 1e-9)
    unfuse(ours)
    assert {n: type(m) for n, m in ours.named_modules()} == {n: type(m) for n, m in theirs.named_modules()}


def test_adapters_added_deleted_and_loaded_after_fusing(tmp_path: Path) -> None:
    model, plain = pair("llama", torch.float64)
    fuse(model)
    plain.save_pretrained(tmp_path)
    both(model, plain, lambda m: add_late(m, LoraConfig(**SECOND, modules_to_save=["lm_head"])))
    same(model, plain)
    both(model, plain, lambda m: m.delete_adapter("default"))
    same(model, plain)
    both(model, plain, lambda m: m.load_adapter(tmp_path, "again", is_trainable=True))
    both(model, plain, lambda m: m.set_adapter("again"))
    both(model, plain, lambda m: m.double())
    same(model, plain)
    fuse(model)
    same(model, plain)


def test_an_adapter_that_reaches_the_head_after_fusing() -> None:
    model, plain = pair("llama", torch.float64)
    fuse(model)
    assert fuses_loss(model)
    both(model, plain, lambda m: add_late(m, LoraConfig(r=2, target_modules=["q_proj", "lm_head"])))
    same(model, plain)
    unfuse(model)
    same(model, plain)


def test_mixed_batches() -> None:
    model, plain = two()
    batch = batch_of("llama")
    with evaluating(model, plain):
        names = ["default", "__base__", "second"]
        near(model(**batch, adapter_names=names).logits, plain(**batch, adapter_names=names).logits, 1e-9)
        near(model(**batch).logits, plain(**batch).logits, 1e-9)


def test_scaled_layers() -> None:
    model, plain = two()
    before = step(model, batch_of("llama")).loss

    def scale(one: Any) -> None:
        for module in one.modules():
            if hasattr(module, "lora_A"):
                module.scale_layer(2.5)

    both(model, plain, scale)
    same(model, plain)
    assert step(model, batch_of("llama")).loss != before


def test_rates_of_dropout_follow_the_mode() -> None:
    model, plain = pair("llama", torch.float64, lora_dropout=0.5)
    fuse(model)
    batch = batch_of("llama")
    dropped = step(model, batch).loss
    both(model, plain, lambda m: m.eval())
    check_same(step(model, batch), step(plain, batch), 1e-9)
    assert step(model, batch).loss != dropped
    part = model.base_model.model.model.layers[0]  # one layer in train mode, the rest in eval mode
    part.train()
    assert step(model, batch).loss != step(plain, batch).loss


PART = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "part",
    [f"{PART}.lora_A.default", f"{PART}.base_layer", "base_model.model.model.layers.0.mlp.down_proj.lora_B.default"],
)
@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_hooks_on_parts_run(part: str, early: bool) -> None:
    """A fused layer bypasses its parts, so a layer with hooks on them runs as peft's does, and says so."""
    model, plain = pair("llama", torch.float64)
    calls: list[str] = []

    def hook(name: str) -> Callable[..., Tensor]:
        def run(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            calls.append(name)
            return output * 2

        return run

    plain.get_submodule(part).register_forward_hook(hook("plain"))
    if not early:
        fuse(model)
        step(model, batch_of("llama"))
    handle = model.get_submodule(part).register_forward_hook(hook("fused"))
    layer = part.split(".lora_")[0].removesuffix(".base_layer")
    if early:
        assert fuse(model).skipped == {layer: "hooks stand on its parts"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same(model, plain)
        same(model, plain)
    ours = [w for w in caught if "got hooks after it was fused" in str(w.message)]
    assert len(ours) == (0 if early else 1)
    assert calls.count("fused") == calls.count("plain") == 4
    handle.remove()
    assert step(model, batch_of("llama")).loss != step(plain, batch_of("llama")).loss


def test_hooks_on_fused_modules_run() -> None:
    model, plain = pair("llama", torch.float64)
    called: dict[str, int] = {}
    report = fuse(model)
    for one, owner in ((model, "fused"), (plain, "plain")):
        for name in report.swapped:

            def count(module: nn.Module, args: Any, output: Any, key: str = f"{owner} {name}") -> None:
                called[key] = called.get(key, 0) + 1

            def double(module: nn.Module, grads: Any) -> None:
                pass

            one.get_submodule(name).register_forward_hook(count)
        q = one.get_submodule(PART)
        q.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        q.register_forward_hook(lambda module, args, output: output + 1)
        one.get_submodule("base_model.model.model.layers.1.mlp").register_full_backward_hook(
            lambda module, gave, got: tuple(2 * g for g in gave)
        )
    same(model, plain)
    assert set(called.values()) == {2}
    assert len(called) == 2 * len(report.swapped)


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("factor", [1, 2])
def test_hooks_on_an_activation_run(early: bool, factor: int) -> None:
    """A gated MLP calls its own activation: one with hooks must not be bypassed."""
    model, plain = pair("llama", torch.float64)
    place = "base_model.model.model.layers.0.mlp"
    called: list[nn.Module] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        called.append(module)
        return output * factor

    if not early:
        fuse(model)
    acts = [one.get_submodule(f"{place}.act_fn") for one in (model, plain)]
    for act in acts:
        act.register_forward_hook(hook)
    if early:
        assert place not in fuse(model).swapped
    same(model, plain)
    assert [called.count(act) for act in acts] == [2, 2]


def test_a_loaded_peft_model(tmp_path: Path) -> None:
    trained = adapt(make("llama", dtype=torch.float64)).double()
    trained.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make("llama", dtype=torch.float64), tmp_path, is_trainable=True).train().double()
    fuse(model)
    same(model, trained)
