"""How a call enters and ends: its rule, its request, its method, its one status.

Owns what every RPC has in common, so that no method can forget it: one without a rule of who may
call it is not served; the caller is known, allowed and counted by the headers alone, before
anything of the request is received; a request's fields are counted in its bytes before an object
is made of any; an error becomes a status by the one table, and only the client's own cancellation
leaves a handler as CancelledError (any other would leave the client waiting for a status for ever).
To gRPC every method is a stream in and a stream out, which is the same on the wire: only so does
our code run before the request has arrived, and read it when it may
([why so](../../docs/decisions/0020-headers-first.md)).
Does not know what the methods do, nor how long they may take (`calls`).
Fails by aborting the RPC, never by raising.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc
from google.protobuf.descriptor import Descriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status

from sage_fed.auth import Authenticator, Throttle, require_role
from sage_fed.core import TIER_ROLES, Caller, Role, Tier, TraceContext, parse_traceparent
from sage_fed.errors import InvalidField, NotOneRequest, RateLimited, SageFedError, Unauthenticated
from sage_fed.service.calls import OpenCall, OpenCalls
from sage_fed.service.tls import names_in
from sage_fed.settings import LimitSettings
from sage_fed.v1 import admin_pb2, budget_pb2, inference_pb2, model_pb2
from sage_fed.wire import bounds
from sage_fed.wire.error_status import status_of

if TYPE_CHECKING:
    from sage_fed.tracing import Call as TracedCall
    from sage_fed.tracing import Tracing


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls, since when (`time.monotonic()`), and how long the call itself may last.

    `trace` is where in whose trace the call stands: its own span, or the caller's.
    """

    caller: Caller
    arrived: float
    deadline_s: float | None
    open_call: OpenCall
    trace: TraceContext | None = None


_log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
MAX_CONVERSATION = 256
"""Requests of one stream; a client that asks for a whole schema sends some dozens."""

Context = grpc.aio.ServicerContext[Any, Any]
Headers = Iterable[tuple[str, str | bytes]]
Work = Callable[[OpenCall, Call | None], Awaitable[None]]
"""What a call does once it is admitted; the caller is None where the method needs none."""


