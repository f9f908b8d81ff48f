"""The daemon as the model and admin services see it.

Owns nothing: it reads the executor, the card and the settings into one picture.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping

import sage_fed
from sage_fed.calibrate import Calibrator
from sage_fed.cards import RateCard, available_cards, is_version
from sage_fed.core import (
    TIER_ROLES,
    CalibrationEvent,
    CardStatus,
    DaemonStatus,
    EndToken,
    ModelStatus,
    Phase,
    Tier,
)
from sage_fed.daemon.cards import CardInForce
from sage_fed.daemon.tiers import display_name
from sage_fed.device import Executor
from sage_fed.errors import ConfigError, InvalidField, NotFound, TierUnavailable
from sage_fed.jobs import Broker
from sage_fed.ledger import Ledger
from sage_fed.settings import Settings
from sage_fed.text import Tokenizer

_log = logging.getLogger(__name__)


class Operations:
    """Satisfies `sage_fed.service.ports.Operations`.

    `drain` asks the daemon to stop; `device_fallback` is why the device is not the one wanted.
    """

    def __init__(
        self,
        settings: Settings,
        executor: Executor,
        broker: Broker,
        cards: CardInForce,
        calibrator: Calibrator,
        *,
        tokenizers: Mapping[Tier, Tokenizer],
        ledger: Ledger,
        device_fallback: str,
        drain: Callable[[float | None], None],
    ) -> None:
        self._settings = settings
        self._executor = executor
        self._broker = broker
        self._cards = cards
        self._calibrator = calibrator
        self._tokenizers = tokenizers
        self._ledger = ledger
        self._device_fallback = device_fallback
        self._drain = drain
        self._draining = False
        self._started_s = time.monotonic()

    def models(self) -> tuple[ModelStatus, ...]:
        """Return both tiers' models, whatever their state."""
        return tuple(self._model(tier) for tier in TIER_ROLES)

    def status(self) -> DaemonStatus:
        """Return the daemon at a glance."""
        return DaemonStatus(
            version=sage_fed.__version__,
            uptime_s=time.monotonic() - self._started_s,
            draining=self._draining,
            device=self._settings.device,
            device_fallback=self._device_fallback,
            rate_card=self._cards.card.version,
            cost_ratio=self._cards.card.cost_ratio(),
            tiers=tuple(self._executor.load(tier) for tier in TIER_ROLES),
            rate_card_fit=self._cards.fit,
            rate_card_note=self._cards.note,
            ledger_trouble=self._ledger.trouble,
            recovered_jobs=self._ledger.recovery.voided_jobs,
            recovered_uatp=self._ledger.recovery.voided_uatp,
        )

    def drain(self, grace_s: float | None) -> int:
        """Start to drain; None is the setting's grace. Returns the jobs that still run."""
        self._draining = True
        self._drain(grace_s)
        return self._broker.num_jobs

    def note_draining(self) -> None:
        """Say from now on that the daemon drains (a signal asked for it)."""
        self._draining = True

    def calibrate(self, *, quick: bool, adopt: bool) -> AsyncGenerator[CalibrationEvent, None]:
        """Measure the engines and write a card."""
        if self._draining:
            raise TierUnavailable("the daemon is draining")
        return self._calibrator.run(quick=quick, adopt=adopt)

    async def adopt_card(self, version: str) -> CardStatus:
        """Put a card in force for new jobs, until the daemon restarts."""
        # A path would let whoever may call read any file of this machine.
        if not is_version(version):
            raise InvalidField("version", "is not a rate card's version")
        directory = self._settings.own_cards_dir
        known = await asyncio.to_thread(available_cards, directory)
        if version not in known:
            raise NotFound(f"there is no rate card {version}; there are {', '.join(known)}")
        try:
            card = await asyncio.to_thread(RateCard.load, version, directory)
        except ConfigError as error:
            _log.error("an operator chose a card that cannot be read: %s", error.message)
            raise InvalidField("version", "this card cannot be read; see the log") from None
        self._cards.adopt(card)
        return self._cards.status

    def _model(self, tier: Tier) -> ModelStatus:
        settings, status = self._settings.tier(tier), self._executor.status(tier)
        load, info = self._executor.load(tier), status.info
        prices = self._cards.card.rates[tier]
        return ModelStatus(
            tier=tier,
            state=status.state,
            name=display_name(settings),
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
