"""Series that are computed when a page is scraped: load, ages, memory, speed, cost ratio, power.

Collectors run in the scraping thread, so what they read is immutable, swapped whole by its owner,
or under a lock. A snapshot that raises fails the scrape, visibly. Every reading of a sensor is
optional: one that stops answering leaves a gap, and is no error.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sage_fed.core import UATP_PER_ATP, Phase, RunningJob, Tier, TierLoad, TierState
from sage_fed.metrics.series import PREFIX
from sage_fed.steps import StepKind, StepReport

_WINDOW = 512
"""Reports that a figure looks back on, for each tier: some seconds of busy traffic."""

MIN_RATIO_TOKENS = 64
"""Tokens of a phase on each tier, among those, below which there is no ratio."""

_MEMINFO = Path("/proc/meminfo")
_HWMON = Path("/sys/class/hwmon")
_POWERCAP = Path("/sys/class/powercap")
_POWER_INTERVAL_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The daemon at one instant: each tier's load, and every job that holds ATP."""

    loads: Mapping[Tier, TierLoad] = field(default_factory=dict)
    jobs: tuple[RunningJob, ...] = ()


class LiveRates:
    """Device seconds per token and bytes read per second, by tier, over the recent past.

    Owns a sliding window of each tier's steps. The event loop writes it and the scraping thread
    reads it, under a lock that is held for one append or one copy.

    A step that both prefills and decodes is split: least squares over the window say what a token
    of each phase costs (seconds = p x prefill tokens + d x decode tokens), and each mixed step's
    time is divided in the proportion of its own tokens at those costs. So the phases' times add up
    to the device's, whatever the mix, and where no step is mixed they are plain means.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._reports: dict[Tier, deque[StepReport]] = {
            tier: deque(maxlen=_WINDOW) for tier in tiers
        }
        self._undrafted: dict[Tier, deque[StepReport]] = {
            tier: deque(maxlen=_WINDOW) for tier in tiers
        }
        """Those without drafts: a row that verifies one is cheaper than a decoded token."""
        self._lock = threading.Lock()

    def add(self, report: StepReport) -> None:
        """Add a report's steps."""
        if report.out_of_memory or not report.num_steps:
            return
        with self._lock:
            self._reports[report.tier].append(report)
            if not report.num_draft_tokens and not report.num_verify_tokens:
                self._undrafted[report.tier].append(report)

    def seconds_per_token(self, tier: Tier) -> Mapping[Phase, float]:
        """Return device seconds per token of the phases that the tier has had traffic in."""
        reports = self._recent(tier, self._undrafted)
        seconds, tokens = _phase_seconds(reports), _phase_tokens(reports)
        return {
            phase: seconds[phase] / tokens[phase]
            for phase in tokens
            if seconds[phase] > 0 and tokens[phase]
        }

    def ratio_tokens(self) -> Mapping[Phase, int]:
        """Return the tokens that each phase's ratio rests on: those of the tier that had fewer."""
        low, high = (_phase_tokens(self._recent(tier, self._undrafted)) for tier in self._compared)
        return {phase: min(low[phase], high[phase]) for phase in low}

    def cost_ratios(self) -> Mapping[Phase, float]:
        """Return the deepest tier's device time per token over the lowest one's, by phase.

        Not of a phase in which one of them had less than `MIN_RATIO_TOKENS`.
        """
        tokens = self.ratio_tokens()
        low, high = (self.seconds_per_token(tier) for tier in self._compared)
        return {
            phase: high[phase] / low[phase]
            for phase in Phase
            if phase in low and phase in high and tokens[phase] >= MIN_RATIO_TOKENS
        }

    def decode_bytes_per_second(
        self, tier: Tier, *, step_bytes: int, kv_token_bytes: int
    ) -> float | None:
        """Return bytes read by recent steps that only decode, over their time; None without any.

        A step reads all the weights, and the keys and values of every token it attends to.
        """
        steps = [r for r in self._recent(tier, self._reports) if r.kind is StepKind.DECODE]
        seconds = sum(r.elapsed_s for r in steps)
        num_bytes = sum(
            r.num_steps * step_bytes + r.num_context_tokens * kv_token_bytes for r in steps
        )
        return num_bytes / seconds if seconds > 0 else None

    @property
    def _compared(self) -> tuple[Tier, Tier]:
        return min(self._reports), max(self._reports)

    def _recent(
        self, tier: Tier, reports: Mapping[Tier, deque[StepReport]]
    ) -> tuple[StepReport, ...]:
        with self._lock:
            return tuple(reports[tier])


