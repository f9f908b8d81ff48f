"""The channel: its address, encryption, options, headers, and waiting until a daemon serves.

Fails with `InvalidField` for an address, a token or a file that gRPC would choke on in its own
words.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sage_fed.client.failures import error_of
from sage_fed.errors import InvalidField

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


def serialize(message: Message) -> bytes:
    """Return a request as it travels."""
    return message.SerializeToString()


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
