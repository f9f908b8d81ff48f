"""A caller's trace: the W3C header `traceparent`, parsed.

Pure. What is not exactly such a header is no trace, and never an error: a caller's tracing must
not be able to fail its request.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Version 00, and later ones, which may append fields: https://www.w3.org/TR/trace-context/.
_TRACEPARENT = re.compile(
    "(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?",
    re.ASCII,
)
_SAMPLED = 0x01


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where in whose trace a request stands; ids in lower-case hexadecimal."""

    trace_id: str
    span_id: str
    sampled: bool


def parse_traceparent(header: str) -> TraceContext | None:
    """Return the context of a `traceparent` header; None for one that is malformed."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None or (header.startswith("00-") and len(header) != 55):
        return None
    trace_id, span_id, flags = match.groups()
    return TraceContext(trace_id, span_id, sampled=bool(int(flags, 16) & _SAMPLED))
