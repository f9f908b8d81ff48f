"""One sequence: what is asked for, a tier's bounds for it, how far it is, and how it ended.

Owns a sequence's tokens, its position, its draft, its blocks and its account of device time.
Knows nothing of other sequences, of queues or of the device. Fails with `InvalidField` for what
could never run on a tier.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from sage_fed.core import DraftOrigin, Priority, Sampling, Tier
from sage_fed.device.draft_sources import Estimates, SequenceDrafts
from sage_fed.device.kv_blocks import BlockKeys, BlockPool, blocks_for
from sage_fed.errors import InvalidField
from sage_fed.steps import BLOCK_SIZE, PENDING, Chunk, Draw, History


class EndReason(enum.Enum):
    """Why a sequence ended; every submitted one ends with exactly one of these."""

    EOS = "eos"
    STOP_TOKEN = "stop_token"  # noqa: S105 - a token of a text
    LENGTH = "length"
    CANCELLED = "cancelled"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    FAILED = "failed"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """What a token counts for between accounts, by phase: its price in uATP, or its equal."""

    prefill: int = 1
    cached: int = 0
    decode: int = 1


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence to run; `seq_id` is unique among those that have not ended.

    `prompt` are token ids, at least one; `max_new_tokens` is at least 1.
    `account` is whose it is: only the same account's sequences find its blocks again, and accounts
    share the tier fairly by what was served to them, which `weights` measure.
    `stop_token_ids` end it as the model's end tokens do, also where `ignore_eos` ignores those.
    `prefix_cache` False neither looks for known blocks nor leaves any behind.
    With `speculates`, tokens are drafted where that is sooner: from `draft_tokens` (an answer that
    is known), the prompt and the output, and by the tier `drafter`, if there is one. The output
    keeps a draft as far as it is the model's own choice: drafts change its time and nothing else.
    """

    seq_id: int
    tier: Tier
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    priority: Priority = Priority.NORMAL
    account: str = ""
    prefix_cache: bool = True
    weights: TokenWeights = TokenWeights()
    speculates: bool = False
    draft_tokens: tuple[int, ...] = ()
    drafter: Tier | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence's ending. Instants (`*_s` but `device_s`) are on the executor's monotonic clock.

    `started_s` is the beginning of its first step, `first_token_s` and `last_token_s` are of
    delivered tokens; None where it did not come so far.
    `prompt_tokens` have their keys and values (less than the prompt's where it ended early);
    `cached_tokens` of them were found in the prefix cache, the others were fed to the model.
    `output_tokens` were delivered (a token that ends the text is neither delivered nor counted);
    `drafted_tokens` were made by its drafter in `draft_s` of the device's time; `verified_tokens`,
    of whatever origin, were scored, and `accepted_tokens` of those are in the output.
    `stop_token_id` is the one of `stop_token_ids` that ended it.
    `device_s` is its part of its own tier's steps' time, by tokens: over all sequences, with
    `draft_s`, it adds up to the time that the device was busy.
    """

    seq_id: int
    reason: EndReason
    submitted_s: float
    ended_s: float
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    device_s: float = 0.0
    stop_token_id: int | None = None
    verified_tokens: int = 0
    accepted_tokens: int = 0
    drafted_tokens: int = 0
    draft_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TierLimits:
    """A tier's bounds; `prefill_chunk_tokens` are prompt tokens a step, over all sequences.

    `ageing_s` of waiting make up for one level of priority. An account that waits `overdue_s`
    for a start goes before all that have waited less; one that is far behind may after
    `preempt_after_s` interrupt others. A sequence is interrupted `max_preemptions` times at most.
    `prefix_cache` keeps the full blocks of sequences for later ones of the same account.
    `kv_overcommit` is by how much outputs are expected to fall short of their maximum; at 1.0
    every sequence has the blocks of its worst case from the start.
    `num_ids` are the token ids that the model can be fed, where it has fewer than its tokenizer.
    """

    num_blocks: int
    max_context_tokens: int
    max_batch: int = 16
    max_waiting: int = 64
    prefill_chunk_tokens: int = 512
    ageing_s: float = 30.0
    overdue_s: float = 60.0
    preempt_after_s: float = 5.0
    max_preemptions: int = 2
    prefix_cache: bool = True
    kv_overcommit: float = 1.0
    num_ids: int | None = None

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV blocks hold."""
        return self.num_blocks * BLOCK_SIZE

    def has_row(self, token_id: int) -> bool:
        """Whether the model can be fed a token, which may come from another one's output."""
        return self.num_ids is None or token_id < self.num_ids

    def check(self, spec: SequenceSpec) -> None:
        """Refuse a sequence that could never run.

        Raises:
            InvalidField: naming the field that has to be smaller.
        """
        if not spec.prompt:
            raise InvalidField("prompt", "is empty")
        if spec.max_new_tokens < 1:
            raise InvalidField("sampling.max_new_tokens", "has to be at least 1")
        if self.num_ids is not None and max(spec.prompt) >= self.num_ids:
            raise InvalidField("prompt", f"holds an id beyond the model's {self.num_ids}")
        longest = min(self.max_context_tokens, self.kv_tokens)
        if len(spec.prompt) >= longest:
            raise InvalidField(
                "prompt",
                f"{len(spec.prompt)} tokens leave no room for output; "
                f"the {spec.tier.name} tier holds {longest} tokens, prompt and output together",
            )
        if len(spec.prompt) + spec.max_new_tokens > longest:
            raise InvalidField(
                "sampling.max_new_tokens",
                f"at most {longest - len(spec.prompt)} fit behind this prompt; "
                f"the {spec.tier.name} tier holds {longest} tokens, prompt and output together",
            )

    def protects(self, seq: Sequence) -> bool:
        """Whether a sequence has been interrupted often enough; it gets its worst case, too."""
        return seq.preemptions >= self.max_preemptions

    def blocks_to_start(self, seq: Sequence) -> int:
        """Return how many blocks a sequence has to have before it starts, or starts again."""
        left = seq.spec.max_new_tokens - seq.num_output
        if not self.protects(seq):
            left = math.ceil(left / self.kv_overcommit)
        return blocks_for(len(seq.token_ids) + left)


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence between `add` and its ending; `order` is its place among all that were added.

    `token_ids` are the prompt and what was delivered; the first `num_stored` of them have their
    keys and values in `blocks`. `num_fed` tokens were handed to the device, in `num_in_flight`
    steps that are not computed yet, which will sample the `num_pending` tokens that follow, or more
    where they verify `num_drafted` draft tokens.

    A sequence that is interrupted loses its blocks and feeds all of its tokens again, which is not
    charged: `prompt_done` and `cached_tokens` only say how its prompt was reached first.
    `counted_uatp` is what its account was counted for it.
    """

    spec: SequenceSpec
    submitted_s: float
    order: int
    estimates: Estimates | None = None
    token_ids: list[int] = field(init=False)
    blocks: tuple[int, ...] = ()
    num_stored: int = 0
    num_fed: int = 0
    num_pending: int = 0
    num_drafted: int = 0
    num_in_flight: int = 0
    num_output: int = 0
    prompt_done: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    counted_uatp: int = 0
    num_at_start: int = 0
    """Its tokens when it last started."""
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    device_s: float = 0.0
    ending: EndReason | None = None
    """Why it ends once no launched step is for it any more."""
    stop_token_id: int | None = None
    verified_tokens: int = 0
    accepted_tokens: int = 0
    drafted_tokens: int = 0
    draft_s: float = 0.0
    num_drafting: int = 0
    """Launched steps of a drafter that are for it."""
    drafts: SequenceDrafts | None = field(init=False, default=None)
    num_planned: int = 0
    """Draft tokens that the newest plan has for it."""
    speculates_now: bool = False
    """Whether its next step may have a draft: then no step is built behind one of its own."""
    _keys: BlockKeys = field(init=False)
    _history: History = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.spec.prompt)
        self._keys = BlockKeys(self.spec.account)
        self._history = History(self.spec.sampling, self.spec.prompt)
        if self.spec.speculates:
            spec = self.spec
            self.drafts = SequenceDrafts(spec.prompt, spec.draft_tokens, self.estimates)
            self.speculates_now = True

    @property
    def num_sampled(self) -> int:
        """Output tokens that were sampled, or will be by a launched step."""
        return self.num_output + self.num_pending

    @property
    def length(self) -> int:
        """Its tokens, with those that launched steps will sample."""
        return len(self.token_ids) + self.num_pending

    @property
    def decodes(self) -> bool:
        """Whether all but its newest token, which was sampled, has been fed."""
        # Asked several times a token: written out, without a property of a property.
        pending = self.num_pending
        sampled = self.num_output + pending
        return sampled > 0 and self.num_fed + 1 == len(self.token_ids) + pending

    @property
    def prefill_left(self) -> int:
        """Tokens that have to be fed before the next is sampled, beyond a newest one."""
        return 0 if self.decodes else self.length - self.num_fed

    @property
    def is_in_flight(self) -> bool:
        """Whether a launched step, its own tier's or a drafter's, is for it."""
        return self.num_in_flight > 0 or self.num_drafting > 0

    @property
    def done(self) -> bool:
        """Whether it is fed nothing more, whatever the launched steps bring."""
        return self.ending is not None or self.num_sampled >= self.spec.max_new_tokens

    @property
    def awaits_tokens(self) -> bool:
        """Whether its next chunk depends on tokens that only the device knows yet."""
        if self.num_drafted > 0:
            return True
        return self.num_pending > 0 and (self.speculates_now or self.spec.sampling.penalises)

    @property
    def served_uatp(self) -> int:
        """What it was served: tokens computed, found and delivered, by their weights."""
        weights = self.spec.weights
        computed = self.prompt_done - self.cached_tokens
        return (
            computed * weights.prefill
            + self.cached_tokens * weights.cached
            + self.num_output * weights.decode
        )

    @property
    def promised_uatp(self) -> int:
        """What it will have been served once its whole prompt is, and nothing more."""
        left = len(self.spec.prompt) - self.prompt_done
        return self.served_uatp + left * self.spec.weights.prefill

    @property
    def worst_uatp(self) -> int:
        """What it can be served at most."""
        weights = self.spec.weights
        return len(self.spec.prompt) * weights.prefill + self.spec.max_new_tokens * weights.decode

    def begin(self, shared: tuple[int, ...], own: tuple[int, ...], now: float) -> None:
        """Start, or start again, in these blocks, `shared` of which are stored already."""
        self.blocks = shared + own
        self.num_at_start = len(self.token_ids)
        self.num_stored = self.num_fed = len(shared) * BLOCK_SIZE
        if self.started_s is None:
            self.started_s = now

    def interrupt(self) -> tuple[int, ...]:
        """Stop, to start again later; returns its blocks, which it loses."""
        assert not self.num_in_flight, "the device may still write to its blocks"
        blocks, self.blocks = self.blocks, ()
        self.num_stored = self.num_fed = 0
        self.preemptions += 1
        return blocks

    @property
    def has_repaid(self) -> bool:
        """Whether it has advanced since its last start by as much as that has cost at most."""
        gained = len(self.token_ids) - self.num_at_start
        weights = self.spec.weights
        return gained > 0 and gained * weights.decode >= self.num_at_start * weights.prefill

    @property
    def blocks_missing(self) -> int:
        """Blocks that it needs for its next token and does not have."""
        return 0 if self.done else blocks_for(self.length) - len(self.blocks)

    def next_chunk(self, prefill_limit: int) -> Chunk:
        """Return the newest token, or at most `prefill_limit` tokens of what is left to prefill.

        Where that ends with the newest token, its draft goes with it, as far as the limit and the
        blocks go, to be verified.
        """
        start, length = self.num_fed, self.length
        # A newest token is one, whatever the limit.
        end = length if self.decodes else min(length, start + prefill_limit)
        assert start < end
        known = tuple(self.token_ids[start:end]) or (PENDING,)
        draft: tuple[int, ...] = ()
        draws: tuple[Draw, ...] = ()
        if end == length:
            if self.drafts and self.drafts.proposal:
                room = min(prefill_limit - len(known), len(self.blocks) * BLOCK_SIZE - end)
                draft = self._draft(room)
            draws = self._draws(draft) if draft else (self._history.draw(self.num_sampled),)
        return Chunk(self.spec.seq_id, start, known + draft, self.blocks, draws)

    def launch(self, chunk: Chunk) -> None:
        """Note that a chunk is in a launched step."""
        num_drafted = len(chunk.draws) - 1 if len(chunk.draws) > 1 else 0
        self.num_drafted += num_drafted
        self.num_fed += len(chunk.token_ids) - num_drafted
        self.num_pending += bool(chunk.draws)
        self.num_in_flight += 1

    def computed(self, chunk: Chunk, num_accepted: int, pool: BlockPool | None) -> None:
        """Note that a chunk was computed, and what it delivered appended.

        `num_accepted` of its draft tokens are in the output; the others' keys and values are
        overwritten by what follows. Blocks that it filled are published in `pool`.
        """
        count = len(chunk.token_ids)
        if num_drafted := self._no_longer_in_flight(chunk):
            self.verified_tokens += num_drafted
            self.accepted_tokens += num_accepted
            self.num_fed += num_accepted
            assert self.drafts is not None
            self.drafts.note_verified(num_accepted, num_drafted)
            count -= num_drafted - num_accepted
        if self.num_stored + count > len(self.token_ids):
            return  # it was fed a token that ended it or was dropped: what was stored means nothing
        self._stored(count, pool)

    def undo(self, chunk: Chunk) -> None:
        """Note that a chunk's step came to nothing; it will be fed again."""
        self.num_fed -= len(chunk.token_ids) - self._no_longer_in_flight(chunk)

    def find(self, pool: BlockPool) -> tuple[int, ...]:
        """Return the blocks of its beginning that are stored already.

        Never all of it: the last token has to be fed, because its logits are wanted.
        """
        if not self.spec.prefix_cache:
            return ()
        whole = (len(self.token_ids) - 1) // BLOCK_SIZE
        return pool.find(self._keys.of(index, self.token_ids) for index in range(whole))

    def append(self, token_id: int, now: float) -> None:
        """Note a sampled token that is delivered."""
        if self.drafts:
            self.drafts.note_output(token_id)
        self.token_ids.append(token_id)
        self.num_output += 1
        if self.first_token_s is None:
            self.first_token_s = now
        self.last_token_s = now
        self._history.add(token_id)

    def ended(self, reason: EndReason, now: float) -> Ended:
        """Return the ending as it looks at `now`."""
        return Ended(
            seq_id=self.spec.seq_id,
            reason=reason,
            submitted_s=self.submitted_s,
            started_s=self.started_s,
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s,
            ended_s=now,
            prompt_tokens=self.prompt_done,
            cached_tokens=self.cached_tokens,
            output_tokens=self.num_output,
            device_s=self.device_s,
            stop_token_id=self.stop_token_id,
            verified_tokens=self.verified_tokens,
            accepted_tokens=self.accepted_tokens,
            drafted_tokens=self.drafted_tokens,
            draft_s=self.draft_s,
        )

    @property
    def draft_origin(self) -> DraftOrigin | None:
        """What proposed the draft that is being verified; None where there is none."""
        source = self.drafts.source if self.drafts else None
        return source.origin if source else None

    def draw(self, index: int, draft: tuple[int, ...]) -> Draw:
        """Return the draw of output token `index`, behind the output so far and these tokens."""
        return self._history.draw(index, draft)

    def _draft(self, room: int) -> tuple[int, ...]:
        """Return at most `room` tokens of the proposal."""
        if self.num_pending or self.drafts is None:
            return ()
        # One more token than was drafted is sampled.
        count = min(room, self.spec.max_new_tokens - self.num_output - 1)
        return self.drafts.proposal[: max(count, 0)]

    def _draws(self, draft: tuple[int, ...]) -> tuple[Draw, ...]:
        """Return the draw of the next token, and of the one behind each draft token."""
        first = self.num_sampled
        if not draft:
            return (self._history.draw(first),)
        rows = range(len(draft) + 1)
        return tuple(self._history.draw(first + row, draft[:row]) for row in rows)

    def _no_longer_in_flight(self, chunk: Chunk) -> int:
        """Note it, and return how many draft tokens the chunk has."""
        num_drafted = len(chunk.draws) - 1 if len(chunk.draws) > 1 else 0
        self.num_drafted -= num_drafted
        self.num_pending -= bool(chunk.draws)
        self.num_in_flight -= 1
        return num_drafted

    def _stored(self, count: int, pool: BlockPool | None) -> None:
        first = self.num_stored // BLOCK_SIZE
        if self.prompt_done < len(self.spec.prompt):
            # What it began with beyond what it had ever reached was found, not computed.
            found = min(self.num_stored, len(self.spec.prompt))
            self.cached_tokens += max(found - self.prompt_done, 0)
            reached = min(self.num_stored + count, len(self.spec.prompt))
            self.prompt_done = max(self.prompt_done, reached)
        self.num_stored += count
        last = self.num_stored // BLOCK_SIZE
        if first < last and pool is not None and self.spec.prefix_cache:
            for index in range(first, last):
                pool.publish(self.blocks[index], self._keys.of(index, self.token_ids))
