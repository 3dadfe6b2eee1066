"""Published figures stand beside ours in the report; what can't be read or fits nothing is refused before any cell."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from made_records import classes_folder
from sklearn.metrics import f1_score

from peft_engine.bench.report import write_report
from peft_engine.bench.results import open_results
from peft_engine.bench.running import Bench
from peft_engine.errors import ConfigError
from suites import write_suite

FIGURES = {
    "title": "A table of somebody's",
    "source": {"what": "a paper", "url": "https://example.org/paper", "table": "Table 9"},
    "verified": "read in the paper",
    "hardware": "one GPU",
    "model": "some encoder",
    "setup": "as | they <b>say</b>",
    "differs": "much",
    "figures": [
        {"task": "news", "method": "full", "metrics": {"acc": 0.9, "f1": 0.5}, "train_seconds": 4, "peak_bytes": 2**30},
        {"task": "news", "method": "lora", "metrics": {"acc": 0.2}, "spread": {"acc": 0.003}, "file": "lora.json"},
        {"task": "news", "method": "magic", "metrics": {"acc": 0.99, "mmlu": 3.0}},
        {"task": "other", "method": "full", "metrics": {"acc": 0.1}},
    ],
}
WANTED = {"path": "figures.yaml", "task": "news", "metrics": {"acc": "accuracy", "f1": "per_class.Sports.f1"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return classes_folder(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "results")
    suite = yaml.safe_load((copy / "suite.yaml").read_text())
    (copy / "suite.yaml").write_text(yaml.safe_dump({**suite, "published": WANTED}))
    (copy / "published.yaml").write_text(yaml.safe_dump(FIGURES))
    return copy


def test_each_figure_stands_beside_ours(folder):
    found = write_report(folder)
    lines = {(row["method"], row["number"]): row for row in found["published"]["rows"]}
    assert set(lines) == {
        ("full", "acc"), ("full", "f1"), ("full", "train_seconds"), ("full", "peak_bytes"),
        ("lora", "acc"), ("magic", "acc"), ("magic", "mmlu"),
    }  # fmt: skip
    facts = {row["name"]: row["train_info"] for row in found["results"]}
    accuracy = facts["full"]["metrics"]["accuracy"]
    full = lines["full", "acc"]
    assert (full["ours"], full["low"], full["high"]) == (accuracy["mean"], accuracy["low"], accuracy["high"])
    assert full["difference"] == pytest.approx(accuracy["mean"] - 0.9)
    assert full["inside"] is (accuracy["low"] <= 0.9 <= accuracy["high"]) is True
    assert lines["lora", "acc"]["inside"] is False
    assert lines["lora", "acc"]["spread"] == 0.003
    assert lines["full", "peak_bytes"]["ours"] == facts["full"]["peak_bytes"]["median"]
    assert lines["full", "peak_bytes"]["inside"] is None
    assert lines["magic", "acc"]["ours"] is lines["magic", "acc"]["difference"] is None

    items = [json.loads(p.read_text())["train_info"]["items"] for p in (folder / "cells").glob("full-final-*.json")]
    sports = [f1_score(one["label"], one["predicted"], labels=[1], average="macro") for one in items]
    assert lines["full", "f1"]["ours"] == pytest.approx(sum(sports) / len(sports))


def test_the_pages_show_them_as_text(folder):
    found = write_report(folder)
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    ours = next(row for row in found["published"]["rows"] if row["number"] == "acc")
    shown = f"{ours['ours']:.4f} [{ours['low']:.4f}, {ours['high']:.4f}]"
    for content in (page, text):
        assert "A table of somebody" in content
        assert "https://example.org/paper" in content
        assert "<b>say" not in content
    assert f"<td>0.9000</td><td>{shown}</td><td>{ours['difference']:+.4f} (inside our interval)</td>" in page
    assert "| full | acc | 0.9000 |" in text
    assert "0.2000 ± 0.003" in text
    assert "| full | peak, MiB | 1,024 |" in text


def test_without_figures_nothing_is_shown(made):
    found = write_report(made)
    assert found["published"] is None
    assert "Published" not in (made / "report.html").read_text() + (made / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        ("{", "can be read"),
        ("- 1", "dict"),
        (yaml.safe_dump({**FIGURES, "figures": []}), "figures"),
        (yaml.safe_dump({**FIGURES, "figures": [{"task": "a", "method": "full", "metrics": {"acc": "many"}}]}), "acc"),
    ],
)
def test_figures_that_cannot_be_read_are_refused_first(tmp_path, monkeypatch, content, told):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("figures.yaml").write_text(content)
    suite = write_suite(tmp_path / "suite.yaml", published=WANTED)
    with pytest.raises(ConfigError, match=told) as caught:
        open_results(suite, tmp_path / "results")
    assert "figures.yaml" in caught.value.problem


def test_a_task_without_figures_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("figures.yaml").write_text(yaml.safe_dump(FIGURES))
    suite = write_suite(tmp_path / "suite.yaml", published={**WANTED, "task": "weather"})
    with pytest.raises(ConfigError, match="weather, only of news, other"):
        open_results(suite, tmp_path / "results")


def test_a_bench_keeps_the_figures_with_its_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("figures.yaml").write_text(yaml.safe_dump(FIGURES))
    suite = write_suite(tmp_path / "suite.yaml", published=WANTED)
    Bench(open_results(suite, "results"), print, only="nothing").run()
    assert yaml.safe_load(Path("results/published.yaml").read_text()) == FIGURES
    Bench(open_results(write_suite(suite), "results"), print, only="nothing").run()
    assert not Path("results/published.yaml").exists()
