"""Energy by the machine's own counters: RAPL for CPU packages and memory, NVML for GPUs. Absent where none is readable.

The counters are the whole machine's (or the whole GPU's): whatever else runs there is counted too.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
COUNTED = ("package", "dram")  # RAPL zones that don't overlap; "core" is inside a package, "psys" around all


class Energy:
    """Adds up what the counters have gone forward since it was made.

    RAPL's counters are small and begin again at zero, after half an hour or so of full load: `sample` must be called
    more often than that.

    Args:
        powercap: folder of the kernel's RAPL zones.
        gpus: UUIDs of the GPUs that compute.
        nvml: the module `pynvml`, or None where it is not installed.
    """

    def __init__(self, powercap: Path = POWERCAP, gpus: Sequence[str] = (), nvml: Any = None) -> None:
        self._counters: dict[str, Callable[[], int | None]] = {}  # name → microjoules
        self._ranges: dict[str, int | None] = {}
        self.method: list[str] = []
        self._find_rapl(powercap)
        if nvml is not None and gpus:
            self._find_gpus(gpus, nvml)
        self._last = {name: read() for name, read in self._counters.items()}
        self._used = dict.fromkeys(self._counters, 0)

    def _find_rapl(self, powercap: Path) -> None:
        for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's too; the -mmio zones are the same packages again
            with contextlib.suppress(OSError, ValueError):
                label = (zone / "name").read_text().strip()
                if not label.startswith(COUNTED):
                    continue
                range_ = int((zone / "max_energy_range_uj").read_text())
                counter = zone / "energy_uj"
                int(counter.read_text())  # root's alone on many machines
                name = f"{label} ({zone.name})"
                self._counters[name], self._ranges[name] = partial(_number, counter), range_
        if self._counters:
            self.method.append("RAPL")

    def _find_gpus(self, gpus: Sequence[str], nvml: Any) -> None:
        def reader(handle: Any) -> Callable[[], int | None]:
            return lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1000

        try:
            nvml.nvmlInit()
            handles = {f"GPU {uuid}": nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in gpus}
            for handle in handles.values():
                nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError:  # no driver, or a GPU older than Volta
            return
        for name, handle in handles.items():
            self._counters[name], self._ranges[name] = reader(handle), None
        self.method.append("NVML")

    def sample(self) -> None:
        """Add what was used since the last call."""
        for name, read in self._counters.items():
            now, last = read(), self._last[name]
            if now is None or last is None:
                self._last[name] = None  # a counter that failed once tells nothing any more
                continue
            range_ = self._ranges[name]
            self._used[name] += now - last if now >= last or range_ is None else now + range_ - last
            self._last[name] = now

    def used(self) -> dict[str, Any] | None:
        """{"joules", "method", "by_counter"} since the beginning; None where no counter is readable, or one failed."""
        self.sample()
        if not self._counters or None in self._last.values():
            return None
        by_counter = {name: used / 1e6 for name, used in self._used.items()}
        return {"joules": sum(by_counter.values()), "method": " + ".join(self.method), "by_counter": by_counter}


def energy_here() -> Energy:
    """The counters of this machine and of the GPU that this process computes on."""
    import torch

    if not torch.cuda.is_available():
        return Energy()
    try:
        import pynvml  # comes with nvidia-ml-py
    except ImportError:
        return Energy(gpus=[], nvml=None)
    return Energy(gpus=[f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"], nvml=pynvml)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
