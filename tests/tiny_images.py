"""Tiny random image models saved as ordinary folders (the base alone: the head is new), and images to train them on.

resnet      batch norm, ConvNext's processor (keeps proportions, cuts the edges away)
mobilenet   batch norm, depthwise convolutions, dropout 0.8 before the head
vit         layer norm, learned positions for 32 x 32 pixels
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

FAMILIES = ("resnet", "mobilenet", "vit")
SIDE = 32
CLASSES = ("blue", "green", "red")
PROCESSORS: dict[str, dict[str, Any]] = {
    "resnet": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIDE}, "crop_pct": 0.875},
    "mobilenet": {
        "image_processor_type": "MobileNetV2ImageProcessor",
        "size": {"shortest_edge": 36},
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
    },
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}},
}
NORMAL = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TARGETS: dict[str, Any] = {
    "resnet": ["convolution"],
    "mobilenet": r".*(expand_1x1|reduce_1x1|conv_1x1)\.convolution",
    "vit": "all-linear",
}


def make_image_model(family: str, folder: Path, *, processor: bool = True) -> Path:
    """Save a random model, its batch norms with statistics of their own, and return the folder."""
    torch.manual_seed(0)
    model = _model(family)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.0, 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if processor:
        text = json.dumps({**PROCESSORS[family], **NORMAL, "resample": 2})
        (folder / "preprocessor_config.json").write_text(text)
    return folder


def _model(family: str) -> PreTrainedModel:
    if family == "resnet":
        shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        return ResNetModel(ResNetConfig(**shape, layer_type="basic"))
    if family == "mobilenet":
        return MobileNetV2Model(
            MobileNetV2Config(depth_multiplier=0.25, min_depth=8, image_size=SIDE, tf_padding=False)
        )
    assert family == "vit", family
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTModel(ViTConfig(**shape, image_size=SIDE, patch_size=8, initializer_range=0.1))


def noise(number: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Pixels, uint8 (height, width, 3), tinted by their class; different for every number."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 160, (height, width, 3), dtype=np.uint8)
    pixels[:, :, 2 - number % 3] += 80
    return pixels


def write_folder(folder: Path, count: int, start: int = 0) -> Path:
    """PNG files of uneven sizes, one sub-folder per class."""
    for number in range(start, start + count):
        path = folder / CLASSES[number % 3] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(number, 24 + number % 7, 40 - number % 5)).save(path)
    return folder
