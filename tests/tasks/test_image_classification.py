"""Image classification end to end on tiny random models, against plain transformers and its own processors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparing import changed
from PIL import Image
from safetensors.torch import load_file
from task_checks import resumes_bitwise
from tiny import assemble, config
from tiny_images import CLASSES, FAMILIES, NORMAL, PROCESSORS, SIDE, TARGETS, make_image_model, noise, write_folder
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2Model,
    ResNetConfig,
    ResNetModel,
)

from peft_engine.config import ModelConfig
from peft_engine.errors import ConfigError
from peft_engine.run import train
from peft_engine.tasks.pixels import load_pixels
from peft_engine.training.step import gradients
from peft_engine.using import evaluate, export, predict

AUGMENTED = {"augment": {"image": {"flip": 0.5, "crop": 0.2, "colour": 0.3, "randaugment": 1}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make_image_model(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "data", 36)


def settings(model: Path, data: Path, output: Path, /, family: str = "vit", **sections: Any) -> Any:
    lora = {"method": "lora", "rank": 4, "dropout": 0.0, "targets": TARGETS[family]}
    given = {"adapter": lora, "training": {}, "data": {}, **sections}
    given["training"] = {"steps": 4, "batch_size": 8, "learning_rate": 0.01, **given["training"]}
    return config("image-classification", model, data, output, **given)


def plain_pixels(folder: Path, images: list[np.ndarray], **replaced: Any) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **replaced)
    return processor([Image.fromarray(one) for one in images], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_the_processors_own(family, models):
    pixels = load_pixels(ModelConfig(path=str(models[family])), None)
    odd = [noise(1, 31, 47), noise(2, 64, 64), noise(3, 9, 200), noise(4, 33, 32)]
    ours = pixels.normalise(np.stack([pixels.resize(one) for one in odd]))
    assert torch.equal(ours, plain_pixels(models[family], odd))
    assert ours.shape == (4, 3, SIDE, SIDE)


@pytest.mark.parametrize(("family", "side"), [("resnet", 40), ("mobilenet", 48), ("vit", 24)])
def test_another_size_keeps_what_the_processor_cuts_away(family, side, models, tmp_path):
    pixels = load_pixels(ModelConfig(path=str(models[family])), side)
    odd = [noise(1, 31, 47), noise(2, 64, 64)]
    ours = pixels.normalise(np.stack([pixels.resize(one) for one in odd]))
    replaced: dict[str, Any] = {"size": {"height": 24, "width": 24}}
    if family == "resnet":
        replaced = {"size": {"shortest_edge": 40}}
    if family == "mobilenet":
        replaced = {"size": {"shortest_edge": 54}, "crop_size": {"height": 48, "width": 48}}  # 36 : 32 = 54 : 48
    assert torch.equal(ours, plain_pixels(models[family], odd, **replaced))
    pixels.processor.save_pretrained(tmp_path)
    assert torch.equal(ours, plain_pixels(tmp_path, odd))


def test_without_a_processor_the_architectures_is_taken_and_told(tmp_path, images):
    model = make_image_model("vit", tmp_path / "model", processor=False)
    made = assemble(settings(model, images, tmp_path / "run"))
    told = made.group.decisions()["image_processor"]
    assert told.startswith(
        "no preprocessor_config.json in model.path, defaults of its kind: ViTImageProcessorPil, mean 0.5"
    )
    assert made.data["train"].columns["pixels"].shape[1:] == (SIDE, SIDE, 3)


def test_a_processor_that_does_more_is_refused(tmp_path):
    model = make_image_model("vit", tmp_path / "model")
    file = model / "preprocessor_config.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({**stated, "image_processor_type": "EfficientNetImageProcessor"}))
    with pytest.raises(ConfigError, match="more to an image than"):
        load_pixels(ModelConfig(path=str(model)), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_train_predict_and_export(family, models, images, tmp_path):
    """What the run predicts is what plain transformers says of the merged model, file by file."""
    chosen = settings(models[family], images, tmp_path / "run", family, data={"split": {"eval": 0.2, "test": 0.2}})
    summary = train(chosen)
    assert summary["metrics"]["primary"] == "accuracy"
    found = evaluate(chosen.output)["metrics"]
    assert found["loss"] == pytest.approx(summary["metrics"]["after"]["loss"], rel=1e-6)
    assert export(chosen.output)[1].relative <= 1e-5  # plain peft
    merged, drift = export(chosen.output, merged=True)
    assert drift.relative <= 1e-4
    rows = predict(chosen.output, str(images), tmp_path / "out.jsonl")
    files = sorted(images.rglob("*.png"))
    assert [row["image"] for row in rows] == [str(path) for path in files]
    model = AutoModelForImageClassification.from_pretrained(merged).eval()
    with torch.no_grad():
        logits = model(plain_pixels(merged, [np.asarray(Image.open(path)) for path in files])).logits
    ours = np.array([[row["probabilities"][name] for name in CLASSES] for row in rows])
    np.testing.assert_allclose(ours, torch.softmax(logits, -1).numpy(), atol=1e-4)
    assert {row["predicted"] for row in rows} <= set(CLASSES)
    for folder in (Path(chosen.output) / "adapter", merged):  # what the cards say works
        snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {}
        exec(snippet.replace("THIS_FOLDER", str(folder)).replace("some.png", str(files[5])), names)
        np.testing.assert_allclose(ours[5], torch.softmax(names["logits"], -1)[0].numpy(), atol=1e-4)
    skipped = set(summary["kernels"]["skipped"].values())
    assert skipped == (set() if family == "vit" else {"peft's Conv2d has no fused form"})
    assert (family == "vit") == any("lora" in name for name in summary["kernels"]["swapped"])
    assert [model.config.id2label[i] for i in range(3)] == list(CLASSES)


@pytest.mark.parametrize("method", ["full", "head", "bitfit"])
def test_methods_that_train_the_models_own_tensors(method, models, images, tmp_path):
    chosen = settings(models["resnet"], images, tmp_path / "run", adapter={"method": method}, training={"steps": 12})
    summary = train(chosen)
    metrics = summary["metrics"]
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    made = assemble(chosen)
    sizes = {name: p.numel() for name, p in made.group.backbone.model.named_parameters()}
    expected = {
        "full": sum(sizes.values()),
        "head": 16 * 3 + 3,
        "bitfit": sum(n for name, n in sizes.items() if name.endswith("bias")) + 16 * 3,
    }
    assert summary["trainable_parameters"] == expected[method]
    merged, drift = export(chosen.output, merged=True)
    assert drift.relative <= 1e-5
    assert evaluate(chosen.output)["metrics"]["loss"] == pytest.approx(metrics["after"]["loss"], rel=1e-6)
    assert (merged / "preprocessor_config.json").is_file()


@pytest.fixture
def assembled(models, images, tmp_path):
    def make(family: str, **sections: Any) -> Any:
        return assemble(settings(models[family], images, tmp_path / "run", family, **sections))

    return make


def grads_of(made: Any, size: int, seed: int = 5) -> tuple[float, dict[str, torch.Tensor]]:
    member = made.group.members[0]
    torch.manual_seed(seed)
    rows = np.arange(10)
    parts = [rows[i : i + size] for i in range(0, 10, size)]
    data = made.data["train"]
    found = gradients(made.group, made.task, data, parts, 10, list(member.tensors.values()), made.runtime, seed)
    grads = {name: t.grad.clone() for name, t in member.tensors.items() if t.grad is not None}
    for t in member.tensors.values():
        t.grad = None
    return float(found.loss), grads


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    largest = max(float(g.abs().max()) for g in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / largest


@pytest.mark.parametrize(("family", "method"), [("resnet", "full"), ("mobilenet", "full"), ("mobilenet", "lora")])
def test_a_step_does_not_depend_on_how_it_is_cut(family, method, assembled):
    """Batch norms, the dropout before MobileNet's head and augmentation included."""
    adapter = {"method": "full"} if method == "full" else {"method": "lora", "rank": 4, "targets": TARGETS[family]}
    if method == "lora":
        adapter["dropout"] = 0.0
    made = assembled(family, adapter=adapter, data=AUGMENTED)
    made.group.train()
    statistics = {n: b.clone() for n, b in made.group.model.named_buffers()}
    loss, grads = grads_of(made, 10)
    for size in (1, 3, 7):
        other_loss, other = grads_of(made, size)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert farthest(grads, other) <= 1e-5
    assert all(torch.equal(b, statistics[n]) for n, b in made.group.model.named_buffers())
    made.group.model.train()  # what a plain loop does: the batch's own statistics
    assert farthest(grads_of(made, 10)[1], grads_of(made, 5)[1]) > 1e-3


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_all_linear_of_mobilenet_leaves_out_what_the_method_cant_take(method, models, images, tmp_path):
    chosen = settings(models["mobilenet"], images, tmp_path / "run", adapter={"method": method})
    summary = train(chosen)
    plain = AutoModelForImageClassification.from_pretrained(models["mobilenet"])
    groups = [module.groups for module in plain.modules() if isinstance(module, nn.Conv2d)]
    whole = groups.count(1)
    told = f"all-linear found none, so {whole if method == 'lora' else len(groups)} convolutions are adapted"
    if method == "lora":
        told += f"; {len(groups) - whole} grouped ones, which lora can't take, are left out"
    assert summary["decisions"]["adapter.targets"] == told
    assert 0 < whole < len(groups)
    assert export(chosen.output)[1].relative <= 1e-5
    assert export(chosen.output, merged=True)[1].relative <= 1e-4


