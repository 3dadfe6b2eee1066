"""Source to target: rows, loss against plain transformers, generation metrics, and a run from end to end."""

import json
import logging
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from comparing import changed
from rouge_score.rouge_scorer import RougeScorer
from task_checks import pieces_agree, resumes_bitwise
from tiny import assemble, config, write_rows
from tiny_seq2seq import SEQ2SEQ, copy_rows, make_seq2seq
from transformers import AutoModelForSeq2SeqLM

from peft_engine.backbone import positions_of
from peft_engine.config import Config
from peft_engine.errors import ConfigError, DataError
from peft_engine.evaluation import evaluate_split
from peft_engine.run import train
from peft_engine.tasks import make_task
from peft_engine.tasks.text_metrics import text_scores
from peft_engine.using import evaluate, export, generate, predict

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return cache(lambda family: make_seq2seq(family, tmp_path_factory.mktemp("seq2seq") / family))


def settings_of(model: Path, folder: Path, /, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Config:
    source = write_rows(folder / "rows.jsonl", copy_rows(48) if rows is None else rows)
    training = {"steps": 12, "batch_size": 7, "learning_rate": 1e-2, **sections.pop("training", {})}
    adapter = {"rank": 4, "dropout": 0.0, **sections.pop("adapter", {})}
    return config("seq2seq", model, source, folder / "out", training=training, adapter=adapter, **sections)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_loss_and_gradients_are_those_of_plain_transformers(family: str, models: Models, tmp_path: Path) -> None:
    """With all weights, in fp64, on rows of uneven source and target."""
    settings = changed(settings_of(models(family), tmp_path), kernels="off", adapter={"method": "full"})
    run = assemble(settings)
    run.group.model.double().eval()
    plain = AutoModelForSeq2SeqLM.from_pretrained(models(family), dtype=torch.float64).eval()
    rows = np.arange(6)
    batch = run.task.collate(run.data["train"], rows)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2
    assert len(set((batch["labels"] != -100).sum(1).tolist())) > 2
    units = int(run.data["train"].units[rows].sum())
    assert units == int((batch["labels"] != -100).sum())
    if family == "bert2bert":  # its own loss warns and needs the decoder's input as well
        batch["decoder_input_ids"] = plain.prepare_decoder_input_ids_from_labels(batch["labels"])
    output = plain(**batch)
    logits = run.task.forward(run.group.model, batch)
    torch.testing.assert_close(logits, output.logits, rtol=1e-9, atol=1e-11)
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    assert float((exact / units).detach()) == pytest.approx(float(output.loss.detach()), rel=1e-10)
    assert float(run.task.loss(logits.detach(), batch)) == pytest.approx(float(exact.detach()), rel=1e-6)
    (exact / units).backward()
    output.loss.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in run.group.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_fused_is_plain(family: str, models: Models, tmp_path: Path) -> None:
    """Loss curve of a LoRA run with and without the fused kernels, dropout 0."""
    fused = assemble(settings_of(models(family), tmp_path))
    plain = assemble(changed(fused.config, kernels="off"))
    assert fused.group.fused is not None
    assert {op.split(",")[0] for op in fused.group.fused.swapped.values()} >= {"lora_linear", "activation"}
    for one, two in zip(fused.train(6), plain.train(6), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_pieces_of_a_batch_give_one_gradient(family: str, models: Models, tmp_path: Path) -> None:
    pieces_agree(settings_of(models(family), tmp_path, adapter={"dropout": 0.2}))


def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"steps": 9, "save_every": 3, "micro_batch_size": 3}
    settings = settings_of(models("t5"), tmp_path, training=training, adapter={"dropout": 0.2})
    resumes_bitwise(settings, 5, monkeypatch)


def test_a_row_is_source_then_target_with_its_end(models: Models, tmp_path: Path) -> None:
    settings = settings_of(models("t5"), tmp_path, data={"max_length": 5})
    task = make_task(settings)
    row = task.encode({"source": "the fox", "target": "old dog wall"}, "here")[0]
    words = task.processor.convert_ids_to_tokens(row.input_ids)
    assert words == ["the", "fox", "</s>", "old", "dog", "wall", "</s>"]
    assert row.columns == {"supervised": [False] * 3 + [True] * 4, "longest": 4}
    assert (row.units, row.truncated) == (4, False)
    cut = task.encode({"source": "the fox the fox the fox", "target": "a dog a dog a dog"}, "here")[0]
    source, target = cut.input_ids[:5], cut.input_ids[5:]
    assert cut.truncated
    assert source[-1] == task.processor.eos_token_id
    assert task.processor.eos_token_id not in target  # nothing learns to stop within a text
    assert len(target) == 5


@pytest.mark.parametrize("family", [*SEQ2SEQ[::2], *(pytest.param(f, marks=pytest.mark.slow) for f in SEQ2SEQ[1::2])])
def test_a_run_from_end_to_end(family: str, models: Models, tmp_path: Path) -> None:
    """The target is the source's first words, so that it can be learned by heart."""
    rows = [{"document": f"the {word} {i}", "summary": word} for i in range(10) for word in ("fox", "dog", "wall")]
    evaluation = {"generate_rows": 3, "max_new_tokens": 6, "batch_size": 2}
    training = {"steps": 70, "batch_size": 10, "learning_rate": 2e-2 if "t5" in family else 5e-3, "warmup": 0.1}
    adapter = {"rank": 8, "modules_to_save": ["lm_head"] if family == "t5_new" else []}
    settings = settings_of(models(family), tmp_path, rows, evaluation=evaluation, training=training, adapter=adapter)
    summary = train(settings)
    before, after = summary["metrics"]["before"], summary["metrics"]["after"]
    assert after["loss"] < 0.5 * before["loss"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert set(after) >= {"exact_match", "rouge1", "rouge2", "rouge_l", "bleu", "chrf", "token_accuracy"}
    assert after["token_accuracy"] > before["token_accuracy"]
    assert evaluate(tmp_path / "out")["metrics"] == after

    source = write_rows(tmp_path / "new.jsonl", [{"document": "the fox 3"}, {"document": "the wall 4"}])
    found = [one["predicted"] for one in predict(tmp_path / "out", str(source))]
    assert found == ["fox", "wall"]
    assert generate(tmp_path / "out", "the fox 3", max_new_tokens=6) == found[0]
    with pytest.raises(ConfigError, match="--system"):
        generate(tmp_path / "out", "the fox", system="Be brief.")
    beams = changed(settings, evaluation={**evaluation, "num_beams": 3})
    assert evaluate(tmp_path / "out", overrides=("evaluation.num_beams=3",))["metrics"]["exact_match"] >= 0
    assert beams.evaluation.num_beams == 3

    _, drift = export(tmp_path / "out")
    assert drift.top1_agreement > 0.99
    folder, drift = export(tmp_path / "out", merged=True)
    assert drift.top1_agreement > 0.99
    assert "AutoModelForSeq2SeqLM" in (folder / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "out" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "method"), [("t5", "full"), ("t5", "head"), ("bart", "full"), ("bart", "head"), ("bart", "bitfit")]
)
def test_methods_of_own_tensors_round_trip(family: str, method: str, models: Models, tmp_path: Path) -> None:
    settings = changed(settings_of(models(family), tmp_path), adapter={"method": method})
    summary = train(settings)
    assert summary["metrics"]["after"]["loss"] < summary["metrics"]["before"]["loss"]
    again = evaluate(tmp_path / "out")["metrics"]  # not fused, so other roundings
    assert again["loss"] == pytest.approx(summary["metrics"]["after"]["loss"], rel=1e-6)
    _, drift = export(tmp_path / "out", merged=True)
    assert drift.relative < 1e-4


def test_bf16_follows_fp32(models: Models, tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = assemble(settings_of(models("t5"), tmp_path, model={"dtype": dtype}, training={"learning_rate": 1e-3}))
        losses[dtype] = [row["loss"] for row in run.train(5)]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_metrics_do_not_depend_on_the_batch(models: Models, tmp_path: Path) -> None:
    run = assemble(settings_of(models("bart"), tmp_path))
    member = run.group.members[0]
    with run.group.evaluating(member) as model:
        one, four = (evaluate_split(model, run.task, run.data["train"], size, run.runtime) for size in (1, 4))
    assert one["tokens"] == four["tokens"] == int(run.data["train"].units.sum())
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
    assert one["token_accuracy"] == pytest.approx(four["token_accuracy"])


def test_generation_does_not_depend_on_the_batch(models: Models, tmp_path: Path) -> None:
    run = assemble(settings_of(models("bart"), tmp_path))
    examples = run.splits.train.examples[:5]
    settings = run.config.evaluation
    with run.group.evaluating(run.group.members[0]) as model:
        assert run.task.answers(model, examples, settings, 1) == run.task.answers(model, examples, settings, 4)


def test_scores_are_those_of_the_packages() -> None:
    wanted = ["the quick brown fox", "a dog sleeps by the river", "no"]
    found = ["the quick red fox", "a dog sleeps near a river", "no "]
    scores = text_scores(found, wanted)
    stripped = [text.strip() for text in found]
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["bleu"] == sacrebleu.corpus_bleu(stripped, [wanted]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(stripped, [wanted]).score
    scorer = RougeScorer(["rouge2"])
    mean = np.mean([scorer.score(w, f)["rouge2"].fmeasure for w, f in zip(wanted, stripped, strict=True)])
    assert scores["rouge2"] == pytest.approx(float(mean))
    assert scores["rouge1"] == pytest.approx((3 / 4 + 2 * (4 / 6) * (4 / 6) / (8 / 6) + 1) / 3)


def test_missing_packages_are_told_before_training(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_engine.tasks.text_metrics.find_spec", lambda name: None)
    make_task(settings_of(models("t5"), tmp_path))
    with pytest.raises(ConfigError, match="need rouge_score and sacrebleu") as caught:
        make_task(settings_of(models("t5"), tmp_path, evaluation={"generate_rows": 2}))
    assert "peft-engine[generation]" in str(caught.value)


def test_positions_count_each_side_alone(models: Models, tmp_path: Path) -> None:
    """100 tokens of source and as many of target fit 128 positions."""
    long = " ".join(["fox"] * 96)
    rows = [{"source": f"{long} {i % 10} {i // 10}", "target": f"{long} {i // 10}"} for i in range(20)]
    settings = settings_of(models("bart"), tmp_path, rows)
    run = assemble(settings)
    assert run.data["train"].longest < 128 < int(run.data["train"].lengths.max())
    with pytest.raises(ConfigError, match=r"the longest sequence has 1[34]. tokens, the model has 128 positions"):
        assemble(
            settings_of(models("bart"), tmp_path, [{**row, "source": f"{row['source']} {long[:130]}"} for row in rows])
        )
    assert positions_of(assemble(settings_of(models("bert2bert"), tmp_path)).group.backbone.model) == 128


def test_a_model_without_a_start_is_refused(models: Models, tmp_path: Path) -> None:
    folder = make_seq2seq("bert2bert", tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("decoder_start_token_id")
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="does not say how its decoder starts"):
        assemble(settings_of(folder, tmp_path))


def test_sources_that_are_cut_are_told(models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = assemble(settings_of(models("t5"), tmp_path, data={"max_length": 6}))
    with run.group.evaluating(run.group.members[0]) as model, caplog.at_level(logging.WARNING):
        run.task.generate(model, ["the fox", "the fox " * 5], 3)
    assert "1 of 2 sources were cut to data.max_length = 6 tokens" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "a", "target": ""}, "column 'target' is empty"),
        ({"question": "a", "answer": "b", "document": "c", "summary": "d"}, "could be read as"),
        ({"prompt": "a", "completion": "b"}, "no column for the source"),
    ],
)
def test_rows_that_cant_be_used(row: dict[str, Any], message: str, models: Models, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        assemble(settings_of(models("t5"), tmp_path, [row] * 5))
