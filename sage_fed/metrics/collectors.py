"""What recent steps say about speed: device time per token, and bytes read per second.

Owns a sliding window of each tier's steps. Written by the event loop, read by the scraping
thread, under a lock that is held for one append or one copy.

A step that both prefills and decodes is split: least squares over the window say what a token of
each phase costs (seconds = p x prefill tokens + d x decode tokens), and each mixed step's time is
divided in the proportion of its own tokens at those costs. So the phases' times add up to the
device's, whatever the mix, and where no step is mixed they are plain means.

What is read off at the moment of a scrape: queues, ages, memory, ratios.

Runs in the scraping thread, so what it reads must be immutable values that their owners swap
whole. A snapshot that raises fails the scrape, visibly.

What the GPU draws, where anything says so: the driver (NVML), or a board's own sensors (hwmon).

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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sage_fed.core import TIER_ROLES, UATP_PER_ATP, Phase, RunningJob, Tier, TierLoad
from sage_fed.metrics.series import PREFIX, TIERS
from sage_fed.steps import StepKind, StepReport

_WINDOW = 512
"""Reports that a figure looks back on, for each tier: some seconds of busy traffic."""

MIN_RATIO_TOKENS = 64
"""Tokens of a phase on each tier, among those, below which there is no ratio."""


class LiveRates:
    """Device seconds per token, by tier and phase, over the recent past."""

    def __init__(self) -> None:
        self._reports: dict[Tier, deque[StepReport]] = {
            tier: deque(maxlen=_WINDOW) for tier in TIER_ROLES
        }
        self._lock = threading.Lock()

    def add(self, report: StepReport) -> None:
        """Takes a report's steps in."""
        if report.out_of_memory or not report.num_steps:
            return
        with self._lock:
            self._reports[report.tier].append(report)

    def ratio_tokens(self) -> Mapping[Phase, int]:
        """Tokens that each phase's ratio rests on: those of the tier that had fewer."""
        recent = {tier: self._recent(tier) for tier in TIER_ROLES}
        return {
            Phase.PREFILL: min(sum(r.num_prefill_tokens for r in of) for of in recent.values()),
            Phase.DECODE: min(sum(r.num_decode_tokens for r in of) for of in recent.values()),
        }

    def seconds_per_token(self, tier: Tier) -> Mapping[Phase, float]:
        """Device seconds per token of the phases that the tier has had traffic in."""
        reports = self._recent(tier)
        prefill_s, decode_s = _phase_seconds(reports)
        rates: dict[Phase, float] = {}
        for phase, seconds, tokens in (
            (Phase.PREFILL, prefill_s, sum(r.num_prefill_tokens for r in reports)),
            (Phase.DECODE, decode_s, sum(r.num_decode_tokens for r in reports)),
        ):
            if seconds > 0 and tokens:
                rates[phase] = seconds / tokens
        return rates

    def cost_ratios(self) -> Mapping[Phase, float]:
        """Strategic over tactical device time per token, of phases in which both had traffic.

        Not of those in which a tier had less than `MIN_RATIO_TOKENS`: that is no figure yet.
        """
        tokens = self.ratio_tokens()
        strategic = self.seconds_per_token(Tier.STRATEGIC)
        tactical = self.seconds_per_token(Tier.TACTICAL)
        return {
            phase: strategic[phase] / tactical[phase]
            for phase in strategic.keys() & tactical
            if tokens[phase] >= MIN_RATIO_TOKENS
        }

    def decode_bytes_per_second(
        self, tier: Tier, *, step_bytes: int, kv_token_bytes: int
    ) -> float | None:
        """Bytes read by recent steps that only decode, over their time; None without any.

        A step reads all the weights, and the keys and values of every token it attends to.
        """
        steps = [r for r in self._recent(tier) if r.kind is StepKind.DECODE]
        seconds = sum(r.elapsed_s for r in steps)
        num_bytes = sum(
            r.num_steps * step_bytes + r.num_context_tokens * kv_token_bytes for r in steps
        )
        return num_bytes / seconds if seconds > 0 else None

    def _recent(self, tier: Tier) -> tuple[StepReport, ...]:
        with self._lock:
            return tuple(self._reports[tier])


