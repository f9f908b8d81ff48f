"""What the event loop does in one turn: bounded, whatever clients send and jobs make."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st
from service_harness import FINISHED, STARTED, WAIT_S, ScriptedJobs, serving

from sage_fed.core import (
    Delta,
    Finished,
    JobSpec,
    Logprob,
    Message,
    Price,
    Prompt,
    Route,
    SamplingRequest,
    StopReason,
    Tier,
    Timing,
    Usage,
)
from sage_fed.errors import InvalidField, QueueFull, SageFedError
from sage_fed.jobs.results import (
    Result,
    _frames,
    payload_hashes,
    read_result,
    request_key,
    write_result,
)
from sage_fed.ledger import RequestKey
from sage_fed.service.edge import MAX_FIELDS, require_few_fields
from sage_fed.settings import LimitSettings
from sage_fed.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from sage_fed.workers import Workers

LONG = Delta(
    text="x" * 950,
    token_ids=tuple(range(950)),
    logprobs=tuple(
        Logprob(i, -i / 7, tuple((i + j, -j / 9) for j in range(20))) for i in range(950)
    ),
    output_tokens=950,
)
"""An answer that takes a tenth of a second to write down or to translate."""

GENERATE = inference_pb2.GenerateRequest.DESCRIPTOR


@dataclass
class Turns:
    """CPU seconds of the longest turn."""

    longest_s: float = 0.0


@contextmanager
def measured() -> Iterator[Turns]:
    """Time each callback of asyncio's own loop by the CPU that its thread used meanwhile."""
    turns, run = Turns(), asyncio.Handle._run
    thread = threading.get_ident()

    def timed(handle: asyncio.Handle) -> None:
        before_s = time.thread_time()
        run(handle)
        if threading.get_ident() == thread:
            turns.longest_s = max(turns.longest_s, time.thread_time() - before_s)

    asyncio.Handle._run = timed  # type: ignore[method-assign]
    try:
        yield turns
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]


MOST_S = 0.02
"""Five milliseconds, on a machine that is busy with other tests; before it was a hundred."""


def delimited(number: int, data: bytes) -> bytes:
    """A field with a length."""
    length, out = len(data), bytes([number << 3 | 2])
    while length > 0x7F:
        out, length = out + bytes([length & 0x7F | 0x80]), length >> 7
    return out + bytes([length]) + data


EMPTY_MESSAGES = delimited(1, delimited(2, b"\x0a\x00" * 2**20))
"""A million chat messages of nothing."""


@pytest.mark.parametrize(
    "raw",
    [
        EMPTY_MESSAGES,
        delimited(1, delimited(10, delimited(9, b"a") * 2**19)),
        b"\x78\x01" * 2**20,
        b"\x0b\x0c" * 2**20,
    ],
    ids=["messages", "stop strings", "unknown numbers", "groups"],
)
def test_fields_are_counted_before_objects_are_made(raw: bytes) -> None:
    """However many there are, a few thousand bytes are looked at."""
    began_s = time.thread_time()
    with pytest.raises(InvalidField, match="at most 2,048 fields"):
        require_few_fields(GENERATE, raw)
    assert time.thread_time() - began_s < MOST_S


def test_the_largest_honest_requests_have_few_enough() -> None:
    """Two million bytes of text, the most messages, and as many token ids as a context has."""
    text, chat, ids = (inference_pb2.GenerateRequest() for _ in range(3))
    text.job.text = "é" * 1_000_000
    for i in range(512):
        chat.job.chat.messages.add(role=("user", "assistant")[i % 2], content="x" * 400)
    chat.job.sampling.stop.extend(["x" * 128] * 256)
    ids.job.token_ids.ids.extend(range(200_000))
    for request in (text, chat, ids):
        require_few_fields(GENERATE, request.SerializeToString())


FIELDS = st.recursive(
    st.binary(max_size=12),
    lambda inner: st.lists(
        st.builds(delimited, st.integers(1, 15), inner), min_size=1, max_size=6
    ).map(b"".join),
    max_leaves=20,
)


