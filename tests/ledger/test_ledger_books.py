"""Hold, settle, void, expire and replay, on books in memory."""

import apsw
import pytest
from ledger_fakes import Desk

from sage_fed.core import MAX_UATP, Budget, BudgetChange, Day
from sage_fed.errors import (
    CannotAfford,
    HoldClosed,
    InvalidField,
    NoSuchAccount,
    NotFound,
    RequestIdConflict,
)
from sage_fed.ledger.books import DAY_NS, MAX_INT, Retention
from sage_fed.ledger.check import audit
from sage_fed.ledger.entries import (
    AccountTerms,
    HoldReceipt,
    Place,
    Recovery,
    Replay,
    Settlement,
)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_hold_and_settle_move_the_price_and_release_the_rest(desk: Desk):
    """A settled hold leaves its price discharged and the rest available."""
    desk.account(balance=100)

    held = desk.hold("j1", 60)
    settled = desk.settle("j1", 45)

    assert HoldReceipt("j1", 60, 40) == held
    assert Settlement("j1", 60, 45, 55) == settled
    assert [
        ("grant", 100, ""),
        ("hold", 60, "j1"),
        ("settle", 45, "j1"),
        ("release", 15, "j1"),
    ] == desk.entries()


def test_settling_at_the_full_hold_releases_nothing(desk: Desk):
    """No entry of 0 is written."""
    desk.account(balance=100)
    desk.hold("j1", 60)

    desk.settle("j1", 60)

    assert ("settle", 60, "j1") == desk.entries()[-1]


def test_settling_twice_returns_the_first_settlement(desk: Desk):
    """The second settlement changes nothing, whatever price it names."""
    desk.account(balance=100)
    desk.hold("j1", 60)
    desk.settle("j1", 45)
    entries = desk.entries()

    again = desk.settle("j1", 7)

    assert Settlement("j1", 60, 45, 55, repeated=True) == again
    assert entries == desk.entries()


def test_a_charge_above_the_hold_is_refused(desk: Desk):
    """The hold stays open, so that the right price can still be settled."""
    desk.account(balance=100)
    desk.hold("j1", 60)

    with pytest.raises(InvalidField, match="charged_uatp"):
        desk.settle("j1", 61)

    assert 60 == desk.budget().held_uatp


def test_a_void_gives_the_hold_back_once(desk: Desk):
    """Nothing is left of it but a count, and it cannot be ended again."""
    desk.account(balance=100)
    desk.hold("j1", 60)

    assert Settlement("j1", 60, 0, 100) == desk.void("j1")
    with pytest.raises(NotFound):
        desk.void("j1")
    with pytest.raises(NotFound):
        desk.settle("j1", 1)
    assert [("grant", 100, "")] == desk.entries()
    assert [Day(today(desk), 2, 0, 0, 0, 1, 0)] == list(desk.books.days.read("ann", MAX_INT, 10))
    assert (100, 0, 0) == _sums(desk)
    assert () == audit(desk.db)


def test_a_settled_hold_cannot_be_voided_nor_one_that_a_restart_gave_back_settled(desk: Desk):
    """A hold ends one way."""
    desk.account(balance=100)
    desk.hold("left", 10)
    with desk.db:
        desk.books.recover(desk.clock.now())
    desk.hold("settled", 10)
    desk.settle("settled", 4)

    with pytest.raises(HoldClosed) as of_left:
        desk.settle("left", 1)
    with pytest.raises(HoldClosed) as of_settled:
        desk.void("settled")

    assert ("voided", "settled") == (of_left.value.how, of_settled.value.how)
    assert desk.void("left").repeated
    assert 96 == desk.balance()


def test_an_expired_hold_is_given_back_and_never_charged(desk: Desk):
    """A settlement that comes after the expiry is refused and charges nothing."""
    desk.account(balance=100)
    desk.hold("short", 10, ttl_s=5.0)
    desk.hold("long", 20, ttl_s=6.0)
    desk.clock.advance(5.0)

    assert ("short",) == desk.expire_due()
    with pytest.raises(HoldClosed) as caught:
        desk.settle("short", 1)

    assert "expired" == caught.value.how
    assert (80, 20, 0) == _sums(desk)
    assert ("expire", 10, "short") == desk.entries()[-1]


