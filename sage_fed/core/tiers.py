"""Tiers and their models: roles, states, loads, the card in force, measured points."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, order=True)
class Tier:
    """A role that the operator binds to a model; tiers compare by `rank`, the order of depth.

    `name` is what settings, cards, metrics and the wire call it. A daemon's tiers are those that
    its settings name: code iterates over them, and knows `TACTICAL` and `STRATEGIC` only where a
    rule is about one of the two roles.
    """

    rank: int
    name: str

    TACTICAL: ClassVar[Tier]
    STRATEGIC: ClassVar[Tier]

    @classmethod
    def named(cls, name: str) -> Tier:
        """Return the role of this name.

        Raises:
            ValueError: there is none.
        """
        for tier in TIER_ROLES:
            if tier.name == name:
                return tier
        raise ValueError(f"{name!r} is no tier")

    @classmethod
    def called(cls, name: str, known: Iterable[Tier] | None = None) -> Tier:
        """Return the tier of this name, or one of which no more than its name is known.

        Args:
            name: as settings, cards and the wire have it.
            known: those that may be meant; None: the two roles.
        """
        found = (tier for tier in known or TIER_ROLES if tier.name == name)
        return next(found, cls(_UNRANKED, name))

    def __str__(self) -> str:
        return self.name


_UNRANKED = 255
"""The rank of a tier that only another daemon, or an earlier one, knows."""

Tier.TACTICAL = Tier(0, "tactical")
Tier.STRATEGIC = Tier(1, "strategic")

TIER_ROLES = (Tier.TACTICAL, Tier.STRATEGIC)
"""The two roles that settings and the wire know by name, in the order of depth."""


class Phase(enum.Enum):
    """What kind of token is priced."""

    PREFILL = "prefill"
    CACHED = "cached"
    DECODE = "decode"
    DRAFT = "draft"
    VERIFY = "verify"


@dataclass(frozen=True, slots=True)
class PhaseTokens:
    """Tokens of one kind that one tier computed for a job."""

    tier: Tier
    phase: Phase
    tokens: int


class DraftOrigin(enum.Enum):
    """What proposed a draft."""

    DRAFTER = "drafter"
    ANSWER = "answer"
    """An answer that the sequence was given to verify."""
    LOOKUP = "lookup"
    """The prompt, or the output so far."""


class TierState(enum.Enum):
    """What a tier is doing; only READY admits jobs."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A loaded model, as operators and clients see it; `revision` "" for a local directory.

    `kernels` says whose code computes a step: "torch", with "+graphs" where steps are captured
    beforehand, or "native" for our own on the CPU. `capture_s` of `load_s` went into that, and
    `graph_bytes` of the device's memory.
    `step_bytes` are the weights that one decode step reads: all but an embedding of its own.
    `kv_token_bytes` are what a step reads of the cache for each token that it attends to.
    `end_token_ids` end a text, in ascending order.
    """

    name: str
    revision: str
    architecture: str
    parameters: int
    precision: str
    kernels: str
    device: str
    weight_bytes: int
    step_bytes: int
    kv_cache_bytes: int
    kv_token_bytes: int
    load_s: float
    capture_s: float = 0.0
    graph_bytes: int = 0
    end_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier's life: state, load progress from 0 to 1, and why it FAILED.

    A tier that FAILED may serve again after `retry_s` seconds; None where it never will.
    `restarts` counts how often its model was loaded again.
    """

    tier: Tier
    state: TierState
    load_progress: float = 0.0
    info: ModelInfo | None = None
    message: str = ""
    retry_s: float | None = None
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class DraftAcceptance:
    """The share of an origin's draft tokens that was accepted lately, of those compared."""

    origin: DraftOrigin
    share: float


@dataclass(frozen=True, slots=True)
class TierLoad:
    """What a tier is doing now, as the executor last said; rates None until measured.

    Of `kv_tokens_total`, running sequences own `kv_tokens_used`; `kv_tokens_cached` are kept for
    the prefix cache until the room is needed. `retry_after_s` is when the next place may be
    free, for a job that finds none. Up to `running_limit` run at once, memory permitting.
    The newest plans have drafts for `speculating` of the running sequences; `acceptance` is of the
    origins that were tried.
    """

    tier: Tier
    state: TierState
    running: int = 0
    waiting: int = 0
    waiting_limit: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0
    max_context_tokens: int = 0
    queued_prompt_tokens: int = 0
    decode_step_s: float | None = None
    prefill_tokens_per_s: float | None = None
    kv_tokens_cached: int = 0
    retry_after_s: float | None = None
    running_limit: int = 0
    speculating: int = 0
    acceptance: tuple[DraftAcceptance, ...] = ()


