"""What a fused layer keeps for its backward pass, counted byte by byte, and what a fused step has alive at its peak."""

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import peft_engine
from peft_engine.meters.memory import LiveBytes

B, T, D, INNER, R = 3, 7, 32, 80, 4  # samples, positions, width, inner width of the MLP, rank
HEADS, KV, HEAD = 4, 2, 8
M = B * T
Sizes = Counter[tuple[str, int]]


def adapted(model: nn.Module, p: float, task: str | None = None) -> PeftModel:
    settings = LoraConfig(
        task_type=task, r=R, lora_dropout=p, init_lora_weights=False,
        target_modules="all-linear", exclude_modules=["classifier", "pooler.dense"],
    )  # fmt: skip
    return get_peft_model(model, settings).train()


def llama(p: float, words: int = 61, layers: int = 1) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=D,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        use_cache=False,
    )
    return adapted(LlamaForCausalLM(config), p)


def bert(p: float) -> PeftModel:
    """Hidden dropout and the adapters' have one rate; attention has none: with one, torch keeps its probabilities."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=D,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=0.0,
    )
    return adapted(BertForSequenceClassification(config), p, "SEQ_CLS")


class Saved:
    """Storages that autograd was handed for backward, each once, without those of the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.found: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.found.setdefault(storage._cdata, t)  # kept alive, so that no address comes twice
        return t

    def sizes(self) -> Sizes:
        """(dtype, elements of the storage) → how many."""
        kinds = ((str(t.dtype).removeprefix("torch."), t) for t in self.found.values())
        return Counter((kind, t.untyped_storage().nbytes() // t.element_size()) for kind, t in kinds)

    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.found.values())


def llama_layer(model: PeftModel, dtype: torch.dtype = torch.float32) -> tuple[Saved, Tensor, Tensor]:
    """What one decoder layer saves, its input and its output."""
    inner: Any = model.get_base_model().model
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    rotary = inner.rotary_emb(x, torch.arange(T)[None])
    saved = Saved(model)
    with saved.hooks:
        y = inner.layers[0](x, position_embeddings=rotary, attention_mask=None)
    return saved, x, y


def bert_layer(model: PeftModel) -> tuple[Saved, Tensor, Tensor]:
    inner: Any = model.get_base_model().bert
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2)).requires_grad_()
    saved = Saved(model)
    with saved.hooks:
        y = inner.encoder.layer[0](x, None)
    return saved, x, y[0] if isinstance(y, tuple) else y


def plus(*counts: dict[tuple[str, int], int]) -> Sizes:
    total: Sizes = Counter()
    for one in counts:
        total.update(one)
    return total


def sketches(together: list[int], p: float) -> dict[tuple[str, int], int]:
    """S (M, r) of every adapter; without dropout siblings' are made by one product, in one storage."""
    if p:
        return {("float32", M * R): sum(together)}
    return plus(*({("float32", M * R * n): 1} for n in together))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_llama_layer_saves_what_it_must_and_no_more(p: float) -> None:
    model = llama(p)
    peft_engine.fuse(model)
    saved, _, _ = llama_layer(model)
    expected = plus(
        {
            ("float32", M * D): 2
        },  # the residual stream at both norms: x of the norms, and of all LoRA linears behind them
        {("float32", M): 2},  # rstd of both
        sketches([3, 1, 2, 1], p),  # q k v, o, gate up, down
        {("float32", T * HEAD): 2},  # cos and sin, shared by all layers
        {("float32", M * HEADS * HEAD): 1},  # q, rotated, as attention reads it
        {("float32", M * KV * HEAD): 2},  # k, rotated, and v
        {("float32", M * D): 1},  # attention's output, which is o's input too
        {("float32", M * HEADS): 1},  # its log of sums
        {("float32", M * INNER): 2},  # gate and up
        {("int64", B): 4} if p else {},  # seeds of q k v, of o, of gate up, of down
    )
    assert saved.sizes() == expected
    assert saved.bytes() == sum(n * count * (8 if kind == "int64" else 4) for (kind, n), count in expected.items())


