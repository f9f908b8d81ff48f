"""The one table from error class to gRPC status, and the details that travel with it.

Owns the wording of errors on the wire: `google.rpc.Status` with ErrorInfo always, and
BadRequest, QuotaFailure or RetryInfo where a program can act on them (docs/architecture.md).
Does not know handlers. An error that has no row is our bug: the client gets a random id,
the log gets the story under the same id.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Mapping
from types import MappingProxyType

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import (  # type: ignore[import-untyped] # no marker in the wheel
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

TABLE: Mapping[type[SageFedError], grpc.StatusCode] = MappingProxyType(
    {
        errors.InvalidField: grpc.StatusCode.INVALID_ARGUMENT,
        errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
        errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
        errors.NoSuchAccount: grpc.StatusCode.PERMISSION_DENIED,
        errors.NotFound: grpc.StatusCode.NOT_FOUND,
        errors.CannotAfford: grpc.StatusCode.RESOURCE_EXHAUSTED,
        errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
        errors.RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
        errors.DeviceOutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
        errors.NotFinite: grpc.StatusCode.DATA_LOSS,
        errors.TierUnavailable: grpc.StatusCode.UNAVAILABLE,
        errors.LedgerDown: grpc.StatusCode.UNAVAILABLE,
        errors.LedgerBlocked: grpc.StatusCode.UNAVAILABLE,
        errors.DeadlineInfeasible: grpc.StatusCode.DEADLINE_EXCEEDED,
        errors.DeviceBusy: grpc.StatusCode.UNAVAILABLE,
        errors.RequestIdConflict: grpc.StatusCode.ALREADY_EXISTS,
        errors.CalibrationRunning: grpc.StatusCode.ALREADY_EXISTS,
        errors.HoldClosed: grpc.StatusCode.ABORTED,
        errors.CallEnded: grpc.StatusCode.ABORTED,
        # What gRPC's own servers say of a wrong number of requests.
        errors.NotOneRequest: grpc.StatusCode.UNIMPLEMENTED,
        errors.Internal: grpc.StatusCode.INTERNAL,
    }
)
"""Every other class never leaves the daemon as it is: its text may name internals."""

_log = logging.getLogger(__name__)


def status_of(error: BaseException) -> Status:
    """Return what the client is told; an unforeseen error is logged here, under its id."""
    code = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), None)
    if code is None or not isinstance(error, SageFedError):
        return status_of(_report(error))
    status = Status(code=code.value[0], message=_cut(error.message))
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
    metadata: dict[str, str] = {}
    match error:
        case errors.InvalidField():
            violation = BadRequest.FieldViolation(
                field=_cut(error.field), description=_cut(error.description), reason=error.reason
            )
            details.append(BadRequest(field_violations=[violation]))
        case errors.CannotAfford():
            quota = QuotaFailure.Violation(
                subject=f"account:{error.account}", description=_cut(error.message)
            )
            details.append(QuotaFailure(violations=[quota]))
            metadata = {"account": error.account, "detail": error.detail}
        case errors.RateLimited():
            metadata = {
                "account": error.account,
                "limit": error.limit,
                "allowed": str(error.allowed),
            }
        case errors.CallEnded():
            metadata = {"why": error.why}
        case errors.HoldClosed():
            metadata = {"how": error.how}
        case errors.DeadlineInfeasible():
            metadata = {"estimate_s": f"{error.estimate_s:.3f}"}
        case errors.Internal():
            metadata = {"error_id": error.error_id}
        case _:
            pass
    if isinstance(error, errors.Retryable) and error.retry_after_s is not None:
        details.append(RetryInfo(retry_delay=duration_of(error.retry_after_s)))
    details.append(ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    return details


def duration_of(seconds: float) -> Duration:
    """Return a Duration in [0, MAX_RETRY_S], rounded up to the millisecond."""
    bounded = min(max(seconds, 0.0), MAX_RETRY_S)
    milliseconds = math.ceil(bounded * 1000)
    return Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"
