"""What a record says of a cell: from the run itself, and from its reopened model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapters.fusing import fuse, row_seeds
from ..adapters.group import Group, initialise
from ..adapters.new_rows import with_new_tokens
from ..answers import is_right
from ..building import encode_splits, make_trainees, refuse_too_long
from ..config import Config
from ..config_reading import load_config
from ..data.batching import BatchPlan
from ..data.encoding import EncodedSet
from ..data.loading import load_splits
from ..data.splitting import Splits
from ..errors import ConfigError, DataError, VerificationError
from ..evaluation import evaluate_items, evaluate_split
from ..generation import prompt_and_answer
from ..meters.cost import cost_usd
from ..meters.energy import energy_here
from ..meters.flops import count_flops, gemm_rate
from ..meters.memory import peak_rss_bytes
from ..meters.time import PhaseTimer
from ..run import train
from ..runtime import Runtime, git_state, hardware, start, versions
from ..tasks import Task, make_task
from ..tasks.base import Generates, to_device
from ..tasks.causal_lm import CausalLM
from ..tasks.items import item_kind
from ..tasks.text_metrics import text_scores
from ..training.step import gradients
from ..using import open_run
from .general_text import windows
from .suite import GeneralText

UNIT = "nats per token"  # of forgetting
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOOKED_AT = 200  # steps among which the one of median size is looked for
AGREES = 1e-3  # relative difference of a loss that rounding may cause between a trained model and its reopened run


def trained(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train as the spec says, then measure: train_info and meta_info of a record."""
    config, final = _ready(spec, config_of(spec, folder)), spec["kind"] == "final"
    summary = train(config, overwrite=True)
    metrics = summary["metrics"]
    opened_up = _reopened(spec, config, metrics["after"], summary["micro_batch_size"]) if final else {}
    flops, rate = opened_up.pop("flops", None), opened_up.pop("gemm", None)
    usual = (summary["step_seconds_percentiles"] or {}).get("p50")
    one_format = config.model.frozen_compute == "full"
    info = {
        "status": "success",
        "primary": metrics["primary"],
        "maximize": metrics["maximize"],
        "metrics_before": metrics["before"] if final else None,
        "metrics_after": metrics["after"] | opened_up.pop("answers", {}) if final else None,
        "train_curve": _curve(Path(config.output)),
        "eval_curve": summary["evaluations"],
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "seconds": {name: summary["seconds"].get(name, 0.0) for name in ("load", "train", "evaluate", "save")},
        "wall_seconds": summary["wall_seconds"],
        "tokens_per_second": summary["tokens_per_second"],
        "step_seconds": summary["step_seconds_percentiles"],
        **{
            name: summary[name]
            for name in (
                "peak_bytes",
                "peak_bytes_meaning",
                "peak_rss_bytes",
                "memory",
                "optimizer_state_bytes",
                "trainable_parameters",
                "total_parameters",
                "adapter_file_bytes",
                "micro_batch_size",
            )
        },
        "flops_per_step": flops,
        "mfu": flops / usual / rate["flops_per_second"] if flops and usual and rate and one_format else None,
        "mfu_of": rate and (_of(rate) if one_format else "none: some products of a step run in another format"),
        "gemm": rate,
        "energy_joules": summary["energy"] and summary["energy"]["joules"],
        "energy_method": summary["energy"] and summary["energy"]["method"],
        "cost_usd": summary["cost_usd"],
        **({"forgetting": None, "class_names": None, "judging_seconds": None} | opened_up),
    }
    meta = {
        "hardware": summary["hardware"],
        "versions": summary["versions"],
        "git": summary["git"],
        "data_digest": summary["digests"]["data"],
        "weights_digest": summary["digests"]["backbone"],
        "kernels": summary["kernels"],
        "decisions": summary["decisions"],
        "precision": summary["precision"],
        "device": summary["device"],
    }
    return {"train_info": info, "meta_info": meta}


