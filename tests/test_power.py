"""What the GPU draws: a board's sensors as the kernel shows them, and energy added up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sage_fed.metrics import Metrics
from sage_fed.metrics.collectors import (
    PowerCollector,
    Sensor,
    driver_sensor,
    find_sensor,
    rails,
)

UUID = "GPU-00000000-0000-0000-0000-000000000000"


def board(root: Path, folder_name: str, **files: str) -> Path:
    """A power monitor as the kernel shows it."""
    folder = root / folder_name
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(f"{text}\n")
    return folder


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    """The rails of a Jetson: an INA3221 with three channels, and a sensor of something else."""
    board(
        tmp_path, "hwmon1", name="ina3221",
        in1_label="VDD_GPU", in1_input="12000", curr1_input="2500",
        in2_label="VDD_CPU_SOC_MSS", in2_input="12000", curr2_input="900",
    )  # fmt: skip
    board(tmp_path, "hwmon0", name="tmp451", temp1_input="41000")
    return tmp_path


def test_a_jetsons_rail_is_voltage_times_current(jetson: Path) -> None:
    """12 V at 2.5 A are 30 W; the rails of the CPU and the rest are not the GPU's."""
    (rail,) = rails(jetson)
    assert ("VDD_GPU", 30.0, None) == (rail.name, rail.watts(), rail.joules())


def test_a_monitor_that_knows_its_power_is_asked_for_that(tmp_path: Path) -> None:
    """Microwatts of the monitor itself win over a product of two readings at two moments."""
    board(
        tmp_path, "hwmon0",
        in1_label="VDD_GPU", in1_input="12000", curr1_input="1", power1_input="17500000",
    )  # fmt: skip
    (rail,) = rails(tmp_path)
    assert 17.5 == rail.watts()


def test_a_sensor_that_stops_answering_says_nothing(jetson: Path) -> None:
    """A reading that is gone or no number is no reading, and no error."""
    (rail,) = rails(jetson)
    (jetson / "hwmon1" / "curr1_input").write_text("busy\n")
    assert rail.watts() is None
    (jetson / "hwmon1" / "curr1_input").unlink()
    assert rail.watts() is None


def test_a_machine_without_sensors_has_none(tmp_path: Path) -> None:
    """No driver and no rail: there are no series, and the metrics page is whole."""
    assert driver_sensor(UUID) is None
    assert find_sensor(UUID, tmp_path) is None
    metrics = Metrics()
    with metrics.watch_power(UUID) as sensor:
        assert sensor is None
        assert b"gpu_power" not in metrics.exposition()


def test_the_board_speaks_where_the_driver_does_not(jetson: Path) -> None:
    """On a Jetson the driver's library knows no power."""
    found = find_sensor(UUID, jetson)
    assert found is not None
    assert "VDD_GPU" == found.name


def meter(*watts: float | None, joules: float | None = None) -> Sensor:
    """A sensor that follows a script; `joules` None does not count."""
    readings: Iterator[float | None] = iter(watts)
    return Sensor("script", lambda: next(readings, None), lambda: joules)


def read(sensor: Sensor, *at_s: float) -> PowerCollector:
    """A collector whose thread has not run: readings are taken at these moments."""
    times = iter(at_s)
    collector = PowerCollector(sensor, clock=lambda: next(times))
    collector.close()
    for _ in at_s:
        collector.add_reading()
    return collector


def energy(collector: PowerCollector) -> float:
    _, family = collector.collect()
    (sample,) = family.samples
    assert {"sensor": "script"} == sample.labels
    return float(sample.value)


def test_energy_is_power_over_time() -> None:
    """Between two readings it is the mean of both, for as long as that was."""
    assert 10.0 * 2 + 15.0 * 1 == energy(read(meter(10.0, 10.0, 20.0), 0.0, 2.0, 3.0))


def test_energy_that_nobody_measured_is_not_guessed() -> None:
    """A gap in the readings adds nothing."""
    assert 10.0 == energy(read(meter(10.0, 10.0, None, 50.0, None), 0.0, 1.0, 2.0, 3.0))


def test_a_sensor_that_counts_is_believed() -> None:
    """The driver's own count of energy is shown as it is."""
    collector = PowerCollector(meter(5.0, joules=1234.5))
    power, counted = collector.collect()

    assert [5.0] == [sample.value for sample in power.samples]
    assert [("sage_fed_energy_joules_total", 1234.5)] == [
        (sample.name, sample.value) for sample in counted.samples
    ]
