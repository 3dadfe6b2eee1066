"""The silent traps of fine-tuning by their numbers: each is refused, or handled so that the result is right.

Tests go through the engine's own calls. `mutants.py` takes the guards out one by one and sees tests here fail.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chat_samples import CHATML, CHATML_TOKENS, LLAMA3, MARKED, PHI3, byte_tokenizer, chatml, metaspace_tokenizer
from comparing import changed, write_config
from peft.tuners.lora.layer import Linear as PeftLinear
from ranks import done, ranks
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import assemble, chat_rows, class_rows, config, make_model, pair_rows, sentence, write_rows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerBase,
)
from wide_models import make_wide

from peft_engine import exporting, quantised
from peft_engine.adapters import files
from peft_engine.adapters.group import MemberSpec, plain_name
from peft_engine.adapters.quantised_start import lora_layers
from peft_engine.building import encode_splits
from peft_engine.config import Config
from peft_engine.config_writing import to_yaml
from peft_engine.data.batching import BatchPlan
from peft_engine.data.encoding import EncodedSet
from peft_engine.data.packing import Packs
from peft_engine.data.splitting import load_splits
from peft_engine.errors import ConfigError, DataError, Diverged, EngineError, StorageError, VerificationError
from peft_engine.evaluation import evaluate_split
from peft_engine.generation import generate_text
from peft_engine.inspection import inspect_data
from peft_engine.meters.memory import LiveBytes
from peft_engine.quantised import dequantised
from peft_engine.run import train
from peft_engine.tasks import make_task
from peft_engine.tasks.causal_lm import IGNORED
from peft_engine.training import isolation, loop
from peft_engine.training.checkpoint import MANIFEST, complete_checkpoints
from peft_engine.using import export, open_run

Models = Callable[[str], Path]
LM, CLASSES = "causal-lm", "text-classification"
NO_SPLIT = {"split": {"eval": 0.0, "test": 0.0}}


def settings(task: str, backbone: Path, folder: Path, rows: list[dict[str, Any]], **sections: Any) -> Config:
    """A config that trains on all `rows`, into `folder`/run. Constant learning rate without warm-up unless given."""
    source = write_rows(folder / "train.jsonl", rows)
    sections["data"] = NO_SPLIT | sections.get("data", {})
    plain = {"steps": 3, "batch_size": 4, "schedule": "constant", "warmup": 0, "learning_rate": 1e-2}
    sections["training"] = plain | sections.get("training", {})
    return config(task, backbone, source, folder / "run", **sections)


def remake(model: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a model folder with these attributes of its tokenizer changed."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def rewrite(model: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model folder whose weights `edit` has changed."""
    if model != folder:
        shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def rows_of(of: Config, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    lines = (Path(of.output) / name).read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def trained(of: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(of.output) / "adapter" / "adapter_model.safetensors")


def newest(of: Config) -> Path:
    return complete_checkpoints(Path(of.output) / "checkpoints")[-1]


def left_behind(of: Config) -> list[str]:
    """What a refused run wrote."""
    return sorted(path.name for path in Path(of.output).glob("*"))


def refused(of: Config, kind: type[EngineError], *parts: str, **how: bool) -> EngineError:
    """`train` raises `kind`, and its message holds all `parts`."""
    with pytest.raises(kind) as caught:
        train(of, **how)
    for part in parts:
        assert part in str(caught.value)
    return caught.value


# 1 — accumulation


@pytest.fixture(scope="module")
def whole_batches(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Config:
    of = uneven(tiny_model("llama"), tmp_path_factory.mktemp("whole"), 8)
    train(of)
    return of


def uneven(model: Path, folder: Path, micro: int) -> Config:
    steps = {"steps": 3, "batch_size": 8, "micro_batch_size": micro, "optimizer": "sgd", "learning_rate": 0.3}
    return settings(LM, model, folder, pair_rows(20), training=steps, adapter={"dropout": 0.0})


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_trap_01_accumulation_equals_one_big_batch(tiny_model, tmp_path, whole_batches, micro):
    of = uneven(tiny_model("llama"), tmp_path, micro)
    train(of)
    for row, wanted in zip(rows_of(of), rows_of(whole_batches), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    here, there = trained(of), trained(whole_batches)
    for name in there:
        torch.testing.assert_close(here[name], there[name], rtol=1e-5, atol=1e-7)
    assert any(bool(there[name].any()) for name in there if "lora_B" in name)


def test_trap_01_loss_is_the_mean_over_all_supervised_tokens(tiny_model, whole_batches):
    data = assemble(whole_batches).data["train"]
    first = BatchPlan(data.lengths, 8, whole_batches.training.seed, whole_batches.data.group_by_length).rows(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    sums, counts = [], []
    for row in first:
        ids = torch.from_numpy(data.tokens(int(row)).astype(np.int64))
        learned = torch.from_numpy(data.token_column("supervised", int(row)))[1:]
        with torch.no_grad():
            nats = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        sums.append(float(nats[learned].sum()))
        counts.append(int(learned.sum()))
    mean_of_means = np.mean([total / count for total, count in zip(sums, counts, strict=True)])
    found = rows_of(whole_batches)[0]["loss"]  # the adapter's update is still zero
    assert found == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert abs(found - mean_of_means) > 1e-3


def test_trap_01_uneven_micro_batches_of_a_classifier(tiny_model, tmp_path):
    found = []
    for micro in (5, 2):
        steps = {"batch_size": 5, "micro_batch_size": micro, "optimizer": "sgd", "learning_rate": 0.1}
        of = settings(CLASSES, tiny_model("bert"), tmp_path / str(micro), class_rows(10), training=steps,
                      adapter={"dropout": 0.0})  # fmt: skip
        train(of)
        found.append(trained(of))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-5, atol=1e-7)


# 2 — nothing supervised

# marks what role "model" says; the data calls it "assistant"
MARKS_NOBODY = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'model' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\
<|im_end|>
{% endfor %}"""


def test_trap_02_no_supervised_token_is_refused_and_shown(tiny_model, tmp_path):
    model = remake(tiny_model("llama"), tmp_path / "model", chat_template=MARKS_NOBODY)
    of = settings(LM, model, tmp_path, chat_rows(6))
    error = refused(of, DataError, "6 of 6 rows", "no token is supervised", "train.jsonl, line 1", "peft-engine data")
    assert error.exit_code == 3
    assert left_behind(of) == []

    report, show = inspect_data(of, 2)
    assert report["splits"]["train"]["dropped"] == 6
    console = Console(record=True, width=200, file=open(os.devnull, "w"), no_color=True)  # noqa: SIM115
    show(console)
    text = console.export_text()
    assert "<|im_start|>assistant↵" in text
    assert "⟦" not in text


def test_trap_02_also_where_any_share_may_be_dropped(tiny_model, tmp_path):
    model = remake(tiny_model("llama"), tmp_path / "model", chat_template=MARKS_NOBODY)
    refused(settings(LM, model, tmp_path, chat_rows(6), data={"max_dropped": 1.0}), DataError, "no token is supervised")


def test_trap_02_conversations_of_which_nothing_is_to_be_learned(tiny_model, tmp_path):
    rows = chat_rows(4)
    for message in rows[2]["messages"]:
        message["weight"] = 0
    refused(settings(LM, tiny_model("llama"), tmp_path, rows), DataError, "line 3", "no assistant turn to learn from")


# 3 — truncation


def test_trap_03_rows_that_truncation_empties_are_dropped_and_counted(tiny_model, tmp_path):
    rows = pair_rows(20)
    rows[7]["prompt"] = sentence(0, 60)
    of = settings(LM, tiny_model("llama"), tmp_path, rows, data={"max_length": 48},
                  training={"epochs": 1, "steps": None})  # fmt: skip
    summary = train(of)
    assert summary["data"]["dropped"]["train"] == 1
    assert summary["steps"] == 5  # 19 rows, 4 a step
    assert all(row["loss"] > 0.1 for row in rows_of(of))
    assert 7 not in assemble(of).data["train"].rows
    report, _ = inspect_data(of, 0)
    told = report["splits"]["train"]
    assert told["dropped"] == 1
    assert "line 8" in told["dropped_first"][0]["where"]
    assert "first 48 of" in told["dropped_first"][0]["reason"]


def test_trap_03_above_a_share_the_run_is_refused(tiny_model, tmp_path):
    rows = pair_rows(20)
    rows[7]["prompt"] = rows[9]["prompt"] = sentence(0, 60)
    of = settings(LM, tiny_model("llama"), tmp_path, rows, data={"max_length": 48})
    error = refused(of, DataError, "2 of 20 rows (10.0%)", "5.0%", "line 8", "first 48 of", "data.max_length")
    assert error.exit_code == 3
    assert left_behind(of) == []
    train(settings(LM, tiny_model("llama"), tmp_path / "more", rows, data={"max_length": 48, "max_dropped": 0.1}))


# 4 — pad is eos


def test_trap_04_eos_is_learned_and_seen_where_it_is_the_padding_too(tiny_model, tmp_path):
    model = remake(tiny_model("llama"), tmp_path / "model", pad_token="<|im_end|>")
    made = assemble(settings(LM, model, tmp_path, chat_rows(6)))
    eos = made.task.tokenizer.eos_token_id
    assert made.task.tokenizer.pad_token_id == eos
    rows = np.arange(6)
    batch = made.task.collate(made.data["train"], rows)
    lengths = torch.from_numpy(made.data["train"].lengths)
    assert lengths.min() < lengths.max()
    assert torch.equal(batch["attention_mask"].sum(1), lengths)
    for line, length in enumerate(lengths):
        ids, labels = batch["input_ids"][line], batch["labels"][line]
        assert batch["attention_mask"][line, :length].all()
        assert (ids[length:] == eos).all()
        assert (labels[length:] == IGNORED).all()
        # two turns or four, each ends in EOS; those of the assistant are learned
        turns = int((ids[:length] == eos).sum())
        assert int((labels == eos).sum()) * 2 == turns
    with made.group.evaluating(made.group.members[0]) as net, torch.no_grad():
        whole = made.task.loss(made.task.forward(net, batch), batch)
        singles = [made.task.collate(made.data["train"], np.array([row])) for row in rows]
        one_by_one = sum(made.task.loss(made.task.forward(net, single), single) for single in singles)
    torch.testing.assert_close(whole, one_by_one)


def test_trap_04_generation_sees_the_end_of_earlier_turns(tiny_model, tmp_path):
    model = remake(tiny_model("llama"), tmp_path / "model", pad_token="<|im_end|>")
    tokenizer, net = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    masks = []
    real = net.generate
    net.generate = lambda **given: masks.append(given["attention_mask"]) or real(**given)
    prompts = ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>a"]
    generate_text(net, tokenizer, prompts, 3, templated=True)
    assert masks[0].sum(1).tolist() == [len(tokenizer(text)["input_ids"]) for text in prompts]


def test_trap_04_padding_does_not_change_a_class(tiny_model, tmp_path):
    made = assemble(settings(CLASSES, tiny_model("bert"), tmp_path, class_rows(6), model={"pooling": "mean"}))
    with made.group.evaluating(made.group.members[0]) as net, torch.no_grad():
        together = made.task.forward(net, made.task.collate(made.data["train"], np.arange(6)))
        alone = [made.task.forward(net, made.task.collate(made.data["train"], np.array([row]))) for row in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


# 5 — stop token


def learned_of(
    tokenizer: PreTrainedTokenizerBase, model: Path, folder: Path, rows: list[dict[str, Any]], **data: Any
) -> list[list[str]]:
    """Learned tokens of every row, in the engine's own encoding, with `tokenizer` in place of the model's."""
    shutil.copytree(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    of = settings(LM, folder / "model", folder, rows, data=data)
    task = make_task(of)
    encoded = encode_splits(task, load_splits(of), of)["train"]
    found = []
    for row in range(len(encoded)):
        ids = encoded.tokens(row)[encoded.token_column("supervised", row)]
        found.append(task.tokenizer.convert_ids_to_tokens(ids.tolist()))
    return found


@pytest.mark.parametrize(
    ("template", "specials", "eos", "stop"),
    [
        (CHATML, CHATML_TOKENS, "<|im_end|>", "<|im_end|>"),
        (CHATML, CHATML_TOKENS, "<|endoftext|>", "<|im_end|>"),
        (MARKED, CHATML_TOKENS, "<|im_end|>", "<|im_end|>"),  # its blocks end before the stop token
        (MARKED, CHATML_TOKENS, "<|endoftext|>", "<|im_end|>"),
        (PHI3, ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"], "<|endoftext|>", "<|end|>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", ["</s>"], "</s>", "</s>"),  # prints none
    ],
)
def test_trap_05_the_token_that_ends_a_turn_is_learned(tiny_model, tmp_path, template, specials, eos, stop):
    rows = [row for row in chat_rows(6) if len(row["messages"]) == (2 if stop == "</s>" else 4)]
    found = learned_of(byte_tokenizer(template, specials, eos), tiny_model("llama"), tmp_path, rows)
    for tokens, row in zip(found, rows, strict=True):
        assert tokens.count(stop) == len(row["messages"]) // 2
        assert tokens[-1] in (stop, eos)  # Phi-3 closes a conversation twice


def test_trap_05_also_where_everything_is_learned(tiny_model, tmp_path):
    tokenizer = byte_tokenizer(CHATML, CHATML_TOKENS, "<|endoftext|>")
    found = learned_of(tokenizer, tiny_model("llama"), tmp_path, chat_rows(4), supervise="all")
    assert [tokens[-1] for tokens in found] == ["<|im_end|>"] * 4


def test_trap_05_completions_and_documents_end_in_eos(tiny_model, tmp_path):
    tokenizer = byte_tokenizer(None, CHATML_TOKENS, "<|endoftext|>")
    for name, rows in (("pairs", pair_rows(3)), ("documents", [{"text": sentence(i, 5)} for i in range(3)])):
        found = learned_of(tokenizer, tiny_model("llama"), tmp_path / name, rows)
        assert [tokens[-1] for tokens in found] == ["<|endoftext|>"] * 3


def test_trap_05_what_nothing_can_end_is_refused(tiny_model, tmp_path):
    with pytest.raises(DataError, match=r"line 1.*never stop"):
        learned_of(byte_tokenizer(None, [], None), tiny_model("llama"), tmp_path, pair_rows(2))


# 6 — dead gradients


@pytest.mark.parametrize(("task", "family"), [(LM, "llama"), (LM, "gpt2"), (CLASSES, "bert")])
def test_trap_06_gradient_checkpointing_trains_as_without(tiny_model, tmp_path, task, family):
    rows = class_rows(12) if task == CLASSES else pair_rows(12)
    found, passes = [], []
    for checkpointing in (False, True):
        steps = {"gradient_checkpointing": checkpointing, "optimizer": "sgd", "learning_rate": 0.1}
        made = assemble(settings(task, tiny_model(family), tmp_path / str(checkpointing), rows, training=steps))
        inner = next(m for name, m in made.group.model.named_modules() if ".0." in name and "Norm" in type(m).__name__)
        calls: list[int] = []
        inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        made.train(3)
        found.append(made.group.members[0].tensors)
        passes.append(len(calls))
    assert passes == [3, 6]  # activations are computed again in backward
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=1e-5, atol=1e-7)
        assert plain.detach().any(), name


def test_trap_06_checkpointing_that_cuts_gradients_off_is_refused(tiny_model, tmp_path):
    """As it was with older libraries: the reentrant kind, and inputs of the first layer that need no gradient."""
    of = settings(LM, tiny_model("llama"), tmp_path, pair_rows(8), adapter={"modules_to_save": ["lm_head"]},
                  training={"gradient_checkpointing": True})  # fmt: skip
    made = assemble(of)
    net = made.group.backbone.model
    net.disable_input_require_grads()
    net.gradient_checkpointing_enable({"use_reentrant": True})
    net.disable_input_require_grads()
    with pytest.raises(ConfigError, match=r"28 of 29 .*no gradient.*gradient_checkpointing: false"):
        made.train(1)


def test_trap_06_adapters_that_the_task_does_not_use_are_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model("gpt2"), tmp_path / "model")
    shape = GPT2Config.from_pretrained(tmp_path / "model", add_cross_attention=True)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "model")  # cross-attention to an encoder that is not there
    of = settings(LM, tmp_path / "model", tmp_path, pair_rows(8))
    error = refused(of, ConfigError, "12 of 28", "no gradient", "h.0.crossattention.c_attn.lora_A", "adapt other")
    assert error.exit_code == 2
    used = {"targets": r".*\.(attn|mlp)\.(c_attn|c_fc|c_proj)"}
    train(settings(LM, tmp_path / "model", tmp_path / "used", pair_rows(8), adapter=used))


def cut_off(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.self_attn.o_proj.weight"].zero_()


def test_trap_06_adapters_that_never_move_are_refused(tiny_model, tmp_path):
    model = rewrite(tiny_model("llama"), tmp_path / "model", cut_off)
    of = settings(LM, model, tmp_path, pair_rows(8), adapter={"targets": ["v_proj"]})
    refused(of, ConfigError, "1 adapters have not moved", "layers.1.self_attn.v_proj.lora_B")
    assert left_behind(of) == ["config.yaml", "metrics.jsonl"]


@pytest.mark.parametrize(
    "adapter", [{}, {"init": "pissa"}, {"init": "orthogonal"}, {"dora": True}, {"bias": "all"}, {"method": "bitfit"}]
)
def test_trap_06_no_false_alarm(tiny_model, tmp_path, adapter):
    """A's gradient is exactly zero at step 1, warm-up starts at learning rate 0, a key bias has next to none."""
    steps = {"steps": 5, "warmup": 3, "schedule": "linear"}
    of = settings(LM, tiny_model("qwen2"), tmp_path, pair_rows(8), adapter=adapter, training=steps)
    assert train(of)["steps"] == 5
    assert rows_of(of)[0]["learning_rate"] == 0.0


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_trap_06_several_processes_hide_no_dead_tensor(tiny_model, tmp_path, parallel):
    """Adding gradients up over processes turns one that is nowhere into zeros."""
    shutil.copytree(tiny_model("gpt2"), tmp_path / "model")
    shape = GPT2Config.from_pretrained(tmp_path / "model", add_cross_attention=True)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "model")  # cross-attention to an encoder that is not there
    of = settings(LM, tmp_path / "model", tmp_path, pair_rows(8), training={"parallel": parallel})
    ended = ranks("train", write_config(of, tmp_path / "of.yaml"), folder=tmp_path)
    assert [one.code for one in ended] == [2, 2]
    assert "12 of 28 trainable tensors got no gradient" in ended[0].err + ended[1].err


# 7 — a sharded backbone


@pytest.mark.parametrize(
    ("task", "family", "selected"),
    [(LM, "llama", {}), (LM, "qwen2", {"frozen": ["lora_A"]}), (CLASSES, "bert", {})],
    ids=str,
)
def test_trap_07_a_sharded_run_saves_whole_adapters(tiny_model, tmp_path, task, family, selected):
    """Two processes with FSDP2: every tensor of one process's file, as large, moved and loaded by plain peft."""
    rows = class_rows(10) if task == CLASSES else pair_rows(10)
    steps = {"optimizer": "sgd", "learning_rate": 0.3, **selected}  # Adam makes much of the rounding of a tiny gradient
    alone = settings(task, tiny_model(family), tmp_path, rows, adapter={"dropout": 0.1}, training=steps)
    train(alone)
    of = changed(alone, output=str(tmp_path / "sharded"), training__parallel="fsdp")
    done("train", write_config(of, tmp_path / "of.yaml"), folder=tmp_path)
    held = json.loads((Path(of.output) / "run.json").read_text())["processes"]
    assert held["parallel"] == "fsdp"
    expected, found = trained(alone), trained(of)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    for name, tensor in expected.items():
        assert tensor.any()
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    saved = load_file(newest(of) / "default.adapter.safetensors")
    live = [name for name in expected if not (selected and "lora_A" in name)]
    assert sum(t.numel() for t in saved.values()) == sum(expected[name].numel() for name in live)
    export(of.output)  # raises where plain peft's logits differ


# 8 — samples of a pack


def test_trap_08_packed_samples_are_learned_as_unpacked_ones(tiny_model, tmp_path):
    """One optimizer step per family and attention; `tests/training/test_packed.py` compares sample by sample."""
    for family in ("llama", "gpt2", "qwen2"):
        for attention in ("sdpa", "eager"):
            told = []
            for packing in (False, True):
                of = settings(LM, tiny_model(family), tmp_path / f"{family}{attention}{packing}", pair_rows(8),
                              model={"attention": attention}, data={"packing": packing, "max_length": 128},
                              adapter={"dropout": 0.0}, training={"steps": 2, "batch_size": 8})  # fmt: skip
                train(of)
                told.append([(row["loss"], row["grad_norm"]) for row in rows_of(of)])
            for plain, packed in zip(*told, strict=True):
                assert packed == pytest.approx(plain, rel=1e-5), (family, attention)


def saved(model: Any, folder: Path) -> Path:
    """A folder with this random model and a tokenizer of bytes."""
    model.save_pretrained(folder)
    chatml(pad_token="<|endoftext|>").save_pretrained(folder)
    return folder


def packed_settings(model: Path, folder: Path) -> Config:
    return settings(LM, model, folder, pair_rows(8), data={"packing": True, "max_length": 128})


def test_trap_08_a_model_whose_samples_see_each_other_is_refused(tmp_path):
    """OPT takes positions, and makes a mask of its own that knows nothing of packs; BLOOM takes none (ALiBi)."""
    torch.manual_seed(0)
    small = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=600, init_std=0.1)
    of = packed_settings(saved(OPTForCausalLM(opt), tmp_path / "opt"), tmp_path)
    with pytest.raises(ConfigError, match="OPTForCausalLM with sdpa attention lets packed samples see each other"):
        train(of)
    bloom = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    of = packed_settings(saved(BloomForCausalLM(bloom), tmp_path / "bloom"), tmp_path)
    with pytest.raises(ConfigError, match=r"BloomForCausalLM can't keep packed samples apart.*takes no position_ids"):
        train(of)
    assert not (Path(of.output) / "metrics.jsonl").exists(), "refused before anything is trained"


def test_trap_08_positions_that_go_on_are_refused(tiny_model, tmp_path):
    """A model whose samples are apart, but that counts their positions from the pack's start."""
    made = assemble(packed_settings(tiny_model("gpt2"), tmp_path))
    base: Any = made.group.backbone.model

    def counted(module: Any, positions: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.arange(positions[0].shape[1])[None],)

    isolation.prove_isolation(made.group, made.group.members[0], made.task, made.runtime)
    base.transformer.wpe.register_forward_pre_hook(counted)
    with pytest.raises(ConfigError, match="gives a packed sample other logits than alone"):
        isolation.prove_isolation(made.group, made.group.members[0], made.task, made.runtime)


def test_trap_08_a_first_token_is_never_learned(tiny_model, tmp_path):
    made = assemble(packed_settings(tiny_model("llama"), tmp_path))
    data = made.data["train"]
    data.columns["supervised"][:] = True
    batch = made.task.collate_packs(data, Packs((np.arange(len(data)),)))
    assert (batch["labels"][batch["position_ids"] == 0] == IGNORED).all()
    assert int((batch["labels"] != IGNORED).sum()) == int(data.lengths.sum()) - len(data)


# 9 — states that run on


def test_trap_09_models_with_a_running_state_are_refused(tmp_path):
    """A state-space model, and one in which some layers are convolutions over time, told by their structure."""
    torch.manual_seed(0)
    mamba = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    of = packed_settings(saved(MambaForCausalLM(mamba), tmp_path / "mamba"), tmp_path)
    with pytest.raises(ConfigError, match="MambaForCausalLM can't keep packed samples apart: it carries a state"):
        train(of)
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    lfm2 = Lfm2Config(vocab_size=300, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **layers)
    of = packed_settings(saved(Lfm2ForCausalLM(lfm2), tmp_path / "lfm2"), tmp_path)
    with pytest.raises(ConfigError, match="Lfm2ForCausalLM can't keep packed samples apart: it has conv layers"):
        train(of)
    assert not (Path(of.output) / "metrics.jsonl").exists()


# 10 — resume


class Killed(BaseException):
    """Stands for a process that ends at once."""


def watched(monkeypatch: pytest.MonkeyPatch, of: Config, die_at: int | None = None, **how: bool) -> list[list[Any]]:
    """Train, and tell the rows of every step's micro-batches; end as if killed in the `die_at`-th of them."""
    seen: list[list[Any]] = []
    real = loop.gradients

    def gradients(model: Any, task: Any, data: EncodedSet, micro_batches: Any, *rest: Any) -> Any:
        if len(seen) + 1 == die_at:
            raise Killed
        seen.append([rows.tolist() for rows in micro_batches])
        return real(model, task, data, micro_batches, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "gradients", gradients)
        if die_at:
            with pytest.raises(Killed):
                train(of, **how)
        else:
            train(of, **how)
    return seen


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_trap_10_resume_repeats_and_skips_no_sample(tmp_path, monkeypatch, kernels):
    """Fused dropout has named masks; without it every mask comes from torch's generator."""
    model = make_model("bert", tmp_path / "model", dropout=0.1)
    steps = {"steps": 8, "batch_size": 4, "micro_batch_size": 2, "save_every": 4, "log_every": 5, "schedule": "cosine",
             "warmup": 2}  # fmt: skip

    def made(name: str) -> Config:
        of = settings(CLASSES, model, tmp_path / name, class_rows(10), training=steps)
        return of.model_copy(update={"kernels": kernels})

    whole = watched(monkeypatch, made("whole"))
    before = watched(monkeypatch, made("cut"), die_at=7)  # the newest checkpoint is of step 4, in the second epoch
    after = watched(monkeypatch, made("cut"), resume=True)
    assert len(before) == 6
    assert before[:4] + after == whole
    assert [len(micro) for micro in whole[:3]] != [2, 2, 2]  # ten rows by four: one step of an epoch is smaller
    for epoch in (whole[:3], whole[3:6]):
        assert sorted(row for step in epoch for micro in step for row in micro) == list(range(10))

    ours, theirs = (Path(made(name).output) for name in ("cut", "whole"))
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-8/default.optimizer.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    kept = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    told = [[{key: row[key] for key in kept} for row in rows_of(made(name))] for name in ("cut", "whole")]
    assert told[0] == told[1]
    assert [row["step"] for row in told[0]] == [5, 8]


# 11 — restored tensors


@pytest.fixture(scope="module")
def finished(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Config:
    of = settings(CLASSES, tiny_model("bert"), tmp_path_factory.mktemp("finished"), class_rows(8))
    train(of)
    return of


@pytest.fixture
def tampered(finished: Config, tmp_path: Path) -> Callable[..., Config]:
    """(file, edit, fix) → a copy of the finished run in which `edit` changed a checkpoint file; `fix` hides it from
    the manifest's file digest."""

    def make(name: str, edit: Callable[[Path], None], fix: bool) -> Config:
        shutil.copytree(finished.output, tmp_path / "run")
        of = finished.model_copy(update={"output": str(tmp_path / "run")})
        edit(newest(of) / name)
        if fix:
            manifest = json.loads((newest(of) / MANIFEST).read_text())
            manifest["files"][name] = hashlib.sha256((newest(of) / name).read_bytes()).hexdigest()
            (newest(of) / MANIFEST).write_text(json.dumps(manifest))
        return of

    return make


def nudge(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-6
    save_file(tensors, path)


def test_trap_11_every_restored_tensor_is_compared(tampered):
    error = refused(tampered("default.adapter.safetensors", nudge, fix=True), StorageError, "not restored", resume=True)
    assert error.exit_code == 8


@pytest.mark.parametrize("name", ["default.adapter.safetensors", "default.optimizer.safetensors"])
def test_trap_11_altered_files_are_refused(tampered, name):
    of = tampered(name, nudge, fix=False)
    refused(of, StorageError, name, "altered", f"Delete {newest(of)}", resume=True)


def test_trap_11_missing_files_are_refused(tampered):
    refused(tampered("default.optimizer.safetensors", Path.unlink, fix=False), StorageError, "missing", resume=True)


def test_trap_11_the_adapter_is_restored(tampered, finished):
    of = tampered(MANIFEST, lambda path: None, fix=False)
    train(of, resume=True)
    for name, tensor in trained(finished).items():
        assert torch.equal(trained(of)[name], tensor)


# 12 — drift of a merge


@pytest.fixture
def wobbly(tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Config]:
    """noise → a finished run whose merge moves every matrix by so much, and whose reload is not looked at."""

    def make(noise: float) -> Config:
        of = settings(LM, tiny_model("llama"), tmp_path, pair_rows(30), data={"split": {"eval": 0.0, "test": 0.4}})
        train(of)
        merge = exporting._merge

        def moved(model: Any) -> Any:
            merged = merge(model)
            torch.manual_seed(0)
            with torch.no_grad():
                for weight in merged.parameters():
                    weight.add_(torch.randn_like(weight), alpha=noise)
            return merged

        monkeypatch.setattr(exporting, "_merge", moved)
        monkeypatch.setattr(exporting, "BOUNDS", {torch.float32: 1e9})
        return of

    return make


def test_trap_12_a_merge_that_drifts_is_refused(wobbly):
    of = wobbly(0.1)
    with pytest.raises(VerificationError, match=r"not what was trained: KL .* on 12 test rows") as caught:
        export(of.output, merged=True)
    assert caught.value.exit_code == 7
    assert not [path.name for path in Path(of.output).iterdir() if "merged" in path.name]


def test_trap_12_the_bound_is_the_users(wobbly):
    of = wobbly(1e-3)
    with pytest.raises(VerificationError, match="bound 1e-09"):
        export(of.output, merged=True, max_kl=1e-9)
    folder, drift = export(of.output, merged=True)
    kept = json.loads((folder / "merge.json").read_text())["held_out"]
    assert 1e-9 < drift.held_out.kl == kept["kl"] < 0.05
    assert kept["bounds"] == {"kl": 0.05, "top1_agreement": 0.9}


@pytest.mark.parametrize("format", ["int8", "bf16"])
def test_trap_12_a_rounded_run_is_merged_onto_its_own_weights_and_says_how_far_it_is(tiny_model, tmp_path, format):
    model, data = {"frozen_compute": format}, {"split": {"eval": 0.0, "test": 0.4}}
    of = settings(LM, tiny_model("llama"), tmp_path, pair_rows(30), model=model, data=data)
    train(of)
    folder, drift = export(of.output, merged=True)
    kept = json.loads((folder / "merge.json").read_text())
    assert kept["frozen_compute"] == format
    assert kept["reloaded"]["relative"] == drift.relative < 1e-5  # the reload is what was merged
    assert 1e-8 < kept["held_out"]["kl"] < 0.05
    assert kept["held_out"]["relative"] > 1e-4
    merged = load_file(folder / "model.safetensors")
    for name, weight in load_file(tiny_model("llama") / "model.safetensors").items():
        if "proj" not in name:
            assert torch.equal(merged[name], weight)
    with pytest.raises(VerificationError, match="bound 1e-09"):
        export(of.output, merged=True, target=tmp_path / "other", max_kl=1e-9)
    assert not (tmp_path / "other").exists()
    assert export(of.output)[1].relative < 1e-5  # the adapter in plain peft, on weights that nobody rounded


@pytest.fixture(scope="module")
def quantised_model(tmp_path_factory):
    return make_wide("llama", tmp_path_factory.mktemp("quantised") / "llama", pytest.MonkeyPatch())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trap_12_a_quantised_run_is_merged_onto_the_base_that_keeps_its_outputs(quantised_model, tmp_path, kind):
    data = {"split": {"eval": 0.0, "test": 0.4}}
    of = settings(LM, quantised_model, tmp_path, pair_rows(30), model={"quantization": kind}, data=data)
    train(of)
    folder, drift = export(of.output, merged=True)
    kept = json.loads((folder / "merge.json").read_text())
    both = kept["candidates"]
    assert set(both) == {"full precision", "dequantised"}
    assert kept["onto"] == drift.base == min(both, key=lambda base: both[base]["kl"])
    assert 10 * abs(both["dequantised"]["kl"]) < both["full precision"]["kl"] < 0.05
    assert both[kept["onto"]] == kept["held_out"] == drift.held_out.to_json()
    assert both["dequantised"]["relative"] < 1e-5 < both["full precision"]["relative"]
    assert both["dequantised"]["top1_agreement"] > 0.99  # of 221 places one is a tie but for the last bit
    merged, own = load_file(folder / "model.safetensors"), load_file(quantised_model / "model.safetensors")
    opened = open_run(of.output)
    deltas = {
        name: layer.get_delta_weight("default") for name, layer in lora_layers(opened.group.model, "default").items()
    }
    for name, weight in own.items():
        module = name.removesuffix(".weight")
        if module in deltas:
            base = opened.group.model.get_base_model().get_submodule(module).get_base_layer()
            assert torch.allclose(merged[name], dequantised(base) + deltas[module].detach(), atol=1e-6)
            assert not torch.allclose(merged[name], weight + deltas[module].detach(), atol=1e-3)
        else:
            assert torch.equal(merged[name], weight)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_trap_12_the_full_precision_base_is_taken_where_it_is_nearer(quantised_model, tmp_path, monkeypatch):
    """The choice is by what was measured: here the dequantised weights are spoiled a little."""
    data = {"split": {"eval": 0.0, "test": 0.4}}
    of = settings(LM, quantised_model, tmp_path, pair_rows(30), model={"quantization": "int8"}, data=data)
    train(of)
    numbers = quantised.dequantised

    def spoiled(module: Any) -> torch.Tensor:
        found = numbers(module)
        return found + 0.05 * found.std() * torch.randn(found.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(quantised, "dequantised", spoiled)
    folder, drift = export(of.output, merged=True)
    kept = json.loads((folder / "merge.json").read_text())
    assert kept["onto"] == drift.base == "full precision"
    assert kept["candidates"]["full precision"]["kl"] < kept["candidates"]["dequantised"]["kl"]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trap_12_a_wrong_merge_of_a_quantised_run_is_caught(quantised_model, tmp_path, monkeypatch, kind):
    """The adapter folded in with the wrong sign, on both bases, in a model that reloads as it was written."""
    data = {"split": {"eval": 0.0, "test": 0.4}}
    training = {"steps": 12, "learning_rate": 3e-2}
    of = settings(
        LM, quantised_model, tmp_path, pair_rows(30), model={"quantization": kind}, data=data, training=training
    )
    train(of)
    delta = PeftLinear.get_delta_weight
    monkeypatch.setattr(PeftLinear, "get_delta_weight", lambda layer, adapter: -delta(layer, adapter))
    monkeypatch.setattr(exporting, "BOUNDS", {torch.float32: 1e9})
    with pytest.raises(VerificationError, match=r"not what was trained: KL .* on 12 test rows") as caught:
        export(of.output, merged=True)
    assert caught.value.exit_code == 7
    assert not [path.name for path in Path(of.output).iterdir() if "merged" in path.name]


def test_trap_12_without_the_rows_no_base_is_chosen(quantised_model, tmp_path):
    of = settings(LM, quantised_model, tmp_path, pair_rows(30), model={"quantization": "nf4"})
    train(of)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match="held against what was trained, on the run's rows"):
        export(of.output, merged=True)
    assert not (tmp_path / "run" / "merged").exists()


# 13 — tied embeddings


def probe(model: Any) -> torch.Tensor:
    ids = torch.arange(60).reshape(3, 20)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids).logits
    return logits


@pytest.mark.parametrize(
    ("adapter", "stays_tied"),
    [
        ({}, True),
        ({"targets": ["q_proj", "embed_tokens"]}, False),
        ({"targets": ["q_proj", "lm_head"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"method": "head"}, False),
        ({"method": "full"}, True),
    ],
)
def test_trap_13_tied_embeddings_survive_the_merge(tiny_model, tmp_path, adapter, stays_tied):
    of = settings(LM, tiny_model("qwen2"), tmp_path, pair_rows(12), adapter=adapter)
    train(of)
    opened = open_run(of.output)
    wanted = probe(opened.group.model)
    untrained = probe(AutoModelForCausalLM.from_pretrained(tiny_model("qwen2")))
    assert (wanted - untrained).abs().max() > 1e-2
    folder, _ = export(of.output, merged=True)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(probe(plain), wanted, rtol=1e-4, atol=1e-4)
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == stays_tied
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == stays_tied  # other tools obey it


def test_trap_13_a_merge_that_is_not_what_was_trained_is_refused(tiny_model, tmp_path, monkeypatch):
    """peft's own merge folds the update of the head into the embeddings that share its weight."""
    of = settings(LM, tiny_model("qwen2"), tmp_path, pair_rows(12), adapter={"targets": ["q_proj", "lm_head"]})
    train(of)
    monkeypatch.setattr(exporting, "_merge", lambda model: model.merge_and_unload(safe_merge=True))
    with pytest.raises(VerificationError, match="other logits than the trained one") as caught:
        export(of.output, merged=True)
    assert caught.value.exit_code == 7
    export(of.output)  # as an adapter it is right


# 14 — heads and other modules trained in full


@pytest.mark.parametrize(
    ("task", "family", "adapter", "pooling"),
    [
        (CLASSES, "bert", {}, "mean"),
        (CLASSES, "bert", {}, "model"),
        (CLASSES, "llama", {"bias": "all"}, "model"),
        (CLASSES, "bert", {"method": "head"}, "mean"),
        (CLASSES, "bert", {"method": "bitfit"}, "mean"),
        (CLASSES, "bert", {"method": "full"}, "model"),
        (LM, "qwen2", {"modules_to_save": ["lm_head"], "bias": "all"}, "auto"),
    ],
)
def test_trap_14_every_trained_tensor_comes_back(tiny_model, tmp_path, task, family, adapter, pooling):
    rows = class_rows(8) if task == CLASSES else pair_rows(8)
    of = settings(task, tiny_model(family), tmp_path, rows, adapter=adapter, model={"pooling": pooling})
    start_of = {plain_name(n, "default"): t.detach().clone() for n, t in assemble(of).group.members[0].tensors.items()}
    train(of)
    kept = load_file(newest(of) / "default.adapter.safetensors")
    opened = open_run(of.output)
    back = {plain_name(name, "default"): tensor for name, tensor in opened.group.members[0].tensors.items()}
    assert back.keys() == kept.keys() == start_of.keys()
    for name in kept:
        assert torch.equal(back[name], kept[name]), name
    if task == CLASSES:
        heads = [name for name in kept if "classifier" in name or "score" in name]
        assert heads
        assert all(not torch.equal(kept[name], start_of[name]) for name in heads)
    if opened.group.method == "lora":
        assert export(of.output)[1].relative < 1e-5  # plain peft finds the head too


def without_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "classifier" not in name}


def test_trap_14_a_file_without_the_head_is_noticed(tiny_model, tmp_path, monkeypatch):
    real = files.save_file
    monkeypatch.setattr(files, "save_file", lambda tensors, path, notes: real(without_head(tensors), path, notes))
    of = settings(CLASSES, tiny_model("bert"), tmp_path, class_rows(8))
    assert refused(of, VerificationError, "differs from the trained weights", "classifier").exit_code == 7
    assert not (Path(of.output) / "adapter").exists()


def test_trap_14_a_head_that_peft_would_not_save_is_noticed(tiny_model, tmp_path, monkeypatch):
    real = files.get_peft_model_state_dict
    monkeypatch.setattr(files, "get_peft_model_state_dict", lambda model, **how: without_head(real(model, **how)))
    refused(settings(CLASSES, tiny_model("bert"), tmp_path, class_rows(8)), VerificationError, "peft would leave 2 of")


# 15 — keys


def drop(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(sorted(tensors)[0])


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.nobody.lora_A.weight"] = torch.zeros(2, 2)


def bend(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


@pytest.fixture(scope="module")
def runs(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory, finished: Config) -> dict[str, Path]:
    of = settings(LM, tiny_model("gpt2"), tmp_path_factory.mktemp("full"), pair_rows(8), adapter={"method": "full"})
    train(of)
    return {"lora": Path(finished.output), "full": Path(of.output)}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("edit", "word"), [(drop, "missing"), (add, "unexpected"), (bend, "has shape"), (rename, "missing")]
)
def test_trap_15_an_adapter_that_does_not_fit_is_refused(runs, tmp_path, method, edit, word):
    shutil.copytree(runs[method], tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    with pytest.raises(StorageError, match=word) as caught:
        open_run(tmp_path / "run")
    assert caught.value.exit_code == 8
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_trap_15_an_adapter_that_fits_is_loaded(runs, method):
    opened = open_run(runs[method])
    tensors, _ = files.adapter_content(opened.group, opened.group.members[0])
    saved = load_file(runs[method] / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)


# 17 — narrow weights


@pytest.mark.parametrize("adapter", [{"targets": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_trap_16_the_fused_loss_sees_an_adapter_on_the_head(tiny_model, tmp_path, adapter):
    """Both runs end at the same head and the same loss, fused and plain, and the head moved."""
    plain = settings(LM, tiny_model("llama"), tmp_path, pair_rows(12), adapter=adapter | {"dropout": 0.0})
    plain = plain.model_copy(update={"kernels": "off", "output": str(tmp_path / "plain")})
    fused = plain.model_copy(update={"kernels": "auto", "output": str(tmp_path / "fused")})
    found = [train(each) for each in (fused, plain)]
    assert found[0]["kernels"]["swapped"]["linear_cross_entropy"] == 1
    assert found[1]["kernels"] is None
    losses = [run["metrics"]["after"]["loss"] for run in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    files_ = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("fused", "plain")]
    heads = [name for name in files_[0] if "lm_head" in name]
    assert heads
    for name in heads:
        assert files_[0][name].abs().max() > 0
        torch.testing.assert_close(files_[0][name], files_[1][name], rtol=1e-3, atol=1e-5)


def test_trap_27_disabled_switched_and_merged_adapters_are_honoured(tiny_model, tmp_path):
    """A fused model gives what peft gives in every state; DPO's reference model is the disabled one."""
    rows = pair_rows(12)
    of = settings(LM, tiny_model("llama"), tmp_path, rows, adapter={"dropout": 0.0})
    specs = [MemberSpec("one", 0, 0.01), MemberSpec("two", 1, 0.01)]
    fused, plain = assemble(of, specs), assemble(of.model_copy(update={"kernels": "off"}), specs)
    for each in (fused, plain):
        generator = torch.Generator().manual_seed(5)
        for name, tensor in each.group.model.named_parameters():
            if "lora_B" in name:
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    batch = fused.task.collate(fused.data["train"], np.arange(4))
    model, other = fused.group.model, plain.group.model
    seen = []

    def same() -> None:
        got, want = fused.task.forward(model, batch), plain.task.forward(other, batch)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert not any(torch.allclose(got, before, atol=1e-3) for before in seen), "this state changed nothing"
        seen.append(got.detach())

    same()
    for each in (model, other):
        each.set_adapter("two")
    same()
    for each in (model, other):
        each.base_model.set_adapter(["one", "two"])
    same()
    with model.disable_adapter(), other.disable_adapter():
        same()
    both = seen[2]
    for each in (model, other):
        each.merge_adapter()
    for each, task in ((model, fused.task), (other, plain.task)):
        torch.testing.assert_close(task.forward(each, batch), both, rtol=1e-4, atol=1e-4)
        each.unmerge_adapter()
        torch.testing.assert_close(task.forward(each, batch), both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("task", "family", "adapter"),
    [
        (LM, "llama", {"dropout": 0.0}),
        (LM, "qwen2", {"modules_to_save": ["lm_head"], "bias": "all", "dropout": 0.0}),
        (LM, "qwen2", {"method": "head"}),
        (LM, "qwen2", {"method": "bitfit"}),
        (CLASSES, "bert", {"dropout": 0.0}),
        (CLASSES, "bert", {"method": "full"}),
    ],
)
def test_trap_17_small_updates_of_a_bf16_backbone_are_kept(tiny_model, tmp_path, task, family, adapter):
    rows = class_rows(8) if task == CLASSES else pair_rows(8)
    rate = 1e-6
    of = settings(task, tiny_model(family), tmp_path, rows, adapter=adapter, model={"dtype": "bfloat16"},
                  training={"learning_rate": rate, "precision": "bf16", "steps": 4})  # fmt: skip
    made = assemble(of)
    tensors = made.group.members[0].tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    frozen = {p.dtype for p in made.group.backbone.model.parameters() if not p.requires_grad}
    assert frozen == (set() if adapter.get("method") == "full" else {torch.bfloat16})
    started = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    train(of)
    kept = load_file(newest(of) / "default.adapter.safetensors")
    assert {tensor.dtype for tensor in [*kept.values(), *trained(of).values()]} == {torch.float32}
    lost = 0.0
    for name, before in started.items():
        step = kept[name] - before
        assert step.any(), name
        assert step.abs().max() <= 4.1 * rate
        lost += float((before.bfloat16() + step.bfloat16() == before.bfloat16()).float().mean()) / len(started)
    assert lost > 0.2  # in bf16 such steps would vanish


def test_trap_17_dtypes_that_do_not_mix_are_refused(tiny_model, tmp_path):
    of = settings(CLASSES, tiny_model("bert"), tmp_path, class_rows(8), model={"dtype": "bfloat16"})
    refused(of, ConfigError, "model.dtype", "float32", "training.precision: bf16")
    of = settings(CLASSES, tiny_model("bert"), tmp_path, class_rows(8), model={"dtype": "bfloat16"},
                  adapter={"method": "bitfit"}, training={"precision": "bf16"})  # fmt: skip
    refused(of, ConfigError, "model.dtype", "LayerNorm", "Set model.dtype: float32")


def test_trap_17_what_was_trained_can_be_used(tiny_model, tmp_path):
    """fp32 heads in a bf16 backbone: loaded, generated with and exported as they are."""
    of = settings(LM, tiny_model("qwen2"), tmp_path, chat_rows(8), model={"dtype": "bfloat16"},
                  training={"precision": "bf16"}, adapter={"method": "head"},
                  evaluation={"generate_rows": 2, "max_new_tokens": 2})  # fmt: skip
    assert train(of)["metrics"]["after"]["generated_rows"] == 2
    assert {tensor.dtype for tensor in open_run(of.output).group.members[0].tensors.values()} == {torch.float32}
    export(of.output, merged=True)
    for pooling in ("mean", "model"):
        of = settings(CLASSES, tiny_model("bert"), tmp_path / pooling, class_rows(8),
                      model={"dtype": "bfloat16", "pooling": pooling}, training={"precision": "bf16"})  # fmt: skip
        train(of)
        back = {plain_name(n, "default"): t for n, t in open_run(of.output).group.members[0].tensors.items()}
        kept = load_file(newest(of) / "default.adapter.safetensors")
        assert back.keys() == kept.keys()
        assert all(tensor.dtype == torch.float32 and torch.equal(tensor, kept[name]) for name, tensor in back.items())
        export(of.output)
        export(of.output, merged=True)


# 18 — BOS


def llama_with_bos(model: Path, folder: Path, template: str | None) -> Path:
    """A model folder whose tokenizer adds <s> by itself."""
    shutil.copytree(model, folder)
    tokenizer = metaspace_tokenizer(template, ["<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
                                    "</s>", bos_token="<s>")  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rows", [chat_rows(4), pair_rows(4), [{"text": sentence(i, 4)} for i in range(4)]])
def test_trap_18_one_bos(tiny_model, tmp_path, rows):
    model = llama_with_bos(tiny_model("llama"), tmp_path / "model", LLAMA3)
    of = settings(LM, model, tmp_path, rows)
    task = make_task(of)
    data = encode_splits(task, load_splits(of), of)["train"]
    bos = task.tokenizer.bos_token_id
    for row in range(4):
        assert (data.tokens(row) == bos).tolist() == [True] + [False] * (len(data.tokens(row)) - 1)


@pytest.mark.parametrize("rows", [[{"text": "<s>the quick"}], [{"prompt": "<s>the", "completion": " quick"}]])
def test_trap_18_two_bos_are_refused(tiny_model, tmp_path, rows):
    model = llama_with_bos(tiny_model("llama"), tmp_path / "model", None)
    refused(settings(LM, model, tmp_path, rows), DataError, "line 1", "two '<s>'", "Remove it")


def test_trap_18_a_template_that_prints_two_is_refused(tiny_model, tmp_path):
    model = llama_with_bos(tiny_model("llama"), tmp_path / "model", "{{ bos_token }}" + LLAMA3)
    refused(settings(LM, model, tmp_path, chat_rows(4)), DataError, "line 1", "two '<s>'")


def test_trap_18_generation_starts_with_one(tiny_model, tmp_path):
    model = llama_with_bos(tiny_model("llama"), tmp_path / "model", LLAMA3)
    tokenizer, net = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    given = []
    real = net.generate
    net.generate = lambda **how: given.append(how["input_ids"]) or real(**how)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a cat"}], tokenize=False)
    for prompt, templated in ((chat, True), ("a cat", False)):
        generate_text(net, tokenizer, [prompt], 1, templated=templated)
        ids = given.pop()[0]
        assert (ids == tokenizer.bos_token_id).tolist() == [True] + [False] * (len(ids) - 1)
        assert tokenizer.eos_token_id not in ids  # this tokenizer adds one, and what follows it is another text
    generate_text(net, tokenizer, [chat, "a cat"], 1, templated=[True, False])  # rows of a mixture
    assert ((given.pop() == tokenizer.bos_token_id).sum(1) == 1).all()


# 19 — stale cache


def test_trap_19_the_cache_is_found_by_content(tiny_model, tmp_path, monkeypatch):
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    cache = tmp_path / "cache"

    def encoded(folder: Path | None, **data: Any) -> EncodedSet:
        given = {"max_length": 40, "max_dropped": 0.9, "cache": str(folder) if folder else None, **data}
        of = config(LM, tmp_path / "model", tmp_path / "train.jsonl", tmp_path / "run", data=NO_SPLIT | given)
        return encode_splits(make_task(of), load_splits(of), of)["train"]

    def same(one: EncodedSet, other: EncodedSet) -> bool:
        pairs = [(one.input_ids, other.input_ids), (one.columns["supervised"], other.columns["supervised"])]
        return all(np.array_equal(a, b) for a, b in pairs)

    def template(text: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        tokenizer.chat_template = text
        tokenizer.save_pretrained(tmp_path / "model")

    def lower_case() -> None:
        path = tmp_path / "model" / "tokenizer.json"
        content = json.loads(path.read_text())
        content["normalizer"] = {"type": "Lowercase"}
        path.write_text(json.dumps(content))

    rows = chat_rows(8)
    rows[0]["messages"][0]["content"] = "The QUICK fox"
    write_rows(tmp_path / "train.jsonl", rows)
    last = encoded(cache)
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr("peft_engine.tasks.causal_lm.CausalLM.encode", lambda *_: pytest.fail("not from the cache"))
        assert same(encoded(cache), last)

    changes: list[tuple[Callable[[], Any], dict[str, Any]]] = [
        (lambda: write_rows(tmp_path / "train.jsonl", [*rows[1:], rows[0]]), {}),
        (lambda: template(CHATML.replace("{{ m.content }}", "{{ m.content }}!")), {}),
        (lower_case, {}),
        (lambda: None, {"max_length": 20}),
        (lambda: None, {"supervise": "all"}),
        (lambda: None, {"supervise": "last"}),
    ]
    for change, data in changes:
        change()
        now = encoded(cache, **data)
        assert same(now, encoded(None, **data))
        assert not same(now, last)
        last = encoded(cache)


def test_trap_19_labels_are_part_of_the_key(tiny_model, tmp_path):
    found = []
    for labels in (["no", "yes"], ["yes", "no"]):
        of = settings(CLASSES, tiny_model("bert"), tmp_path, class_rows(8),
                      data={"cache": str(tmp_path / "cache"), "labels": labels})  # fmt: skip
        found.append(assemble(of).data["train"].columns["label"])
    assert np.array_equal(found[0], 1 - found[1])


def test_trap_19_a_damaged_cache_is_written_anew(tiny_model, tmp_path):
    of = settings(LM, tiny_model("llama"), tmp_path, pair_rows(8), data={"cache": str(tmp_path / "cache")})
    whole = assemble(of).data["train"]
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        again = assemble(of).data["train"]
        assert np.array_equal(again.input_ids, whole.input_ids)
        assert all(np.array_equal(again.columns[name], whole.columns[name]) for name in whole.columns)
        assert np.array_equal(again.units, whole.units)
        assert np.array_equal(again.rows, whole.rows)
        assert len(path.read_bytes()) == len(content)
        assert path.read_bytes() != damaged


# 20 — the schedule's steps


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_trap_20_the_schedule_counts_optimizer_steps(tiny_model, tmp_path, parallel):
    """Neither processes nor micro-batches enter: two epochs of 10 rows by 4 are 6 steps, down to almost nothing."""
    steps = {"epochs": 2, "steps": None, "schedule": "cosine", "warmup": 2, "micro_batch_size": 1}
    of = settings(LM, tiny_model("llama"), tmp_path, pair_rows(10), training={**steps, "parallel": parallel})
    done("train", write_config(of, tmp_path / "of.yaml"), folder=tmp_path)
    rates = [row["learning_rate"] for row in rows_of(of)]
    falling = [(1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3)]
    assert rates == pytest.approx([1e-2 * factor for factor in (0, 1 / 2, 1, *falling)])


# 21 — targets


@pytest.mark.parametrize(
    ("adapter", "parts"),
    [
        ({"targets": ["q_proj", "v_prjo"]}, ("adapter.targets", "'v_prjo'", "Nearest: v_proj")),
        ({"targets": r".*\.query"}, ("adapter.targets", r"'.*\\.query'", "q_proj")),
        ({"layers": [0, 7]}, ("adapter.layers", "layer 7", "0 to 1")),
        ({"rank_pattern": {"query": 4}}, ("adapter.rank_pattern", "'query'", "q_proj")),
        ({"alpha_pattern": {"query": 4}}, ("adapter.alpha_pattern", "'query'", "q_proj")),
        ({"targets": ["q_proj"], "rank_pattern": {"v_proj": 4}}, ("adapter.rank_pattern", "'v_proj'", "q_proj")),
        ({"modules_to_save": ["lm_heda"]}, ("adapter.modules_to_save", "'lm_heda'", "Nearest: lm_head")),
    ],
)
def test_trap_21_a_name_that_matches_nothing_is_refused(tiny_model, tmp_path, adapter, parts):
    of = settings(LM, tiny_model("llama"), tmp_path, pair_rows(8), adapter=adapter)
    assert refused(of, ConfigError, *parts).exit_code == 2
    assert left_behind(of) == []


# 22 — weights that start at random


def lose(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        del weights[name]

    return edit


def misname(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if ".mlp." in name]:
        weights[name.replace(".mlp.", ".ffn.")] = weights.pop(name)


def shrink(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("edit", "lost"),
    [
        (lose("model.layers.1.mlp.down_proj.weight"), "1 pretrained tensors"),
        (lose("lm_head.weight"), "lm_head.weight"),
        (misname, "6 pretrained tensors"),
        (shrink, "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_trap_22_pretrained_tensors_that_would_start_at_random_are_refused(tiny_model, tmp_path, edit, lost):
    model = rewrite(tiny_model("llama"), tmp_path / "model", edit)
    of = settings(LM, model, tmp_path, pair_rows(8))
    assert refused(of, ConfigError, lost, "at random", str(model)).exit_code == 2
    assert left_behind(of) == []


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_trap_22_also_under_a_new_head(tiny_model, tmp_path, pooling):
    model = rewrite(tiny_model("bert"), tmp_path / "model", lose("encoder.layer.1.output.dense.bias"))
    of = settings(CLASSES, model, tmp_path, class_rows(8), model={"pooling": pooling})
    refused(of, ConfigError, "encoder.layer.1.output.dense.bias")


def test_trap_22_a_new_head_is_accepted_and_an_old_one_kept(tiny_model, tmp_path):
    first = settings(CLASSES, tiny_model("bert"), tmp_path / "first", class_rows(8), adapter={"method": "head"})
    made = assemble(first)
    assert made.group.backbone.new_modules == ["classifier"]
    train(first)
    export(first.output, merged=True, target=tmp_path / "merged")
    again = assemble(settings(CLASSES, tmp_path / "merged", tmp_path / "again", class_rows(8)))
    assert again.group.backbone.new_modules == []  # two classes as before: the trained head goes on
    three = class_rows(9, ("a", "b", "c"))
    assert assemble(settings(CLASSES, tmp_path / "merged", tmp_path / "three", three)).group.backbone.new_modules == [
        "classifier"
    ]


def test_trap_22_an_untrained_pooler_is_refused_or_not_used(tiny_model, tmp_path):
    def lose_pooler(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith("pooler.")]:
            del weights[name]

    model = rewrite(tiny_model("bert"), tmp_path / "model", lose_pooler)
    of = settings(CLASSES, model, tmp_path, class_rows(8), model={"pooling": "model"})
    refused(of, ConfigError, "2 pretrained tensors", "pooler", "model.pooling: mean")
    made = assemble(settings(CLASSES, model, tmp_path / "mean", class_rows(8), model={"pooling": "mean"}))
    assert not any("pooler" in name for name, _ in made.group.model.named_parameters())


# 23 — logits of an evaluation


@pytest.mark.parametrize("task", [LM, CLASSES])
def test_trap_23_evaluation_keeps_no_logits(tiny_model, tmp_path, task):
    """The peak of live bytes does not grow with the rows, but for the few bytes of a prediction each."""
    peaks = []
    for count in (16, 96):
        if task == LM:
            rows: list[dict[str, Any]] = [{"text": f"the quick fox {i:02d}"} for i in range(count)]
        else:
            rows = [{"text": sentence(i, 8), "label": f"class {i % 16:02d}"} for i in range(count)]
        family = "llama" if task == LM else "bert"
        made = assemble(settings(task, tiny_model(family), tmp_path / str(count), rows, data={"max_length": 8}))
        assert len(set(made.data["train"].lengths.tolist())) == 1
        member = made.group.members[0]
        with made.group.evaluating(member) as net, LiveBytes(net.parameters()) as meter:
            evaluate_split(net, made.task, made.data["train"], 8, made.runtime)
        peaks.append(meter.peak)
    logits = {LM: 80 * 20 * 300 * 4, CLASSES: 80 * 16 * 4}[task]  # of 80 more rows; more tokens than 20 in truth
    assert peaks[1] - peaks[0] <= (80 * 16 if task == CLASSES else 0) < logits / 3


@pytest.mark.parametrize("task", [LM, CLASSES])
def test_trap_23_evaluation_builds_no_graph(tiny_model, tmp_path, task):
    rows = pair_rows(8) if task == LM else class_rows(8)
    made = assemble(settings(task, tiny_model("llama" if task == LM else "bert"), tmp_path, rows))
    seen = []
    real = made.task.loss
    made.task.loss = lambda logits, batch: seen.append(logits.requires_grad) or real(logits, batch)
    with made.group.evaluating(made.group.members[0]) as net:
        evaluate_split(net, made.task, made.data["train"], 4, made.runtime)
    assert seen == [False, False]


# 25 — loss that is not finite


def poison(model: Path, folder: Path) -> Path:
    """A model whose embedding of "Z" is NaN."""
    token = AutoTokenizer.from_pretrained(model)("Z")["input_ids"][0]

    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][token] = float("nan")

    return rewrite(model, folder, edit)


def poisoned_rows() -> list[dict[str, Any]]:
    rows = pair_rows(24)
    rows[13]["prompt"] = "Z ->"
    return rows


def step_of(of: Config, row: int) -> int:
    """The first step that holds a row."""
    data = assemble(of).data["train"]
    plan = BatchPlan(data.lengths, of.training.batch_size, of.training.seed, of.data.group_by_length)
    return next(step for step in range(1, 99) if row in plan.rows(step))


def test_trap_25_nan_stops_the_run_with_the_last_good_weights(tiny_model, tmp_path):
    model = poison(tiny_model("llama"), tmp_path / "model")
    steps = {"steps": 6, "batch_size": 4, "save_every": 100}
    of = settings(LM, model, tmp_path / "bad", poisoned_rows(), training=steps)
    bad = step_of(of, 13)
    assert bad > 1
    (tmp_path / "bad.yaml").write_text(to_yaml(of))
    done = subprocess.run(
        [sys.executable, "-m", "peft_engine", "train", str(tmp_path / "bad.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert f"Step {bad}: loss nan" in done.stderr
    assert "train.jsonl, line 14" in done.stderr

    record = json.loads((Path(of.output) / "failure.json").read_text())
    assert record["step"] == bad
    assert record["loss"] == "nan"
    assert [Path(row["row"]).name for row in record["rows"]] == ["train.jsonl, line 14"]
    assert [row["step"] for row in rows_of(of)] == list(range(1, bad))
    kept = newest(of)
    assert kept.name == f"step-{bad - 1}"
    short = settings(LM, model, tmp_path / "short", poisoned_rows(), training={**steps, "steps": bad - 1})
    train(short)
    wanted = load_file(newest(short) / "default.adapter.safetensors")
    found = load_file(kept / "default.adapter.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_trap_25_a_gradient_that_is_not_finite_stops_it_too(tiny_model, tmp_path):
    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] *= 1e30

    model = rewrite(tiny_model("llama"), tmp_path / "model", edit)
    of = settings(LM, model, tmp_path, pair_rows(8))
    error = refused(of, Diverged, "Step 1", "gradient norm inf", "no single row does it", "train.jsonl, line")
    assert error.exit_code == 5
    record = json.loads((Path(of.output) / "failure.json").read_text())
    assert len(record["rows"]) == 4
    assert np.isfinite(float(record["loss"]))


def test_trap_25_at_the_first_step_there_is_nothing_to_keep(tiny_model, tmp_path):
    model = poison(tiny_model("llama"), tmp_path / "model")
    rows = [{"prompt": f"Z {i} ->", "completion": " a"} for i in range(4)]
    of = settings(LM, model, tmp_path, rows)
    refused(of, Diverged, "Step 1")
    assert left_behind(of) == ["config.yaml", "failure.json"]


# 26 — one input on one side


def test_trap_26_rows_of_given_splits_leave_training(tiny_model, tmp_path):
    rows = class_rows(20)
    held = {
        "eval": [{"text": f"  {rows[3]['text']} ", "label": "no"}, {"text": "another fox", "label": "yes"}],
        "test": [dict(rows[5]), {"text": rows[8]["text"].upper() + "!", "label": "no"}],
    }
    paths = {name: str(write_rows(tmp_path / f"{name}.jsonl", given)) for name, given in held.items()}
    of = settings(CLASSES, tiny_model("bert"), tmp_path, rows, data=paths)
    summary = train(of)
    told = summary["data"]
    assert told["counts"] == {"train": 18, "eval": 2, "test": 2}
    assert told["leaked"] == {"eval": 1, "test": 1}
    pairs = [[Path(side).name for side in pair.split(" = ")] for pair in told["leaked_where"]]
    assert pairs == [["train.jsonl, line 4", "eval.jsonl, line 1"], ["train.jsonl, line 6", "test.jsonl, line 1"]]
    assert told["near"] == {"test": 1}  # but for case and punctuation: told, and kept
    kept = {row["text"] for row in load_splits(of).train.examples}
    assert rows[3]["text"] not in kept
    assert rows[5]["text"] not in kept
    assert rows[8]["text"] in kept


@pytest.mark.parametrize("seed", [0, 1])
def test_trap_26_made_splits_keep_duplicates_on_one_side(tiny_model, tmp_path, seed):
    rows = class_rows(30)
    rows += [{**row, "text": f" {row['text']}"} for row in rows[:20]]
    of = settings(CLASSES, tiny_model("bert"), tmp_path, rows,
                  data={"split": {"eval": 0.2, "test": 0.2}, "seed": seed})  # fmt: skip
    splits = load_splits(of)
    assert splits.eval is not None
    assert splits.test is not None
    sides = [{row["text"].strip() for row in split.examples} for split in (splits.train, splits.eval, splits.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert sum(map(len, sides)) == 30
    assert len(splits.train.examples) > len(sides[0])  # duplicates there are, and on this side they stay
