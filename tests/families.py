"""Tiny random models of many families, made from their configs, to compare two ways of computing the same thing.

Unlike `tiny.py` these are not saved (but `routed`): no tokenizer, they take ids. Every matrix, norm weight and bias
is random, so that a lost bias or a norm that wrongly adds one to its weight would show. Dropout is 0 unless asked for.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from chat_samples import chatml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HIDDEN, LAYERS, VOCAB, CLASSES = 32, 2, 97, 3
RANK = 4
IGNORED = -100

DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GROUPED = DECODER | {"num_key_value_heads": 2, "head_dim": 8}
ENCODER = {k: v for k, v in DECODER.items() if k != "tie_word_embeddings"} | {"num_labels": CLASSES}
# every name under which a family keeps a rate of dropout
RATES = (
    "dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "embd_pdrop",
    "resid_pdrop",
)
RATES += ("attn_pdrop", "seq_classif_dropout", "embd_dropout", "activation_dropout")

# name → model's class, config's class, settings
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 4}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED | {"tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        GROUPED | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "attn_implementation": "eager"},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 4}),
    "phi": ("PhiForCausalLM", "PhiConfig", DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER | {"num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", DECODER | {"n_inner": 48, "tie_word_embeddings": True}),
    "opt": ("OPTForCausalLM", "OPTConfig", DECODER | {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "cohere": ("CohereForCausalLM", "CohereConfig", DECODER | {"num_key_value_heads": 2, "logit_scale": 0.3}),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        DECODER | {"num_key_value_heads": 2, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        GROUPED | {"num_local_experts": 4, "experts_implementation": "eager"},
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "bert_masked": ("BertForMaskedLM", "BertConfig", ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", ENCODER),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4, "num_labels": CLASSES},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", ENCODER | {"image_size": 8, "patch_size": 4}),
    "llama_classes": ("LlamaForSequenceClassification", "LlamaConfig", GROUPED | {"num_labels": CLASSES}),
}
FAMILIES = tuple(_FAMILIES)
CAUSAL = tuple(name for name, (cls, _, _) in _FAMILIES.items() if "CausalLM" in cls or "LMHead" in cls)
CLASSIFIERS = tuple(name for name, (cls, _, _) in _FAMILIES.items() if "Classification" in cls)


def make(family: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model of the family in training mode. The same arguments give the same weights in every dtype, rounding aside.

    Args:
        dropout: rate of every dropout the model itself has.
        settings: of its config, over the family's own.
    """
    model_name, config_name, own = _FAMILIES[family]
    config = getattr(tf, config_name)(**(own | settings))
    for rate in RATES:
        if hasattr(config, rate):
            setattr(config, rate, settings.get(rate, dropout))
    with torch.random.fork_rng():
        model = getattr(tf, model_name)._from_config(config)
    return randomise(model).train().to(dtype)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with numbers of its own. Norm weights and biases vary around where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(p + 0.3 * noise if p.dim() == 1 else 0.15 * noise)
    return model


def adapt(model: Any, **options: Any) -> PeftModel:
    """A LoRA adapter on all linears, without dropout, as `options` of LoraConfig have it; B is random, not zero."""
    names = {"r": RANK, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": "all-linear"} | options
    if type(model).__name__.endswith("Classification"):
        names.setdefault("task_type", "SEQ_CLS")
    if hasattr(model, "pre_classifier"):
        names.setdefault("exclude_modules", "pre_classifier")  # peft trains it whole, and can't do so over an adapter
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return shake(get_peft_model(model, LoraConfig(**names)))


def shake(model: PeftModel, seed: int = 1, only: str = "lora_") -> PeftModel:
    """Move every adapter tensor away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).mul_(0.15).to(p.dtype))
    return model


def batch_of(
    family: str, rows: int = 3, length: int = 9, seed: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Inputs with labels; texts of uneven length, padded on the right, the beginnings without labels."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(rows) % CLASSES
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator).to(dtype), "labels": classes}
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    lengths = length - torch.arange(rows) % 3
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = ids * mask
    labels = classes
    if family not in CLASSIFIERS:
        labels = ids.masked_fill(mask == 0, IGNORED)
        labels[:, :2] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass
class Step:
    """What one forward and backward gave: loss, logits, and the gradient of every trainable parameter."""

    loss: Tensor
    logits: Tensor
    grads: dict[str, Tensor | None]


def step(model: nn.Module, batch: dict[str, Tensor], call: Callable[..., Any] | None = None, **kwargs: Any) -> Step:
    """Loss, logits and gradients of one batch; the model's own `.grad` are left empty."""
    model.zero_grad(set_to_none=True)
    output = (model if call is None else call)(**batch, **kwargs)
    logits = output.logits.detach()
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return Step(output.loss.detach(), logits, grads)


def check_same(got: Step, want: Step, tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest number in it (for gradients at least 1/1000 of the largest of all:
    a key's bias has a gradient of nothing but rounding)."""
    near(got.loss, want.loss, tolerance, "loss")
    near(got.logits, want.logits, tolerance, "logits")
    assert got.grads.keys() == want.grads.keys()
    largest = max(float(g.abs().max()) for g in want.grads.values() if g is not None)
    for name, wanted in want.grads.items():
        given = got.grads[name]
        assert (given is None) == (wanted is None), f"{name}: one has no gradient"
        if given is not None and wanted is not None:
            near(given, wanted, tolerance, name, floor=largest / 1000)


def near(got: Tensor, want: Tensor, tolerance: float, what: str = "", floor: float = 0.0) -> None:
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} against {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype} against {want.dtype}"
    allowed = tolerance * max(float(want.double().abs().max()), floor)
    off = float((got.double() - want.double()).abs().max())
    assert off <= allowed, f"{what}: off by {off:.3g}, allowed {allowed:.3g}"


class InDouble(TorchFunctionMode):
    """Where a model's code asks for float32 by name (norms, softmax, losses), float64 tensors stay float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def pair(
    family: str, dtype: torch.dtype = torch.float32, model: dict[str, Any] | None = None, **lora: Any
) -> tuple[Any, Any]:
    """Two adapted models that are equal in every tensor and share none."""
    one = adapt(make(family, dtype=dtype, **(model or {})), **lora).to(dtype)
    return one, copy.deepcopy(one)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients for a while."""
    for model in models:
        model.eval()
    with torch.no_grad():
        yield
    for model in models:
        model.train()


def routed(family: str, folder: Path) -> Path:
    """A saved model with experts whose config asks for the balance loss."""
    torch.manual_seed(0)
    tokenizer = chatml(pad_token="<|endoftext|>")
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
        "output_router_logits": True, "router_aux_loss_coef": 0.5, **special,
    }  # fmt: skip
    if family == "mixtral":
        model: Any = tf.MixtralForCausalLM(tf.MixtralConfig(**shape, num_local_experts=4))
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        model = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**shape, **experts, shared_expert_intermediate_size=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