class Edge:
    """Builds a service's handlers from its methods.

    Args:
        authenticator: who calls.
        rules: full method name -> the role that it takes, `OPEN` for none.
        calls: counts what is open, and ends what takes too long.
        limits: of a request's fields.
        throttle: how often they may; None is as often as they like.
        certificates: whether every client has shown a certificate.
        on_denied: told why a call was denied: a reason in lower case.
        tracing: traces each call; None traces none.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        rules: Mapping[str, Role | None],
        calls: OpenCalls,
        limits: LimitSettings,
        *,
        throttle: Throttle | None = None,
        certificates: bool = False,
        on_denied: Callable[[str], None] = lambda _: None,
        tracing: Tracing | None = None,
        tiers: Sequence[Tier] = TIER_ROLES,
    ) -> None:
        self._tiers = tiers
        self._authenticator = authenticator
        self._rules = rules
        self._calls = calls
        self._limits = limits
        self._throttle = throttle
        self._certificates = certificates
        self._on_denied = on_denied
        self._tracing = tracing

    def handler(
        self, service: ServiceDescriptor, servicer: object
    ) -> grpc.GenericRpcHandler[Any, Any]:
        """Return the handler of a whole service: `servicer.get_load` is what serves `GetLoad`."""
        return grpc.method_handlers_generic_handler(
            service.full_name,
            {
                rpc.name: self.answering(
                    f"/{service.full_name}/{rpc.name}",
                    GetMessageClass(rpc.input_type),
                    getattr(servicer, re.sub("(?<!^)(?=[A-Z])", "_", rpc.name).lower()),
                    streams=rpc.server_streaming,
                    tracing=self._tracing,
                )
                for rpc in service.methods
            },
        )

    def answering(
        self,
        path: str,
        request_class: type[M],
        method: Callable[[M, Any], Any],
        *,
        streams: bool = False,
        tracing: Tracing | None = None,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Serve a method that returns the one reply to its one request, or that yields several."""

        async def work(open_call: OpenCall, call: Call | None) -> None:
            raw = await open_call.receive()
            if raw is None:
                raise NotOneRequest("this method takes one request, and none came")
            self._count_message(open_call, call, len(raw))
            request = parse(request_class, raw)
            bounds.check(request, self._limits, tiers=self._tiers)
            made = method(request, call)
            # Closed now, and not when it is garbage, where a write was cancelled or refused.
            # The first write sends the response headers; a refusal before it leaves the RPC
            # retryable.
            async with contextlib.aclosing(made if streams else _once(made)) as replies:
                async for reply in replies:
                    if streams and open_call.to_work.held:
                        # What else it writes is bounded as what is unread.
                        open_call.done()
                    await open_call.write(reply.SerializeToString())

        return self._serve(path, work, tracing)

    def conversing(
        self,
        path: str,
        request_class: type[M],
        method: Callable[[AsyncIterator[M], Any], AsyncGenerator[Message, None]],
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Serve a method that reads requests and yields replies."""

        async def requests(open_call: OpenCall, call: Call | None) -> AsyncIterator[M]:
            for num_received in range(MAX_CONVERSATION):
                raw = await open_call.receive(last=False)
                if raw is None:
                    return
                # Each message is a call, and has a turn of its own.
                self._count_message(open_call, call, len(raw), again=num_received > 0)
                yield parse(request_class, raw)
                open_call.done()  # its answer has been taken
            raise InvalidField(
                "request", f"a stream may have {MAX_CONVERSATION} requests; begin another one"
            )

        async def work(open_call: OpenCall, call: Call | None) -> None:
            async with contextlib.aclosing(method(requests(open_call, call), call)) as replies:
                async for reply in replies:
                    await open_call.write(reply.SerializeToString())

        return self._serve(path, work, None)

    def _serve(
        self, path: str, work: Work, tracing: Tracing | None
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Admit a call by the rule that names its method, do the work, and end it."""
        assert path in self._rules, f"no rule names {path}"
        role, name = self._rules[path], path.removeprefix("/")

        async def handle(context: Context, traced: TracedCall | None, headers: Headers) -> None:
            open_call = None
            try:
                arrived = time.monotonic()
                caller = None if role is OPEN else self._caller(context, headers, role)
                open_call = self._enter(context, caller, name)
                call = None
                if caller is not None:
                    trace = traced.context if traced is not None else _trace_of(headers)
                    call = Call(caller, arrived, context.time_remaining(), open_call, trace)
                await work(open_call, call)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the last line of defence
                await end(context, error, traced)
            finally:
                if open_call is not None:
                    self._calls.leave(open_call)

        # gRPC's stream of requests stays unused: what it reads, it reads when it likes.
        async def serve(_: object, context: Context) -> None:
            # gRPC has them as pairs; its stubs have a mapping.
            headers = context.invocation_metadata() or ()
            spanned = (
                tracing.call(name, _trace_of(headers)) if tracing else contextlib.nullcontext()
            )
            try:
                with spanned as span:
                    await handle(context, span, headers)
                    if span is not None:
                        span.ended("OK")
            except grpc.aio.AbortError as aborted:
                raise _bare(aborted)  # noqa: B904 - it is the same one

        # A single reply is written like a stream of one: gRPC's own way of sending it logs a
        # traceback where the connection breaks meanwhile.
        return grpc.stream_stream_rpc_method_handler(serve)

    def _count_message(
        self, open_call: OpenCall, call: Call | None, num_bytes: int, *, again: bool = False
    ) -> None:
        """Count what a user's message is beyond a call's, before it is parsed.

        The call itself was counted with its headers; `again` is a message after its first.
        """
        role = self._rules[f"/{open_call.method}"]
        if self._throttle is None or call is None or role is not Role.USER:
            return
        account = call.caller.account
        try:
            if again:
                self._throttle.count(account)
            self._throttle.count_message(account, num_bytes)
        except RateLimited as error:
            self._on_denied(error.limit)
            raise

    def _caller(self, context: Context, headers: Headers, role: Role) -> Caller:
        tokens = [value for key, value in headers if key == "authorization"]
        identities = names_in(context.auth_context()) if self._certificates else None
        try:
            caller = self._authenticator.caller(tokens, identities)
            require_role(caller, role)
            # Operators are admitted while their robots call too often.
            if self._throttle is not None and role is Role.USER:
                self._throttle.count(caller.account)
        except SageFedError as error:
            self._denied(context, error)
            if isinstance(error, Unauthenticated):
                self._calls.refused(context.peer())
            raise
        return caller

    def _enter(self, context: Context, caller: Caller | None, name: str) -> OpenCall:
        try:
            account = caller.account if caller is not None else None
            operator = caller is not None and caller.role is Role.ADMIN
            return self._calls.enter(account, context, name, operator=operator)
        except RateLimited as error:
            self._denied(context, error)
            raise

    def _denied(self, context: Context, error: SageFedError) -> None:
        reason = error.limit if isinstance(error, RateLimited) else error.reason.lower()
        self._on_denied(reason)
        # At debug only: many calls must not become many lines.
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("denied: %s, from %s", reason, context.peer())


async def _once(reply: Awaitable[Message]) -> AsyncGenerator[Message, None]:
    yield await reply


def parse(request_class: type[M], raw: bytes) -> M:
    """Return a request that arrived; `InvalidField` where the bytes are none of its kind."""
    # The stubs know two kinds of descriptors, of which one is the other's face.
    require_few_fields(request_class.DESCRIPTOR, raw)  # type: ignore[arg-type]
    try:
        return request_class.FromString(raw)
    except DecodeError:
        message = f"not a {request_class.DESCRIPTOR.full_name} message"
        raise InvalidField("request", message) from None


async def end(context: Context, error: BaseException, traced: TracedCall | None = None) -> NoReturn:
    """Give the RPC its status, and tell its trace; raise only what tells gRPC that it is over."""
    if isinstance(error, grpc.aio.AbortError):
        raise error  # it has a status already
    # A failed write is how a broken connection shows first: the call is dead, and gRPC will
    # know of it only later. No client is there to tell, and nothing of ours to log.
    if _client_left(context) or isinstance(error, grpc.aio.InternalError):
        if traced is not None:
            traced.ended("CANCELLED")
        raise asyncio.CancelledError from None
    status = rpc_status.to_status(status_of(error))
    if traced is not None:
        traced.ended(status.code.name)
    try:
        await context.abort(status.code, status.details, status.trailing_metadata)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def _bare(aborted: grpc.aio.AbortError) -> grpc.aio.AbortError:
    """Return what ends an aborted call without its frames, and without the error before it.

    gRPC keeps it with the call, which the frames lead back to: a request of a megabyte would be
    garbage that only a collection finds.
    """
    aborted.__context__ = None
    return aborted.with_traceback(None)


def _trace_of(headers: Headers) -> TraceContext | None:
    """Return the caller's trace, where its headers have a well-formed one."""
    for key, value in headers:
        if key == "traceparent" and isinstance(value, str):
            return parse_traceparent(value)
    return None


def _client_left(context: Context) -> bool:
    # gRPC cancels the handler's task when its client cancels or disconnects; a CancelledError
    # that leaked out of something awaited has not asked this task to cancel.
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling() > 0 or context.cancelled() or context.done()


OPEN = None
"""No caller is asked for."""


INFERENCE_SERVICE: ServiceDescriptor = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
BUDGET_SERVICE: ServiceDescriptor = budget_pb2.DESCRIPTOR.services_by_name["BudgetService"]
MODEL_SERVICE: ServiceDescriptor = model_pb2.DESCRIPTOR.services_by_name["ModelService"]
ADMIN_SERVICE: ServiceDescriptor = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]

