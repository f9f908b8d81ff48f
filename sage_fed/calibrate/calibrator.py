"""One calibration from beginning to end: measure, derive prices, write a card, perhaps adopt it.

Owns that there is one at a time, and the files that it leaves. Closing the generator ends it at
the next step of the device and leaves nothing behind: no KV block, no file. A card appears whole
or not at all, and never in the place of another. Balances are never touched.
Fails with `CalibrationRunning`, with `ConfigError` where the cards' directory cannot be written,
and as `Executor.probe` does.
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
    step_times,
    verify_rows,
    warning_of,
)
from sage_fed.cards.rate_card import Fingerprint, Measured, RateCard, available_cards, card_text
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
    counted,
)
from sage_fed.device import Executor
from sage_fed.errors import CalibrationRunning, ConfigError, TierUnavailable
from sage_fed.trusted_files import create_file, make_directory

_LONGEST_STEM = 48
_UNFINISHED = ".card-"
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
    tiers: tuple[Tier, ...] = TIER_ROLES


class Calibrator:
    """Measures the tiers of one executor; `adopt` puts a card in force."""

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
        site = self._site
        try:
            models = self._models()
            # Now, and not when minutes of measuring would be lost.
            await asyncio.to_thread(_require_writable, site.cards_dir)
            known = ((tier, self._executor.limits(tier)) for tier in site.tiers)
            limits = {tier: limits for tier, limits in known if limits is not None}
            measurement = Measurement(self._executor, limits, pace or (QUICK if quick else FULL))
            async for progress in measurement.run():
                yield progress
            yield CalibrationProgress("writing", 0.99, "", measurement.elapsed_s)
            conditions = await asyncio.to_thread(read_conditions, cuda_index=site.cuda_index)
            card = _card(site, models, measurement, conditions)
            if not card.doubts():
                # How fast the machine is does not hang on whose prices are in force.
                self._executor.begin_with(step_times(measurement.points))
            saving = asyncio.create_task(
                asyncio.to_thread(_save, card, site.cards_dir, measurement.left_out)
            )
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
        for tier in self._site.tiers:
            status = self._executor.status(tier)
            if status.state is not TierState.READY or status.info is None:
                raise TierUnavailable(
                    f"the {tier.name} tier is {status.state.value}; both tiers are measured"
                )
            models[tier] = status.info
        return models


def _card(
    site: Site,
    models: Mapping[Tier, ModelInfo],
    measurement: Measurement,
    conditions: Mapping[str, str],
) -> RateCard:
    """Return the card, under the version that it would like to have."""
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    points, lowest, deepest = measurement.points, min(models), max(models)
    ratios = measurement.ratios[deepest]
    unit = reference_point(point for point in points if point.tier == lowest)
    rows = verify_rows(point for point in points if point.tier == deepest)
    bandwidth = site.read_bandwidth_bytes_per_s
    kv_read_s = {tier: info.kv_token_bytes / bandwidth for tier, info in models.items()}
    lines = prices(points, measurement.ratios, kv_read_s)
    names = " and ".join(f"{m.name} ({m.precision}, {m.kernels})" for m in models.values())
    precisions = "-".join(dict.fromkeys(info.precision for info in models.values()))
    return RateCard(
        version=stem_of(site.device, precisions, f"{now:%Y-%m-%d}"),
        title=f"{names} on {site.device}",
        created=now.date(),
        device=site.device,
        software=f"sage-fed {site.version}, torch {conditions.get('torch', 'unknown')}",
        provenance=(
            f"Measured by the daemon on its own engines in {measurement.elapsed_s:.0f} s, "
            f"{len(ratios)} rounds of both tiers in turns; spread of the ratio "
            f"{spread_of(ratios):.1%}. 1 ATP is one decode step of one {lowest.name} sequence with "
            f"{unit.context_tokens} tokens of context; every price is marginal device time. "
            f"A drafted token is priced as a step of 1 row, a verified one in steps of "
            f"{counted(rows, 'row')}."
        ),
        lines=lines,
        fingerprint=Fingerprint.of(site.device, site.threads, site.version, models),
        measured=Measured(
            at=now,
            took_s=round(measurement.elapsed_s, 1),
            token_s=unit.step_s,
            cost_ratio=median(ratios),
            spread=spread_of(ratios),
            error=median_error(ratios),
            rounds=len(ratios),
            read_bandwidth_bytes_per_s=bandwidth,
            load_s=MappingProxyType({tier: info.load_s for tier, info in models.items()}),
            conditions=MappingProxyType({**site.settings, **conditions}),
            points=points,
            warning=warning_of(lines),
        ),
    )


# Files


def stem_of(device: str, precisions: str, day: str) -> str:
    """Return what a version begins with: device, precisions and day, in a card's alphabet."""
    tail = f"-{_slug(precisions)}-{day}"
    name = _slug(device)[: _LONGEST_STEM - len(tail)].strip("-.")
    return f"{name or 'device'}{tail}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def _require_writable(directory: Path) -> None:
    """Create the cards' directory and see that it can be written."""
    make_directory("cards_dir", directory)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=_UNFINISHED):
            pass
    except OSError as error:
        raise ConfigError(f"cards_dir: cannot write into {directory}: {error.strerror}") from error


