"""The data of a run, in memory or streamed (`data.streaming`)."""

from pathlib import Path
from typing import Any

from ..config import Config
from . import encoding, splitting
from .encoding import Encode, EncodedSet
from .splitting import Split, Splits
from .streaming import StreamedSplit, stream_splits
from .token_store import encode_streamed, store_facts

__all__ = ["encode_split", "load_splits", "store_facts", "without_looking"]


def load_splits(config: Config) -> Splits:
    """See `splitting.load_splits`."""
    return stream_splits(config) if config.data.streaming else splitting.load_splits(config)


def encode_split(
    split: Split, encode: Encode, fingerprint: dict[str, Any], max_dropped: float | None, cache: Path | None
) -> EncodedSet:
    """See `encoding.encode_split`. A streamed split has its tokens beside its rows, whatever `cache` says."""
    if not isinstance(split, StreamedSplit):
        return encoding.encode_split(split, encode, fingerprint, max_dropped, cache)
    encoded = encode_streamed(split, encode, fingerprint)
    if max_dropped is not None:
        encoding.refuse_empty(split, encoded, max_dropped)
    return encoded


def without_looking(config: Config) -> Config:
    """The settings that give the same splits and look for near duplicates only where these are dropped."""
    if config.data.near_duplicates != "report":
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"near_duplicates": "off"})})
