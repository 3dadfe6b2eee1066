"""One run in several processes over gloo: what torchrun would start, forked from the server of processes.py."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from processes import Ended, Engine
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_engine.tasks.base import Batch
from peft_engine.tasks.causal_lm import CausalLM
from peft_engine.training.loop import Loop

PLACE = "RANK"
LAST = "last.safetensors"


class Ranks:
    """`peft-engine ARGUMENTS` in `count` processes; each prints into a folder of its own below `folder`.

    Args:
        first: called in each process before it begins.
    """

    def __init__(
        self,
        *arguments: object,
        folder: Path,
        count: int = 2,
        first: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the launcher's
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo",
            **(environment or {}),
        }
        self.engines = []
        for place in range(count):
            own = folder / f"rank{place}"
            own.mkdir(parents=True, exist_ok=True)
            variables = {**shared, PLACE: str(place), "LOCAL_RANK": str(place)}
            self.engines.append(Engine(*arguments, folder=own, environment=variables, first=first))

    def wait(self, seconds: float = 60) -> list[Ended]:
        return [engine.wait(seconds) for engine in self.engines]


def ranks(*arguments: object, folder: Path, **how: object) -> list[Ended]:
    """Run to the end; see `Ranks`."""
    return Ranks(*arguments, folder=folder, **how).wait()  # type: ignore[arg-type]


def done(*arguments: object, folder: Path, **how: object) -> None:
    """Run to the end, which must be a good one, told by the first process alone."""
    first, *others = ranks(*arguments, folder=folder, **how)
    assert [first.code, *(other.code for other in others)] == [0] * (1 + len(others)), first.err + others[0].err
    assert "rows: " in first.err
    assert first.out
    for other in others:  # whatever libraries say that the server has loaded already
        assert "rows: " not in other.err
        assert other.out == ""


def starve_second() -> None:
    """Before a run: in the second process forward runs out of memory on more than one sequence."""
    whole = CausalLM.training_loss

    def starved(self: CausalLM, model: nn.Module, batch: Batch) -> Tensor:
        if len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return whole(self, model, batch)

    if os.environ[PLACE] == "1":
        CausalLM.training_loss = starved  # type: ignore[method-assign]


def end_second() -> None:
    """Before a run: the second process is killed in its third step."""
    whole, calls = CausalLM.training_loss, [0]

    def killed(self: CausalLM, model: nn.Module, batch: Batch) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, model, batch)

    if os.environ[PLACE] == "1":
        CausalLM.training_loss = killed  # type: ignore[method-assign]


def keep_last() -> None:
    """Before a run: each process writes the tensors that it ends with into its own folder."""
    whole = Loop._final_weights

    def kept(self: Loop) -> None:
        whole(self)
        tensors = {n: t.detach().cpu().contiguous() for n, t in self.trainees[0].member.all_tensors().items()}
        save_file(tensors, LAST)

    Loop._final_weights = kept  # type: ignore[method-assign]
