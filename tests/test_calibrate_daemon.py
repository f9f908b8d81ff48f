"""Calibration through a real daemon with the bundled pair: a card out, nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from forked_daemon import ForkedProcess
from waiting import until

from sage_fed.cards.rate_card import DEFAULT_CARD, RateCard, card_text
from sage_fed.client import Client
from sage_fed.core import (
    TIER_ROLES,
    CalibrationProgress,
    CalibrationResult,
    CardFit,
    Phase,
    StopReason,
    Tier,
)
from sage_fed.errors import CalibrationRunning, Forbidden, InvalidField, NotFound


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One of its own: a calibration would change what others see of the shared one."""
    daemon = DaemonProcess.start(
        tmp_path_factory.mktemp("calibrated") / "state",
        *("--set", "tactical.max_batch=4", "--set", "strategic.max_batch=2"),
        launch=ForkedProcess,
    )
    yield daemon
    assert 0 == daemon.stop(), daemon.log.read_text()


@pytest.fixture
def operator(daemon: DaemonProcess) -> Iterator[Client]:
    with Client(daemon.address, daemon.admin_token) as client:
        yield client


def idle(operator: Client) -> bool:
    """Whether nothing holds a KV block."""
    return all(tier.kv_tokens_used == 0 for tier in operator.load().tiers)


@pytest.fixture(scope="module")
def result(daemon: DaemonProcess) -> CalibrationResult:
    """A quick calibration, with jobs of a client in the middle of it."""
    with Client(daemon.address, daemon.admin_token) as operator, Client(daemon.address) as client:
        events = operator.calibrate(quick=True)
        assert isinstance(next(events), CalibrationProgress)
        for tier in TIER_ROLES:
            answer = client.generate("What is 12 plus 30?", tier=tier, max_new_tokens=8)
            assert answer.finished.stop_reason in {StopReason.END_OF_TEXT, StopReason.LENGTH}
        with pytest.raises(CalibrationRunning):
            next(operator.calibrate(quick=True))
        *progress, result = events
    assert all(isinstance(event, CalibrationProgress) for event in progress)
    assert isinstance(result, CalibrationResult)
    return result


def test_it_measures_the_real_engines(result: CalibrationResult) -> None:
    """Every phase of both tiers, at every batch that the settings allow."""
    for tier, batches in ((Tier.TACTICAL, [1, 2, 4]), (Tier.STRATEGIC, [1, 2])):
        own = [point for point in result.points if point.tier is tier]
        assert {Phase.DECODE, Phase.PREFILL, Phase.CACHED, Phase.VERIFY} == {p.phase for p in own}
        shortest = min(point.context_tokens for point in own if point.phase is Phase.DECODE)
        assert batches == [
            p.batch for p in own if p.phase is Phase.DECODE and p.context_tokens == shortest
        ]
        assert all(point.step_s > 0 and point.rounds >= 1 for point in own)
    assert result.cost_ratio > 0


def test_the_card_names_what_it_was_measured_on(
    daemon: DaemonProcess, operator: Client, result: CalibrationResult
) -> None:
    """It is a card like every other, and its fingerprint is that of the loaded pair."""
    card = RateCard.load(result.version, daemon.state_dir / "cards")
    assert result.card == Path(result.path).read_text()
    assert card.fingerprint is not None
    for model in operator.models():
        shape = card.fingerprint.models[model.tier]
        assert (model.architecture, model.parameters, model.precision, model.kernels) == (
            shape.architecture,
            shape.parameters,
            shape.precision,
            shape.kernels,
        )
    assert card.measured is not None
    assert {"sage-fed", "torch", "os", "tactical.max_batch"} <= card.measured.conditions.keys()
    assert card.measured.read_bandwidth_bytes_per_s > 0
    assert all(card.measured.load_s[tier] > 0 for tier in TIER_ROLES)


def test_it_costs_nobody_anything(
    daemon: DaemonProcess, operator: Client, result: CalibrationResult
) -> None:
    """The books know of the two jobs and of nothing else; every KV block is free again."""
    assert result.version
    with Client(daemon.address) as client:
        jobs = {entry.job_id for entry in client.entries(100) if entry.job_id}
    assert 2 == len(jobs)
    assert idle(operator)


