"""GLUE: columns, metrics and published settings of its eight tasks, declared once; writes the suites.

    python benchmarks/published/glue.py        benchmarks/suites/published-{roberta,bert}-*.yaml

`roberta`: LoRA against full fine-tuning of RoBERTa-base as in the LoRA paper; settings of LoRA from microsoft/LoRA's
scripts (examples/NLU/roberta_base_*.sh, read on the commit of roberta-glue.yaml). Their batch is per GPU, and how many
GPUs a run had is not clear (8 in most scripts, 4 in the README): here it is the whole step.
`bert`: full fine-tuning of BERT-base-cased by transformers' run_glue.py. All are judged on GLUE's validation split, as
the publications are; a share of the training split serves as the evaluation split.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SUITES = Path(__file__).resolve().parents[1] / "suites"


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE on the hub (nyu-mll/glue).

    Attributes:
        name: of the subset.
        columns: of the text, and of the second text where there is one.
        metrics: the publication's name of a metric → where it stands among the engine's; classes by the hub's names.
        batch, rate, epochs: of the LoRA paper's script.
        held_out: the split that is reported.
        bert_epochs: of transformers' table.
    """

    name: str
    columns: tuple[str, ...]
    metrics: dict[str, str]
    batch: int
    rate: float
    epochs: int
    held_out: str = "validation"
    bert_epochs: int = 3


ACCURACY = {"accuracy": "accuracy"}
TASKS = (
    GlueTask("mnli", ("premise", "hypothesis"), ACCURACY, 16, 5e-4, 30, "validation_matched"),
    GlueTask("sst2", ("sentence",), ACCURACY, 16, 5e-4, 60),
    GlueTask(
        "mrpc", ("sentence1", "sentence2"), {"f1": "per_class.equivalent.f1", **ACCURACY}, 16, 4e-4, 30, bert_epochs=5
    ),
    GlueTask("cola", ("sentence",), {"matthews": "mcc"}, 32, 4e-4, 80),
    GlueTask("qnli", ("question", "sentence"), ACCURACY, 32, 4e-4, 25),
    GlueTask("qqp", ("question1", "question2"), {**ACCURACY, "f1": "per_class.duplicate.f1"}, 16, 5e-4, 25),
    GlueTask("rte", ("sentence1", "sentence2"), ACCURACY, 32, 5e-4, 80),
    GlueTask("stsb", ("sentence1", "sentence2"), {"pearson": "pearson", "spearman": "spearman"}, 16, 4e-4, 40),
)


def data_of(task: GlueTask, max_length: int) -> dict[str, Any]:
    """The section `data` of a config."""
    return {
        "train": "nyu-mll/glue:train",
        "test": f"nyu-mll/glue:{task.held_out}",
        "subset": task.name,
        "columns": {**dict(zip(("text", "text_pair"), task.columns, strict=False)), "label": "label"},
        "split": {"eval": 0.05, "test": 0.0},
        "near_duplicates": "off",
        "max_length": max_length,
    }


def published_of(task: GlueTask, model: str) -> dict[str, Any]:
    """The suite's section `published`."""
    other = {name: ours for name, ours in task.metrics.items() if name != ours}
    return {"path": f"benchmarks/published/{model}-glue.yaml", "task": task.name, "metrics": other}


def roberta(task: GlueTask) -> dict[str, Any]:
    lora = {"method": "lora", "rank": 8, "alpha": 16, "dropout": 0.0, "targets": ["query", "value"]}
    return {
        "name": f"published-roberta-{task.name}",
        "title": f"RoBERTa-base on GLUE {task.name}: LoRA against full fine-tuning (LoRA paper, Table 2)",
        "description": "Needs the hub and a GPU. The paper reports each run's best epoch on the validation split; here "
        "the last weights count. Full fine-tuning's rate is searched: its published figure is that of Liu et al. 2019. "
        + ("The paper starts this task from the MNLI adapter; here it starts anew. " if _from_mnli(task) else "")
        + f"Reported: {', '.join(task.metrics)}.",
        "published": published_of(task, "roberta"),
        "config": {
            "task": "text-classification",
            "model": {"path": "FacebookAI/roberta-base", "pooling": "model"},
            "data": data_of(task, 512),
            "training": {
                "batch_size": task.batch,
                "schedule": "linear",
                "warmup": 0.06,
                "weight_decay": 0.1,
            },
            "evaluation": {"batch_size": 128},
        },
        "budget": {"epochs": task.epochs},
        "reference": "full",
        "seeds": [0, 1, 2, 3, 4],
        "tuning": {"share": 0.2},
        "methods": {
            "full": {"adapter": {"method": "full"}, "learning_rates": [1e-5, 2e-5, 3e-5]},
            "lora": {"adapter": lora, "learning_rates": [task.rate]},
        },
        "general_text": None,
    }


def bert(task: GlueTask) -> dict[str, Any]:
    return {
        "name": f"published-bert-{task.name}",
        "title": f"BERT-base-cased on GLUE {task.name}: full fine-tuning (transformers' run_glue.py)",
        "description": f"Needs the hub and a GPU. Reported: {', '.join(task.metrics)}.",
        "published": published_of(task, "bert"),
        "config": {
            "task": "text-classification",
            "model": {"path": "google-bert/bert-base-cased", "pooling": "model"},
            "data": data_of(task, 128) | {"split": {"eval": 0.01, "test": 0.0}},
            "training": {"batch_size": 32, "schedule": "linear", "warmup": 0.0},
            "evaluation": {"batch_size": 128},
        },
        "budget": {"epochs": task.bert_epochs},
        "reference": "full",
        "seeds": [0, 1, 2],
        "methods": {"full": {"adapter": {"method": "full"}, "learning_rates": [2e-5]}},
        "general_text": None,
    }


def _from_mnli(task: GlueTask) -> bool:
    return task.name in ("mrpc", "rte", "stsb")


def text_of(suite: dict[str, Any]) -> str:
    run = f"# Run: peft-engine bench benchmarks/suites/{suite['name']}.yaml"
    head = f"{run}\n# Written by benchmarks/published/glue.py.\n\n"
    return head + yaml.safe_dump(suite, sort_keys=False, width=110, allow_unicode=True)


def suites() -> dict[str, str]:
    """File name → text."""
    made = [make(task) for make in (roberta, bert) for task in TASKS]
    return {f"{suite['name']}.yaml": text_of(suite) for suite in made}


def main() -> None:
    for name, text in suites().items():
        (SUITES / name).write_text(text, encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main()
