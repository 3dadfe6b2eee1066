"""dpo, orpo, kto and reward: our fused model in TRL's trainers, our run directory round them.

TRL makes the loss, the batches and their order. The optimizer, the schedule, checkpoints (safetensors and JSON, never
pickles), signals, budget and guards are this engine's, put in through the trainer's own hooks.
"""

import contextlib
import inspect
import logging
import math
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .config import Config
from .data.splitting import Split
from .errors import ConfigError, DataError, Diverged, EngineError, OutOfMemory
from .levers.checkpointing import hold_choice
from .meters.memory import LiveBytes
from .reference import copy_to_reference, one_start, reference_numbers
from .runtime import seed_everything
from .session import Run
from .tasks.preference import over_rows
from .training.guards import check_gradients, is_out_of_memory
from .training.optim import make_schedule, set_learning_rate
from .training.state import Trainee
from .training.stopping import stop_reason

ENGINE_SETS = {
    "beta": "preference.beta",
    "max_length": "data.max_length",
    "learning_rate": "training.learning_rate",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.steps",
    "per_device_train_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size",
    "max_grad_norm": "training.max_grad_norm",
    "seed": "training.seed",
    "output_dir": "output",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing_kwargs": "training.gradient_checkpointing",
    "report_to": "report_to",
}
"""TRL's fields that are settings of ours, or that the engine decides by them."""


def trainer_classes(task: str) -> tuple[Any, Any]:
    """TRL's (trainer, its config class) of a task. Raises ConfigError where TRL isn't installed."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO lives there
    try:
        import trl

        if task == "orpo":
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            return ORPOTrainer, ORPOConfig
    except ImportError as error:
        raise ConfigError(
            f"task: {task} needs TRL ({error}).", "Install it: pip install 'peft-engine[preference]'."
        ) from error
    names = {"dpo": "DPO", "kto": "KTO", "reward": "Reward"}
    return getattr(trl, f"{names[task]}Trainer"), getattr(trl, f"{names[task]}Config")


class PreferenceRun(Run):
    """A `Run` whose loop is a TRL trainer."""

    def _open(self) -> None:
        self._refuse_unsupported()
        self.driver = Driver(self)  # before a checkpoint is loaded: the reference is the start of the adapter
        super()._open()

    def _refuse_unsupported(self) -> None:
        if self.runtime.world > 1:
            raise ConfigError(f"task: {self.config.task} runs in one process here.", "Start one process.")
        for name in ("early_stopping", "restore_best"):
            if getattr(self.config.training, name):
                raise ConfigError(f"training.{name} is not built for task {self.config.task}.", "Remove it.")
        if self.config.training.precision == "fp16" or self.runtime.precision == "fp16":
            raise ConfigError(f"task: {self.config.task} does not train in fp16 here.", "Set training.precision: fp32.")
        if self.config.task == "reward" and self.task.processor.eos_token is None:
            raise ConfigError(
                f"model.path: the tokenizer of {self.config.model.path} has no end-of-text token, which TRL's "
                "RewardTrainer closes texts by.",
                "Take a causal language model as the backbone.",
            )
        if self.config.task == "kto":
            self._refuse_one_sided()

    def _refuse_one_sided(self) -> None:
        """KTO's margin, and what it learns from, is between good and bad answers."""
        for name in ("train", "eval", "test"):
            split = getattr(self.splits, name)
            shown = {example["label"] for example in split.examples} if split else {True, False}
            if len(shown) == 1:
                raise DataError(
                    f"data: all {len(split.examples)} rows of the {name} split have the label {str(*shown).lower()}; "
                    "kto compares good answers with bad ones.",
                    "Give rows of both kinds, or make that split larger (data.split, data.limit).",
                )

    def _loop(self) -> Any:
        return self.driver

    def _judge(self, member: Any, split: str, generate: bool = True) -> dict[str, Any]:
        with self.timer.phase("evaluate"):
            return self.driver.judge(split)

    def _evaluate_during(self, member: Any) -> dict[str, Any]:
        found = self._judge(member, "eval")
        self.view.say(
            "eval  " + "  ".join(f"{name} {found[name]:.4f}" for name in dict.fromkeys([self.task.primary, "loss"]))
        )
        return found

    def _summary(self, after: dict[str, Any]) -> dict[str, Any]:
        summary = super()._summary(after)
        summary["total_parameters"] -= reference_numbers(self.group.model)
        summary["decisions"] |= {"trainer": self.driver.described, "dropout": self.driver.dropout}
        return summary


