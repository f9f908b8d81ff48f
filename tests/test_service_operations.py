"""BudgetService, ModelService and AdminService through a real client and a real ledger."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from pathlib import Path

import grpc
import pytest
from grpc.aio import AioRpcError
from holds import asked, entries_of
from hypothesis import given
from hypothesis import strategies as st
from service_harness import (
    CARD,
    LOADS,
    MODELS,
    PROGRESS,
    QUALITY,
    RESULT,
    RUNNING,
    STATUS,
    WAIT_S,
    Harness,
    in_thread,
    serving,
)
from typer.testing import CliRunner

from sage_fed.cli.app import build_app
from sage_fed.client import Client, EntryPage, LoadReport, error_of
from sage_fed.core import Budget, BudgetChange, Day, EntryKind
from sage_fed.errors import (
    CalibrationRunning,
    DeviceBusy,
    InvalidField,
    NoSuchAccount,
    NotFound,
    SageFedError,
    TierUnavailable,
)
from sage_fed.ledger import AccountTerms
from sage_fed.ledger.books import Books
from sage_fed.ledger.entries import MAX_TEXT, Now, Place
from sage_fed.service.services import page_token, read_page_token
from sage_fed.v1 import admin_pb2, budget_pb2, model_pb2
from sage_fed.wire.bounds import MAX_PAGE_SIZE

ADMIN = "admin-token"


async def hold(harness: Harness, number: int) -> None:
    await harness.ledger.hold(
        *asked(f"job-{number}", "local", 1_000_000 + number, "default-1", "tactical")
    )


async def test_a_budget_is_the_callers_own(tmp_path: Path) -> None:
    """The books come from the ledger as they are; an account without any has none."""
    async with serving(tmp_path) as harness:
        await hold(harness, 0)
        expected = Budget(
            account="local",
            balance_uatp=99_000_000,
            held_uatp=1_000_000,
            discharged_uatp=0,
            capacity_uatp=100_000_000,
            refill_uatp_per_s=0,
            strategic_floor_uatp=0,
        )

        def ask() -> Budget:
            with (
                Client(harness.address, token="robot-token") as robot,
                pytest.raises(NoSuchAccount),
            ):
                robot.budget()
            with Client(harness.address) as client:
                return client.budget()

        assert expected == await in_thread(ask)


async def test_the_budget_names_the_rate_card_in_force(tmp_path: Path) -> None:
    """A price without its card means nothing."""
    async with serving(tmp_path) as harness:
        call = harness.channel.unary_unary("/sage_fed.v1.BudgetService/GetBudget")
        reply = budget_pb2.GetBudgetResponse.FromString(await call(b""))
    assert "default-1" == reply.rate_card


async def test_a_flood_of_pages_is_in_nobodys_way(tmp_path: Path) -> None:
    """While one account's pages wait for their turn, jobs are held and settled; then all are read.

    That none of them is refused is new: free calls take turns before they are read, so that fewer
    wait in the ledger than an account may have there (`ledger/test_ledger_reader.py` has that).
    """
    async with serving(tmp_path) as harness:
        await harness.ledger.ensure_account("robot", AccountTerms(1000, initial_uatp=1000))
        let_go = threading.Event()
        reading = asyncio.create_task(
            harness.ledger.page("local", None, 1, lambda _: let_go.wait(WAIT_S))
        )
        await asyncio.sleep(0)
        method = "/sage_fed.v1.BudgetService/ListEntries"
        request = budget_pb2.ListEntriesRequest(page_size=1000).SerializeToString()
        own = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(harness.address, options=own) for _ in range(3)]
        flood = [
            asyncio.ensure_future(channel.unary_unary(method)(request))
            for channel in channels
            for _ in range(8)
        ]
        await hold(harness, 0)
        assert 7 == (await harness.ledger.settle("job-0", 7, "length")).charged_uatp
        others = asyncio.create_task(harness.ledger.budget("robot"))
        await asyncio.sleep(0)
        let_go.set()
        assert 1000 == (await others).balance_uatp
        answers = await asyncio.gather(*flood, return_exceptions=True)
        await reading
        for channel in channels:
            await channel.close()

    assert all(isinstance(answer, bytes) for answer in answers), "each in its turn"


async def test_the_largest_page_fits_a_default_client(tmp_path: Path) -> None:
    """A thousand entries with the longest names that the books take, in four bytes a character."""
    longest = "\N{PILE OF POO}" * MAX_TEXT
    async with serving(tmp_path) as harness:
        await harness.ledger.set_budget("local", BudgetChange(balance_uatp=2**53))
        for number in range(MAX_PAGE_SIZE):
            name = f"{longest[:-4]}{number:04}"
            await harness.ledger.hold(*asked(name, "local", 2**42, longest, "tactical"))
        call = harness.channel.unary_unary("/sage_fed.v1.BudgetService/ListEntries")
        page = await call(budget_pb2.ListEntriesRequest(page_size=1000).SerializeToString())

    assert MAX_PAGE_SIZE == len(budget_pb2.ListEntriesResponse.FromString(page).entries)
    assert 1000 * 2 * 4 * (MAX_TEXT - 4) < len(page) < 4 * 2**20


@pytest.mark.parametrize("page_size", [1, 2, 3, 7, 8, 1000])
async def test_pages_give_every_entry_once_newest_first(tmp_path: Path, page_size: int) -> None:
    """Whatever the page's size, the pages together are the ledger."""
    async with serving(tmp_path) as harness:
        for number in range(6):
            await hold(harness, number)
        expected = await entries_of(harness.ledger, "local", None, 100)

        def ask() -> list[object]:
            with Client(harness.address) as client:
                page = client.entries_page(page_size)
                entries = list(page.entries)
                while page.next_page_token:
                    page = client.entries_page(page_size, page.next_page_token)
                    entries += page.entries
                assert client.entries(limit=5) == tuple(entries[:5])
                assert client.entries(limit=2000) == tuple(entries)
                return list(entries)

        entries = await in_thread(ask)
    assert 7 == len(expected)
    assert expected == entries
    assert [EntryKind.HOLD, EntryKind.GRANT] == [expected[0].kind, expected[-1].kind]


