"""Changes to training images, drawn anew for every image of every step. Off by default.

A draw is a function of (seed of the member and step, row): it depends neither on micro-batches nor on processes, and a
resumed run draws the same. Order: crop, flip, colour, RandAugment (Cubuk et al. 2020, on PIL).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..config import ImageAugmentConfig
from .encoding import Change, EncodedSet

LEVELS = 30  # of RandAugment's magnitude
GREY = (128, 128, 128)  # what moves in at the edges


def image_change(settings: ImageAugmentConfig) -> Change | None:
    """What `EncodedSet.change` of a training split is, None where nothing is on."""
    return partial(_changed, settings) if describe(settings) else None


def _changed(settings: ImageAugmentConfig, data: EncodedSet, rows: np.ndarray, seed: int) -> EncodedSet:
    """These rows, with changed pixels."""
    columns = {name: values[rows] for name, values in data.columns.items() if name != "pixels"}
    columns["pixels"] = augment(data.columns["pixels"][rows], rows, seed, settings)
    one_each = np.arange(len(rows) + 1, dtype=np.int64)
    return EncodedSet(np.zeros(len(rows), np.int32), one_each, data.units[rows], data.rows[rows], columns)


def augment(pixels: np.ndarray, rows: np.ndarray, seed: int, settings: ImageAugmentConfig) -> np.ndarray:
    """Changed copies of a batch of images.

    Args:
        pixels: uint8 (rows, height, width, 3).
        rows: their numbers in the data.
        seed: of the member and step.
    """
    return np.stack([_one(image, int(row), seed, settings) for image, row in zip(pixels, rows, strict=True)])


def describe(settings: ImageAugmentConfig) -> str:
    """What is on, in words; "" where nothing is."""
    found = [
        f"flip {settings.flip:g}" if settings.flip else "",
        f"crop up to {settings.crop:g}" if settings.crop else "",
        f"colour up to {settings.colour:g}" if settings.colour else "",
        f"RandAugment {settings.randaugment} of magnitude {settings.magnitude}" if settings.randaugment else "",
    ]
    return ", ".join(filter(None, found))


def _one(pixels: np.ndarray, row: int, seed: int, settings: ImageAugmentConfig) -> np.ndarray:
    from PIL import Image

    rng = np.random.default_rng([seed, row])
    image = Image.fromarray(pixels)
    if settings.crop:
        image = _cropped(image, settings.crop * rng.random(), rng.random(), rng.random())
    if settings.flip and rng.random() < settings.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if settings.colour:
        for change in ("Brightness", "Contrast", "Color"):
            image = _enhanced(image, change, 1 + settings.colour * (2 * rng.random() - 1))
    for _ in range(settings.randaugment):
        name = NAMES[int(rng.integers(len(NAMES)))]
        image = OPERATIONS[name](image, settings.magnitude / LEVELS, -1 if rng.random() < 0.5 else 1)
    return np.asarray(image)


def _cropped(image: Any, share: float, left: float, top: float) -> Any:
    """Cut `share` of height and width away, and resize back."""
    from PIL import Image

    width, height = image.width * (1 - share), image.height * (1 - share)
    x, y = left * (image.width - width), top * (image.height - height)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(x, y, x + width, y + height))


def _enhanced(image: Any, change: str, factor: float) -> Any:
    from PIL import ImageEnhance

    return getattr(ImageEnhance, change)(image).enhance(factor)


def _enhancer(change: str) -> Callable[[Any, float, int], Any]:
    """Brightness, colour, contrast or sharpness by up to 0.9, up or down."""
    return lambda image, level, sign: _enhanced(image, change, 1 + sign * 0.9 * level)


def _moved(image: Any, coefficients: tuple[float, float, float, float, float, float]) -> Any:
    """Each pixel (x, y) of the result is the nearest to (a x + b y + c, d x + e y + f) of the image."""
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST, fillcolor=GREY)


def _rotate(image: Any, level: float, sign: int) -> Any:
    from PIL import Image

    return image.rotate(sign * 30 * level, Image.Resampling.NEAREST, fillcolor=GREY)


def _ops(name: str) -> Callable[[Any, float, int], Any]:
    def run(image: Any, level: float, sign: int) -> Any:
        from PIL import ImageOps

        return getattr(ImageOps, name)(image)

    return run


def _solarize(image: Any, level: float, sign: int) -> Any:
    from PIL import ImageOps

    return ImageOps.solarize(image, round(256 * (1 - level)))


def _posterize(image: Any, level: float, sign: int) -> Any:
    from PIL import ImageOps

    return ImageOps.posterize(image, 8 - round(4 * level))


MOST_SHIFT = 150 / 331  # of the width: the paper's 150 pixels at 331
OPERATIONS: dict[str, Callable[[Any, float, int], Any]] = {
    "identity": lambda image, level, sign: image,
    "autocontrast": _ops("autocontrast"),
    "equalize": _ops("equalize"),
    "rotate": _rotate,
    "solarize": _solarize,
    "color": _enhancer("Color"),
    "posterize": _posterize,
    "contrast": _enhancer("Contrast"),
    "brightness": _enhancer("Brightness"),
    "sharpness": _enhancer("Sharpness"),
    "shear_x": lambda image, level, sign: _moved(image, (1, sign * 0.3 * level, 0, 0, 1, 0)),
    "shear_y": lambda image, level, sign: _moved(image, (1, 0, 0, sign * 0.3 * level, 1, 0)),
    "translate_x": lambda image, level, sign: _moved(image, (1, 0, sign * MOST_SHIFT * level * image.width, 0, 1, 0)),
    "translate_y": lambda image, level, sign: _moved(image, (1, 0, 0, 0, 1, sign * MOST_SHIFT * level * image.height)),
}
"""The paper's fourteen: (image, share of the full magnitude, sign) → image."""
NAMES = tuple(OPERATIONS)
