"""One run on its way along the arrow: what `run.train` and the preference tasks drive."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from . import processes
from .adapters.files import WEIGHTS
from .adapters.fusing import FrozenRecord
from .adapters.fusing.frozen_record import FILE, read_record, write_record
from .adapters.group import Member
from .adapters.sharding import held_bytes
from .building import build_group, encode_splits, make_trainees
from .config import Config
from .data.batching import packing_report
from .data.cleaning import Dropped, as_lines
from .data.formats import is_conversation
from .data.loading import load_splits, store_facts
from .errors import ConfigError, DataError
from .evaluation import evaluate_split
from .exporting import save_trained
from .meters.cost import cost_usd
from .meters.energy import energy_here
from .meters.memory import peak_rss_bytes, storage_bytes
from .meters.time import PhaseTimer, percentiles
from .run_directory import RunDirectory, command, refuse_other_settings, storage_errors
from .runtime import git_state, hardware, machine, start, versions
from .tasks import make_task
from .tasks.base import Generates
from .tasks.weighting import weights_by_class
from .tracking import Trackers
from .training.checkpoint import complete_checkpoints, load_checkpoint, read_state, save_checkpoint
from .training.guards import Signals
from .training.loop import Hooks, Loop
from .training.progress import ProgressView


class Run:
    """One call of `train`."""

    def __init__(
        self, config: Config, directory: RunDirectory, signals: Signals, view: ProgressView, resume: bool
    ) -> None:
        self.config, self.directory, self.signals, self.view = config, directory, signals, view
        self.timer = PhaseTimer()
        self.began = time.perf_counter()
        self.earlier = 0.0  # wall seconds of the sessions before this one
        self.saved_phases: dict[str, float] = {}
        self.trackers = Trackers(config, directory.path, directory.writes, view.warn)
        self.runtime = start(config)
        self.energy = energy_here()
        self.resume = processes.from_first(lambda: resume and directory.holds_run())
        self.before: dict[str, Any] = {}
        self.moved: list[str] = []  # what a resumed run found changed of its machine and versions

    def go(self) -> dict[str, Any]:
        config = self.config
        if self.resume and self.runtime.main:
            refuse_other_settings(config, self.directory)
        with self.timer.phase("load"):
            self.splits = load_splits(config)
            rows = ", ".join(f"{name} {count:,}" for name, count in self.splits.report.counts.items())
            self.view.say(f"rows: {rows}; loading {config.model.path} on {self.runtime.device.type}")
            self.task = make_task(config, self.splits.labels)
            self.data = encode_splits(self.task, self.splits, config)
            self.group = build_group(self.task, config, self.runtime, self.data, record=self._frozen_before())
            self._refuse_other_processes()
        if told := self.group.decisions().get("balance_loss"):
            self.view.warn(f"{told[0].upper()}{told[1:]}.")
        self.trainees = make_trainees(self.group, self.data["train"], config, self.runtime)
        self.total_steps = config.training.steps or max(
            1, round(config.training.epochs * self.trainees[0].plan.steps_per_epoch)
        )
        self._open()
        self._keep_frozen()
        for said in (*self._dropout().values(), *self._frozen().values()):
            self.view.say(said)
        self.trackers.start(self.trainees[0].step)
        if not self.before:
            self.view.say(f"evaluating before training, then {self.total_steps:,} steps")
            self.before = self._judge(self.group.members[0], self._final_split())
        with self.timer.phase("train"), self.signals.deferred():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self._loop().run()
        after = self._judge(self.group.members[0], self._final_split())
        self.trackers.log({"step": self.trainees[0].step, "final": after})
        summary = self._summary(after)
        self._write_adapter(summary)
        if self.directory.writes:
            summary["adapter_file_bytes"] = (self.directory.adapter / WEIGHTS).stat().st_size
        summary["energy"] = self._energy()
        summary["seconds"] = self._phases()
        summary["wall_seconds"] = self._elapsed()
        summary["cost_usd"] = cost_usd(summary["wall_seconds"], config.budget.usd_per_hour)
        self.directory.write_json("run.json", summary)
        self.directory.forget_failure()
        processes.barrier()
        return summary

    def _frozen_before(self) -> FrozenRecord | None:
        """What a run that goes on had decided about frozen linears; None where it decides now."""
        if self.config.model.frozen_compute == "full" or not self.resume:
            return None
        return processes.from_first(self._read_frozen)

    def _read_frozen(self) -> FrozenRecord | None:
        checkpoints = complete_checkpoints(self.directory.checkpoints)
        if not checkpoints:
            return None
        return read_record(self.directory.path / FILE, read_state(checkpoints[-1])["run"].get("frozen_digest"))

    def _keep_frozen(self) -> None:
        """Write what was decided about frozen linears, so that the run can be resumed and used as it trained."""
        record = None if self.group.fused is None else self.group.fused.record
        if record is not None and self.directory.writes:
            with storage_errors(self.directory.path / FILE):
                write_record(record, self.directory.path / FILE)

    def _open(self) -> None:
        """Begin the run directory, or put everything back where its newest complete checkpoint was."""
        from .config_reading import to_yaml

        checkpoints = processes.from_first(
            lambda: complete_checkpoints(self.directory.checkpoints) if self.resume else []
        )
        if not checkpoints:
            if self.resume and self.runtime.main:
                if (self.directory.path / "run.json").exists():
                    raise ConfigError(
                        f"--resume: {self.directory.path} holds a finished run whose checkpoints are gone.",
                        "Keep it as it is, or start anew with --overwrite.",
                    )
                self.view.say("No complete checkpoint to resume from: starting from step 0.")
            self.directory.clear()
            self.directory.write_text("config.yaml", to_yaml(self.config))
            self._list_dropped()
            return
        state = read_state(checkpoints[-1])["run"]
        self._refuse_other_input(state, checkpoints[-1])
        load_checkpoint(checkpoints[-1], self.trainees)
        if self.config.training.micro_batch_size != "auto":
            self.trainees[0].micro_batch_size = self.config.training.micro_batch_size
        if self.runtime.accelerator.scaler is not None:
            self.runtime.accelerator.scaler.load_state_dict(state["scaler"])
        self.earlier, self.saved_phases, self.before = state["wall_seconds"], state["seconds"], state["before"]
        self.directory.cut_metrics(self.trainees[0].step)
        self.directory.write_text("config.yaml", to_yaml(self.config))
        self._list_dropped()
        self.view.say(f"Resuming from {checkpoints[-1]}.")
        now = machine() | {"processes": self.runtime.world}
        self.moved = sorted(name for name, was in state["machine"].items() if now.get(name) != was)
        if self.moved:
            self.view.say(f"Not the machine or versions it began on ({', '.join(self.moved)}): the bits may differ.")

    def _list_dropped(self) -> None:
        """`dropped.jsonl`: every row that is not used, with its reason; no file where all are."""
        nothing = [
            Dropped(name, getattr(self.splits, name).where[i], "teaches nothing", reason)
            for name, data in self.data.items()
            for i, reason in data.dropped
        ]
        if dropped := [*self.splits.dropped, *nothing]:
            self.directory.write_text("dropped.jsonl", as_lines(dropped))

    def _refuse_other_input(self, state: dict[str, Any], checkpoint: Path) -> None:
        if state["data_digest"] != self.splits.digest:
            raise DataError(
                f"The data is not what {checkpoint} was trained on.",
                "Restore the data, or start anew with --overwrite.",
            )
        if state["weights_digest"] != self.group.backbone.weights_digest:
            raise ConfigError(
                f"The backbone's weights are not those {checkpoint} was trained on.",
                "Restore the model, or start anew with --overwrite.",
            )
        was, now = state.get("started_from"), self.group.started_from
        if (was or {}).get("sha256") != (now or {}).get("sha256"):
            raise ConfigError(
                f"adapter.start_from: {self.config.adapter.start_from} does not hold the weights that the run of "
                f"{checkpoint} began with.",
                "Restore that adapter, or start anew with --overwrite.",
            )

    def _refuse_other_processes(self) -> None:
        """Every process must have read the same data and weights."""
        found = processes.gathered((self.splits.digest, self.group.backbone.weights_digest))
        for place, one in enumerate(found):
            for mine, other, what in zip(found[0], one, ("data", "backbone"), strict=True):
                if mine != other:
                    raise DataError(
                        f"The {what} that process {place} has read is not that of process 0.",
                        "Give all machines the same files.",
                    )

    def _loop(self) -> Loop:
        hooks = Hooks(
            evaluate=self._evaluate_during if "eval" in self.data else None,
            log=self._log,
            save=self._save,
            fail=lambda record: self.directory.write_json("failure.json", record),
            progress=self.view.step,
            elapsed=self._elapsed,
        )
        where = self.splits.train.where
        return Loop(
            self.group,
            self.task,
            self.data["train"],
            where,
            self.trainees,
            self.config,
            self.runtime,
            self.total_steps,
            hooks,
            self.signals,
        )

    def _log(self, row: dict[str, Any]) -> None:
        self.energy.sample()
        self.directory.append_metrics(row)
        self.trackers.log(row)

    def _evaluate_during(self, member: Member) -> dict[str, Any]:
        found = self._judge(member, "eval", generate=False)
        names = dict.fromkeys([self.task.primary, "loss"])
        self.view.say("eval  " + "  ".join(f"{name} {found[name]:.4f}" for name in names))
        return found

    def _judge(self, member: Member, split: str, generate: bool = True) -> dict[str, Any]:
        """Metrics of a member on a split; with `evaluation.generate_rows` also the exact match of generated answers."""
        settings = self.config.evaluation
        size = settings.batch_size or self.config.training.batch_size
        with self.timer.phase("evaluate"), self.group.evaluating(member) as model:
            found = evaluate_split(model, self.task, self.data[split], size, self.runtime)
            if generate and settings.generate_rows and isinstance(self.task, Generates):
                examples = [
                    getattr(self.splits, split).examples[i] for i in self.data[split].read()[: settings.generate_rows]
                ]
                found |= self.task.judge_answers(model, examples, settings, size)
        return found

    def _final_split(self) -> str:
        return next(name for name in ("test", "eval", "train") if name in self.data)

    def _save(self, step: int) -> None:
        state = {
            "wall_seconds": self._elapsed(),
            "seconds": self._phases(),
            "before": self.before,
            "scaler": self.runtime.accelerator.scaler and self.runtime.accelerator.scaler.state_dict(),
            "data_digest": self.splits.digest,
            "weights_digest": self.group.backbone.weights_digest,
            "started_from": self.group.started_from,
            "frozen_digest": self._frozen_digest(),
            "machine": machine() | {"processes": self.runtime.world},
        }
        with self.timer.phase("save"), storage_errors(self.directory.checkpoints):
            if self.directory.writes:
                save_checkpoint(
                    self.directory.checkpoints, step, self.trainees, state, self.config.training.save_total_limit
                )
            processes.barrier()  # none leaves before it is complete

    def _write_adapter(self, summary: dict[str, Any]) -> None:
        if not self.directory.writes:
            return
        group, labels, folder = self.group, self.splits.labels, self.directory.adapter
        with self.timer.phase("save"), storage_errors(folder):
            save_trained(group, group.members[0], self.task, labels, folder, summary, self.config)

    def _energy(self) -> dict[str, Any] | None:
        """What this run used; None where nothing tells, or where it told a part of it alone."""
        return None if self.earlier or self.runtime.world > 1 else self.energy.used()

    def _memory(self, peak: int | None) -> dict[str, int] | None:
        """The peak by what it is for. `optimizer` holds the average of the weights too; `activations` is what remains,
        inputs and work space among it. None without a peak, or where the backbone is in pieces that come and go."""
        if peak is None or self.runtime.sharded:
            return None
        trainee, model = self.trainees[0], self.group.model
        average = trainee.average.tensors.values() if trainee.average is not None else ()
        held = {
            "weights": storage_bytes([*model.parameters(), *model.buffers()]),
            "gradients": sum(t.numel() * t.element_size() for t in trainee.member.tensors.values()),
            "optimizer": self._optimizer_bytes() + storage_bytes(average),
        }
        return {**held, "activations": peak - sum(held.values())}

    def _optimizer_bytes(self) -> int:
        states = self.trainees[0].optimizer.state.values()
        return storage_bytes(v for state in states for v in state.values() if isinstance(v, torch.Tensor))

    def _elapsed(self) -> float:
        return self.earlier + time.perf_counter() - self.began

    def _phases(self) -> dict[str, float]:
        names = {*self.saved_phases, *self.timer.seconds}
        return {name: self.saved_phases.get(name, 0.0) + self.timer.seconds.get(name, 0.0) for name in sorted(names)}

    def _processes(self) -> dict[str, Any] | None:
        """What each of several processes held and took at most; None for one."""
        peak = torch.cuda.max_memory_allocated() if self.runtime.device.type == "cuda" else self.trainees[0].live_bytes
        found = {"model_bytes": held_bytes(self.group.model), "peak_bytes": peak, "peak_rss_bytes": peak_rss_bytes()}
        each = processes.gathered(found)
        parallel = "fsdp" if self.runtime.sharded else "ddp"
        return {"count": len(each), "parallel": parallel, "each": each} if len(each) > 1 else None

    def _dropout(self) -> dict[str, str]:
        """For run.json, where dropout makes the curve depend on how a step is cut."""
        layers = self.group.own_dropout()
        if not layers or (
            self.runtime.world == 1 and self.trainees[0].micro_batch_size >= self.config.training.batch_size
        ):
            return {}
        return {
            "dropout": f"the adapters' dropout in {len(layers)} layers without a fused form is drawn per process and "
            "micro-batch: another number of either gives another curve; set adapter.dropout to 0 to make them alike"
        }

    def _frozen_digest(self) -> str | None:
        fused = self.group.fused
        return None if fused is None or fused.record is None else fused.record.digest()

    def _frozen(self) -> dict[str, str]:
        """For run.json: the format of the frozen linears, and how it came about, or that of quantised ones."""
        fused = self.group.fused
        if fused is None or (fused.record is None and not fused.quantised):
            return {}
        return {"quantised_linears" if fused.record is None else "frozen_compute": fused.told()}

    def _summary(self, after: dict[str, Any]) -> dict[str, Any]:
        trainee = self.trainees[0]
        trainable, total = self.group.parameter_counts(trainee.member)
        timed = sum(trainee.step_seconds)
        cuda = self.runtime.device.type == "cuda"
        fused = self.group.fused
        peak = torch.cuda.max_memory_allocated() if cuda else trainee.live_bytes
        return {
            "task": self.config.task,
            "method": self.config.adapter.method,
            "metrics": {
                "primary": self.task.primary,
                "maximize": self.task.maximize,
                "split": self._final_split(),
                "before": self.before,
                "after": after,
            },
            "wall_seconds": self._elapsed(),
            "seconds": self._phases(),
            "step_seconds": statistics.median(trainee.step_seconds) if trainee.step_seconds else None,
            "tokens_per_second": trainee.timed_tokens / timed if timed else None,
            "step_seconds_percentiles": percentiles(trainee.step_seconds),
            "peak_bytes": peak,
            "peak_bytes_meaning": "CUDA allocator's maximum"
            if cuda
            else "live tensor bytes, counted on the heaviest step",
            "peak_rss_bytes": peak_rss_bytes(),
            "memory": self._memory(peak),
            "optimizer_state_bytes": self._optimizer_bytes(),
            "trainable_parameters": trainable,
            "total_parameters": total,
            "started_from": self.group.started_from,
            "cost_usd": cost_usd(self._elapsed(), self.config.budget.usd_per_hour),
            "energy": None,
            "steps": trainee.step,
            "best_step": trainee.best_step,
            "stopped_early": trainee.stopped,
            "tokens": trainee.total_tokens,
            "micro_batch_size": trainee.micro_batch_size,
            "data": {
                **self.splits.report.to_json(),
                "conversations": is_conversation(self.splits.train.examples[0]),
                "digest": self.splits.digest,
                **store_facts(self.splits.train),
                "class_weights": weights_by_class(self.data["train"], self.splits.labels),
                "dropped": {n: len(d.dropped) for n, d in self.data.items()},
                "truncated": {n: d.truncated for n, d in self.data.items()},
            },
            "packing": packing_report(trainee.plan, self.total_steps, trainee.micro_batch_size),
            "evaluations": trainee.evaluations,
            "trackers": self.trackers.report(),
            "precision": self.runtime.precision,
            "device": self.runtime.device.type,
            "resumed_with_other": self.moved,
            "decisions": {
                **self.runtime.why,
                **self.group.decisions(),
                **self._dropout(),
                **self._frozen(),
                "kernels": "off: plain PEFT" if fused is None else fused.why,
            },
            "kernels": None if fused is None else fused.to_json(),
            "digests": {
                "data": self.splits.digest,
                "backbone": self.group.backbone.weights_digest,
                **({"frozen": digest} if (digest := self._frozen_digest()) else {}),
            },
            "processes": self._processes(),
            "hardware": hardware(),
            "versions": versions(),
            "git": git_state(),
            "command": command(),
        }