def test_a_hold_of_a_job_that_lives_does_not_expire(desk: Desk):
    """It is settled at its price, however late."""
    desk.account()
    desk.hold("lives", 10, ttl_s=1.0)
    desk.hold("leaked", 10, ttl_s=1.0)
    desk.clock.advance(3600)

    assert ("leaked",) == desk.expire_due(frozenset({"lives", "unknown"}))

    assert 4 == desk.settle("lives", 4).charged_uatp
    assert 96 == desk.balance()


def test_a_hold_is_not_expired_before_its_time(desk: Desk):
    """One nanosecond before, it stays."""
    desk.account(balance=100)
    desk.hold("j1", 10, ttl_s=5.0)
    desk.clock.advance_ns(5 * 10**9 - 1)

    assert () == desk.expire_due()
    desk.clock.advance_ns(1)
    assert ("j1",) == desk.expire_due()


def test_unknown_accounts_and_jobs_are_named_errors(desk: Desk):
    """Neither a hold without an account nor an end without a hold passes."""
    with pytest.raises(NoSuchAccount):
        desk.hold("j1", 1)
    with pytest.raises(NotFound):
        desk.settle("j1", 1)
    with pytest.raises(NotFound):
        desk.void("j1")


def test_a_hold_above_the_balance_is_refused_without_a_trace(desk: Desk):
    """The refusal is the router's for a balance that does not reach, in one word."""
    desk.account(balance=100)

    with pytest.raises(CannotAfford) as caught:
        desk.hold("j1", 101)

    assert ("cannot_afford", None, "ann") == (
        caught.value.detail,
        caught.value.retry_after_s,
        caught.value.account,
    )
    assert [("grant", 100, "")] == desk.entries()


@pytest.mark.parametrize("amount", [-1, MAX_UATP + 1, 1.0, True])
def test_amounts_out_of_range_are_invalid_fields(desk: Desk, amount: int):
    """Only integers from 0 to the limit are amounts."""
    desk.account()

    with pytest.raises(InvalidField, match="amount_uatp"):
        desk.hold("j1", amount)
    with pytest.raises(InvalidField, match="balance_uatp"):
        desk.set_budget(BudgetChange(balance_uatp=amount))


@pytest.mark.parametrize("job_id", ["", "x" * 257, "a\x00b", "\ud800"])
def test_unstorable_ids_are_invalid_fields(desk: Desk, job_id: str):
    """What SQLite could not keep as it is never reaches it."""
    desk.account()

    with pytest.raises(InvalidField, match="job_id"):
        desk.hold(job_id, 1)


def test_a_job_id_is_used_once(desk: Desk):
    """A second hold under the same job id is refused, also after the first was charged."""
    desk.account()
    desk.hold("j1", 1)
    desk.settle("j1", 1)

    with pytest.raises(InvalidField, match="job_id"):
        desk.hold("j1", 1)


def test_a_free_job_is_held_and_settled_without_entries(desk: Desk):
    """A price of 0 moves nothing and still ends once."""
    desk.account(balance=0)

    assert HoldReceipt("j1", 0, 0) == desk.hold("j1", 0)
    assert Settlement("j1", 0, 0, 0) == desk.settle("j1", 0)
    assert [] == desk.entries()


def test_a_repeated_request_gets_the_first_result(desk: Desk):
    """It is not held again, neither by the look-up nor by the hold."""
    desk.account(balance=100)
    desk.hold("j1", 60, client_request_id="r", payload_hash=b"p")
    desk.settle("j1", 45, b"answer")

    looked_up = desk.find("r", b"p")
    held = desk.hold("j2", 60, client_request_id="r", payload_hash=b"p")

    assert Replay("j1", b"answer") == looked_up == held
    assert 55 == desk.balance()


