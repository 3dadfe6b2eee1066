"""The report's numbers, recomputed from the raw rows by other means; what is left out; what is escaped."""

import csv
import io
import json
import shutil
from pathlib import Path
from statistics import median

import made_records
import numpy as np
import pytest
from click.testing import CliRunner
from made_records import METHODS, class_items, classes_folder, record, token_items, write, write_suite
from sklearn import metrics

from peft_engine.bench.plots import pareto
from peft_engine.bench.report import write_report
from peft_engine.bench.scoring import load
from peft_engine.bench.tables import table
from peft_engine.cli import cli
from peft_engine.errors import ConfigError, DataError

NASTY = '<img src=x onerror="nothing()">|`*'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return classes_folder(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def found(folder):
    return write_report(folder)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def numbers(folder):
    """The report's content, without its files."""
    return table(load(folder))


def row_of(found, method):
    return next(row for row in found["results"] if row["name"] == method)


def raw(folder, method, kind="final"):
    """seed → the record as it lies on disk."""
    files = (folder / "cells").glob(f"{method}-{kind}-*.json")
    each = [json.loads(path.read_text()) for path in files]
    return {one["run_info"]["seed"]: one for one in each}


def names_of(items):
    return np.array(items["label"]), np.array(items["predicted"])


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_raw_rows(folder, found, method):
    shown = row_of(found, method)["train_info"]["metrics"]
    items = [one["train_info"]["items"] for _, one in sorted(raw(folder, method).items())]
    known = {
        "accuracy": [metrics.accuracy_score(*names_of(one)) for one in items],
        "f1_macro": [metrics.f1_score(*names_of(one), average="macro") for one in items],
        "mcc": [metrics.matthews_corrcoef(*names_of(one)) for one in items],
        "loss": [sum(one["loss"]) / sum(one["units"]) for one in items],
    }
    assert set(known) < set(shown)
    assert all(one["over_items"] for one in shown.values())
    for name, values in known.items():
        assert shown[name]["mean"] == pytest.approx(np.mean(values))
        assert list(shown[name]["by_seed"].values()) == pytest.approx(values)
        assert shown[name]["low"] < shown[name]["mean"] < shown[name]["high"]


def test_differences_and_gains_are_those_of_the_raw_rows(folder, found):
    """Against a loop over drawn rows and drawn seeds that shares no code with the engine."""
    right = {}
    for method in ("full", "bitfit"):
        each = [one["train_info"]["items"] for _, one in sorted(raw(folder, method).items())]
        right[method] = np.array([np.equal(*names_of(one)) for one in each], dtype=float)
    before = np.equal(*names_of(raw(folder, "baseline", "baseline")[0]["train_info"]["items"])).astype(float)
    random = np.random.default_rng(11)
    differences, gains = [], []
    for _ in range(3000):
        rows, seeds = random.integers(400, size=400), random.integers(3, size=3)
        full, ours = (right[name][seeds][:, rows].mean() for name in ("full", "bitfit"))
        differences.append(ours - full)
        gains.append((ours - before[rows].mean()) / (full - before[rows].mean()))
    facts = row_of(found, "bitfit")["train_info"]
    mean = right["bitfit"].mean() - right["full"].mean()
    shown = facts["difference"]["accuracy"]
    assert shown["mean"] == pytest.approx(mean)
    assert [shown["low"], shown["high"]] == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.006)
    assert shown["distinguishable"] is True
    kept = facts["gain_kept"]["accuracy"]
    assert kept["mean"] == pytest.approx(
        (right["bitfit"].mean() - before.mean()) / (right["full"].mean() - before.mean())
    )
    assert [kept["low"], kept["high"]] == pytest.approx(np.quantile(gains, [0.025, 0.975]), abs=0.01)


def test_times_memory_and_shares_are_those_of_the_records(folder, found):
    ours, full = ([one["train_info"] for _, one in sorted(raw(folder, n).items())] for n in ("lora", "full"))
    facts = row_of(found, "lora")["train_info"]
    steps = [one["step_seconds"]["p50"] for one in ours]
    assert facts["step_seconds"]["median"] == median(steps)
    assert (facts["step_seconds"]["low"], facts["step_seconds"]["high"]) == (min(steps), max(steps))
    for name in ("peak_bytes", "cost_usd"):
        known = median(one[name] / other[name] for one, other in zip(ours, full, strict=True))
        assert facts["shares"][name]["ratio"] == pytest.approx(known)
    for part, size in facts["memory"].items():
        assert size == median(one["memory"][part] for one in ours)


