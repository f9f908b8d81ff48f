"""Why a client has no connection: each cause made by a real server, and what is said about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from certificates import Files, authority, issue
from service_harness import in_thread, serving

from sage_fed.cli.exits import error_object, explain
from sage_fed.client import Client, Tls
from sage_fed.errors import CannotConnect, NoConnection
from sage_fed.service.tls import LiveCertificate


@dataclass(frozen=True, slots=True)
class Fleet:
    """A server's files, those of an accepted client, and a stranger's."""

    server: Files
    client: Files
    stranger: Files


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """Three authorities that know nothing of each other."""
    return Fleet(
        issue(tmp_path / "server", authority(), "127.0.0.1"),
        issue(tmp_path / "client", authority(), "arm.fleet"),
        issue(tmp_path / "stranger", authority(), "arm.fleet"),
    )


async def failure(tmp_path: Path, served: LiveCertificate | None, tls: Tls | None) -> CannotConnect:
    """The error of a client that connects with `tls` to a server with the certificate."""
    async with serving(tmp_path, certificate=served) as harness:

        def ask() -> None:
            with Client(harness.address, tls=tls) as client:
                client.status()

        with pytest.raises(CannotConnect) as raised:
            await in_thread(ask)
    assert raised.value.message.startswith(f"cannot connect to {harness.address}: ")
    return raised.value


def check(error: CannotConnect, cause: NoConnection, advice: str) -> None:
    """The cause, for programs as well, and advice that is not to start a daemon."""
    line = explain(error)
    assert cause is error.cause, line
    assert cause.value == error_object(error)["error"]["cause"]  # type: ignore[index]
    assert advice in line
    assert "is the daemon running?" not in line


async def test_plain_text_to_a_daemon_with_tls(tmp_path: Path, fleet: Fleet) -> None:
    """It is told to encrypt, whether or not the daemon wants a certificate too."""
    for client_ca in (None, fleet.client.ca):
        served = LiveCertificate(fleet.server.server(client_ca=client_ca))
        check(await failure(tmp_path, served, None), NoConnection.HUNG_UP, "--tls-ca FILE")


async def test_tls_to_a_daemon_without(tmp_path: Path, fleet: Fleet) -> None:
    """It is told to leave the options out."""
    error = await failure(tmp_path, None, fleet.server.client())
    check(error, NoConnection.PLAIN_TEXT, "leave out --tls")


async def test_a_daemon_whom_the_client_does_not_trust(tmp_path: Path, fleet: Fleet) -> None:
    """Another authority is one cause, another name a second."""
    served = LiveCertificate(fleet.server.server())
    error = await failure(tmp_path, served, fleet.stranger.client())
    check(error, NoConnection.UNTRUSTED, "--tls-ca FILE")
    error = await failure(tmp_path, served, Tls(fleet.server.ca, name="elsewhere.fleet"))
    check(error, NoConnection.OTHER_NAME, "--tls-name")


async def test_a_daemon_that_does_not_trust_the_client(tmp_path: Path, fleet: Fleet) -> None:
    """No certificate, or one that somebody else signed."""
    served = LiveCertificate(fleet.server.server(client_ca=fleet.client.ca))
    error = await failure(tmp_path, served, fleet.server.client())
    check(error, NoConnection.CERTIFICATE_WANTED, "--tls-cert and --tls-key")
    error = await failure(tmp_path, served, fleet.server.client(fleet.stranger))
    check(error, NoConnection.CERTIFICATE_REFUSED, "client_ca")


async def test_nobody_at_all(tmp_path: Path, fleet: Fleet) -> None:
    """A free port and a socket that is not there: then a daemon has to be started."""
    async with serving(tmp_path) as harness:
        free = harness.address
    places = ((free, None), (free, fleet.server.client()), (f"unix:{tmp_path}/no.sock", None))
    for address, tls in places:

        def ask(address: str = address, tls: Tls | None = tls) -> None:
            with Client(address, tls=tls) as client:
                client.status()

        with pytest.raises(CannotConnect) as raised:
            await in_thread(ask)
        assert NoConnection.REFUSED is raised.value.cause
        assert "no daemon listens there; is the daemon running?" in explain(raised.value)
