"""A plain torch + peft training loop that shares no code with the engine, for test_oracle.py.

It tokenises, masks, pads, batches, schedules, clips and accumulates by itself. Two things are taken from the engine,
because they are choices and not mathematics: which rows make a step (`BatchPlan`), and the state of the random
generator before weights are drawn (`seed_everything`: parts (seed, 2) before peft injects, (seed, 1) before a new head
is drawn).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tiny import STD
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_engine.data.batching import BatchPlan
from peft_engine.runtime import seed_everything

STEPS, BATCH, MICRO, WARM, CLIP, DECAY, SEED = 20, 6, 4, 4, 0.5, 0.1, 3
BLOCKS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    # the pooler is a linear layer as well; "dense" alone would be in it and in the blocks
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"],
}


@dataclass(frozen=True)
class Case:
    family: str
    method: str
    task: str = "causal-lm"
    kind: str = "single"
    pooling: str = "model"
    options: dict[str, Any] = field(default_factory=dict)  # of the engine's adapter section
    plain: dict[str, Any] = field(default_factory=dict)  # the same for peft's LoraConfig

    def __str__(self) -> str:
        extra = [*self.options, *([self.kind] if self.kind != "single" else [])]
        task = ["classes"] if self.task != "causal-lm" else []
        return "-".join([self.family, *task, *(["mean"] if self.pooling == "mean" else []), self.method, *extra])


class Plain:
    """The loop that the engine is held against."""

    def __init__(self, case: Case, path: Path, rows: list[dict[str, Any]], rate: float) -> None:
        self.case, self.rate = case, rate
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.pad = self.tokenizer.pad_token_id
        self.samples = [self.sample(row) for row in rows]
        self.model = self.build(path)
        self.tensors = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def sample(self, row: dict[str, Any]) -> tuple[list[int], Any]:
        """Token ids, and the label or which tokens are learned."""
        if "label" in row:
            return self.ids(row["text"], special=True), self.label(row["label"])
        pieces: list[tuple[str, bool]] = []
        if "messages" in row:
            for message in row["messages"]:
                learned = message["role"] == "assistant"
                opening = f"<|im_start|>{message['role']}\n"
                pieces += [(opening, False), (message["content"], learned), ("<|im_end|>", learned), ("\n", False)]
        elif "prompt" in row:
            pieces = [(row["prompt"], False), (row["completion"], True), ("<|im_end|>", True)]
        else:
            pieces = [(row["text"], True), ("<|im_end|>", True)]
        ids, learned_tokens = [], []
        for text, learned in pieces:
            new = self.ids(text, special=False)
            ids += new
            learned_tokens += [learned] * len(new)
        if "messages" in row:  # what follows the last answer teaches nothing and may be left off
            end = max(i for i, on in enumerate(learned_tokens) if on) + 1
            ids, learned_tokens = ids[:end], learned_tokens[:end]
        return ids, learned_tokens

    def ids(self, text: str, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def label(self, value: Any) -> Any:
        if self.case.kind == "regression":
            return value
        if self.case.kind == "multi":
            return [float(name in value) for name in ("a", "b", "c")]
        return ["maybe", "no", "yes"].index(value)

    def build(self, path: Path) -> nn.Module:
        case = self.case
        classes = 1 if case.kind == "regression" else 3
        if case.task == "causal-lm":
            model = AutoModelForCausalLM.from_pretrained(path)
            if case.method == "head":
                output = model.get_output_embeddings()
                output.weight = nn.Parameter(output.weight.detach().clone())
            head = "lm_head"
        elif case.pooling == "mean":
            model, head = MeanPooled(path, classes), "classifier"
        else:
            model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes, pad_token_id=self.pad)
            head = "score" if case.family == "llama" else "classifier"
        new = [head] if case.task != "causal-lm" else []
        for parameter in model.parameters():
            parameter.requires_grad_(case.method == "full")
        for name, parameter in model.named_parameters():
            inside = name.startswith(f"{head}.")
            if (case.method == "head" and inside) or (case.method == "bitfit" and (name.endswith(".bias") or inside)):
                parameter.requires_grad_(True)
        lora = case.method == "lora"
        if lora:
            model = self.inject(model, new)
        for name in new:
            linear = model.get_submodule(f"base_model.model.{name}.modules_to_save.default" if lora else name)
            seed_everything(SEED, 1)
            with torch.no_grad():
                linear.weight.normal_(0.0, STD)
                if linear.bias is not None:
                    linear.bias.zero_()
        return model.train()

    def inject(self, model: nn.Module, new: list[str]) -> nn.Module:
        targets = BLOCKS[self.case.family]
        if self.case.pooling == "mean":
            targets = [name for name in targets if "pooler" not in name]
        options = dict(self.case.plain)
        save = [*options.pop("modules_to_save", []), *new]
        task = {"causal-lm": "CAUSAL_LM", "text-classification": "SEQ_CLS"}[self.case.task]
        seed_everything(SEED, 2)
        settings = LoraConfig(
            task_type=None if self.case.pooling == "mean" else task,
            r=4,
            lora_alpha=6,
            lora_dropout=0.0,
            target_modules=targets,
            modules_to_save=save or None,
            fan_in_fan_out=self.case.family == "gpt2",
            **options,
        )
        return get_peft_model(model, settings)

    def run(self) -> tuple[list[float], list[float]]:
        optimizer = torch.optim.AdamW(self.groups(), betas=(0.9, 0.999), foreach=False, fused=False)
        lengths = np.array([len(ids) for ids, _ in self.samples])
        order = BatchPlan(lengths, BATCH, SEED, group_by_length=True)
        losses, norms = [], []
        for step in range(STEPS):
            rows = order.rows(step + 1)
            total = sum(self.units(row) for row in rows)
            loss = 0.0
            for start in range(0, len(rows), MICRO):
                part = self.forward(rows[start : start + MICRO]) / total
                part.backward()
                loss += float(part.detach())
            squares = sum(float((t.grad.double() ** 2).sum()) for t in self.tensors.values())
            norm = math.sqrt(squares)
            for tensor in self.tensors.values():
                tensor.grad.mul_(min(1.0, CLIP / (norm + 1e-6)))
            factor = step / WARM if step < WARM else 0.5 * (1 + math.cos(math.pi * (step - WARM) / (STEPS - WARM)))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            norms.append(norm)
        return losses, norms

    def groups(self) -> list[dict[str, Any]]:
        """One group per tensor: vectors don't decay, B learns faster under LoRA+."""
        ratio = self.case.options.get("lora_plus_ratio", 1.0)
        return [
            {
                "params": [t],
                "peak": self.rate * (ratio if "lora_B" in name else 1),
                "weight_decay": DECAY * (t.dim() > 1),
            }
            for name, t in self.tensors.items()
        ]

    def units(self, row: int) -> int:
        learned = self.samples[row][1]
        return sum(learned[1:]) if self.case.task == "causal-lm" else 1

    def forward(self, rows: np.ndarray) -> torch.Tensor:
        """Sum of the losses of some rows."""
        picked = [self.samples[row] for row in rows]
        longest = max(len(ids) for ids, _ in picked)
        ids = torch.tensor([ids + [self.pad] * (longest - len(ids)) for ids, _ in picked])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in picked])
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        wanted = [label for _, label in picked]
        if self.case.task == "causal-lm":
            learned = [(i, t) for i, label in enumerate(wanted) for t, on in enumerate(label) if on and t > 0]
            lines, places = torch.tensor(learned).T
            return -logits[lines, places - 1].log_softmax(-1)[range(len(lines)), ids[lines, places]].sum()
        if self.case.kind == "regression":
            return ((logits[:, 0] - torch.tensor(wanted)) ** 2).sum()
        if self.case.kind == "multi":
            on = torch.tensor(wanted)
            return -(on * F.logsigmoid(logits) + (1 - on) * F.logsigmoid(-logits)).mean(1).sum()
        return -logits.log_softmax(-1)[range(len(wanted)), wanted].sum()

    def trained(self) -> dict[str, torch.Tensor]:
        """Final tensors, named as in an adapter's file."""
        if self.case.method == "lora":
            found = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        else:
            found = self.tensors
        return {name.replace("encoder_itself.", ""): tensor.detach() for name, tensor in found.items()}


class MeanPooled(nn.Module):
    """An encoder whose last hidden states are averaged over real tokens."""

    def __init__(self, path: Path, classes: int) -> None:
        super().__init__()
        self.encoder_itself = AutoModel.from_pretrained(path, add_pooling_layer=False)
        self.classifier = nn.Linear(self.encoder_itself.config.hidden_size, classes)
        self.config = self.encoder_itself.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        hidden = self.encoder_itself(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        means = [line[: int(mask.sum())].mean(0) for line, mask in zip(hidden, attention_mask, strict=True)]
        return Output(self.classifier(torch.stack(means)))


@dataclass
class Output:
    logits: torch.Tensor