def test_a_card_is_adopted_at_run_time(operator: Client, result: CalibrationResult) -> None:
    """New jobs are priced by it, status says that it fits, and the shipped one can come back."""
    before = operator.status()
    assert (DEFAULT_CARD, CardFit.DECLARED) == (before.rate_card, before.rate_card_fit)
    adopted = operator.adopt_card(result.version)
    assert (result.version, CardFit.MEASURED) == (adopted.version, adopted.fit)
    now = operator.status()
    assert (result.version, CardFit.MEASURED) == (now.rate_card, now.rate_card_fit)
    assert result.cost_ratio == now.cost_ratio
    answer = operator.generate("What is 12 plus 30?", max_new_tokens=8)
    assert result.version == answer.finished.price.rate_card
    decode = {model.tier: model.decode_uatp for model in operator.models()}
    assert decode[Tier.STRATEGIC] == round(result.cost_ratio * 1e6)
    assert CardFit.DECLARED is operator.adopt_card(DEFAULT_CARD).fit


@pytest.mark.parametrize(
    ("version", "error"),
    [("no-such-card", NotFound), ("../../etc/passwd", InvalidField), ("/etc/x.toml", InvalidField)],
)
def test_only_a_known_version_is_adopted(
    operator: Client, version: str, error: type[Exception]
) -> None:
    """A path is none: an operator of the daemon is not one of the machine."""
    with pytest.raises(error) as caught:
        operator.adopt_card(version)
    if error is NotFound:
        assert DEFAULT_CARD in caught.value.message, "the error says which there are"


def test_a_user_cannot_calibrate(daemon: DaemonProcess) -> None:
    """Nor choose the prices."""
    with Client(daemon.address) as client:
        with pytest.raises(Forbidden):
            next(client.calibrate(quick=True))
        with pytest.raises(Forbidden):
            client.adopt_card(DEFAULT_CARD)


@pytest.mark.usefixtures("result")
def test_a_calibration_that_is_left_leaves_nothing(daemon: DaemonProcess, operator: Client) -> None:
    """Every KV block comes back, no file appears, and the next one is not refused."""
    cards = daemon.state_dir / "cards"
    before = sorted(cards.iterdir())
    events = operator.calibrate()
    next(events)
    next(events)
    events.close()

    def gone() -> bool:
        """The daemon hears of it a moment later; a new one is refused until then."""
        again = operator.calibrate(quick=True)
        try:
            next(again)
        except CalibrationRunning:
            return False
        again.close()
        return True

    until(gone)
    until(lambda: idle(operator))
    assert before == sorted(cards.iterdir())


def as_if(card: RateCard, spread: float) -> RateCard:
    """The card with this spread throughout, whatever else the machine did when it was measured."""
    assert card.measured is not None
    return replace(
        card,
        lines={
            tier: {phase: replace(rate, spread=spread) for phase, rate in rates.items()}
            for tier, rates in card.lines.items()
        },
        measured=replace(card.measured, spread=spread),
    )


def test_auto_finds_the_card_at_the_next_start(
    daemon: DaemonProcess, result: CalibrationResult, tmp_path: Path
) -> None:
    """The same pair on the same machine fits; other threads or other work meanwhile do not."""
    card = RateCard.load(result.version, daemon.state_dir / "cards")
    for name, spread, more, version, words in (
        ("quiet", 0.01, (), card.version, ""),
        ("threads", 0.01, ("--set", "cpu_threads=2"), DEFAULT_CARD, "IS STALE"),
        ("loud", 1.1, (), DEFAULT_CARD, "IS PASSED OVER"),
    ):
        cards = tmp_path / f"{name}-cards"
        cards.mkdir()
        (cards / f"{card.version}.toml").write_text(card_text(as_if(card, spread)))
        again = DaemonProcess.start(
            tmp_path / name,
            *("--set", f"cards_dir={cards}", "--set", "rate_card=auto", *more),
            launch=ForkedProcess,
        )
        try:
            with Client(again.address) as client:
                now = client.status()
        finally:
            assert 0 == again.stop()
        fit = CardFit.STALE if words else CardFit.MEASURED
        assert (version, fit) == (now.rate_card, now.rate_card_fit)
        log = again.log.read_text()
        assert ("IS STALE" in log) is bool(words)
        assert words in log
