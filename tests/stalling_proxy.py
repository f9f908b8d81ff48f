"""A TCP proxy whose connections can be frozen: nothing is passed on, and nobody is told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import Future
from typing import Self

CHUNK = 16 * 1024


class StallingProxy:
    """Listens on a free loopback port and passes on to `upstream`, on a thread of its own."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = host, int(port)
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._port: Future[int] = Future()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(20)
        self._loop.close()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self._port.result(20)}"

    def freeze(self) -> None:
        """Pass nothing on any more, in either direction; connections stay open."""
        self._loop.call_soon_threadsafe(self._flows.clear)

    def thaw(self) -> None:
        """Go on."""
        self._loop.call_soon_threadsafe(self._flows.set)

    async def _run(self) -> None:
        self._flows.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port.set_result(server.sockets[0].getsockname()[1])
        await self._stopping.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        self._writers |= {writer, up_writer}
        # Cancelled at the end, where asyncio would log it as a callback's failure.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(self._pass_on(reader, up_writer), self._pass_on(up_reader, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self._flows.wait()
                data = await reader.read(CHUNK)
                await self._flows.wait()
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()
