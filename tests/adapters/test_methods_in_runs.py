"""Methods other than LoRA in whole runs: trained, evaluated, exported and merged as LoRA is, or refused clearly."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from adapted import (
    OPTIONS,
    RANK,
    SPEC,
    TOKENS,
    backbone_of,
    batch_of,
    forward,
    group_of,
    logits_of,
    loss_of,
    settings_of,
    train,
)
from tiny import assemble, class_rows, config, pair_rows, write_rows
from tiny import logits_of as task_logits

from peft_engine import run as runs
from peft_engine.adapters.bottleneck import find_layers
from peft_engine.adapters.files import load_adapter, save_adapter
from peft_engine.adapters.fusing import fuse
from peft_engine.adapters.group import MemberSpec
from peft_engine.adapters.methods import adapt
from peft_engine.backbone import Backbone
from peft_engine.config import Config
from peft_engine.config_methods import BOTTLENECK, SETTINGS, WHOLE_TENSORS, names, peft_type
from peft_engine.config_reading import load_config, to_yaml
from peft_engine.errors import ConfigError
from peft_engine.exporting import _merge
from peft_engine.using import evaluate, export, generate

LM, CLASSES = "causal-lm", "text-classification"


def run_config(method: str, task: str, model: Path, folder: Path, **training: Any) -> Config:
    rows = write_rows(folder / "rows.jsonl", pair_rows(12) if task == LM else class_rows(12))
    adapter: dict[str, Any] = {"method": method}
    adapter |= {"options": {"num_virtual_tokens": TOKENS}} if method in ("prompt", "prefix", "p-tuning") else {}
    adapter |= {"options": OPTIONS[method]} if method in OPTIONS else {}
    given = {"steps": 3, "batch_size": 4, "warmup": 0.0, "learning_rate": 1e-2} | training
    return config(
        task, model, rows, folder / "out", adapter=adapter, training=given,
        data={"split": {"eval": 0.0, "test": 0.0}},
        evaluation={"generate_rows": 2, "max_new_tokens": 3} if task == LM else {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "task", "family", "merges"),
    [
        ("ia3", LM, "llama", True),
        ("oft", CLASSES, "bert", True),
        ("layernorm", LM, "gpt2", True),
        ("prompt", LM, "llama", False),
        ("prompt", CLASSES, "bert", False),
        ("prefix", LM, "gpt2", False),
        ("p-tuning", LM, "llama", False),
        ("trainable-tokens", LM, "qwen2", True),
        ("houlsby", LM, "gpt2", False),
        ("parallel", CLASSES, "bert", False),
    ],
)
def test_a_whole_run(
    method: str, task: str, family: str, merges: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    summary = runs.train(run_config(method, task, tiny_model(family), tmp_path))
    out = tmp_path / "out"
    again = evaluate(out, "train")["metrics"]
    assert again["loss"] == pytest.approx(summary["metrics"]["after"]["loss"], rel=1e-5)
    if task == LM:
        assert isinstance(generate(out, "a b", max_new_tokens=2), str)
    if peft_type(method):
        assert export(out)[1].relative < 1e-4
    else:
        with pytest.raises(ConfigError, match=r"holds no peft adapter[\s\S]*use it through peft-engine"):
            export(out)
    if merges:
        assert export(out, merged=True)[1].relative < 1e-4
    else:
        advice = "load the adapter with peft" if peft_type(method) else "use it through peft-engine"
        with pytest.raises(ConfigError, match=rf"can't be folded into the weights[\s\S]*{advice}"):
            export(out, merged=True)


@pytest.mark.parametrize(
    "method", ["ia3", "prompt", "prefix", "layernorm", "loha", "trainable-tokens", "parallel", "vera"]
)
def test_fusing_changes_nothing(method: str) -> None:
    """What is not LoRA stays as it is, and is listed; the rest of the model is fused round it."""
    plain = group_of(method, "llama")
    train(plain, "llama", steps=2)
    fused = copy.deepcopy(plain)
    report = fuse(fused.model, "torch")
    fused.train()
    plain.train()
    assert report.swapped
    one, two = loss_of(plain.model, "llama"), loss_of(fused.model, "llama")
    assert torch.allclose(one, two, rtol=1e-5)
    wanted = torch.autograd.grad(one, list(plain.members[0].tensors.values()))
    tensors = [p for p in fused.model.parameters() if p.requires_grad]
    for a, b in zip(wanted, torch.autograd.grad(two, tensors), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_what_is_not_lora_is_listed_as_left_alone() -> None:
    report = fuse(group_of("loha", "llama").model, "torch")
    assert report.skipped["base_model.model.model.layers.0.self_attn.q_proj"] == "peft's Linear has no fused form"


@pytest.mark.parametrize("method", ["houlsby", "parallel", "prompt", "oft"])
def test_gradient_checkpointing_changes_nothing(method: str) -> None:
    group = group_of(method, "llama")
    train(group, "llama", steps=2)
    tensors = list(group.members[0].tensors.values())
    group.train()
    wanted = torch.autograd.grad(loss_of(group.model, "llama"), tensors)
    group.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = torch.autograd.grad(loss_of(group.model, "llama"), tensors)
    assert group.backbone.model.is_gradient_checkpointing
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(wanted, found, strict=True))


ALONE = {
    "adalora": "AdaLoraModel supports only 1 trainable adapter",
    "lily": "peft gives a second adapter of lily other tensors than the first",
    "shadow": "a loss of its own",
    "xlora": "`use_cache` must be False",
    **dict.fromkeys((*WHOLE_TENSORS, *BOTTLENECK), "so it holds one member, got 2"),
}


@pytest.mark.parametrize("method", [name for name in names() if name not in ("multitask-prompt", "poly")])
def test_members_over_one_backbone(method: str) -> None:
    """Two members train as each would alone, or the second is refused."""
    specs = [MemberSpec("one", 0, 1e-2), MemberSpec("two", 1, 1e-2)]
    if method in ALONE:
        with pytest.raises(ConfigError) as caught:
            adapt(backbone_of("llama"), settings_of(method), specs)
        assert ALONE[method] in str(caught.value)
        return
    group = adapt(backbone_of("llama"), settings_of(method), specs)
    tensors = [{id(t) for t in member.tensors.values()} for member in group.members]
    assert not tensors[0] & tensors[1]
    for member in group.members:
        alone = adapt(backbone_of("llama"), settings_of(method), [member.spec])
        group.activate(member)
        own = alone.members[0].tensors
        assert own.keys() == member.tensors.keys()
        with torch.no_grad():
            for name, tensor in member.tensors.items():
                tensor.add_(0.01)
                own[name].copy_(tensor)
        assert torch.equal(logits_of(group.model, "llama"), logits_of(alone.model, "llama"))


@pytest.mark.parametrize("method", names())
def test_resolved_settings_of_every_method_are_read_again(method: str) -> None:
    settings = settings_of(method)
    assert load_config(to_yaml_file(settings)) == settings


def to_yaml_file(settings: Config) -> dict[str, Any]:
    import yaml

    tree: dict[str, Any] = yaml.safe_load(to_yaml(settings))
    assert set(tree["adapter"]) - {"method", "start_from", "options"} <= set(SETTINGS[settings.adapter.method])
    return tree


def test_experts_of_a_mixture(tmp_path: Path) -> None:
    options = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    group = group_of("lora", "moe", targets=["q_proj"], options=options)
    member = group.members[0]
    experts = 4 * RANK * ((32 + 96) + (48 + 32))  # four of them: fused gate and up, 32 → 96, and down, 48 → 32
    assert sum(t.numel() for t in member.tensors.values()) == 2 * (experts + RANK * (32 + 32))
    plain = logits_of(backbone_of("moe").model, "moe")
    assert torch.allclose(logits_of(group.model, "moe"), plain, atol=1e-6)
    report = fuse(group.model, "torch")
    assert "peft's ParamWrapper has no fused form" in set(report.skipped.values())
    losses = train(group, "moe")
    assert losses[-1] < losses[0]
    save_adapter(group, member, tmp_path)
    settings = settings_of("lora", targets=["q_proj"], options=options)
    again = load_adapter(backbone_of("moe"), settings, tmp_path)
    assert all(torch.equal(t, member.tensors[name]) for name, t in again.members[0].tensors.items())
    wanted = logits_of(group.model, "moe")
    assert torch.allclose(logits_of(again.model, "moe"), wanted, atol=1e-5)
    merged: Any = again.model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    assert torch.allclose(logits_of(merged, "moe"), wanted, atol=1e-5)


def test_parameters_that_match_nothing() -> None:
    with pytest.raises(ConfigError, match=r"'experts.gate_prj' matches no parameter"):
        group_of("lora", "moe", options={"target_parameters": ["experts.gate_prj"]})


@pytest.mark.parametrize("method", ["lora", "ia3", "oft", "layernorm", "pfeiffer", "beft"])
@pytest.mark.parametrize(("layers", "there"), [({"last": 1}, 1), ({"first": 1}, 0), ([1], 1)])
def test_layers_of_every_method(method: str, layers: Any, there: int) -> None:
    found = group_of(method, "llama", layers=layers).members[0].tensors
    assert any(f".layers.{there}." in name for name in found)
    assert not any(f".layers.{1 - there}." in name for name in found)


def test_convolutions_stand_in_for_linears_and_it_is_said() -> None:
    group = group_of("lora", "resnet")
    assert group.decisions()["adapter.targets"] == "all-linear found none, so 6 convolutions are adapted"
    assert "adapter.targets" not in group_of("lora", "vit").decisions()


def test_more_layers_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"adapter.layers: last: 3, but targets are in 2 layers only"):
        group_of("lora", "llama", layers={"last": 3})


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit", "swin"])
def test_bottleneck_adapters_are_what_the_papers_say(method: str, family: str) -> None:
    """Against hooks on a plain model: y + up(act(down(y))) behind a block, scale · up(act(down(x))) beside the MLP."""
    group = group_of(method, family)
    train(group, family, steps=2)
    for tensor in group.members[0].tensors.values():
        tensor.data += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    plain = backbone_of(family).model
    plain.load_state_dict({n: t for n, t in group.model.state_dict().items() if ".bottleneck." not in n})
    inputs: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        part = {k.split("bottleneck.")[1]: t for k, t in group.members[0].tensors.items() if k.startswith(f"{name}.b")}
        hidden = x @ part["down.weight"].T + part["down.bias"]
        hidden = torch.nn.functional.gelu(hidden) if method == "houlsby" else hidden.relu()
        scale = 32 / RANK if method == "parallel" else 1.0
        return y + scale * (hidden @ part["up.weight"].T + part["up.bias"])

    def behind(name: str) -> Any:
        return lambda module, args, y: add(name, y, y)

    def beside(first: str, name: str) -> Any:
        plain.get_submodule(first).register_forward_hook(lambda module, args, y: inputs.update({name: args[0]}))
        return lambda module, args, y: add(name, inputs[name], y)

    for layer in find_layers(backbone_of(family)):
        end = layer.mlp[-1]
        hook = beside(layer.mlp[0], end) if method == "parallel" else behind(end)
        plain.get_submodule(end).register_forward_hook(hook)
        for name in layer.attention if method == "houlsby" else []:
            plain.get_submodule(name).register_forward_hook(behind(name))
    assert torch.allclose(logits_of(group.model, family), logits_of(plain, family), atol=1e-5)


def test_every_block_of_every_stage_has_its_bottlenecks() -> None:
    blocks = ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]
    found = find_layers(backbone_of("swin"))
    assert [(layer.attention, layer.mlp[0], layer.mlp[-1], layer.width) for layer in found] == [
        ([f"{name}.attention.o_proj"], f"{name}.mlp.fc1", f"{name}.mlp.fc2", width)
        for name, width in zip((f"swin.encoder.{block}" for block in blocks), (16, 32, 32), strict=True)
    ]
    tensors = group_of("houlsby", "swin").members[0].tensors
    assert {n.split(".bottleneck")[0] for n in tensors if "bottleneck" in n} == {
        f"swin.encoder.{block}.{place}" for block in blocks for place in ("attention.o_proj", "mlp.fc2")
    }


SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
STAGES: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
MOE = {"num_experts": 4, "moe_intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8}
SWITCH = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "num_experts": 2}
PYRAMID = {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1}
PROPHET = {"vocab_size": 50, "hidden_size": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
PROPHET |= {"num_encoder_layers": 2, "num_decoder_layers": 2}
PROPHET |= {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
PYRAMID |= {"query_stride": [2, 2], "patch_stride": [4, 4], "masked_unit_size": [4, 4]}


@pytest.mark.parametrize(
    ("kind", "settings", "count"),
    [
        ("Swinv2", STAGES | {"window_size": 4}, 3),
        ("DeiT", {"hidden_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}, 12),
        ("Albert", SMALL | {"embedding_size": 16, "num_hidden_groups": 2, "num_hidden_layers": 4}, 2),
        ("ConvNext", {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2}, 0),  # no attention
        ("Hiera", PYRAMID, 0),  # a projection behind the MLP of some blocks
        ("Qwen3Moe", SMALL | MOE | {"mlp_only_layers": [0], "num_hidden_layers": 2}, 0),  # experts in some layers
        ("SwitchTransformers", SWITCH, 0),  # a list of experts
        ("ProphetNet", PROPHET, 0),  # a decoder whose layers read otherwise than its encoder's
    ],
)
def test_layers_are_found_all_or_refused(kind: str, settings: dict[str, Any], count: int) -> None:
    model: Any = getattr(tf, f"{kind}Model")(getattr(tf, f"{kind}Config")(**settings))
    if count:
        assert len({layer.mlp[-1] for layer in find_layers(Backbone(model))}) == count
        return
    with pytest.raises(ConfigError, match=f"{kind}Model has no layers of attention and MLP"):
        find_layers(Backbone(model))


MERGES = ("lora", "layernorm", "ia3", "loha", "lokr", "adalora", "hira", "hra")


@pytest.mark.parametrize("family", ["bert", "resnet"])
@pytest.mark.parametrize("method", MERGES)
def test_a_new_head_is_merged_into_its_place(method: str, family: str) -> None:
    """Nothing of peft stays round the trained head; resnet's is a Sequential."""
    group = group_of(method, family)
    train(group, family, steps=2)
    wanted = logits_of(group.model, family)
    merged = _merge(group.model)  # type: ignore[arg-type]
    assert torch.allclose(logits_of(merged, family), wanted, atol=1e-4)
    plain = backbone_of(family).model
    assert merged.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(logits_of(plain, family), logits_of(merged, family))