def test_per_class_scores_are_scikit_learns(folder, found):
    each = [
        metrics.precision_recall_fscore_support(*names_of(one["train_info"]["items"]))
        for one in raw(folder, "head").values()
    ]
    shown = row_of(found, "head")["train_info"]["per_class"]
    for i, name in enumerate(made_records.NAMES):
        known = [np.mean([one[k][i] for one in each]) for k in range(4)]
        assert list(shown[name].values()) == pytest.approx(known)


def test_all_four_files_tell_the_same_numbers(folder, found):
    page, plain = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    told = json.loads((folder / "report.json").read_text())
    listing = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    assert told["results"][0]["train_info"]["metrics"] == found["results"][0]["train_info"]["metrics"]
    for row in found["results"]:
        one = row["train_info"]["metrics"]["accuracy"]
        text = f"{one['mean']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"
        assert text in page
        assert text.replace("[", r"\[").replace("]", r"\]") in plain
        listed = {
            line["statistic"]: float(line["value"])
            for line in listing
            if (line["method"], line["group"], line["number"]) == (row["name"], "metrics", "accuracy")
        }
        assert {name: listed[name] for name in ("mean", "low", "high")} == {n: one[n] for n in ("mean", "low", "high")}
        assert listed["seed-1"] == one["by_seed"]["1"]


def test_a_rebuilt_report_is_the_same(folder, found, copied):
    write_report(copied)
    for name in ("report.html", "report.md", "report.csv", "report.json"):
        assert (copied / name).read_bytes() == (folder / name).read_bytes()


def test_places_say_what_is_not_told_apart(found):
    rows = {row["name"]: row for row in found["results"]}
    assert rows["full"]["not_told_apart_from"] == ["lora"]
    assert rows["lora"]["not_told_apart_from"] == ["full"]
    assert rows["full"]["places"] == rows["lora"]["places"] == [1, 2]
    assert rows["bitfit"]["places"] == [3, 3]
    assert rows["head"]["places"] == [4, 4]
    assert any("Not told apart from the best" in note for note in found["notes"])


def test_claims_are_met_on_average_or_missed(tmp_path):
    methods = {**METHODS, "lora": (0.897, 0.0752, 500, 600_000)}
    found = write_report(classes_folder(tmp_path, methods=methods))
    gain, step, memory = found["claims"]
    assert gain["verdict"] == "met on average"
    assert gain["low"] < 0.95 <= gain["value"]
    assert step["verdict"] == "met on average"
    assert step["value"] <= 0.75 < step["high"]
    assert [one["cell"] for one in step["cells"]]
    assert memory["verdict"] == "missed"
    assert memory["value"] == pytest.approx(0.5)
    assert [one["cell"] for one in memory["cells"]] == ["lora/seed-0", "lora/seed-1", "lora/seed-2"]
    assert "missed, 0.500×" in found["summary"][2]


def test_variants_and_unfused_lora_are_not_the_claim(tmp_path):
    write_suite(tmp_path, ["full"], [0])
    write(tmp_path, record("full", 0, class_items(0.9, 0)))
    lora = {"method": "lora"}
    for name, settings in {
        "dora": {"adapter": lora | {"dora": True}},
        "plain": {"adapter": lora, "kernels": "off"},
        "rounded": {"adapter": lora, "model": {"frozen_compute": "int8"}},
    }.items():
        one = record(name, 0, class_items(0.9, 0))
        one["run_info"]["config"] = {"kernels": "auto"} | settings
        write(tmp_path, one | {"sha256": made_records.digest(one)})
    assert write_report(tmp_path)["claims"] == []
    assert "its claim is not measured here" in (tmp_path / "report.html").read_text()


def test_against_another_reference_there_is_no_claim(tmp_path):
    write_suite(tmp_path, ["lora", "other"], [0], reference="lora")
    for name in ("lora", "other"):
        write(tmp_path, record(name, 0, class_items(0.9, 0), adapter="lora"))
    found = write_report(tmp_path)
    assert found["claims"] == []
    assert row_of(found, "other")["train_info"]["difference"]["accuracy"] is not None


def test_lora_that_did_not_run_fused_proves_nothing(tmp_path):
    write_suite(tmp_path, ["full", "lora"], [0])
    for name in ("full", "lora"):
        write(tmp_path, record(name, 0, class_items(0.9, 0), swapped={"layer_norm": 13}))
    found = write_report(tmp_path)
    assert [line["verdict"] for line in found["claims"]] == ["unknown"] * 3
    assert "none of its LoRA layers ran fused" in found["summary"][0]


