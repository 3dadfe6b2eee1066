"""One image of a data set: where it comes from, its pixels as RGB, and the digest that names it.

Pixels are what `PIL.Image.open(...).convert("RGB")` gives after the camera's rotation (EXIF) was undone; 16-bit grey is
scaled to 8 bits. Of an animation the first frame counts, and transparency is dropped, as plain pipelines do.
"""

import base64
import binascii
import hashlib
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from .messages import Malformed
from .parsing import shown

MISSING = "pip install 'peft-engine[images]'"


@dataclass(frozen=True, eq=False)
class Picture:
    """An image that was decoded once, so that it is known to be readable.

    Attributes:
        source: path, encoded bytes, or pixels as they were given.
        digest: sha256 of height, width and the RGB pixels: equal pictures have equal digests, however they are stored.
    """

    source: Path | bytes | np.ndarray
    digest: str

    def __str__(self) -> str:
        return self.digest  # JSON of an example holds this, so that caches and digests follow the pixels

    def pixels(self) -> np.ndarray:
        """uint8 (height, width, 3). Raises Malformed where a file is no longer what it was."""
        pixels = _pixels(self.source)
        if _digest(pixels) != self.digest:
            raise Malformed(f"the image {shown(self.source)} was changed while it was used")
        return pixels


def require_pillow() -> None:
    """Raises ConfigError where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ConfigError("Images are read with Pillow, which is not installed.", MISSING) from error


def picture(value: Any, folder: str) -> Picture:
    """The image that a cell of a row holds.

    Args:
        value: a path (relative to `folder`), base64 text (with or without `data:image/…;base64,`), encoded bytes,
            `{"bytes": …}` or `{"path": …}` as the `datasets` library stores images, or an array or nested list of
            pixels, (h, w), (h, w, 1), (h, w, 3) or (h, w, 4).

    Raises:
        Malformed: it is none of these, or can't be decoded.
    """
    source = _source(value, folder)
    return Picture(source, _digest(_pixels(source)))


def from_array(pixels: np.ndarray) -> np.ndarray:
    """RGB uint8 (h, w, 3) of an array of pixels: bool, uint8 or uint16; grey, RGB or RGBA, channels last."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        turned = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4)
        hint = "; the channels come last: transpose it" if turned else ""
        raise Malformed(f"an array of shape {pixels.shape} is no image; (h, w) or (h, w, 1, 3 or 4) was expected{hint}")
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    elif pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise Malformed(f"pixels of type {pixels.dtype} have no stated range; uint8 (0 to 255) or uint16 was expected")
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, :3])


def _source(value: Any, folder: str) -> Path | bytes | np.ndarray:
    if isinstance(value, dict):
        found = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if found is None:
            raise Malformed(f"the image {shown(value)} has neither bytes nor path")
        return _source(found, folder)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, list):
        return _listed(value)
    if isinstance(value, os.PathLike):
        return Path(value)
    if not isinstance(value, str):
        raise Malformed(f"the image is {shown(value)}; a path, base64 text, bytes or an array was expected")
    if not value.strip():
        raise Malformed("the image's cell is empty")
    return _written(value.strip(), folder)


def _listed(value: list[Any]) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise Malformed(f"the image is a ragged list ({error})") from error
    if not np.issubdtype(array.dtype, np.integer) or array.size == 0 or array.min() < 0 or array.max() > 255:
        raise Malformed(f"the image is the list {shown(value)}; whole numbers from 0 to 255 were expected")
    return array.astype(np.uint8)


def _written(text: str, folder: str) -> Path | bytes:
    if text.startswith("data:"):
        head, comma, body = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Malformed(f"the image is {shown(text)}; data:image/png;base64,… was expected")
        return _unpacked(body, text)
    if text.startswith(("http://", "https://")):
        raise Malformed(f"the image is the address {shown(text)}; images are not fetched, download them first")
    path = Path(folder, os.path.expanduser(text))
    if os.path.exists(path):
        return path
    if len(text) >= 64 and "." not in text:  # the smallest image files are longer
        return _unpacked(text, text)
    raise Malformed(f"there is no image {path}")


def _unpacked(body: str, text: str) -> bytes:
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"the image {shown(text)} is neither a file nor base64 ({error})") from error


def _pixels(source: Path | bytes | np.ndarray) -> np.ndarray:
    if isinstance(source, np.ndarray):
        return from_array(source)
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(_stream(source)) as image:
            return _decoded(image)
    except UnidentifiedImageError:
        raise Malformed(f"{_named(source)} is no image that Pillow can read") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise Malformed(f"{_named(source)} can't be decoded: {error}") from error


def _stream(source: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _named(source: Path | bytes) -> str:
    return f"an image of {len(source):,} bytes" if isinstance(source, bytes) else str(source)


def _decoded(image: Any) -> np.ndarray:
    from PIL import ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits per pixel; 32-bit images hold 16-bit ones that were widened
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise Malformed(f"pixels from {grey.min()} to {grey.max()} are outside of 16 bits")
        return from_array(grey.astype(np.uint16))
    if image.mode == "F":
        raise Malformed("floating-point pixels have no stated range; convert them to 8 bits")
    return np.array(image.convert("RGB"))


def _digest(pixels: np.ndarray) -> str:
    digest = hashlib.sha256(f"{pixels.shape[0]}x{pixels.shape[1]} ".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
