"""NEFTune against the paper's formula (Jain et al. 2023, algorithm 1), and as a function of (seed, step, row)."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import changed, small
from task_checks import resumes_bitwise
from tiny import assemble, class_rows, config, make_model, write_rows
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from peft_engine.adapters.neftune import Neftune, Sample, noise_like, packed_samples, padded_samples
from peft_engine.config import Config
from peft_engine.errors import ConfigError
from peft_engine.run import train
from peft_engine.training.step import sample_seeds


def losses(settings: Config) -> list[float]:
    rows = [json.loads(line) for line in (Path(settings.output) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("alpha", [5.0, 0.3])
def test_the_noise_is_that_of_the_paper(alpha):
    """Per sample: uniform in ±alpha/sqrt(L·d), so of variance alpha²/(3·L·d); nothing on padding."""
    width, lengths = 64, [200, 37, 3]
    mask = torch.tensor([[1] * n + [0] * (200 - n) for n in lengths])
    samples = padded_samples(mask, torch.tensor([11, -12, 13]))
    noise = noise_like(torch.zeros(3, 200, width, dtype=torch.float64), samples, alpha)
    assert noise.dtype == torch.float64
    for line, length in enumerate(lengths):
        own, bound = noise[line, :length], alpha / math.sqrt(length * width)
        assert not noise[line, length:].any()
        assert own.abs().max() <= bound * (1 + 1e-6)
        assert own.abs().max() > 0.95 * bound
        count = own.numel()
        assert abs(own.mean()) < 5 * bound / math.sqrt(3 * count)
        assert own.var().item() == pytest.approx(bound**2 / 3, rel=5 / math.sqrt(count))
        shares = torch.histc(own / bound, 4, -1, 1) / count
        assert (shares - 0.25).abs().max() < 3 / math.sqrt(count)


def test_a_samples_noise_is_its_own():
    """Neither padding, nor neighbours, nor its place changes it; another seed does."""
    wide = noise_like(torch.zeros(2, 9, 8), [Sample(0, 0, 5, 1), Sample(1, 0, 9, 2)], 5.0)
    narrow = noise_like(torch.zeros(1, 5, 8), [Sample(0, 0, 5, 1)], 5.0)
    packed = noise_like(torch.zeros(1, 20, 8), packed_samples([[9, 5]], [[2, 1]]), 5.0)
    assert torch.equal(wide[0, :5], narrow[0])
    assert torch.equal(packed[0, 9:14], narrow[0])
    assert torch.equal(packed[0, :9], wide[1])
    assert not packed[0, 14:].any()
    assert not torch.equal(noise_like(torch.zeros(1, 5, 8), [Sample(0, 0, 5, 3)], 5.0)[0], narrow[0])


def test_texts_of_one_row_have_noise_of_their_own():
    mask = torch.tensor([[[1, 1, 0], [1, 1, 0]], [[1, 1, 1], [0, 0, 0]]])  # (rows, choices, length)
    samples = padded_samples(mask, torch.tensor([7, 70]))
    assert [(s.line, s.length) for s in samples] == [(0, 2), (1, 2), (2, 3)]
    noise = noise_like(torch.zeros(4, 3, 8), samples, 5.0)
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_the_model_sees(family, tiny_model, tmp_path):
    """The hook adds exactly the named noise to what the embedding module gives, in training only, and goes again."""
    task = "text-classification" if family == "bert" else "causal-lm"
    rows = class_rows(12) if family == "bert" else [{"text": row["text"]} for row in class_rows(12)]
    settings = config(
        task, tiny_model(family), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run",
        training={"neftune_alpha": 5.0, "steps": 1, "batch_size": 4}, data={"split": {"eval": 0.2, "test": 0.0}},
    )  # fmt: skip
    run = assemble(settings)
    embeddings = run.group.backbone.model.get_input_embeddings()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = embeddings.register_forward_hook(lambda module, given, out: seen.append((given[0], out.detach().clone())))
    model = run.group.model
    order = np.array([3, 1, 0])
    batch = run.task.collate(run.data["train"], order)
    seeds = sample_seeds(99, order)
    noise = run.group.noise
    assert noise is not None
    with noise.during(batch["input_ids"], padded_samples(batch["attention_mask"], seeds)):
        run.task.training_loss(model.train(), batch)
    run.task.training_loss(model, batch)
    (_, before), (_, clean) = seen  # the noise's hook came later, so it runs after ours
    assert torch.equal(before, clean)
    handle.remove()
    seen.clear()
    with noise.during(batch["input_ids"], padded_samples(batch["attention_mask"], seeds)):
        embeddings.register_forward_hook(lambda module, given, out: seen.append((given[0], out.detach().clone())))
        run.task.training_loss(model, batch)
    lengths = run.data["train"].lengths[order]
    expected = noise_like(clean, [Sample(i, 0, int(n), int(s)) for i, (n, s) in enumerate(zip(lengths, seeds))], 5.0)  # noqa: B905
    assert torch.equal(seen[0][1], clean + expected)
    seen.clear()
    with run.group.evaluating(run.group.members[0]) as judged, torch.no_grad():
        run.task.forward(judged, batch)
    assert torch.equal(seen[0][1], clean)


@pytest.mark.parametrize(("kernels", "checkpointing"), [("auto", False), ("off", True)])
def test_a_run_does_not_depend_on_the_cut(kernels, checkpointing, tiny_model, tmp_path):
    """1, 2 or 5 rows at once, fused or not, replayed or not: the same losses; without noise they are others."""
    settings = small(tiny_model("llama"), tmp_path, steps=4, batch_size=5, micro_batch_size=5, neftune_alpha=5.0)
    settings = changed(settings, adapter__dropout=0.0, training__gradient_checkpointing=checkpointing)
    for size in (5, 2, 1):
        train(changed(settings, output=str(tmp_path / str(size)), training__micro_batch_size=size, kernels=kernels))
    reference = losses(changed(settings, output=str(tmp_path / "5")))
    for size in (2, 1):
        assert losses(changed(settings, output=str(tmp_path / str(size)))) == pytest.approx(reference, rel=1e-5)
    plain = changed(settings, output=str(tmp_path / "plain"), training__neftune_alpha=None, kernels=kernels)
    train(plain)
    assert losses(plain) != pytest.approx(reference, rel=1e-3)
    if kernels == "off":
        fused = changed(settings, output=str(tmp_path / "fused"))
        train(fused)
        assert losses(fused) == pytest.approx(reference, rel=1e-4)


def test_resume_gives_the_same_bits(tiny_model, tmp_path, monkeypatch):
    whole = small(tiny_model("llama"), tmp_path, neftune_alpha=5.0)
    resumes_bitwise(whole, 5, monkeypatch)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_encoder_of_a_pair_gets_it_and_the_decoder_does_not(family):
    """Both share one table of embeddings; T5 also one module."""
    sizes = {"vocab_size": 40, "d_model": 16}
    if family == "t5":
        model = T5ForConditionalGeneration(T5Config(**sizes, d_kv=4, d_ff=32, num_layers=1, num_heads=4))
    else:
        ends = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        model = BartForConditionalGeneration(BartConfig(**sizes, **ends, encoder_ffn_dim=32, decoder_ffn_dim=32))
    model.eval()
    ids, targets = torch.arange(3, 11).view(2, 4), torch.arange(12, 20).view(2, 4)
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == 40]
    noise = Neftune(model, 5.0)
    samples = padded_samples(torch.ones_like(ids), torch.tensor([1, 2]))

    def embedded(noisy: bool) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        def keep(module: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            found["source" if torch.equal(given[0], ids) else "target"] = out.detach()

        with noise.during(ids, samples) if noisy else nullcontext():
            handles = [table.register_forward_hook(keep) for table in tables]  # after ours, so that they see it
            model(input_ids=ids, decoder_input_ids=targets)
        for handle in handles:
            handle.remove()
        return found

    clean, noisy = embedded(False), embedded(True)
    assert torch.equal(noisy["target"], clean["target"])
    assert torch.equal(noisy["source"], clean["source"] + noise_like(clean["source"], samples, 5.0))


def test_a_model_that_never_embeds_its_batch_is_told(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model("gpt2", tmp_path / "gpt2"))
    noise = Neftune(model, 5.0)
    ids = torch.ones(1, 4, dtype=torch.int64)
    with (
        pytest.raises(ConfigError, match="did not look up its batch"),
        noise.during(ids, [Sample(0, 0, 4, 1)]),
    ):
        model(input_ids=ids.clone())
    assert not model.get_input_embeddings()._forward_hooks


def test_a_task_without_tokens_refuses_it():
    with pytest.raises(ValueError, match=r"training.neftune_alpha: applies to tasks"):
        Config.model_validate({
            "task": "image-classification", "model": {"path": "m"}, "data": {"train": "d"}, "output": "o",
            "training": {"neftune_alpha": 5.0},
        })  # fmt: skip
