"""InferenceService over a real server: events, aggregation, cancellation, retries."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from service_harness import (
    DELTAS,
    EVENTS,
    FINISHED,
    QUOTE,
    STARTED,
    WAIT_S,
    ScriptedJobs,
    in_thread,
    serving,
)

from sage_fed.client import Client, TokenCount
from sage_fed.core import Delta, JobSpec, Message, Prompt, Refusal, SamplingRequest, Tier
from sage_fed.errors import InvalidField, TierUnavailable
from sage_fed.settings import LimitSettings
from sage_fed.v1 import inference_pb2, types_pb2

STREAM = "/sage_fed.v1.InferenceService/GenerateStream"
GENERATE = "/sage_fed.v1.InferenceService/Generate"
COUNT = "/sage_fed.v1.InferenceService/CountTokens"
CHAT = types_pb2.ChatMessages(messages=[types_pb2.ChatMessage(role="user", content="hello")])
REQUEST = inference_pb2.GenerateStreamRequest(
    job=types_pb2.JobSpec(text="hello")
).SerializeToString()


async def test_a_stream_is_its_events_in_order(tmp_path: Path) -> None:
    """Started, every Delta, Finished: the client reads exactly what the job said."""
    async with serving(tmp_path) as harness:

        def ask() -> list[object]:
            with Client(harness.address) as client:
                return list(client.stream("hello"))

        assert list(EVENTS) == await in_thread(ask)


async def test_generate_gathers_the_stream(tmp_path: Path) -> None:
    """The unary call answers with the whole text, tokens and log-probabilities in order."""
    async with serving(tmp_path) as harness:

        def ask() -> object:
            with Client(harness.address) as client:
                answer = client.generate("hello")
                return (
                    answer.started,
                    answer.text,
                    answer.token_ids,
                    answer.logprobs,
                    answer.finished,
                )

        expected = (
            STARTED,
            "Grüß Gott",
            (1, 2, 3, 4),
            tuple(entry for delta in DELTAS for entry in delta.logprobs),
            FINISHED,
        )
        assert expected == await in_thread(ask)


async def test_a_misspelled_keyword_costs_nothing(tmp_path: Path) -> None:
    """`max_tokens` is an error where it is written; it was ignored, and 64 tokens charged."""
    async with serving(tmp_path) as harness:

        def ask() -> None:
            with Client(harness.address) as client:
                for call in (client.stream, client.generate, client.quote):
                    with pytest.raises(TypeError, match="did you mean 'max_new_tokens'"):
                        call("hello", max_tokens=3)  # type: ignore[call-arg] # on purpose
                    with pytest.raises(InvalidField, match="auto, tactical, strategic"):
                        call("hello", tier="tacticla")  # type: ignore[arg-type] # on purpose
                with pytest.raises(InvalidField, match="auto, tactical, strategic"):
                    client.count_tokens("hello", "tacticla")  # type: ignore[arg-type]
                with pytest.raises(TypeError, match="a prompt is"):
                    client.count_tokens([{"role": "user", "content": "hi"}])  # type: ignore[list-item]

        await in_thread(ask)
        assert ([], []) == (harness.jobs.specs, harness.jobs.counted)


async def test_a_tier_may_be_named_by_a_word(tmp_path: Path) -> None:
    """Every call that takes a tier takes its name."""
    async with serving(tmp_path) as harness:

        def ask() -> None:
            with Client(harness.address) as client:
                list(client.stream("hello", tier="tactical"))
                client.generate("hello", tier="strategic", priority="high")
                client.quote("hello", tier="auto")
                client.count_tokens("hello", "strategic")

        await in_thread(ask)
        requested = [spec.requested for spec in harness.jobs.specs]
        assert [Tier.TACTICAL, Tier.STRATEGIC, None] == requested
        assert [Tier.STRATEGIC] == [tier for _, tier in harness.jobs.counted]


async def test_the_job_is_what_the_client_asked_for(tmp_path: Path) -> None:
    """Every field of a request reaches the broker, and the account is the caller's."""
    asked = SamplingRequest(
        temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, seed=2**64 - 1,
        max_new_tokens=1, stop=("\n",), ignore_eos=True, top_logprobs=0, deadline_s=0.5,
    )  # fmt: skip
    spec = JobSpec(
        account="somebody else",
        prompt=Prompt(messages=(Message("system", "Be brief."), Message("user", "hello"))),
        requested=Tier.STRATEGIC,
        allow_downgrade=True,
        max_cost_uatp=0,
        complexity=0.0,
        task_class="sums",
        client_request_id="again",
        sampling=asked,
    )
    async with serving(tmp_path) as harness:

        def ask() -> None:
            with Client(harness.address) as client:
                client.generate(spec)

        await in_thread(ask)
        (received,) = harness.jobs.specs
    assert ("local", spec.prompt, asked) == (received.account, received.prompt, received.sampling)
    assert (Tier.STRATEGIC, True, 0, 0.0, "sums", "again", None) == (
        received.requested,
        received.allow_downgrade,
        received.max_cost_uatp,
        received.complexity,
        received.task_class,
        received.client_request_id,
        received.call_deadline_s,
    )


