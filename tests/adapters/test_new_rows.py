"""New tokens: rows of their own in the embeddings, trained and saved with the adapter; all other rows stay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import HIDDEN, assemble, config, logits_of, pair_rows, write_rows
from tiny_seq2seq import copy_rows, make_seq2seq
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_engine.config import Config
from peft_engine.errors import ConfigError
from peft_engine.run import train
from peft_engine.using import export, open_run

NEW = ["<step>", "<end>"]


def settings_of(model: Path, folder: Path, tokens: list[str] | None = None, **adapter: Any) -> Config:
    rows = [{**row, "completion": f"<step>{row['completion']}<end>"} for row in pair_rows(12)]
    given = {"rank": 4, "dropout": 0.0} | adapter if adapter.get("method", "lora") == "lora" else adapter
    return config(
        "causal-lm",
        model,
        write_rows(folder / "rows.jsonl", rows),
        folder / "out",
        model={"new_tokens": NEW if tokens is None else tokens},
        adapter=given,
        data={"split": {"eval": 0.0, "test": 0.0}},
        training={"steps": 4, "batch_size": 4, "warmup": 0.0, "learning_rate": 2e-2},
    )


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize(("family", "ends"), [("llama", 2), ("qwen2", 1), ("gpt2", 1)])
def test_only_the_new_rows_train(
    family: str, ends: int, kernels: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = settings_of(tiny_model(family), tmp_path)
    live = assemble(settings.model_copy(update={"kernels": kernels}))
    ids = live.group.backbone.new_token_ids
    plain = AutoTokenizer.from_pretrained(tiny_model(family))
    assert ids == [len(plain), len(plain) + 1]
    rows = {name: t for name, t in live.group.members[0].tensors.items() if "trainable_tokens" in name}
    assert sum(t.numel() for t in rows.values()) == ends * len(NEW) * HIDDEN
    before = {name: t.detach().clone() for name, t in rows.items()}
    entry = live.group.backbone.model.get_input_embeddings().weight
    assert entry is not None
    losses = [row["loss"] for row in live.train(4)]
    assert losses[-1] < losses[0]
    assert all(bool((t != before[name]).any(-1).all()) for name, t in rows.items()), "a new row did not move"
    original = AutoModelForCausalLM.from_pretrained(tiny_model(family)).get_input_embeddings().weight
    merged: Any = live.group.model.merge_and_unload()  # type: ignore[operator]
    table = merged.get_input_embeddings().weight
    assert torch.equal(table[: len(plain)], original)
    assert torch.equal(table[ids], next(iter(rows.values())))
    if ends == 1:
        assert merged.get_output_embeddings().weight is table


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_run_with_new_tokens(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    settings = settings_of(tiny_model(family), tmp_path)
    train(settings)
    folder = tmp_path / "out" / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(family))
    with torch.random.fork_rng():
        base.resize_token_embeddings(len(tokenizer))
    plain = PeftModel.from_pretrained(base, str(folder)).eval()
    opened = open_run(tmp_path / "out")
    batch = tokenizer("a <step> b <end>", return_tensors="pt")
    assert set(tokenizer.convert_tokens_to_ids(NEW)) <= set(batch["input_ids"][0].tolist())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with opened.group.evaluating(opened.group.members[0]) as own, torch.no_grad():
        assert torch.allclose(plain(**inputs).logits, own(**inputs).logits, atol=1e-5)
    assert export(tmp_path / "out")[1].relative < 1e-5
    merged, drift = export(tmp_path / "out", merged=True)
    assert drift.relative < 1e-4
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.config.vocab_size == len(tokenizer)


def test_full_training_is_simply_resized(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    live = assemble(settings_of(tiny_model("gpt2"), tmp_path, method="full"))
    size = len(AutoTokenizer.from_pretrained(tiny_model("gpt2")))
    assert live.group.backbone.model.get_input_embeddings().weight.shape == (size + 2, HIDDEN)
    assert logits_of(live.group, live.task, live.data["train"]).shape[-1] == size + 2


def test_the_same_rows_again(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    one, two = (assemble(settings_of(tiny_model("llama"), tmp_path)).group.members[0].tensors for _ in range(2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("tokens", "adapter", "message"),
    [
        (["<a>", "<a>"], {}, "model.new_tokens: got <a> more than once"),
        (["<a>"], {"method": "ia3"}, "model.new_tokens: ia3 would not train their rows"),
        ([], {"method": "trainable-tokens"}, "trainable-tokens trains rows of tokens: add token_indices"),
        (["<a>"], {"options": {"trainable_token_indices": [3]}}, "sets adapter.options.trainable_token_indices itself"),
    ],
)
def test_refused_in_the_settings(tokens: list[str], adapter: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, tmp_path, tokens, **adapter)


def test_two_models_in_one_are_refused(tmp_path: Path) -> None:
    model = make_seq2seq("bert2bert", tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows(12))
    settings = config("seq2seq", model, rows, tmp_path / "out", model={"new_tokens": ["<a>"]})
    with pytest.raises(ConfigError, match="is an EncoderDecoderModel, two models with embeddings of their own"):
        assemble(settings)


def test_a_token_that_is_there_already(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.new_tokens: 'a' is a token of this model already \(id "):
        assemble(settings_of(tiny_model("llama"), tmp_path, ["a"]))
