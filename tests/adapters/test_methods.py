"""Exactly the intended tensors train: counted by hand, and all others come out of training as they went in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import assemble, class_rows, config, pair_rows, write_rows

from peft_engine.errors import ConfigError

R = 4  # rank
# (in + out) summed over one layer's matrices: what one unit of rank costs there
#   llama, qwen2: q 32+32, k and v 32+16 each (GQA), o 32+32, gate and up 32+64 each, down 64+32
#   gpt2: c_attn 32+96, c_proj 32+32, c_fc 32+64, mlp.c_proj 64+32
#   bert: query, key, value, attention output 32+32 each, intermediate 32+64, output 64+32
LAYER = {
    "llama": 64 + 48 + 48 + 64 + 96 + 96 + 96,
    "qwen2": 64 + 48 + 48 + 64 + 96 + 96 + 96,
    "gpt2": 128 + 64 + 96 + 96,
    "bert": 4 * 64 + 96 + 96,
}
# outputs of one layer's matrices: DoRA's magnitudes, and biases where all matrices have them
OUTPUTS = {"llama": 32 + 16 + 16 + 32 + 64 + 64 + 32, "qwen2": 32 + 16 + 16 + 32 + 64 + 64 + 32}
OUTPUTS |= {"gpt2": 96 + 32 + 64 + 32, "bert": 4 * 32 + 64 + 32}
NORM_BIASES = {"gpt2": 2 * 2 * 32 + 32, "bert": 2 * 2 * 32 + 32}  # two norms a layer and one beside them
LORA = {family: 2 * R * LAYER[family] for family in LAYER}
POOLER = R * (32 + 32)
CLASSIFIER = 32 * 2 + 2  # bert's, two classes
BIASES = {"gpt2": 2 * OUTPUTS["gpt2"] + NORM_BIASES["gpt2"], "bert": 2 * OUTPUTS["bert"] + NORM_BIASES["bert"] + 32}
BIASES["qwen2"] = 2 * (32 + 16 + 16)  # q, k, v only
HEAD = 323 * 32  # vocabulary × hidden
LM, CLASSES = "causal-lm", "text-classification"


def lora(**options: Any) -> dict[str, Any]:
    return {"method": "lora", "rank": R, **options}


CASES: list[tuple[str, str, dict[str, Any], int]] = [
    ("llama", LM, lora(), LORA["llama"]),
    ("llama", LM, lora(rslora=True), LORA["llama"]),
    ("llama", LM, lora(lora_plus_ratio=4.0), LORA["llama"]),
    ("llama", LM, lora(init="pissa"), LORA["llama"]),
    ("llama", LM, lora(dora=True), LORA["llama"] + 2 * OUTPUTS["llama"]),
    ("llama", LM, lora(modules_to_save=["lm_head"]), LORA["llama"] + HEAD),
    ("llama", LM, lora(targets=["q_proj", "v_proj"]), 2 * R * (64 + 48)),
    ("llama", LM, lora(targets=["q_proj", "v_proj"], layers=[1]), R * (64 + 48)),
    ("llama", LM, lora(targets=r"model\.layers\.0\.mlp\..*_proj"), R * 3 * 96),
    ("llama", LM, lora(targets=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}), 2 * (R * 64 + 2 * 48)),
    ("llama", LM, {"method": "head"}, HEAD),
    ("llama", LM, {"method": "full"}, 2 * HEAD + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32),
    ("gpt2", LM, lora(), LORA["gpt2"]),
    ("gpt2", LM, lora(dora=True), LORA["gpt2"] + 2 * OUTPUTS["gpt2"]),
    ("gpt2", LM, lora(bias="lora_only"), LORA["gpt2"] + 2 * OUTPUTS["gpt2"]),
    ("gpt2", LM, lora(bias="all"), LORA["gpt2"] + BIASES["gpt2"]),
    ("gpt2", LM, {"method": "head"}, HEAD),  # untied: the embedding stays
    ("gpt2", LM, {"method": "bitfit"}, BIASES["gpt2"]),
    (
        "gpt2",
        LM,
        {"method": "full"},
        HEAD + 128 * 32 + 2 * (32 * 96 + 32 * 32 + 2 * 32 * 64 + 64) + 32 + BIASES["gpt2"],
    ),
    ("qwen2", LM, lora(), LORA["qwen2"]),
    ("qwen2", LM, lora(dora=True), LORA["qwen2"] + 2 * OUTPUTS["qwen2"]),
    ("qwen2", LM, lora(modules_to_save=["embed_tokens"]), LORA["qwen2"] + HEAD),
    ("qwen2", LM, {"method": "bitfit"}, BIASES["qwen2"]),
    ("bert", CLASSES, lora(), LORA["bert"] + POOLER + CLASSIFIER),
    ("bert", CLASSES, lora(dora=True), LORA["bert"] + POOLER + CLASSIFIER + 2 * OUTPUTS["bert"] + 32),
    ("bert", CLASSES, lora(bias="all"), LORA["bert"] + POOLER + CLASSIFIER + BIASES["bert"]),
    ("bert", CLASSES, {"method": "head"}, CLASSIFIER),
    ("bert", CLASSES, {"method": "bitfit"}, BIASES["bert"] + CLASSIFIER),
    ("llama", CLASSES, lora(), LORA["llama"] + 2 * 32),
    ("llama", CLASSES, {"method": "head"}, 2 * 32),
]


@pytest.mark.parametrize(("family", "task", "adapter", "count"), CASES)
def test_exactly_the_intended_tensors_train(
    family: str, task: str, adapter: dict[str, Any], count: int, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(12) if task == LM else class_rows(12))
    settings = config(
        task,
        tiny_model(family),
        rows,
        tmp_path / "out",
        adapter=adapter,
        data={"split": {"eval": 0.0, "test": 0.0}},
        training={"steps": 3, "batch_size": 4, "warmup": 0.0, "learning_rate": 1e-2},
    )
    run = assemble(settings)
    (member,) = run.group.members
    trainable, total = run.group.parameter_counts(member)
    assert trainable == count
    assert total == sum(p.numel() for p in run.group.model.parameters())
    assert {id(t) for t in member.tensors.values()} == {id(p) for p in run.group.model.parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in run.group.model.named_parameters()}

    run.train(3)

    moved = {name for name, p in run.group.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in run.group.model.named_parameters() if p.requires_grad}
    assert all(t.dtype == torch.float32 for t in member.tensors.values())


def test_a_mean_pooled_head_has_no_pooler(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    settings = config(
        CLASSES,
        tiny_model("bert"),
        write_rows(tmp_path / "rows.jsonl", class_rows(12, ("a", "b", "c"))),
        tmp_path / "out",
        model={"pooling": "mean"},
        adapter=lora(),
    )
    run = assemble(settings)
    assert run.group.parameter_counts(run.group.members[0])[0] == LORA["bert"] + 3 * 32 + 3
    assert not any("pooler" in name for name, _ in run.group.model.named_parameters())


def test_head_unties_the_embedding(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(12))
    run = assemble(config(LM, tiny_model("qwen2"), rows, tmp_path / "out", adapter={"method": "head"}))
    model = run.group.backbone.model
    entry, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(entry, output)
    run.train(2)
    assert not torch.equal(entry, output)
    assert not model.config.tie_word_embeddings


def test_bitfit_without_biases_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(12))
    with pytest.raises(ConfigError, match="LlamaForCausalLM has none"):
        assemble(config(LM, tiny_model("llama"), rows, tmp_path / "out", adapter={"method": "bitfit"}))


def test_olora_on_conv1d_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """peft starts it from the untransposed weight: it crashes on c_attn and silently changes the square c_proj."""
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(12))
    with pytest.raises(ConfigError, match="Conv1D"):
        assemble(config(LM, tiny_model("gpt2"), rows, tmp_path / "out", adapter=lora(init="olora")))


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "pissa_niter_4", "olora"])
def test_every_start_leaves_the_model_as_it_was(init: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(12))
    settings = config(LM, tiny_model("llama"), rows, tmp_path / "out", adapter=lora(init=init))
    run, plain = assemble(settings), assemble(settings.model_copy(update={"adapter": full_of(settings)}))
    batch = run.task.collate(run.data["train"], np.arange(3))
    with torch.no_grad():
        ours = run.task.forward(run.group.model.eval(), batch)
        wanted = plain.task.forward(plain.group.model.eval(), batch)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


def full_of(settings: Any) -> Any:
    return type(settings.adapter)(method="full")