def test_another_payload_or_a_running_job_conflicts(desk: Desk):
    """The same id is the same request, once."""
    desk.account(balance=100)
    desk.hold("j1", 10, client_request_id="r", payload_hash=b"p")

    with pytest.raises(RequestIdConflict, match="still running"):
        desk.hold("j2", 10, client_request_id="r", payload_hash=b"p")
    desk.settle("j1", 1, b"answer")
    with pytest.raises(RequestIdConflict, match="another request"):
        desk.hold("j2", 10, client_request_id="r", payload_hash=b"q")

    assert (99, 0, 1) == _sums(desk)


def test_request_ids_belong_to_an_account(desk: Desk):
    """Another account's id is not looked at."""
    desk.account("ann")
    desk.account("bob")
    desk.hold("j1", 10, client_request_id="r", payload_hash=b"p")

    assert HoldReceipt("j2", 10, 90) == desk.hold(
        "j2", 10, account="bob", client_request_id="r", payload_hash=b"q"
    )


@pytest.mark.parametrize("end", ["void", "expire", "settle without a result"])
def test_a_request_id_without_a_result_is_free_again(desk: Desk, end: str):
    """What gave the client nothing may be tried again under the same id."""
    desk.account(balance=100)
    desk.hold("j1", 10, client_request_id="r", payload_hash=b"p", ttl_s=1.0)
    if end == "void":
        desk.void("j1")
    elif end == "expire":
        desk.clock.advance(1.0)
        desk.expire_due()
    else:
        desk.settle("j1", 0, None)

    assert isinstance(desk.hold("j2", 10, client_request_id="r", payload_hash=b"q"), HoldReceipt)


def test_results_are_forgotten_after_their_retention():
    """Until then they replay; after it the id is free."""
    desk = Desk(Retention(keep_s=10.0))
    desk.account(balance=100)
    desk.hold("j1", 10, client_request_id="r", payload_hash=b"p")
    desk.settle("j1", 1, b"answer")

    desk.clock.advance(10.0)
    assert 0 == desk.books.requests.prune(desk.clock.now())
    assert Replay("j1", b"answer") == desk.find("r", b"p")
    desk.clock.advance_ns(1)
    assert 1 == desk.books.requests.prune(desk.clock.now())
    assert None is desk.find("r", b"p")


def test_results_above_the_byte_limits_refuse_a_second_run():
    """The oldest make room, a too large one is not kept; none of their ids charges again."""
    desk = Desk(Retention(one_result_bytes=10, all_results_bytes=16))
    desk.account(balance=100)
    for name, size in (("huge", 11), ("old", 8), ("mid", 8), ("new", 8)):
        desk.clock.advance(1.0)
        desk.hold(f"j-{name}", 1, client_request_id=name)
        desk.settle(f"j-{name}", 1, b"x" * size)

    desk.books.requests.prune(desk.clock.now())

    assert Replay("j-mid", b"x" * 8) == desk.find("mid", b"")
    assert Replay("j-new", b"x" * 8) == desk.find("new", b"")
    for name in ("huge", "old"):
        with pytest.raises(RequestIdConflict, match="too large"):
            desk.find(name, b"")


def test_one_result_above_its_limit_is_not_kept_where_there_is_room_for_all():
    """The limit is on each: it does not wait for the sum."""
    desk = Desk(Retention(one_result_bytes=10))
    desk.account(balance=100)
    for name, size in (("fits", 10), ("huge", 11)):
        desk.hold(f"j-{name}", 1, client_request_id=name)
        desk.settle(f"j-{name}", 1, b"x" * size)

    assert Replay("j-fits", b"x" * 10) == desk.find("fits", b"")
    with pytest.raises(RequestIdConflict, match="too large"):
        desk.find("huge", b"")


def test_orphans_are_voided_and_counted(desk: Desk):
    """After a restart no hold is open, and their ids may be used again."""
    desk.account(balance=100)
    desk.hold("j1", 10, client_request_id="r")
    desk.hold("j2", 20)
    desk.hold("j3", 5)
    desk.settle("j3", 5)

    assert Recovery(2, 30) == desk.books.recover(desk.clock.now())
    assert Recovery(0, 0) == desk.books.recover(desk.clock.now())
    assert (95, 0, 5) == _sums(desk)
    assert None is desk.find("r", b"")


