"""The command line. Each verb is a thin call; heavy imports happen inside the verbs."""

import json
import os
import sys
from typing import Any

import click

from .cli_bench import bench
from .cli_report import report
from .cli_tools import AS_JSON, CONFIG, OVERRIDES, RUN, calm_libraries, completion, doctor, env, merge, show_found
from .config_checks import TASKS
from .errors import EngineError
from .faults import explain, leave, several, told_by_another
from .printing import print_dropped, print_metrics, print_summary


class InOrder(click.Group):
    """Lists the verbs in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="peft-engine", prog_name="peft-engine")
@click.pass_context
def cli(context: click.Context) -> None:
    """Fine-tune Hugging Face models with adapters, and know what it costs.

    \b
    Start:  peft-engine init --task text-classification --model PATH > my.yaml
            peft-engine validate my.yaml      all faults of the settings at once
            peft-engine data my.yaml          what the model would see of the data
            peft-engine train my.yaml         writes the run directory that my.yaml names
            peft-engine predict my.yaml --input new.csv --output labelled.csv

    \b
    Exit codes: 0 ok, 1 internal error, 2 settings, or a model or file that isn't there,
    3 data, 4 out of memory, 5 diverged, 6 budget reached, 7 verification failed,
    8 storage, 75 interrupted (go on with train --resume).
    """
    if several() and context.invoked_subcommand != "train":
        raise click.UsageError(f"{context.invoked_subcommand} runs in one process, but WORLD_SIZE says there are more.")


@cli.command()
@click.option("--task", type=click.Choice(TASKS), required=True, metavar="TASK", help=f"One of {', '.join(TASKS)}.")
@click.option("--model", required=True, metavar="MODEL", help="Hub id or local folder.")
def init(task: str, model: str) -> None:
    """Print a commented config to start from.

    \b
    peft-engine init --task causal-lm --model HuggingFaceTB/SmolLM2-135M-Instruct > my.yaml

    Then name your data (data.train) and the run directory (output) in it.
    """
    from .config_writing import starter

    click.echo(starter(task, model), nl=False)


@cli.command()
@CONFIG
@OVERRIDES
@AS_JSON
def validate(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check the settings of CONFIG; all faults at once.

    Looks at the file alone: data and model are looked at by `data` and `train`.
    """
    from .config_reading import load_config

    found = load_config(config, overrides)
    show_found(
        {"valid": True, "config": found.model_dump(mode="json")}, as_json, lambda: click.echo(f"{config} is valid.")
    )


@cli.command()
@CONFIG
@OVERRIDES
@AS_JSON
@click.option(
    "--rows", type=click.IntRange(0), default=3, show_default=True, metavar="N", help="Rows of the mask preview."
)
@click.option("--images", metavar="FILE", help="PNG to write of some images, with augmentations.")
def data(config: str, overrides: tuple[str, ...], as_json: bool, rows: int, images: str | None) -> None:
    """Look at the data before training.

    Counts, lengths, labels, duplicates, leakage and truncation of each split, and the first training rows as the model
    reads them: what is learned is green, or stands between ⟦ and ⟧ where there are no colours.
    """
    from .config_reading import load_config

    settings = load_config(config, overrides)
    from rich.console import Console

    from .inspection import inspect_data

    report, show = inspect_data(settings, rows, images)
    show_found(report, as_json, lambda: show(Console()))