def baseline(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Judge the model as it is: train_info and meta_info of a record without training. A new head is as its seed
    starts it."""
    config, timer, energy = config_of(spec, folder), PhaseTimer(), energy_here()
    with timer.phase("load"):
        runtime = start(config)
        splits, task, data = prepare(config)
        refuse_unjudged(spec, splits, task)
        backbone = with_new_tokens(task.load(runtime.device), task.processor, config)
        model: Any = backbone.model
        refuse_too_long(model, data)
        for name in backbone.new_modules:
            initialise(model.get_submodule(name), getattr(model.config, "initializer_range", 0.02), spec["seed"])
    model.eval()
    size = config.evaluation.batch_size or config.training.batch_size
    rate = gemm_rate(runtime.device, NARROW.get(runtime.precision, torch.float32))
    with timer.phase("evaluate"):
        before = evaluate_split(model, task, data["test"], size, runtime)
        items = evaluate_items(model, task, data["test"], size, runtime)
        before |= _answered(model, task, splits, items, spec, size)
        forgetting = None
        if spec["general_text"]:
            loss = _general_loss(spec, model, task, config, runtime)
            forgetting = {"before": loss, "after": loss, "unit": UNIT}
    used, wall = energy.used(), timer.total
    info = {
        "status": "success",
        "primary": task.primary,
        "maximize": task.maximize,
        "metrics_before": before,
        "metrics_after": None,
        "train_curve": [],
        "eval_curve": [],
        "steps": 0,
        "tokens": 0,
        "seconds": {"load": 0.0, "train": 0.0, "evaluate": 0.0, "save": 0.0} | timer.seconds,
        "wall_seconds": wall,
        "tokens_per_second": None,
        "step_seconds": None,
        "peak_bytes": None,
        "peak_bytes_meaning": None,
        "peak_rss_bytes": peak_rss_bytes(),
        "memory": None,
        "optimizer_state_bytes": 0,
        "trainable_parameters": 0,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "adapter_file_bytes": None,
        "flops_per_step": None,
        "mfu": None,
        "mfu_of": _of(rate),
        "gemm": rate,
        "energy_joules": used and used["joules"],
        "energy_method": used and used["method"],
        "cost_usd": cost_usd(wall, config.budget.usd_per_hour),
        "forgetting": forgetting,
        "items": items,
        "class_names": _class_names(task),
    }
    meta = {
        "hardware": hardware(),
        "versions": versions(),
        "git": git_state(),
        "data_digest": splits.digest,
        "weights_digest": backbone.weights_digest,
        "kernels": None,
        "decisions": {**runtime.why, **backbone.decisions},
        "precision": runtime.precision,
        "device": runtime.device.type,
    }
    return {"train_info": info, "meta_info": meta}


def _reopened(spec: Mapping[str, Any], config: Config, after: Mapping[str, Any], micro: int) -> dict[str, Any]:
    """What only the trained model itself can tell: answers, items, forgetting, class_names, flops and gemm."""
    timer = PhaseTimer()
    with timer.phase("reopen"):
        splits, _, data = prepare(config)
        opened = open_run(config.output)
        task, group, runtime = opened.task, opened.group, opened.runtime
        if config.kernels != "off" and group.fused is None:
            group.fused, group.rows = fuse(group.model, config.kernels), row_seeds(group.model)
    size = config.evaluation.batch_size or config.training.batch_size
    with group.evaluating(group.members[0]) as model:
        with timer.phase("items"):
            items = evaluate_items(model, task, data["test"], size, runtime)
        refuse_other_loss(after, items)
        with timer.phase("answers"):
            answers = _answered(model, task, splits, items, spec, size)
        with timer.phase("forgetting"):
            forgetting = _forgetting(spec, model, task, config, runtime)
    with timer.phase("machine"):
        flops = _step_flops(group, task, data["train"], config, runtime, micro)
        gemm = gemm_rate(runtime.device, NARROW.get(runtime.precision, torch.float32))
    return {
        "answers": answers,
        "forgetting": forgetting,
        "items": items,
        "class_names": _class_names(task),
        "flops": flops,
        "gemm": gemm,
        "judging_seconds": timer.seconds,
    }


def refuse_other_loss(trained: Mapping[str, Any], items: Mapping[str, Any]) -> None:
    """The reopened run must be what was trained. Raises VerificationError where its loss on the test rows differs."""
    before, after = float(trained["loss"]), sum(items["loss"]) / sum(items["units"])
    if not abs(after - before) <= AGREES * max(1.0, abs(before)):
        raise VerificationError(
            f"The reopened run has a loss of {after:.5f} on the test rows, training ended with {before:.5f}.",
            "Report this with the suite.",
        )


def config_of(spec: Mapping[str, Any], folder: Path) -> Config:
    """The run's settings. Answers are generated here, once and row by row, not by the run."""
    config = load_config({**spec["config"], "output": str(folder / "run")})
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"generate_rows": 0})})


