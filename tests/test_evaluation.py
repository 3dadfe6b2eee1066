"""Metrics against computations of their own, and independent of how the split is cut into batches."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import classification_report
from tiny import DECODERS, assemble, chat_rows, class_rows, config, make_model, pair_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_engine.data.labels import Labels
from peft_engine.evaluation import evaluate_split, predict_rows
from peft_engine.generation import generate_text, stop_ids
from peft_engine.tasks.class_metrics import ClassMeter
from peft_engine.tasks.text_classification import TextClassification

LM, CLASSES = "causal-lm", "text-classification"


def measured(kind: str, names: list[str], logits: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """What the meter says when it gets the rows in uneven batches."""
    task = TextClassification.__new__(TextClassification)  # the loss and the labels are all that the meter asks for
    task.labels = Labels(kind, names)
    meter = ClassMeter(task)
    for rows in np.split(np.arange(len(wanted)), [1, 8, 9, 30]):
        label = torch.from_numpy(wanted[rows])
        batch = {"label": label if kind == "single" else label.float()}
        meter.update(torch.from_numpy(logits[rows]).float(), batch)
    return meter.compute()


def test_single_label_metrics() -> None:
    rng = np.random.default_rng(0)
    names = ["a", "b", "c", "never"]
    wanted = rng.integers(0, 3, 50)  # `never` stands in no row
    logits = rng.normal(size=(50, 4)) + 1.5 * np.eye(4)[wanted]
    predicted = logits.argmax(1)
    found = measured("single", names, logits, wanted)

    table = np.array([[np.sum((wanted == i) & (predicted == j)) for j in range(4)] for i in range(4)])
    assert found["confusion"] == table.tolist()
    assert found["accuracy"] == pytest.approx(np.trace(table) / 50)
    assert found["rows"] == 50
    report = classification_report(
        wanted, predicted, labels=range(4), target_names=names, output_dict=True, zero_division=0
    )
    for name in names:
        own = {"precision": report[name]["precision"], "recall": report[name]["recall"], "f1": report[name]["f1-score"]}
        assert found["per_class"][name] == pytest.approx(own | {"rows": report[name]["support"]})
    recalls = [table[i, i] / max(1, table[i].sum()) for i in range(4)]
    precisions = [table[i, i] / max(1, table[:, i].sum()) for i in range(4)]
    f1s = [2 * table[i, i] / max(1, table[i].sum() + table[:, i].sum()) for i in range(4)]
    assert found["recall_macro"] == pytest.approx(np.mean(recalls))
    assert found["precision_macro"] == pytest.approx(np.mean(precisions))
    assert found["f1_macro"] == pytest.approx(np.mean(f1s))
    assert found["f1_micro"] == pytest.approx(found["accuracy"])
    # Matthews' coefficient is the correlation of the one-hot tables (Gorodkin 2004)
    one_hot, one_hot_found = np.eye(4)[wanted], np.eye(4)[predicted]

    def covariance(x: np.ndarray, y: np.ndarray) -> float:
        return float(((x - x.mean(0)) * (y - y.mean(0))).sum())

    norm = math.sqrt(covariance(one_hot, one_hot) * covariance(one_hot_found, one_hot_found))
    assert found["mcc"] == pytest.approx(covariance(one_hot, one_hot_found) / norm)
    losses = np.log(np.exp(logits).sum(1)) - logits[range(50), wanted]
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_multi_label_metrics() -> None:
    rng = np.random.default_rng(1)
    wanted = (rng.random((40, 3)) < 0.4).astype(np.int64)
    logits = rng.normal(size=(40, 3)) + 1.2 * (2 * wanted - 1)
    predicted = (logits > 0).astype(int)
    found = measured("multi", ["a", "b", "c"], logits, wanted)
    assert found["accuracy"] == pytest.approx(np.mean((predicted == wanted).all(1)))
    right = (predicted & wanted).sum()
    assert found["precision_micro"] == pytest.approx(right / predicted.sum())
    assert found["recall_micro"] == pytest.approx(right / wanted.sum())
    assert found["f1_micro"] == pytest.approx(2 * right / (predicted.sum() + wanted.sum()))
    f1s = 2 * (predicted & wanted).sum(0) / (predicted.sum(0) + wanted.sum(0))
    assert found["f1_macro"] == pytest.approx(f1s.mean())
    assert [found["per_class"][name]["f1"] for name in "abc"] == pytest.approx(f1s.tolist())
    losses = -(wanted * np.log(1 / (1 + np.exp(-logits))) + (1 - wanted) * np.log(1 / (1 + np.exp(logits))))
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_regression_metrics() -> None:
    rng = np.random.default_rng(2)
    wanted = rng.normal(size=40)
    values = 0.7 * wanted + 0.5 * rng.normal(size=40)
    found = measured("regression", [], values[:, None], wanted)
    assert found["pearson"] == pytest.approx(np.corrcoef(values, wanted)[0, 1], rel=1e-5)
    ranks = stats.rankdata(values), stats.rankdata(wanted)
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-5)
    assert found["mean_squared_error"] == pytest.approx(np.mean((values - wanted) ** 2), rel=1e-5)
    assert found["mean_absolute_error"] == pytest.approx(np.mean(np.abs(values - wanted)), rel=1e-5)
    assert found["loss"] == pytest.approx(np.mean((values - wanted) ** 2), rel=1e-5)
    constant = measured("regression", [], np.ones((40, 1)), wanted)
    assert constant["pearson"] == constant["spearman"] == 0.0  # undefined: nothing was correlated


ACCENTED = [" café", " 漢字", " naïve œuvre", " 🙂 ok", " plain", " ½ litre"]


@pytest.mark.parametrize("family", DECODERS)
def test_perplexity_and_bits_per_byte_by_hand(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"the {i} fox →", "completion": ACCENTED[i % 6] + " cat" * (i % 4)} for i in range(12)]
    path = tiny_model(family)
    run = assemble(
        config(LM, path, write_rows(tmp_path / "r.jsonl", rows), tmp_path / "out", data=unsplit(), adapter=plain())
    )
    with run.group.evaluating(run.group.members[0]) as model:
        found = evaluate_split(model, run.task, run.data["train"], 5, run.runtime)

    tokenizer, plain_model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    nats, right, tokens, text_bytes = 0.0, 0, 0, 0
    for row in rows:
        start = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
        with torch.no_grad():
            logits = plain_model(torch.tensor([start + answer])).logits[0].double()
        for place, token in enumerate(answer, len(start)):
            scores = logits[place - 1]
            nats += float(scores.logsumexp(0) - scores[token])
            right += int(scores.argmax() == token)
        tokens += len(answer)
        text_bytes += len(row["completion"].encode())  # the stop token stands for no text
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    assert found["token_accuracy"] == pytest.approx(right / tokens)


def unsplit() -> dict[str, Any]:
    return {"split": {"eval": 0.0, "test": 0.0}}


def plain() -> dict[str, Any]:
    """An adapter that changes nothing yet."""
    return {"rank": 2, "dropout": 0.1}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "llama-classes", "gpt2-classes"])
def test_evaluation_does_not_depend_on_the_batch_size(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Padding must not enter: not as attention, not as positions, not as the pooled token."""
    task = LM if family in DECODERS else CLASSES
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(14) if task == LM else class_rows(14, ("a", "b", "c")))
    settings = config(task, tiny_model(family.split("-")[0]), rows, tmp_path / "out", data=unsplit(), adapter=plain())
    run = assemble(settings)
    run.train(2)
    with run.group.evaluating(run.group.members[0]) as model:
        alone, some, together = (
            evaluate_split(model, run.task, run.data["train"], size, run.runtime) for size in (1, 3, 14)
        )
    for other in (some, together):
        assert other.keys() == alone.keys()
        for name, value in alone.items():
            if isinstance(value, float | int):
                assert other[name] == pytest.approx(value, rel=1e-5), name
            else:
                assert other[name] == value, name


