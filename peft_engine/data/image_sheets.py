"""Training images to look at: a line of text per image, and a sheet of some of them before and after augmentation."""

from pathlib import Path

import numpy as np

from ..config import ImageAugmentConfig
from ..errors import ConfigError, StorageError
from ..runtime import combine
from .augmenting_images import image_change
from .encoding import EncodedSet

SHADES = " ░▒▓█"
COLUMNS = 32  # characters
SHOWN = 8
STEPS = (1, 2)
GAP = 2


def image_preview(data: EncodedSet, row: int, *, colour: bool) -> str:
    """A small picture of characters: half blocks in the image's own colours, or shades of grey without colour."""
    pixels = data.columns["pixels"][row]
    height, width = pixels.shape[:2]
    lines = max(1, round(COLUMNS * height / width / 2))
    small = _shrunk(pixels, 2 * lines, COLUMNS)
    if not colour:
        grey = small.mean(-1).reshape(lines, 2, COLUMNS).mean(1)
        return "\n".join("".join(SHADES[int(v * len(SHADES) / 256)] for v in line) for line in grey)
    upper, lower = small[0::2], small[1::2]
    return "\n".join(
        "".join(f"\x1b[38;2;{_rgb(a)};48;2;{_rgb(b)}m▀" for a, b in zip(*pair, strict=True)) + "\x1b[0m"
        for pair in zip(upper, lower, strict=True)
    )


def write_sheet(file: str, data: EncodedSet, settings: ImageAugmentConfig, seed: int) -> None:
    """A PNG with a line per image: as it is resized, then as a run's first two steps would change it.

    Args:
        seed: `training.seed`.

    Raises:
        ConfigError: the name does not end in .png.
        StorageError: it can't be written.
    """
    from PIL import Image

    path = Path(file).expanduser()
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--images {file}: a name that ends in .png was expected.", "Name it so.")
    rows = np.arange(min(SHOWN, len(data)))
    change = image_change(settings)
    versions = [data.columns["pixels"][rows]]
    versions += [change(data, rows, combine(seed, 4, step)).columns["pixels"] for step in STEPS] if change else []
    framed = [np.pad(v, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for v in versions]
    sheet = np.concatenate([np.concatenate(list(version), axis=0) for version in framed], axis=1)
    try:
        Image.fromarray(sheet).save(path)
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error}.", "Name another file.") from error


def _shrunk(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))


def _rgb(pixel: np.ndarray) -> str:
    return ";".join(str(int(v)) for v in pixel)
