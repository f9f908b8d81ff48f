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
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import MappingProxyType

from sage_fed.calibrate.card_report import plot_of, report_of
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
from sage_fed.cards import Fingerprint, Measured, RateCard, available_cards, card_text
from sage_fed.core import (
    TIER_ROLES,
    CalibrationEvent,
    CalibrationProgress,
    CalibrationResult,
    ModelInfo,
    Tier,
    TierState,
)
from sage_fed.device import Executor
from sage_fed.errors import CalibrationRunning, ConfigError, TierUnavailable
from sage_fed.trusted_files import make_directory

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
            limits = {tier: self._executor.limits(tier) for tier in site.tiers}
            measurement = Measurement(
                self._executor,
                {tier: known for tier, known in limits.items() if known is not None},
                pace or (QUICK if quick else FULL),
            )
            async for progress in measurement.run():
                yield progress
            yield CalibrationProgress("writing", 0.99, "", measurement.elapsed_s)
            conditions = await asyncio.to_thread(read_conditions, cuda_index=site.cuda_index)
            card = _card(site, models, measurement, conditions)
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
            f"{unit.context_tokens} tokens of context; every price is marginal device time."
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
            if version not in taken and _create(path, card_text(named)):
                return named, path
    except OSError as error:
        raise ConfigError(f"cards_dir: cannot write into {directory}: {error.strerror}") from error
    raise AssertionError("there is always a free number")


def _create(path: Path, text: str) -> bool:
    """Create the file with its whole text; False where it exists."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=_UNFINISHED
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


_LONGEST_STEM = 48
_FRESH = ".card-"
_BESIDE = (".md", ".svg")
