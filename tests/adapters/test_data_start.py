"""EVA and LoRA-GA: what the engine starts from is what peft's own functions make of the same batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from tiny import Assembled, assemble, class_rows, config, logits_of, pair_rows, write_rows
from transformers import AutoModelForCausalLM

from peft_engine.adapters.files import load_adapter, save_adapter
from peft_engine.adapters.group import MemberSpec
from peft_engine.errors import ConfigError
from peft_engine.runtime import seed_everything

RANK = 4


def live_of(init: str, model: Path, folder: Path, task: str = "causal-lm", **adapter: Any) -> Assembled:
    rows = write_rows(folder / "rows.jsonl", pair_rows(16) if task == "causal-lm" else class_rows(16))
    settings = {"init": init, "rank": RANK, "alpha": 6, "dropout": 0.0} | adapter
    training = {"steps": 4, "batch_size": 4, "warmup": 0.0, "learning_rate": 1e-2}
    data = {"split": {"eval": 0.0, "test": 0.0}}
    return assemble(config(task, model, rows, folder / "out", adapter=settings, data=data, training=training))


def batches(live: Assembled, count: int) -> list[dict[str, torch.Tensor]]:
    plan = live.trainees[0].plan
    found = [live.task.collate(live.data["train"], plan.rows(step)) for step in range(1, count + 1)]
    return [{name: batch[name] for name in ("input_ids", "attention_mask", "labels")} for batch in found]


def settings_like(live: Assembled, **more: Any) -> LoraConfig:
    targets = live.group.model.peft_config["default"].target_modules
    return LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=6, target_modules=targets, **more)


def plain_base(live: Assembled) -> Any:
    return AutoModelForCausalLM.from_pretrained(live.config.model.path)


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    return {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}


def test_eva_is_pefts(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    live = live_of("eva", tiny_model("llama"), tmp_path, options={"eva_config": {"tau": 0.9}})
    eva = EvaConfig(tau=0.9)
    settings = settings_like(live, init_lora_weights="eva", eva_config=eva)
    settings.target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(plain_base(live), settings)
    initialize_lora_eva_weights(model, batches(live, 200), show_progress_bar=False)
    wanted, found = tensors_of(model), live.group.members[0].tensors
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name
    ours, theirs = (m.peft_config["default"] for m in (live.group.model, model))
    assert ours.rank_pattern == theirs.rank_pattern
    assert ours.rank_pattern, "no rank was moved: nothing was compared"


def test_lora_ga_is_pefts(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    live = live_of("lora-ga", tiny_model("llama"), tmp_path)
    settings = settings_like(live, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    base = plain_base(live)

    def run() -> None:
        for batch in batches(live, 8):
            base(**batch).loss.backward()

    preprocess_loraga(base, settings, run)
    seed_everything(0, 2)
    model: Any = get_peft_model(base, settings)
    for name, tensor in tensors_of(model).items():
        assert torch.allclose(live.group.members[0].tensors[name], tensor, atol=1e-4), name
    moved = "model.layers.0.self_attn.q_proj.base_layer.weight"
    ours, theirs = (m.get_base_model().get_parameter(moved) for m in (live.group.model, model))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, plain_base(live).get_parameter(moved.replace(".base_layer", "")), atol=1e-4)


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
@pytest.mark.parametrize(("family", "task"), [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("bert", "text-classification")])  # fmt: skip
def test_starts_as_the_model_and_comes_back(
    init: str, family: str, task: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = live_of("default", tiny_model(family), tmp_path / "plain", task)
    live = live_of(init, tiny_model(family), tmp_path / "own", task)
    start = logits_of(live.group, live.task, live.data["train"])
    assert torch.allclose(start, logits_of(plain.group, plain.task, plain.data["train"]), atol=1e-4)
    losses = [row["loss"] for row in live.train(4)]
    assert losses[-1] < losses[0] or task != "causal-lm"
    wanted = logits_of(live.group, live.task, live.data["train"])
    assert not torch.allclose(wanted, start, atol=1e-3)
    save_adapter(live.group, live.group.members[0], tmp_path / "adapter")
    again = load_adapter(live.task.load(live.runtime.device), live.config, tmp_path / "adapter")
    assert torch.allclose(logits_of(again, live.task, live.data["train"]), wanted, atol=1e-4)
    assert not any("_peft_loraga_grad" in vars(m) for m in live.group.model.modules())


def test_the_file_of_lora_ga_is_for_the_original_weights(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    live = live_of("lora-ga", tiny_model("llama"), tmp_path)
    live.train(4)
    save_adapter(live.group, live.group.members[0], tmp_path / "adapter")
    model: Any = PeftModel.from_pretrained(plain_base(live), str(tmp_path / "adapter")).eval()
    (batch,) = batches(live, 1)
    batch.pop("labels")
    with live.group.evaluating(live.group.members[0]) as own, torch.no_grad():
        assert torch.allclose(model(**batch).logits, own(**batch).logits, atol=1e-4)


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
def test_the_same_start_again(init: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    one, two = (live_of(init, tiny_model("llama"), tmp_path) for _ in range(2))
    for name, tensor in one.group.members[0].tensors.items():
        assert torch.equal(tensor, two.group.members[0].tensors[name]), name


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
def test_members_can_not_share_it(init: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    live = live_of("default", tiny_model("llama"), tmp_path)
    adapter = live.config.adapter.model_copy(update={"init": init})
    members = [MemberSpec("a", 0, 1e-2), MemberSpec("b", 1, 1e-2)]
    with pytest.raises(ConfigError, match=f"adapter.init: {init} .*, so members can't share it"):
        assemble(live.config.model_copy(update={"adapter": adapter}), members)
