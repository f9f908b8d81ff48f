"""Calibration on engines whose time is known: what is timed, what is derived, what is left."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast
from xml.etree import ElementTree as ET

import pytest
from executor_rig import Rig, read, serving, submit
from fake_engine import WAIT_S, entered, spec
from hypothesis import given
from hypothesis import strategies as st
from test_executor_probe import prepare, used

from sage_fed.calibrate.calibrator import Calibrator, Site, save_card, stem_of
from sage_fed.calibrate.measurement import (
    VERIFY_ROWS,
    Measurement,
    Pace,
    interleaved,
    median_error,
    points_of,
    prices,
    reference_of,
    spread_of,
    step_times,
    warning_of,
)
from sage_fed.cards.rate_card import Basis, RateCard
from sage_fed.core import (
    TIER_ROLES,
    CalibrationProgress,
    CalibrationResult,
    MeasuredPoint,
    Phase,
    Tier,
)
from sage_fed.device import Executor, TierLimits
from sage_fed.errors import (
    CalibrationRunning,
    ConfigError,
    DeviceOutOfMemory,
    TierUnavailable,
)
from sage_fed.steps import Step

T, S = Tier.TACTICAL, Tier.STRATEGIC
PACE = Pace(budget_s=20 * WAIT_S, rounds=2, ratios=12, sample_s=0.02, max_repeats=3)


# The plan


@given(
    blocks=st.integers(3, 4096),
    context=st.integers(16, 4096),
    batch=st.integers(1, 200),
    chunk=st.integers(1, 1024),
)
def test_every_point_fits_the_tier(blocks: int, context: int, batch: int, chunk: int) -> None:
    """Whatever the pools, a point is a step that the engine would take; the reference is one."""
    limits = TierLimits(blocks, context, max_batch=batch, prefill_chunk_tokens=chunk)
    points = points_of(T, limits)
    assert reference_of(T, limits) == points[0]
    assert len(set(points)) == len(points)
    for point in points:
        step = point.step()
        taken = [block for chunk_ in step.chunks for block in chunk_.blocks]
        assert len(set(taken)) == len(taken) == point.num_blocks <= blocks
        assert set(range(len(taken))) == set(taken)
        assert point.context_tokens + point.tokens <= context
        assert point.batch <= batch
        assert point.tokens <= chunk or point.phase is Phase.VERIFY


def test_a_roomy_tier_is_measured_in_every_phase() -> None:
    """Batches by powers of two up to the largest, short and long contexts, four prompts."""
    limits = TierLimits(10_000, 4096, max_batch=24, prefill_chunk_tokens=512)
    points = points_of(S, limits)
    assert {Phase.DECODE, Phase.PREFILL, Phase.CACHED, Phase.VERIFY} == {p.phase for p in points}
    short = [p.batch for p in points if p.phase is Phase.DECODE and p.context_tokens == 40]
    assert [1, 2, 4, 8, 16, 24] == short
    assert [32, 128, 256, 512] == [p.tokens for p in points if p.phase is Phase.PREFILL]
    assert [1, 8] == [p.batch for p in points if p.phase is Phase.DECODE and p.context_tokens > 40]


def test_a_verified_row_is_priced_at_one_row_count_and_drawn_from() -> None:
    """Of the row counts that are timed, four rows make the price, and the card says so."""
    limits = TierLimits(10_000, 4096, max_batch=24, prefill_chunk_tokens=512)
    verified = [point for point in points_of(S, limits) if point.phase is Phase.VERIFY]
    assert [2, 3, 4, 6, 8, 12, 16, 24, 32] == [point.tokens for point in verified]
    assert [4] == [point.tokens for point in verified if point.sets_a_price]
    for one in verified:
        (chunk,) = one.step().chunks
        assert list(range(one.tokens)) == [draw.index for draw in chunk.draws]
    timed = [
        point(tier, phase, rows, seconds, 40)
        for tier in TIER_ROLES
        for phase, rows, seconds in (
            *((Phase.DECODE, 1, 1.0), (Phase.VERIFY, 2, 1.1)),
            *((Phase.VERIFY, 4, 1.2), (Phase.VERIFY, 32, 9.6)),
        )
    ]
    rate = prices(timed, paired(6.0, 0.01), READ_S)[S][Phase.VERIFY]
    assert (1_800_000, Basis.MEASURED) == (rate.uatp, rate.basis)
    assert "over 4 rows, each of them drawn from" in rate.source


def test_step_times_are_by_rows() -> None:
    """A drafter's rows are sequences, a verifier's are tokens; long contexts are left out."""
    timed = [
        MeasuredPoint(tier, phase, batch, context, tokens, seconds, None, 1)
        for tier in TIER_ROLES
        for phase, batch, context, tokens, seconds in (
            (Phase.DECODE, 1, 40, 1, 0.1),
            (Phase.DECODE, 4, 40, 1, 0.15),
            (Phase.DECODE, 1, 1032, 1, 0.2),
            (Phase.DECODE, 4, 1032, 1, 0.4),
            (Phase.VERIFY, 1, 40, 4, 0.12),
            (Phase.VERIFY, 1, 40, 6, 0.14),
        )
    ]
    assert {T: {1: 0.1, 4: 0.15, 6: 0.14}, S: {1: 0.1, 4: 0.12, 6: 0.14}} == step_times(timed)


def test_the_tiers_take_turns() -> None:
    """A B A B, and the longer list goes on alone."""
    limits = TierLimits(10_000, 4096)
    tactical, strategic = points_of(T, limits), points_of(S, limits)[:3]
    order = [point.tier for point in interleaved([tactical, strategic])]
    assert [T, S, T, S, T, S, T] == order[:7]
    assert len(tactical) + 3 == len(order)


# Prices

SECONDS = st.floats(1e-6, 1e3)


def point(tier: Tier, phase: Phase, tokens: int, step_s: float, context: int) -> MeasuredPoint:
    return MeasuredPoint(tier, phase, 1, context, tokens, step_s, 0.01, 9)


@st.composite
def measurements(draw: st.DrawFn) -> tuple[MeasuredPoint, ...]:
    """Any times whatever, sensible or not: noise must not make a price that a card refuses."""
    points = []
    for tier in TIER_ROLES:
        points += [
            point(tier, Phase.DECODE, 1, draw(SECONDS), 40),
            *(point(tier, Phase.PREFILL, n, draw(SECONDS), 0) for n in (32, 128)),
        ]
        if draw(st.booleans()):
            points.append(point(tier, Phase.CACHED, 32, draw(SECONDS), 1000))
        if draw(st.booleans()):
            points += [point(tier, Phase.VERIFY, n, draw(SECONDS), 40) for n in (4, 8)]
    return tuple(points)


READ_S = {T: 1e-7, S: 5e-7}


def paired(ratio: float, spread: float) -> dict[Tier, list[float]]:
    """Rounds of the strategic tier's ratio, with this relative spread."""
    return {S: [ratio * (1 - spread), ratio, ratio * (1 + spread)]}


