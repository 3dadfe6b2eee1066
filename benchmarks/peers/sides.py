"""One side of compare.py, in a process of its own: the engine's loop, or another trainer on the same rows.

    python benchmarks/peers/sides.py SIDE CONFIG STEPS_OF_A_BLOCK BLOCKS [KEY=VALUE ...]

Both kinds of side train their whole run in one call of their own loop; after each block they report and wait.
"""

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from peft_engine.config import Config  # noqa: E402
from peft_engine.errors import ConfigError, EngineError  # noqa: E402

TASKS = {
    "hf-trainer": ("causal-lm", "text-classification"),
    "trl": ("causal-lm",),
    "liger": ("causal-lm", "text-classification"),
}


def refuse_what_peers_lack(config: Config, peers: list[str]) -> None:
    """Only a run that other trainers can repeat step for step is compared.

    Raises:
        ConfigError: all settings at once that they have no like of, or a peer that can't run here.
    """
    data, training, augment = config.data, config.training, config.data.augment
    lacking = {
        f"adapter.method: {config.adapter.method} (lora only)": config.adapter.method != "lora",
        "data.packing": data.packing,
        "data.streaming": data.streaming,
        "data.class_weights": data.class_weights != "none",
        "data.augment": augment.model_dump() != type(augment)().model_dump(),
        "training.ema_decay": training.ema_decay is not None,
        "training.neftune_alpha": training.neftune_alpha is not None,
        "training.early_stopping": training.early_stopping is not None,
        f"training.micro_batch_size: {training.micro_batch_size} (auto, or the whole batch)": training.micro_batch_size
        not in ("auto", training.batch_size),
        "training.precision: fp16": training.precision == "fp16",
    }
    found = [name for name, is_set in lacking.items() if is_set]
    if found:
        raise ConfigError(
            f"This config can't be repeated by other trainers: {'; '.join(found)}.",
            "Take another config, or replace these settings with --set.",
        )
    for peer in peers:
        if config.task not in TASKS[peer]:
            raise ConfigError(
                f"Peer {peer} does not train the task {config.task}, only {', '.join(TASKS[peer])}.", "Leave it out."
            )
        _refuse_absent(peer)


def _refuse_absent(peer: str) -> None:
    import torch

    if peer == "trl" and importlib.util.find_spec("trl") is None:
        raise ConfigError("Peer trl: the package trl is not installed.", "pip install 'peft-engine[preference]'.")
    if peer != "liger":
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            "Peer liger: Liger's kernels are Triton for CUDA, and this machine has no CUDA device.",
            "Leave it out, or run on a machine with an NVIDIA GPU.",
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("Peer liger: the package liger-kernel is not installed.", "pip install liger-kernel.")


