"""InferenceService: jobs in, events out.

Owns the shape of the answers: a stream event by event, or the same stream gathered into one
reply. Knows neither money nor tokens. Fails as the broker's stream does; a client that goes
away is passed on as `cancel`, and the job's own task settles what was made.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import TypeVar

from google.protobuf.message import Message

from sage_fed.core import Delta, Event, Finished, JobSpec
from sage_fed.errors import InvalidField
from sage_fed.service import replies
from sage_fed.service.edge import Call, Method
from sage_fed.service.ports import EventStream, Jobs
from sage_fed.service.requests import count_error, parse_count, parse_job, prompt_error
from sage_fed.settings import LimitSettings
from sage_fed.v1 import inference_pb2, types_pb2
from sage_fed.workers import Workers

M = TypeVar("M", bound=Message)

_INLINE_SIZE = 1024
"""What is translated in a millisecond at most; more in a thread."""

_IDS_PER_SIZE = 32
"""Token ids of a request that are read in about a microsecond."""


class InferenceService:
    """Generate, GenerateStream, Quote and CountTokens."""

    def __init__(self, jobs: Jobs, limits: LimitSettings, workers: Workers) -> None:
        self._jobs = jobs
        self._limits = limits
        self._workers = workers

    @property
    def methods(self) -> Mapping[str, Method]:
        """The service's RPCs by name."""
        return {
            "Generate": self.generate,
            "GenerateStream": self.generate_stream,
            "Quote": self.quote,
            "CountTokens": self.count_tokens,
        }

    async def generate(
        self, request: inference_pb2.GenerateRequest, call: Call
    ) -> inference_pb2.GenerateResponse:
        """Run a job and return its whole answer."""
        spec = await self._spec(request, call)
        stream = await self._submit(request, spec, call)
        try:
            started, output, finished = await stream.answer()
        finally:
            stream.cancel()
        return await self._translated(
            call, output.size, lambda: replies.answer_of(started, output, finished)
        )

    async def generate_stream(
        self, request: inference_pb2.GenerateStreamRequest, call: Call
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse, None]:
        """Run a job and stream its events; nothing is sent before the job is accepted."""
        spec = await self._spec(request, call)
        stream = await self._submit(request, spec, call)
        event: Event | None = None
        try:
            async for event in stream:
                if isinstance(event, Delta) and event.size > _INLINE_SIZE:
                    yield await self._translated(
                        call, event.size, functools.partial(replies.event_of, event)
                    )
                else:
                    yield replies.event_of(event)
        finally:
            # Reached with the job still running only if the client is gone.
            stream.cancel()
        assert isinstance(event, Finished), "the job's stream ended without an ending"

    async def quote(
        self, request: inference_pb2.QuoteRequest, call: Call
    ) -> inference_pb2.QuoteResponse:
        """Say what a job would cost at most and which route it would take."""
        with _named_as_in(request.job):
            # What waits for a thread is bounded there, and takes turns of its own.
            call.open_call.done()
            spec = await self._spec(request, call)
            return replies.quote_of(await self._jobs.quote(spec))

    async def count_tokens(
        self,
        request: inference_pb2.CountTokensRequest,
        call: Call,
    ) -> inference_pb2.CountTokensResponse:
        """Count a prompt's tokens as the tier's model would see them."""
        prompt, tier = parse_count(request, self._limits)
        call.open_call.done()
        try:
            num_tokens, max_context_tokens = await self._jobs.count_tokens(
                prompt, tier, call.caller.account
            )
        except InvalidField as error:
            raise count_error(error, request) from error
        return inference_pb2.CountTokensResponse(
            prompt_tokens=num_tokens, max_context_tokens=max_context_tokens
        )

    async def _translated(self, call: Call, size: int, translate: Callable[[], M]) -> M:
        """Return a reply, made in a thread where it is long."""
        if size <= _INLINE_SIZE:
            return translate()
        return await self._workers.run(call.caller.account, size, translate)

    async def _submit(
        self,
        request: inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest,
        spec: JobSpec,
        call: Call,
    ) -> EventStream:
        # The turn lasts until the job is admitted, or what was begun for it is undone: calls that
        # are given up as soon as they are made would otherwise be bounded by nothing.
        try:
            with _named_as_in(request.job):
                stream = await self._jobs.submit(spec, call.arrived)
        finally:
            call.open_call.done()
        call.open_call.keep(stream)
        return stream

    async def _spec(
        self,
        request: inference_pb2.GenerateRequest
        | inference_pb2.GenerateStreamRequest
        | inference_pb2.QuoteRequest,
        call: Call,
    ) -> JobSpec:
        # An absent job reads as an empty one, whose missing prompt is refused by name.
        job: types_pb2.JobSpec = request.job
        parse = functools.partial(
            parse_job,
            job,
            self._limits,
            account=call.caller.account,
            call_remaining_s=call.deadline_s,
            trace=call.trace,
            one_reply=isinstance(request, inference_pb2.GenerateRequest),
        )
        size = len(job.token_ids.ids) // _IDS_PER_SIZE
        if size <= _INLINE_SIZE:
            return parse()
        account = call.caller.account
        self._workers.require_room(account, size)
        return await self._workers.run(account, size, parse)


@contextlib.contextmanager
def _named_as_in(job: types_pb2.JobSpec) -> Iterator[None]:
    """Name a prompt's error as this job names its prompt: a text is a conversation below."""
    try:
        yield
    except InvalidField as error:
        raise prompt_error(error, job) from error
