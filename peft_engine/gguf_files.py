"""GGUF files for llama.cpp, written and read by the `gguf` package: a merged model of the llama family, a LoRA adapter.

Both are read again: the model by transformers' own GGUF loader, whose tensors and logits must be those of the merged
model, the adapter by gguf's reader. Queries and keys lie in another order than in transformers: of each head llama.cpp
rotates neighbours, transformers the two halves.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from .backbone import load_settings, load_tokenizer
from .config import Config
from .drift import judge_batches
from .errors import ConfigError, VerificationError
from .tasks.base import probe_tokens

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
ARCHITECTURE = "llama"
LANGUAGE = ("causal-lm", "dpo", "orpo", "kto")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text."""
READ_ALIKE = ("gpt-2", "llama-bpe")
"""Splittings that transformers' GGUF reader makes as well, so that whole encodings can be compared."""


def refuse_without_gguf(config: Config) -> None:
    """Raise ConfigError where no GGUF file can be made of a run's model."""
    if config.task not in LANGUAGE:
        raise ConfigError(f"--gguf: llama.cpp runs language models, and the task is {config.task}.", "Use --merged.")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--gguf needs the package gguf ({error}).", "pip install 'peft-engine[gguf]'.") from error
    refuse_foreign(load_settings(config.model), config.model.path)
    vocabulary(load_tokenizer(config.model), 0)


def refuse_foreign(settings: Any, path: str) -> None:
    """Raise ConfigError for a model that is not of the llama family, or reads positions in another way."""
    rope = getattr(settings, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if settings.model_type != ARCHITECTURE or kind != "default" or settings.hidden_act != "silu":
        what = f"model_type {settings.model_type}, rope {kind}, {getattr(settings, 'hidden_act', 'no')} activation"
        raise ConfigError(
            f"--gguf: {path} has {what}; GGUF is written for model_type llama with plain rope and silu.",
            "Export with --merged, and convert that folder with llama.cpp's own script.",
        )


def vocabulary(tokenizer: Any, size: int) -> dict[str, Any]:
    """tokens, types and merges of a byte-level BPE tokenizer, and llama.cpp's name for how it splits text.

    Args:
        size: rows of the embeddings; those without a token get a placeholder.

    Raises:
        ConfigError: another kind of tokenizer, or a splitting without a name here.
    """
    from gguf import TokenType

    content = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    split = _splitting(content.get("pre_tokenizer") or {})
    if content.get("model", {}).get("type") != "BPE" or split is None or content.get("normalizer"):
        raise ConfigError(
            "--gguf: this tokenizer is no byte-level BPE that splits text as GPT-2, SmolLM or Llama 3 do.",
            "Export with --merged, and convert that folder with llama.cpp's own script.",
        )
    ids = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {one["id"]: one for one in content.get("added_tokens", [])}
    tokens, types = [], []
    for number in range(max(size, len(ids))):
        tokens.append(ids.get(number, f"[PAD{number}]"))
        known = added.get(number)
        kind = TokenType.CONTROL if known and known["special"] else TokenType.USER_DEFINED
        types.append(int(kind if known else TokenType.NORMAL if number in ids else TokenType.UNUSED))
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    return {"tokens": tokens, "types": types, "merges": merges, "split": split}


def _splitting(found: dict[str, Any]) -> str | None:
    """llama.cpp's name of a pre-tokenizer, by its parts."""
    parts = found.get("pretokenizers", [found])
    kinds = [part.get("type") for part in parts]
    last = parts[-1]
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and parts[0].get("pattern") == {"Regex": LLAMA3}:
        return "llama-bpe" if not last.get("use_regex", True) else None
    return None


def write_model(merged: Path, path: Path) -> dict[str, Any]:
    """Write a merged model's folder as one GGUF file, in its own dtype (norms in float32), and read it again.

    Returns:
        For merge.json: tensors, dtype, and the largest difference of logits over the largest logit.

    Raises:
        VerificationError: what transformers reads from it is not the merged model.
    """
    from gguf import GGUFWriter

    model: Any = AutoModelForCausalLM.from_pretrained(str(merged), dtype="auto")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(merged))
    words = vocabulary(tokenizer, model.config.vocab_size)
    writer = GGUFWriter(path, ARCHITECTURE)
    _describe(writer, model.config, model.dtype)
    _add_words(writer, words, tokenizer)
    count = 0
    for name, tensor in _named_for_gguf(model):
        _add(writer, name, tensor)
        count += 1
    _close(writer)
    relative = _read_again(model, tokenizer, words, path)
    return {"tensors": count, "dtype": str(model.dtype).removeprefix("torch."), "relative": relative}


