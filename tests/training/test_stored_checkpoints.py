"""Runs on checkpoints that are quantised already: what is refused, and what of them the task makes anew."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparing import changed
from safetensors.torch import load_file
from tiny import assemble
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from wide_models import maker, settings

from peft_engine.backbone import load_settings
from peft_engine.errors import ConfigError
from peft_engine.quantised import load_settings_of
from peft_engine.run import train
from peft_engine.stored_checkpoint import _quantised_names
from peft_engine.using import evaluate, export

CPU = torch.device("cpu")
CLASSES = "text-classification"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("wide"), pytest.MonkeyPatch())


def store(
    source: Path,
    folder: Path,
    kind: str,
    auto: Any = AutoModelForCausalLM,
    skipped: list[str] | None = None,
    **how: Any,
) -> Path:
    """What transformers writes of a model that it has quantised."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    own: dict[str, Any] = {"load_in_8bit": True} if kind == "int8" else four
    rounded = BitsAndBytesConfig(**own, llm_int8_skip_modules=skipped)
    model = auto.from_pretrained(source, quantization_config=rounded, device_map={"": "cpu"})
    model.save_pretrained(folder, **how)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def plain(model: Path, folder: Path, task: str = "causal-lm", /, **more: Any) -> Any:
    return settings(model, folder, task, **{"model": {"quantization": "none"}, **more})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("nf4", {"adapter": {"method": "full"}}, r"model.path: the checkpoint is stored in nf4, and adapter.method full"),
    ("int8", {"adapter": {"method": "full"}}, r"model.path: the checkpoint is stored in int8, and adapter.method full"),
    ("gptq", {"adapter": {"method": "full"}}, r"model.path: the checkpoint is stored in gptq, and adapter.method full"),
    ("nf4", {"adapter": {"method": "loha"}}, r"adapter.method loha is not among those proved"),
    ("int8", {"adapter": {"dora": True}}, r"adapter.dora: peft's DoRA loses the scales.* is stored in int8"),
    ("nf4", {"adapter": {"init": "lora-ga"}}, r"adapter.init: lora-ga reads the gradient"),
    ("nf4", {"training": {"parallel": "fsdp"}}, r"training.parallel: fsdp shares out weights .* is stored in nf4"),
    ("int8", {"training": {"parallel": "fsdp"}}, r"training.parallel: fsdp shares out weights"),
    ("gptq", {"training": {"parallel": "fsdp"}}, r"training.parallel: fsdp shares out weights"),
]


def stored_as(kind: str, given: Any) -> Any:
    """The model's config, as if the checkpoint were stored so."""
    found = load_settings(given.model)
    own = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    found.quantization_config = {"quant_method": kind} if kind == "gptq" else {"quant_method": "bitsandbytes", **own}
    return found


def loading(given: Any, kind: str) -> Any:
    return load_settings_of(given, AutoModelForCausalLM, stored_as(kind, given), CPU, lambda model, name: False)


@pytest.mark.parametrize(("kind", "more", "told"), REFUSED)
def test_a_stored_format_is_refused_what_a_setting_would_be(kind, more, told, wide, tmp_path) -> None:
    given = plain(wide("llama"), tmp_path, **more)
    with pytest.raises(ConfigError, match=told):
        loading(given, kind)


def test_preferences_over_a_stored_checkpoint_too(wide, tmp_path) -> None:
    given = plain(wide("llama"), tmp_path)
    with pytest.raises(ConfigError, match="stored in nf4; task dpo trains in the loop of TRL"):
        loading(given.model_copy(update={"task": "dpo"}), "nf4")


@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "road", "randlora", "head", "houlsby", "prefix"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_methods_that_run_over_codes_may(kind, method, wide, tmp_path) -> None:
    given = plain(wide("llama"), tmp_path, adapter={"method": method})
    assert loading(given, kind) == {"device_map": {"": "cpu"}}


def test_a_run_says_so_before_it_builds_anything(wide, tmp_path) -> None:
    folder = store(wide("gpt2"), tmp_path / "stored", "nf4")
    with pytest.raises(ConfigError, match="method full trains these weights") as caught:
        train(plain(folder, tmp_path, adapter={"method": "full"}))
    assert "full precision" in caught.value.fix


