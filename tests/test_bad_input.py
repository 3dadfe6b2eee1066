"""Bad input, each as a process of its own: the exit code, a message with what was got and what to do, nothing lost.

The cases are the tables in bad_input/. Each runs in a folder of its own; nothing that stands there may change.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from bad_input import machine, models, rows, runs, settings
from bad_input.case import CONFIGS, RUNS, Case, Models
from processes import Ended, engine
from tiny import chat_rows, class_rows, pair_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]
CASES = settings.CASES | models.CASES | rows.CASES | runs.CASES | machine.CASES
JSON_VERBS = ("train", "evaluate", "predict", "generate", "export", "data", "validate")


@pytest.fixture(scope="module")
def started(tiny_model: Models) -> Iterator[Path]:
    """A folder with configs, data and runs, that everybody may enter."""
    folder = Path(tempfile.mkdtemp(prefix="bad-input-"))
    folder.chmod(0o755)
    for name, (task, family, data) in CONFIGS.items():
        shutil.copytree(tiny_model(family), folder / "models" / family)
        for path in (folder / "models" / family).iterdir():
            path.chmod(0o644)  # safetensors makes them private
        settings = {
            "task": task,
            "device": "cpu",
            "model": {"path": str(folder / "models" / family)},
            "adapter": {"rank": 2},
            "data": {"train": data, "cache": None},
            "training": {"steps": 2, "batch_size": 4, "save_every": 1},
            "output": "new",
        }
        (folder / name).write_text(yaml.safe_dump(settings))
    write_rows(folder / "rows.jsonl", class_rows(24))
    write_rows(folder / "chats.jsonl", chat_rows(24))
    write_rows(folder / "pairs.jsonl", pair_rows(24))
    for words, code in RUNS.values():
        done = engine(*shlex.split(words), "--quiet", folder=folder)
        assert done.code == code, done.err
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def place(started: Path) -> Iterator[Path]:
    """A fresh folder for one case, that everybody may enter."""
    folder = Path(tempfile.mkdtemp(prefix="bad-input-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, place: Path, started: Path) -> None:
    case = CASES[name]
    if case.limits.get("nobody") and os.getuid() != 0:
        pytest.skip("only root can become another user")
    prepare(case, place, started)
    before = digests(place, started)
    words = shlex.split(case.words)
    words += ["--json"] if words[0] in JSON_VERBS else []
    done = cold(words, place, case.stdout) if case.cold else engine(*words, folder=place, **case.limits)
    print(f"$ peft-engine {' '.join(words)}\n{done.err}exit {done.code}")
    judge(done, case)
    after = digests(place, started)
    changed = [path for path in before if after.get(path) != before[path]]
    assert changed == [str(place / name) for name in case.written], "something that stood there has changed"


def test_refused_while_another_process_writes(place: Path, started: Path) -> None:
    prepare(Case("train c.yaml --set output=run-paused", 8, (), ()), place, started)
    before = digests(place)
    with (place / "run-paused" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = engine("train", "c.yaml", "--set", "output=run-paused", "--resume", folder=place)
    judge(done, Case("", 8, ("run-paused", "another process"), ("Wait for it",)))
    after = digests(place)
    assert {path: after.get(path) for path in before} == before


def prepare(case: Case, place: Path, started: Path) -> None:
    """Configs, data, files, and the runs that the command names."""
    for name in (*CONFIGS, "rows.jsonl", "chats.jsonl", "pairs.jsonl"):
        shutil.copy(started / name, place / name)
    for name in RUNS:
        if name in shlex.split(case.words.replace("=", " ")):
            shutil.copytree(started / name, place / name)
    for name, content in case.files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if case.make:
        case.make(place, lambda family: started / "models" / family)


def judge(done: Ended, case: Case) -> None:
    """The exit code, the message, and nothing else."""
    assert done.code == case.code, done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert "rror: " in done.err
    missing = [text for text in (*case.got, *case.fix) if text not in done.err]
    assert not missing, f"not told: {missing}"
    assert len(done.err) < 3000, "too long to be read"


def cold(words: list[str], folder: Path, stdout: str | None) -> Ended:
    """`python -m peft_engine WORDS` from the start, in `folder`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(stdout or os.devnull, "w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "peft_engine", *words],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file if stdout else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    return Ended(done.returncode, done.stdout or "", done.stderr)


def digests(*folders: Path) -> dict[str, str]:
    """Every file below the folders: path → sha256, and where links lead."""
    found = {}
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"→ {path.readlink()}"
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
