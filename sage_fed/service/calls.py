"""Calls in progress: whose they are, what they keep for a peer that is slow, and when that ends.

A call costs memory on behalf of its peer twice: while its request arrives, and while its reply
waits to be read. Both are bounded here, by account and by connection, in number and in bytes, and
both have a deadline. What cannot be seen at once is seen by a sweep, twice a second: a message
then costs no timer and no task, only two assignments.
gRPC cannot reset a stream whose reader takes nothing: the status waits behind the data. Such a
call is ended as far as it is ours (its job is settled, its output dropped), stays counted until
gRPC lets go of it, and too many of them end their connection (`connections`).
Knows no protobuf, no money and no job. Fails with `RateLimited` where one has too much open, and
with `CallEnded`, `NotOneRequest` where a peer does not do its part.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from grpc_status import rpc_status

from sage_fed.core import OpenReply, counted
from sage_fed.errors import CallEnded, NotOneRequest, RateLimited
from sage_fed.service.connections import Connections, host_of
from sage_fed.settings import LimitSettings
from sage_fed.wire.error_status import status_of

if TYPE_CHECKING:
    from sage_fed.jobs.outgoing import OutgoingStream
    from sage_fed.metrics import Metrics

SWEEP_S = 0.5
"""Between two looks at what waits for peers, and at the connections."""

CROWDED_S = 0.05
"""Between two looks at the connections while one address has too many, or all have half of what
there may be: what is closed later than it can be made again keeps others out."""

UNREAD_S = 1.0
"""A reply that has waited so long for its reader is unread. One that is on its way is not."""

RECEIVING_OF_CONNECTION = 8
RECEIVING_OF_ACCOUNT = 32
"""Requests that arrive, or have and wait, at the same time. Others of the connection or the account
wait for their turn, and nothing of them is read meanwhile."""

WORK_OF_CONNECTION = 8
WORK_OF_ACCOUNT = 32
COST_OF_JOB = 2
COST_OF_OTHERS = 4
"""What jobs that are admitted, and short answers that are made and taken, may cost at the same
time. Jobs are paid for and share the ledger's commits; anything else is free, and a few at a time
are as fast as many."""

REST_S = 0.005
"""What a free call's turn rests before another has it: as fast as they are answered, they would
take all of the event loop, whose every step for a job stands behind theirs."""

_WATCH = "grpc.health.v1.Health/Watch"
_JOBS = ("sage_fed.v1.InferenceService/Generate", "sage_fed.v1.InferenceService/GenerateStream")

UNREAD_OF_CONNECTION = 16
UNREAD_BYTES_OF_CONNECTION = 4 * 2**20
"""Ended replies that a connection with other calls may keep; beyond it, it is closed."""

UNAUTHENTICATED_OF_CONNECTION = 64
"""Unauthenticated calls between two sweeps that close a connection without other calls."""

_RETRY_S = 1.0

_EOF = grpc.aio.EOF  # type: ignore[attr-defined] # stubs lack it

Context = grpc.aio.ServicerContext[Any, Any]


class Turn:
    """One call's place among those of its connection and its account."""

    __slots__ = ("connection", "cost", "held", "owner", "waiting")

    def __init__(self, owner: str, connection: str, cost: int) -> None:
        self.owner = owner
        self.connection = connection
        self.cost = cost
        self.held = False
        self.waiting: asyncio.Future[None] | None = None
        """Done when it is its turn; None while it does not wait."""


