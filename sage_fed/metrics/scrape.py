"""What is read off at the moment of a scrape: queues, ages, memory, ratios.

Runs in the scraping thread, so what it reads must be immutable values that their owners swap
whole. A snapshot that raises fails the scrape, visibly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from sage_fed.core import TIER_ROLES, UATP_PER_ATP, Phase, RunningJob, Tier, TierLoad
from sage_fed.metrics.live import MIN_RATIO_TOKENS, LiveRates
from sage_fed.metrics.series import PREFIX, TIERS

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
