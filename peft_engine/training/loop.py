"""The loop: drives a group of members over one backbone, from any step to the last. A single run is a group of one."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters.group import Group, Member
from ..adapters.sharding import own_part
from ..config import Config
from ..data.encoding import EncodedSet
from ..errors import Diverged, OutOfMemory
from ..levers.in_backward import StepInBackward
from ..meters.memory import LiveBytes
from ..quantised import weights_of
from ..runtime import Runtime, combine, give_back_freed_memory, seed_everything
from ..tasks.base import Task
from .ema import averaged
from .guards import Signals, check_gradients, check_moving, describe_rows, is_out_of_memory, rows_not_finite
from .optim import make_schedule, set_learning_rate
from .state import Trainee
from .step import Gradients, clip, gradients
from .stopping import agree_on_micro_batches, stop_reason

SKIPS_IN_A_ROW = 50  # fp16 scaler: so many steps without a finite gradient are a divergence


@dataclass(frozen=True)
class Hooks:
    """What happens around the steps.

    Attributes:
        evaluate: metrics of a member on the evaluation split; None where there is none.
        log: takes a row for metrics.jsonl.
        save: takes the step; writes a complete checkpoint.
        fail: takes a record of a failure.
        progress: takes the step, the number of steps and the last row's figures.
        elapsed: wall seconds of the run so far, earlier sessions of a resumed run included.
    """

    evaluate: Callable[[Member], dict[str, Any]] | None
    log: Callable[[dict[str, Any]], None]
    save: Callable[[int], None]
    fail: Callable[[dict[str, Any]], None]
    progress: Callable[[int, int, dict[str, Any]], None]
    elapsed: Callable[[], float]


@dataclass
class Loop:
    """Everything that stays the same from step to step."""

    group: Group
    task: Task
    data: EncodedSet
    where: Sequence[str]
    trainees: list[Trainee]
    config: Config
    runtime: Runtime
    total_steps: int
    hooks: Hooks
    signals: Signals
    saved: int = 0
    """Step of the newest checkpoint, 0 where there is none."""

    def run(self) -> None:
        """Train to the last step, or until every member stopped early.

        Raises:
            Diverged, OutOfMemory, BudgetReached, Interrupted: each after a complete checkpoint, where a step was done.
        """
        settings = self.config.training
        self.group.begin(self.total_steps)
        per_epoch = self.trainees[0].plan.steps_per_epoch
        evaluate_every, save_every = settings.eval_every or per_epoch, settings.save_every or per_epoch
        schedule = make_schedule(settings.schedule, settings.warmup, self.total_steps)
        self.group.train()
        self.saved = min(t.step for t in self.trainees)
        for step in range(self.saved + 1, self.total_steps + 1):
            if all(t.stopped for t in self.trainees):  # resumed after early stopping had ended it
                break
            for trainee in self.trainees:
                if trainee.step < step and not trainee.stopped:
                    self._advance(trainee, step, schedule(step))
            last = step == self.total_steps
            if step % evaluate_every == 0 or last:
                self._evaluate_all(step)
            last = last or all(t.stopped for t in self.trainees)
            reason = stop_reason(self.config, self.signals, self.hooks.elapsed())
            if step % save_every == 0 or last or reason:
                self._save(step)
            if reason and not last:
                raise reason
            if last:
                break
        self._final_weights()

    def _advance(self, trainee: Trainee, step: int, factor: float) -> None:
        """One optimizer step of one member."""
        start = time.perf_counter()
        settings = self.config.training
        tensors = list(trainee.member.tensors.values())
        self.group.activate(trainee.member)
        heavy = self.runtime.device.type == "cpu" and step == trainee.plan.heaviest_step(self.total_steps)
        meter = LiveBytes(self._resident(trainee), self.runtime.sharded) if heavy else None
        early = StepInBackward(trainee.optimizer, tensors) if settings.optimizer_in_backward else None
        set_learning_rate(trainee.optimizer, factor)
        with meter or nullcontext():
            with early.during() if early else nullcontext():
                found = self._gradients(trainee, step)
            if early:
                found = Gradients(found.loss, early.norm(), early.reached())
            loss, norm = float(found.loss), float(found.norm)
            self._refuse_not_finite(trainee, step, loss, norm, early.moved if early else 0)
            if trainee.step == 0:
                check_gradients(trainee.member, found.reached)
            if early is None:
                clip(tensors, found.norm, settings.max_grad_norm)
                self._update(trainee)
            self.group.after_step(trainee.member, step)
        trainee.optimizer.zero_grad(set_to_none=True)
        if self.runtime.sharded and self.runtime.device.type == "cpu":
            give_back_freed_memory()  # gathered layers come and go in several threads, whose heaps would only grow
        trainee.step = step
        updated = factor > 0 and math.isfinite(norm)  # the fp16 scaler skips a step whose gradient overflowed
        trainee.updates += updated
        if updated and trainee.average is not None:
            trainee.average.update(trainee.member, trainee.updates)
        if updated and trainee.updates == 2:
            check_moving(trainee.member, self.config.adapter.init == "default")
        if meter:
            trainee.live_bytes = max(meter.peak, trainee.live_bytes or 0)
        self._note(trainee, step, loss, norm, time.perf_counter() - start, measured=heavy)

    def _gradients(self, trainee: Trainee, step: int) -> Gradients:
        """Gradients of a step; halves the micro-batch on out-of-memory and begins the same step again (trap 24)."""
        rows = trainee.plan.rows(step)
        rows, plan = trainee.plan.rows(step), trainee.plan
        units = self.data.units[rows].sum().item()
        rank, world = self.runtime.rank, self.runtime.world
        tensors = list(trainee.member.tensors.values())
        while True:
            seed_everything(trainee.member.spec.seed, 3, step, self.runtime.rank)
            seed = combine(trainee.member.spec.seed, 4, step)
            size = trainee.micro_batch_size
            pieces = plan.micro_batches(step, size, rank, world)
            # a sharded backbone runs in all processes at once: who has fewer pieces passes rows without weight
            most = max(len(plan.micro_batches(step, size, other, world)) for other in range(world))
            idle = [rows[:1]] * (most - len(pieces)) if self.runtime.sharded else []
            try:
                found = self._unscaled(
                    trainee,
                    gradients(self.group, self.task, self.data, pieces, units, tensors, self.runtime, seed, idle),
                )
                break
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
                smaller = plan.smaller(step, size, rank, world)
                settings = self.config.training
                # sharded: none can try again alone; in backward: some tensors may have been updated
                fixed = settings.micro_batch_size != "auto" or self.runtime.sharded or settings.optimizer_in_backward
                if smaller is None or fixed:
                    raise self._out_of_memory(size, error) from error
            trainee.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            trainee.micro_batch_size = smaller
            self._log_smaller(trainee, step)
        if self.config.training.micro_batch_size == "auto" and agree_on_micro_batches(trainee):
            self._log_smaller(trainee, step)
        return found

    def _log_smaller(self, trainee: Trainee, step: int) -> None:
        self.hooks.log({"step": step, "event": "out_of_memory", "micro_batch_size": trainee.micro_batch_size})

    def _unscaled(self, trainee: Trainee, found: Gradients) -> Gradients:
        """fp16: take the loss scale out of the gradients before anything looks at their norm."""
        scaler = self.runtime.accelerator.scaler
        if scaler is None:
            return found
        scaler.unscale_(trainee.optimizer)
        grads = [t.grad for t in trainee.member.tensors.values() if t.grad is not None]
        return Gradients(found.loss, torch.nn.utils.get_total_norm(grads))

    def _update(self, trainee: Trainee) -> None:
        scaler = self.runtime.accelerator.scaler
        try:
            if scaler is None:
                trainee.optimizer.step()
            else:
                scaler.step(trainee.optimizer)
                scaler.update()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise self._out_of_memory(trainee.micro_batch_size, error) from error
            raise

    def _out_of_memory(self, size: int, error: BaseException) -> OutOfMemory:
        packing = self.trainees[0].plan.packing
        packed = f", in packs of up to {packing.tokens} tokens," if packing else ""
        first = "training.micro_batch_size, data.pack_tokens" if packing else "training.micro_batch_size"
        if self.config.training.optimizer_in_backward:  # one micro-batch is the whole step
            first = "training.batch_size"
        return OutOfMemory(
            f"Memory ran out with {size} {self.data.largest}{packed} at once: {str(error).splitlines()[0]}",
            f"Lower {first} or {self.data.length_setting}, set training.gradient_checkpointing: true, or adapt less.",
        )

    def _refuse_not_finite(self, trainee: Trainee, step: int, loss: float, norm: float, moved: int) -> None:
        """Stop before the update, the weights still good (trap 25); `moved` tensors had theirs inside of backward."""
        scaled = self.runtime.accelerator.scaler is not None
        if math.isfinite(loss) and (math.isfinite(norm) or scaled):
            trainee.skipped = 0 if math.isfinite(norm) else trainee.skipped + 1
            if trainee.skipped < SKIPS_IN_A_ROW:
                return
        trainee.optimizer.zero_grad(set_to_none=True)
        seed = combine(trainee.member.spec.seed, 4, step)
        bad = rows_not_finite(self.group.model, self.task, self.data, trainee.plan.rows(step), self.runtime, seed)
        rows = describe_rows(self.data, self.where, bad or [int(r) for r in trainee.plan.rows(step)])
        self.hooks.fail(
            {"step": step, "member": trainee.member.spec.name, "loss": str(loss), "grad_norm": str(norm), "rows": rows}
        )
        if trainee.step and not moved:
            self._save(trainee.step)
        which = (
            f"rows that do it by themselves: {', '.join(r['row'] for r in rows[:3])}"
            if bad
            else f"no single row does it; the batch began with {rows[0]['row']}"
        )
        raise Diverged(
            f"Step {step}: loss {loss}, gradient norm {norm}; {which}.",
            "Lower training.learning_rate, use a wider precision, or mend the rows (failure.json lists them). "
            + self._what_is_good(moved),
        )

    def _what_is_good(self, moved: int) -> str:
        """Which weights are as they were before the step in which `moved` tensors were updated, for a message."""
        if not moved:
            return "The weights before this step are kept."
        told = f"{moved} tensors of this run were updated in this step already"
        if self.saved:
            return f"{told}: the checkpoint of step {self.saved} has good weights."
        return f"{told}, and it has no checkpoint: start anew; training.save_every says how often one is written."

    def _save(self, step: int) -> None:
        self.hooks.save(step)
        self.saved = step

    def _note(self, trainee: Trainee, step: int, loss: float, norm: float, seconds: float, measured: bool) -> None:
        """Add a step to the meters, and write a row every `log_every` steps."""
        rows = trainee.plan.rows(step)
        tokens, units = int(self.data.lengths[rows].sum()), self.data.units[rows].sum().item()
        trainee.total_tokens += tokens
        trainee.train_seconds += seconds
        if not measured and step > 1:
            trainee.step_seconds.append(seconds)
            trainee.timed_tokens += tokens
        window = trainee.window
        for name, value in {"loss": loss * units, "units": units, "tokens": tokens, "seconds": seconds}.items():
            window[name] += value
        row = {
            "step": step,
            "epoch": step / trainee.plan.steps_per_epoch,
            "loss": window["loss"] / (window["units"] or 1),
            "learning_rate": trainee.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "tokens_per_second": window["tokens"] / window["seconds"],
        }
        if step % self.config.training.log_every == 0 or step == self.total_steps:
            self.hooks.log(self._named(trainee, row))
            trainee.window = dict.fromkeys(window, 0)
        self.hooks.progress(step, self.total_steps, row)

    def _evaluate_all(self, step: int) -> None:
        for trainee in self.trainees:
            if trainee.stopped or self.hooks.evaluate is None:
                continue
            with averaged(trainee.member, trainee.average):
                metrics = self.hooks.evaluate(trainee.member)
                trainee.evaluations.append({"step": step, **metrics})
                self.hooks.log(self._named(trainee, {"step": step, "eval": metrics}))
                self._judge(trainee, step, float(metrics[self.task.primary]))

    def _judge(self, trainee: Trainee, step: int, value: float) -> None:
        """Early stopping and the best weights so far."""
        stopping = self.config.training.early_stopping
        if self._gain(value, trainee.best_value) > 0:
            trainee.best_value, trainee.best_step = value, step
            if self.config.training.restore_best:
                trainee.best_tensors = {name: t.detach().cpu().clone() for name, t in trainee.member.tensors.items()}
        # patience asks for more: small gains add up to one that counts, but each by itself is none
        if self._gain(value, trainee.counted_value) > (stopping.min_delta if stopping else 0.0):
            trainee.counted_value, trainee.waited = value, 0
        else:
            trainee.waited += 1
        trainee.stopped = bool(stopping and trainee.waited >= stopping.patience)

    def _gain(self, value: float, before: float | None) -> float:
        """By how much the primary metric is better than it was; infinite where there was none."""
        if before is None:
            return math.inf
        return value - before if self.task.maximize else before - value

    def _final_weights(self) -> None:
        """The best evaluation's weights, the average, or the last."""
        for trainee in self.trainees:
            average = trainee.average.tensors if trainee.average is not None else {}
            with torch.no_grad():
                for name, tensor in (trainee.best_tensors or average).items():
                    trainee.member.tensors[name].copy_(tensor)

    def _resident(self, trainee: Trainee) -> list[torch.Tensor]:
        """Tensors that live from step to step: all weights and buffers, every member's optimizer state and average."""
        states = [
            v
            for t in self.trainees
            for s in t.optimizer.state.values()
            for v in s.values()
            if isinstance(v, torch.Tensor)
        ]
        weights = [own_part(tensor) for tensor in weights_of(self.group.model)]
        averages = [v for t in self.trainees if t.average is not None for v in t.average.tensors.values()]
        return [*weights, *states, *averages]

    def _named(self, trainee: Trainee, row: dict[str, Any]) -> dict[str, Any]:
        return row if len(self.trainees) == 1 else {"member": trainee.member.spec.name, **row}