@dataclass(frozen=True, slots=True)
class EndToken:
    """A token that ends a text, and how the tokenizer spells it."""

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A tier's model: as configured, and as loaded (0 and "" until it is).

    `load_progress` goes from 0 to 1; `message` says why the tier FAILED;
    `decode_uatp` is the price of one decoded token on the card in force, `prefill_uatp` and
    `cached_uatp` those of a prompt token that is computed or found in the prefix cache.
    """

    tier: Tier
    state: TierState
    name: str
    revision: str
    precision: str
    device: str
    kernels: str = ""
    architecture: str = ""
    parameters: int = 0
    weight_bytes: int = 0
    kv_cache_bytes: int = 0
    kv_cache_tokens: int = 0
    max_context_tokens: int = 0
    load_s: float = 0.0
    load_progress: float = 0.0
    decode_uatp: int = 0
    message: str = ""
    prefill_uatp: int = 0
    cached_uatp: int = 0
    end_tokens: tuple[EndToken, ...] = ()


class CardFit(enum.Enum):
    """Whether the prices in force were measured on what is loaded.

    UNKNOWN until both tiers are loaded; DECLARED for a card without a fingerprint; STALE where
    it was measured on something else, or where a measured card was wanted and none fits.
    """

    UNKNOWN = "unknown"
    MEASURED = "measured"
    DECLARED = "declared"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class CardStatus:
    """The rate card in force; `note` says in words what its fit means here.

    Its first line is for a person, those below are the differences of a stale card, all of them.
    """

    version: str
    cost_ratio: float
    fit: CardFit
    note: str


@dataclass(frozen=True, slots=True)
class QualityCardStatus:
    """The quality card in force, "" for none; `note` says how well it tells, or why there is none.

    Its first line is for a person, those below are the differences of a card that was dropped.
    """

    version: str
    note: str


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The daemon at a glance; `cost_ratio` is strategic over tactical decode price.

    `device_fallback` says why it is not the device that was wanted; "" where it is.
    `ledger_trouble` says why the ledger takes no entries; "" where it does.
    `recovered_jobs` is how many jobs the daemon before this one did not end, and `recovered_uatp`
    what was given back for them.
    """

    version: str
    uptime_s: float
    draining: bool
    device: str
    rate_card: str
    cost_ratio: float
    tiers: tuple[TierLoad, ...]
    device_fallback: str = ""
    rate_card_fit: CardFit = CardFit.UNKNOWN
    rate_card_note: str = ""
    ledger_trouble: str = ""
    recovered_jobs: int = 0
    recovered_uatp: int = 0
    quality_card: str = ""
    quality_card_note: str = ""


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """One kind of step: `batch` sequences of `context_tokens` each, fed `tokens` each.

    `step_s` is the median over the rounds of the device's time with no other tier's step in
    between, `co_resident_s` with one before each (None where that was not measured).
    `spread` is half of the interquartile range of the rounds over their median; None where
    there was one round, which says nothing of it.
    """

    tier: Tier
    phase: Phase
    batch: int
    context_tokens: int
    tokens: int
    step_s: float
    spread: float | None
    rounds: int
    co_resident_s: float | None = None

    @property
    def token_s(self) -> float:
        """Device seconds per token fed."""
        return self.step_s / (self.batch * self.tokens)


@dataclass(frozen=True, slots=True)
class CalibrationProgress:
    """How far a calibration is, from 0 to 1, and what it does.

    `measured` are the points whose figures changed since the last message.
    """

    phase: str
    fraction: float
    point: str
    elapsed_s: float
    cost_ratio: float | None = None
    measured: tuple[MeasuredPoint, ...] = ()


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """A calibration's card and reports, as written into the daemon's cards directory.

    `card` is the file's text; `report` is Markdown and `plot` SVG, beside it.
    """

    version: str
    path: str
    card: str
    report: str
    plot: str
    cost_ratio: float
    cost_ratio_spread: float
    took_s: float
    adopted: bool
    points: tuple[MeasuredPoint, ...]


CalibrationEvent = CalibrationProgress | CalibrationResult
"""Progress, any number of times, and then the result."""