@given(FIELDS)
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(b"\x0a\x05\x12\x08ab")
def test_what_protobuf_reads_is_never_called_malformed(some: bytes) -> None:
    """The count follows the bytes exactly as far as protobuf would."""
    # Behind a field that is long enough to be counted at all.
    raw = delimited(1, delimited(1, b"x" * 3 * MAX_FIELDS)) + some
    try:
        inference_pb2.GenerateRequest.FromString(raw)
    except DecodeError:
        return
    require_few_fields(GENERATE, raw)


async def test_a_flood_of_empty_messages_is_refused_within_a_turn(tmp_path: Path) -> None:
    limits = LimitSettings(max_message_bytes=4 * 2**20)
    async with serving(tmp_path, limits=limits) as harness:
        call = harness.channel.unary_unary("/sage_fed.v1.InferenceService/Generate")
        with measured() as turns, pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(EMPTY_MESSAGES, timeout=WAIT_S)
    assert grpc.StatusCode.INVALID_ARGUMENT is raised.value.code()
    assert turns.longest_s < MOST_S


async def test_a_long_answer_is_translated_beside_the_loop(tmp_path: Path) -> None:
    """Unary and streamed, all of it."""
    jobs = ScriptedJobs(events=(STARTED, LONG, FINISHED))
    request = inference_pb2.GenerateRequest(job=types_pb2.JobSpec(text="?"))
    stream = inference_pb2.GenerateStreamRequest(job=request.job)
    async with serving(tmp_path, jobs=jobs) as harness:
        # Read as bytes: what the client makes of them is not the server's turn.
        raw = harness.channel.unary_unary(
            "/sage_fed.v1.InferenceService/Generate",
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
        )
        streamed = harness.channel.unary_stream(
            "/sage_fed.v1.InferenceService/GenerateStream",
            request_serializer=inference_pb2.GenerateStreamRequest.SerializeToString,
        )
        with measured() as turns:
            answer = await raw(request, timeout=WAIT_S)
            events = [event async for event in streamed(stream, timeout=WAIT_S)]
    assert turns.longest_s < MOST_S
    reply = inference_pb2.GenerateResponse.FromString(answer)
    assert [entry.token_id for entry in reply.logprobs] == list(LONG.token_ids)
    assert 20 == len(reply.logprobs[949].top)
    delta = inference_pb2.GenerateStreamResponse.FromString(events[1]).delta
    assert (reply.logprobs, reply.text) == (delta.logprobs, delta.text)


async def test_many_token_ids_are_read_in_the_turn_of_their_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its workers, which bound what they wait for; a few are read at once."""
    sizes: list[int] = []
    run = Workers.run

    async def seen(self: Workers, account: str, size: int, work: Callable[[], object]) -> object:
        assert "local" == account
        sizes.append(size)
        return await run(self, account, size, work)

    monkeypatch.setattr(Workers, "run", seen)
    ids = [i % 400 for i in range(100_000)]
    jobs = ScriptedJobs()
    async with serving(tmp_path, jobs=jobs) as harness:
        for num_ids in (100, len(ids)):
            asked = types_pb2.JobSpec(token_ids=types_pb2.TokenIds(ids=ids[:num_ids]))
            stub = inference_pb2_grpc.InferenceServiceStub(harness.channel)
            await stub.Quote(inference_pb2.QuoteRequest(job=asked), timeout=WAIT_S)
            assert (num_ids > 100) == len(sizes)
            assert tuple(ids[:num_ids]) == jobs.specs[-1].prompt.token_ids
    assert sizes[0] > 1000


async def test_a_long_answer_is_kept_and_replayed_beside_the_loop() -> None:
    """What is read is what was written, and the loop goes on meanwhile."""
    result = Result(STARTED, LONG, FINISHED)
    with Workers(max_calls=1, max_size=1) as workers, measured() as turns:
        data = await write_result(result, "robot", workers)
        again = await read_result(data, "robot", workers)
    assert (LONG, FINISHED) == (again.output, again.finished)
    assert again.started.replayed
    assert turns.longest_s < MOST_S
    longest = max(len(frame) for frame in _frames(data))
    assert longest < 40_000, "the interpreter's lock is held for a frame"


KEPT_2 = (
    '{"format":2,"started":{"job_id":"job-1","route":{"tier":"TIER","reason":"auto_simple",'
    '"requested":null,"downgraded":false},"held_uatp":9,"prompt_tokens":3,"seed":9223372036854775808'
    ',"max_new_tokens":16,"replayed":false},"output":{"text":"Gr\\u00fc\\u00df\\n","output_tokens":2},'
    '"finished":{"stop_reason":"cancelled","usage":{"prompt_tokens":3,"cached_tokens":1,'
    '"output_tokens":2,"by_phase":[["TIER","prefill",2],["TIER","cached",1],["TIER","decode",2]]},'
    '"timing":{"queue_s":0.1,"prefill_s":0.2,"decode_s":0.3,"time_to_first_token_s":0.4,'
    '"total_s":0.5,"device_s":0.6},"price":{"charged_uatp":5,"held_uatp":9,"rate_card":"card"},'
    '"balance_uatp":100}}\n{"token_ids":[1,2]}\n'
    '{"logprobs":[[1,-0.5,[[1,-0.5],[9,-1.0]]],[2,-0.25,[[2,-0.25],[9,-1.5]]]]}'
)
"""What the version before the wire's messages wrote, of a tier."""


