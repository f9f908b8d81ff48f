"""Random histories of the books against a model that refills at every nanosecond."""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from ledger_fakes import Desk

from sage_fed.core import BudgetChange
from sage_fed.errors import CannotAfford, HoldClosed, InvalidField, NotFound, RequestIdConflict
from sage_fed.ledger.books import Books, Retention
from sage_fed.ledger.check import audit
from sage_fed.ledger.entries import NS_PER_S, HoldReceipt, Recovery, Replay

ACCOUNTS = ("ann", "bob")
TIERS = ("tactical", "strategic", "oracle")
AMOUNTS = st.integers(0, 150)
TIMES_NS = st.integers(0, 2 * NS_PER_S) | st.integers(0, 100 * NS_PER_S)
RETENTION = Retention(keep_s=20.0, entries_s=10.0, all_results_bytes=20)
"""So short that in most histories much is forgotten and folded."""

AGES = st.integers(0, 3)
"""Which job: 0 is the newest."""


def count(desk: Desk, table: str) -> int:
    """How many rows a table has."""
    return int(desk.db.execute(f"SELECT count(*) FROM {table}").get)


@dataclass
class ModelAccount:
    """Balances in 1e-9 uATP, so that refill needs no lazy arithmetic."""

    nano: int
    capacity: int
    rate: int
    floor: int
    held: int = 0
    discharged: int = 0
    minted: int = 0

    @property
    def balance(self) -> int:
        """Whole uATP available."""
        return self.nano // NS_PER_S

    def elapse(self, ns: int) -> None:
        """Refill up to the capacity less what is held; a full account keeps no fraction."""
        room = (self.capacity - self.held) * NS_PER_S - self.nano
        before = self.balance
        if self.rate * ns < room:
            self.nano += self.rate * ns
        else:
            self.nano = (before + max(0, self.capacity - self.held - before)) * NS_PER_S
        self.minted += self.balance - before


@dataclass
class ModelJob:
    """A hold and what became of it."""

    account: str
    held: int
    expires_ns: int
    state: str = "held"
    charged: int = 0


