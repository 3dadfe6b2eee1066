"""A results folder: which cells of a suite it holds, which are open, and which learning rates they choose."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .cells import Cell, baseline_cell, final_cells, tuning_cells
from .records import read_records
from .refusals import check_suite
from .suite import SMALLER_IS_BETTER, Suite, load_suite, metrics_in

DIVERGED = 5  # exit code


@dataclass
class Results:
    """A results folder and what stands in it for a suite."""

    suite: Suite
    folder: Path
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    broken: str | None = None
    """What is wrong with the folder's suite.yaml; the next bench puts it aside."""
    _known: dict[tuple[Any, ...], list[Cell]] = field(default_factory=dict)

    def baseline(self) -> Cell:
        return self._once(("baseline",), lambda: [baseline_cell(self.suite)])[0]

    def search(self, method: str) -> list[Cell]:
        """The cells of a method's search of its learning rate."""
        return self._once(("tuning", method), lambda: tuning_cells(self.suite, method))

    def final(self, method: str, rate: float) -> list[Cell]:
        return self._once(("final", method, rate), lambda: final_cells(self.suite, method, rate))

    def _once(self, key: tuple[Any, ...], make: Callable[[], list[Cell]]) -> list[Cell]:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def read(self) -> None:
        """Look at the folder. Changes nothing in it."""
        self.records, self.damaged = read_records(self.folder)
        self.failures = {}
        for path in sorted((self.folder / "failed").glob("*.json")):
            with contextlib.suppress(OSError, ValueError):  # half of a failure is none: the cell is open anyway
                failure = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(failure, dict) and {"reason", "exit_code"} <= set(failure):
                    self.failures[path.stem] = failure

    def state(self, cell: Cell) -> str:
        """done, diverged (a learning rate that is out of the choice), damaged, failed or open."""
        record = self.records.get(cell.name)
        if record is not None and record["key"] == cell.key:
            return "done"
        if cell.name in self.damaged:
            return "damaged"
        failure = self.failures.get(cell.name)
        if failure is None:
            return "open"
        return "diverged" if cell.kind == "tuning" and failure.get("exit_code") == DIVERGED else "failed"

    def choice(self, method: str) -> dict[str, Any] | None:
        """How a method's learning rate is chosen: by the last evaluation of each search run, ties to the smaller rate.

        Returns:
            {"learning_rate", "metric", "maximize", "candidates": [{"learning_rate", "value"}], "edge"}; `edge` is
            "lowest" or "highest" where the chosen one ends the grid of several, else None. `value` is None where the
            run diverged. None while a search run is missing, or where all have diverged.
        """
        rates = self.suite.rates(method)
        if len(rates) == 1:
            return {"learning_rate": rates[0], "metric": None, "maximize": None, "candidates": [], "edge": None}
        candidates: list[dict[str, Any]] = []
        metric, maximize = None, True
        for cell in self.search(method):
            state, value = self.state(cell), None
            if state not in ("done", "diverged"):
                return None
            if state == "done":
                info = self.records[cell.name]["train_info"]
                metric, maximize = self.judged_by(info)
                value = info["eval_curve"][-1][metric]
            candidates.append({"learning_rate": cell.learning_rate, "value": value})
        usable = [one for one in candidates if one["value"] is not None]
        if not usable:
            return None
        best = min(usable, key=lambda one: (-one["value"] if maximize else one["value"], one["learning_rate"]))
        rate = best["learning_rate"]
        edge = "lowest" if rate == rates[0] else "highest" if rate == rates[-1] else None
        return {"learning_rate": rate, "metric": metric, "maximize": maximize, "candidates": candidates, "edge": edge}

    def judged_by(self, info: dict[str, Any]) -> tuple[str, bool]:
        """The metric that a search run is chosen by, and whether more of it is better.

        Args:
            info: its train_info.
        """
        named = self.suite.primary
        if named is None or named == info["primary"]:
            return str(info["primary"]), bool(info["maximize"])
        return (named, named not in SMALLER_IS_BETTER) if named in info["eval_curve"][-1] else ("loss", False)

    def refuse_primary(self, record: dict[str, Any]) -> None:
        """Raises ConfigError where a record of test metrics has none that the suite ranks by."""
        info = record["train_info"]
        found = info["metrics_after"] or info["metrics_before"] or {}
        known = metrics_in(found)
        if self.suite.primary is not None and found and self.suite.primary not in known:
            raise ConfigError(
                f"primary: got {self.suite.primary}, expected a metric of {record['run_info']['method']}: "
                f"{', '.join(known)}.",
                "Name one of these, or set what makes the metric (exact_match: config.evaluation.generate_rows).",
            )

    def cells(self) -> list[Cell]:
        """All cells that are known, in the order in which they run: the final ones of methods whose learning rate is
        chosen among them, seed by seed, so that a slow hour of the machine meets every method."""
        found = [self.baseline()]
        for method in self.suite.methods:
            found += self.search(method)
        chosen = {method: choice for method in self.suite.methods if (choice := self.choice(method))}
        runs = [self.final(method, choice["learning_rate"]) for method, choice in chosen.items()]
        return found + [cell for of_one_seed in zip(*runs, strict=True) for cell in of_one_seed]

    def possible(self) -> list[Cell]:
        """All cells that the suite's settings may still ask for: where a learning rate is not chosen, the final cells
        of every rate."""
        methods = [method for method in self.suite.methods if self.choice(method) is None]
        undecided = [(method, rate) for method in methods for rate in self.suite.rates(method)]
        return self.cells() + [cell for method, rate in undecided for cell in self.final(method, rate)]

    def waiting(self) -> dict[str, int]:
        """Final cells that wait for their learning rate, by method."""
        lost = self.diverged()
        methods = [method for method in self.suite.methods if method not in lost and self.choice(method) is None]
        return {method: len(self.suite.seeds) for method in methods}

    def diverged(self) -> dict[str, list[float]]:
        """Methods all of whose learning rates diverged, with these: they have no final cells until their grid is
        another."""
        states = {method: [self.state(cell) for cell in self.search(method)] for method in self.suite.methods}
        return {method: self.suite.rates(method) for method, of in states.items() if set(of) == {"diverged"}}


