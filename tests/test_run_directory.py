"""The run directory: what is refused, what is deleted, who may write, and disks that fail."""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from comparing import Crash, changed, crash_at, everything, last_step, newest, outcome, small, write_config
from processes import Engine, engine
from safetensors import SafetensorError
from tiny import make_model, write_rows

from peft_engine.config import Config
from peft_engine.errors import ConfigError, DataError, StorageError
from peft_engine.run import train
from peft_engine.run_directory import OWN, RunDirectory, command, explain_storage, storage_errors
from peft_engine.training.checkpoint import complete_checkpoints, verify_files


def fill(folder: Path) -> None:
    """A folder that holds a run, and things of the user's own."""
    for name in ("checkpoints/step-3", "adapter", "merged", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("content")
    for name in ("config.yaml", "run.json", "metrics.jsonl", "failure.json", "my.txt", "run.json.bak"):
        (folder / name).write_text("content")


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    for name in OWN:
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        (folder / name).touch()
        with pytest.raises(ConfigError, match=r"already holds a run.*--resume.*--overwrite"):
            RunDirectory(folder).refuse_occupied(resume=False, overwrite=False)
        RunDirectory(folder).refuse_occupied(resume=True, overwrite=False)
        RunDirectory(folder).refuse_occupied(resume=False, overwrite=True)
        assert os.listdir(folder) == [name]


def test_other_files_do_not_make_a_run(tmp_path):
    (tmp_path / "my.txt").write_text("content")
    RunDirectory(tmp_path).refuse_occupied(resume=False, overwrite=False)
    RunDirectory(tmp_path / "a" / "b").refuse_occupied(resume=False, overwrite=False)
    assert (tmp_path / "a" / "b").is_dir()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("content")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="file"):
            RunDirectory(path).refuse_occupied(resume=False, overwrite=True)
    assert (tmp_path / "file").read_text() == "content"