def _phase_tokens(reports: Sequence[StepReport]) -> Mapping[Phase, int]:
    return {
        Phase.PREFILL: sum(report.num_prefill_tokens for report in reports),
        Phase.DECODE: sum(report.num_decode_tokens for report in reports),
    }


def _phase_seconds(reports: Sequence[StepReport]) -> Mapping[Phase, float]:
    """Divide the reports' time between prefill and decode."""
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
    return {Phase.PREFILL: prefill_s, Phase.DECODE: decode_s}


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


# Name, help text, and the value of a tier's load.
_LOADS: tuple[tuple[str, str, Callable[[TierLoad], float]], ...] = (
    ("requests_running", "Jobs in the running batch.", lambda load: load.running),
    ("requests_waiting", "Jobs that wait for a place in the batch.", lambda load: load.waiting),
    (
        "speculation_active",
        "Sequences of the batch whose newest plan has a draft.",
        lambda load: load.speculating,
    ),
    (
        "requests_waiting_limit",
        "Waiting jobs from which on new ones are refused.",
        lambda load: load.waiting_limit,
    ),
)

# Name, help text, and the value of a tier's jobs.
_JOBS: tuple[tuple[str, str, Callable[[Sequence[RunningJob]], float]], ...] = (
    (
        "oldest_running_age_seconds",
        "Age of the oldest job that has made a token.",
        lambda jobs: max((job.age_s for job in jobs if job.output_tokens), default=0.0),
    ),
    (
        "oldest_waiting_age_seconds",
        "Age of the oldest job that waits for its first token.",
        lambda jobs: max((job.age_s for job in jobs if not job.output_tokens), default=0.0),
    ),
    (
        "atp_held",
        "ATP held now for jobs that have not ended.",
        lambda jobs: sum(job.held_uatp for job in jobs) / UATP_PER_ATP,
    ),
    ("ledger_holds_open", "Holds that have neither been settled nor voided.", len),
)


