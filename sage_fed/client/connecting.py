"""Why there is no connection: what gRPC says about it, in words of ours.

Owns the reading of gRPC's texts, which are no interface: a text that is not known has the cause
`UNKNOWN`, and the tests make each of the others with real servers. Never fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sage_fed.client.channel import Tls
from sage_fed.errors import CannotConnect, NoConnection

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
