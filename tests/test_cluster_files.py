"""What configs/cluster holds: readable by the tools it is for, as far as they are here, with commands that exist."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from peft_engine.cli import cli

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "cluster"
SLURM = FOLDER / "slurm.sbatch"
# from `sbatch --help`; the file itself was read by sbatch, see docs/cluster.md
DIRECTIVES = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue"}
DIRECTIVES |= {"open-mode", "output"}


def commands(text: str) -> list[list[str]]:
    """The words after `train` of each engine command in a shell text, and what torchrun was given before it."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if re.search(r"peft[-_]engine train", line)]


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_the_commands_are_those_of_the_engine(path):
    text = path.read_text()
    script = text if path == SLURM else yaml.safe_load(text)["run"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0
    found = [words for words in commands(script) if words[0] != "#"]
    assert len(found) == 1
    words = found[0]
    train = cli.commands["train"]
    with click.Context(train) as context:
        train.make_parser(context).parse_args(words[words.index("train") + 1 :])
    assert any("torchrun" in word for word in words) != ("--processes" in words)


def test_slurm_directives():
    names = re.findall(r"^#SBATCH --([a-z-]+)", SLURM.read_text(), flags=re.MULTILINE)
    assert set(names) == DIRECTIVES


def test_what_is_started_again_goes_on():
    for name in ("slurm.sbatch", "skypilot-spot.yaml"):
        assert "--resume" in (FOLDER / name).read_text()
    spot = yaml.safe_load((FOLDER / "skypilot-spot.yaml").read_text())
    assert spot["resources"]["use_spot"] is True
    (place,) = spot["file_mounts"]
    assert f'output="{place.replace("~", "$HOME")}' in spot["run"]  # the run directory outlives the machine
