"""RPCs that are open to everyone: gRPC's own servicers of health and reflection, as handlers.

Owns that their requests are parsed, and their errors become a status, as those of our services
do; there is no auth. gRPC itself would answer bytes that are no message with UNKNOWN and a
traceback in the log. Does not know what the servicers say.
Fails by aborting the RPC, never by raising.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from sage_fed.service.edge import Context, end, parse, serialize

M = TypeVar("M", bound=Message)


def answering(
    request_class: type[M], method: Callable[[M, Context], Awaitable[Message]]
) -> grpc.RpcMethodHandler[Any, Any]:
    """Serve a method that returns the one reply to its one request."""

    async def write(request: M, context: Context) -> None:
        await context.write(await method(request, context))

    return writing(request_class, write)


def writing(
    request_class: type[M], method: Callable[[M, Context], Awaitable[None]]
) -> grpc.RpcMethodHandler[Any, Any]:
    """Serve a method that writes its replies itself."""

    async def handle(raw: bytes, context: Context) -> None:
        try:
            await method(parse(request_class, raw), context)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the last line of defence
            await end(context, error)

    return grpc.unary_stream_rpc_method_handler(handle, response_serializer=serialize)


def conversing(
    request_class: type[M],
    method: Callable[[AsyncIterator[M], Context], AsyncGenerator[Message, None]],
) -> grpc.RpcMethodHandler[Any, Any]:
    """Serve a method that reads requests and yields replies."""

    async def handle(raws: AsyncIterator[bytes], context: Context) -> None:
        requests = (parse(request_class, raw) async for raw in raws)
        try:
            async with contextlib.aclosing(method(requests, context)) as replies:
                async for reply in replies:
                    await context.write(reply)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the last line of defence
            await end(context, error)

    return grpc.stream_stream_rpc_method_handler(handle, response_serializer=serialize)
