"""Do drafts change a token? The bundled pair, ten thousand prompts, with and without speculation.

A token is a pure function of logits, sampling, seed and index, so speculation may change nothing.
What can go wrong is bookkeeping (a draft's rows, its KV entries, its penalties, ends inside it) and
arithmetic: a step of other rows sums in another order, which moves logits by some last bits. In
fp32 that is about 1e-5, and a difference is an error. In other precisions a difference is lawful
only where it is explained: by the logits of its place, each moved by at most a stated bound, either
token can be the one drawn. That holds for near-ties of the perturbed scores (their gap times the
temperature is at most twice the bound) and for tokens at a filter's edge, and for nothing else. The
bound of a precision is the largest difference that was measured between logits of one place by a
step of one row and by a step of many, over some hundred places and all ids. How seldom another
token than the one drawn is lawful by it (`ambiguous_places`) says how much the check can tell.

Rounds of a hundred requests each, drawn by seed: task prompts, random ids, shared beginnings; all
sampling settings; given answers right, partly wrong and wrong; the tactical tier's own jobs beside.
First all run in peace without drafts. Then they run with drafts under the round's conditions: batch
1 to 16, joins, leaves, few KV blocks, overcommitment, chunked prompts, pauses, and step times by a
virtual clock that decides which drafts pay. The scheduler and the engines are the daemon's own.

Run: python bench/lossless.py [--prompts 10000] [--other-prompts 2000] [--seed 1]
     [--engines fp32:native fp32:torch ...]
Writes bench/results/lossless.json; the exit code says whether every difference is lawful.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import report
import torch

sys.path.insert(0, str(Path(__file__).parent / "pair"))

from tasks import ALL_FAMILIES, task_at

from sage_fed.core import Logprob, Message, Priority, Sampling, Tier
from sage_fed.device import Ended, EndReason, Scheduler, SequenceSpec, TierLimits
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine.cuda_graphs import EagerCapture
from sage_fed.engine.sampling import draw_key, noise
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, History, InFlightStep, SampledToken, Step
from sage_fed.text import StopMatcher, Tokenizer

T, S = Tier.TACTICAL, Tier.STRATEGIC
MODELS = Path(__file__).parent.parent / "sage_fed" / "models"
NUM_IDS = 490
"""Random prompts are of text tokens: the ids beyond are control tokens and padding."""
CONTEXT = 256
LOGPROB_TOLERANCE = 3e-4
"""For fp32; of values below -10, 1e-5 of each. Ten thousand prompts have rarer roundings than the
tests, and another CPU's sums other ones: 1.1e-4 was seen with torch on Ice Lake."""
ROUND = 100


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence as it is asked for; `leaves_after` so many tokens its client goes away."""

    spec: SequenceSpec
    stops: tuple[str, ...] = ()
    leaves_after: int | None = None

    def with_draft(self, draft: Sequence[int]) -> Request:
        """The same request, with a given answer to verify first."""
        return replace(self, spec=replace(self.spec, draft_tokens=tuple(draft)))

    @property
    def plain(self) -> Request:
        """The same request without drafts, read to its end."""
        spec = replace(self.spec, speculates=False, draft_tokens=(), drafter=None)
        return replace(self, spec=spec, leaves_after=None)


@dataclass(slots=True)
class Answer:
    """What a request was told."""

    stops: StopMatcher
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob | None] = field(default_factory=list)
    num_accepted: int = 0
    text: str = ""
    stopped: bool = False
    left: bool = False
    ended: Ended | None = None

    @property
    def end(self) -> tuple[EndReason, int | None]:
        """Why it ended; a stop string counts as such whatever the device did meanwhile."""
        assert self.ended is not None
        if self.stopped:
            return EndReason.CANCELLED, None
        return self.ended.reason, self.ended.stop_token_id

    @property
    def is_booked(self) -> bool:
        """Whether its ending counts what it was told."""
        assert self.ended is not None
        booked = self.ended.output_tokens, self.ended.accepted_tokens
        return self.stopped or booked == (len(self.token_ids), self.num_accepted)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a round's second run meets."""

    max_batch: int = 16
    num_blocks: Mapping[Tier, int] = field(default_factory=lambda: {T: 512, S: 512})
    kv_overcommit: float = 1.0
    chunk_tokens: int = 512
    prefix_cache: bool = True
    joins: float = 1.0
    leaves: float = 0.0
    pauses: bool = False
    failures: float = 0.0
    """Part of the steps that do not fit the device, or before which the tactical tier is lost."""
    row_s: float = 0.0

    @classmethod
    def drawn(cls, chance: Random) -> Conditions:
        """Random ones."""
        return cls(
            max_batch=chance.randint(1, 16),
            num_blocks={tier: chance.choice([16, 24, 48, 96, 512]) for tier in (T, S)},
            kv_overcommit=chance.choice([1.0, 1.5, 3.0]),
            chunk_tokens=chance.choice([16, 40, 512]),
            prefix_cache=chance.random() < 0.8,
            joins=chance.choice([0.5, 0.9, 1.0]),
            leaves=chance.choice([0.0, 0.0, 0.02]),
            pauses=chance.random() < 0.5,
            failures=chance.choice([0.0, 0.0, 0.01]),
            row_s=chance.choice([0.0, 0.0005, 0.004]),
        )