class Turns:
    """Who may cost something now, and who waits until another is done."""

    def __init__(self, of_connection: int, of_account: int, overall: int) -> None:
        self._of_connection = of_connection
        self._of_account = of_account
        self._overall = overall
        self._total = 0
        self._accounts: Counter[str] = Counter()
        self._connections: Counter[tuple[str, str]] = Counter()
        self._waiting: dict[tuple[str, str], deque[Turn]] = {}

    def take(self, turn: Turn) -> asyncio.Future[None] | None:
        """Give a call its turn, or return what it has to wait for."""
        key = (turn.owner, turn.connection)
        if key not in self._waiting and self._has_room(turn):
            self._give(turn)
            return None
        turn.waiting = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        return turn.waiting

    def leave(self, turn: Turn) -> None:
        """Take the turn back, or the call out of the queue; it may have had neither."""
        key = (turn.owner, turn.connection)
        if turn.held:
            turn.held = False
            self._total -= 1
            self._count_down(self._accounts, turn.owner, turn.cost)
            self._count_down(self._connections, key, turn.cost)
            self._next()
        elif turn.waiting is not None:
            queue = self._waiting.get(key)
            if queue is not None:
                with contextlib.suppress(ValueError):
                    queue.remove(turn)
                if not queue:
                    del self._waiting[key]
                # Who comes behind it may cost less than it would have.
                self._next()
        turn.waiting = None

    def in_the_way(self, turn: Turn) -> bool:
        """Whether others wait because this turn is held."""
        if not turn.held or not self._waiting:
            return False
        if self._total >= self._overall:
            return True
        # Those that wait for what this one has: its account's, or its connection's of that.
        return any(
            not self._account_has_room(queue[0])
            or (connection == turn.connection and not self._has_room(queue[0]))
            for (owner, connection), queue in self._waiting.items()
            if owner == turn.owner
        )

    def _next(self) -> None:
        """Serve those who wait: one connection after the other, each in its order."""
        for key in tuple(self._waiting):
            if self._total >= self._overall:
                return
            if not self._has_room(self._waiting[key][0]):
                continue
            queue = self._waiting.pop(key)
            while queue:
                turn = queue.popleft()
                assert turn.waiting is not None
                # One that was ended or cancelled meanwhile has not left the queue itself yet.
                if not turn.waiting.done():
                    self._give(turn)
                    turn.waiting.set_result(None)
                    turn.waiting = None
                    break
            if queue:
                self._waiting[key] = queue  # behind the others

    def _has_room(self, turn: Turn) -> bool:
        return (
            self._total < self._overall
            and self._account_has_room(turn)
            and self._connections[turn.owner, turn.connection] + turn.cost <= self._of_connection
        )

    def _account_has_room(self, turn: Turn) -> bool:
        return self._accounts[turn.owner] + turn.cost <= self._of_account

    def _give(self, turn: Turn) -> None:
        turn.held = True
        self._total += 1
        self._accounts[turn.owner] += turn.cost
        self._connections[turn.owner, turn.connection] += turn.cost

    @staticmethod
    def _count_down(counts: Counter[Any], key: object, cost: int) -> None:
        counts[key] -= cost
        if not counts[key]:
            del counts[key]


@dataclass(frozen=True, slots=True)
class AllTurns:
    """Those to receive a request, which take memory, and those to work on it, which take time."""

    receiving: Turns
    working: Turns