async def test_an_entry_that_comes_between_two_pages_repeats_none(tmp_path: Path) -> None:
    """A token names an entry, not a distance: new entries shift nothing."""
    async with serving(tmp_path) as harness:
        for number in range(3):
            await hold(harness, number)

        def page(token: str) -> tuple[list[str], str]:
            with Client(harness.address) as client:
                got = client.entries_page(2, token)
                return [entry.job_id for entry in got.entries], got.next_page_token

        first, token = await in_thread(lambda: page(""))
        await hold(harness, 3)
        second, _ = await in_thread(lambda: page(token))
    assert (["job-2", "job-1"], ["job-0", ""]) == (first, second)


@pytest.mark.parametrize(
    ("size", "token", "field"),
    [
        (1001, "", "page_size"),
        (2**32 - 1, "", "page_size"),
        (10, "garbage", "page_token"),
        (10, "ÿ", "page_token"),
        (10, page_token(Place(1))[:-4], "page_token"),
        (10, page_token(Place(2**64 - 1)), "page_token"),
        (10, "AQAAAAAAAAAD", "page_token"),
    ],
)
async def test_a_page_that_cannot_be_is_refused(
    tmp_path: Path, size: int, token: str, field: str
) -> None:
    """By the name of the field."""
    async with serving(tmp_path) as harness:

        def ask() -> str:
            with Client(harness.address) as client, pytest.raises(InvalidField) as raised:
                client.entries_page(size, token)
            return raised.value.field

        assert field == await in_thread(ask)


@given(st.text(max_size=40))
def test_any_page_token_is_an_entry_or_refused(token: str) -> None:
    """Nothing that a client sends as a token is our bug."""
    place: Place | None = None
    with contextlib.suppress(InvalidField):
        place = read_page_token(token)
    assert place is None or 0 <= place.before < 2**63


