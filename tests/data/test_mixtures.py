"""Mixtures: exact counts per source in each epoch, drawn by (seed, epoch) alone; splits over the union."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import assemble, class_rows, config, pair_rows, sentence, write_rows

from peft_engine.config import Config
from peft_engine.config_reading import load_config, to_yaml
from peft_engine.data.batching import BatchPlan
from peft_engine.data.mixing import Mixture, name_of, seen
from peft_engine.data.splitting import load_splits
from peft_engine.errors import DataError
from peft_engine.inspection import inspect_data
from peft_engine.run import train

SIZES, WEIGHTS = (31, 10, 7, 1), (1.0, 2.5, 0.3, 0.1)
SOURCES = np.repeat(np.arange(4), SIZES)
LENGTHS = np.random.default_rng(0).integers(1, 90, len(SOURCES))


def plan(seed=0, group=True, size=8):
    return BatchPlan(LENGTHS, size, seed, group, mixture=Mixture(SOURCES, WEIGHTS))


def epoch(made, number):
    first = number * made.steps_per_epoch + 1
    return [made.rows(step) for step in range(first, first + made.steps_per_epoch)]


@pytest.mark.parametrize("group", [False, True])
def test_exact_counts_in_every_epoch(group):
    made = plan(group=group)
    total = 31 + 25 + 2 + 1
    assert made.steps_per_epoch == -(-total // 8)
    for number in range(5):
        batches = epoch(made, number)
        assert sorted(len(batch) for batch in batches)[1:] == [8] * (len(batches) - 1)
        rows = np.concatenate(batches)
        assert np.bincount(SOURCES[rows]).tolist() == [31, 25, 2, 1]
        often = Counter(rows.tolist())
        assert all(often[row] == 1 for row in range(31))
        assert sorted(often[row] for row in range(31, 41)) == [2] * 5 + [3] * 5
        assert max(often[row] for row in range(41, 49)) == 1


def test_fractions_are_drawn_anew_and_reach_every_row():
    made = plan()
    drawn = [frozenset(row for row in np.concatenate(epoch(made, n)).tolist() if 41 <= row < 48) for n in range(40)]
    assert len(set(drawn)) > 10
    assert frozenset().union(*drawn) == set(range(41, 48))


@pytest.mark.parametrize("group", [False, True])
def test_a_function_of_seed_and_step(group):
    in_order = {step: made.rows(step).tolist() for made in [plan(group=group)] for step in range(1, 40)}
    again = plan(group=group)
    for step in np.random.default_rng(1).permutation(np.arange(1, 40)):
        assert again.rows(int(step)).tolist() == in_order[int(step)]
    assert [plan(seed=1, group=group).rows(step).tolist() for step in (1, 2)] != [in_order[1], in_order[2]]


def test_counts_of_an_epoch():
    assert [seen(n, w) for n, w in ((10, 1), (10, 0.5), (3, 0.5), (10, 0.01), (0, 2), (7, 2.0))] == [10, 5, 2, 1, 0, 14]
    shares = Mixture(SOURCES, WEIGHTS).shares()
    assert shares.sum() == pytest.approx(Mixture(SOURCES, WEIGHTS).size)


@pytest.fixture
def mixed(tmp_path):
    """Three sources with overlapping inputs and columns of their own."""
    first = [{"text": f"one {i}", "label": "ab"[i % 2]} for i in range(200)]
    second = [{"headline": f"two {i}", "class": "ab"[i % 2]} for i in range(100)]
    second += [{"headline": f"one {i}", "class": "ab"[i % 2]} for i in range(50)]
    paths = [str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("a", first), ("b", second))]
    sources = [{"path": paths[0]}, {"path": paths[1], "weight": 0.5, "columns": {"text": "headline"}}]

    def make(**data):
        given = {"train": sources, "cache": None, **data}
        return Config.model_validate(
            {"task": "text-classification", "model": {"path": "m"}, "output": "o", "data": given}
        )

    return make


def test_an_input_of_two_sources_falls_on_one_side(mixed):
    splits = load_splits(mixed())
    sides = [{row["text"] for row in split.examples} for split in (splits.train, splits.eval, splits.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert sum(len(split.examples) for split in (splits.train, splits.eval, splits.test)) == 350
    held = [Path(where.split(",")[0]).name for split in (splits.eval, splits.test) for where in split.where]
    assert abs(Counter(held)["b.jsonl"] / len(held) - 150 / 350) < 0.1, "in proportion to the sources"
    for where, source in zip(splits.train.where, splits.train.sources, strict=True):
        assert where.split("/")[-1].startswith("ab"[source])


def test_rows_per_source_are_told(mixed):
    splits = load_splits(mixed(split={"eval": 0.0, "test": 0.0}))
    told = [{k: v for k, v in part.items() if k != "path"} for part in splits.report.sources]
    assert told == [
        {"weight": 1.0, "rows": 200, "train": 200, "epoch": 200},
        {"weight": 0.5, "rows": 150, "train": 150, "epoch": 75},
    ]
    assert load_splits(mixed(train=mixed().data.train[0].path)).report.sources == []
    limited = load_splits(mixed(split={"eval": 0.0, "test": 0.0}, limit={"train": 100})).report.sources
    assert sum(part["train"] for part in limited) == 100


def test_sources_must_hold_the_same_kind(tmp_path):
    paths = [write_rows(tmp_path / "a.jsonl", pair_rows(4)), write_rows(tmp_path / "b.jsonl", [{"text": "x"}])]
    of = config("causal-lm", "m", "", "o", data={"train": [{"path": str(path)} for path in paths]})
    with pytest.raises(DataError, match=r"a\.jsonl holds prompt-completion, .*b\.jsonl text"):
        load_splits(of)


def test_settings_round_trip_and_are_checked(mixed, tmp_path):
    of = mixed()
    again = load_config(yaml.safe_load(to_yaml(of)))
    assert again == of
    assert name_of(of).endswith("b.jsonl (×0.5)")
    path = of.data.train[0].path
    for change, problem in (
        ({"eval": path}, "the same as data.train"),
        ({"train": []}, "empty list"),
        ({"train": [{"path": path}, {"path": path}]}, "a second time"),
        ({"train": [{"path": path}, {"path": f"{Path(path).parent}/./{Path(path).name}"}]}, "a second time"),
        ({"eval": f"{Path(path).parent}/./{Path(path).name}"}, "the same as data.train"),
        ({"train": [{"path": path, "weight": 0}]}, "greater than 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            mixed(**change)
    with pytest.raises(ValueError, match="our own loop"):
        config("dpo", "m", "", "o", data={"train": [{"path": "a.jsonl", "weight": 2.0}]})


def test_a_run_sees_what_the_report_says(tiny_model, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", class_rows(20))
    two = write_rows(tmp_path / "two.jsonl", [{"text": sentence(50 + i, 3), "label": "yes"} for i in range(6)])
    sources = [{"path": str(one), "weight": 1.5}, {"path": str(two), "weight": 0.5}]
    data = {"train": sources, "split": {"eval": 0.0, "test": 0.0}}
    of = config("text-classification", tiny_model("bert"), sources, tmp_path / "run", data=data,
                training={"epochs": 2, "batch_size": 8})  # fmt: skip
    summary = train(of)
    assert [part["epoch"] for part in summary["data"]["sources"]] == [30, 3]
    assert summary["steps"] == 2 * 5
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "one.jsonl (×1.5) + " in card
    report, _ = inspect_data(of, 0)
    assert report["sources"] == summary["data"]["sources"]
    made = assemble(of)
    rows = np.concatenate([made.trainees[0].plan.rows(step) for step in range(1, 6)])
    sources_seen = Counter(made.splits.train.sources[int(made.data["train"].rows[row])] for row in rows)
    assert sources_seen == {0: 30, 1: 3}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["sources"] == summary["data"]["sources"]
