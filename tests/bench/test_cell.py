"""Real cells on tiny models, in this process: what a record holds, against independent computations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics
from tiny import class_rows, pair_rows, sentence, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_engine.bench.cell import main, run_cell, spec_of
from peft_engine.bench.cells import baseline_cell, final_cells, tuning_cells
from peft_engine.bench.general_text import windows
from peft_engine.bench.measuring import refuse_other_loss
from peft_engine.bench.records import read_record, write_record
from peft_engine.bench.suite import GeneralText, Suite, suite_of
from peft_engine.errors import DataError, StorageError, VerificationError
from suites import SUITE

SPLIT = {"eval": 0.2, "test": 0.3}


def suite(folder: Path, model: Path, rows: list[dict[str, Any]], **changes: Any) -> Suite:
    write_rows(folder / "rows.jsonl", rows)
    config = {
        "task": changes.pop("task", "text-classification"),
        "device": "cpu",
        "model": {"path": str(model)},
        "data": {"train": str(folder / "rows.jsonl"), "cache": None, "split": SPLIT},
        "training": {"batch_size": 8, "log_every": 1, **changes.pop("training", {})},
        "budget": {"usd_per_hour": 3.6},
        **changes.pop("config", {}),
    }
    return suite_of({**SUITE, "config": config, **changes})


def run(suite: Suite, cell: Any, folder: Path, **more: Any) -> dict[str, Any]:
    folder.mkdir()
    record = run_cell(json.loads(json.dumps(spec_of(cell, suite.name, suite.general_text, **more))), folder)
    write_record(folder / "record.json", record)
    return read_record(folder / "record.json")


@pytest.fixture(scope="module")
def classes(tmp_path_factory, tiny_model) -> tuple[Suite, dict[str, Any]]:
    """A suite and its baseline, one search run and one final record."""
    folder = tmp_path_factory.mktemp("classes")
    made = suite(folder, tiny_model("bert"), class_rows(80))
    cells = {"baseline": baseline_cell(made), "tuning": tuning_cells(made, "lora")[1]}
    cells["final"] = final_cells(made, "lora", 1e-2)[0]
    cells["full"] = final_cells(made, "full", 1e-3)[0]
    return made, {name: run(made, cell, folder / name) for name, cell in cells.items()}


def test_a_final_record_by_its_raw_rows(classes):
    info = classes[1]["final"]["train_info"]
    items, after = info["items"], info["metrics_after"]
    assert items["kind"] == "classes"
    assert items["rows"] == list(range(24))
    assert items["units"] == [1] * 24
    assert after["accuracy"] == pytest.approx(np.mean(np.equal(items["label"], items["predicted"])))
    assert after["f1_macro"] == pytest.approx(metrics.f1_score(items["label"], items["predicted"], average="macro"))
    assert after["loss"] == pytest.approx(np.mean(items["loss"]), rel=1e-5)
    assert info["class_names"] == ["no", "yes"]
    assert (info["primary"], info["maximize"]) == ("accuracy", True)
    assert info["steps"] == 6
    assert [step for step, _ in info["train_curve"]] == [1, 2, 3, 4, 5, 6]
    assert info["eval_curve"][-1]["step"] == 6
    assert info["step_seconds"]["count"] == 4, "neither the first nor the measured one"
    assert info["step_seconds"]["p10"] <= info["step_seconds"]["p50"] <= info["step_seconds"]["p99"]
    assert info["cost_usd"] == pytest.approx(info["wall_seconds"] * 3.6 / 3600)
    assert info["mfu"] == pytest.approx(
        info["flops_per_step"] / info["step_seconds"]["p50"] / info["gemm"]["flops_per_second"]
    )
    assert "float32" in info["mfu_of"]


@pytest.mark.parametrize("name", ["final", "full"])
def test_memory_is_split_by_what_it_is_for(classes, name):
    info = classes[1][name]["train_info"]
    memory = info["memory"]
    assert sum(memory.values()) == info["peak_bytes"]
    assert memory["gradients"] == 4 * info["trainable_parameters"]
    assert memory["weights"] >= 4 * info["total_parameters"]
    tensors = 8 * info["trainable_parameters"]  # two moments in fp32, and a step counter for each tensor
    assert tensors < memory["optimizer"] < tensors + 1000
    assert info["optimizer_state_bytes"] == memory["optimizer"]
    assert memory["activations"] > 0
    assert 4 * info["trainable_parameters"] < info["adapter_file_bytes"] < 4 * info["trainable_parameters"] + 10_000


def test_a_search_record_knows_nothing_of_the_test_rows(classes):
    info = classes[1]["tuning"]["train_info"]
    assert info["metrics_before"] is info["metrics_after"] is None
    assert "items" not in info
    assert info["steps"] == 3, "half of the budget"
    assert info["eval_curve"][-1]["rows"] == 16


def test_the_baseline_is_the_untouched_model(classes):
    """Its metrics are those that the run with the same seed begins with."""
    found = classes[1]["baseline"]["train_info"]
    before = classes[1]["full"]["train_info"]["metrics_before"]
    assert found["metrics_before"]["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert found["metrics_before"]["loss"] == pytest.approx(np.mean(found["items"]["loss"]), rel=1e-5)
    assert (found["steps"], found["metrics_after"], found["trainable_parameters"]) == (0, None, 0)
    assert found["gemm"]["flops_per_second"] > 1e8


def test_all_records_judge_the_same_rows(classes):
    labels = [classes[1][name]["train_info"]["items"]["label"] for name in ("baseline", "final", "full")]
    assert labels[0] == labels[1] == labels[2]


def test_the_same_cell_gives_the_same_record_but_for_times(classes, tmp_path):
    made, records = classes
    again = run(made, final_cells(made, "lora", 1e-2)[0], tmp_path / "again")
    first = records["final"]
    for name in ("items", "metrics_after", "train_curve", "eval_curve", "peak_bytes", "memory", "flops_per_step"):
        assert again["train_info"][name] == first["train_info"][name], name
    assert again["run_info"]["config"] == first["run_info"]["config"]


def test_forgetting_by_a_plain_loop(tmp_path, tiny_model):
    """transformers alone, a window at a time, by its own loss."""
    folder = tiny_model("llama")
    write_rows(tmp_path / "general.jsonl", [{"tokens": sentence(i, 9).split()} for i in range(400)])
    text = {"path": str(tmp_path / "general.jsonl"), "rows": 5, "max_length": 32}
    made = suite(
        tmp_path,
        folder,
        pair_rows(60),
        task="causal-lm",
        general_text=text,
        budget={"tokens": 900},
        config={"evaluation": {"generate_rows": 3, "max_new_tokens": 4}},
    )
    untouched = run(made, baseline_cell(made), tmp_path / "baseline")
    expected = plain_loss(folder, text)
    before = untouched["train_info"]["forgetting"]
    assert before == {"before": pytest.approx(expected, rel=1e-5), "after": before["before"], "unit": "nats per token"}
    cell = final_cells(made, "full", 1e-2)[0]
    record = run(made, cell, tmp_path / "full", forgetting_before=before["before"])
    info = record["train_info"]
    assert info["forgetting"]["before"] == before["before"]
    assert abs(info["forgetting"]["after"] - before["before"]) > 1e-3
    alone = run(made, cell, tmp_path / "alone")["train_info"]
    assert alone["forgetting"] == info["forgetting"], "without the baseline the cell measures by itself"

    items = info["items"]
    assert items["kind"] == "tokens"
    assert sum(items["loss"]) / sum(items["units"]) == pytest.approx(info["metrics_after"]["loss"], rel=1e-5)
    assert sum(items["right"]) / sum(items["units"]) == pytest.approx(info["metrics_after"]["token_accuracy"])
    bits = sum(items["loss"]) / np.log(2) / sum(items["bytes"])
    assert bits == pytest.approx(info["metrics_after"]["bits_per_byte"], rel=1e-5)
    assert [value is None for value in items["exact"]] == [False] * 3 + [True] * (len(items["rows"]) - 3)
    assert info["metrics_after"]["exact_match"] == np.mean(items["exact"][:3])
    assert abs(info["tokens"] - 900) < 900 / info["steps"], "a budget of tokens, in whole steps"


def plain_loss(folder: Path, text: dict[str, Any]) -> float:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [json.loads(line) for line in Path(text["path"]).read_text().splitlines()]
    ids = tokenizer("\n".join(" ".join(row["tokens"]) for row in rows), add_special_tokens=False)["input_ids"]
    length, losses = text["max_length"], []
    for start in range(0, text["rows"] * length, length):
        window = torch.tensor([ids[start : start + length]])
        with torch.no_grad():
            losses.append(float(model(input_ids=window, labels=window).loss))
    return float(np.mean(losses))


def test_too_little_general_text(tmp_path, tiny_model):
    write_rows(tmp_path / "general.jsonl", [{"text": "a few words"}])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    with pytest.raises(DataError, match="tokens, expected 64 windows of 256"):
        windows(GeneralText(path=str(tmp_path / "general.jsonl")), tokenizer)
    write_rows(tmp_path / "general.jsonl", [{"words": "a few words"}])
    with pytest.raises(DataError, match="neither text nor tokens, but words"):
        windows(GeneralText(path=str(tmp_path / "general.jsonl")), tokenizer)


def test_a_reopened_run_that_is_another_is_refused():
    items = {"loss": [1.0, 2.0], "units": [1, 1]}
    refuse_other_loss({"loss": 1.5004}, items)
    for loss in (1.6, float("nan")):
        with pytest.raises(VerificationError, match="reopened run"):
            refuse_other_loss({"loss": loss}, items)


def test_a_failing_cell_says_why(tmp_path, tiny_model, capsys):
    made = suite(tmp_path, tiny_model("bert"), class_rows(80))
    cell = final_cells(made, "lora", 1e-3)[0]
    spec = spec_of(cell, "tiny", None)
    spec["config"] = {**spec["config"], "model": {**spec["config"]["model"], "path": str(tmp_path / "nowhere")}}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert main([str(tmp_path / "spec.json"), str(tmp_path / "record.json")]) == 2
    told = json.loads((tmp_path / "failure.json").read_text())
    assert "nowhere" in told["reason"]
    assert told["exit_code"] == 2
    assert told["reason"] in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()


def test_records_that_do_not_check(tmp_path):
    path = tmp_path / "one.json"
    parts = {"key": "k", "run_info": {}, "train_info": {"loss": float("nan")}, "meta_info": {}}
    write_record(path, parts)
    assert read_record(path)["train_info"]["loss"] is None, "what is no number can't be known"
    good = path.read_text()
    for text, said in (
        (good.replace('"k"', '"l"'), "damaged"),
        (good[:-9], "can't be read"),
        ("[]", "no record"),
        (good.replace("cell 1", "cell 2"), "no record"),
    ):
        path.write_text(text)
        with pytest.raises(StorageError, match=said):
            read_record(path)
    write_record(path, {name: part for name, part in parts.items() if name != "run_info"})
    with pytest.raises(StorageError, match="lacks run_info"):
        read_record(path)


METHODS = {
    "head": {"method": "head"},
    "bitfit": {"method": "bitfit"},
    "dora": {"method": "lora", "dora": True, "rank": 2},
    "ia3": {"method": "ia3"},
    "houlsby": {"method": "houlsby", "rank": 4},
    "prefix": {"method": "prefix", "options": {"num_virtual_tokens": 2}},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method_is_reopened_and_measured(tmp_path, tiny_model, method):
    made = suite(
        tmp_path,
        tiny_model("bert"),
        class_rows(60),
        budget={"steps": 2},
        methods={"it": {"adapter": METHODS[method], "learning_rates": [1e-2]}},
        reference="it",
    )
    info = run(made, final_cells(made, "it", 1e-2)[0], tmp_path / "it")["train_info"]
    assert sum(info["items"]["loss"]) / len(info["items"]["rows"]) == pytest.approx(
        info["metrics_after"]["loss"], rel=1e-5
    )
    assert info["flops_per_step"] > 0
    assert sum(info["memory"].values()) == info["peak_bytes"]
