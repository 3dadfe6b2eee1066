"""Members of one group, trained in turns over one backbone, end where each would have ended alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Assembled, assemble, class_rows, config, logits_of, make_model, pair_rows, write_rows

from peft_engine.adapters.files import save_adapter
from peft_engine.adapters.group import MemberSpec
from peft_engine.config import Config
from peft_engine.errors import ConfigError

STEPS = 6
SPECS = [MemberSpec("first", 1, 1e-2), MemberSpec("second", 2, 3e-3), MemberSpec("again", 1, 1e-2)]


def settings_of(family: str, model: Path, folder: Path, **adapter: Any) -> Config:
    bert = family == "bert"
    return config(
        "text-classification" if bert else "causal-lm",
        model,
        write_rows(folder / "rows.jsonl", class_rows(20) if bert else pair_rows(20)),
        folder / "out",
        adapter={"rank": 4, "dropout": 0.2, **adapter},
        data={"split": {"eval": 0.0, "test": 0.0}},
        training={"steps": STEPS, "batch_size": 6, "micro_batch_size": 4, "warmup": 0.2, "weight_decay": 0.01},
    )


@pytest.fixture(scope="module")
def shaky(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models with dropout of their own."""
    return lambda family: make_model(family, tmp_path_factory.mktemp("shaky") / family, dropout=0.1)


@pytest.mark.parametrize(
    ("family", "adapter"),
    [("llama", {}), ("bert", {}), ("gpt2", {"dora": True}), ("qwen2", {"modules_to_save": ["norm"], "rslora": True})],
)
def test_members_equal_solo_runs_bit_for_bit(
    family: str, adapter: dict[str, Any], shaky: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = settings_of(family, shaky(family), tmp_path, **adapter)
    together = assemble(settings, SPECS)
    frozen = {name: p.clone() for name, p in together.group.model.named_parameters() if "lora_" not in name}
    rows = together.train(STEPS)
    for number, spec in enumerate(SPECS):
        alone = assemble(settings, [spec])
        own = alone.train(STEPS)
        assert curve([row for row in rows if row["member"] == spec.name]) == curve(own)
        assert names(alone, 0) == names(together, number)
        for name, tensor in alone.group.members[0].tensors.items():
            assert torch.equal(tensor, together.group.members[number].tensors[name]), name
        data = alone.data["train"]
        assert torch.equal(
            logits_of(alone.group, alone.task, data), logits_of(together.group, together.task, data, number)
        )
    trained = {id(t) for member in together.group.members for t in member.tensors.values()}
    for name, parameter in together.group.model.named_parameters():
        if name in frozen and id(parameter) not in trained:
            assert torch.equal(parameter, frozen[name]), f"the shared {name} moved"


def curve(rows: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    return [(row["loss"], row["learning_rate"], row["grad_norm"]) for row in rows]


def names(run: Assembled, member: int) -> list[str]:
    return sorted(run.group.members[member].tensors)


def test_seeds_and_rates_tell_members_apart(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    run = assemble(settings_of("llama", tiny_model("llama"), tmp_path), SPECS)
    first, second, twin = run.group.members
    a = next(name for name in first.tensors if ".lora_A." in name)
    assert not torch.equal(first.tensors[a], second.tensors[a])
    assert torch.equal(first.tensors[a], twin.tensors[a])
    orders = [[trainee.plan.rows(step).tolist() for step in range(1, STEPS + 1)] for trainee in run.trainees]
    assert orders[0] == orders[2] != orders[1]
    rows = run.train(STEPS)
    peaks = {
        name: max(r["learning_rate"] for r in rows if r["member"] == name) for name in ("first", "second", "again")
    }
    assert peaks == {"first": 1e-2, "second": 3e-3, "again": 1e-2}


def test_each_member_is_saved_by_itself(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    run = assemble(settings_of("bert", tiny_model("bert"), tmp_path), SPECS)
    run.train(2)
    for member in run.group.members:
        save_adapter(run.group, member, tmp_path / member.spec.name)
        file = load_file(tmp_path / member.spec.name / "adapter_model.safetensors")
        assert len(file) == len(member.tensors)
        assert sum(t.numel() for t in file.values()) == run.group.parameter_counts(member)[0]
        held = {t.numpy().tobytes() for t in file.values()}
        assert {t.detach().numpy().tobytes() for t in member.tensors.values()} == held


def test_the_count_of_one_member_leaves_the_others_out(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    settings = settings_of("llama", tiny_model("llama"), tmp_path)
    alone, together = assemble(settings, SPECS[:1]), assemble(settings, SPECS)
    counts = {together.group.parameter_counts(member) for member in together.group.members}
    assert counts == {alone.group.parameter_counts(alone.group.members[0])}


@pytest.mark.parametrize("adapter", [{"init": "pissa"}, {"init": "olora"}])
def test_starts_that_move_the_shared_weights_hold_one_member(
    adapter: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="can't share"):
        assemble(settings_of("llama", tiny_model("llama"), tmp_path, **adapter), SPECS)


def test_shared_biases_hold_one_member(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bias"):
        assemble(settings_of("gpt2", tiny_model("gpt2"), tmp_path, bias="all"), SPECS)


@pytest.mark.parametrize("method", ["full", "head", "bitfit"])
def test_methods_that_train_the_backbone_hold_one_member(
    method: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = settings_of("gpt2", tiny_model("gpt2"), tmp_path)
    settings = settings.model_copy(update={"adapter": type(settings.adapter)(method=method)})
    with pytest.raises(ConfigError, match="holds one member, got 3"):
        assemble(settings, SPECS)


@pytest.mark.parametrize("name", ["0", "weight", "q_proj", "a.b", "lora_A", "modules_to_save", "again"])
def test_names_that_peft_would_mix_up_are_refused(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """peft takes a key that holds `.name.` for that adapter's, so a member called 0 would lose layer 0's tensors."""
    specs = [MemberSpec(name, 1, 1e-2), MemberSpec("again", 2, 1e-2)]
    with pytest.raises(ConfigError, match=f"member {name!r}"):
        assemble(settings_of("llama", tiny_model("llama"), tmp_path), specs)
