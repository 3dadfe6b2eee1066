"""`doctor`, `env` and shell completion, as a user meets them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from processes import engine

from peft_engine import doctor as doctor_module
from peft_engine.cli import cli
from peft_engine.doctor import NotThere, _Toys, _try, doctor

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "cores", "memory", "disk", "training", "fused kernels", "saving and reloading", "classification", "CUDA", "bf16",
    "fp16", "Triton", "bitsandbytes", "torch.compile", "several processes",
]  # fmt: skip
SECRETS = {"HF_TOKEN": "hf_secretsecret", "WANDB_API_KEY": "0123456789abcdef", "HOME_OF_MINE": "somewhere-private"}


@pytest.mark.slow
def test_doctor_tries_everything_in_less_than_a_minute(tmp_path):
    done = engine("doctor", "--json", folder=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["ok"] is True
    assert report["seconds"] < 60
    assert [one["name"] for one in report["findings"]] == NAMES
    assert not [one for one in report["findings"] if one["status"] == "broken"]
    assert not list(tmp_path.glob("runs*"))


def test_the_toy_trains_compares_and_reloads(tmp_path):
    toys = _Toys(tmp_path)
    assert "LoRA on a toy Llama, cpu, 6 steps" in toys.train()
    assert toys.compare().startswith("torch; losses as without them up to ")
    assert toys.reload().startswith("same loss; logits in plain peft apart by ")
    path = tmp_path / "fused/run.json"
    record = json.loads(path.read_text())
    record["metrics"]["after"]["loss"] += 0.1
    path.write_text(json.dumps(record))
    found = _try("reload", toys.reload, needed=True)
    assert (found.status, found.needed) == ("broken", True)
    assert "after reloading" in found.detail
    toys.losses[2] *= 1.01
    shutil.rmtree(tmp_path / "plain")
    assert _try("compare", toys.compare).detail.startswith("ValueError: losses differ from plain PEFT's by")


def test_what_a_check_says_is_one_line():
    def fails() -> str:
        raise RuntimeError("first\nsecond " + "x" * 500)

    def lacks() -> str:
        raise NotThere("no GPU")

    broken = _try("one", fails)
    assert broken.status == "broken"
    assert broken.detail.startswith("RuntimeError: first second xxx")
    assert len(broken.detail) < 250
    assert (_try("two", lacks).status, _try("two", lacks).detail) == ("not there", "no GPU")


def stand_ins(monkeypatch: pytest.MonkeyPatch, **faults: Exception) -> None:
    """Every check of doctor answers at once, or fails as asked."""

    def answer(name: str):
        def check(*_: object) -> str:
            if name in faults:
                raise faults[name]
            return "as if"

        return check

    for name in ("_cores", "_memory", "_disk", "_cuda", "_narrow", "_fp16", "_triton", "_bitsandbytes", "_compile"):
        monkeypatch.setattr(doctor_module, name, answer(name))
    for name in ("train", "compare", "reload", "classify"):
        monkeypatch.setattr(_Toys, name, answer(name))
    monkeypatch.setattr(doctor_module, "GREET", "pass")


@pytest.mark.parametrize(
    ("faults", "ok"),
    [({}, True), ({"_cuda": NotThere("no"), "_compile": ValueError("x")}, True), ({"train": ValueError("x")}, False)],
)
def test_only_what_is_needed_decides(faults, ok, monkeypatch):
    stand_ins(monkeypatch, **faults)
    report = doctor()
    assert report["ok"] is ok
    assert [one["name"] for one in report["findings"]] == NAMES
    assert report["findings"][-1]["status"] == "works"


def test_a_fault_that_matters_ends_with_1_and_the_rest_is_still_told(monkeypatch):
    stand_ins(monkeypatch, train=ValueError("no arms"))
    ended = CliRunner().invoke(cli, ["doctor"])
    assert ended.exit_code == 1
    assert "training              broken     ValueError: no arms" in ended.output
    assert "several processes     works" in ended.output
    assert "doctor: training fails here" in str(ended.exception)
    assert json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)["ok"] is False


def test_processes_that_fail_to_meet_are_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_module, "GREET", "raise SystemExit('no gloo here')")
    with doctor_module._two_processes(tmp_path) as greeted:
        assert _try("processes", greeted).detail == "RuntimeError: no gloo here"


def test_env_tells_no_secrets(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text = CliRunner().invoke(cli, ["env"]).output
    assert "torch: " in text
    assert "cores: " in text
    assert not [value for value in SECRETS.values() if value in text]
    assert str(ROOT) not in text


def completed(words: str, cwd: Path) -> list[str]:
    """What click's own protocol answers a bash that completes the last of `words`."""
    code = "import sys; sys.argv = ['peft-engine']; from peft_engine.cli import main; main()"
    listed = words.split(" ")
    env = {
        **os.environ, "_PEFT_ENGINE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(listed) - 1),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_completion_of_verbs_options_settings_and_files(tmp_path):
    assert completed("peft-engine tr", tmp_path) == ["plain,train"]
    assert "plain,--overwrite" in completed("peft-engine train --o", tmp_path)
    assert "plain,training.neftune_alpha=" in completed("peft-engine train --set training.ne", tmp_path)
    assert completed("peft-engine train my", tmp_path) == ["file,my"]
    assert completed("peft-engine completion f", tmp_path) == ["plain,fish"]
    assert completed("peft-engine merge a b --method dare_t", tmp_path) == ["plain,dare_ties", "plain,dare_ties_svd"]


@pytest.mark.parametrize(("answer", "blank"), [("training.epochs=", False), ("train", True)])
def test_no_blank_comes_after_an_equals_sign(answer, blank, tmp_path):
    """bash with click's script, and a program that answers with one word."""
    program = tmp_path / "answers"
    program.write_text(f"#!/bin/sh\necho plain,{answer}\n")
    program.chmod(0o755)
    script = CliRunner().invoke(cli, ["completion", "bash"]).output
    words = (
        f'compopt() {{ echo option "$1" "$2"; }}\nCOMP_WORDS=(x y); COMP_CWORD=1; _peft_engine_completion {program}\n'
    )
    done = subprocess.run(
        ["bash"], input=f'{script}\n{words}echo "${{COMPREPLY[@]}}"\n', text=True, capture_output=True
    )
    assert done.stdout.splitlines() == [*([] if blank else ["option -o nospace"]), answer], done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell):
    text = CliRunner().invoke(cli, ["completion", shell]).output
    assert "_PEFT_ENGINE_COMPLETE" in text
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=text, text=True).returncode == 0
