"""The channel to a daemon, and gRPC's errors as the error tree.

Owns the address, encryption, options and headers; the mapping from the reason code in ErrorInfo to
the class of `errors.py`, the daemon's table read backwards; and the reading of gRPC's texts about
connections, which are no interface: a text that is not known has the cause `UNKNOWN`, and the tests
make each of the others with real servers. A status without our details (another server, a proxy, a
broken connection) becomes `CannotConnect` or `CallFailed`.
Fails with `InvalidField` for an address, a token or a file that gRPC would choke on in its own
words.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from sage_fed.errors import CallFailed, CannotConnect, InvalidField, NoConnection, SageFedError
from sage_fed.wire import error_status

_ADDRESS = re.compile(r"(?:\[(?P<ipv6>[^\[\]\s]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>\d{1,5})")

OPTIONS: tuple[tuple[str, int], ...] = (
    # A whole answer with log-probabilities is larger than gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 64 * 2**20),
    # A daemon on this machine or this network is not reached through a web proxy.
    ("grpc.enable_http_proxy", 0),
)

DEFAULT_TIMEOUT_S = 30.0
"""For calls that are not a job."""


@dataclass(frozen=True, slots=True)
class Tls:
    """How a daemon that speaks TLS is trusted, and what it is shown. Files in PEM.

    Attributes:
        ca: who may have signed the daemon's certificate; None is whom this system trusts.
        certificate: what the client shows, where the daemon asks for it; with `key`.
        key: its private key.
        name: the name in the daemon's certificate, where that is not the address's host.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    name: str | None = None


def open_channel(address: str, tls: Tls | None = None) -> grpc.Channel:
    """Return a channel to HOST:PORT or unix:/PATH; it connects with the first call.

    Raises:
        InvalidField: `address` is neither, or a file cannot be read.
    """
    if address.startswith("unix:"):
        if tls is not None:
            raise InvalidField("tls", "a Unix socket speaks plain text; use it without")
        if not re.fullmatch(r"unix:(//)?/[^\x00]+", address):
            raise InvalidField("address", f"must be unix:/PATH, not {address!r}")
        return grpc.insecure_channel(address, options=OPTIONS)
    match = _ADDRESS.fullmatch(address)
    if match is None or not _is_ipv6(match["ipv6"]) or not 1 <= int(match["port"]) <= 65535:
        raise InvalidField(
            "address",
            "must be HOST:PORT, such as 127.0.0.1:6590 or [::1]:6590, or unix:/PATH, "
            f"not {address!r}",
        )
    if tls is None:
        return grpc.insecure_channel(address, options=OPTIONS)
    named = (("grpc.ssl_target_name_override", tls.name),) if tls.name else ()
    return grpc.secure_channel(address, _credentials(tls), options=(*OPTIONS, *named))


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    if (tls.certificate is None) != (tls.key is None):
        missing = "tls_key" if tls.key is None else "tls_cert"
        raise InvalidField(missing, "a client certificate and its key come together")
    return grpc.ssl_channel_credentials(
        root_certificates=_read("tls_ca", tls.ca),
        private_key=_read("tls_key", tls.key),
        certificate_chain=_read("tls_cert", tls.certificate),
    )


def _read(field: str, path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise InvalidField(field, f"{path} cannot be read: {error.strerror}") from None


def leaves_machine(address: str) -> bool:
    """Whether what is sent to the address can be seen by others; an unknown name's can."""
    host = address.rpartition(":")[0].strip("[]")
    if address.startswith("unix:") or host.lower() == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def _is_ipv6(text: str | None) -> bool:
    """Whether it is one, or nothing was in brackets."""
    try:
        return text is None or bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


def metadata_of(token: str | None) -> tuple[tuple[str, str], ...]:
    """Return the headers that say who calls.

    Raises:
        InvalidField: the token cannot be a header; the text does not repeat it.
    """
    if token is None:
        return ()
    if not re.fullmatch("[!-~]+", token):
        raise InvalidField("token", "must be printable ASCII without spaces")
    return (("authorization", f"Bearer {token}"),)


def wait_serving(address: str, service: str, timeout_s: float) -> bool:
    """Wait until `service` is SERVING; False where it is not in time.

    Raises:
        SageFedError: the server refused the question.
    """
    with open_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=service), timeout=timeout_s, wait_for_ready=True
        )
        try:
            return any(reply.status == health_pb2.HealthCheckResponse.SERVING for reply in watch)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return False
            raise error_of(error, address) from None
        finally:
            watch.cancel()


def error_of(error: grpc.RpcError, address: str, tls: Tls | None = None) -> SageFedError:
    """Return the error that the daemon meant; `address` is where, and `tls` how it was asked."""
    # Every RpcError that a channel raises is also its Call; grpc's own types do not say so.
    call = cast("grpc.Call", error)
    code = call.code()
    message = call.details() or ""
    try:
        status = rpc_status.from_call(call)
        known = error_status.error_of(message, status.details) if status is not None else None
    except (ValueError, DecodeError):  # what is not readable is not the daemon's
        known = None
    if known is not None:
        return known
    if code is grpc.StatusCode.UNAVAILABLE:
        return no_connection(message, address, tls)
    return CallFailed(message or code.name.lower(), status=code.name)


_NEVER_MADE = "failed to connect to all addresses"
"""How gRPC begins where there never was a connection; one that broke has no such words."""

_TEXTS = (
    ("Connection refused", NoConnection.REFUSED),
    ("No such file or directory", NoConnection.REFUSED),
    ("Hostname Verification Check failed", NoConnection.OTHER_NAME),
    ("WRONG_VERSION_NUMBER", NoConnection.PLAIN_TEXT),
    ("CERTIFICATE_VERIFY_FAILED", NoConnection.UNTRUSTED),
)

_WORDS: Mapping[NoConnection, str] = MappingProxyType(
    {
        NoConnection.REFUSED: "no daemon listens there",
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
