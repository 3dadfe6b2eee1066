"""Near duplicates: no false positives, hardly any missed, held against Jaccard by brute force."""

import random
import time
from pathlib import Path

import pytest
from tiny import config, write_rows

from peft_engine.data import near_duplicates
from peft_engine.data.duplicates import near_key
from peft_engine.data.near_duplicates import PERMUTATIONS, bands, find_near, grams, jaccard, method_for, words
from peft_engine.data.splitting import load_splits
from peft_engine.errors import DataError

LONG = "the quick brown fox jumps over a lazy dog while seven grey cats watch from an old wall near the wide river"


def brute(a: list[str], b: list[str]) -> float:
    """Jaccard similarity of word 3-grams, written anew."""
    one, two = ({tuple(t[i : i + 3]) for i in range(max(1, len(t) - 2))} for t in (a, b))
    return len(one & two) / len(one | two)


@pytest.fixture(scope="module")
def texts():
    """600 random training texts, 200 held-out ones with up to four words changed, and the similarities of all pairs."""
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(400)]
    train = [rng.choices(vocabulary, k=rng.randint(1, 60)) for _ in range(600)]
    held = []
    for _ in range(200):
        text = list(rng.choice(train))
        for _ in range(rng.randint(0, 4)):
            text[rng.randrange(len(text))] = rng.choice(vocabulary)
        held.append(text)
    return train, held, [[brute(text, other) for other in held] for text in train]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_against_brute_force(texts, threshold):
    train, held, similar = texts
    wanted = {i: max(row) for i, row in enumerate(similar) if max(row) >= threshold}
    found = find_near([{"text": " ".join(t)} for t in train], {"test": [{"text": " ".join(t)} for t in held]},
                      threshold, fuzzy=True)  # fmt: skip
    assert len(wanted) > 20
    assert {near.row for near in found} == set(wanted)
    for near in found:
        assert near.similarity == pytest.approx(wanted[near.row])
        assert similar[near.row][near.other] == pytest.approx(near.similarity)


def test_a_pair_at_the_threshold_is_hardly_ever_missed():
    for threshold in (0.05, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0):
        b, r = bands(threshold)
        assert b * r <= PERMUTATIONS
        assert b >= 2
        if threshold >= 0.1:
            assert (1 - threshold**r) ** b <= 1e-4


def test_words_and_grams():
    assert words({"text": "Don't STOP — now!"}) == ["don", "t", "stop", "now"]
    assert grams(["a", "b", "c", "d"]) == {"a b c", "b c d"}
    assert grams(["a", "b"]) == {"a b"}
    assert jaccard(set(), set()) == 0.0
    chat = {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Say hello"},
                         {"role": "assistant", "content": "Hello"}]}  # fmt: skip
    assert words(chat) == ["say", "hello"]


