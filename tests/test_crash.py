"""`kill -9` of a working daemon, at any moment: what was promised is in the books, once.

One state directory goes through all rounds, as a robot's does whose power fails again and again.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import apsw
from daemon_process import DaemonProcess
from forked_daemon import ForkedProcess

from sage_fed.cards.rate_card import RateCard, charge
from sage_fed.client import Client
from sage_fed.core import (
    UATP_PER_ATP,
    Budget,
    CascadeOutcome,
    Delta,
    Entry,
    EntryKind,
    Event,
    Finished,
    Mode,
    Started,
    StopReason,
    Tier,
)
from sage_fed.errors import SageFedError
from sage_fed.ledger import check

WAIT_S = 60.0
"""A deadline that only a hung daemon meets."""

GRANTED_UATP = 50_000 * UATP_PER_ATP
SETTINGS = (
    *("--set", "budget.initial_atp=50000", "--set", "budget.capacity_atp=1000000"),
    *("--set", "budget.refill_atp_per_s=100", "--set", "limits.max_new_tokens=900"),
)
NUM_STREAMS = 6
KINDS = (
    (Tier.TACTICAL, None),
    (Tier.STRATEGIC, None),
    (Tier.STRATEGIC, Mode.CASCADE),
)
"""A cascade that doubts every answer is the strategic tier's, and the tactical one's is a draft."""


@dataclass
class Seen:
    """What one client got before the daemon was gone."""

    tier: Tier
    mode: Mode | None
    request_id: str
    new_tokens: int
    started: Started | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finished: Finished | None = None


@dataclass
class Clients:
    """Streams of both tiers, one after the other on each thread, until the daemon is gone."""

    daemon: DaemonProcess
    new_tokens: Callable[[], int]
    names: itertools.count[int]
    seen: list[Seen] = field(default_factory=list)
    events: dict[str, threading.Semaphore] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for event in ("asked", "started", "delta", "finished"):
            self.events[event] = threading.Semaphore(0)
        self._threads = [
            threading.Thread(target=self._run, args=kind)
            for kind, _ in zip(itertools.cycle(KINDS), range(NUM_STREAMS), strict=False)
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, event: str, times: int) -> None:
        """Wait until something has happened so often, to all clients together."""
        for _ in range(times):
            assert self.events[event].acquire(timeout=WAIT_S)

    def join(self) -> None:
        """Wait until every client has noticed that the daemon is gone."""
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()

    def _run(self, tier: Tier, mode: Mode | None) -> None:
        with Client(self.daemon.address) as client:
            while True:
                job = Seen(tier, mode, f"request-{next(self.names)}", self.new_tokens())
                self.seen.append(job)
                try:
                    self._follow(client, job)
                except SageFedError:
                    return

    def _follow(self, client: Client, job: Seen) -> None:
        self.events["asked"].release()
        for event in ask(client, job):
            match event:
                case Started():
                    job.started = event
                    self.events["started"].release()
                case Delta():
                    job.text += event.text
                    job.token_ids += event.token_ids
                    self.events["delta"].release()
                case Finished():
                    job.finished = event
                    self.events["finished"].release()


def ask(client: Client, job: Seen) -> Iterator[Event]:
    """Run a job, or repeat it: everything that it consists of is in `job`."""
    return client.stream(
        "count",
        tier=job.tier,
        mode=job.mode,
        max_error=0.0,
        max_new_tokens=job.new_tokens,
        ignore_eos=True,
        # The quality card is of greedy answers.
        temperature=0.0 if job.mode is Mode.CASCADE else 1.0,
        seed=len(job.request_id) * 1000 + job.new_tokens,
        client_request_id=job.request_id,
    )


MOMENTS: tuple[tuple[str, int, tuple[int, int]], ...] = (
    ("asked", 1, (1, 900)),  # while the first holds are written
    ("started", 1, (50, 900)),  # holds are durable, nothing is delivered
    ("delta", 1, (400, 900)),  # first tokens
    ("delta", 60, (400, 900)),  # in the middle
    ("finished", 1, (1, 4)),  # settlements, many a second
    ("finished", 17, (1, 12)),
    ("finished", 40, (1, 3)),
    ("started", 30, (1, 30)),
)
"""When to kill: after which event, how many of them, and how long the answers are."""


def entries(client: Client) -> tuple[Entry, ...]:
    """All of the account's entries."""
    return client.entries(limit=1_000_000)


def assert_balanced(daemon: DaemonProcess, budget: Budget, lines: tuple[Entry, ...]) -> None:
    """No violation, no open hold, and the balance is what came in less what was spent."""
    report = check(daemon.state_dir / "ledger.db")
    assert () == report.violations
    assert 0 == report.open_holds
    assert 0 == budget.held_uatp
    sums: Counter[EntryKind] = Counter()
    for line in lines:
        sums[line.kind] += line.amount_uatp
    assert GRANTED_UATP == sums[EntryKind.GRANT]
    assert sums[EntryKind.SETTLE] == budget.discharged_uatp
    # Refill that has come in is counted in the balance, and written with the next movement.
    booked = sums[EntryKind.GRANT] + sums[EntryKind.REFILL] - sums[EntryKind.SETTLE]
    assert booked <= budget.balance_uatp
    assert booked == _charged_uatp(daemon.state_dir / "ledger.db")


