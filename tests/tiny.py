"""Tiny random models of four families, saved as ordinary model folders, with rows and configs to train them on.

    llama   GQA (4 heads, 2 for keys and values), untied embeddings, no biases
    gpt2    Conv1D layers, tied embeddings, biases everywhere
    bert    encoder with its pooler, biases everywhere
    qwen2   GQA, tied embeddings, biases on q, k and v

Decoders have a ChatML-like chat template without `{% generation %}`. Dropout is 0 unless asked for.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chat_samples import chatml
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from peft_engine.adapters.group import Group, Member, MemberSpec
from peft_engine.building import build_group, encode_splits, make_trainees
from peft_engine.config import Config
from peft_engine.data.encoding import EncodedSet
from peft_engine.data.loading import load_splits
from peft_engine.data.splitting import Splits
from peft_engine.generation import matched
from peft_engine.runtime import Runtime, start
from peft_engine.tasks import Task, make_task
from peft_engine.training.guards import Signals
from peft_engine.training.loop import Hooks, Loop
from peft_engine.training.state import Trainee

FAMILIES = ("llama", "gpt2", "bert", "qwen2")
DECODERS = ("llama", "gpt2", "qwen2")
HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, POSITIONS = 32, 2, 4, 2, 64, 128
STD = 0.1  # wider than usual, so that a random model's outputs differ from row to row
SENTENCE = "the quick brown fox jumps over a lazy dog while seven grey cats watch from an old wall near the river"
WORDS = SENTENCE.split(" ")


def make_model(family: str, folder: Path, *, dropout: float = 0.0, seed: int = 0) -> Path:
    """Save a random model with its tokenizer into `folder` and return it. The same arguments give the same weights."""
    tokenizer = _wordpieces() if family == "bert" else chatml(pad_token="<|endoftext|>")
    torch.manual_seed(seed)
    model = _model(family, len(tokenizer), tokenizer, dropout)
    with torch.no_grad():
        for module in model.modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                bias.normal_(0.0, STD)  # transformers starts them at zero, where a lost one would not show
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in pieces of at most `size`."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSONL and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sentence(number: int, words: int) -> str:
    """A text of so many words; different for every number."""
    return " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(words)) + f" {number}"


def class_rows(count: int, labels: tuple[Any, ...] = ("no", "yes")) -> list[dict[str, Any]]:
    """Texts of uneven length, labelled in turn."""
    return [{"text": sentence(i, 2 + i * 5 % 11), "label": labels[i % len(labels)]} for i in range(count)]


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Prompts and completions whose lengths, supervised and not, are uneven."""
    return [
        {"prompt": sentence(i, 1 + i * 3 % 7) + " ->", "completion": " " + sentence(i + 1, 1 + i * 5 % 9)}
        for i in range(count)
    ]


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of one or two exchanges."""
    return [
        {
            "messages": [
                message
                for turn in range(1 + i % 2)
                for message in (
                    {"role": "user", "content": sentence(i + turn, 2 + i % 4)},
                    {"role": "assistant", "content": sentence(i + turn + 1, 1 + i % 3)},
                )
            ]
        }
        for i in range(count)
    ]


def config(
    task: str, model: Path | str, train: Path | str, output: Path | str, /, **sections: dict[str, Any]
) -> Config:
    """A config for tests: CPU, no cache, every step logged.

    Args:
        sections: blocks of settings by name, such as `training={"steps": 3}`; `data` and `model` add to the paths.
    """
    given = {name: dict(settings) for name, settings in sections.items()}
    given["model"] = {"path": str(model), **given.get("model", {})}
    given["data"] = {"train": str(train), "cache": None, **given.get("data", {})}
    given["training"] = {"log_every": 1, **given.get("training", {})}
    return Config.model_validate({"task": task, "device": "cpu", "output": str(output), **given})


@dataclass
class Assembled:
    """The parts of a run, put together as `train` does, with the live model in hand."""

    config: Config
    group: Group
    trainees: list[Trainee]
    task: Task
    data: dict[str, EncodedSet]
    splits: Splits
    runtime: Runtime

    def train(self, steps: int, evaluate: Callable[[Member], dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Run the loop and return its rows of metrics.jsonl. No checkpoints; evaluation as the caller has it."""
        rows: list[dict[str, Any]] = []
        hooks = Hooks(
            evaluate=evaluate,
            log=rows.append,
            save=lambda step: None,
            fail=lambda record: None,
            progress=lambda step, steps, row: None,
            elapsed=lambda: 0.0,
        )
        where = self.splits.train.where
        Loop(
            self.group,
            self.task,
            self.data["train"],
            where,
            self.trainees,
            self.config,
            self.runtime,
            steps,
            hooks,
            Signals(),
        ).run()
        return rows


def assemble(config: Config, specs: list[MemberSpec] | None = None) -> Assembled:
    """Everything up to step 0, with the members of `specs` (one, of the config, by default)."""
    runtime = start(config)
    splits = load_splits(config)
    task = make_task(config, splits.labels)
    data = encode_splits(task, splits, config)
    group = build_group(task, config, runtime, data, specs)
    trainees = make_trainees(group, data["train"], config, runtime)
    return Assembled(config, group, trainees, task, data, splits, runtime)


def logits_of(group: Group, task: Task, data: EncodedSet, member: int = 0) -> torch.Tensor:
    """Logits of the first rows in eval mode."""
    batch = task.collate(data, np.arange(min(5, len(data))))
    with group.evaluating(group.members[member]) as model, torch.no_grad(), matched(group.model):
        return task.forward(model, batch)


def _model(family: str, size: int, tokenizer: PreTrainedTokenizerFast, dropout: float) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "initializer_range": STD,
        "pad_token_id": tokenizer.pad_token_id,
    }
    decoder = {
        **shape,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "attention_dropout": dropout,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**decoder, tie_word_embeddings=False))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**decoder, tie_word_embeddings=True))
    if family == "gpt2":
        drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        return GPT2LMHeadModel(GPT2Config(**shape, n_positions=POSITIONS, n_inner=INNER, **drops, **ends))
    assert family == "bert", family
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertModel(BertConfig(**shape, intermediate_size=INNER, max_position_embeddings=POSITIONS, **drops))


def _wordpieces() -> PreTrainedTokenizerFast:
    """BERT's way: [CLS] text [SEP], token types."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(33, 127)]
    # written down, not trained: the trainer breaks ties differently in every process
    pieces = [*specials, *letters, *(f"##{letter}" for letter in letters), *sorted(set(WORDS) - set(letters))]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