@given(measurements(), st.floats(0.01, 1000))
def test_prices_are_a_card_whatever_was_timed(
    points: tuple[MeasuredPoint, ...], ratio: float
) -> None:
    """A tactical output token is 1 ATP, the ratio is the measured one, and nothing is free."""
    lines = prices(points, paired(ratio, 0.01), READ_S)
    assert 1_000_000 == lines[T][Phase.DECODE].uatp
    assert ratio * 1e6 - 1e-5 <= lines[S][Phase.DECODE].uatp <= ratio * 1e6 + 1
    for tier in TIER_ROLES:
        assert 1 <= lines[tier][Phase.CACHED].uatp <= lines[tier][Phase.PREFILL].uatp
        assert lines[tier][Phase.DRAFT].uatp == lines[tier][Phase.DECODE].uatp
        assert all(rate.uatp >= 1 and rate.source for rate in lines[tier].values())


@given(measurements(), st.floats(0.01, 1000), st.floats(0.01, 100))
def test_a_slower_clock_changes_no_price(
    points: tuple[MeasuredPoint, ...], ratio: float, factor: float
) -> None:
    """Prices are relative: a device that takes twice as long for everything costs the same."""
    slower = tuple(replace(one, step_s=one.step_s * factor) for one in points)
    before = prices(points, paired(ratio, 0.01), READ_S)
    after = prices(slower, paired(ratio, 0.01), {t: s * factor for t, s in READ_S.items()})
    for tier in TIER_ROLES:
        for phase in Phase:
            a, b = before[tier][phase].uatp, after[tier][phase].uatp
            assert abs(a - b) <= 1 + 1e-9 * a


