"""A settled job's whole answer as bytes, and back: what an idempotent replay returns.

Owns the format of the `result` column of the ledger (JSON, versioned) and the hash that
says whether two requests are the same job. Fails with ValueError on bytes it did not write.

A long answer with its alternatives is a megabyte: it is written and read in a thread, a line of
JSON for some tokens each, because the library holds the interpreter's lock for a line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import Any

from sage_fed.core import (
    PAYLOAD_FIELDS,
    Delta,
    Finished,
    JobSpec,
    Logprob,
    Message,
    Phase,
    PhaseTokens,
    Price,
    Prompt,
    Route,
    Started,
    StopReason,
    Tier,
    Timing,
    Usage,
)
from sage_fed.ledger import RequestKey
from sage_fed.workers import Workers

_FORMAT = 2
_ONE_DOCUMENT = 1
"""The format before, which is read as long as the books keep one: one line, `Logprob` by names."""

_LINE_TOKENS = 32

_OTHER_BYTES = 4096
"""More than all of an answer takes that does not grow with it."""

_INLINE_SIZE = 1024
"""Numbers and characters that take a millisecond at most; more goes to a thread."""

_BYTES_PER_SIZE = 8
"""Of JSON, to one number."""


@dataclass(frozen=True, slots=True)
class Result:
    """One settled job, as its client saw it (or would have, had it stayed)."""

    started: Started
    output: Delta
    finished: Finished

    def to_bytes(self) -> bytes:
        """Return the JSON that `from_bytes` reads."""
        route, output = self.started.route, self.output
        head = {
            "format": _FORMAT,
            "started": {
                **asdict(self.started),
                "route": {
                    **asdict(route),
                    "tier": route.tier.name,
                    "requested": route.requested.name if route.requested else None,
                },
            },
            "output": {"text": output.text, "output_tokens": output.output_tokens},
            "finished": {
                **asdict(self.finished),
                "stop_reason": self.finished.stop_reason.value,
                "usage": _plain_usage(self.finished.usage),
            },
        }
        lines: list[object] = [head]
        lines += [{"token_ids": part} for part in _parts(output.token_ids)]
        lines += [
            {"logprobs": [(entry.token_id, entry.logprob, entry.top) for entry in part]}
            for part in _parts(output.logprobs)
        ]
        return b"\n".join(json.dumps(line, separators=(",", ":")).encode() for line in lines)

    @classmethod
    def from_bytes(cls, data: bytes) -> Result:
        """Read what `to_bytes` wrote; the result is marked as replayed.

        Raises:
            ValueError: another format.
        """
        first, *others = data.split(b"\n")
        document: dict[str, Any] = json.loads(first)
        if document.get("format") not in {_FORMAT, _ONE_DOCUMENT}:
            raise ValueError("a stored result of another format")
        started, output, finished = document["started"], document["output"], document["finished"]
        token_ids: list[int] = output.get("token_ids", [])
        logprobs = [
            _logprob(entry["token_id"], entry["logprob"], entry["top"])
            for entry in output.get("logprobs", [])
        ]
        for line in others:
            more: dict[str, Any] = json.loads(line)
            token_ids += more.get("token_ids", [])
            logprobs += [_logprob(*entry) for entry in more.get("logprobs", [])]
        route = started.pop("route")
        tier, requested = Tier.named(route.pop("tier")), route.pop("requested")
        return cls(
            started=replace(
                Started(
                    route=Route(
                        tier=tier,
                        requested=Tier.named(requested) if requested else None,
                        **route,
                    ),
                    **started,
                ),
                replayed=True,
            ),
            output=Delta(
                text=output["text"],
                token_ids=tuple(token_ids),
                logprobs=tuple(logprobs),
                output_tokens=output["output_tokens"],
            ),
            finished=Finished(
                stop_reason=StopReason(finished["stop_reason"]),
                usage=_usage(tier, finished["usage"]),
                timing=Timing(**finished["timing"]),
                price=Price(**finished["price"]),
                balance_uatp=finished["balance_uatp"],
            ),
        )


def _plain_usage(usage: Usage) -> dict[str, Any]:
    by_phase = [(done.tier.name, done.phase.value, done.tokens) for done in usage.by_phase]
    return {**asdict(usage), "by_phase": by_phase}


def _usage(tier: Tier, plain: dict[str, Any]) -> Usage:
    """Return a kept usage; one from before there were stages is of one sequence on `tier`."""
    if "by_phase" not in plain:
        return Usage.single(tier, *plain.values())
    by_phase = tuple(
        PhaseTokens(Tier.named(name), Phase(phase), tokens)
        for name, phase, tokens in plain.pop("by_phase")
    )
    return Usage(**plain, by_phase=by_phase)


async def write_result(result: Result, account: str, workers: Workers) -> bytes:
    """Return the result's bytes, made in a thread where it is long."""
    size = result.output.size
    if size <= _INLINE_SIZE:
        return result.to_bytes()
    return await workers.run(account, size, result.to_bytes)


async def read_result(data: bytes, account: str, workers: Workers) -> Result:
    """Return the result that the bytes say, read in a thread where it is long."""
    size = len(data) // _BYTES_PER_SIZE
    if size <= _INLINE_SIZE:
        return Result.from_bytes(data)
    return await workers.run(account, size, lambda: Result.from_bytes(data))