def _save(
    card: RateCard, directory: Path, left_out: list[str]
) -> tuple[CalibrationResult, RateCard]:
    """Write the card and what stands beside it; return the card as it was read. Blocks."""
    named, path = save_card(card, directory)
    report, plot = report_of(named, left_out, f"{named.version}.svg"), plot_of(named)
    path.with_suffix(".md").write_text(report, encoding="utf-8")
    path.with_suffix(".svg").write_text(plot, encoding="utf-8")
    assert named.measured is not None
    result = CalibrationResult(
        version=named.version,
        path=str(path.absolute()),
        card=path.read_text(encoding="utf-8"),
        report=report,
        plot=plot,
        cost_ratio=named.cost_ratio(),
        cost_ratio_spread=named.measured.spread,
        took_s=named.measured.took_s,
        adopted=False,
        points=named.measured.points,
    )
    return result, RateCard.load(path, tiers=tuple(named.lines))


def _discard(saving: asyncio.Task[tuple[CalibrationResult, RateCard]]) -> None:
    """Delete what was written after its caller had left."""
    if not saving.cancelled() and saving.exception() is None:
        path = Path(saving.result()[0].path)
        for suffix in (".toml", ".md", ".svg"):
            path.with_suffix(suffix).unlink(missing_ok=True)


def save_card(card: RateCard, directory: Path) -> tuple[RateCard, Path]:
    """Write the card under its version, or that with the first free number behind it.

    Returns the card as it was named, and its file. The directory is there.
    """
    try:
        taken = set(available_cards(directory))
        numbered = (f"{card.version}-{number}" for number in itertools.count(2))
        for version in itertools.chain([card.version], numbered):
            named, path = replace(card, version=version), directory / f"{version}.toml"
            if version not in taken and create_file(path, card_text(named)):
                return named, path
    except OSError as error:
        raise ConfigError(f"cards_dir: cannot write into {directory}: {error.strerror}") from error
    raise AssertionError("there is always a free number")


# The machine


def read_conditions(*, cuda_index: int | None) -> dict[str, str]:
    """Return what the machine says of itself, by name: versions, clocks, power mode, load.

    Every reading is optional, and decides no price: a file or a tool that is not there leaves its
    line out. Blocks, for at most `_TOOL_S` a tool. `cuda_index` None is a device that is no GPU.
    """
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
        readings[name] = _text(path).partition("\n")[0].strip("\0 \t")
    clock = re.search(r"^cpu MHz\s*:\s*(.*?)\s*$", _text("/proc/cpuinfo"), re.MULTILINE)
    readings["cpu clock (MHz)"] = clock[1] if clock else ""
    if cuda_index is not None:
        query = f"--query-gpu={','.join(_GPU_FIELDS)}"
        values = _tool("nvidia-smi", f"--id={cuda_index}", query, "--format=csv,noheader")
        for field, value in zip(_GPU_FIELDS, values.split(","), strict=False):
            readings[f"gpu {field}"] = value.strip()
        readings["power mode"] = _tool("nvpmodel", "-q").replace("\n", " ")
    return {name: value for name, value in readings.items() if value}