def test_a_job_pays_for_the_steps_that_it_takes() -> None:
    """The prefill step and the decode steps of a job are what its tokens' prices add up to."""
    points = tuple(
        one
        for tier, scale in ((T, 0.01), (S, 0.06))
        for one in (
            point(tier, Phase.DECODE, 1, scale, 40),
            # Each token of a prompt beyond the first adds a fiftieth of a step.
            *(point(tier, Phase.PREFILL, n, scale * (1 + (n - 1) / 50), 0) for n in (32, 128)),
            point(tier, Phase.CACHED, 32, scale * (1 + 31 / 50) + 1000 * scale / 500, 1000),
            point(tier, Phase.VERIFY, 4, scale * 1.2, 40),
        )
    )
    lines = prices(points, paired(6.0, 0.01), READ_S)
    assert (1_000_000, 6_000_000) == tuple(lines[tier][Phase.DECODE].uatp for tier in TIER_ROLES)
    assert (20_000, 120_000) == tuple(lines[tier][Phase.PREFILL].uatp for tier in TIER_ROLES)
    assert (2_000, 12_000) == tuple(lines[tier][Phase.CACHED].uatp for tier in TIER_ROLES)
    assert (300_000, 1_800_000) == tuple(lines[tier][Phase.VERIFY].uatp for tier in TIER_ROLES)
    assert {Basis.MEASURED} == {rate.basis for tier in TIER_ROLES for rate in lines[tier].values()}


def priced(*, spread: float | None = 0.01, outlier: float = 1.0) -> tuple[MeasuredPoint, ...]:
    """Each token of a prompt adds a fiftieth of a step; `outlier` lengthens the longest one."""
    return tuple(
        replace(point(tier, phase, tokens, 0.01 * scale, context), spread=spread)
        for tier in TIER_ROLES
        for phase, tokens, context, scale in (
            (Phase.DECODE, 1, 40, 1.0),
            *((Phase.PREFILL, n, 0, 1 + (n - 1) / 50) for n in (32, 128, 256)),
            (Phase.PREFILL, 512, 0, outlier * (1 + 511 / 50)),
            (Phase.CACHED, 32, 1000, 1 + 31 / 50 + 2),
            (Phase.VERIFY, 4, 40, 1.2),
        )
    )


def test_one_disturbed_length_does_not_make_the_prompts_price() -> None:
    """The longest prompt took half as long again: least squares would follow it."""
    lines = prices(priced(outlier=1.5), paired(6.0, 0.01), READ_S)
    assert pytest.approx(20_000, abs=1) == lines[T][Phase.PREFILL].uatp


def test_every_price_has_a_spread_and_those_above_the_limit_are_named() -> None:
    """A quiet machine is not warned of; a noisy ratio concerns the strategic decode price only."""
    quiet = prices(priced(spread=0.0001), paired(6.0, 0.0001), READ_S)
    assert "" == warning_of(quiet)
    assert all(rate.spread is not None for tier in TIER_ROLES for rate in quiet[tier].values())
    noisy = warning_of(prices(priced(spread=0.0001), paired(6.0, 0.25), READ_S))
    assert "not a quiet machine (spread above 3%: strategic decode ±25.0%)" in noisy
    for word in ("prefill", "cached", "decode", "verify"):
        loud = warning_of(prices(priced(spread=0.2), paired(6.0, 0.25), READ_S))
        assert all(f"{tier.name} {word} ±" in loud for tier in TIER_ROLES)


def test_a_price_of_one_round_has_no_spread_and_is_named() -> None:
    """None, not a spread of nothing, which would look like certainty."""
    lines = prices(priced(spread=None), paired(6.0, 0.01), READ_S)
    assert lines[T][Phase.PREFILL].spread is None
    assert "one round only: tactical prefill, tactical cached, tactical decode" in warning_of(lines)


def test_spread_is_half_the_interquartile_range() -> None:
    """Relative to the median; a constant has none, and few values give their whole range."""
    assert 0.0 == spread_of([3.0] * 9)
    assert pytest.approx(0.1) == spread_of([9.0, 11.0])
    assert pytest.approx(2.5 / 5) == spread_of([float(i) for i in range(1, 10)])
    assert median_error([1.0] * 5) == 0.0