def drawn_sampling(chance: Random) -> Sampling:
    """Greedy or not, each filter and penalty on or off."""
    penalised = chance.random() < 0.4
    return Sampling(
        temperature=0.0 if chance.random() < 0.4 else chance.uniform(0.5, 1.5),
        top_k=chance.choice([0, 0, 1, 5, 20]),
        top_p=chance.choice([1.0, 1.0, 0.9, 0.5]),
        min_p=chance.choice([0.0, 0.0, 0.05, 0.3]),
        repetition_penalty=chance.choice([1.0, 1.1, 1.3]) if penalised else 1.0,
        presence_penalty=chance.choice([0.0, 0.5, -0.5]) if penalised else 0.0,
        frequency_penalty=chance.choice([0.0, 0.4]) if penalised else 0.0,
        seed=chance.getrandbits(62),
        top_logprobs=chance.choice([None, None, 0, 3]),
    )


def requests(chance: Random, tokenizer: Tokenizer, count: int, first_id: int) -> list[Request]:
    """Draw requests of all kinds; of those that speculate, given answers come later."""
    accounts = chance.choice(["a", "ab"])  # of several, steps serve one or the other
    beginnings = [ids_of(chance, chance.choice([16, 32, 50])) for _ in range(3)]
    made = []
    for seq_id in range(first_id, first_id + count):
        prompt = ids_of(chance, chance.randint(1, 90))
        if chance.random() < 0.5:
            task = task_at(first_id, seq_id, "test", families=tuple(ALL_FAMILIES))
            prompt = tokenizer.encode_messages((Message("user", task.prompt),))
        if chance.random() < 0.15:
            prompt = prompt[:8] * chance.randint(2, 6)  # so that a suffix is found
        if chance.random() < 0.3:
            prompt = chance.choice(beginnings) + prompt
        tier = S if chance.random() < 0.85 else T
        letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ "
        stops = tuple(
            "".join(chance.choices(letters, k=chance.randint(1, 2)))
            for _ in range(chance.choice([0, 0, 0, 0, 0, 1, 3]))
        )
        spec = SequenceSpec(
            seq_id,
            tier,
            prompt[:200],
            chance.randint(1, 40),
            drawn_sampling(chance),
            ignore_eos=chance.random() < 0.5,
            stop_token_ids=frozenset(
                chance.choices(range(NUM_IDS), k=20 if chance.random() < 0.15 else 0)
            ),
            priority=chance.choice(list(Priority)),
            account=chance.choice(accounts),
            prefix_cache=chance.random() < 0.9,
            speculates=tier == S or chance.random() < 0.5,
            drafter=T if tier == S and chance.random() < 0.8 else None,
        )
        made.append(Request(spec, stops, chance.randint(0, 30) if chance.random() < 0.1 else None))
    return made


