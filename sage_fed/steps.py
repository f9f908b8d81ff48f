"""What the scheduler asks of an engine for one step, and what the engine answers.

Floor 0, so that `scheduler` (no torch) and `engine` (no queues) need not know each other,
and `metrics` need not know the executor that reports its steps.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Protocol

from sage_fed.core import DraftOrigin, Logprob, ModelInfo, Sampling, Tier

BLOCK_SIZE = 16
"""Tokens in one KV block; a sequence owns whole blocks."""

PENDING = -1
"""In a chunk, as its first token: what the step launched before this one draws last for
`seq_id`.

The host need not know it yet. It has to be known where a draw of the same chunk lists what was
`seen`, because that is the host's to say.
"""

NO_TOKEN = -1
"""In a `SampledToken`: the logits were not all finite numbers, so that none can be sampled."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How to choose the token that follows a position.

    `index` counts the sequence's output tokens; with `sampling.seed` it determines the
    random number, so the choice does not depend on what else is in the batch.
    `seen` are the token ids that a repetition penalty applies to; empty when it is 1. `counts` are
    (token id, how often the output has it), empty without presence and frequency penalties.
    """

    sampling: Sampling
    index: int
    seen: tuple[int, ...] = ()
    counts: tuple[tuple[int, int], ...] = ()


class History:
    """The earlier tokens of one sequence, as far as its penalties look at them."""

    def __init__(self, sampling: Sampling, prompt: tuple[int, ...]) -> None:
        self._sampling = sampling
        self._penalises = sampling.penalises
        self._repetition = sampling.repetition_penalty != 1.0
        # Kept as a tuple of distinct ids that grows rarely, because each step's Draw holds it.
        self._seen = tuple(dict.fromkeys(prompt)) if self._repetition else ()
        self._seen_set = set(self._seen)
        self._counts: Counter[int] = Counter()

    def add(self, token_id: int) -> None:
        """Note a token of the output."""
        if not self._penalises:
            return
        if self._repetition and token_id not in self._seen_set:
            self._seen_set.add(token_id)
            self._seen = (*self._seen, token_id)
        if self._sampling.counts_output:
            self._counts[token_id] += 1

    def draw(self, index: int, draft: tuple[int, ...] = ()) -> Draw:
        """Return the draw of output token `index`, behind these draft tokens."""
        if not self._penalises:  # of nearly every step's rows
            return Draw(self._sampling, index)
        seen, counts = self._seen, self._counts
        if draft and self._repetition:
            seen += tuple(id_ for id_ in dict.fromkeys(draft) if id_ not in self._seen_set)
        if draft and self._sampling.counts_output:
            counts = counts + Counter(draft)
        return Draw(self._sampling, index, seen, tuple(counts.items()) if counts else ())


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: a piece of its prompt, or its newest token.

    `start` is the position of `token_ids[0]`; every earlier position is in the cache already.
    `blocks` are the sequence's KV blocks in order, enough for `start + len(token_ids)`. Full ones
    before `start` may be shared with other sequences; they are only read.
    Its last `len(draws)` positions are drawn from, one `SampledToken` each, in order: none where no
    token is wanted yet (a prompt piece that is not the last), several where draft tokens are
    verified. What each draw has `seen` is then the accepted tokens and the draft before it.
    """

    seq_id: int
    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    draws: tuple[Draw, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of one tier's engine over a ragged batch of chunks."""

    tier: Tier
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens fed to the model in this step."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def num_context_tokens(self) -> int:
        """Tokens in the KV cache that the chunks attend to, their own included."""
        return sum(chunk.start + len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token chosen for one draw of a chunk; `logprob` only where it was asked for.

    `token_id` is `NO_TOKEN` where the model's numbers have broken down for this sequence. The
    scheduler says which were `accepted`: drafted, and then the model's own choice.
    """

    seq_id: int
    token_id: int
    logprob: Logprob | None = None
    accepted: bool = False


class StepKind(enum.Enum):
    """What a step was made of; a metric label."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    DRAFT = "draft"


@dataclass(frozen=True, slots=True)
class VerifiedDrafts:
    """Drafts of one origin of which equally many tokens were accepted.

    Of the `num_tokens` that were verified in all `num_drafts`, each had `num_accepted`.
    """

    origin: DraftOrigin
    num_accepted: int
    num_tokens: int
    num_drafts: int = 1


def added_up(drafts: Iterable[VerifiedDrafts]) -> tuple[VerifiedDrafts, ...]:
    """Return the same drafts, those alike as one: origins times lengths are the most."""
    alike: dict[tuple[DraftOrigin, int], VerifiedDrafts] = {}
    for one in drafts:
        key = (one.origin, one.num_accepted)
        if (known := alike.get(key)) is not None:
            one = replace(  # noqa: PLW2901 - the sum stands for it
                known,
                num_tokens=known.num_tokens + one.num_tokens,
                num_drafts=known.num_drafts + one.num_drafts,
            )
        alike[key] = one
    return tuple(alike.values())


@dataclass(frozen=True, slots=True)
class StepReport:
    """What was done by one step, or by several of a kind where the event loop had stalled.

    `num_prefill_tokens`, `num_decode_tokens`, `num_draft_tokens` (a drafter's, for the tier
    `drafts_for`) and `num_verify_tokens` (drafts) are tokens fed to the model, `num_sequences`
    the sum of the steps' batch sizes, `elapsed_s` the device's time. `verified` says what became of
    the drafts. `num_context_tokens` are
    the tokens in the KV cache that the steps' sequences attended to, their own included.
    The sequences that started had `num_queried_tokens`, and found `num_hit_tokens` of them in the
    prefix cache; where it is off, both are 0. `num_preempted` were interrupted for the steps.
    """

    tier: Tier
    kind: StepKind
    num_steps: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_sequences: int
    elapsed_s: float
    out_of_memory: bool = False
    num_context_tokens: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_preempted: int = 0
    num_draft_tokens: int = 0
    num_verify_tokens: int = 0
    drafts_for: Tier | None = None
    verified: tuple[VerifiedDrafts, ...] = ()

    def plus(self, other: StepReport) -> StepReport:
        """Return a report of the steps of both, which are alike but for their numbers."""
        names = [f.name for f in fields(self) if f.name.startswith(("num_", "elapsed_"))]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return replace(self, **sums, verified=added_up((*self.verified, *other.verified)))


class InFlightStep(Protocol):
    """A launched step; waited for once, in the order of the engine's launches."""

    @property
    def paused(self) -> bool:
        """Whether work is left that waits for `resume`."""

    def resume(self, pause_after_s: float | None) -> None:
        """Go on with a paused step as `Engine.launch` began it, and fail as that does."""

    @property
    def device_s(self) -> float | None:
        """Seconds that the device took, once waited for; None where it has no clock of its own."""

    def wait(self) -> tuple[SampledToken, ...]:
        """Wait for the device; one `SampledToken` a draw, in the chunks' order.

        Not of a paused step.
        """


class Engine(Protocol):
    """One model on one device; used by one thread at a time.

    `launch` raises `DeviceOutOfMemory` where the step did not fit; it may then be run again,
    because all that a step leaves behind are KV entries that a repetition overwrites.
    After any other exception, also of `InFlightStep.wait`, the engine is not used again; after
    `DeviceLost` no engine is.
    """

    @property
    def pipelined(self) -> bool:
        """Whether `launch` returns while the device still works, so that waiting can wait."""

    @property
    def num_parts(self) -> int:
        """Into how many parts of about the same length a step can be divided; 1: not at all."""

    @property
    def info(self) -> ModelInfo:
        """What was loaded."""

    @property
    def num_blocks(self) -> int:
        """KV blocks of `BLOCK_SIZE` tokens; a chunk's `blocks` are below it."""

    @property
    def max_context_tokens(self) -> int:
        """The longest sequence, prompt and output together."""

    @property
    def num_ids(self) -> int:
        """Token ids from 0 on that it can be fed."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""

    @property
    def defaults(self) -> Sampling:
        """The checkpoint's own sampling."""

    def launch(self, step: Step, pause_after_s: float | None = None) -> InFlightStep:
        """Queue one forward pass behind those launched; where not pipelined, run it.

        With `pause_after_s` run as many of its parts as that time is enough for, and one at
        least; then the step may be paused. Until it is done this engine launches no other.
        """

    def run(self, step: Step) -> tuple[SampledToken, ...]:
        """Launch and wait."""

    def close(self) -> None:
        """Free the device's memory."""
