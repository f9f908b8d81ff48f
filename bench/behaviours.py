"""Clients of a stressed daemon: how they ask, and how they misbehave.

Owns: the behaviours, which endings each of them may have, the tally, and a crowd of clients whose
daemon is looked at meanwhile. Does not know: the daemon's start, the checks afterwards.
Fails: never by exception; an ending that a behaviour may not have is a violation in the tally.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import grpc
from grpc.aio import AioRpcError, Channel, insecure_channel
from load_generator import before, closed_loop
from pair.tasks import task_at

from sage_fed.v1 import inference_pb2 as pb
from sage_fed.v1 import inference_pb2_grpc as rpc
from sage_fed.v1 import types_pb2 as types

STUCK_S = 60.0
"""An RPC that has not ended by then is stuck: nothing here is worth a second of work."""

Code = grpc.StatusCode
BUSY = frozenset({Code.OK.name, Code.RESOURCE_EXHAUSTED.name})
FLAGS = (
    "--set", "budget.initial_atp=900000000", "--set", "budget.capacity_atp=1000000000",
    "--set", "accounts.poor.budget.initial_atp=200",
    "--set", "accounts.poor.budget.capacity_atp=200",
    "--set", "accounts.poor.budget.refill_atp_per_s=50",
    "--set", "accounts.poor.budget.strategic_floor_atp=20",
    "--log-level", "warning",
)  # fmt: skip
TIERS = (types.TIER_TACTICAL, types.TIER_TACTICAL, types.TIER_STRATEGIC, types.TIER_AUTO)


@dataclass
class Tally:
    """Endings by behaviour, delivered tokens, and what must not have happened."""

    endings: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: int = 0
    finished_streams: int = 0
    seconds: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


@dataclass
class Client:
    """One client with its own connection, which it sometimes drops."""

    address: str
    random: Random
    tally: Tally
    token: str | None = None
    channel: Channel | None = None
    pause_s: float = 0.0
    asked: int = 0

    @property
    def stub(self) -> rpc.InferenceServiceStub:
        """The service over this client's connection, opened anew where it was dropped."""
        if self.channel is None:
            # A pool of its own: otherwise all clients of the process share one connection.
            options = [("grpc.use_local_subchannel_pool", 1)]
            self.channel = insecure_channel(self.address, options=options)
        return rpc.InferenceServiceStub(self.channel)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Who pays."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def job(self, max_new_tokens: int | None = None) -> types.JobSpec:
        """A held-out task, asked in a random way."""
        self.asked += 1
        task = task_at(self.random.randrange(2**30), self.asked, "test")
        # Going on past the end of text makes streams long enough to be interrupted.
        job = types.JobSpec(
            text=task.prompt,
            tier=self.random.choice(TIERS),
            allow_downgrade=self.random.random() < 0.5,
            priority=self.random.choice((1, 2, 3)),
            sampling=types.SamplingParams(
                temperature=self.random.choice((0.0, 0.8)),
                max_new_tokens=max_new_tokens or self.random.randint(4, 96),
                ignore_eos=self.random.random() < 0.7,
            ),
        )
        self._choose_mode(job)
        return job

    def _choose_mode(self, job: types.JobSpec) -> None:
        """Ask for one of the modes that such a job can have, and let a cascade doubt everything."""
        # The quality card is of greedy answers.
        modes = [types.MODE_UNSPECIFIED, types.MODE_SINGLE]
        if job.tier != types.TIER_TACTICAL:
            modes.append(types.MODE_SPECULATIVE)
            if not job.sampling.temperature:
                modes += [types.MODE_CASCADE, types.MODE_CASCADE]
        job.mode = self.random.choice(modes)
        if self.random.random() < 0.7:
            job.max_error = self.random.choice((0.0, 0.0, 0.05, 1.0))
        job.accept_revisions = self.random.random() < 0.5
        job.task_class = self.random.choice(("", "any", "of a kind that no card knows"))

    def stream(self, job: types.JobSpec, timeout_s: float = STUCK_S) -> grpc.aio.UnaryStreamCall:
        """Start to stream a job."""
        request = pb.GenerateStreamRequest(job=job)
        return self.stub.GenerateStream(request, timeout=timeout_s, metadata=self.metadata)

    async def drop(self) -> None:
        """Close the connection, whatever still runs on it."""
        if self.channel is not None:
            await self.channel.close()
            self.channel = None

    async def behave(self, _: object = None) -> None:
        """One behaviour, after a pause of `pause_s` on average."""
        if self.pause_s:
            await asyncio.sleep(self.random.uniform(0.0, 2 * self.pause_s))
        names, weights = zip(
            *((name, weight) for name, (weight, _, _) in BEHAVIOURS.items()), strict=True
        )
        name = self.random.choices(names, weights)[0]
        _, behave, allowed = BEHAVIOURS[name]
        begun = time.monotonic()
        details = ""
        try:
            async with asyncio.timeout(STUCK_S + 10):
                code = await behave(self)
        except AioRpcError as error:
            code, details = error.code().name, error.details() or ""
        except TimeoutError:
            code = "STUCK"
        self.tally.endings[name, code] += 1
        if code == Code.RESOURCE_EXHAUSTED.name:
            # As a client should: otherwise the refused ones would be most of the traffic.
            await asyncio.sleep(self.random.uniform(0.05, 0.5))
        if code not in allowed:
            self.tally.violations.append(f"{name} ended with {code}: {details}")
        if name == "read" and code == "OK":
            self.tally.seconds.append(time.monotonic() - begun)


