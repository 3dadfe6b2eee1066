"""Packed training computes what unpacked training computes: per sample, per gradient, per run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chat_samples import chatml
from comparing import changed, outcome, small
from families import make, routed
from tiny import Assembled, assemble, pair_rows, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from peft_engine.config import Config
from peft_engine.data.packing import Packs
from peft_engine.errors import ConfigError, OutOfMemory
from peft_engine.run import train
from peft_engine.tasks.base import Batch
from peft_engine.tasks.causal_lm import IGNORED, CausalLM
from peft_engine.training.step import gradients

TINY = ("llama", "gpt2", "qwen2")
WINDOWED = ("mistral", "gemma3")  # a window of 4 tokens; gemma3 has layers with and without


@pytest.fixture(scope="session")
def folder_of(tiny_model, tmp_path_factory):
    """family → model folder, of `tiny` or of `families`."""

    def made(family: str) -> Path:
        if family in TINY:
            return tiny_model(family)
        folder = tmp_path_factory.mktemp("families") / family
        tokenizer = chatml(pad_token="<|endoftext|>")
        ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        make(family, vocab_size=len(tokenizer), max_position_embeddings=128, **ids).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return made


def packed(settings: Config, name: str = "packed", **new: Any) -> Config:
    output = str(Path(settings.output).parent / name)
    return changed(settings, **{"output": output, "data__packing": True, "data__pack_tokens": 96, **new})


def losses(settings: Config) -> list[float]:
    rows = [json.loads(line) for line in (Path(settings.output) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def per_sample(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss of a sequence's targets, (sequences,)."""
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return each.sum(1)


def token_losses(made: Assembled, batch: Batch) -> Tensor:
    """Loss at every position that is a target, else 0, (rows, length)."""
    with torch.no_grad():
        logits = made.task.forward(made.group.model, batch)
    each = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return F.pad(each, (1, 0))


def grads_of(made: Assembled, pieces: list[Any]) -> tuple[Tensor, list[Tensor]]:
    tensors = list(made.group.members[0].tensors.values())
    for tensor in tensors:
        tensor.grad = None
    found = gradients(made.group, made.task, made.data["train"], pieces, 7, tensors, made.runtime, 0)
    return found.loss, [tensor.grad.clone() for tensor in tensors if tensor.grad is not None]


