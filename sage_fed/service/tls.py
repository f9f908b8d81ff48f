"""The server's certificate: read, proven, in use, and replaced without a restart.

Owns the files' contents while they are in use, and the proof that they work: a whole handshake
in memory, so that a file that cannot serve never replaces one that does. Connections that exist
keep the certificate that they began with; new ones get the newest.
Fails with `ConfigError`, which names the setting and the file.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from sage_fed.auth import Identity, NameKind
from sage_fed.errors import ConfigError
from sage_fed.settings import TlsSettings
from sage_fed.trusted_files import os_error, read_trusted

_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME: a machine may boot before it knows the time."""

_MAX_ROUNDS = 10
"""A handshake takes three."""


@dataclass(frozen=True, slots=True)
class Pems:
    """What the files hold, and until when the certificate is good (seconds since 1970)."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    expires_s: float


class LiveCertificate:
    """The certificate in use, by gRPC and by the metrics page.

    Raises:
        ConfigError: the files cannot be used.
    """

    def __init__(self, tls: TlsSettings) -> None:
        self._tls = tls
        self._pems, self._page = read_pems(tls)
        self._fresh: Pems | None = None

    @property
    def needs_clients(self) -> bool:
        """Whether clients have to show a certificate."""
        return self._tls.client_ca is not None

    @property
    def expires_s(self) -> float:
        """Until when it is good, in seconds since 1970."""
        return self._pems.expires_s

    def reload(self) -> None:
        """Read the files again and show them to every connection from now on. It blocks.

        Raises:
            ConfigError: they cannot be used; what was in use stays.
        """
        self._pems, self._page = read_pems(self._tls)
        self._fresh = self._pems

    def page(self) -> ssl.SSLContext:
        """Return what the next connection to the metrics page is served with."""
        return self._page

    def credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's side of it, which asks for a newer certificate at each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._pems),
            self._newest,  # type: ignore[arg-type] # None is documented, and not in the stubs
            require_client_authentication=self.needs_clients,
        )

    def _newest(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what to show from now on; None is what there is. Called in gRPC's threads."""
        # Handed over once: gRPC frees what it is given.
        fresh, self._fresh = self._fresh, None
        return None if fresh is None else _configuration(fresh)


def _configuration(pems: Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(pems.key, pems.certificate)], root_certificates=pems.client_ca
    )


_NAMES = {
    "peer_dns": NameKind.DNS,
    "peer_uri": NameKind.URI,
    "peer_email": NameKind.EMAIL,
    "peer_ip": NameKind.IP,
    "x509_common_name": NameKind.COMMON_NAME,
}
"""What gRPC calls the names in a certificate, by their kind."""

_ALTERNATIVES = "x509_subject_alternative_name"


def names_in(context: Mapping[str, Iterable[bytes]]) -> frozenset[Identity]:
    """Return the names in a peer's certificate, from what gRPC knows of the connection.

    A DNS name may be named without its kind, and where a certificate has no alternative names,
    so may its common name, as was the custom before there were any.
    """
    found: set[Identity] = set()
    alone = not any(True for _ in context.get(_ALTERNATIVES, ()))
    for key, kind in _NAMES.items():
        for raw in context.get(key, ()):
            # What is no text, or no address, is no name.
            with contextlib.suppress(ValueError):
                name = raw.decode()
                found.add(Identity.of(kind, name))
                if kind is NameKind.DNS or (kind is NameKind.COMMON_NAME and alone):
                    found.add(Identity.of(NameKind.PLAIN, name))
    return frozenset(found)


def read_pems(tls: TlsSettings) -> tuple[Pems, ssl.SSLContext]:
    """Read the files and prove that a client can trust them.

    Raises:
        ConfigError: one cannot be read, or they do not belong together.
    """
    assert tls.certificate is not None
    assert tls.key is not None
    certificate, key = _read("tls.certificate", tls.certificate), _read("tls.key", tls.key)
    client_ca = None if tls.client_ca is None else _read("tls.client_ca", tls.client_ca)
    context = _context(tls.certificate, tls.key)
    if tls.client_ca is not None:
        _require_certificates(tls.client_ca)
    expires_s = _prove(tls.certificate, context)
    # The proof names the files, and gRPC gets what was read from them.
    again = _read("tls.certificate", tls.certificate), _read("tls.key", tls.key)
    if (certificate, key) != again:
        raise ConfigError(f"tls.certificate {tls.certificate}: it changes while it is read")
    return Pems(certificate, key, client_ca, expires_s), context


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return a context that shows the certificate; `ConfigError` where it cannot."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, _no_passphrase)
    except OSError as error:  # which an SSLError is
        raise ConfigError(
            f"tls.certificate {certificate} with tls.key {key}: {_words(error)}; expected PEM, "
            "the key without a passphrase and of this certificate"
        ) from None
    return context


def _require_certificates(client_ca: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(client_ca)
    except OSError as error:  # which an SSLError is
        raise ConfigError(
            f"tls.client_ca {client_ca}: {_words(error)}; expected certificates in PEM"
        ) from None


def _prove(certificate: Path, server: ssl.SSLContext) -> float:
    """Shake hands with ourselves; return when the certificate expires."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        client.load_verify_locations(certificate)
        ends = (
            client.wrap_bio(to_client, to_server),
            server.wrap_bio(to_server, to_client, server_side=True),
        )
        done: set[ssl.SSLObject] = set()
        for _ in range(_MAX_ROUNDS):
            for end in ends:
                try:
                    end.do_handshake()
                    done.add(end)
                except ssl.SSLWantReadError:
                    continue  # it waits for the other end
    except OSError as error:  # which an SSLError is
        raise ConfigError(
            f"tls.certificate {certificate}: no client could trust it: {_words(error)}"
        ) from None
    assert len(done) == len(ends), "a handshake with ourselves takes three rounds"
    shown = ends[0].getpeercert()
    assert shown is not None
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


def _read(key: str, path: Path) -> bytes:
    try:
        return read_trusted(key, path)
    except OSError as error:
        raise os_error(f"{key}: {path} cannot be read", error) from None


def _words(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message)
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error).replace("_", " ").lower()
    return str(error.strerror)


def _no_passphrase() -> str:
    """Asked for where the key has one; gRPC could not read it, and a daemon has no terminal."""
    return ""