async def crowd(
    clients: Sequence[Client], until: float, look: Callable[[], None], every_s: float
) -> list[str]:
    """Let all clients behave until `until` (monotonic); `look` meanwhile, which may raise."""

    async def watch() -> None:
        while True:
            look()
            await asyncio.sleep(every_s)

    watcher = asyncio.create_task(watch())
    try:
        await closed_loop([client.behave for client in clients], before(until))
        for client in clients:
            await client.drop()
    finally:
        watcher.cancel()
    if watcher.done() and not watcher.cancelled() and watcher.exception():
        return [f"the daemon died: {watcher.exception()}"]
    return []


async def read(client: Client, pause_s: float = 0.0) -> str:
    """Read a stream to its end, and check that its events make sense."""
    started = finished = False
    tokens = counted = 0
    async for response in client.stream(client.job()):
        event = response.WhichOneof("event")
        if finished or started is (event == "started"):
            client.tally.violations.append(f"event {event} out of order")
        started = started or event == "started"
        if event == "revised":
            tokens = response.revised.from_token
        if event == "delta":
            tokens += len(response.delta.token_ids)
            counted = response.delta.output_tokens
        if event == "finished":
            finished = True
            if not tokens == counted == response.finished.usage.output_tokens:
                client.tally.violations.append("token counts of a stream disagree")
        if pause_s:
            await asyncio.sleep(pause_s)
    if not finished:
        client.tally.violations.append("a stream ended OK without Finished")
    client.tally.tokens += tokens
    client.tally.finished_streams += 1
    return "OK"


async def read_slowly(client: Client) -> str:
    """A reader that the device must not wait for."""
    return await read(client, client.random.uniform(0.02, 0.2))


async def cancel(client: Client) -> str:
    """Cancel after some events, or before the first."""
    call = client.stream(client.job())
    await read_some(client, call)
    call.cancel()
    return "CANCELLED"


async def disconnect(client: Client) -> str:
    """Close the whole connection in mid-stream, as a crashing client does."""
    call = client.stream(client.job())
    await read_some(client, call)
    await client.drop()
    return "GONE"


async def read_some(client: Client, call: grpc.aio.UnaryStreamCall) -> None:
    """Take the first few events."""
    for _ in range(client.random.randint(0, 8)):
        if await call.read() is grpc.aio.EOF:
            return


async def short_deadline(client: Client) -> str:
    """A gRPC deadline, too short at once, in mid-stream or not at all."""
    async for _ in client.stream(client.job(), client.random.uniform(0.01, 3.0)):
        pass
    return "OK"


async def job_deadline(client: Client) -> str:
    """A deadline in the job: the daemon refuses it, or stops the job in time."""
    job = client.job()
    job.sampling.deadline_s = client.random.uniform(0.01, 3.0)
    async for _ in client.stream(job):
        pass
    return "OK"


async def bad_request(client: Client) -> str:
    """A field out of range, one of several."""
    job = client.job()
    spoil: tuple[Callable[[], object], ...] = (
        lambda: setattr(job.sampling, "temperature", -1.0),
        lambda: setattr(job.sampling, "top_p", 7.0),
        lambda: setattr(job, "text", ""),
        # Beyond the largest prompt of the demo, and within the message that follows from it.
        lambda: setattr(job, "text", "x" * 20_000),
        lambda: setattr(job.sampling, "max_new_tokens", 2**31),
        lambda: job.sampling.stop.extend(["x"] * 1000),
        lambda: setattr(job, "complexity", float("nan")),
        lambda: setattr(job, "max_error", client.random.choice((-1e-9, 1.1, float("nan")))),
        lambda: setattr(job, "mode", 99),
        lambda: setattr(job, "task_class", client.random.choice(("x" * 65, "a\nb"))),
    )
    client.random.choice(spoil)()
    async for _ in client.stream(job):
        pass
    return "OK"


async def whole(client: Client) -> str:
    """The unary form."""
    request = pb.GenerateRequest(job=client.job())
    await client.stub.Generate(request, timeout=STUCK_S, metadata=client.metadata)
    return "OK"


async def quote(client: Client) -> str:
    """A question about the price."""
    request = pb.QuoteRequest(job=client.job())
    await client.stub.Quote(request, timeout=STUCK_S, metadata=client.metadata)
    return "OK"


async def replay(client: Client) -> str:
    """The same request id twice; the second is answered from the books."""
    job = client.job(16)
    job.client_request_id = f"stress-{client.random.getrandbits(64):x}"
    request = pb.GenerateRequest(job=job)
    first, second = [
        await client.stub.Generate(request, timeout=STUCK_S, metadata=client.metadata)
        for _ in range(2)
    ]
    if first.text != second.text or not second.started.replayed:
        client.tally.violations.append("a replayed request was answered differently")
    return "OK"


Behaviour = Callable[[Client], Awaitable[str]]
BEHAVIOURS: dict[str, tuple[float, Behaviour, frozenset[str]]] = {
    # name: (weight, what it does, the endings that are right)
    "read": (35, read, BUSY),
    "read slowly": (8, read_slowly, BUSY),
    "cancel": (15, cancel, BUSY | {"CANCELLED"}),
    "disconnect": (10, disconnect, BUSY | {"GONE"}),
    "short deadline": (8, short_deadline, BUSY | {Code.DEADLINE_EXCEEDED.name}),
    "job deadline": (6, job_deadline, BUSY | {Code.DEADLINE_EXCEEDED.name}),
    "bad request": (6, bad_request, frozenset({Code.INVALID_ARGUMENT.name})),
    "whole": (5, whole, BUSY),
    "quote": (4, quote, BUSY),
    "replay": (3, replay, BUSY),
}
