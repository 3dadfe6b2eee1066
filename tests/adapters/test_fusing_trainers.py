"""A fused model inside transformers' `Trainer` and TRL's trainers: the same losses, files and outputs as unfused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from chat_samples import chatml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import pair_rows
from torch import nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import peft_engine
from peft_engine.adapters.fusing import fuses_loss

STEPS, WORDS, LENGTH = 10, 97, 11
CLOSE = {"rtol": 1e-5, "atol": 0.0}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def base(kind: str, words: int = WORDS) -> PreTrainedModel:
    """The same random model every time: "causal", "decoder" (a classifier) or "encoder" (another)."""
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": words, "pad_token_id": 0, "initializer_range": 0.1}
    if kind == "causal":
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))
    if kind == "decoder":
        return LlamaForSequenceClassification(LlamaConfig(**shape, num_key_value_heads=2, num_labels=3))
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**shape, **dropout, num_labels=3))


def adapted(kind: str, p: float = 0.0, words: int = WORDS) -> PeftModel:
    task = "CAUSAL_LM" if kind == "causal" else "SEQ_CLS"
    model = base(kind, words)
    torch.manual_seed(1)
    settings = LoraConfig(
        task_type=task, r=4, lora_alpha=8, lora_dropout=p, target_modules="all-linear", init_lora_weights=False
    )
    return get_peft_model(model, settings)


def rows(kind: str, count: int = 24) -> Dataset:
    """Rows of one length, with a column that no forward takes. Decoders' first tokens are not supervised."""
    generator = np.random.default_rng(3)
    found = []
    for number in range(count):
        ids = generator.integers(1, WORDS, LENGTH).tolist()
        real = LENGTH - number % 4
        labels = [-100, -100, *ids[2:real], *[-100] * (LENGTH - real)] if kind == "causal" else number % 3
        mask = [1] * real + [0] * (LENGTH - real)
        ids = ids[:real] + [0] * (LENGTH - real)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "note": f"row {number}"})
    return Dataset.from_list(found)


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **settings,
    }


def metrics(prediction: Any) -> dict[str, float]:
    """Of all logits, and of the right ones."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    hits = float((logits.argmax(-1) == prediction.label_ids).mean())
    return {"mean": float(logits.mean()), "spread": float(logits.std()), "hits": hits}


def trainer_of(model: nn.Module, kind: str, folder: Path, cls: type[Trainer] = Trainer, **settings: Any) -> Trainer:
    return cls(
        model=model,
        args=TrainingArguments(**arguments(folder, **settings)),
        train_dataset=rows(kind),
        eval_dataset=rows(kind, 8),
        compute_metrics=metrics,
    )


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """By the largest of them: a logit near zero is a sum of terms that are not, and has their rounding."""
    assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def losses(trainer: Trainer, key: str = "loss") -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def logits(model: nn.Module, words: int = WORDS) -> torch.Tensor:
    model.eval()
    ids = torch.randint(1, words, (3, 7), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", ["causal", "decoder", "encoder"])
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1}], ids=str)
def test_trainer_logs_the_same_losses(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    plain, fused = adapted(kind), adapted(kind)
    report = peft_engine.fuse(fused)
    assert report.counts()["linear_cross_entropy" if kind == "causal" else "lora_linear"] >= 1
    run, wanted = (
        trainer_of(m, kind, tmp_path, eval_strategy="steps", eval_steps=5, **settings) for m in (fused, plain)
    )
    run.train()
    wanted.train()
    assert run._signature_columns == wanted._signature_columns
    assert {"input_ids", "attention_mask", "labels"} <= set(run._signature_columns)
    assert len(losses(run)) == STEPS
    assert max(losses(wanted)) > 1.02 * min(losses(wanted))  # it learns, so that equal losses say something
    assert_close(losses(run), losses(wanted), **CLOSE)
    assert_close(losses(run, "grad_norm"), losses(wanted, "grad_norm"), rtol=1e-4, atol=0)
    for key in ("eval_loss", "eval_mean", "eval_spread", "eval_hits"):
        assert len(losses(run, key)) == 2
        assert_close(losses(run, key), losses(wanted, key), rtol=1e-4, atol=1e-6)


class Gradients(TrainerCallback):
    """All gradients of every step, before the optimizer takes them."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_bf16_is_as_near_to_fp32_as_unfused(kind: str, tmp_path: Path) -> None:
    """Oracle: the fp32 run. Nothing moves (rate 0), so that every step shows rounding and not where rounding led."""
    found = {}
    for name, fused, bf16 in (("fused", True, True), ("plain", False, True), ("truth", False, False)):
        model, gradients = adapted(kind), Gradients()
        if fused:
            peft_engine.fuse(model)
        run = trainer_of(model, kind, tmp_path, bf16=bf16, learning_rate=0.0, max_steps=4)
        run.add_callback(gradients)
        run.train()
        found[name] = torch.tensor(losses(run)), torch.stack(gradients.found)
    # a loss is one number, right or wrong by luck; there are thousands of gradients
    off = {name: (found[name][1] - found["truth"][1]).norm().item() for name in ("fused", "plain")}
    assert 0 < off["fused"] <= 1.1 * off["plain"], off
    assert_close(found["fused"][0], found["truth"][0], rtol=2**-8, atol=0)  # bf16's rounding


