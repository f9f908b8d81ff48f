"""10,000 messages made from the descriptors, over every RPC: never INTERNAL, never a wrong charge.

Hypothesis fills every field of every request with plausible values, extremes and rubbish, and now
and then sends bytes that are no message at all. Every call ends with a status that says what was
wrong with it, the daemon logs no traceback, and what the books have charged is exactly what the
answers said.

Run: python bench/fuzz.py [--count 10000]. Exit code 1 on any violation.
Writes bench/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import hypothesis
import report
from driven_daemon import START_S, TROUBLE, wait_ready
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import strategies as st
from rich.console import Console

from sage_fed.cli.demo import DemoDaemon
from sage_fed.cli.options import ledger_file
from sage_fed.core import TIER_ROLES
from sage_fed.ledger import check
from sage_fed.ledger.ledger_files import snapshot
from sage_fed.settings import LimitSettings
from sage_fed.v1 import admin_pb2, budget_pb2, inference_pb2, model_pb2
from sage_fed.wire import bounds

FLAGS = (
    "--set", "budget.initial_atp=900000000", "--set", "budget.capacity_atp=1000000000",
    "--set", "limits.max_new_tokens=6", "--set", "limits.default_new_tokens=4",
    "--log-level", "warning",
)  # fmt: skip
LIMITS = LimitSettings(max_new_tokens=6, default_new_tokens=4)
FILES = (inference_pb2, budget_pb2, model_pb2, admin_pb2, health_pb2, reflection_pb2)
FOR_USERS_ONLY = ("Drain",)
"""Asked without the operator's token: the answer to the right one is that the daemon leaves."""
ENDLESS = ("Watch", "Calibrate")
TIMEOUT_S = 20.0
GLANCE_S = 0.1
"""How long a call that need not end is listened to."""

FORBIDDEN = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE"})


@dataclass
class Tally:
    """What came back, and what must not have."""

    endings: Counter[tuple[str, str]] = field(default_factory=Counter)
    charged_uatp: int = 0
    sent: int = 0
    violations: list[str] = field(default_factory=list)


