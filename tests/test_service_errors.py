"""Every row of the error table, through a real client over a real server."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import cast

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb2
from grpc_status import rpc_status
from service_harness import STARTED, WAIT_S, Harness, ScriptedJobs, in_thread, serving

from sage_fed import errors
from sage_fed.client import Client
from sage_fed.errors import SageFedError
from sage_fed.service import edge
from sage_fed.v1 import inference_pb2, types_pb2
from sage_fed.wire import error_status

STREAM = "/sage_fed.v1.InferenceService/GenerateStream"
QUOTE = "/sage_fed.v1.InferenceService/Quote"


def unary(harness: Harness, method: str, request: bytes) -> grpc.aio.UnaryUnaryCall[bytes, bytes]:
    return harness.channel.unary_unary(method)(request, timeout=WAIT_S)


def quote_request() -> bytes:
    return inference_pb2.QuoteRequest(job=types_pb2.JobSpec(text="hello")).SerializeToString()


def stream_request() -> bytes:
    job = types_pb2.JobSpec(text="hello")
    return inference_pb2.GenerateStreamRequest(job=job).SerializeToString()


ROWS: list[tuple[SageFedError, grpc.StatusCode, list[str]]] = [
    (
        errors.InvalidField("job.token_ids", "token 7 does not exist"),
        grpc.StatusCode.INVALID_ARGUMENT,
        ["BadRequest", "ErrorInfo"],
    ),
    (errors.Unauthenticated("no token"), grpc.StatusCode.UNAUTHENTICATED, ["ErrorInfo"]),
    (errors.Forbidden("not yours"), grpc.StatusCode.PERMISSION_DENIED, ["ErrorInfo"]),
    (errors.NoSuchAccount("robot"), grpc.StatusCode.PERMISSION_DENIED, ["ErrorInfo"]),
    (errors.NotFound("no such model"), grpc.StatusCode.NOT_FOUND, ["ErrorInfo"]),
    (
        errors.CannotAfford("costs 9", account="local", detail="balance", retry_after_s=2.5),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        ["QuotaFailure", "RetryInfo", "ErrorInfo"],
    ),
    (
        errors.CannotAfford("costs 9", account="local", detail="max_cost", retry_after_s=None),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        ["QuotaFailure", "ErrorInfo"],
    ),
    (
        errors.QueueFull("64 wait", 0.5),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        ["RetryInfo", "ErrorInfo"],
    ),
    (
        errors.DeadlineInfeasible("takes 9 s", estimate_s=9.125),
        grpc.StatusCode.DEADLINE_EXCEEDED,
        ["ErrorInfo"],
    ),
    (
        errors.TierUnavailable("loading", 3.0),
        grpc.StatusCode.UNAVAILABLE,
        ["RetryInfo", "ErrorInfo"],
    ),
    (errors.LedgerDown("closed", 1.0), grpc.StatusCode.UNAVAILABLE, ["RetryInfo", "ErrorInfo"]),
    (errors.RequestIdConflict("still runs"), grpc.StatusCode.ALREADY_EXISTS, ["ErrorInfo"]),
    (
        errors.HoldClosed("the hold was voided", how="voided"),
        grpc.StatusCode.ABORTED,
        ["ErrorInfo"],
    ),
    (errors.CalibrationRunning("one runs"), grpc.StatusCode.ALREADY_EXISTS, ["ErrorInfo"]),
    (errors.DeviceBusy("jobs run"), grpc.StatusCode.UNAVAILABLE, ["ErrorInfo"]),
    (errors.DeviceOutOfMemory("no memory"), grpc.StatusCode.RESOURCE_EXHAUSTED, ["ErrorInfo"]),
    (errors.Internal("c0ffee"), grpc.StatusCode.INTERNAL, ["ErrorInfo"]),
]


def row_id(row: object) -> str:
    return type(row).__name__ if isinstance(row, SageFedError) else ""


@pytest.mark.parametrize(("error", "code", "kinds"), ROWS, ids=row_id)
async def test_an_error_has_its_status_and_its_details(
    tmp_path: Path, error: SageFedError, code: grpc.StatusCode, kinds: list[str]
) -> None:
    """Each class has the table's status, its text and the details that a program acts on."""
    async with serving(tmp_path, jobs=ScriptedJobs(refusals=[error])) as harness:
        call = unary(harness, QUOTE, quote_request())
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        rich = await rpc_status.aio.from_call(call)
    assert (code, error.message) == (raised.value.code(), raised.value.details())
    assert kinds == [detail.type_url.rpartition(".")[2] for detail in rich.details]
    info = details_pb2.ErrorInfo()
    rich.details[-1].Unpack(info)
    assert (error.reason, "sage-fed") == (info.reason, info.domain)


@pytest.mark.parametrize(("error", "code", "kinds"), ROWS, ids=row_id)
async def test_the_client_gets_the_same_error_back(
    tmp_path: Path,
    error: SageFedError,
    code: grpc.StatusCode,  # noqa: ARG001 - the table above checks it
    kinds: list[str],  # noqa: ARG001
) -> None:
    """The Python client raises what the daemon raised: class, text and every value on it."""
    async with serving(tmp_path, jobs=ScriptedJobs(refusals=[error])) as harness:

        def ask() -> None:
            with Client(harness.address) as client:
                client.quote("hello")

        with pytest.raises(SageFedError) as raised:
            await in_thread(ask)
    assert type(error) is type(raised.value)
    assert vars(error) == vars(raised.value)


