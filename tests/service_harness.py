"""A real gRPC server on port 0 over a real ledger, with jobs that follow a script.

The script stands for GPU time only: it decides what a job's stream says and when, so that
refusals, bugs and disconnects happen on cue.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc

from sage_fed.auth import Authenticator, Register, Throttle, Token
from sage_fed.core import (
    Address,
    CalibrationEvent,
    CalibrationProgress,
    CalibrationResult,
    Caller,
    CardFit,
    CardStatus,
    DaemonStatus,
    Delta,
    EndToken,
    Event,
    Finished,
    JobSpec,
    Logprob,
    MeasuredPoint,
    Mode,
    ModelStatus,
    ModeReturn,
    ModeReturns,
    Phase,
    Price,
    Priority,
    Prompt,
    QualityCardStatus,
    Quote,
    Role,
    Route,
    RouteQuote,
    RunningJob,
    Started,
    StopReason,
    Tier,
    TierLoad,
    TierState,
    Timing,
    UnixSocket,
    Usage,
)
from sage_fed.errors import NotFound
from sage_fed.ledger import AccountTerms, Ledger
from sage_fed.service.grpc_server import BoundServer, build_server
from sage_fed.service.tls import LiveCertificate
from sage_fed.settings import LimitSettings
from sage_fed.workers import Workers

T = TypeVar("T")

WAIT_S = 20.0
"""A deadline that only a hung test meets."""

ROUTE = Route(Tier.TACTICAL, "auto_default", requested=None)
STARTED = Started(
    job_id="job-1",
    route=ROUTE,
    held_uatp=5_000_000,
    prompt_tokens=3,
    seed=2**64 - 1,
    max_new_tokens=4,
)
DELTAS = (
    Delta("Grüß", (1, 2), (Logprob(1, -0.5, ((1, -0.5), (9, -1.0))), Logprob(2, -0.1)), 2),
    Delta("", (3,), (Logprob(3, -0.2),), 3),
    Delta(" Gott", (4,), (Logprob(4, -0.3),), 4),
)
FINISHED = Finished(
    StopReason.LENGTH,
    Usage.single(Tier.TACTICAL, 3, 1, 4),
    Timing(0.001, 0.002, 0.003, 0.004, 0.005),
    Price(4_300_000, 5_000_000, "default-1"),
    balance_uatp=95_700_000,
)
EVENTS: tuple[Event, ...] = (STARTED, *DELTAS, FINISHED)
RUNNING = RunningJob("job-1", "robot", Tier.STRATEGIC, Priority.HIGH, 1.5, 3, 2, 5_000_000)
QUOTE = Quote(
    decision=ROUTE,
    tiers=(
        RouteQuote(Tier.TACTICAL, 5_000_000, affordable=True, estimated_s=0.25),
        RouteQuote(Tier.STRATEGIC, 32_000_000, affordable=False, estimated_s=None),
    ),
    rate_card="default-1",
    prompt_tokens=3,
    max_new_tokens=4,
    balance_uatp=100_000_000,
)
LOADS = (
    TierLoad(
        Tier.TACTICAL, TierState.READY, 1, 2, 64, 16, 1024, 512, 40, 0.002, 5000.0, 8, 1.5, 32
    ),
    TierLoad(Tier.STRATEGIC, TierState.LOADING),
)
MODELS = (
    ModelStatus(
        Tier.TACTICAL, TierState.READY, "demo-tactical", "", "bf16", "cpu", "native",
        "Qwen2ForCausalLM", 600_000, 1_200_000, 2**20, 1024, 512, 0.5, 1.0, 1_000_000,
        end_tokens=(EndToken(2, "<|im_end|>"), EndToken(0, "")),
    ),
    ModelStatus(
        Tier.STRATEGIC, TierState.FAILED, "Qwen/Qwen2.5-7B-Instruct", "a" * 40, "bf16", "cuda:0",
        message="config.json: no such file",
    ),
)  # fmt: skip
STATUS = DaemonStatus(
    *("0.1.0", 12.5, False, "cpu", "default-1", 6.59, LOADS),
    device_fallback="no GPU",
    rate_card_fit=CardFit.STALE,
    rate_card_note="threads is 2 now",
    ledger_trouble="its disk does not answer",
    recovered_jobs=3,
    recovered_uatp=4_500_000,
)


CARD = CardStatus("mine-1", 5.25, CardFit.MEASURED, "on this device, engine and pair")
QUALITY = QualityCardStatus("pair-1", "measured on this pair")
POINTS = (
    MeasuredPoint(Tier.TACTICAL, Phase.DECODE, 1, 40, 1, 0.002, 0.01, 30, 0.0025),
    MeasuredPoint(Tier.STRATEGIC, Phase.VERIFY, 1, 40, 8, 0.02, 0.03, 8),
)
PROGRESS = CalibrationProgress("round 1 of 2", 0.25, "tactical decode x1", 3.5, 5.3, POINTS[:1])
RESULT = CalibrationResult(
    version="mine-1", path="/var/lib/sage-fed/cards/mine-1.toml", card='version = "mine-1"\n',
    report="# Rate card", plot="<svg/>", cost_ratio=5.25, cost_ratio_spread=0.01, took_s=61.0,
    adopted=True, points=POINTS,
)  # fmt: skip


class ScriptedStream:
    """Says the given events, then raises the given error or hangs until it is cancelled."""

    def __init__(self, events: Sequence[Event], ending: BaseException | None, hang: bool) -> None:
        self._events = events
        self._ending = ending
        self._hang = hang
        self.cancelled = asyncio.Event()

    @property
    def job_id(self) -> str:
        """There is one job."""
        return STARTED.job_id

    @property
    def kept_bytes(self) -> int:
        """The script is not made for its reader."""
        return 0

    def cancel(self) -> None:
        """Nobody reads any more."""
        self.cancelled.set()

    async def answer(self) -> tuple[Started, Delta, Finished]:
        """All events together."""
        started, *deltas, finished = [event async for event in self]
        assert isinstance(started, Started)
        assert isinstance(finished, Finished)
        return started, merge([d for d in deltas if isinstance(d, Delta)]), finished

    async def __aiter__(self) -> AsyncIterator[Event]:
        for event in self._events:
            yield event
        if self._hang:
            await self.cancelled.wait()
        if self._ending is not None:
            raise self._ending


@dataclass
class ScriptedJobs:
    """What the next jobs do; remembers what it was asked."""

    events: Sequence[Event] = EVENTS
    refusals: list[BaseException] = field(default_factory=list)
    ending: BaseException | None = None
    hang: bool = False
    specs: list[JobSpec] = field(default_factory=list)
    streams: list[ScriptedStream] = field(default_factory=list)
    counted: list[tuple[Prompt, Tier]] = field(default_factory=list)
    quoted: Quote = QUOTE
    accepted: asyncio.Event = field(default_factory=asyncio.Event)

    async def submit(self, spec: JobSpec, arrived: float) -> ScriptedStream:
        """Refuse while refusals are left, then accept."""
        assert arrived > 0
        self.specs.append(spec)
        if self.refusals:
            raise self.refusals.pop(0)
        self.streams.append(ScriptedStream(self.events, self.ending, self.hang))
        self.accepted.set()
        return self.streams[-1]

    async def quote(self, spec: JobSpec) -> Quote:
        """Refuse while refusals are left, then quote."""
        self.specs.append(spec)
        if self.refusals:
            raise self.refusals.pop(0)
        return self.quoted

    async def count_tokens(
        self,
        prompt: Prompt,
        tier: Tier,
        account: str,  # noqa: ARG002 - as the port has it
    ) -> tuple[int, int]:
        """Refuse while refusals are left, then seven tokens, whatever they are."""
        self.counted.append((prompt, tier))
        if self.refusals:
            raise self.refusals.pop(0)
        return 7, 512

    def abort(self, job_id: str) -> bool:
        """There is one job."""
        return job_id == RUNNING.job_id

    def running(self) -> tuple[RunningJob, ...]:
        """There is one job."""
        return (RUNNING,)


RETURNS = ModeReturns(
    "demo-1", "card-1", "any", 30, 0.1, 0.25, None, "no sensor",
    (
        ModeReturn(Tier.TACTICAL, Mode.SINGLE, 9_000_000, 0.7, 0.6, 0.8, 8.0, 0.08, 3, 0.1, None,
                   None),
        ModeReturn(Tier.STRATEGIC, Mode.CASCADE, 20_000_000, 0.8, None, None, 8.0, 0.04, 0, None,
                   None, None),
    ),
)  # fmt: skip


@dataclass
class ScriptedOperations:
    """A daemon that stands still."""

    drained: list[float | None] = field(default_factory=list)
    compared: list[tuple[str, str, float | None]] = field(default_factory=list)
    shown: tuple[ModelStatus, ...] = MODELS
    calibrated: list[tuple[bool, bool]] = field(default_factory=list)
    calibration_error: BaseException | None = None
    calibration_hangs: bool = False
    calibration_over: asyncio.Event = field(default_factory=asyncio.Event)

    def models(self) -> tuple[ModelStatus, ...]:
        """Whatever is shown."""
        return self.shown

    def status(self) -> DaemonStatus:
        """Always the same."""
        return STATUS

    def compare_modes(self, account: str, task_class: str, max_error: float | None) -> ModeReturns:
        """There is a card for one class of tasks; notes who asked."""
        if task_class == "unknown":
            raise NotFound("no quality card is in force")
        self.compared.append((account, task_class, max_error))
        return RETURNS

    async def calibrate(
        self, *, quick: bool, adopt: bool
    ) -> AsyncGenerator[CalibrationEvent, None]:
        """Progress, then the result, or what is asked for instead; notes how it was left."""
        self.calibrated.append((quick, adopt))
        try:
            yield PROGRESS
            if self.calibration_error is not None:
                raise self.calibration_error
            if self.calibration_hangs:
                await asyncio.Event().wait()
            yield RESULT
        finally:
            self.calibration_over.set()

    async def adopt_card(self, version: str) -> CardStatus:
        """There is one card."""
        if version != CARD.version:
            raise NotFound(f"there is no rate card {version}")
        return CARD

    async def adopt_quality_card(self, version: str) -> QualityCardStatus:
        """There is one of these, too."""
        if version != QUALITY.version:
            raise NotFound(f"there is no quality card {version}")
        return QUALITY

    def drain(self, grace_s: float | None) -> int:
        """Two jobs are left, always."""
        self.drained.append(grace_s)
        return 2


def token(text: str, account: str, role: Role = Role.USER) -> Token:
    return Token(hashlib.sha256(text.encode()).digest(), Caller(account, role))


TOKENS = (token("robot-token", "robot"), token("admin-token", "local", Role.ADMIN))


@dataclass
class Harness:
    """A running server and what is behind it."""

    address: str
    bound: BoundServer
    jobs: ScriptedJobs
    ledger: Ledger
    operations: ScriptedOperations
    channel: grpc.aio.Channel
    denied: list[str]


@contextlib.asynccontextmanager
async def serving(
    tmp_path: Path,
    *,
    jobs: ScriptedJobs | None = None,
    anonymous: Caller | None = Caller("local", Role.USER),  # noqa: B008 - frozen
    limits: LimitSettings | None = None,
    listen: Address | UnixSocket = Address("127.0.0.1", 0),  # noqa: B008 - frozen
    certificate: LiveCertificate | None = None,
    register: Register | None = None,
    throttle: Throttle | None = None,
) -> AsyncIterator[Harness]:
    """Serve until the block is left; account `local` has 100 ATP, `robot` has none."""
    jobs = jobs or ScriptedJobs()
    operations = ScriptedOperations()
    ledger = await Ledger(tmp_path / "ledger.db").open()
    await ledger.ensure_account(
        "local", AccountTerms(capacity_uatp=100_000_000, initial_uatp=100_000_000)
    )
    denied: list[str] = []
    workers = Workers(max_calls=512, max_size=4_000_000)
    bound = await build_server(
        listen,
        authenticator=Authenticator(TOKENS, anonymous, register),
        limits=limits or LimitSettings(),
        jobs=jobs,
        ledger=ledger,
        operations=operations,
        workers=workers,
        throttle=throttle,
        certificate=certificate,
        on_denied=denied.append,
    )
    await bound.server.start()
    address = str(bound.address)
    looking = asyncio.ensure_future(bound.calls.run())
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Harness(address, bound, jobs, ledger, operations, channel, denied)
    finally:
        looking.cancel()
        await bound.server.stop(None)
        workers.close()
        await ledger.close()


async def in_thread(work: Callable[[], T]) -> T:
    """Run a blocking client beside the server's event loop, within a deadline."""
    return await asyncio.wait_for(asyncio.to_thread(work), WAIT_S)


def merge(deltas: Sequence[Delta]) -> Delta:
    """One delta that says what the given ones say, in order."""
    return Delta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        output_tokens=deltas[-1].output_tokens if deltas else 0,
    )
