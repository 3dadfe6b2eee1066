"""Sources of images that are not files of rows: a folder per class, `.npz` arrays, IDX files (MNIST and its kin)."""

import gzip
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, StorageError
from .images import require_pillow
from .parsing import Row
from .reading import Rows, arrow_folder

SPLITS = {"train", "training", "val", "valid", "validation", "eval", "dev", "test"}
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
IDX_IMAGES, IDX_LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
SHARED = "an array per part, all with one entry per image"


def read_images(source: str, task: str, labelled: bool) -> Rows | None:
    """Rows of an image folder, an `.npz` or an IDX file; None where `source` is none of these, or `task` takes none.

    Args:
        labelled: rows need a class. Without, a folder may hold images at any depth.

    Raises:
        ConfigError: a folder that is not laid out by classes, an IDX file without its labels, or no Pillow.
        DataError: there is no image, or the file is damaged.
        StorageError: the operating system refuses to read it.
    """
    if task != "image-classification":
        return None
    require_pillow()
    path = Path(source).expanduser()
    name = path.name.lower()
    try:
        if os.path.isdir(path):
            if arrow_folder(source, path) is not None:
                return None  # rows of `datasets`, which hold their images
            return _folder(source, path) if labelled else _any_folder(source, path)
        if os.path.isfile(path) and name.endswith(".npz"):
            return _arrays(source, path)
        if os.path.isfile(path) and name.removesuffix(".gz").endswith(IDX_IMAGES):
            return _idx(source, path, labelled)
    except OSError as error:
        problem = f"{error.filename or source} can't be read: {error.strerror or error}."
        raise StorageError(problem, "Check who may read it, and the disk.") from error
    return None


def _folder(source: str, root: Path) -> Rows:
    """One sub-folder per class, images in it at any depth."""
    classes = [entry for entry in _entries(root) if entry.is_dir()]
    names = [entry.name for entry in classes]
    loose = [entry for entry in _entries(root) if not entry.is_dir()]
    if not classes:
        held = f"{len(loose)} files and no folders" if loose else "nothing"
        raise ConfigError(
            f"{source} holds {held}; one sub-folder per class was expected.",
            "Name the folder above the classes, or a file of rows with the columns image and label.",
        )
    if {name.lower() for name in names} <= SPLITS:
        named = ", ".join(f"data.{_part(name)}: {os.path.join(source, name)}" for name in names)
        raise ConfigError(f"{source} is divided into {', '.join(names)}, which are no classes.", f"Set {named}.")
    if loose:
        raise DataError(
            f"{loose[0]} stands in no class folder ({len(loose)} such files).",
            "Move it into the folder of its class, or away.",
        )
    files = [(file, entry.name) for entry in classes for file in _walk(entry, {os.path.realpath(root)})]
    if not files:
        raise DataError(f"The {len(classes)} class folders of {source} hold no files.", "Give a folder with images.")
    rows = [{"image": str(file), "label": name} for file, name in files]
    return Rows(source, rows, places=[str(file) for file, _ in files])


def _any_folder(source: str, root: Path) -> Rows:
    files = _walk(root, set())
    if not files:
        raise DataError(f"{source} holds no files.", "Give a folder with images.")
    return Rows(source, [{"image": str(file)} for file in files], places=[str(file) for file in files])


def _part(name: str) -> str:
    if name.lower().startswith("train"):
        return "train"
    return "test" if name.lower() == "test" else "eval"


def _entries(folder: Path) -> list[Path]:
    """What a folder shows, sorted by name: no dot files, nothing that file managers leave behind."""
    return sorted(
        (
            entry
            for entry in folder.iterdir()
            if not entry.name.startswith(".") and entry.name.lower() not in SYSTEM_FILES
        ),
        key=lambda entry: entry.name,
    )


def _walk(folder: Path, above: set[str]) -> list[Path]:
    """Files at any depth.

    Args:
        above: resolved paths of the folders that this one stands in, to which no link may lead back.
    """
    own = os.path.realpath(folder)
    if own in above:
        raise DataError(f"{folder} is a link back to {own}, in which it stands.", "Remove the link.")
    found: list[Path] = []
    for entry in _entries(folder):
        found += _walk(entry, above | {own}) if entry.is_dir() else [entry]
    return found


def _arrays(source: str, path: Path) -> Rows:
    """Each array of the file is a column; its first dimension counts the rows."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError, zlib.error, KeyError) as error:
        raise DataError(f"{source} can't be read: {error}.", "Save it with numpy.savez, no objects in it.") from error
    counts = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if not counts or len(set(counts.values())) > 1 or not max(counts.values()):
        held = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise DataError(
            f"{source} holds {held}; {SHARED}, was expected.", "Save one file per split, images and labels."
        )
    columns = {name: list(array) if array.ndim > 2 else array.tolist() for name, array in arrays.items()}
    return Rows(source, [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)])


def _idx(source: str, path: Path, labelled: bool) -> Rows:
    images = _read_idx(path, 3)
    partner = path.with_name(path.name.replace(IDX_IMAGES, IDX_LABELS))
    found = next((p for p in (partner, _other_packing(partner)) if p.is_file()), None)
    if found is None:
        if labelled:
            raise ConfigError(f"{source} has no labels beside it: there is no {partner}.", "Put it there.")
        return Rows(source, [{"image": image} for image in images])
    labels = _read_idx(found, 1)
    if len(labels) != len(images):
        raise DataError(
            f"{source} holds {len(images)} images, {found.name} {len(labels)} labels.", "Copy or download them again."
        )
    rows: list[Row] = [{"image": image, "label": int(n)} for image, n in zip(images, labels, strict=True)]
    return Rows(source, rows)


def _other_packing(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".gz")) if path.suffix == ".gz" else path.with_name(path.name + ".gz")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """uint8 of so many dimensions. The file: two zero bytes, 8 (for bytes), the dimensions, their sizes, the data."""
    raw = path.read_bytes()
    again = "Copy or download it again."
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} can't be decompressed: {error}.", again) from error
    start = 4 + 4 * dimensions
    if len(raw) < start or raw[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path} is no IDX file of {dimensions} dimensions of bytes.", again)
    shape: tuple[Any, ...] = struct.unpack(f">{dimensions}I", raw[4:start])
    if len(raw) - start != int(np.prod(shape)):
        raise DataError(f"{path} holds {len(raw) - start:,} bytes for the shape {shape}.", again)
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
