"""What stands between the daemon and its target whatever its own code does.

Two counts. First what gRPC itself costs in Python: a server whose handler writes prepared messages
and does nothing else, asked by the client that costs nothing, one call at a time and 32 at once, on
asyncio's own event loop and on uvloop's. A call is six or seven completions, each of which crosses
from gRPC's thread to the event loop; nothing that is built on this server answers faster.

Then what it costs that the cores sleep between requests: one and the same piece of Python (a
prompt's encoding under a chat template) back to back, and after pauses like those between requests
and between tokens. On a machine that halts idle cores, virtual ones above all, everything that
follows a pause takes several times as long, and a request at concurrency 1 is a chain of pauses.

Run: python bench/transport_floor.py [--rounds 5] [--quick]. One minute.
Writes bench/results/transport_floor.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import grpc
import report
import uvloop
from direct import thread_cpu_s
from load_generator import LeanClient
from rich.console import Console
from rich.table import Table

from sage_fed.core import Message
from sage_fed.model_files import resolve_model
from sage_fed.text import Tokenizer

METHOD = "/Floor/Stream"
MESSAGE = b"\x12\x1e" + b"x" * 30
"""As long as a streamed token, and a delta to the client."""

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
CASES = ((1, 1, 400), (1, 3, 400), (32, 64, 64))
"""(calls at once, messages of each, calls of a round)."""

PAUSES_S = (0.0, 0.001, 0.003, 0.01)


def serve(loop: str, port: Queue[int]) -> None:
    """Serve until killed: a call's body is the number of messages it wants."""

    async def stream(body: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        for _ in range(int(body)):
            await context.write(MESSAGE)

    async def run() -> None:
        server = grpc.aio.server()
        handler = grpc.unary_stream_rpc_method_handler(stream)  # type: ignore[arg-type] # a coroutine that writes, as ours
        handlers = {"Stream": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Floor", handlers),))
        port.put(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())


def transport(rounds: int, shorter: int) -> list[dict[str, Any]]:
    """Both loops in turns, after a round that is not counted."""
    context = multiprocessing.get_context("spawn")
    servers, clients = {}, {}
    found: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for loop in LOOPS:
        port: Queue[int] = context.Queue()
        servers[loop] = context.Process(target=serve, args=(loop, port), daemon=True)
        servers[loop].start()
        clients[loop] = LeanClient(f"127.0.0.1:{port.get(timeout=60.0)}")
    try:
        for index, (many, messages, planned), loop in itertools.product(
            range(rounds + 1), CASES, LOOPS
        ):
            pid = servers[loop].pid
            assert pid is not None
            calls = max(many, planned // shorter)
            before = thread_cpu_s(pid)
            run = clients[loop].run(METHOD, [str(messages).encode()] * calls, many)
            spent = {tid: s - before.get(tid, 0.0) for tid, s in thread_cpu_s(pid).items()}
            if index:
                found.setdefault((loop, many, messages), []).append(
                    {
                        "first_us": statistics.median(r.first - r.sent for r in run.replies) * 1e6,
                        "total_us": statistics.median(r.end - r.sent for r in run.replies) * 1e6,
                        "loop_cpu_us_per_call": spent[pid] / calls * 1e6,
                        "other_cpu_us_per_call": (sum(spent.values()) - spent[pid]) / calls * 1e6,
                    }
                )
    finally:
        for loop, client in clients.items():
            client.close()
            servers[loop].terminate()
    return [
        {"loop": loop, "at_once": many, "messages": messages}
        | {key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]}
        for (loop, many, messages), runs in found.items()
    ]


def after_pauses(work: Callable[[], object], times: int) -> dict[str, float]:
    """Median microseconds of the same work after each pause, in turns."""
    taken: dict[float, list[float]] = {pause: [] for pause in PAUSES_S}
    for _ in range(times):
        for pause_s, kept in taken.items():
            if pause_s:
                time.sleep(pause_s)
            else:
                work()
            begun = time.perf_counter()
            work()
            kept.append(time.perf_counter() - begun)
    return {
        f"{pause * 1e3:g} ms": round(statistics.median(t) * 1e6, 1) for pause, t in taken.items()
    }


def show(transports: list[dict[str, Any]], pauses: dict[str, float]) -> None:
    """The two tables."""
    table = Table(*transports[0], title="gRPC alone: medians")
    for row in transports:
        table.add_row(*map(str, row.values()))
    after = Table(*pauses, title="one prompt's encoding after a pause of ..., us")
    after.add_row(*map(str, pauses.values()))
    console = Console(stderr=True, width=120)
    console.print(table)
    console.print(after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    shorter = 8 if given.quick else 1
    given.rounds = 1 if given.quick else given.rounds
    tokenizer = Tokenizer.load(resolve_model("bundled:demo-tactical"))
    question = (Message("user", "1234. 12 + 34 = ?"),)
    transports = transport(given.rounds, shorter)
    pauses = after_pauses(lambda: tokenizer.encode_messages(question), 400 // shorter)
    show(transports, pauses)
    body = {"rounds": given.rounds, "grpc": transports, "encoding_us_after_pause": pauses}
    report.write("transport_floor", body, given.output)