class Driver:
    """A TRL trainer over a run's group, with the interface of `training.loop.Loop`."""

    def __init__(self, run: PreferenceRun) -> None:
        self.run_ = run
        self.config: Config = run.config
        self.trainee: Trainee = run.trainees[0]
        trainer, settings = trainer_classes(run.config.task)
        self.total_steps = run.total_steps
        self.schedule = make_schedule(run.config.training.schedule, run.config.training.warmup, run.total_steps)
        arguments = self._arguments(settings)
        optimizer = self.trainee.optimizer
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # Steps sets the rate
        self.reason: EngineError | None = None
        self.batches: dict[str, list[float]] = {}  # TRL's metrics of each batch of the last evaluation
        self.steps = Steps(self)
        first = "eval" if "eval" in run.data else run._final_split()
        with quiet(), refused(run.config.task), one_start(run.group.model):
            self.trainer: Any = type(f"Engine{trainer.__name__}", (Hooked, trainer), {"driver": self})(
                model=run.group.model,
                args=arguments,
                train_dataset=as_dataset(run.splits.train),
                eval_dataset=as_dataset(getattr(run.splits, first)),
                processing_class=run.task.processor,
                callbacks=[self.steps],
                optimizers=(optimizer, constant),
            )
        copy_to_reference(run.group.model)
        hold_choice(run.group.backbone.model)
        self.trainer.remove_callback(PrinterCallback)
        self.prepared = {first: self.trainer.eval_dataset}
        off = getattr(arguments, "disable_dropout", False)
        self.dropout = "off: TRL's disable_dropout, preference.options sets it" if off else "as set"
        self.described = f"trl {trainer.__module__}.{trainer.__name__}"
        run.group.activate(self.trainee.member)

    def _arguments(self, settings: Any) -> Any:
        training, options = self.config.training, dict(self.config.preference.options)
        known = inspect.signature(settings).parameters
        for name in options:
            if name in ENGINE_SETS:
                raise ConfigError(
                    f"preference.options.{name} is a setting of its own here.", f"Set {ENGINE_SETS[name]}."
                )
            if name not in known:
                raise ConfigError(
                    f"preference.options.{name}: TRL's {settings.__name__} has no such field.", "Remove it."
                )
        micro = self.trainee.micro_batch_size
        if training.batch_size % micro:
            raise ConfigError(
                f"training.micro_batch_size: {micro} does not divide training.batch_size {training.batch_size}; "
                "TRL's trainers take whole micro-batches only.",
                "Take a divisor.",
            )
        size = self.config.evaluation.batch_size or micro
        given: dict[str, Any] = {
            "output_dir": str(self.run_.directory.path / "trl"),
            "max_steps": self.total_steps,
            "per_device_train_batch_size": micro,
            "per_device_eval_batch_size": size,
            "gradient_accumulation_steps": training.batch_size // micro,
            "max_grad_norm": training.max_grad_norm or 0.0,
            "learning_rate": training.learning_rate,
            "max_length": self.config.data.max_length,
            "seed": training.seed,
            "data_seed": training.seed,
            "bf16": self.run_.runtime.precision == "bf16",
            "fp16": False,
            "use_cpu": self.run_.runtime.device.type == "cpu",
            "logging_steps": training.log_every,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "full_determinism": False,
            "gradient_checkpointing": False,  # TRL's default is True; `build_group` has done it where it is set
        }
        if "router_aux_loss_coef" in known:
            if options.pop("router_aux_loss_coef", None):
                raise ConfigError(
                    "preference.options.router_aux_loss_coef: the balance loss would depend on how a step is cut.",
                    "Remove it: the engine does not train it.",
                )
            given["router_aux_loss_coef"] = 0.0  # TRL takes the model's own otherwise
        if "beta" in known:
            given["beta"] = self.config.preference.beta
        with quiet(), refused(self.config.task):
            return settings(**{name: value for name, value in given.items() if name in known}, **options)

    def run(self) -> None:
        """Train from the trainee's step to the last. Raises as `training.loop.Loop.run` does."""
        done, training = self.trainee.step, self.config.training
        if done >= self.total_steps:
            return
        with quiet(), tempfile.TemporaryDirectory() as folder:
            if done:  # the trainer reads where it was from a folder; weights and optimizer are in place already
                state = TrainerState(global_step=done, epoch=self._epoch(done), max_steps=self.total_steps)
                state.train_batch_size, state.logging_steps = self.trainer.args.train_batch_size, training.log_every
                state.save_to_json(str(Path(folder) / TRAINER_STATE_NAME))
            try:
                self.trainer.train(resume_from_checkpoint=folder if done else None)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemory(
                    f"Memory ran out with {self.trainee.micro_batch_size} row(s) at once: {str(error).splitlines()[0]}",
                    "Set training.micro_batch_size lower (auto does not halve it under TRL), or data.max_length.",
                ) from error
        if self.reason:
            raise self.reason

    def _epoch(self, step: int) -> float:
        return step / max(1, math.ceil(len(self.trainer.train_dataset) / self.config.training.batch_size))

    def judge(self, split: str) -> dict[str, Any]:
        """TRL's evaluation metrics of a split, without their prefix."""
        if split not in self.prepared:
            self.prepared[split] = self._prepare(getattr(self.run_.splits, split))
        seed_everything(self.config.training.seed, 5)
        size = self._evaluation_size(len(self.prepared[split]))
        self.trainer.args.per_device_eval_batch_size = size
        with quiet(), refused(self.config.task):  # the first use of TRL's options, before any training
            found = self.trainer.evaluate(self.prepared[split])
        measured = {name.removeprefix("eval_"): value for name, value in found.items()}
        if self.config.task == "kto":
            measured |= over_rows(self.batches, self.prepared[split]["label"], size)
        left_out = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
        return {name: float(value) for name, value in measured.items() if name not in left_out}

    def _evaluation_size(self, rows: int) -> int:
        """Rows at once. TRL takes the mean of its batches' means: the rows', where all batches are of one size."""
        most = self.config.evaluation.batch_size or self.trainee.micro_batch_size
        if self.config.task == "kto":  # its loss is of a batch; its rewards are put right by `over_rows`
            return most
        return next(size for size in range(min(most, rows), 0, -1) if rows % size == 0)

    def _prepare(self, split: Split) -> Any:
        """A split as the trainer's constructor prepares its evaluation data."""
        with quiet(), refused(self.config.task):
            data = as_dataset(split)
            prepare = getattr(self.trainer, "_prepare_dataset", None)
            if prepare is not None:
                return prepare(data, self.run_.task.processor, self.trainer.args, "eval")
            return data.map(self.trainer.tokenize_row)


