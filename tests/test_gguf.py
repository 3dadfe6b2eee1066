"""GGUF files of a run: read by transformers and by gguf, against the merged model and the adapter; planted faults."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from comparing import changed
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from wide_models import maker, settings

from peft_engine import gguf_files
from peft_engine.cli import cli
from peft_engine.errors import ConfigError, VerificationError
from peft_engine.gguf_files import LLAMA3, vocabulary
from peft_engine.run import train
from peft_engine.using import export


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("wide"), pytest.MonkeyPatch())


def unrotated(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order back to transformers': the even rows of a head, then the odd ones."""
    each = rows.reshape(heads, -1, *rows.shape[1:])
    return np.concatenate([each[:, 0::2], each[:, 1::2]], axis=1).reshape(rows.shape)


def read(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_model_and_adapter_are_those_of_the_run(kind, wide, tmp_path) -> None:
    of = settings(wide("llama"), tmp_path, model={"quantization": kind})
    train(of)
    merged, _ = export(of.output, merged=True)
    folder, drift = export(of.output, gguf=True)
    assert {path.name for path in folder.iterdir()} == {"model.gguf", "adapter.gguf", "merge.json"}
    said = json.loads((folder / "merge.json").read_text())
    assert said["gguf"]["model.gguf"]["dtype"] == "float32"
    assert said["gguf"]["adapter.gguf"] == {"pairs": 14, "alpha": 32.0}
    assert said["onto"] == drift.base == ("full precision" if kind == "none" else "dequantised")

    plain: Any = AutoModelForCausalLM.from_pretrained(merged)
    again: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-5)
    assert (again.config.rope_parameters["rope_theta"], again.config.rms_norm_eps) == pytest.approx(
        (plain.config.rope_parameters["rope_theta"], plain.config.rms_norm_eps)
    )
    for given in ("the quick brown fox 12", "<|im_start|>user\nhello<|im_end|>"):
        one, other = (
            AutoTokenizer.from_pretrained(merged)(given).input_ids,
            AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")(given).input_ids,
        )
        assert one == other

    tensors = read(folder / "model.gguf")
    query = unrotated(tensors["blk.1.attn_q.weight"], 4)  # by our own hand, not transformers'
    assert np.array_equal(query, plain.state_dict()["model.layers.1.self_attn.q_proj.weight"].numpy())
    adapter, found = load_file(Path(of.output) / "adapter" / "adapter_model.safetensors"), read(folder / "adapter.gguf")
    assert len(found) == 28
    for place, module, heads in (
        ("attn_q", "self_attn.q_proj", 4),
        ("attn_k", "self_attn.k_proj", 2),
        ("ffn_up", "mlp.up_proj", 0),
    ):
        name = f"base_model.model.model.layers.0.{module}"
        down, up = found[f"blk.0.{place}.weight.lora_a"], found[f"blk.0.{place}.weight.lora_b"]
        assert np.array_equal(down, adapter[f"{name}.lora_A.weight"].numpy())
        assert np.array_equal(unrotated(up, heads) if heads else up, adapter[f"{name}.lora_B.weight"].numpy())


def test_an_adapter_whose_base_nobody_has_is_not_written(wide, tmp_path, monkeypatch) -> None:
    """llama.cpp reads no bitsandbytes weights: where the model's own give another model, the file would mislead."""
    of = settings(wide("llama"), tmp_path, model={"quantization": "nf4"})
    train(of)
    monkeypatch.setattr("peft_engine.drift.MIN_TOP1", 0.9999)
    folder, drift = export(of.output, gguf=True)
    assert drift.bases["full precision"].top1_agreement < 0.9999 < drift.bases["dequantised"].top1_agreement
    assert {path.name for path in folder.iterdir()} == {"model.gguf", "merge.json"}
    said = json.loads((folder / "merge.json").read_text())["gguf"]["adapter.gguf"]
    assert said.startswith("not written: on the model's own weights it is not what was trained: KL")
    shown = CliRunner().invoke(cli, ["export", of.output, "--gguf", "--to", str(tmp_path / "again")])
    assert f"adapter.gguf: {said}" in shown.output
    assert "model.gguf: tensors 21, dtype float32, relative 0.0" in shown.output


