"""Images from every kind of source come to the pixels that PIL gives, and faults are told with their place."""

import base64
import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from tiny_images import CLASSES, make_image_model, noise, write_folder

from peft_engine.building import encode_splits
from peft_engine.data import stacking
from peft_engine.data.encoding import encode_split
from peft_engine.data.images import picture
from peft_engine.data.messages import Malformed
from peft_engine.data.splitting import load_one, load_splits
from peft_engine.errors import ConfigError, DataError
from peft_engine.tasks import make_task


def config(train: Any, /, **data: Any) -> Any:
    return tiny.config("image-classification", "model", str(train), "run", data=data)


def png(pixels: np.ndarray, **settings: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", **settings)
    return out.getvalue()


def pixels_of(value: Any, folder: str = "") -> np.ndarray:
    return picture(value, folder).pixels()


@pytest.mark.parametrize("kind", ["path", "bytes", "dict", "dict path", "base64", "data uri", "array", "list"])
def test_every_form_of_an_image_gives_its_pixels(kind, tmp_path):
    pixels = noise(1, 17, 23)
    raw = png(pixels)
    (tmp_path / "a.png").write_bytes(raw)
    text = base64.b64encode(raw).decode()
    forms = {
        "path": "a.png",
        "bytes": raw,
        "dict": {"bytes": raw, "path": None},
        "dict path": {"bytes": None, "path": "a.png"},
        "base64": text,
        "data uri": f"data:image/png;base64,{text}",
        "array": pixels,
        "list": pixels.tolist(),
    }
    found = picture(forms[kind], str(tmp_path))
    np.testing.assert_array_equal(found.pixels(), pixels)
    assert found.digest == picture(raw, "").digest


def test_modes_come_to_rgb(tmp_path):
    pixels = noise(3, 9, 11)
    grey = pixels[:, :, 0]
    alpha = np.dstack([pixels, np.full((9, 11), 7, np.uint8)])
    deep = (grey.astype(np.uint16) * 257) + np.uint16(100)  # 100/257 rounds to nothing
    for given, want in (
        (png(grey), np.repeat(grey[:, :, None], 3, 2)),
        (png(alpha), pixels),
        (png(deep), np.repeat(grey[:, :, None], 3, 2)),
        (deep, np.repeat(grey[:, :, None], 3, 2)),
        (grey > 80, np.repeat((grey > 80)[:, :, None] * np.uint8(255), 3, 2)),
    ):
        np.testing.assert_array_equal(pixels_of(given), want)
    palette = Image.fromarray(pixels).quantize(16)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(pixels_of("p.png", str(tmp_path)), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize(("orientation", "undo"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_the_cameras_rotation_is_undone(orientation, undo, tmp_path):
    pixels = noise(4, 8, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(pixels_of(png(pixels, exif=exif)), np.rot90(pixels, undo))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("none.png", "there is no image"),
        ("", "empty"),
        ("https://a.example/b.png", "not fetched"),
        (b"not an image", "no image that Pillow can read"),
        (3, "a path, base64 text, bytes or an array was expected"),
        ({"bytes": None, "path": None}, "neither bytes nor path"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,a*b", "neither a file nor base64"),
        (np.zeros((3, 8, 8), np.uint8), "channels come last"),
        (np.zeros((8, 8), np.float32), "no stated range"),
        (np.zeros((0, 8), np.uint8), "is no image"),
        ([[1, 2], [3]], "ragged"),
        ([[1, 300]], "from 0 to 255"),
    ],
)
def test_what_is_no_image_is_refused(value, message):
    with pytest.raises(Malformed, match=message):
        picture(value, "")


def test_a_truncated_file_is_named_with_its_place(tmp_path):
    write_folder(tmp_path / "data", 9)
    bad = tmp_path / "data" / "red" / "zz.png"
    bad.write_bytes(png(noise(50, 64, 64))[:900])
    with pytest.raises(DataError, match=r"zz\.png: .*can't be decoded"):
        load_splits(config(tmp_path / "data"))
    bad.write_text("no image at all")
    with pytest.raises(DataError, match=r"zz\.png: .*no image that Pillow can read"):
        load_splits(config(tmp_path / "data"))


def test_a_folder_per_class(tmp_path):
    write_folder(tmp_path / "data", 30)
    (tmp_path / "data" / ".DS_Store").write_text("left by a file manager")
    splits = load_splits(config(tmp_path / "data", split={"eval": 0.2, "test": 0.2}))
    assert splits.labels.names == list(CLASSES)
    assert splits.report.counts == {"train": 18, "eval": 6, "test": 6}
    for split in (splits.train, splits.eval, splits.test):
        labels = [row["label"] for row in split.examples]
        assert [labels.count(name) for name in CLASSES] == [len(labels) // 3] * 3  # stratified
        for row, where in zip(split.examples, split.where, strict=True):
            assert Path(where).parent.name == row["label"]
            np.testing.assert_array_equal(row["image"].pixels(), np.asarray(Image.open(where)))


def test_equal_pixels_never_stand_on_two_sides(tmp_path):
    write_folder(tmp_path / "train", 12)
    write_folder(tmp_path / "test", 6, start=100)
    same = Image.open(tmp_path / "train" / "blue" / "000.png")
    same.save(tmp_path / "test" / "blue" / "copy.webp", lossless=True)  # other bytes, equal pixels
    splits = load_splits(config(tmp_path / "train", test=str(tmp_path / "test"), split={"eval": 0.0}))
    assert splits.report.leaked == {"test": 1}
    assert "000.png" in splits.report.leaked_where[0]
    assert splits.report.counts == {"train": 11, "test": 7}


def test_folders_that_are_no_classes_are_refused(tmp_path):
    write_folder(tmp_path / "data" / "train", 6)
    write_folder(tmp_path / "data" / "val", 3)
    with pytest.raises(ConfigError, match=r"divided into train, val.*data\.eval: .*val"):
        load_splits(config(tmp_path / "data"))
    with pytest.raises(ConfigError, match=r"one sub-folder per class"):
        load_splits(config(tmp_path / "data" / "train" / "red"))
    (tmp_path / "data" / "train" / "loose.png").write_bytes(png(noise(1)))
    with pytest.raises(DataError, match=r"loose\.png stands in no class folder"):
        load_splits(config(tmp_path / "data" / "train"))
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="hold no files"):
        load_splits(config(tmp_path / "empty"))


def test_rows_name_files_beside_them(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "data", 9)
    lines = ["file_name,label"] + [f"{p.parent.name}/{p.name},{p.parent.name}" for p in sorted(folder.rglob("*.png"))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    split, _ = load_one("data/rows.csv", config("data/rows.csv"), need_label=True, default_split="train")
    assert split.where[0] == "data/rows.csv, line 2"
    for row in split.examples:
        assert row["image"].source.parent.name == row["label"]
    (folder / "rows.csv").write_text("\n".join([*lines, "red/none.png,red"]) + "\n")
    with pytest.raises(DataError, match=r"rows\.csv, line 11: there is no image data/red/none\.png"):
        load_one("data/rows.csv", config("data/rows.csv"), need_label=True, default_split="train")


def test_parquet_as_the_datasets_library_writes_it(tmp_path):
    import datasets

    rows = {"image": [{"bytes": png(noise(i)), "path": None} for i in range(6)], "label": [i % 3 for i in range(6)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    split, _ = load_one(str(tmp_path / "a.parquet"), config("a.parquet"), need_label=True, default_split="train")
    for i, row in enumerate(split.examples):
        np.testing.assert_array_equal(row["image"].pixels(), noise(i))


@pytest.mark.parametrize("channels", [0, 1, 3])
def test_npz(channels, tmp_path):
    images = np.stack([noise(i) for i in range(6)])
    images = images[:, :, :, 0] if channels == 0 else images[:, :, :, :channels]
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6) % 2)
    split, rows = load_one(str(tmp_path / "a.npz"), config("a.npz"), need_label=True, default_split="train")
    assert [row["label"] for row in split.examples] == [0, 1] * 3
    assert rows.where(2).endswith("a.npz, row 3")
    for i, row in enumerate(split.examples):
        want = noise(i) if channels == 3 else np.repeat(noise(i)[:, :, :1], 3, 2)
        np.testing.assert_array_equal(row["image"].pixels(), want)


def test_faulty_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.zeros(3))
    with pytest.raises(DataError, match="one entry per image"):
        load_one(str(tmp_path / "a.npz"), config("a.npz"), need_label=True, default_split="train")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(DataError, match="can't be read"):
        load_one(str(tmp_path / "b.npz"), config("b.npz"), need_label=True, default_split="train")


def write_idx(path: Path, array: np.ndarray, packed: bool) -> Path:
    raw = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


def test_idx(tmp_path):
    images = np.stack([noise(i)[:, :, 0] for i in range(5)])
    source = write_idx(tmp_path / "train-images-idx3-ubyte.gz", images, True)
    with pytest.raises(ConfigError, match="no labels beside it"):
        load_one(str(source), config(source), need_label=True, default_split="train")
    labels = write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(5, dtype=np.uint8), False)
    split, _ = load_one(str(source), config(source), need_label=True, default_split="train")
    assert [row["label"] for row in split.examples] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(split.examples[3]["image"].pixels()[:, :, 1], images[3])
    write_idx(labels, np.arange(4, dtype=np.uint8), False)
    with pytest.raises(DataError, match=r"5 images, .* 4 labels"):
        load_one(str(source), config(source), need_label=True, default_split="train")
    source.write_bytes(gzip.compress(gzip.decompress(source.read_bytes())[:-3]))
    with pytest.raises(DataError, match="bytes for the shape"):
        load_one(str(source), config(source), need_label=True, default_split="train")


@pytest.fixture
def prepared(tmp_path):
    settings = tiny.config(
        "image-classification",
        make_image_model("vit", tmp_path / "model"),
        write_folder(tmp_path / "data", 24),
        tmp_path / "run",
        data={"cache": str(tmp_path / "cache")},
    )
    splits = load_splits(settings)
    return settings, splits, make_task(settings, splits.labels)


def test_pixels_are_cached_by_content(prepared, tmp_path):
    settings, splits, task = prepared
    first = encode_splits(task, splits, settings)["train"].columns["pixels"]
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 3
    again = encode_splits(task, splits, settings)["train"].columns["pixels"]
    np.testing.assert_array_equal(first, again)
    assert sorted((tmp_path / "cache").iterdir()) == files
    other = settings.model_copy(update={"data": settings.data.model_copy(update={"image_size": 16})})
    encode_splits(make_task(other, splits.labels), splits, other)
    assert len(list((tmp_path / "cache").iterdir())) == 6  # trap 19: other settings, other names
    where = Path(splits.train.where[0])
    Image.fromarray(noise(999)).save(where)
    encode_splits(task, load_splits(settings), settings)
    assert len(list((tmp_path / "cache").iterdir())) > 6


def test_many_pixels_are_mapped_from_the_cache(prepared, tmp_path, monkeypatch):
    _, splits, task = prepared
    held = encode_split(splits.train, task.encode, task.fingerprint(), None, None).columns["pixels"]
    monkeypatch.setattr(stacking, "MAPPED_FROM", 4 * held[0].nbytes)
    encode = [task.encode, task.fingerprint(), None, tmp_path / "cache"]
    for _ in range(2):  # written, then read
        mapped = encode_split(splits.train, *encode)
        assert isinstance(mapped.columns["pixels"], np.memmap)
        np.testing.assert_array_equal(mapped.columns["pixels"], held)
    (file,) = (tmp_path / "cache").glob("*.pixels")
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    np.testing.assert_array_equal(encode_split(splits.train, *encode).columns["pixels"], held)  # made anew
    file.unlink()
    np.testing.assert_array_equal(encode_split(splits.train, *encode).columns["pixels"], held)


def test_without_room_for_the_cache_pixels_stay_in_memory(prepared, tmp_path, monkeypatch, caplog):
    _, splits, task = prepared
    monkeypatch.setattr(stacking, "MAPPED_FROM", 1)
    monkeypatch.setattr(Path, "open", _full_after(3, Path.open))
    found = encode_split(splits.train, task.encode, task.fingerprint(), None, tmp_path / "cache").columns["pixels"]
    monkeypatch.undo()
    assert not isinstance(found, np.memmap)
    np.testing.assert_array_equal(
        found, encode_split(splits.train, task.encode, task.fingerprint(), None, None).columns["pixels"]
    )
    assert "not cached" in caplog.text
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".safetensors"]


def _full_after(times: int, real: Any) -> Any:
    calls = []

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode in ("ab", "wb"):
            calls.append(self)
            if len(calls) > times:
                raise OSError(28, "No space left on device")
        return real(self, mode, *args, **kwargs)

    return opened


def test_a_file_that_changes_between_reading_and_encoding_is_refused(prepared):
    _, splits, task = prepared
    Image.fromarray(noise(999)).save(splits.train.where[0])
    with pytest.raises(DataError, match="changed while it was used"):
        encode_split(splits.train, task.encode, task.fingerprint(), None, None)


def test_the_digest_of_examples_follows_pixels_not_names(tmp_path):
    write_folder(tmp_path / "a", 9)
    write_folder(tmp_path / "b", 9)
    assert load_splits(config(tmp_path / "a")).digest == load_splits(config(tmp_path / "b")).digest
    json.dumps([str(row["image"]) for row in load_splits(config(tmp_path / "a")).train.examples])


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_image_sets_of_the_datasets_library(tmp_path, form):
    """Images as bytes, classes by name."""
    import datasets

    pixels = [noise(i, 8, 9) for i in range(30)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "fox"])})
    columns = {"image": [Image.fromarray(p) for p in pixels], "label": [i % 3 for i in range(30)]}
    found = datasets.Dataset.from_dict(columns, features=features)
    source = tmp_path / ("saved" if form == "folder" else "rows.parquet")
    if form == "folder":
        found.save_to_disk(str(source))
    else:
        found.to_parquet(source)
    splits = load_splits(config(source, split={"eval": 0.2, "test": 0.0}))
    assert splits.labels.names == ["cat", "dog", "fox"]
    by_digest = {picture(p, "").digest: i for i, p in enumerate(pixels)}
    for example in splits.train.examples:
        i = by_digest[example["image"].digest]
        assert example["label"] == ["cat", "dog", "fox"][i % 3]


