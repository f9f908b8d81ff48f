"""The daemon as the model and admin services see it, and which rate card is in force.

Owns the choice of the card: the setting names one, or asks for the newest of the operator's own
that was measured on exactly this device, engine and pair, and not under load. Hears from the
executor what is loaded, and judges when every tier is. A card that was measured on something else
is a loud warning, never an error: its prices are still prices. Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

import sage_fed
from sage_fed.calibrate.calibrator import Calibrator
from sage_fed.calibrate.measurement import step_times
from sage_fed.cards.quality_card import ANY_CLASS, QualityCard, quality_cards
from sage_fed.cards.rate_card import Fingerprint, RateCard, available_cards, is_version
from sage_fed.core import (
    CalibrationEvent,
    CardFit,
    CardStatus,
    DaemonStatus,
    EndToken,
    ModelInfo,
    ModelStatus,
    ModeReturns,
    Phase,
    QualityCardStatus,
    Tier,
    TierState,
    TierStatus,
)
from sage_fed.daemon.readiness import Lifecycle
from sage_fed.device import Executor
from sage_fed.errors import ConfigError, InvalidField, NotFound, TierUnavailable
from sage_fed.jobs.admission import Admission
from sage_fed.jobs.broker import Broker
from sage_fed.ledger import Ledger
from sage_fed.metrics import Metrics
from sage_fed.settings import AUTO_CARD, Settings
from sage_fed.steps import StepReport
from sage_fed.text import Tokenizer

_log = logging.getLogger(__name__)


class Operations:
    """Satisfies `sage_fed.service.Operations`.

    `device_fallback` is why the device is not the one that the settings name.
    """

    def __init__(
        self,
        settings: Settings,
        executor: Executor,
        broker: Broker,
        cards: CardInForce,
        calibrator: Calibrator,
        *,
        quality: QualityInForce,
        admission: Admission,
        metrics: Metrics,
        lifecycle: Lifecycle,
        tokenizers: Mapping[Tier, Tokenizer],
        ledger: Ledger,
        device_fallback: str,
    ) -> None:
        self._settings = settings
        self._lifecycle = lifecycle
        self._executor = executor
        self._broker = broker
        self._cards = cards
        self._quality = quality
        self._admission = admission
        self._metrics = metrics
        self._calibrator = calibrator
        self._tokenizers = tokenizers
        self._ledger = ledger
        self._device_fallback = device_fallback
        self._started_s = time.monotonic()

    def models(self) -> tuple[ModelStatus, ...]:
        """Return every tier's model, whatever their state."""
        return tuple(self._model(tier) for tier in self._settings.tiers)

    def status(self) -> DaemonStatus:
        """Return the daemon at a glance."""
        return DaemonStatus(
            version=sage_fed.__version__,
            uptime_s=time.monotonic() - self._started_s,
            draining=self._lifecycle.stopping.is_set(),
            device=self._settings.device,
            device_fallback=self._device_fallback,
            rate_card=self._cards.card.version,
            cost_ratio=self._cards.card.cost_ratio(),
            tiers=tuple(self._executor.load(tier) for tier in self._settings.tiers),
            rate_card_fit=self._cards.fit,
            rate_card_note=self._cards.note,
            ledger_trouble=self._ledger.trouble,
            recovered_jobs=self._ledger.recovery.voided_jobs,
            recovered_uatp=self._ledger.recovery.voided_uatp,
            quality_card=self._quality.status.version,
            quality_card_note=self._quality.status.note,
        )

    def compare_modes(self, account: str, task_class: str, max_error: float | None) -> ModeReturns:
        """Return what each mode gives for what it takes."""
        watts, note = self._metrics.power_at_work
        return self._admission.compare_modes(
            account, task_class, max_error, watts=watts, power_note=note
        )

    def drain(self, grace_s: float | None) -> int:
        """Start to drain; None is the setting's grace. Returns the jobs that still run."""
        self._lifecycle.drain(grace_s)
        return self._broker.num_jobs

    def calibrate(self, *, quick: bool, adopt: bool) -> AsyncGenerator[CalibrationEvent, None]:
        """Measure the engines and write a card."""
        if self._lifecycle.stopping.is_set():
            raise TierUnavailable("the daemon is draining")
        return self._calibrator.run(quick=quick, adopt=adopt)

    async def adopt_card(self, version: str) -> CardStatus:
        """Put a card in force for new jobs, until the daemon restarts."""
        # With a path any caller could read any file of this machine.
        if not is_version(version):
            raise InvalidField("version", "is not a rate card's version")
        directory = self._settings.own_cards_dir
        known = await asyncio.to_thread(available_cards, directory)
        if version not in known:
            raise NotFound(f"there is no rate card {version}; there are {', '.join(known)}")
        try:
            card = await asyncio.to_thread(
                RateCard.load, version, directory, tuple(self._settings.tiers)
            )
        except ConfigError as error:
            _log.error("an operator chose a card that cannot be read: %s", error.message)
            raise InvalidField("version", "this card cannot be read; see the log") from None
        self._cards.adopt(card)
        return self._cards.status

    async def adopt_quality_card(self, version: str) -> QualityCardStatus:
        """Put a quality card in force, until the daemon restarts."""
        # With a path any caller could read any file of this machine.
        if not is_version(version):
            raise InvalidField("version", "is not a quality card's version")
        directory = self._settings.own_cards_dir
        known = await asyncio.to_thread(quality_cards, directory)
        if version not in known:
            have = ", ".join(known) or "none"
            raise NotFound(f"there is no quality card {version}; there are {have}")
        try:
            card = await asyncio.to_thread(
                QualityCard.load, version, directory, tuple(self._settings.tiers)
            )
        except ConfigError as error:
            _log.error("an operator chose a card that cannot be read: %s", error.message)
            raise InvalidField("version", "this card cannot be read; see the log") from None
        self._quality.adopt(card)
        return self._quality.status

    def _model(self, tier: Tier) -> ModelStatus:
        settings, status = self._settings.tiers[tier], self._executor.status(tier)
        load, info = self._executor.load(tier), status.info
        prices = self._cards.card.rates[tier]
        return ModelStatus(
            tier=tier,
            state=status.state,
            name=settings.display_name,
            revision=settings.revision or "",
            precision=settings.precision,
            device=self._settings.device,
            kernels=info.kernels if info else "",
            architecture=info.architecture if info else "",
            parameters=info.parameters if info else 0,
            weight_bytes=info.weight_bytes if info else 0,
            kv_cache_bytes=info.kv_cache_bytes if info else 0,
            kv_cache_tokens=load.kv_tokens_total,
            max_context_tokens=load.max_context_tokens,
            load_s=info.load_s if info else 0.0,
            load_progress=status.load_progress,
            decode_uatp=prices[Phase.DECODE],
            message=status.message,
            prefill_uatp=prices[Phase.PREFILL],
            cached_uatp=prices[Phase.CACHED],
            end_tokens=tuple(
                EndToken(id_, self._tokenizers[tier].token_text(id_))
                for id_ in (info.end_token_ids if info else ())
            ),
        )