def _describe(writer: Any, settings: Any, dtype: torch.dtype) -> None:
    from gguf import GGUFType, LlamaFileType

    heads = settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    rope: dict[str, Any] = getattr(settings, "rope_parameters", None) or {}
    kinds = {torch.float16: LlamaFileType.MOSTLY_F16, torch.bfloat16: LlamaFileType.MOSTLY_BF16}
    writer.add_type(GGUFType.MODEL)
    writer.add_file_type(kinds.get(dtype, LlamaFileType.ALL_F32))
    writer.add_vocab_size(settings.vocab_size)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    theta: Any = rope.get("rope_theta") or getattr(settings, "rope_theta", 10000.0)
    writer.add_rope_freq_base(float(theta))
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)


def _add_words(writer: Any, words: dict[str, Any], tokenizer: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words["split"])
    writer.add_token_list(words["tokens"])
    writer.add_token_types(words["types"])
    writer.add_token_merges(words["merges"])
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _named_for_gguf(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a llama model by llama.cpp's name, in its order; an output tied to the embeddings is left out."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        yield gguf_name(name, model.config), reordered(name, tensor, model.config)


def gguf_name(name: str, settings: Any) -> str:
    """llama.cpp's name of a tensor."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    table = get_tensor_name_map(MODEL_ARCH.LLAMA, settings.num_hidden_layers)
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ConfigError(f"--gguf: llama.cpp has no place for {name}.", "Use --merged.")
    return str(found)


def reordered(name: str, tensor: Tensor, settings: Any) -> Tensor:
    """Rows of queries' and keys' weights as llama.cpp has them: a head's two halves interleaved."""
    heads = {"q_proj": settings.num_attention_heads, "k_proj": settings.num_key_value_heads}
    count = next((count for part, count in heads.items() if f".{part}." in name), None)
    if count is None:
        return tensor
    parts = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
    return parts.transpose(1, 2).reshape(tensor.shape)


def _add(writer: Any, name: str, tensor: Tensor) -> None:
    """A tensor in its own dtype; vectors in float32, which llama.cpp wants of norms and biases."""
    from gguf import GGMLQuantizationType, quants

    wide = tensor.detach().float().contiguous().numpy()
    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, wide)
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, wide.astype(np.float16))
    else:
        kind = GGMLQuantizationType.BF16
        writer.add_tensor(name, quants.quantize(wide, kind), raw_dtype=kind)


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_again(model: Any, tokenizer: Any, words: dict[str, Any], path: Path) -> float:
    """The file through transformers' GGUF loader: every tensor bit by bit, logits, and the vocabulary."""
    from gguf import GGUFReader

    again: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=model.dtype)
    wanted, found = model.state_dict(), again.state_dict()
    wrong = sorted(set(wanted) ^ set(found))
    wrong += [name for name in wanted if name in found and not torch.equal(wanted[name], found[name])]
    if wrong:
        raise VerificationError(
            f"{path.name} read by transformers has {len(wrong)} tensors that are not the merged model's, "
            f"{wrong[0]} first.",
            "Report this with the config.",
        )
    batch = probe_tokens(model)
    with torch.no_grad():
        drift = judge_batches(*(one.eval()(**batch, use_cache=False).logits for one in (model, again)))
    if not drift.relative <= 1e-3:
        raise VerificationError(
            f"{path.name} read by transformers gives other logits: largest difference {drift.relative:.2e} of the "
            "largest logit, bound 1e-03.",
            "Report this with the config.",
        )
    fields = GGUFReader(path).fields
    stored = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")}
    if stored != {"tokens": words["tokens"], "merges": words["merges"], "token_type": words["types"]}:
        raise VerificationError(f"{path.name} holds another vocabulary than the tokenizer.", "Report this.")
    if words["split"] in READ_ALIKE:
        _compare_encodings(tokenizer, path)
    return drift.relative


