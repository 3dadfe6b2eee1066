"""dpo, orpo, kto and reward: TRL's own losses on our fused model, our run directory round them."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import changed
from datasets import Dataset
from families import routed
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import config, sentence, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from peft_engine import session
from peft_engine.config import Config
from peft_engine.errors import BudgetReached, ConfigError, DataError
from peft_engine.run import train
from peft_engine.training.checkpoint import complete_checkpoints
from peft_engine.using import evaluate, export, generate, predict

Tiny = Callable[[str], Path]


def rows(task: str, count: int = 20) -> list[dict[str, Any]]:
    """Good answers repeat the prompt's words; bad ones are other words, of uneven length."""
    found: list[dict[str, Any]] = []
    for i in range(count):
        prompt, good, bad = sentence(i, 3), " " + sentence(i, 1 + i % 4), " " + sentence(i + 50, 2 + i % 3)
        if task == "kto":
            found.append({"prompt": prompt, "completion": good if i % 2 else bad, "label": bool(i % 2)})
        else:
            found.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return found


def settings(task: str, model: Path, folder: Path, **changes: Any) -> Config:
    training = {"steps": 4, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01, "save_every": 2}
    return config(
        task,
        model,
        write_rows(folder / f"{task}.jsonl", rows(task)),
        folder / "run",
        adapter={"rank": 4, "dropout": 0.1},
        data={"split": {"eval": 0.2, "test": 0.0}, "max_length": 64, **changes.pop("data", {})},
        training=training | {"schedule": "constant", "warmup": 0.0} | changes.pop("training", {}),
        **changes,
    )


def metrics(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["dpo", "orpo", "kto", "reward"])
def test_a_run_learns_the_preference_and_is_used(task: str, tiny_model: Tiny, tmp_path: Path) -> None:
    run = settings(task, tiny_model("llama"), tmp_path, training={"steps": 8})
    summary = train(run)
    losses = [row["loss"] for row in metrics(run.output) if "loss" in row]
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    primary = {"kto": "rewards/margins", "reward": "accuracy"}.get(task, "rewards/accuracies")
    assert summary["metrics"]["primary"] == primary
    assert {primary, "loss"} <= set(summary["metrics"]["before"]) & set(summary["metrics"]["after"])
    assert summary["steps"] == 8
    assert summary["peak_bytes"] > 0
    assert summary["tokens"] > 0
    assert summary["kernels"]["backend"] == "torch"
    assert summary["kernels"]["swapped"]["lora_linear"] > 0
    assert "trl" in summary["decisions"]["trainer"]
    assert "off" in summary["decisions"]["dropout"]  # TRL's default; the adapter's own dropout does not run
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    whole = sum(p.numel() for p in base.parameters())
    if task != "reward":
        assert summary["total_parameters"] == whole + summary["trainable_parameters"]
    assert not list((Path(run.output)).rglob("*.pt"))
    assert not list((Path(run.output)).rglob("*.bin"))
    folder, drift = export(run.output)
    assert drift.relative < 1e-3
    assert (folder / "adapter_model.safetensors").is_file()
    if task == "reward":
        texts = [{"text": row["prompt"] + row[side]} for row in rows(task, 4) for side in ("chosen", "rejected")]
        scores = [row["predicted"] for row in predict(run.output, str(write_rows(tmp_path / "t.jsonl", texts)))]
        assert sum(good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)) >= 3
    else:
        assert isinstance(generate(run.output, sentence(1, 3), max_new_tokens=4), str)
        with pytest.raises(ConfigError, match=r"run\.json"):
            evaluate(run.output, "eval")


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_resume_gives_the_bits_of_an_undisturbed_run(task: str, tiny_model: Tiny, tmp_path: Path) -> None:
    run = settings(task, tiny_model("llama"), tmp_path, training={"steps": 6, "eval_every": 3})
    train(run)
    broken = run.model_copy(update={"output": str(tmp_path / "broken")})
    spent = broken.model_copy(update={"budget": broken.budget.model_copy(update={"max_hours": 1e-9})})
    for step in (1, 2):  # stops after each step that it is let do
        with pytest.raises(BudgetReached):
            train(spent, resume=step > 1)
        assert complete_checkpoints(tmp_path / "broken" / "checkpoints")[-1].name == f"step-{step}"
    train(broken, resume=True)
    files = [load_file(Path(r.output) / "adapter" / "adapter_model.safetensors") for r in (run, broken)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    for one, other in zip(metrics(run.output), metrics(broken.output), strict=True):
        assert one.get("loss") == other.get("loss")
        assert one["step"] == other["step"]


def test_losses_are_trls_own_on_a_plain_peft_model(tiny_model: Tiny, tmp_path: Path) -> None:
    """The oracle: TRL's DPOTrainer on plain peft from the same start, torch's AdamW, the same seed."""
    run = settings("dpo", tiny_model("llama"), tmp_path, data={"split": {"eval": 0.0, "test": 0.0}})
    train(run)
    start = settings("dpo", tiny_model("llama"), tmp_path / "start", data={"split": {"eval": 0.0, "test": 0.0}})
    start = start.model_copy(
        update={"training": start.training.model_copy(update={"steps": 1, "learning_rate": 1e-30})}
    )
    train(start)  # its adapter is the start of the other run
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, target_modules=linear, task_type="CAUSAL_LM"))
    tensors = load_file(Path(start.output) / "adapter" / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data.copy_(tensors[name.replace(".default.", ".")])
    arguments = DPOConfig(
        output_dir=str(tmp_path / "plain"),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_length=64,
        seed=0,
        data_seed=0,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        optim="adamw_torch",
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows("dpo")), processing_class=tokenizer
    )
    trainer.train()
    expected = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    found = [row["loss"] for row in metrics(run.output) if "loss" in row]
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]


