"""What was trained is what is loaded: by the engine bit by bit, by plain peft and plain transformers alike."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import assemble, class_rows, config, logits_of, pair_rows, write_rows
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_engine import using
from peft_engine.adapters.fusing import unfuse
from peft_engine.config import Config
from peft_engine.errors import ConfigError, StorageError, VerificationError
from peft_engine.exporting import verify_adapter
from peft_engine.run import train
from peft_engine.using import export, open_run

LM, CLASSES = "causal-lm", "text-classification"
STEPS = 3


@dataclass(frozen=True)
class Case:
    family: str
    adapter: dict[str, Any] = field(default_factory=dict)
    task: str = LM
    model: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.family, *(["classes"] if self.task == CLASSES else []), *map(str, self.model.values())]
        return "-".join([*parts, *(f"{k}={v}" for k, v in self.adapter.items())] or ["plain"])

    @property
    def lora(self) -> bool:
        return self.adapter.get("method", "lora") == "lora"

    @property
    def exact(self) -> bool:
        """PiSSA and OLoRA move part of the frozen weight; the file holds the same update for the original weight."""
        return not str(self.adapter.get("init", "")).startswith(("pissa", "olora"))


PEFT = [
    Case("llama"),
    Case("llama", {"rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}}),
    Case("llama", {"dora": True}),
    Case("llama", {"init": "pissa"}),
    Case("llama", {"init": "pissa_niter_4", "rslora": True, "rank_pattern": {"q_proj": 2}}),
    Case("llama", {"init": "pissa", "dora": True, "layers": [1]}),
    Case("llama", {"init": "olora"}),
    Case("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    Case("llama", {"options": {"trainable_token_indices": [5, 7]}}),
    Case("qwen2", {"bias": "all"}),
    Case("qwen2", {"targets": ["embed_tokens", "q_proj"], "init": "pissa"}),
    Case("qwen2", {"targets": ["lm_head"]}),
    Case("qwen2", {"modules_to_save": ["lm_head"]}),
    Case("gpt2"),
    Case("gpt2", {"init": "pissa"}),
    Case("gpt2", {"dora": True, "bias": "lora_only"}),
    Case("bert", task=CLASSES),
    Case("bert", {"bias": "all", "modules_to_save": ["pooler"]}, CLASSES),
    Case("bert", {"dora": True}, CLASSES, {"pooling": "mean"}),
    Case("llama", task=CLASSES),
    Case("gpt2", {"init": "pissa"}, CLASSES),
]
OWN = [
    Case(family, {"method": method}, task)
    for method in ("head", "full", "bitfit")
    for family, task in (("qwen2", LM), ("gpt2", LM), ("bert", CLASSES), ("llama", CLASSES))
    if not (family == "llama" and method == "bitfit")
]
OWN += [Case("bert", {"method": "full"}, CLASSES, {"pooling": "mean"})]


def settings_of(case: Case, model: Path, folder: Path, **more: Any) -> Config:
    rows = write_rows(folder / "rows.jsonl", pair_rows(12) if case.task == LM else class_rows(12, ("a", "b", "c")))
    adapter = {"rank": 4, "alpha": 6, "dropout": 0.1, **case.adapter} if case.lora else case.adapter
    return config(
        case.task,
        model,
        rows,
        folder / "out",
        model={"pooling": "model", **case.model} if case.task == CLASSES else {},
        adapter=adapter,
        data={"split": {"eval": 0.0, "test": 0.0}},
        training={"steps": STEPS, "batch_size": 4, "warmup": 0.0, "learning_rate": 2e-2, "save_every": STEPS, **more},
    )


@pytest.mark.parametrize("case", PEFT + OWN, ids=str)
def test_a_trained_run_loads_with_equal_outputs(case: Case, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    settings = settings_of(case, tiny_model(case.family), tmp_path)
    before = logits_of((live := assemble(settings)).group, live.task, live.data["train"])
    live.train(STEPS)
    unfuse(live.group.model)  # fused logits may differ in their last bit
    trained = logits_of(live.group, live.task, live.data["train"])
    assert (trained - before).abs().max() > 1e-2, "nothing was trained, so any file would do"

    train(settings)
    opened = open_run(tmp_path / "out")
    loaded = logits_of(opened.group, opened.task, live.data["train"])
    if case.exact:
        assert torch.equal(loaded, trained)
    else:
        torch.testing.assert_close(loaded, trained, atol=2e-4, rtol=1e-4)

    if case.lora:
        plain = plain_peft(case, settings, tmp_path / "out/adapter", live)
        torch.testing.assert_close(plain, trained, atol=2e-4 if not case.exact else 1e-6, rtol=1e-5)

    folder, drift = export(tmp_path / "out", merged=True)
    assert drift.top1_agreement == 1
    merged = plain_merged(case, folder, live)
    torch.testing.assert_close(merged, trained, atol=2e-4, rtol=1e-4)


def plain_peft(case: Case, settings: Config, adapter: Path, live: Any) -> torch.Tensor:
    """Logits as somebody without this engine gets them."""
    path = settings.model.path
    if case.task == LM:
        base = AutoModelForCausalLM.from_pretrained(path)
    elif "pooling" in case.model:
        base = AutoModel.from_pretrained(path)
        base.classifier = nn.Linear(32, 3)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    if "pooling" not in case.model:
        return forward(model, live)
    return mean_pooled(model, model.base_model.model.classifier, live)


def plain_merged(case: Case, folder: Path, live: Any) -> torch.Tensor:
    if "pooling" in case.model:
        head = nn.Linear(32, 3)
        weights = load_file(folder / "model.safetensors")
        head.load_state_dict({name: weights[f"classifier.{name}"] for name in ("weight", "bias")})
        return mean_pooled(AutoModel.from_pretrained(folder).eval(), head, live)
    auto = AutoModelForCausalLM if case.task == LM else AutoModelForSequenceClassification
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if model.get_output_embeddings() is not None:  # other tools tie by this setting alone, whatever the file holds
        tied = torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == tied
    return forward(model.eval(), live)


def forward(model: nn.Module, live: Any) -> torch.Tensor:
    """The rows of `logits_of` one at a time, without padding, and padded again with the batch's logits left out."""
    batch = live.task.collate(live.data["train"], torch.arange(5).numpy())
    with torch.no_grad():
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        return model(**inputs).logits


