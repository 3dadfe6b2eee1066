"""Which rows make which step: every row once an epoch, and a function of (seed, step) alone."""

import numpy as np
import pytest

from peft_engine.data.batching import BatchPlan

LENGTHS = np.random.default_rng(0).integers(1, 200, 1037)


def plan(rows: int = 1037, size: int = 16, seed: int = 0, group: bool = True) -> BatchPlan:
    return BatchPlan(LENGTHS[:rows], size, seed, group)


def epoch(made: BatchPlan, number: int) -> list[np.ndarray]:
    first = number * made.steps_per_epoch + 1
    return [made.rows(step) for step in range(first, first + made.steps_per_epoch)]


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(1037, 16), (1037, 7), (16, 16), (17, 16), (3, 16), (1, 1), (100, 1)])
def test_every_row_exactly_once_an_epoch(rows, size, group):
    made = plan(rows, size, group=group)
    assert made.steps_per_epoch == -(-rows // size)
    for number in range(3):
        batches = epoch(made, number)
        assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
        sizes = sorted(len(batch) for batch in batches)
        assert sizes[1:] == [size] * (len(batches) - 1)
        assert sizes[0] == rows % size or size, "the smaller batch is kept"


@pytest.mark.parametrize("group", [False, True])
def test_a_function_of_seed_and_step(group):
    """From any step on, in any order of asking, whatever was asked before."""
    made = plan(group=group)
    steps = 2 * made.steps_per_epoch
    in_order = {step: made.rows(step).tolist() for step in range(1, steps + 1)}
    again = plan(group=group)
    for step in np.random.default_rng(1).permutation(np.arange(1, steps + 1)):
        assert again.rows(int(step)).tolist() == in_order[int(step)]
    assert plan(group=group).rows(steps).tolist() == in_order[steps]


@pytest.mark.parametrize("group", [False, True])
def test_epochs_and_seeds_differ(group):
    made, other = plan(group=group), plan(seed=1, group=group)
    orders = [np.concatenate(epoch(p, n)).tolist() for p, n in ((made, 0), (made, 1), (other, 0), (other, 1))]
    assert len({tuple(order) for order in orders}) == 4


def test_epoch_of_a_step():
    made = plan(33, 16)
    assert [made.epoch_of(step) for step in range(1, 8)] == [0, 0, 0, 1, 1, 1, 2]


def padding(made: BatchPlan) -> float:
    """Share of padded positions in an epoch."""
    lengths = [LENGTHS[batch] for batch in epoch(made, 0)]
    return 1 - sum(int(n.sum()) for n in lengths) / sum(len(n) * int(n.max()) for n in lengths)


def test_grouping_by_length_pads_little_and_stays_shuffled():
    assert padding(plan(group=True)) < 0.1 < 0.4 < padding(plan(group=False))
    longest = [int(LENGTHS[batch].max()) for batch in epoch(plan(group=True), 0)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("group", [False, True])
def test_heaviest_step_has_the_most_padded_tokens(group):
    made = plan(group=group)
    heaviest = made.heaviest_step(10_000)
    weights = {
        step: len(made.rows(step)) * int(LENGTHS[made.rows(step)].max()) for step in range(2, made.steps_per_epoch + 1)
    }
    assert weights[heaviest] == max(weights.values())
    assert 2 <= made.heaviest_step(5) <= 5, "a step that the run has"


def test_heaviest_step_of_short_runs():
    assert plan(3, 16).heaviest_step(1) == 1, "there is no other"
    assert plan(3, 16).heaviest_step(5) == 2, "one step an epoch: not the first, where the optimizer has no state"
    assert plan(40, 16).heaviest_step(1) == 1
    assert plan(40, 16).heaviest_step(2) == 2
