"""Tiny random encoder-decoder models, saved as ordinary model folders: T5 old and new, BART, and two BERTs.

t5       tied embeddings, outputs scaled by 1/sqrt(width), ReLU, relative positions; ends a text with </s>
t5_new   untied head, gated GELU, as in T5 1.1 and mT5
bart     learned positions, biases; <s> text </s>, the decoder starts with </s>
bert2bert  transformers' EncoderDecoderModel of two BERTs, a pooler in the encoder that nothing reads
"""

from pathlib import Path
from typing import Any

import torch
from tiny import HEADS, HIDDEN, INNER, LAYERS, POSITIONS, STD, WORDS, make_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    EncoderDecoderModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SEQ2SEQ = ("t5", "t5_new", "bart", "bert2bert")


def make_seq2seq(family: str, folder: Path, *, dropout: float = 0.0) -> Path:
    """Save a random model with its tokenizer into `folder` and return it. The same arguments give the same weights."""
    torch.manual_seed(0)
    if family == "bert2bert":
        bert = make_model("bert", folder.with_name(f"{folder.name}-part"), dropout=dropout)
        tokenizer: Any = AutoTokenizer.from_pretrained(bert)
        model: Any = EncoderDecoderModel.from_encoder_decoder_pretrained(str(bert), str(bert))
        model.config.decoder_start_token_id = tokenizer.cls_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        tokenizer = _words(start="<s>" if family == "bart" else None)
        model = _model(family, tokenizer, dropout)
    with torch.no_grad():
        for module in model.modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                bias.normal_(0.0, STD)
        if family in ("bart", "bert2bert"):
            model.get_output_embeddings().weight.mul_(5)  # behind a norm: else no logit could get large
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copy_rows(count: int) -> list[dict[str, Any]]:
    """Sources of uneven length, whose targets are their first words, uneven too."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(2 + i * 5 % 9)]
        rows.append({"source": f"{' '.join(words)} {i % 10} {i // 10}", "target": " ".join(words[: 1 + i % 4])})
    return rows


def _model(family: str, tokenizer: Any, dropout: float) -> Any:
    shape = {"vocab_size": len(tokenizer), "d_model": HIDDEN, "pad_token_id": tokenizer.pad_token_id}
    ends = {"eos_token_id": tokenizer.eos_token_id}
    if family == "bart":
        return BartForConditionalGeneration(
            BartConfig(
                **shape, **ends, bos_token_id=tokenizer.bos_token_id, decoder_start_token_id=tokenizer.eos_token_id,
                encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER,
                encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, max_position_embeddings=POSITIONS,
                dropout=dropout, attention_dropout=dropout, init_std=STD, forced_eos_token_id=None,
            )
        )  # fmt: skip
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if family == "t5_new" else {}
    return T5ForConditionalGeneration(
        T5Config(
            **shape, **ends, d_kv=HIDDEN // HEADS, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS, dropout_rate=dropout,
            decoder_start_token_id=tokenizer.pad_token_id, **gated,
        )
    )  # fmt: skip


def _words(start: str | None) -> PreTrainedTokenizerFast:
    """A word per token and a letter for every other, closed by </s>."""
    specials = ["<pad>", "</s>", "<unk>", "<s>"]
    pieces = [*specials, *sorted({*WORDS, *"0123456789", "summarise", ":"})]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("</s>", "<s>")]
    head = f"{start} " if start else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{head}$A </s>", pair=f"{head}$A </s> $B </s>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token=start
    )
