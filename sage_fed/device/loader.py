"""Loads the engines one after the other, on a thread of its own.

Owns an engine until the device's thread has taken it. Tactical comes first in `setups`, so it
serves while strategic is read. A model that cannot be loaded is its tier's failure: it is
reported and the next one is loaded.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from sage_fed.core import Tier, TierState, TierStatus
from sage_fed.device.handover import Handover
from sage_fed.device.inbox import Inbox, OpenTier
from sage_fed.device.limits import TierLimits
from sage_fed.errors import SageFedError
from sage_fed.steps import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TierSetup:
    """How to get a tier's engine, and how much it may take on.

    `load` blocks; it is given a callback for its progress from 0 to 1, which raises where
    nobody waits for the engine any more.
    """

    load: Callable[[Callable[[float], None]], Engine]
    max_batch: int = 16
    max_waiting: int = 64
    prefill_chunk_tokens: int = 512
    prefix_cache: bool = True
    kv_overcommit: float = 1.0

    def limits(self, engine: Engine) -> TierLimits:
        """Return the tier's bounds, now that the engine is known."""
        return TierLimits(
            num_blocks=engine.num_blocks,
            max_context_tokens=engine.max_context_tokens,
            max_batch=self.max_batch,
            max_waiting=self.max_waiting,
            prefill_chunk_tokens=self.prefill_chunk_tokens,
            prefix_cache=self.prefix_cache,
            kv_overcommit=self.kv_overcommit,
            num_ids=engine.num_ids,
        )


class LoadAbandoned(Exception):
    """Raised into a load by its progress callback when the executor stops."""


class Loader:
    """The thread "sage-fed-loader"; `exited` is done when it has ended."""

    def __init__(self, setups: Mapping[Tier, TierSetup], inbox: Inbox, handover: Handover) -> None:
        self.exited: Future[None] = Future()
        self._setups = setups
        self._inbox = inbox
        self._handover = handover
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._main, name="sage-fed-loader", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def abandon(self) -> None:
        """Stop at the next report of progress."""
        self._abandoned.set()

    def _main(self) -> None:
        try:
            for tier, setup in self._setups.items():
                if self._abandoned.is_set():
                    break
                self._load(tier, setup)
        except RuntimeError:
            # The event loop has closed without stopping the executor.
            logger.exception("the loader has nobody to report to")
        finally:
            self.exited.set_result(None)

    def _load(self, tier: Tier, setup: TierSetup) -> None:
        def progress(fraction: float) -> None:
            if self._abandoned.is_set():
                raise LoadAbandoned
            self._tell(TierStatus(tier, TierState.LOADING, fraction))

        try:
            engine = setup.load(progress)
            message = OpenTier(tier, engine, setup.limits(engine))
        except LoadAbandoned:
            return
        except SageFedError as error:
            self._fail(tier, error.message)
        except Exception:  # a loader of foreign files may raise anything
            logger.exception("loading the %s tier failed", tier.name)
            self._fail(tier, "loading failed; the daemon's log has the details")
        else:
            if not self._inbox.post(message):
                close_engine(engine)

    def _fail(self, tier: Tier, message: str) -> None:
        self._tell(TierStatus(tier, TierState.FAILED, message=message))

    def _tell(self, status: TierStatus) -> None:
        self._handover.put(status=status)
        self._handover.send()


def close_engine(engine: Engine) -> None:
    """Close an engine for good; a broken one that does not even close is only logged."""
    try:
        engine.close()
    except Exception:  # the process goes on without it
        logger.exception("an engine did not close")