class Steps(TrainerCallback):
    """The engine's side of each optimizer step."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.began = 0.0
        self.losses: list[torch.Tensor] = []
        self.tokens = 0
        self.row: dict[str, float] = {}  # of the window that ends with this step
        self.meter: LiveBytes | None = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        driver, step = self.driver, state.global_step + 1
        seed_everything(driver.config.training.seed, 3, step, 0)
        set_learning_rate(driver.trainee.optimizer, driver.schedule(step))
        self.began, self.losses, self.tokens = time.perf_counter(), [], 0
        if driver.run_.runtime.device.type == "cpu" and step == min(2, driver.total_steps):
            self.meter = LiveBytes([*driver.run_.group.model.parameters(), *driver.run_.group.model.buffers()])
            self.meter.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        driver, step = self.driver, state.global_step + 1
        loss = float(torch.stack(self.losses).sum()) if self.losses else math.nan
        if not math.isfinite(loss):
            self._close_meter()
            driver.trainee.optimizer.zero_grad(set_to_none=True)
            driver.run_.directory.write_json("failure.json", {"step": step, "loss": str(loss)})
            if driver.trainee.step:
                driver.run_._save(driver.trainee.step)
            raise Diverged(
                f"Step {step}: loss {loss}.",
                "Lower training.learning_rate, or use a wider precision. The weights before this step are kept.",
            )
        if step == 1:
            check_gradients(driver.trainee.member)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        driver, trainee, step = self.driver, self.driver.trainee, state.global_step
        measured, seconds = self.meter is not None, time.perf_counter() - self.began
        self._close_meter()
        trainee.step = step
        trainee.train_seconds += seconds
        trainee.total_tokens += self.tokens
        window, loss = trainee.window, float(torch.stack(self.losses).sum())
        for name, value in {"loss": loss, "units": 1, "tokens": self.tokens, "seconds": seconds}.items():
            window[name] += value
        if step % driver.config.training.log_every == 0:
            rate = window["tokens"] / window["seconds"]
            self.row = {"loss": window["loss"] / window["units"], "tokens_per_second": rate}
            trainee.window = dict.fromkeys(window, 0)  # before the checkpoint: this row is written
        if step > 1 and not measured:
            trainee.step_seconds.append(seconds)
            trainee.timed_tokens += self.tokens
        training = driver.config.training
        per_epoch = trainee.plan.steps_per_epoch
        last = step == driver.total_steps
        if "eval" in driver.run_.data and (step % (training.eval_every or per_epoch) == 0 or last):
            found = driver.run_._evaluate_during(trainee.member)
            trainee.evaluations.append({"step": step, **found})
            driver.run_._log({"step": step, "eval": found})
        driver.reason = stop_reason(driver.config, driver.run_.signals, driver.run_._elapsed())
        if step % (training.save_every or per_epoch) == 0 or last or driver.reason:
            driver.run_._save(step)
        if driver.reason and not last:
            control.should_training_stop = True
        elif last:
            driver.reason = None

    def _close_meter(self) -> None:
        if self.meter is not None:
            self.meter.__exit__(None, None, None)
            self.driver.trainee.live_bytes, self.meter = self.meter.peak, None


class Hooked:
    """Mixin over a TRL trainer: rows to metrics.jsonl, each loss to `Steps`, no checkpoints of its own."""

    driver: Driver

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, *rest)  # type: ignore[misc]
        self.driver.steps.losses.append(loss.detach())
        self.driver.steps.tokens += sum(int(v.sum()) for k, v in inputs.items() if k.endswith("attention_mask"))
        return loss

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        metrics = getattr(self, "_metrics", {}).get("eval", {})
        self.driver.batches = {name: list(values) for name, values in metrics.items()}  # the next line clears them
        super().log(logs, *rest)  # type: ignore[misc]
        driver, step = self.driver, self.state.global_step  # type: ignore[attr-defined]
        if "loss" not in logs:
            return
        rate = driver.trainee.optimizer.param_groups[0]["lr"]
        row = {"step": step, **logs, "learning_rate": rate, **driver.steps.row}
        driver.run_._log(row)
        driver.run_.view.step(step, driver.total_steps, row)

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """Nothing: `Run._open` has put the weights back."""

    def _load_optimizer_and_scheduler(self, *_: Any) -> None:
        """Nothing: `Run._open` has put the optimizer's state back; the rate is a function of the step."""

    def _load_rng_state(self, *_: Any) -> None:
        """Nothing: random state is a function of (seed, step)."""


def as_dataset(split: Split) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(split.examples))


@contextlib.contextmanager
def quiet() -> Any:
    """TRL and transformers keep their notes to themselves; their errors come through."""
    level, bars = logging.root.manager.disable, datasets.are_progress_bars_disabled()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def refused(task: str) -> Any:
    """What TRL refuses of a model, its data or options is a mistake of the config's."""
    try:
        yield
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise ConfigError(
            f"task: TRL refuses this {task} run: {' '.join(str(error).split())}",
            f"Change what it names, or see TRL's documentation of its {task} trainer.",
        ) from error
