"""Memory levers in the settings: what they take, and what they can't be combined with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from delayed import DelayedLane
from test_config_checks import faults, tree
from tiny import assemble, config, pair_rows, write_rows

from peft_engine import building
from peft_engine.config_reading import load_config, to_yaml
from peft_engine.errors import ConfigError
from peft_engine.run_directory import find_run

FREE = {"max_grad_norm": None, "optimizer_in_backward": True}


@pytest.mark.parametrize("value", [True, False, 1, 2, 7, [r"layers\.[0-3]\b"], ["a", "b"]])
def test_checkpointing_takes(value: Any) -> None:
    assert not faults("causal-lm", training={"gradient_checkpointing": value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            0,
            "training.gradient_checkpointing: got 0 (a number), expected true or false or a whole number of at least 1",
        ),
        (-2, "training.gradient_checkpointing: got -2"),
        (1.5, "training.gradient_checkpointing: got 1.5"),
        ("every second", "training.gradient_checkpointing: got"),
        ([], "training.gradient_checkpointing: names no layer"),
        (["("], "training.gradient_checkpointing[0]: got '(', expected a regular expression"),
        ([3], "training.gradient_checkpointing[0]: got"),
    ],
)
def test_checkpointing_refuses(value: Any, message: str) -> None:
    (line,) = faults("causal-lm", training={"gradient_checkpointing": value})
    assert line.startswith(message), line


@pytest.mark.parametrize("chosen", [True, 2, ["0$"]])
def test_prefix_and_checkpointing(chosen: Any) -> None:
    (line,) = faults("causal-lm", adapter={"method": "prefix"}, training={"gradient_checkpointing": chosen})
    assert line.startswith("training.gradient_checkpointing: runs layers again without the keys and values that")
    assert "adapter.method prefix" in line
    assert not faults("causal-lm", adapter={"method": "prefix"})
    assert not faults("causal-lm", adapter={"method": "prompt"}, training={"gradient_checkpointing": chosen})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"activation_offload": "cpu"}, "training.activation_offload: keeps saved tensors on the host, and device"),
        ({"optimizer": "paged_adamw"}, "training.optimizer: got paged_adamw, whose state lies in CUDA's unified"),
        ({"optimizer": "paged_adamw8bit"}, "training.optimizer: got paged_adamw8bit, whose state lies in CUDA's"),
    ],
)
def test_what_needs_a_card_is_refused_by_validate(setting: dict[str, Any], message: str) -> None:
    for device in ("cpu", "mps"):
        (line,) = faults("causal-lm", device=device, training=setting)
        assert line.startswith(message), line
    assert not faults("causal-lm", device="cuda", training=setting)
    assert not faults("causal-lm", training=setting)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"training": {"optimizer_in_backward": True}}, "max_grad_norm 1.0 needs all gradients at once"),
        ({"training": {**FREE, "micro_batch_size": 4}}, "4 of 16 sequences at once"),
        ({"training": {**FREE, "ema_decay": 0.9}}, "ema_decay keeps an average"),
        ({"training": {**FREE, "precision": "fp16"}, "device": "cuda"}, "fp16 looks at all gradients"),
        ({"training": FREE, "data": {"packing": True}}, "data.packing adds up the gradients of several packs"),
        ({"training": {**FREE, "steps": 100}, "adapter": {"method": "adalora"}}, "adalora reads all gradients"),
    ],
)
def test_optimizer_in_backward_refuses(sections: dict[str, Any], named: str) -> None:
    (line,) = faults("causal-lm", **sections)
    begin = "training.optimizer_in_backward: updates a tensor once its gradient is there, and "
    assert line.startswith(begin + named), line


def test_optimizer_in_backward_takes() -> None:
    assert not faults("causal-lm", training={**FREE, "micro_batch_size": 16})
    assert not faults("causal-lm", training=FREE, adapter={"method": "full"})


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"adapter": {"method": "full"}}, "adapter.method full freezes none"),
        ({"adapter": {"init": "lora-ga"}}, "adapter.init lora-ga runs the model before they are there"),
        ({"model": {"frozen_compute": "int8"}}, "model.frozen_compute int8 changes them"),
        ({"model": {"quantization": "int8"}}, "bitsandbytes leaves the scales of int8 weights behind there"),
        ({"training": {"parallel": "fsdp"}}, "training.parallel fsdp shares them out"),
        ({"device": "cpu"}, "device cpu has no memory but the host's"),
    ],
)
def test_layers_on_the_host_refuse(sections: dict[str, Any], named: str) -> None:
    model = {"offload": "layers", **sections.pop("model", {})}
    (line,) = faults("causal-lm", model=model, **sections)
    assert line.startswith(f"model.offload: keeps frozen layers on the host, and {named}; "), line


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"activation_offload": "cpu"}},
        {"training": FREE},
        {"model": {"offload": "layers"}},
    ],
)
def test_preference_tasks_refuse(sections: dict[str, Any]) -> None:
    (line,) = faults("dpo", **sections)
    assert "works in the engine's own loop, and task dpo trains in TRL's; remove it" in line
    assert not faults("causal-lm", **sections)


@pytest.mark.parametrize(
    ("section", "setting"), [("training", {"activation_offload": "cpu"}), ("model", {"offload": "layers"})]
)
def test_a_cpu_refuses_before_it_loads(
    section: str, setting: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(20))
    given = config("causal-lm", tmp_path / "no model", rows, tmp_path / "out")
    given = given.model_copy(update={section: getattr(given, section).model_copy(update=setting)})
    name = f"{section}.{next(iter(setting))}"
    with pytest.raises(ConfigError, match=rf"^{name}: got \w+, and the device is cpu: only a CUDA card"):
        assemble(given.model_copy(update={"model": given.model.model_copy(update={"path": str(tiny_model("llama"))})}))


def test_a_run_of_a_card_is_used_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    training = {"activation_offload": "cpu", "optimizer": "paged_adamw"}
    given = load_config(tree("causal-lm", training=training, output=str(tmp_path)))
    (tmp_path / "config.yaml").write_text(to_yaml(given))
    assert find_run(tmp_path, ("device=cpu",))[1].device == "cpu"
    assert find_run(tmp_path)[1].training.optimizer == "paged_adamw"
    with pytest.raises(ConfigError, match="whose state lies in CUDA's unified memory"):
        find_run(tmp_path, ("device=cpu", "training.optimizer=paged_adamw"))


def test_levers_are_told(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `decisions` of run.json; on a card, so that what refuses them here is taken out."""
    monkeypatch.setattr(building, "refuse_levers", lambda *_: None)
    monkeypatch.setattr(building, "CudaLane", lambda _: DelayedLane())
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(20))
    given = config("causal-lm", tiny_model("llama"), rows, tmp_path / "out", training=FREE)
    assert "activation_offload" not in assemble(given).group.decisions()
    training = given.training.model_copy(update={"activation_offload": "cpu"})
    told = assemble(given.model_copy(update={"training": training})).group.decisions()
    assert told["activation_offload"] == "cpu: saved tensors of 262,144 bytes and more"
    assert told["optimizer_in_backward"] == "each tensor is updated as soon as its gradient is there"


def test_some_layers_of_a_run(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(20))
    told, curves = [], []
    for chosen in (False, 2, [r"layers\.1$"]):
        training = {"gradient_checkpointing": chosen, "batch_size": 4, "steps": 2}
        run = assemble(config("causal-lm", tiny_model("llama"), rows, tmp_path / "out", training=training))
        curves.append([(row["loss"], row["grad_norm"]) for row in run.train(2)])
        told.append(run.group.decisions().get("gradient_checkpointing"))
    assert told == [None, "1 of 2 layers", "1 of 2 layers"]
    assert curves[0] == curves[1] == curves[2]