def test_bottleneck_settings_must_be_those_of_the_file(tmp_path: Path) -> None:
    group = group_of("pfeiffer", "llama")
    save_adapter(group, group.members[0], tmp_path)
    with pytest.raises(ConfigError, match="was trained with activation relu, the config has tanh"):
        load_adapter(backbone_of("llama"), settings_of("pfeiffer", options={"activation": "tanh"}), tmp_path)


def test_hooks_of_others_survive_a_bottleneck() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        seen = 0

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            return args, kwargs

    backbone, counts = backbone_of("llama"), Counts()
    add_hook_to_module(backbone.model.get_submodule("model.layers.0.mlp.down_proj"), counts)
    group = adapt(backbone, settings_of("pfeiffer"), [SPEC])
    with torch.no_grad():
        forward(group.model, batch_of("llama"))
    assert counts.seen == 1


def test_virtual_tokens_take_positions(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    settings = run_config("prompt", LM, tiny_model("llama"), tmp_path)
    options = {"num_virtual_tokens": 120}
    adapter = settings.adapter.model_copy(update={"options": options})
    with pytest.raises(ConfigError, match="positions beside the adapter's 120"):
        assemble(settings.model_copy(update={"adapter": adapter}))


def test_a_prompt_is_trained_in_the_loop_as_by_peft_alone(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Micro-batches, fused loss and all: the same steps as a plain loop over peft's own forward."""
    settings = run_config("prompt", LM, tiny_model("llama"), tmp_path, micro_batch_size=3, max_grad_norm=None)
    live = assemble(settings)
    plain = assemble(settings.model_copy(update={"kernels": "off"}))
    live.train(3)
    tensors = list(plain.group.members[0].tensors.values())
    optimizer = torch.optim.AdamW(tensors, lr=1e-2, weight_decay=0.0)
    from peft_engine.training.optim import make_schedule

    factor = make_schedule("cosine", 0.0, 3)
    plain.group.train()
    for step in range(1, 4):
        batch = plain.task.collate(plain.data["train"], plain.trainees[0].plan.rows(step))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        plain.group.model(**inputs).loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * factor(step)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in live.group.members[0].tensors.items():
        assert torch.allclose(tensor, plain.group.members[0].tensors[name], atol=1e-5), name
    wanted = task_logits(plain.group, plain.task, plain.data["train"])
    assert torch.allclose(task_logits(live.group, live.task, live.data["train"]), wanted, atol=1e-4)
