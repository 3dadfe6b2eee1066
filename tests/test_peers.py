"""benchmarks/peers: the same run in other trainers, loss by loss."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import class_rows, pair_rows, write_rows

from peers.compare import OURS, agreement, ratios, refuse_disagreement
from peers.sides import Cell, refuse_what_peers_lack, run_ours, run_peer
from peft_engine.config_reading import load_config
from peft_engine.errors import ConfigError, VerificationError
from turns import Side

ROOT = Path(__file__).resolve().parents[1]


class Recorded:
    """Stands for the talk with the parent."""

    def __init__(self):
        self.losses, self.counted = [], []

    def step_done(self, loss, counted):
        self.losses.append(float(loss))
        self.counted.append(counted)


@pytest.fixture
def cell_file(tiny_model, tmp_path):
    """family → a config file of a tiny LoRA run on rows of uneven length, the last batch of an epoch smaller."""

    def make(family, pooling="model", **adapter):
        causal = family != "bert"
        settings = {
            "task": "causal-lm" if causal else "text-classification",
            "device": "cpu",
            "model": {"path": str(tiny_model(family)), **({} if causal else {"pooling": pooling})},
            "adapter": {"rank": 4, "alpha": 8, "dropout": 0.0, **adapter},
            "data": {"cache": None, "max_length": 64, "split": {"eval": 0.0, "test": 0.0}},
            "training": {"batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.01, "max_grad_norm": 0.5},
            "output": str(tmp_path / "out"),
        }
        settings["data"]["train"] = str(write_rows(tmp_path / "rows.jsonl", (pair_rows if causal else class_rows)(20)))
        (tmp_path / "cell.yaml").write_text(json.dumps(settings))
        return tmp_path / "cell.yaml"

    return make


@pytest.mark.parametrize(
    ("peer", "family", "adapter"),
    [
        ("hf-trainer", "llama", {}),
        ("trl", "llama", {}),
        ("hf-trainer", "bert", {}),
        ("hf-trainer", "bert", {"pooling": "mean"}),
        ("trl", "qwen2", {"init": "pissa"}),
    ],
)
def test_a_peer_trains_the_same(peer, family, adapter, cell_file, tmp_path):
    config, steps = load_config(cell_file(family, **adapter)), 7
    ours, theirs = Recorded(), Recorded()
    own = Cell(config, steps, ours=True)
    facts = own.facts()
    found = run_ours(own, ours)
    torch.use_deterministic_algorithms(False)
    other = Cell(config, steps, ours=False)
    assert other.group.fused is None
    go, _ = run_peer(peer, other, str(tmp_path / "trainer"))
    for same in ("start_digest", "rows_digest", "precision"):
        assert other.facts()[same] == facts[same], same
    ended = go(theirs)
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-5)
    assert len(set(ours.losses)) == steps
    assert ours.counted == theirs.counted  # bytes on the same step
    assert sum(ours.counted) == 1
    assert found["peak_bytes"] > 0
    assert ended["peak_bytes"] > 0
    tensors = zip(own.trainee.member.tensors.items(), other.trainee.member.tensors.values(), strict=True)
    for (name, a), b in tensors:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_all_that_peers_lack_is_named_at_once(cell_file):
    given = ("data.packing=true", "training.neftune_alpha=5.0", "training.micro_batch_size=2")
    with pytest.raises(ConfigError, match=r"data\.packing.*neftune_alpha.*micro_batch_size: 2"):
        refuse_what_peers_lack(load_config(cell_file("llama"), given), ["hf-trainer"])
    with pytest.raises(ConfigError, match="full \\(lora only\\)"):
        refuse_what_peers_lack(load_config(cell_file("llama"), ("adapter={method: full}",)), ["trl"])
    with pytest.raises(ConfigError, match="trl does not train the task text-classification"):
        refuse_what_peers_lack(load_config(cell_file("bert")), ["trl"])


def test_liger_without_cuda_is_refused_with_the_reason(cell_file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        refuse_what_peers_lack(load_config(cell_file("llama")), ["hf-trainer", "liger"])


def side(losses, start="a", seconds=(1.0, 2.0, 6.0), peak=100):
    ordered = sorted(seconds)
    return {
        "losses": losses, "start_digest": start, "rows_digest": "r", "precision": "fp32", "peak_bytes": peak,
        "block_seconds": list(seconds), "step_seconds": ordered[len(ordered) // 2],
    }  # fmt: skip


def test_losses_that_differ_are_refused():
    near, far = side([2.0, 1.0]), side([2.0, 1.0001])
    good = agreement({OURS: near, "trl": side([2.0, 1.000001])}, comparable=True)
    refuse_disagreement({"losses": good})
    bad = agreement({OURS: near, "trl": far}, comparable=True)
    assert bad["largest_relative_difference"]["trl"] == pytest.approx(1e-4)
    with pytest.raises(VerificationError, match="differ by"):
        refuse_disagreement({"losses": bad})
    with pytest.raises(VerificationError, match="did not start"):
        refuse_disagreement({"losses": agreement({OURS: near, "trl": side([2.0, 1.0], "b")}, comparable=True)})
    refuse_disagreement({"losses": agreement({OURS: near, "trl": far}, comparable=False)})  # dropout: other masks


def test_ratios_are_of_medians_and_of_blocks_side_by_side():
    found = ratios(side([], seconds=(1.0, 2.0, 6.0), peak=50), side([], seconds=(2.0, 1.0, 8.0)))
    assert found == {"seconds": 2.0 / 2.0, "median_of_blocks": 0.75, "bytes": 0.5}


def test_a_side_that_ends_ends_the_comparison(capfd):
    with pytest.raises(SystemExit) as ended:
        Side("it", [sys.executable, "-c", "import sys; sys.exit(3)"])
    assert ended.value.code == 3
    assert "'it' ended" in capfd.readouterr().err


@pytest.mark.slow
def test_from_end_to_end(cell_file, tmp_path):
    command = [sys.executable, "benchmarks/peers/compare.py", str(cell_file("llama")), "--peers", "hf-trainer", "trl"]
    command += ["--steps", "2", "--repeats", "2", "--output", str(tmp_path / "out.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == json.loads(run.stdout)
    assert found["losses"]["agree"]
    assert found["steps"] == 6
    for name in (OURS, "hf-trainer", "trl"):
        assert len(found["sides"][name]["losses"]) == 6
        assert found["sides"][name]["step_seconds"] > 0
    assert set(found["against_peers"]) == {"hf-trainer", "trl"}
