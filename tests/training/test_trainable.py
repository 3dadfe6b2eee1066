"""`training.trainable` and `training.frozen`: what trains, what stands still, and that all of it is saved."""

import json

import pytest
import torch
from comparing import changed, small
from safetensors.torch import load_file
from task_checks import resumes_bitwise
from tiny import assemble, class_rows, config, logits_of, pair_rows, write_rows

from peft_engine.config import Config
from peft_engine.errors import ConfigError
from peft_engine.run import train
from peft_engine.using import export, open_run


def classifier(model, folder, **training) -> Config:
    rows = write_rows(folder / "rows.jsonl", class_rows(24))
    return config(
        "text-classification", model, rows, folder / "run", adapter={"rank": 2},
        data={"split": {"eval": 0.2, "test": 0.0}}, training={"steps": 3, "learning_rate": 0.01, **training},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "trains"),
    [
        ({"frozen": [r"lora_A"]}, lambda name: "lora_A" not in name),
        ({"trainable": [r"layers\.1\."]}, lambda name: "layers.1." in name),
        ({"trainable": ["q_proj", "v_proj"], "frozen": [r"layers\.0\."]},
         lambda name: ("q_proj" in name or "v_proj" in name) and "layers.0." not in name),
    ],
)  # fmt: skip
def test_exactly_the_named_tensors_train_and_all_are_saved(patterns, trains, tiny_model, tmp_path):
    settings = small(tiny_model("llama"), tmp_path, steps=4, **patterns)
    run = assemble(settings)
    member = run.group.members[0]
    start = {name: tensor.detach().clone() for name, tensor in member.all_tensors().items()}
    everything = assemble(changed(settings, training__trainable=None, training__frozen=[])).group.members[0].tensors
    assert set(member.tensors) == {name for name in everything if trains(name)}
    assert set(start) == set(everything)
    assert {p for p in run.group.model.parameters() if p.requires_grad} == set(member.tensors.values())
    summary = train(settings)
    assert summary["trainable_parameters"] == sum(t.numel() for t in member.tensors.values())
    assert summary["total_parameters"] == sum(p.numel() for p in run.group.model.parameters())
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert set(saved) == set(everything)
    moved = {name for name in saved if not torch.equal(saved[name], start[name])}
    assert moved == {name for name in everything if trains(name)}


def test_fused_and_plain_agree_where_a_half_is_frozen(tiny_model, tmp_path):
    settings = changed(small(tiny_model("llama"), tmp_path, frozen=["lora_A"]), adapter__dropout=0.0)
    rows = {}
    for kernels in ("auto", "off"):
        train(changed(settings, output=str(tmp_path / kernels), kernels=kernels))
        lines = (tmp_path / kernels / "metrics.jsonl").read_text().splitlines()
        rows[kernels] = [json.loads(line).get("loss") for line in lines]
    assert [r for r in rows["auto"] if r] == pytest.approx([r for r in rows["off"] if r], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "patterns"),
    [
        ("lora", {"trainable": ["classifier"]}),
        ("lora", {"frozen": ["lora_A", "classifier.*bias"]}),
        ("warm", {"frozen": ["classifier", "lora_A"]}),  # a head that has learned
        ("full", {"frozen": ["embeddings", r"layer\.0\."]}),
        ("bitfit", {"trainable": ["attention", "classifier"]}),
    ],
)
def test_the_round_trip_keeps_what_did_not_train(method, patterns, tiny_model, tmp_path):
    """Traps 14 and 15: a frozen head is random, so losing it would show."""
    settings = classifier(tiny_model("bert"), tmp_path, **patterns)
    if method == "warm":
        train(changed(settings, output=str(tmp_path / "first"), training__frozen=[]))
        settings, method = changed(settings, adapter__start_from=str(tmp_path / "first")), "lora"
    elif method != "lora":
        settings = settings.model_copy(update={"adapter": settings.adapter.model_validate({"method": method})})
    train(settings)
    fresh = assemble(settings)
    opened = open_run(tmp_path / "run")
    held = opened.group.members[0].all_tensors()
    assert set(held) == set(fresh.group.members[0].all_tensors())
    for name, tensor in fresh.group.members[0].kept.items():
        assert torch.equal(held[name], tensor), name
    before, after = (logits_of(g, fresh.task, fresh.data["train"]) for g in (fresh.group, opened.group))
    assert not torch.equal(before, after)
    if method == "lora":
        export(tmp_path / "run")


def test_resume_gives_the_same_bits(tiny_model, tmp_path, monkeypatch):
    whole = small(tiny_model("llama"), tmp_path, trainable=["v_proj", "o_proj"], frozen=["lora_A"], ema_decay=0.9)
    resumes_bitwise(whole, 5, monkeypatch)


@pytest.mark.parametrize(
    ("method", "patterns"),
    [
        ("lora", {"frozen": ["classifier"]}),
        ("lora", {"trainable": ["lora_"]}),
        ("full", {"trainable": [r"layer\.1\."]}),
        ("bitfit", {"trainable": ["attention"]}),
    ],
)
def test_a_new_head_that_would_stay_random_is_refused(method, patterns, tiny_model, tmp_path):
    settings = classifier(tiny_model("bert"), tmp_path, **patterns)
    if method != "lora":
        settings = settings.model_copy(update={"adapter": settings.adapter.model_validate({"method": method})})
    with pytest.raises(ConfigError, match=r"classifier\.\S*weight would not train, and is new: it would stay random"):
        assemble(settings)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"trainable": ["q_prj"]}, r"training.trainable: 'q_prj' finds none of the 28 tensors.*Nearest: .*q_proj"),
        ({"frozen": [r"lora_A", r"layers\.7"]}, r"training.frozen: 'layers\\\\.7' finds none.*Nearest: layers"),
        ({"frozen": ["lora"]}, "leave none of the 28 tensors of lora to train"),
        ({"frozen": ["lora_B"]}, "would train while its B stands still at zero"),
    ],
)
def test_what_can_not_be_is_refused(patterns, said, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=said):
        assemble(small(tiny_model("llama"), tmp_path, **patterns))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"trainable": []}, "got an empty list, which would train nothing"),
        ({"frozen": ["("]}, r"training.frozen\[0\]: got '\(', expected a regular expression"),
    ],
)
def test_faults_of_the_settings(given, said):
    rest = {"task": "causal-lm", "model": {"path": "m"}, "data": {"train": "d"}, "output": "o"}
    with pytest.raises(ValueError, match=said):
        Config.model_validate({**rest, "training": given})


def test_members_of_a_group_stay_frozen_when_they_take_turns(tiny_model, tmp_path):
    from peft_engine.adapters.group import MemberSpec

    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(12))
    settings = config("causal-lm", tiny_model("llama"), rows, tmp_path / "run", training={"frozen": ["lora_A"]})
    run = assemble(settings, [MemberSpec("one", 0, 0.01), MemberSpec("two", 1, 0.01)])
    run.train(3)
    for member in run.group.members:
        run.group.activate(member)
        assert not any(tensor.requires_grad for tensor in member.kept.values())
        assert all(tensor.grad is None for tensor in member.kept.values())
        trainable, total = run.group.parameter_counts(member)
        assert trainable == sum(t.numel() for t in member.tensors.values())
        assert total == sum(p.numel() for p in run.group.model.parameters()) - sum(
            t.numel() for m in run.group.members if m is not member for t in m.all_tensors().values()
        )