@pytest.mark.parametrize("tier", [Tier.TACTICAL, Tier.called("deep")])
@pytest.mark.parametrize("version", [1, 2])
def test_what_an_earlier_version_kept_is_replayed(tier: Tier, version: int) -> None:
    """Lines of JSON, or one document with names; also of a tier that is neither of the roles."""
    kept = KEPT_2.replace("TIER", tier.name)
    if version == 1:
        head, *_ = kept.split("\n")
        kept = head.replace('"format":2', '"format":1').replace(
            '"output_tokens":2},"finished"',
            '"token_ids":[1,2],"logprobs":[{"token_id":1,"logprob":-0.5,"top":[[1,-0.5],[9,-1.0]]},'
            '{"token_id":2,"logprob":-0.25,"top":[[2,-0.25],[9,-1.5]]}],"output_tokens":2},"finished"',
        )
    logprobs = (
        Logprob(1, -0.5, ((1, -0.5), (9, -1.0))),
        Logprob(2, -0.25, ((2, -0.25), (9, -1.5))),
    )
    result = Result.from_bytes(kept.encode())
    assert Delta("Grüß\n", (1, 2), logprobs, 2) == result.output
    assert Route(tier, "auto_simple", None, draw_version=1) == result.started.route
    assert result.started.replayed
    assert Finished(
        StopReason.CANCELLED, Usage.single(tier, 3, 1, 2),
        Timing(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), Price(5, 9, "card"), 100,
    ) == result.finished  # fmt: skip


async def test_a_long_request_has_the_same_hash_wherever_it_is_made() -> None:
    """Or a retry would be taken for another job."""
    sampling = SamplingRequest()
    prompts = Prompt(messages=(Message("user", "x" * 100_000),)), Prompt(token_ids=(1, 2, 3))
    with Workers(max_calls=1, max_size=1) as workers:
        for prompt in prompts:
            spec = JobSpec("robot", prompt, client_request_id="r", sampling=sampling)
            key = RequestKey("robot", "r", payload_hashes(spec))
            assert key == await request_key(spec, workers)


@pytest.mark.parametrize("raw", [b"", b"\xff\xff"], ids=["refused", "malformed"])
async def test_a_refused_call_leaves_nothing_large_to_the_garbage_collector(
    tmp_path: Path, raw: bytes
) -> None:
    """A request may be a megabyte, and a flood of them would wait for a collection."""
    jobs = ScriptedJobs(refusals=[QueueFull("full", 1.0) for _ in range(4)])
    request = (
        raw or inference_pb2.GenerateRequest(job=types_pb2.JobSpec(text="?")).SerializeToString()
    )
    async with serving(tmp_path, jobs=jobs) as harness:
        call = harness.channel.unary_unary("/sage_fed.v1.InferenceService/Generate")

        async def ask() -> None:
            with pytest.raises(grpc.aio.AioRpcError):
                await call(request, timeout=WAIT_S)

        await ask()
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(3):  # gRPC holds the last one until the next
                await ask()
            gc.collect()
            kinds = (inference_pb2.GenerateRequest, SageFedError)
            ours = [f"{type(found)}" for found in gc.garbage if isinstance(found, kinds)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
    assert [] == ours
