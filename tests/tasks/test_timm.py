"""timm's models in transformers' wrapper. What needs timm itself is left out where it can't be imported."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import assemble, config
from tiny_images import CLASSES, noise, write_folder
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from peft_engine.config import ModelConfig
from peft_engine.errors import ConfigError
from peft_engine.run import train
from peft_engine.tasks.pixels import load_pixels
from peft_engine.using import evaluate, export, predict

SIDE = 32
STATED: dict[str, Any] = {"input_size": [3, SIDE, SIDE], "interpolation": "bilinear", "crop_pct": 0.875}
STATED |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_mode": "center"}
FAMILIES = {
    "vgg11_bn": ("timm_model.head.fc", {"mlp_ratio": 1 / 256}),
    "test_resnet": ("timm_model.fc", {}),
    "test_vit": ("timm_model.head", {"img_size": SIDE, "dynamic_img_size": False}),
}


def write_config(folder: Path, **changed: Any) -> Path:
    """A timm model's config.json, without weights. Its label names let transformers read it without timm."""
    folder.mkdir(parents=True, exist_ok=True)
    stated = {"architecture": "vgg11_bn", "num_classes": 3, "label_names": ["a", "b", "c"]}
    stated |= {"pretrained_cfg": {**STATED, **changed}}
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def settings(model: Path, data: Path, output: Path, /, **sections: Any) -> Any:
    lora = {"method": "lora", "rank": 4, "dropout": 0.0}
    given = {"adapter": lora, "training": {}, **sections}
    given["training"] = {"steps": 4, "batch_size": 8, "learning_rate": 0.005, **given["training"]}
    return config("image-classification", model, data, output, **given)


# (crop mode, width and height of the input, settings) → size after resizing, and where the crop or the image begins
GEOMETRY = [
    ("center", (40, 28), {}, (51, 36), (10, 2)),  # 19 too wide, and half of it is rounded to the even
    ("center", (28, 47), {}, (36, 60), (2, 14)),
    ("center", (39, 28), {"crop_pct": 1.0}, (44, 32), (6, 0)),
    ("center", (40, 28), {"input_size": [3, 24, 32]}, (39, 27), (4, 2)),
    ("squash", (40, 28), {}, (36, 36), (2, 2)),
    ("border", (40, 20), {"crop_pct": 1.0}, (32, 16), (0, -8)),
]


@pytest.mark.parametrize(("mode", "size", "changed", "resized", "start"), GEOMETRY)
@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
def test_pixels_follow_pretrained_cfg(mode, size, changed, resized, start, interpolation, tmp_path):
    write_config(tmp_path, crop_mode=mode, interpolation=interpolation, **changed)
    pixels = load_pixels(ModelConfig(path=str(tmp_path)), None)
    given = noise(3, size[1], size[0])
    _, height, width = changed.get("input_size", STATED["input_size"])
    mean, std = (np.array(STATED[name]) for name in ("mean", "std"))
    image = Image.fromarray(given).resize(resized, getattr(Image.Resampling, interpolation.upper()))
    left, top = start
    want = np.broadcast_to(np.round(255 * mean), (height, width, 3)).copy()
    cut = np.asarray(image)[max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    y, x = max(-top, 0), max(-left, 0)
    want[y : y + cut.shape[0], x : x + cut.shape[1]] = cut
    assert mode == "border" or cut.shape == (height, width, 3)
    want = (want / 255 - mean) / std
    ours = pixels.normalise(pixels.resize(given)[None])[0]
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), want, atol=1e-6)


def test_what_pretrained_cfg_leaves_out_is_timms_default(tmp_path):
    empty = dict.fromkeys(("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"))
    pixels = load_pixels(ModelConfig(path=str(write_config(tmp_path, **empty))), None)
    assert (pixels.height, pixels.width) == (224, 224)
    written = ("interpolation", "crop_pct", "crop_mode", "image_mean", "image_std")
    found = [getattr(pixels.processor, name) for name in written]
    assert found == ["bicubic", 0.875, "center", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]
    other = load_pixels(ModelConfig(path=str(tmp_path)), 64)
    assert (other.height, other.width) == (64, 64)
    assert other.told()["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert other.told() != pixels.told()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"interpolation": "random"}, "interpolation random"),
        ({"crop_mode": "zoom"}, "crop_mode zoom"),
        ({"input_size": [1, 32, 32]}, "1 channels"),
        ({"mean": [0.5, 0.5]}, "3 channels, got 2"),
        ({"crop_pct": "most"}, "could not convert"),
    ],
)
def test_settings_that_are_not_known_are_refused(changed, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_pixels(ModelConfig(path=str(write_config(tmp_path, **changed))), None)


def test_a_model_without_pretrained_cfg_is_refused(tmp_path):
    stated = {"model_type": "timm_wrapper", "architecture": "vgg11", "num_classes": 2, "label_names": ["a", "b"]}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match="holds no pretrained_cfg"):
        load_pixels(ModelConfig(path=str(tmp_path)), None)