def mean_pooled(encoder: nn.Module, head: nn.Module, live: Any) -> torch.Tensor:
    found = []
    with torch.no_grad():
        for row in range(5):
            ids = torch.from_numpy(live.data["train"].tokens(row).astype("int64"))[None]
            found.append(head(encoder(input_ids=ids).last_hidden_state.mean(1)))
    return torch.cat(found)


def test_class_names_and_metrics_survive(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    summary = train(settings_of(Case("bert", task=CLASSES), tiny_model("bert"), tmp_path))
    opened = open_run(tmp_path / "out")
    assert opened.labels is not None
    assert opened.labels.names == ["a", "b", "c"]
    assert using.evaluate(tmp_path / "out", "train")["metrics"] == summary["metrics"]["after"]
    _, drift = export(tmp_path / "out")
    assert drift.relative < 1e-6


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_file_that_does_not_fit_is_refused(method: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Trap 15: a missing, unexpected or misshapen tensor never leaves one at random."""
    train(settings_of(Case("llama", {"method": method}), tiny_model("llama"), tmp_path))
    path = tmp_path / "out/adapter/adapter_model.safetensors"
    good = load_file(path)
    first = next(iter(good))
    for tensors, word in (
        ({k: v for k, v in good.items() if k != first}, "missing"),
        ({**good, "extra.lora_A.weight": torch.zeros(2, 2)}, "unexpected"),
        ({**good, first: good[first][:-1].clone()}, "shape"),
    ):
        save_file(tensors, path)
        with pytest.raises(StorageError, match=word):
            open_run(tmp_path / "out")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StorageError, match="can't be read"):
        open_run(tmp_path / "out")


def test_drift_beyond_the_bound_is_an_error(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The adapter is verified on other base weights than it was trained on."""
    train(settings_of(Case("llama"), tiny_model("llama"), tmp_path))
    path = tmp_path / "out/adapter/adapter_config.json"
    settings = json.loads(path.read_text())
    opened = open_run(tmp_path / "out")
    path.write_text(json.dumps({**settings, "lora_alpha": settings["lora_alpha"] * 3}))
    with pytest.raises(VerificationError, match="other logits"):
        verify_adapter(opened.group, opened.config, opened.task, tmp_path / "out/adapter")


def test_methods_that_are_not_pefts_say_so(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    train(settings_of(Case("gpt2", {"method": "head"}), tiny_model("gpt2"), tmp_path))
    with pytest.raises(ConfigError, match="no peft adapter"):
        export(tmp_path / "out")


def test_an_adapter_that_can_not_be_merged_says_so(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    case = Case("llama", {"options": {"lora_bias": True}})
    train(settings_of(case, tiny_model("llama"), tmp_path))
    with pytest.raises(ConfigError, match="can't merge"):
        export(tmp_path / "out", merged=True)
