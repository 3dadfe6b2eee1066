"""Parts that verbs share, and the verbs around a run: adapter arithmetic, versions, self-test, shell completion."""

import json
import logging
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from .config_methods import MERGES
from .errors import ConfigError, EngineError

BASH_PLAIN = "COMPREPLY+=($value)"  # of click's script: takes one of the words
COMPLETE = "_PEFT_ENGINE_COMPLETE"  # click's name for a program called peft-engine


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a path."""
    return [CompletionItem(incomplete, type="file")]  # the shell itself lists them


def _settings(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from .config_messages import leaves

    names = (".".join(map(str, path)) for path in leaves())
    return [CompletionItem(f"{name}=") for name in names if name.startswith(incomplete)]


def _merges(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in MERGES if name.startswith(incomplete)]


OVERRIDES = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=C",
    shell_complete=_settings,
    help="Override a setting, such as training.epochs=1; may be repeated.",
)
AS_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout; all else goes to stderr."
)
CONFIG = click.argument("config", metavar="CONFIG", shell_complete=files)
RUN = click.argument("run", metavar="RUN", shell_complete=files)


def show_found(found: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """Print what a verb found: one JSON object, or what `show` prints for people."""
    from .run_directory import plain

    if as_json:
        click.echo(json.dumps(plain(found), default=str))
    else:
        show()


def calm_libraries() -> None:
    """Progress bars and notes of the libraries under us would bury ours."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d: frames of C++ where a process has ended
    for name in ("bitsandbytes", "transformers", "datasets", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN=WEIGHT...", shell_complete=files)
@click.option("--to", "target", required=True, metavar="FOLDER", help="Where to write it; used like a run directory.")
@click.option(
    "--method",
    default="cat",
    show_default=True,
    metavar="METHOD",
    shell_complete=_merges,
    help="cat (the exact sum), svd, linear, ties, dare_linear, dare_ties, magnitude_prune; but for cat and linear "
    "also with _svd behind it.",
)
@click.option("--density", type=float, metavar="SHARE", help="Share of values kept by ties, dare and magnitude_prune.")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="Rank of the result of the svd methods.")
@click.option("--head", metavar="RUN", help="Whose classifier to take, where each run trained its own.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of what dare drops.")
@AS_JSON
def merge(
    runs: tuple[str, ...],
    target: str,
    method: str,
    density: float | None,
    rank: int | None,
    head: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Add up the LoRA adapters of several runs, with weights.

    All runs must have the same backbone, task and classes. FOLDER/adapter is an ordinary adapter that loads in plain
    peft; FOLDER is taken for a run by evaluate, predict, generate and export, with the first run's settings and data.

    \b
    peft-engine merge runs/law=0.7 runs/medicine=0.3 --to runs/both
    peft-engine merge runs/a=1 runs/b=-0.5 --method svd --rank 16 --to runs/apart
    """
    from .run_directory import find_run

    sources = [_weighted(text) for text in runs]
    for path, _ in sources:
        find_run(path)  # before torch is waited for
    from .merging import merge as run_merge

    found = run_merge(sources, target, method=method, density=density, rank=rank, head=head, seed=seed)
    text = (
        f"{found['folder']}: rank {found['rank']}, {found['distance']:.1e} of the weighted sum's norm away from it\n"
        f"Check it with: peft-engine export {found['folder']}"
    )
    show_found(found, as_json, lambda: click.echo(text))


def _weighted(text: str) -> tuple[str, float]:
    """`RUN=WEIGHT`; weight 1 where none is given."""
    path, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            f"merge: got {text!r}, expected RUN=WEIGHT with a finite number.", "Write it like runs/mine=0.5."
        )
    return path, number


@click.command()
@AS_JSON
def env(as_json: bool) -> None:
    """Versions and hardware, for a bug report.

    Holds no paths, no environment variables and no secrets.
    """
    import torch

    from .runtime import cores, hardware, memory_bytes, versions

    found = {
        **versions(),
        "torch_cuda": torch.version.cuda,
        **hardware(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
    }
    show_found(found, as_json, lambda: click.echo("\n".join(f"{name}: {value}" for name, value in found.items())))


@click.command()
@AS_JSON
def doctor(as_json: bool) -> None:
    """Train a toy from end to end here, and say what works.

    Takes less than a minute and fetches nothing. Tries training, fused kernels against plain ones, saving and
    reloading, then CUDA, bf16, fp16, Triton, bitsandbytes, torch.compile and several processes. Exits with 1 where
    something fails that training needs.
    """
    from .doctor import doctor as run_doctor

    report = run_doctor()

    def show() -> None:
        width = max(len(one["name"]) for one in report["findings"])
        for one in report["findings"]:
            colour = {"works": "green", "broken": "red"}.get(one["status"], "yellow")
            status = click.style(f"{one['status']:<9}", fg=colour)
            click.echo(f"{one['name']:<{width}}  {status}  {one['detail']}")
        click.echo(f"\n{report['seconds']:.0f} s")

    show_found(report, as_json, show)
    failed = [one for one in report["findings"] if one["needed"] and one["status"] != "works"]
    if failed:
        raise EngineError(
            f"doctor: {failed[0]['name']} fails here: {failed[0]['detail']}.",
            "Mend the installation (`peft-engine env` lists the versions), or report this with what is above.",
        )


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell script that completes verbs, options and files.

    \b
    bash:  peft-engine completion bash >> ~/.bashrc
    zsh:   peft-engine completion zsh >> ~/.zshrc
    fish:  peft-engine completion fish > ~/.config/fish/completions/peft-engine.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    root = click.get_current_context().find_root().command
    text = found(root, {}, "peft-engine", COMPLETE).source()
    if shell == "bash":  # else a blank would come between `--set training.epochs=` and its value
        text = text.replace(BASH_PLAIN, f"{BASH_PLAIN}\n            [[ $value == *= ]] && compopt -o nospace")
    click.echo(text)