class ScrapeCollector(Collector):
    """Gauges computed from a snapshot, the live rates and the kernel's memory figures.

    `ratios` holds the cost ratios of the rate cards by source, `read_bytes` what each loaded
    model reads: of weights in a decode step, and of the KV cache for a token that it attends to.
    Both are replaced whole, never changed. `memory_bytes_per_s` is the device's measured read
    bandwidth, 0 until it has been measured.
    """

    def __init__(self, live: LiveRates, tiers: Sequence[Tier]) -> None:
        self.snapshot: Callable[[], Snapshot] = Snapshot
        self.ratios: Mapping[str, Mapping[Phase, float]] = {}
        self.read_bytes: Mapping[Tier, tuple[int, int]] = {}
        self.memory_bytes_per_s = 0.0
        self._live = live
        self._tiers = tuple(tiers)

    def describe(self) -> list[Metric]:
        """Return nothing: else registering would already ask for a snapshot."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all families, in a stable order."""
        yield from self._load(self.snapshot())
        live = self._live.cost_ratios()
        yield _family(
            "cost_ratio",
            "Strategic over tactical cost of a token: priced, and live from device time of each "
            "tier's recent steps without drafts, where both had at least "
            f"{MIN_RATIO_TOKENS} tokens "
            "of the phase.",
            {
                (source, phase.value): ratio
                for source, ratios in {**self.ratios, "live": live}.items()
                for phase, ratio in ratios.items()
            },
            labels=("source", "phase"),
        )
        yield _family(
            "cost_ratio_tokens",
            "Recent tokens that the live cost ratio rests on: of the tier that had fewer.",
            {(phase.value,): count for phase, count in self._live.ratio_tokens().items()},
            labels=("phase",),
        )
        yield from self._bandwidth()
        available = available_memory_bytes()
        if available is not None:
            text = "Memory that the kernel could give out."
            yield _family("memory_available_bytes", text, {(): available}, labels=())

    def _load(self, now: Snapshot) -> Iterator[Metric]:
        loads = {t: now.loads.get(t) or TierLoad(t, TierState.LOADING) for t in self._tiers}
        jobs = {tier: [job for job in now.jobs if job.tier == tier] for tier in self._tiers}
        for name, text, of_load in _LOADS:
            yield _family(name, text, {(t.name,): of_load(load) for t, load in loads.items()})
        kv_tokens: dict[tuple[str, ...], float] = {}
        for tier, load in loads.items():
            free = load.kv_tokens_total - load.kv_tokens_used - load.kv_tokens_cached
            kv_tokens[tier.name, "used"] = load.kv_tokens_used
            kv_tokens[tier.name, "cached"] = load.kv_tokens_cached
            kv_tokens[tier.name, "free"] = free
        yield _family(
            "kv_cache_tokens",
            "Tokens that the KV cache has room for: used by jobs, cached for later ones, or free.",
            kv_tokens,
            labels=("tier", "state"),
        )
        yield _family(
            "draft_acceptance_ratio",
            "Share of the draft tokens that were accepted lately, of those that were compared; "
            "what drafts are planned by. None of an origin before its first draft.",
            {
                (tier.name, measured.origin.value): measured.share
                for tier, load in loads.items()
                for measured in load.acceptance
            },
            labels=("tier", "origin"),
        )
        for name, text, of_jobs in _JOBS:
            yield _family(name, text, {(t.name,): of_jobs(own) for t, own in jobs.items()})

    def _bandwidth(self) -> Iterator[Metric]:
        used: dict[tuple[str, ...], float] = {
            (tier.name,): self._live.decode_bytes_per_second(
                tier, step_bytes=step_bytes, kv_token_bytes=kv_token_bytes
            )
            or 0.0
            for tier, (step_bytes, kv_token_bytes) in self.read_bytes.items()
        }
        yield _family(
            "decode_bytes_per_second",
            "Weights and KV cache read per second of device time in recent decode steps.",
            used,
        )
        measured = self.memory_bytes_per_s
        if not measured:
            return
        yield _family(
            "memory_bandwidth_bytes_per_second",
            "Read bandwidth of the device, measured at start over far more than its caches.",
            {(): measured},
            labels=(),
        )
        yield _family(
            "decode_bandwidth_ratio",
            "decode_bytes_per_second over the measured bandwidth; above 1 where caches hold "
            "what is read.",
            {labels: value / measured for labels, value in used.items()},
        )


def _family(
    name: str,
    text: str,
    samples: Mapping[tuple[str, ...], float],
    labels: tuple[str, ...] = ("tier",),
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, value)
    return family


def available_memory_bytes(meminfo: Path = _MEMINFO) -> int | None:
    """Return MemAvailable of the kernel; None where there is no such file.

    On unified memory this, not the device's "free", is what a model can still get.
    """
    try:
        text = meminfo.read_text()
    except OSError:
        return None
    figures = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    available = figures.get("MemAvailable")
    return None if available is None else int(available.split()[0]) * 1024


@dataclass(frozen=True, slots=True)
class Sensor:
    """What knows the GPU's power: the driver (NVML), or a sensor of the board (hwmon).

    A Jetson's NVML knows no power, but its board has a sensor on the GPU's rail. `watts` are now,
    `joules` since some time in the past; None where it does not say, or does not count.
    """

    name: str
    watts: Callable[[], float | None]
    joules: Callable[[], float | None] = lambda: None


def find_sensor(gpu_uuid: str, hwmon: Path = _HWMON) -> Sensor | None:
    """Return the sensor of a GPU: the driver's, else the board's, else None."""
    driver = driver_sensor(gpu_uuid)
    if driver is not None and driver.watts() is not None:
        return driver
    return next((rail for rail in rails(hwmon) if rail.watts() is not None), None)


def driver_sensor(gpu_uuid: str) -> Sensor | None:
    """Return the driver's reading; None without a driver, or one that does not know the GPU."""
    import pynvml  # noqa: PLC0415 - a start without a GPU does not pay for it

    def thousandths(read: Callable[[object], int]) -> float | None:
        try:
            return read(handle) / 1000
        except pynvml.NVMLError:
            return None

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid)
    except pynvml.NVMLError as error:
        _log.info("the driver says nothing of the GPU's power: %s", error)
        return None
    return Sensor(
        "nvml",
        lambda: thousandths(pynvml.nvmlDeviceGetPowerUsage),
        lambda: thousandths(pynvml.nvmlDeviceGetTotalEnergyConsumption),
    )