def test_clear_deletes_the_runs_own_files_only(tmp_path):
    fill(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("content")
    for name in ("adapter", "metrics.jsonl"):
        target = tmp_path / "run" / name
        (target / "file").unlink() if target.is_dir() else None
        target.rmdir() if target.is_dir() else target.unlink()
        target.symlink_to(elsewhere if name == "adapter" else elsewhere / "file")
    RunDirectory(tmp_path / "run").clear()
    assert sorted(os.listdir(tmp_path / "run")) == ["my.txt", "notes", "run.json.bak"]
    assert (elsewhere / "file").read_text() == "content", "a link was followed"


def wrong_row(settings: Config) -> Config:
    rows = [json.loads(line) for line in Path(settings.data.train).read_text().splitlines()]
    rows[7]["completion"] = 5
    return changed(settings, data__train=str(write_rows(Path(settings.output).parent / "wrong.jsonl", rows)))


def broken_model(settings: Config) -> Config:
    folder = make_model("llama", Path(settings.output).parent / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return changed(settings, model__path=str(folder))


BAD: dict[str, tuple[Callable[[Config], Config], type[Exception]]] = {
    "data that isn't there": (lambda s: changed(s, data__train="./absent.jsonl"), ConfigError),
    "a wrong row": (wrong_row, DataError),
    "a model that isn't there": (lambda s: changed(s, model__path="./absent"), ConfigError),
    "weights cut off": (broken_model, StorageError),
    "a target that matches nothing": (lambda s: changed(s, adapter__targets=["w_proj"]), ConfigError),
    "rows that teach nothing": (lambda s: changed(s, data__max_length=2), DataError),
}


@pytest.mark.parametrize("what", BAD)
def test_overwrite_deletes_only_after_all_was_found_good(what, tiny_model, tmp_path):
    spoil, error = BAD[what]
    settings = spoil(small(tiny_model("llama"), tmp_path))
    fill(tmp_path / "run")
    before = everything(tmp_path / "run")
    with pytest.raises(error):
        train(settings, overwrite=True)
    assert everything(tmp_path / "run") == before


def test_overwrite_replaces_the_run(tiny_model, tmp_path):
    settings = small(tiny_model("llama"), tmp_path, steps=2)
    fill(tmp_path / "run")
    train(settings, overwrite=True)
    plain = changed(settings, output=str(tmp_path / "plain"))
    train(plain)
    assert outcome(settings.output) == outcome(plain.output)
    left = set(os.listdir(tmp_path / "run")) - set(os.listdir(tmp_path / "plain"))
    assert left == {"my.txt", "notes", "run.json.bak"}
    with pytest.raises(ConfigError, match="already holds a run"):
        train(settings)


def test_one_process_at_a_time(tiny_model, tmp_path):
    settings = small(tiny_model("llama"), tmp_path, steps=30)
    path = write_config(settings, tmp_path / "run.yaml")
    (tmp_path / "second").mkdir()
    first = Engine("train", path, "--quiet", folder=tmp_path)
    assert first.wait_for(lambda: last_step(tmp_path / "run" / "metrics.jsonl") >= 2)
    first.send(signal.SIGSTOP)
    before = everything(tmp_path / "run")
    for flag in ("--overwrite", "--resume"):
        ended = engine("train", path, "--quiet", flag, folder=tmp_path / "second")
        assert ended.code == 8, ended.err
        assert f"another process is writing to {tmp_path / 'run'}" in ended.err
    assert everything(tmp_path / "run") == before
    first.send(signal.SIGCONT)
    assert first.wait().code == 0
    plain = changed(settings, output=str(tmp_path / "plain"))
    train(plain)
    assert outcome(settings.output) == outcome(plain.output)


def test_the_lock_goes_with_its_owner(tmp_path):
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    with first:
        with pytest.raises(StorageError, match="another process"), second:
            pass
        with pytest.raises(StorageError, match="another process"), second:
            pass  # the one refused must not have taken the lock file away
    assert not os.listdir(tmp_path)
    (tmp_path / ".lock").touch()  # left by a killed process
    with second:
        pass
    assert not os.listdir(tmp_path)


def test_a_lock_file_deleted_in_the_moment_of_locking_is_no_lock(tmp_path, monkeypatch):
    """Else two processes could each hold one: a deleted file's and its successor's."""
    opened = os.open

    def lose(path: Path, *rest: Any) -> int:
        number = opened(path, *rest)
        Path(path).unlink()
        return number

    monkeypatch.setattr("peft_engine.run_directory.os.open", lose)
    with pytest.raises(StorageError, match="another process"), RunDirectory(tmp_path):
        pass


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.write_json("run.json", {"a": 1, "b": float("nan"), "c": [float("inf")]})
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1, "b": None, "c": [None]}
    before = (tmp_path / "run.json").read_bytes()

    def half(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text.encode()[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(StorageError, match=r"run.json: no space left"):
        directory.write_json("run.json", {"a": 2})
    assert (tmp_path / "run.json").read_bytes() == before


def test_metrics_are_cut_at_a_step_and_forgive_a_half_line(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.cut_metrics(3)  # there are none yet
    for step in range(1, 6):
        directory.append_metrics({"step": step, "loss": 1 / step})
    with directory.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    directory.cut_metrics(3)
    assert [json.loads(line)["step"] for line in directory.metrics.read_text().splitlines()] == [1, 2, 3]
    directory.append_metrics({"step": 4})
    assert [json.loads(line)["step"] for line in directory.metrics.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), StorageError, "no space left"),
        (OSError(errno.EFBIG, "File too large"), StorageError, "over a limit"),
        (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), StorageError, "no space"),
        (Exception("File too large (os error 27)"), StorageError, "over a limit"),  # the tokenizers library
        (PermissionError(errno.EACCES, "Permission denied"), StorageError, "permissions"),
        (OSError(errno.EROFS, "Read-only file system"), StorageError, "permissions"),
        (FileExistsError(errno.EEXIST, "File exists"), ConfigError, "a file where a folder must be"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), ConfigError, "a file where a folder must be"),
    ],
)
def test_faults_of_the_disk_in_words(error, kind, said, tmp_path):
    with pytest.raises(kind) as caught, storage_errors(tmp_path / "place"):
        raise error
    assert said in str(caught.value)
    assert str(tmp_path / "place") in str(caught.value)


def test_other_faults_are_not_taken_for_the_disks(tmp_path):
    for error in (
        OSError(errno.EINTR, "x"),
        SafetensorError("HeaderTooSmall"),
        SafetensorError("(os error x)"),
        Exception(),
    ):
        assert explain_storage(error) is None
        with pytest.raises(type(error)), storage_errors(tmp_path):
            raise error


