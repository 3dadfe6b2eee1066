"""The distance of a merged model from the trained one: its figures, its rows, and where it is written down."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny import class_rows, config, pair_rows, sentence, write_rows

from peft_engine.cli import cli
from peft_engine.config import Config
from peft_engine.data.loading import load_splits
from peft_engine.drift import Gap, HeldOut, judge_batches
from peft_engine.errors import VerificationError
from peft_engine.run import train
from peft_engine.using import export, open_run

Tiny = Callable[[str], Path]
LM, CLASSES = "causal-lm", "text-classification"
APART = {"split": {"eval": 0.2, "test": 0.3}}


def finished(task: str, model: Path, rows: list[dict[str, Any]], folder: Path, /, **more: Any) -> Config:
    training = {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "schedule": "constant", "warmup": 0}
    of = config(task, model, write_rows(folder / "rows.jsonl", rows), folder / "out", training=training, **more)
    train(of)
    return of


def by_hand(trained: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """KL in nats and agreement, the sums written out in Python's floats."""
    nats = same = 0.0
    for p, q in zip(trained.double().tolist(), found.double().tolist(), strict=True):
        tops = max(p), max(q)
        sums = [top + math.log(sum(math.exp(v - top) for v in one)) for one, top in zip((p, q), tops, strict=True)]
        log_p, log_q = ([v - total for v in one] for one, total in zip((p, q), sums, strict=True))
        nats += sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True) if a > -math.inf)
        same += p.index(max(p)) == q.index(max(q))
    return nats / len(trained), same / len(trained)


def test_figures_are_those_made_by_hand() -> None:
    torch.manual_seed(0)
    trained = torch.randn(1200, 7) * 3
    found = trained + torch.randn(1200, 7) * 0.3
    trained[::3, 5:] = found[::3, 5:] = -torch.inf  # choices that a row does not have
    gap = Gap()
    for start, end in ((0, 1), (1, 900), (900, 900), (900, 1200)):
        gap.update(trained[start:end], found[start:end])
    drift = gap.compute()
    kl, same = by_hand(trained, found)
    assert drift.kl == pytest.approx(kl, rel=1e-5)
    assert 0.5 < drift.top1_agreement == same < 1
    real = torch.isfinite(trained)
    largest = (trained - found)[real].abs().max() / trained[real].abs().max()
    assert drift.relative == pytest.approx(float(largest))


def test_what_is_the_same_is_at_no_distance() -> None:
    logits = torch.randn(3, 40, 9)
    drift = judge_batches(logits, logits.clone())
    assert (drift.relative, drift.kl, drift.top1_agreement) == (0, 0, 1)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_a_number_is_refused(broken: float, side: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 600, 5)
    pair = [logits, logits.clone()]
    pair[side][0, 550, 2] = broken
    drift = judge_batches(pair[0], pair[1])
    bounds = {"kl": 1e9, "top1_agreement": 0.0}
    if side == 0 and broken == -math.inf:
        bounds = {"kl": 1e-5, "top1_agreement": 1.0}  # as of a choice that is not there: the others' shares move
    with pytest.raises(VerificationError):
        HeldOut("test", 1, 600, "token", drift.relative, drift.kl, drift.top1_agreement, bounds).refuse()
    with pytest.raises(VerificationError):
        HeldOut("test", 1, 600, "row", math.nan, None, None, {"relative": 1e9}).refuse()


@pytest.mark.parametrize(
    ("kl", "top1", "fine"),
    [(0.05, 0.9, True), (0.0501, 1.0, False), (0.0, 0.899, False), (math.nan, 1.0, False), (0.0, math.nan, False)],
)
def test_each_bound_refuses_by_itself(kl: float, top1: float, fine: bool) -> None:
    one = HeldOut("test", 4, 9, "token", 0.0, kl, top1, {"kl": 0.05, "top1_agreement": 0.9})
    if fine:
        one.refuse()
        return
    with pytest.raises(VerificationError, match="on 4 test rows") as caught:
        one.refuse()
    assert caught.value.exit_code == 7


def test_a_merge_is_compared_on_every_supervised_token_of_the_test_rows(tiny_model: Tiny, tmp_path: Path) -> None:
    """Against sums made by hand from two models that a user loads: the adapter's by the engine, the merged in plain."""
    of = finished(LM, tiny_model("llama"), pair_rows(40), tmp_path, data=APART)
    folder, drift = export(of.output, merged=True)
    kept = json.loads((folder / "merge.json").read_text())["held_out"]
    opened = open_run(of.output)
    splits, task = load_splits(of), opened.task
    assert splits.test is not None
    merged = task.plain(str(folder)).eval()
    ours, theirs = [], []
    for number, example in enumerate(splits.test.examples):
        ids, learned = task.mask(example, str(number))
        places = [i - 1 for i, one in enumerate(learned) if one]
        for model, found in ((opened.group.model.eval(), ours), (merged, theirs)):
            with torch.no_grad():
                found.append(model(input_ids=torch.tensor([ids])).logits[0][places])
    kl, same = by_hand(torch.cat(ours), torch.cat(theirs))
    assert (kept["split"], kept["rows"], kept["places"]) == ("test", len(splits.test.examples), len(torch.cat(ours)))
    assert kept["unit"] == "token"
    assert kept["top1_agreement"] == same == 1
    assert abs(kept["kl"] - kl) < 1e-6
    assert abs(kept["kl"]) < 1e-6
    assert drift.held_out is not None
    assert drift.held_out.to_json() == kept


