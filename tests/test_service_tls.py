"""TLS on a real port: who is trusted, and certificates that change while it runs."""

from __future__ import annotations

import asyncio
import socket
import ssl
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from certificates import Files, authority, first_of, issue, shown_at
from service_harness import ScriptedJobs, in_thread, serving

from sage_fed.auth import Certificate, Register
from sage_fed.client import Client, Tls, leaves_machine
from sage_fed.core import Caller, Role
from sage_fed.errors import CannotConnect, ConfigError, Forbidden, InvalidField, Unauthenticated
from sage_fed.service.tls import LiveCertificate

ROBOT = Caller("robot", Role.USER)


async def test_a_client_that_trusts_the_authority_is_served(tmp_path: Path) -> None:
    """Encrypted, with a token; the caller is the token's."""
    server = issue(tmp_path / "server", authority(), "127.0.0.1")
    async with serving(
        tmp_path, anonymous=None, certificate=LiveCertificate(server.server())
    ) as harness:

        def ask() -> list[str]:
            with Client(harness.address, "robot-token", tls=server.client()) as client:
                client.generate("hello")
            return [spec.account for spec in harness.jobs.specs]

        assert ["robot"] == await in_thread(ask)


async def test_a_daemon_that_cannot_prove_who_it_is_is_not_talked_to(tmp_path: Path) -> None:
    """Another authority, another name, or no TLS at all: no token is sent."""
    server = issue(tmp_path / "server", authority(), "127.0.0.1")
    stranger = issue(tmp_path / "stranger", authority(), "127.0.0.1")
    async with serving(tmp_path, certificate=LiveCertificate(server.server())) as harness:

        def ask() -> None:
            doubtful = (stranger.client(), Tls(server.ca, name="elsewhere.fleet"), None)
            for tls in doubtful:
                with (
                    Client(harness.address, "robot-token", tls=tls) as client,
                    pytest.raises(CannotConnect),
                ):
                    client.status()

        await in_thread(ask)
        assert [] == harness.denied


async def test_a_renewed_certificate_is_shown_to_new_connections_and_old_ones_live(
    tmp_path: Path,
) -> None:
    """A stream that runs over the old certificate goes on; the next handshake sees the new one."""
    ca = authority()
    server = issue(tmp_path / "server", ca, "127.0.0.1")
    live = LiveCertificate(server.server())
    jobs = ScriptedJobs(hang=True)
    async with serving(tmp_path, certificate=live, jobs=jobs) as harness:
        old = Client(harness.address, tls=server.client())
        events = old.stream("hello")
        await in_thread(lambda: next(events))
        assert first_of(server.certificate) == await in_thread(lambda: shown_at(harness.address))

        issue(tmp_path / "server", ca, "127.0.0.1", common_name="renewed")
        await in_thread(live.reload)
        renewed = first_of(server.certificate)
        seen = [await in_thread(lambda: shown_at(harness.address)) for _ in range(3)]
        assert [renewed] * 3 == seen

        assert not jobs.streams[0].cancelled.is_set()
        await in_thread(old.status)
        await in_thread(lambda: next(events))
        await in_thread(old.close)
        await asyncio.wait_for(jobs.streams[0].cancelled.wait(), 20)


async def test_a_new_authority_of_clients_holds_from_the_next_connection_on(
    tmp_path: Path,
) -> None:
    """Who signs clients' certificates is read again with the rest."""
    ca, first, second = authority(), authority(), authority()
    server = issue(tmp_path / "server", ca, "127.0.0.1")
    before, after = (
        issue(tmp_path / name, signer, "arm.fleet")
        for name, signer in (("before", first), ("after", second))
    )
    live = LiveCertificate(server.server(client_ca=before.ca))
    register = Register(certificates=(Certificate("arm.fleet", ROBOT),))
    async with serving(tmp_path, certificate=live, register=register) as harness:

        def reaches(shown: Files) -> bool:
            with Client(harness.address, tls=server.client(shown)) as client:
                try:
                    client.status()
                except CannotConnect:
                    return False
                return True

        assert [True, False] == [await in_thread(lambda f=f: reaches(f)) for f in (before, after)]
        second.cert_pem.write_to_path(before.ca)
        await in_thread(live.reload)
        assert [False, True] == [await in_thread(lambda f=f: reaches(f)) for f in (before, after)]