class OpenCall:
    """One call, from its headers until gRPC lets go of it."""

    __slots__ = (
        "call_id", "connection", "context", "ended", "kept", "method", "opened_s", "owner",
        "receiving", "to_receive", "to_work", "turns", "unread_bytes", "waiting_since_s",
    )  # fmt: skip

    def __init__(
        self, call_id: str, owner: str, context: Context, method: str, turns: AllTurns
    ) -> None:
        self.call_id = call_id
        self.owner = owner
        """The account, marked where an operator calls; the address where no caller is needed."""
        self.connection: str = context.peer()
        self.context = context
        self.method = method
        self.turns = turns
        self.to_receive = Turn(owner, self.connection, 1)
        cost = COST_OF_JOB if method in _JOBS else COST_OF_OTHERS
        self.to_work = Turn(owner, self.connection, cost)
        self.opened_s = time.monotonic()
        self.waiting_since_s = 0.0
        """Since when it waits for its peer (`time.monotonic()`); 0 while it does not."""
        self.receiving = False
        self.unread_bytes = 0
        self.ended: CallEnded | None = None
        self.kept: OutgoingStream | None = None

    async def receive(self, *, last: bool = True) -> bytes | None:
        """Read the next request and wait for the turn to work on it; None at the end.

        Args:
            last: whether no other one may follow it.

        Raises:
            CallEnded: it did not arrive in time.
            NotOneRequest: another came after the last.
        """
        self.receiving = True
        self.waiting_since_s = time.monotonic()
        receiving, working = self.turns.receiving, self.turns.working
        if not self.to_receive.held and (turn := receiving.take(self.to_receive)) is not None:
            await turn
        read = await self.context.read()
        raw: bytes | None = None if read is _EOF else read
        if raw is not None and last and await self.context.read() is not _EOF:
            raise NotOneRequest("this method takes one request, and another one came after it")
        if not self.to_work.held and (turn := working.take(self.to_work)) is not None:
            await turn
        receiving.leave(self.to_receive)
        self.waiting_since_s = 0.0
        self.receiving = False
        # A stream that broke looks like one that ended; its handler is cancelled a moment later.
        return raw

    async def write(self, raw: bytes) -> None:
        """Send a reply; returns when the reader's window has taken it.

        Raises:
            CallEnded: the reader took so long that the call was ended meanwhile.
        """
        self.unread_bytes = len(raw)
        self.waiting_since_s = time.monotonic()
        await self.context.write(raw)
        self.waiting_since_s = 0.0
        self.unread_bytes = 0
        if self.ended is not None:
            raise self.ended

    def done(self) -> None:
        """Give the turns back: what the call does from here on is bounded by others."""
        self.turns.receiving.leave(self.to_receive)
        turn, working = self.to_work, self.turns.working
        if not turn.held or turn.cost <= COST_OF_JOB:
            working.leave(turn)
            return
        self.to_work = Turn(turn.owner, turn.connection, turn.cost)
        asyncio.get_running_loop().call_later(REST_S, working.leave, turn)

    @property
    def waits_for_turn(self) -> bool:
        """Whether it waits for other calls, and not for its peer."""
        return self.to_receive.waiting is not None or self.to_work.waiting is not None

    @property
    def in_the_way(self) -> bool:
        """Whether others wait for a turn of this one, which waits for its peer."""
        return not self.waits_for_turn and (
            self.turns.receiving.in_the_way(self.to_receive)
            or self.turns.working.in_the_way(self.to_work)
        )

    def keep(self, stream: OutgoingStream) -> None:
        """Name the job's stream that this call reads; it ends with the call."""
        self.kept = stream

    @property
    def job_id(self) -> str:
        """The job that the call waits for; empty where it is none."""
        return self.kept.job_id if self.kept is not None else ""

    @property
    def kept_bytes(self) -> int:
        """What is kept for the reader."""
        return self.unread_bytes + (self.kept.kept_bytes if self.kept is not None else 0)


@dataclass(slots=True)
class _Unread:
    """What an account, or a connection, has not read."""

    calls: list[OpenCall] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, call: OpenCall) -> None:
        self.calls.append(call)
        self.num_bytes += call.kept_bytes