def test_set_budget_grants_or_revokes_and_leaves_holds(desk: Desk):
    """The balance is set exactly; what is held stays held."""
    desk.account(balance=100)
    desk.hold("j1", 30)

    desk.set_budget(BudgetChange(balance_uatp=500))
    desk.set_budget(BudgetChange(balance_uatp=20, capacity_uatp=77, strategic_floor_uatp=3))

    assert [("grant", 430, ""), ("revoke", 480, "")] == desk.entries()[-2:]
    assert (20, 30, 0) == _sums(desk)
    assert (77, 3) == (desk.budget().capacity_uatp, desk.budget().strategic_floor_uatp)


def test_set_budget_creates_an_account(desk: Desk):
    """What it is not told is 0."""
    budget = desk.set_budget(BudgetChange(balance_uatp=5), "new")

    assert (5, 0, 0, 0) == (
        budget.balance_uatp,
        budget.capacity_uatp,
        budget.refill_uatp_per_s,
        budget.strategic_floor_uatp,
    )


def test_a_restart_grants_nothing_and_keeps_the_operators_terms(desk: Desk):
    """Settings apply again only where they themselves changed."""
    desk.account(balance=100, capacity=1000, floor=10)
    desk.hold("j1", 40)
    desk.settle("j1", 40)
    desk.set_budget(BudgetChange(capacity_uatp=5000))

    same = desk.account(balance=100, capacity=1000, floor=10)
    floor_changed = desk.account(balance=100, capacity=1000, floor=11)
    capacity_changed = desk.account(balance=100, capacity=999, floor=11)

    assert (60, 5000, 10) == _terms(same)
    assert (60, 5000, 11) == _terms(floor_changed)
    assert (60, 999, 11) == _terms(capacity_changed)


def test_the_log_says_where_settings_replace_an_operators_word(
    desk: Desk, caplog: pytest.LogCaptureFixture
):
    """It names the account and both amounts; what only the settings ever said is no news."""
    desk.account(capacity=1000, floor=10)
    desk.account(capacity=1100, floor=10)
    desk.set_budget(BudgetChange(capacity_uatp=5000))
    desk.account(capacity=1100, floor=11)
    assert [] == caplog.messages
    desk.account(capacity=999, floor=11)
    (said,) = caplog.messages
    assert said.startswith("account ann: the settings have changed its capacity_uatp")
    assert "999 uATP replace the 5000 that an operator had set" in said


def test_an_operators_budget_stays_when_the_account_gets_a_token(desk: Desk):
    """The settings spoke before, and have not said anything else since; no grant either."""
    terms = AccountTerms(1000, 7, 10, 100)
    desk.set_budget(BudgetChange(balance_uatp=5, capacity_uatp=50), terms=terms)

    for _ in ("the token", "a restart"):
        assert (5, 50, 0) == _terms(desk.account(balance=100, capacity=1000, refill=7, floor=10))
    assert 0 == desk.budget().refill_uatp_per_s
    # Now they do.
    assert (5, 900, 0) == _terms(desk.account(balance=100, capacity=900, refill=7, floor=10))


def test_settings_that_changed_before_the_operator_spoke_change_nothing_after(desk: Desk):
    """An account whose token was revoked misses a change of the settings; the operator did not."""
    desk.account(balance=100, capacity=1000, floor=10)
    changed = AccountTerms(2000, 3, 20)
    desk.set_budget(BudgetChange(capacity_uatp=5000), terms=changed)

    budget = desk.account(balance=100, capacity=2000, refill=3, floor=20)

    assert (100, 5000, 20) == _terms(budget)
    assert 3 == budget.refill_uatp_per_s