def test_what_was_swapped_is_told_by_method(tmp_path):
    write_suite(tmp_path, ["full", "lora", "head"], [0])
    swapped = {"layer_norm": 13}
    write(tmp_path, record("full", 0, class_items(0.9, 0), swapped=swapped))
    write(tmp_path, record("head", 0, class_items(0.8, 0), swapped=swapped))
    write(tmp_path, record("lora", 0, class_items(0.9, 0)))
    found = write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    told = next(line for line in page.splitlines() if line.startswith("- Kernels"))
    assert told.count("torch") == 2
    assert "lora: torch (layer\\_norm 13, lora\\_linear 36)" in told
    assert "full, head: torch (layer\\_norm 13)" in told
    assert not any("kernels" in line for line in found["notes"])


def test_a_damaged_record_is_named_and_in_no_number(copied, found):
    path = next((copied / "cells").glob("lora-final-1-*"))
    path.write_text(path.read_text().replace('"maximize": true', '"maximize":  false'))
    told = write_report(copied)
    assert row_of(told, "lora")["run_info"]["seeds"] == [0, 2]
    by_seed = row_of(found, "lora")["train_info"]["metrics"]["accuracy"]["by_seed"]
    mean = row_of(told, "lora")["train_info"]["metrics"]["accuracy"]["mean"]
    assert mean == pytest.approx((by_seed["0"] + by_seed["2"]) / 2)
    assert told["left_out"][0]["cell"] == path.stem
    assert path.stem in (copied / "report.html").read_text()
    assert "lora/seed-1" in told["missing"]
    assert str(copied) not in (copied / "report.html").read_text()  # reports are published


def test_half_a_file_is_named(copied):
    path = next((copied / "cells").glob("lora-final-1-*"))
    path.write_text(path.read_text()[:200])
    assert "can't be read" in numbers(copied)["left_out"][0]["reason"]


def test_failed_and_missing_cells_are_shown_with_their_reason(copied):
    next((copied / "cells").glob("head-final-2-*")).unlink()
    lost = next((copied / "cells").glob("bitfit-final-0-*"))
    lost.unlink()
    (copied / "failed").mkdir()
    why = {
        "reason": "Memory ran out.",
        "exit_code": 4,
        "method": "bitfit",
        "kind": "final",
        "seed": 0,
        "log_tail": ["first", f"at {Path.cwd()}/peft_engine/run.py"],
    }
    (copied / "failed" / lost.name).write_text(json.dumps(why))
    done = next((copied / "cells").glob("full-final-0-*"))
    (copied / "failed" / done.name).write_text(json.dumps(why))  # failed once, then succeeded
    told = write_report(copied)
    assert [(one["cell"], one["reason"], one["exit_code"]) for one in told["failed"]] == [
        (lost.stem, "Memory ran out.", 4)
    ]
    assert told["failed"][0]["log_tail"] == "first\nat peft_engine/run.py"
    assert told["missing"] == ["head/seed-2"]
    for name in ("report.html", "report.md"):
        text = (copied / name).read_text()
        assert "Memory ran out." in text
        assert "head/seed-2" in text


def test_of_two_records_of_one_cell_the_newer_counts(copied):
    newer = record("head", 0, class_items(0.1, 0), learning_rate=7e-3, created_at="2026-11-21T00:00:00+00:00")
    newer["train_info"]["class_names"] = made_records.NAMES
    newer["sha256"] = made_records.digest(newer)
    write(copied, newer)
    told = numbers(copied)
    assert row_of(told, "head")["train_info"]["metrics"]["accuracy"]["by_seed"]["0"] < 0.2
    assert "older than another record" in told["left_out"][0]["reason"]


def test_cells_tested_on_other_rows_are_left_out(copied):
    items = class_items(0.9, 9)
    items["rows"] = [row + 1 for row in items["rows"]]
    write(copied, record("lora", 9, items, class_names=made_records.NAMES))
    told = numbers(copied)
    assert 9 not in row_of(told, "lora")["run_info"]["seeds"]
    assert "other rows" in told["left_out"][0]["reason"]


def test_the_order_of_rows_in_a_record_says_nothing(copied, found):
    path = next((copied / "cells").glob("lora-final-1-*"))
    one = json.loads(path.read_text())
    items = one["train_info"]["items"]
    turned = {name: values[::-1] if isinstance(values, list) else values for name, values in items.items()}
    one["train_info"]["items"] = turned
    path.write_text(json.dumps(one | {"sha256": made_records.digest(one)}))
    told = numbers(copied)
    for name in ("difference", "gain_kept"):
        assert row_of(told, "lora")["train_info"][name] == row_of(found, "lora")["train_info"][name]