def test_the_adapter_on_the_base_is_the_merged_model(wide, tmp_path) -> None:
    """As llama.cpp adds it up: W + alpha / rank · b·a, in its own order of rows; scales by rsLoRA and patterns."""
    patterns = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"up_proj": 7}}
    of = settings(
        wide("llama"), tmp_path, model={"quantization": "none"}, adapter={"rslora": True, "dropout": 0.0} | patterns
    )
    train(of)
    folder, _ = export(of.output, gguf=True)
    base = AutoModelForCausalLM.from_pretrained(wide("llama"))
    merged = PeftModel.from_pretrained(base, str(Path(of.output) / "adapter")).merge_and_unload().state_dict()
    fields, pairs, tensors = (
        GGUFReader(folder / "adapter.gguf").fields,
        read(folder / "adapter.gguf"),
        read(folder / "model.gguf"),
    )
    alpha = float(fields["adapter.lora.alpha"].contents())
    stored = load_file(wide("llama") / "model.safetensors")
    for place, module, heads in (
        ("attn_v", "self_attn.v_proj", 0),
        ("ffn_up", "mlp.up_proj", 0),
        ("attn_q", "self_attn.q_proj", 4),
    ):
        down, up = (pairs[f"blk.1.{place}.weight.lora_{side}"].astype(np.float64) for side in "ab")
        update = alpha / len(down) * up @ down
        update = unrotated(update, heads) if heads else update
        name = f"model.layers.1.{module}.weight"
        assert np.allclose(stored[name].numpy() + update, merged[name].numpy(), atol=1e-5)
        whole = tensors[f"blk.1.{place}.weight"]
        assert np.allclose(unrotated(whole, heads) if heads else whole, merged[name].numpy(), atol=1e-6)


def test_tied_embeddings_and_bfloat16(wide, tmp_path) -> None:
    folder = tmp_path / "tied"
    model: Any = AutoModelForCausalLM.from_pretrained(wide("llama"))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(wide("llama")).save_pretrained(folder)
    of = settings(folder, tmp_path, model={"quantization": "none", "dtype": "bfloat16"}, training={"precision": "bf16"})
    train(of)
    target, _ = export(of.output, gguf=True)
    names = set(read(target / "model.gguf"))
    assert "output.weight" not in names
    assert "token_embd.weight" in names
    assert json.loads((target / "merge.json").read_text())["gguf"]["model.gguf"]["dtype"] == "bfloat16"


def test_a_wrong_order_of_rows_is_caught(wide, tmp_path, monkeypatch) -> None:
    of = settings(wide("llama"), tmp_path, model={"quantization": "none"})
    train(of)
    monkeypatch.setattr(gguf_files, "reordered", lambda name, tensor, settings: tensor)
    with pytest.raises(VerificationError, match=r"tensors that are not the merged model's.*q_proj|k_proj") as caught:
        export(of.output, gguf=True)
    assert caught.value.exit_code == 7
    assert not (tmp_path / "run" / "gguf").exists()


def test_adapters_without_a_form_say_why(wide, tmp_path) -> None:
    of = changed(settings(wide("llama"), tmp_path, model={"quantization": "none"}), adapter__dora=True)
    train(of)
    told = CliRunner().invoke(cli, ["export", str(of.output), "--gguf", "--json"])
    assert told.exit_code == 0, told.output
    folder = Path(json.loads(told.stdout)["folder"])
    assert not (folder / "adapter.gguf").exists()
    assert (
        json.loads((folder / "merge.json").read_text())["gguf"]["adapter.gguf"] == "not written: llama.cpp has no DoRA"
    )


def test_other_families_and_tasks_are_refused_first(wide, tmp_path, monkeypatch) -> None:
    of = settings(wide("gpt2"), tmp_path, model={"quantization": "none"})
    train(of)
    with pytest.raises(ConfigError, match="model_type gpt2"):
        export(of.output, gguf=True)
    with pytest.raises(ConfigError, match="one folder holds one form"):
        export(of.output, gguf=True, merged=True)
    classes = settings(wide("bert"), tmp_path / "classes", "text-classification", model={"quantization": "none"})
    train(classes)
    with pytest.raises(ConfigError, match=r"llama\.cpp runs language models"):
        export(classes.output, gguf=True)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs the package gguf"):
        export(of.output, gguf=True)


def tokenizer(pre: Any, **more: Any) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "ab"])}, [("a", "b")]))
    own.pre_tokenizer = pre
    for name, part in more.items():
        setattr(own, name, part)
    own.add_special_tokens(["<end>"])
    own.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>")


def test_vocabularies() -> None:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = vocabulary(tokenizer(bytes_), 262)
    assert (found["split"], found["merges"]) == ("gpt-2", ["a b"])
    kinds = dict(zip(found["tokens"], found["types"], strict=True))
    assert (kinds["ab"], kinds["<end>"], kinds["<think>"], kinds["[PAD261]"]) == (1, 3, 4, 5)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    assert vocabulary(tokenizer(digits), 0)["split"] == "smollm"
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), raw])
    assert vocabulary(tokenizer(split), 0)["split"] == "llama-bpe"
    other = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), raw])
    for refused in (
        tokenizer(other),
        tokenizer(pre_tokenizers.Whitespace()),
        tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        tokenizer(bytes_, normalizer=normalizers.Lowercase()),
    ):
        with pytest.raises(ConfigError, match="no byte-level BPE"):
            vocabulary(refused, 0)
