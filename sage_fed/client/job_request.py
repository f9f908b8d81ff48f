"""A job as a client writes it down: `generate("...", tier=..., max_new_tokens=...)`.

Owns that shorthand for a JobSpec. Checks nothing that travels: the daemon is the judge. What
protobuf cannot carry is refused here, as `InvalidField` with the daemon's name of the field; a
keyword that does not exist is a `TypeError`, before anything is sent.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar, Unpack

from sage_fed.core import (
    TIER_ROLES,
    JobFields,
    JobSpec,
    Message,
    Priority,
    Prompt,
    SamplingRequest,
    Tier,
)
from sage_fed.errors import InvalidField
from sage_fed.v1 import types_pb2
from sage_fed.wire.codec import encode

T = TypeVar("T")

_TIERS = {"auto": None} | {tier.name: tier for tier in TIER_ROLES}
_PRIORITIES = {priority.name.lower(): priority for priority in Priority}
_SAMPLING = frozenset(field.name for field in fields(SamplingRequest))

PromptLike = JobSpec | Prompt | Sequence[Message] | str
"""A whole job, a prompt, a conversation, or one user turn."""


def job_of(prompt: PromptLike, **given: Unpack[JobFields]) -> types_pb2.JobSpec:
    """Return the message for a job; keyword arguments go with a prompt, not with a JobSpec.

    Raises:
        TypeError: a keyword that no job has, keywords beside a JobSpec, or what is no prompt, or no
            sequence of token ids.
        InvalidField: a value that protobuf cannot carry, or a word that names nothing.
    """
    _require_known(given)
    if not isinstance(prompt, JobSpec):
        named: dict[str, Any] = {"requested" if k == "tier" else k: v for k, v in given.items()}
        sampling = {name: named.pop(name) for name in _SAMPLING & named.keys()}
        spec = JobSpec("", prompt_of(prompt), sampling=SamplingRequest(**sampling), **named)
    elif given:
        raise TypeError(f"a JobSpec already says everything; put {', '.join(given)} into it")
    else:
        spec = prompt
    spec = replace(
        spec,
        requested=tier_of(spec.requested, "job.tier"),
        priority=_priority(spec.priority),
        sampling=replace(
            spec.sampling,
            stop=_stop_strings(spec.sampling.stop),
            stop_token_ids=_stop_token_ids(spec.sampling.stop_token_ids),
        ),
    )
    # The account is not sent: the daemon knows it from the token.
    return encode(spec, types_pb2.JobSpec, "job")


def prompt_of(prompt: object) -> Prompt:
    """Return what a `PromptLike` other than a whole job says.

    Raises:
        TypeError: it is none.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return Prompt(messages=(Message("user", prompt),))
    turns = tuple(prompt) if isinstance(prompt, Sequence) else (None,)
    if not all(isinstance(turn, Message) for turn in turns):
        raise TypeError("a prompt is a JobSpec, a Prompt, a sequence of Message or a str")
    return Prompt(messages=turns)


def tier_of(tier: Tier | str | None, field: str) -> Tier | None:
    """Return the tier that a word names, None for AUTO; `field` is its name in the request."""
    if tier is None or isinstance(tier, Tier):
        return tier
    return _meaning(_TIERS, tier, field)


def _require_known(given: Iterable[str]) -> None:
    """Raise the error of Python's own calls for a keyword that `JobFields` does not have."""
    names = JobFields.__annotations__
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean '{close[0]}'?" if close else f"a job has {', '.join(names)}"
            if "max_cost_uatp" in close:
                advice += " It is in micro-ATP: 5 ATP is 5_000_000"
            raise TypeError(f"got an unexpected keyword argument '{name}'; {advice}")


def _stop_strings(stop: object) -> tuple[str, ...]:
    """Return the strings; a lone one is not taken apart into its letters."""
    if isinstance(stop, str):
        return (stop,)
    if stop is None:
        return ()
    if not isinstance(stop, Sequence):
        raise InvalidField("job.sampling.stop", "must be a sequence of strings")
    return tuple(stop)


def _stop_token_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise TypeError(f"stop_token_ids is a sequence of token ids, such as (17,), not {ids!r}")
    return tuple(ids)


def _priority(priority: Priority | str | int) -> Priority:
    if priority in tuple(Priority):
        return Priority(priority)
    return _meaning(_PRIORITIES, priority, "job.priority")


def _meaning(words: Mapping[str, T], word: object, field: str) -> T:
    if not isinstance(word, str) or word not in words:
        raise InvalidField(field, f"must be one of {', '.join(words)}, not {word!r}")
    return words[word]