NUMBERS = [{"text": sentence(i, 2 + i % 5), "score": i % 7 / 2 - 1.5} for i in range(40)]
SEVERAL = [
    {"text": sentence(i, 2 + i % 5), "labels": [n for bit, n in enumerate(("a", "b")) if i >> bit & 1]}
    for i in range(40)
]
CHOICES = [{"text": sentence(i, 3), "choices": ["cats", "wall", "fox"][: 2 + i % 2], "label": i % 2} for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "pooling", "unit", "places"),
    [
        (class_rows(40), "mean", "row", 12),
        (class_rows(40), "model", "row", 12),
        (SEVERAL, "mean", "label", 24),
        (NUMBERS, "mean", "row", 12),
        (CHOICES, "mean", "row", 12),
        (CHOICES, "model", "row", 12),
    ],
    ids=["classes", "own pooler", "several labels", "numbers", "choices", "choices, own pooler"],
)
def test_every_kind_of_answer(
    rows: list[dict[str, Any]], pooling: str, unit: str, places: int, tiny_model: Tiny, tmp_path: Path
) -> None:
    of = finished(CLASSES, tiny_model("bert"), rows, tmp_path, data=APART, model={"pooling": pooling})
    found = export(of.output, merged=True)[1].held_out
    assert found is not None
    assert (found.split, found.unit, found.places) == ("test", unit, places)
    assert found.relative < 1e-4
    if rows is NUMBERS:
        assert (found.kl, found.top1_agreement, found.bounds) == (None, None, {"relative": 0.1})
        assert "largest output" in found.told()
    else:
        assert found.kl == pytest.approx(0, abs=1e-6)
        assert found.top1_agreement == 1


@pytest.mark.parametrize(("split", "wanted"), [({"eval": 0.2, "test": 0.0}, "eval"), ({"eval": 0, "test": 0}, "train")])
def test_other_rows_where_there_is_no_test_split(
    split: dict[str, float], wanted: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    of = finished(CLASSES, tiny_model("bert"), class_rows(40), tmp_path, data={"split": split})
    found = export(of.output, merged=True)[1].held_out
    assert found is not None
    assert (found.split, found.rows) == (wanted, 8 if wanted == "eval" else 40)


def test_a_large_split_is_sampled_evenly(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_engine import drift

    monkeypatch.setattr(drift, "ROWS", 5)
    of = finished(CLASSES, tiny_model("bert"), class_rows(40), tmp_path, data={"split": {"eval": 0, "test": 0}})
    seen: list[int] = []
    visit = drift.visit_rows
    monkeypatch.setattr(drift, "visit_rows", lambda *given: (seen.extend(given[-1].tolist()), visit(*given)))
    found = export(of.output, merged=True)[1].held_out
    assert found is not None
    assert (sorted(seen), found.rows) == ([0, 10, 20, 29, 39], 5)


def test_without_the_data_it_says_so(tiny_model: Tiny, tmp_path: Path) -> None:
    of = finished(LM, tiny_model("gpt2"), pair_rows(30), tmp_path, data=APART)
    (tmp_path / "rows.jsonl").unlink()
    asked = ["export", str(of.output), "--merged"]
    printed = CliRunner().invoke(cli, asked)
    assert printed.exit_code == 0, printed.output
    assert "on seeded random input, because the run's rows can't be read: " in printed.stdout
    kept = json.loads((tmp_path / "out" / "merged" / "merge.json").read_text())
    assert (kept["held_out"]["split"], kept["held_out"]["rows"]) == ("probe", 0)
    assert "rows.jsonl" in kept["held_out"]["note"]
    assert kept["held_out"]["kl"] == kept["reloaded"]["kl"]


def test_a_merge_into_a_folder_that_is_there(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = finished(CLASSES, tiny_model("bert"), class_rows(40), tmp_path, data=APART)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with monkeypatch.context() as patched:
        patched.setattr("peft_engine.drift.MIN_TOP1", 1.1)
        with pytest.raises(VerificationError):
            export(of.output, merged=True, target=".")
    assert not list(Path.cwd().iterdir())
    export(of.output, merged=True, target=".")
    written = {path.name for path in (tmp_path / "empty").iterdir()}
    assert written >= {"model.safetensors", "config.json", "merge.json"}
    assert not any(name.startswith(".") for name in written)


def test_the_terminal_and_json_tell_it(tiny_model: Tiny, tmp_path: Path) -> None:
    of = finished(CLASSES, tiny_model("bert"), class_rows(40), tmp_path, data=APART)
    told = CliRunner().invoke(cli, ["export", str(of.output), "--merged", "--to", str(tmp_path / "one")])
    assert "against what was trained: KL " in told.stdout
    assert "nats per row (bound 0.05), top-1 agreement 100.0% (bound 90%) on 12 test rows" in told.stdout
    asked = ["export", str(of.output), "--merged", "--to", str(tmp_path / "two"), "--max-kl", "0.5", "--json"]
    found = json.loads(CliRunner().invoke(cli, asked).stdout)
    assert found["held_out"]["bounds"] == {"kl": 0.5, "top1_agreement": 0.9}
    assert "held_out" not in json.loads(CliRunner().invoke(cli, ["export", str(of.output), "--json"]).stdout)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max-kl", "0.1"], "only a merged model"),
        (["--merged", "--max-kl", "-1"], "0 or more"),
        (["--merged", "--max-kl", "nan"], "0 or more"),
        (["--merged", "--max-kl", "0.1"], "no probabilities"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(words: list[str], told: str, tiny_model: Tiny, tmp_path: Path) -> None:
    of = finished(CLASSES, tiny_model("bert"), NUMBERS, tmp_path)
    found = CliRunner().invoke(cli, ["export", str(of.output), *words])
    assert found.exit_code != 0
    assert told in str(found.exception) + found.output
    assert not (tmp_path / "out" / "merged").exists()
