"""Prompts to ids, per tier, where and when that is fair.

Owns what is encoded on the event loop (what takes about a millisecond) and what waits for a
thread in its account's turn; and what is not encoded at all: a conversation whose length alone
says that no tier can take it, and the token ids that a client sends itself.
Fails with `InvalidField` for a prompt that cannot be encoded and with `RateLimited` for an account
that has as much waiting as it may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sage_fed.core import Prompt, Tier
from sage_fed.text import Tokenizer
from sage_fed.workers import Workers

_INLINE_SIZE = 1024
"""Encoding this much takes about a millisecond at most, whatever it is; more goes to a thread."""

_MESSAGE_SIZE = 32
"""What a message costs besides its characters: the template's loop."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's size on every tier, and its ids.

    `ids` is empty for an unread prompt: its `num_tokens` are the fewest that it can have, more
    than any tier takes.
    """

    num_tokens: Mapping[Tier, int]
    ids: Mapping[Tier, tuple[int, ...]]

    @property
    def unread(self) -> bool:
        """Whether its length alone was enough to refuse it."""
        return not self.ids


class Encoder:
    """The tokenizers of the tiers; those that share one share the work."""

    def __init__(self, tokenizers: Mapping[Tier, Tokenizer], workers: Workers) -> None:
        self.tokenizers = tokenizers
        self._workers = workers
        self._distinct = tuple({id(own): own for own in tokenizers.values()}.values())

    async def encode(
        self, prompt: Prompt, account: str, *, max_tokens: int | None = None
    ) -> Encoded:
        """Return a prompt's ids, in its account's turn.

        Args:
            prompt: what to encode.
            account: who asks.
            max_tokens: what certainly has more for every tokenizer is left unread.

        Raises:
            InvalidField: the template refuses the messages, or an id has no meaning.
            RateLimited: the account has as much waiting as it may.
        """
        if not prompt.messages:
            return self._as_sent(prompt.token_ids, max_tokens)
        size = sum(len(message.content) + _MESSAGE_SIZE for message in prompt.messages)
        if max_tokens is not None and size <= max_tokens:
            max_tokens = None  # its length cannot say that it is too long
        size *= len(self._distinct)
        if size <= _INLINE_SIZE:
            return self._encode(prompt, max_tokens)
        self._workers.require_room(account, size)
        return await self._workers.run(account, size, lambda: self._encode(prompt, max_tokens))

    def _encode(self, prompt: Prompt, max_tokens: int | None) -> Encoded:
        if max_tokens is not None:
            least = {id(own): own.least_tokens(prompt.messages) for own in self._distinct}
            if min(least.values()) > max_tokens:
                return Encoded({tier: least[id(own)] for tier, own in self.tokenizers.items()}, {})
        ids = {id(own): own.encode_messages(prompt.messages) for own in self._distinct}
        return _read({tier: ids[id(own)] for tier, own in self.tokenizers.items()})

    def _as_sent(self, ids: tuple[int, ...], max_tokens: int | None) -> Encoded:
        """Take the ids that a client sends, which are checked only where a tier can take them."""
        if max_tokens is not None and len(ids) > max_tokens:
            return Encoded(dict.fromkeys(self.tokenizers, len(ids)), {})
        for own in self._distinct:
            own.validate_ids(ids)
        return _read(dict.fromkeys(self.tokenizers, ids))


def _read(ids: Mapping[Tier, tuple[int, ...]]) -> Encoded:
    return Encoded({tier: len(own) for tier, own in ids.items()}, ids)
