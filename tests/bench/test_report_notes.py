"""What a report says before its numbers: cells that were run otherwise, places, claims, cost. No report is edited."""

import json
import shutil
from pathlib import Path

import made_records
import pytest
from click.testing import CliRunner
from made_records import class_items, classes_folder, edited, record, write, write_suite

from peft_engine.bench.report import as_csv, as_markdown, lines_of, report_of, write_report
from peft_engine.cli import cli
from peft_engine.errors import ConfigError

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"
COMMITTED = sorted(path.parent.name for path in RESULTS.glob("*/cells"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return classes_folder(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def found(folder):
    return write_report(folder)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def row_of(found, method):
    return next(row for row in found["results"] if row["name"] == method)


def notes_with(folder, *words):
    return [line for line in report_of(folder)["notes"] if all(word in line for word in words)]


def test_means_over_other_seeds_do_not_turn_a_paired_comparison(tmp_path):
    """b ran the hard seed alone, and beats a there; a's mean is higher by its easy seeds."""
    write_suite(tmp_path, ["full", "a", "b"], [0, 1, 2])
    for seed, share in ((0, 0.60), (1, 0.95), (2, 0.95)):
        write(tmp_path, record("a", seed, class_items(share, seed, salt="a"), class_names=made_records.NAMES))
        write(tmp_path, record("full", seed, class_items(0.97, seed, salt="f"), class_names=made_records.NAMES))
    write(tmp_path, record("b", 0, class_items(0.75, 0, salt="b"), class_names=made_records.NAMES))
    found = report_of(tmp_path)
    means = {row["name"]: row["train_info"]["metrics"]["accuracy"]["mean"] for row in found["results"]}
    assert means["a"] > means["b"]
    assert [row["name"] for row in found["results"]] == ["full", "b", "a"]
    assert [row["place"] for row in found["results"]] == [1, 2, 3]
    assert [row["places"] for row in found["results"]] == [[1, 2], [2, 2], [2, 3]]
    assert row_of(found, "a")["not_told_apart_from"] == ["full"]
    assert found["notes"][0].startswith("Methods ran other seeds: b lacks 1, 2.")
    assert any(line.startswith("Not told apart from the one placed first, full: a.") for line in found["notes"])


def test_a_seed_that_is_missing_leaves_the_order_of_the_others(copied, found):
    next((copied / "cells").glob("lora-final-1-*")).unlink()
    told = report_of(copied)
    assert [row["name"] for row in told["results"]] == [row["name"] for row in found["results"]]
    assert told["notes"][0].startswith("Methods ran other seeds: lora lacks 1.")


def test_cells_that_were_run_otherwise_are_told_first(copied, found):
    assert not any(line.startswith("Cells differ") for line in found["notes"])
    edited(copied, "lora-final-*", lambda one: one["run_info"].__setitem__("cells_at_once", 4))
    edited(
        copied, "full-final-1-*", lambda one: one["meta_info"].__setitem__("git", {"commit": "f" * 40, "dirty": True})
    )
    edited(copied, "head-final-*", lambda one: one["train_info"].__setitem__("steps", 3000))
    edited(
        copied, "bitfit-final-0-*", lambda one: one["run_info"].__setitem__("command", "peft-engine bench other.yaml")
    )
    assert write_report(copied)["notes"][:4] == [
        "Cells differ in git commit (fffffff with changes: full/seed-1; 0123abc: all others): compare them with care.",
        "Cells differ in how many ran at once (4: lora; 1: all others): their times can't be compared.",
        "Cells differ in command (peft-engine bench other.yaml: bitfit/seed-0; peft-engine bench "
        "benchmarks/suites/made-up.yaml: all others): compare them with care.",
        "Cells differ in steps trained (3000: head; 300: all others): they had other budgets.",
    ]
    assert "Cells differ in how many ran at once (4: lora" in (copied / "report.html").read_text()


def test_other_tokens_at_one_seed_are_told_and_rounding_is_not(copied):
    """307,200 tokens in 300 steps: one step is 1,024."""
    edited(copied, "head-final-2-*", lambda one: one["train_info"].__setitem__("tokens", 307_200 + 1_000))
    edited(copied, "*-final-1-*", lambda one: one["train_info"].__setitem__("tokens", 290_000))  # other rows by seed
    assert notes_with(copied, "tokens") == []
    edited(copied, "head-final-2-*", lambda one: one["train_info"].__setitem__("tokens", 350_000))
    assert notes_with(copied, "tokens") == [
        "Cells differ in tokens trained from others of their seed: head/seed-2 350,000 (usual 307,200)."
    ]


def test_a_step_of_rounding_is_no_other_budget(copied):
    suite = copied / "suite.yaml"
    suite.write_text(suite.read_text().replace("steps: 300", "tokens: 307200"))
    edited(copied, "head-final-2-*", lambda one: one["train_info"].__setitem__("steps", 301))
    assert notes_with(copied, "steps trained") == []
    edited(copied, "head-final-2-*", lambda one: one["train_info"].__setitem__("steps", 302))
    assert len(notes_with(copied, "steps trained", "302: head/seed-2")) == 1


def test_without_full_fine_tuning_as_reference_nothing_is_claimed(copied):
    suite = copied / "suite.yaml"
    suite.write_text(suite.read_text().replace("reference: full", "reference: head"))
    found = write_report(copied)
    assert found["claims"] == []
    assert "about full fine-tuning. The reference here, head, is something else" in found["unclaimed"]
    assert found["unclaimed"] in (copied / "report.html").read_text()
    assert "reference here, head" in (copied / "report.md").read_text()
    assert found["unclaimed"] in CliRunner().invoke(cli, ["report", str(copied)]).output


def test_a_reference_is_what_its_cells_ran_not_its_name(copied):
    edited(copied, "full-final-*", lambda one: one["run_info"]["config"]["adapter"].__setitem__("method", "bitfit"))
    assert report_of(copied)["claims"] == []


def test_the_suites_price_makes_the_cost_where_runs_named_none(copied, found):
    assert found["run_info"]["price"] is None
    suite = copied / "suite.yaml"
    suite.write_text(suite.read_text() + "usd_per_hour: 0.36\nprice_source: a price list of 2026-11-23\n")
    edited(copied, "*-final-*", lambda one: one["train_info"].__setitem__("cost_usd", None))
    told = write_report(copied)
    assert told["run_info"]["price"] == {"usd_per_hour": 0.36, "source": "a price list of 2026-11-23", "cells": 12}
    for row in told["results"]:
        facts = row["train_info"]
        known = {seed: seconds * 1e-4 for seed, seconds in facts["wall_seconds"]["by_seed"].items()}
        assert facts["cost_usd"]["by_seed"] == pytest.approx(known)
    for name in ("report.html", "report.md"):
        assert (
            "runs, from loading to saving, at 0.36 USD an hour (a price list of 2026-11-23)"
            in (copied / name).read_text()
        )


def test_a_price_that_a_run_recorded_wins(copied, found):
    suite = copied / "suite.yaml"
    suite.write_text(suite.read_text() + "usd_per_hour: 36\nprice_source: elsewhere\n")
    told = write_report(copied)
    assert row_of(told, "lora")["train_info"]["cost_usd"] == row_of(found, "lora")["train_info"]["cost_usd"]
    assert told["run_info"]["price"]["cells"] == 0
    assert "elsewhere" not in (copied / "report.md").read_text()
    edited(copied, "lora-final-*", lambda one: one["train_info"].__setitem__("cost_usd", None))
    assert len(notes_with(copied, "Cost is by the suite's price in 3 of 12 cells")) == 1


@pytest.mark.parametrize("price", ["lots", "-1", "true", ".inf"])
def test_a_price_that_is_none_is_refused(copied, price):
    suite = copied / "suite.yaml"
    suite.write_text(suite.read_text() + f"usd_per_hour: {price}\n")
    with pytest.raises(ConfigError, match="usd_per_hour: got"):
        report_of(copied)


def differences(told, made, place="report"):
    """Where two contents of report.json are not the same; floats to 1e-9 of their value."""
    if isinstance(told, dict) and isinstance(made, dict):
        names = [f"{place}: {set(told) ^ set(made)}"] if set(told) != set(made) else []
        return names + [d for key in told if key in made for d in differences(told[key], made[key], f"{place}.{key}")]
    if isinstance(told, list) and isinstance(made, list) and len(told) == len(made):
        return [d for i in range(len(told)) for d in differences(told[i], made[i], f"{place}[{i}]")]
    if isinstance(told, float) and isinstance(made, float):
        return [] if told == pytest.approx(made, rel=1e-9, abs=1e-12) else [f"{place}: {told} != {made}"]
    return [] if told == made and type(told) is type(made) else [f"{place}: {told!r} != {made!r}"]


def test_a_number_changed_by_hand_is_seen(folder, found):
    changed = json.loads((folder / "report.json").read_text())
    assert differences(changed, found) == []
    changed["results"][1]["train_info"]["metrics"]["accuracy"]["mean"] += 1e-6
    assert len(differences(changed, found)) == 1


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_reports_are_what_their_records_say(name):
    """`peft-engine report benchmarks/results/NAME` mends what this finds."""
    committed = RESULTS / name
    told = json.loads((committed / "report.json").read_text())
    assert differences(told, report_of(committed))[:10] == []
    assert as_csv(told) == (committed / "report.csv").read_text()
    assert as_markdown(told) == (committed / "report.md").read_text()
    page = (committed / "report.html").read_text()
    for line in lines_of(told):
        assert all(f">{shown}</td>" in page for _, shown, _ in line["cells"])