@cli.command()
@CONFIG
@OVERRIDES
@AS_JSON
@click.option("--resume", is_flag=True, help="Go on from the newest complete checkpoint of the output.")
@click.option("--overwrite", is_flag=True, help="Replace the run that the output holds.")
@click.option("--quiet", is_flag=True, help="No progress: only errors and the summary.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    metavar="N",
    help="Train in N processes on this machine: a GPU for each, or parts of the CPU.",
)
def train(
    config: str,
    overrides: tuple[str, ...],
    as_json: bool,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    processes: int | None,
) -> None:
    """Fine-tune as CONFIG says; write the run directory.

    Evaluates before and after, checkpoints on the way, saves the adapter. The first Ctrl-C (SIGINT) or SIGTERM writes
    a checkpoint and exits with 75; --resume goes on from there to the same result, bit by bit. With --processes, or
    started by torchrun or accelerate launch, several processes make the same steps together.

    \b
    peft-engine train my.yaml --set output=runs/rank4 --set adapter.rank=4
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other: go on with the run, or replace it.")
    if several() and processes is not None:
        raise click.UsageError(f"--processes: {os.environ['WORLD_SIZE']} are there already; leave it out.")
    from .config_reading import load_config
    from .starting import enter, start_here, start_processes

    enter()
    settings = load_config(config, overrides)
    if processes is not None and processes > 1:
        flags = {"--json": as_json, "--resume": resume, "--overwrite": overwrite, "--quiet": quiet}
        leave(start_processes(settings, config, overrides, flags, processes))
    summary = start_here(settings, resume=resume, overwrite=overwrite, quiet=quiet)
    if summary is not None:
        show_found(summary, as_json, lambda: print_summary(summary, settings.output))


@cli.command()
@RUN
@click.option(
    "--split",
    type=click.Choice(["train", "eval", "test"]),
    default="test",
    show_default=True,
    help="Which split of the run's own data.",
)
@click.option("--data", metavar="FILE", help="A file with the labels or answers, instead of a split.")
@OVERRIDES
@AS_JSON
def evaluate(run: str, split: Any, data: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Metrics of a run on a split or a file.

    RUN is a run directory, or the config whose output it is.
    """
    from .run_directory import find_run

    find_run(run, overrides)  # before torch is waited for
    from .using import evaluate as run_evaluate

    found = run_evaluate(run, split, data=data, overrides=overrides)

    def show() -> None:
        print_dropped(found)
        print_metrics(found["metrics"])

    show_found(found, as_json, show)