class OpenCalls:
    """Every call in progress.

    Args:
        limits: how many, how much, for how long.
        connections: what the calls come over.
        metrics: told of what is open and of what was ended; None is told nothing.
    """

    def __init__(
        self,
        limits: LimitSettings,
        connections: Connections,
        metrics: Metrics | None = None,
    ) -> None:
        self._limits = limits
        self._connections = connections
        self._metrics = metrics
        self._open: dict[str, OpenCall] = {}
        self._accounts: Counter[str] = Counter()
        self._unread: dict[str, _Unread] = {}
        self._unauthenticated: Counter[str] = Counter()
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        overall = max(limits.max_receiving_bytes // limits.largest_message_bytes, 1)
        self._turns = AllTurns(
            Turns(RECEIVING_OF_CONNECTION, RECEIVING_OF_ACCOUNT, overall),
            Turns(WORK_OF_CONNECTION, WORK_OF_ACCOUNT, sys.maxsize),
        )

    def enter(
        self, account: str | None, context: Context, method: str, *, operator: bool
    ) -> OpenCall:
        """Count a call whose headers have arrived; nothing of its request is read yet.

        Args:
            account: who calls; None where the method needs no caller.
            context: gRPC's.
            method: its full name.
            operator: whether an operator calls, who has to get in whatever is unread.

        Raises:
            RateLimited: the account has too much open, or does not read what it asks for.
        """
        if account is None:
            # A watcher stays for as long as it likes: it must not take the place of a check.
            watching = " (watching)" if method == _WATCH else ""
            owner = f"@{host_of(context.peer())}{watching}"
        else:
            owner = f"{account} (admin)" if operator else account
        if not operator:
            self._require_room(owner)
        call = OpenCall(f"call-{next(self._ids)}", owner, context, method, self._turns)
        self._open[call.call_id] = call
        self._accounts[owner] += 1
        return call

    def refused(self, connection: str) -> None:
        """Count an unauthenticated call; a connection that has no others is closed.

        Each refusal costs as much as a small call. Those of a connection that is closed cost
        nothing any more, however many it had sent.
        """
        self._unauthenticated[connection] += 1
        if self._unauthenticated[connection] < UNAUTHENTICATED_OF_CONNECTION:
            return
        del self._unauthenticated[connection]
        # A proxy's connection carries others, too.
        if all(call.connection != connection for call in self._open.values()):
            self._close(connection, "strangers")

    def leave(self, call: OpenCall) -> None:
        """Forget a call that is over."""
        call.done()
        del self._open[call.call_id]
        self._accounts[call.owner] -= 1
        if not self._accounts[call.owner]:
            del self._accounts[call.owner]

    def end(self, name: str) -> bool:
        """End a call for an operator, by its id or by its job's; False where there is none."""
        found = [c for c in self._open.values() if name in (c.call_id, c.job_id)]
        for call in found:
            self._end(call, "operator", "an operator ended this call")
        return bool(found)

    def close_connection(self, connection: str) -> bool:
        """Close a connection for an operator; False where there is none of that name."""
        return self._close(connection, "operator")

    def unread(self) -> tuple[OpenReply, ...]:
        """Return every reply that waits for its reader, or did when its call was ended."""
        now = time.monotonic()
        return tuple(
            OpenReply(
                call_id=call.call_id,
                account=call.owner,
                connection=call.connection,
                method=call.method,
                job_id=call.job_id,
                age_s=now - call.opened_s,
                unread_s=now - call.waiting_since_s,
                unread_bytes=call.kept_bytes,
                ended=call.ended is not None,
            )
            for call in tuple(self._open.values())
            if _is_unread(call, now)
        )

    @property
    def num_open(self) -> int:
        """Calls in progress."""
        return len(self._open)

    @property
    def num_connections(self) -> int:
        """Connections at the last look."""
        return self._connections.num_open

    async def run(self) -> None:
        """Look after calls and connections for as long as the server does."""
        async with asyncio.TaskGroup() as looks:
            looks.create_task(self._look_at_connections())
            while True:
                await asyncio.sleep(SWEEP_S)
                self._sweep()

    async def _look_at_connections(self) -> None:
        pause_s = SWEEP_S
        while True:
            await asyncio.sleep(pause_s)
            closed = await asyncio.to_thread(self._connections.scan)
            for _ in closed:
                self._closed("per_address")
            crowded = closed or 2 * self._connections.num_open >= self._limits.max_connections
            pause_s = CROWDED_S if crowded else SWEEP_S

    def _sweep(self) -> None:
        """Look once: end what takes too long, and close what holds too much."""
        self._unauthenticated.clear()
        now = time.monotonic()
        owners: defaultdict[str, _Unread] = defaultdict(_Unread)
        lost: defaultdict[str, _Unread] = defaultdict(_Unread)
        calls_of: Counter[str] = Counter()
        for call in tuple(self._open.values()):
            calls_of[call.connection] += 1
            if call.waiting_since_s:
                self._look(call, now)
            if _is_unread(call, now):
                owners[call.owner].add(call)
        for unread in owners.values():
            self._end_surplus(unread)
            for call in unread.calls:
                if call.ended is not None:
                    lost[call.connection].add(call)
        self._unread = dict(owners)
        for connection, unread in lost.items():
            if (
                len(unread.calls) == calls_of[connection]
                or len(unread.calls) > UNREAD_OF_CONNECTION
                or unread.num_bytes > UNREAD_BYTES_OF_CONNECTION
            ):
                self._close(connection, "unread")
        if self._metrics is not None:
            self._metrics.calls_seen(
                calls=len(self._open),
                unread=sum(len(unread.calls) for unread in owners.values()),
                unread_bytes=sum(unread.num_bytes for unread in owners.values()),
                connections=self._connections.num_open,
                full_addresses=self._connections.num_full,
            )

    def _require_room(self, owner: str) -> None:
        limits = self._limits
        if self._accounts[owner] >= limits.max_account_calls:
            allowed, limit = limits.max_account_calls, "open_calls"
            message = f"{owner} may have {counted(allowed, 'call')} open at once"
        elif (unread := self._unread.get(owner)) is None:
            return
        elif len(unread.calls) > limits.max_account_unread:
            allowed, limit = limits.max_account_unread, "unread_replies"
            message = f"{owner} has not read {counted(len(unread.calls), 'reply', 'replies')}"
        elif unread.num_bytes > limits.max_account_unread_bytes:
            allowed, limit = limits.max_account_unread_bytes, "unread_bytes"
            message = f"{owner} has not read {counted(unread.num_bytes, 'byte')} of replies"
        else:
            return
        raise RateLimited(
            message, account=owner, limit=limit, allowed=allowed, retry_after_s=_RETRY_S
        )

    def _look(self, call: OpenCall, now: float) -> None:
        """End a call whose peer is too slow, or in the way of others."""
        waited_s = now - call.waiting_since_s
        limits = self._limits
        if call.receiving and waited_s >= limits.receive_timeout_s:
            waits = "for its turn" if call.waits_for_turn else "for the request to arrive"
            self._end(call, "receive", f"{limits.receive_timeout_s:g} s were spent waiting {waits}")
        elif not call.receiving and waited_s >= limits.write_timeout_s:
            self._end(call, "write", f"the reply was not read for {limits.write_timeout_s:g} s")
        elif waited_s >= UNREAD_S and call.in_the_way:
            self._end(call, "pressure", "others waited for this call, and it for its peer")

    def _end_surplus(self, unread: _Unread) -> None:
        """End what an account has not read beyond its bounds, what has waited longest first."""
        num, num_bytes = len(unread.calls), unread.num_bytes
        for call in sorted(unread.calls, key=lambda call: call.waiting_since_s):
            if (
                num <= self._limits.max_account_unread
                and num_bytes <= self._limits.max_account_unread_bytes
            ):
                return
            num -= 1
            num_bytes -= call.kept_bytes
            self._end(call, "unread", "too many replies to this account were not read")

    def _end(self, call: OpenCall, why: str, message: str) -> None:
        if call.ended is not None:
            return
        call.ended = CallEnded(message, why)
        if self._metrics is not None:
            self._metrics.call_ended(why)
        if call.kept is not None:
            # The job stops and settles; what it made is dropped.
            call.kept.cancel()
        # A short answer's turn: who waits behind it is not to wait for a reader that never comes.
        if not call.receiving:
            call.done()
            return
        for turn in (call.to_receive, call.to_work):
            if turn.waiting is not None:
                if not turn.waiting.done():
                    turn.waiting.set_exception(call.ended)
                return
        # Nothing of ours is on its way: the status goes out, and the stream with it.
        self._spawn(_abort(call))

    def _close(self, connection: str, why: str) -> bool:
        closed = self._connections.close(connection)
        if closed:
            self._closed(why)
        return closed

    def _closed(self, why: str) -> None:
        if self._metrics is not None:
            self._metrics.connection_closed(why)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_unread(call: OpenCall, now: float) -> bool:
    """Whether a reply of the call waits for its reader, and not just for the network."""
    since = call.waiting_since_s
    return not call.receiving and since > 0.0 and now - since >= UNREAD_S


async def _abort(call: OpenCall) -> None:
    """Give a call its status while its handler still reads; the handler then finds it ended."""
    assert call.ended is not None
    status = rpc_status.to_status(status_of(call.ended))
    with contextlib.suppress(grpc.aio.AbortError, grpc.aio.InternalError, grpc.aio.UsageError):
        await call.context.abort(status.code, status.details, status.trailing_metadata)