@pytest.fixture
def stopped(tiny_model, tmp_path, monkeypatch) -> Config:
    """A run that was lost after step 5; checkpoints 2 and 4 stand."""
    settings = small(tiny_model("llama"), tmp_path)
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(Crash):
            train(settings)
    return settings


def goes_on(settings: Config, folder: Path) -> None:
    """The run can be resumed to the bits of an undisturbed one."""
    assert newest(folder / "run" / "checkpoints") >= 4
    for one in complete_checkpoints(folder / "run" / "checkpoints"):
        verify_files(one)
    train(settings, resume=True)
    plain = changed(settings, output=str(folder / "plain"))
    train(plain)
    assert outcome(settings.output) == outcome(plain.output)


@pytest.mark.parametrize("limit", [1000, 6000])
def test_a_full_disk_while_resuming(limit, stopped, tmp_path):
    """No file may grow beyond the limit: not config.yaml, not a checkpoint."""
    path = write_config(stopped, tmp_path / "run.yaml")
    ended = engine("train", path, "--quiet", "--resume", folder=tmp_path, file_bytes=limit)
    assert ended.code == 8, ended.err
    assert "no space left on the device, or over a limit" in ended.err
    assert str(tmp_path / "run") in ended.err
    assert "Free space" in ended.err
    assert "Traceback" not in ended.err
    goes_on(stopped, tmp_path)


def test_a_full_disk_while_the_adapter_is_written(tiny_model, tmp_path):
    """The tokenizer is the largest file of such a run, written by a library that raises a bare Exception."""
    settings = changed(small(tiny_model("llama"), tmp_path, optimizer="sgd"), adapter__rank=1)
    path = write_config(settings, tmp_path / "run.yaml")
    limit = (tiny_model("llama") / "tokenizer.json").stat().st_size - 500
    ended = engine("train", path, "--quiet", folder=tmp_path, file_bytes=limit)
    assert ended.code == 8, ended.err
    assert f"{tmp_path / 'run' / 'adapter'}: no space left" in ended.err
    assert "Traceback" not in ended.err
    assert newest(tmp_path / "run" / "checkpoints") == 8
    assert not (tmp_path / "run" / "adapter").exists()
    goes_on(settings, tmp_path)
    assert not (tmp_path / "run" / ".adapter.part").exists()


def test_a_full_disk_under_metrics(tiny_model, tmp_path):
    settings = small(tiny_model("llama"), tmp_path, steps=60)
    path = write_config(settings, tmp_path / "run.yaml")
    metrics = tmp_path / "run" / "metrics.jsonl"
    child = Engine("train", path, "--quiet", folder=tmp_path)
    assert child.wait_for(lambda: newest(tmp_path / "run" / "checkpoints") >= 4)
    child.send(signal.SIGSTOP)
    kept = tmp_path / "kept.jsonl"
    os.replace(metrics, kept)
    metrics.symlink_to("/dev/full")
    child.send(signal.SIGCONT)
    ended = child.wait()
    assert ended.code == 8, ended.err
    assert f"{metrics}: no space left" in ended.err
    assert "Traceback" not in ended.err
    os.replace(kept, metrics)
    goes_on(settings, tmp_path)


@pytest.mark.parametrize("where", ["", "checkpoints"])
def test_a_folder_that_may_not_be_written(where, stopped, tmp_path):
    path = write_config(stopped, tmp_path / "run.yaml")
    before = everything(tmp_path / "run")
    locked = tmp_path / "run" / where
    locked.chmod(0o555)
    ended = engine("train", path, "--quiet", "--resume", folder=tmp_path, unprivileged=True)
    locked.chmod(0o755)
    assert ended.code == 8, ended.err
    assert str(locked) in ended.err
    assert "Permission denied" in ended.err
    assert "Traceback" not in ended.err
    if not where:
        assert everything(tmp_path / "run") == before
    goes_on(stopped, tmp_path)


def test_the_command_is_told_as_it_was_begun(monkeypatch):
    begun = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", begun)
    monkeypatch.setattr(sys, "argv", ["/some/bin/peft-engine", "train", "my run.yaml"])
    assert command() == "peft-engine train 'my run.yaml'"
    begun.__spec__ = ModuleSpec("peft_engine.__main__", None)
    monkeypatch.setattr(sys, "argv", ["/some/peft_engine/__main__.py", "train", "my run.yaml"])
    assert command() == "python -m peft_engine train 'my run.yaml'"