@pytest.mark.parametrize(("method", "family"), [("layernorm", "mobilenet"), ("loha", "resnet")])
def test_a_merged_model_has_its_new_head_in_place(method, family, models, images, tmp_path):
    chosen = settings(models[family], images, tmp_path / "run", adapter={"method": method})
    train(chosen)
    folder, drift = export(chosen.output, merged=True)
    assert drift.relative <= 1e-4
    saved = load_file(folder / "model.safetensors")
    assert not any("modules_to_save" in name or "original_module" in name for name in saved)


def test_frozen_statistics_are_told_and_survive_evaluation(assembled):
    made = assembled("resnet", adapter={"method": "full"})
    made.group.train()
    with made.group.evaluating(made.group.members[0]) as model:
        assert not any(module.training for module in model.modules())
    norms = made.group.batch_norms()
    assert norms
    assert not any(module.training for module in norms)
    assert made.group.model.training
    assert made.group.decisions()["batch_norm"] == f"frozen statistics in {len(norms)} layers"
    made = assembled("vit")
    assert "batch_norm" not in made.group.decisions()


def test_loss_and_gradients_are_plain_transformers(models, assembled, images):
    """Summed cross-entropy over the batch's images, with the plain model in eval mode and the plain processor."""
    made = assembled("resnet", adapter={"method": "full"})
    made.group.train()
    loss, grads = grads_of(made, 4)
    plain = AutoModelForImageClassification.from_pretrained(models["resnet"], num_labels=3).eval()
    plain.load_state_dict(made.group.model.state_dict())
    rows = made.data["train"].rows[:10]
    where = [made.splits.train.where[int(i)] for i in rows]
    pixels = plain_pixels(models["resnet"], [np.asarray(Image.open(path)) for path in where])
    labels = torch.tensor([CLASSES.index(Path(path).parent.name) for path in where])
    want = F.cross_entropy(plain(pixels).logits, labels)
    want.backward()
    assert loss == pytest.approx(float(want.detach()), rel=1e-6)
    assert farthest({name: p.grad for name, p in plain.named_parameters()}, grads) <= 1e-5


