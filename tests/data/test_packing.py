"""Samples in packs: every one once, none too long, the same ones whatever the cut and the number of processes."""

from itertools import chain

import numpy as np
import pytest

from peft_engine.data.batching import BatchPlan
from peft_engine.data.packing import Packing, Packs, lay_out, padded_tokens

LENGTHS = np.random.default_rng(0).integers(1, 90, 203)


def sums(packs: list[np.ndarray]) -> list[int]:
    return [int(LENGTHS[pack].sum()) for pack in packs]


def plan(tokens: int = 128, together: bool = True, size: int = 16, group: bool = True) -> BatchPlan:
    return BatchPlan(LENGTHS, size, 0, group, Packing(tokens, together))


def spread(pieces: list[Packs]) -> list[list[int]]:
    """Packs of all micro-batches, in order."""
    return [pack.tolist() for piece in pieces for pack in piece.packs]


@pytest.mark.parametrize("tokens", [2, 89, 90, 128, 1000, 10**6])
def test_every_sample_once_and_no_pack_too_long(tokens):
    rows = np.random.default_rng(1).permutation(len(LENGTHS))
    packs = Packing(tokens).packs(rows, LENGTHS)
    assert sorted(np.concatenate(packs).tolist()) == sorted(rows.tolist())
    for pack, held in zip(packs, sums(packs), strict=True):
        assert held <= tokens or len(pack) == 1, "only a sample that is longer than a pack may exceed it"
    assert sums(packs) == sorted(sums(packs), reverse=True)


def test_first_fit_decreasing_by_hand():
    """Spread evenly, 9+1 would be 9+2 with the 1 elsewhere: too long, so first fit's own packs stay."""
    lengths = np.array([3, 9, 5, 6, 1, 2, 4])
    packs = Packing(10).packs(np.arange(7), lengths)
    assert [pack.tolist() for pack in packs] == [[1, 4], [3, 6], [2, 0, 5]]


def test_packs_are_spread_evenly_by_hand():
    """First fit: 5+4 and 3+2+1 in packs of 9; evenly 5+2+1 and 4+3."""
    packs = Packing(9).packs(np.arange(5), np.array([1, 2, 3, 4, 5]))
    assert [pack.tolist() for pack in packs] == [[4, 1, 0], [3, 2]]


def test_first_fit_decreasing_keeps_its_bound():
    """At most 11/9 of the best number of packs and 6/9 (Dósa 2007)."""
    rows = np.arange(len(LENGTHS))
    for tokens in (90, 128, 300):
        least = -(-int(LENGTHS.sum()) // tokens)
        assert least <= len(Packing(tokens).packs(rows, LENGTHS)) <= 11 / 9 * least + 6 / 9 + 1


def test_a_row_that_comes_twice_is_packed_twice():
    packs = Packing(500).packs(np.array([4, 4, 7]), LENGTHS)
    assert sorted(np.concatenate(packs).tolist()) == [4, 4, 7]


@pytest.mark.parametrize("together", [True, False])
def test_packs_depend_neither_on_the_cut_nor_on_the_processes(together):
    made = plan(together=together)
    for step in (1, 2, made.steps_per_epoch):
        whole = spread(made.micro_batches(step, 16))
        assert sorted(chain(*whole)) == sorted(made.rows(step).tolist())
        for size in (1, 2, 3, 8, 1000):
            assert spread(made.micro_batches(step, size)) == whole
        shares = [spread(made.micro_batches(step, 2, rank, 3)) for rank in range(3)]
        assert sorted(chain(*shares)) == sorted(whole)


def test_a_micro_batch_needs_no_more_than_its_samples_would_but_one_pack():
    made = plan()
    for step in range(1, made.steps_per_epoch + 1):
        longest = int(LENGTHS[made.rows(step)].max())
        for size in (1, 3, 16):
            for piece in made.micro_batches(step, size):
                assert padded_tokens([piece], LENGTHS) <= size * longest or len(piece) == 1
    assert any(len(piece) > 1 for piece in made.micro_batches(1, 1000))


def test_flash_attention_gets_one_pack_at_a_time():
    assert all(len(piece) == 1 for piece in plan(together=False).micro_batches(1, 1000))


def test_smaller_is_smaller_until_nothing_is():
    made, sizes = plan(size=64), [64]
    while (size := made.smaller(1, sizes[-1])) is not None:
        now, then = ([padded_tokens([p], LENGTHS) for p in made.micro_batches(1, s)] for s in (size, sizes[-1]))
        assert max(now) < max(then)
        sizes.append(size)
    assert len(sizes) > 2
    longest = max(sums([p for piece in made.micro_batches(1, sizes[-1]) for p in piece.packs]))
    assert max(padded_tokens([p], LENGTHS) for p in made.micro_batches(1, sizes[-1])) == longest, "a single pack"
    plain = BatchPlan(LENGTHS, 16, 0, True)
    assert [plain.smaller(1, n) for n in (16, 5, 2, 1)] == [8, 3, 1, None]


def test_packing_pads_less_than_grouping_by_length():
    def share(made: BatchPlan) -> float:
        padded = 0
        for step in range(1, made.steps_per_epoch + 1):
            for piece in made.micro_batches(step, 16):
                packed = isinstance(piece, Packs)
                padded += padded_tokens([piece], LENGTHS) if packed else len(piece) * int(LENGTHS[piece].max())
        return 1 - int(LENGTHS.sum()) / padded

    loose, grouped = (share(BatchPlan(LENGTHS, 16, 0, group)) for group in (False, True))
    assert grouped < loose
    for group in (False, True):
        assert share(plan(256, group=group)) < grouped
        assert share(plan(128, group=group)) < 1 / 8, "no pack stands beside one that is much longer"
    assert share(plan(256, together=False)) == 0


def test_layout_by_hand():
    found = lay_out([[np.array([7, 8, 9]), np.array([5])], [np.array([6, 4])]], 1)
    assert found["input_ids"].tolist() == [[7, 8, 9, 5], [6, 4, 1, 1]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert found["input_ids"].dtype == found["position_ids"].dtype == np.int64


def test_heaviest_step_has_the_most_tokens():
    made = plan()
    heaviest = made.heaviest_step(10_000)
    tokens = {step: int(LENGTHS[made.rows(step)].sum()) for step in range(2, made.steps_per_epoch + 1)}
    assert tokens[heaviest] == max(tokens.values())
