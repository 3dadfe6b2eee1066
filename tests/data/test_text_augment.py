"""Augmented texts: seeded per row and step, nothing learned or special is touched, off in evaluation."""

import re

import numpy as np
import pytest
import torch
from comparing import changed, outcome
from task_checks import resumes_bitwise
from tiny import assemble, chat_rows, class_rows, config, pair_rows, sentence, write_rows
from transformers import AutoTokenizer

from peft_engine.data.augmenting_text import text_change, written_tokens
from peft_engine.errors import ConfigError
from peft_engine.evaluation import evaluate_split
from peft_engine.inspection import inspect_data
from peft_engine.run import train
from peft_engine.runtime import combine
from peft_engine.training.step import gradients

ALL = {"token_dropout": 0.3, "masking": 0.3, "punctuation": 0.3}
CASES = {"classes": ("text-classification", "bert", class_rows), "pairs": ("causal-lm", "llama", pair_rows),
         "chats": ("causal-lm", "qwen2", chat_rows)}  # fmt: skip


def settings(case, tiny_model, folder, augment, **sections):
    task, family, rows = CASES[case]
    data = {"augment": {"text": augment}, "split": {"eval": 0.2, "test": 0.0}, "max_length": 64}
    path = write_rows(folder / "rows.jsonl", rows(30))
    return config(task, tiny_model(family), path, folder / "run", data=data | sections.pop("data", {}), **sections)


def usable(case):
    """These decoders have no token to mask with but their end of text, which is refused."""
    return ALL if case == "classes" else {"token_dropout": 0.3, "punctuation": 0.3}


@pytest.mark.parametrize("case", CASES)
def test_what_is_learned_and_special_stays(case, tiny_model, tmp_path):
    made = assemble(settings(case, tiny_model, tmp_path, usable(case)))
    data, special = made.data["train"], set(made.task.tokenizer.all_special_ids)
    rows = np.arange(len(data))
    differ = 0
    for seed in range(20):
        new, _ = data.drawn(rows, seed)
        assert new.units.tolist() == data.units.tolist()
        assert new.rows.tolist() == data.rows.tolist()
        assert new.input_ids.dtype == np.int32
        assert all(len(values) == len(new.input_ids) or len(values) == len(rows) for values in new.columns.values())
        for i in rows:
            old_ids, new_ids = data.tokens(i).tolist(), new.tokens(i).tolist()
            differ += old_ids != new_ids
            assert len(new_ids) <= 64
            assert new_ids[0] == old_ids[0]
            mask = made.task.tokenizer.mask_token_id if case == "classes" else None
            assert [t for t in new_ids if t in special - {mask}] == [t for t in old_ids if t in special]
            if case != "classes":
                for name in ("input_ids", "text_bytes"):
                    old = old_ids if name == "input_ids" else data.token_column(name, i)
                    got = new_ids if name == "input_ids" else new.token_column(name, i)
                    was, now = data.token_column("supervised", i), new.token_column("supervised", i)
                    assert np.asarray(got)[now].tolist() == np.asarray(old)[was].tolist()
    assert differ > 10 * len(rows)


def test_the_words_of_the_template_stay(tiny_model, tmp_path):
    made = assemble(settings("chats", tiny_model, tmp_path, {"token_dropout": 0.9}, data={"max_length": 128}))
    tokenizer = made.task.tokenizer
    new, _ = made.data["train"].drawn(np.arange(10), 0)
    for i in range(10):
        turns = made.splits.train.examples[int(new.rows[i])]["messages"]
        text = tokenizer.decode(new.tokens(i))
        assert text.count("<|im_start|>user\n") == text.count("<|im_start|>assistant\n") == len(turns) // 2
        assert len(new.tokens(i)) < len(made.data["train"].tokens(i))


