"""Tags of words: their alignment to sub-words, loss, metrics, and a run from end to end."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparing import changed
from seqeval.metrics import f1_score, precision_score, recall_score
from task_checks import pieces_agree, resumes_bitwise
from tiny import WORDS, assemble, config, cut, write_rows
from transformers import AutoModelForTokenClassification

from peft_engine.config import Config
from peft_engine.data.labels import Labels
from peft_engine.data.splitting import load_splits
from peft_engine.errors import ConfigError, DataError
from peft_engine.run import train
from peft_engine.tasks import make_task
from peft_engine.tasks.tag_metrics import TagMeter, entity_scores
from peft_engine.training.step import gradients
from peft_engine.using import evaluate, export, predict

Tiny = Callable[[str], Path]
TASK = "token-classification"
NAMES = {"fox": "B-ANIMAL", "dog": "B-ANIMAL", "cats": "B-ANIMAL", "river": "B-PLACE", "wall": "B-PLACE"}


def tagged_rows(count: int) -> list[dict[str, Any]]:
    """Rows of 2 to 12 words; a word before a name, "grey" or "old", may belong to the name."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(2 + i * 5 % 11)] + [f"x{i}"]
        rows.append({"tokens": words, "tags": [NAMES.get(word, "O") for word in words]})
    return rows


