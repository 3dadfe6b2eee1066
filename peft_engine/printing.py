"""What a person sees of a summary and of metrics."""

from typing import Any

import click


def counted(number: int, what: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def print_summary(summary: dict[str, Any], output: str) -> None:
    """What a person wants to know after training."""
    metrics = summary["metrics"]
    before, after = metrics["before"], metrics["after"]
    click.echo(f"\n{summary['method']} on {summary['task']}, {summary['steps']} steps, {metrics['split']} split")
    for name in after:
        if isinstance(after[name], float):
            click.echo(f"  {name:<18} {before.get(name, float('nan')):>10.4f} → {after[name]:.4f}")
    share = summary["trainable_parameters"] / summary["total_parameters"]
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary["seconds"].items())
    click.echo(f"  time               {summary['wall_seconds']:.1f} s ({phases})")
    if summary["tokens_per_second"]:
        milliseconds = summary["step_seconds"] * 1000
        click.echo(
            f"  speed              {summary['tokens_per_second']:,.0f} tokens/s, {milliseconds:.0f} ms a step (median)"
        )
    if summary["peak_bytes"]:
        click.echo(f"  peak memory        {summary['peak_bytes'] / 2**20:,.0f} MiB ({summary['peak_bytes_meaning']})")
    click.echo(f"  resident           {summary['peak_rss_bytes'] / 2**20:,.0f} MiB at most")
    trainable, total = summary["trainable_parameters"], summary["total_parameters"]
    click.echo(f"  trained            {trainable:,} of {total:,} parameters ({share:.2%})")
    if summary["cost_usd"] is not None:
        click.echo(f"  cost               {summary['cost_usd']:.4f} USD")
    click.echo(f"  files              {output}/adapter, {output}/run.json, {output}/metrics.jsonl")


def print_dropped(found: dict[str, Any]) -> None:
    """How many rows an evaluation left out, and why: nothing where it took all."""
    if "dropped" in found:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in found["dropped_kinds"].items())
        click.echo(f"{found['dropped']:,} of {found['rows'] + found['dropped']:,} rows were left out: {kinds}.")
        for row in found["dropped_first"]:
            click.echo(f"  left out: {row['where']}: {row['kind']}: {row['reason']}")
        click.echo()


def print_metrics(metrics: dict[str, Any]) -> None:
    """Numbers, then a table per class and the confusion matrix where there are some."""
    for name, value in metrics.items():
        if isinstance(value, int | float):
            click.echo(f"{name:<18} {value:.4f}" if isinstance(value, float) else f"{name:<18} {value}")
    if "per_class" in metrics:
        click.echo(f"\n{'class':<24} {'precision':>9} {'recall':>9} {'f1':>9} {'count':>7}")
        for name, one in metrics["per_class"].items():
            count = one.get("rows", one.get("words"))
            click.echo(f"{name:<24} {one['precision']:>9.4f} {one['recall']:>9.4f} {one['f1']:>9.4f} {count:>7}")
    if "confusion" in metrics:
        click.echo("\nconfusion (rows: true, columns: predicted)")
        for line in metrics["confusion"]:
            click.echo("  " + " ".join(f"{n:>7}" for n in line))