_SHOWN = 2
"""Differences of a stale card that its note begins with."""


class CardInForce:
    """Satisfies `sage_fed.device.ExecutorObserver`; `use` hears of every new card.

    `use_times` hears what steps take by rows, of a card that was measured on what is loaded.

    Args:
        setting: as configured; `AUTO_CARD` chooses by fingerprint.
        card: in force until every tier is loaded, and after that unless a better one is found.
        own: the operator's own cards, for `AUTO_CARD`.
        fingerprint: of what is loaded, once every model is known.
    """

    def __init__(
        self,
        setting: str,
        card: RateCard,
        own: Sequence[RateCard],
        fingerprint: Callable[[Mapping[Tier, ModelInfo]], Fingerprint],
        metrics: Metrics,
    ) -> None:
        self.card = card
        self.fit = CardFit.UNKNOWN
        self.note = "the models are not loaded yet"
        self.use: Callable[[RateCard], None] = lambda _card: None
        self.use_times: Callable[[Mapping[Tier, Mapping[int, float]]], None] = lambda _times: None
        self._auto = setting == AUTO_CARD
        self._own = tuple(own)
        self._fingerprint = fingerprint
        self._metrics = metrics
        self._models: dict[Tier, ModelInfo] = {}
        self._passed_over = ""
        self._show()

    @property
    def status(self) -> CardStatus:
        """The card in force, for clients."""
        return CardStatus(self.card.version, self.card.cost_ratio(), self.fit, self.note)

    def adopt(self, card: RateCard) -> None:
        """Put a card in force for jobs from now on; those that run keep their prices."""
        _log.info("rate card %s is in force, chosen by an operator", card.version)
        self._auto = False
        self._put(card)

    def step_done(self, report: StepReport) -> None:
        """Steps do not change the prices."""

    def tier_changed(self, status: TierStatus) -> None:
        """Note what was loaded; judge when it is all there."""
        if status.state is not TierState.READY or status.info is None:
            return
        if self._models.get(status.tier) == status.info:
            return
        self._models[status.tier] = status.info
        if len(self._models) == len(self.card.lines):
            self._put(self._chosen())

    def _chosen(self) -> RateCard:
        """The newest own card that fits and is sound, where there is one; else what is in force."""
        if not self._auto:
            return self.card
        loaded = self._fingerprint(self._models)
        fitting = [
            card
            for card in self._own
            if card.measured is not None
            and card.fingerprint is not None
            and not card.fingerprint.differences(loaded)
        ]
        self._passed_over = ""
        for card in sorted(fitting, key=_age, reverse=True):
            doubts = card.doubts()
            if not doubts:
                return card
            _log.warning(
                "RATE CARD %s IS PASSED OVER: it fits, and was measured under load (%s)",
                card.version,
                doubts,
            )
            self._passed_over = self._passed_over or (
                f"own card {card.version} fits, and was measured under load ({doubts})"
            )
        return self.card

    def _put(self, card: RateCard) -> None:
        changed = card is not self.card
        self.card = card
        if len(self._models) == len(self.card.lines):
            self.fit, self.note = self._judge(card)
            if self.fit is CardFit.STALE:
                _log.warning(
                    "RATE CARD %s IS STALE: %s", card.version, self.note.replace("\n", "; ")
                )
            elif doubts := card.doubts():
                _log.warning(
                    "RATE CARD %s WAS MEASURED UNDER LOAD (%s): %s", card.version, doubts, self.note
                )
            elif card.measured is not None and card.measured.warning:
                _log.warning("rate card %s: %s", card.version, self.note)
            else:
                _log.info("rate card %s: %s", card.version, self.note)
            if self.fit is CardFit.MEASURED and card.measured is not None and not card.doubts():
                self.use_times(step_times(card.measured.points))
        self._show()
        if changed:
            self.use(card)

    def _judge(self, card: RateCard) -> tuple[CardFit, str]:
        advice = "measure with `sage-fed calibrate`"
        if card.fingerprint is None:
            if self._auto:
                why = self._passed_over or "no own card was measured on what is loaded"
                return CardFit.STALE, f"{why}; {advice}"
            return CardFit.DECLARED, f"not measured here; {advice}"
        differences = card.fingerprint.differences(self._fingerprint(self._models))
        if differences:
            return CardFit.STALE, _stale_note(differences, f"{advice}{_warning(card)}")
        return CardFit.MEASURED, f"on this device, engine and pair{_warning(card)}"

    def _show(self) -> None:
        self._metrics.rate_card(self.card.version, stale=self.fit is CardFit.STALE)
        self._metrics.cost_ratios("card", {phase: self.card.cost_ratio(phase) for phase in Phase})


