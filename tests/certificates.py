"""Certificates for tests: an authority of our own, and files as an operator has them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme

from sage_fed.client import Tls
from sage_fed.settings import TlsSettings


@dataclass(frozen=True, slots=True)
class Files:
    """A certificate, its key and who signed it, as files."""

    certificate: Path
    key: Path
    ca: Path

    def server(self, *, client_ca: Path | None = None) -> TlsSettings:
        """The daemon's settings."""
        return TlsSettings(certificate=self.certificate, key=self.key, client_ca=client_ca)

    def client(self, shown: Files | None = None) -> Tls:
        """A client that trusts the authority, and shows a certificate of its own."""
        if shown is None:
            return Tls(self.ca)
        return Tls(self.ca, shown.certificate, shown.key)

    def flags(self) -> tuple[str, ...]:
        """The same for a daemon's command line."""
        return (
            *("--set", f"tls.certificate={self.certificate}"),
            *("--set", f"tls.key={self.key}"),
        )


def authority() -> trustme.CA:
    """A new one."""
    return trustme.CA()


def issue(folder: Path, ca: trustme.CA, *names: str, common_name: str | None = None) -> Files:
    """Write a certificate for the names, over the one that is there, as a renewal does."""
    folder.mkdir(exist_ok=True)
    files = Files(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")
    issued = ca.issue_cert(*names, common_name=common_name)
    ca.cert_pem.write_to_path(files.ca)
    issued.private_key_pem.write_to_path(files.key)
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(files.certificate, append=number > 0)
    files.key.chmod(0o600)
    return files


def shown_at(address: str) -> bytes:
    """The certificate that a new connection is shown, in DER."""
    host, _, port = address.rpartition(":")
    pem = ssl.get_server_certificate((host, int(port)), timeout=20)
    return ssl.PEM_cert_to_DER_cert(pem)


def first_of(certificate: Path) -> bytes:
    """The first certificate of a file, in DER."""
    head, end = "-----BEGIN", "-----END CERTIFICATE-----"
    text = certificate.read_text()
    return ssl.PEM_cert_to_DER_cert(text[text.index(head) : text.index(end) + len(end)])