def test_llama_layer_saves_the_same_with_dropout_but_for_seeds() -> None:
    found = {}
    for p in (0.0, 0.1):
        model = llama(p)
        peft_engine.fuse(model)
        found[p] = llama_layer(model)[0].bytes()
    assert found[0.1] - found[0.0] == 4 * B * 8
    plain = {p: llama_layer(llama(p))[0].bytes() for p in (0.0, 0.1)}
    assert found[0.1] < 0.4 * plain[0.1]
    assert found[0.0] < 0.65 * plain[0.0]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_llama_layer_in_bf16_saves_half(p: float) -> None:
    """Every tensor in bf16, statistics in fp32, and no wider copy of anything. Adapters too are bf16 here."""
    model = llama(p).to(torch.bfloat16)
    peft_engine.fuse(model)
    saved, _, _ = llama_layer(model, torch.bfloat16)
    wide = Counter({n: c for (kind, n), c in saved.sizes().items() if kind == "float32"})
    assert wide == Counter({M: 2, M * HEADS: 1})
    assert {kind for kind, _ in saved.sizes()} == {"bfloat16", "float32"} | ({"int64"} if p else set())
    full = llama(p)
    peft_engine.fuse(full)
    assert saved.bytes() == (llama_layer(full)[0].bytes() + 4 * (2 * M + M * HEADS) + (8 * 4 * B if p else 0)) / 2


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bert_layer_saves_what_it_must_and_no_more(p: float) -> None:
    model = bert(p)
    peft_engine.fuse(model)
    saved, _, _ = bert_layer(model)
    expected = plus(
        {("float32", M * D): 1},  # the layer's input, read by query, key and value
        {("float32", M * D): 3},  # query, key and value as attention reads them
        {("float32", M * D): 1},  # attention's output, which is the input of the linear behind it
        {("float32", M * HEADS): 1},  # its log of sums
        {("float32", M * D): 2},  # x of both LayerNorms; y of the first, the MLP's input, is made again
        {("float32", M): 4},  # their means and rstds
        {("float32", M * INNER): 1},  # x of GELU; its y, the input of the last linear, is made again
        sketches([3, 1, 1, 1], p),
        {("int64", B): 4 + 2}
        if p
        else {},  # of query key value and of three linears; of two dropouts, which keep no mask
    )
    assert saved.sizes() == expected
    unfused = bert_layer(bert(p))[0].bytes()
    assert saved.bytes() < (0.45 if p else 0.8) * unfused


@pytest.mark.parametrize("layer", [llama_layer, bert_layer])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_backward_from_what_was_saved(layer: Any, p: float) -> None:
    """What is made again is what was: with p = 0 gradients equal the unfused layer's, with masks they repeat."""
    make = llama if layer is llama_layer else bert
    found = []
    for fused in (True, True) if p else (True, False):
        model = make(p)
        if fused:
            peft_engine.fuse(model)
        torch.manual_seed(4)
        _, x, y = layer(model)
        y.square().sum().backward()
        found.append([x.grad, *(q.grad for q in model.parameters() if q.grad is not None)])
    assert len(found[0]) == len(found[1]) > 12
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if p else 1e-4, atol=0 if p else 1e-5)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_checkpointed_layers_save_their_inputs_only(p: float) -> None:
    model = llama(p, layers=3)
    peft_engine.fuse(model)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    ids = torch.randint(0, 61, (B, T))
    saved = Saved(model)
    with saved.hooks:
        model(input_ids=ids, labels=ids)
    big = Counter({n: c for (_, n), c in saved.sizes().items() if n >= (M - B) * D})
    # three layers' inputs and the last norm's; the gradient of its y, which the loss makes for rows with a label
    assert big == Counter({M * D: 3 + 1, (M - B) * D: 1})


# --- a whole step

WORDS, ROWS, LENGTH = 3000, 4, 160


class Largest(TorchDispatchMode):
    """Elements of the largest storage that an operator returned, parameters aside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.elements, self.op = 0, ""
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.parameters:
                size = t.untyped_storage().nbytes() // t.element_size()
                if size > self.elements:
                    self.elements, self.op = size, str(func)
        return out


def step(model: PeftModel, supervised: int = LENGTH) -> None:
    ids = torch.randint(0, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(LENGTH) < LENGTH - supervised, -100)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()


def peak(model: PeftModel) -> int:
    """Bytes beyond the model's own."""
    meter = LiveBytes(model.parameters())
    before = meter.now
    with meter:
        step(model)
    return meter.peak - before


def test_peak_of_a_step_with_a_large_vocabulary() -> None:
    fused, plain = llama(0.1, WORDS, 2), llama(0.1, WORDS, 2)
    peft_engine.fuse(fused)
    a, b = peak(fused), peak(plain)
    assert a < 0.6 * b, (a, b)
    assert b > 2 * ROWS * LENGTH * WORDS * 4  # logits are what there is to save


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_tensor_as_large_as_the_logits(p: float) -> None:
    """The loss works in chunks of rows."""
    sizes = {}
    for fused in (True, False):
        model = llama(p, WORDS, 2)
        if fused:
            peft_engine.fuse(model)
        with Largest(model) as largest:
            step(model)
        sizes[fused] = largest.elements
    assert sizes[False] == ROWS * LENGTH * WORDS
    assert sizes[True] < 0.5 * sizes[False], largest.op


def test_rows_without_a_label_cost_no_logits() -> None:
    model = llama(0.0, WORDS, 2)
    peft_engine.fuse(model)
    with Largest(model) as largest:
        step(model, supervised=20)
    assert largest.elements <= ROWS * 20 * WORDS, largest.op
