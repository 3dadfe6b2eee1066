"""When a run stops before its last step: one decision of all its processes."""

import signal

from .. import processes
from ..config import BudgetConfig, Config
from ..errors import BudgetReached, Interrupted
from ..meters.cost import cost_usd
from .guards import Signals
from .state import Trainee

GO_ON, HOURS, USD = 0, 1, 2  # a larger number wins; above stand the numbers of signals
SIGNALS = 100


def stop_reason(config: Config, signals: Signals, seconds: float) -> Interrupted | BudgetReached | None:
    """Why to stop after this step, None to go on. A signal to any process, or the budget on any clock, stops all."""
    budget = config.budget
    decided = int(processes.maximum([_own_wish(signals, budget, seconds)])[0])
    if decided > SIGNALS:
        return Interrupted(
            f"{signal.Signals(decided - SIGNALS).name}: stopped after a complete checkpoint.",
            "Run it again with --resume (and without --overwrite).",
        )
    if decided == HOURS:
        return BudgetReached(f"budget.max_hours: {budget.max_hours} h are used up.", "Raise it and run with --resume.")
    if decided == USD:
        spent = cost_usd(seconds, budget.usd_per_hour)
        return BudgetReached(
            f"budget.max_usd: {spent:.4f} of {budget.max_usd} USD are spent.", "Raise it and run with --resume."
        )
    return None


def _own_wish(signals: Signals, budget: BudgetConfig, seconds: float) -> int:
    if signals.wanted:
        return SIGNALS + signal.Signals[signals.wanted].value
    if budget.max_hours is not None and seconds >= budget.max_hours * 3600:
        return HOURS
    spent = cost_usd(seconds, budget.usd_per_hour)
    return USD if budget.max_usd is not None and spent is not None and spent >= budget.max_usd else GO_ON


def agree_on_micro_batches(trainee: Trainee) -> bool:
    """Let every process take the smallest micro-batch that one of them was brought to (a checkpoint holds one number).

    Returns:
        Whether this process takes fewer sequences than before because another ran out of memory.
    """
    smallest = -int(processes.maximum([-trainee.micro_batch_size])[0])
    fell, trainee.micro_batch_size = smallest < trainee.micro_batch_size, smallest
    return fell
