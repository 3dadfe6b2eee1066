"""Runs on a quantised backbone: what is quantised, what run.json says, resume, and the use of a finished run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from comparing import changed, outcome, train_and_crash
from safetensors.torch import load_file
from tiny import assemble, logits_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from wide_models import maker, settings

from peft_engine.errors import ConfigError, DataError
from peft_engine.quantised import dequantised, kind_of, quantised_linears, side_tensors
from peft_engine.run import train
from peft_engine.using import evaluate, export, generate, open_run, predict

LM, CLASSES = "causal-lm", "text-classification"
REPACKS = bool(functional.has_avx512bf16())


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    return maker(tmp_path_factory.mktemp("wide"), patch)


@pytest.mark.parametrize("task", [LM, CLASSES])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_run_says_what_it_quantised_and_is_used_as_it_was_trained(kind, task, wide, tmp_path) -> None:
    model = wide("llama" if task == LM else "bert")
    summary = train(settings(model, tmp_path, task, model={"quantization": kind}))
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    told = said["decisions"]["quantization"]
    linears = 14 if task == LM else 13  # its pooler is one
    assert told.startswith(f"{kind}: asked for; {linears} linears in ")
    assert "products in float32" in told
    assert ("absmax in 8 bits" in told) == (kind != "int8")
    plain = train(settings(model, tmp_path / "plain", task, model={"quantization": "none"}))
    assert said["total_parameters"] == plain["total_parameters"]
    assert said["memory"]["weights"] < plain["memory"]["weights"]
    assert "quantization" not in plain["decisions"]
    if task == LM:  # of the other, 6 rows
        assert summary["metrics"]["after"]["loss"] == pytest.approx(plain["metrics"]["after"]["loss"], rel=0.05)

    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]["after"]
    opened = open_run(tmp_path / "run")
    assert {kind_of(m) for m in quantised_linears(opened.group.model).values()} == {kind}
    if task == LM:
        assert isinstance(generate(tmp_path / "run", "the quick", max_new_tokens=3), str)
        assert kind_of(opened.group.backbone.model.lm_head) is None
    else:
        assert len(predict(tmp_path / "run", str(tmp_path / "rows.jsonl"))) == 28
    assert export(tmp_path / "run")[1].relative < 1e-3  # in plain peft, on weights that bitsandbytes rounded
    assert "BitsAndBytesConfig(load_in_" in (tmp_path / "run" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_weights_are_those_that_bitsandbytes_makes_of_the_checkpoint(kind, nested, wide, tmp_path) -> None:
    folder = wide("llama")
    double = {} if kind == "int8" else {"double_quantization": nested}
    group = assemble(settings(folder, tmp_path, model={"quantization": kind, **double})).group
    stored = load_file(folder / "model.safetensors")
    linears = quantised_linears(group.model.get_base_model())
    assert len(linears) == 14
    for name, linear in linears.items():
        weight = stored[f"{name.removesuffix('.base_layer')}.weight"]
        if kind == "int8":
            codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
            wanted = functional.int8_vectorwise_dequant(codes, scale)
        else:
            codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
            wanted = functional.dequantize_4bit(codes, state)
            assert ("offset" in side_tensors(linear)) == nested
        assert torch.equal(linear.weight.data, codes), name
        assert torch.equal(dequantised(linear), wanted), name
    whole = set(dict(group.model.named_parameters())) & {"base_model.model.lm_head.weight"}
    assert whole


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_resume_gives_the_bits_of_an_undisturbed_run(kind, wide, tmp_path, monkeypatch) -> None:
    whole = settings(wide("llama"), tmp_path, model={"quantization": kind})
    train(whole)
    broken = changed(whole, output=str(tmp_path / "broken"))
    train_and_crash(monkeypatch, broken, 5)
    train(broken, resume=True)
    assert outcome(broken.output) == outcome(whole.output)


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_evaluation_computes_with_the_weights_that_were_trained_on(kernels, wide, tmp_path) -> None:
    """bitsandbytes' 4-bit linear packs its weight anew in evaluation on some CPUs, in bfloat16."""
    made = assemble(changed(settings(wide("llama"), tmp_path, adapter={"dropout": 0.0}), kernels=kernels))
    group, batch = made.group, made.task.collate(made.data["train"], torch.arange(4).numpy())
    group.train()
    with torch.enable_grad():
        in_training = made.task.forward(group.model, batch).detach()
    before = {n: m.weight.detach().clone() for n, m in quantised_linears(group.model).items()}
    with group.evaluating(group.members[0]) as model, torch.no_grad():
        found = made.task.forward(model, batch)
    assert float((found - in_training).abs().max()) < 1e-4 * float(found.abs().max())
    for name, linear in quantised_linears(group.model).items():
        assert torch.equal(linear.weight, before[name])
        assert not getattr(linear.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.skipif(not REPACKS, reason="bitsandbytes packs weights anew on CPUs with AVX512-BF16 only")
def test_without_it_they_would_be_others(wide, tmp_path) -> None:
    """The trap itself, so that the test above is known to see it."""
    made = assemble(changed(settings(wide("llama"), tmp_path), kernels="off"))
    wanted = logits_of(made.group, made.task, made.data["train"])
    for linear in quantised_linears(made.group.model).values():
        linear.support_avx512bf16_for_cpu = True
    found = logits_of(made.group, made.task, made.data["train"])
    assert float((found - wanted).abs().max()) > 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantised_is_taken_as_it_is(kind, wide, tmp_path) -> None:
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    rounded = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else four))
    source, folder = wide("llama"), tmp_path / "stored"
    model: Any = AutoModelForCausalLM.from_pretrained(source, quantization_config=rounded, device_map={"": "cpu"})
    model.save_pretrained(folder)
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    for file in source.glob("*.jinja"):
        (folder / file.name).write_bytes(file.read_bytes())
    summary = train(settings(folder, tmp_path, model={"quantization": "none"}))
    assert summary["decisions"]["quantization"].startswith(f"{kind}: as the checkpoint stores it; 14 linears")
    assert "products in float32" in summary["decisions"]["quantization"]  # whatever the checkpoint says
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]["after"]
    assert export(tmp_path / "run")[1].relative < 1e-3
    merged, drift = export(tmp_path / "run", merged=True)
    assert json.loads((merged / "merge.json").read_text())["onto"] == "dequantised"
    assert drift.held_out is not None
    assert drift.held_out.kl < 1e-4
    other = "fp4" if kind == "nf4" else "nf4"
    with pytest.raises(ConfigError, match=f"got {other}, and the checkpoint .* is stored in {kind} already"):
        train(settings(folder, tmp_path / "other", model={"quantization": other}))
    with pytest.raises(ConfigError, match="would be rounded once more"):
        train(settings(folder, tmp_path / "twice", model={"quantization": "none", "frozen_compute": "int8"}))
    for asked, init in (("none", "loftq"), (kind, "loftq"), (kind, "pissa")):
        with pytest.raises(ConfigError, match="holds quantised ones only"):
            train(settings(folder, tmp_path / "init", model={"quantization": asked}, adapter={"init": init}))
    same = train(settings(folder, tmp_path / "same", model={"quantization": kind}))
    assert same["decisions"]["quantization"].startswith(f"{kind}: as the checkpoint stores it")
    with pytest.raises(ConfigError, match=r"quantization_skip: got \['q_proj'\], and the checkpoint .* is stored in"):
        train(settings(folder, tmp_path / "skip", model={"quantization": kind, "quantization_skip": ["q_proj"]}))


