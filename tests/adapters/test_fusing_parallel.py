"""Fused models under DDP, FSDP2, Accelerate's hooks and ZeRO-3's marks: equal to one plain process, or refused.

What needs two processes runs in two, over gloo. Each runs this file under another name, since pytest's name for it is
not importable there; they are forked from the server of processes.py, which has the libraries loaded.
"""

import faulthandler
import multiprocessing
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import processes  # noqa: F401  # what the server loads
import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import peft_engine
from peft_engine.adapters.fusing import row_seeds
from peft_engine.errors import ConfigError

ROW, WORDS, ROWS, RANKS, LIMIT = "a rank of test_fusing_parallel", 61, 4, 2, 60
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
SHAPE = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ATTENTION = "base_model.model.model.layers.0.self_attn"


def llama(p: float = 0.0, save: list[str] | None = None, **settings: Any) -> PeftModel:
    """The same in every process. `save`: what trains in full beside the adapters."""
    torch.manual_seed(0)
    shape = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.1))
    torch.manual_seed(1)
    settings = {"target_modules": "all-linear", "modules_to_save": save, **settings}
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=p, init_lora_weights=False, **settings)
    ).train()


def batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    ids = torch.randint(0, WORDS, (ROWS, 9), generator=torch.Generator().manual_seed(7))
    labels = ids.clone()
    labels[:, :3] = -100  # as many everywhere, so that a mean of means is the mean
    return {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": labels[rows]}


def mine(rank: int) -> slice:
    return slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def mean(mine: Tensor) -> Tensor:
    dist.all_reduce(mine)
    return mine / RANKS


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, without what wrappers put before it."""
    return {n.removeprefix("module."): whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}


def trained(model: nn.Module, steps: int, rows: slice = slice(None)) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps, and what was trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(**batch(rows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, {n: whole(p).detach() for n, p in model.named_parameters() if p.requires_grad}


# --- what a rank does


def ddp(rank: int, settings: dict[str, Any], checkpointing: bool) -> None:
    single, model = llama(), llama()
    single(**batch()).loss.backward()
    peft_engine.fuse(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    wrapped = DistributedDataParallel(model, **settings)
    for _ in range(2):  # static_graph learns the graph in the first call
        model.zero_grad()
        out = wrapped(**batch(mine(rank)))
        out.loss.backward()
        assert_close(gradients(wrapped), gradients(single), **CLOSE)
    with torch.no_grad():
        wanted = single(**batch(mine(rank)))
    assert_close(out.logits, wanted.logits, **CLOSE)  # made now, from outputs that DDP may have taken apart
    assert_close(out["loss"], wanted.loss, **CLOSE)


def ddp_dropout(rank: int) -> None:
    """A sample's masks are its own: ranks together draw what one process draws."""
    seeds = torch.tensor([3, -9, 2**60, 4])
    single, model = llama(p=0.3), llama(p=0.3)
    for one, rows in ((single, slice(None)), (model, mine(rank))):
        peft_engine.fuse(one)
        holder = row_seeds(one)
        assert holder is not None
        holder.seeds = seeds[rows]
    single(**batch()).loss.backward()
    wrapped = DistributedDataParallel(model)
    wrapped(**batch(mine(rank))).loss.backward()
    assert_close(gradients(wrapped), gradients(single), **CLOSE)


def ddp_unused(rank: int) -> None:
    """A pair that one call leaves out: DDP's search of the graph sees through the fused functions."""
    model = llama()
    peft_engine.fuse(model)
    layer = model.get_submodule(f"{ATTENTION}.q_proj")
    layer.enable_adapters(False)
    layer.lora_A.requires_grad_(True)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        model.zero_grad()
        wrapped(**batch(mine(rank))).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, g in found.items() if g is None or not g.any()] == [f"{ATTENTION}.q_proj.lora_A.default.weight"]


def fsdp(rank: int, order: str, save: list[str], checkpointing: bool) -> None:
    single, model = llama(save=save), llama(save=save)
    if order == "fused first":
        peft_engine.fuse(model)
    shard(model, model.base_model.model.model.layers)
    if order == "sharded first":
        report = peft_engine.fuse(model)
        assert report.counts()["lora_linear, shared input"] == 10
        assert report.counts()["linear_cross_entropy"] == 1
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert isinstance(model.base_model.model.model.layers[0], FSDPModule)
    losses, weights = trained(model, 3, mine(rank))
    wanted, expected = trained(single, 3)
    assert_close(mean(torch.tensor(losses)), torch.tensor(wanted), **CLOSE)
    assert_close(weights, expected, rtol=1e-3, atol=1e-5)  # Adam turns a small gradient's rounding into more
    model.eval(), single.eval()
    with torch.no_grad():
        assert_close(model(**batch()).logits, single(**batch()).logits, rtol=1e-3, atol=1e-4)


def shard(model: nn.Module, parts: Any, **settings: Any) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in parts:
        fully_shard(part, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)


