"""By what a request id knows a repeat: the payload's hash, of now and as it was kept before."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from holds import asked
from hypothesis import given
from hypothesis import strategies as st
from ledger.ledger_fakes import HandClock

from sage_fed.core import (
    PAYLOAD_FIELDS,
    JobSpec,
    Message,
    Mode,
    Priority,
    Prompt,
    SamplingRequest,
    StopReason,
    Tier,
)
from sage_fed.errors import ConfigError, RequestIdConflict
from sage_fed.jobs import results
from sage_fed.jobs.results import Result, payload_hashes, request_key
from sage_fed.ledger import HoldReceipt, Ledger, Replay, check
from sage_fed.ledger.entries import NS_PER_S
from sage_fed.workers import Workers

V2 = Path(__file__).parent / "data" / "ledger-v2"
"""Written by the last program whose hash had no version; `make.py` in it says how."""

NOT_ASKED_FOR = {"client_request_id", "call_deadline_s", "trace", "one_reply"}
"""What of a request a repeat may have otherwise."""


def spec_of(values: dict[str, Any]) -> JobSpec:
    """Return the request that `make.py` wrote down."""
    prompt, sampling, tier = values["prompt"], values["sampling"], values["requested"]
    listed = {name: tuple(sampling[name]) for name in ("stop", "stop_token_ids")}
    named = {
        "prompt": Prompt(
            tuple(Message(**message) for message in prompt["messages"]),
            tuple(prompt["token_ids"]),
        ),
        "requested": None if tier is None else Tier.named(tier),
        "priority": Priority[values["priority"]],
        "sampling": SamplingRequest(**{**sampling, **listed}),
    }
    return JobSpec(**{**values, **named})


VECTORS = json.loads((V2 / "payload-hashes.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=range(len(VECTORS)))
def test_the_hash_of_before_is_rebuilt_as_it_was(vector: dict[str, Any]) -> None:
    """Its bytes are written down, made by the program of then."""
    assert vector["hash"] == payload_hashes(spec_of(vector["spec"]))[1].hex()


TEXTS = st.text(st.characters(codec="utf-8"), max_size=5)
SPECS = st.builds(
    JobSpec,
    account=st.sampled_from(["ann", "bob"]),
    prompt=st.builds(
        Prompt,
        messages=st.lists(st.builds(Message, role=TEXTS, content=TEXTS), max_size=2).map(tuple),
        token_ids=st.lists(st.integers(0, 9), max_size=2).map(tuple),
    ),
    requested=st.sampled_from([None, Tier.TACTICAL, Tier.STRATEGIC]),
    max_cost_uatp=st.none() | st.integers(0, 3),
    priority=st.sampled_from(Priority),
    client_request_id=st.sampled_from(["", "r"]),
    sampling=st.builds(
        SamplingRequest,
        temperature=st.sampled_from([None, 0.0, 0.5]),
        seed=st.none() | st.integers(0, 2),
        stop=st.lists(TEXTS, max_size=2).map(tuple),
        stop_token_ids=st.lists(st.integers(0, 2), max_size=2).map(tuple),
    ),
    one_reply=st.booleans(),
)


@given(first=SPECS, second=SPECS)
def test_hashes_are_equal_exactly_where_the_same_is_asked_for(
    first: JobSpec, second: JobSpec
) -> None:
    """In either version, whatever the request id is."""
    alike = replace(first, client_request_id="") == replace(second, client_request_id="")
    ours, theirs = payload_hashes(first), payload_hashes(second)
    assert [alike, alike] == [mine == other for mine, other in zip(ours, theirs, strict=True)]
    assert (33, 32) == tuple(len(known) for known in ours)


def test_every_field_of_a_request_is_hashed_or_left_out_by_name() -> None:
    """A field that is forgotten would make a replay of another request."""
    named = {path.split(".")[0] for path in PAYLOAD_FIELDS}
    assert {field.name for field in fields(JobSpec)} == named | NOT_ASKED_FOR
    for part, cls in (("prompt", Prompt), ("sampling", SamplingRequest)):
        inner = {path for path in PAYLOAD_FIELDS if path.startswith(f"{part}.")}
        assert {f"{part}.{field.name}" for field in fields(cls)} == inner
    assert len(set(PAYLOAD_FIELDS)) == len(PAYLOAD_FIELDS)


@pytest.mark.parametrize(
    "fields", [{"mode": mode} for mode in Mode] + [{"max_error": 0.1}, {"accept_revisions": True}]
)
def test_how_a_job_is_served_is_part_of_what_is_asked(fields: dict[str, Any]) -> None:
    """A repeat that asks for another mode is another request; the first version knew none."""
    plain = JobSpec("ann", Prompt(token_ids=(1,)))
    (asked,) = payload_hashes(replace(plain, **fields))
    assert asked != payload_hashes(plain)[0]


def test_a_new_field_changes_no_hash_of_requests_that_do_not_name_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if one field were younger than the others: only a request with it has another hash."""
    plain = JobSpec("ann", Prompt(token_ids=(1,)), sampling=SamplingRequest(top_k=3))
    naming = replace(plain, sampling=replace(plain.sampling, top_logprobs=2))
    now = payload_hashes(plain), payload_hashes(naming)
    younger = "sampling.top_logprobs"
    before = tuple(path for path in PAYLOAD_FIELDS if path != younger)
    monkeypatch.setattr(results, "PAYLOAD_FIELDS", before)
    assert now[0] == payload_hashes(plain)
    assert now[1][0] != payload_hashes(naming)[0]
    # And what the first version did not know cannot have been kept under it.
    monkeypatch.undo()
    monkeypatch.setattr(results, "_FIELDS_1", frozenset(before))
    assert (2, 1) == (len(payload_hashes(plain)), len(payload_hashes(naming)))