class Clockwork:
    """An executor whose steps take a second for each rank, and one more."""

    async def probe(self, steps: Sequence[Step], _timeout_s: float) -> tuple[float, ...]:
        return tuple(float(step.tier.rank + 1) for step in steps)


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_each_tier_is_measured_against_the_lowest(number: int) -> None:
    """However many there are: its price is the ratio, and all are timed beside another one."""
    tiers = (T, S, Tier(2, "deep"))[:number]
    limits = dict.fromkeys(tiers, TierLimits(1000, 4096, max_batch=2, prefill_chunk_tokens=32))
    pace = replace(PACE, ratios=9, sample_s=0.001)
    measurement = Measurement(cast("Executor", Clockwork()), limits, pace, clock=lambda: 0.0)
    progress = [one async for one in measurement.run()]
    lines = prices(measurement.points, measurement.ratios, dict.fromkeys(tiers, 1e-9))

    assert list(tiers) == list(dict.fromkeys(point.tier for point in measurement.points))
    assert {number > 1} == {point.co_resident_s is not None for point in measurement.points}
    assert float(number) == progress[-1].cost_ratio
    assert [1_000_000 * (t.rank + 1) for t in tiers] == [
        lines[tier][Phase.DECODE].uatp for tier in tiers
    ]


# A whole calibration


def files(directory: Path) -> int:
    return len(list(directory.iterdir()))


def site(tmp_path: Path) -> Site:
    return Site("Fake Device 3000", 1, "0.1.0", None, 1e9, {"tactical.max_batch": "4"}, tmp_path)


def calibrator(rig: Rig, tmp_path: Path) -> tuple[Calibrator, list[RateCard]]:
    adopted: list[RateCard] = []
    prepare(rig)
    rig.engines[T].token_s = 0.0001
    rig.engines[S].step_s, rig.engines[S].token_s = 0.0505, 0.0005
    return Calibrator(rig.executor, site(tmp_path), adopted.append), adopted


async def run(one: Calibrator, *, adopt: bool = False) -> CalibrationResult:
    events = [event async for event in one.run(quick=True, adopt=adopt, pace=PACE)]
    fractions = [event.fraction for event in events if isinstance(event, CalibrationProgress)]
    assert len(events) - 1 == len(fractions)
    assert sorted(fractions) == fractions
    result = events[-1]
    assert isinstance(result, CalibrationResult)
    told = {
        (p.tier, p.phase, p.batch, p.context_tokens, p.tokens)
        for event in events[:-1]
        if isinstance(event, CalibrationProgress)
        for p in event.measured
    }
    assert told == {(p.tier, p.phase, p.batch, p.context_tokens, p.tokens) for p in result.points}
    return result


async def test_a_calibration_finds_the_ratio_and_writes_a_card(tmp_path: Path) -> None:
    """Where a strategic step takes five times as long, the card says 5; it loads again."""
    rig = Rig(max_batch=4, prefill_chunk_tokens=64)
    one, adopted = calibrator(rig, tmp_path)
    async with serving(rig) as executor:
        result = await run(one)
        assert [0, 0] == used(executor)
    assert [] == adopted
    assert not result.adopted
    card = RateCard.load(result.version, tmp_path)
    assert pytest.approx(0.051 / 0.0101, rel=1e-4) == result.cost_ratio == card.cost_ratio()
    assert result.card == (tmp_path / f"{result.version}.toml").read_text()
    assert card.measured is not None
    assert result.points == card.measured.points
    assert result.cost_ratio_spread < 1e-6
    assert "a verified one in steps of 4 rows." in card.provenance
    assert card.fingerprint is not None
    assert ("Fake Device 3000", "0.1.0") == (card.fingerprint.device, card.fingerprint.engine)
    assert "4" == card.measured.conditions["tactical.max_batch"]
    assert {"os", "torch", "python", "load average"} <= card.measured.conditions.keys()
    decode = [p.batch for p in result.points if p.tier is T and p.phase is Phase.DECODE]
    assert [1, 2, 4] == decode[:3]
    assert all(p.co_resident_s is not None for p in result.points)
    assert [] == rig.observer.reports, "what serves nobody is no traffic"


