import io
import json

import numpy as np
import pytest
from chat_samples import chatml, metaspace_tokenizer
from rich.console import Console

from peft_engine.config import Config
from peft_engine.data.encoding import EncodedSet
from peft_engine.data.formats import Layout
from peft_engine.data.inspecting import DIM, GREEN, RESET, inspect_splits, mask_preview, print_inspection
from peft_engine.data.labels import Labels
from peft_engine.data.splitting import Split, SplitReport, Splits, load_splits


def encoded(lengths, dropped=(), truncated=0, learned=None):
    """Sequences of these lengths; of each the last `learned` tokens are supervised."""
    lengths = np.asarray(lengths, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    columns = {}
    if learned is not None:
        columns["supervised"] = np.concatenate([np.arange(n) >= n - learned for n in lengths])
    return EncodedSet(
        input_ids=np.zeros(int(lengths.sum()), dtype=np.int32),
        offsets=offsets,
        units=np.ones(len(lengths), dtype=np.int64),
        rows=np.arange(len(lengths)),
        columns=columns,
        dropped=list(dropped),
        truncated=truncated,
    )


def classified(values, kind="single", names=("no", "yes"), report=None):
    split = Split(
        [{"text": str(i), "label": v} for i, v in enumerate(values)], [f"row {i}" for i in range(len(values))]
    )
    labels = Labels(kind, list(names))
    return Splits(split, None, None, Layout("text-label", {}), labels, report or SplitReport(), "abc")


def printed(report):
    out = io.StringIO()
    print_inspection(report, Console(file=out, width=120, no_color=True))
    return out.getvalue()


def test_token_facts():
    split = Split([{"text": "x"}] * 10, [f"a.txt, line {i + 1}" for i in range(10)])
    splits = Splits(split, None, None, Layout("text", {}), None, SplitReport(), "abc")
    data = encoded([1, 2, 3, 4, 5, 6, 7, 8, 20], dropped=[(9, "too long")], truncated=3, learned=1)
    facts = inspect_splits(splits, {"train": data})["splits"]["train"]
    assert facts["rows"] == 10
    assert facts["sequences"] == 9
    assert facts["tokens"] == 56
    assert facts["lengths"] == {"p50": 5, "p90": 20, "p99": 20, "max": 20}
    assert (facts["truncated"], facts["truncated_share"]) == (3, 0.3)
    assert facts["dropped"] == 1
    assert facts["dropped_first"] == [{"where": "a.txt, line 10", "reason": "too long"}]
    assert facts["supervised_tokens"] == 9
    assert facts["supervised_share"] == pytest.approx(9 / 56)
    text = printed(inspect_splits(splits, {"train": data}))
    assert "9 (16.1%)" in text
    assert "Dropped from train: a.txt, line 10: too long" in text


def test_split_without_sequences():
    splits = classified(["yes", "no"])
    facts = inspect_splits(splits, {"train": encoded([], dropped=[(0, "x"), (1, "x")])})["splits"]["train"]
    assert facts["lengths"]["max"] == 0
    assert facts["tokens"] == 0


def test_labels_of_each_type():
    facts = inspect_splits(classified(["yes", "no", "yes"]), {})["splits"]["train"]
    assert facts["label_counts"] == {"no": 1, "yes": 2}
    assert "tokens" not in facts
    multi = classified([["a", "c"], [], ["c"]], "multi", ["a", "b", "c"])
    facts = inspect_splits(multi, {})["splits"]["train"]
    assert facts["label_counts"] == {"a": 1, "b": 0, "c": 2}
    assert facts["rows_without_label"] == 1
    facts = inspect_splits(classified([1.0, 2.0, 4.5], "regression", []), {})["splits"]["train"]
    assert facts["label_numbers"] == pytest.approx({"min": 1, "mean": 2.5, "max": 4.5, "std": np.std([1, 2, 4.5])})


def test_many_labels_are_cut_in_print_only():
    names = [f"class {i:03}" for i in range(30)]
    report = inspect_splits(classified(names, names=names), {})
    assert len(report["splits"]["train"]["label_counts"]) == 30
    text = printed(report)
    assert "class 019" in text
    assert "class 020" not in text
    assert "10 more" in text


def test_markup_and_control_characters_in_labels_are_printed_as_they_are():
    report = inspect_splits(classified(["[red]x", "\x1b[31my"], names=["[red]x", "\x1b[31my"]), {})
    text = printed(report)
    assert "[red]x" in text
    assert "\x1b" not in text
    assert "␛[31my" in text


def test_real_files_with_leakage_duplicates_and_contradictions(tmp_path):
    rows = [("good film", 1), ("bad film", 0), ("good film", 0), ("so so", 0), ("so so", 0), ("shared", 1)]
    for name, taken in (("train", rows), ("test", [("shared", 1), ("other", 0)])):
        lines = [json.dumps({"text": text, "label": label}) for text, label in taken]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    data = {"train": f"{tmp_path}/train.jsonl", "test": f"{tmp_path}/test.jsonl", "split": {"eval": 0.0}}
    config = Config.model_validate(
        {"task": "text-classification", "model": {"path": "m"}, "data": data, "output": f"{tmp_path}/out"}
    )
    report = inspect_splits(load_splits(config), {})
    assert set(report["splits"]) == {"train", "test"}
    assert report["splits"]["train"]["rows"] == 5
    assert report["splits"]["train"]["duplicates"] == 1
    assert report["splits"]["test"]["leaked_into_train"] == 1
    assert report["splits"]["test"]["made"] is False
    assert report["contradictory"] == 1
    assert report["splits"]["train"]["label_counts"] == {"0": 4, "1": 1}
    assert json.loads(json.dumps(report)) == report
    text = printed(report)
    assert "Leakage: 1 training rows stand in test too" in text
    assert "train.jsonl, line 6" in text
    assert "Contradictory: 1 inputs" in text


def test_mask_preview_marks_what_is_learned():
    tokenizer = chatml()
    ids = tokenizer("<|im_start|>user\nhello\x1b 你<|im_end|>")["input_ids"]
    prompt = len(tokenizer("<|im_start|>user\n")["input_ids"])
    supervised = [k >= prompt for k in range(len(ids))]
    plain = mask_preview(tokenizer, ids, supervised, colour=False)
    assert plain == "<|im_start|>user↵\n⟦hello␛ 你<|im_end|>⟧"
    coloured = mask_preview(tokenizer, np.array(ids, dtype=np.int32), np.array(supervised), colour=True)
    assert coloured == f"{DIM}<|im_start|>user↵\n{RESET}{GREEN}hello␛ 你<|im_end|>{RESET}"
    assert mask_preview(tokenizer, [], [], colour=False) == ""


def test_mask_preview_keeps_the_space_between_runs():
    tokenizer = metaspace_tokenizer(None, ["<s>", "</s>"], "</s>", bos_token="<s>")
    ids = tokenizer("hello there fox", add_special_tokens=False)["input_ids"]
    cut = len(tokenizer("hello", add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(ids[cut:]) == "there fox"
    text = mask_preview(tokenizer, ids, [k >= cut for k in range(len(ids))], colour=False)
    assert text == "hello⟦ there fox⟧"