def stirred(settings: Config) -> Assembled:
    """A run at step 0 whose B is not zero, so that every tensor has a gradient."""
    made = assemble(settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in made.group.members[0].tensors.values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    made.group.model.train()
    return made


@pytest.mark.parametrize("kernels", ["torch", "off"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*TINY, *WINDOWED])
def test_the_same_loss_of_every_sample_and_the_same_gradients(folder_of, tmp_path, family, attention, kernels):
    settings = changed(small(folder_of(family), tmp_path), adapter__dropout=0.0, model__attention=attention)
    made = stirred(packed(settings).model_copy(update={"kernels": kernels}))
    assert made.group.backbone.model.config._attn_implementation == attention
    data, rows = made.data["train"], np.arange(9)
    packs = made.trainees[0].plan.packing.packs(rows, data.lengths)
    assert min(map(len, packs)) > 1, "every pack holds several samples"
    piece = Packs(tuple(packs))
    together = token_losses(made, made.task.collate_packs(data, piece))
    for line, pack in enumerate(packs):
        start = 0
        for row in pack:
            alone = token_losses(made, made.task.collate(data, np.array([row])))[0]
            assert alone.count_nonzero() == data.units[row]
            inside = together[line, start : start + len(alone)]
            torch.testing.assert_close(inside, alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(inside.sum(), alone.sum(), rtol=1e-5, atol=1e-5)
            start += len(alone)
        assert not together[line, start:].any()
    loss, wanted = grads_of(made, [rows[:4], rows[4:]])
    for pieces in ([piece], [Packs((pack,)) for pack in packs]):
        again, found = grads_of(made, pieces)
        torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("family", TINY)
def test_noise_on_embeddings_is_a_samples_own_in_a_pack_too(folder_of, tmp_path, family):
    made = {}
    for alpha in (15.0, None):
        given = changed(small(folder_of(family), tmp_path), adapter__dropout=0.0, training__neftune_alpha=alpha)
        run = stirred(packed(given))
        rows = np.arange(9)
        packs = run.trainees[0].plan.packing.packs(rows, run.data["train"].lengths)
        assert min(map(len, packs)) > 1
        made[alpha] = [grads_of(run, pieces) for pieces in ([rows[:4], rows[4:]], [Packs(tuple(packs))])]
    (loss, wanted), (again, found) = made[15.0]
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert abs(float(made[None][0][0]) - float(loss)) > 1e-4 * float(loss), "the noise is felt"


@pytest.mark.parametrize("family", TINY)
def test_samples_of_a_pack_against_plain_transformers(folder_of, tmp_path, family):
    """The model as transformers loads it, one sample at a time, in float64."""
    settings = packed(changed(small(folder_of(family), tmp_path), adapter__dropout=0.0))
    made = assemble(settings)
    data = made.data["train"]
    pack = made.trainees[0].plan.packing.packs(np.arange(9), data.lengths)[0]
    oracle = AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float64).eval()
    found = token_losses(made, made.task.collate_packs(data, Packs((pack,))))[0]
    start = 0
    for row in pack:
        ids = torch.from_numpy(data.tokens(int(row)).astype(np.int64))
        labels = ids.masked_fill(~torch.from_numpy(data.token_column("supervised", int(row)).astype(bool)), IGNORED)
        with torch.no_grad():
            wanted = per_sample(oracle(ids[None]).logits, labels[None])
        length = len(ids)
        torch.testing.assert_close(found[start : start + length].double().sum(), wanted[0], rtol=1e-5, atol=1e-5)
        start += length


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_balance_loss_of_experts_depends_on_the_cut_and_is_left_out(tmp_path, family, capsys):
    base = changed(small(routed(family, tmp_path / "model"), tmp_path, steps=2, batch_size=8), adapter__dropout=0.0)
    runs = [changed(base, training__micro_batch_size=n, output=str(tmp_path / f"cut{n}")) for n in (8, 3)]
    runs += [changed(runs[0], output=str(tmp_path / "off")).model_copy(update={"kernels": "off"}), packed(runs[0])]
    summaries = [train(run) for run in runs]
    first, *others = map(losses, runs)
    for found in others:
        assert found == pytest.approx(first, rel=1e-6)
    assert "router weights are frozen" in summaries[0]["decisions"]["balance_loss"]
    assert "balance loss" in " ".join(capsys.readouterr().err.split())
    row = assemble(runs[0])
    loading = {"dtype": torch.float64, "experts_implementation": "eager"}
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **loading).eval()
    total = units = 0.0
    for i in row.trainees[0].plan.rows(1):
        ids = torch.from_numpy(row.data["train"].tokens(int(i)).astype(np.int64))
        taught = torch.from_numpy(row.data["train"].token_column("supervised", int(i)).astype(bool))
        with torch.no_grad():
            total += float(per_sample(oracle(ids[None]).logits, ids.masked_fill(~taught, IGNORED)[None])[0])
        units += int(taught.sum())
    assert first[0] == pytest.approx(total / units, rel=1e-5), "the loss of the tokens alone"


def test_routers_that_train_without_their_balance_loss_are_told(tmp_path, capsys):
    base = small(routed("mixtral", tmp_path / "model"), tmp_path, steps=2)
    told = train(changed(base, adapter={"method": "full"}))["decisions"]["balance_loss"]
    assert "tensors of routers train" in told
    assert "training.frozen" in " ".join(capsys.readouterr().err.split())
    frozen = changed(base, adapter={"method": "full"}, training__frozen=[r"\.gate\."], output=str(tmp_path / "frozen"))
    assert "router weights are frozen" in train(frozen)["decisions"]["balance_loss"]


def test_a_first_token_is_never_a_target(folder_of, tmp_path):
    """Even where the data says so: it would be predicted from another sample's last token."""
    made = assemble(packed(small(folder_of("llama"), tmp_path)))
    data = made.data["train"]
    data.columns["supervised"][:] = True
    batch = made.task.collate_packs(data, Packs((np.array([3, 1, 2]), np.array([0]))))
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == IGNORED).all()
    lengths = data.lengths[[3, 1, 2]]
    assert starts[0].nonzero().flatten().tolist()[:3] == [0, lengths[0], lengths[:2].sum()]
    assert int((batch["labels"] != IGNORED).sum()) == int(data.lengths[:4].sum()) - 4
    assert "attention_mask" not in batch


@pytest.mark.parametrize(("family", "kernels"), [("llama", "off"), ("gpt2", "auto"), ("mistral", "auto")])
def test_a_whole_run_has_the_same_curve(folder_of, tmp_path, family, kernels):
    base = small(folder_of(family), tmp_path, batch_size=6, micro_batch_size="auto")
    settings = changed(base, adapter__dropout=0.0).model_copy(update={"kernels": kernels})
    plain = train(settings)
    found = train(packed(settings).model_copy(update={"kernels": kernels}))
    assert losses(packed(settings)) == pytest.approx(losses(settings), rel=1e-5)
    assert found["tokens"] == plain["tokens"]
    assert found["metrics"]["after"]["loss"] == pytest.approx(plain["metrics"]["after"]["loss"], rel=1e-5)
    told = found["packing"]
    assert told["samples_per_pack"] > 1
    assert told["padding_share"] < told["padding_share_unpacked"]
    assert plain["packing"] is None


