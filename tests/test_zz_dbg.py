"""Twenty steps of the engine equal twenty steps of a plain torch + peft loop that shares no code with it.

The loop below tokenises, masks, pads, batches, schedules, clips and accumulates by itself. Two things are taken from
the engine, because they are choices and not mathematics: which rows make a step (`BatchPlan`), and the state of the
random generator before weights are drawn (`seed_everything`: parts (seed, 2) before peft injects, (seed, 1) before a
new head is drawn).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import STD, chat_rows, class_rows, config, pair_rows, write_rows
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_engine.data.batching import BatchPlan
from peft_engine.run import train
from peft_engine.runtime import seed_everything

STEPS, BATCH, MICRO, WARM, CLIP, DECAY, SEED = 20, 6, 4, 4, 0.5, 0.1, 3
BLOCKS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    # the pooler is a linear layer as well; "dense" alone would be in it and in the blocks
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"],
}
IN_FULL = {"llama": "lm_head", "qwen2": "norm", "gpt2": "wte", "bert": "pooler"}


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


def cases() -> list[Case]:
    found = []
    for family in ("llama", "gpt2", "bert", "qwen2"):
        task = "text-classification" if family == "bert" else "causal-lm"
        save = [IN_FULL[family]]
        found += [
            Case(family, "lora", task),
            Case(family, "lora", task, options={"rslora": True}, plain={"use_rslora": True}),
            Case(family, "lora", task, options={"dora": True}, plain={"use_dora": True}),
            Case(family, "lora", task, options={"lora_plus_ratio": 4.0}),
            Case(family, "lora", task, options={"modules_to_save": save}, plain={"modules_to_save": save}),
            Case(family, "head", task),
            Case(family, "full", task),
        ]
        if family != "llama":
            found.append(Case(family, "bitfit", task))
    for method in ("lora", "head", "full"):
        found.append(Case("llama", method, "text-classification"))
        found.append(Case("bert", method, "text-classification", pooling="mean"))
    found += [Case("bert", "lora", "text-classification", kind=kind) for kind in ("multi", "regression")]
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_twenty_steps_equal_a_plain_loop(case: Case, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, rows = tiny_model(case.family), data(case)
    rate = {"full": 1e-3}.get(case.method, 1e-2)
    adapter = {"method": case.method, **case.options}
    if case.method == "lora":
        adapter |= {"rank": 4, "alpha": 6, "dropout": 0.0}
    settings = config(
        case.task,
        model,
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "out",
        model={"pooling": case.pooling} if case.task != "causal-lm" else {},
        adapter=adapter,
        data={"split": {"eval": 0.0, "test": 0.0}},
        training={
            "steps": STEPS,
            "batch_size": BATCH,
            "micro_batch_size": MICRO,
            "learning_rate": rate,
            "schedule": "cosine",
            "warmup": WARM / STEPS,
            "max_grad_norm": CLIP,
            "weight_decay": DECAY,
            "seed": SEED,
            "save_every": STEPS,
        },
    )
    train(settings)
    logged = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]

    plain = Plain(case, model, rows, rate)
    losses, norms = plain.run()

    import sys; print("DIFF", case, max(abs(r["loss"]-l) for r,l in zip(logged,losses)), losses[0], losses[-1], min(norms), max(norms), file=sys.__stderr__)
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in logged] == pytest.approx(losses, abs=1e-6, rel=1e-6)
    assert [row["grad_norm"] for row in logged] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > CLIP, "clipping was never tried"
    assert abs(losses[-1] - losses[0]) > 1e-3, "nothing was learned, so nothing was compared"
    compare(load_file(tmp_path / "out/adapter/adapter_model.safetensors"), plain.trained(), rate)


def compare(engine: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], rate: float) -> None:
    """Adam divides by the gradient's size, so where that is rounding noise (a key's bias shifts all scores of a softmax
    alike) the direction is noise too; everything else moved alike to a hundredth of one step."""
    assert sorted(engine) == sorted(plain)
    for name, tensor in plain.items():
        ours = engine[name]
        if name.endswith(("key.bias", "c_attn.bias")):
            keep = torch.ones_like(tensor, dtype=torch.bool)
            keep[slice(None) if "key" in name else slice(len(tensor) // 3, 2 * len(tensor) // 3)] = False
            ours, tensor = ours[keep], tensor[keep]
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, tensor, atol=rate / 100, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def data(case: Case) -> list[dict[str, Any]]:
    if case.task == "causal-lm":
        return {"llama": chat_rows, "gpt2": text_rows, "qwen2": pair_rows}[case.family](20)
    labels: tuple[Any, ...] = ("no", "yes", "maybe")
    if case.kind == "multi":
        labels = (["a"], ["a", "b"], [], ["b", "c"])
    if case.kind == "regression":
        labels = (0.5, -1.25, 2.0)
    return class_rows(20, labels)


def text_rows(count: int) -> list[dict[str, Any]]:
    return [{"text": row["text"]} for row in class_rows(count)]


class Plain:
    """The loop that the engine is held against."""

    def __init__(self, case: Case, path: Path, rows: list[dict[str, Any]], rate: float) -> None:
        self.case, self.rate = case, rate
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.pad = self.tokenizer.pad_token_id
        self.samples = [self.sample(row) for row in rows]
        self.model = self.build(path)
        self.tensors = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    # data ----------------------------------------------------------------------------------------------------------

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

    # model ---------------------------------------------------------------------------------------------------------

    def build(self, path: Path) -> nn.Module:
        case = self.case
        classes = 1 if case.kind == "regression" else 3
        if case.task == "causal-lm":
            model = AutoModelForCausalLM.from_pretrained(path)
            if case.method == "head":
                model.get_output_embeddings().weight = nn.Parameter(model.get_output_embeddings().weight.detach().clone())
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
        if case.method == "lora":
            model = self.inject(model, new)
        for name in new:
            linear = model.base_model.model.get_submodule(name).modules_to_save["default"] if case.method == "lora" else None
            linear = linear if linear is not None else model.get_submodule(name)
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

    # loop ----------------------------------------------------------------------------------------------------------

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
                part = sum_of_losses = self.forward(rows[start : start + MICRO])
                part = sum_of_losses / total
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
            {"params": [t], "peak": self.rate * (ratio if "lora_B" in name else 1), "weight_decay": DECAY * (t.dim() > 1)}
            for name, t in self.tensors.items()
        ]

    def units(self, row: int) -> int:
        ids, learned = self.samples[row]
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
