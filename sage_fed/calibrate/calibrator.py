"""One calibration from beginning to end: measure, derive, write, and perhaps adopt.

Owns that there is one at a time. Whoever closes the generator ends it, at the next step of the
device, and leaves nothing behind: no KV block, no file. Balances are never touched: what a
calibration runs is nobody's job.
Fails with `CalibrationRunning`, and as `Executor.probe` and `save_card` do.

What the machine says of itself: versions, clocks, power mode, load. Every reading is optional.

Owns where each reading is found. A file or a tool that is not there leaves its line out, and
nothing of it decides a price. Blocks for as long as the slowest tool, at most `_TOOL_S` each.

Writes a card and its report where `RateCard.load` finds the card.

A card appears whole or not at all, and never in the place of another. Fails with `ConfigError`
where the directory cannot be written.

A measured card as a page that a person reads: Markdown, tables first.

Pure. Says what was measured and what follows; the card itself is the file beside it.

A measured card as a picture: device time per token over the batch, both tiers, as SVG.

Pure, and drawn by hand: two lines on logarithmic axes are not worth a plotting library.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import importlib.metadata
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import MappingProxyType
from xml.sax.saxutils import escape

from sage_fed.calibrate.measurement import (
    FULL,
    QUICK,
    Measurement,
    Pace,
    median_error,
    prices,
    reference_point,
    spread_of,
    warning_of,
)
from sage_fed.cards import Fingerprint, Measured, Rate, RateCard, available_cards, card_text
from sage_fed.core import (
    TIER_ROLES,
    CalibrationEvent,
    CalibrationProgress,
    CalibrationResult,
    MeasuredPoint,
    ModelInfo,
    Phase,
    Tier,
    TierState,
)
from sage_fed.device import Executor
from sage_fed.errors import CalibrationRunning, ConfigError, TierUnavailable
from sage_fed.trusted_files import make_directory


@dataclass(frozen=True, slots=True)
class Site:
    """Where the daemon runs, as far as a calibration cannot read it itself.

    `cuda_index` is None on a CPU; `settings` are those of the engines, by name.
    """

    device: str
    threads: int
    version: str
    cuda_index: int | None
    read_bandwidth_bytes_per_s: float
    settings: Mapping[str, str]
    cards_dir: Path


class Calibrator:
    """Measures both tiers of one executor; `adopt` puts a card in force."""

    def __init__(self, executor: Executor, site: Site, adopt: Callable[[RateCard], None]) -> None:
        self._executor = executor
        self._site = site
        self._adopt = adopt
        self._running = False

    async def run(
        self, *, quick: bool, adopt: bool, pace: Pace | None = None
    ) -> AsyncGenerator[CalibrationEvent, None]:
        """Calibrate: progress, then the result. `pace` overrides what `quick` chooses."""
        if self._running:
            raise CalibrationRunning("a calibration runs already; wait for it or cancel it")
        self._running = True
        try:
            models = self._models()
            # Now, and not when minutes of measuring would be lost.
            await asyncio.to_thread(prepare_directory, self._site.cards_dir)
            limits = {tier: self._executor.limits(tier) for tier in TIER_ROLES}
            measurement = Measurement(
                self._executor,
                {tier: known for tier, known in limits.items() if known is not None},
                pace or (QUICK if quick else FULL),
            )
            async for progress in measurement.run():
                yield progress
            yield CalibrationProgress("writing", 0.99, "", measurement.elapsed_s)
            conditions = await asyncio.to_thread(read_conditions, cuda_index=self._site.cuda_index)
            card = _card(self._site, models, measurement, conditions)
            saving = asyncio.create_task(asyncio.to_thread(self._save, card, measurement))
            try:
                result, named = await asyncio.shield(saving)
            except asyncio.CancelledError:
                # A thread cannot be stopped: what it writes is deleted when it has.
                saving.add_done_callback(_discard)
                raise
            if adopt:
                self._adopt(named)
        finally:
            self._running = False
        yield replace(result, adopted=adopt)

    def _models(self) -> dict[Tier, ModelInfo]:
        models: dict[Tier, ModelInfo] = {}
        for tier in TIER_ROLES:
            status = self._executor.status(tier)
            if status.state is not TierState.READY or status.info is None:
                raise TierUnavailable(
                    f"the {tier.name} tier is {status.state.value}; both tiers are measured"
                )
            models[tier] = status.info
        return models

    def _save(self, card: RateCard, measurement: Measurement) -> tuple[CalibrationResult, RateCard]:
        """Write the card and its report; the card is handed back as it was read. Blocks."""
        left_out = measurement.left_out

        def extras(named: RateCard) -> dict[str, str]:
            picture = f"{named.version}.svg"
            return {".md": report_of(named, left_out, picture), ".svg": plot_of(named)}

        named, path = save_card(card, self._site.cards_dir, extras)
        assert named.measured is not None
        written = extras(named)
        result = CalibrationResult(
            version=named.version,
            path=str(path.absolute()),
            card=path.read_text(encoding="utf-8"),
            report=written[".md"],
            plot=written[".svg"],
            cost_ratio=named.cost_ratio(),
            cost_ratio_spread=named.measured.spread,
            took_s=named.measured.took_s,
            adopted=False,
            points=named.measured.points,
        )
        return result, RateCard.load(path)


def _discard(saving: asyncio.Task[tuple[CalibrationResult, RateCard]]) -> None:
    """Delete what was written for somebody who left meanwhile."""
    if not saving.cancelled() and saving.exception() is None:
        delete_card(Path(saving.result()[0].path))


def _card(
    site: Site,
    models: Mapping[Tier, ModelInfo],
    measurement: Measurement,
    conditions: Mapping[str, str],
) -> RateCard:
    """Return the card, under the version that it would like to have."""
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    points, ratios = measurement.points, measurement.ratios
    tactical = reference_point(point for point in points if point.tier == Tier.TACTICAL)
    bandwidth = site.read_bandwidth_bytes_per_s
    kv_read_s = {tier: models[tier].kv_token_bytes / bandwidth for tier in TIER_ROLES}
    names = " and ".join(
        f"{models[tier].name} ({models[tier].precision}, {models[tier].kernels})"
        for tier in TIER_ROLES
    )
    lines = prices(points, median(ratios), kv_read_s, spread_of(ratios))
    precisions = "-".join(dict.fromkeys(models[tier].precision for tier in TIER_ROLES))
    return RateCard(
        version=stem_of(site.device, precisions, f"{now:%Y-%m-%d}"),
        title=f"{names} on {site.device}",
        created=now.date(),
        device=site.device,
        software=f"sage-fed {site.version}, torch {conditions.get('torch', 'unknown')}",
        provenance=(
            f"Measured by the daemon on its own engines in {measurement.elapsed_s:.0f} s, "
            f"{len(ratios)} rounds of both tiers in turns; spread of the ratio "
            f"{spread_of(ratios):.1%}. 1 ATP is one decode step of one tactical sequence with "
            f"{tactical.context_tokens} tokens of context; every price is marginal device time."
        ),
        lines=lines,
        fingerprint=Fingerprint.of(site.device, site.threads, site.version, models),
        measured=Measured(
            at=now,
            took_s=round(measurement.elapsed_s, 1),
            token_s=tactical.step_s,
            cost_ratio=median(ratios),
            spread=spread_of(ratios),
            error=median_error(ratios),
            rounds=len(ratios),
            read_bandwidth_bytes_per_s=bandwidth,
            load_s=MappingProxyType({tier: models[tier].load_s for tier in TIER_ROLES}),
            conditions=MappingProxyType({**site.settings, **conditions}),
            points=points,
            warning=warning_of(lines),
        ),
    )


_TOOL_S = 5.0
_PACKAGES = ("sage-fed", "torch", "transformers", "triton")
_FILES = {
    "cpu governor": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    "cpu clock (kHz)": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq",
    "cpu clock, highest (kHz)": "/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq",
    "power profile": "/sys/firmware/acpi/platform_profile",
    "huge pages": "/sys/kernel/mm/transparent_hugepage/enabled",
    "nvidia driver": "/proc/driver/nvidia/version",
    "jetson release": "/etc/nv_tegra_release",
    "board": "/proc/device-tree/model",
}
_GPU_FIELDS = (
    "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit",
    "temperature.gpu",
)  # fmt: skip


def read_conditions(*, cuda_index: int | None) -> dict[str, str]:
    """Return the readings by name; `cuda_index` None is a device that is no GPU."""
    readings = {
        "os": platform.platform(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    for package in _PACKAGES:
        try:
            readings[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name, path in _FILES.items():
        readings[name] = _file(path)
    readings["cpu clock (MHz)"] = _cpu_mhz()
    if cuda_index is not None:
        query = f"--query-gpu={','.join(_GPU_FIELDS)}"
        values = _tool("nvidia-smi", f"--id={cuda_index}", query, "--format=csv,noheader")
        for field, value in zip(_GPU_FIELDS, values.split(","), strict=False):
            readings[f"gpu {field}"] = value.strip()
        readings["power mode"] = _tool("nvpmodel", "-q").replace("\n", " ")
    return {name: value for name, value in readings.items() if value}


def _cpu_mhz() -> str:
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "cpu MHz":
            return value.strip()
    return ""


def _file(path: str) -> str:
    """The file's first line; "" where it cannot be read."""
    lines = _lines(path)
    return lines[0].strip("\0 \t") if lines else ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _tool(name: str, *arguments: str) -> str:
    """A tool's output; "" where it is not there, fails or does not come back."""
    path = shutil.which(name)
    if path is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 - a constant command
            [path, *arguments], capture_output=True, text=True, timeout=_TOOL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