@pytest.mark.parametrize("method", [STREAM, GENERATE])
async def test_a_client_that_leaves_cancels_its_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """A cancelled call reaches the job's stream at once, and is no error of ours."""
    caplog.set_level(logging.WARNING)
    jobs = ScriptedJobs(events=(STARTED, DELTAS[0]), hang=True)
    async with serving(tmp_path, jobs=jobs) as harness:
        call = harness.channel.unary_stream(method)(REQUEST, timeout=WAIT_S)
        if method == STREAM:
            await call.read()
        await asyncio.wait_for(jobs.accepted.wait(), WAIT_S)
        call.cancel()
        await asyncio.wait_for(jobs.streams[0].cancelled.wait(), WAIT_S)
    assert [] == caplog.records


async def test_a_broken_connection_cancels_its_job(tmp_path: Path) -> None:
    """A client whose connection goes away is as gone as one that says so."""
    jobs = ScriptedJobs(events=(STARTED,), hang=True)
    async with serving(tmp_path, jobs=jobs) as harness:
        async with grpc.aio.insecure_channel(harness.address) as channel:
            call = channel.unary_stream(STREAM)(REQUEST, timeout=WAIT_S)
            await call.read()
        await asyncio.wait_for(jobs.streams[0].cancelled.wait(), WAIT_S)


