"""Published figures, their suites, the data behind them and the metric that they need."""

import json
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from tiny import config, sentence, write_rows

from peft_engine.answers import as_number, final_answer, is_right
from peft_engine.bench.published import figures_of, read_publication
from peft_engine.bench.refusals import MADE_IN, PREPARED
from peft_engine.bench.suite import Published
from peft_engine.config import Config
from peft_engine.data.loading import load_splits
from peft_engine.run import train
from published import glue, prepare

ROOT = Path(__file__).resolve().parents[1]
SUITES = sorted((ROOT / "benchmarks" / "suites").glob("*.yaml"))
NAMED = {  # classes of the hub's ClassLabel, which the engine reads as names
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
}
FIGURES = sorted((ROOT / "benchmarks" / "published").glob("*.yaml"))


# ---- the final number of a worked answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 4 + 4 = 8.\nThe answer is: 8", "8"),
        ("it costs 5 * 2 = <<5*2=10>>10 dollars\n#### 10", "10"),
        ("The answer is: 3. No: The answer is: 7.", "7"),
        ("The final answer is $1.50!", "1.50"),
        ("The answer is: 25%\n\nQuestion: and then? The result 9", "25"),
        ("The answer is 5. #### 6", "5. #### 6"),  # the first announcement in their order, not in the text's
        ("eight", None),
        ("#### ", None),  # the blank behind it goes with the outer white space
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("16", 16.0), ("65.33", 65.33), ("20/14", float(Decimal(20) / Decimal(14))), ("-3", -3.0)),
        *((text, None) for text in ("1,000", "x", "3/0", "1/2/3", "", "NaN", "a/2")),
    ],
)
def test_as_number(text, number):
    assert as_number(text) == number


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("Hm. The answer is: 0.5", "so\n#### 1/2", True),
        ("The answer is: 72.0", "#### 72", True),
        ("The answer is: 1,000", "#### 1,000", True),  # no number to them, but the same text
        ("The answer is: 1000", "#### 1,000", False),
        ("72", "#### 72", False),  # nothing announced
        ("The answer is: x", "#### 72", False),
    ],
)
def test_right_by_its_number(text, reference, right):
    assert is_right(text, reference, "number") is right
    assert is_right(f" {reference}\n", reference)


def test_a_run_is_judged_by_the_number(tiny_model, tmp_path, monkeypatch):
    """`evaluation.answer: number` reaches the metric; the same answers are wrong as texts."""
    rows = [{"prompt": prepare.question(sentence(i, 3)), "completion": f" it is {i}\n#### {i}"} for i in range(4)]
    said = [" well. The answer is: 0", " #### 1.0", "The answer is: 5", "3"]
    monkeypatch.setattr("peft_engine.generation.generate_all", lambda *a, **k: said)
    found = {}
    for answer in ("number", "text"):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        settings = config(
            "causal-lm", tiny_model("llama"), path, tmp_path / answer,
            data={"split": {"eval": 0.0, "test": 0.0}},
            training={"steps": 1, "batch_size": 4},
            evaluation={"generate_rows": 4, "answer": answer},
        )  # fmt: skip
        found[answer] = train(settings)["metrics"]["after"]["exact_match"]
    assert found == {"number": 0.5, "text": 0.0}


# ---- data


def test_metamath_and_gsm8k_rows():
    long = {"query": "q" * 700, "response": "r" * 600, "type": "x", "original_question": "o"}
    fits = {**long, "response": "r" * 599}  # with the blank between them 1,300 characters
    made = list(prepare.metamath_rows([long, fits]))
    assert [row["completion"] for row in made] == ["r" * 599]
    assert made[0]["prompt"] == "Question: " + "q" * 700 + " Think step by step.\nAnswer:"
    (row,) = prepare.gsm8k_rows([{"question": "How many?", "answer": "Two.\n#### 2"}])
    assert row == {"prompt": "Question: How many? Think step by step.\nAnswer:", "completion": "Two.\n#### 2"}