def _phase_seconds(reports: Iterable[StepReport]) -> tuple[float, float]:
    """Divide the reports' time between prefill and decode."""
    reports = tuple(reports)
    prefill_cost, decode_cost = _token_costs(reports)
    prefill_s = decode_s = 0.0
    for report in reports:
        prefill = report.num_prefill_tokens * prefill_cost
        decode = report.num_decode_tokens * decode_cost
        if report.kind is not StepKind.MIXED or prefill + decode <= 0:
            prefill, decode = float(report.num_prefill_tokens), float(report.num_decode_tokens)
        if prefill + decode > 0:
            prefill_s += report.elapsed_s * prefill / (prefill + decode)
            decode_s += report.elapsed_s * decode / (prefill + decode)
    return prefill_s, decode_s


def _token_costs(reports: Iterable[StepReport]) -> tuple[float, float]:
    """Least squares, weighted by 1 / time: a long step must not drown the short ones.

    Equal costs, which is a division by tokens, where the steps are all of one mix.
    """
    pp = pd = dd = p = d = 0.0
    for report in reports:
        if report.elapsed_s <= 0:
            continue
        weight = 1 / report.elapsed_s
        prefill, decode = report.num_prefill_tokens, report.num_decode_tokens
        pp += weight * prefill * prefill
        pd += weight * prefill * decode
        dd += weight * decode * decode
        p += prefill
        d += decode
    determinant = pp * dd - pd * pd
    if determinant <= 1e-9 * pp * dd:
        return 1.0, 1.0
    prefill_cost = (p * dd - d * pd) / determinant
    decode_cost = (d * pp - p * pd) / determinant
    if prefill_cost < 0:
        return 0.0, 1.0
    if decode_cost < 0:
        return 1.0, 0.0
    return prefill_cost, decode_cost


_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The daemon at one instant: each tier's load, and every job that holds ATP."""

    loads: Mapping[Tier, TierLoad] = field(default_factory=dict)
    jobs: tuple[RunningJob, ...] = ()


class ScrapeCollector(Collector):
    """Gauges computed from a snapshot, the live rates and the kernel's memory figures.

    `ratios` holds the cost ratios of the rate cards by source, `read_bytes` what each loaded
    model reads: of weights in a decode step, and of the KV cache for a token that it attends to.
    Both are replaced whole, never changed. `memory_bytes_per_s` is the device's measured read
    bandwidth, 0 until it has been measured.
    """

    def __init__(self, live: LiveRates) -> None:
        self.snapshot: Callable[[], Snapshot] = Snapshot
        self.ratios: Mapping[str, Mapping[Phase, float]] = {}
        self.read_bytes: Mapping[Tier, tuple[int, int]] = {}
        self.memory_bytes_per_s = 0.0
        self._live = live

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing: else registering would already ask for a snapshot."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All families, in a stable order."""
        now = self.snapshot()
        yield from _queues(now)
        yield from _ages(now)
        yield from _money(now)
        yield self._cost_ratio()
        yield _family(
            "cost_ratio_tokens",
            "Recent tokens that the live cost ratio rests on: of the tier that had fewer.",
            ("phase",),
            [((phase.value,), count) for phase, count in self._live.ratio_tokens().items()],
        )
        yield from self._bandwidth()
        available = available_memory_bytes()
        if available is not None:
            yield _family(
                "memory_available_bytes",
                "Memory that the kernel could give out.",
                (),
                [((), available)],
            )

    def _cost_ratio(self) -> GaugeMetricFamily:
        samples: list[tuple[tuple[str, ...], float]] = [
            ((source, phase.value), ratio)
            for source, ratios in self.ratios.items()
            for phase, ratio in ratios.items()
        ]
        live = self._live.cost_ratios()
        samples += [(("live", phase.value), live[phase]) for phase in Phase if phase in live]
        return _family(
            "cost_ratio",
            "Strategic over tactical cost of a token: priced, and live from device time of each "
            f"tier's recent steps, where both had at least {MIN_RATIO_TOKENS} tokens of the phase.",
            ("source", "phase"),
            samples,
        )

    def _bandwidth(self) -> Iterator[GaugeMetricFamily]:
        used: list[tuple[tuple[str, ...], float]] = []
        for tier, (step_bytes, kv_token_bytes) in self.read_bytes.items():
            rate = self._live.decode_bytes_per_second(
                tier, step_bytes=step_bytes, kv_token_bytes=kv_token_bytes
            )
            used.append(((tier.name,), rate or 0.0))
        yield _family(
            "decode_bytes_per_second",
            "Weights and KV cache read per second of device time in recent decode steps.",
            ("tier",),
            used,
        )
        if not self.memory_bytes_per_s:
            return
        yield _family(
            "memory_bandwidth_bytes_per_second",
            "Read bandwidth of the device, measured at start over far more than its caches.",
            (),
            [((), self.memory_bytes_per_s)],
        )
        yield _family(
            "decode_bandwidth_ratio",
            "decode_bytes_per_second over the measured bandwidth; above 1 where caches hold "
            "what is read.",
            ("tier",),
            [(labels, value / self.memory_bytes_per_s) for labels, value in used],
        )


