"""The channel's options, headers and serialisation."""

from __future__ import annotations

from google.protobuf.message import Message

OPTIONS: tuple[tuple[str, int], ...] = (
    # A whole answer with log-probabilities is larger than gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 64 * 2**20),
    # A daemon on this machine or this network is not reached through a web proxy.
    ("grpc.enable_http_proxy", 0),
)

DEFAULT_TIMEOUT_S = 30.0
"""For calls that are not a job."""


def metadata_of(token: str | None) -> tuple[tuple[str, str], ...]:
    """Return the headers that say who calls."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def serialize(message: Message) -> bytes:
    """Return a request as it travels."""
    return message.SerializeToString()