_LONGEST_STEM = 48
_FRESH = ".card-"
_BESIDE = (".md", ".svg")


def stem_of(device: str, precisions: str, day: str) -> str:
    """Return what a version begins with: device, precisions and day, in a card's alphabet."""
    tail = f"-{_slug(precisions)}-{day}"
    name = _slug(device)[: _LONGEST_STEM - len(tail)].strip("-.")
    return f"{name or 'device'}{tail}"


def prepare_directory(directory: Path) -> None:
    """Create the directory and see that it can be written; `ConfigError` where it cannot."""
    make_directory("cards_dir", directory)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=_FRESH):
            pass
    except OSError as error:
        raise ConfigError(f"cards_dir: cannot write into {directory}: {error.strerror}") from error


def delete_card(path: Path) -> None:
    """Delete a card and what stands beside it."""
    for suffix in (path.suffix, *_BESIDE):
        path.with_suffix(suffix).unlink(missing_ok=True)


def save_card(
    card: RateCard, directory: Path, extras: Callable[[RateCard], dict[str, str]]
) -> tuple[RateCard, Path]:
    """Write the card under its version, or that with the first free number behind it.

    `extras` gives the texts of files beside it, by suffix (of `_BESIDE`). Returns the card as it
    was named. The directory is there (`prepare_directory`).
    """
    try:
        taken = set(available_cards(directory))
        numbered = (f"{card.version}-{number}" for number in itertools.count(2))
        for version in itertools.chain([card.version], numbered):
            if version in taken:
                continue
            named = replace(card, version=version)
            path = directory / f"{version}.toml"
            if _create(path, card_text(named)):
                for suffix, text in extras(named).items():
                    assert suffix in _BESIDE
                    path.with_suffix(suffix).write_text(text, encoding="utf-8")
                return named, path
    except OSError as error:
        raise ConfigError(f"cards_dir: cannot write into {directory}: {error.strerror}") from error
    raise AssertionError("there is always a free number")