def prepare(config: Config) -> tuple[Splits, Task, dict[str, EncodedSet]]:
    splits = load_splits(config)
    task = make_task(config, splits.labels)
    return splits, task, encode_splits(task, splits, config)


def _ready(spec: Mapping[str, Any], config: Config) -> Config:
    """The settings with their number of steps. Looks at the data first, where no baseline was judged on it."""
    if not spec["tokens"] and spec.get("judged"):
        return config
    splits, task, data = prepare(config)
    refuse_unjudged(spec, splits, task)
    return with_steps(config, data["train"], spec["tokens"]) if spec["tokens"] else config


def refuse_unjudged(spec: Mapping[str, Any], splits: Splits, task: Task) -> int:
    """What a cell could not measure after its training, told before it.

    Returns:
        Test rows that answers are generated for.

    Raises:
        ConfigError: no split to evaluate or test on, or a task without single test rows. DataError: no answers to
            compare generated ones with, or too little general text.
    """
    item_kind(task)
    for name in ("eval", "test"):
        if getattr(splits, name) is None:
            fix = f"Set config.data.split.{name}, or data.{name}."
            raise ConfigError(f"The suite's data has no {name} split.", fix)
    if spec["general_text"]:
        windows(GeneralText.model_validate(spec["general_text"]), task.processor)
    return len(_reference_answers(spec, splits, task))


def with_steps(config: Config, data: EncodedSet, tokens: int) -> Config:
    """A budget of tokens as steps: the same for every method and seed, by the mean step of the data."""
    steps = max(1, round(tokens / tokens_of_steps(config, data).mean()))
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})


def tokens_of_steps(config: Config, data: EncodedSet) -> np.ndarray:
    """Tokens of each step of an epoch, padding not counted, int64 (steps,)."""
    plan = BatchPlan(data.lengths, config.training.batch_size, 0, config.data.group_by_length, mixture=data.mixture)
    steps = range(1, plan.steps_per_epoch + 1)
    return np.array([data.lengths[plan.rows(step)].sum() for step in steps], dtype=np.int64)


def _curve(folder: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[row["step"], row["loss"]] for row in rows if "loss" in row]