@pytest.mark.parametrize("first", ["chats", "pairs"])
def test_a_mixture_of_conversations_and_plain_prompts(first, tiny_model, tmp_path):
    """Of each row what somebody wrote may change, whichever kind stands first."""
    plain = write_rows(tmp_path / "plain.jsonl", pair_rows(20))
    turns = [
        {
            "prompt": [{"role": "user", "content": sentence(i, 8)}],
            "completion": [{"role": "assistant", "content": "ok"}],
        }
        for i in range(20)
    ]
    chats = write_rows(tmp_path / "chats.jsonl", turns)
    order = (chats, plain) if first == "chats" else (plain, chats)
    data = {"train": [{"path": str(path)} for path in order], "max_length": 128, "split": {"eval": 0.1, "test": 0.0}}
    data["augment"] = {"text": {"token_dropout": 0.9}}
    made = assemble(config("causal-lm", tiny_model("qwen2"), plain, tmp_path / "run", data=data))
    rows = np.arange(len(made.data["train"]))
    new, _ = made.data["train"].drawn(rows, 0)
    shorter = {True: 0, False: 0}
    for i in rows:
        example = made.splits.train.examples[int(new.rows[i])]
        text, chat = made.task.tokenizer.decode(new.tokens(i)), isinstance(example["prompt"], list)
        shorter[chat] += len(new.tokens(i)) < len(made.data["train"].tokens(i))
        if chat:
            assert text.count("<|im_start|>user\n") == 1
            assert text.count("<|im_start|>assistant\n") == 1
    assert min(shorter.values()) > 5


def test_written_tokens_are_those_of_the_contents():
    class Letters:
        """One token per character."""

        def __call__(self, text, **_):
            return {"offset_mapping": [(i, i + 1) for i in range(len(text))]}

    flags = written_tokens(Letters(), "<u>ab</u><a>ab c</a>", ["ab", " ab c ", "not there", ""])
    assert "".join("x" if flag else "." for flag in flags) == "...xx.......xxxx...."


@pytest.mark.parametrize("case", CASES)
def test_a_function_of_seed_and_row(case, tiny_model, tmp_path):
    data = assemble(settings(case, tiny_model, tmp_path, usable(case))).data["train"]
    whole, numbers = data.drawn(np.arange(8), 5)
    assert numbers.tolist() == list(range(8))
    for rows in ([3], [7, 3], [3, 3, 0]):
        part, _ = data.drawn(np.array(rows), 5)
        for i, row in enumerate(rows):
            assert part.tokens(i).tolist() == whole.tokens(row).tolist()
            for name in part.columns:
                if len(part.columns[name]) == len(part.input_ids):
                    assert part.token_column(name, i).tolist() == whole.token_column(name, row).tolist()
    other, _ = data.drawn(np.arange(8), 6)
    assert other.input_ids.tolist() != whole.input_ids.tolist()
    assert data.drawn(np.arange(8), 5)[0].input_ids.tolist() == whole.input_ids.tolist()


def test_shares_are_those_asked_for(tiny_model, tmp_path):
    data = assemble(settings("classes", tiny_model, tmp_path, {"token_dropout": 0.25})).data["train"]
    free = len(data.input_ids) - 2 * len(data)
    sizes = [len(data.drawn(np.arange(len(data)), seed)[0].input_ids) for seed in range(60)]
    lost = 1 - (np.mean(sizes) - 2 * len(data)) / free
    assert abs(lost - 0.25) < 0.02
    data = assemble(settings("classes", tiny_model, tmp_path, {"masking": 0.25})).data["train"]
    new = [data.drawn(np.arange(len(data)), seed)[0] for seed in range(60)]
    changed_tokens = np.mean([(part.input_ids != data.input_ids).sum() for part in new]) / free
    assert abs(changed_tokens - 0.25) < 0.02
    assert all(np.array_equal(part.offsets, data.offsets) for part in new)