def _text(path: str) -> str:
    """Return a file's text; "" where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _tool(name: str, *arguments: str) -> str:
    """Return a tool's output; "" where it is not there, fails or does not come back."""
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


# The report: a page of Markdown, tables first, and a picture that is drawn by hand, because a few
# lines on logarithmic axes are not worth a plotting library

_POINT_HEADINGS = (
    *("tier", "phase", "batch", "context", "tokens", "step", "tok/s"),
    *("share", "co-resident", "spread", "rounds"),
)
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 210, 50, 50
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
"""Of the tiers, the lowest first."""


def report_of(card: RateCard, left_out: Sequence[str], plot: str) -> str:
    """Return the page; `plot` is the picture's file name, `left_out` points without a figure."""
    measured, fingerprint, tiers = card.measured, card.fingerprint, sorted(card.lines)
    assert measured is not None, "a report is of a measured card"
    assert fingerprint is not None, "a report is of a measured card"
    price_headings = [name for tier in tiers for name in (tier.name, "spread")]
    prices = [
        [phase.value, *_prices(card, phase), f"{card.cost_ratio(phase):.2f}"] for phase in Phase
    ]
    conditions = [
        ("device", fingerprint.device),
        ("threads", str(fingerprint.threads)),
        ("fingerprint", fingerprint.digest),
        *((f"{tier.name} load", f"{measured.load_s[tier]:.2f} s") for tier in tiers),
        *measured.conditions.items(),
    ]
    warning = f"\n**Warning**: {measured.warning}.\n" if measured.warning else ""
    missing = f"\nLeft out, for want of device memory: {', '.join(left_out)}.\n" if left_out else ""
    return f"""\
# Rate card {card.version}

{card.title}, measured {measured.at:%Y-%m-%d %H:%M} UTC in {measured.took_s:.0f} s.

A {tiers[-1].name} output token costs **{card.cost_ratio():.3f}** {tiers[0].name} ones: the median \
of {measured.rounds} paired rounds, spread ±{measured.spread:.1%} (half of the interquartile \
range), standard error ±{measured.error:.2%}.
1 ATP is {measured.token_s * 1e3:.4g} ms of device time.
{warning}
![step times]({plot})

## Prices (ATP per token)

{_table(("phase", *price_headings, "ratio"), prices)}

## What was timed

Alone: the tier's steps one after the other. \
Co-resident: a decode step of another tier before each.
The share is of the measured read bandwidth, \
{measured.read_bandwidth_bytes_per_s / 1e9:.1f} GB/s, weights and KV cache together.

{_table(_POINT_HEADINGS, [_point_row(card, point) for point in measured.points])}
{missing}
## Batches

{_table(("batch", *(f"{tier.name} tok/s" for tier in tiers), "ratio"), _batch_rows(card))}

## Conditions

{_table(("what", "reading"), conditions)}
"""


def _prices(card: RateCard, phase: Phase) -> Iterable[str]:
    for tier in sorted(card.lines):
        rate = card.lines[tier][phase]
        yield from (f"{rate.uatp / 1e6:.6f}", _spread(rate.spread))


def _point_row(card: RateCard, point: MeasuredPoint) -> tuple[str, ...]:
    assert card.measured is not None
    assert card.fingerprint is not None
    model = card.fingerprint.models[point.tier]
    attended = point.batch * (point.context_tokens + point.tokens)
    read_s = (model.step_bytes + attended * model.kv_token_bytes) / (
        card.measured.read_bandwidth_bytes_per_s
    )
    return (
        point.tier.name,
        point.phase.value,
        str(point.batch),
        str(point.context_tokens),
        str(point.tokens),
        f"{point.step_s * 1e3:.3f} ms",
        f"{1 / point.token_s:,.0f}",
        f"{read_s / point.step_s:.0%}",
        "" if point.co_resident_s is None else f"{point.co_resident_s / point.step_s:.2f}x",
        _spread(point.spread),
        str(point.rounds),
    )