def methods() -> list[MethodDescriptor]:
    """Every RPC that the daemon serves."""
    return [
        method
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


def values(of: FieldDescriptor, depth: int, *, likely: bool) -> st.SearchStrategy[object]:
    """Values of one field: such as a client sends, or also its bounds and anything else."""
    if likely and (words := words_of(of)):
        return st.sampled_from(words)
    if not likely and (edges := edges_of(of)):
        return st.sampled_from(edges) | values_of_type(of, depth, likely=likely)
    return values_of_type(of, depth, likely=likely)


TIER_NAMES = tuple(tier.name for tier in TIER_ROLES)


def words_of(of: FieldDescriptor) -> tuple[str, ...]:
    """The words that a field takes, where it takes no others."""
    found = bounds.BOUNDS.get(f"{of.containing_type.name}.{of.name}", ())
    for bound in found:
        if isinstance(bound, bounds.OneOf):
            return bound.words
        if isinstance(bound, bounds.TierName):
            return TIER_NAMES
    return ()


def edges_of(of: FieldDescriptor) -> list[object]:
    """The bounds of a field, as the daemon's own table has them, and what is just beyond."""
    edges: list[object] = []
    for bound in bounds.BOUNDS.get(f"{of.containing_type.name}.{of.name}", ()):
        match bound:
            case bounds.Number(low=low):
                high = bounds.limit_of(bound.high, LIMITS)
                step = 1 if isinstance(high, int) else 1e-6
                edges += [low, high, high + step, *([low - step] if low or step < 1 else [])]
            case bounds.Count(low=low) if not of.is_repeated or bound.each:
                high = int(bounds.limit_of(bound.high, LIMITS))
                edges += ["x" * low, "x" * min(high, 5000), "x" * min(high + 1, 5000)]
            case bounds.OneOf() | bounds.TierName():
                edges += words_of(of)
    return edges


def values_of_type(of: FieldDescriptor, depth: int, *, likely: bool) -> st.SearchStrategy[object]:
    """Values of one field's type: such as a client sends, or the ends of the range and anything."""
    kind = FieldDescriptor
    match of.cpp_type:
        case kind.CPPTYPE_INT32 | kind.CPPTYPE_INT64:
            bits = 31 if of.cpp_type == kind.CPPTYPE_INT32 else 63
            usual = st.sampled_from([0, 1, 2, 5, 100])
            ends = st.sampled_from([-1, 2**bits - 1, -(2**bits)])
            return usual if likely else usual | ends | st.integers(-(2**bits), 2**bits - 1)
        case kind.CPPTYPE_UINT32 | kind.CPPTYPE_UINT64:
            bits = 32 if of.cpp_type == kind.CPPTYPE_UINT32 else 64
            usual = st.sampled_from([1, 2, 5])
            return usual if likely else usual | st.integers(0, 2**bits - 1) | st.just(2**bits - 1)
        case kind.CPPTYPE_DOUBLE | kind.CPPTYPE_FLOAT:
            width = 64 if of.cpp_type == kind.CPPTYPE_DOUBLE else 32
            usual = st.sampled_from([0.5, 1.0])
            return usual if likely else usual | st.just(-1.0) | st.floats(width=width)
        case kind.CPPTYPE_BOOL:
            return st.booleans()
        case kind.CPPTYPE_ENUM:
            usual = st.sampled_from([value.number for value in of.enum_type.values])
            return usual if likely else usual | st.sampled_from([-1, 99, 2**31 - 1])
        case kind.CPPTYPE_MESSAGE:
            return messages(of.message_type, depth + 1, likely=likely)
    if of.type == kind.TYPE_BYTES:
        return st.binary(max_size=64)
    usual = st.sampled_from(["count", "What is 12 plus 30?", "user", "local", "default-1"])
    if likely:
        return usual
    odd = ["", "../../etc", "\0", "\u202e\ud7ff\U0001f600", "x" * 5000, "a\nb", "{{ 7 * 7 }}"]
    return usual | st.sampled_from(odd) | st.text(max_size=40)


@st.composite
def messages(
    draw: st.DrawFn, descriptor: Descriptor, depth: int = 0, *, likely: bool = False
) -> Message:
    """A message of a type, with some of its fields."""
    message = GetMessageClass(descriptor)()
    # Few fields at once: with many, the first one that is out of range hides all others.
    share = draw(st.sampled_from([0.15] if likely else [0.15, 0.5, 0.95]))
    chosen = {
        draw(st.sampled_from(list(oneof.fields))).name
        for oneof in descriptor.oneofs
        if len(oneof.fields) > 1
    }
    for of in descriptor.fields:
        wanted = of.name in chosen or (depth == 0 and of.message_type is not None)
        if depth > 4 or not (wanted or draw(st.floats(0, 1)) < share):
            continue
        value = values(of, depth, likely=likely)
        if of.is_repeated:
            getattr(message, of.name).extend(draw(st.lists(value, min_size=1, max_size=3)))
        elif of.message_type is not None:
            getattr(message, of.name).CopyFrom(draw(value))
        else:
            setattr(message, of.name, draw(value))
    return message


@st.composite
def calls(draw: st.DrawFn) -> tuple[MethodDescriptor, bytes]:
    """An RPC and what is sent to it."""
    method = draw(st.sampled_from(sorted(methods(), key=lambda m: m.full_name)))
    if draw(st.integers(0, 15)) == 0:
        return method, draw(st.binary(max_size=200))
    raw = draw(messages(method.input_type, likely=draw(st.booleans()))).SerializeToString()
    if raw and draw(st.integers(0, 15)) == 0:
        at = draw(st.integers(0, len(raw) - 1))
        raw = raw[:at] + bytes([raw[at] ^ draw(st.integers(1, 255))]) + raw[at + 1 :]
    return method, raw


class Sender:
    """Sends one message after the other, and keeps what came of it."""

    def __init__(self, address: str, token: str, tally: Tally) -> None:
        self._channel = grpc.insecure_channel(address)
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._tally = tally

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def send(self, method: MethodDescriptor, raw: bytes) -> None:
        """One call, from its request to its status."""
        service = method.containing_service.full_name
        name = f"{service.split('.')[-1]}/{method.name}"
        path = f"/{service}/{method.name}"
        endless = method.name in ENDLESS
        options = {
            "timeout": GLANCE_S if endless else TIMEOUT_S,
            "metadata": () if method.name in FOR_USERS_ONLY else self._metadata,
        }
        replies: list[bytes] = []
        began_s = time.monotonic()
        try:
            if method.client_streaming:
                call = self._channel.stream_stream(path)(iter([raw]), **options)
            else:
                call = self._channel.unary_stream(path)(raw, **options)
            replies.extend(call)
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
            # A job's own deadline is refused at once where it cannot be met.
            stuck = not endless and time.monotonic() - began_s > TIMEOUT_S - 1.0
            if code in FORBIDDEN or stuck:
                details = f"{name} {raw.hex()}: {code}: {error.details()}"
                self._tally.violations.append(details)
        self._tally.sent += 1
        self._tally.endings[name, code] += 1
        if code == "OK":
            self._tally.charged_uatp += charged_uatp(method, replies)


def charged_uatp(method: MethodDescriptor, replies: Sequence[bytes]) -> int:
    """What an answer says that it cost; a repeated one was paid before."""
    if method.name == "Generate":
        (answer,) = (inference_pb2.GenerateResponse.FromString(raw) for raw in replies)
        return 0 if answer.started.replayed else answer.finished.price.charged_uatp
    if method.name == "GenerateStream":
        events = [inference_pb2.GenerateStreamResponse.FromString(raw) for raw in replies]
        if not events[0].started.replayed:
            return events[-1].finished.price.charged_uatp
    return 0


def fuzz(sender: Sender, count: int, seed: int) -> None:
    """Send `count` messages."""

    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.seed(seed)
    @hypothesis.given(calls())
    def one(call: tuple[MethodDescriptor, bytes]) -> None:
        sender.send(*call)

    one()


def main(count: int, seed: int, output: Path | None) -> int:
    """Run, check, report; the exit code."""
    tally = Tally()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sage-fed-fuzz-") as folder:
        state_dir = Path(folder)
        daemon = DemoDaemon(state_dir, *FLAGS)
        try:
            endpoint = daemon.endpoint(START_S)
            asyncio.run(wait_ready(endpoint))
            token = (state_dir / "admin.token").read_text().strip()
            sender = Sender(endpoint.listen, token, tally)
            fuzz(sender, count, seed)
            sender.close()
            daemon.check()
        finally:
            code = daemon.stop(60.0)
        if code != 0:
            tally.violations.append(f"the daemon left with {code}")
        log = (state_dir / "daemon.log").read_text()
        if TROUBLE.search(log):
            tally.violations.append(f"the daemon logged an error: {log[-2000:]}")
        books = check(ledger_file(state_dir))
        tally.violations += books.violations
        with snapshot(ledger_file(state_dir)) as (db, _):
            (spent,) = db.execute("SELECT coalesce(sum(discharged_uatp), 0) FROM account")
        if spent[0] != tally.charged_uatp:
            tally.violations.append(
                f"the books charged {spent[0]} uATP, the answers said {tally.charged_uatp}"
            )
    codes = Counter(code for _, code in tally.endings.elements())
    result = {
        "count": tally.sent,
        "seed": seed,
        "seconds": round(time.monotonic() - began_s, 1),
        "rpcs": len({name for name, _ in tally.endings}),
        "codes": dict(sorted(codes.items())),
        "endings": {f"{name}: {code}": n for (name, code), n in sorted(tally.endings.items())},
        "charged_uatp": tally.charged_uatp,
        "jobs_in_the_books": books.jobs,
        "violations": tally.violations[:100],
    }
    report.write("fuzz", result, output)
    console = Console(stderr=True)
    for violation in tally.violations[:20]:
        console.print(f"VIOLATION: {violation}", markup=False)
    console.print(f"{tally.sent} messages, {len(tally.violations)} violations", highlight=False)
    return 1 if tally.violations else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    sys.exit(main(given.count, given.seed, given.output))
