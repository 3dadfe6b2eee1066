"""Augmentation: each operation against arrays by hand, draws that depend on (seed, row) alone, off by default."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from tiny_images import noise

from peft_engine.config import ImageAugmentConfig
from peft_engine.data.augmenting_images import NAMES, OPERATIONS, augment, describe, image_change
from peft_engine.data.encoding import EncodedSet
from peft_engine.data.image_sheets import image_preview, write_sheet
from peft_engine.errors import ConfigError
from peft_engine.runtime import combine

ALL = ImageAugmentConfig(flip=0.5, crop=0.3, colour=0.4, randaugment=2, magnitude=20)


def batch(count: int = 6, height: int = 24, width: int = 31) -> np.ndarray:
    return np.stack([noise(i, height, width) for i in range(count)])


def encoded(count: int = 6) -> EncodedSet:
    offsets = np.arange(count + 1, dtype=np.int64)
    columns = {"pixels": batch(count), "label": np.arange(count)}
    units = np.ones(count, np.int64)
    return EncodedSet(np.zeros(count, np.int32), offsets, units, np.arange(count), columns)


def run(name: str, pixels: np.ndarray, level: float, sign: int = 1) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), level, sign))


def test_the_papers_fourteen_operations():
    assert len(NAMES) == 14


def test_flip_is_a_mirror():
    pixels = batch()
    found = augment(pixels, np.arange(6), 3, ImageAugmentConfig(flip=0.999999))
    np.testing.assert_array_equal(found, pixels[:, :, ::-1])


def test_half_of_the_images_are_flipped():
    pixels = np.repeat(batch(1), 400, axis=0)
    found = augment(pixels, np.arange(400), 3, ImageAugmentConfig(flip=0.5))
    flipped = sum(np.array_equal(one, pixels[0, :, ::-1]) for one in found)
    same = sum(np.array_equal(one, pixels[0]) for one in found)
    assert flipped + same == 400
    assert 160 < flipped < 240  # four standard deviations


def test_a_crop_is_a_window_resized_back():
    """A ramp from left to right shows which window was taken: crops are linear in it."""
    ramp = np.tile(np.linspace(0, 240, 61).astype(np.uint8)[None, :, None], (40, 1, 3))
    rows = np.arange(50)
    found = augment(np.stack([ramp] * 50), rows, 9, ImageAugmentConfig(crop=0.5)).astype(float)
    slope = (found[:, 0, 50, 0] - found[:, 0, 10, 0]) / 40 / (240 / 60)  # share of the width that is left
    assert slope.min() >= 0.49
    assert slope.max() <= 1.01
    assert slope.std() > 0.05
    assert found[:, 0, 5, 0].std() > 5  # windows begin in different places


@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_brightness_contrast_and_colour(factor):
    pixels = noise(5, 12, 14)
    level, sign = abs(factor - 1) / 0.9, 1 if factor > 1 else -1
    want = np.clip(np.floor(pixels.astype(np.float32) * np.float32(factor)), 0, 255)
    assert np.abs(run("brightness", pixels, level, sign).astype(float) - want).max() <= 1
    grey = np.asarray(Image.fromarray(pixels).convert("L")).astype(float)
    mean = int(grey.mean() + 0.5)
    want = np.clip(mean + (pixels.astype(float) - mean) * factor, 0, 255)
    assert np.abs(run("contrast", pixels, level, sign).astype(float) - want).max() <= 1
    want = np.clip(grey[:, :, None] + (pixels - grey[:, :, None]) * factor, 0, 255)
    assert np.abs(run("color", pixels, level, sign).astype(float) - want).max() <= 1
    want = np.asarray(ImageEnhance.Sharpness(Image.fromarray(pixels)).enhance(factor))
    assert np.abs(run("sharpness", pixels, level, sign).astype(float) - want).max() <= 1


def test_posterize_and_solarize():
    pixels = noise(6, 12, 14)
    np.testing.assert_array_equal(run("posterize", pixels, 1.0), pixels & 0b11110000)  # four bits at most
    np.testing.assert_array_equal(run("posterize", pixels, 0.5), pixels & 0b11111100)
    np.testing.assert_array_equal(run("solarize", pixels, 1.0), 255 - pixels)
    np.testing.assert_array_equal(run("solarize", pixels, 0.5), np.where(pixels < 128, pixels, 255 - pixels))
    np.testing.assert_array_equal(run("identity", pixels, 1.0), pixels)


def test_autocontrast_and_equalize():
    pixels = noise(7, 40, 50)
    low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1)).astype(float)
    want = (pixels - low) * 255 / (high - low)
    assert np.abs(run("autocontrast", pixels, 1.0) - want).max() <= 1
    flat = run("equalize", pixels, 1.0)
    for channel in range(3):  # each value becomes its rank, as a share of all pixels
        counts = np.bincount(pixels[:, :, channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        ranks = np.minimum((step // 2 + np.cumsum(counts) - counts) // step, 255)
        np.testing.assert_array_equal(flat[:, :, channel], ranks[pixels[:, :, channel]])


def test_geometry():
    pixels = noise(8, 20, 20)
    moved = run("translate_x", pixels, 0.5 / (150 / 331) / 2, 1)  # a quarter of the width: 5 pixels to the left
    np.testing.assert_array_equal(moved[:, :15], pixels[:, 5:])
    assert (moved[:, 15:] == 128).all()
    moved = run("translate_y", pixels, 0.5 / (150 / 331) / 2, -1)
    np.testing.assert_array_equal(moved[5:], pixels[:15])
    assert (moved[:5] == 128).all()
    sheared = run("shear_x", pixels, 1.0, 1)
    for y in (0, 10, 19):
        shift = 0.3 * (y + 0.5)
        source = np.floor(np.arange(20) + 0.5 + shift).astype(int)
        inside = source < 20
        np.testing.assert_array_equal(sheared[y, inside], pixels[y, source[inside]])
    np.testing.assert_array_equal(
        run("shear_y", pixels, 1.0, -1), run("shear_x", pixels.swapaxes(0, 1), 1.0, -1).swapaxes(0, 1)
    )
    turned = run("rotate", pixels, 1.0, 1)
    want = np.asarray(Image.fromarray(pixels).rotate(30, fillcolor=(128, 128, 128)))
    np.testing.assert_array_equal(turned, want)


def test_a_draw_depends_on_seed_and_row_alone():
    pixels, rows = batch(8), np.array([3, 9, 1, 4, 20, 7, 0, 5])
    whole = augment(pixels, rows, 77, ALL)
    assert whole.dtype == np.uint8
    assert whole.shape == pixels.shape
    for cut in (1, 3, 5):
        parts = [augment(pixels[i : i + cut], rows[i : i + cut], 77, ALL) for i in range(0, 8, cut)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_array_equal(augment(pixels[order], rows[order], 77, ALL), whole[order])
    other = augment(pixels, rows, 78, ALL)
    assert sum(np.array_equal(a, b) for a, b in zip(whole, other, strict=True)) <= 2
    same = np.repeat(pixels[:1], 8, axis=0)  # rows draw for themselves
    assert len({one.tobytes() for one in augment(same, rows, 77, ALL)}) >= 6


def test_off_by_default_and_only_where_a_split_is_told_to():
    assert describe(ImageAugmentConfig()) == ""
    assert image_change(ImageAugmentConfig()) is None
    data, rows = encoded(), np.array([4, 2])
    got, index = data.drawn(rows, 1)
    assert got is data
    assert index is rows


def test_a_changed_set_holds_these_rows_alone():
    data, rows = encoded(), np.array([4, 2, 5])
    change = image_change(ALL)
    assert change is not None
    got = change(data, rows, 1)
    assert len(got) == 3
    assert got.lengths.tolist() == [1, 1, 1]
    assert got.columns["label"].tolist() == [4, 2, 5]
    assert got.rows.tolist() == [4, 2, 5]
    np.testing.assert_array_equal(got.columns["pixels"], augment(data.columns["pixels"][rows], rows, 1, ALL))
    np.testing.assert_array_equal(data.columns["pixels"], batch())  # the data itself stays


def test_a_sheet_shows_images_before_and_after(tmp_path):
    data = encoded()
    write_sheet(str(tmp_path / "a.png"), data, ALL, seed=0)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (6 * (24 + 2), 3 * (31 + 2), 3)
    np.testing.assert_array_equal(sheet[26 : 26 + 24, :31], data.columns["pixels"][1])
    assert not np.array_equal(sheet[:24, 33 : 33 + 31], data.columns["pixels"][0])
    change = image_change(ALL)
    for step in (1, 2):  # the loop's own draws
        drawn = change(data, np.arange(6), combine(0, 4, step)).columns["pixels"]
        np.testing.assert_array_equal(sheet[26 : 26 + 24, 33 * step : 33 * step + 31], drawn[1])
    write_sheet(str(tmp_path / "b.png"), data, ImageAugmentConfig(), seed=0)
    assert np.asarray(Image.open(tmp_path / "b.png")).shape == (6 * 26, 33, 3)
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        write_sheet(str(tmp_path / "a.jpg"), data, ALL, seed=0)


def test_a_preview_is_a_picture_of_characters():
    data = encoded()
    data.columns["pixels"][0] = 0
    data.columns["pixels"][0, :12] = 255
    lines = image_preview(data, 0, colour=False).splitlines()
    assert {len(line) for line in lines} == {32}
    assert set(lines[0]) == {"█"}
    assert set(lines[-1]) == {" "}
    coloured = image_preview(data, 0, colour=True)
    assert "38;2;255;255;255" in coloured
    assert coloured.endswith("\x1b[0m")