def test_masks_are_replayed_under_checkpointing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted("causal", p=0.1)
        peft_engine.fuse(model)
        run = trainer_of(model, "causal", tmp_path, gradient_checkpointing=checkpointing)
        run.train()
        found.append(losses(run))
    assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_checkpoints_resume_and_reload_into_plain_peft(tmp_path: Path) -> None:
    def run(fused: bool, resume: bool) -> tuple[Trainer, PeftModel]:
        model = adapted("causal")
        if fused:
            peft_engine.fuse(model)
        trainer = trainer_of(model, "causal", tmp_path, save_strategy="steps", save_steps=5)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5") if resume else None)
        return trainer, model

    whole, model = run(True, False)
    again, resumed = run(True, True)  # starts at the first run's step 5
    assert losses(again) == losses(whole)
    whole.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(base("causal"), tmp_path / "saved")
    near(logits(model), logits(loaded))
    assert torch.equal(logits(resumed), logits(model))
    peft_engine.unfuse(model)
    assert torch.equal(logits(model), logits(loaded))
    # a fused run goes on unfused
    plain, _ = run(False, True)
    assert_close(losses(plain), losses(whole), **CLOSE)


def test_reference_logits_are_the_base_models() -> None:
    """As preference losses take them: adapters off, for one call without gradients, between two training calls."""
    model, plain = adapted("causal", p=0.1), base("causal")
    peft_engine.fuse(model)
    batch = three_rows()
    model.train()
    model(**batch).loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad(), model.disable_adapter():
        reference = model(**batch)
    with torch.no_grad():
        wanted = plain.train()(**batch)
    near(reference.logits, wanted.logits)
    assert_close(reference.loss, wanted.loss, **CLOSE)
    with model.disable_adapter():  # with gradients, though nothing takes one: the fused loss of the base model
        assert_close(model(**batch).loss, wanted.loss, **CLOSE)
    after = model(**batch)
    assert not torch.allclose(after.logits, wanted.logits, atol=1e-2)
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, before, rtol=0, atol=0)


def three_rows() -> dict[str, torch.Tensor]:
    return {k: v for k, v in rows("causal", 3).with_format("torch")[:].items() if k != "note"}


def outputs() -> tuple[Any, Any, PeftModel, PeftModel]:
    """A training call of one model fused, and of another that isn't."""
    fused, plain = adapted("causal"), adapted("causal")
    peft_engine.fuse(fused)
    return fused.train()(**three_rows()), plain.train()(**three_rows()), fused, plain


ASK: dict[str, Callable[[Any], torch.Tensor]] = {
    "attribute": lambda out: out.logits,
    "key": lambda out: out["logits"],
    "place": lambda out: out[1],
    "slice": lambda out: out[:2][1],
    "tuple": lambda out: out.to_tuple()[1],
    "copy": lambda out: copy.copy(out).logits,
    "get": lambda out: out.get("logits"),
}


@pytest.mark.parametrize("way", list(ASK))
def test_logits_asked_for_in_training_are_made(way: str) -> None:
    got, wanted, fused, plain = outputs()
    near(ASK[way](got), wanted.logits)
    assert ASK[way](got) is ASK[way](got)  # made once
    for out in (got, wanted):  # a second loss through the logits, beside the fused one
        (out.loss + ASK[way](out).logsumexp(-1).square().mean()).backward()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        if a.requires_grad:
            assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_outputs_have_the_usual_order() -> None:
    """`loss, logits = model(...)[:2]` is how much code reads them."""
    got, wanted, _, _ = outputs()
    assert list(got) == list(wanted)
    assert_close(got[0], wanted[0], **CLOSE)
    assert got["loss"] is got.loss is got[0]
    assert len(got) == len(wanted)


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_logits_survive_accelerate(mixed: str) -> None:
    """Accelerate builds the outputs anew to turn them into float32, and they are read outside of its autocast."""
    AcceleratorState._reset_state(reset_partial_state=True)
    found = []
    try:
        for fused in (True, False):
            model = adapted("causal").train()
            if fused:
                peft_engine.fuse(model)
            prepared = Accelerator(mixed_precision=mixed, cpu=True).prepare(model)
            out = prepared(**three_rows())
            out.logits.square().mean().backward()
            grads = [p.grad for p in model.parameters() if p.requires_grad]
            found.append((out.logits.detach(), out["loss"].detach(), torch.cat([g.flatten() for g in grads])))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert found[0][0].dtype == found[1][0].dtype == torch.float32
    for got, wanted in zip(*found, strict=True):
        far = (got - wanted).norm() / wanted.norm()
        assert far <= (2e-2 if mixed == "bf16" else 1e-5), far


