"""The channel: its address, options, headers and serialisation.

Fails with `InvalidField` for an address or a token that gRPC would choke on in its own words.
"""

from __future__ import annotations

import ipaddress
import re

import grpc
from google.protobuf.message import Message

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


def open_channel(address: str) -> grpc.Channel:
    """Return a channel to HOST:PORT; it connects with the first call.

    Raises:
        InvalidField: `address` is no such pair.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not _is_ipv6(match["ipv6"]) or not 1 <= int(match["port"]) <= 65535:
        raise InvalidField(
            "address", f"must be HOST:PORT, such as 127.0.0.1:6590 or [::1]:6590, not {address!r}"
        )
    return grpc.insecure_channel(address, options=OPTIONS)


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