def settings_of(model: Path, folder: Path, /, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Config:
    source = write_rows(folder / "rows.jsonl", tagged_rows(48) if rows is None else rows)
    training = {"steps": 12, "batch_size": 7, "learning_rate": 1e-2, **sections.pop("training", {})}
    adapter = {"rank": 4, "dropout": 0.0, **sections.pop("adapter", {})}
    return config(TASK, model, source, folder / "out", training=training, adapter=adapter, **sections)


def test_the_first_sub_word_carries_the_tag(tiny_model: Tiny, tmp_path: Path) -> None:
    rows = [
        {"tokens": ["the", "foxy", "dog"], "tags": ["O", "B-A", "B-B"]},
        {"tokens": ["dog", "the"], "tags": ["B-B", None]},
        *tagged_rows(20),
    ]
    settings = settings_of(tiny_model("bert"), tmp_path, rows, data={"split": {"eval": 0.0, "test": 0.0}})
    run = assemble(settings)
    names = run.splits.labels.names
    assert names == sorted({"O", "B-A", "B-B", "B-ANIMAL", "B-PLACE"})
    data, tokenizer = run.data["train"], run.task.processor
    assert tokenizer.convert_ids_to_tokens(data.tokens(0)) == ["[CLS]", "the", "fox", "##y", "dog", "[SEP]"]
    tags = [names.index(tag) for tag in ("O", "B-A", "B-B")]
    assert data.token_column("tag", 0).tolist() == [-100, tags[0], tags[1], -100, tags[2], -100]
    assert data.token_column("word", 0).tolist() == [-1, 0, 1, -1, 2, -1]
    assert data.token_column("supervised", 0).tolist() == [False, True, True, False, True, False]
    assert data.units[:2].tolist() == [3, 1]
    batch = run.task.collate(data, np.array([1, 0]))
    assert batch["tag"][0].tolist() == [-100, tags[2], -100, -100, -100, -100]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_byte_level_tokenizers_read_words_as_in_running_text(family: str, tiny_model: Tiny, tmp_path: Path) -> None:
    settings = settings_of(tiny_model(family), tmp_path)
    task = make_task(settings, Labels("tags", ["O", "X"]))
    row = task.encode({"tokens": ["the", "quick", "fox"], "tags": ["O", "X", "O"]}, "here")[0]
    assert row.input_ids == task.processor("the quick fox")["input_ids"]
    assert [place for place in row.columns["word"] if place >= 0] == [0, 1, 2]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_loss_and_gradients_are_those_of_plain_transformers(family: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """Its own loss is the mean over words; in fp64."""
    adapter = {"method": "full"}
    source = write_rows(tmp_path / "rows.jsonl", tagged_rows(48))
    settings = config(TASK, tiny_model(family), source, tmp_path / "out", adapter=adapter)
    run = assemble(changed(settings, kernels="off"))
    run.group.model.double()
    plain = AutoModelForTokenClassification.from_pretrained(tiny_model(family), num_labels=3, dtype=torch.float64)
    plain.load_state_dict(run.group.model.state_dict())
    rows = np.arange(6)
    batch = run.task.collate(run.data["train"], rows)
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    expected = plain.eval()(**inputs, labels=batch["tag"]).loss
    units = int(run.data["train"].units[rows].sum())
    assert units == int((batch["tag"] != -100).sum())
    run.group.model.eval()  # GPT-2's head has a dropout of its own
    logits = run.task.forward(run.group.model, batch)
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["tag"].flatten(), reduction="sum") / units
    assert float(exact.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    loss = float(run.task.loss(logits.detach(), batch))
    assert loss / units == pytest.approx(float(expected.detach()), rel=1e-6)  # ours is fp32
    exact.backward()
    expected.backward()
    mine = dict(run.group.model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_pieces_of_a_batch_give_one_gradient(tiny_model: Tiny, tmp_path: Path) -> None:
    pieces_agree(settings_of(tiny_model("bert"), tmp_path, adapter={"dropout": 0.2}))


def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"steps": 9, "save_every": 3, "micro_batch_size": 3}
    resumes_bitwise(
        settings_of(tiny_model("bert"), tmp_path, training=training, adapter={"dropout": 0.2}), 5, monkeypatch
    )


def test_a_run_from_end_to_end(tiny_model: Tiny, tmp_path: Path) -> None:
    settings = settings_of(tiny_model("bert"), tmp_path, training={"steps": 60, "batch_size": 16})
    summary = train(settings)
    before, after = summary["metrics"]["before"], summary["metrics"]["after"]
    assert summary["metrics"]["primary"] == "f1"
    assert after["f1"] > 0.8 > before["f1"]
    assert after["accuracy"] > 0.9
    assert set(after["per_class"]) == {"O", "B-ANIMAL", "B-PLACE"}
    assert evaluate(tmp_path / "out")["metrics"] == after

    source = write_rows(tmp_path / "new.jsonl", [{"tokens": ["the", "fox", "near"]}, {"tokens": "an old river"}])
    found = predict(tmp_path / "out", str(source), tmp_path / "found.csv")
    assert [one["predicted"] for one in found] == [["O", "B-ANIMAL", "O"], ["O", "O", "B-PLACE"]]
    assert all(len(one["probabilities"]) == 3 and min(one["probabilities"]) > 1 / 3 for one in found)
    with (tmp_path / "found.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [json.loads(row["predicted"]) for row in written] == [one["predicted"] for one in found]
    assert [json.loads(row["probabilities"]) for row in written] == [one["probabilities"] for one in found]

    _, drift = export(tmp_path / "out")
    assert drift.top1_agreement == 1.0
    folder, drift = export(tmp_path / "out", merged=True)
    assert drift.top1_agreement == 1.0
    assert "AutoModelForTokenClassification" in (folder / "README.md").read_text()
    assert "num_labels=3" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    merged = AutoModelForTokenClassification.from_pretrained(folder)
    assert merged.config.id2label == {0: "B-ANIMAL", 1: "B-PLACE", 2: "O"}


def test_words_beyond_the_limit_are_told(tiny_model: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_of(tiny_model("bert"), tmp_path, data={"max_length": 8}, training={"steps": 2})
    summary = train(settings)
    truncated = summary["data"]["truncated"]
    assert truncated["train"] > 0
    splits = load_splits(settings)
    task = make_task(settings, splits.labels)
    kept = [task.encode(example, "")[0].columns["word"] for example in splits.test.examples]
    lost = sum(
        len(example["tokens"]) - sum(place >= 0 for place in places)
        for example, places in zip(splits.test.examples, kept, strict=True)
    )
    after = summary["metrics"]["after"]
    assert (after["words_lost"], after["words"]) == (lost, sum(len(e["tokens"]) for e in splits.test.examples) - lost)
    source = write_rows(tmp_path / "new.jsonl", [{"tokens": ["the"] * 9}, {"tokens": ["fox"]}])
    with caplog.at_level(logging.WARNING):
        found = predict(tmp_path / "out", str(source))
    assert [tag is None for tag in found[0]["predicted"]] == [False] * 6 + [True] * 3
    assert found[0]["probabilities"][6:] == [None] * 3
    assert "1 of 2 rows were cut to data.max_length = 8 tokens; words beyond it are predicted as null" in caplog.text


def test_entity_scores_are_those_of_seqeval() -> None:
    wanted = [["O", "B-PER", "I-PER", "O", "B-LOC"], ["B-LOC"], ["O", "O"]]
    found = [["O", "B-PER", "O", "O", "B-LOC"], ["B-LOC"], ["B-PER", "O"]]
    scores = entity_scores(wanted, found)
    assert scores["precision"] == precision_score(wanted, found) == 0.5
    assert scores["recall"] == recall_score(wanted, found) == 2 / 3
    assert scores["f1"] == f1_score(wanted, found)
    assert scores["per_entity"]["LOC"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "entities": 2}
    assert scores["per_entity"]["PER"]["f1"] == 0.0
    bilou = entity_scores([["B-A", "L-A", "U-A", "O"]], [["B-A", "L-A", "O", "U-A"]])
    assert (bilou["precision"], bilou["recall"]) == (0.5, 0.5)  # the long one, of two
    assert entity_scores([["O"]], [["O"]])["entities"] == 0


def test_the_meter_does_not_depend_on_batches_or_padding() -> None:
    class Scored:
        labels = Labels("tags", ["B-A", "O"])

        def loss(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["tag"].flatten(), reduction="sum")

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 2, generator=generator)
    tag = torch.randint(0, 2, (4, 6), generator=generator)
    tag[:, 0], tag[2, 3:], tag[3, 2:] = -100, -100, -100
    word = torch.where(tag == -100, -1, 0)
    batch = {"tag": tag, "word": word, "words": torch.tensor([5, 6, 2, 1])}
    one, two = TagMeter(Scored()), TagMeter(Scored())
    one.update(logits, batch)
    for part in (slice(0, 3), slice(3, 4)):
        two.update(logits[part], {name: tensor[part] for name, tensor in batch.items()})
    whole, parts = one.compute(), two.compute()
    assert parts.pop("loss") == pytest.approx(whole.pop("loss"), rel=1e-6)
    assert parts == whole
    right = (logits.argmax(-1) == tag)[tag != -100]
    assert whole["accuracy"] == pytest.approx(float(right.float().mean()))
    assert (whole["words"], whole["words_lost"]) == (13, 1)


def test_numbers_are_named_by_data_labels(tiny_model: Tiny, tmp_path: Path) -> None:
    order = ["O", "B-ANIMAL", "B-PLACE"]
    rows = [{"words": r["tokens"], "ner_tags": [order.index(tag) for tag in r["tags"]]} for r in tagged_rows(40)]
    named = settings_of(tiny_model("bert"), tmp_path, rows, data={"labels": order})
    labels = load_splits(named).labels
    assert labels is not None
    assert labels.names == order
    assert labels.encode_tags([2, "B-PLACE", None], "here") == [2, 2, -100]
    assert make_task(named, labels).primary == "f1"
    plain = load_splits(settings_of(tiny_model("bert"), tmp_path, rows)).labels
    assert plain is not None
    assert plain.names == ["0", "1", "2"]


def test_lists_in_cells_of_a_csv(tiny_model: Tiny, tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tokens", "tags"])
        for i, row in enumerate(tagged_rows(40)):
            form = json.dumps if i % 2 else " ".join
            writer.writerow([form(row["tokens"]), form(row["tags"])])
    splits = load_splits(config(TASK, tiny_model("bert"), tmp_path / "rows.csv", tmp_path / "out"))
    assert all(row in tagged_rows(40) for row in splits.train.examples)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words have 1 tags"),
        ({"tokens": [], "tags": []}, "holds no word"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "word 2 in column 'tokens' is ' '"),
        ({"tokens": ["a"], "tags": [1.5]}, "a name or a whole number was expected"),
        ({"tokens": 3, "tags": ["O"]}, "a list of words was expected"),
        ({"tokens": ["a"], "tags": 3}, "a list of tags was expected"),
    ],
)
def test_rows_that_cant_be_used(row: dict[str, Any], message: str, tiny_model: Tiny, tmp_path: Path) -> None:
    settings = settings_of(tiny_model("bert"), tmp_path, [*tagged_rows(10), row])
    with pytest.raises(DataError, match=message) as caught:
        load_splits(settings)
    assert "line 11" in str(caught.value)


def test_one_tag_alone_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", f"b{i}"], "tags": ["O", "O"]} for i in range(20)]
    with pytest.raises(DataError, match="'O' only; at least two"):
        load_splits(settings_of(tiny_model("bert"), tmp_path, rows))


def test_a_tokenizer_without_word_ids_is_refused(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        is_fast = False

    monkeypatch.setattr("peft_engine.tasks.token_classification.load_tokenizer", lambda settings: Slow())
    with pytest.raises(ConfigError, match="does not tell which token is of which word"):
        make_task(settings_of(tiny_model("bert"), tmp_path), Labels("tags", ["O", "X"]))


@pytest.mark.parametrize("kernels", ["torch", "off"])
def test_class_weights_weigh_tags(tiny_model: Tiny, tmp_path: Path, kernels: str) -> None:
    """Against torch's own weighted cross-entropy over all words, whatever the cut; evaluation knows no weights."""
    of = changed(settings_of(tiny_model("bert"), tmp_path), data__class_weights={"O": 0.1, "B-PLACE": 3.0})
    run = assemble(of.model_copy(update={"kernels": kernels}))
    names, data, rows = run.task.labels.names, run.data["train"], np.arange(13)
    member = run.group.members[0]
    batch = run.task.collate(data, rows)
    by_tag = torch.tensor([{"O": 0.1, "B-PLACE": 3.0}.get(name, 1.0) for name in names])
    logits = run.task.forward(run.group.model, batch)
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["tag"].flatten(), weight=by_tag)
    wanted.backward()
    tensors = list(member.tensors.values())
    slopes = [tensor.grad.clone() for tensor in tensors]
    for size in (13, 4):
        for tensor in tensors:
            tensor.grad = None
        found = gradients(
            run.group, run.task, data, cut(rows, size), data.units[rows].sum(), tensors, run.runtime, seed=3
        )
        assert float(found.loss) == pytest.approx(float(wanted), rel=1e-5)
        for tensor, slope in zip(tensors, slopes, strict=True):
            torch.testing.assert_close(tensor.grad, slope, rtol=1e-4, atol=1e-6)
    assert "weight" not in run.data["eval"].columns
    plain = F.cross_entropy(logits.flatten(0, 1), batch["tag"].flatten(), reduction="sum")
    assert float(run.task.loss(logits, batch)) == pytest.approx(float(plain), rel=1e-6), "also on training rows"
    weights = train(of)["data"]["class_weights"]
    assert weights == pytest.approx(dict(zip(names, by_tag.tolist(), strict=True)))


def written(folder: Path, cells: list[tuple[str, str]]) -> str:
    """A CSV file of tokens and tags as they stand in its cells."""
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("tokens", "tags"), *cells])
    return str(folder / "rows.csv")