@dataclass
class Model:
    """The whole ledger as dictionaries."""

    accounts: dict[str, ModelAccount] = field(default_factory=dict)
    jobs: dict[str, ModelJob] = field(default_factory=dict)
    requests: dict[tuple[str, str], tuple[bytes, str, bytes | None]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    """Jobs that have left no row: given back by themselves, or folded."""

    def end(self, job_id: str, state: str, charged: int = 0) -> None:
        """Give back what was not charged."""
        job = self.jobs[job_id]
        account = self.accounts[job.account]
        job.state, job.charged = state, charged
        account.held -= job.held
        account.discharged += charged
        account.nano += (job.held - charged) * NS_PER_S

    def free(self, job_id: str) -> None:
        """Let the job's request id be used again."""
        self.requests = {key: row for key, row in self.requests.items() if row[1] != job_id}

    def give_back(self, state: str, job_ids: list[str]) -> None:
        """End holds without a charge."""
        for job_id in job_ids:
            self.end(job_id, state)
            self.free(job_id)

    def open(self) -> list[str]:
        """Ids of open holds, as the books sort them."""
        return sorted(job_id for job_id, job in self.jobs.items() if job.state == "held")


class LedgerHistory(RuleBasedStateMachine):
    """Any order of operations keeps books and model equal and the audit silent."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(RETENTION)
        self.model = Model()
        self.passed_id = 0

    @initialize(
        rates=st.tuples(st.integers(0, 3), st.sampled_from([7, 1_000_003])),
        capacity=st.integers(80, 300),
        floor=st.integers(0, 60),
    )
    def open_accounts(self, rates: tuple[int, int], capacity: int, floor: int) -> None:
        for name, rate in zip(ACCOUNTS, rates, strict=True):
            self.desk.account(name, balance=100, capacity=capacity, refill=rate, floor=floor)
            self.model.accounts[name] = ModelAccount(
                100 * NS_PER_S, capacity, rate, floor, minted=100
            )
            self.model.accounts[name].elapse(0)

    @rule(ns=TIMES_NS, wall_jump_s=st.just(0) | st.integers(-(10**9), 10**9))
    def time_passes(self, ns: int, wall_jump_s: int) -> None:
        self.desk.clock.advance_ns(ns)
        self.desk.clock.wall_ns += wall_jump_s * NS_PER_S
        for account in self.model.accounts.values():
            account.elapse(ns)

    @rule(
        account=st.sampled_from(ACCOUNTS),
        amount=st.integers(0, 60),
        ns=TIMES_NS,
        fifths=st.integers(0, 5),
    )
    def a_job_runs(self, account: str, amount: int, ns: int, fifths: int) -> None:
        """Most jobs are held, take a while and are settled, so most histories should have some."""
        jobs = len(self.model.jobs)
        self.hold(account, amount, tier=TIERS[0], request_id="", payload=b"", ttl_s=30.0)
        self.time_passes(ns, 0)
        if len(self.model.jobs) > jobs:
            self.settle(0, fifths, b"answer")

    @rule(
        account=st.sampled_from(ACCOUNTS),
        amount=st.integers(0, 20) | AMOUNTS,
        tier=st.sampled_from(TIERS),
        request_id=st.sampled_from(["", "r1", "r2"]),
        payload=st.sampled_from([b"p", b"q"]),
        ttl_s=st.sampled_from([1.0, 30.0]),
    )
    def hold(
        self,
        account: str,
        amount: int,
        tier: str,
        request_id: str,
        payload: bytes,
        ttl_s: float,
    ) -> None:
        job_id = f"job-{len(self.model.jobs):04}-{self.desk.clock.ns}"
        books = self.model.accounts[account]
        known = self.model.requests.get((account, request_id))

        def hold() -> HoldReceipt | Replay:
            return self.desk.hold(
                job_id,
                amount,
                account,
                tier=tier,
                client_request_id=request_id,
                payload_hash=payload,
                ttl_s=ttl_s,
            )

        if known is not None and not self._result_is_kept(known[1]):
            known = (known[0], known[1], None)
        if known is not None and (known[0] != payload or known[2] is None):
            with pytest.raises(RequestIdConflict):
                hold()
            return
        if known is not None:
            assert Replay(known[1], known[2] or b"") == hold()
            return
        if books.balance < amount:
            with pytest.raises(CannotAfford):
                hold()
            return
        books.nano -= amount * NS_PER_S
        books.held += amount
        expires_ns = self.desk.clock.ns + round(ttl_s * NS_PER_S)
        self.model.jobs[job_id] = ModelJob(account, amount, expires_ns)
        if request_id:
            self.model.requests[account, request_id] = (payload, job_id, None)
        assert HoldReceipt(job_id, amount, books.balance) == hold()

    def _result_is_kept(self, job_id: str) -> bool:
        """Not where it had to make room, which the tidying decides by the wall's time."""
        row = self.desk.db.execute("SELECT result FROM request WHERE job_id = ?", (job_id,))
        return row.get is not None

    @precondition(lambda self: self.model.jobs)
    @rule(age=AGES, fifths=st.integers(0, 6), result=st.sampled_from([None, b"answer"]))
    def settle(self, age: int, fifths: int, result: bytes | None) -> None:
        job_id, job = self._job(age)
        charged = job.held * fifths // 5
        if job_id in self.model.gone:
            with pytest.raises(NotFound):
                self.desk.settle(job_id, charged, result)
            return
        if job.state in ("voided", "expired"):
            with pytest.raises(HoldClosed, match=job.state):
                self.desk.settle(job_id, charged, result)
            return
        if job.state == "held" and charged > job.held:
            with pytest.raises(InvalidField):
                self.desk.settle(job_id, charged, result)
            return
        repeated = job.state == "settled"
        if not repeated:
            self.model.end(job_id, "settled", charged)
            self._answer(job_id, result)
        settlement = self.desk.settle(job_id, charged, result)
        assert (job.charged, repeated) == (settlement.charged_uatp, settlement.repeated)
        assert self.model.accounts[job.account].balance == settlement.balance_uatp
        if not job.held and all(row[1] != job_id for row in self.model.requests.values()):
            self.model.gone.add(job_id)

    def _answer(self, job_id: str, result: bytes | None) -> None:
        if result is None:
            self.model.free(job_id)
            return
        for key, (payload, owner, _) in self.model.requests.items():
            if owner == job_id:
                self.model.requests[key] = (payload, owner, result)

    def _job(self, age: int) -> tuple[str, ModelJob]:
        jobs = list(self.model.jobs.items())
        return jobs[max(0, len(jobs) - 1 - age)]

    @precondition(lambda self: self.model.jobs)
    @rule(age=AGES)
    def void(self, age: int) -> None:
        job_id, job = self._job(age)
        if job_id in self.model.gone:
            with pytest.raises(NotFound):
                self.desk.void(job_id)
            return
        if job.state == "settled":
            with pytest.raises(HoldClosed, match="settled"):
                self.desk.void(job_id)
            return
        repeated = job.state != "held"
        if not repeated:
            self.model.give_back("voided", [job_id])
            self.model.gone.add(job_id)
        assert repeated == self.desk.void(job_id).repeated

    @rule()
    def expire_due(self) -> None:
        due = [
            job_id
            for job_id in self.model.open()
            if self.model.jobs[job_id].expires_ns <= self.desk.clock.ns
        ]
        self._give_back("expired", due)
        assert tuple(due) == self.desk.expire_due()

    def _give_back(self, state: str, job_ids: list[str]) -> None:
        self.model.give_back(state, job_ids)
        self.model.gone |= {job_id for job_id in job_ids if not self.model.jobs[job_id].held}

    @rule(undone=st.booleans(), anew=st.booleans())
    def tidy(self, undone: bool, anew: bool) -> None:
        """One step, which a failed commit may take back; what goes is nobody's any more."""
        if anew:
            self.passed_id = 0
        now = self.desk.clock.now()
        entries = count(self.desk, "entry")
        self.desk.db.execute("BEGIN")
        step = self.desk.books.tidy(now, self.passed_id)
        if undone:
            self.desk.db.execute("ROLLBACK")
            return
        self.desk.db.execute("COMMIT")
        self.passed_id = step.passed_id
        assert entries - step.entries == count(self.desk, "entry")
        kept = {str(row[0]) for row in self.desk.db.execute("SELECT job_id FROM request")}
        for key, (_, job_id, _) in tuple(self.model.requests.items()):
            if job_id not in kept:
                assert self.model.jobs[job_id].state == "settled"
                del self.model.requests[key]
        there = {str(row[0]) for row in self.desk.db.execute("SELECT job_id FROM job")}
        went = set(self.model.jobs) - there - self.model.gone
        assert all(self.model.jobs[job_id].state != "held" for job_id in went)
        assert went.isdisjoint({row[1] for row in self.model.requests.values()})
        self.model.gone |= went
        assert self.model.gone.isdisjoint(there)

    @rule(
        account=st.sampled_from(ACCOUNTS),
        balance=st.none() | AMOUNTS,
        capacity=st.none() | st.integers(0, 300),
        rate=st.none() | st.integers(0, 50),
        floor=st.none() | st.integers(0, 60),
    )
    def set_budget(
        self,
        account: str,
        balance: int | None,
        capacity: int | None,
        rate: int | None,
        floor: int | None,
    ) -> None:
        books = self.model.accounts[account]
        if balance is not None:
            rise = balance - books.balance
            books.minted += rise
            books.nano += rise * NS_PER_S
        books.capacity = books.capacity if capacity is None else capacity
        books.rate = books.rate if rate is None else rate
        books.floor = books.floor if floor is None else floor
        self.desk.set_budget(BudgetChange(balance, capacity, rate, floor), account)
        books.elapse(0)

    @rule(often=st.integers(0, 3), uptime_s=st.none() | st.integers(0, 20))
    def the_daemon_restarts(self, often: int, uptime_s: int | None) -> None:
        """After a crash, or after a stop and a reboot; one time in four, so that holds live."""
        if often != 3:
            return
        if uptime_s is not None:
            with self.desk.db:
                self.desk.books.accounts.keep_marks(self.desk.clock.now(), age_ns=0, limit=-1)
            self.desk.clock.reboot(uptime_s=uptime_s)
        orphans = self.model.open()
        held = sum(self.model.jobs[job_id].held for job_id in orphans)
        self._give_back("voided", orphans)
        self.desk.books = Books(self.desk.db, RETENTION)
        self.passed_id = 0
        with self.desk.db:
            recovery = self.desk.books.recover(self.desk.clock.now())
        assert Recovery(len(orphans), held) == recovery

    @invariant()
    def books_and_model_agree(self) -> None:
        for name, account in self.model.accounts.items():
            budget = self.desk.budget(name)
            assert (account.balance, account.held, account.discharged) == (
                budget.balance_uatp,
                budget.held_uatp,
                budget.discharged_uatp,
            )
            assert account.minted == account.balance + account.held + account.discharged
            assert min(account.balance, account.held, account.discharged) >= 0
        held = sum(account.held for account in self.model.accounts.values())
        assert held == self.desk.books.held_total_uatp()

    @invariant()
    def the_audit_finds_nothing(self) -> None:
        assert () == audit(self.desk.db)

    def teardown(self) -> None:
        self.desk.db.close()


TestLedgerHistory = LedgerHistory.TestCase
TestLedgerHistory.settings = settings(
    stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)
