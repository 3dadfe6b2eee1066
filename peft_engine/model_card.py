"""The README.md that goes with an adapter: what it is, how it was made, how to load it."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel

from .adapters.group import Group
from .config import Config
from .data.labels import Labels
from .data.mixing import name_of
from .tasks.text_classification import MeanPooled
from .tasks.timm_models import WRAPPER

PEFT_CAUSAL = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({path!r})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")"""

PEFT_CLASSES = """from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained({path!r}, num_labels={outputs})
base.config.pad_token_id = {pad}
model = PeftModel.from_pretrained(base, "THIS_FOLDER")"""

PEFT_IMAGES = """import torch
from PIL import Image
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("THIS_FOLDER", backend="pil")
base = AutoModelForImageClassification.from_pretrained({path!r}, num_labels={outputs}, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()

batch = processor([Image.open("some.png").convert("RGB")], return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits"""
TIMM_FILE = 'image_processor_filename="preprocessor_config.json"'  # transformers looks into config.json by itself
PEFT_TAGS = """from peft import PeftModel
from transformers import AutoModelForTokenClassification

base = AutoModelForTokenClassification.from_pretrained({path!r}, num_labels={outputs})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")"""

PEFT_SEQ2SEQ = """from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

base = AutoModelForSeq2SeqLM.from_pretrained({path!r})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")"""

PEFT_CHOICES = """from peft import PeftModel
from transformers import AutoModelForMultipleChoice

base = AutoModelForMultipleChoice.from_pretrained({path!r})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")"""

PEFT_MEAN = """import torch
from peft import PeftModel
from transformers import AutoModel

base = AutoModel.from_pretrained({path!r})
base.classifier = torch.nn.Linear(base.config.hidden_size, {outputs})
model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()

def logits(batch):  # input_ids, attention_mask, ...: mean of the last hidden states over real tokens, then the head
    weight = batch["attention_mask"].unsqueeze(-1)
    hidden = model(**batch).last_hidden_state
    return model.base_model.model.classifier((hidden * weight).sum(1) / weight.sum(1))"""

TENSORS = """# The file holds the trained tensors under the model's own names; the engine puts them back:
from peft_engine import evaluate, export

evaluate("RUN_DIRECTORY")
export("RUN_DIRECTORY", merged=True)  # an ordinary transformers model folder"""

MERGED_MEAN = """import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModel.from_pretrained("THIS_FOLDER").eval()
head = load_file("THIS_FOLDER/model.safetensors")

batch = tokenizer(["some text"], return_tensors="pt", truncation=True, max_length={length})
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
weight = batch["attention_mask"].unsqueeze(-1)
mean = (hidden * weight).sum(1) / weight.sum(1)
logits = mean @ head["classifier.weight"].T + head["classifier.bias"]  # classes: {classes}"""

MERGED_IMAGES = """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("THIS_FOLDER", backend="pil")
model = AutoModelForImageClassification.from_pretrained("THIS_FOLDER").eval()

batch = processor([Image.open("some.png").convert("RGB")], return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits"""

MERGED = """from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = {auto}.from_pretrained("THIS_FOLDER")"""