def test_checkpointing_replays_the_same_masks(folder_of, tmp_path):
    settings = packed(small(folder_of("llama"), tmp_path, steps=4))
    again = packed(settings, "again", training__gradient_checkpointing=True)
    train(settings)
    train(again)
    assert losses(again) == losses(settings)


def test_dropout_does_not_depend_on_the_cut(folder_of, tmp_path):
    """Packs are named by their rows; how many stand in a batch changes nothing."""
    base = small(folder_of("llama"), tmp_path, batch_size=8, steps=4)
    runs = [packed(base, f"{n}", training__micro_batch_size=n, data__pack_tokens=40) for n in (8, 3, 1)]
    for each in runs:
        train(each)
    for each in runs[1:]:
        assert losses(each) == pytest.approx(losses(runs[0]), rel=1e-5)
    other = packed(base, "other", training__seed=1, data__pack_tokens=40)
    train(other)
    assert losses(other) != pytest.approx(losses(runs[0]), rel=1e-3)


def test_memory_that_runs_out_makes_smaller_batches_of_the_same_packs(folder_of, tmp_path, monkeypatch):
    """Trap 24, packed: the same losses, dropout included; a single pack that does not fit is the end."""
    base = small(folder_of("llama"), tmp_path, batch_size=8, steps=4, micro_batch_size="auto")
    roomy = packed(base, "roomy", data__pack_tokens=40)
    train(roomy)
    whole = CausalLM.training_loss

    def starve(most: int) -> None:
        def starved(self: CausalLM, model: torch.nn.Module, batch: Batch) -> Tensor:
            if batch["input_ids"].numel() > most:
                raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
            return whole(self, model, batch)

        monkeypatch.setattr(CausalLM, "training_loss", starved)

    starve(80)  # the longest sample has 65 tokens
    starved = packed(base, "starved", data__pack_tokens=40)
    assert train(starved)["micro_batch_size"] < 4
    assert losses(starved) == pytest.approx(losses(roomy), rel=1e-5)
    starve(0)
    with pytest.raises(OutOfMemory, match=r"in packs of up to 40 tokens") as caught:
        train(packed(base, "none", data__pack_tokens=40))
    assert "data.pack_tokens" in caught.value.fix


def test_resume_is_bitwise(folder_of, tmp_path, monkeypatch):
    from comparing import Crash, crash_at

    base = small(folder_of("llama"), tmp_path, steps=6)
    whole, cut = packed(base, "whole"), packed(base, "cut")
    train(whole)
    with monkeypatch.context() as patched:
        crash_at(patched, 4)
        with pytest.raises(Crash):
            train(cut)
    train(cut, resume=True)
    assert outcome(cut.output) == outcome(whole.output)


@pytest.mark.parametrize("method", ["bitfit", "full", "head"])
def test_other_methods(folder_of, tmp_path, method):
    base = small(folder_of("gpt2"), tmp_path, steps=3)
    tree = base.model_dump(mode="json", exclude_unset=True) | {"adapter": {"method": method}}
    settings = Config.model_validate(tree)
    train(settings)
    train(packed(settings))
    assert losses(packed(settings)) == pytest.approx(losses(settings), rel=1e-5)


def test_attention_is_what_was_asked_for_or_refused(folder_of, tmp_path):
    settings = small(folder_of("llama"), tmp_path, steps=1)
    with pytest.raises(ConfigError, match="flash_attention_2 needs CUDA and the package flash-attn; the device is cpu"):
        train(changed(settings, model__attention="flash_attention_2", device="auto"))
    made = assemble(changed(settings, model__attention="eager"))
    assert made.group.backbone.model.config._attn_implementation == "eager"
    gemma = changed(small(folder_of("gemma2"), tmp_path, steps=1), model__attention="sdpa")
    with pytest.raises(ConfigError, match=r"model.attention: .*gemma2 can't run with sdpa"):
        train(gemma)


def test_settings_that_do_not_go_together(tmp_path):
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(4))
    base = small(tmp_path / "model", tmp_path)
    for new, words in (
        ({"data__pack_tokens": 64}, "data.pack_tokens: has no effect without data.packing"),
        ({"model__attention": "flash_attention_2"}, "runs on CUDA only, and device is cpu"),
        ({"model__attention": "flash_attention_2", "device": "cuda", "training__precision": "fp32"}, "16 bits"),
    ):
        with pytest.raises(ValueError, match=words):
            changed(base, **new)
    tree = {"task": "text-classification", "model": {"path": "m"}, "output": "o"}
    tree["data"] = {"train": str(rows), "packing": True}
    with pytest.raises(ValueError, match="applies to task causal-lm only"):
        Config.model_validate(tree)