def ids_of(chance: Random, count: int) -> tuple[int, ...]:
    """Random text tokens."""
    return tuple(chance.choices(range(NUM_IDS), k=count))


def given_answer(chance: Random, own: Sequence[int]) -> tuple[int, ...]:
    """No draft, or what the sequence will say, right, wrong in places, or altogether wrong."""
    kind = chance.choice([*["none"] * 5, "right", "changed", "missing", "more", "wrong"])
    answer = list(own)
    at = chance.randrange(len(answer)) if answer else 0
    if kind == "none" or (kind == "wrong" and chance.random() < 0.5):
        return ()
    if kind == "wrong":
        return ids_of(chance, chance.randint(1, 30))
    if kind == "changed" and answer:
        answer[at] = (answer[at] + 1 + chance.randrange(NUM_IDS - 1)) % NUM_IDS
    elif kind == "missing":
        del answer[at : at + chance.randint(1, 3)]
    elif kind == "more":
        answer[at:at] = ids_of(chance, chance.randint(1, 3))
    # Behind its end: an end of text inside the draft is drafted, too.
    return (*answer, *ids_of(chance, chance.choice([0, 5])))


@dataclass(slots=True)
class Traffic:
    """What the runs of an engine pair met, to show that the conditions were there."""

    counts: Counter[str] = field(default_factory=Counter)
    batches: Counter[int] = field(default_factory=Counter)


