"""From a request to a plan: encode, price, decide. No side effect.

Owns what `Quote` shows and what a job runs with, so that a quote is for exactly the job that
would run; and where a prompt is encoded: on the event loop what takes about a millisecond, in a
thread in its account's turn what takes longer, not at all what no tier can take.
Reads the tiers' load; the account's budget is handed to it, because the decision is made where
the balance is, inside the ledger's transaction.
Fails with `InvalidField` for a prompt that cannot be encoded and with `RateLimited` for an account
that has as much waiting as it may; a refusal is a value.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sage_fed.cards import RateCard
from sage_fed.cards import quote as price
from sage_fed.core import (
    Budget,
    GenerationDefaults,
    JobSpec,
    Offer,
    Prompt,
    Quote,
    Refusal,
    Route,
    RouteQuote,
    Sampling,
    Tier,
    TierLoad,
)
from sage_fed.device import Executor
from sage_fed.errors import InvalidField
from sage_fed.jobs.results import most_reply_bytes, most_result_bytes
from sage_fed.routing import RouteRequest, RoutingPolicy, estimate_s, refuse_unread, route
from sage_fed.text import Tokenizer
from sage_fed.workers import Workers

MAX_REPLY_BYTES = 4 * 2**20
"""What a gRPC client takes that was not told otherwise."""

_ENOUGH_UATP = 2**63 - 1
"""A balance that every job can be paid from."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A job with its size and price on every tier, before anyone decided.

    `card` is frozen here: a newer one never reprices this job.
    """

    spec: JobSpec
    prompt: Encoded
    offers: Mapping[Tier, Offer]
    card: RateCard
    deadline_at_s: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a job runs with."""

    route: Route
    prompt: tuple[int, ...]
    sampling: Sampling
    tokenizer: Tokenizer
    stop_token_ids: frozenset[int]
    card: RateCard
    offer: Offer


