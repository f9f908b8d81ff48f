"""What the client gives back that core has no word for."""

from __future__ import annotations

from dataclasses import dataclass

from sage_fed.core import Finished, Logprob, OpenReply, RunningJob, Started, TierLoad
from sage_fed.ledger.entries import Day, Entry


@dataclass(frozen=True, slots=True)
class Answer:
    """One job's whole answer."""

    started: Started
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finished: Finished


@dataclass(frozen=True, slots=True)
class TokenCount:
    """A prompt's tokens, and the longest context (prompt and output) of the tier."""

    prompt_tokens: int
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class EntryPage:
    """Ledger entries, newest first; `next_page_token` is empty on the last page.

    `days` is what is left of older ones, behind the oldest entry.
    """

    entries: tuple[Entry, ...]
    next_page_token: str
    days: tuple[Day, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What runs and waits now; `held_uatp` is over all accounts.

    `unread` are replies that have waited for their readers for a second or longer.
    """

    tiers: tuple[TierLoad, ...]
    jobs: tuple[RunningJob, ...]
    held_uatp: int
    unread: tuple[OpenReply, ...] = ()
    open_calls: int = 0
    connections: int = 0
