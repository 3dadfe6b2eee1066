"""Models of the timm library in transformers' wrapper: their heads, and their image processing on PIL alone.

The image processing is that of timm's evaluation transform, as `pretrained_cfg` in config.json states it: resize, crop,
mean and standard deviation. transformers makes it with timm and torchvision; here it is made without either, so that
the pixels do not depend on what else is installed. timm itself is needed for the model, and imports torchvision.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import ModelConfig
from ..errors import ConfigError

WRAPPER = "timm_wrapper"
SETTINGS = "preprocessor_config.json"
DEFAULTS: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
"""What timm takes where `pretrained_cfg` is silent."""
CROPS = ("center", "squash", "border")
FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def is_timm(settings: ModelConfig) -> bool:
    """Whether a model is timm's, by its config.json alone, which is read without timm."""
    try:
        stated, _ = PreTrainedConfig.get_config_dict(settings.path, revision=settings.revision)
    except (OSError, ValueError):
        return False  # whoever loads it says what is wrong
    return stated.get("model_type") == WRAPPER


def require_timm(settings: ModelConfig) -> None:
    """Raises ConfigError where timm can't be imported, or where attention was chosen, which timm chooses itself."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another torch raises either of them
        raise ConfigError(
            f"model.path: {settings.path} is a timm model, and timm can't be imported ({_first_line(error)}).",
            "pip install 'peft-engine[timm]', which brings timm and torchvision. torchvision must be built for this "
            "torch: beside a torch for the CPU, install it first, from the index that torch came from.",
        ) from error
    if settings.attention != "auto":
        raise ConfigError(
            f"model.attention: timm chooses the attention of its models itself, so {settings.attention} would do "
            "nothing.",
            "Set model.attention: auto.",
        )


def head_names(model: PreTrainedModel) -> list[str]:
    """Full names of the modules that make the classes; they are inside of `timm_model`.

    Raises:
        ConfigError: the model has none, or has norms over the batch that can't be held still.
    """
    timm_model: Any = model.timm_model
    made = timm_model.get_classifier()
    made = made if isinstance(made, tuple | list) else [made]
    names = [name for name, module in model.named_modules() if any(module is one for one in made)]
    if not any(True for name in names for _ in model.get_submodule(name).parameters()):
        raise ConfigError(
            f"model.path: timm's {model.config.architecture} has no head with weights.", "Take another architecture."
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if hasattr(module, "running_var") and not isinstance(module, _BatchNorm) and "Frozen" not in kind:
            raise ConfigError(
                f"model.path: {name} of timm's {model.config.architecture} is a {kind}, a norm over "
                "the batch whose statistics can't be frozen, so that a step would depend on its micro-batches.",
                "Take an architecture with batch norm, group norm or layer norm.",
            )
    return names


class TimmProcessor:
    """Has what the engine asks of an image processor of transformers, and makes what timm's evaluation transform makes.

    Args:
        config: the model's transformers config, with `architecture` and `pretrained_cfg`.
        path: of the model, for messages.
        image_size: height and width of what it makes; None is the model's own. The share that is cut away stays.

    Raises:
        ConfigError: `pretrained_cfg` is not there, or asks for what is not known here.
    """

    do_normalize = True

    def __init__(self, config: Any, path: str, image_size: int | None) -> None:
        stated = getattr(config, "pretrained_cfg", None)
        if not isinstance(stated, dict):
            raise ConfigError(
                f"model.path: config.json of {path} holds no pretrained_cfg, so nothing says how its images are made.",
                "Add it, with input_size, mean, std, interpolation, crop_pct and crop_mode.",
            )
        self.architecture = config.architecture
        self.pretrained_cfg = dict(stated)
        if image_size is not None:
            self.pretrained_cfg["input_size"] = [3, image_size, image_size]
        found = {name: self.pretrained_cfg.get(name) or default for name, default in DEFAULTS.items()}
        try:
            channels, self.height, self.width = (int(n) for n in found["input_size"])
            self.image_mean, self.image_std = (_three(found[name]) for name in ("mean", "std"))
            self.crop_pct = float(found["crop_pct"])
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"model.path: pretrained_cfg in config.json of {path} can't be read: {error}.", "Correct it."
            ) from error
        self.crop_mode, self.interpolation = found["crop_mode"], found["interpolation"]
        if channels != 3 or self.crop_mode not in CROPS or self.interpolation not in FILTERS:
            raise ConfigError(
                f"model.path: pretrained_cfg of {path} has {channels} channels, crop_mode {self.crop_mode} and "
                f"interpolation {self.interpolation}.",
                f"Known are 3 channels, {', '.join(CROPS)}, and {', '.join(FILTERS)}.",
            )

    def __call__(self, images: list[Any], do_resize: bool = True, do_rescale: bool = True, **other: Any) -> Any:
        """`pixel_values` (images, 3, height, width): uint8 without `do_rescale`, else float32 after mean and std."""
        made = [np.asarray(self._cut(np.asarray(one)) if do_resize else one) for one in images]
        pixels = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)
        if do_rescale:
            mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (self.image_mean, self.image_std))
            pixels = (pixels.float() / 255 - mean) / std
        return {"pixel_values": pixels if other.get("return_tensors") == "pt" else pixels.numpy()}

    def _cut(self, pixels: np.ndarray) -> Any:
        """Resize so that the crop is `crop_pct` of it, then cut out the middle."""
        from PIL import Image

        image = Image.fromarray(pixels)
        size = self._resized(*image.size)
        image = image.resize(size, getattr(Image.Resampling, self.interpolation.upper()))
        fill = tuple(round(255 * mean) for mean in self.image_mean) if self.crop_mode == "border" else (0, 0, 0)
        canvas = Image.new("RGB", (self.width, self.height), fill)
        canvas.paste(image, (_place(size[0], self.width), _place(size[1], self.height)))
        return canvas

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        to_width, to_height = (math.floor(side / self.crop_pct) for side in (self.width, self.height))
        if self.crop_mode == "squash":
            return to_width, to_height
        if self.crop_mode == "center" and to_width == to_height:
            short = min(width, height)
            return int(to_width * width / short), int(to_width * height / short)
        pick = max if self.crop_mode == "border" else min
        ratio = pick(height / to_height, width / to_width)
        return round(width / ratio), round(height / ratio)

    def to_dict(self) -> dict[str, Any]:
        """What transformers' processor of timm models takes."""
        kind = {"image_processor_type": "TimmWrapperImageProcessor", "architecture": self.architecture}
        return {**kind, "pretrained_cfg": self.pretrained_cfg}

    def save_pretrained(self, folder: str) -> None:
        """Write preprocessor_config.json. A merged model's config.json says the same."""
        (Path(folder) / SETTINGS).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _three(values: Any) -> tuple[float, ...]:
    found = tuple(float(v) for v in values)
    found = found * 3 if len(found) == 1 else found
    if len(found) != 3:
        raise ValueError(f"mean and std are of 3 channels, got {len(found)}")
    return found


def _place(side: int, target: int) -> int:
    """Where an image of this side begins on a canvas of the target's: outside of it where it is cut."""
    return (target - side) // 2 if side < target else -round((side - target) / 2)