class Turns:
    """The talk with the parent. `step_done` is called after every optimizer step, and waits at the end of a block."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.pipe = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr instead
        os.dup2(2, 1)
        self.seconds: list[float] = []
        self.losses: list[Any] = []
        self.began = 0.0

    def wait(self, facts: dict[str, Any]) -> None:
        """Say that all is loaded; returns when the first block is to begin."""
        print("ready", file=self.pipe, flush=True)
        while self._asked() != "block":
            self._answer(facts)
        self.began = time.perf_counter()

    def step_done(self, loss: Any, counted: bool) -> None:
        """
        Args:
            loss: of the step, a number or a tensor; a tensor is read at the end of the block.
            counted: whether bytes were counted on this step, which its time then shows.
        """
        self.losses.append(loss)
        if len(self.losses) == self.steps:
            _synchronise()
        now = time.perf_counter()
        if not counted:
            self.seconds.append(now - self.began)
        if len(self.losses) == self.steps:
            self._answer({"seconds": self.seconds, "losses": [float(loss) for loss in self.losses]})
            self.seconds, self.losses = [], []
            asked = self._asked()
            assert asked in ("block", "end"), asked
            now = time.perf_counter()
        self.began = now

    def end(self, facts: dict[str, Any]) -> None:
        self._answer(facts)

    def _asked(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(f"{sys.argv[1]}: the parent has gone.")
        return line.strip()

    def _answer(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self.pipe, flush=True)


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Cell:
    """The parts of the run, put together as `train` does; for peers without the fused kernels."""

    def __init__(self, config: Config, total_steps: int, ours: bool) -> None:
        import torch
        from accelerate import Accelerator

        from peft_engine.building import build_group, encode_splits, make_trainees
        from peft_engine.data.loading import load_splits
        from peft_engine.runtime import PRECISIONS, Runtime, device_of, start
        from peft_engine.tasks import make_task

        training = config.training.model_copy(update={"steps": total_steps, "log_every": 1})
        self.config = config.model_copy(update={"training": training, "kernels": config.kernels if ours else "off"})
        if ours:
            self.runtime = start(self.config)
        else:  # as its users run it: no deterministic algorithms, the C library's own way with freed memory
            cpu, asked = device_of(config) == "cpu", training.precision
            native = not cpu and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = asked if asked != "auto" else "bf16" if native else "fp32"
            self.runtime = Runtime(Accelerator(cpu=cpu, mixed_precision=PRECISIONS[precision]), precision, {})
        self.splits = load_splits(self.config)
        self.task = make_task(self.config, self.splits.labels)
        self.data = encode_splits(self.task, self.splits, self.config)
        self.group = build_group(self.task, self.config, self.runtime, self.data)
        (self.trainee,) = make_trainees(self.group, self.data["train"], self.config, self.runtime)
        self.total_steps = total_steps
        self.heaviest = self.trainee.plan.heaviest_step(total_steps) if self.runtime.device.type == "cpu" else None

    def facts(self) -> dict[str, Any]:
        """What must be the same on all sides, for the parent to see."""
        from torch import nn

        digest = hashlib.sha256()
        for name, tensor in sorted(self.trainee.member.all_tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        order = hashlib.sha256()
        for step in range(1, self.total_steps + 1):
            order.update(self.trainee.plan.rows(step).tobytes() + b"|")
        own = {id(m) for n, m in self.group.model.named_modules() if "lora_dropout" in n}
        modules = [m for m in self.group.model.modules() if isinstance(m, nn.Dropout) and id(m) not in own]
        rates = [getattr(self.group.backbone.model.config, name, 0.0) or 0.0 for name in ("attention_dropout",)]
        return {
            "start_digest": digest.hexdigest(),
            "precision": self.runtime.precision,
            "device": self.runtime.device.type,
            "model_dropout": bool(any(m.p for m in modules) or any(rates)),
            "rows_digest": order.hexdigest(),
        }

    def peak(self, counted: int | None) -> dict[str, Any]:
        import torch

        if self.runtime.device.type == "cuda":
            return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_bytes_meaning": "CUDA allocator's maximum"}
        return {"peak_bytes": counted, "peak_bytes_meaning": "live tensor bytes, counted on the heaviest step"}


def run_ours(cell: Cell, turns: Turns) -> dict[str, Any]:
    """The engine's loop, as `train` drives it, without evaluation and checkpoints."""
    from peft_engine.training.guards import Signals
    from peft_engine.training.loop import Hooks, Loop

    hooks = Hooks(
        evaluate=None,
        log=lambda row: None,
        save=lambda step: None,
        fail=lambda record: print(json.dumps(record), file=sys.stderr),
        progress=lambda step, steps, row: turns.step_done(row["loss"], step == cell.heaviest),
        elapsed=lambda: 0.0,
    )
    where = cell.splits.train.where
    Loop(
        cell.group, cell.task, cell.data["train"], where, [cell.trainee], cell.config, cell.runtime,
        cell.total_steps, hooks, Signals(),
    ).run()  # fmt: skip
    fused = cell.group.fused
    return cell.peak(cell.trainee.live_bytes) | {"kernels": "off" if fused is None else fused.backend}