class OwnLoss(Trainer):
    """A loss computed from the logits, labels given to the model all the same: usual in people's own trainers."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        out = model(**inputs)
        targets = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        return nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), label_smoothing=0.2)


def test_a_loss_of_ones_own_from_logits(tmp_path: Path) -> None:
    fused, plain = adapted("causal"), adapted("causal")
    peft_engine.fuse(fused)
    run, wanted = (trainer_of(m, "causal", tmp_path, cls=OwnLoss) for m in (fused, plain))
    run.train(), wanted.train()
    assert_close(losses(run), losses(wanted), **CLOSE)


def test_a_hook_on_the_head_sees_real_logits() -> None:
    """Put there after fusing, as to record logits: then the head has to run."""
    _, wanted, fused, plain = outputs()
    seen: list[torch.Tensor] = []
    for model in (fused, plain):
        model.get_output_embeddings().register_forward_hook(lambda m, x, y: seen.append(y.detach()))
        again = model(**three_rows())
        assert_close(again.loss, wanted.loss, **CLOSE)
    near(seen[0], seen[1])


# --- TRL

TOKENIZER = chatml(pad_token="<|endoftext|>")
SIZE = len(TOKENIZER)


def sft(model: nn.Module, folder: Path, **settings: Any) -> trl.SFTTrainer:
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(folder, max_length=24, bf16=False, gradient_checkpointing=False) | settings),
        train_dataset=Dataset.from_list(pair_rows(16)),
        eval_dataset=Dataset.from_list(pair_rows(4)),
        processing_class=TOKENIZER,
    )


def slow(**settings: Any) -> Any:
    return pytest.param(settings, marks=pytest.mark.slow)


SFT_KEYS = ("loss", "entropy", "mean_token_accuracy", "eval_loss", "eval_entropy", "eval_mean_token_accuracy")


@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor:FutureWarning")
@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": True}, slow(label_smoothing_factor=0.1), slow(packing=True)], ids=str
)
def test_sft_trainer_logs_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 5, **settings}
    plain = sft(adapted("causal", words=SIZE), tmp_path, **settings)
    plain.train()
    for when in ("before", "after"):
        model = adapted("causal", words=SIZE)
        report = peft_engine.fuse(model) if when == "before" else None
        run = sft(model, tmp_path, **settings)
        if report is None:
            report = peft_engine.fuse(model)
            assert "TRL" in report.skipped["base_model.model"]
            assert "linear_cross_entropy" not in report.counts()
            assert not fuses_loss(model)
        assert report.counts()["lora_linear, shared input"] == 10
        run.train()
        for key in SFT_KEYS:
            assert len(losses(run, key)) == len(losses(plain, key)) > 0, key
            rtol = 1e-4 if "eval" in key else 1e-5
            assert_close(losses(run, key), losses(plain, key), rtol=rtol, atol=0)


def test_unfuse_after_trl_patched_a_fused_model(tmp_path: Path) -> None:
    """TRL keeps the forward that it found, a fused one, and calls it for everything but its own loss."""
    model, plain = adapted("causal", words=SIZE), adapted("causal", words=SIZE)
    peft_engine.fuse(model)
    sft(model, tmp_path)
    wanted = logits(plain, SIZE)
    near(logits(model, SIZE), wanted)
    peft_engine.unfuse(model)
    assert_close(logits(model, SIZE), wanted, rtol=0, atol=0)
    peft_engine.fuse(model)
    near(logits(model, SIZE), wanted)


def test_sft_adapters_reload_into_plain_peft(tmp_path: Path) -> None:
    model = adapted("causal", words=SIZE)
    run = sft(model, tmp_path, save_strategy="steps", save_steps=5)
    peft_engine.fuse(model)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(base("causal", SIZE), tmp_path / "saved")
    near(logits(loaded, SIZE), logits(model, SIZE))
    resumed = adapted("causal", words=SIZE)
    peft_engine.fuse(resumed)
    again = sft(resumed, tmp_path, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_close(losses(again), losses(run), **CLOSE)


def test_dpo_trainer_logs_the_same(tmp_path: Path) -> None:
    """Its reference is the policy without adapters."""
    pairs = [{"prompt": p, "chosen": c, "rejected": c[::-1]} for p, c in map(dict.values, pair_rows(8))]
    found = []
    for fused in (False, True):
        model = adapted("causal", words=SIZE)
        if fused:
            peft_engine.fuse(model)
        settings = arguments(tmp_path, max_steps=4, max_length=32, bf16=False, gradient_checkpointing=False)
        run = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(**settings),
            train_dataset=Dataset.from_list(pairs),
            processing_class=TOKENIZER,
        )
        run.train()
        found.append({key: losses(run, key) for key in ("loss", "rewards/margins", "logps/chosen")})
    assert all(found[0].values())
    assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
