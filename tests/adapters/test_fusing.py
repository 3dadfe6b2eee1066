"""A fused model computes what peft computes: every family, every option of LoRA that is fused, every way to run it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CAUSAL, FAMILIES, InDouble, batch_of, check_same, evaluating, make, near, pair, step
from peft import IA3Config, VeraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from peft_engine.adapters.fusing import fuse, fuses_loss, row_seeds, unfuse
from peft_engine.errors import ConfigError

SHARED, ALONE, LOSS = "lora_linear, shared input", "lora_linear", "linear_cross_entropy"
# of two layers: q, k, v and gate, up read one input, output and down projections their own; two norms each and a last
LLAMA = {SHARED: 2 * 5, ALONE: 2 * 2, "glu": 2, "rms_norm": 2 * 2 + 1, "rope": 2, LOSS: 1}
# q, k, v share; attention output, both dense layers are alone; a norm over the embeddings and two a layer
BERT = {SHARED: 2 * 3, ALONE: 2 * 3, "layer_norm": 1 + 2 * 2, "activation": 2}
COUNTS: dict[str, dict[str, int]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "mistral": LLAMA,
    "gemma": LLAMA,
    "granite": LLAMA,
    "qwen3": LLAMA | {"rms_norm": 2 * 4 + 1},  # queries and keys are normalised too
    "gemma2": LLAMA | {"rms_norm": 2 * 4 + 1},  # norms on both sides of attention and MLP
    "gemma3": LLAMA | {"rms_norm": 2 * 6 + 1},  # both
    "phi3": {ALONE: 2 * 4, "glu": 2, "rms_norm": 5, "rope": 2, LOSS: 1},  # q, k, v and gate, up are one matrix each
    "phi": {SHARED: 2 * 3, ALONE: 2 * 3, "activation": 2, "layer_norm": 2 + 1, "rope": 2, LOSS: 1},
    "gpt2": {ALONE: 2 * 4, "activation": 2, "layer_norm": 2 * 2 + 1, LOSS: 1},  # q, k, v are one Conv1D
    "opt": {SHARED: 2 * 3, ALONE: 2 * 3, "activation": 2, "layer_norm": 2 * 2 + 1, LOSS: 1},
    "cohere": {SHARED: 2 * 5, ALONE: 2 * 2, "glu": 2, LOSS: 1},  # norms of its own, pairs turned instead of halves
    "mixtral": {SHARED: 2 * 3, ALONE: 2, "rms_norm": 5, "rope": 2, LOSS: 1},
    "bert": BERT | {ALONE: 2 * 3 + 1},  # and the pooler
    "bert_masked": BERT | {ALONE: 2 * 3 + 1, "layer_norm": 6, "activation": 3},  # and the head's transform
    "roberta": BERT | {ALONE: 2 * 3 + 1, "layer_norm": 6},  # whose activation is a function here
    "distilbert": BERT,
    "vit": BERT,
    "llama_classes": {k: n for k, n in LLAMA.items() if k != LOSS},
}
SKIPPED = {  # end of the name → the reason; all others skip nothing
    "cohere": {"self_attn": "its rotary embedding is not the one that turns halves"},
    "mixtral": dict.fromkeys(("mlp.gate", "mlp.experts"), "peft's ParamWrapper has no fused form"),
}


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_fused_whole_and_computes_the_same(family: str) -> None:
    model, plain = pair(family, torch.float64)
    batch, before = batch_of(family, dtype=torch.float64), classes(model)
    report = fuse(model)
    assert report.counts() == COUNTS[family]
    reasons = {
        (end, why) for name, why in report.skipped.items() for end in SKIPPED.get(family, {}) if name.endswith(end)
    }
    assert reasons == set(SKIPPED.get(family, {}).items())
    assert len(report.skipped) == 2 * len(reasons)
    assert (report.backend, report.why) == ("torch", "auto: the model is on cpu")
    assert fuses_loss(model) == (family in CAUSAL)

    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with InDouble():
        want = step(plain, batch)
        check_same(step(model, batch), want, 1e-9)
        with evaluating(model, plain):
            near(model(**batch).logits, plain(**batch).logits, 1e-9)
            near(model(**batch).loss, plain(**batch).loss, 1e-9)
        assert fuse(model).counts() == COUNTS[family]
        check_same(step(model, batch), want, 1e-9)
        unfuse(model)
        assert classes(model) == before
        assert row_seeds(model) is None
        assert not any(name.startswith("_peft_engine") for module in model.modules() for name in module.__dict__)
        again = step(model, batch)
    assert torch.equal(again.loss, want.loss)
    assert all(g is None or torch.equal(g, want.grads[name]) for name, g in again.grads.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_single_precision(family: str) -> None:
    model, plain = pair(family)
    fuse(model)
    batch = batch_of(family)
    check_same(step(model, batch), step(plain, batch), 1e-5)
    with evaluating(model, plain):
        near(model(**batch).logits, plain(**batch).logits, 1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("how", ["model", "autocast"])
def test_half_precision_errs_no_more_than_peft(family: str, how: str) -> None:
    """Fused and plain round in different places, so each is compared with the same model in float64."""
    model, plain = pair(family)
    truth = copy.deepcopy(plain).double()
    if how == "model":  # as peft has it: a base in bfloat16, adapters in float32
        for one in (model, plain, truth):
            for name, p in one.named_parameters():
                half = p.data if "lora_" in name else p.data.bfloat16()
                p.data = half.double() if one is truth else half
    fuse(model)
    wrong: dict[str, list[float]] = {}
    for seed in range(8):
        batch = batch_of(family, seed=seed)
        batch = {k: v.bfloat16() if v.is_floating_point() and how == "model" else v for k, v in batch.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            ours, theirs = step(model, batch), step(plain, batch)
        with InDouble():
            real = step(truth, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
        for name in ("logits", *(n for n, g in real.grads.items() if g is not None)):
            got, other, want = (one.logits if name == "logits" else one.grads[name] for one in (ours, theirs, real))
            assert got.dtype == other.dtype
            for place, value in enumerate((got, other)):
                wrong.setdefault(name, [0.0, 0.0])[place] += float(
                    (value.double() - want).norm() ** 2 / want.norm() ** 2
                )
    # errors are sums of many roundings, and one early rounding moves all tensors of a batch: over 30 batches the fused
    # models' errors are 0.91 to 0.98 of peft's, the ratio of a single batch varies by 8 to 19%
    fused, unfused = (torch.tensor([pair[i] for pair in wrong.values()]).sqrt() for i in (0, 1))
    assert fused.mean() <= 1.15 * unfused.mean()
    assert (fused <= 2 * unfused).all(), [n for n, w in zip(wrong, (fused > 2 * unfused).tolist(), strict=True) if w]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("cache", [True, False])
def test_generate(family: str, cache: bool) -> None:
    model, plain = pair(family, torch.float64)
    fuse(model)
    ids = batch_of(family)["input_ids"][:, :4].clamp(min=3)
    settings = {"max_new_tokens": 10, "use_cache": cache, "do_sample": False}
    with evaluating(model, plain):
        got, want = (m.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings) for m in (model, plain))
    assert torch.equal(got, want)
    assert got.shape == (3, 14) or (got == 2).any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing_replays_the_same(family: str) -> None:
    """With dropout everywhere, in the model and in the adapters: the replay must draw the masks of the first pass."""
    model, plain = pair(family, torch.float64, {"dropout": 0.1}, lora_dropout=0.2)
    whole = copy.deepcopy(model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(family)
    fuse(model), fuse(whole)
    for seeds in (None, torch.tensor([5, -7, 2**40])):
        results = []
        for one in (model, whole):
            torch.manual_seed(3)
            holder = row_seeds(one)
            assert holder is not None
            holder.seeds = seeds
            results.append(step(one, batch))
        check_same(*results, 1e-12)
    assert not torch.equal(results[0].loss, step(plain.eval(), batch).loss)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_torch_compile(family: str) -> None:
    model, plain = pair(family, model={"num_hidden_layers": 1})
    fuse(model)
    batch = batch_of(family)
    torch._dynamo.reset()
    check_same(step(model, batch, torch.compile(model, backend="aot_eager")), step(plain, batch), 1e-5)


def test_a_copy_is_independent() -> None:
    model, plain = pair("llama", torch.float64)
    fuse(model)
    batch = batch_of("llama")
    with InDouble():
        want = step(plain, batch)
        step(model, batch)
        twin = copy.deepcopy(model)
        check_same(step(twin, batch), want, 1e-9)
        for p in model.parameters():
            p.data.zero_()
        unfuse(model)
        check_same(step(twin, batch), want, 1e-9)
    assert fuses_loss(twin)
    assert not fuses_loss(model)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_fifty_steps(family: str) -> None:
    model, plain = pair(family)
    fuse(model)
    curves: list[list[float]] = []
    for one in (model, plain):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=3e-3)
        curves.append([])
        for number in range(50):
            loss = one(**batch_of(family, rows=4, seed=number % 5)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curves[-1].append(loss.item())
    assert curves[1][-1] < 0.8 * curves[1][0]
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5, atol=0)


OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "patterns": {"rank_pattern": {r"0\..*": 7}, "alpha_pattern": {r"1\..*": 11}},
    "one_layer": {"layers_to_transform": [1]},
    "rank_1": {"r": 1},
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_lora(family: str, option: str) -> None:
    settings = dict(OPTIONS[option])
    if option == "lora_bias" and family in ("llama", "qwen2"):
        settings["target_modules"] = ["q_proj", "v_proj", "down_proj"]
    if option == "one_layer":
        settings["target_modules"] = {"gpt2": ["c_attn", "c_proj"], "bert": ["query", "dense"]}.get(
            family, ["q_proj", "up_proj"]
        )
    model, plain = pair(family, torch.float64, **settings)
    report = fuse(model)
    adapted = sum(1 for m in plain.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A"))
    assert report.counts().get(SHARED, 0) + report.counts().get(ALONE, 0) == adapted > 0
    with InDouble():
        batch = batch_of(family, dtype=torch.float64)
        check_same(step(model, batch), step(plain, batch), 1e-9)


HEADS: dict[str, dict[str, Any]] = {
    "copied": {"modules_to_save": ["lm_head"]},
    "adapted": {"target_modules": ["q_proj", "lm_head"]},
    "adapted_rslora": {"target_modules": ["k_proj", "lm_head"], "use_rslora": True},
    "adapted_dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "adapted_with_bias": {"target_modules": ["q_proj", "lm_head"], "lora_bias": True},
    "alone": {"target_modules": ["lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("how", HEADS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite"])  # two with tied embeddings
def test_trap_16_an_adapter_on_the_head_counts(how: str, family: str) -> None:
    model, plain = pair(family, torch.float64, **HEADS[how])
    report = fuse(model)
    (name,) = [
        n
        for n, m in model.named_modules()
        if n.endswith("model") and hasattr(m, "lm_head") and "loss_function" in dir(m)
    ]
    refused = how in ("adapted_dora", "adapted_with_bias")
    assert (name in report.skipped) == refused
    assert fuses_loss(model) != refused
    batch = batch_of(family)
    with InDouble():
        got, want = step(model, batch), step(plain, batch)
    check_same(got, want, 1e-9)
    of_head = [g for n, g in want.grads.items() if "lm_head" in n]
    assert all(g is not None and float(g.abs().max()) > 0 for g in of_head)
    assert bool(of_head) == (how != "embeddings")


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"use_dora": True}), ("gpt2", {}), ("bert", {"bias": "all"}), ("llama", HEADS["copied"])],
)
def test_adapter_files_are_the_same(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, plain = pair(family, **options)
    fuse(model)
    model.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert "adapter_model.safetensors" in files
    assert sorted(path.name for path in (tmp_path / "fused").iterdir()) == files
    for file in files:
        ours, theirs = ((tmp_path / kind / file).read_bytes() for kind in ("fused", "plain"))
        # sets of names are written in the order they happen to have
        same = sorted(ours) == sorted(theirs) if file == "adapter_config.json" else ours == theirs
        assert same, file


def test_lora_on_embeddings_and_convolutions_is_reported() -> None:
    model, plain = pair("llama", torch.float64, target_modules=["embed_tokens", "q_proj"])
    assert fuse(model).skipped == {"base_model.model.model.embed_tokens": "peft's Embedding has no fused form"}
    vit, bare = pair("vit", torch.float64, target_modules=["projection", "q_proj"])
    skipped = fuse(vit).skipped
    assert [why for name, why in skipped.items() if "projection" in name] == ["peft's Conv2d has no fused form"]
    with InDouble():
        for ours, theirs, family in ((model, plain, "llama"), (vit, bare, "vit")):
            batch = batch_of(family, dtype=torch.float64)
            check_same(step(ours, batch), step(theirs, batch), 1e-9)


@pytest.mark.parametrize("method", ["IA3Layer", "VeraLayer"])
def test_other_methods_keep_their_adapters(method: str) -> None:
    config: Any = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    if method == "VeraLayer":
        config = VeraConfig(r=4, target_modules=["q_proj", "o_proj"])
    torch.manual_seed(0)
    model = get_peft_model(make("llama"), config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1 if p.requires_grad else 0)
    model.double()
    plain = copy.deepcopy(model)
    report = fuse(model)
    assert report.counts() == {"glu": 2, "rms_norm": 5, "rope": 2, LOSS: 1}
    assert len(report.skipped) == (6 if method == "IA3Layer" else 4)
    assert set(report.skipped.values()) == {"peft's Linear has no fused form"}
    with InDouble():
        check_same(step(model, batch_of("llama")), step(plain, batch_of("llama")), 1e-9)


def test_a_model_without_adapters() -> None:
    model = make("llama", dtype=torch.float64)
    plain = copy.deepcopy(model)
    assert fuse(model).counts() == {"glu": 2, "rms_norm": 5, "rope": 2, LOSS: 1}
    with InDouble():
        check_same(step(model, batch_of("llama")), step(plain, batch_of("llama")), 1e-9)
    assert model.lm_head.weight.grad is None


class Dropping(nn.Module):
    """A gated MLP that drops half of its product while it trains, with a function and not with a module."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 0.5, self.training))


def test_a_module_that_does_something_else_in_training_is_left_alone() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(Dropping().double())
    model = copy.deepcopy(plain)
    fuse(model)
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.manual_seed(1)
    want = plain(x)
    torch.manual_seed(1)
    near(model(x), want, 1e-12)


def test_zero_3_is_refused() -> None:
    model, _ = pair("llama", torch.float64)
    next(p for n, p in model.named_parameters() if "lora_A" in n).ds_id = 7
    with pytest.raises(ConfigError, match="ZeRO-3"):
        fuse(model)
    assert not fuses_loss(model)
