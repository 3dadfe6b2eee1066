"""Two results folders: noise is no regression, a real one is, and what can't be compared is said."""

import pytest
from click.testing import CliRunner
from made_records import METHODS, NAMES, class_items, classes_folder, record, write

from peft_engine.bench.comparing import compare
from peft_engine.cli import cli
from peft_engine.errors import ConfigError, VerificationError


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return classes_folder(tmp_path_factory.mktemp("old"), tuned=False)


def changed(folder, **methods):
    return classes_folder(folder, methods={**METHODS, **methods}, tuned=False)


def test_the_same_results_are_the_same(old, tmp_path):
    found = compare(changed(tmp_path), old)
    assert found["regressions"] == []
    assert {line["verdict"] for of in found["methods"].values() for line in of.values()} == {"same"}


def test_worse_quality_is_a_regression(old, tmp_path):
    found = compare(changed(tmp_path, lora=(0.80, 0.070, 380, 600_000)), old)
    assert len(found["regressions"]) == 1
    assert found["regressions"][0].startswith("lora: accuracy 0.9")
    assert found["methods"]["lora"]["accuracy"]["difference"]["high"] < 0


def test_better_quality_is_none(old, tmp_path):
    found = compare(changed(tmp_path, head=(0.80, 0.025, 190, 1_500)), old)
    assert found["regressions"] == []
    assert found["methods"]["head"]["accuracy"]["verdict"] == "better"


def test_a_quality_within_noise_is_none(old, tmp_path):
    found = compare(changed(tmp_path, lora=(0.895, 0.070, 380, 600_000)), old)
    one = found["methods"]["lora"]["accuracy"]
    assert one["difference"]["mean"] != 0
    assert one["verdict"] == "same"


def test_slower_and_larger_are_regressions_beyond_the_bound(old, tmp_path):
    found = compare(changed(tmp_path, lora=(0.90, 0.085, 420, 600_000), bitfit=(0.84, 0.063, 430, 40_000)), old)
    told = sorted(text.split()[1] for text in found["regressions"])
    assert told == ["optimizer_state_bytes", "peak_bytes", "step_seconds", "train_seconds"]
    assert all(text.startswith("lora:") for text in found["regressions"])
    assert found["methods"]["bitfit"]["step_seconds"]["verdict"] == "same"  # 5% is inside the stated bound


def test_a_slow_seed_among_fast_ones_is_noise(old, tmp_path):
    new = changed(tmp_path)
    for seed in (1, 2):  # two of three are 30% slower: the ranges still touch
        slow = record("lora", seed, class_items(0.90, seed, salt="lora"), step_seconds=0.091, peak_mib=380,
                      class_names=NAMES, created_at="2026-12-01", trainable=600_000)  # fmt: skip
        write(new, slow)
    found = compare(new, old)
    assert found["methods"]["lora"]["step_seconds"]["ratio"] > 1.1
    assert found["regressions"] == []


def test_a_method_that_is_gone_is_a_regression_and_a_new_one_is_not(old, tmp_path):
    fewer = {name: METHODS[name] for name in ("full", "head")} | {"dora": METHODS["lora"]}
    found = compare(classes_folder(tmp_path, methods=fewer, tuned=False), old)
    assert found["regressions"] == [f"{name}: has no finished cell any more" for name in ("bitfit", "lora")]
    assert "dora: new, nothing to compare with." in found["notes"]


def test_times_of_other_machines_are_not_compared(old, tmp_path):
    new = changed(tmp_path)
    for seed in range(3):
        items = class_items(0.90, seed, salt="lora")
        other = {"hardware": {"cpu": "another"}, "created_at": "2026-12-01", "class_names": NAMES, "peak_mib": 380}
        write(new, record("lora", seed, items, step_seconds=9.0, trainable=600_000, **other))
    found = compare(new, old)
    assert found["regressions"] == []
    assert "Other hardware: times are not compared." in found["notes"]
    assert "step_seconds" not in found["methods"]["lora"]


def test_quality_on_other_rows_is_not_compared(old, tmp_path):
    for seed in range(3):
        write(tmp_path, record("full", seed, class_items(0.5, seed, rows=100), class_names=NAMES))
    found = compare(tmp_path, old)
    assert "Other data or test rows: quality is not compared." in found["notes"]
    assert "accuracy" not in found["methods"]["full"]


def test_nothing_in_common_is_an_error(old, tmp_path):
    write(tmp_path, record("else", 0, class_items(0.5, 0), class_names=NAMES))
    with pytest.raises(ConfigError, match="no method in common"):
        compare(tmp_path, old)


def test_the_verb_exits_with_7_where_something_regressed(old, tmp_path):
    same = CliRunner().invoke(cli, ["report", str(changed(tmp_path / "same")), "--against", str(old)])
    assert same.exit_code == 0, same.output
    worse = changed(tmp_path / "worse", head=(0.3, 0.025, 190, 1_500))
    done = CliRunner().invoke(cli, ["report", str(worse), "--against", str(old)])
    assert isinstance(done.exception, VerificationError)
    assert done.exception.exit_code == 7
    assert "worse  head: accuracy" in done.output