def test_a_stored_checkpoint_says_how_its_absmax_is_held(wide, tmp_path) -> None:
    plain, nested = wide("llama"), tmp_path / "stored"
    rounded = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model: Any = AutoModelForCausalLM.from_pretrained(plain, quantization_config=rounded, device_map={"": "cpu"})
    model.save_pretrained(nested)
    for file in (*plain.glob("*token*"), *plain.glob("*.jinja")):
        (nested / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"got False, and the checkpoint .* is stored in another"):
        train(settings(nested, tmp_path, model={"quantization": "nf4", "double_quantization": False}))
    train(settings(nested, tmp_path, model={"quantization": "nf4"}))


def test_an_export_is_held_against_the_run_and_nothing_else(wide, tmp_path) -> None:
    """On other weights the same adapter is another model, which equals itself."""
    train(settings(wide("llama"), tmp_path))
    for merged in (True, False):
        with pytest.raises(ConfigError, match=r"got model\.quantization=none, and what comes out is held"):
            export(tmp_path / "run", merged=merged, overrides=("model.quantization=none",))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="held against what was trained, on the run's rows"):
        export(tmp_path / "run", merged=True)


def test_a_format_whose_package_is_missing_names_it(wide, tmp_path) -> None:
    folder = tmp_path / "gptq"
    folder.mkdir()
    for file in wide("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    stated = json.loads((folder / "config.json").read_text())
    stated["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    (folder / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match="is stored in gptq, which needs a package") as caught:
        train(settings(folder, tmp_path, model={"quantization": "none"}))
    assert "gptqmodel" in caught.value.fix


def test_without_bitsandbytes_it_says_so(wide, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="quantization: nf4 needs bitsandbytes"):
        train(settings(wide("llama"), tmp_path))


def test_linears_that_stay(wide, tmp_path) -> None:
    given = settings(
        wide("llama"), tmp_path, model={"quantization": "nf4", "quantization_skip": [r"1\.mlp", "o_proj$"]}
    )
    group = assemble(given).group
    names = {
        n.removesuffix(".base_layer").removeprefix("model.") for n in quantised_linears(group.model.get_base_model())
    }
    attention = {f"layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qkv"}
    assert names == attention | {f"layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}
    told = group.backbone.decisions["quantization"]
    assert "6 linears as they are" in told
    with pytest.raises(ConfigError, match=r"'nothing' is found in none of the 15 linears"):
        assemble(changed(given, model__quantization_skip=["nothing"]))
    with pytest.raises(ConfigError, match=r"none of the 15 linears .* is left to quantise: .* and quantization_skip"):
        assemble(changed(given, model__quantization_skip=["proj"]))
    with pytest.raises(ConfigError, match=r"k_proj holds .*k_proj, which is quantised") as caught:
        assemble(changed(given, adapter__modules_to_save=["k_proj"]))
    assert "quantization_skip: [k_proj]" in caught.value.fix
    train(changed(given, adapter__modules_to_save=["o_proj"], adapter__targets=["q_proj"]))


def test_widths_that_are_no_multiple_of_the_block_stay(tiny_model, tmp_path) -> None:
    """Of hidden 32 and inner 64 only down_proj is 64 wide; int8 takes all."""
    group = assemble(settings(tiny_model("llama"), tmp_path)).group
    assert {n.split(".")[-2] for n in quantised_linears(group.model.get_base_model())} == {"down_proj"}
    group = assemble(settings(tiny_model("llama"), tmp_path, model={"quantization": "int8"})).group
    assert len(quantised_linears(group.model.get_base_model())) == 14


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_other_families(family, kind, wide, tmp_path) -> None:
    """Conv1D, whose weight lies the other way round; tied embeddings and biases."""
    summary = train(settings(wide(family), tmp_path, model={"quantization": kind}))
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]["after"]
    folder, drift = export(tmp_path / "run", merged=True)
    assert drift.base == "dequantised"
    assert drift.bases["dequantised"].kl < min(1e-4, drift.bases["full precision"].kl)
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("method", ["adalora", "ia3", "road", "randlora", "head", "layernorm", "houlsby", "prompt"])
def test_other_methods_run_over_quantised_weights(method, wide, tmp_path) -> None:
    targets = {"targets": ["q_proj", "down_proj"]} if method == "road" else {}  # it wants 64 outputs
    given = settings(wide("llama"), tmp_path, adapter={"method": method, **targets})
    summary = train(changed(given, training__steps=3))
    assert summary["decisions"]["quantization"].startswith("nf4")
    assert evaluate(tmp_path / "run")["metrics"]["loss"] == pytest.approx(summary["metrics"]["after"]["loss"], rel=1e-5)


def test_packing_checkpointing_and_dora(wide, tmp_path) -> None:
    given = settings(wide("llama"), tmp_path, adapter={"dropout": 0.0})
    plain = train(given)
    packed = train(
        changed(
            given, output=str(tmp_path / "packed"), data__packing=True, data__max_length=64,
            training__gradient_checkpointing=True,
        )
    )  # fmt: skip
    assert packed["metrics"]["after"]["loss"] == pytest.approx(plain["metrics"]["after"]["loss"], rel=0.02)
    dora = train(changed(given, output=str(tmp_path / "dora"), adapter__dora=True))
    assert evaluate(tmp_path / "dora")["metrics"]["loss"] == pytest.approx(dora["metrics"]["after"]["loss"], rel=1e-5)


def test_biases_are_told_before_anything_is_loaded(wide, tmp_path) -> None:
    with pytest.raises(ValueError, match="training biases over quantised weights is not proved"):
        settings(wide("qwen2"), tmp_path, adapter={"bias": "all"})


def test_half_precision_around_the_codes(wide, tmp_path) -> None:
    """What is not quantised in bfloat16, adapters in float32 (trap 17), products in bfloat16."""
    given = settings(wide("llama"), tmp_path, training={"precision": "bf16"})
    summary = train(given)
    assert "products in bfloat16" in summary["decisions"]["quantization"]
    group = open_run(tmp_path / "run").group
    dtypes = {p.dtype for n, p in group.model.named_parameters() if p.is_floating_point() and ".lora_" not in n}
    assert dtypes == {torch.bfloat16}
    assert {t.dtype for t in group.members[0].tensors.values()} == {torch.float32}
    assert isinstance(generate(Path(given.output), "the quick", max_new_tokens=3), str)


@pytest.mark.parametrize(
    ("kind", "other", "told"),
    [
        ("nf4", "model.quantization=fp4", "model.quantization: got fp4, and the run was trained with nf4"),
        ("nf4", "model.double_quantization=false", "model.double_quantization: got False"),
        ("none", "model.quantization=nf4", "model.quantization: got nf4, and the run was trained with none"),
    ],
)
def test_a_run_is_not_used_in_another_quantisation(kind, other, told, wide, tmp_path) -> None:
    skipped = {} if kind == "none" else {"quantization_skip": ["k_proj"]}
    train(settings(wide("llama"), tmp_path, model={"quantization": kind, **skipped}))
    with pytest.raises(ConfigError, match=told):
        evaluate(tmp_path / "run", overrides=(other,))
    opened = open_run(tmp_path / "run", ("model.quantization=none",))  # the model's own weights
    assert not quantised_linears(opened.group.model)


def test_a_merge_of_a_stored_checkpoint_without_rows_is_held_against_its_codes(wide, tmp_path) -> None:
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    source, folder = wide("llama"), tmp_path / "stored"
    model: Any = AutoModelForCausalLM.from_pretrained(source, quantization_config=four, device_map={"": "cpu"})
    model.save_pretrained(folder)
    for file in (*source.glob("*token*"), *source.glob("*.jinja")):
        (folder / file.name).write_bytes(file.read_bytes())
    train(settings(folder, tmp_path, model={"quantization": "none"}))
    (tmp_path / "rows.jsonl").unlink()
    _, drift = export(tmp_path / "run", merged=True)
    assert drift.held_out is not None
    assert drift.held_out.split == "probe"
    assert drift.held_out.relative < 1e-3