class Run:
    """Requests on both tiers, step by step, on a virtual clock."""

    def __init__(
        self,
        engines: Mapping[Tier, Engine],
        conditions: Conditions,
        tokenizer: Tokenizer,
        chance: Random,
        traffic: Traffic,
    ) -> None:
        self._engines, self._conditions, self._chance = engines, conditions, chance
        self._tokenizer, self._traffic = tokenizer, traffic
        self._scheduler = Scheduler()
        for tier, engine in engines.items():
            limits = TierLimits(
                min(conditions.num_blocks[tier], engine.num_blocks),
                CONTEXT,
                max_batch=conditions.max_batch,
                max_waiting=ROUND,
                prefill_chunk_tokens=conditions.chunk_tokens,
                preempt_after_s=0.2,
                prefix_cache=conditions.prefix_cache,
                kv_overcommit=conditions.kv_overcommit,
            )
            self._scheduler.open_tier(
                tier, limits, engine.eos_token_ids,
                pipelined=engine.pipelined,
                num_parts=engine.num_parts if conditions.pauses else 1,
            )  # fmt: skip
        self._now = 0.0
        self._launched: deque[tuple[Step, InFlightStep]] = deque()
        self._paused: tuple[Step, InFlightStep, float] | None = None
        self._asked: dict[int, Request] = {}
        self._answers: dict[int, Answer] = {}

    def answers(self, asked: Sequence[Request]) -> dict[int, Answer]:
        """Run them to their ends."""
        waiting = deque(asked)
        while waiting or self._scheduler.has_work:
            while waiting and self._chance.random() < self._conditions.joins:
                self._join(waiting.popleft())
            if self._chance.random() < 0.3 * self._conditions.failures:
                self._lose(T)
            if self._scheduler.has_work:
                self._turn()
            if self._asked and self._chance.random() < self._conditions.leaves:
                self._leave(self._chance.choice(list(self._asked)))
        for tier in self._engines:
            load = self._scheduler.load(tier)
            assert load is not None
            if load.kv_tokens_used:
                raise RuntimeError(f"{load.kv_tokens_used} KV tokens of {tier.name} are not free")
        return self._answers

    def _open(self, tier: Tier) -> None:
        engine, conditions = self._engines[tier], self._conditions
        limits = TierLimits(
            min(conditions.num_blocks[tier], engine.num_blocks),
            CONTEXT,
            max_batch=conditions.max_batch,
            max_waiting=ROUND,
            prefill_chunk_tokens=conditions.chunk_tokens,
            preempt_after_s=0.2,
            prefix_cache=conditions.prefix_cache,
            kv_overcommit=conditions.kv_overcommit,
        )
        self._scheduler.open_tier(
            tier,
            limits,
            engine.eos_token_ids,
            pipelined=engine.pipelined,
            num_parts=engine.num_parts if conditions.pauses else 1,
        )

    def _lose(self, tier: Tier) -> None:
        """End a tier's sequences, and serve it again at once, with nothing in its cache."""
        self._traffic.counts["tiers_lost"] += 1
        for step, running in tuple(self._launched):
            if step.tier == tier:
                running.wait()
                self._launched.remove((step, running))
        ended = self._scheduler.close_tier(tier, EndReason.FAILED, self._now)
        for one in ended:
            self._answers[one.seq_id].left = True
        self._end(ended)
        self._open(tier)

    def _join(self, request: Request) -> None:
        self._asked[request.spec.seq_id] = request
        self._answers[request.spec.seq_id] = Answer(StopMatcher(request.stops))
        self._scheduler.add(request.spec, self._now)

    def _leave(self, seq_id: int) -> None:
        self._answers[seq_id].left = True
        self._end(self._scheduler.cancel(seq_id, self._now))

    def _turn(self) -> None:
        """Launch what is next, or take in what was launched."""
        step = self._scheduler.next_step(self._now) if len(self._launched) < 2 else None
        if step is None:
            self._take_in()
            return
        resumes = self._paused is not None and self._paused[0] is step
        if not resumes and self._chance.random() < self._conditions.failures:
            outcome = self._scheduler.out_of_memory(step, now=self._now, elapsed_s=0.001)
            self._traffic.counts["steps_out_of_memory"] += 1
            for one in outcome.ended:
                self._answers[one.seq_id].left = True
            self._end(outcome.ended)
            return
        pause_after_s = None
        if self._scheduler.pause_after_s(step) is not None and self._chance.random() < 0.7:
            pause_after_s = 0.0  # the shortest part
        spent_s = 0.0
        if resumes:
            assert self._paused is not None
            _, running, spent_s = self._paused
            self._paused = None
            running.resume(pause_after_s)
        else:
            running = self._engines[step.tier].launch(step, pause_after_s)
            self._note(step)
        if running.paused:
            spent_s += 0.001
            self._now += 0.001
            self._traffic.counts["pauses"] += 1
            self._paused = step, running, spent_s
            self._scheduler.paused(step, spent_s)
            return
        self._launched.append((step, running))
        if not self._engines[step.tier].pipelined:
            self._take_in()

    def _take_in(self) -> None:
        step, running = self._launched.popleft()
        base_s = 0.01 if step.tier == T else 0.06
        elapsed_s = base_s + self._conditions.row_s * step.num_tokens
        self._now += elapsed_s
        outcome = self._scheduler.complete(step, running.wait(), now=self._now, elapsed_s=elapsed_s)
        self._traffic.counts["preemptions"] += outcome.report.num_preempted
        self._traffic.counts["prefix_hit_tokens"] += outcome.report.num_hit_tokens
        self._traffic.counts[f"{outcome.report.kind.value}_steps"] += 1
        for token in outcome.tokens:
            self._deliver(token)
        self._end(outcome.ended)

    def _deliver(self, token: SampledToken) -> None:
        """Give a token to its reader, who cancels behind a stop string."""
        answer = self._answers[token.seq_id]
        if answer.stopped:
            return  # of the step in which the stop string was complete
        answer.token_ids.append(token.token_id)
        answer.logprobs.append(token.logprob)
        answer.num_accepted += token.accepted
        request = self._asked.get(token.seq_id)
        piece, answer.stopped = answer.stops.push(self._tokenizer.token_text(token.token_id))
        answer.text += piece
        if request is None:
            return
        if answer.stopped:
            self._traffic.counts["stop_strings"] += 1
            self._end(self._scheduler.cancel(token.seq_id, self._now))
        elif request.leaves_after == len(answer.token_ids):
            self._leave(token.seq_id)

    def _end(self, ended: Iterable[Ended]) -> None:
        for one in ended:
            del self._asked[one.seq_id]
            self._answers[one.seq_id].ended = one
            self._traffic.counts[one.reason.value] += 1
            for name in ("drafted_tokens", "verified_tokens", "accepted_tokens"):
                self._traffic.counts[name] += getattr(one, name)

    def _note(self, step: Step) -> None:
        self._traffic.batches[len(step.chunks)] += 1
        self._traffic.counts["verifying_chunks"] += sum(len(c.draws) > 1 for c in step.chunks)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two answers part: behind the `same` tokens, each goes on with one of its `own`."""

    request: Request
    own: tuple[frozenset[int], frozenset[int]]
    same: tuple[int, ...]


def compare(
    request: Request, plain: Answer, drafted: Answer, ends: frozenset[int]
) -> Divergence | str | float:
    """Equal: by how much log-probabilities differ. A text says what differs beside tokens."""
    a, b = plain.token_ids, drafted.token_ids
    length = min(len(a), len(b))
    same = next((i for i in range(length) if a[i] != b[i]), length)
    interrupted = drafted.left and same == len(b) and len(b) <= len(a)
    differs = same < max(len(a), len(b)) or plain.end != drafted.end
    if differs and not interrupted:
        following = tuple(
            frozenset({one.token_ids[same]}) if same < len(one.token_ids) else _ending(one, ends)
            for one in (plain, drafted)
        )
        if not all(following):
            return f"the same {same} tokens, then {plain.end} and {drafted.end}"
        return Divergence(request, (following[0], following[1]), tuple(a[:same]))
    if not interrupted and plain.text != drafted.text:
        return f"the same tokens, but the texts {plain.text!r} and {drafted.text!r}"
    pairs = list(zip(plain.logprobs[:same], drafted.logprobs[:same], strict=True))
    if any((one is None) != (other is None) for one, other in pairs):
        return "log-probabilities of one of both only"
    return max((_moved(one, other) for one, other in pairs if one and other), default=0.0)


def _ending(answer: Answer, ends: frozenset[int]) -> frozenset[int]:
    """The tokens that an answer may have ended with."""
    reason, stop_token_id = answer.end
    if reason is EndReason.EOS:
        return ends
    return frozenset() if stop_token_id is None else frozenset({stop_token_id})


def _moved(one: Logprob, other: Logprob) -> float:
    # Of near-ties either may come first: values are compared in their order.
    pairs = [(one.logprob, other.logprob)]
    pairs += [(a, b) for (_, a), (_, b) in zip(one.top, other.top, strict=True)]
    # fp32 rounds large values more coarsely: see LOGPROB_TOLERANCE.
    return max(abs(a - b) / max(1.0, abs(a) / 10.0) for a, b in pairs)


class Judge:
    """Whether a difference is lawful: by the logits of its place and their bound."""

    def __init__(self, engines: Mapping[Tier, Engine]) -> None:
        self._engines = engines

    def logits(self, tier: Tier, token_ids: Sequence[int], *, alone: int) -> torch.Tensor:
        """Logits fp32 [alone + 1, ids]: the last `alone` tokens each in a step of its own."""
        engine = self._engines[tier]
        blocks = tuple(range(-(-len(token_ids) // BLOCK_SIZE)))
        plain = Sampling()
        rows = []
        start = 0
        for end in (*range(len(token_ids) - alone, len(token_ids)), len(token_ids)):
            fed = tuple(token_ids[start:end])
            rows.append(self._forward(engine, Chunk(1, start, fed, blocks, (Draw(plain, 0),))))
            start = end
        return torch.cat(rows)

    def rows(self, tier: Tier, token_ids: Sequence[int], count: int) -> torch.Tensor:
        """Logits behind each of the last `count` tokens, by one step over these."""
        blocks = tuple(range(-(-len(token_ids) // BLOCK_SIZE)))
        start, draws = len(token_ids) - count, (Draw(Sampling(), 0),)
        engine = self._engines[tier]
        if start:
            self._forward(engine, Chunk(1, 0, tuple(token_ids[:start]), blocks, draws))
        chunk = Chunk(1, start, tuple(token_ids[start:]), blocks, draws * count)
        return self._forward(engine, chunk)

    @torch.inference_mode()
    def _forward(self, engine: Engine, chunk: Chunk) -> torch.Tensor:
        forward = engine._forward  # noqa: SLF001 - logits are nobody's but the judge's business
        assert forward is not None
        forwarded = forward.begin([chunk]).advance(None)
        assert forwarded is not None
        assert forwarded.logits is not None
        return forwarded.logits.float().clone()

    def measured(self, tier: Tier, token_ids: Sequence[int]) -> tuple[float, torch.Tensor]:
        """The largest difference of a logit by one row at a time and by many; the last logits."""
        count = min(len(token_ids) - 1, 12)
        many = self.rows(tier, token_ids, count)
        single = self.logits(tier, token_ids, alone=count - 1)[-count:]
        moved = many - single
        # Equal for all ids of a row, a shift changes no draw.
        moved -= moved.mean(-1, keepdim=True)
        return float(moved.abs().max()), single[-1]

    def least_bound(self, found: Divergence) -> float:
        """The least by which logits have to move for either token to be drawn."""
        spec = found.request.spec
        scores = self.logits(spec.tier, (*spec.prompt, *found.same), alone=0)[-1]
        draw = draw_behind(spec, found.same)
        return max(min(_least_for(scores, draw, token_id) for token_id in own) for own in found.own)


def draw_behind(spec: SequenceSpec, output: Sequence[int]) -> Draw:
    """The draw of the token that follows this output."""
    history = History(spec.sampling, spec.prompt)
    for token_id in output:
        history.add(token_id)
    return history.draw(len(output))


def is_ambiguous(logits: torch.Tensor, draw: Draw, bound: float) -> bool:
    """Whether more than one token can be drawn with this bound."""
    likely = logits.topk(16).indices.tolist()
    return sum(can_be_drawn(logits, draw, token_id, bound) for token_id in likely) > 1


def _least_for(logits: torch.Tensor, draw: Draw, token_id: int) -> float:
    """The least bound with which a token can be drawn, to a hundredth of itself."""
    low, high = 1e-7, 64.0
    if not can_be_drawn(logits, draw, token_id, high):
        return high
    while high > 1.01 * low:
        middle = (low * high) ** 0.5
        if can_be_drawn(logits, draw, token_id, middle):
            high = middle
        else:
            low = middle
    return high


def can_be_drawn(logits: torch.Tensor, draw: Draw, token_id: int, bound: float) -> bool:
    """Whether a token may be what is drawn from logits that are moved by at most `bound` each.

    Necessary for that: no id that every filter keeps for certain beats it by more than both may
    move, and no filter drops it for certain. Masses move by at most a factor of exp(2 bound / T) in
    their odds.
    """
    s = draw.sampling
    scores = logits.double().clone()
    factor = torch.ones_like(scores)
    seen = torch.tensor([i for i in draw.seen if i < len(scores)], dtype=torch.long)
    factor[seen] = s.repetition_penalty
    scores = torch.where(scores > 0, scores / factor, scores * factor)
    for counted, count in draw.counts:
        if counted < len(scores):
            scores[counted] -= s.presence_penalty + count * s.frequency_penalty
    both = 2.0 * bound * max(s.repetition_penalty, 1.0 / s.repetition_penalty)
    own = scores[token_id]
    if s.greedy:
        return bool(scores.max() - own <= both)
    certain = torch.ones_like(scores, dtype=torch.bool)
    possible = certain.clone()
    # Rows: of id i, what is surely above it, and what may be.
    surely = scores[None, :] > scores[:, None] + both
    maybe = scores[None, :] > scores[:, None] - both
    maybe.fill_diagonal_(fill_value=False)
    if s.top_k > 0:
        possible &= surely.sum(-1) < s.top_k
        certain &= maybe.sum(-1) < s.top_k
    relative = (scores - scores.max()) / s.temperature
    slack = both / s.temperature
    if s.min_p > 0:
        floor = torch.tensor(s.min_p).log()
        possible &= relative >= floor - slack
        certain &= relative >= floor + slack
    if s.top_p < 1.0:
        mass = relative.exp()
        kept_at_most = surely.sum(-1) < s.top_k if s.top_k else torch.ones_like(certain)
        kept_at_least = maybe.sum(-1) < s.top_k if s.top_k else torch.ones_like(certain)
        most, least = (mass * kept_at_most).sum(), (mass * kept_at_least).sum()
        above = (surely * (mass * kept_at_least)).sum(-1)
        perhaps = (maybe * (mass * kept_at_most)).sum(-1)
        slackest = torch.tensor(slack).exp()
        low = above / (above + (most - above).clamp_min(0) * slackest)
        high = perhaps / (perhaps + (least - perhaps).clamp_min(0) / slackest)
        # One part in 1e6 is what weights are rounded to.
        possible &= low < s.top_p + 1e-6
        certain &= high < s.top_p - 1e-6
    if not possible[token_id]:
        return False
    noisy = relative + noise(
        torch.tensor([draw_key(s.seed, draw.index)]), torch.arange(len(scores))
    )
    others = noisy.masked_fill(~certain, -torch.inf)
    others[token_id] = -torch.inf
    return bool(others.max() - noisy[token_id] <= slack)


def load(precision: str, kernels: str) -> dict[Tier, Engine]:
    """The bundled pair; kernels `graphs` are torch's with what a GPU captures, pipelined."""
    capture = EagerCapture() if kernels == "graphs" else None
    return {
        tier: load_engine(
            EngineOptions(
                str(MODELS / f"demo-{tier.name}"),
                kv_cache_bytes=32 << 20,
                precision=precision,
                kernels="torch" if kernels == "graphs" else kernels,
                max_context_tokens=CONTEXT,
            ),
            lambda _: None,
            capture,
        )
        for tier in (T, S)
    }