class Planner:
    """Makes drafts and decides them.

    Args:
        default_new_tokens: for a job that does not say; less where the context is shorter.
    """

    def __init__(
        self,
        encoder: Encoder,
        executor: Executor,
        card: RateCard,
        *,
        policy: RoutingPolicy,
        default_new_tokens: int,
    ) -> None:
        self.encoder = encoder
        self.card = card
        self._executor = executor
        self._policy = policy
        self._default_new_tokens = default_new_tokens

    def use(self, card: RateCard) -> None:
        """Price with this card from the next draft on."""
        self.card = card

    def refuse_unread(self, spec: JobSpec, coming: Mapping[Tier, int]) -> Refusal | None:
        """Return the refusal of a job that no tier takes now; None where one may.

        `coming` are jobs that were taken on and are not in their tier's queue yet: its last places
        are theirs. Without them one more would be held for, refused by the queue and given back.
        """
        loads = self.loads()
        for tier, count in coming.items():
            load = loads[tier]
            free = 0 if load.waiting else max(load.running_limit - load.running, 0)
            if count > free:
                loads[tier] = replace(load, waiting=load.waiting + count - free)
        return refuse_unread(spec, loads, self._policy)

    async def draft(self, spec: JobSpec, arrived_s: float) -> Draft:
        """Encode a job, and price it on every tier that can be fed its prompt.

        Raises:
            InvalidField: a stop token is none, the prompt cannot be encoded, or it holds an id
                that the model of the tier it names, or of every tier, has no row for.
            RateLimited: the account has as much waiting to be encoded as it may.
        """
        self._check_stop_tokens(spec)
        prompt = await self.encoder.encode(
            spec.prompt, spec.account, max_tokens=self._longest_prompt()
        )
        strange = self._strange(prompt)
        if strange and (spec.requested in strange or len(strange) == len(prompt.ids)):
            tier = spec.requested if spec.requested in strange else next(iter(strange))
            raise _no_row(spec, tier, strange[tier])
        deadline_s = spec.deadline_s
        offers = {
            tier: price(self.card, tier, num_tokens, self._new_tokens(spec, tier, num_tokens))
            for tier, num_tokens in prompt.num_tokens.items()
            if tier not in strange
        }
        if prompt.unread:
            offers = {tier: replace(offer, unread=True) for tier, offer in offers.items()}
        return Draft(
            spec=spec,
            prompt=prompt,
            offers=offers,
            card=self.card,
            deadline_at_s=None if deadline_s is None else arrived_s + deadline_s,
        )

    def loads(self) -> dict[Tier, TierLoad]:
        """Return what the tiers are doing at this moment."""
        return {tier: self._executor.load(tier) for tier in self.encoder.tokenizers}

    def decide(
        self, draft: Draft, budget: Budget, loads: Mapping[Tier, TierLoad]
    ) -> Route | Refusal:
        """Decide; may be called from any thread, because it reads nothing but its arguments."""
        deadline_at_s = draft.deadline_at_s
        return route(
            RouteRequest(
                job=draft.spec,
                offers=draft.offers,
                loads=loads,
                budget=budget,
                policy=self._policy,
                deadline_s=None if deadline_at_s is None else deadline_at_s - time.monotonic(),
            )
        )

    def require_bounded(self, draft: Draft, tier: Tier, max_result_bytes: int) -> None:
        """Refuse an answer that its client could not take, or that could not be kept for a repeat.

        By what it can take at most, because it is charged when it is known.

        Raises:
            InvalidField: it could be too large.
        """
        spec, most = draft.spec, draft.offers[tier].max_new_tokens
        text_bytes = self.encoder.tokenizers[tier].most_text_bytes
        reply_bytes = most_reply_bytes(spec, most, text_bytes)
        if spec.one_reply and reply_bytes > MAX_REPLY_BYTES:
            raise _too_large(
                spec, most, reply_bytes, MAX_REPLY_BYTES, "one reply may have; stream it, or ask"
            )
        result_bytes = most_result_bytes(spec, most, text_bytes)
        if spec.client_request_id and result_bytes > max_result_bytes:
            raise _too_large(
                spec, most, result_bytes, max_result_bytes,
                "is kept for a client_request_id; leave that out, or ask",
            )  # fmt: skip

    def hopeless(self, draft: Draft, loads: Mapping[Tier, TierLoad]) -> Refusal | None:
        """Return the refusal that no balance could change; None where it depends on that.

        Under overload most jobs are refused for want of a place; those need not wait for the
        ledger, which has the admitted ones to write.
        """
        account = draft.spec.account
        rich = Budget(account, _ENOUGH_UATP, 0, 0, _ENOUGH_UATP, 0, strategic_floor_uatp=0)
        decision = self.decide(draft, rich, loads)
        return decision if isinstance(decision, Refusal) else None

    def plan(self, draft: Draft, chosen: Route) -> Plan:
        """Return what runs for a route that `decide` chose."""
        tier = chosen.tier
        return Plan(
            route=chosen,
            prompt=draft.prompt.ids[tier],
            sampling=resolve_sampling(draft.spec, self._executor.defaults(tier)),
            tokenizer=self.encoder.tokenizers[tier],
            stop_token_ids=stop_token_ids(draft.spec, self.encoder.tokenizers[tier]),
            card=draft.card,
            offer=draft.offers[tier],
        )

    def quote(self, draft: Draft, budget: Budget) -> Quote:
        """Return every route's worst case and the decision that would be taken now."""
        loads = self.loads()
        decision = self.decide(draft, budget, loads)
        shown = decision.tier if isinstance(decision, Route) else draft.spec.requested
        size = draft.offers[shown or min(draft.offers, key=lambda tier: tier.rank)]
        return Quote(
            decision=decision,
            tiers=tuple(
                RouteQuote(
                    tier=tier,
                    worst_case_uatp=priced.worst_case_uatp,
                    affordable=priced.worst_case_uatp <= budget.balance_uatp,
                    estimated_s=estimate_s(
                        loads[tier], priced.prompt_tokens, priced.max_new_tokens
                    ),
                )
                for tier, priced in draft.offers.items()
            ),
            rate_card=draft.card.version,
            prompt_tokens=size.prompt_tokens,
            max_new_tokens=size.max_new_tokens,
            balance_uatp=budget.balance_uatp,
        )

    def _strange(self, prompt: Encoded) -> dict[Tier, _Strange]:
        """Return the tiers whose models, as far as they are loaded, lack an id of the prompt."""
        found = {}
        for tier, ids in prompt.ids.items():
            limits = self._executor.limits(tier)
            num_ids = None if limits is None else limits.num_ids
            if num_ids is not None and ids and (largest := max(ids)) >= num_ids:
                found[tier] = _Strange(largest, ids.index(largest), num_ids)
        return found

    def _check_stop_tokens(self, spec: JobSpec) -> None:
        """Refuse ids that a tier which may serve the job does not have."""
        fixed = spec.requested is not None and not spec.allow_downgrade
        for tier, tokenizer in self.encoder.tokenizers.items():
            if not fixed or tier is spec.requested:
                ids = spec.sampling.stop_token_ids
                tokenizer.require_ids("job.sampling.stop_token_ids", ids)

    def _longest_prompt(self) -> int | None:
        """Return the most tokens that any tier takes; None while one is not loaded."""
        contexts = [load.max_context_tokens for load in self.loads().values()]
        return max(contexts) - 1 if all(contexts) else None

    def _new_tokens(self, spec: JobSpec, tier: Tier, prompt_tokens: int) -> int:
        if spec.sampling.max_new_tokens is not None:
            return spec.sampling.max_new_tokens
        context = self._executor.load(tier).max_context_tokens
        # A context of 0 is not loaded yet; a prompt that fills it is refused by the router.
        room = context - prompt_tokens if context else self._default_new_tokens
        return max(1, min(self._default_new_tokens, room))


