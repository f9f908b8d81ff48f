"""May a job run, on which tier, and with what: asked once, on the event loop.

Owns the places in the tiers' queues, where and when a prompt is encoded, and what a job would run
and cost on every tier: `Quote` and the job itself read the same draft, so that a quote is for
exactly the job that would run. What depends on the balance is confirmed inside the ledger's
transaction, by the same `decide`. Nothing below refuses a job for a reason that is looked at here.
Knows neither streams nor the books. A refusal is a value; fails with `InvalidField` for a prompt
that cannot be encoded and with `RateLimited` for an account that has as much waiting as it may.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from sage_fed.cards.quality_card import (
    TOP_LOGPROBS,
    AnswerFeatures,
    QualityCard,
)
from sage_fed.cards.rate_card import RateCard, quote, quote_program
from sage_fed.core import (
    Budget,
    Delta,
    JobSpec,
    Mode,
    ModeReturns,
    Offer,
    Phase,
    Program,
    Prompt,
    Quote,
    Refusal,
    Route,
    RouteQuote,
    Sampling,
    Stage,
    Tier,
    TierLoad,
    counted,
)
from sage_fed.device import Executor, SequenceSpec, TokenWeights
from sage_fed.errors import InvalidField, NotFound
from sage_fed.jobs.results import most_answer_bytes
from sage_fed.jobs.returns import Experience, compare_modes
from sage_fed.routing import (
    Reason,
    RouteRequest,
    RoutingPolicy,
    Way,
    candidates,
    needed_s,
    refuse_unread,
    route,
)
from sage_fed.text import Tokenizer
from sage_fed.workers import Workers

MAX_REPLY_BYTES = 4 * 2**20
"""What a gRPC client takes that was not told otherwise."""

_RETRY_FULL_S = 1.0
_RETRY_DRAINING_S = 5.0
"""A daemon that is stopped for an update is back about then; another one may answer at once."""

_INLINE_SIZE = 1024
"""Encoding this much takes about a millisecond at most, whatever it is; more goes to a thread."""

_MESSAGE_SIZE = 32
"""What a message costs besides its characters: the template's loop."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A job with what it would run and cost on every tier, before one is chosen.

    `card` is frozen here: a newer one never reprices this job. `programs` is empty for a prompt
    that was not read, because its length alone says that no tier takes it. `cascade` and its offer
    are None where there can be none. `ways` is empty where no quality card says what each is worth.
    """

    spec: JobSpec
    programs: Mapping[Tier, Program]
    offers: Mapping[Tier, Offer]
    card: RateCard
    seed: int
    deadline_at_s: float | None
    cascade: Program | None = None
    cascade_offer: Offer | None = None
    ways: tuple[Way, ...] = ()
    max_error: float = 1.0

    def program(self, route: Route) -> Program:
        """Return what the job runs on this route."""
        if route.mode is Mode.CASCADE:
            assert self.cascade is not None, "a cascade was offered"
            return self.cascade
        return self.programs[route.tier]

    def offer(self, route: Route) -> Offer:
        """Return what the job asks for on this route."""
        if route.mode is Mode.CASCADE:
            assert self.cascade_offer is not None, "a cascade was offered"
            return self.cascade_offer
        return self.offers[route.tier]


class Place:
    """A job's place in the queue of every tier that it may still need.

    Before its prompt is read those are the tiers of every program that may serve it; until its hold
    is decided, those that its balance may still lead to; from then on those of the stages that are
    not in their queues yet.
    """

    def __init__(self, tiers: Collection[Tier], reserved: Counter[Tier]) -> None:
        self.tiers = frozenset(tiers)
        self._reserved = reserved
        reserved.update(self.tiers)

    def cover(self, tiers: Collection[Tier]) -> None:
        """Have a place at each of these tiers, and at no other."""
        self._reserved.subtract(self.tiers)
        self.tiers = frozenset(tiers)
        self._reserved.update(self.tiers)

    def release(self) -> None:
        """Give back what is reserved; a second time there is nothing left."""
        self.cover(())


class Admission:
    """Who may run what.

    Args:
        default_new_tokens: for a job that does not say; less where the context is shorter.
        max_jobs: accepted and not ended, over all tiers and accounts.
        max_account_jobs: accepted and not ended, or ended and not read, of one account; 0 is no
            limit.
        speculates: whether jobs use drafts where they do not say.
        max_error: the probability of a wrong answer that an account puts up with where a job does
            not say.
    """

    def __init__(
        self,
        encoder: Encoder,
        executor: Executor,
        card: RateCard,
        *,
        policy: RoutingPolicy,
        default_new_tokens: int,
        max_jobs: int,
        max_account_jobs: Callable[[str], int] = lambda _: 0,
        speculates: bool = True,
        max_error: Callable[[str], float] = lambda _: 1.0,
    ) -> None:
        self.encoder = encoder
        self.experience = Experience()
        self.card = card
        """What the next draft is priced with."""
        self.quality: QualityCard | None = None
        """What doubt about an answer is read from; None where no card is of the loaded models."""
        self.draining = False
        """Whether no job is admitted any more."""
        self._executor = executor
        self._policy = policy
        self._default_new_tokens = default_new_tokens
        self._max_jobs = max_jobs
        self._max_account_jobs = max_account_jobs
        self._speculates = speculates
        self._max_error = max_error
        lowest = min(encoder.tokenizers)
        own = encoder.tokenizers[lowest]
        self._drafters: dict[Tier, Tier] = {
            tier: lowest
            for tier, tokenizer in encoder.tokenizers.items()
            if tier != lowest and tokenizer.has_tokens_of(own)
        }
        """Who can draft for a tier: its tokens have to be the same."""
        self._reserved: Counter[Tier] = Counter()
        self._unread: Mapping[Tier, tuple[int, ...]] = dict.fromkeys(encoder.tokenizers, ())

    def use(self, card: RateCard) -> None:
        """Price with this card from the next draft on."""
        self.card = card

    def use_quality(self, card: QualityCard | None) -> None:
        """Read doubt from this card from the next draft on; None is no card."""
        self.quality = card

    def admit(
        self, spec: JobSpec, num_jobs: int, account_jobs: Callable[[], int], *, answered: bool
    ) -> Place | Refusal:
        """Reserve a place for a job, before its prompt is read; or say why there is none.

        Under overload most jobs are refused here: no task, no tokens, no price, no hold.

        Args:
            spec: what is asked for.
            num_jobs: jobs under way.
            account_jobs: counts those of its account.
            answered: whether the books have its answer, so that no tier need take it.
        """
        allowed = self._max_account_jobs(spec.account)
        if allowed and account_jobs() >= allowed:
            text = f"account {spec.account} may run {counted(allowed, 'job')} at once"
            return Refusal(Reason.ACCOUNT_JOBS, text, _RETRY_FULL_S, allowed_jobs=allowed)
        if self.draining:
            text = "the daemon is draining and takes no more jobs"
            return Refusal(Reason.DRAINING, text, _RETRY_DRAINING_S)
        # Not what readers have not taken: that counts against their own account and connection
        # (`service.calls`), and never makes another's job fail.
        if num_jobs >= self._max_jobs:
            text = f"{counted(self._max_jobs, 'job')} under way, and no more at once"
            return Refusal(Reason.TOO_MANY_JOBS, text, _RETRY_FULL_S)
        if answered:
            return Place((), self._reserved)
        loads = self._loads_with_reserved()
        refusal = refuse_unread(spec, loads, partial(self._needs, spec))
        return refusal or Place(self._open(spec, loads), self._reserved)

    def loads_for(self, spec: JobSpec, place: Place) -> Mapping[Tier, TierLoad]:
        """Return the tiers' loads as the job sees them: with room where it has a place.

        It gets a place at tiers that had none before and have one now.
        """
        loads = self._loads_with_reserved()
        place.cover(place.tiers | self._open(spec, loads))
        for tier in place.tiers:
            load = loads[tier]
            loads[tier] = replace(load, waiting=min(load.waiting, load.waiting_limit - 1))
        return loads

    def narrow(self, spec: JobSpec, place: Place, chosen: Tier) -> None:
        """Give back the places that no balance leads to, once `chosen` is what a full one leads to.

        A smaller one can only lead lower. Without this, jobs that wait for their holds would fill
        the queue of a tier that few of them go to, and one that names it would be refused. Until
        here a place at each is right: which one a prompt leads to is not known before it is read,
        and what is read without a place may have been read for nothing.
        """
        served = candidates(spec, self.encoder.tokenizers)
        place.cover(place.tiers & self._need_any(spec, (of for of in served if of <= chosen)))

    async def draft(self, spec: JobSpec, arrived_s: float) -> Draft:
        """Encode a job, and price it on every tier that can be fed its prompt.

        Raises:
            InvalidField: a stop token is none, the prompt cannot be encoded, or it holds an id
                that the model of the tier it names, or of every tier, has no row for.
            RateLimited: the account has as much waiting to be encoded as it may.
        """
        self._check_mode(spec)
        self._check_stop_tokens(spec)
        prompt = await self.encoder.encode(
            spec.prompt, spec.account, max_tokens=self._longest_prompt()
        )
        unfit = self._without_rows(spec, prompt)
        programs: dict[Tier, Program] = {}
        offers: dict[Tier, Offer] = {}
        for tier, num_tokens in prompt.num_tokens.items():
            new = self._new_tokens(spec, tier, num_tokens)
            if prompt.unread:
                offers[tier] = replace(quote(self.card, tier, num_tokens, new), unread=True)
            elif unfit.isdisjoint(self._needs(spec, tier)):
                programs[tier] = program = self.program(spec, tier, prompt.ids, new)
                offers[tier] = quote_program(self.card, program)
        deadline_s = spec.deadline_s
        draft = Draft(
            spec=spec,
            programs=programs,
            offers=offers,
            card=self.card,
            # 63 bits: a client that reads JSON numbers as int64 can send it back.
            seed=secrets.randbits(63) if spec.sampling.seed is None else spec.sampling.seed,
            deadline_at_s=None if deadline_s is None else arrived_s + deadline_s,
            max_error=self._max_error(spec.account) if spec.max_error is None else spec.max_error,
        )
        return self._with_cascade(draft)

    def _with_cascade(self, draft: Draft) -> Draft:
        """Add the cascade, and what each way is worth, where a quality card tells."""
        lowest, deepest = min(self.encoder.tokenizers), max(self.encoder.tokenizers)
        quality, spec = self._quality_for(draft.spec), draft.spec
        if quality is None or not {lowest, deepest} <= draft.programs.keys():
            return draft
        if self._drafters.get(deepest) == lowest:
            program = _cascade(draft, quality, lowest, deepest)
            offer = quote_program(draft.card, program)
            draft = replace(draft, cascade=program, cascade_offer=offer)
        ways = []
        for tier, offer in draft.offers.items():
            if tier in quality.fingerprint.models:
                mode = self._mode_of(draft.programs[tier])
                error = quality.expected_error(tier, spec.task_class)
                ways.append(Way(mode, offer, self._expected_uatp(mode, offer), error))
        if (offer_both := draft.cascade_offer) is not None and spec.mode is None:
            outlook = quality.cascade(spec.task_class, draft.max_error)
            expected_uatp = self._expected_uatp(Mode.CASCADE, offer_both, outlook.escalated)
            ways.append(Way(Mode.CASCADE, offer_both, expected_uatp, outlook.error))
        if spec.mode is Mode.SPECULATIVE:
            ways = [way for way in ways if way.mode is Mode.SPECULATIVE]
        return replace(draft, ways=tuple(ways))

    def _quality_for(self, spec: JobSpec) -> QualityCard | None:
        """Return the card, if it was measured on answers that are sampled as this job's are."""
        if self.quality is None:
            return None
        defaults = self._executor.defaults(min(self.encoder.tokenizers))
        sampling = _resolve_sampling(spec, defaults, 0)
        return self.quality if self.quality.covers(sampling.temperature) else None

    def _expected_uatp(self, mode: Mode, offer: Offer, escalated: float = 1.0) -> int:
        """Return what an output of average length is expected to cost."""
        seen = self.experience
        total = 0.0
        for stage in offer.stages:
            output_uatp = seen.output * stage.max_new_tokens * stage.decode_uatp
            if mode is Mode.SPECULATIVE:
                output_uatp *= seen.speculated
            last = mode is Mode.CASCADE and stage.tier == offer.tier
            share = escalated if last else 1.0
            total += share * (stage.prompt_uatp + output_uatp * (seen.escalated if last else 1.0))
        return round(total)

    def _mode_of(self, program: Program) -> Mode:
        last = program.stages[-1]
        # Drafts from earlier text leave the lowest tier the only one that works.
        lowest = last.tier == min(self.encoder.tokenizers)
        return Mode.SPECULATIVE if last.speculates and not lowest else Mode.SINGLE

    def _check_mode(self, spec: JobSpec) -> None:
        """Refuse a mode that cannot be had.

        Raises:
            InvalidField: naming it.
        """
        lowest, deepest = min(self.encoder.tokenizers), max(self.encoder.tokenizers)
        if spec.mode in (None, Mode.SINGLE):
            return
        name = spec.mode.value
        if spec.requested == lowest:
            raise InvalidField(
                "job.mode", f"{name} needs the {deepest.name} tier; name that or none"
            )
        if spec.mode is Mode.CASCADE and deepest not in self._drafters:
            raise InvalidField("job.mode", f"{name} needs two tiers of one tokenizer")
        if spec.mode is Mode.CASCADE and self._quality_for(spec) is None:
            raise InvalidField(
                "job.mode",
                "cascade needs a quality card of these models, at this temperature; "
                "`sage-fed calibrate --quality` makes one",
            )

    def program(
        self, spec: JobSpec, tier: Tier, ids: Mapping[Tier, tuple[int, ...]], new: int
    ) -> Program:
        """Return what a job runs that a tier serves; `ids` is its prompt on every tier.

        It is asked with empty prompts, too, for the tiers that the job will need.
        """
        speculates = self._speculates if spec.mode is None else spec.mode is not Mode.SINGLE
        # Without a drafter, as on the lowest tier, earlier text is still a source of drafts, and
        # costs no step.
        drafter = self._drafters.get(tier) if speculates else None
        return Program((Stage(tier, ids[tier], new, speculates=speculates, drafter=drafter),))

    def decide(
        self, draft: Draft, budget: Budget | None, loads: Mapping[Tier, TierLoad]
    ) -> Route | Refusal:
        """Decide; may be called from any thread, because it reads nothing but its arguments.

        Without a budget the refusal is one that no balance could change: those need not wait for
        the ledger, which has the admitted ones to write.
        """
        deadline_at_s = draft.deadline_at_s
        decision = route(
            RouteRequest(
                job=draft.spec,
                offers=draft.offers,
                loads=loads,
                budget=budget,
                policy=self._policy,
                deadline_s=None if deadline_at_s is None else deadline_at_s - time.monotonic(),
                cascade=draft.cascade_offer,
                ways=draft.ways,
                max_error=draft.max_error,
            )
        )
        if isinstance(decision, Route) and decision.mode is Mode.SINGLE:
            return replace(decision, mode=self._mode_of(draft.programs[decision.tier]))
        return decision

    def require_bounded(self, draft: Draft, route: Route, max_result_bytes: int) -> None:
        """Refuse an answer that its client could not take, or that could not be kept for a repeat.

        By what it can take at most, because it is charged when it is known.

        Raises:
            InvalidField: it could be too large.
        """
        spec, stages = draft.spec, draft.offer(route).stages
        # Any stage's answer may be the one.
        most = max(stage.max_new_tokens for stage in stages)
        text_bytes = max(self.encoder.tokenizers[of.tier].most_text_bytes for of in stages)
        size = most_answer_bytes(spec, most, text_bytes)
        if spec.one_reply and size > MAX_REPLY_BYTES:
            raise _too_large(
                spec, most, size, MAX_REPLY_BYTES, "one reply may have; stream it, or ask"
            )
        if spec.client_request_id and size > max_result_bytes:
            raise _too_large(
                spec, most, size, max_result_bytes,
                "is kept for a client_request_id; leave that out, or ask",
            )  # fmt: skip

    def sequence(self, draft: Draft, stage: Stage, seq_id: int) -> SequenceSpec:
        """Return the sequence that runs a stage of the job."""
        spec, rates = draft.spec, draft.card.lines[stage.tier]
        sampling = _resolve_sampling(spec, self._executor.defaults(stage.tier), draft.seed)
        if stage.needs_logprobs:
            sampling = replace(sampling, top_logprobs=max(sampling.top_logprobs or 0, TOP_LOGPROBS))
        return SequenceSpec(
            seq_id=seq_id,
            tier=stage.tier,
            prompt=stage.prompt,
            max_new_tokens=stage.max_new_tokens,
            sampling=sampling,
            ignore_eos=spec.sampling.ignore_eos,
            stop_token_ids=_stop_token_ids(spec, self.encoder.tokenizers[stage.tier]),
            speculates=stage.speculates,
            draft_tokens=stage.draft_tokens,
            drafter=stage.drafter,
            priority=spec.priority,
            account=spec.account,
            # What its tokens count for between accounts: what they cost.
            weights=TokenWeights(
                rates[Phase.PREFILL].uatp, rates[Phase.CACHED].uatp, rates[Phase.DECODE].uatp
            ),
        )

    def quote(self, draft: Draft, budget: Budget) -> Quote:
        """Return every mode's price, error and time, and the decision that would be taken now."""
        loads, quality = self._loads(), self._quality_for(draft.spec)
        decision = self.decide(draft, budget, loads)
        shown = decision.tier if isinstance(decision, Route) else draft.spec.requested
        size = draft.offers[shown or min(draft.offers)]
        offers = {(tier, Mode.SINGLE): offer for tier, offer in draft.offers.items()}
        for tier, offer in draft.offers.items():
            if tier != min(self.encoder.tokenizers):
                offers[tier, Mode.SPECULATIVE] = offer
        errors, escalated = dict[tuple[Tier, Mode], float](), 1.0
        if quality is not None:
            task_class = draft.spec.task_class
            for tier, mode in offers:
                if tier in quality.fingerprint.models:
                    errors[tier, mode] = quality.expected_error(tier, task_class)
            if draft.cascade_offer is not None:
                cascade = draft.cascade_offer.tier, Mode.CASCADE
                outlook = quality.cascade(task_class, draft.max_error)
                offers[cascade] = draft.cascade_offer
                errors[cascade], escalated = outlook.error, outlook.escalated
        return Quote(
            decision=decision,
            tiers=tuple(
                RouteQuote(
                    tier=tier,
                    worst_case_uatp=offer.worst_case_uatp,
                    affordable=offer.worst_case_uatp <= budget.balance_uatp,
                    estimated_s=needed_s(loads, offer),
                    mode=mode,
                    expected_uatp=self._expected_uatp(mode, offer, escalated),
                    expected_error=errors.get((tier, mode)),
                )
                for (tier, mode), offer in offers.items()
            ),
            rate_card=draft.card.version,
            prompt_tokens=size.prompt_tokens,
            max_new_tokens=size.max_new_tokens,
            balance_uatp=budget.balance_uatp,
        )

    def compare_modes(
        self,
        account: str,
        task_class: str,
        max_error: float | None,
        *,
        watts: float | None,
        power_note: str,
    ) -> ModeReturns:
        """Return what each mode gives for what it takes, on the quality card's tasks.

        `max_error` None is the account's.

        Raises:
            NotFound: no quality card is in force.
        """
        if self.quality is None:
            raise NotFound(
                "no quality card is in force, so it is not known how often answers are right; "
                "`sage-fed status` says why, `sage-fed calibrate --quality` makes one"
            )
        return compare_modes(
            self.card,
            self.quality,
            self.experience,
            task_class=task_class,
            max_error=self._max_error(account) if max_error is None else max_error,
            cascades=max(self.encoder.tokenizers) in self._drafters,
            watts=watts,
            power_note=power_note,
        )

    def _loads(self) -> dict[Tier, TierLoad]:
        return {tier: self._executor.load(tier) for tier in self.encoder.tokenizers}

    def _loads_with_reserved(self) -> dict[Tier, TierLoad]:
        """Return the loads as if jobs that have a place were in their queues.

        The last places are theirs: else one more would be held for and given back.
        """
        loads = self._loads()
        for tier, load in loads.items():
            free = 0 if load.waiting else max(load.running_limit - load.running, 0)
            if (more := self._reserved[tier] - free) > 0:
                loads[tier] = replace(load, waiting=load.waiting + more)
        return loads

    def _needs(self, spec: JobSpec, tier: Tier) -> tuple[Tier, ...]:
        """Return the tiers on which a job has stages that `tier` serves."""
        if tier not in self._unread:
            return (tier,)  # which is not served here, and refused for that
        return self.program(spec, tier, self._unread, 0).tiers

    def _open(self, spec: JobSpec, loads: Mapping[Tier, TierLoad]) -> frozenset[Tier]:
        """Return the tiers that a job may need, but for those of programs that lack room."""
        full = {tier for tier, load in loads.items() if load.waiting >= load.waiting_limit}
        served = (tier for tier in candidates(spec, loads) if tier in loads)
        needed = self._need_any(
            spec, (tier for tier in served if full.isdisjoint(self._needs(spec, tier)))
        )
        # A cascade begins on the lowest tier, but need not.
        lowest = min(loads)
        return needed | {lowest} if spec.mode is Mode.CASCADE and lowest not in full else needed

    def _need_any(self, spec: JobSpec, tiers: Iterable[Tier]) -> frozenset[Tier]:
        return frozenset().union(*(self._needs(spec, tier) for tier in tiers))

    def _without_rows(self, spec: JobSpec, prompt: Encoded) -> set[Tier]:
        """Return the tiers whose models, as far as they are loaded, lack an id of the prompt.

        Raises:
            InvalidField: the tier that the job names does, or every tier.
        """
        found: dict[Tier, InvalidField] = {}
        for tier, ids in prompt.ids.items():
            limits = self._executor.limits(tier)
            num_ids = None if limits is None else limits.num_ids
            if num_ids is not None and ids and (largest := max(ids)) >= num_ids:
                found[tier] = _no_row(spec, tier, largest, ids.index(largest), num_ids)
        if spec.requested in found:
            raise found[spec.requested]
        if found and len(found) == len(prompt.ids):
            raise next(iter(found.values()))
        return set(found)

    def _check_stop_tokens(self, spec: JobSpec) -> None:
        """Refuse ids that a tier which may serve the job does not have."""
        served = candidates(spec, self.encoder.tokenizers)
        for tier in self._need_any(spec, served):
            if (tokenizer := self.encoder.tokenizers.get(tier)) is not None:
                ids = spec.sampling.stop_token_ids
                tokenizer.require_ids("job.sampling.stop_token_ids", ids)

    def _longest_prompt(self) -> int | None:
        """Return the most tokens that any tier takes; None while one is not loaded."""
        contexts = [load.max_context_tokens for load in self._loads().values()]
        return max(contexts) - 1 if all(contexts) else None

    def _new_tokens(self, spec: JobSpec, tier: Tier, prompt_tokens: int) -> int:
        if spec.sampling.max_new_tokens is not None:
            return spec.sampling.max_new_tokens
        context = self._executor.load(tier).max_context_tokens
        # A context of 0 is not loaded yet; a prompt that fills it is refused by the router.
        room = context - prompt_tokens if context else self._default_new_tokens
        return max(1, min(self._default_new_tokens, room))


