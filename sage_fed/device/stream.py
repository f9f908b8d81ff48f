"""One sequence's output on the event loop: tokens as they come, then exactly one ending.

Owns what its reader has not taken yet: at most `max_new_tokens` tokens, whatever the reader
does, so a slow reader merges and never stalls the device. Event loop only, one reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sage_fed.device.words import Ended, SequenceSpec
from sage_fed.steps import SampledToken


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens since the last `next`, at least one, in order."""

    drawn: tuple[SampledToken, ...]


class TokenStream:
    """What `Executor.submit` returns; the executor writes it, one reader reads it."""

    def __init__(self, spec: SequenceSpec, submitted_s: float) -> None:
        self.spec = spec
        self.submitted_s = submitted_s
        self.num_tokens = 0
        self.cancel_asked = False
        self._unread: list[SampledToken] = []
        self._ended: Ended | None = None
        self._changed = asyncio.Event()
        self._over = asyncio.Event()
        self._reader: Callable[[Sequence[SampledToken]], None] | None = None
        self._delivered: asyncio.Future[Ended] | None = None

    @property
    def ended(self) -> Ended | None:
        """The ending, if it has come; tokens before it may still be unread."""
        return self._ended

    async def next(self) -> Tokens | Ended:
        """Wait for more; the ending comes after the last token, and again if asked again.

        No deadline of its own: every stream is ended whatever happens to the device, and a
        reader with a deadline may cancel this wait without losing a token.
        """
        while not self._unread and self._ended is None:
            self._changed.clear()
            await self._changed.wait()
        if self._unread:
            drawn, self._unread = tuple(self._unread), []
            return Tokens(drawn)
        assert self._ended is not None
        return self._ended

    async def deliver(self, reader: Callable[[Sequence[SampledToken]], None]) -> Ended:
        """Call `reader` with tokens the moment they come, and return the ending.

        No task is woken for a token, which at many streams is what an event loop does most.
        What `reader` raises is raised here, and it is not called again.
        """
        assert self._delivered is None, "one reader"
        unread, self._unread = self._unread, []
        if unread:
            reader(unread)
        if self._ended is not None:
            return self._ended
        self._delivered = asyncio.get_running_loop().create_future()
        self._reader = reader
        try:
            return await self._delivered
        finally:
            self._reader = self._delivered = None

    async def wait_ended(self) -> Ended:
        """Wait for the ending without reading."""
        await self._over.wait()
        assert self._ended is not None
        return self._ended

    def push(self, drawn: Sequence[SampledToken]) -> None:
        """Write tokens (the executor only)."""
        assert self._ended is None
        self.num_tokens += len(drawn)
        if self._reader is None:
            self._unread.extend(drawn)
            self._changed.set()
            return
        try:
            self._reader(drawn)
        except Exception as error:  # noqa: BLE001 - a reader's failure is its own, not its neighbours'
            self._reader = None
            if self._delivered is not None and not self._delivered.done():
                self._delivered.set_exception(error)

    def end(self, ended: Ended) -> None:
        """Write the one ending (the executor only)."""
        assert self._ended is None, "a sequence ends once"
        self._ended = ended
        self._changed.set()
        self._over.set()
        if self._delivered is not None and not self._delivered.done():
            self._delivered.set_result(ended)