@pytest.mark.parametrize("broken", ["ImportError('No module named timm')", "RuntimeError('operator nms is missing')"])
def test_without_timm_the_packages_are_named(broken, tmp_path, monkeypatch):
    """A torchvision of another build than torch raises RuntimeError."""
    (tmp_path / "site" / "timm").mkdir(parents=True)
    (tmp_path / "site" / "timm" / "__init__.py").write_text(f"raise {broken}\n")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    chosen = settings(write_config(tmp_path / "model"), write_folder(tmp_path / "data", 12), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"timm can't be imported \((No module|operator nms)") as caught:
        assemble(chosen)
    assert "timm and torchvision" in caught.value.fix


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm can't be imported: {str(error).splitlines()[0]}")
    folder = tmp_path_factory.mktemp("models")
    return {name: make_timm_model(name, folder / name) for name in FAMILIES}


def make_timm_model(architecture: str, folder: Path, **arguments: Any) -> Path:
    """Save a random model with a head of its own, its batch norms with statistics of their own."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    torch.manual_seed(0)
    arguments = {**FAMILIES.get(architecture, ("", {}))[1], **arguments}
    stated = TimmWrapperConfig(architecture=architecture, model_args=arguments, pretrained_cfg=STATED)
    stated.num_labels = 5
    model = TimmWrapperForImageClassification(stated)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "data", 36)


def timms_pixels(folder: Path, given: list[np.ndarray]) -> torch.Tensor:
    """As transformers makes them, by timm's own transforms."""
    return AutoImageProcessor.from_pretrained(folder)([Image.fromarray(one) for one in given])["pixel_values"]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [[3, 32, 32], [3, 24, 40]])