@pytest.mark.parametrize("target", ["a", "."])
def test_a_link_back_is_refused(tmp_path, target):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(noise(1, 8, 8)).save(tmp_path / "set" / name / "0.png")
    (tmp_path / "set" / "a" / "link").symlink_to(tmp_path / "set" / target)
    with pytest.raises(DataError, match="is a link back to"):
        load_splits(config(tmp_path / "set"))


def test_a_column_of_labels_in_npz_is_one_class_each(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.stack([noise(i) for i in range(6)]), label=(np.arange(6) % 2)[:, None])
    splits = load_splits(config(tmp_path / "a.npz", split={"eval": 0.0, "test": 0.0}))
    assert splits.labels.kind == "single"
    assert [row["label"] for row in splits.train.examples] == [0, 1] * 3


@pytest.mark.parametrize("image", [None, " ", {"bytes": None, "path": None}])
def test_a_row_without_an_image_is_empty(image, tmp_path):
    write_folder(tmp_path / "data", 9)
    files = sorted((tmp_path / "data").rglob("*.png"))
    rows = [{"image": str(file), "label": file.parent.name} for file in files]
    rows[1]["image"] = image
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"split": {"eval": 0.0, "test": 0.0}, "clean": {"empty": "drop"}}
    splits = load_splits(config(tmp_path / "rows.jsonl", **data))
    assert splits.report.removed == {"train": {"empty": 1}}