@given(st.builds(Place, st.integers(0, 2**63 - 1), st.booleans()))
def test_a_page_token_reads_back(place: Place) -> None:
    """Every entry, and every day, can be the last of a page."""
    assert place == read_page_token(page_token(place))


def test_a_page_token_of_an_older_daemon_is_refused_in_words() -> None:
    """It named an entry by a number that is another one now."""
    with pytest.raises(InvalidField, match=r"of an older daemon.*begin again"):
        read_page_token("AQAAAAAAAAAD")


@pytest.mark.parametrize("page_size", [1, 2, 3, 6, 1000])
async def test_pages_end_with_the_days(tmp_path: Path, page_size: int) -> None:
    """Behind the oldest entry, newest first, each once; entries are counted per account."""
    async with serving(tmp_path) as harness:
        await harness.ledger.ensure_account("robot", AccountTerms(1000, initial_uatp=1000))
        days = [
            Day(day, 2, 0, 0, settled_jobs=0, voided_jobs=number, expired_jobs=1)
            for number, day in enumerate((20_000, 20_001, 20_005))
        ]

        def fold(books: Books, _now: Now) -> None:
            for day in days:
                books.db.execute(
                    "INSERT INTO day VALUES ('local', ?, 2, 0, 0, 0, 0, ?, 1)",
                    (day.day, day.voided_jobs),
                )

        await harness.ledger._ask(fold)
        await hold(harness, 0)

        def ask() -> tuple[list[int], list[Day], EntryPage]:
            with Client(harness.address) as client:
                entries, found = [], []
                token = ""
                while True:
                    page = client.entries_page(page_size, token)
                    assert len(page.entries) + len(page.days) <= page_size
                    entries += [entry.entry_id for entry in page.entries]
                    found += page.days
                    token = page.next_page_token
                    if not token:
                        return entries, found, client.books(4)

        entries, found, lines = await in_thread(ask)

    assert [2, 1] == entries
    assert days[::-1] == found
    assert (2, 2) == (len(lines.entries), len(lines.days))


async def test_the_command_line_shows_the_days(tmp_path: Path) -> None:
    """Behind the entries, for people; for programs beside them."""
    async with serving(tmp_path) as harness:
        await hold(harness, 0)
        await harness.ledger.void("job-0", "test")
        await hold(harness, 1)

        def ask(*more: str) -> str:
            shell = CliRunner(env={"SAGE_FED_ADDRESS": harness.address})
            return shell.invoke(build_app(), ["ledger", *more]).stdout

        output, body = await in_thread(ask), json.loads(await in_thread(lambda: ask("--json")))

    *_, title, header, line = output.strip().splitlines()
    assert "older entries, and holds that were given back, by the day (UTC):" == title
    assert ["day", "entries", "granted", "spent", "jobs", "given", "back", "expired"] == (
        header.split()
    )
    assert ["2", "0.00", "0.00", "0", "1", "0"] == line.split()[1:]
    assert [4, 1] == [entry["entry_id"] for entry in body["entries"]]
    (day,) = body["days"]
    assert (line.split()[0], 1) == (day["date"], day["voided_jobs"])


async def test_models_and_status_arrive_whole(tmp_path: Path) -> None:
    """What the daemon says of itself is what the client reads, the unknown included."""
    async with serving(tmp_path) as harness:

        def ask() -> object:
            with Client(harness.address) as client:
                return client.models(), client.status()

        assert (MODELS, STATUS) == await in_thread(ask)


@pytest.mark.parametrize("tier", [1, 2])
async def test_one_model_by_its_tier(tmp_path: Path, tier: int) -> None:
    """GetModel answers with the tier that was named."""
    async with serving(tmp_path) as harness:
        call = harness.channel.unary_unary("/sage_fed.v1.ModelService/GetModel")
        request = model_pb2.GetModelRequest(tier=tier)  # type: ignore[arg-type] # an open enum
        reply = model_pb2.GetModelResponse.FromString(await call(request.SerializeToString()))
    assert MODELS[tier - 1].name == reply.model.name