SCRIPTS = {
    "Chinese": "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也",
    "Japanese": "あいうえおかきくけこさしすせそたちつてとなにぬねのアイウエオ日本語東京大学会社時間電車食",
    "Thai": "กขคงจฉชซญดตถทธนบปผฝพฟภมยรลวศษสหอฮะาเแโใไ",
    "Khmer": "កខគឃងចឆជឈញដឋឌឍណតថទធនបផពភមយរលវសហឡអ",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_without_blanks(script):
    """A character more or less in texts of 40, in a script that puts no blanks between words."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(SCRIPTS[script], k=40)) for _ in range(60)]
    train, held = [{"text": text} for text in texts], [{"text": text + SCRIPTS[script][0]} for text in texts[:30]]
    found = find_near(train, {"test": held}, 0.8, fuzzy=True)
    assert [(near.row, near.other) for near in found] == [(i, i) for i in range(30)]
    assert all(0.8 <= near.similarity < 1 for near in found)


def test_words_of_mixed_scripts():
    assert words({"text": "我喜欢 Python编程 3.5 lang"}) == ["我", "喜", "欢", "python", "编", "程", "3", "5", "lang"]
    assert words({"text": "กขคง hello"}) == ["กขค", "ขคง", "hello"]
    assert words({"text": "안녕 하세요 Привет"}) == ["안녕", "하세요", "привет"]


def test_a_template_makes_no_near_duplicates():
    rng = random.Random(1)
    rows = [
        {"text": f"{LONG} {LONG[::-1]} {' '.join(f'n{rng.randrange(10**6)}' for _ in range(5))}"} for _ in range(300)
    ]
    train, held = rows[:200], rows[200:]
    assert brute(train[0]["text"].split(), held[0]["text"].split()) > 0.8
    assert find_near(train, {"test": held}, 0.8, fuzzy=True) == []
    same = find_near([*train, {"text": held[7]["text"].upper()}], {"test": held}, 0.8, fuzzy=True)
    assert [(near.row, near.other, near.similarity) for near in same] == [(200, 7, 1.0)]


def near_config(tmp_path, **data):
    train = [{"text": LONG + f" {i}" * 30, "label": "ab"[i % 2]} for i in range(20)]
    train += [{"text": LONG, "label": "a"}, {"text": LONG.upper() + "!", "label": "b"}]
    test = [{"text": LONG.replace("wide", "deep"), "label": "a"}, {"text": "another one", "label": "b"}]
    paths = [str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("train", train), ("test", test))]
    given = {"test": paths[1], "split": {"eval": 0.0}, **data}
    return config("text-classification", "m", paths[0], tmp_path / "run", data=given)


def test_report_keeps_and_drop_removes(tmp_path):
    exact = brute(LONG.split(), LONG.replace("wide", "deep").split())
    assert 0.8 < exact < 0.9
    told = load_splits(near_config(tmp_path))
    assert told.report.near == {"test": 2}
    assert told.report.near_method == "minhash"
    assert not told.report.near_dropped
    first = told.report.near_where[0].replace(str(tmp_path) + "/", "")
    assert first == f"train.jsonl, line 21 ~ {exact:.2f} test.jsonl, line 1"
    assert told.report.counts["train"] == 22
    gone = load_splits(near_config(tmp_path, near_duplicates="drop"))
    assert gone.report.counts["train"] == 20
    assert gone.report.near == {"test": 2}
    assert gone.report.near_dropped
    assert gone.report.removed == {"train": {"near duplicate": 2}}
    assert [Path(row.where).name for row in gone.dropped] == ["train.jsonl, line 21", "train.jsonl, line 22"]
    off = load_splits(near_config(tmp_path, near_duplicates="off"))
    assert (off.report.near, off.report.near_method) == ({}, "off")
    strict = load_splits(near_config(tmp_path, near_threshold=0.95))
    assert strict.report.near == {}


def test_without_datasketch_the_normalised_comparison_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(near_duplicates, "find_spec", lambda name: None)
    splits = load_splits(near_config(tmp_path))
    assert splits.report.near_method == "normalised"
    assert splits.report.near == {}
    assert any("datasketch is not installed" in note for note in splits.report.notes)


def test_images_are_compared_exactly_and_it_is_said():
    rows = [{"image": "a" * 64, "label": "x"}]
    method, note = method_for(rows, {"test": rows}, "report")
    assert method == "exact"
    assert "images were compared exactly" in str(note)


def test_too_much_text_is_not_compared_unasked(monkeypatch):
    monkeypatch.setattr(near_duplicates, "AFFORDABLE", 50)
    rows = [{"text": "x" * 30}]
    method, note = method_for(rows, {"test": rows}, "report")
    assert method == "normalised"
    assert "60 characters" in str(note)
    assert method_for(rows, {"test": rows}, "drop") == ("minhash", None)


def test_nothing_left_is_refused(tmp_path):
    rows = [{"text": LONG + (" and more" if i % 2 else ""), "label": "ab"[i]} for i in range(2)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    held = write_rows(tmp_path / "test.jsonl", [{"text": LONG.replace("wide", "deep"), "label": "a"}])
    data = {"test": str(held), "split": {"eval": 0.0}, "near_duplicates": "drop", "near_threshold": 0.7}
    with pytest.raises(DataError, match=r"data\.near_duplicates leaves no row of train"):
        load_splits(config("text-classification", "m", path, "o", data=data))


def test_28000_short_rows_take_seconds():
    rng = random.Random(2)
    vocabulary = [f"w{i}" for i in range(3000)]
    rows = [{"text": " ".join(rng.choices(vocabulary, k=10))} for _ in range(28_000)]
    start = time.process_time()
    assert find_near(rows[:22_000], {"eval": rows[22_000:25_000], "test": rows[25_000:]}, 0.8, fuzzy=True) == []
    assert time.process_time() - start < 15


@pytest.mark.parametrize(
    ("one", "other"), [("मेरा बेटा", "मेरी बेटी"), ("เก่า", "เก้า"), ("cafe\u0301s", "cafes"), ("נֵר", "נוֹר")]
)
def test_vowel_and_tone_signs_tell_words_apart(one: str, other: str) -> None:
    assert near_key(one) != near_key(other)
    assert near_key(f"«{one}»!") == near_key(one)