def test_class_weights_weigh_the_loss(assembled):
    made = assembled("vit", data=AUGMENTED)
    weights = torch.tensor([0.5, 2.0, 1.25])
    labels = torch.from_numpy(made.data["train"].columns["label"]).long()
    columns = {**made.data["train"].columns, "weight": weights[labels].numpy()}
    weighted = dataclasses.replace(made.data["train"], columns=columns)
    rows = np.arange(7)
    batch = made.task.collate(*weighted.drawn(rows, 1))
    logits = made.task.forward(made.group.model.eval(), batch).detach()
    want = F.cross_entropy(logits, labels[:7], weight=weights, reduction="sum")
    torch.testing.assert_close(made.task.training_loss(made.group.model, batch).detach(), want)
    plain = F.cross_entropy(logits, labels[:7], reduction="sum")
    torch.testing.assert_close(made.task.loss(logits, batch), plain, msg="evaluation knows no weights")
    assert "weight" not in made.task.collate(made.data["train"], rows)


def test_a_new_head_gets_a_small_dropout_an_old_one_keeps_its_own(models, images, tmp_path, assembled):
    made = assembled("mobilenet")
    assert made.group.decisions()["head_dropout"].startswith("0.1, not the model's 0.8")
    rates = {module.p for module in made.group.backbone.model.children() if isinstance(module, nn.Dropout)}
    assert rates == {0.1}
    old = AutoModelForImageClassification.from_pretrained(models["mobilenet"], num_labels=3)
    old.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "preprocessor_config.json").write_bytes(
        (models["mobilenet"] / "preprocessor_config.json").read_bytes()
    )
    made = assemble(settings(tmp_path / "old", images, tmp_path / "run", "mobilenet"))
    assert made.group.backbone.new_modules == []
    assert "head_dropout" not in made.group.decisions()
    assert {m.p for m in made.group.backbone.model.children() if isinstance(m, nn.Dropout)} == {0.8}