def test_a_hash_that_is_kept_now_is_written_down() -> None:
    """Or the next change of the encoding would turn retries into conflicts."""
    spec = JobSpec(
        "robot",
        Prompt(messages=(Message("user", "größe"),)),
        requested=Tier.STRATEGIC,
        priority=Priority.HIGH,
        sampling=SamplingRequest(temperature=0.5, max_new_tokens=8, stop=("x",)),
    )
    kept = "028064fdbfc3a6a83f2c8291daf5cc84a72e2851a5c2694c244067f8d3b0013db1"
    assert kept == payload_hashes(spec)[0].hex()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the ledger that the program before wrote."""
    copytree(V2, tmp_path / "state")
    return tmp_path / "state" / "ledger.db"


def kept_spec(text: str, request_id: str) -> JobSpec:
    """Return one of the requests that `make.py` had answered."""
    return JobSpec(
        "ann",
        Prompt(messages=(Message("user", text),)),
        requested=Tier.STRATEGIC,
        client_request_id=request_id,
        sampling=SamplingRequest(temperature=0.5, max_new_tokens=8, stop=("\n",)),
    )


async def test_a_ledger_of_the_program_before_opens_and_balances(old: Path) -> None:
    """Its orphans are voided, its sums, days and refill marks go on, and the audit is silent."""
    with pytest.raises(ConfigError, match="start the daemon once to migrate it"):
        check(old)
    clock = HandClock()
    clock.ns, clock.wall_ns = (605_806 + 10) * NS_PER_S, 1_790_700_000 * NS_PER_S
    ledger = await Ledger(old, clock=clock).open()
    assert (2, 85) == (ledger.recovery.voided_jobs, ledger.recovery.voided_uatp)
    budgets = [await ledger.budget(name) for name in ("ann", "bob", "carl")]
    assert [(99_868, 132), (1000, 13), (50, 0)] == [
        (budget.balance_uatp, budget.discharged_uatp) for budget in budgets
    ]
    page = await ledger.page("ann", None, 100, lambda page: page)
    assert 4 == sum(day.settled_jobs for day in page.days)
    await ledger.close()
    report = check(old)
    assert ((), 0) == (report.violations, report.open_holds)


async def test_a_retry_across_the_upgrade_is_a_replay(old: Path) -> None:
    """Another payload is a conflict, and an id that was open or forgotten is free."""
    clock = HandClock()
    clock.ns, clock.wall_ns = 605_816 * NS_PER_S, 1_790_700_000 * NS_PER_S
    ledger = await Ledger(old, clock=clock).open()
    with Workers(max_calls=1, max_size=1) as workers:
        for text, request_id in (("hello", "kept-1"), ("how are you?", "kept-2")):
            key = await request_key(kept_spec(text, request_id), workers)
            replay = await ledger.hold(key, lambda _: pytest.fail("a repeat is not decided"))
            assert isinstance(replay, Replay)
            result = Result.from_bytes(replay.result)
            assert ("an answer", StopReason.END_OF_TEXT) == (
                result.output.text,
                result.finished.stop_reason,
            )
            other = await request_key(kept_spec("another", request_id), workers)
            with pytest.raises(RequestIdConflict, match="another request"):
                await ledger.lookup_request(other)
        for text, request_id in (("still running", "open"), ("long ago", "gone")):
            key = await request_key(kept_spec(text, request_id), workers)
            _, decide = asked(f"new-{request_id}")
            assert isinstance(await ledger.hold(key, decide), HoldReceipt)
            await ledger.settle(f"new-{request_id}", 1, "length", b"answer")
            assert Replay(f"new-{request_id}", b"answer") == await ledger.lookup_request(key)
    await ledger.close()
    assert () == check(old).violations