def _compare_encodings(tokenizer: Any, path: Path) -> None:
    again: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    specials = "".join(tokenizer.all_special_tokens)
    for text in ("Hello, world! It's 12,345 o'clock.\n\n  Größe × naïve – 你好 🙂\t_end", f"a{specials} b"):
        one, other = (t(text, add_special_tokens=False).input_ids for t in (tokenizer, again))
        if one != other:
            raise VerificationError(
                f"{path.name}: its tokenizer encodes {text!r} otherwise ({other[:8]}, expected {one[:8]}).",
                "Report this with the model.",
            )


def why_no_adapter(settings: dict[str, Any], tensors: dict[str, Tensor]) -> str | None:
    """What of a peft adapter has no place in a GGUF adapter; None where all has."""
    if settings.get("peft_type") != "LORA":
        return f"it is no LoRA adapter ({settings.get('peft_type') or settings.get('method')})"
    if settings.get("use_dora"):
        return "llama.cpp has no DoRA"
    other = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    other += [name for name in tensors if ".layers." not in name]
    return f"it also trained {other[0]}" if other else None


def write_adapter(tensors: dict[str, Tensor], settings: dict[str, Any], model: Any, path: Path) -> dict[str, Any]:
    """Write a LoRA adapter for llama.cpp's `--lora`, and compare every tensor and the scale through gguf's reader.

    llama.cpp scales each pair by alpha over its own rank: where peft's scale is another one (rsLoRA, patterns), the
    difference goes into B.

    Args:
        tensors: of the adapter file.
        settings: of its adapter_config.json.
        model: transformers' config of the base.

    Returns:
        For merge.json: pairs and alpha.
    """
    from gguf import GGUFReader, GGUFType, GGUFWriter, Keys

    pairs = {name.removesuffix(".lora_A.weight"): name for name in tensors if name.endswith(".lora_A.weight")}
    alpha = float(settings["lora_alpha"]) * (math.sqrt(settings["r"]) if settings.get("use_rslora") else 1.0)
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    written: dict[str, Tensor] = {}
    for module, name in pairs.items():
        down, up = tensors[name].float(), tensors[f"{module}.lora_B.weight"].float()
        plain = f"{module.removeprefix('base_model.model.')}.weight"
        factor = scale_of(module, len(down), settings) * len(down) / alpha
        place = gguf_name(plain, model)
        written[f"{place}.lora_a"] = down
        written[f"{place}.lora_b"] = reordered(plain, up * factor if factor != 1.0 else up, model)
    for name, tensor in written.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    _close(writer)
    reader = GGUFReader(path)
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    wrong = sorted(set(found) ^ set(written))
    wrong += [n for n in written if n in found and not torch.equal(found[n].reshape(written[n].shape), written[n])]
    if wrong or np.float32(reader.fields[Keys.Adapter.LORA_ALPHA].contents()) != np.float32(alpha):
        raise VerificationError(
            f"{path.name} read by gguf is not the adapter: {(wrong or [Keys.Adapter.LORA_ALPHA])[0]} differs.",
            "Report this with the config.",
        )
    return {"pairs": len(pairs), "alpha": alpha}


def scale_of(module: str, rank: int, settings: dict[str, Any]) -> float:
    """peft's scale of one LoRA pair, from the adapter's settings."""
    from peft.utils.other import get_pattern_key

    patterns: dict[str, Any] = settings.get("alpha_pattern") or {}
    name = module.removeprefix("base_model.model.")
    alpha = patterns.get(get_pattern_key(list(patterns), name), settings["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