async def test_a_client_certificate_says_who_calls(tmp_path: Path) -> None:
    """Its name is an account's; unknown names and clients without one are let in by nothing."""
    ca, clients = authority(), authority()
    server = issue(tmp_path / "server", ca, "127.0.0.1")
    arm = issue(tmp_path / "arm", clients, "arm.fleet")
    boss = issue(tmp_path / "boss", clients, "boss@fleet.example")
    guest = issue(
        tmp_path / "guest",
        clients,
        *("guest.fleet", "guest@fleet.example", "10.6.6.6"),
        common_name="Guest",
    )
    register = Register(
        certificates=(
            Certificate("arm.fleet", ROBOT),
            Certificate("email:boss@fleet.example", Caller("boss", Role.ADMIN)),
            Certificate("uri:spiffe://fleet/guest", Caller("boss", Role.ADMIN)),
            # Meant as a DNS name, which an authority may give out more carefully than the others.
            Certificate("dns:10.6.6.6", Caller("boss", Role.ADMIN)),
            Certificate("Guest", Caller("boss", Role.ADMIN)),
        )
    )
    live = LiveCertificate(server.server(client_ca=arm.ca))
    async with serving(tmp_path, certificate=live, register=register) as harness:

        def ask(shown: Files | None, token: str | None, work: Callable[[Client], object]) -> object:
            with Client(harness.address, token, tls=server.client(shown)) as client:
                return work(client)

        def run() -> None:
            ask(arm, None, lambda client: client.generate("hello"))
            ask(arm, "admin-token", lambda client: client.generate("hello"))
            ask(boss, None, lambda client: client.load())
            with pytest.raises(Forbidden):
                ask(arm, None, lambda client: client.load())
            with pytest.raises(Unauthenticated, match="names no caller"):
                ask(guest, None, lambda client: client.generate("hello"))
            with pytest.raises(CannotConnect):
                ask(None, "admin-token", lambda client: client.generate("hello"))

        await in_thread(run)
        assert ["robot", "local"] == [spec.account for spec in harness.jobs.specs]
        assert ["forbidden", "unauthenticated"] == harness.denied


def broken(files: Files, how: str, folder: Path) -> str:
    """Break the files; return what the error has to say."""
    other = issue(folder / "other", authority(), "127.0.0.1")
    match how:
        case "another key":
            files.key.write_bytes(other.key.read_bytes())
            return "key values mismatch"
        case "half a certificate":
            files.certificate.write_bytes(files.certificate.read_bytes()[:400])
            return "tls.certificate"
        case "an empty key":
            files.key.write_bytes(b"")
            return "tls.key"
        case "no certificate":
            files.certificate.unlink()
            return "cannot be read: No such file"
        case "a client authority that is none":
            files.ca.write_text("certificates, one hopes")
            return "tls.client_ca"
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [
        "another key",
        "half a certificate",
        "an empty key",
        "no certificate",
        "a client authority that is none",
    ],
)
async def test_files_that_cannot_serve_never_replace_those_that_do(
    tmp_path: Path, how: str
) -> None:
    """The error names setting and file; clients are shown what they were shown before."""
    server = issue(tmp_path / "server", authority(), "127.0.0.1")
    client = issue(tmp_path / "client", authority(), "arm.fleet")
    files = Files(server.certificate, server.key, client.ca)
    live = LiveCertificate(files.server(client_ca=files.ca))
    before = first_of(server.certificate)
    async with serving(tmp_path, certificate=live) as harness:
        expected = broken(files, how, tmp_path)
        with pytest.raises(ConfigError) as raised:
            await in_thread(live.reload)
        assert expected in raised.value.message
        assert before == await in_thread(lambda: shown_at(harness.address))
    with pytest.raises(ConfigError):
        LiveCertificate(files.server(client_ca=files.ca))