INFERENCE: str = INFERENCE_SERVICE.full_name
SERVICES: tuple[str, ...] = tuple(
    service.full_name
    for service in (INFERENCE_SERVICE, BUDGET_SERVICE, MODEL_SERVICE, ADMIN_SERVICE)
)
"""Full names, as gRPC tools ask for them."""


MAX_FIELDS = 2048
"""Of one request, those of the messages in it included; counting them takes a millisecond.

A conversation of the most messages that `limits.max_messages` may allow has 1,536."""

_LEAST_FIELD_BYTES = 2
_MAX_VARINT_BYTES = 10
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_GROUPS = (3, 4)
_FIXED = {_FIXED64: 8, _FIXED32: 4}

Inner = Mapping[int, Descriptor]
"""Which fields of a message are messages."""


def require_few_fields(message: Descriptor, raw: bytes) -> None:
    """Refuse bytes of a message with more fields than any request of ours can have.

    Raises:
        InvalidField: there are more, or the bytes are no message at all.
    """
    if len(raw) <= MAX_FIELDS * _LEAST_FIELD_BYTES:
        return
    # What is still to be counted, the innermost last: where it ends, and what is in it.
    outer: list[tuple[int, Inner]] = []
    end, inner = len(raw), _inner(message)
    at = count = 0
    while True:
        if at == end:
            if not outer:
                return
            end, inner = outer.pop()
            continue
        count += 1
        if count > MAX_FIELDS:
            raise InvalidField("request", f"must have at most {MAX_FIELDS:,} fields")
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == _DELIMITED:
            length, at = _varint(raw, at)
            nested = inner.get(tag >> 3)
            if nested is None:
                at += length
            elif at + length <= end:
                outer.append((end, inner))
                end, inner = at + length, _inner(nested)
            else:
                raise _malformed()
        else:
            at = _behind(raw, at, kind)
        if at > end:
            raise _malformed()


@cache
def _inner(message: Descriptor) -> Inner:
    """Return the messages in a message; there are as many as the schema has."""
    return {
        field.number: field.message_type
        for field in message.fields
        if field.message_type is not None
    }


def _behind(raw: bytes, at: int, kind: int) -> int:
    """Return the place behind a number; a group's marks have none."""
    if kind == _VARINT:
        return _varint(raw, at)[1]
    if kind not in _FIXED and kind not in _GROUPS:
        raise _malformed()
    return at + _FIXED.get(kind, 0)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    if at < len(raw) and raw[at] < 0x80:
        return raw[at], at + 1
    value = shift = 0
    for i in range(at, min(at + _MAX_VARINT_BYTES, len(raw))):
        byte = raw[i]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, i + 1
        shift += 7
    raise _malformed()


def _malformed() -> InvalidField:
    return InvalidField("request", "not a protobuf message")