@cli.command()
@RUN
@click.option(
    "--input",
    "source",
    required=True,
    metavar="FILE",
    help="csv, tsv, jsonl, json, parquet or txt (a text per line); a folder of images.",
)
@click.option("--output", "target", metavar="FILE", help=".csv or .jsonl to write; without it JSON lines go to stdout.")
@OVERRIDES
@AS_JSON
def predict(run: str, source: str, target: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Label, or answer, every row of a file.

    The input has the text, prompt or messages columns of training; labels are not needed. The output keeps its columns
    and adds `predicted`, with the probability of each class. RUN is a run directory, or the config whose output it is.

    \b
    peft-engine predict runs/mine --input new.csv --output labelled.csv
    """
    from .run_directory import find_run

    find_run(run, overrides)  # before torch is waited for
    from .using import predict as run_predict

    rows = run_predict(run, source, target, overrides=overrides)

    def show() -> None:
        if target:
            click.echo(f"{len(rows)} rows written to {target}", err=True)
        for row in () if target else rows:
            click.echo(json.dumps(row, ensure_ascii=False))

    show_found({"rows": len(rows), "output": target} | ({} if target else {"predictions": rows}), as_json, show)


@cli.command()
@RUN
@click.argument("prompt")
@click.option("--system", metavar="TEXT", help="System message, for runs that learned conversations.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    metavar="N",
    help="Stop here at the latest.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    metavar="T",
    help="0 takes the likeliest token each time; higher is freer.",
)
@OVERRIDES
@AS_JSON
def generate(
    run: str,
    prompt: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Answer PROMPT with a run that makes text, word by word.

    The run's task is causal-lm or seq2seq. The prompt goes through the model's chat template where the run learned
    conversations; else it is continued as it stands. For seq2seq it is the source. RUN is a run directory, or the
    config whose output it is.

    \b
    peft-engine generate runs/mine "Name three rivers." --max-new-tokens 50
    """
    from .run_directory import find_run

    find_run(run, overrides)  # before torch is waited for
    from .using import generate as run_generate

    text = run_generate(
        run,
        prompt,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        streamer=None if as_json else _streamer,
        overrides=overrides,
    )
    if as_json:
        click.echo(json.dumps({"text": text}, ensure_ascii=False))


@cli.command()
@RUN
@click.option(
    "--merged",
    is_flag=True,
    help="Fold the adapter into the weights: a transformers model folder; its README says how to load it.",
)
@click.option(
    "--gguf",
    is_flag=True,
    help="Merge a llama-family model into model.gguf, and write a LoRA adapter as adapter.gguf beside it (llama.cpp).",
)
@click.option(
    "--to", "target", metavar="FOLDER", help="Where to write it; RUN/merged with --merged, RUN/gguf with --gguf."
)
@click.option(
    "--max-kl",
    type=float,
    metavar="NATS",
    help="Of a merged model: how far its probabilities may be from the trained one's, a token or row; 0.05 by default.",
)
@OVERRIDES
@AS_JSON
def export(
    run: str,
    merged: bool,
    gguf: bool,
    target: str | None,
    max_kl: float | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Verify a run's adapter in plain peft, or merge it.

    Reloads what is exported in plain transformers and peft, without this engine, compares the logits, and fails
    (exit 7) where they differ. A merged model is also held against what was trained, on up to 256 test rows: mean KL
    and top-1 agreement go to its merge.json; beyond a bound nothing is left (exit 7). Of a quantised run two merges are
    held so, onto the full-precision and onto the dequantised weights; the nearer one is written. RUN is a run
    directory, or the config whose output it is.

    \b
    peft-engine export runs/mine                      RUN/adapter as it stands, verified
    peft-engine export runs/mine --to my-adapter      the same, copied
    peft-engine export runs/mine --merged             one model folder, with its README
    peft-engine export runs/mine --gguf               files for llama.cpp, read again and compared
    """
    from .run_directory import find_run

    find_run(run, overrides)  # before torch is waited for
    from .using import export as run_export

    folder, drift = run_export(run, merged=merged, gguf=gguf, target=target, max_kl=max_kl, overrides=overrides)
    found: dict[str, Any] = {
        "folder": str(folder),
        "relative": drift.relative,
        "kl": drift.kl,
        "top1_agreement": drift.top1_agreement,
    }
    if drift.held_out:
        found["held_out"] = drift.held_out.to_json()
    if drift.bases:
        found |= {"base": drift.base, "bases": {base: one.to_json() for base, one in drift.bases.items()}}
    library = "transformers" if merged or gguf else "transformers + peft"
    text = (
        f"{folder}: reloaded in plain {library}; largest logit difference {drift.relative:.1e} of the largest logit, "
        f"top-1 agreement {drift.top1_agreement:.1%}"
    )
    if drift.held_out:
        text += f"\n  against what was trained: {drift.held_out.told()}"
    for base, one in drift.bases.items():
        text += f"\n  merged onto the {base} base: {one.told()}" + (" (written)" if base == drift.base else "")
    if gguf:
        found["gguf"] = json.loads((folder / "merge.json").read_text(encoding="utf-8"))["gguf"]
        text += "".join(f"\n  {name}: {_of_file(said)}" for name, said in found["gguf"].items())
    show_found(found, as_json, lambda: click.echo(text))


def _of_file(said: Any) -> str:
    """What merge.json says of a GGUF file, for people."""
    return said if isinstance(said, str) else ", ".join(f"{name} {value}" for name, value in said.items())


for _verb in (merge, bench, report):
    cli.add_command(_verb)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of configs, for editors.

    A config that begins with `# yaml-language-server: $schema=schema.json` is completed and checked by the editor.
    """
    from .config_writing import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


for _verb in (env, doctor, completion):
    cli.add_command(_verb)


def main() -> None:
    """Entry point: one clear message and the right exit code for whatever a user can cause."""
    calm_libraries()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # terminals that are not UTF-8
    try:
        cli(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        _complain("Interrupted.", "")
        leave(75)
    except click.ClickException as error:
        error.show()
        leave(2)
    except Exception as error:
        known = error if isinstance(error, EngineError) else explain(error)
        told = told_by_another()
        if known is None and not told:
            raise
        if known is not None and not told:
            _complain(known.problem, known.fix)
        leave(1 if known is None else known.exit_code)
    leave(0)


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _complain(problem: str, fix: str) -> None:
    click.echo(f"error: {problem}", err=True)
    if fix:
        click.echo(f"  fix: {fix}", err=True)
