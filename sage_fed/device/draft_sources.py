"""Where draft tokens come from without a model, and how often they are what the model draws.

Owns one sequence's index of earlier text (the answer that it was given as a draft, its prompt, its
own output), the search for what followed the last time, and the estimate of acceptance. Knows no
step, no device and no clock. Cannot fail.

The search is prompt lookup decoding (Saxena 2023) and its like in vLLM ("ngram"): the longest
suffix of the sequence that occurs earlier proposes what followed there. In a given answer this also
finds the place again after a token that differed: a doubtful answer's tokens mostly agree in place,
while its prefix alone is short.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from sage_fed.core import DraftAcceptance, DraftOrigin

_LONGEST_MATCH = 8
"""Tokens of a suffix that are compared: longer ones tell nothing more."""

_CANDIDATES = 32
"""Occurrences that are compared, the latest first: a bound for tokens that are everywhere."""

_MEMORY = 0.95
"""What a verified draft leaves of the weight of those before it."""

_PRIOR_WEIGHT = 4.0
"""Tested tokens that the expectation counts for."""


@dataclass(slots=True)
class Acceptance:
    """How likely the next draft token is what the model draws, given that those before it were.

    `expected` is what is assumed before anything was tested.
    """

    expected: float
    accepted: float = 0.0
    tested: float = 0.0

    @property
    def rate(self) -> float:
        """The estimate, in [0, 1]."""
        weight = _PRIOR_WEIGHT
        return (self.accepted + weight * self.expected) / (self.tested + weight)

    def note(self, num_accepted: int, num_drafted: int) -> None:
        """Take in a verified draft: behind the first token that differed, none was tested."""
        self.accepted = self.accepted * _MEMORY + num_accepted
        self.tested = self.tested * _MEMORY + min(num_accepted + 1, num_drafted)

    def fade(self, share: float) -> None:
        """Forget a share of what was tested, so that what once failed is tried again."""
        self.accepted *= 1.0 - share
        self.tested *= 1.0 - share


@dataclass(frozen=True, slots=True)
class Source:
    """A draft's origin and how long a suffix was found: what its acceptance depends on."""

    origin: DraftOrigin
    match: int = 0


_EXPECTED = {
    Source(DraftOrigin.DRAFTER): 0.75,
    Source(DraftOrigin.ANSWER, 0): 0.7,
    Source(DraftOrigin.ANSWER, 1): 0.5,
    Source(DraftOrigin.ANSWER, 2): 0.7,
    Source(DraftOrigin.ANSWER, 4): 0.85,
    Source(DraftOrigin.ANSWER, 8): 0.9,
    Source(DraftOrigin.LOOKUP, 2): 0.4,
    Source(DraftOrigin.LOOKUP, 4): 0.65,
    Source(DraftOrigin.LOOKUP, 8): 0.8,
}
"""Assumed before a source was tested; the order of magnitude of a 0.5B and a 1.5B on code."""


class Estimates:
    """Acceptance by source: of one sequence where it has its own, else of the tier's others."""

    def __init__(self, tier: Estimates | None = None) -> None:
        self._tier = tier
        self._by_source: dict[Source, Acceptance] = {}
        self._by_origin: dict[DraftOrigin, Acceptance] = {}
        """What was measured of a tier; a plan that finds nothing forgets none of it."""

    @property
    def measured(self) -> tuple[DraftAcceptance, ...]:
        """The share of compared tokens that was accepted lately, by origin."""
        return tuple(
            DraftAcceptance(origin, of.accepted / of.tested)
            for origin, of in self._by_origin.items()
        )

    def rate(self, source: Source) -> float:
        """Return the acceptance to expect of a source's next token."""
        own = self._by_source.get(source)
        if own is None:
            return self._tier.rate(source) if self._tier else _EXPECTED[source]
        if self._tier:
            own.expected = self._tier.rate(source)
        return own.rate

    def note(self, source: Source, num_accepted: int, num_drafted: int) -> None:
        """Take in a verified draft, here and for the tier."""
        if source not in self._by_source:
            self._by_source[source] = Acceptance(self.rate(source))
        self._by_source[source].note(num_accepted, num_drafted)
        if self._tier:
            self._tier.note(source, num_accepted, num_drafted)
            return
        if source.origin not in self._by_origin:
            self._by_origin[source.origin] = Acceptance(0.0)
        self._by_origin[source.origin].note(num_accepted, num_drafted)

    def fade(self, share: float) -> None:
        """Forget a share of all that was tested."""
        for acceptance in self._by_source.values():
            acceptance.fade(share)