@pytest.mark.parametrize(("interpolation", "crop_pct"), [("bicubic", 0.9), ("bilinear", 1.0), ("nearest", 0.875)])
def test_pixels_are_timms_own(mode, size, interpolation, crop_pct, models, tmp_path):
    write_config(tmp_path, crop_mode=mode, input_size=size, interpolation=interpolation, crop_pct=crop_pct)
    pixels = load_pixels(ModelConfig(path=str(tmp_path)), None)
    odd = [noise(1, 31, 47), noise(2, 64, 64), noise(3, 9, 200), noise(4, 33, 32), noise(5, 101, 67)]
    ours = pixels.normalise(np.stack([pixels.resize(one) for one in odd]))
    assert torch.equal(ours, timms_pixels(tmp_path, odd))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_train_predict_and_export(architecture, models, images, tmp_path):
    """What the run predicts is what plain transformers and timm say of the merged model, file by file."""
    data = {"split": {"eval": 0.2, "test": 0.2}}
    chosen = settings(models[architecture], images, tmp_path / "run", data=data)
    summary = train(chosen)
    found = evaluate(chosen.output)["metrics"]
    assert found["loss"] == pytest.approx(summary["metrics"]["after"]["loss"], rel=1e-6)
    assert export(chosen.output)[1].relative <= 1e-5  # plain peft
    merged, drift = export(chosen.output, merged=True)
    assert drift.relative <= 1e-4
    rows = predict(chosen.output, str(images), tmp_path / "out.jsonl")
    files = sorted(images.rglob("*.png"))
    ours = np.array([[row["probabilities"][name] for name in CLASSES] for row in rows])
    model = AutoModelForImageClassification.from_pretrained(merged).eval()
    assert [model.config.id2label[i] for i in range(3)] == list(CLASSES)
    with torch.no_grad():
        logits = model(timms_pixels(merged, [np.asarray(Image.open(path)) for path in files])).logits
    np.testing.assert_allclose(ours, torch.softmax(logits, -1).numpy(), atol=1e-4)
    for folder in (Path(chosen.output) / "adapter", merged):  # what the cards say works
        snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {}
        exec(snippet.replace("THIS_FOLDER", str(folder)).replace("some.png", str(files[5])), names)
        np.testing.assert_allclose(ours[5], torch.softmax(names["logits"], -1)[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_where_adapters_and_heads_are(architecture, models, images, tmp_path):
    made = assemble(settings(models[architecture], images, tmp_path / "run"))
    backbone = made.group.backbone
    head = FAMILIES[architecture][0]
    assert backbone.head_modules == backbone.new_modules == [head]
    kinds = (nn.Linear,) if architecture == "test_vit" else (nn.Conv2d,)
    plain = AutoModelForImageClassification.from_pretrained(models[architecture])
    expected = {n for n, m in plain.named_modules() if isinstance(m, kinds) and n != head}
    tensors = made.group.members[0].tensors
    adapted = {n.split(".lora_A")[0].removeprefix("base_model.model.") for n in tensors if ".lora_A" in n}
    assert adapted == expected
    assert sorted(p.shape[0] for n, p in tensors.items() if "lora_" not in n) == [3, 3]  # the head's weight and bias
    made.group.train()
    assert not any(norm.training for norm in made.group.batch_norms())
    assert bool(made.group.batch_norms()) == (architecture != "test_vit")


@pytest.mark.parametrize("method", ["full", "head"])
def test_methods_that_train_the_models_own_tensors(method, models, images, tmp_path):
    training = {"steps": 10, "learning_rate": 0.01 if method == "full" else 0.1}
    chosen = settings(models["test_resnet"], images, tmp_path / "run", adapter={"method": method}, training=training)
    summary = train(chosen)
    metrics = summary["metrics"]
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    sizes = {n: p.numel() for n, p in assemble(chosen).group.backbone.model.named_parameters()}
    heads = sum(count for name, count in sizes.items() if name.startswith("timm_model.fc."))
    assert summary["trainable_parameters"] == (sum(sizes.values()) if method == "full" else heads)
    merged, drift = export(chosen.output, merged=True)
    assert drift.relative <= 1e-5
    assert evaluate(chosen.output)["metrics"]["loss"] == pytest.approx(metrics["after"]["loss"], rel=1e-6)
    before, after = (AutoModelForImageClassification.from_pretrained(path) for path in (models["test_resnet"], merged))
    assert all(
        torch.equal(b, after.get_buffer(name)) for name, b in before.named_buffers() if "running" in name
    )  # frozen statistics


def test_another_size_goes_into_the_merged_model(models, images, tmp_path):
    chosen = settings(models["test_resnet"], images, tmp_path / "run", data={"image_size": 48})
    train(chosen)
    merged = export(chosen.output, merged=True)[0]
    pixels = load_pixels(ModelConfig(path=str(models["test_resnet"])), 48)
    one = noise(7, 61, 90)
    assert torch.equal(pixels.normalise(pixels.resize(one)[None]), timms_pixels(merged, [one]))
    with pytest.raises(ConfigError, match="takes no images of 48 x 48 pixels"):
        assemble(settings(models["test_vit"], images, tmp_path / "vit", data={"image_size": 48}))


def test_a_head_of_as_many_classes_is_kept_and_the_digest_is_the_backbones(models, images, tmp_path):
    own = AutoModelForImageClassification.from_pretrained(
        models["test_resnet"], num_labels=3, ignore_mismatched_sizes=True
    )
    own.save_pretrained(tmp_path / "model")
    kept = assemble(settings(tmp_path / "model", images, tmp_path / "run")).group.backbone
    assert kept.head_modules == ["timm_model.fc"]
    assert kept.new_modules == []
    new = assemble(settings(models["test_resnet"], images, tmp_path / "other")).group.backbone
    assert new.new_modules == ["timm_model.fc"]
    assert kept.weights_digest == new.weights_digest


def test_what_timm_decides_or_can_not_freeze_is_refused(models, images, tmp_path):
    chosen = settings(models["test_vit"], images, tmp_path / "run", model={"attention": "eager"})
    with pytest.raises(ConfigError, match=r"model\.attention: timm chooses"):
        assemble(chosen)
    model = make_timm_model("test_efficientnet", tmp_path / "evo", norm_layer="evonormb0")
    with pytest.raises(ConfigError, match="EvoNorm2dB0"):
        assemble(settings(model, images, tmp_path / "run"))