@dataclass(slots=True)
class Findings:
    """What the comparison of an engine pair has found."""

    num_prompts: int = 0
    num_tokens: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    logit_difference: float = 0.0
    logprob_difference: float = 0.0
    places: list[tuple[torch.Tensor, Draw]] = field(default_factory=list)
    """Where the difference was measured: logits and what is drawn from them."""

    def note(self, request: Request, plain: Answer, drafted: Answer, ends: frozenset[int]) -> None:
        """Compare a request's answers."""
        self.num_prompts += 1
        self.num_tokens += len(drafted.token_ids)
        if not drafted.is_booked:
            self.wrong.append(f"request {request.spec.seq_id}: {drafted.ended} counts other tokens")
        differs = compare(request, plain, drafted, ends)
        if isinstance(differs, Divergence):
            self.divergences.append(differs)
        elif isinstance(differs, str):
            self.wrong.append(f"request {request.spec.seq_id}: {differs}")
        else:
            self.logprob_difference = max(self.logprob_difference, differs)


def examine(
    engines: Mapping[Tier, Engine], num_prompts: int, seed: int, per_round: int = ROUND
) -> Findings:
    """Run rounds of requests until so many are compared."""
    tokenizer = Tokenizer.load(MODELS / "demo-strategic")
    judge, found = Judge(engines), Findings()
    number = 0
    while found.num_prompts < num_prompts:
        chance = Random(f"{seed} {number}")
        count = min(per_round, num_prompts - found.num_prompts)
        asked = requests(chance, tokenizer, count, number * per_round)
        number += 1
        calm = Run(engines, Conditions(), tokenizer, Random(0), Traffic())
        plain = calm.answers([request.plain for request in asked])
        asked = [
            one.with_draft(given_answer(chance, plain[one.spec.seq_id].token_ids))
            if one.spec.speculates else one
            for one in asked
        ]  # fmt: skip
        conditions = Conditions.drawn(chance)
        asked = [one for one in asked if _fits(one.spec, conditions)]
        run = Run(engines, conditions, tokenizer, chance, found.traffic)
        drafted = run.answers(asked)
        for request in asked:
            seq_id, ends = request.spec.seq_id, engines[request.spec.tier].eos_token_ids
            found.note(request, plain[seq_id], drafted[seq_id], ends)
        for request in asked[:10]:
            spec = request.spec
            token_ids = (*spec.prompt, *plain[spec.seq_id].token_ids)
            if len(token_ids) > 1:
                moved, logits = judge.measured(spec.tier, token_ids)
                found.logit_difference = max(found.logit_difference, moved)
                draw = draw_behind(spec, plain[spec.seq_id].token_ids)
                found.places.append((logits, draw))
    return found