def _step_flops(group: Group, task: Task, data: EncodedSet, config: Config, runtime: Runtime, size: int) -> int | None:
    """Operations of forward and backward of the training step with the median number of padded tokens."""
    if runtime.world > 1:
        return None
    trainee = make_trainees(group, data, config, runtime)[0]
    plan = trainee.plan
    steps = range(1, min(plan.steps_per_epoch, LOOKED_AT) + 1)
    padded = [len(plan.rows(step)) * int(data.lengths[plan.rows(step)].max()) for step in steps]
    step = int(np.argsort(padded, kind="stable")[len(padded) // 2]) + 1
    tensors = list(trainee.member.tensors.values())
    for tensor in tensors:  # peft freezes what it loads
        tensor.requires_grad_(True)
    group.activate(trainee.member)
    group.train()
    pieces = plan.micro_batches(step, size)
    units = data.units[plan.rows(step)].sum().item()
    try:
        return count_flops(lambda: gradients(group, task, data, pieces, units, tensors, runtime, seed=0))
    finally:
        trainee.optimizer.zero_grad(set_to_none=True)
        group.train(False)


def _answered(
    model: nn.Module, task: Task, splits: Splits, items: dict[str, Any], spec: Mapping[str, Any], size: int
) -> dict[str, Any]:
    """Generate the answers that the suite asks for; add `exact` to the items (null beyond them); their metrics."""
    settings = load_config({**spec["config"], "output": "unset"}).evaluation
    wanted = _reference_answers(spec, splits, task)
    if not wanted:
        return {}
    assert splits.test is not None
    assert isinstance(task, Generates)
    texts = task.answers(model, [splits.test.examples[row] for row in wanted], settings, size)
    pairs = zip(texts, wanted.items(), strict=True)
    right = {row: float(is_right(text, answer, settings.answer)) for text, (row, answer) in pairs}
    items["exact"] = [right.get(row) for row in items["rows"]]
    if isinstance(task, CausalLM):
        return {"exact_match": sum(right.values()) / len(right), "generated_rows": len(right)}
    return text_scores(texts, list(wanted.values()))


def _reference_answers(spec: Mapping[str, Any], splits: Splits, task: Task) -> dict[int, str]:
    """Test row → its answer, of the rows that are to be answered. Raises DataError where none of them has any."""
    asked = (spec["config"].get("evaluation") or {}).get("generate_rows")
    if not asked or not isinstance(task, Generates):
        return {}
    assert splits.test is not None
    wanted = {}
    for row, example in enumerate(splits.test.examples[:asked]):
        answer = prompt_and_answer(example, task.processor)[1] if isinstance(task, CausalLM) else example["target"]
        if answer:
            wanted[row] = str(answer).strip()
    if not wanted:
        problem = f"evaluation.generate_rows: got {asked}, and the test rows have no answers to compare with."
        raise DataError(
            problem, "Set evaluation.generate_rows to 0, or give rows with answers (prompt and completion)."
        )
    return wanted


def _forgetting(
    spec: Mapping[str, Any], model: nn.Module, task: Task, config: Config, runtime: Runtime
) -> dict[str, Any] | None:
    if not spec["general_text"]:
        return None
    before = spec.get("forgetting_before")
    after = _general_loss(spec, model, task, config, runtime)
    if before is None:  # the baseline is not there: the untouched model once more
        untouched = make_task(config).load(runtime.device)
        before = _general_loss(spec, untouched.model.eval(), task, config, runtime)
    return {"before": before, "after": after, "unit": UNIT}


def _general_loss(spec: Mapping[str, Any], model: nn.Module, task: Task, config: Config, runtime: Runtime) -> float:
    assert isinstance(task, CausalLM)
    settings = GeneralText.model_validate(spec["general_text"])
    size = config.evaluation.batch_size or config.training.batch_size
    return _mean_nats(model, task, windows(settings, task.processor), size, runtime)


def _mean_nats(model: nn.Module, task: CausalLM, ids: np.ndarray, size: int, runtime: Runtime) -> float:
    """Mean loss per predicted token (nats): in each window every token but the first. The model in eval mode."""
    total = 0.0
    for first in range(0, len(ids), size):
        part = torch.from_numpy(ids[first : first + size])
        batch = to_device({"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}, runtime.device)
        with torch.no_grad(), runtime.accelerator.autocast():
            logits = task.forward(model, batch)
        total += float(task.loss(logits, batch))
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def _class_names(task: Task) -> list[str] | None:
    labels = getattr(task, "labels", None)
    return list(labels.names) or None if labels is not None else None


def _of(rate: Mapping[str, Any]) -> str:
    return f"measured {rate['dtype']} GEMM of this machine"