def open_results(path: str | Path, folder: str | Path | None = None) -> Results:
    """A suite and what its results folder holds. Changes nothing.

    Raises:
        ConfigError: the suite is at fault, or asks for what the bench can't do; or the folder is another suite's.
    """
    suite = load_suite(path)
    check_suite(suite)
    results = Results(suite, Path(folder or Path("benchmarks/results") / suite.name).expanduser())
    if results.folder.exists() and not results.folder.is_dir():
        raise ConfigError(f"--output: {results.folder} is a file.", "Name a folder.")
    results.read()
    results.broken, name = _written(results)
    if name not in (None, suite.name):
        raise ConfigError(
            f"--output: {results.folder} holds the results of the suite {name}, not of {suite.name}.",
            "Name another folder.",
        )
    for cell in results.cells():
        if cell.kind != "tuning" and results.state(cell) == "done":
            results.refuse_primary(results.records[cell.name])
    return results


def _written(results: Results) -> tuple[str | None, str | None]:
    """What is wrong with the suite that stands in a results folder, and its name; where that can't be read, the one
    that its records have."""
    path = results.folder / "suite.yaml"
    if not path.exists():
        return None, None
    try:
        return None, load_suite(path).name
    except ConfigError as error:
        problem = error.problem.splitlines()[0]
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and tree.get("name") and isinstance(tree["name"], str):
            return problem, tree["name"]
    names = sorted({str(record["run_info"].get("suite")) for record in results.records.values()})
    return problem, next((name for name in names if name != results.suite.name), None)