def _handshake(server: ssl.SSLContext, version: ssl.TLSVersion, ca: Path) -> str | None:
    """The version that a client of one version and a server agree on; None where they do not."""
    client = ssl.create_default_context(cafile=ca)
    client.check_hostname = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the version, which is the point
        client.minimum_version = client.maximum_version = version
    for context in (client, server):
        # Else OpenSSL's own policy would refuse an old version, whatever ours is.
        context.set_ciphers("ALL:@SECLEVEL=0")
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(5):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return None
    return ends[1].version()


@pytest.mark.parametrize(
    ("version", "spoken"),
    [
        (ssl.TLSVersion.TLSv1, None),
        (ssl.TLSVersion.TLSv1_1, None),
        (ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
        (ssl.TLSVersion.TLSv1_3, "TLSv1.3"),
    ],
)
def test_the_metrics_page_speaks_no_old_tls(
    tmp_path: Path, version: ssl.TLSVersion, spoken: str | None
) -> None:
    """Whatever the system's OpenSSL would allow."""
    files = issue(tmp_path, authority(), "127.0.0.1")
    page = LiveCertificate(files.server()).page()
    assert spoken == _handshake(page, version, files.ca)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2])
async def test_the_grpc_port_speaks_no_old_tls(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """GRPC's own lower bound is ours, and a change of it would be noticed."""
    files = issue(tmp_path, authority(), "127.0.0.1")
    async with serving(tmp_path, certificate=LiveCertificate(files.server())) as harness:

        def spoken() -> str | None:
            context = ssl.create_default_context(cafile=files.ca)
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.set_alpn_protocols(["h2"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = context.maximum_version = version
            host, _, port = harness.address.rpartition(":")
            with socket.create_connection((host, int(port)), 20) as plain:
                try:
                    with context.wrap_socket(plain, server_hostname=host) as encrypted:
                        return encrypted.version()
                except (ssl.SSLError, ConnectionError):
                    return None

        assert ("TLSv1.2" if version is ssl.TLSVersion.TLSv1_2 else None) == await in_thread(spoken)


def test_until_when_a_certificate_is_good(tmp_path: Path) -> None:
    """It is read from the certificate that is shown, for the metric that warns of it."""
    server = issue(tmp_path / "server", authority(), "127.0.0.1")
    # The test's authority signs until the year 3000.
    assert 32_503_680_000.0 == LiveCertificate(server.server()).expires_s


def test_a_client_key_without_its_certificate_is_refused(tmp_path: Path) -> None:
    """By the option's name, before anything is sent; so is a file that is not there."""
    files = issue(tmp_path / "client", authority(), "arm.fleet")
    with pytest.raises(InvalidField, match="tls_cert"):
        Client("127.0.0.1:1", tls=Tls(files.ca, key=files.key))
    with pytest.raises(InvalidField, match=r"tls_ca: .* cannot be read"):
        Client("127.0.0.1:1", tls=Tls(tmp_path / "nowhere.crt"))
    with pytest.raises(InvalidField, match="plain text"):
        Client("unix:/tmp/x.sock", tls=Tls(files.ca))


@pytest.mark.parametrize(
    ("address", "leaves"),
    [("127.0.0.1:1", False), ("[::1]:1", False), ("localhost:1", False), ("unix:/s", False),
     ("10.0.0.1:1", True), ("robot.example:1", True), ("[fd00::1]:1", True)],
)  # fmt: skip
def test_what_goes_to_another_machine_is_known(address: str, leaves: bool) -> None:
    """The command line warns of a token in plain text there."""
    assert leaves is leaves_machine(address)
