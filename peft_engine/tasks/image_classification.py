"""Image classification: one class, several classes, or a number per image, with the model's own head."""

import inspect
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..backbone import Backbone, digest_weights, load_model, load_settings
from ..config import Config
from ..data.augmenting_images import describe
from ..data.encoding import EncodedRow, EncodedSet
from ..data.formats import Example
from ..data.images import require_pillow
from ..data.labels import Labels
from ..errors import ConfigError, DataError
from .base import Batch, to_device
from .class_metrics import ClassMeter, predictions
from .heads import head_modules, is_head, name_classes, with_outputs
from .pixels import load_pixels
from .timm_models import WRAPPER, TimmProcessor, head_names, is_timm, require_timm
from .weighting import LABEL, WEIGHT, add_weights, class_loss

PROBLEM = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}
HEAD_DROPOUT = 0.1
MOST_HEAD_DROPOUT = 0.5


class ImageClassification:
    auto = "AutoModelForImageClassification"

    def __init__(self, config: Config, labels: Labels | None) -> None:
        assert labels is not None, "image classification needs its classes"
        self.config = config
        self.labels = labels
        self.primary = {"single": "accuracy", "multi": "f1_micro", "regression": "pearson"}[labels.kind]
        self.maximize = True
        require_pillow()
        if is_timm(config.model):
            require_timm(config.model)
        self.pixels = load_pixels(config.model, config.data.image_size)
        self.processor = self.pixels.processor
        self.arguments: dict[str, Any] = {}  # of the model's forward, beside the pixels
        self.decisions = {
            "image_processor": self.pixels.source,
            "image_size": f"{self.pixels.height} x {self.pixels.width}",
            "tokens": "one per image",
        }
        if told := describe(config.data.augment.image):
            self.decisions["augmentation"] = told

    def load(self, device: torch.device) -> Backbone:
        settings = load_settings(self.config.model)
        names = self.labels.names or ["value"]
        name_classes(settings, names)
        settings.problem_type = PROBLEM[self.labels.kind]
        if isinstance(self.processor, TimmProcessor):
            settings.pretrained_cfg = self.processor.pretrained_cfg  # a merged model makes its images by it
            settings.label_names = names  # timm's place for them
        model, new = load_model(self.config, AutoModelForImageClassification, settings, device, _is_head)
        heads = _heads(model)
        fresh = [name for name in heads if any(tensor.startswith(f"{name}.") for tensor in new)]
        if fresh:
            self._soften(model)
        self._fit(model)
        return Backbone(model, heads, fresh, None, digest_weights(model.base_model, _inner(model)), self.decisions)

    def _soften(self, model: PreTrainedModel) -> None:
        """A new head under a dropout made for a thousand classes would hardly learn (MobileNet's default is 0.8)."""
        settings: Any = model.config
        rate = getattr(settings, "classifier_dropout_prob", 0.0)
        if rate >= MOST_HEAD_DROPOUT:
            settings.classifier_dropout_prob = HEAD_DROPOUT
            for child in model.children():
                if isinstance(child, nn.Dropout):
                    child.p = HEAD_DROPOUT
            self.decisions["head_dropout"] = f"{HEAD_DROPOUT}, not the model's {rate}: the head is new"

    def _fit(self, model: PreTrainedModel) -> None:
        """Find out whether the model takes images of this size, by one image."""
        settings: Any = model.config
        size = [self.pixels.height, self.pixels.width]
        stated = getattr(settings, "image_size", None)
        made_for = list(stated) if isinstance(stated, list | tuple) else [stated, stated]
        patch = getattr(settings, "patch_size", None)
        if isinstance(patch, int) and any(side % patch for side in size):
            low = size[0] // patch * patch
            raise ConfigError(
                f"data.image_size: {size[0]} x {size[1]} pixels are no whole number of patches of {patch}, so that the "
                "model would not see the edges.",
                f"Set {low or patch} or {low + patch}.",
            )
        takes = inspect.signature(model.forward).parameters
        if stated is not None and made_for != size and "interpolate_pos_encoding" in takes:
            self.arguments = {"interpolate_pos_encoding": True}
            self.decisions["positions"] = f"interpolated from {made_for[0]} x {made_for[1]} pixels"
        model.eval()
        try:
            with torch.no_grad():
                found = self.forward(model, {"pixel_values": self.probe(model)["pixel_values"][:1]})
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"data.image_size: {type(model).__name__} takes no images of {size[0]} x {size[1]} pixels "
                f"({str(error).splitlines()[0]}).",
                f"The model was made for {made_for[0]} x {made_for[1]}." if stated else "Set another data.image_size.",
            ) from error
        assert found.shape == (1, max(1, len(self.labels.names))), found.shape

    def fingerprint(self) -> dict[str, Any]:
        return {
            "task": "image-classification 1",
            "processor": self.pixels.told(),
            "pillow": version("pillow"),
            "labels": self.labels.to_json(),
        }

    def mask(self, example: Example, where: str) -> tuple[list[int], list[bool]]:
        raise NotImplementedError("an image has no tokens")

    def encode(self, example: Example, where: str) -> list[EncodedRow] | str:
        """One unit of length one per image; its pixels are resized, as bytes."""
        try:
            columns: dict[str, Any] = {"pixels": self.pixels.resize(example["image"].pixels())}
        except ValueError as error:  # Malformed among them
            raise DataError(
                f"{where}: {error}.", "Set data.image_size, so that all images come to one size."
            ) from error
        if "label" in example:
            columns["label"] = self.labels.encode(example["label"], where)
        return [EncodedRow([0], 1, columns)]

    def collate(self, data: EncodedSet, rows: np.ndarray) -> Batch:
        """`pixel_values`, float32 (rows, 3, height, width), `label`, and `weight` where classes are weighted."""
        batch = {"pixel_values": self.pixels.normalise(data.columns["pixels"][rows])}
        if "label" in data.columns:
            dtype = torch.int64 if self.labels.kind == "single" else torch.float32
            batch["label"] = torch.from_numpy(data.columns["label"][rows]).to(dtype)
            add_weights(batch, data, rows)
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, classes), or (rows, 1) for regression."""
        kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
        pixels = batch["pixel_values"]
        if not torch.is_autocast_enabled(pixels.device.type):
            pixels = pixels.to(kind)
        return model(pixel_values=pixels, **self.arguments).logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return class_loss(logits, batch[LABEL], self.labels.kind)

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return class_loss(self.forward(model, batch), batch[LABEL], self.labels.kind, batch.get(WEIGHT))

    def meter(self) -> ClassMeter:
        return ClassMeter(self)

    def predictions(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        return predictions(logits, self.labels)

    def probe(self, model: nn.Module) -> Batch:
        """Four images of noise."""
        shape = (4, self.pixels.height, self.pixels.width, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return to_device({"pixel_values": self.pixels.normalise(noise)}, next(model.parameters()).device)

    def plain(self, path: str, **settings: Any) -> Any:
        outputs = max(1, len(self.labels.names))
        return AutoModelForImageClassification.from_pretrained(
            path, ignore_mismatched_sizes=True, **with_outputs(outputs, settings)
        )

    def plain_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.forward(model, batch)

    def as_plain(self, model: nn.Module) -> None:
        """Nothing: the model is of transformers' own class."""


def _heads(model: PreTrainedModel) -> list[str]:
    if model.config.model_type == WRAPPER:
        return head_names(model)
    return head_modules(model)


def _is_head(model: PreTrainedModel, name: str) -> bool:
    inner = tuple(f"{model.base_model_prefix}.{part}" for part in _inner(model))
    return is_head(model, name) or name.startswith(inner)


def _inner(model: PreTrainedModel) -> tuple[str, ...]:
    """Beginnings of the head's names inside of the base model, where timm has it."""
    base = f"{model.base_model_prefix}."
    return tuple(f"{name.removeprefix(base)}." for name in _heads(model) if name.startswith(base))
