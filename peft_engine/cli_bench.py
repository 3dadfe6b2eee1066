"""The benchmark verbs."""

from collections.abc import Iterable
from typing import Any

import click

from .cli_tools import AS_JSON, files, show_found
from .errors import ConfigError, EngineError
from .printing import counted


@click.command()
@click.argument("suite", metavar="SUITE", shell_complete=files)
@click.option("--output", metavar="FOLDER", help="Results folder.  [default: benchmarks/results/<name of the suite>]")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Cells at once.")
@click.option(
    "--dry-run", is_flag=True, help="Show the cells and how long they will take. Where none has run, times a few steps."
)
@click.option("--only", metavar="PATTERN", help="Cells whose name matches: lora, lora-tuning, '*-final-0-*'.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Run the first N of the open cells, then stop.")
@AS_JSON
def bench(
    suite: str, output: str | None, jobs: int, dry_run: bool, only: str | None, limit: int | None, as_json: bool
) -> None:
    """Compare methods over several seeds.

    Each cell (method, seed, learning rate) runs in a process of its own and leaves a record in the results folder. The
    same command goes on where it was stopped: finished cells are kept, failed and damaged ones run again. Learning
    rates are chosen on the evaluation split alone.

    \b
    peft-engine bench benchmarks/suites/quick-text.yaml --dry-run
    peft-engine bench benchmarks/suites/quick-text.yaml
    """
    from .bench.results import DIVERGED, open_results
    from .bench.running import Bench, worst

    results = open_results(suite, output)
    if only is not None and not any(cell.matches(only) for cell in results.cells()):
        later, lost = {cell.method for cell in results.possible() if cell.matches(only)}, results.diverged()
        if later and later <= set(lost):
            raise ConfigError(
                f"--only {only}: none can run: {_lost(lost, sorted(later))}", _other_grid(results, sorted(later))
            )
        raise ConfigError(
            f"--only {only}: no cell of {results.suite.name} has such a name"
            + (" yet: they wait for their learning rates." if later else "."),
            "`--dry-run` lists the names; a method's search (METHOD-tuning) comes before its final cells.",
        )
    if dry_run:
        if results.broken is not None:
            _say(f"{results.broken} The next bench puts it aside as suite.yaml.broken and writes it anew.")
        found = _overview(results, only, limit, jobs)
        failure = _probe(results, found, only, limit, jobs) if found["predicted"]["seconds"] is None else None
        show_found(found, as_json, lambda: _print_overview(found))
        if failure is not None:
            raise failure
        return
    begun = Bench(results, _say, jobs=jobs, only=only, limit=limit)
    begun.run()
    _write_report(results)
    found = _overview(results, only, None, jobs)
    show_found(found, as_json, lambda: _print_end(found))
    if found["failed"] or found["diverged"]:
        failure = _failed(results, found)
        failure.exit_code = worst([one["exit_code"] for one in found["failed"]] + [DIVERGED] * len(found["diverged"]))
        raise failure


def _failed(results: Any, found: dict[str, Any]) -> EngineError:
    """What a bench ends with whose cells did not all come to a record."""
    told, fixes = [], []
    if cells := found["failed"]:
        told += [f"{counted(len(cells), 'cell')} failed:", *(f"  {one['cell']}: {one['reason']}" for one in cells)]
        fixes.append("The logs are in the results folder, under work/; the same command tries again.")
    if lost := found["diverged"]:
        told.append(_lost(lost, lost))
        fixes.append(_other_grid(results, lost))
    return EngineError("\n".join(told), " ".join(fixes))


def _lost(diverged: dict[str, list[float]], methods: Iterable[str]) -> str:
    grids = (f"{name} ({', '.join(f'{rate:g}' for rate in diverged[name])})" for name in methods)
    return f"Every learning rate diverged of {', '.join(grids)}."


def _other_grid(results: Any, methods: Iterable[str]) -> str:
    """What to do where a whole grid diverged: to run it again would tell the same."""
    own = [f"methods.{name}.learning_rates" for name in methods if results.suite.methods[name].learning_rates]
    shared = [name for name in methods if not results.suite.methods[name].learning_rates]
    if shared:
        own.append(f"tuning.learning_rates, or give own learning_rates to {', '.join(shared)}")
    return f"Lower {', '.join(own)}: the same rates would diverge again."


def _say(text: str) -> None:
    click.echo(text, err=True)


def _ahead(results: Any, only: str | None, limit: int | None) -> tuple[list[Any], list[Any], dict[str, int]]:
    """The cells that match, those of them that would run now, and how many wait for their learning rate."""
    matching = [cell for cell in results.cells() if only is None or cell.matches(only)]
    ahead = [cell for cell in matching if results.state(cell) not in ("done", "diverged")][:limit]
    return matching, ahead, {} if only or limit else results.waiting()