STARTS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 4, "targets": ["embed_tokens", "q_proj"], "dropout": 0.0},
    {"method": "ia3"},
    {"method": "vera", "dropout": 0.0},
    {"method": "oft"},
    {"method": "lora", "rank": 4, "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("task", ["dpo", "kto"])
@pytest.mark.parametrize("adapter", STARTS, ids=["embedding", "ia3", "vera", "oft", "head"])
def test_the_reference_is_the_start(task: str, adapter: dict[str, Any], tiny_model: Tiny, tmp_path: Path) -> None:
    """A warm start far from the base: at step 0 the trained model and the reference are one."""
    good = [{"text": row["prompt"] + row["chosen"]} for row in rows("dpo", 12)]
    made = {"steps": 6, "batch_size": 4, "learning_rate": 0.05}
    first = config("causal-lm", tiny_model("llama"), write_rows(tmp_path / "sft.jsonl", good), tmp_path / "sft",
                   adapter=adapter, training=made, data={"split": {"eval": 0.0, "test": 0.0}})  # fmt: skip
    train(first)
    run = settings(task, tiny_model("llama"), tmp_path, training={"steps": 1}, data={"split": {"eval": 0.4}})
    run = changed(run, adapter={**adapter, "start_from": first.output})
    before = train(run)["metrics"]["before"]
    assert before["loss"] == pytest.approx(math.log(2) if task == "dpo" else 0.5, abs=1e-6)
    assert before["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_moves_the_frozen_weights_is_made_once(init: str, tiny_model: Tiny, tmp_path: Path) -> None:
    run = settings("dpo", tiny_model("llama"), tmp_path, training={"steps": 1})
    summary = train(changed(run, adapter={"rank": 4, "dropout": 0.0, "init": init}))
    assert summary["metrics"]["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    _, drift = export(run.output)
    assert drift.relative < 1e-3


def test_a_reward_run_scores_answers(tiny_model: Tiny, tmp_path: Path) -> None:
    """predict's scores are those of the pairs that training reports; prompts alone are refused."""
    run = settings("reward", tiny_model("llama"), tmp_path, training={"steps": 6})
    after = train(changed(run, data__split={"eval": 0.0, "test": 0.0}))["metrics"]["after"]
    pairs = [{"prompt": row["prompt"], "completion": row[side]} for row in rows("reward")
             for side in ("chosen", "rejected")]  # fmt: skip
    scores = [row["predicted"] for row in predict(run.output, str(write_rows(tmp_path / "p.jsonl", pairs)))]
    texts = [{"text": row["prompt"] + row["completion"]} for row in pairs]
    same = [row["predicted"] for row in predict(run.output, str(write_rows(tmp_path / "t.jsonl", texts)))]
    assert scores == pytest.approx(same, abs=1e-6)
    won = [good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]
    assert sum(won) / len(won) == pytest.approx(after["accuracy"], abs=1e-6)
    with pytest.raises(DataError, match="completion"):
        predict(run.output, str(write_rows(tmp_path / "raw.jsonl", rows("reward"))))


def test_kto_needs_good_and_bad_answers(tiny_model: Tiny, tmp_path: Path) -> None:
    run = settings("kto", tiny_model("llama"), tmp_path)
    write_rows(Path(str(run.data.train)), [{**row, "label": True} for row in rows("kto")])
    with pytest.raises(DataError, match="of the train split have the label true"):
        train(run)


def test_a_reward_backbone_without_an_end_token(tiny_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no end-of-text token"):
        train(settings("reward", tiny_model("bert"), tmp_path))


@pytest.mark.parametrize(
    ("task", "new", "words"),
    [
        ("dpo", {"adapter": {"method": "prefix"}}, "virtual tokens"),
        ("reward", {"adapter": {"method": "lora", "init": "lora-ga"}}, "take eva"),
        ("kto", {"adapter": {"method": "full", "start_from": "runs/first"}}, "export that run with --merged"),
        ("reward", {"preference": {"beta": 0.3}}, "preference.beta: applies to tasks dpo, orpo, kto only"),
        ("orpo", {"adapter": {"method": "adalora"}}, "does not move after each step"),
        ("kto", {"data__clean": {"contradictory": "drop"}}, "set it to keep"),
        ("orpo", {"data__group_by_length": True}, "data.group_by_length: applies to tasks"),
    ],
)
def test_what_trl_would_silently_leave_out(task: str, new: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        changed(settings(task, tmp_path / "model", tmp_path), **new)


@pytest.mark.parametrize("task", ["dpo", "orpo", "kto", "reward"])
def test_metrics_do_not_depend_on_the_size_of_batches(task: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """12 rows in batches of 1, 5 and 12; KTO's with one-sided batches. The losses of KTO and ORPO are of a batch."""
    found = []
    for size in (1, 5, 12):
        run = settings(task, tiny_model("llama"), tmp_path / str(size), training={"steps": 3})
        made = rows(task, 24)
        if task == "kto":
            made.sort(key=lambda row: row["label"])
        held = write_rows(tmp_path / f"{task}-{size}.jsonl", made[6:18])
        write_rows(Path(str(run.data.train)), made[:6] + made[18:])
        run = changed(run, data__eval=str(held), evaluation={"batch_size": size})
        found.append(train(run)["metrics"]["after"])
    counted = {name for name in found[0] if "rewards" in name or "logps" in name or name in ("accuracy", "margin")}
    assert counted
    if task in ("dpo", "reward"):
        counted.add("loss")
    for other in found[1:]:
        for name in counted:
            assert other[name] == pytest.approx(found[0][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("task", "row", "error", "words"),
    [
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}, DataError, "no preference to learn"),
        ("dpo", {"prompt": "a", "chosen": "b"}, DataError, "rejected"),
        ("kto", {"prompt": "a", "completion": "b", "label": "maybe"}, DataError, "expected true"),
    ],
)
def test_rows_that_hold_no_preference(
    task: str, row: dict[str, Any], error: type[Exception], words: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    run = settings(task, tiny_model("llama"), tmp_path)
    write_rows(Path(str(run.data.train)), [row] * 3)
    with pytest.raises(error, match=words):
        train(run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preference": {"options": {"beta": 0.2}}}, "preference.beta"),
        ({"preference": {"options": {"bta": 0.2}}}, "no such field"),
        ({"preference": {"options": {"activation_checkpointing": True}}}, "Set training.gradient_checkpointing"),
        ({"training": {"batch_size": 4, "micro_batch_size": 3}}, "does not divide"),
        ({"preference": {"options": {"loss_type": "nonsense"}}}, "TRL refuses"),
        ({"training": {"restore_best": True}}, "restore_best"),
    ],
)
def test_settings_that_do_not_go_are_told(change: dict[str, Any], words: str, tiny_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        train(settings("dpo", tiny_model("llama"), tmp_path, **change))


@pytest.mark.parametrize("task", ["dpo", "orpo", "kto", "reward"])
def test_layers_are_checkpointed_as_set(
    task: str, tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL checkpoints all by default, and all again after its reference. A checkpointed layer runs twice in a step."""
    build, runs, told, losses = session.build_group, {}, [], []

    def count(chosen: Any, name: str, *_: Any) -> None:
        if torch.is_grad_enabled():
            runs[chosen][name] = runs[chosen].get(name, 0) + 1

    def counted(chosen: Any, *given: Any, **more: Any) -> Any:
        group = build(*given, **more)
        for name, module in group.model.named_modules():
            if name.endswith(".mlp"):
                module.register_forward_pre_hook(partial(count, chosen, name[-5:]))
        return group

    for chosen in ("no", 2, "all"):
        runs[chosen] = {}
        monkeypatch.setattr(session, "build_group", partial(counted, chosen))
        training = {"steps": 3, "gradient_checkpointing": {"no": False, "all": True}.get(chosen, chosen)}
        run = settings(task, tiny_model("llama"), tmp_path / str(chosen), training=training)
        told.append(train(run)["decisions"].get("gradient_checkpointing"))
        losses.append([row["loss"] for row in metrics(run.output) if "loss" in row])
    once = runs["no"]["0.mlp"]
    assert once > 0
    assert runs["no"] == {"0.mlp": once, "1.mlp": once}
    assert runs[2] == {"0.mlp": 2 * once, "1.mlp": once}
    assert runs["all"] == {"0.mlp": 2 * once, "1.mlp": 2 * once}
    assert told == [None, "1 of 2 layers", "all 2 layers"]
    assert losses[0] == losses[1] == losses[2]


def test_the_balance_loss_of_experts_is_left_out(tmp_path: Path) -> None:
    """TRL adds it, micro-batch by micro-batch, whatever the model's config says."""
    run = changed(settings("dpo", routed("mixtral", tmp_path / "model"), tmp_path), adapter__dropout=0.0)
    summary = train(changed(run, training__steps=2))
    first = next(row["loss"] for row in metrics(run.output) if "loss" in row)
    assert first == pytest.approx(math.log(2), abs=1e-5), "the policy is its own reference still"
    assert "router weights are frozen" in summary["decisions"]["balance_loss"]
    with pytest.raises(ConfigError, match="router_aux_loss_coef"):
        train(changed(run, preference={"options": {"router_aux_loss_coef": 0.1}}, output=str(tmp_path / "refused")))
