"""New tokens of `model.new_tokens` in a tokenizer."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

from .errors import ConfigError


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer, in place, in their order.

    Raises:
        ConfigError: a token is there already, or text would not be cut at it.
    """
    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise ConfigError(
                f"model.new_tokens: {token!r} is a token of this model already (id {known[token]}).",
                "Remove it, or train its row: adapter.options: {trainable_token_indices: [id]}.",
            )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    for token, number in zip(tokens, token_ids(tokenizer, tokens), strict=True):
        if number not in tokenizer(token, add_special_tokens=False)["input_ids"]:
            raise ConfigError(
                f"model.new_tokens: this tokenizer does not give {token!r} as one token.", "Choose another text."
            )


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Their numbers in the vocabulary."""
    found: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    return found
