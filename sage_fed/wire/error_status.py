"""The one table from error class to gRPC status, and the details that travel with it, both ways.

Owns the wording of errors on the wire: `google.rpc.Status` with ErrorInfo always, and
BadRequest, QuotaFailure or RetryInfo where a program can act on them (docs/architecture.md); and
what of an error's values the metadata of ErrorInfo carries, so that a client raises what the daemon
raised.
An error that has no row is our bug: the client gets a random id, the log gets the story under the
same id.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2  # type: ignore[import-untyped] # no marker in the wheel
from google.rpc.error_details_pb2 import (  # type: ignore[import-untyped] # as above
    BadRequest,
    ErrorInfo,
    QuotaFailure,
    RetryInfo,
)
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # as above

from sage_fed import errors
from sage_fed.errors import SageFedError

DOMAIN = "sage-fed"
"""`ErrorInfo.domain` of every error of ours."""

MAX_MESSAGE_CHARS = 500
"""Longer texts are cut: a status travels in HTTP/2 trailers, which clients bound to 8 KiB."""

MAX_RETRY_S = 10 * 365 * 86_400.0
"""Far beyond any client's patience, and well inside a protobuf Duration."""

TABLE: Mapping[type[SageFedError], int] = MappingProxyType(
    {
        errors.InvalidField: code_pb2.INVALID_ARGUMENT,
        errors.Unauthenticated: code_pb2.UNAUTHENTICATED,
        errors.Forbidden: code_pb2.PERMISSION_DENIED,
        errors.NoSuchAccount: code_pb2.PERMISSION_DENIED,
        errors.NotFound: code_pb2.NOT_FOUND,
        errors.CannotAfford: code_pb2.RESOURCE_EXHAUSTED,
        errors.QueueFull: code_pb2.RESOURCE_EXHAUSTED,
        errors.RateLimited: code_pb2.RESOURCE_EXHAUSTED,
        errors.DeviceOutOfMemory: code_pb2.RESOURCE_EXHAUSTED,
        errors.NotFinite: code_pb2.DATA_LOSS,
        errors.TierUnavailable: code_pb2.UNAVAILABLE,
        errors.LedgerDown: code_pb2.UNAVAILABLE,
        errors.LedgerBlocked: code_pb2.UNAVAILABLE,
        errors.DeadlineInfeasible: code_pb2.DEADLINE_EXCEEDED,
        errors.DeviceBusy: code_pb2.UNAVAILABLE,
        errors.RequestIdConflict: code_pb2.ALREADY_EXISTS,
        errors.CalibrationRunning: code_pb2.ALREADY_EXISTS,
        errors.HoldClosed: code_pb2.ABORTED,
        errors.CallEnded: code_pb2.ABORTED,
        # What gRPC's own servers say of a wrong number of requests.
        errors.NotOneRequest: code_pb2.UNIMPLEMENTED,
        errors.Internal: code_pb2.INTERNAL,
    }
)
"""Every other class never leaves the daemon as it is: its text may name internals."""

_CARRIED: Mapping[type[SageFedError], Mapping[str, type]] = MappingProxyType(
    {
        errors.CannotAfford: {"account": str, "detail": str},
        errors.RateLimited: {"account": str, "limit": str, "allowed": int},
        errors.CallEnded: {"why": str},
        errors.HoldClosed: {"how": str},
        errors.DeadlineInfeasible: {"estimate_s": float},
        errors.Internal: {"error_id": str},
    }
)
"""The values of an error that ErrorInfo carries."""

_log = logging.getLogger(__name__)


def status_of(error: BaseException) -> Status:
    """Return what the client is told; an unforeseen error is logged here, under its id."""
    code = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), None)
    if code is None or not isinstance(error, SageFedError):
        return status_of(_report(error))
    status = Status(code=code, message=_cut(error.message))
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


def _report(error: BaseException) -> errors.Internal:
    """Log an error of ours and return what stands for it on the wire."""
    error_id = secrets.token_hex(6)
    _log.error("internal error %s", error_id, exc_info=error)
    return errors.Internal(error_id)


def _details(error: SageFedError) -> list[Message]:
    """Return the machine-readable part, most specific first."""
    details: list[Message] = []
    if isinstance(error, errors.InvalidField):
        violation = BadRequest.FieldViolation(
            field=_cut(error.field), description=_cut(error.description), reason=error.reason
        )
        details.append(BadRequest(field_violations=[violation]))
    if isinstance(error, errors.CannotAfford):
        quota = QuotaFailure.Violation(
            subject=f"account:{error.account}", description=_cut(error.message)
        )
        details.append(QuotaFailure(violations=[quota]))
    if isinstance(error, errors.Retryable) and error.retry_after_s is not None:
        details.append(RetryInfo(retry_delay=duration_of(error.retry_after_s)))
    carried = {name: getattr(error, name) for name in _CARRIED.get(type(error), ())}
    metadata = {n: f"{v:.3f}" if isinstance(v, float) else str(v) for n, v in carried.items()}
    details.append(ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    return details


def error_of(message: str, details: Iterable[Any]) -> SageFedError | None:
    """Return the error that a status with these details stands for; None where it is not ours."""
    info, field, given = ErrorInfo(), BadRequest.FieldViolation(), dict[str, Any]()
    for detail in details:
        if detail.Is(ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(BadRequest.DESCRIPTOR):
            field = BadRequest.FromString(detail.value).field_violations[0]
        elif detail.Is(RetryInfo.DESCRIPTOR):
            delay = RetryInfo.FromString(detail.value).retry_delay
            given["retry_after_s"] = delay.seconds + delay.nanos / 1e9
    kind = next((kind for kind in TABLE if kind.reason == info.reason), None)
    if kind is None:
        return None
    if kind is errors.InvalidField:
        return errors.InvalidField(field.field, field.description)
    carried = _CARRIED.get(kind, {})
    given |= {name: _read(of, info.metadata.get(name, "")) for name, of in carried.items()}
    if kind is errors.Internal:
        return errors.Internal(given["error_id"])
    if issubclass(kind, errors.Retryable):
        given.setdefault("retry_after_s", None)
    return kind(message, **given)


def _read(kind: type, text: str) -> object:
    """Return a value of the metadata; what another server says may be no number."""
    if kind is int:
        return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else 0
    try:
        return kind(text)
    except ValueError:
        return math.nan


def duration_of(seconds: float) -> Duration:
    """Return a Duration in [0, MAX_RETRY_S], rounded up to the millisecond."""
    bounded = min(max(seconds, 0.0), MAX_RETRY_S)
    milliseconds = math.ceil(bounded * 1000)
    return Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"
