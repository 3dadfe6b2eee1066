"""`report_to`: metrics.jsonl's rows go to experiment trackers as well, through Accelerate's tracker classes.

Everything stays on this machine unless the user's own environment says otherwise, below `<output>/trackers` where the
tool allows it. A tracker never ends a run: one that fails is told of once and switched off.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import tracking

from .config import Config
from .errors import ConfigError
from .run_directory import flat, storage_errors, write_whole

PROJECT = "peft-engine"
FOLDER = "trackers"
RUNS = "runs.json"
QUIET = {
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}
"""Reports to the tools' makers, off unless the user set them otherwise."""


class Trackers:
    """The trackers of one run. Use as a context manager: leaving it closes them.

    Args:
        output: the run directory.
        active: false in all but the first of several processes: they report nothing.
        say: takes a sentence for the user.

    Raises:
        ConfigError: a tracker's package is not installed.
    """

    def __init__(self, config: Config, output: Path, active: bool, say: Callable[[str], None]) -> None:
        self.config, self.folder, self.say = config, output / FOLDER, say
        self.names = [] if config.report_to == "none" or not active else list(dict.fromkeys(config.report_to))
        self._open: dict[str, Any] = {}
        self._report: dict[str, dict[str, Any]] = {}
        missing = [name for name in self.names if importlib.util.find_spec(name) is None]  # packages of these names
        if missing:
            raise ConfigError(
                f"report_to: {', '.join(missing)} is not installed.",
                f"pip install {' '.join(missing)}, or take it out of report_to.",
            )

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name in list(self._open):
            self._try(name, "finish", lambda tracker: tracker.finish())
        self._open.clear()

    def start(self, step: int) -> None:
        """Open every tracker; a run that goes on after `step` goes on in the trackers' own runs.

        Raises:
            ConfigError: one does not start. No training time was spent.
        """
        if not self.names:
            return
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            known = self._known()
        for name in self.names:
            again = name in known
            identity = known.setdefault(name, uuid.uuid4().hex[:12])
            try:
                with _quietly():
                    tracker, used, place = OPENERS[name](self.folder, identity, step, self.config)
                    known[name] = used
                    self._open[name] = tracker
                    if not again:
                        tracker.store_init_configuration(_settings(self.config))
            except Exception as error:
                raise ConfigError(
                    f"report_to: {name} does not start: {_line(error)}",
                    "Mend what it says, or take it out of report_to.",
                ) from error
            self._report[name] = {"run": used, "where": place, "failed": None}
        with storage_errors(self.folder / RUNS):
            write_whole(self.folder / RUNS, json.dumps(known, indent=2) + "\n")

    def log(self, row: dict[str, Any]) -> None:
        """Send the numbers of a row of metrics.jsonl."""
        values, step = numbers(row), int(row.get("step", 0))
        if not values:
            return
        for name in list(self._open):
            self._try(name, "log", lambda tracker: tracker.log(values, step=step))

    def report(self) -> dict[str, dict[str, Any]]:
        """What run.json says: per tracker its own id of the run, where its files are, and why it failed if it did."""
        return self._report

    def _known(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.folder / RUNS).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _try(self, name: str, what: str, call: Callable[[Any], None]) -> None:
        try:
            with _quietly():
                call(self._open[name])
        except Exception as error:
            del self._open[name]
            self._report[name]["failed"] = f"{what}: {_line(error)}"
            self.say(f"report_to: {name} failed ({what}: {_line(error)}) and is off from here; the run goes on.")


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row under names such as `train/loss` and `eval/accuracy`; tables and texts stay in
    metrics.jsonl."""
    found: dict[str, float] = {}
    before = f"{row['member']}/" if "member" in row else ""
    for key, value in row.items():
        if isinstance(value, dict):
            for name, number in flat(value).items():
                if _is_number(number):
                    found[f"{before}{key}/{name.replace('.', '/')}"] = number
        elif key != "step" and _is_number(value):
            found[f"{before}train/{key}"] = value
    return {_name(name): number for name, number in found.items()}


@contextlib.contextmanager
def environment(defaults: dict[str, str]) -> Iterator[None]:
    """Set variables that the user has not set, and take them away again."""
    new = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without reports to the tools' makers; what they print goes to stderr, as stdout is the command line's own."""
    with environment(QUIET), contextlib.redirect_stdout(sys.stderr):
        yield


Opened = tuple[Any, str, str]
"""An open tracker, its own id of the run, and where its files are."""


def _tensorboard(folder: Path, identity: str, step: int, config: Config) -> Opened:
    tracker = tracking.TensorBoardTracker("tensorboard", folder, purge_step=step + 1 if step else None)
    tracker.start()
    return tracker, "tensorboard", str(folder / "tensorboard")


def _wandb(folder: Path, identity: str, step: int, config: Config) -> Opened:
    import wandb

    wanted = {"disable_git": True, "disable_code": True, "console": "off", "x_disable_meta": True}
    known = wandb.Settings.model_fields
    tracker = tracking.WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=os.environ.get("WANDB_NAME", Path(config.output).name),
        id=identity,
        resume="allow",
        dir=str(folder),
        settings=wandb.Settings(**{name: value for name, value in wanted.items() if name in known}),
        **({} if "WANDB_MODE" in os.environ else {"mode": "offline"}),
    )
    tracker.start()
    return tracker, str(tracker.run.id), str(folder / "wandb")


def _mlflow(folder: Path, identity: str, step: int, config: Config) -> Opened:
    import mlflow

    place = os.environ.get("MLFLOW_TRACKING_URI")
    if place is None:
        (folder / "mlflow").mkdir(exist_ok=True)
        place = f"sqlite:///{(folder / 'mlflow' / 'mlflow.db').absolute()}"
        mlflow.set_tracking_uri(place)
    options: dict[str, Any] = {"run_name": Path(config.output).name}
    known = [run.info.run_id for run in _mlflow_runs(mlflow, identity)]
    tracker = tracking.MLflowTracker(
        experiment_name=PROJECT,
        logging_dir=(folder / "mlflow" / "artifacts").absolute().as_uri(),
        tags={"peft_engine_run": identity},
        **({"run_id": known[0]} if known else options),
    )
    tracker.start()
    return tracker, identity, place


def _mlflow_runs(mlflow: Any, identity: str) -> list[Any]:
    """Runs of an earlier session, found by the tag that we gave them."""
    experiment = mlflow.get_experiment_by_name(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    if experiment is None:
        return []
    client = mlflow.MlflowClient()
    return list(client.search_runs([experiment.experiment_id], f"tags.peft_engine_run = '{identity}'"))


def _trackio(folder: Path, identity: str, step: int, config: Config) -> Opened:
    with environment({"TRACKIO_DIR": str((folder / "trackio").absolute())}):  # read once, when it is imported
        import trackio
    tracker = tracking.TrackioTracker(
        os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{Path(config.output).name}-{identity}",
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    tracker.start()
    return tracker, identity, str(trackio.utils.TRACKIO_DIR)


OPENERS: dict[str, Callable[[Path, str, int, Config], Opened]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def _settings(config: Config) -> dict[str, Any]:
    """All settings by their dotted names, as texts and numbers. They hold no secrets: none may stand in a config."""
    found = flat(config.model_dump(mode="json"))
    return {_name(key): value if _is_cell(value) else json.dumps(value) for key, value in found.items()}


def _name(text: str) -> str:
    """What every tracker takes for a name (mlflow is the strictest)."""
    return re.sub(r"[^\w\-. /]", "_", text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_cell(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"