def test_gsm8k_validation_is_numpys_shuffle_with_seed_0():
    rows = [{"question": str(i), "answer": "#### 1"} for i in range(200)]
    np.random.seed(0)  # noqa: NPY002
    order = np.arange(200)
    np.random.shuffle(order)  # noqa: NPY002
    assert [int(row["question"]) for row in prepare.gsm8k_validation(rows)] == order[:50].tolist()


def test_alpaca_rows():
    given = {"instruction": "Add.", "input": "1 2", "output": "3", "text": "…"}
    first, second = prepare.alpaca_rows([given, {**given, "input": ""}])
    assert first["prompt"].endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert first["prompt"].startswith("Below is an instruction that describes a task, paired with an input")
    assert "### Input" not in second["prompt"]
    assert "paired" not in second["prompt"]
    assert first["completion"] == second["completion"] == "3"


def test_text8_is_cut_without_loss(tmp_path, tiny_model):
    text = (" " + sentence(1, 600).replace("1", "one"))[:2000]
    sizes = {"train": 1200, "valid": 300, "test": 400}
    parts = prepare.text8_parts(text, sizes, row=100)
    assert {name: "".join(row["text"] for row in rows) for name, rows in parts.items()} == {
        "train": text[:1200], "valid": text[1200:1500], "test": text[1500:1900],
    }  # fmt: skip
    assert all(1 <= len(row["text"]) <= 100 for rows in parts.values() for row in rows)
    assert all(row["text"].startswith(" ") for row in parts["train"][1:])
    with pytest.raises(ValueError, match="got 2,000 characters, expected 9,000"):
        prepare.text8_parts(text, {"train": 9000})
    with pytest.raises(ValueError, match="a to z and spaces only, got \\['B'\\]"):
        prepare.text8_parts("aB", {"train": 1})
    with pytest.raises(SystemExit):
        _prepare("text8")
    source = tmp_path / "text8"
    source.write_text(text)
    prepare_sizes, prepare.TEXT8_PARTS = prepare.TEXT8_PARTS, sizes
    try:
        _prepare("text8", "--source", str(source), "--folder", str(tmp_path))
    finally:
        prepare.TEXT8_PARTS = prepare_sizes
    rows = [json.loads(line)["text"] for line in (tmp_path / "text8-test.jsonl").read_text().splitlines()]
    assert "".join(rows) == text[1500:1900]


@pytest.mark.parametrize("words", PREPARED)
def test_the_bench_knows_what_is_made_of_which_words(tmp_path, monkeypatch, words):
    row = {"query": "a", "response": "b", "question": "a", "answer": "#### 1", "instruction": "a", "output": "b"}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, split: [row])
    monkeypatch.setattr(prepare, "TEXT8_PARTS", {"train": 4, "valid": 2, "test": 2})
    monkeypatch.chdir(tmp_path)
    Path("text8").write_text(" one two")
    _prepare(*words.split(), "--folder", "made")
    assert sorted(path.name for path in Path("made").iterdir()) == sorted(PREPARED[words])
    assert prepare.DATA == prepare.ROOT / MADE_IN


def _prepare(*words):
    before, sys.argv = sys.argv, ["prepare.py", *words]
    try:
        prepare.main()
    finally:
        sys.argv = before


@pytest.mark.parametrize("task", glue.TASKS, ids=lambda task: task.name)
def test_glue_columns_and_metrics(task, tiny_model, tmp_path):
    """Rows with the hub's columns go through the suite's own section; metrics stand where the table looks for them."""
    kinds = {"mnli": 3, "stsb": 0}.get(task.name, 2)
    rows = [
        {**{column: sentence(i + n, 3 + i % 4) for n, column in enumerate(task.columns)}, "idx": i,
         "label": NAMED.get(task.name, range(3))[i % kinds] if kinds else i * 5 / 7 % 5.0}
        for i in range(24)
    ]  # fmt: skip
    data = glue.data_of(task, 64) | {"train": str(write_rows(tmp_path / "train.jsonl", rows))}
    data |= {"test": str(write_rows(tmp_path / "test.jsonl", rows[:12])), "subset": None, "cache": None}
    settings = Config.model_validate(
        {"task": "text-classification", "model": {"path": str(tiny_model("bert")), "pooling": "model"},
         "device": "cpu", "data": data, "training": {"steps": 2}, "output": str(tmp_path / "out")}
    )  # fmt: skip
    splits = load_splits(settings)
    example = splits.test.examples[0]
    assert example["text"] == rows[0][task.columns[0]]
    assert example.get("text_pair") == (rows[0][task.columns[1]] if len(task.columns) > 1 else None)
    assert splits.labels.kind == ("regression" if task.name == "stsb" else "single")
    assert set(splits.labels.names) == {str(name) for name in NAMED.get(task.name, range(kinds))[:kinds]}
    found = train(settings)["metrics"]["after"]
    for path in task.metrics.values():
        value = found
        for part in path.split("."):
            value = value[part]
        assert isinstance(value, float), path