async def test_what_sets_a_price_is_timed_three_times_without_a_budget(tmp_path: Path) -> None:
    """The budget is spent by the pilots: the others have one round, and say that it has no spread.

    The report shows a dash for them, and the card reads back as it was.
    """
    rig = Rig(max_batch=4, prefill_chunk_tokens=64)
    one, _ = calibrator(rig, tmp_path)
    hurried = replace(PACE, budget_s=1e-9)
    async with serving(rig):
        result = [event async for event in one.run(quick=True, adopt=False, pace=hurried)][-1]
    assert isinstance(result, CalibrationResult)
    decode = [p for p in result.points if p.phase is Phase.DECODE]
    told = [p for p in result.points if p.phase is Phase.VERIFY and p.tokens != VERIFY_ROWS]
    priced = [p for p in result.points if p.phase is not Phase.DECODE and p not in told]
    assert all(p.rounds >= 3 for p in priced)
    assert {1} == {p.rounds for p in decode if p.batch > 1}
    assert {None} == {p.spread for p in decode if p.batch > 1}
    assert "| - | 1 |" in result.report
    card = RateCard.load(result.version, tmp_path)
    assert card.measured is not None
    assert result.points == card.measured.points
    assert all(card.lines[tier][Phase.PREFILL].spread is not None for tier in TIER_ROLES)


async def test_the_report_and_the_plot_are_beside_the_card(tmp_path: Path) -> None:
    """Markdown with every point, and a picture that a browser can read."""
    rig = Rig(max_batch=4, prefill_chunk_tokens=64)
    one, adopted = calibrator(rig, tmp_path)
    async with serving(rig):
        result = await run(one, adopt=True)
    assert [result.version] == [card.version for card in adopted]
    assert result.adopted
    assert result.report == (tmp_path / f"{result.version}.md").read_text()
    assert f"({result.version}.svg)" in result.report
    assert result.report.count("\n| strategic |") == sum(p.tier is S for p in result.points)
    root = ET.fromstring((tmp_path / f"{result.version}.svg").read_text())
    assert "{http://www.w3.org/2000/svg}svg" == root.tag
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len({(p.tier, p.context_tokens) for p in result.points if p.phase is Phase.DECODE}) == (
        len(lines)
    )


async def test_drafts_are_planned_by_what_was_measured(tmp_path: Path) -> None:
    """A job of three tokens has drafts: no step has to be served before they are planned."""
    rig = Rig(max_batch=2, prefill_chunk_tokens=32)
    one, _ = calibrator(rig, tmp_path)
    async with serving(rig) as executor:
        await run(one)
        _, ended = await read(submit(executor, spec(0, S, new=3, speculates=True, drafter=T)))
        assert ended.drafted_tokens > 0


async def test_calibrations_never_overwrite_each_other(tmp_path: Path) -> None:
    """The second one of a day gets a number; the first one's file is as it was."""
    rig = Rig(max_batch=2, prefill_chunk_tokens=32)
    one, _ = calibrator(rig, tmp_path)
    async with serving(rig):
        first = await run(one)
        second = await run(one)
    assert f"{first.version}-2" == second.version
    assert first.card == (tmp_path / f"{first.version}.toml").read_text()
    assert RateCard.load(second.version, tmp_path).rates
    assert 6 == files(tmp_path), "and nothing half-written is left"


async def test_there_is_one_calibration_at_a_time(tmp_path: Path) -> None:
    """A second one is refused at once; after the first has ended the next may come."""
    rig = Rig(max_batch=2, prefill_chunk_tokens=32)
    one, _ = calibrator(rig, tmp_path)
    async with serving(rig):
        first = one.run(quick=True, adopt=False, pace=PACE)
        await anext(first)
        with pytest.raises(CalibrationRunning):
            await run(one)
        await first.aclose()
        assert (await run(one)).version


async def test_a_cancelled_calibration_leaves_nothing(tmp_path: Path) -> None:
    """In the middle of a step: no block, no file, and the next one is not refused."""
    rig = Rig(max_batch=2, prefill_chunk_tokens=32)
    one, _ = calibrator(rig, tmp_path)
    engine = rig.gate(S)
    async with serving(rig) as executor:
        task = asyncio.create_task(run(one))
        await entered(engine)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        engine.let_pass(10_000)
        assert (await run(one)).version
        assert [0, 0] == used(executor)
    assert 3 == files(tmp_path)