def _charged_uatp(ledger: Path) -> int:
    with apsw.Connection(str(ledger), flags=apsw.SQLITE_OPEN_READONLY) as db:
        (amount,) = db.execute("SELECT charged_uatp FROM account WHERE account = 'local'")
    db.close()
    return int(amount[0])


def assert_promises_kept(seen: list[Seen], lines: tuple[Entry, ...]) -> None:
    """A job that a client saw finish is settled at exactly that price; none is settled twice."""
    settled = [line for line in lines if line.kind is EntryKind.SETTLE]
    price = {line.job_id: line.amount_uatp for line in settled}
    assert len(settled) == len(price)
    for job in seen:
        if job.finished is not None:
            assert job.started is not None
            assert job.finished.price.charged_uatp == price[job.started.job_id]
            usage = job.finished.usage
            assert (job.started.prompt_tokens, job.new_tokens) == (
                usage.prompt_tokens,
                usage.output_tokens,
            )
            assert charge(RateCard.load(), usage) == price[job.started.job_id]
            escalated = CascadeOutcome.ESCALATED if job.mode is Mode.CASCADE else None
            assert escalated is job.finished.cascade


def test_no_crash_loses_or_spends_money_twice(tmp_path: Path) -> None:
    """Eight times killed while six clients stream; after each restart the books are right."""
    choose = random.Random(20261123)
    names = itertools.count()
    everything: list[Seen] = []
    for event, times, (least, most) in MOMENTS:
        daemon = DaemonProcess.start(tmp_path / "state", *SETTINGS, launch=ForkedProcess)
        with Client(daemon.address) as client:
            lines = entries(client)
            assert_balanced(daemon, client.budget(), lines)
            assert_promises_kept(everything, lines)
        clients = Clients(daemon, lambda a=least, b=most: choose.randint(a, b), names)
        try:
            clients.wait(event, times)
        finally:
            daemon.kill()
        clients.join()
        everything += clients.seen
    for kind in KINDS:
        of_kind = [job for job in everything if kind == (job.tier, job.mode)]
        assert any(job.finished for job in of_kind)
        assert any(job.started and not job.finished for job in of_kind)
    daemon = DaemonProcess.start(tmp_path / "state", *SETTINGS, launch=ForkedProcess)
    with Client(daemon.address) as client:
        lines = entries(client)
        assert_balanced(daemon, client.budget(), lines)
        assert_promises_kept(everything, lines)
        assert_repeats_are_answered_once(client, everything)
    assert 0 == daemon.stop(WAIT_S)
    assert () == check(tmp_path / "state" / "ledger.db").violations


def assert_repeats_are_answered_once(client: Client, everything: list[Seen]) -> None:
    """What finished is replayed for nothing; what was cut off is run again and charged once."""
    finished = [job for job in everything if job.finished][-9:]
    cut_off = [job for job in everything if job.started and not job.finished][-9:]
    for job in finished:
        spent_uatp = client.budget().discharged_uatp
        again = client_answer(client, job)
        assert again.started is not None
        assert again.finished is not None
        assert job.started is not None
        assert job.finished is not None
        assert again.started.replayed
        assert job.started.job_id == again.started.job_id
        assert (job.text, job.token_ids) == (again.text, again.token_ids)
        assert job.finished.price == again.finished.price
        assert job.finished.usage == again.finished.usage
        assert spent_uatp == client.budget().discharged_uatp
    for job in cut_off:
        spent_uatp = client.budget().discharged_uatp
        again = client_answer(client, job)
        assert again.started is not None
        assert again.finished is not None
        assert job.started is not None
        if again.started.replayed:
            # Killed between the settlement and its way to the client: it was charged before.
            assert job.started.job_id == again.started.job_id
            assert spent_uatp == client.budget().discharged_uatp
            continue
        assert StopReason.LENGTH is again.finished.stop_reason
        assert again.token_ids[: len(job.token_ids)] == job.token_ids
        charged_uatp = again.finished.price.charged_uatp
        assert spent_uatp + charged_uatp == client.budget().discharged_uatp


def client_answer(client: Client, job: Seen) -> Seen:
    """Ask for a job again."""
    again = Seen(job.tier, job.mode, job.request_id, job.new_tokens)
    for event in ask(client, again):
        match event:
            case Started():
                again.started = event
            case Delta():
                again.text += event.text
                again.token_ids += event.token_ids
            case Finished():
                again.finished = event
    return again


def test_a_stopped_and_killed_daemon_frees_its_books_for_the_next(tmp_path: Path) -> None:
    """A daemon that hangs (stopped by a signal) and is then killed leaves nothing locked."""
    daemon = DaemonProcess.start(tmp_path / "state", *SETTINGS, launch=ForkedProcess)
    with Client(daemon.address) as client:
        events = client.stream("count", tier=Tier.STRATEGIC, max_new_tokens=900, ignore_eos=True)
        assert isinstance(next(events), Started)
        os.kill(daemon.process.pid, signal.SIGSTOP)
        held = check(daemon.state_dir / "ledger.db")
        assert ((), 1) == (held.violations, held.open_holds)
        daemon.kill()
    again = DaemonProcess.start(tmp_path / "state", *SETTINGS, launch=ForkedProcess)
    with Client(again.address) as client:
        assert_balanced(again, client.budget(), entries(client))
        assert GRANTED_UATP <= client.budget().balance_uatp
    assert 0 == again.stop(WAIT_S)