@pytest.mark.parametrize(
    ("tier", "reason"),
    [(0, InvalidField.reason), (3, InvalidField.reason), (9, InvalidField.reason),
     (2, NotFound.reason)],
)  # fmt: skip
async def test_a_model_that_is_not_there(tmp_path: Path, tier: int, reason: str) -> None:
    """AUTO is no tier of a model; a tier that the daemon does not have is NOT_FOUND."""
    async with serving(tmp_path) as harness:
        harness.operations.shown = MODELS[:1]
        call = harness.channel.unary_unary("/sage_fed.v1.ModelService/GetModel")
        request = model_pb2.GetModelRequest(tier=tier)  # type: ignore[arg-type] # an open enum
        with pytest.raises(AioRpcError) as raised:
            await call(request.SerializeToString())
    assert reason == error_of(raised.value, "here").reason


async def test_an_operator_sees_every_job_and_what_is_held(tmp_path: Path) -> None:
    """Jobs from the broker, tiers from the daemon, the held total from the books."""
    async with serving(tmp_path) as harness:
        await hold(harness, 0)

        def ask() -> LoadReport:
            with Client(harness.address, token=ADMIN) as client:
                return client.load()

        said = await in_thread(ask)
    assert LoadReport(LOADS, (RUNNING,), 1_000_000, (), 1, said.connections) == said


async def test_an_operator_aborts_and_drains(tmp_path: Path) -> None:
    """Abort says whether there was such a job; drain passes the grace on, absent as absent."""
    async with serving(tmp_path) as harness:

        def ask() -> object:
            with Client(harness.address, token=ADMIN) as client:
                return (
                    client.abort("job-1"),
                    client.abort("job-2"),
                    client.drain(),
                    client.drain(0.0),
                    client.drain(2.5),
                )

        assert (True, False, 2, 2, 2) == await in_thread(ask)
        assert [None, 0.0, 2.5] == harness.operations.drained


async def test_an_operator_creates_and_changes_accounts(tmp_path: Path) -> None:
    """Absent fields stay as they are; held amounts stay held."""
    async with serving(tmp_path) as harness:
        await hold(harness, 0)

        def ask() -> object:
            with Client(harness.address, token=ADMIN) as client:
                created = client.set_budget("new", balance_uatp=5, capacity_uatp=9)
                changed = client.set_budget("local", strategic_floor_uatp=7)
                emptied = client.set_budget("local", balance_uatp=0)
                return created, changed, emptied

        assert (
            Budget("new", 5, 0, 0, 9, 0, 0),
            Budget("local", 99_000_000, 1_000_000, 0, 100_000_000, 0, 7),
            Budget("local", 0, 1_000_000, 0, 100_000_000, 0, 7),
        ) == await in_thread(ask)


async def test_an_operator_calibrates_and_adopts(tmp_path: Path) -> None:
    """Progress and result arrive as they were said; so does what is in force after it."""
    async with serving(tmp_path) as harness:

        def ask() -> object:
            with Client(harness.address, token=ADMIN) as client:
                return (
                    list(client.calibrate(quick=True, adopt=True)),
                    list(client.calibrate()),
                    client.adopt_card("mine-1"),
                    client.adopt_quality_card("pair-1"),
                )

        assert ([PROGRESS, RESULT], [PROGRESS, RESULT], CARD, QUALITY) == await in_thread(ask)
        assert [(True, True), (False, False)] == harness.operations.calibrated


async def test_a_client_that_leaves_ends_its_calibration(tmp_path: Path) -> None:
    """The measurement is told at once; it would go on for minutes otherwise."""
    async with serving(tmp_path) as harness:
        harness.operations.calibration_hangs = True

        def ask() -> object:
            with Client(harness.address, token=ADMIN) as client:
                return next(client.calibrate())

        assert PROGRESS == await in_thread(ask)
        async with asyncio.timeout(WAIT_S):
            await harness.operations.calibration_over.wait()