@pytest.mark.parametrize("pooling", ["model", "mean"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_new_head_on_a_stored_encoder_is_not_quantised(kind, pooling, wide, tmp_path) -> None:
    folder = store(wide("bert"), tmp_path / "stored", kind, AutoModel)
    given = plain(folder, tmp_path, CLASSES, model={"quantization": "none", "pooling": pooling})
    summary = train(given)
    told = summary["decisions"]["quantization"]
    linears = 13 if pooling == "model" else 12  # without its pooler
    assert told.startswith(f"{kind}: as the checkpoint stores it; {linears} linears")
    assert told.endswith("1 linears as they are (classifier)")
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]["after"]
    assert export(tmp_path / "run")[1].relative < 1e-3
    assert (export(tmp_path / "run", merged=True)[0] / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_head_that_is_stored_is_trained_or_refused(kind, wide, tmp_path) -> None:
    """transformers quantises all that is in the checkpoint and not in its list."""
    whole = tmp_path / "whole"
    AutoModelForSequenceClassification.from_pretrained(wide("bert")).save_pretrained(whole)
    AutoTokenizer.from_pretrained(wide("bert")).save_pretrained(whole)
    more = {"model": {"quantization": "none", "pooling": "model"}}
    folder = store(whole, tmp_path / "plain", kind, AutoModelForSequenceClassification, ["classifier"])
    backbone = assemble(plain(folder, tmp_path, CLASSES, **more)).group.backbone
    assert backbone.new_modules == []
    head = backbone.model.get_submodule("classifier").original_module
    assert torch.equal(head.weight, load_file(whole / "model.safetensors")["classifier.weight"])
    folder = store(whole, tmp_path / "rounded", kind, AutoModelForSequenceClassification, [])
    with pytest.raises(ConfigError, match=f"stores classifier in {kind}, and the head is trained"):
        assemble(plain(folder, tmp_path, CLASSES, **more))


@pytest.mark.parametrize("method", ["road", "boft"])
def test_codes_of_a_conv1d_take_no_layer_that_the_conv1d_has_not(method, wide, tmp_path, monkeypatch) -> None:
    """What trained there could never be merged."""
    monkeypatch.setattr("peft_engine.config_quantised.METHODS", ("road", "boft"))
    targets = {"targets": ["c_proj"]} if method == "road" else {"options": {"boft_block_size": 4}}
    folder = store(wide("gpt2"), tmp_path / "stored", "nf4")
    for path, kind in ((folder, "none"), (wide("gpt2"), "nf4"), (wide("gpt2"), "none")):
        given = settings(path, tmp_path, model={"quantization": kind}, adapter={"method": method, **targets})
        with pytest.raises(ConfigError, match=f"peft refuses {method} here: Target module Conv1D.* not supported"):
            assemble(given)


@pytest.mark.parametrize("method", ["adalora", "ia3", "randlora", "vera", "fourierft", "houlsby"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_a_conv1d_can_take_its_codes_can(kind, method, wide, tmp_path) -> None:
    given = settings(wide("gpt2"), tmp_path, model={"quantization": kind}, adapter={"method": method})
    assert train(changed(given, training__steps=2))["decisions"]["quantization"].startswith(kind)


def test_names_of_what_is_stored_are_read_from_parts_too(wide, tmp_path) -> None:
    whole = store(wide("llama"), tmp_path / "whole", "nf4")
    store(wide("llama"), tmp_path / "parts", "nf4", max_shard_size="30KB")
    found = _quantised_names(SimpleNamespace(path=str(tmp_path / "parts"), revision=None))  # type: ignore[arg-type]
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    assert found == _quantised_names(SimpleNamespace(path=str(whole), revision=None))  # type: ignore[arg-type]
    assert found is not None
    assert len(found) == 14
    assert _quantised_names(SimpleNamespace(path=str(wide("llama")), revision=None)) == set()  # type: ignore[arg-type]