@pytest.mark.parametrize("write", [str, json.dumps, " ".join])
def test_lists_in_cells_of_csv(write: Callable[[Any], str], tmp_path: Path) -> None:
    rows = tagged_rows(12)
    source = written(tmp_path, [(write(row["tokens"]), write(row["tags"])) for row in rows])
    settings = config(TASK, Path("m"), Path(source), tmp_path / "out", data={"split": {"eval": 0.0, "test": 0.0}})
    assert load_splits(settings).train.examples == rows


@pytest.mark.parametrize(
    ("tokens", "tags"),
    [("['EU' 'rejects']", "['B-ORG', 'O']"), ("['EU', 'rejects']", "['B-ORG' 'O']"), ("EU rejects", "[3 0]")],
)
def test_lists_as_numpy_prints_them_are_refused(tokens: str, tags: str, tmp_path: Path) -> None:
    settings = config(TASK, Path("m"), Path(written(tmp_path, [(tokens, tags)] * 3)), tmp_path / "out")
    with pytest.raises(DataError, match=r"line 2: .*looks like a list that was printed: write it as JSON"):
        load_splits(settings)


def test_numbers_in_a_given_file_are_no_places_of_sorted_names(tmp_path: Path) -> None:
    names = ["O", "B-PLACE", "B-ANIMAL"]
    numbered = [row | {"tags": [names.index(tag) for tag in row["tags"]]} for row in tagged_rows(20)[12:]]
    given = {"test": str(write_rows(tmp_path / "test.jsonl", numbered)), "split": {"eval": 0.0}}
    settings = settings_of(tmp_path, tmp_path, tagged_rows(12), data=given)
    with pytest.raises(DataError, match=r"test\.jsonl, line 1: the tag \d is a number"):
        load_splits(settings)
    assert load_splits(changed(settings, data__labels=names)).labels == Labels(  # type: ignore[arg-type]
        "tags", names, places=True
    )
