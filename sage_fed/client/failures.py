"""gRPC errors as the error tree: the daemon's table, read backwards.

Owns the mapping from the reason code in ErrorInfo to the class of `errors.py`, and the reading of
gRPC's texts about connections, which are no interface: a text that is not known has the cause
`UNKNOWN`, and the tests make each of the others with real servers.
A status without our details (another server, a proxy, a broken connection) becomes
`CannotConnect` or `CallFailed`. Never fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import (  # type: ignore[import-untyped] # no marker in the wheel
    BadRequest,
    ErrorInfo,
    RetryInfo,
)
from grpc_status import rpc_status

from sage_fed import errors
from sage_fed.client.channel import Tls
from sage_fed.errors import CannotConnect, NoConnection, SageFedError


@dataclass(slots=True)
class _Details:
    """The details of a status, unpacked."""

    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    field_path: str = ""
    description: str = ""
    retry_after_s: float | None = None


def error_of(error: grpc.RpcError, address: str, tls: Tls | None = None) -> SageFedError:
    """Return the error that the daemon meant; `address` is where, and `tls` how it was asked."""
    # Every RpcError that a channel raises is also its Call; grpc's own types do not say so.
    call = cast("grpc.Call", error)
    code = call.code()
    message = call.details() or ""
    details = _details(call)
    if not details.reason:
        if code is grpc.StatusCode.UNAVAILABLE:
            return no_connection(message, address, tls)
        return errors.CallFailed(message or code.name.lower(), status=code.name)
    return _known(message, details) or errors.CallFailed(message, status=code.name)


def _known(message: str, details: _Details) -> SageFedError | None:
    match details.reason:
        case errors.InvalidField.reason:
            return errors.InvalidField(details.field_path, details.description)
        case errors.CannotAfford.reason:
            return errors.CannotAfford(
                message,
                account=details.metadata.get("account", ""),
                reason=details.metadata.get("detail", ""),
                retry_after_s=details.retry_after_s,
            )
        case errors.RateLimited.reason:
            return errors.RateLimited(
                message,
                account=details.metadata.get("account", ""),
                limit=details.metadata.get("limit", ""),
                allowed=_whole(details.metadata.get("allowed", "")),
                retry_after_s=details.retry_after_s,
            )
        case errors.DeadlineInfeasible.reason:
            return errors.DeadlineInfeasible(message, estimate_s=_seconds(details))
        case errors.HoldClosed.reason:
            return errors.HoldClosed(message, how=details.metadata.get("how", ""))
        case errors.Internal.reason:
            return errors.Internal(details.metadata.get("error_id", ""))
        case reason:
            for kind in _RETRYABLE:
                if reason == kind.reason:
                    return kind(message, details.retry_after_s)
            for plain in _PLAIN:
                if reason == plain.reason:
                    return plain(message)
            return None


def _whole(text: str) -> int:
    """The number of our own daemon; 0 for whatever else somebody sent."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else 0


def _seconds(details: _Details) -> float:
    try:
        return float(details.metadata["estimate_s"])
    except (KeyError, ValueError):
        return math.nan


_RETRYABLE: tuple[type[errors.Retryable], ...] = (
    errors.QueueFull,
    errors.TierUnavailable,
    errors.LedgerDown,
    errors.LedgerBlocked,
    errors.DeviceBusy,
)
_PLAIN: tuple[type[SageFedError], ...] = (
    errors.Unauthenticated,
    errors.Forbidden,
    errors.NoSuchAccount,
    errors.NotFound,
    errors.RequestIdConflict,
    errors.CalibrationRunning,
    errors.DeviceOutOfMemory,
    errors.NotFinite,
)


def _details(call: grpc.Call) -> _Details:
    """Read `grpc-status-details-bin`; what is not there or not readable stays empty."""
    found = _Details()
    try:
        status = rpc_status.from_call(call)
        _unpack(status.details if status is not None else (), found)
    except (ValueError, DecodeError):
        pass
    return found


def _unpack(details: Iterable[Any], found: _Details) -> None:
    for detail in details:
        if detail.Is(ErrorInfo.DESCRIPTOR):
            info = ErrorInfo.FromString(detail.value)
            found.reason, found.metadata = info.reason, dict(info.metadata)
        elif detail.Is(BadRequest.DESCRIPTOR):
            for violation in BadRequest.FromString(detail.value).field_violations:
                found.field_path, found.description = violation.field, violation.description
        elif detail.Is(RetryInfo.DESCRIPTOR):
            delay = RetryInfo.FromString(detail.value).retry_delay
            found.retry_after_s = delay.seconds + delay.nanos / 1e9


_NEVER_MADE = "failed to connect to all addresses"
"""How gRPC begins where there never was a connection; one that broke has no such words."""

_TEXTS = (
    ("Connection refused", NoConnection.NOBODY),
    ("No such file or directory", NoConnection.NOBODY),
    ("Hostname Verification Check failed", NoConnection.OTHER_NAME),
    ("WRONG_VERSION_NUMBER", NoConnection.PLAIN_TEXT),
    ("CERTIFICATE_VERIFY_FAILED", NoConnection.UNTRUSTED),
)

_WORDS: Mapping[NoConnection, str] = MappingProxyType(
    {
        NoConnection.NOBODY: "nobody listens there",
        NoConnection.HUNG_UP: (
            "it hung up before a word was said, as a daemon with TLS does on a client without"
        ),
        NoConnection.PLAIN_TEXT: "it does not speak TLS",
        NoConnection.UNTRUSTED: "its certificate is not to be trusted here",
        NoConnection.OTHER_NAME: "its certificate is for another name",
        NoConnection.CERTIFICATE_WANTED: "it hung up on a client that shows no certificate",
        NoConnection.CERTIFICATE_REFUSED: "it hung up on the certificate that it was shown",
    }
)


def no_connection(details: str, address: str, tls: Tls | None) -> CannotConnect:
    """Return the error for what gRPC said; `tls` is what the client tried it with."""
    cause = _cause(details, tls)
    why = _WORDS.get(cause)
    message = f"cannot connect to {address}: {why}" if why else None
    return CannotConnect(address, message, cause=cause)


def _cause(details: str, tls: Tls | None) -> NoConnection:
    if not details.startswith(_NEVER_MADE):
        return NoConnection.UNKNOWN
    for text, cause in _TEXTS:
        if text in details:
            return cause
    if "Socket closed" not in details:
        return NoConnection.UNKNOWN
    if tls is None:
        return NoConnection.HUNG_UP
    if tls.certificate is None:
        return NoConnection.CERTIFICATE_WANTED
    return NoConnection.CERTIFICATE_REFUSED
