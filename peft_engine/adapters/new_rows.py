"""Rows of the embeddings for new tokens.

They are all that an adapter trains of the embeddings, and are saved with it whole, so that it fits any model that was
given rows for the same tokens. What a new row starts from follows from the seed alone.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import EncoderDecoderModel

from ..backbone import Backbone, embeddings_of
from ..config import Config
from ..errors import ConfigError
from ..runtime import seed_everything
from ..vocabulary import token_ids


def grow(model: Any, tokenizer: Any, tokens: Sequence[str]) -> None:
    """Give a model rows for new tokens, in place, where its embeddings have not got them (many are padded)."""
    entry: Any = embeddings_of(model)[0]
    if tokens and max(token_ids(tokenizer, tokens)) >= entry.weight.shape[0]:
        with warnings.catch_warnings(action="ignore"):
            model.resize_token_embeddings(len(tokenizer))


def with_new_tokens(backbone: Backbone, tokenizer: Any, config: Config) -> Backbone:
    """The backbone with rows for `model.new_tokens`, whose numbers it keeps for the adapter.

    Raises:
        ConfigError: the model is two models, each with embeddings of its own.
    """
    tokens = config.model.new_tokens
    if tokens:
        if isinstance(backbone.model, EncoderDecoderModel):
            raise ConfigError(
                f"model.new_tokens: {config.model.path} is an EncoderDecoderModel, two models with embeddings of their "
                "own, and the engine gives new rows to one only.",
                "Leave model.new_tokens out (unused words of the vocabulary can stand in), or take a model such as T5 "
                "or BART, whose encoder and decoder share them.",
            )
        seed_everything(config.training.seed, 5)
        grow(backbone.model, tokenizer, tokens)
        backbone.new_token_ids = token_ids(tokenizer, tokens)
    return backbone


def rows_to_train(backbone: Backbone) -> dict[str, list[int]]:
    """peft's `trainable_token_indices`: module → rows, for the embeddings and for an output head of its own."""
    if not backbone.new_token_ids:
        return {}
    entry, output = embeddings_of(backbone.model)
    tied = output is None or getattr(output, "weight", None) is getattr(entry, "weight", None)
    ends = [entry] if tied else [entry, output]
    names = {id(module): name for name, module in backbone.model.named_modules()}
    return {names[id(end)]: list(backbone.new_token_ids) for end in ends}
