"""From decoded images to a model's pixels, exactly as the model's own image processor makes them.

The processor runs in two parts. Its geometry (resize, crop) is done once per image and kept as bytes; its arithmetic
(rescale, normalise) is a function of each byte and its channel, so it is asked once for all 256 values and looked up.
Both together give the processor's own floats; that is checked when it is loaded. The PIL code of transformers is taken
even where torchvision could be: the two resize differently, and a run must not depend on what else is installed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbone import load_image_processor, load_settings
from ..config import ModelConfig
from ..errors import ConfigError
from .timm_models import TimmProcessor, is_timm

FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Pixels:
    """An image processor, taken apart.

    Attributes:
        processor: of transformers; saved beside what is trained.
        table: float32 (3, 256): what becomes of each byte of each channel.
        height, width: of what it makes.
        source: where the settings are from, in words for run.json.
    """

    processor: Any
    table: np.ndarray
    height: int
    width: int
    source: str

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (h, w, 3) → uint8 (height, width, 3)."""
        found = _geometry(self.processor, pixels)
        if found.shape != (self.height, self.width, 3):
            raise ValueError(
                f"it comes out as {found.shape[1]} x {found.shape[0]}, others as {self.width} x {self.height}"
            )
        return found

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """uint8 (rows, height, width, 3) → float32 (rows, 3, height, width)."""
        return torch.stack([torch.from_numpy(self.table[c][pixels[:, :, :, c]]) for c in range(3)], dim=1)

    def told(self) -> dict[str, Any]:
        """All settings of the processor, as JSON."""
        return dict(self.processor.to_dict())


def load_pixels(settings: ModelConfig, image_size: int | None) -> Pixels:
    """The processor of a model, or of its architecture where the folder holds none.

    Args:
        image_size: height and width of what it makes; None is its own. The share that it crops away stays.

    Raises:
        ConfigError: it can't be loaded, or does more to an image than resize, crop and arithmetic per byte.
    """
    if is_timm(settings):
        timm = TimmProcessor(load_settings(settings), settings.path, image_size)
        return _taken_apart(timm, "pretrained_cfg in the model's config.json", settings.path)
    folder = Path(settings.path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in FILES):
        make, source = _of_architecture(settings)
        image_size = image_size or _square(getattr(load_settings(settings), "image_size", None))
    else:
        make, source = partial(load_image_processor, settings), "the model's preprocessor_config.json"
    processor = make()
    if image_size is not None:
        processor = make(**_sized(processor, image_size))
    return _taken_apart(processor, source, settings.path)


def _of_architecture(settings: ModelConfig) -> tuple[Callable[..., Any], str]:
    """The class that makes the architecture's processor, and where its settings are from."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    config = load_settings(settings)
    found: Any = IMAGE_PROCESSOR_MAPPING.get(type(config), None)
    made = found.get("pil") if isinstance(found, dict) else None
    if not isinstance(made, type):
        raise ConfigError(
            f"model.path: {settings.path} holds no preprocessor_config.json, and {config.model_type} has no image "
            "processor of its own that runs on PIL.",
            "Put the model's preprocessor_config.json beside its weights.",
        )
    return made, "no preprocessor_config.json in model.path, defaults of its kind"


def _square(size: Any) -> int | None:
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None


def _sized(processor: Any, side: int) -> dict[str, Any]:
    """Settings that make it give (side, side)."""
    size, square = processor.size, {"height": side, "width": side}
    scale = 1.0
    crops = bool(processor.do_center_crop and processor.crop_size)
    if crops:
        scale = (size.shortest_edge or size.height or 1) / processor.crop_size.height
    edge = round(side * scale)
    if size is not None and size.shortest_edge:
        own_crop = getattr(processor, "crop_pct", None) is not None
        found: dict[str, Any] = {"size": {"shortest_edge": edge}}
        return found if own_crop else found | {"do_center_crop": True, "crop_size": square}
    found = {"size": {"height": edge, "width": edge}}
    return found | {"crop_size": square} if crops else found


def _geometry(processor: Any, pixels: np.ndarray) -> np.ndarray:
    made = processor(
        images=[pixels], do_rescale=False, do_normalize=False, input_data_format="channels_last", return_tensors="np"
    )["pixel_values"][0]
    return np.ascontiguousarray(np.moveaxis(made, 0, -1))


def _taken_apart(processor: Any, source: str, path: str) -> Pixels:
    name = type(processor).__name__
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    sample = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    try:
        levels = processor(
            images=[ramp], do_resize=False, do_center_crop=False, input_data_format="channels_last", return_tensors="np"
        )["pixel_values"][0]
        kept = _geometry(processor, sample)
        whole = processor(images=[sample], input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        table = np.asarray(levels, dtype=np.float32).reshape(3, 256)
        pixels = Pixels(processor, table, kept.shape[0], kept.shape[1], f"{source}: {_described(processor)}")
        same = kept.dtype == np.uint8 and torch.equal(pixels.normalise(kept[None]), whole.float())
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path}: {name} can't be used: {error}", "Correct its preprocessor_config.json.") from error
    if not same:
        raise ConfigError(
            f"{path}: {name} does more to an image than resize, crop, rescale and normalise, so its result can't be "
            "kept as bytes.",
            "Take another model, or a preprocessor_config.json of one of the plain kinds (ViTImageProcessor).",
        )
    return pixels


def _described(processor: Any) -> str:
    mean, std = (_numbers(getattr(processor, name, None)) for name in ("image_mean", "image_std"))
    normal = f"mean {mean}, std {std}" if processor.do_normalize else "not normalised"
    return f"{type(processor).__name__}, {normal}"


def _numbers(values: Any) -> str:
    return "/".join(f"{v:.4g}" for v in values) if isinstance(values, list | tuple) else str(values)
