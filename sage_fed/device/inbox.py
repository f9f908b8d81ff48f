"""What the event loop and the loader say to the device's thread.

Owns the messages under way and the count of sequences that have not started, so that the
bound on waiting holds over both. A device's thread with nothing to do sleeps here, unpolled.
Fails with QueueFull; a closed inbox takes nothing and says so.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from sage_fed.core import Tier
from sage_fed.device.limits import TierLimits
from sage_fed.device.probe import Probe
from sage_fed.device.words import SequenceSpec
from sage_fed.errors import QueueFull
from sage_fed.steps import Engine


@dataclass(frozen=True, slots=True)
class Submit:
    """Run a sequence."""

    spec: SequenceSpec
    submitted_s: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a sequence at the next step boundary."""

    seq_id: int


@dataclass(frozen=True, slots=True)
class OpenTier:
    """Serve a tier with this engine, which is the device thread's from now on."""

    tier: Tier
    engine: Engine
    limits: TierLimits


@dataclass(frozen=True, slots=True)
class Stop:
    """End everything and leave."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Turn the loop once: whoever does so beats, also with nothing to do."""


Message = Submit | Cancel | OpenTier | Probe | Ping | Stop


class Inbox:
    """Messages in order; bounded for `Submit`, by live sequences for the others."""

    def __init__(self, max_waiting: Mapping[Tier, int]) -> None:
        self._max_waiting = dict(max_waiting)
        self._waiting = dict.fromkeys(self._max_waiting, 0)
        self._retry_after_s: dict[Tier, float | None] = {}
        self._messages: list[Message] = []
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, message: Submit) -> None:
        """Give a sequence to the device's thread.

        Raises:
            QueueFull: the tier's bound of sequences has not started yet.
        """
        tier = message.spec.tier
        with self._changed:
            if self._waiting[tier] >= self._max_waiting[tier]:
                retry_after_s = self._retry_after_s.get(tier) or 1.0
                raise QueueFull.of_tier(tier.name, self._waiting[tier], retry_after_s)
            self._waiting[tier] += 1
            self._messages.append(message)
            self._changed.notify()

    def post(self, message: Cancel | OpenTier | Probe | Ping | Stop) -> bool:
        """Say something else; False where nobody will hear it any more."""
        with self._changed:
            if self._closed:
                return False
            if isinstance(message, Ping) and message in self._messages:
                # A thread that hangs is asked again and again: one question is enough.
                return True
            self._messages.append(message)
            self._changed.notify()
            return True

    def take(self, *, wait: bool) -> list[Message]:
        """Return all messages, at least one where `wait` (the device's thread only)."""
        with self._changed:
            while wait and not self._messages:
                # No deadline: a stop is a message too.
                self._changed.wait()
            messages, self._messages = self._messages, []
            return messages

    def note_waiting(self, tier: Tier, count: int, retry_after_s: float | None) -> None:
        """Say how many of the tier's sequences wait, once all that was taken is dealt with."""
        with self._changed:
            under_way = sum(isinstance(m, Submit) and m.spec.tier is tier for m in self._messages)
            self._waiting[tier] = count + under_way
            self._retry_after_s[tier] = retry_after_s

    def waiting(self, tier: Tier) -> int:
        """Return how many sequences of the tier have not started, those under way included."""
        with self._changed:
            return self._waiting[tier]

    def close(self) -> list[Message]:
        """Take no more, and return what nobody dealt with."""
        with self._changed:
            self._closed = True
            messages, self._messages = self._messages, []
            return messages
