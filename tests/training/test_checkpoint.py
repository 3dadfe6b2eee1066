"""Checkpoints: whole or not there, exact, and free of pickle."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft_engine.adapters.group import Member, MemberSpec
from peft_engine.config import Config
from peft_engine.data.batching import BatchPlan
from peft_engine.errors import ConfigError, StorageError
from peft_engine.training import checkpoint as checkpoints
from peft_engine.training.checkpoint import (
    complete_checkpoints,
    digest_file,
    load_checkpoint,
    read_state,
    save_checkpoint,
    verify_files,
)
from peft_engine.training.optim import make_optimizer, set_learning_rate
from peft_engine.training.state import Trainee

OPTIMIZERS = ("adamw", "sgd", "adafactor", "adamw8bit")


def make_trainee(optimizer: str = "adamw", *, start: float = 0.0, name: str = "default", size: int = 8) -> Trainee:
    """A member of three tensors, one large enough for an 8-bit state, all at `start`."""
    shapes = {"x.lora_A.weight": (size, 3), "x.lora_B.weight": (64, 70), "x.bias": (5,)}
    tensors = {key: nn.Parameter(torch.full(shape, start)) for key, shape in shapes.items()}
    settings = Config.model_validate(
        {
            "task": "causal-lm",
            "model": {"path": "unused"},
            "adapter": {"lora_plus_ratio": 2.0},
            "data": {"train": "unused.jsonl"},
            "training": {"optimizer": optimizer, "weight_decay": 0.01, "learning_rate": 0.1},
            "output": "unused",
        }
    )
    member = Member(MemberSpec(name, 0, 0.1), tensors)
    made = make_optimizer(member, settings, torch.device("cpu"))
    return Trainee(member, made, BatchPlan(np.full(9, 4), 3, 0, True), 3)


def advance(trainee: Trainee, steps: int) -> None:
    """Updates whose gradients depend on the step alone."""
    for _ in range(steps):
        trainee.step += 1
        torch.manual_seed(trainee.step)
        for tensor in trainee.member.tensors.values():
            tensor.grad = torch.randn_like(tensor)
        set_learning_rate(trainee.optimizer, 1 / trainee.step)
        trainee.optimizer.step()
        trainee.window["loss"] += 0.1 * trainee.step
        trainee.step_seconds.append(0.1)


def save(folder: Path, trainee: Trainee, keep: int = 2, **run: Any) -> Path:
    return save_checkpoint(folder, trainee.step, [trainee], run, keep)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_round_trip_goes_on_bit_for_bit(optimizer, tmp_path):
    going, back = make_trainee(optimizer), make_trainee(optimizer, start=1.0)
    advance(going, 3)
    going.best_value, going.best_tensors = 0.3, {k: t.detach().clone() for k, t in going.member.tensors.items()}
    going.evaluations = [{"step": 2, "loss": 1 / 3}]
    first = save(tmp_path / "a", going, before={"loss": 0.1})
    assert load_checkpoint(first, [back]) == {"before": {"loss": 0.1}}
    assert back.to_json() == going.to_json()
    assert all(torch.equal(back.best_tensors[k], t) for k, t in going.best_tensors.items())
    assert content(save(tmp_path / "b", back, before={"loss": 0.1})) == content(first)
    advance(going, 3)
    advance(back, 3)
    expected, found = save(tmp_path / "c", going), save(tmp_path / "d", back)
    assert content(found) == content(expected)
    assert content(expected)["default.adapter.safetensors"] != content(first)["default.adapter.safetensors"]


def test_the_optimizer_state_counts(tmp_path):
    """A member without its optimizer state goes on otherwise: the test above would notice it missing."""
    for optimizer in OPTIMIZERS:
        going, bare = make_trainee(optimizer), make_trainee(optimizer)
        advance(going, 3)
        with torch.no_grad():
            for key, tensor in bare.member.tensors.items():
                tensor.copy_(going.member.tensors[key])
        bare.step = going.step
        advance(going, 1)
        advance(bare, 1)
        assert any(not torch.equal(going.member.tensors[k], t) for k, t in bare.member.tensors.items()), optimizer


def test_eight_bit_states_are_kept_in_eight_bits(tmp_path):
    trainee = make_trainee("adamw8bit")
    advance(trainee, 1)
    saved = load_file(save(tmp_path, trainee) / "default.optimizer.safetensors")
    assert [t.dtype for name, t in saved.items() if name.endswith("state1") and t.numel() >= 4096] == [torch.uint8]


def test_only_safetensors_and_json(tmp_path, monkeypatch):
    trainee, back = make_trainee("adamw8bit"), make_trainee("adamw8bit")
    advance(trainee, 2)
    trainee.best_tensors = {k: t.detach().clone() for k, t in trainee.member.tensors.items()}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for module, name in ((torch, "save"), (torch, "load"), (pickle, "dump"), (pickle, "dumps"), (pickle, "load")):
        monkeypatch.setattr(module, name, refuse)
    folder = save(tmp_path, trainee)
    load_checkpoint(folder, [back])
    assert sorted(path.name for path in folder.iterdir()) == [
        "MANIFEST.json",
        "default.adapter.safetensors",
        "default.best.safetensors",
        "default.optimizer.safetensors",
        "state.json",
    ]
    for path in folder.iterdir():
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def test_the_manifest_holds_every_file_and_tensor(tmp_path):
    trainee = make_trainee()
    advance(trainee, 1)
    folder = save(tmp_path, trainee)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["step"] == 1
    assert manifest["files"] == {p.name: digest_file(p) for p in folder.iterdir() if p.name != "MANIFEST.json"}
    assert set(manifest["tensors"]["default"]) == set(trainee.member.tensors)


@pytest.mark.parametrize("name", ["default.adapter.safetensors", "default.optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("fault", ["altered", "missing"])
def test_a_damaged_file_is_named(name, fault, tmp_path):
    trainee = make_trainee()
    advance(trainee, 1)
    folder = save(tmp_path, trainee)
    path = folder / name
    if fault == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    back = make_trainee(start=5.0)
    with pytest.raises(StorageError, match=f"{name} is {fault}") as caught:
        load_checkpoint(folder, [back])
    assert str(folder) in caught.value.fix
    assert all(bool((t == 5.0).all()) for t in back.member.tensors.values()), "a damaged checkpoint was half loaded"
    if name == "state.json":
        with pytest.raises(StorageError, match=f"{name} is {fault}"):
            read_state(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3, "tensors": {}}', '{"step": 1}'])
def test_a_damaged_manifest_is_named(text, tmp_path):
    trainee = make_trainee()
    advance(trainee, 1)
    folder = save(tmp_path, trainee)
    (folder / "MANIFEST.json").write_text(text)
    for read in (verify_files, read_state):
        with pytest.raises(StorageError, match=r"MANIFEST.json can't be read"):
            read(folder)


def test_tensors_that_differ_from_the_manifest_are_refused(tmp_path):
    """Trap 11: a file may be whole and yet hold other weights."""
    trainee = make_trainee()
    advance(trainee, 1)
    folder = save(tmp_path, trainee)
    path = folder / "default.adapter.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"][path.name] = digest_file(path)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="3 tensors were not restored as saved"):
        load_checkpoint(folder, [make_trainee()])


def test_another_members_checkpoint_is_refused(tmp_path):
    trainee = make_trainee()
    advance(trainee, 1)
    folder = save(tmp_path, trainee)
    with pytest.raises(ConfigError, match=r"holds members \['default'\], this run has \['other'\]"):
        load_checkpoint(folder, [make_trainee(name="other")])
    with pytest.raises(StorageError, match=r"lora_A.weight has shape \(8, 3\), expected \(4, 3\)"):
        load_checkpoint(folder, [make_trainee(size=4)])


def test_folders_without_a_manifest_are_never_chosen(tmp_path):
    trainee = make_trainee()
    advance(trainee, 2)
    whole = save(tmp_path, trainee)
    for name in ("step-9", "step-10", ".step-11.part", "step-12.part", "step-x"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "step-9" / "MANIFEST.json").unlink()
    (tmp_path / "step-10" / "MANIFEST.json").unlink()
    (tmp_path / "step-13").write_text("a file")
    assert complete_checkpoints(tmp_path) == [whole]
    assert complete_checkpoints(tmp_path / "absent") == []


def test_newest_is_by_number_not_by_name(tmp_path):
    trainee = make_trainee()
    for _ in range(11):
        advance(trainee, 1)
        save(tmp_path, trainee, keep=3)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-9", "step-10", "step-11"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_save_total_limit_keeps_the_newest(keep, tmp_path):
    trainee = make_trainee()
    for done in range(1, 6):
        advance(trainee, 1)
        save(tmp_path, trainee, keep=keep)
        assert sorted(os.listdir(tmp_path)) == sorted(f"step-{n}" for n in range(max(1, done - keep + 1), done + 1))


class Crash(BaseException):
    """The process ends here."""


class Bomb:
    """Lets the file operations of a checkpoint happen, up to the one that is to be cut off in its middle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.calls = at, 0
        write_text, replace, rmtree, flush = Path.write_text, os.replace, shutil.rmtree, checkpoints._flush

        def half_text(path: Path, text: str, *rest: Any, **more: Any) -> int:
            self._or(lambda: write_text(path, text[: len(text) // 2]))
            return write_text(path, text, *rest, **more)

        def half_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
            self._or(lambda: path.write_bytes(b"\x10\0\0"))
            save_file(tensors, path)

        def half_tree(path: Path, **more: Any) -> None:
            self._or(lambda: [file.unlink() for file in sorted(path.glob("*"))[1:]])
            rmtree(path, **more)

        def no_replace(source: Path, target: Path) -> None:
            self._or(lambda: None)
            replace(source, target)

        def no_flush(path: Path) -> None:
            self._or(lambda: None)
            flush(path)

        monkeypatch.setattr(Path, "write_text", half_text)
        monkeypatch.setattr(checkpoints, "save_file", half_tensors)
        monkeypatch.setattr(checkpoints.shutil, "rmtree", half_tree)
        monkeypatch.setattr(checkpoints.os, "replace", no_replace)
        monkeypatch.setattr(checkpoints, "_flush", no_flush)

    def _or(self, half: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            half()
            raise Crash


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_file_operation_leaves_a_state_to_resume_from(keep, tmp_path, monkeypatch):
    at, ended = 0, False
    while not ended:
        at += 1
        folder = tmp_path / str(at)
        trainee = make_trainee()
        advance(trainee, 1)
        save(folder, trainee, keep)
        advance(trainee, 1)
        save(folder, trainee, keep)
        advance(trainee, 1)
        with monkeypatch.context() as patched:
            bomb = Bomb(patched, at)
            try:
                save(folder, trainee, keep)
                ended = True
            except Crash:
                pass
        left = complete_checkpoints(folder)
        for one in left:
            verify_files(one)
        back = make_trainee()
        load_checkpoint(left[-1], [back])
        assert back.step in (2, 3)
        advance(back, 4 - back.step)
        save(folder, back, keep)
        assert load_checkpoint(complete_checkpoints(folder)[-1], [make_trainee()]) == {}
        assert len(os.listdir(folder)) == keep, "what the crash left was not cleaned up"
    assert bomb.calls == at - 1
    assert at > 12, "the operations were not intercepted"


def test_saving_the_same_step_again_never_takes_it_away(tmp_path, monkeypatch):
    trainee = make_trainee()
    advance(trainee, 1)
    folder = save(tmp_path, trainee, keep=1)
    before = content(folder)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: pytest.fail("deleted"))
    assert save(tmp_path, trainee, keep=1) == folder
    assert content(folder) == before