def test_an_account_of_an_older_program_keeps_what_its_operator_set(desk: Desk):
    """What the settings said then was not kept, so they are taken to say the same."""
    desk.set_budget(BudgetChange(balance_uatp=5, capacity_uatp=50))

    assert (5, 50, 0) == _terms(desk.account(balance=100, capacity=1000, floor=10))
    assert (5, 50, 11) == _terms(desk.account(balance=100, capacity=1000, floor=11))


def test_settings_are_checked_before_an_account_is_made(desk: Desk):
    """A negative term names its field."""
    with pytest.raises(InvalidField, match="refill_uatp_per_s"):
        desk.books.accounts.ensure("ann", AccountTerms(1, -1), desk.clock.now())


def test_entries_are_paged_newest_first(desk: Desk):
    """A page continues below the last id seen and carries the job's rate card."""
    desk.account("bob")
    desk.account(balance=100)
    for number in range(5):
        desk.hold(f"j{number}", 1)

    first = desk.books.page("ann", None, 4).entries
    second = desk.books.page("ann", Place(first[-1].entry_id), 4).entries

    assert ["j4", "j3", "j2", "j1"] == [entry.job_id for entry in first]
    assert ["j0", ""] == [entry.job_id for entry in second]
    assert ("card-1", "charged", "held") == (
        first[0].rate_card,
        first[0].debit,
        first[0].credit,
    )
    assert ("", "mint", "charged") == (second[1].rate_card, second[1].debit, second[1].credit)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET amount_uatp = amount_uatp + 1",
        "DELETE FROM entry WHERE job_id = 'open'",
        "DELETE FROM entry WHERE job_id = 'kept'",
        "DELETE FROM job WHERE job_id = 'open'",
        "DELETE FROM day",
        "INSERT OR REPLACE INTO entry SELECT * FROM entry WHERE entry_id = 1",
        "UPDATE job SET charged_uatp = 9 WHERE job_id = 'done'",
        "UPDATE job SET state = 'held' WHERE job_id = 'done'",
        "DELETE FROM job",
        "DELETE FROM account",
        "UPDATE account SET charged_uatp = -1",
        # Out of order twice, a second settlement, books that do not fit the kind, nothing, a half,
        # an overdraft.
        "INSERT INTO entry VALUES (10, 10, 0, 'ann', 'settle', 'done', 1, 'held', 'discharged')",
        "INSERT INTO entry VALUES (10, 10, 0, 'ann', 'grant', NULL, 1, 'held', 'charged')",
        "INSERT INTO entry VALUES (11, 10, 0, 'ann', 'grant', NULL, 1, 'mint', 'charged')",
        "INSERT INTO entry VALUES (10, 9, 0, 'ann', 'grant', NULL, 1, 'mint', 'charged')",
        "INSERT INTO entry VALUES (10, 10, 0, 'ann', 'grant', NULL, 0, 'mint', 'charged')",
        "INSERT INTO entry VALUES (10, 10, 0, 'ann', 'grant', NULL, 1.5, 'mint', 'charged')",
        "INSERT INTO entry VALUES (10, 10, 0, 'ann', 'revoke', NULL, 1000, 'charged', 'mint')",
    ],
)
def test_the_database_itself_refuses_what_no_operation_may_do(desk: Desk, statement: str):
    """Rewritten history, second endings, halves and negative balances do not get in."""
    desk.account(balance=100)
    desk.hold("done", 10)
    desk.settle("done", 5)
    desk.hold("open", 1)
    desk.hold("kept", 1, client_request_id="r")
    desk.settle("kept", 1, b"answer")
    desk.hold("voided", 1)
    desk.void("voided")

    with pytest.raises(apsw.ConstraintError):
        desk.db.execute(statement)


def today(desk: Desk) -> int:
    return desk.clock.wall_ns // DAY_NS


def _sums(desk: Desk) -> tuple[int, int, int]:
    budget = desk.budget()
    return budget.balance_uatp, budget.held_uatp, budget.discharged_uatp


def _terms(budget: Budget) -> tuple[int, int, int]:
    return budget.balance_uatp, budget.capacity_uatp, budget.strategic_floor_uatp