def rails(hwmon: Path) -> Iterator[Sensor]:
    """Yield the board's sensors whose label names a GPU, as `VDD_GPU` of a Jetson."""
    for label in sorted(hwmon.glob("hwmon*/in*_label")):
        with contextlib.suppress(OSError):
            text = label.read_text().strip()
            if "GPU" in text.upper():
                channel = label.name.removeprefix("in").removesuffix("_label")
                yield Sensor(text, functools.partial(_rail_watts, label.parent, channel))


def _rail_watts(directory: Path, channel: str) -> float | None:
    """Return the power now: as the sensor says, or its voltage times its current."""
    if (microwatts := _number(directory / f"power{channel}_input")) is not None:
        return microwatts / 1e6
    millivolts = _number(directory / f"in{channel}_input")
    milliamperes = _number(directory / f"curr{channel}_input")
    if millivolts is None or milliamperes is None:
        return None
    return millivolts * milliamperes / 1e6


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


def processor_sensor(powercap: Path = _POWERCAP) -> Sensor | None:
    """Return the processors' own count of energy (RAPL); None where it is not ours to read.

    It is of whole packages, whatever uses them, and most kernels show it to root alone.
    """
    packages = [
        zone
        for zone in sorted(powercap.glob("intel-rapl:*"))
        if _text(zone / "name").startswith("package") and _number(zone / "energy_uj") is not None
    ]
    if not packages:
        return None

    def joules() -> float | None:
        counts = [_number(zone / "energy_uj") for zone in packages]
        known = [count for count in counts if count is not None]
        return sum(known) / 1e6 if len(known) == len(counts) else None

    names = " and ".join(_text(zone / "name") for zone in packages)
    return Sensor(names, lambda: None, joules)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class _Reading:
    """The sensor and the device's work at one moment."""

    at_s: float
    watts: float | None
    joules: float | None
    busy_s: float

    def used_since(self, before: _Reading) -> float | None:
        """Return the joules since then: as counted, else by the mean of both powers."""
        if self.joules is not None and before.joules is not None:
            used = self.joules - before.joules
            return used if used >= 0 else None  # a counter that begins anew tells nothing
        if self.watts is None or before.watts is None:
            return None
        return (self.at_s - before.at_s) * (self.watts + before.watts) / 2


class PowerCollector(Collector):
    """The sensor's two series, and the power that the device draws while it works.

    A thread reads the sensor once a second, until `close`. It adds the energy up where the sensor
    does not count it, and takes each second's power for as much of it as the device worked:
    `busy_s` says for how many seconds it has, so far.
    """

    def __init__(
        self,
        sensor: Sensor,
        busy_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sensor = sensor
        self._busy_s = busy_s
        self._clock = clock
        self._joules = 0.0
        self._at_work_joules = 0.0
        self._at_work_s = 0.0
        self._last: _Reading | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_on, name="power", daemon=True)
        self._thread.start()

    @property
    def sensor_name(self) -> str:
        """The sensor's own name."""
        return self._sensor.name

    @property
    def watts_at_work(self) -> float | None:
        """Mean power over the time in which the device worked; None before it has for a second."""
        return self._at_work_joules / self._at_work_s if self._at_work_s >= 1.0 else None

    def describe(self) -> list[Metric]:
        """Return nothing: else registering would already read the sensor."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the power now, and the energy until now."""
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
        """Add the energy since the last reading; what was not measured is not guessed."""
        watts, joules = self._sensor.watts(), self._sensor.joules()
        if watts is None and joules is None:
            self._last = None
            return
        now = _Reading(self._clock(), watts, joules, self._busy_s())
        before, self._last = self._last, now
        if before is None or now.at_s <= before.at_s:
            return
        if (used := now.used_since(before)) is None:
            return
        self._joules += used
        took_s = now.at_s - before.at_s
        # A step counts when it has ended, also where it began before the last reading.
        share = min(max(now.busy_s - before.busy_s, 0.0) / took_s, 1.0)
        self._at_work_joules += share * used
        self._at_work_s += share * took_s

    def close(self) -> None:
        """Stop reading."""
        self._closed.set()
        self._thread.join(timeout=5)

    def _read_on(self) -> None:
        while not self._closed.wait(_POWER_INTERVAL_S):
            self.add_reading()
