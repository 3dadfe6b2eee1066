"""NEFTune (Jain et al. 2023): uniform noise on the input embeddings while training.

    x ← x + alpha / sqrt(L·d) · u,   u ~ Uniform(-1, 1)     (their algorithm 1)

    L   tokens of this sample, padding and pack neighbours left out
    d   width of the embeddings

A sample's noise is a function of its seed and its length, so neither the cut into micro-batches, packing, the number of
processes nor a replay under gradient checkpointing changes it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.dropout import mix

from ..errors import ConfigError

SALT = 0x4E454654  # apart from the dropout masks that the same seeds name


@dataclass(frozen=True)
class Sample:
    """Where one sample stands in a batch of token ids, and its seed."""

    line: int
    start: int
    length: int
    seed: int


class Neftune:
    """Adds noise to the output of a model's token embeddings, inside `during` only.

    Args:
        model: its `get_input_embeddings` names the module; others that share its weight count as well.
        alpha: scale of the noise.

    Raises:
        ConfigError: the model has no token embeddings.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        try:
            found = model.get_input_embeddings()
        except NotImplementedError:
            found = None
        if not isinstance(found, nn.Module):
            raise ConfigError(
                f"training.neftune_alpha: {type(model).__name__} has no token embeddings to put noise on.",
                "Leave it out.",
            )
        inside = set(found.modules())
        weight = getattr(found, "weight", None)
        # BART's encoder and decoder look up one weight, each through a module of its own
        also = [m for m in model.modules() if isinstance(m, nn.Embedding) and m not in inside and m.weight is weight]
        self.embeddings, self.alpha = [found, *also], alpha

    @contextmanager
    def during(self, ids: Tensor, samples: Sequence[Sample]) -> Iterator[None]:
        """While active, embedding `ids` gives noisy embeddings; other ids (a decoder's) stay as they are.

        Args:
            ids: int64 (…, length), the very tensor that is handed to the model.
            samples: what stands where in `ids`, its leading dimensions flattened.

        Raises:
            ConfigError: the model never embedded `ids`, so that there was no noise.
        """
        met = 0

        def add(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor | None:
            nonlocal met
            if not given or not isinstance(given[0], Tensor) or not _shares_memory(given[0], ids):
                return None
            met += 1
            return out + noise_like(out, samples, self.alpha)

        handles = [module.register_forward_hook(add) for module in self.embeddings]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if not met:
            raise ConfigError(
                "training.neftune_alpha: the model did not look up its batch in its input embeddings, so there was no "
                "noise.",
                "Leave it out for this model.",
            )


def noise_like(out: Tensor, samples: Sequence[Sample], alpha: float) -> Tensor:
    """The noise for embeddings `out` (…, length, d): same shape, dtype and device; zero where no sample stands."""
    length, width = out.shape[-2:]
    noise = torch.zeros(out.numel() // (length * width), length, width, device=out.device)
    generator = torch.Generator(device=out.device)
    for sample in samples:
        generator.manual_seed(mix(sample.seed, SALT))
        # drawn at the sample's own size: on a GPU the numbers depend on how many are drawn
        drawn = torch.rand(sample.length, width, generator=generator, device=out.device)
        bound = alpha / math.sqrt(sample.length * width)
        noise[sample.line, sample.start : sample.start + sample.length] = (2 * drawn - 1) * bound
    return noise.view(out.shape).to(out.dtype)


def padded_samples(mask: Tensor, seeds: Tensor) -> list[Sample]:
    """Samples of a batch that is padded on the right.

    Args:
        mask: int64 (rows, length), or (rows, choices, length) for rows of several texts; on the CPU.
        seeds: int64 (rows,).
    """
    lengths = mask.sum(-1).flatten().tolist()
    each = len(lengths) // len(seeds)  # texts per row
    return [
        Sample(line, 0, length, seed + text)
        for line, (length, seed, text) in enumerate(
            zip(lengths, seeds.repeat_interleave(each).tolist(), [*range(each)] * len(seeds), strict=True)
        )
        if length
    ]


def packed_samples(lengths: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[Sample]:
    """Samples of packs, each laid out from the left without gaps: per pack its samples' lengths and seeds."""
    found = []
    for line, (sizes, names) in enumerate(zip(lengths, seeds, strict=True)):
        start = 0
        for size, seed in zip(sizes, names, strict=True):
            found.append(Sample(line, start, size, seed))
            start += size
    return found


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and one.untyped_storage()._cdata == other.untyped_storage()._cdata
