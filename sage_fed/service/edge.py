"""The one way in: the rule of the method, then parsing, then the method, then one ending.

Owns what every RPC has in common, so that no method can forget it: the caller is known, allowed
and counted before a byte of the request is parsed, an error becomes a status by the one table,
and only the client's own cancellation leaves a handler as CancelledError (any other would
leave the client waiting for a status for ever).
Does not know what the methods do, nor who may call them (`rules`).
Fails by aborting the RPC, never by raising.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status

from sage_fed.auth import Authenticator, Throttle, require_role
from sage_fed.core import Caller, Role, TraceContext, parse_traceparent
from sage_fed.errors import InvalidField, RateLimited, SageFedError
from sage_fed.service.rules import OPEN, RULES
from sage_fed.service.status import status_of
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
    trace: TraceContext | None = None


_log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]
UnaryMethod = Callable[[Any, Call], Awaitable[Message]]
StreamMethod = Callable[[Any, Call], AsyncGenerator[Message, None]]
Method = UnaryMethod | StreamMethod
Check = Callable[[Context], Call | None]
"""Lets a call in, or raises; None is a caller that nobody asked for."""


class Edge:
    """Builds a service's handlers from its methods.

    Args:
        authenticator: who calls.
        throttle: how often they may; None is as often as they like.
        certificates: whether every client has shown a certificate.
        on_denied: told why a call was not let in: a reason in lower case.
        tracing: traces each call; None traces none.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        *,
        throttle: Throttle | None = None,
        certificates: bool = False,
        on_denied: Callable[[str], None] = lambda _: None,
        tracing: Tracing | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._throttle = throttle
        self._certificates = certificates
        self._on_denied = on_denied
        self._tracing = tracing

    def check(self, path: str) -> Check:
        """Return what lets a call of this method in, by the rule that names it."""
        assert path in RULES, f"no rule names {path}"
        role = RULES[path]
        if role is OPEN:
            return lambda _: None
        return lambda context: self._identify(context, role)

    def handler(
        self, service: ServiceDescriptor, methods: Mapping[str, Method]
    ) -> grpc.GenericRpcHandler[Any, Any]:
        """Return the handler of a whole service; `methods` has one entry for each of its RPCs."""
        assert methods.keys() == {method.name for method in service.methods}, service.full_name
        return grpc.method_handlers_generic_handler(
            service.full_name,
            {
                method.name: self._method_handler(method, methods[method.name])
                for method in service.methods
            },
        )

    def _method_handler(
        self, descriptor: MethodDescriptor, method: Method
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Requests arrive as bytes: they are parsed here, after auth, not by gRPC before it."""
        assert not descriptor.client_streaming
        request_class = GetMessageClass(descriptor.input_type)
        path = f"/{descriptor.containing_service.full_name}/{descriptor.name}"
        check, counts = self.check(path), RULES[path] is Role.USER

        def enter(raw: bytes, context: Context, trace: TraceContext | None) -> tuple[Message, Call]:
            call = check(context)
            assert call is not None, "a method of ours has a caller"
            if trace is not None:
                call = replace(call, trace=trace)
            if counts:
                self._count_message(call.caller.account, len(raw))
            return parse(request_class, raw), call

        wrap = _streaming if descriptor.server_streaming else _unary
        name = f"{descriptor.containing_service.full_name}/{descriptor.name}"
        # A single reply is written like a stream of one, which is the same on the wire: gRPC's
        # own way of sending it logs a traceback where the connection breaks meanwhile.
        return grpc.unary_stream_rpc_method_handler(
            # The descriptor says which kind the method is.
            self._traced(name, wrap(enter, method)),  # type: ignore[arg-type]
            response_serializer=serialize,
        )

    def _traced(self, name: str, handle: Handler) -> Callable[[bytes, Context], Awaitable[None]]:
        """Give each call the caller's trace, and with tracing on a span of its own in it."""
        tracing = self._tracing

        async def handle_untraced(raw: bytes, context: Context) -> None:
            await handle(raw, context, _trace_of(context), None)

        async def handle_traced(raw: bytes, context: Context) -> None:
            assert tracing is not None
            with tracing.call(name, _trace_of(context)) as traced:
                await handle(raw, context, traced.context, traced)
                traced.ended("OK")

        return handle_untraced if tracing is None else handle_traced

    def _count_message(self, account: str, num_bytes: int) -> None:
        """Count what a message is beyond a call's: before it is parsed."""
        if self._throttle is None:
            return
        try:
            self._throttle.count_message(account, num_bytes)
        except RateLimited as error:
            self._on_denied(error.limit)
            raise

    def _identify(self, context: Context, role: Role) -> Call:
        arrived = time.monotonic()
        headers = [
            value for key, value in context.invocation_metadata() or () if key == "authorization"
        ]
        identities = tuple(context.peer_identities() or ()) if self._certificates else None
        try:
            caller = self._authenticator.caller(headers, identities)
            require_role(caller, role)
            # Operators get in while their robots are too loud.
            if self._throttle is not None and role is Role.USER:
                self._throttle.count(caller.account)
        except SageFedError as error:
            reason = error.limit if isinstance(error, RateLimited) else error.reason.lower()
            self._on_denied(reason)
            # Who knocks, for whoever looks for it; a flood of calls is no flood of lines otherwise.
            if _log.isEnabledFor(logging.DEBUG):
                _log.debug("not let in: %s, from %s", reason, context.peer())
            raise
        return Call(caller, arrived, context.time_remaining())


Enter = Callable[[bytes, Context, TraceContext | None], tuple[Message, Call]]
Handler = Callable[[bytes, Context, TraceContext | None, TracedCall | None], Awaitable[None]]


def _unary(enter: Enter, method: UnaryMethod) -> Handler:
    async def handle(
        raw: bytes, context: Context, trace: TraceContext | None, traced: TracedCall | None
    ) -> None:
        try:
            await context.write(await method(*enter(raw, context, trace)))
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the last line of defence
            await end(context, error, traced)

    return handle


def _streaming(enter: Enter, method: StreamMethod) -> Handler:
    # A coroutine that writes, not a generator that gRPC drives: so a cancellation during a
    # write is raised here, and the method is closed now and not when it is garbage.
    # The first write sends the response headers; a refusal before it leaves the RPC retryable.
    async def handle(
        raw: bytes, context: Context, trace: TraceContext | None, traced: TracedCall | None
    ) -> None:
        try:
            async with contextlib.aclosing(method(*enter(raw, context, trace))) as replies:
                async for reply in replies:
                    await context.write(reply)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the last line of defence
            await end(context, error, traced)

    return handle


def parse(request_class: type[M], raw: bytes) -> M:
    """Return a request that arrived; `InvalidField` where the bytes are none of its kind."""
    try:
        return request_class.FromString(raw)
    except DecodeError:
        message = f"not a {request_class.DESCRIPTOR.full_name} message"
        raise InvalidField("request", message) from None


async def end(context: Context, error: BaseException, traced: TracedCall | None = None) -> NoReturn:
    """Give the RPC its status, and tell its trace; raise only what tells gRPC that it is over."""
    if isinstance(error, grpc.aio.AbortError):
        raise error  # somebody has given it one already
    # A failed write is how a broken connection shows first: the call is dead, and gRPC will
    # know of it only later. There is nobody to tell, and nothing of ours to log.
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


def _trace_of(context: Context) -> TraceContext | None:
    """Return the caller's trace, where its headers have a well-formed one."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent" and isinstance(value, str):
            return parse_traceparent(value)
    return None


def _client_left(context: Context) -> bool:
    # gRPC cancels the handler's task when its client cancels or disconnects; a CancelledError
    # that leaked out of something awaited has not asked this task to cancel.
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling() > 0 or context.cancelled() or context.done()


def serialize(message: Message) -> bytes:
    """Return a reply as it travels."""
    return message.SerializeToString()