async def test_clients_that_leave_at_any_moment_are_no_errors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cancelling after any number of reads, mid-write too, never looks like a bug of ours."""
    caplog.set_level(logging.WARNING)
    jobs = ScriptedJobs(events=(STARTED, *DELTAS * 200), hang=True)
    async with serving(tmp_path, jobs=jobs) as harness:
        for reads in range(40):
            call = harness.channel.unary_stream(STREAM)(REQUEST, timeout=WAIT_S)
            for _ in range(reads % 7 + 1):
                await call.read()
            call.cancel()
        for stream in jobs.streams:
            await asyncio.wait_for(stream.cancelled.wait(), WAIT_S)
    assert 40 == len(jobs.streams)
    assert [] == caplog.records


@pytest.mark.parametrize("method", [STREAM, GENERATE])
async def test_a_connection_that_breaks_during_a_write_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """A reply that cannot be delivered says that the client left, before gRPC knows it."""
    caplog.set_level(logging.WARNING)
    # More than the transport takes in for a client that does not read: the write waits.
    jobs = ScriptedJobs(events=(STARTED, *[Delta("x" * 100_000, (1,), (), 1)] * 20, FINISHED))
    narrow = (
        ("grpc.http2.lookahead_bytes", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.use_local_subchannel_pool", 1),
    )
    async with serving(tmp_path, jobs=jobs) as harness:
        channels = [grpc.aio.insecure_channel(harness.address, narrow) for _ in range(40)]
        calls = [channel.unary_stream(method)(REQUEST, timeout=WAIT_S) for channel in channels]
        for call in calls:
            await asyncio.wait_for(call.initial_metadata(), WAIT_S)
        for channel in channels:
            await channel.close()
        for stream in jobs.streams:
            await asyncio.wait_for(stream.cancelled.wait(), WAIT_S)
    assert 40 == len(jobs.streams)
    assert [] == caplog.records


async def test_nothing_is_sent_before_the_job_is_accepted(tmp_path: Path) -> None:
    """A refusal before admission leaves the call retryable: gRPC's own retry gets the answer."""
    policy = {
        "methodConfig": [
            {
                "name": [{"service": "sage_fed.v1.InferenceService"}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.01s",
                    "maxBackoff": "0.01s",
                    "backoffMultiplier": 1,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
    jobs = ScriptedJobs(refusals=[TierUnavailable("loading")])
    async with serving(tmp_path, jobs=jobs) as harness:
        options = (("grpc.service_config", json.dumps(policy)),)
        async with grpc.aio.insecure_channel(harness.address, options=options) as channel:
            call = channel.unary_stream(STREAM)(REQUEST, timeout=WAIT_S)
            num_replies = len([reply async for reply in call])
    assert (2, len(EVENTS)) == (len(jobs.specs), num_replies)


async def test_a_calls_own_deadline_bounds_its_job_without_being_part_of_it(
    tmp_path: Path,
) -> None:
    """The gRPC deadline reaches the job; two equal requests stay equal whatever is left of it."""
    async with serving(tmp_path) as harness:
        for timeout_s in (60.0, 90.0):
            call = harness.channel.unary_stream(STREAM)(REQUEST, timeout=timeout_s)
            assert len(EVENTS) == len([reply async for reply in call])
        sooner, later = harness.jobs.specs
    # The wire rounds a timeout up, by less than two seconds.
    assert sooner.deadline_s is not None
    assert later.deadline_s is not None
    assert 0.0 < sooner.deadline_s < 62.0 < later.deadline_s < 92.0
    assert sooner == later


async def test_a_call_deadline_beyond_the_limit_says_nothing(tmp_path: Path) -> None:
    """A huge default timeout of some client library is not a wish about the job."""
    limits = LimitSettings(max_deadline_s=10.0)
    async with serving(tmp_path, limits=limits) as harness:
        call = harness.channel.unary_stream(STREAM)(REQUEST, timeout=1e6)
        assert len(EVENTS) == len([reply async for reply in call])
        assert [None] == [spec.deadline_s for spec in harness.jobs.specs]


@pytest.mark.parametrize(
    "decision",
    [
        QUOTE.decision,
        Refusal("balance", "costs 5 ATP, 3 are left", 2.5),
        Refusal("deadline", "takes 9 s", None, 9.0),
    ],
)
async def test_a_quote_arrives_whole(tmp_path: Path, decision: Refusal) -> None:
    """The decision, every route's price, and what is unknown stays unknown."""
    quote = replace(QUOTE, decision=decision)
    async with serving(tmp_path, jobs=ScriptedJobs(quoted=quote)) as harness:

        def ask() -> object:
            with Client(harness.address) as client:
                return client.quote("hello", tier=Tier.TACTICAL)

        assert quote == await in_thread(ask)


async def test_tokens_are_counted_on_the_tier_that_was_named(tmp_path: Path) -> None:
    """Text and conversations are counted, tactical unless said otherwise."""
    chat = (Message("user", "hello"), Message("assistant", ""))
    async with serving(tmp_path) as harness:

        def ask() -> object:
            with Client(harness.address) as client:
                return client.count_tokens("hello"), client.count_tokens(chat, Tier.STRATEGIC)

        assert (TokenCount(7, 512), TokenCount(7, 512)) == await in_thread(ask)
        assert [
            (Prompt(messages=(Message("user", "hello"),)), Tier.TACTICAL),
            (Prompt(messages=chat), Tier.STRATEGIC),
        ] == harness.jobs.counted


@pytest.mark.parametrize(
    ("request_", "raised", "expected"),
    [
        ({"chat": CHAT}, "job.chat.messages[0]", "chat.messages[0]"),
        ({"chat": CHAT}, "job.chat", "chat"),
        ({"text": "hello"}, "job.chat.messages", "text"),
    ],
)
async def test_a_prompt_that_cannot_be_counted_is_named_as_in_its_request(
    tmp_path: Path, request_: dict[str, Any], raised: str, expected: str
) -> None:
    """CountTokensRequest has no job: the path is one of its own fields."""
    request = inference_pb2.CountTokensRequest(**request_)
    jobs = ScriptedJobs(refusals=[InvalidField(raised, "the template refuses it")])
    async with serving(tmp_path, jobs=jobs) as harness:
        call = harness.channel.unary_unary(COUNT)(request.SerializeToString(), timeout=WAIT_S)
        assert grpc.StatusCode.INVALID_ARGUMENT is await call.code()
        assert f"{expected}: the template refuses it" == await call.details()


@pytest.mark.parametrize("method", [STREAM, GENERATE])
@pytest.mark.parametrize(
    ("job", "raised", "expected"),
    [
        ({"chat": CHAT}, "job.chat.messages[0]", "job.chat.messages[0]"),
        ({"text": "hello"}, "job.chat.messages[0]", "job.text"),
        ({"text": "hello"}, "job.chat", "job.text"),
        ({"text": "hello"}, "sampling.max_new_tokens", "sampling.max_new_tokens"),
    ],
)
async def test_a_prompt_that_cannot_be_encoded_is_named_as_in_its_job(
    tmp_path: Path, method: str, job: dict[str, Any], raised: str, expected: str
) -> None:
    """A text is a conversation of one message below; its sender knows only the text."""
    request = inference_pb2.GenerateStreamRequest(job=types_pb2.JobSpec(**job))
    jobs = ScriptedJobs(refusals=[InvalidField(raised, "the template refuses it")])
    async with serving(tmp_path, jobs=jobs) as harness:
        call = harness.channel.unary_stream(method)(request.SerializeToString(), timeout=WAIT_S)
        assert grpc.StatusCode.INVALID_ARGUMENT is await call.code()
        assert f"{expected}: the template refuses it" == await call.details()