def test_glue_metrics_are_those_of_the_benchmark():
    """F1 is that of class 1, CoLA's is Matthews', STS-B's are Pearson's and Spearman's."""
    import torch

    from peft_engine.data.labels import Labels
    from peft_engine.tasks.class_metrics import ClassMeter

    rng = np.random.default_rng(0)
    wanted, logits = rng.integers(0, 2, 50), rng.normal(size=(50, 2)).astype(np.float32)
    labels = Labels(kind="single", names=["0", "1"])
    meter = ClassMeter(SimpleNamespace(labels=labels, loss=lambda logits, batch: torch.zeros(())))
    meter.update(torch.from_numpy(logits), {"label": torch.from_numpy(wanted)})
    found, guessed = meter.compute(), logits.argmax(1)
    assert found["per_class"]["1"]["f1"] == pytest.approx(f1_score(wanted, guessed))
    assert found["mcc"] == pytest.approx(matthews_corrcoef(wanted, guessed))
    scores, values = rng.normal(size=50).astype(np.float32), rng.uniform(0, 5, 50).astype(np.float32)
    meter = ClassMeter(SimpleNamespace(labels=Labels(kind="regression", names=[]), loss=lambda *_: torch.zeros(())))
    meter.update(torch.from_numpy(scores)[:, None], {"label": torch.from_numpy(values)})
    found = meter.compute()
    assert found["pearson"] == pytest.approx(pearsonr(scores, values).statistic)
    assert found["spearman"] == pytest.approx(spearmanr(scores, values).statistic)


# ---- suites and figures


def test_the_glue_suites_are_those_that_glue_py_writes():
    made = glue.suites()
    assert len(made) == 16
    for name, text in made.items():
        assert (ROOT / "benchmarks" / "suites" / name).read_text(encoding="utf-8") == text, "run glue.py"


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_makes_whole_configs(path):
    """Every method at every rate is a config that the engine takes."""
    suite = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert suite["name"] == path.stem
    assert suite["reference"] in suite["methods"]
    assert len(set(suite["seeds"])) >= 3
    assert path.read_text(encoding="utf-8").startswith(f"# Run: peft-engine bench benchmarks/suites/{path.name}")
    if path.stem.startswith("published-"):
        published = Published(**suite["published"])
        figures = figures_of(read_publication(ROOT / published.path), published)
        assert "text8" in path.stem or {figure.method for figure in figures} & set(suite["methods"])
        if "bert" in path.stem:
            task = next(task for task in glue.TASKS if task.name == published.task)
            assert {name for figure in figures for name in figure.metrics} <= set(task.metrics)
    for method in suite["methods"].values():
        for rate in method.get("learning_rates") or suite["tuning"]["learning_rates"]:
            training = {**suite["config"]["training"], **method.get("training", {}), "learning_rate": float(rate)}
            settings = {**suite["config"], "adapter": method["adapter"], "training": training, "output": "runs/x"}
            Config.model_validate(settings)


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_figures_name_their_sources(path):
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"title", "source", "verified", "hardware", "model", "setup", "figures"} <= set(table)
    for figure in table["figures"]:
        assert figure["task"]
        assert figure["method"]
        source = figure.get("source", table["source"])
        assert source["url"].startswith("https://")
        assert source["table"]
        assert all(isinstance(value, float) for value in figure["metrics"].values())
        percent = {"loss", "bits_per_character"}
        assert all(0 < value < 1 for name, value in figure["metrics"].items() if name not in percent)
