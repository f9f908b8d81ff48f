"""The daemon as the model and admin services see it.

Owns nothing: it reads the executor, the card and the settings into one picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import sage_fed
from sage_fed.broker import Broker
from sage_fed.core import DaemonStatus, ModelStatus, Phase, Tier
from sage_fed.daemon.tiers import display_name
from sage_fed.executor import Executor
from sage_fed.pricing import RateCard
from sage_fed.settings import Settings


class Operations:
    """Satisfies `sage_fed.service.ports.Operations`; `drain` asks the daemon to stop."""

    def __init__(
        self,
        settings: Settings,
        executor: Executor,
        broker: Broker,
        card: RateCard,
        *,
        drain: Callable[[float | None], None],
    ) -> None:
        self._settings = settings
        self._executor = executor
        self._broker = broker
        self._card = card
        self._drain = drain
        self._draining = False
        self._started_s = time.monotonic()

    def models(self) -> tuple[ModelStatus, ...]:
        """Return both tiers' models, whatever their state."""
        return tuple(self._model(tier) for tier in Tier)

    def status(self) -> DaemonStatus:
        """Return the daemon at a glance."""
        return DaemonStatus(
            version=sage_fed.__version__,
            uptime_s=time.monotonic() - self._started_s,
            draining=self._draining,
            device=self._settings.device,
            rate_card=self._card.version,
            cost_ratio=self._card.cost_ratio(),
            tiers=tuple(self._executor.load(tier) for tier in Tier),
        )

    def drain(self, grace_s: float | None) -> int:
        """Start to drain; None is the setting's grace. Returns the jobs that still run."""
        self._draining = True
        self._drain(grace_s)
        return self._broker.num_jobs

    def note_draining(self) -> None:
        """Say from now on that the daemon drains (a signal asked for it)."""
        self._draining = True

    def _model(self, tier: Tier) -> ModelStatus:
        settings, status = self._settings.tier(tier), self._executor.status(tier)
        load, info = self._executor.load(tier), status.info
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
            decode_uatp=self._card.rates[tier][Phase.DECODE],
            message=status.message,
        )