@pytest.mark.parametrize(("case", "family"), [("classes", "bert"), ("pairs", "llama")])
def test_punctuation_is_what_tokenising_the_changed_text_gives(case, family, tiny_model, tmp_path):
    made = assemble(settings(case, tiny_model, tmp_path, {"punctuation": 0.5}))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    data, seen = made.data["train"], set()
    for i in range(len(data)):
        new, _ = data.drawn(np.array([i]), i)
        text = tokenizer.decode(new.tokens(0), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        old = tokenizer.decode(data.tokens(i), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        again = tokenizer(text, add_special_tokens=False)["input_ids"]
        special = set(tokenizer.all_special_ids)
        assert [t for t in new.tokens(0).tolist() if t not in special] == again
        assert re.sub(r" ?[.;?:!,]", "", text) == old
        seen |= set(re.findall(r"[.;?:!,]", text))
    assert len(seen) == 6


def test_a_row_never_gets_longer_than_max_length(tiny_model, tmp_path):
    of = settings("classes", tiny_model, tmp_path, {"punctuation": 0.9}, data={"max_length": 12})
    data = assemble(of).data["train"]
    new, _ = data.drawn(np.arange(len(data)), 0)
    assert data.lengths.max() == new.lengths.max() == 12


def test_every_reading_of_a_choice_has_room_of_its_own(tiny_model, tmp_path):
    made = assemble(settings("pairs", tiny_model, tmp_path, {"punctuation": 0.9}))
    plain, asked = made.data["train"], made.config.data.augment.text
    choice = np.concatenate([np.arange(n) * 3 // n for n in plain.lengths])
    data = type(plain)(plain.input_ids, plain.offsets, plain.units, plain.rows, {"choice": choice})
    most = max(int(np.bincount(data.token_column("choice", i)).max()) for i in range(len(data)))
    new = text_change(asked, made.task.tokenizer, most, data, None)(data, np.arange(len(data)), 0)
    assert any(len(new.tokens(i)) > max(most, len(data.tokens(i))) for i in range(len(data)))
    assert max(int(np.bincount(new.token_column("choice", i)).max()) for i in range(len(data))) == most


def test_marks_go_into_a_source_whatever_its_target_takes(tiny_model, tmp_path):
    """A row of seq2seq: `data.max_length` is for source and target each."""
    made = assemble(settings("pairs", tiny_model, tmp_path, {"punctuation": 0.9}))
    plain, asked = made.data["train"], made.config.data.augment.text
    side = np.concatenate([np.arange(n) * 2 // n for n in plain.lengths]).astype(bool)
    columns = {"supervised": side, "longest": (plain.lengths + 1) // 2}
    data = type(plain)(plain.input_ids, plain.offsets, plain.units, plain.rows, columns)
    most = int(data.columns["longest"].max()) + 2
    new = text_change(asked, made.task.tokenizer, most, data, None)(data, np.arange(len(data)), 0)
    full = [i for i in range(len(data)) if len(data.tokens(i)) >= most]
    assert sum(len(new.tokens(i)) > len(data.tokens(i)) for i in full) > len(full) / 2
    for i in range(len(data)):
        was, now = data.token_column("supervised", i), new.token_column("supervised", i)
        assert (~now).sum() <= most
        assert new.tokens(i)[now].tolist() == data.tokens(i)[was].tolist()


def test_tags_stay_with_their_words(tiny_model, tmp_path):
    """A tagged row, as token classification has it: tagged words may be masked, are never left out."""
    made = assemble(settings("classes", tiny_model, tmp_path, {}))
    plain, tokenizer = made.data["train"], made.task.tokenizer
    tags = np.where(np.arange(len(plain.input_ids)) % 3 == 0, plain.input_ids % 5, -100)
    tags[np.isin(plain.input_ids, tokenizer.all_special_ids)] = -100
    columns = {"tag": tags, "supervised": tags >= 0, "word": np.arange(len(tags)), "label": plain.columns["label"]}
    data = type(plain)(plain.input_ids, plain.offsets, plain.units, plain.rows, columns)
    asked = assemble(settings("classes", tiny_model, tmp_path, ALL)).config.data.augment.text
    change = text_change(asked, tokenizer, 64, data, None)
    new = change(data, np.arange(len(data)), 0)
    masked = 0
    for i in range(len(data)):
        was, now = data.token_column("tag", i), new.token_column("tag", i)
        assert now[now >= 0].tolist() == was[was >= 0].tolist()
        assert (new.token_column("supervised", i) == (now >= 0)).all()
        masked += int((new.tokens(i)[now >= 0] == tokenizer.mask_token_id).sum())
        marks = new.token_column("word", i) == -1
        assert (now[marks] == -100).all()
    assert masked > 5
    assert new.columns["label"].tolist() == data.columns["label"].tolist()


def test_no_reading_of_a_choice_is_lost(tiny_model, tmp_path):
    """A row with choices, as multiple choice has it: one reading after the other, none without tokens."""
    made = assemble(settings("pairs", tiny_model, tmp_path, {"token_dropout": 0.9, "punctuation": 0.9}))
    plain, asked = made.data["train"], made.config.data.augment.text
    choice = np.concatenate([np.arange(n) * 3 // n for n in plain.lengths])
    data = type(plain)(plain.input_ids, plain.offsets, plain.units, plain.rows, {"choice": choice})
    new = text_change(asked, made.task.tokenizer, 64, data, None)(data, np.arange(len(data)), 0)
    assert len(new.input_ids) < 0.6 * len(data.input_ids)
    for i in range(len(data)):
        was, now = data.token_column("choice", i), new.token_column("choice", i)
        assert sorted(now.tolist()) == now.tolist()
        for reading in range(3):
            assert new.tokens(i)[now == reading][0] == data.tokens(i)[was == reading][0]


def test_no_way_of_cutting_changes_the_gradient(tiny_model, tmp_path):
    found = []
    for size in (8, 3):
        made = assemble(settings("classes", tiny_model, tmp_path, ALL, adapter={"dropout": 0.0}))
        rows, tensors = np.arange(8), list(made.trainees[0].member.tensors.values())
        made.group.activate(made.trainees[0].member)
        cuts = [rows[i : i + size] for i in range(0, 8, size)]
        gradients(made.group, made.task, made.data["train"], cuts, 8, tensors, made.runtime, 11)
        found.append([t.grad.clone() for t in tensors])
    assert any(bool(one.any()) for one in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_evaluation_is_never_augmented(tiny_model, tmp_path):
    plain = assemble(settings("classes", tiny_model, tmp_path, {}))
    noisy = assemble(settings("classes", tiny_model, tmp_path, ALL))
    for split in ("train", "eval"):
        told = [
            evaluate_split(made.group.model.eval(), made.task, made.data[split], 8, made.runtime)
            for made in (plain, noisy)
        ]
        assert told[0] == told[1]


def test_resume_with_augmentation_and_a_mixture_is_bitwise(tiny_model, tmp_path, monkeypatch):
    other = write_rows(tmp_path / "other.jsonl", [{"text": sentence(100 + i, 4), "label": "no"} for i in range(9)])
    sources = [{"path": str(tmp_path / "rows.jsonl"), "weight": 0.5}, {"path": str(other), "weight": 2.0}]
    training = {"steps": 9, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 0.01, "save_every": 2}
    data = {"train": sources, "class_weights": "balanced"}
    whole = settings("classes", tiny_model, tmp_path, ALL, data=data, training=training)
    resumes_bitwise(whole, 7, monkeypatch)
    plain = changed(whole, output=str(tmp_path / "plain"), data=data | {"augment": {"text": {}}})
    train(plain)
    assert outcome(plain.output) != outcome(whole.output)


def test_refused_where_nothing_can_be_changed(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"masking: the tokenizer has no mask token"):
        assemble(settings("pairs", tiny_model, tmp_path, {"masking": 0.1}))
    with pytest.raises(ConfigError, match=r"no token of the training rows may be changed"):
        assemble(settings("pairs", tiny_model, tmp_path, {"token_dropout": 0.1}, data={"supervise": "all"}))
    with pytest.raises(ValueError, match=r"data\.packing lays sequences out"):
        settings("pairs", tiny_model, tmp_path, {"token_dropout": 0.1}, data={"packing": True})


def test_the_preview_shows_the_changed_rows(tiny_model, tmp_path):
    from io import StringIO

    from rich.console import Console

    of = settings("classes", tiny_model, tmp_path, {"token_dropout": 0.5})
    report, show = inspect_data(of, 2)
    text = StringIO()
    show(Console(file=text, width=200))
    assert text.getvalue().count("augmented:") == 2
    made = assemble(of)
    first, _ = made.data["train"].drawn(np.array([0]), combine(of.training.seed, 4, 1))
    assert made.task.tokenizer.decode(first.tokens(0)) in text.getvalue()
    assert report["augmentation"] == {"text": {"token_dropout": 0.5}}
    assert len(report["preview"]) == 2
    assert report["preview"][0]["augmented"] == made.task.tokenizer.decode(first.tokens(0))
    assert report["preview"][0]["text"] == made.task.tokenizer.decode(made.data["train"].tokens(0))
