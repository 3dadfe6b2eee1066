"""The verb `report`."""

from pathlib import Path

import click

from .cli_tools import AS_JSON, show_found
from .errors import VerificationError


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--against", metavar="DIR2", type=click.Path(path_type=Path), help="Earlier results to compare with, cell by cell."
)
@AS_JSON
def report(folder: Path, against: Path | None, as_json: bool) -> None:
    """Rebuild the report of a bench from its records.

    Writes report.html, report.md, report.csv and report.json into DIR from what DIR/cells holds. With --against, says
    which methods got worse, slower or larger than in DIR2 beyond noise, and exits with 7 where one did. Results of
    other data, weights or budget are refused.

    \b
    peft-engine report benchmarks/results/quick-text
    peft-engine report new-results --against old-results
    """
    from .bench.report import write_report

    found = write_report(folder)

    def show() -> None:
        said = [found["unclaimed"]] if found["unclaimed"] else []
        for line in (*found["summary"], *said, *found["notes"]):
            click.echo(line)
        for one in found["left_out"]:
            click.echo(f"{one['cell']} left out: {one['reason']}.")
        click.echo(f"{folder}/report.html, report.md, report.csv, report.json")

    if against is None:
        show_found(found, as_json, show)
        return
    from .bench.comparing import compare, told_comparison

    compared = compare(folder, against)
    show_found(compared, as_json, lambda: click.echo("\n".join(told_comparison(compared))))
    if compared["regressions"]:
        raise VerificationError(
            f"report: {len(compared['regressions'])} regressions against {against}: "
            + "; ".join(compared["regressions"]),
            "Mend what got worse, or make these the results to compare with.",
        )