def available_memory_bytes(meminfo: Path = _MEMINFO) -> int | None:
    """MemAvailable of the kernel; None where there is no such file.

    On unified memory this, not the device's "free", is what a model can still get.
    """
    try:
        text = meminfo.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _queues(now: Snapshot) -> Iterator[GaugeMetricFamily]:
    loads = [(tier.name, now.loads.get(tier)) for tier in TIER_ROLES]
    yield _family(
        "requests_running",
        "Jobs in the running batch.",
        ("tier",),
        [((tier,), load.running if load else 0) for tier, load in loads],
    )
    yield _family(
        "requests_waiting",
        "Jobs that wait for a place in the batch.",
        ("tier",),
        [((tier,), load.waiting if load else 0) for tier, load in loads],
    )
    yield _family(
        "requests_waiting_limit",
        "Waiting jobs from which on new ones are refused.",
        ("tier",),
        [((tier,), load.waiting_limit if load else 0) for tier, load in loads],
    )
    yield _family(
        "kv_cache_tokens",
        "Tokens that the KV cache holds room for: used by jobs, cached for later ones, or free.",
        ("tier", "state"),
        [
            ((tier, state), tokens)
            for tier, load in loads
            for state, tokens in (
                ("used", load.kv_tokens_used if load else 0),
                ("cached", load.kv_tokens_cached if load else 0),
                ("free", _kv_tokens_free(load) if load else 0),
            )
        ],
    )


def _kv_tokens_free(load: TierLoad) -> int:
    return load.kv_tokens_total - load.kv_tokens_used - load.kv_tokens_cached


def _ages(now: Snapshot) -> Iterator[GaugeMetricFamily]:
    for name, text, has_output in (
        ("running", "Age of the oldest job that has made a token.", True),
        ("waiting", "Age of the oldest job that waits for its first token.", False),
    ):
        ages = dict.fromkeys(TIERS, 0.0)
        for job in now.jobs:
            if bool(job.output_tokens) is has_output:
                ages[job.tier.name] = max(ages[job.tier.name], job.age_s)
        yield _family(
            f"oldest_{name}_age_seconds", text, ("tier",), [((t,), age) for t, age in ages.items()]
        )


def _money(now: Snapshot) -> Iterator[GaugeMetricFamily]:
    held = dict.fromkeys(TIERS, 0)
    holds = dict.fromkeys(TIERS, 0)
    for job in now.jobs:
        held[job.tier.name] += job.held_uatp
        holds[job.tier.name] += 1
    yield _family(
        "atp_held",
        "ATP held now for jobs that have not ended.",
        ("tier",),
        [((tier,), uatp / UATP_PER_ATP) for tier, uatp in held.items()],
    )
    yield _family(
        "ledger_holds_open",
        "Holds that have neither been settled nor voided.",
        ("tier",),
        [((tier,), number) for tier, number in holds.items()],
    )


def _family(
    name: str,
    text: str,
    labels: tuple[str, ...],
    samples: list[tuple[tuple[str, ...], float]],
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


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