async def test_who_leaves_while_the_card_is_written_leaves_no_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that writes cannot be stopped; what it wrote is gone all the same."""
    rig = Rig(max_batch=2, prefill_chunk_tokens=32)
    one, adopted = calibrator(rig, tmp_path)
    writing, left = threading.Event(), threading.Event()

    def slowly(card: RateCard, directory: Path) -> tuple[RateCard, Path]:
        writing.set()
        assert left.wait(WAIT_S)
        return save_card(card, directory)

    monkeypatch.setattr("sage_fed.calibrate.calibrator.save_card", slowly)
    async with serving(rig):
        task = asyncio.create_task(run(one, adopt=True))
        assert await asyncio.to_thread(writing.wait, WAIT_S)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        left.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait_for(asyncio.gather(*others), WAIT_S)
    await asyncio.sleep(0)  # for what is called when they are done
    assert [] == adopted
    assert 0 == files(tmp_path)


async def test_a_directory_that_cannot_be_written_is_refused_before_it_measures(
    tmp_path: Path,
) -> None:
    """Nobody waits for minutes to hear it."""
    rig = Rig(max_batch=2, prefill_chunk_tokens=32)
    (tmp_path / "file").touch()
    one, _ = calibrator(rig, tmp_path / "file")
    async with serving(rig):
        with pytest.raises(ConfigError, match="cards_dir: cannot create"):
            await run(one)
    assert not any(engine.steps for engine in rig.engines.values())


async def test_jobs_are_served_while_it_runs(tmp_path: Path) -> None:
    """They come in the middle of it, are served whole, and the calibration ends all the same."""
    rig = Rig(max_batch=2, prefill_chunk_tokens=32)
    one, _ = calibrator(rig, tmp_path)
    engine = rig.gate(S)
    async with serving(rig) as executor:
        task = asyncio.create_task(run(one))
        await entered(engine)
        streams = [submit(executor, spec(number, (T, S)[number % 2])) for number in range(4)]
        engine.let_pass(10_000)
        for stream in streams:
            tokens, ended = await read(stream)
            assert 4 == len(tokens) == ended.output_tokens
        result = await task
    assert pytest.approx(0.051 / 0.0101, rel=1e-4) == result.cost_ratio


async def test_a_point_that_does_not_fit_the_device_is_left_out(tmp_path: Path) -> None:
    """The card is written without it, and the report says so."""
    rig = Rig(max_batch=4, prefill_chunk_tokens=32)
    one, _ = calibrator(rig, tmp_path)

    def fail(step: Step) -> None:
        if len(step.chunks) == 4:
            raise DeviceOutOfMemory("no room")

    rig.engines[S].fail = fail
    async with serving(rig):
        result = await run(one)
    strategic = [p.batch for p in result.points if p.tier is S and p.phase is Phase.DECODE]
    assert 4 not in strategic
    assert "Left out" in result.report
    assert "strategic decode x4" in result.report


async def test_a_tier_that_does_not_serve_cannot_be_measured(tmp_path: Path) -> None:
    """Both are needed for a ratio; the error names the one that is missing."""
    rig = Rig()
    one, _ = calibrator(rig, tmp_path)
    with pytest.raises(TierUnavailable, match="tactical"):
        await run(one)


async def test_a_stop_ends_a_calibration_with_an_error(tmp_path: Path) -> None:
    """Its caller is told, and no card is written."""
    rig = Rig(max_batch=2)
    one, _ = calibrator(rig, tmp_path)
    engine = rig.gate(T)
    async with serving(rig) as executor:
        task = asyncio.create_task(run(one))
        await entered(engine)
        stop = asyncio.create_task(executor.stop(0.0))
        with pytest.raises(TierUnavailable):
            await task
        engine.let_pass(10_000)
        await stop
    assert 0 == files(tmp_path)


# Files


@pytest.mark.parametrize(
    ("device", "version"),
    [
        ("AMD EPYC, 2 CPUs", "amd-epyc-2-cpus-bf16-2026-11-23"),
        ("NVIDIA Jetson AGX Thor (Developer Kit) with a long name", None),
        ("日本", "device-bf16-2026-11-23"),
    ],
)
def test_a_version_is_made_of_the_device(device: str, version: str | None, tmp_path: Path) -> None:
    """In the alphabet that versions have, and short enough to be numbered."""
    stem = stem_of(device, "bf16", f"{dt.date(2026, 11, 23)}")
    assert version in {None, stem}
    named, _ = save_card(replace(RateCard.load(), version=stem), tmp_path)
    again, path = save_card(replace(RateCard.load(), version=stem), tmp_path)
    assert (stem, f"{stem}-2") == (named.version, again.version)
    assert RateCard.load(path).version == again.version


def test_a_calibration_never_takes_a_bundled_cards_name(tmp_path: Path) -> None:
    """The books name cards by version: two of one name would be refused at the next start."""
    card = RateCard.load()
    named, _ = save_card(card, tmp_path)
    assert f"{card.version}-2" == named.version