def _cascade(draft: Draft, quality: QualityCard, lowest: Tier, deepest: Tier) -> Program:
    """Return the program that answers on the lowest tier, and on the deepest where in doubt."""
    (first,), (then,) = draft.programs[lowest].stages, draft.programs[deepest].stages
    task_class, max_error = draft.spec.task_class, draft.max_error

    def decide(answer: Delta, planned: Stage) -> Stage | None:
        features = AnswerFeatures.of(answer.logprobs)
        if not quality.escalates(task_class, features, max_error):
            return None
        return replace(planned, draft_tokens=answer.token_ids)

    def doubt(answer: Delta) -> float:
        return quality.p_wrong(task_class, AnswerFeatures.of(answer.logprobs))

    # The price of drafts has a cap by the output of the stage that answers: the first has none.
    first = replace(first, needs_logprobs=True, speculates=False)
    escalated = replace(then, speculates=True, drafter=lowest)
    return Program((first, escalated), decide, doubt)


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
    """The tokenizers of the tiers; those that share one share the work.

    On the event loop it encodes what takes about a millisecond; what takes longer, in a thread in
    its account's turn; what certainly no tier can take, not at all.
    """

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


def _no_row(spec: JobSpec, tier: Tier, id_: int, index: int, num_ids: int) -> InvalidField:
    sent = not spec.prompt.messages
    field = f"job.token_ids.ids[{index}]" if sent else "job.chat.messages"
    what = f"{id_} is" if sent else f"they encode to the token {id_}, which is"
    return InvalidField(
        field,
        f"{what} a token of the {tier.name} tier's tokenizer that its model has no row for; "
        f"its ids are 0 to {num_ids - 1}",
    )


def _stop_token_ids(spec: JobSpec, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a job's text: those it names, and those its stop strings spell.

    A control token is not in the text, so no string can match it there.
    """
    spelled = map(tokenizer.control_id, spec.sampling.stop)
    return frozenset(spec.sampling.stop_token_ids).union(id_ for id_ in spelled if id_ is not None)


def _resolve_sampling(spec: JobSpec, defaults: Sampling | None, seed: int) -> Sampling:
    """Fill what the client left open with the checkpoint's own defaults."""
    asked = {name: getattr(spec.sampling, name) for name in Sampling.__slots__}
    given = {name: value for name, value in asked.items() if value is not None}
    return replace(defaults or Sampling(), **{**given, "seed": seed})


def _too_large(spec: JobSpec, most: int, size: int, limit: int, what: str) -> InvalidField:
    field = "max_new_tokens" if spec.sampling.top_logprobs is None else "top_logprobs"
    return InvalidField(
        f"job.sampling.{field}",
        f"{most} tokens can take {size / 2**20:.1f} MiB, more than the {limit / 2**20:g} MiB that "
        f"{what} for less",
    )