PARTS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "frozen linears": lambda m: [x.get_base_layer() for x in m.modules() if isinstance(x, PeftLinear)],
    "lora layers": lambda m: [x for x in m.modules() if isinstance(x, PeftLinear)],
    "pairs": lambda m: [
        y for x in m.modules() if isinstance(x, PeftLinear) for y in (x.lora_A["default"], x.lora_B["default"])
    ],
    "norms": lambda m: [x for n, x in m.named_modules() if n.endswith("norm")],
    "attention and mlp": lambda m: [x for n, x in m.named_modules() if n.endswith(("self_attn", "mlp"))],
    "head": lambda m: [m.get_output_embeddings()],
    "causal model": lambda m: [m.get_base_model()],
}


def fsdp_parts(rank: int, order: str, which: str) -> None:
    """Shards smaller than a layer: weights are whole only while their own module runs."""
    single, model = llama(), llama()
    if order == "fused first":
        peft_engine.fuse(model)
    shard(model, PARTS[which](model))
    if order == "sharded first":
        report = peft_engine.fuse(model)
        if which in ("frozen linears", "pairs"):
            assert f"{ATTENTION}.k_proj" in report.skipped
        assert ("base_model.model" in report.skipped) == (which == "head")
    single(**batch()).loss.backward()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = model(**batch(mine(rank)))
        if which not in ("head", "causal model"):  # FSDP read all of the outputs, and made no logits by that
            assert dict(out.items())["logits"].numel() == 0
            assert_close(out.logits, single(**batch(mine(rank))).logits, **CLOSE)
        out.loss.backward()
    assert_close(mean(out.loss.detach().clone()), single(**batch()).loss.detach(), **CLOSE)
    assert_close(gradients(model), gradients(single), **CLOSE)
    fell_back = any("got hooks after it was fused" in str(w.message) for w in said)
    assert fell_back == (order == "fused first" and which in ("frozen linears", "pairs"))