@pytest.mark.parametrize(
    "error",
    [
        CalibrationRunning("a calibration runs already"),
        DeviceBusy("live jobs kept it busy"),
        TierUnavailable("the daemon is draining"),
    ],
)
async def test_a_calibration_that_fails_says_why(tmp_path: Path, error: SageFedError) -> None:
    """With a reason of its own, also in the middle of it; the client raises the same error."""
    async with serving(tmp_path) as harness:
        harness.operations.calibration_error = error

        def ask() -> None:
            with Client(harness.address, token=ADMIN) as client:
                list(client.calibrate())

        with pytest.raises(type(error), match=error.message):
            await in_thread(ask)


async def test_a_new_account_may_hold_what_it_is_given(tmp_path: Path) -> None:
    """Without a capacity of its own it refills up to its first balance, not up to nothing."""
    async with serving(tmp_path) as harness:

        def ask() -> object:
            with Client(harness.address, token=ADMIN) as client:
                return (
                    client.set_budget("new", balance_uatp=5, refill_uatp_per_s=1),
                    client.set_budget("local", balance_uatp=300, capacity_uatp=300),
                )

        assert (
            Budget("new", 5, 0, 0, 5, 1, 0),
            Budget("local", 300, 0, 0, 300, 0, 0),
        ) == await in_thread(ask)


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Abort", admin_pb2.AbortRequest(), "job_id"),
        ("Abort", admin_pb2.AbortRequest(job_id="x" * 257), "job_id"),
        ("AdoptRateCard", admin_pb2.AdoptRateCardRequest(), "version"),
        ("AdoptRateCard", admin_pb2.AdoptRateCardRequest(version="x" * 65), "version"),
        ("Drain", admin_pb2.DrainRequest(grace_s=-1.0), "grace_s"),
        ("Drain", admin_pb2.DrainRequest(grace_s=float("nan")), "grace_s"),
        ("Drain", admin_pb2.DrainRequest(grace_s=float("inf")), "grace_s"),
        ("SetBudget", admin_pb2.SetBudgetRequest(), "account"),
        ("SetBudget", admin_pb2.SetBudgetRequest(account="x" * 1000, capacity_uatp=1), "account"),
        ("SetBudget", admin_pb2.SetBudgetRequest(account="a", balance_uatp=-1), "balance_uatp"),
        ("SetBudget", admin_pb2.SetBudgetRequest(account="a"), "capacity_uatp"),
        (
            "SetBudget",
            admin_pb2.SetBudgetRequest(account="a", balance_uatp=10, capacity_uatp=9),
            "balance_uatp",
        ),
        (
            "SetBudget",
            admin_pb2.SetBudgetRequest(account="local", balance_uatp=100_000_001),
            "balance_uatp",
        ),
        (
            "SetBudget",
            admin_pb2.SetBudgetRequest(account="a", capacity_uatp=2**62),
            "capacity_uatp",
        ),
    ],
)
async def test_an_operators_mistake_is_refused_by_name(
    tmp_path: Path,
    method: str,
    request_: admin_pb2.AbortRequest | admin_pb2.DrainRequest | admin_pb2.SetBudgetRequest,
    field: str,
) -> None:
    """Operators get the same plain answers as clients."""
    async with serving(tmp_path) as harness:
        call = harness.channel.unary_unary(f"/sage_fed.v1.AdminService/{method}")
        headers = [("authorization", f"Bearer {ADMIN}")]
        with pytest.raises(AioRpcError) as raised:
            await call(request_.SerializeToString(), metadata=headers)
        assert [] == harness.operations.drained
    error: SageFedError = error_of(raised.value, "here")
    assert isinstance(error, InvalidField)
    assert field == error.field
