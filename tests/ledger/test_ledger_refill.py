"""Refill: exact, capped, and deaf to jumping clocks."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_fakes import Desk

from sage_fed.core import MAX_UATP, BudgetChange
from sage_fed.errors import CannotAfford
from sage_fed.ledger.books import Account
from sage_fed.ledger.entries import (
    MAX_LIFETIME_UATP,
    NS_PER_S,
    Now,
    system_clock,
)
from sage_fed.routing import _refill_s


@pytest.fixture
def desk() -> Desk:
    return Desk()


@given(
    rate=st.integers(0, 5 * 10**9),
    gaps_ns=st.lists(st.integers(0, 10**12), max_size=20),
    room=st.integers(0, 10**13),
)
def test_refilling_often_and_refilling_once_give_the_same_sum(
    rate: int, gaps_ns: list[int], room: int
):
    """However the time is cut, no part of a uATP is lost or made."""
    row, ns = Account("ann", 0, 0, 0, room, rate, 0, "boot", 0, 0), 0
    for gap_ns in gaps_ns:
        ns += gap_ns
        row = row.refilled(Now("boot", ns, 0))

    assert min(room, rate * ns // NS_PER_S) == row.charged_uatp


def test_a_balance_grows_between_operations_without_entries(desk: Desk):
    """Reading computes the refill; it writes nothing."""
    desk.account(balance=0, refill=10)
    desk.clock.advance(2.5)

    assert 25 == desk.balance()
    assert [] == desk.entries()


def test_refill_is_written_when_a_hold_needs_it(desk: Desk):
    """The refill comes first, in an entry of its own."""
    desk.account(balance=5, refill=10)
    desk.clock.advance(0.5)

    desk.hold("j1", 10)

    assert [("grant", 5, ""), ("refill", 5, ""), ("hold", 10, "j1")] == desk.entries()


def test_refill_entries_are_coalesced(desk: Desk):
    """A hundred jobs in a tenth of a second do not write a hundred refills."""
    desk.account(balance=500, refill=1000)
    for number in range(100):
        desk.clock.advance(0.001)
        desk.hold(f"j{number}", 2)
        desk.settle(f"j{number}", 2)

    assert 500 + 100 - 200 == desk.balance()
    assert 0 == sum(kind == "refill" for kind, _, _ in desk.entries())


def test_refill_stops_at_the_capacity_counted_with_what_is_held(desk: Desk):
    """A void after a long hold does not lift the balance above the capacity."""
    desk.account(balance=100, capacity=100, refill=10)
    desk.hold("j1", 60)
    desk.clock.advance(1000)

    assert 40 == desk.balance()
    desk.void("j1")
    assert 100 == desk.balance()


def test_what_a_settlement_spends_is_refilled_only_from_then_on(desk: Desk):
    """Time spent full does not count, although the mark was not written meanwhile."""
    desk.account(balance=100, capacity=100, refill=10)
    desk.hold("j1", 60)
    desk.clock.advance(1000)
    desk.settle("j1", 60)

    assert 40 == desk.balance()
    desk.clock.advance(1)
    assert 50 == desk.balance()


def test_a_grant_above_the_capacity_stays_and_is_not_refilled(desk: Desk):
    """The capacity limits refill, not the operator."""
    desk.account(balance=0, capacity=100, refill=10)
    desk.set_budget(BudgetChange(balance_uatp=300))
    desk.clock.advance(50)

    assert 300 == desk.balance()


def test_a_new_rate_counts_from_its_change(desk: Desk):
    """The time before was lived under the old rate."""
    desk.account(balance=0, refill=10)
    desk.clock.advance(3)
    desk.set_budget(BudgetChange(refill_uatp_per_s=100))
    desk.clock.advance(2)

    assert 3 * 10 + 2 * 100 == desk.balance()


@pytest.mark.parametrize("jump_s", [-10 * 365 * 86400, 10 * 365 * 86400])
def test_a_jump_of_the_wall_clock_neither_mints_nor_withholds(desk: Desk, jump_s: int):
    """Only the boot clock counts."""
    desk.account(balance=0, refill=10)
    desk.clock.advance(1)
    desk.clock.wall_ns += jump_s * NS_PER_S
    desk.clock.advance(1)

    assert 20 == desk.balance()


def test_a_boot_clock_that_goes_back_does_not_pay_twice(desk: Desk):
    """The mark is a high-water mark."""
    desk.account(balance=0, refill=10)
    desk.clock.advance(10)
    desk.set_budget(BudgetChange())
    desk.clock.ns -= 10 * NS_PER_S
    desk.set_budget(BudgetChange())
    desk.clock.ns += 10 * NS_PER_S

    assert 100 == desk.balance()


def test_after_a_reboot_counting_begins_where_the_books_are_opened(desk: Desk):
    """How long the machine was off is not known, so it is not paid; what was written stays."""
    desk.account(balance=0, refill=10)
    desk.clock.advance(10)
    desk.books.accounts.keep_marks(desk.clock.now(), age_ns=0)
    desk.clock.wall_ns += 86400 * NS_PER_S
    desk.clock.reboot(uptime_s=3)
    desk.books.recover(desk.clock.now())

    assert 100 == desk.balance()
    desk.clock.advance(2)
    assert 120 == desk.balance()
    desk.hold("j1", 1)
    desk.clock.advance(1)
    assert 129 == desk.balance()


def test_another_machines_uptime_mints_nothing(desk: Desk):
    """However often the books are moved between machines that have been up for days."""
    desk.account(balance=10, capacity=10**9, refill=10)
    for _ in range(10):
        desk.clock.reboot(uptime_s=500)
        assert 10 == desk.balance()
        desk.books.recover(desk.clock.now())
        desk.hold(f"j{desk.clock.boots}", 10)
        desk.void(f"j{desk.clock.boots}")

    assert 10 == desk.balance()
    assert [] == [entry for entry in desk.entries() if entry[0] == "refill"]


def test_a_restart_within_a_boot_loses_no_time(desk: Desk):
    """The mark is on disk and the boot clock runs on while no daemon does."""
    desk.account(balance=0, refill=10)
    desk.hold("j1", 0)
    desk.clock.advance(10)
    desk.books.recover(desk.clock.now())

    assert 100 == desk.balance()


def test_marks_are_kept_only_when_they_are_old(desk: Desk):
    """Upkeep bounds what a crash and a reboot lose to a minute of refill."""
    desk.account(balance=0, capacity=10_000, refill=10)
    desk.clock.advance(59)
    desk.books.accounts.keep_marks(desk.clock.now())
    assert [] == desk.entries()

    desk.clock.advance(1)
    desk.books.accounts.keep_marks(desk.clock.now())
    assert [("refill", 600, "")] == desk.entries()


@pytest.mark.parametrize(("refill", "amount"), [(1, 50), (7, 50), (3_000_000, 999_999_999)])
def test_a_refused_hold_is_accepted_after_the_wait_it_was_told(refill: int, amount: int):
    """The router counts it from the balance that the books showed."""
    desk = Desk()
    desk.account(balance=0, capacity=10**9, refill=refill)
    desk.clock.advance_ns(123_456_789)
    with pytest.raises(CannotAfford):
        desk.hold("early", amount)
    wait_s = _refill_s(desk.budget(), amount)

    desk.clock.advance(math.ceil(wait_s * 1000) / 1000)
    desk.hold("right", amount)


def test_refill_stops_before_the_integers_overflow(desk: Desk):
    """An account's lifetime sum stays below int64, however fast it refills and spends."""
    desk.account(balance=0, capacity=MAX_UATP, refill=MAX_UATP)
    for number in range(2**9 + 2):
        desk.clock.advance(1)
        amount = desk.balance()
        desk.hold(f"j{number}", amount)
        desk.settle(f"j{number}", amount)

    assert (0, MAX_LIFETIME_UATP) == (desk.balance(), desk.budget().discharged_uatp)


def test_the_platforms_clock_goes_forward_in_one_epoch(tmp_path: Path):
    """With a boot id it is the kernel's clock, without one the process's own."""
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("0f4b\n")
    boot, process = system_clock(boot_id), system_clock(tmp_path / "none")
    for clock in (boot, process):
        first, second = clock.now(), clock.now()
        assert first.epoch == second.epoch
        assert first.ns <= second.ns
    assert "boot:0f4b" == boot.epoch
    assert process.epoch != system_clock(tmp_path / "none").epoch
