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
    processor_sensor,
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


def read(sensor: Sensor, *at_s: float, busy_s: tuple[float, ...] = ()) -> PowerCollector:
    """A collector whose thread has not run: readings are taken at these moments."""
    times, busy = iter(at_s), iter(busy_s)
    collector = PowerCollector(sensor, lambda: next(busy, 0.0), clock=lambda: next(times))
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
    collector = read(meter(5.0, joules=1234.5))
    power, counted = collector.collect()

    assert [5.0] == [sample.value for sample in power.samples]
    assert [("sage_fed_energy_joules_total", 1234.5)] == [
        (sample.name, sample.value) for sample in counted.samples
    ]


def test_power_at_work_is_of_the_seconds_in_which_the_device_worked() -> None:
    """Half of one at 100 W, all of the next at 60 W, and nothing of an idle one at 10 W."""
    watts = (100.0, 100.0, 20.0, 0.0)
    collector = read(meter(*watts), 0.0, 1.0, 2.0, 3.0, busy_s=(5.0, 5.5, 6.5, 6.5))
    assert pytest.approx((0.5 * 100 + 1.0 * 60) / 1.5) == collector.watts_at_work


def test_what_the_sensor_counts_is_the_energy_at_work() -> None:
    """Of a driver that counts, two seconds of work; a step that ends late is no third one."""
    counted = iter((10.0, 110.0, 310.0))
    sensor = Sensor("script", lambda: 1.0, lambda: next(counted))
    collector = read(sensor, 0.0, 1.0, 2.0, busy_s=(0.0, 1.0, 9.0))
    assert 150.0 == collector.watts_at_work


def test_power_at_work_is_not_known_before_a_second_of_work() -> None:
    """A moment of work is no measurement."""
    collector = read(meter(10.0, 10.0), 0.0, 1.0, busy_s=(0.0, 0.9))
    assert collector.watts_at_work is None


def test_the_metrics_say_why_power_is_not_known() -> None:
    """Nothing is made up for a machine that does not tell."""
    watts, note = Metrics().power_at_work
    assert watts is None
    assert "no sensor" in note


def test_processors_count_their_energy_where_it_is_ours_to_read(tmp_path: Path) -> None:
    """Packages are added up, parts of one and a counter that cannot be read are left out."""
    assert processor_sensor(tmp_path) is None
    board(tmp_path, "intel-rapl:0", name="package-0", energy_uj="5000000")
    board(tmp_path, "intel-rapl:0:0", name="core", energy_uj="4000000")
    board(tmp_path, "intel-rapl:1", name="package-1", energy_uj="2500000")
    sensor = processor_sensor(tmp_path)
    assert sensor is not None
    assert ("package-0 and package-1", None, 7.5) == (sensor.name, sensor.watts(), sensor.joules())
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert sensor.joules() is None


def test_a_counter_that_begins_anew_adds_nothing() -> None:
    """Of three seconds at work the second is not known."""
    counted = iter((100.0, 150.0, 10.0, 60.0))
    sensor = Sensor("package-0", lambda: None, lambda: next(counted))
    collector = read(sensor, 0.0, 1.0, 2.0, 3.0, busy_s=(0.0, 1.0, 2.0, 3.0))
    assert 50.0 == collector.watts_at_work