def write_merged_card(path: Path, config: Config, auto: str, labels: Labels | None, mean_pooled: bool) -> None:
    """Write the README.md of a merged model: what it is and how to load it.

    Args:
        auto: name of transformers' Auto class.
    """
    classes = ", ".join(labels.names) if labels else ""
    snippet = (
        MERGED_MEAN.format(length=config.data.max_length, classes=classes) if mean_pooled else MERGED.format(auto=auto)
    )
    if config.task == "image-classification":
        snippet = MERGED_IMAGES
    note = [
        "The head is one linear layer on the *mean* of the last hidden states over real tokens. No Auto class of",
        "transformers does that: loaded as a sequence classifier, the head would sit on an untrained pooler.",
        "",
    ]
    lines = [
        f"# {config.model.hub_id or config.model.path}, fine-tuned for {config.task}",
        "",
        f"{config.adapter.method} merged into the weights by peft-engine.",
        "",
        *(note if mean_pooled else []),
        "```python",
        snippet,
        "```",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rounded(summary: dict[str, Any]) -> list[str]:
    """That the metrics are of rounded frozen weights, where they are."""
    formats = (summary.get("kernels") or {}).get("frozen") or {}
    if not formats:
        return []
    told = ", ".join(f"{count} in {name}" for name, count in formats.items())
    return [f"Measured on rounded frozen linears ({told}), as trained; plain peft on the model's own weights differs a "
            "little.", ""]  # fmt: skip


def _rest_was_rounded(group: Group, config: Config) -> list[str]:
    """That a start moved a part of the weights into the adapter before the rest was quantised."""
    if config.model.quantization == "none" or not group.members[0].initial:
        return []
    return [
        f"Measured on what {config.adapter.init} left of the weights, in {config.model.quantization}. This file is for "
        "the model's own weights, where outputs differ: `peft-engine export` says by how much.",
        "",
    ]


def write_card(path: Path, group: Group, config: Config, labels: Labels | None, summary: dict[str, Any]) -> None:
    """Write the model card from a run's summary (run.json)."""
    front = [
        "---",
        f"base_model: {config.model.hub_id or config.model.path}",
        "library_name: peft",
        f"tags: [{config.task}, {config.adapter.method}, peft-engine]",
        "---",
    ]
    metrics = summary["metrics"]
    scores = [
        f"| {name} | {_number(metrics['before'].get(name))} | {_number(value)} |"
        for name, value in metrics["after"].items()
        if isinstance(value, int | float)
    ]
    data = summary["data"]
    machine = summary["hardware"].get("gpu", summary["hardware"]["cpu"])
    body = [
        f"# {config.adapter.method} adapter for {config.task}",
        "",
        f"Base model: `{config.model.path}`"
        + (f" (hub: `{config.model.hub_id}`)" if config.model.hub_id else "")
        + (f", revision `{config.model.revision}`" if config.model.revision else "")
        + ".",
        f"Trained {summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters "
        f"with peft-engine {summary['versions']['peft_engine']}.",
        "",
        "## Data",
        "",
        f"`{name_of(config)}`: "
        + ", ".join(f"{name} {count:,} rows" for name, count in data["counts"].items())
        + f"; sha256 of the content `{data['digest']}`.",
        *([f"Classes, in order: {', '.join(labels.names)}."] if labels and labels.names else []),
        "",
        f"## Metrics on the {metrics['split']} split",
        "",
        "| metric | before | after |",
        "| --- | --- | --- |",
        *scores,
        "",
        *_rounded(summary),
        *_rest_was_rounded(group, config),
        f"{summary['steps']} optimizer steps, seed {config.training.seed}, "
        f"{summary['wall_seconds']:.0f} s on {machine}.",
        "",
        "## Use",
        "",
        "```python",
        _on_quantised(_snippet(group, config, labels), group, config),
        "```",
        "",
        "## Made by",
        "",
        "```",
        summary["command"],
        "```",
        "",
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in summary["versions"].items() if version != "absent")
        + ".",
        "",
        "<details><summary>Settings</summary>",
        "",
        "```json",
        json.dumps(config.model_dump(mode="json", exclude_defaults=True), indent=2, ensure_ascii=False),
        "```",
        "",
        "</details>",
    ]
    path.write_text("\n".join([*front, *body]) + "\n", encoding="utf-8")


def _snippet(group: Group, config: Config, labels: Labels | None) -> str:
    outputs = max(1, len(labels.names)) if labels else 0
    if not isinstance(group.model, PeftModel):
        return TENSORS
    if config.task == "causal-lm":
        return PEFT_CAUSAL.format(path=config.model.path)
    if config.task == "image-classification":
        snippet = PEFT_IMAGES.format(path=config.model.path, outputs=outputs)
        if group.backbone.model.config.model_type == WRAPPER:
            snippet = snippet.replace('backend="pil"', TIMM_FILE).replace("AutoImage", "TimmWrapperImage")
        return snippet
    if config.task == "seq2seq":
        return PEFT_SEQ2SEQ.format(path=config.model.path)
    if config.task == "token-classification":
        return PEFT_TAGS.format(path=config.model.path, outputs=outputs)
    if labels and labels.kind == "choice" and not isinstance(group.backbone.model, MeanPooled):
        return PEFT_CHOICES.format(path=config.model.path)
    if group.backbone.peft_task is None:
        return PEFT_MEAN.format(path=config.model.path, outputs=outputs)
    return PEFT_CLASSES.format(path=config.model.path, outputs=outputs, pad=group.backbone.model.config.pad_token_id)


def _on_quantised(snippet: str, group: Group, config: Config) -> str:
    """The same with a base that is quantised as in training; an adapter that a part of the weights was moved into is
    for the model's own."""
    settings: Any = getattr(group.backbone.model.config, "quantization_config", None)
    if config.model.quantization == "none" or settings is None or group.members[0].initial:
        return snippet
    kind = "load_in_8bit=True"
    if config.model.quantization != "int8":
        kind = (
            f"load_in_4bit=True, bnb_4bit_quant_type={config.model.quantization!r}, "
            f"bnb_4bit_use_double_quant={config.model.double_quantization}"
        )
    rounded = f"BitsAndBytesConfig({kind}, llm_int8_skip_modules={settings.llm_int8_skip_modules!r})"
    path = repr(config.model.path)
    snippet = snippet.replace(f".from_pretrained({path}", f".from_pretrained({path}, quantization_config=rounded", 1)
    head, _, tail = snippet.partition("\nbase = ")
    return f"{head}\nrounded = {rounded}\nbase = {tail}".replace(
        "from transformers import Auto", "from transformers import BitsAndBytesConfig, Auto", 1
    )


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