def run_peer(name: str, cell: Cell, folder: str) -> tuple[Callable[[Turns], dict[str, Any]], Any]:
    """Another trainer over the cell's plain peft model, fed with the cell's batches.

    Returns:
        What trains it, to be called once the parent says so; and the trainer.
    """
    import torch
    from datasets import Dataset
    from torch.utils.data import DataLoader, Sampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from peft_engine.meters.memory import LiveBytes
    from peft_engine.tasks.text_classification import pooling_of
    from peft_engine.training.optim import make_schedule

    settings, data, trainee = cell.config.training, cell.data["train"], cell.trainee
    cpu = cell.runtime.device.type == "cpu"
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": cell.total_steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": settings.learning_rate,
        "max_grad_norm": settings.max_grad_norm or 0.0,
        "seed": settings.seed,
        "bf16": cell.runtime.precision == "bf16",
        "fp16": False,
        "use_cpu": cpu,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not cpu,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    base: Any = Trainer
    if name == "trl":
        from trl import SFTConfig, SFTTrainer

        base, made = SFTTrainer, SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    else:
        made = TrainingArguments(**arguments, use_liger_kernel=name == "liger")

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        import numpy as np

        batch = cell.task.collate(data, np.array(rows))
        batch.pop("text_bytes", None)
        return {{"label": "labels"}.get(part, part): tensor for part, tensor in batch.items()}

    class Planned(Sampler[list[int]]):
        """The rows of every optimizer step of the engine's plan."""

        def __len__(self) -> int:
            return cell.total_steps

        def __iter__(self) -> Iterator[list[int]]:
            for step in range(1, cell.total_steps + 1):
                yield [int(row) for row in trainee.plan.rows(step)]

    class Fed(base):
        def get_train_dataloader(self) -> Any:
            rows: Any = range(len(data))
            return self.accelerator.prepare(DataLoader(rows, batch_sampler=Planned(), collate_fn=collate))

        def training_step(self, *rest: Any, **named: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*rest, **named)
            self.last_loss = loss.detach()
            return loss

    class Steps(TrainerCallback):
        def __init__(self) -> None:
            self.turns: Turns | None = None
            self.meter: LiveBytes | None = None
            self.counted: int | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step + 1 == cell.heaviest:
                held = [v for s in trainee.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
                self.meter = LiveBytes([*cell.group.model.parameters(), *cell.group.model.buffers(), *held])
                self.meter.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            counted = self.meter is not None
            if self.meter is not None:
                self.meter.__exit__(None, None, None)
                self.counted, self.meter = self.meter.peak, None
            assert self.turns is not None
            self.turns.step_done(trainer.last_loss, counted)

    own_loss: dict[str, Any] = {}
    if cell.config.task == "text-classification" and pooling_of(cell.config.model) == "mean":
        if cell.task.labels.kind != "single":
            raise ConfigError(
                f"Peer {name}: model.pooling: mean with labels of the kind {cell.task.labels.kind} is not compared.",
                "Take data with one class per row, or model.pooling: model.",
            )
        # no class of transformers has this head; its users hand the trainer a loss
        own_loss["compute_loss_func"] = lambda out, labels, **_: torch.nn.functional.cross_entropy(out.logits, labels)
    schedule = make_schedule(settings.schedule, settings.warmup, cell.total_steps)
    rates = torch.optim.lr_scheduler.LambdaLR(trainee.optimizer, lambda done: schedule(done + 1))
    steps = Steps()
    rows = {"input_ids": [data.tokens(0).tolist()], "labels": [data.tokens(0).tolist()]}  # looked at, never trained on
    trainer = Fed(
        model=cell.group.model, args=made, train_dataset=Dataset.from_dict(rows), data_collator=list,
        processing_class=cell.task.processor, callbacks=[steps], optimizers=(trainee.optimizer, rates), **own_loss,
    )  # fmt: skip

    def go(turns: Turns) -> dict[str, Any]:
        steps.turns = turns
        trainer.train()
        return cell.peak(steps.counted) | {"kernels": "Liger" if name == "liger" else "none"}

    return go, trainer


def main() -> None:
    from peft_engine.config_reading import load_config

    side, path, steps, blocks, *given = sys.argv[1:]
    turns = Turns(int(steps))
    try:
        config = load_config(path, tuple(given))
        cell = Cell(config, int(steps) * int(blocks), ours=side == "peft-engine")
        with tempfile.TemporaryDirectory() as folder:
            go = None if side == "peft-engine" else run_peer(side, cell, folder)[0]
            turns.wait(cell.facts())
            if cell.runtime.device.type == "cuda":
                import torch

                torch.cuda.reset_peak_memory_stats()
            turns.end(run_ours(cell, turns) if go is None else go(turns))
    except EngineError as error:
        print(f"Error: {side}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