def _probe(results: Any, found: dict[str, Any], only: str | None, limit: int | None, jobs: int) -> EngineError | None:
    """Predict by a probe, where there is something to run; what went wrong with it."""
    from .bench.forecast import by_probe
    from .bench.probing import probe

    _, ahead, waiting = _ahead(results, only, limit)
    if not ahead and not waiting:
        return None
    try:
        record, seconds = probe(results, _say, jobs=jobs)
    except EngineError as error:
        found["predicted"]["of"] = f"unknown. {error.problem}"
        return error
    found["predicted"] = by_probe(results, ahead, waiting, record, seconds, jobs)
    return None


def _overview(results: Any, only: str | None, limit: int | None, jobs: int) -> dict[str, Any]:
    """Cells with their state, those that would run now, and the time that these take."""
    from .bench.forecast import forecast

    suite = results.suite
    matching, ahead, waiting = _ahead(results, only, limit)
    states = {cell.name: results.state(cell) for cell in matching}
    failed = [
        {"cell": cell.title, **{name: results.failures[cell.name][name] for name in ("reason", "exit_code")}}
        for cell in matching
        if states[cell.name] == "failed"
    ]
    met = {cell.method for cell in matching}
    diverged = {method: rates for method, rates in results.diverged().items() if method in met}
    chosen = {method: results.choice(method) for method in suite.methods}
    return {
        "suite": suite.name,
        "folder": str(results.folder),
        "primary": suite.primary,
        "cells": [{"name": c.name, "kind": c.kind, "method": c.method, "seed": c.seed,
                   "learning_rate": c.learning_rate, "state": states[c.name]} for c in matching],
        "open": [cell.name for cell in ahead],
        "waiting_for_learning_rate": waiting,
        "failed": failed,
        "diverged": diverged,
        "damaged": results.damaged,
        "learning_rates": chosen,
        "at_the_edge": {m: one["edge"] for m, one in chosen.items() if one and one["edge"]},
        "predicted": forecast(results, ahead, waiting, jobs),
        "stated_minutes": suite.minutes,
    }  # fmt: skip


def _print_overview(found: dict[str, Any]) -> None:
    width = max(len(cell["name"]) for cell in found["cells"]) if found["cells"] else 0
    for cell in found["cells"]:
        click.echo(f"{cell['name']:<{width}}  {cell['state']}")
    for method, count in found["waiting_for_learning_rate"].items():
        click.echo(f"{method}-final: {counted(count, 'cell')}, once its learning rate is chosen")
    for method, rates in found["diverged"].items():
        grid = ", ".join(f"{rate:g}" for rate in rates)
        click.echo(f"{method}-final: can't run, every learning rate of its grid diverged ({grid}); lower the grid")
    waiting = sum(found["waiting_for_learning_rate"].values())
    count = counted(len(found["cells"]) + waiting, "cell")
    click.echo(f"\n{count}, {len(found['open']) + waiting} of them to run")
    predicted, stated = found["predicted"], found["stated_minutes"]
    limit = f"; the suite states {stated:g}" if stated else ""
    if predicted["seconds"] is None:
        click.echo(f"time: {predicted['of']}{limit and limit + ' minutes'}")
    else:
        click.echo(f"time: about {predicted['seconds'] / 60:.1f} minutes{limit} ({predicted['of']})")


def _print_end(found: dict[str, Any]) -> None:
    states = [cell["state"] for cell in found["cells"]]
    click.echo(f"{states.count('done')} of {len(states)} cells are recorded in {found['folder']}")
    for method, edge in found["at_the_edge"].items():
        rate = found["learning_rates"][method]["learning_rate"]
        click.echo(f"note: {method}'s learning rate {rate:g} is the {edge} of its grid; a wider one may do better")
    by = {one["metric"] for one in found["learning_rates"].values() if one and one["metric"]}
    if found["primary"] and by - {found["primary"]}:
        click.echo(
            f"note: learning rates are chosen by {', '.join(by)}: evaluations while training have no {found['primary']}"
        )
    diverged = [cell["name"] for cell in found["cells"] if cell["state"] == "diverged"]
    if diverged:
        click.echo(f"note: diverged, out of the choice: {', '.join(diverged)}")


def _write_report(results: Any) -> None:
    """The report of what is there so far, where there is something to compare."""
    if any(record["run_info"]["kind"] == "final" for record in results.records.values()):
        from .bench.report import write_report

        write_report(results.folder)
