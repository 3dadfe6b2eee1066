"""Which rows make which optimizer step: a function of (seed, step), so a run can go on from any step."""

import math
from dataclasses import dataclass, field

import numpy as np

from .mixing import Mixture
from .packing import Packing, Packs, padded_tokens

MEGA = 50  # batches whose rows are sorted by length together, at most


@dataclass
class BatchPlan:
    """Rows of every optimizer step.

    Each epoch is a fresh permutation of all rows; its last batch may be smaller. With `group_by_length`, rows are
    sorted by length inside runs of up to 50 batches (a quarter of the data at most, so that epochs differ), and the
    batches are shuffled again: a batch pads little. With a mixture an epoch is a permutation of what it draws.

    Args:
        lengths: tokens per row, int64 (rows,).
        batch_size: rows per optimizer step, over all processes.
        seed: order of this member.
        packing: how a step's rows share sequences; None gives each its own.
        mixture: how often the rows of each source are seen; None shows each once per epoch.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int
    group_by_length: bool
    packing: Packing | None = None
    mixture: Mixture | None = None
    _epoch: int = field(default=-1, init=False)
    _batches: list[np.ndarray] = field(default_factory=list, init=False)
    _heaviest: dict[int, int] = field(default_factory=dict, init=False)

    @property
    def steps_per_epoch(self) -> int:
        rows = len(self.lengths) if self.mixture is None else self.mixture.size
        return math.ceil(rows / self.batch_size)

    def epoch_of(self, step: int) -> int:
        """Epoch (from 0) of an optimizer step (from 1)."""
        return (step - 1) // self.steps_per_epoch

    def rows(self, step: int) -> np.ndarray:
        """Row indices of optimizer step `step` (from 1), int64 (at most batch_size,)."""
        epoch = self.epoch_of(step)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._permute(epoch)
        return self._batches[(step - 1) % self.steps_per_epoch]

    def _permute(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths) if self.mixture is None else self.mixture.draw(rng))
        size = self.batch_size
        if not self.group_by_length:
            return [order[i : i + size] for i in range(0, len(order), size)]
        batches = []
        mega = size * max(1, min(MEGA, len(order) // (4 * size)))  # four runs or more, else epochs would repeat batches
        for start in range(0, len(order), mega):
            run = order[start : start + mega]
            run = run[np.argsort(-self.lengths[run], kind="stable")]
            batches += [run[i : i + size] for i in range(0, len(run), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def micro_batches(self, step: int, size: int, rank: int = 0, world: int = 1) -> list[np.ndarray] | list[Packs]:
        """What one process computes at once, one after the other, in optimizer step `step`.

        Without packing, pieces of at most `size` rows. With it, packs that are no more padded tokens than `size` of the
        step's longest row would be, but at least one pack. No pack and no sample of it depends on `size` or `world`.
        """
        rows = self.rows(step)
        if self.packing is None:
            own = rows[rank::world]
            return [own[i : i + size] for i in range(0, len(own), size)]
        packs = self.packing.packs(rows, self.lengths)[rank::world]
        return self.packing.cut(packs, self.lengths, size * int(self.lengths[rows].max()))

    def smaller(self, step: int, size: int, rank: int = 0, world: int = 1) -> int | None:
        """The next lower size with which this step needs less at once; None where there is none."""
        if size == 1:
            return None
        if self.packing is None:
            return math.ceil(min(size, len(self.rows(step)[rank::world])) / 2)
        now = self._largest(step, size, rank, world)
        while size > 1:
            size = math.ceil(size / 2)
            if self._largest(step, size, rank, world) < now:
                return size
        return None

    def _largest(self, step: int, size: int, rank: int, world: int) -> int:
        """Padded tokens of the largest micro-batch of packs."""
        pieces = self.micro_batches(step, size, rank, world)
        return max((padded_tokens([piece], self.lengths) for piece in pieces if isinstance(piece, Packs)), default=0)

    def heaviest_step(self, total_steps: int) -> int:
        """The step of the first epoch with the most padded tokens (packed: with the most tokens), for measuring peak
        memory; never the first step, where the optimizer has no state yet, unless there is no other. Found once."""
        if total_steps not in self._heaviest:
            first_epoch = self._permute(0)[:total_steps]
            packed = self.packing is not None
            padded = [
                int(self.lengths[rows].sum() if packed else len(rows) * self.lengths[rows].max())
                for rows in first_epoch
            ]
            later = range(2, len(padded) + 1)
            self._heaviest[total_steps] = max(later, key=lambda step: padded[step - 1], default=min(2, total_steps))
        return self._heaviest[total_steps]


def packing_report(plan: BatchPlan, total_steps: int, size: int) -> dict[str, float] | None:
    """What packing does to the first epoch's steps (at most 1,000 of them) at this micro-batch size; None without it.

    Returns:
        steps, samples_per_pack, padding_share (of the positions that are computed) and padding_share_unpacked.
    """
    if plan.packing is None:
        return None
    steps = range(1, min(total_steps, plan.steps_per_epoch, 1000) + 1)
    plain = BatchPlan(plan.lengths, plan.batch_size, plan.seed, plan.group_by_length)
    packs = tokens = packed = unpacked = samples = 0
    for step in steps:
        rows = plan.rows(step)
        samples, tokens = samples + len(rows), tokens + int(plan.lengths[rows].sum())
        pieces = [piece for piece in plan.micro_batches(step, size) if isinstance(piece, Packs)]
        packs, packed = packs + sum(map(len, pieces)), packed + padded_tokens(pieces, plan.lengths)
        parts = [part for part in plain.micro_batches(step, size) if isinstance(part, np.ndarray)]
        unpacked += sum(len(part) * int(plan.lengths[part].max()) for part in parts)
    return {
        "steps": len(steps),
        "samples_per_pack": samples / packs,
        "padding_share": 1 - tokens / packed,
        "padding_share_unpacked": 1 - tokens / unpacked,
    }