async def request_key(spec: JobSpec, workers: Workers) -> RequestKey:
    """Return by what the ledger knows the request, hashed in a thread where the prompt is long.

    Without a request id it is only whose it is.
    """
    if not spec.client_request_id:
        return RequestKey(spec.account)
    prompt = spec.prompt
    size = len(prompt.token_ids) + sum(len(message.content) for message in prompt.messages)
    if size <= _INLINE_SIZE * _BYTES_PER_SIZE:
        hashes = payload_hashes(spec)
    else:
        hashes = await workers.run(
            spec.account, size // _BYTES_PER_SIZE, lambda: payload_hashes(spec)
        )
    return RequestKey(spec.account, spec.client_request_id, hashes)


def most_reply_bytes(spec: JobSpec, max_new_tokens: int, most_text_bytes: int) -> int:
    """Return what the answer as one message can take at most.

    A token is its text, an id of five bytes, and each of its log-probabilities an id, a double and
    their tags.
    """
    return _OTHER_BYTES + max_new_tokens * (most_text_bytes + 5 + 20 * _num_logprobs(spec))


def most_result_bytes(spec: JobSpec, max_new_tokens: int, most_text_bytes: int) -> int:
    """Return what the answer can take at most as it is kept for a repeat.

    JSON escapes a byte of text in six, writes an id in 11 characters and a log-probability with
    its id in 40.
    """
    return _OTHER_BYTES + max_new_tokens * (6 * most_text_bytes + 11 + 40 * _num_logprobs(spec))


def _num_logprobs(spec: JobSpec) -> int:
    """Return how many log-probabilities each token of an answer comes with."""
    top = spec.sampling.top_logprobs
    return 0 if top is None else 1 + top


def payload_hashes(spec: JobSpec) -> tuple[bytes, ...]:
    """Return the hashes of what a request asks for, in every version, the current one first.

    Each is equal for two requests exactly if they ask for the same job. The current one is a byte
    of version and the SHA-256 of the `PAYLOAD_FIELDS` that the client named, as JSON.
    """
    named = {
        path: value
        for path in PAYLOAD_FIELDS
        if (value := attrgetter(path)(spec)) != attrgetter(path)(_NOTHING_NAMED)
    }
    text = json.dumps(named, default=_canonical, sort_keys=True, separators=(",", ":"))
    current = _HASH_VERSION + hashlib.sha256(text.encode()).digest()
    earlier = () if named.keys() - _FIELDS_1 else (_payload_hash_1(spec),)
    return current, *earlier


_HASH_VERSION = b"\2"
_NOTHING_NAMED = JobSpec("", Prompt())


def _canonical(value: object) -> object:
    match value:
        case Tier():
            return value.name
        case Message():
            return value.role, value.content
        case _:
            raise AssertionError(f"{value!r} has no canonical form")


_FIELDS_1 = frozenset(PAYLOAD_FIELDS[:20])
"""All that the first version knew; a request that names more cannot have been kept under it."""


def _payload_hash_1(spec: JobSpec) -> bytes:
    """Return the hash as ledgers kept it before it had a version: 32 bytes, of the job's `repr`.

    Frozen: the text is written out, whatever becomes of the classes. Ids of that time are forgotten
    after the ledger's retention, and this may go with them.
    """
    prompt, sampling = spec.prompt, spec.sampling
    messages = tuple(
        f"Message(role={message.role!r}, content={message.content!r})"
        for message in prompt.messages
    )
    listed = f"({messages[0]},)" if len(messages) == 1 else f"({', '.join(messages)})"
    tier = spec.requested
    requested = "None" if tier is None else f"<Tier.{tier.name.upper()}: {tier.name!r}>"
    text = (
        f"JobSpec(account={spec.account!r}, "
        f"prompt=Prompt(messages={listed}, token_ids={prompt.token_ids!r}), "
        f"requested={requested}, allow_downgrade={spec.allow_downgrade!r}, "
        f"max_cost_uatp={spec.max_cost_uatp!r}, complexity={spec.complexity!r}, "
        f"priority=<Priority.{spec.priority.name}: {spec.priority.value}>, client_request_id='', "
        f"sampling=SamplingRequest(temperature={sampling.temperature!r}, top_p={sampling.top_p!r}, "
        f"top_k={sampling.top_k!r}, min_p={sampling.min_p!r}, "
        f"repetition_penalty={sampling.repetition_penalty!r}, seed={sampling.seed!r}, "
        f"max_new_tokens={sampling.max_new_tokens!r}, stop={sampling.stop!r}, "
        f"ignore_eos={sampling.ignore_eos!r}, top_logprobs={sampling.top_logprobs!r}, "
        f"deadline_s={sampling.deadline_s!r}))"
    )
    if sampling.stop_token_ids:
        text += f" stop_token_ids={sampling.stop_token_ids!r}"
    return hashlib.sha256(text.encode()).digest()


def _parts(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """Return the values in pieces of a line."""
    return (values[i : i + _LINE_TOKENS] for i in range(0, len(values), _LINE_TOKENS))


def _logprob(token_id: int, logprob: float, top: Sequence[Sequence[Any]]) -> Logprob:
    return Logprob(token_id, logprob, tuple((other, value) for other, value in top))