def test_other_sizes_interpolate_a_vits_positions(models, images, tmp_path):
    chosen = settings(models["vit"], images, tmp_path / "run", data={"image_size": 48})
    summary = train(chosen)
    assert summary["decisions"]["positions"] == "interpolated from 32 x 32 pixels"
    assert export(chosen.output)[1].relative <= 1e-5


def test_a_size_that_the_model_does_not_take_is_refused(models, images, tmp_path):
    with pytest.raises(ConfigError, match=r"20 x 20 pixels are no whole number of patches of 8.*16 or 24"):
        assemble(settings(models["vit"], images, tmp_path / "run", data={"image_size": 20}))
    grey = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1])
    ResNetModel(grey).save_pretrained(tmp_path / "grey")
    with pytest.raises(ConfigError, match=r"ResNetForImageClassification takes no images of 32 x 32 pixels"):
        assemble(settings(tmp_path / "grey", images, tmp_path / "run", "resnet", data={"image_size": 32}))


def test_text_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.max_length: applies to"):
        settings(tmp_path, tmp_path, tmp_path / "run", data={"max_length": 64})


def test_resume_gives_the_bits_of_an_undisturbed_run(models, images, tmp_path, monkeypatch):
    """29 training rows in batches of 8, with augmentation and dropout before the head."""
    training = {"steps": 9, "save_every": 3, "micro_batch_size": 3}
    data = {**AUGMENTED, "split": {"eval": 0.2, "test": 0.0}}
    whole = settings(models["mobilenet"], images, tmp_path / "whole", "mobilenet", training=training, data=data)
    resumes_bitwise(whole, 5, monkeypatch)


def test_augmentation_changes_training_alone(models, images, tmp_path):
    plain = settings(models["vit"], images, tmp_path / "plain", training={"learning_rate": 1e-9})
    drawn = changed(plain, output=str(tmp_path / "drawn"), data__augment=AUGMENTED["augment"])
    a, b = train(plain), train(drawn)
    assert a["metrics"]["before"] == b["metrics"]["before"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[0] for name in ("plain", "drawn")]
    first = [json.loads(line)["loss"] for line in lines]
    assert first[0] != first[1]
    assert b["decisions"]["augmentation"] == "flip 0.5, crop up to 0.2, colour up to 0.3, RandAugment 1 of magnitude 9"
    assert "augmentation" not in a["decisions"]


def test_arrays_are_predicted_and_named_by_their_place(models, images, tmp_path):
    chosen = settings(models["vit"], images, tmp_path / "run", training={"steps": 1})
    train(chosen)
    np.savez(tmp_path / "new.npz", images=np.stack([noise(i) for i in range(4)]))
    rows = predict(chosen.output, str(tmp_path / "new.npz"), tmp_path / "out.csv")
    assert [row["images"] for row in rows] == [f"{tmp_path / 'new.npz'}, row {i}" for i in range(1, 5)]
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 5


def test_several_classes_and_numbers(models, tmp_path):
    folder = write_folder(tmp_path / "data", 24)
    files = sorted(folder.rglob("*.png"))
    for kind, label in (("multi", lambda i: [CLASSES[i % 3], "dark"][: 1 + i % 2]), ("regression", lambda i: i / 7)):
        rows = [{"image": f"{p.parent.name}/{p.name}", "label": label(i)} for i, p in enumerate(files)]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen = settings(models["resnet"], folder / f"{kind}.jsonl", tmp_path / kind, "resnet")
        summary = train(chosen)
        assert summary["metrics"]["primary"] == {"multi": "f1_micro", "regression": "pearson"}[kind]
        assert export(chosen.output)[1].relative <= 1e-5
        assert len(predict(chosen.output, str(folder / f"{kind}.jsonl"))) == 24


def test_convolutions_that_the_model_looks_into_are_refused_in_words(images, tmp_path):
    """transformers' TensorFlow padding reads `stride` of convolutions, which peft's wrappers don't have."""
    shape = {"depth_multiplier": 0.25, "min_depth": 8, "image_size": 32, "tf_padding": True}
    folder = tmp_path / "model"
    MobileNetV2Model(MobileNetV2Config(**shape)).save_pretrained(folder)
    text = json.dumps({**PROCESSORS["mobilenet"], **NORMAL, "resample": 2})
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(ConfigError, match="has no attribute 'stride'"):
        train(settings(folder, images, tmp_path / "run", "mobilenet"))
