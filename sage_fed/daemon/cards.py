"""Which rate card is in force, and whether its prices belong to what is loaded.

Owns the choice: the setting names a card, or asks for the newest of the operator's own that was
measured on exactly this device, engine and pair, and not under load. Hears from the executor what
is loaded, and judges when both tiers are. A card that was measured on something else is a loud
warning, never an error: its prices are still prices. Event loop only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import sage_fed
from sage_fed.calibrate import Site
from sage_fed.cards import Fingerprint, RateCard, own_cards
from sage_fed.core import (
    TIER_ROLES,
    CardFit,
    CardStatus,
    ModelInfo,
    Phase,
    Tier,
    TierState,
    TierStatus,
)
from sage_fed.engine import DeviceDescription
from sage_fed.metrics import Metrics
from sage_fed.settings import AUTO_CARD, Settings
from sage_fed.steps import StepReport
from sage_fed.trusted_files import require_trusted_directory

_log = logging.getLogger(__name__)

_SHOWN = 2
"""Differences of a stale card that its note begins with."""


class CardInForce:
    """Satisfies `sage_fed.device.ExecutorObserver`; `use` hears of every new card.

    Args:
        setting: as configured; `AUTO_CARD` chooses by fingerprint.
        card: in force until both tiers are loaded, and after that unless a better one is found.
        own: the operator's own cards, for `AUTO_CARD`.
        fingerprint: of what is loaded, once both models are known.
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
        if len(self._models) == len(TIER_ROLES):
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
        if len(self._models) == len(TIER_ROLES):
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
        self._metrics.money.rate_card(self.card.version, stale=self.fit is CardFit.STALE)
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


def card_in_force(settings: Settings, device: DeviceDescription, metrics: Metrics) -> CardInForce:
    """Read the card that the settings name, and with `AUTO_CARD` those to choose from; blocks.

    Raises:
        ConfigError: the named card is not there or cannot be read, or somebody else may put cards
            into the operator's directory.
    """
    require_trusted_directory("cards_dir", settings.own_cards_dir)
    own: tuple[RateCard, ...] = ()
    if settings.rate_card == AUTO_CARD:
        card = RateCard.load()
        own, errors = own_cards(settings.own_cards_dir)
        for error in errors:
            _log.warning("a rate card is passed over: %s", error.message)
    else:
        card = RateCard.load(settings.rate_card, settings.own_cards_dir)

    def fingerprint(models: Mapping[Tier, ModelInfo]) -> Fingerprint:
        return Fingerprint.of(device.name, device.threads, sage_fed.__version__, models)

    return CardInForce(settings.rate_card, card, own, fingerprint, metrics)


def site_of(settings: Settings, device: DeviceDescription, bandwidth: float) -> Site:
    """Return what a calibration is told of this daemon."""
    _, _, index = settings.device.partition("cuda:")
    tiers = {
        f"{tier.name}.{key}": str(getattr(settings.tier(tier), key))
        for tier in TIER_ROLES
        for key in ("kv_cache_bytes", "max_context_tokens", "max_batch", "prefill_chunk_tokens")
    }
    return Site(
        device=device.name,
        threads=device.threads,
        version=sage_fed.__version__,
        cuda_index=int(index) if index else None,
        read_bandwidth_bytes_per_s=bandwidth,
        settings={"device": settings.device, "cpu_threads": str(settings.cpu_threads), **tiers},
        cards_dir=settings.own_cards_dir,
    )
