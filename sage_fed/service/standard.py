"""RPCs that gRPC defines: its own servicers of health and reflection, as handlers.

Owns that they pass the edge's check, that their requests are parsed, and their errors become a
status, as those of our services do. gRPC itself would answer bytes that are no message with
UNKNOWN and a traceback in the log. Does not know what the servicers say.
Fails by aborting the RPC, never by raising.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from sage_fed.service.edge import Check, Context, end, parse, serialize

M = TypeVar("M", bound=Message)


def answering(
    check: Check, request_class: type[M], method: Callable[[M, Context], Awaitable[Message]]
) -> grpc.RpcMethodHandler[Any, Any]:
    """Serve a method that returns the one reply to its one request."""

    async def write(request: M, context: Context) -> None:
        await context.write(await method(request, context))

    return writing(check, request_class, write)


def writing(
    check: Check, request_class: type[M], method: Callable[[M, Context], Awaitable[None]]
) -> grpc.RpcMethodHandler[Any, Any]:
    """Serve a method that writes its replies itself."""

    async def handle(raw: bytes, context: Context) -> None:
        try:
            check(context)
            await method(parse(request_class, raw), context)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the last line of defence
            await end(context, error)

    return grpc.unary_stream_rpc_method_handler(handle, response_serializer=serialize)


def conversing(
    check: Check,
    request_class: type[M],
    method: Callable[[AsyncIterator[M], Context], AsyncGenerator[Message, None]],
) -> grpc.RpcMethodHandler[Any, Any]:
    """Serve a method that reads requests and yields replies."""

    async def handle(raws: AsyncIterator[bytes], context: Context) -> None:
        try:
            check(context)
            # After the check: gRPC's stream of requests, once asked for, wants to be read.
            requests = (parse(request_class, raw) async for raw in raws)
            async with contextlib.aclosing(method(requests, context)) as replies:
                async for reply in replies:
                    await context.write(reply)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the last line of defence
            await end(context, error)

    return grpc.stream_stream_rpc_method_handler(handle, response_serializer=serialize)