@dataclass(frozen=True, slots=True)
class _Strange:
    """A prompt's id at `index` that its tokenizer has, and the model, of `num_ids`, has not."""

    id: int
    index: int
    num_ids: int


def _no_row(spec: JobSpec, tier: Tier, strange: _Strange) -> InvalidField:
    sent = not spec.prompt.messages
    field = f"job.token_ids.ids[{strange.index}]" if sent else "job.chat.messages"
    what = f"{strange.id} is" if sent else f"they encode to the token {strange.id}, which is"
    return InvalidField(
        field,
        f"{what} a token of the {tier.name} tier's tokenizer that its model has no row for; "
        f"its ids are 0 to {strange.num_ids - 1}",
    )


def stop_token_ids(spec: JobSpec, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a job's text: those it names, and those its stop strings spell.

    A control token is not in the text, so no string can match it there.
    """
    spelled = map(tokenizer.control_id, spec.sampling.stop)
    return frozenset(spec.sampling.stop_token_ids).union(id_ for id_ in spelled if id_ is not None)


def resolve_sampling(spec: JobSpec, defaults: GenerationDefaults | None) -> Sampling:
    """Fill what the client left open with the checkpoint's own defaults, and draw a seed."""
    asked, own = spec.sampling, defaults or GenerationDefaults()
    # 63 bits: a client that reads JSON numbers as int64 can send it back.
    values: dict[str, Any] = {"seed": secrets.randbits(63)}
    for name in Sampling.__slots__:
        value = getattr(asked, name)
        value = getattr(own, name, None) if value is None else value
        if value is not None:
            values[name] = value
    return Sampling(**values)


def _too_large(spec: JobSpec, most: int, size: int, limit: int, what: str) -> InvalidField:
    field = "max_new_tokens" if spec.sampling.top_logprobs is None else "top_logprobs"
    return InvalidField(
        f"job.sampling.{field}",
        f"{most} tokens can take {size / 2**20:.1f} MiB, more than the {limit / 2**20:g} MiB that "
        f"{what} for less",
    )


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