@dataclass(slots=True)
class SuffixIndex:
    """Token ids, and where each of them stands."""

    token_ids: list[int] = field(default_factory=list)
    _places: dict[int, list[int]] = field(default_factory=dict)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append token ids."""
        for token_id in token_ids:
            self._places.setdefault(token_id, []).append(len(self.token_ids))
            self.token_ids.append(token_id)

    def find(self, text: Sequence[int], near: int | None = None) -> tuple[int, int]:
        """Find the longest suffix of `text`: where what follows it stands, and its length.

        Of equally long ones the latest, or the first behind place `near` where that is given.
        Length 0 where not even the last token occurs with something behind it.
        """
        places = self._places.get(text[-1], []) if text else []
        middle = len(places) if near is None else bisect_left(places, near)
        around = places[max(middle - _CANDIDATES, 0) : middle + _CANDIDATES]
        best, longest, last = 0, 0, len(self.token_ids) - 1
        for place in reversed(around):
            if place == last:
                continue
            length, most = 1, min(_LONGEST_MATCH, place + 1, len(text))
            while length < most and self.token_ids[place - length] == text[-1 - length]:
                length += 1
            nearer = near is not None and length == longest and near <= place + 1
            if length > longest or nearer:
                best, longest = place + 1, length
        return best, longest


class FreeDrafts:
    """What one sequence's given answer, prompt and output propose, at no step of a model.

    `answer` is aligned with the output's beginning at first. After a token that differs from it,
    the place is sought again by the longest suffix.
    """

    def __init__(self, prompt: Sequence[int], answer: Sequence[int] = ()) -> None:
        self._answer = SuffixIndex()
        self._answer.extend(answer)
        self._text = SuffixIndex()
        self._unread_prompt = prompt
        """Indexed when it is first searched: what waits in a queue needs no index."""
        self._num_prompt = len(prompt)
        self._at = 0
        """Where the answer goes on, as it is aligned now."""
        self._match = 0
        """How many tokens the output has followed the answer there."""

    def note(self, token_ids: Sequence[int]) -> None:
        """Take in new output, in order."""
        self._read_prompt()
        for token_id in token_ids:
            self._text.extend((token_id,))
            answer = self._answer.token_ids
            if self._at < len(answer) and answer[self._at] == token_id:
                self._at, self._match = self._at + 1, min(self._match + 1, _LONGEST_MATCH)
            elif answer:
                text = self._text.token_ids
                output = text[max(self._num_prompt, len(text) - _LONGEST_MATCH) :]
                at, match = self._answer.find(output, near=self._at)
                # Nothing of it found: a token that replaces one is the likeliest difference.
                self._at, self._match = (at, match) if match else (self._at + 1, 0)

    def propose(self, longest: int) -> tuple[Source, tuple[int, ...]] | None:
        """Return the better proposal of at most `longest` tokens; None where there is none."""
        answer = self._answer.token_ids[self._at : self._at + longest]
        if answer and (self._match or self._at == 0):
            return Source(DraftOrigin.ANSWER, _bucket(self._match)), tuple(answer)
        self._read_prompt()
        text = self._text.token_ids
        at, match = self._text.find(text)
        if match >= 2:
            return Source(DraftOrigin.LOOKUP, _bucket(match)), tuple(text[at : at + longest])
        if answer:
            return Source(DraftOrigin.ANSWER, 0), tuple(answer)
        return None

    def _read_prompt(self) -> None:
        if self._unread_prompt:
            self._text.extend(self._unread_prompt)
            self._unread_prompt = ()


def _bucket(match: int) -> int:
    """Round a match's length down to 0, 1, 2, 4 or 8."""
    return 1 << (match.bit_length() - 1) if match else 0


_FIRST_CAP = 4
_LEAST_CAP = 2
_LAST_CAP = 64
"""Draft tokens at most: about twice as many as were accepted of late, so that a source that fails
costs little, and one that does not is soon used in full."""


class SequenceDrafts:
    """One sequence's drafts: the one to be verified next, and what is known of those before it.

    `proposal` comes from `source` and is fed behind the sequence's newest token.
    """

    def __init__(
        self, prompt: Sequence[int], answer: Sequence[int], estimates: Estimates | None
    ) -> None:
        self.estimates = Estimates(estimates)
        self.proposal: tuple[int, ...] = ()
        self.source: Source | None = None
        self._free = FreeDrafts(prompt, answer)
        self._lately = _FIRST_CAP / 2
        """Tokens accepted of a draft, lately."""
        self._unread: list[int] = []
        """Output that no search has needed yet: where drafts do not pay, it is never indexed."""
        if answer and (first := self._free.propose(self.cap)):
            self.source, self.proposal = first

    @property
    def cap(self) -> int:
        """How many tokens to draft at most."""
        return min(max(round(2.0 * self._lately), _LEAST_CAP), _LAST_CAP)

    def find(self) -> tuple[Source, tuple[int, ...]] | None:
        """Return what the earlier text proposes, if anything."""
        self._free.note(self._unread)
        self._unread.clear()
        return self._free.propose(self.cap)

    def note_output(self, token_id: int) -> None:
        """Take in a token of the output."""
        self._unread.append(token_id)

    def note_verified(self, num_accepted: int, num_drafted: int) -> None:
        """Take in what was accepted of the proposal's first `num_drafted` tokens."""
        source, self.source, self.proposal = self.source, None, ()
        assert source is not None, "a draft has a source"
        self.estimates.note(source, num_accepted, num_drafted)
        # Of one that was accepted whole, more might have been.
        reached = 2 * num_drafted if num_accepted == num_drafted else num_accepted
        self._lately += 0.5 * (reached - self._lately)
