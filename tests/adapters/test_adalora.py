"""AdaLoRA in the engine's loop against peft's own recipe, written out plainly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from tiny import Assembled, assemble, config, logits_of, pair_rows, write_rows
from transformers import AutoModelForCausalLM

from peft_engine.adapters.files import load_adapter, save_adapter
from peft_engine.config import Config
from peft_engine.errors import ConfigError
from peft_engine.training.checkpoint import load_checkpoint, save_checkpoint
from peft_engine.training.optim import make_schedule

STEPS, RATE = 8, 2e-2
PHASES = {"tinit": 1, "tfinal": 2, "deltaT": 2, "orth_reg_weight": 0.3}


def settings_of(tiny_model: Callable[[str], Path], folder: Path, **more: Any) -> Config:
    rows = write_rows(folder / "rows.jsonl", pair_rows(12))
    adapter = {"method": "adalora", "rank": 2, "alpha": 6, "dropout": 0.0, "options": PHASES}
    training = {"steps": STEPS, "batch_size": 4, "warmup": 0.0, "learning_rate": RATE, "max_grad_norm": None}
    return config(
        "causal-lm", tiny_model("llama"), rows, folder / "out",
        adapter=adapter, data={"split": {"eval": 0.0, "test": 0.0}}, training=training | more.pop("training", {}), **more,
    )  # fmt: skip


def plain_run(live: Assembled) -> tuple[Any, list[float]]:
    """peft's documented loop: the model's own loss (which has the term in it), a step, `update_and_allocate`."""
    settings = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=live.group.model.peft_config["default"].target_modules,
        target_r=2, init_r=3, lora_alpha=6, lora_dropout=0.0, total_step=STEPS, **PHASES,
    )  # fmt: skip
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(live.config.model.path), settings)
    start = {name: p.detach().clone() for name, p in live.group.members[0].tensors.items()}
    tensors = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert tensors.keys() == start.keys()
    with torch.no_grad():
        for name, p in tensors.items():
            p.copy_(start[name])
    optimizer = torch.optim.AdamW(tensors.values(), lr=RATE, weight_decay=0.0)
    factor = make_schedule("cosine", 0.0, STEPS)
    losses = []
    for step in range(1, STEPS + 1):
        batch = live.task.collate(live.data["train"], live.trainees[0].plan.rows(step))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        loss = model(**inputs).loss
        loss.backward()
        optimizer.param_groups[0]["lr"] = RATE * factor(step)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(float(loss))
    return model, losses


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("micro", [4, 3])
def test_the_engines_loop_is_pefts_own(
    kernels: str, micro: int, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = settings_of(tiny_model, tmp_path, training={"micro_batch_size": micro, "schedule": "cosine"})
    live = assemble(settings.model_copy(update={"kernels": kernels}))
    model, losses = plain_run(live)
    rows = live.train(STEPS)
    assert np.allclose([row["loss"] for row in rows], losses, rtol=2e-5)
    wanted = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in live.group.members[0].tensors.items():
        assert torch.allclose(tensor, wanted[name], atol=2e-4), name
    ours, theirs = (m.peft_config["default"].rank_pattern for m in (live.group.model, model))
    assert ours == theirs
    assert any(not all(kept) for kept in ours.values()), "no rank was taken away: the schedule did nothing"


def test_ranks_taken_away_come_back_so(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    live = assemble(settings_of(tiny_model, tmp_path))
    live.train(STEPS)
    wanted = logits_of(live.group, live.task, live.data["train"])
    save_adapter(live.group, live.group.members[0], tmp_path / "adapter")
    fresh = assemble(live.config)
    again = load_adapter(fresh.task.load(live.runtime.device), live.config, tmp_path / "adapter")
    held = sum(t.numel() for t in again.members[0].tensors.values())
    assert held < sum(t.numel() for t in live.group.members[0].tensors.values())
    assert torch.allclose(logits_of(again, live.task, live.data["train"]), wanted, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(live.config.model.path)
    plain: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    fresh.group.model = plain.eval()
    assert plain.peft_config["default"].orth_reg_weight == PHASES["orth_reg_weight"]
    assert plain.peft_config["default"].total_step == STEPS
    batch = live.task.collate(live.data["train"], np.arange(5))
    with torch.no_grad():
        assert torch.allclose(live.task.forward(plain, batch), wanted, atol=1e-5)


def test_weights_of_an_earlier_step_are_not_cut(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """restore_best puts weights back from before the last ranks were taken away."""
    live = assemble(settings_of(tiny_model, tmp_path))
    early: dict[str, torch.Tensor] = {}

    def evaluate(member: Any) -> dict[str, Any]:
        early.update({n: t.detach().clone() for n, t in member.tensors.items()} if not early else {})
        return {"loss": 1.0}

    settings = live.config.training.model_copy(update={"eval_every": 1})
    live.config = live.config.model_copy(update={"training": settings})
    live.train(STEPS, evaluate)
    with torch.no_grad():
        for name, tensor in live.group.members[0].tensors.items():
            tensor.copy_(early[name])
    wanted = logits_of(live.group, live.task, live.data["train"])
    save_adapter(live.group, live.group.members[0], tmp_path / "adapter")
    fresh = assemble(live.config)
    again = load_adapter(fresh.task.load(live.runtime.device), live.config, tmp_path / "adapter")
    assert live.group.model.peft_config["default"].rank_pattern is None
    assert torch.allclose(logits_of(again, live.task, live.data["train"]), wanted, atol=1e-5)


def test_resume_is_bitwise(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    whole = assemble(settings_of(tiny_model, tmp_path))
    saved: list[Path] = []
    advance = whole.group.after_step

    def and_save(member: Any, step: int) -> None:
        advance(member, step)
        if step == 6:  # the trainee's own step is 5 until the loop has counted this one
            whole.trainees[0].step = step
            saved.append(save_checkpoint(tmp_path / "checkpoints", step, whole.trainees, {}, 2))

    whole.group.after_step = and_save  # type: ignore[method-assign]
    whole.train(STEPS)
    later = assemble(whole.config)
    load_checkpoint(saved[0], later.trainees)
    later.train(STEPS)
    for name, tensor in whole.group.members[0].tensors.items():
        assert torch.equal(tensor, later.group.members[0].tensors[name]), name
    ours, theirs = (live.group.model.peft_config["default"].rank_pattern for live in (whole, later))
    assert ours == theirs


def test_phases_that_do_not_fit_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    live = assemble(settings_of(tiny_model, tmp_path))
    with pytest.raises(ConfigError, match="peft refuses adalora for 3 steps: The supplied schedule values"):
        live.train(3)


def test_members_can_not_share_a_backbone(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from peft_engine.adapters.group import MemberSpec

    with pytest.raises(ConfigError, match="peft refuses adalora here: AdaLoraModel supports only 1 trainable adapter"):
        assemble(settings_of(tiny_model, tmp_path), [MemberSpec("a", 0, RATE), MemberSpec("b", 1, RATE)])