def _fits(spec: SequenceSpec, conditions: Conditions) -> bool:
    """Whether a small pool holds a sequence's worst case; the daemon refuses others."""
    longest = min(CONTEXT, conditions.num_blocks[spec.tier] * BLOCK_SIZE)
    return len(spec.prompt) + spec.max_new_tokens <= longest


def verdict(engines: Mapping[Tier, Engine], found: Findings, precision: str) -> dict[str, Any]:
    """What was found, as JSON has it; `unlawful` are differences that nothing explains."""
    judge = Judge(engines)
    bound = found.logit_difference
    ambiguous = sum(is_ambiguous(*place, bound) for place in found.places) if bound else 0
    needed = sorted(judge.least_bound(one) for one in found.divergences)
    exact = precision == "fp32" or not bound
    unlawful = len(needed) if exact else sum(one > bound for one in needed)
    if exact and found.logprob_difference > LOGPROB_TOLERANCE:
        found.wrong.append(f"a log-probability differs by {found.logprob_difference}")
    return {
        "prompts": found.num_prompts,
        "tokens": found.num_tokens,
        "divergences": len(needed),
        "unlawful": unlawful,
        "other_differences": found.wrong,
        "largest_logit_difference": found.logit_difference,
        "bound": bound,
        "ambiguous_places": f"{ambiguous} of {len(found.places)}",
        "bounds_needed": {
            name: needed[int(part * (len(needed) - 1))]
            for name, part in (("median", 0.5), ("p90", 0.9), ("most", 1.0))
            if needed
        },
        "largest_logprob_difference": found.logprob_difference,
        "met": dict(sorted(found.traffic.counts.items())),
        "steps_by_sequences": dict(sorted(found.traffic.batches.items())),
    }  # fmt: skip


ENGINES = (
    "fp32:native", "fp32:torch", "fp32:graphs", "bf16:native", "bf16:torch",
    "int8:native", "int8:torch", "int4:native", "int4:torch",
)  # fmt: skip


def main() -> int:
    """Examine, print and write; 0 where every difference is lawful."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=10_000, help="of fp32")
    parser.add_argument("--other-prompts", type=int, default=2_000, help="of other precisions")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), metavar="PRECISION:KERNELS")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = {}
    for name in args.engines:
        precision, kernels = name.split(":")
        began = time.monotonic()
        engines = load(precision, kernels)
        count = args.prompts if precision == "fp32" else args.other_prompts
        found = examine(engines, count, args.seed)
        results[name] = verdict(engines, found, precision)
        results[name]["seconds"] = round(time.monotonic() - began, 1)
        brief = {k: v for k, v in results[name].items() if k not in {"met", "steps_by_sequences"}}
        print(name, brief, flush=True)
    report.write("lossless", {"seed": args.seed, "engines": results}, args.output)
    return int(any(one["unlawful"] or one["other_differences"] for one in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
