"""A settled job's whole answer as bytes, and back: what an idempotent replay returns.

Owns the format of the `result` column of the ledger (JSON, versioned) and the hash that
says whether two requests are the same job. Fails with ValueError on bytes it did not write.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from sage_fed.core import (
    Delta,
    Finished,
    JobSpec,
    Logprob,
    Price,
    Route,
    Started,
    StopReason,
    Tier,
    Timing,
    Usage,
)

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Result:
    """One settled job, as its client saw it (or would have, had it stayed)."""

    started: Started
    output: Delta
    finished: Finished

    def to_bytes(self) -> bytes:
        """Return the JSON that `from_bytes` reads."""
        route = self.started.route
        document = {
            "format": _FORMAT,
            "started": {
                **asdict(self.started),
                "route": {
                    **asdict(route),
                    "tier": route.tier.value,
                    "requested": route.requested.value if route.requested else None,
                },
            },
            "output": asdict(self.output),
            "finished": {
                **asdict(self.finished),
                "stop_reason": self.finished.stop_reason.value,
            },
        }
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Result:
        """Read what `to_bytes` wrote; the result is marked as replayed.

        Raises:
            ValueError: another format.
        """
        document: dict[str, Any] = json.loads(data)
        if document.get("format") != _FORMAT:
            raise ValueError("a stored result of another format")
        started, output, finished = document["started"], document["output"], document["finished"]
        route = started.pop("route")
        requested = route.pop("requested")
        return cls(
            started=replace(
                Started(
                    route=Route(
                        tier=Tier(route.pop("tier")),
                        requested=Tier(requested) if requested else None,
                        **route,
                    ),
                    **started,
                ),
                replayed=True,
            ),
            output=Delta(
                text=output["text"],
                token_ids=tuple(output["token_ids"]),
                logprobs=tuple(
                    Logprob(
                        token_id=entry["token_id"],
                        logprob=entry["logprob"],
                        top=tuple((token_id, logprob) for token_id, logprob in entry["top"]),
                    )
                    for entry in output["logprobs"]
                ),
                output_tokens=output["output_tokens"],
            ),
            finished=Finished(
                stop_reason=StopReason(finished["stop_reason"]),
                usage=Usage(**finished["usage"]),
                timing=Timing(**finished["timing"]),
                price=Price(**finished["price"]),
                balance_uatp=finished["balance_uatp"],
            ),
        )


def payload_hash(spec: JobSpec) -> bytes:
    """Return 32 bytes that are equal for two requests exactly if they ask for the same job.

    The request id itself is left out; every other field counts, the account too.
    """
    canonical = repr(replace(spec, client_request_id=""))
    return hashlib.sha256(canonical.encode()).digest()
