"""The arrow: config → backbone → data → adapters → train → evaluate → export, into a run directory."""

from pathlib import Path
from typing import Any

from rich.console import Console

from . import processes
from .config import Config
from .config_checks import PREFERENCE
from .config_reading import load_config
from .run_directory import RunDirectory
from .session import Run
from .training.guards import Signals
from .training.progress import ProgressView


def train(
    config: Config | str | Path, *, resume: bool = False, overwrite: bool = False, quiet: bool = True
) -> dict[str, Any]:
    """Fine-tune as `config` says and write the run directory.

    Args:
        config: settings, or the path of a YAML file.
        resume: go on from the newest complete checkpoint of `output`; from the start where there is none.
        overwrite: replace the run that `output` holds.

    Returns:
        What run.json holds.

    Raises:
        EngineError: see `errors`; its `exit_code` is the command line's.
    """
    config = config if isinstance(config, Config) else load_config(config)
    processes.connect()
    main = processes.rank() == 0  # one writer among processes
    directory = RunDirectory(config.output, writes=main)
    if main:
        directory.refuse_occupied(resume=resume, overwrite=overwrite)
    signals = Signals()
    with directory, signals.handled(), ProgressView(Console(stderr=True), quiet or not main) as view:
        kind = _preference_run() if config.task in PREFERENCE else Run
        run = kind(config, directory, signals, view, resume)
        with run.trackers:
            return run.go()


def _preference_run() -> type[Run]:
    from .preference_run import PreferenceRun  # TRL is slow to import, and optional

    return PreferenceRun