def test_learning_rates_at_the_edge_are_told(found):
    lines = {line["method"]: line for line in found["learning_rates"]}
    assert lines["head"]["at_edge"]
    assert not lines["lora"]["at_edge"]
    assert [one["learning_rate"] for one in lines["lora"]["tried"]] == [1e-4, 3e-4, 1e-3]
    assert any("edge of its grid" in note and "head" in note for note in found["notes"])


def test_names_are_text_in_every_file(tmp_path):
    methods = {"full": METHODS["full"], NASTY: METHODS["lora"], "=cmd()": METHODS["head"], "$x^2$": METHODS["bitfit"]}
    write_report(classes_folder(tmp_path, methods=methods))
    page, plain, listing = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md", "csv"))
    assert "<img" not in page
    assert "&lt;img src=x onerror=" in page
    assert "<img" not in plain
    assert '&lt;img src=x onerror="nothing()"&gt;\\|\\`\\*' in plain
    assert "\n'=cmd()," in listing
    assert ">$x^2$</text>" in page  # not read as mathematics


def test_the_page_names_no_other_host(folder, found):
    page = (folder / "report.html").read_text()
    known = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    urls = {part.split('"')[0] for part in page.split('="') if part.startswith(("http:", "https:", "//"))}
    assert urls <= known
    assert "@import" not in page
    assert "src=" not in page


def test_a_falling_metric_ranks_the_lowest_first(tmp_path):
    write_suite(tmp_path, ["full", "lora"], [0, 1, 2])
    falling = {"primary": "loss", "maximize": False, "metrics_before": {"loss": 3.0}}
    for method, loss in (("full", 1.9), ("lora", 2.0)):
        for seed in range(3):
            bytes_ = {"forgetting": {"before": 3.0, "after": 3.0 + loss / 10, "unit": "nats per token"}}
            write(tmp_path, record(method, seed, token_items(loss, seed), **falling, **bytes_))
    found = numbers(tmp_path)
    assert [row["name"] for row in found["results"]] == ["full", "lora"]
    facts = row_of(found, "lora")["train_info"]
    assert facts["gain_kept"]["loss"]["mean"] == pytest.approx(1.0 / 1.1, abs=0.02)
    assert facts["forgetting"]["median"] == pytest.approx(0.2)
    assert set(facts["metrics"]) == {"loss", "bits_per_byte", "token_accuracy", "perplexity"}


def test_numbers_that_are_not_there_are_dashes(tmp_path):
    write_suite(tmp_path, ["full"], [0])
    write(tmp_path, record("full", 0, {}, metrics_after={"accuracy": 0.5, "spearman": None}, cost_usd=None))
    found = write_report(tmp_path)
    facts = found["results"][0]["train_info"]
    assert facts["cost_usd"] is None
    assert "spearman" not in facts["metrics"]
    assert facts["metrics"]["accuracy"]["over_items"] is False
    assert any("over seeds alone" in note for note in found["notes"])


def test_items_that_do_not_fit_are_refused(tmp_path):
    write_suite(tmp_path, ["full"], [0])
    write(tmp_path, record("full", 0, class_items(0.9, 0) | {"loss": [1.0]}))
    with pytest.raises(DataError, match=r"full/seed-0: items.loss: got 1 values for 400 rows"):
        numbers(tmp_path)


def test_pareto_front_by_hand():
    assert pareto([(1, 0.5), (2, 0.4), (3, 0.9), (3, 0.8), (4, 0.9)], maximize=True) == [0, 2]
    assert pareto([(1, 2.0), (2, 1.0), (1.5, 3.0)], maximize=False) == [0, 1]


def test_the_verb_rebuilds_and_says_what_matters(copied, found):
    for name in ("report.html", "report.md", "report.csv", "report.json"):
        (copied / name).unlink(missing_ok=True)
    done = CliRunner().invoke(cli, ["report", str(copied)])
    assert done.exit_code == 0, done.output
    assert found["summary"][0] in done.output
    assert (copied / "report.html").is_file()
    done = CliRunner().invoke(cli, ["report", str(copied), "--json"])
    assert json.loads(done.stdout)["schema"] == "peft-engine report 1"


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_results_is_told(tmp_path, made):
    if made:
        (tmp_path / "cells").mkdir()
    done = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.exit_code == 2