def _create(path: Path, text: str) -> bool:
    """Create the file with its whole text; False where it exists."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=_FRESH
    ) as fresh:
        fresh.write(text)
        fresh.flush()
        os.fsync(fresh.fileno())
        try:
            # A link, not a rename: that would replace what another calibration just wrote.
            os.link(fresh.name, path)
        except FileExistsError:
            return False
    return True


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def report_of(card: RateCard, left_out: Sequence[str], plot: str) -> str:
    """Return the page; `plot` is the picture's file name, `left_out` points without a figure."""
    measured, fingerprint = card.measured, card.fingerprint
    assert measured is not None, "a report is of a measured card"
    assert fingerprint is not None, "a report is of a measured card"
    lines = [
        f"# Rate card {card.version}",
        "",
        f"{card.title}, measured {measured.at:%Y-%m-%d %H:%M} UTC in {measured.took_s:.0f} s.",
        "",
        (
            f"A strategic output token costs **{card.cost_ratio():.3f}** tactical ones: "
            f"the median of {measured.rounds} paired rounds, spread ±{measured.spread:.1%} "
            f"(half of the interquartile range), standard error ±{measured.error:.2%}."
        ),
        f"1 ATP is {measured.token_s * 1e3:.4g} ms of device time.",
        *(("", f"**Warning**: {measured.warning}.") if measured.warning else ()),
        "",
        f"![step times]({plot})",
        "",
        "## Prices (ATP per token)",
        "",
        *_table(
            ("phase", *(name for tier in TIER_ROLES for name in (tier.name, "spread")), "ratio"),
            [
                (
                    phase.value,
                    *(cell for tier in TIER_ROLES for cell in _price(card.lines[tier][phase])),
                    f"{card.cost_ratio(phase):.2f}",
                )
                for phase in Phase
            ],
        ),
        "",
        "## What was timed",
        "",
        (
            "Alone: the tier's steps one after the other. "
            "Co-resident: a decode step of the other tier before each."
        ),
        (
            "The share is of the measured read bandwidth, "
            f"{measured.read_bandwidth_bytes_per_s / 1e9:.1f} GB/s, weights and KV cache together."
        ),
        "",
        *_table(POINT_HEADINGS, point_rows(card)),
    ]
    if left_out:
        lines += ["", f"Left out, for want of device memory: {', '.join(left_out)}."]
    lines += ["", "## Batches", "", *_table(BATCH_HEADINGS, batch_rows(measured.points))]
    lines += [
        "",
        "## Conditions",
        "",
        *_table(
            ("what", "reading"),
            [
                ("device", fingerprint.device),
                ("threads", str(fingerprint.threads)),
                ("fingerprint", fingerprint.digest),
                *((f"{tier.name} load", f"{measured.load_s[tier]:.2f} s") for tier in TIER_ROLES),
                *measured.conditions.items(),
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


POINT_HEADINGS = (
    "tier", "phase", "batch", "context", "tokens", "step", "tok/s", "share", "co-resident",
    "spread", "rounds",
)  # fmt: skip

BATCH_HEADINGS = ("batch", "tactical tok/s", "strategic tok/s", "ratio")


def point_rows(card: RateCard) -> list[tuple[str, ...]]:
    """Return a row for each point; the columns are `POINT_HEADINGS`."""
    assert card.measured is not None
    return [
        (
            point.tier.name,
            point.phase.value,
            str(point.batch),
            str(point.context_tokens),
            str(point.tokens),
            f"{point.step_s * 1e3:.3f} ms",
            f"{1 / point.token_s:,.0f}",
            f"{_share(card, point):.0%}",
            "" if point.co_resident_s is None else f"{point.co_resident_s / point.step_s:.2f}x",
            spread_text(point.spread),
            str(point.rounds),
        )
        for point in card.measured.points
    ]


def spread_text(spread: float | None) -> str:
    """For a person; one round has none."""
    return "-" if spread is None else f"±{spread:.1%}"


def batch_rows(points: Iterable[MeasuredPoint]) -> list[tuple[str, ...]]:
    """Return a row for each batch size that both tiers decoded at the short context."""
    by_tier: dict[Tier, dict[int, MeasuredPoint]] = {tier: {} for tier in TIER_ROLES}
    for point in points:
        if point.phase is Phase.DECODE:
            known = by_tier[point.tier].get(point.batch)
            if known is None or point.context_tokens < known.context_tokens:
                by_tier[point.tier][point.batch] = point
    tactical, strategic = by_tier[Tier.TACTICAL], by_tier[Tier.STRATEGIC]
    return [
        (
            str(batch),
            f"{1 / tactical[batch].token_s:,.0f}",
            f"{1 / strategic[batch].token_s:,.0f}",
            f"{strategic[batch].token_s / tactical[batch].token_s:.2f}",
        )
        for batch in sorted(tactical.keys() & strategic.keys())
    ]


def _price(rate: Rate) -> tuple[str, str]:
    return f"{rate.uatp / 1e6:.6f}", spread_text(rate.spread)


def _share(card: RateCard, point: MeasuredPoint) -> float:
    assert card.measured is not None
    assert card.fingerprint is not None
    model = card.fingerprint.models[point.tier]
    attended = point.batch * (point.context_tokens + point.tokens)
    num_bytes = model.step_bytes + attended * model.kv_token_bytes
    return num_bytes / point.step_s / card.measured.read_bandwidth_bytes_per_s


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]


_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 210, 50, 50
_COLOURS = {Tier.TACTICAL: "#1f77b4", Tier.STRATEGIC: "#d62728"}

Curve = list[tuple[float, float]]


def plot_of(card: RateCard) -> str:
    """Return the picture; contexts of one tier share its colour, the longer one is dashed."""
    assert card.measured is not None, "a plot is of a measured card"
    curves = _curves(card.measured.points)
    across = _Axis([x for _, curve in curves for x, _ in curve], _LEFT, _WIDTH - _RIGHT)
    up = _Axis([y for _, curve in curves for _, y in curve], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _words(_LEFT, 18, card.title.removesuffix(f" on {card.device}"), size=11),
        _words(_LEFT, 36, f"{card.device}: {card.cost_ratio():.2f} : 1 at batch 1"),
        _words(_WIDTH / 2 - 60, _HEIGHT - 12, "sequences in the batch"),
        (
            f'<g transform="rotate(-90 16 {_HEIGHT / 2})">'
            f"{_words(-40, _HEIGHT / 2, 'device ms per output token')}</g>"
        ),
        *_grid(across, up),
    ]
    for index, ((tier, context), curve) in enumerate(curves):
        parts += _line(tier, context, [(across.at(x), up.at(y)) for x, y in curve], index, curves)
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis:
    """A logarithmic axis from the values' least to their greatest, `begin` to `end` on paper."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            self.low, self.high = self.low / 2, self.high * 2
        self._begin, self._end = begin, end

    def at(self, value: float) -> float:
        """Where a value is on paper."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self._begin + share * (self._end - self._begin)

    def marks(self, base: int) -> list[float]:
        """Round values inside the axis: powers of 2, or 1, 2 and 5 times powers of 10."""
        steps = (1,) if base == 2 else (1, 2, 5)
        first = math.floor(math.log(self.low, base))
        last = math.ceil(math.log(self.high, base))
        values = (step * float(base) ** power for power in range(first, last + 1) for step in steps)
        return [value for value in values if self.low <= value <= self.high]


def _curves(points: Iterable[MeasuredPoint]) -> list[tuple[tuple[Tier, int], Curve]]:
    curves: dict[tuple[Tier, int], Curve] = {}
    for point in points:
        if point.phase is Phase.DECODE:
            curve = curves.setdefault((point.tier, point.context_tokens), [])
            curve.append((float(point.batch), point.token_s * 1e3))
    return [(key, sorted(curve)) for key, curve in curves.items()]


def _grid(across: _Axis, up: _Axis) -> list[str]:
    parts = []
    for value in across.marks(2):
        x = across.at(value)
        parts.append(_stroke(x, _TOP, x, _HEIGHT - _BOTTOM))
        parts.append(_words(x - 6, _HEIGHT - _BOTTOM + 16, f"{value:g}"))
    for value in up.marks(10):
        y = up.at(value)
        parts.append(_stroke(_LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_words(_LEFT - 40, y + 4, f"{value:g}"))
    return parts


def _line(
    tier: Tier,
    context: int,
    places: Curve,
    index: int,
    curves: Sequence[tuple[tuple[Tier, int], Curve]],
) -> list[str]:
    shortest = min(other for (owner, other), _ in curves if owner is tier)
    dash = "" if context == shortest else ' stroke-dasharray="6 4"'
    colour = _COLOURS[tier]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    key_x, key_y = _WIDTH - _RIGHT + 15, _TOP + 10 + 22 * index
    return [
        f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places),
        (
            f'<line x1="{key_x}" y1="{key_y}" x2="{key_x + 24}" y2="{key_y}" stroke="{colour}" '
            f'stroke-width="2"{dash}/>'
        ),
        _words(key_x + 30, key_y + 4, f"{tier.name}, context {context}"),
    ]


def _stroke(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _words(x: float, y: float, text: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(text)}</text>'
