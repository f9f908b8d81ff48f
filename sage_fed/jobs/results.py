"""A settled job's whole answer as bytes, and back: what an idempotent replay returns.

Owns the format of the `result` column of the ledger (the wire's messages, versioned) and the hash
that says whether two requests are the same job. Fails with ValueError on bytes it did not write.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from sage_fed.core import (
    PAYLOAD_FIELDS,
    Answer,
    Delta,
    Finished,
    JobSpec,
    Logprob,
    Message,
    Mode,
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
from sage_fed.errors import CallFailed
from sage_fed.ledger import RequestKey
from sage_fed.v1 import inference_pb2
from sage_fed.wire.codec import decode, encode
from sage_fed.workers import Workers

_CODEC_FORMAT = b"\3"
"""The first byte: frames of the wire's messages follow, each behind its length.

The first is the answer without its tokens; the others are deltas of some tokens each, because the
library holds the interpreter's lock for a message, and a long answer is a megabyte.
"""

_JSON_FORMATS = (1, 2)
"""The formats before, which begin with a brace and are read as long as the books keep one: lines of
JSON. The first has one line, `Logprob` by names, and no usage by phase."""

_FIRST_DRAWS = 1
"""The draw's version of a result from before it was kept."""

_FRAME_TOKENS = 32
_LENGTH_BYTES = 4

_OTHER_BYTES = 4096
"""More than all of an answer takes that does not grow with it."""

_INLINE_SIZE = 1024
"""Numbers and characters that take a millisecond at most; more goes to a thread."""

_BYTES_PER_SIZE = 8
"""Of a kept answer, to one number."""


@dataclass(frozen=True, slots=True)
class Result:
    """One settled job, as its client saw it (or would have, had it stayed)."""

    started: Started
    output: Delta
    finished: Finished

    def to_bytes(self) -> bytes:
        """Return what `from_bytes` reads."""
        output = self.output
        head = encode(
            Answer(self.started, output.text, (), (), self.finished), inference_pb2.GenerateResponse
        )
        frames = [head.SerializeToString()]
        for at in range(0, len(output.token_ids), _FRAME_TOKENS):
            part = slice(at, at + _FRAME_TOKENS)
            tokens = replace(
                output,
                text="",
                token_ids=output.token_ids[part],
                logprobs=output.logprobs[part],
                origins=output.origins[part],
            )
            frames.append(encode(tokens, inference_pb2.Delta).SerializeToString())
        lengths = (len(frame).to_bytes(_LENGTH_BYTES, "big") for frame in frames)
        pieces = itertools.chain.from_iterable(zip(lengths, frames, strict=True))
        return _CODEC_FORMAT + b"".join(pieces)

    @classmethod
    def from_bytes(cls, data: bytes) -> Result:
        """Read what `to_bytes` wrote, or wrote before; the result is marked as replayed.

        Raises:
            ValueError: another format, or something that only a later version knows.
        """
        if data.startswith(b"{"):
            return _from_json(data)
        if not data.startswith(_CODEC_FORMAT):
            raise ValueError("a stored result of another format")
        first, *others = _frames(data)
        try:
            head = decode(Answer, inference_pb2.GenerateResponse.FromString(first))
            parts = [decode(Delta, inference_pb2.Delta.FromString(other)) for other in others]
        except CallFailed as error:
            raise ValueError("a stored result of a later version") from error
        token_ids = tuple(itertools.chain.from_iterable(part.token_ids for part in parts))
        logprobs = tuple(itertools.chain.from_iterable(part.logprobs for part in parts))
        origins = tuple(itertools.chain.from_iterable(part.origins for part in parts))
        route = head.started.route
        route = replace(route, draw_version=route.draw_version or _FIRST_DRAWS)
        return cls(
            started=replace(head.started, route=route, replayed=True),
            output=Delta(head.text, token_ids, logprobs, len(token_ids), origins),
            finished=head.finished,
        )


def _frames(data: bytes) -> Iterator[bytes]:
    at = len(_CODEC_FORMAT)
    while at < len(data):
        begin = at + _LENGTH_BYTES
        at = begin + int.from_bytes(data[at:begin], "big")
        yield data[begin:at]


def _from_json(data: bytes) -> Result:
    first, *others = data.split(b"\n")
    document: dict[str, Any] = json.loads(first)
    if document.get("format") not in _JSON_FORMATS:
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
    route = {"draw_version": _FIRST_DRAWS, **started.pop("route")}
    tier, requested = Tier.called(route.pop("tier")), route.pop("requested")
    requested = Tier.called(requested) if requested else None
    return Result(
        started=replace(
            Started(route=Route(tier=tier, requested=requested, **route), **started), replayed=True
        ),
        output=Delta(output["text"], tuple(token_ids), tuple(logprobs), output["output_tokens"]),
        finished=Finished(
            stop_reason=StopReason(finished["stop_reason"]),
            usage=_usage(tier, finished["usage"]),
            timing=Timing(**finished["timing"]),
            price=Price(**finished["price"]),
            balance_uatp=finished["balance_uatp"],
        ),
    )


def _usage(tier: Tier, plain: dict[str, Any]) -> Usage:
    """Return a kept usage; one from before there were stages is of one sequence on `tier`."""
    if "by_phase" not in plain:
        return Usage.single(tier, *plain.values())
    by_phase = tuple(
        PhaseTokens(Tier.called(name), Phase(phase), tokens)
        for name, phase, tokens in plain.pop("by_phase")
    )
    return Usage(**plain, by_phase=by_phase)


def _logprob(token_id: int, logprob: float, top: Sequence[Sequence[Any]]) -> Logprob:
    return Logprob(token_id, logprob, tuple((other, value) for other, value in top))


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


def most_answer_bytes(spec: JobSpec, max_new_tokens: int, most_text_bytes: int) -> int:
    """Return what the answer can take at most, as one message and as it is kept for a repeat.

    A token is its text, an id of five bytes and an origin of one with its part of a frame, and each
    of its log-probabilities an id, a double and their tags.
    """
    top = spec.sampling.top_logprobs
    num_logprobs = 0 if top is None else 1 + top
    return _OTHER_BYTES + max_new_tokens * (most_text_bytes + 7 + 20 * num_logprobs)


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
        case Mode():
            return value.value
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
