"""Energy counters: on a made tree of the kernel's files and a made NVML."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from peft_engine.meters.energy import Energy


def zone(root: Path, name: str, label: str, microjoules: int, most: int = 1000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for file, text in (("name", label), ("energy_uj", microjoules), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def test_packages_and_memory_are_added_up(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    zone(tmp_path, "intel-rapl:0:0", "core", 50)  # inside the package
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 10)
    zone(tmp_path, "intel-rapl:1", "psys", 900)  # round everything
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 100)  # the same package once more
    meter = Energy(tmp_path)
    package.write_text("700")
    memory.write_text("30")
    (tmp_path / "intel-rapl:0:0/energy_uj").write_text("500")
    found = meter.used()
    assert found["joules"] == pytest.approx(620e-6)
    assert found["method"] == "RAPL"
    assert found["by_counter"] == {
        "package-0 (intel-rapl:0)": pytest.approx(600e-6),
        "dram (intel-rapl:0:1)": pytest.approx(20e-6),
    }


def test_a_counter_that_begins_again(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 900, most=1000)
    meter = Energy(tmp_path)
    counter.write_text("50")
    meter.sample()
    counter.write_text("40")
    assert meter.used()["joules"] == pytest.approx((150 + 990) * 1e-6)


def test_nothing_readable_is_nothing(tmp_path):
    assert Energy(tmp_path).used() is None
    assert Energy(tmp_path / "absent").used() is None
    zone(tmp_path, "intel-rapl:0", "package-0", 1).unlink()
    assert Energy(tmp_path).used() is None


def test_a_counter_that_fails_on_the_way_gives_nothing(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    meter = Energy(tmp_path)
    counter.write_text("")
    meter.sample()
    counter.write_text("200")
    assert meter.used() is None, "a part of the energy would look like all of it"


class Nvml(SimpleNamespace):
    NVMLError = RuntimeError

    def nvmlInit(self) -> None:
        if self.broken:
            raise RuntimeError("no driver")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self.millijoules[handle]


def test_gpus_by_nvml(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    nvml = Nvml(broken=False, millijoules={"GPU-1": 5000})
    meter = Energy(tmp_path, ["GPU-1"], nvml)
    nvml.millijoules["GPU-1"] = 7500
    counter.write_text("200")
    found = meter.used()
    assert found["joules"] == pytest.approx(2.5 + 100e-6)
    assert found["method"] == "RAPL + NVML"
    assert Energy(tmp_path / "absent", ["GPU-1"], Nvml(broken=True)).used() is None
