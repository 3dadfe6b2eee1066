"""Two results folders: noise is no regression, a real one is, and what can't be compared is said."""

import json

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from made_records import METHODS, NAMES, class_items, classes_folder, edited, record, write
from scipy.stats import t as student

from peft_engine.bench.comparing import compare, told_comparison
from peft_engine.bench.noise import moves
from peft_engine.cli import cli
from peft_engine.errors import ConfigError, VerificationError


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return classes_folder(tmp_path_factory.mktemp("old"), tuned=False)


def changed(folder, **methods):
    return classes_folder(folder, methods={**METHODS, **methods}, tuned=False)


def forgets(amount):
    """Each seed forgets about as much."""

    def edit(one):
        wobble = 0.01 * np.random.default_rng([one["run_info"]["seed"], round(100 * amount)]).normal()
        one["train_info"]["forgetting"] = {"before": 3.0, "after": 3.0 + amount + wobble, "unit": "nats per token"}

    return edit


def against_zero(**differences):
    return {name: (each, np.zeros(len(each))) for name, each in differences.items()}


def family(random, spreads, seeds=3, drop=0.0):
    """Whether any of many methods is said to be worse, and whether the first is, where it lost `drop`."""
    values = {str(m): tuple(random.normal(0, spread, seeds) for _ in range(2)) for m, spread in enumerate(spreads)}
    values["0"] = values["0"][0] - drop, values["0"][1]
    judged = moves({"accuracy": values})["accuracy"]
    worse = {name for name, one in judged.items() if one.mean < -one.margin}
    return bool(worse), "0" in worse