def _batch_rows(card: RateCard) -> Iterable[list[str]]:
    """Yield a row for each batch size that all tiers decoded, at their shortest contexts."""
    assert card.measured is not None
    token_s: dict[tuple[int, Tier], float] = {}
    for point in sorted(card.measured.points, key=lambda point: point.context_tokens):
        if point.phase is Phase.DECODE:
            token_s.setdefault((point.batch, point.tier), point.token_s)
    tiers = sorted(card.lines)
    for batch in sorted({batch for batch, _ in token_s}):
        times = [token_s[batch, tier] for tier in tiers if (batch, tier) in token_s]
        if len(times) == len(tiers):
            yield [str(batch), *(f"{1 / s:,.0f}" for s in times), f"{times[-1] / times[0]:.2f}"]


def _spread(spread: float | None) -> str:
    return "-" if spread is None else f"±{spread:.1%}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)


def plot_of(card: RateCard) -> str:
    """Return an SVG of device time per token over the batch.

    Contexts of one tier share its colour; the longer ones are dashed.
    """
    assert card.measured is not None, "a plot is of a measured card"
    curves: dict[tuple[Tier, int], list[tuple[float, float]]] = {}
    for point in card.measured.points:
        if point.phase is Phase.DECODE:
            curve = curves.setdefault((point.tier, point.context_tokens), [])
            curve.append((point.batch, point.token_s * 1e3))
    across = _Axis([x for curve in curves.values() for x, _ in curve], _LEFT, _WIDTH - _RIGHT)
    up = _Axis([y for curve in curves.values() for _, y in curve], _HEIGHT - _BOTTOM, _TOP)
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _label(_LEFT, 18, card.title.removesuffix(f" on {card.device}"), size=11),
        _label(_LEFT, 36, f"{card.device}: {card.cost_ratio():.2f} : 1 at batch 1"),
        _label(_WIDTH / 2 - 60, _HEIGHT - 12, "sequences in the batch"),
        f'<g transform="rotate(-90 16 {_HEIGHT / 2})">',
        _label(-40, _HEIGHT / 2, "device ms per output token"),
        "</g>",
    ]
    for value in across.marks((1,), 2):
        x = across.at(value)
        parts.append(_line((x, _TOP), (x, _HEIGHT - _BOTTOM), 'stroke="#ddd"'))
        parts.append(_label(x - 6, _HEIGHT - _BOTTOM + 16, f"{value:g}"))
    for value in up.marks((1, 2, 5), 10):
        y = up.at(value)
        parts.append(_line((_LEFT, y), (_WIDTH - _RIGHT, y), 'stroke="#ddd"'))
        parts.append(_label(_LEFT - 40, y + 4, f"{value:g}"))
    tiers = sorted(card.lines)
    for index, ((tier, context), curve) in enumerate(curves.items()):
        colour = _COLOURS[tiers.index(tier) % len(_COLOURS)]
        shortest = min(tokens for owner, tokens in curves if owner == tier)
        dash = "" if context == shortest else ' stroke-dasharray="6 4"'
        style = f'stroke="{colour}" stroke-width="2"{dash}'
        places = [(across.at(x), up.at(y)) for x, y in sorted(curve)]
        x, y = _WIDTH - _RIGHT + 15, _TOP + 10 + 22 * index
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" {style}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        parts.append(_line((x, y), (x + 24, y), style))
        parts.append(_label(x + 30, y + 4, f"{tier.name}, context {context}"))
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis:
    """A logarithmic axis from the values' least to their greatest, `begin` to `end` on paper."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self._low, self._high = min(values), max(values)
        if self._low == self._high:
            self._low, self._high = self._low / 2, self._high * 2
        self._begin, self._end = begin, end

    def at(self, value: float) -> float:
        share = math.log(value / self._low) / math.log(self._high / self._low)
        return self._begin + share * (self._end - self._begin)

    def marks(self, steps: Sequence[int], base: int) -> list[float]:
        """Return the round values inside the axis: steps times powers of the base."""
        first = math.floor(math.log(self._low, base))
        last = math.ceil(math.log(self._high, base))
        values = (step * float(base) ** power for power in range(first, last + 1) for step in steps)
        return [value for value in values if self._low <= value <= self._high]


def _line(begin: tuple[float, float], end: tuple[float, float], style: str) -> str:
    (x1, y1), (x2, y2) = begin, end
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _label(x: float, y: float, text: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(text)}</text>'
