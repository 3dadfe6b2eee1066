"""Tokenised sets, and a cache that can be neither stale (trap 19) nor damaged unseen."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparing import changed, small, write_config
from processes import engine
from safetensors.numpy import load_file, save_file
from tiny import make_model
from transformers import AutoTokenizer

from peft_engine.config import Config
from peft_engine.data import encoding
from peft_engine.data.encoding import EncodedRow, EncodedSet, cache_folder, encode_split
from peft_engine.data.splitting import Split, load_splits
from peft_engine.errors import DataError
from peft_engine.run import train
from peft_engine.tasks import make_task


def split_of(*texts: str) -> Split:
    return Split([{"text": text} for text in texts], [f"rows.jsonl, line {i + 1}" for i in range(len(texts))])


def encode(example: dict[str, Any], where: str) -> list[EncodedRow] | str:
    """A token per letter, three at most in a sequence; nothing of capitals."""
    text = example["text"]
    if text.isupper():
        return "capitals"
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    return [
        EncodedRow(
            [ord(c) for c in piece], len(piece), {"vowel": [c in "aeiou" for c in piece], "label": 7}, len(text) > 3
        )
        for piece in pieces
    ]


def same(one: EncodedSet, two: EncodedSet) -> bool:
    arrays = ("input_ids", "offsets", "units", "rows")
    return (
        all(np.array_equal(getattr(one, n), getattr(two, n)) for n in arrays)
        and all(getattr(one, n).dtype == getattr(two, n).dtype for n in arrays)
        and one.columns.keys() == two.columns.keys()
        and all(np.array_equal(one.columns[n], two.columns[n]) for n in one.columns)
        and all(one.columns[n].dtype == two.columns[n].dtype for n in one.columns)
        and (one.dropped, one.truncated) == (two.dropped, two.truncated)
    )


def test_rows_lie_flat():
    made = encode_split(split_of("abcde", "NO", "xy"), encode, {}, 1.0, None)
    assert len(made) == 3
    assert made.lengths.tolist() == [3, 2, 2]
    assert [made.tokens(i).tolist() for i in range(3)] == [[97, 98, 99], [100, 101], [120, 121]]
    assert made.token_column("vowel", 1).tolist() == [False, True]
    assert made.columns["label"].tolist() == [7, 7, 7]
    assert made.rows.tolist() == [0, 0, 2]
    assert made.units.tolist() == [3, 2, 2]
    assert made.dropped == [(1, "capitals")]
    assert made.truncated == 1
    assert (made.input_ids.dtype, made.offsets.dtype, made.rows.dtype) == (np.int32, np.int64, np.int64)


def test_too_many_rows_that_teach_nothing_are_refused():
    with pytest.raises(DataError, match=r"2 of 4 rows \(50.0%\).*First: rows.jsonl, line 2: capitals"):
        encode_split(split_of("a", "B", "c", "D"), encode, {}, 0.4, None)
    assert len(encode_split(split_of("a", "B", "c", "D"), encode, {}, 0.5, None)) == 2
    with pytest.raises(DataError, match=r"1 of 1 rows \(100.0%\)"):
        encode_split(split_of("B"), encode, {}, 1.0, None)


def test_the_cache_gives_what_was_put_in(tmp_path):
    split = split_of("abcde", "NO", "xy")
    made = encode_split(split, encode, {"a": 1}, 1.0, tmp_path)

    def never(example: dict[str, Any], where: str) -> str:
        raise AssertionError("encoded again")

    found = encode_split(split, never, {"a": 1}, 1.0, tmp_path)
    assert same(made, found)
    with pytest.raises(DataError, match="1 of 3 rows"):
        encode_split(split, never, {"a": 1}, 0.1, tmp_path)
    assert len(os.listdir(tmp_path)) == 1


def test_content_names_the_file(tmp_path):
    for fingerprint in ({"a": 1}, {"a": 2}, {"b": 1}):
        for texts in (("ab", "cd"), ("cd", "ab"), ("ab", "c d"), ("ab",)):
            encode_split(split_of(*texts), encode, fingerprint, 1.0, tmp_path)
    assert len(os.listdir(tmp_path)) == 12
    renamed = Split([{"text": "ab"}, {"text": "cd"}], ["other.csv, row 1", "other.csv, row 2"])
    encode_split(renamed, encode, {"a": 1}, 1.0, tmp_path)
    assert len(os.listdir(tmp_path)) == 12, "where a row stands is not what it holds"


def files_of(settings: Config) -> set[str]:
    """Names of the cache files after encoding the training split as a run does."""
    folder = cache_folder(settings.data.cache)
    assert folder is not None
    splits = load_splits(settings)
    task = make_task(settings, splits.labels)
    encode_split(splits.train, task.encode, task.fingerprint(), 1.0, folder)
    return set(os.listdir(folder))


def chat_settings(tiny_model: Any, folder: Path) -> Config:
    from tiny import chat_rows, config, write_rows

    rows = write_rows(folder / "chats.jsonl", chat_rows(8))
    data = {"cache": str(folder / "cache"), "split": {"eval": 0.0, "test": 0.0}}
    return config("causal-lm", tiny_model("llama"), rows, folder / "run", data=data)


def changed_rows(settings: Config) -> Config:
    path = Path(settings.data.train)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["messages"][1]["content"] += "!"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return settings


def another_tokenizer(settings: Config) -> Config:
    folder = make_model("llama", Path(settings.output).parent / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(folder)
    return changed(settings, model__path=str(folder))


def another_template(settings: Config) -> Config:
    folder = make_model("llama", Path(settings.output).parent / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|> ")
    tokenizer.save_pretrained(folder)
    return changed(settings, model__path=str(folder))


CHANGES = {
    "a row": changed_rows,
    "the tokenizer": another_tokenizer,
    "the chat template": another_template,
    "max_length": lambda settings: changed(settings, data__max_length=64),
    "supervise": lambda settings: changed(settings, data__supervise="all"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_decides_the_tokens_gives_another_file(what, tiny_model, tmp_path):
    settings = chat_settings(tiny_model, tmp_path)
    first = files_of(settings)
    assert files_of(settings) == first
    both = files_of(CHANGES[what](settings))
    assert len(both) == 2, f"another file for {what}"


def test_what_does_not_decide_the_tokens_gives_the_same_file(tiny_model, tmp_path):
    settings = chat_settings(tiny_model, tmp_path)
    first = files_of(settings)
    moved = make_model("llama", tmp_path / "moved", seed=5)
    other = changed(settings, model__path=str(moved), training__seed=3, training__batch_size=2, adapter__rank=2)
    assert files_of(other) == first


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "zeros":
        path.write_bytes(bytes(len(content)))
    elif how == "a bit":
        content[-1] ^= 1
        path.write_bytes(content)
    elif how == "another file":
        save_file({"input_ids": np.zeros(3, np.int32)}, path)
    else:
        assert how == "its notes", how
        save_file(load_file(path), path, {"dropped": "[]", "truncated": "0", "digest": "0"})


@pytest.mark.parametrize("how", ["cut", "empty", "zeros", "a bit", "another file", "its notes"])
def test_a_damaged_file_is_built_anew(how, tmp_path):
    split = split_of("abcde", "NO", "xy")
    made = encode_split(split, encode, {}, 1.0, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damage(path, how)
    assert path.read_bytes() != whole
    assert same(encode_split(split, encode, {}, 1.0, tmp_path), made)

    def never(example: dict[str, Any], where: str) -> str:
        raise AssertionError("not written anew")

    assert same(encode_split(split, never, {}, 1.0, tmp_path), made)


def test_a_cache_that_cannot_be_written_is_not_fatal(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        made = encode_split(split_of("ab"), encode, {}, 1.0, tmp_path / "file" / "cache")
    assert len(made) == 1
    assert "was not cached" in caplog.text


def test_a_crash_while_writing_leaves_no_file_to_find(tmp_path, monkeypatch):
    def half(arrays: dict[str, np.ndarray], path: Path, notes: dict[str, str]) -> None:
        path.write_bytes(b"\x10\0\0")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(encoding, "save_file", half)
        with pytest.raises(KeyboardInterrupt):
            encode_split(split_of("ab"), encode, {}, 1.0, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert len(encode_split(split_of("ab"), encode, {}, 1.0, tmp_path)) == 1


def test_a_run_with_a_cache_that_may_not_be_written(tiny_model, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    settings = changed(small(tiny_model("llama"), tmp_path, steps=2), data__cache=str(locked / "cache"))
    cached = changed(settings, data__cache=str(tmp_path / "cache"), output=str(tmp_path / "cached"))
    assert train(cached)["metrics"]["after"] == train(cached, overwrite=True)["metrics"]["after"]
    assert len(os.listdir(tmp_path / "cache")) == 2
    path = write_config(settings, tmp_path / "run.yaml")
    ended = engine("train", path, "--quiet", folder=tmp_path, unprivileged=True)
    assert ended.code == 0, ended.err
    assert not list(locked.iterdir())


def test_cache_folder(monkeypatch, tmp_path):
    assert cache_folder(None) is None
    assert cache_folder("~/x") == Path.home() / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "peft-engine" / "tokenised"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / ".cache" / "peft-engine" / "tokenised"
