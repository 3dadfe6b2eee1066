"""A suite that names its metric: ranking, learning rates, and names that no cell has."""

import json

import pytest
from driver import FAKE
from made_records import NAMES, class_items, classes_folder, record, write, write_suite
from sklearn import metrics

import suites
from peft_engine.bench.comparing import compare
from peft_engine.bench.report import report_of, write_report
from peft_engine.bench.results import open_results
from peft_engine.bench.running import Bench
from peft_engine.bench.scoring import load
from peft_engine.bench.tables import table
from peft_engine.errors import ConfigError

ALL = ["bitfit", "full", "head", "lora"]


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs `suites.SUITE` with this metric in fake cells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_CELLS", str(tmp_path / "table.json"))

    def run(primary, **cells):
        suites.write_suite(tmp_path / "suite.yaml", primary=primary)
        (tmp_path / "table.json").write_text(json.dumps(cells))
        results = open_results("suite.yaml", "out")
        run.said = []
        Bench(results, run.said.append, program=FAKE).run()
        return results

    return run


RATES = {"lora/rate-0.0001": [0.4], "lora/rate-0.001": [0.3], "lora/rate-0.01": [0.5]}


@pytest.mark.parametrize(
    ("primary", "metric", "maximize", "rate"),
    [(None, "accuracy", True, 0.01), ("accuracy", "accuracy", True, 0.01), ("exact_match", "loss", False, 0.001)],
)
def test_learning_rates_are_chosen_by_it_where_evaluations_have_it(go, primary, metric, maximize, rate):
    chosen = go(primary, metrics={"exact_match": 0.25}, **RATES).choice("lora")
    assert (chosen["metric"], chosen["maximize"], chosen["learning_rate"]) == (metric, maximize, rate)
    finals = [line for line in go.said if "/seed-" in line]
    assert all(("exact_match 0.2500" if primary == "exact_match" else "accuracy 0.7500") in line for line in finals)
    assert any(f"{metric} 0.3000 (eval)" in line for line in go.said)


def test_a_metric_that_nothing_has_stops_after_the_baseline(go, tmp_path):
    said = "primary: got exact_match, expected a metric of baseline: accuracy, loss"
    with pytest.raises(ConfigError, match=said):
        go("exact_match")
    assert suites.titles(tmp_path / "out") == ["baseline-baseline-0"]
    assert go.said == [], "no line of a number that is none"
    with pytest.raises(ConfigError, match=said):
        open_results("suite.yaml", "out")
    go("loss")
    assert len(suites.titles(tmp_path / "out")) == 8, "the baseline stands"


@pytest.mark.parametrize("name", ["generated_rows", "tokens", "rows"])
def test_a_count_is_no_metric_before_anything_runs(go, tmp_path, name):
    with pytest.raises(ConfigError, match=f"primary: got {name}, which is no metric"):
        go(name, metrics={name: 4})
    assert not (tmp_path / "started").exists()


def test_bench_and_report_take_the_same_names_for_metrics(go, tmp_path):
    measured = {"exact_match": 0.5, "bits_per_byte": None, "rows": 4, "chance": 0.1, "per_class": {"a": 1.0}}
    with pytest.raises(ConfigError, match=r"of baseline: accuracy, loss, exact_match, bits_per_byte\. Name one"):
        go("bleu", metrics=measured)
    write_suite(tmp_path, ["full"], [0], primary="bleu")
    write(tmp_path, record("full", 0, {}, metrics_after=measured))
    with pytest.raises(ConfigError, match=r"expected one of exact_match\. Correct"):  # no score is null
        load(tmp_path)


def test_the_report_ranks_by_it(tmp_path):
    folder = classes_folder(tmp_path)
    by = {}
    for primary, maximize in ((None, True), ("mcc", True), ("loss", False)):
        write_suite(folder, ALL, [0, 1, 2], primary=primary)
        found = table(load(folder))
        assert (found["primary"], found["maximize"]) == (primary or "accuracy", maximize)
        means = [row["train_info"]["metrics"][found["primary"]]["mean"] for row in found["results"]]
        assert means == sorted(means, reverse=maximize)
        by[primary] = found
    full = next(row for row in by["mcc"]["results"] if row["name"] == "full")
    items = class_items(0.90, 0, salt="full")
    expected = metrics.matthews_corrcoef(items["label"], items["predicted"])
    assert full["train_info"]["metrics"]["mcc"]["by_seed"]["0"] == pytest.approx(expected)


def test_the_report_says_by_what_learning_rates_were_chosen(tmp_path):
    folder = classes_folder(tmp_path)
    for primary, tried in ((None, "accuracy"), ("mcc", "loss")):
        write_suite(folder, ALL, [0, 1, 2], primary=primary)
        write_report(folder)
        assert f"tried: last eval {tried}" in (folder / "report.md").read_text()
        assert f"tried: last eval {tried}" in (folder / "report.html").read_text()


def test_the_report_refuses_a_metric_that_no_cell_has(tmp_path):
    write_suite(tmp_path, ["full"], [0], primary="bleu")
    write(tmp_path, record("full", 0, class_items(0.9, 0), class_names=NAMES))
    with pytest.raises(ConfigError, match=r"suite.yaml: primary: got bleu, expected one of accuracy, f1_macro"):
        load(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = classes_folder(tmp_path_factory.mktemp("made"), tuned=False)
    return folder, write_report(folder)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("name: x\nmethods: {full", "line 2, column 15"),
        ("- 1\n", "no settings"),
        ("budget: 300\n", "suite's budget;"),
        ("budget: [1]\n", "budget"),
        ("seeds: 1\n", "seeds"),
        ("seeds: [[0]]\n", "seeds[0]"),
        ("seeds: [a]\nname: 3\n", "name, seeds[0]"),
        ("title: {a: 1}\n", "title"),
        ("reference: [full]\n", "reference"),
        ("primary: [loss]\n", "primary"),
        ("tuning: {learning_rates: 3}\n", "tuning.learning_rates"),
        ("methods: 3\n", "methods"),
        ("methods: {full: 3}\n", "methods.full"),
        ("methods: {full: {adapter: {}, learning_rates: [a]}}\n", "methods.full.learning_rates[0]"),
        ("published: {pth: x}\n", "published.path"),
        ("seeds: [0]\nseeds: [1]\n", "seeds"),
    ],
)
def test_a_report_without_a_usable_suite(made, content, place):
    folder, whole = made
    (folder / "suite.yaml").write_text(content)
    found = report_of(folder)
    (line,) = found["left_out"]
    assert line["cell"] == "suite.yaml"
    assert place in line["reason"]
    assert "the reference is taken to be full" in line["reason"]
    assert found["name"] == "made-up", "by the records"
    assert found["results"] == whole["results"]


def test_an_unusable_suite_is_named_where_results_are_read(made):
    folder, _ = made
    (folder / "suite.yaml").write_text("budget: 300\n")
    write_report(folder)
    assert "suite.yaml" in (folder / "report.md").read_text()
    assert sum("suite.yaml: left out" in note for note in compare(folder, folder)["notes"]) == 2


def test_a_suite_of_another_version_is_usable(made):
    folder, whole = made
    write_suite(folder, ALL, [0, 1, 2], later={"a": 1}, description=None, tuning={"share": 0.5, "later": 1})
    found = report_of(folder)
    assert (found["left_out"], found["results"]) == ([], whole["results"])
