"""benchmarks/assets.py: checked, made once, and never left half made."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import assets as fetcher
from asset_recipes import ASSETS, Asset, Package, convert_e2e_nlg, convert_past_tense, convert_sarcasm
from asset_recipes_text import convert_brown, convert_vitaminc, universal_tag
from assets import MORE

ROWS = b'{"a": 1}\n{"a": 2}\n'


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_through(contents, folder):
    (folder / "rows.jsonl").write_bytes(contents["pkg/rows.jsonl"])


@pytest.fixture
def root(tmp_path) -> Path:
    """An asset folder in which the one package has been downloaded already."""
    place = tmp_path / "downloads" / "pkg==1"
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "pkg-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pkg/rows.jsonl", ROWS)
    return tmp_path


@pytest.fixture
def rows(root) -> Asset:
    wheel = root / "downloads" / "pkg==1" / "pkg-1-py3-none-any.whl"
    package = Package("pkg==1", "wheel", sha(wheel.read_bytes()), 1)
    return Asset(
        "rows", package, "data/rows.jsonl", ("pkg/rows.jsonl",), write_through, {"rows.jsonl": sha(ROWS)}, "MIT"
    )


def test_made_once_then_reused(rows, root, capsys):
    fetcher.fetch([rows], root)
    assert (root / "data/rows.jsonl").read_bytes() == ROWS
    assert "rows: made" in capsys.readouterr().out

    def refuse(contents, folder):
        raise AssertionError("converted twice")

    fetcher.fetch([replace(rows, convert=refuse)], root)
    assert capsys.readouterr().out.splitlines() == [f"rows: ready, {root.name}/data/rows.jsonl"]


def test_truncated_or_deleted_is_made_again(rows, root):
    for damage in (lambda path: path.write_bytes(b"x"), Path.unlink):
        fetcher.fetch([rows], root)
        damage(root / "data/rows.jsonl")
        assert not fetcher.is_ready(rows, root)
        fetcher.fetch([rows], root)
        assert (root / "data/rows.jsonl").read_bytes() == ROWS


def test_a_conversion_with_another_digest_replaces_nothing(rows, root):
    fetcher.fetch([rows], root)
    other = replace(rows, digests={"rows.jsonl": "0" * 64})
    with pytest.raises(fetcher.AssetError, match=rf"the converted rows.jsonl has sha256 {sha(ROWS)}.*constraints"):
        fetcher.fetch([other], root)
    assert (root / "data/rows.jsonl").read_bytes() == ROWS
    assert not fetcher.is_ready(other, root)
    assert list((root / "scratch").iterdir()) == []


def test_a_conversion_that_dies_leaves_no_target(rows, root):
    def die(contents, folder):
        (folder / "rows.jsonl").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fetcher.fetch([replace(rows, convert=die)], root)
    assert not (root / "data/rows.jsonl").exists()
    assert not fetcher.stamp_of(rows, root).exists()


def test_a_download_with_another_digest_is_not_used(rows, root, monkeypatch):
    seen = []

    def no_index(command, **options):
        seen.append((options, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 1, "ERROR: No matching distribution")

    monkeypatch.setattr(fetcher.subprocess, "run", no_index)
    damaged = root / "downloads" / "pkg==1" / "pkg-1-py3-none-any.whl"
    damaged.write_bytes(b"not it")
    with pytest.raises(fetcher.AssetError, match=r"(?s)could not download pkg==1.*No matching.*make assets"):
        fetcher.fetch([rows], root)
    assert seen[0][1] == f"pkg==1 --hash=sha256:{rows.package.sha256}\n"
    assert not damaged.exists()


def test_pip_that_gets_another_file_is_told_apart():
    message = fetcher.explain(ASSETS[0].package, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n")
    assert "is not the file that was checked" in message


def test_sdist_is_read_in_one_pass(tmp_path):
    archive = tmp_path / "s.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("s/a", "s/b", "s/c"):
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    assert fetcher.read_members(archive, "sdist", {"s/c", "s/a"}) == {"s/a": b"s/a", "s/c": b"s/c"}
    with pytest.raises(fetcher.AssetError, match="lacks"):
        fetcher.read_members(archive, "sdist", {"s/a", "s/nothing"})


def rows_of(convert, source: bytes, folder: Path) -> list[dict]:
    convert({"file": source}, folder)
    (path,) = folder.iterdir()
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_sarcasm_rows(tmp_path):
    sample = {"input": [{"role": "system", "content": "s"}, {"role": "user", "content": "wow\u2028ok"}], "ideal": "1"}
    source = json.dumps(sample, ensure_ascii=False).encode() + b"\n"
    assert rows_of(convert_sarcasm, source, tmp_path) == [{"text": "wow\u2028ok", "label": "sarcastic"}]


def test_past_tense_rows(tmp_path):
    examples = [{"input": "go", "target": "went"}, {"input": "go", "target": "went"}]
    (row,) = rows_of(convert_past_tense, json.dumps({"examples": examples}).encode(), tmp_path)
    assert [m["content"] for m in row["messages"]] == ['What is the past tense of "go"?', "went"]


def test_e2e_rows(tmp_path):
    source = json.dumps({"examples": [{"input": "name: X", "target": "X it is."}]}).encode()
    (row,) = rows_of(convert_e2e_nlg, source, tmp_path)
    assert (row["prompt"][-24:], row["completion"]) == ("Describe the restaurant:", " X it is.")


def test_command_line_names_what_there_is():
    script = Path(fetcher.__file__)
    wrong = subprocess.run([sys.executable, script, "minilmm"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "'minilmm'" in wrong.stderr
    assert "bert-tiny" in wrong.stderr
    listed = subprocess.run([sys.executable, script, "--list"], capture_output=True, text=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [asset.name for asset in (*ASSETS, *MORE)]


@pytest.mark.assets
def test_what_was_made_is_what_the_table_says(assets):
    for asset in ASSETS:
        assert fetcher.is_ready(asset, assets), f"{asset.name}: run `make assets`"
        for name, digest in asset.digests.items():
            made = assets / asset.target
            assert fetcher.sha256_of(made / name if made.is_dir() else made) == digest


@pytest.mark.parametrize(
    ("tag", "universal"),
    [
        ("nn", "NOUN"),
        ("np$-tl", "NOUN"),
        ("vbn-tl-hl", "VERB"),
        ("bedz*", "VERB"),
        ("ppss+md", "PRON"),
        ("pp$", "DET"),
        ("fw-nn-tl", "X"),
        ("*", "ADV"),
        ("*-hl", "ADV"),
        ("--", "."),
        (",-hl", "."),
        ("in-tl", "ADP"),
        ("cd$", "NUM"),
    ],
)
def test_brown_tags_become_universal(tag, universal):
    assert universal_tag(tag) == universal


def test_an_unknown_tag_is_no_silent_x():
    with pytest.raises(ValueError, match="'qq'"):
        universal_tag("qq")


def test_rows_of_the_further_data(tmp_path):
    convert_brown({"package/ca01": b"\n\n\tThe/at 1/2/cd men/nns ,/, etc/rb ./.\n\n"}, tmp_path)
    row = json.loads((tmp_path / "brown-pos.jsonl").read_text())
    assert row["tokens"] == ["The", "1/2", "men", ",", "etc", "."]
    assert row["tags"] == ["DET", "NUM", "NOUN", ".", "ADV", "."]
    example = {"input": "A: b .\nClaim: c", "target_scores": {"True": 0, "False": 0, "Neither": 1}}
    convert_vitaminc({"task.json": json.dumps({"examples": [example]}).encode()}, tmp_path)
    assert json.loads((tmp_path / "vitaminc.jsonl").read_text()) == {
        "claim": "c", "evidence": "A: b .", "label": "Neither",
    }  # fmt: skip
    assert len({asset.name for asset in (*ASSETS, *MORE)}) == len(ASSETS) + len(MORE)


def test_npm_is_asked_only_for_its_packages(root, monkeypatch):
    """Its file is checked as pip's is; without npm the message says so."""
    wanted = Asset("n", Package("n@1", "npm", "0" * 64, 1), "data/n", ("package/n",), write_through, {}, "MIT")
    monkeypatch.setattr(fetcher.shutil, "which", lambda name: None)
    with pytest.raises(fetcher.AssetError, match="npm is not installed"):
        fetcher.fetch([wanted], root)

    def fake(command, **rest):
        assert command[:2] == ["npm", "pack"]
        (Path(command[command.index("--pack-destination") + 1]) / "n-1.tgz").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(fetcher.shutil, "which", lambda name: "/bin/npm")
    monkeypatch.setattr(fetcher.subprocess, "run", fake)
    with pytest.raises(fetcher.AssetError, match="expected 0000"):
        fetcher.fetch([wanted], root)
