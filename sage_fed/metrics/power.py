"""What the GPU draws, where anything says so: the driver (NVML), or a board's own sensors (hwmon).

Every reading is optional. A Jetson's NVML knows no power, but its board has a sensor on the GPU's
rail; a machine may have neither, and then there are no series. A sensor that stops answering
leaves a gap, and is no error.
Where nobody counts energy, a thread of ours reads the power once a second and adds it up.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sage_fed.metrics.series import PREFIX

_HWMON = Path("/sys/class/hwmon")
_INTERVAL_S = 1.0

_log = logging.getLogger(__name__)


class Sensor(Protocol):
    """One place that knows the GPU's power."""

    @property
    def name(self) -> str:
        """Which one; a label."""

    def watts(self) -> float | None:
        """The power now; None where it does not say."""

    def joules(self) -> float | None:
        """The energy since some time in the past; None where it does not count."""


def find_sensor(gpu_uuid: str, hwmon: Path = _HWMON) -> Sensor | None:
    """Return the sensor of a GPU: the driver's, else the board's, else None."""
    driver = NvmlSensor.open(gpu_uuid)
    if driver is not None and driver.watts() is not None:
        return driver
    return next((rail for rail in rails(hwmon) if rail.watts() is not None), None)


class NvmlSensor:
    """The NVIDIA driver's reading."""

    name = "nvml"

    def __init__(self, nvml: ModuleType, handle: object) -> None:
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def open(cls, gpu_uuid: str) -> NvmlSensor | None:
        """Find the GPU; None without a driver, or one that does not know it."""
        import pynvml  # noqa: PLC0415 - a start without a GPU does not pay for it

        try:
            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid))
        except pynvml.NVMLError as error:
            _log.info("the driver says nothing of the GPU's power: %s", error)
            return None

    def watts(self) -> float | None:
        """Return the power now."""
        return self._thousandths(self._nvml.nvmlDeviceGetPowerUsage)

    def joules(self) -> float | None:
        """Return the energy since the driver was loaded."""
        return self._thousandths(self._nvml.nvmlDeviceGetTotalEnergyConsumption)

    def _thousandths(self, read: Callable[[object], int]) -> float | None:
        try:
            return read(self._handle) / 1000
        except self._nvml.NVMLError:
            return None


class RailSensor:
    """A power monitor on the board, on the rail that feeds the GPU."""

    def __init__(self, directory: Path, channel: str, label: str) -> None:
        self.name = label
        self._power = directory / f"power{channel}_input"
        self._millivolts = directory / f"in{channel}_input"
        self._milliamperes = directory / f"curr{channel}_input"

    def watts(self) -> float | None:
        """Return the power now: as the sensor says, or its voltage times its current."""
        if (microwatts := _number(self._power)) is not None:
            return microwatts / 1e6
        volts, amperes = _number(self._millivolts), _number(self._milliamperes)
        return None if volts is None or amperes is None else volts * amperes / 1e6

    def joules(self) -> float | None:
        """Return None: it does not count."""
        return None


def rails(hwmon: Path) -> Iterator[RailSensor]:
    """Yield the sensors whose label names a GPU, as `VDD_GPU` of a Jetson."""
    for label in sorted(hwmon.glob("hwmon*/in*_label")):
        with contextlib.suppress(OSError):
            text = label.read_text().strip()
            if "GPU" in text.upper():
                channel = label.name.removeprefix("in").removesuffix("_label")
                yield RailSensor(label.parent, channel, text)


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


class PowerCollector(Collector):
    """The sensor's two series; `close` ends the thread that adds up, where there is one."""

    def __init__(self, sensor: Sensor, clock: Callable[[], float] = time.monotonic) -> None:
        self._sensor = sensor
        self._clock = clock
        self._joules = 0.0
        self._last: tuple[float, float] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if sensor.joules() is None:
            self._thread = threading.Thread(target=self._add_up, name="power", daemon=True)
            self._thread.start()

    def describe(self) -> list[Metric]:
        """Nothing: else registering would already read the sensor."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The power now, and the energy until now."""
        watts, joules = self._sensor.watts(), self._sensor.joules()
        power = GaugeMetricFamily(
            f"{PREFIX}_gpu_power_watts", "Power that the GPU draws.", labels=("sensor",)
        )
        if watts is not None:
            power.add_metric((self._sensor.name,), watts)
        yield power
        energy = CounterMetricFamily(
            f"{PREFIX}_energy_joules",
            "Energy that the GPU has used; its beginning is the sensor's own.",
            labels=("sensor",),
        )
        energy.add_metric((self._sensor.name,), self._joules if joules is None else joules)
        yield energy

    def add_reading(self) -> None:
        """Add the energy since the last reading, by the mean of the two."""
        now, watts = self._clock(), self._sensor.watts()
        if watts is None:
            # What was used meanwhile is not known, so it is not guessed.
            self._last = None
            return
        if self._last is not None:
            before_s, before_watts = self._last
            self._joules += (now - before_s) * (watts + before_watts) / 2
        self._last = now, watts

    def close(self) -> None:
        """Stop adding up."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _add_up(self) -> None:
        while not self._closed.wait(_INTERVAL_S):
            self.add_reading()