def fsdp_bf16(rank: int) -> None:
    """Mixed precision of FSDP's own: weights and inputs cast at each layer, gradients reduced in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    truth = llama()
    truth(**batch()).loss.backward()
    wanted = gradients(truth)
    off = {}
    for fused in (False, True):
        model = llama()
        if fused:
            peft_engine.fuse(model)
        shard(model, model.base_model.model.model.layers, mp_policy=policy)
        model(**batch(mine(rank))).loss.backward()
        got = gradients(model)
        off[fused] = sum((got[n] - wanted[n]).square().sum().item() for n in wanted) ** 0.5
    assert 0 < off[True] <= 1.2 * off[False], off


def fail(rank: int) -> None:
    raise LookupError("no such part")


# --- two processes


def in_ranks(folder: Path, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(rank, *arguments)` in two processes that form a group; a failure in one is one here."""
    context = multiprocessing.get_context("forkserver")
    given = {"CASE": (function.__name__, arguments), "FOLDER": str(folder)}
    ranks = [
        context.Process(target=runpy.run_path, args=(__file__, {**given, "RANK": rank}, ROW)) for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    said = "\n".join(path.read_text() for path in sorted(folder.glob("rank*.txt")))
    codes = [rank.exitcode for rank in ranks]
    assert codes == [0] * RANKS, f"exit codes {codes}\n{said}"


def main(rank: int, name: str, arguments: tuple[Any, ...], folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    said = (folder / f"rank{rank}.txt").open("w")
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=said)  # where it waits in vain
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    try:
        globals()[name](rank, *arguments)
    except BaseException:
        said.write(f"rank {rank}:\n{traceback.format_exc()}")
        said.close()
        os._exit(1)  # the other one may wait for this one; it is not to wait for the group to end
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


if __name__ == ROW:
    main(RANK, *CASE, Path(FOLDER))  # type: ignore[name-defined]  # noqa: F821
    sys.exit()


DDP: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"find_unused_parameters": True}, True),
    ({"static_graph": True}, True),
    ({"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}, False),
]


@pytest.mark.parametrize(("settings", "checkpointing"), DDP, ids=str)
def test_ddp_gradients_are_those_of_the_joined_batch(
    settings: dict[str, Any], checkpointing: bool, tmp_path: Path
) -> None:
    in_ranks(tmp_path, ddp, settings, checkpointing)


@pytest.mark.parametrize("case", [ddp_dropout, ddp_unused, fsdp_bf16], ids=lambda f: f.__name__)
def test_other_ways_to_be_two(case: Callable[..., None], tmp_path: Path) -> None:
    in_ranks(tmp_path, case)


@pytest.mark.parametrize("order", ["fused first", "sharded first"])
@pytest.mark.parametrize(("save", "checkpointing"), [([], True), (["lm_head"], False)], ids=str)
def test_fsdp2_trains_as_one_process(order: str, save: list[str], checkpointing: bool, tmp_path: Path) -> None:
    in_ranks(tmp_path, fsdp, order, save, checkpointing)


@pytest.mark.parametrize("order", ["fused first", pytest.param("sharded first", marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", list(PARTS))
def test_fsdp2_on_small_parts_is_never_wrong(order: str, which: str, tmp_path: Path) -> None:
    in_ranks(tmp_path, fsdp_parts, order, which)


def test_a_failure_in_a_rank_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such part"):
        in_ranks(tmp_path, fail)


# --- Accelerate's hooks and ZeRO-3, in this process


class Counting(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("order", ["fused first", "hooked first"])
def test_accelerate_hook_on_a_lora_layer(order: str) -> None:
    """It stays where it is. Put there before fusing, it holds the layer's own forward, so that the layer is skipped."""
    model, plain, hook, name = llama(), llama(), Counting(), f"{ATTENTION}.k_proj"
    report = peft_engine.fuse(model) if order == "fused first" else None
    add_hook_to_module(model.get_submodule(name), hook)
    if report is None:
        report = peft_engine.fuse(model)
        assert "replaced" in report.skipped[name]
    for one in (model, plain):
        one(**batch()).loss.backward()
    assert hook.calls == 1
    assert_close(gradients(model), gradients(plain), **CLOSE)
    peft_engine.unfuse(model)
    assert_close(model(**batch()).loss, plain(**batch()).loss, rtol=0, atol=0)
    assert hook.calls == 2
    remove_hook_from_module(model.get_submodule(name))
    assert_close(model(**batch()).loss, plain(**batch()).loss, rtol=0, atol=0)
    assert hook.calls == 2


@pytest.mark.parametrize("child", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
@pytest.mark.parametrize("order", ["fused first", "hooked first"])
def test_accelerate_hook_on_a_part_of_a_lora_layer(order: str, child: str) -> None:
    model, plain, hook, name = llama(), llama(), Counting(), f"{ATTENTION}.k_proj"
    report = peft_engine.fuse(model) if order == "fused first" else None
    add_hook_to_module(model.get_submodule(f"{name}.{child}"), hook)
    if report is None:
        report = peft_engine.fuse(model)
        assert report.skipped == {name: "hooks stand on its parts"}
        found = model(**batch())
    else:
        with pytest.warns(UserWarning, match=r"k_proj got hooks after it was fused"):
            found = model(**batch())
    found.loss.backward()
    plain(**batch()).loss.backward()
    assert hook.calls == 1
    assert_close(gradients(model), gradients(plain), **CLOSE)


def test_hooks_on_one_sibling_that_change_its_input() -> None:
    """q, k and v share an input as long as all get it as it is."""
    model, plain = llama(), llama()
    peft_engine.fuse(model)
    for one in (model, plain):
        one.get_submodule(f"{ATTENTION}.k_proj").register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        one.get_submodule(f"{ATTENTION}.v_proj").register_forward_hook(lambda m, args, y: y + 1)
        one(**batch()).loss.backward()
    assert_close(gradients(model), gradients(plain), **CLOSE)


@pytest.mark.filterwarnings("ignore:.*got hooks after it was fused")
@pytest.mark.parametrize("order", ["fused first", "dispatched first"])
def test_offloaded_layers_predict_the_same(order: str, tmp_path: Path) -> None:
    """Accelerate keeps their weights on disk and on `meta`, and loads each module's own when it is called."""
    model, plain = llama().eval(), llama().eval()
    if order == "fused first":
        peft_engine.fuse(model)
    places = {n: "cpu" for n, m in model.named_modules() if not list(m.children()) and list(m.parameters())}
    places |= {n: "disk" for n in places if "layers.1" in n}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    if order != "fused first":
        peft_engine.fuse(model)
    assert any(p.device.type == "meta" for p in model.parameters())
    with torch.no_grad():
        assert_close(model(**batch()).logits, plain(**batch()).logits, **CLOSE)


def test_offload_hooks_on_whole_lora_layers() -> None:
    """The weights of each layer are there only while that layer runs: siblings can't be computed by the first."""
    model, plain = llama().eval(), llama().eval()
    peft_engine.fuse(model)
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = model.get_submodule(f"{ATTENTION}.{name}")
        weights = {n: t.detach().clone() for n, t in layer.state_dict().items()}
        add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=True))
        assert layer.get_base_layer().weight.device.type == "meta"
    with torch.no_grad():
        assert_close(model(**batch()).logits, plain(**batch()).logits, **CLOSE)


def test_zero3_is_refused() -> None:
    """DeepSpeed marks the parameters that it partitions, and gathers them in hooks on the modules they belong to."""
    model = llama()
    kinds = [type(m) for m in model.modules()]
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    with pytest.raises(ConfigError, match="ZeRO-3"):
        peft_engine.fuse(model)
    assert [type(m) for m in model.modules()] == kinds  # nothing half done


def test_zero3_is_refused_without_a_lora_layer() -> None:
    """Norms and the head are bypassed as well."""
    model = llama().unload()
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ConfigError, match="ZeRO-3"):
        peft_engine.fuse(model)