def test_a_decoder_without_a_padding_token_classifies(tmp_path: Path) -> None:
    """GPT-2 and Llama as they are published: transformers would refuse batches, or pool the padding."""
    path = make_model("gpt2", tmp_path / "model")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"pad_token_id": None}))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(path).pad_token_id is None
    rows = write_rows(tmp_path / "rows.jsonl", class_rows(14))
    run = assemble(config(CLASSES, path, rows, tmp_path / "out", data=unsplit(), adapter=plain()))
    with run.group.evaluating(run.group.members[0]) as model:
        alone, together = (evaluate_split(model, run.task, run.data["train"], size, run.runtime) for size in (1, 14))
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)


PROMPTS = ["the", "seven grey cats watch from", "a", "lazy dog while the river and an old wall near"]


@pytest.mark.parametrize("family", DECODERS)
def test_generation_in_a_batch_equals_one_by_one(family: str, tmp_path: Path) -> None:
    """Padded on the left, by position: absolute (gpt2) and rotary positions alike; and greedy by hand, unpadded."""
    path = make_model(family, tmp_path / "model", dropout=0.1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    together = generate_text(model, tokenizer, PROMPTS, 12, templated=False)
    alone = [generate_text(model, tokenizer, [prompt], 12, templated=False)[0] for prompt in PROMPTS]
    assert together == alone
    assert len(set(together)) > 1
    for prompt, text in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        for _ in range(12):
            with torch.no_grad():
                new = model(ids).logits[0, -1].argmax()
            if int(new) in (stop_ids(model, tokenizer) or []):
                break
            ids = torch.cat([ids, new.reshape(1, 1)], 1)
        start = len(tokenizer(prompt)["input_ids"])
        assert text == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_generation_stops_at_the_end_of_a_turn(tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop in (stop_ids(model, tokenizer) or [])
    always = torch.zeros(model.config.vocab_size)
    always[stop] = 99.0
    model.lm_head.bias = torch.nn.Parameter(always)
    assert generate_text(model, tokenizer, PROMPTS, 12, templated=False) == [""] * 4


def test_rows_are_predicted_in_their_order(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Evaluation takes long rows first; predictions must come back in the order of the file."""
    rows = write_rows(tmp_path / "rows.jsonl", class_rows(14, ("a", "b", "c")))
    run = assemble(config(CLASSES, tiny_model("bert"), rows, tmp_path / "out", data=unsplit(), adapter=plain()))
    run.train(2)
    data = run.data["train"]
    with run.group.evaluating(run.group.members[0]) as model:
        found = predict_rows(model, run.task, data, 4, run.runtime)
        for row, one in enumerate(found):
            with torch.no_grad():
                shares = run.task.forward(model, run.task.collate(data, np.array([row]))).softmax(-1)[0]
            assert list(one["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-6)
            assert one["predicted"] == "abc"[int(shares.argmax())]


def test_pairs_are_not_judged_on_their_prompts(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    rows = pair_rows(6)
    settings = config(
        LM,
        tiny_model("gpt2"),
        write_rows(tmp_path / "r.jsonl", rows),
        tmp_path / "out",
        data=unsplit(),
        adapter=plain(),
    )
    run = assemble(settings)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("gpt2"))
    counted = sum(len(tokenizer(row["completion"])["input_ids"]) + 1 for row in rows)
    with run.group.evaluating(run.group.members[0]) as model:
        assert evaluate_split(model, run.task, run.data["train"], 4, run.runtime)["tokens"] == counted