def test_every_error_has_a_row_or_stays_inside() -> None:
    """A new error class has to be given its status, or be named here as one that never travels."""
    inside = {
        errors.ConfigError, errors.ModelLoadError, errors.LedgerCorrupt, errors.LedgerUnusable,
        errors.Retryable, errors.CannotConnect, errors.CallFailed, errors.CannotWrite,
        errors.DeviceLost, errors.Occupied, errors.MachineFault,
    }  # fmt: skip

    def below(kind: type[SageFedError]) -> set[type[SageFedError]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    # Other parts may derive errors of their own that never travel (the CLI does).
    tree = {kind for kind in below(SageFedError) if kind.__module__ == errors.__name__}
    assert tree - {SageFedError} == error_status.TABLE.keys() | inside
    assert set() == error_status.TABLE.keys() & inside


@pytest.mark.parametrize(
    "bug",
    [
        RuntimeError("secret /home/robot/ledger.db"),
        errors.ConfigError("secret path"),
        errors.LedgerCorrupt("secret balance"),
        AssertionError("secret"),
        asyncio.CancelledError("secret"),
    ],
    ids=lambda bug: type(bug).__name__,
)
@pytest.mark.parametrize("method", [QUOTE, STREAM])
async def test_a_bug_is_internal_with_an_id_and_tells_no_secrets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bug: BaseException, method: str
) -> None:
    """The client gets INTERNAL and an id, also for a leaked CancelledError; the log the story."""
    caplog.set_level(logging.ERROR, "sage_fed.wire.error_status")
    async with serving(tmp_path, jobs=ScriptedJobs(refusals=[bug])) as harness:
        if method == QUOTE:
            call = unary(harness, QUOTE, quote_request())
        else:
            call = harness.channel.unary_stream(STREAM)(stream_request(), timeout=WAIT_S)
        assert grpc.StatusCode.INTERNAL is await call.code()
        text = await call.details()
        rich = await rpc_status.aio.from_call(call)
    info = details_pb2.ErrorInfo()
    rich.details[0].Unpack(info)
    error_id = info.metadata["error_id"]
    assert f"internal error {error_id}; the daemon's log has the details" == text
    assert b"secret" not in rich.SerializeToString()
    (record,) = caplog.records
    assert error_id in record.getMessage()
    assert record.exc_info is not None
    assert bug is record.exc_info[1]


async def test_a_job_that_fails_after_it_began_ends_with_a_status(tmp_path: Path) -> None:
    """A begun stream delivers what it has, then the status instead of Finished."""
    jobs = ScriptedJobs(events=(STARTED,), ending=errors.DeviceOutOfMemory("no memory"))
    async with serving(tmp_path, jobs=jobs) as harness:
        call = harness.channel.unary_stream(STREAM)(stream_request(), timeout=WAIT_S)
        first = inference_pb2.GenerateStreamResponse.FromString(await call.read())
        assert "started" == first.WhichOneof("event")
        assert grpc.StatusCode.RESOURCE_EXHAUSTED is await call.code()


async def test_a_stream_without_an_ending_is_our_bug(tmp_path: Path) -> None:
    """A client is never left to guess whether its answer is whole."""
    async with serving(tmp_path, jobs=ScriptedJobs(events=(STARTED,))) as harness:
        call = harness.channel.unary_stream(STREAM)(stream_request(), timeout=WAIT_S)
        await call.read()
        assert grpc.StatusCode.INTERNAL is await call.code()


async def test_bytes_that_are_no_message_are_the_clients_fault(tmp_path: Path) -> None:
    """Garbage in place of a request is INVALID_ARGUMENT, not an unknown server error."""
    async with serving(tmp_path) as harness:
        call = unary(harness, QUOTE, b"\xff\xff\xff")
        assert grpc.StatusCode.INVALID_ARGUMENT is await call.code()
        assert "request: not a sage_fed.v1.QuoteRequest message" == await call.details()


async def test_a_long_text_is_cut_and_still_arrives(tmp_path: Path) -> None:
    """An error text never outgrows the trailers: the status arrives, not a broken stream."""
    error = errors.NotFound("ü" * 100_000)
    async with serving(tmp_path, jobs=ScriptedJobs(refusals=[error])) as harness:
        call = unary(harness, QUOTE, quote_request())
        assert grpc.StatusCode.NOT_FOUND is await call.code()
        assert error_status.MAX_MESSAGE_CHARS == len(await call.details())


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, (0, 0)),
        (-1.0, (0, 0)),
        (0.0001, (0, 1_000_000)),
        (2.5, (2, 500_000_000)),
        (float("inf"), (int(error_status.MAX_RETRY_S), 0)),
    ],
)
def test_a_retry_delay_is_rounded_up_and_bounded(seconds: float, expected: tuple[int, int]) -> None:
    """A client that waits exactly as long as it was told never comes too early."""
    duration = error_status.duration_of(seconds)
    assert expected == (duration.seconds, duration.nanos)


class DeadCall:
    """A call whose client is gone before gRPC knows: it is not cancelled, and writing fails."""

    def cancelled(self) -> bool:
        """Not as far as gRPC knows."""
        return False

    def done(self) -> bool:
        """No status has been sent."""
        return False

    async def abort(self, *_: object) -> None:
        """Fail as core does."""
        raise grpc.aio.InternalError('Failed "execute_batch"')


@pytest.mark.parametrize("error", [grpc.aio.InternalError("write"), errors.NotFound("no such job")])
async def test_a_status_that_nobody_can_hear_is_no_error(
    caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """Whatever cannot be said to a dead call ends as the client's own cancellation."""
    with pytest.raises(asyncio.CancelledError):
        await edge.end(cast("edge.Context", DeadCall()), error)
    assert [] == caplog.records