def _stale_note(differences: Sequence[str], tail: str) -> str:
    """What has changed: one line with the first two differences, then a line for each."""
    keys = {difference.partition(" is ")[0] for difference in differences}
    changed: list[str] = [key for key in ("device", "threads", "engine") if key in keys]
    changed += ["pair"] if keys.difference(changed) else []
    number = len(differences)
    count = "1 difference" if number == 1 else f"{number} differences"
    more = ", ..." if number > _SHOWN else ""
    head = (
        f"measured on another {' and '.join(changed)} ({count}): "
        f"{'; '.join(differences[:_SHOWN])}{more}; {tail}"
    )
    return "\n".join([head, *(differences if number > _SHOWN else ())])


def _warning(card: RateCard) -> str:
    """What its measurement says against it, as the tail of a note."""
    warning = card.measured.warning if card.measured else ""
    return f"; WARNING: {warning}" if warning else ""


def _age(card: RateCard) -> float:
    assert card.measured is not None
    return card.measured.at.timestamp()


class QualityInForce:
    """Satisfies `sage_fed.device.ExecutorObserver`; `use` hears of every change.

    A card is in force only while every tier is loaded and it was measured on exactly those models:
    unlike a stale price, a stale P(wrong) decides who answers.

    Args:
        cards: to choose from; the one that the setting names, or none.
        num_own: how many of them, at the front, are the operator's own.
        num_tiers: that have to be loaded.
        auto: whether the newest that fits is taken, an own one before a bundled one.
    """

    def __init__(
        self,
        cards: Sequence[QualityCard],
        metrics: Metrics,
        *,
        num_own: int,
        num_tiers: int,
        auto: bool,
    ) -> None:
        self.card: QualityCard | None = None
        self.note = "the models are not loaded yet" if cards or auto else "none is wanted"
        self.use: Callable[[QualityCard | None], None] = lambda _card: None
        newest = [
            card
            for part in (cards[:num_own], cards[num_own:])
            for card in sorted(part, key=lambda card: card.measured.at, reverse=True)
        ]
        self._cards = newest
        self._auto = auto
        self._num_tiers = num_tiers
        self._metrics = metrics
        self._models: dict[Tier, ModelInfo] = {}
        self._metrics.quality_card("")

    @property
    def status(self) -> QualityCardStatus:
        """The card in force, for clients."""
        return QualityCardStatus(self.card.version if self.card else "", self.note)

    def adopt(self, card: QualityCard) -> None:
        """Put a card in force for decisions from now on.

        Raises:
            TierUnavailable: not every tier is loaded, so nothing can be compared.
            InvalidField: it was measured on other models.
        """
        if len(self._models) < self._num_tiers:
            raise TierUnavailable("a quality card is compared with the models; they are not loaded")
        differences = card.fingerprint.differences(self._models)
        if differences:
            raise InvalidField("version", f"was measured on another pair: {'; '.join(differences)}")
        _log.info("quality card %s is in force, chosen by an operator", card.version)
        self._cards, self._auto = [card], False
        self._judge()

    def step_done(self, report: StepReport) -> None:
        """Steps do not change how often answers are wrong."""

    def tier_changed(self, status: TierStatus) -> None:
        """Note what was loaded; judge when it is all there."""
        if status.state is not TierState.READY or status.info is None:
            return
        if self._models.get(status.tier) == status.info:
            return
        self._models[status.tier] = status.info
        if len(self._models) == self._num_tiers:
            self._judge()

    def _judge(self) -> None:
        loaded = self._models
        fitting = (card for card in self._cards if not card.fingerprint.differences(loaded))
        before, self.card = self.card, next(fitting, None)
        advice = "measure with `sage-fed calibrate --quality TASKS`"
        if self.card is not None:
            self.note = _told(self.card)
            _log.info("quality card %s: %s", self.card.version, self.note)
        elif self._auto:
            self.note = f"none was measured on what is loaded; {advice}"
            _log.info("quality card: %s", self.note)
        elif self._cards:
            named = self._cards[0]
            why = _stale_note(named.fingerprint.differences(loaded), advice)
            self.note = f"{named.version} is dropped: {why}"
            _log.warning("QUALITY CARD %s", self.note.replace("\n", "; "))
        if self.card is not before:
            self.use(self.card)
        wanted = not self._auto and bool(self._cards)
        if self.card is None:
            self._metrics.quality_card("", stale=wanted)
        else:
            made_s = self.card.measured.at.timestamp()
            self._metrics.quality_card(self.card.version, made_s=made_s)


def _told(card: QualityCard) -> str:
    evidence = card.classes[ANY_CLASS].evidence
    return (
        f"measured on this pair with {card.measured.num_tasks} tasks, temperature "
        f"{card.fingerprint.temperature:g}; AUROC {evidence.auroc.value:.2f}, calibration error "
        f"{evidence.calibration_error.value:.3f}"
    )
