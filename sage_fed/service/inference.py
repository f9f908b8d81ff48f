"""InferenceService: jobs in, events out.

Owns the shape of the answers: a stream event by event, or the same stream gathered into one
reply; and the names of a prompt's errors, as each request names its prompt. Knows neither money
nor tokens. Fails with `InvalidField` on the request, otherwise as the job's stream does; a client
that goes away is passed on as `cancel`, and the job's own task settles what was made.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message

from sage_fed.core import (
    Answer,
    Delta,
    Event,
    Finished,
    JobSpec,
    Tier,
    TokenCount,
)
from sage_fed.errors import InvalidField
from sage_fed.service.edge import Call
from sage_fed.settings import LimitSettings
from sage_fed.v1 import inference_pb2, types_pb2
from sage_fed.wire.codec import decode, encode
from sage_fed.workers import Workers

if TYPE_CHECKING:
    from sage_fed.jobs import Broker, OutgoingStream

M = TypeVar("M", bound=Message)

JobRequest = (
    inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest | inference_pb2.QuoteRequest
)

_INLINE_SIZE = 1024
"""What is translated in a millisecond at most; more in a thread."""

_IDS_PER_SIZE = 32
"""Token ids of a request that are read in about a microsecond."""


class InferenceService:
    """Generate, GenerateStream, Quote and CountTokens."""

    def __init__(self, jobs: Broker, limits: LimitSettings, workers: Workers) -> None:
        self._jobs = jobs
        self._limits = limits
        self._workers = workers

    async def generate(
        self, request: inference_pb2.GenerateRequest, call: Call
    ) -> inference_pb2.GenerateResponse:
        """Run a job and return its whole answer."""
        stream = await self._submit(request, call)
        try:
            started, output, finished = await stream.answer()
        finally:
            stream.cancel()
        answer = Answer(started, output.text, output.token_ids, output.logprobs, finished)
        return await self._translated(
            call, output.size, lambda: encode(answer, inference_pb2.GenerateResponse)
        )

    async def generate_stream(
        self, request: inference_pb2.GenerateStreamRequest, call: Call
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse, None]:
        """Run a job and stream its events; nothing is sent before the job is accepted."""
        stream = await self._submit(request, call)
        event: Event | None = None
        try:
            async for event in stream:
                if isinstance(event, Delta) and event.size > _INLINE_SIZE:
                    yield await self._translated(call, event.size, functools.partial(_sent, event))
                else:
                    yield _sent(event)
        finally:
            # Reached with the job still running only if the client is gone.
            stream.cancel()
        assert isinstance(event, Finished), "the job's stream ended without an ending"

    async def quote(
        self, request: inference_pb2.QuoteRequest, call: Call
    ) -> inference_pb2.QuoteResponse:
        """Say what a job would cost at most and which route it would take."""
        # What waits for a thread is bounded there, and takes turns of its own.
        call.open_call.done()
        spec = await self._spec(request, call)
        with _named_as_in(request.job):
            return encode(await self._jobs.quote(spec), inference_pb2.QuoteResponse)

    async def count_tokens(
        self, request: inference_pb2.CountTokensRequest, call: Call
    ) -> inference_pb2.CountTokensResponse:
        """Count a prompt's tokens as the tier's model would see them."""
        asked = decode(JobSpec, request, account=call.caller.account)
        call.open_call.done()
        with _named_as_in(request):
            counted = await self._jobs.count_tokens(
                asked.prompt, asked.requested or Tier.TACTICAL, asked.account
            )
        return encode(TokenCount(*counted), inference_pb2.CountTokensResponse)

    async def _translated(self, call: Call, size: int, translate: Callable[[], M]) -> M:
        """Return a reply, made in a thread where it is long."""
        if size <= _INLINE_SIZE:
            return translate()
        return await self._workers.run(call.caller.account, size, translate)

    async def _submit(self, request: JobRequest, call: Call) -> OutgoingStream:
        spec = await self._spec(request, call)
        # The turn lasts until the job is admitted, or what was begun for it is undone: calls that
        # are given up as soon as they are made would otherwise be bounded by nothing.
        try:
            with _named_as_in(request.job):
                stream = await self._jobs.submit(spec, call.arrived)
        finally:
            call.open_call.done()
        call.open_call.keep(stream)
        return stream

    async def _spec(self, request: JobRequest, call: Call) -> JobSpec:
        size = len(request.job.token_ids.ids) // _IDS_PER_SIZE
        if size <= _INLINE_SIZE:
            return parse_job(request, self._limits, call)
        account = call.caller.account
        self._workers.require_room(account, size)
        return await self._workers.run(
            account, size, lambda: parse_job(request, self._limits, call)
        )


def parse_job(request: JobRequest, limits: LimitSettings, call: Call) -> JobSpec:
    """Return the job that a sound request describes, paid for by the caller."""
    return decode(
        JobSpec,
        request.job,
        account=call.caller.account,
        call_deadline_s=_call_deadline_s(call.deadline_s, limits),
        trace=call.trace,
        one_reply=isinstance(request, inference_pb2.GenerateRequest),
    )


def _call_deadline_s(remaining_s: float | None, limits: LimitSettings) -> float | None:
    """Return the call's deadline, unless it is so far away that it says nothing of the job."""
    if remaining_s is None or not remaining_s < limits.max_deadline_s:
        return None
    return max(remaining_s, 0.0)


def _sent(event: Event) -> inference_pb2.GenerateStreamResponse:
    return encode(event, inference_pb2.GenerateStreamResponse)


@contextlib.contextmanager
def _named_as_in(request: types_pb2.JobSpec | inference_pb2.CountTokensRequest) -> Iterator[None]:
    """Name a prompt's error as the request does: below, a text is a conversation of a job."""
    try:
        yield
    except InvalidField as error:
        field = error.field
        if request.WhichOneof("prompt") == "text" and field.startswith("job.chat"):
            field = "job.text"
        if isinstance(request, inference_pb2.CountTokensRequest):
            field = field.removeprefix("job.")
        raise InvalidField(field, error.description) from error