NOISE = {
    "alike": [0.01] * 9,  # what stood here first gave a false alarm in 72% of these
    "one": [0.01] * 8 + [0.1],  # a prefix that falls to chance with one seed of three
    "three": [0.01] * 6 + [0.1] * 3,
    "repeated": [0.01] * 2 + [0.0] * 7,  # seven that repeat to the last bit, and don't vouch for the others
    "alone": [0.01],
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_noise_of_seeds_is_seldom_a_regression(noise):
    """Methods × 3 seeds of one truth: any false alarm in 5% of worlds at most, and .01 for 1,500 of them."""
    random = np.random.default_rng(3)
    alarms = np.mean([family(random, noise)[0] for _ in range(1500)])
    assert 0 < alarms <= 0.06


@pytest.mark.parametrize(("noise", "drop"), [("alike", 0.05), ("one", 0.05), ("three", 0.1), ("alone", 0.05)])
def test_a_real_drop_is_found(noise, drop):
    """Where one seed's noise is .01, 9 times in 10, whatever other methods do."""
    random = np.random.default_rng(6)
    assert np.mean([family(random, NOISE[noise], drop=drop)[1] for _ in range(500)]) >= 0.88


def test_a_margin_by_hand():
    """Two methods, 4 degrees of freedom, two comparisons: t(0.975, 4) = 2.776 from any table."""
    found = moves({"loss": against_zero(a=[0.1, 0.2, 0.3], b=[-0.1, 0.0, 0.1], same=[0.0, 0.0, 0.0])})["loss"]
    assert found["a"].mean == pytest.approx(0.2)
    assert found["a"].margin == pytest.approx(2.776 * 0.1 / 3**0.5, rel=1e-3)
    assert found["a"].single == pytest.approx(4.303 * 0.1, rel=1e-3)  # b's alone: t(0.975, 2)
    assert (found["same"].mean, found["same"].margin) == (0.0, 0.0)
    assert moves({"loss": against_zero(a=[0.1], b=[0.2])})["loss"] == {"a": None, "b": None}


def test_a_restless_method_is_judged_alone_by_hand():
    """c's variance is 100 times the others': its margin has 2 degrees of freedom, theirs have 4; 3 comparisons."""
    calm = {"a": [0.1, 0.2, 0.3], "b": [-0.1, 0.0, 0.1]}
    found = moves({"loss": against_zero(**calm, c=[1.0, 2.0, 3.0])})["loss"]
    assert found["a"].margin == pytest.approx(float(student.isf(0.05 / 3, 4)) * 0.1 / 3**0.5)
    assert found["c"].margin == pytest.approx(float(student.isf(0.05 / 3, 2)) * 1.0 / 3**0.5)
    values = {name: (each, each) for name, each in calm.items()} | {"c": ([0.1, 0.2, 0.3], [0.0, 5.0, 9.0])}
    shifted = {name: (np.add(new, [0.1, 0.2, 0.3]), old) for name, (new, old) in values.items()}
    assert moves({"loss": shifted})["loss"]["c"].margin > 10 * moves({"loss": shifted})["loss"]["a"].margin


def test_the_same_results_are_the_same(old, tmp_path):
    found = compare(changed(tmp_path), old)
    assert found["regressions"] == []
    assert {line["verdict"] for of in found["methods"].values() for line in of.values()} == {"same"}
    assert found["notes"] == []


def test_worse_quality_is_a_regression(old, tmp_path):
    found = compare(changed(tmp_path, lora=(0.80, 0.070, 380, 600_000)), old)
    assert [" ".join(text.split()[:2]) for text in found["regressions"]] == ["lora: accuracy", "lora: loss"]
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


def wrong(*rows):
    """These test rows are got wrong."""

    def edit(one):
        items = one["train_info"]["items"]
        for row in rows:
            items["predicted"][row] = (items["label"][row] + 1) % len(NAMES)

    return edit


def test_one_test_row_in_every_seed_is_noise(old, tmp_path):
    """Three equal differences have no variance, but one row of 400 tells nothing."""
    rights = [set(np.flatnonzero(hits)) for hits in (hits_of(old, seed) for seed in range(3))]
    row = min(set.intersection(*rights))
    found = compare(edited(changed(tmp_path), "lora-final-*", wrong(row)), old)
    one = found["methods"]["lora"]["accuracy"]
    assert one["difference"]["mean"] == pytest.approx(-1 / 400)
    assert one["verdict"] == "same"
    assert found["regressions"] == []


def hits_of(folder, seed):
    path = next((folder / "cells").glob(f"lora-final-{seed}-*"))
    items = json.loads(path.read_text())["train_info"]["items"]
    return np.array(items["label"]) == np.array(items["predicted"])


def test_one_restless_method_hides_no_other(old, tmp_path):
    """head recovers from chance with one seed; bitfit loses 15 points in all of them."""
    before = edited(changed(tmp_path / "old"), "head-final-1-*", wrong(*range(250)))
    after = changed(tmp_path / "new", bitfit=(0.69, 0.060, 430, 40_000))
    told = [" ".join(text.split()[:2]) for text in compare(after, before)["regressions"]]
    assert "bitfit: accuracy" in told


def test_a_seed_that_falls_is_told(old, tmp_path):
    found = compare(edited(changed(tmp_path), "lora-final-1-*", wrong(*range(250))), old)
    assert found["methods"]["lora"]["accuracy"]["verdict"] == "same"
    told = [note for note in found["notes"] if note.startswith("lora: 0.9")]
    assert len(told) == 1
    assert "but seed 1 moved by -0.5" in told[0]
    assert "look at it" in told[0]


def test_a_metric_beside_the_primary_one_is_compared(old, tmp_path):
    def unsure(one):
        one["train_info"]["items"]["loss"] = [3 * loss for loss in one["train_info"]["items"]["loss"]]

    found = compare(edited(changed(tmp_path), "lora-final-*", unsure), old)
    assert [" ".join(text.split()[:2]) for text in found["regressions"]] == ["lora: loss"]
    assert found["methods"]["lora"]["loss"]["higher_is_better"] is False


def test_more_forgetting_is_a_regression(tmp_path):
    before, after = (edited(changed(tmp_path / name), "*-final-*", forgets(0.02)) for name in ("old", "new"))
    edited(after, "lora-final-*", forgets(0.43))
    edited(after, "head-final-*", forgets(0.025))
    found = compare(after, before)
    assert [" ".join(text.split()[:2]) for text in found["regressions"]] == ["lora: forgetting"]
    assert found["methods"]["head"]["forgetting"]["verdict"] == "same"


def test_a_number_that_only_one_has_is_told(old, tmp_path):
    found = compare(edited(changed(tmp_path), "lora-final-*", forgets(8.0)), old)
    assert found["regressions"] == []
    assert "lora: forgetting: only in the new results, not compared." in found["notes"]


def test_one_seed_is_held_against_the_test_items_and_that_is_said(tmp_path):
    before, after, same = (classes_folder(tmp_path / n, seeds=1, tuned=False, methods=m) for n, m in
                           (("old", METHODS), ("new", {**METHODS, "lora": (0.80, 0.070, 380, 600_000)}),
                            ("same", {**METHODS, "lora": (0.899, 0.070, 380, 600_000)})))  # fmt: skip
    found = compare(after, before)
    assert [" ".join(text.split()[:2]) for text in found["regressions"]] == ["lora: accuracy", "lora: loss"]
    assert found["methods"]["lora"]["accuracy"]["by"] == "items"
    assert any(note.startswith("One seed in common of lora:") for note in found["notes"])
    assert compare(same, before)["regressions"] == []


def test_one_seed_without_test_items_is_not_compared(tmp_path):
    for name, value in (("old", 0.9), ("new", 0.5)):
        write(tmp_path / name, record("full", 0, {}, metrics_after={"accuracy": value}))
    found = compare(tmp_path / "new", tmp_path / "old")
    assert "full: accuracy: one seed in common, no noise is known: not compared." in found["notes"]
    assert "accuracy" not in found["methods"]["full"]


def test_slower_and_larger_are_regressions_beyond_the_bound(old, tmp_path):
    found = compare(changed(tmp_path, lora=(0.90, 0.085, 420, 600_000), bitfit=(0.84, 0.063, 430, 40_000)), old)
    told = sorted(text.split()[1] for text in found["regressions"])
    assert told == ["optimizer_state_bytes", "peak_bytes", "step_seconds", "train_seconds"]
    assert all(text.startswith("lora:") for text in found["regressions"])
    assert found["methods"]["bitfit"]["step_seconds"]["verdict"] == "same"  # 5% is inside the stated bound


def test_a_slow_hour_of_the_machine_is_no_regression(old, tmp_path):
    """1.19×, as a suite run twice gave, and one method that got slower beyond that."""
    slow = {name: (share, step * 1.19, peak, of) for name, (share, step, peak, of) in METHODS.items()}
    found = compare(changed(tmp_path / "slow", **slow), old)
    assert found["regressions"] == []
    assert found["all_methods"] == pytest.approx(1.19)
    assert "All methods are 1.19× slower: so may the machine be. Each is held against that." in found["notes"]
    slow["lora"] = (0.90, 0.070 * 1.19 * 1.3, 380, 600_000)
    found = compare(changed(tmp_path / "lora", **slow), old)
    assert {text.split(":")[0] for text in found["regressions"]} == {"lora"}


def test_a_family_that_got_slower_is_not_all_methods(old, tmp_path):
    """Two of four slower by 1.24: the median would call that the machine."""
    slow = {name: (share, step * (1.24 if name in ("lora", "bitfit") else 1.0), peak, of)
            for name, (share, step, peak, of) in METHODS.items()}  # fmt: skip
    found = compare(changed(tmp_path, **slow), old)
    assert {text.split(":")[0] for text in found["regressions"]} == {"lora", "bitfit"}
    assert not any("All methods" in note for note in found["notes"])


def test_slow_judging_and_a_larger_file_are_regressions(old, tmp_path):
    def edit(one):
        one["train_info"]["seconds"]["evaluate"] *= 2
        one["train_info"]["adapter_file_bytes"] *= 10

    found = compare(edited(changed(tmp_path), "lora-final-*", edit), old)
    assert [text.split()[1] for text in found["regressions"]] == ["evaluate_seconds", "adapter_file_bytes"]


def test_all_methods_much_slower_are_one_regression(old, tmp_path):
    found = compare(classes_folder(tmp_path, tuned=False, slower=1.6), old)
    assert found["regressions"] == ["all methods are 1.60× slower (bound 1.25×), by their step times"]
    assert told_comparison(found)[0] == "worse  all methods are 1.60× slower (bound 1.25×), by their step times"


def test_a_method_that_stays_while_others_get_faster_is_none(old, tmp_path):
    fast = {name: (share, step * 0.6, peak, of) for name, (share, step, peak, of) in METHODS.items() if name != "full"}
    found = compare(changed(tmp_path, **fast), old)
    assert found["regressions"] == []
    assert any(note.startswith("All methods are 1.67× faster") for note in found["notes"])


def test_one_method_alone_has_the_wider_bound(tmp_path):
    folders = {name: classes_folder(tmp_path / name, methods={"full": METHODS["full"]}, tuned=False, slower=slower)
               for name, slower in (("old", 1.0), ("hour", 1.2), ("worse", 1.3))}  # fmt: skip
    assert compare(folders["hour"], folders["old"])["regressions"] == []
    told = compare(folders["worse"], folders["old"])["regressions"]
    assert [text.split()[1] for text in told] == ["step_seconds", "train_seconds"]
    assert "bound 1.25×" in told[0]


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


def test_seeds_that_are_gone_are_a_regression_and_new_ones_are_not(old, tmp_path):
    new = classes_folder(tmp_path, seeds=4, tuned=False)
    for method, seed in (("full", 1), ("full", 2), ("lora", 0)):
        next((new / "cells").glob(f"{method}-final-{seed}-*")).unlink()
    found = compare(new, old)
    assert found["regressions"] == [
        "full: seeds 1, 2 have no finished cell any more",
        "lora: seed 0 has no finished cell any more",
    ]
    assert "head: seed 3 has nothing to be compared with." in found["notes"]
    assert found["methods"]["full"]["accuracy"]["seeds"] == [0]


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
    assert "peak_bytes" in found["methods"]["lora"]


def test_times_of_crowded_machines_are_not_compared(old, tmp_path):
    new = classes_folder(tmp_path, tuned=False, slower=1.6)
    found = compare(edited(new, "*-final-*", lambda one: one["run_info"].__setitem__("cells_at_once", 4)), old)
    assert found["regressions"] == []
    assert "Other numbers of cells at once (1 → 4): times are not compared." in found["notes"]


def on_other_rows(new):
    for path in (new / "cells").glob("*"):
        path.unlink()
    for seed in range(3):
        write(new, record("full", seed, class_items(0.5, seed, rows=100), class_names=NAMES))


def with_budget(new):
    path = new / "suite.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"budget": {"steps": 30}}))


def with_steps(new):
    edited(new, "*-final-*", lambda one: one["run_info"]["config"].__setitem__("training", {"steps": 30}))


def with_meta(name):
    return lambda new: edited(new, "*-final-*", lambda one: one["meta_info"].__setitem__(name, "other"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (on_other_rows, r"test rows: got 100 rows, expected 400"),
        (with_budget, r"budget: got steps 30, expected steps 300"),
        (with_steps, r"budget: got steps 30, expected steps 300"),
        (with_meta("data_digest"), r"data: got other, expected dddddddd"),
        (with_meta("weights_digest"), r"weights: got other, expected wwwwwwww"),
    ],
)
def test_another_benchmark_is_not_compared(tmp_path, change, told):
    before, after = changed(tmp_path / "old"), changed(tmp_path / "new")
    edited(before, "*-final-*", lambda one: one["run_info"]["config"].__setitem__("training", {"steps": 300}))
    if change is not with_steps:
        edited(after, "*-final-*", lambda one: one["run_info"]["config"].__setitem__("training", {"steps": 300}))
    change(after)
    with pytest.raises(ConfigError, match=f"not of one benchmark:\n  {told}") as caught:
        compare(after, before)
    assert "Nothing was compared." in caught.value.fix


def test_all_that_is_other_is_named_at_once(old, tmp_path):
    new = changed(tmp_path)
    with_budget(new)
    with_meta("weights_digest")(new)
    done = CliRunner().invoke(cli, ["report", str(new), "--against", str(old)])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.exit_code == 2
    assert "budget: " in str(done.exception)
    assert "weights: " in str(done.exception)
    assert "same" not in done.output


def test_what_else_was_otherwise_is_noted(old, tmp_path):
    def other(one):
        one["meta_info"] |= {
            "versions": {"torch": "9", "peft-engine": "0.1.0"},
            "git": {"commit": "f" * 40, "dirty": True},
        }
        one["meta_info"]["kernels"] = one["meta_info"]["kernels"] | {"backend": "triton"}
        one["run_info"]["learning_rate"] = 7.0
        if one["run_info"]["method"] == "lora":
            one["meta_info"]["kernels"]["swapped"] = {}
            one["run_info"]["config"] |= {"adapter": {"method": "lora", "rank": 64}, "data": {"max_length": 64}}

    found = compare(edited(changed(tmp_path), "*-final-*", other), old)
    assert found["regressions"] == []
    assert found["notes"] == [
        "Other versions: torch 2.13.0 → 9.",
        "Other code: commit 0123abc → fffffff with changes.",
        "Other kernels: backend torch → triton.",
        "lora: other settings: adapter.rank None → 64, data.max_length None → 64.",
        "lora: other fused parts: layer_norm 13, lora_linear 36 → none.",
        "bitfit: other learning rate: 0.0003 → 7.0.",
        "full: other learning rate: 0.0003 → 7.0.",
        "head: other learning rate: 0.001 → 7.0.",
        "lora: other learning rate: 0.0003 → 7.0.",
    ]


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
