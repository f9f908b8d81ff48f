"""The doors of a real daemon: who gets in, what is changed while it runs, what it says of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import ssl
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from certificates import authority, first_of, issue, shown_at
from daemon_process import DaemonProcess, serve_arguments
from forked_daemon import ForkedProcess
from typer.testing import CliRunner
from waiting import WAIT_S, until

from sage_fed.cli.app import build_app
from sage_fed.client import Client, open_channel
from sage_fed.core import UATP_PER_ATP, Tier
from sage_fed.errors import (
    CallFailed,
    CannotAfford,
    Forbidden,
    InvalidField,
    NotFound,
    RateLimited,
    SageFedError,
    Unauthenticated,
)

Start = Callable[..., DaemonProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts daemons, and stops what is left of them."""
    running: list[DaemonProcess] = []

    def start(*arguments: str, connect: Callable[[str], grpc.Channel] = grpc.insecure_channel,
              wait_for: tuple[str, ...] = ("tactical",)) -> DaemonProcess:  # fmt: skip
        daemon = DaemonProcess.start(
            tmp_path / "state", *arguments, wait_for=wait_for, launch=ForkedProcess, connect=connect
        )
        running.append(daemon)
        return daemon

    yield start
    for daemon in running:
        daemon.kill()


def sage_fed(*arguments: object) -> dict[str, object]:
    """What `sage-fed ... --json` says."""
    done = CliRunner().invoke(build_app(), [*map(str, arguments), "--json"])
    assert 0 == done.exit_code, done.output
    said: dict[str, object] = json.loads(done.stdout)
    return said


def metric(daemon: DaemonProcess, line: str) -> bool:
    """Whether the page has the line."""
    with urllib.request.urlopen(daemon.metrics_url, timeout=WAIT_S) as reply:
        return line in reply.read().decode().splitlines()


def refused(address: str, token: str | None) -> bool:
    """Whether the token, or its absence, lets nobody in."""
    with Client(address, token) as client:
        try:
            client.status()
        except Unauthenticated:
            return True
        return False


def test_a_token_works_and_is_revoked_without_a_restart(start: Start) -> None:
    """Made, used by a new account, taken back: the daemon follows the file, and counts it."""
    daemon = start("--set", "auth.anonymous_account=")
    assert refused(daemon.address, None)
    state = ("--state-dir", daemon.state_dir)
    made = sage_fed("token", "create", "--account", "arm", "--name", "left arm", *state)
    token = str(made["token"])
    until(lambda: not refused(daemon.address, token))
    with Client(daemon.address, token) as arm:
        assert "arm" == arm.budget().account
        arm.generate("What is 2 plus 3?", tier=Tier.TACTICAL, max_new_tokens=2)
        with pytest.raises(Forbidden):
            arm.load()
    sage_fed("token", "revoke", "left arm", *state)
    until(lambda: refused(daemon.address, token))
    assert metric(daemon, 'sage_fed_reloads_total{file="tokens",outcome="done"} 2.0')
    with Client(daemon.address, daemon.admin_token) as admin:
        admin.load()
    assert 0 == daemon.stop(WAIT_S)
    assert token not in daemon.log.read_text()


def test_the_operators_last_word_on_a_budget_holds(start: Start) -> None:
    """Set before the token is made or after, and over restarts, until the settings change."""
    first = ("--set", "budget.capacity_atp=2000", "--set", "budget.initial_atp=100")

    def terms(daemon: DaemonProcess, token: object) -> tuple[int, int, int]:
        until(lambda: not refused(daemon.address, str(token)))
        with Client(daemon.address, str(token)) as client:
            budget = client.budget()
        return budget.capacity_uatp, budget.refill_uatp_per_s, budget.balance_uatp

    daemon = start(*first)
    state = ("--state-dir", daemon.state_dir)
    with Client(daemon.address, daemon.admin_token) as admin:
        admin.set_budget("before", balance_uatp=7, capacity_uatp=9)
        before = sage_fed("token", "create", "--account", "before", *state)["token"]
        after = sage_fed("token", "create", "--account", "after", *state)["token"]
        assert (9, 0, 7) == terms(daemon, before)
        assert 2000 * UATP_PER_ATP == terms(daemon, after)[0]
        admin.set_budget("after", capacity_uatp=9, refill_uatp_per_s=0, balance_uatp=7)
    assert 0 == daemon.stop(WAIT_S)
    daemon = start(*first)
    assert (9, 0, 7) == terms(daemon, before) == terms(daemon, after)
    assert 0 == daemon.stop(WAIT_S)
    daemon = start("--set", "budget.capacity_atp=3000", "--set", "budget.initial_atp=100")
    assert (3000 * UATP_PER_ATP, 0, 7) == terms(daemon, before) == terms(daemon, after)


def test_a_tokens_file_that_is_broken_changes_nothing(start: Start, tmp_path: Path) -> None:
    """Those who were let in still are; the log says what is wrong, and a metric counts it."""
    tokens = tmp_path / "tokens.toml"
    made = sage_fed("token", "create", "--account", "arm", "--tokens-file", tokens)
    daemon = start("--set", f"auth.tokens_file={tokens}", "--set", "auth.anonymous_account=")
    whole = tokens.read_text()
    tokens.write_text(whole + "[[token]]\naccount = 'nobody'\n")
    until(lambda: metric(daemon, 'sage_fed_reloads_total{file="tokens",outcome="failed"} 1.0'))
    assert not refused(daemon.address, str(made["token"]))
    assert "token 2: sha256 must be 64 hexadecimal digits" in daemon.log.read_text()
    assert metric(daemon, 'sage_fed_last_reload_successful{file="tokens"} 0.0')
    tokens.write_text("")
    until(lambda: refused(daemon.address, str(made["token"])))
    until(lambda: metric(daemon, 'sage_fed_last_reload_successful{file="tokens"} 1.0'))


def test_a_unix_socket_serves_whom_the_file_system_lets_in(start: Start, tmp_path: Path) -> None:
    """Owner and group may connect, as the anonymous account; the command line does, too."""
    path = tmp_path / "s.sock"
    daemon = start("--listen", f"unix:{path}")
    assert f"unix:{path}" == daemon.address
    assert 0o660 == stat.S_IMODE(path.stat().st_mode)
    assert "local" == sage_fed("budget", "--address", daemon.address)["account"]
    second = ForkedProcess(
        serve_arguments(tmp_path / "second", "--listen", f"unix:{path}"), tmp_path / "second.log"
    )
    assert 1 == second.wait(WAIT_S)
    assert (
        f"listen: cannot bind unix:{path}; another daemon has it"
        in (tmp_path / "second.log").read_text()
    )
    daemon.kill()
    assert path.exists(), "the next daemon has to do with a socket that nobody serves"
    again = start("--listen", f"unix:{path}")
    with Client(again.address) as client:
        client.status()


def in_a_pod() -> None:
    """The environment that Kubernetes gives a pod beside a Service named sage-fed."""
    os.environ["SAGE_FED_PORT"] = os.environ["SAGE_FED_PORT_6590_TCP"] = "tcp://10.43.7.9:6590"
    os.environ["SAGE_FED_SERVICE_HOST"] = "10.43.7.9"


def test_a_kubernetes_service_of_its_name_stops_no_daemon(tmp_path: Path) -> None:
    """It says in one line which variables it does not take for settings."""
    daemon = DaemonProcess.start(
        tmp_path / "state",
        wait_for=("tactical",),
        launch=lambda arguments, log: ForkedProcess(arguments, log, in_a_pod),
    )
    assert 0 == daemon.stop(WAIT_S)
    lines = [line for line in daemon.log.read_text().splitlines() if "SAGE_FED_PORT" in line]
    assert 1 == len(lines)
    assert "SAGE_FED_PORT, SAGE_FED_PORT_6590_TCP, SAGE_FED_SERVICE_HOST, which" in lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("listen=0.0.0.0:0",), ("listen (flag)", "auth.tokens_file", "`sage-fed token create`")),
        (
            ("listen=0.0.0.0:0", "auth.tokens_file=/dev/null"),
            ("tls.certificate", "tls.allow_plaintext"),
        ),
        (("metrics_listen=0.0.0.0:0",), ("metrics_listen (flag)", "metrics.public")),
        (
            ("metrics_listen=0.0.0.0:0", "auth.tokens_file=/dev/null"),
            ("metrics_listen is 0.0.0.0:0", "tls.certificate"),
        ),
        (("tls.certificate=/dev/null",), ("certificate and key come together",)),
        (("auth.tokens_file=$CREDENTIALS_DIRECTORY/tokens.toml",), ("LoadCredential=",)),
        (
            ("tls.certificate=/dev/null", "tls.key=/dev/null"),
            ("tls.certificate /dev/null with tls.key /dev/null", "expected PEM"),
        ),
        (("listen=unix:relative.sock",), ("expected unix:/PATH",)),
        ((f"listen=unix:/{'x' * 200}",), ("at most 107 bytes",)),
    ],
)
def test_an_open_door_fails_the_start(
    tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """One line that names the setting and says what to do; nothing is left behind."""
    log = tmp_path / "log"
    options = [word for flag in flags for word in ("--set", flag)]
    base = ["serve", "--profile", "demo", "--state-dir", str(tmp_path / "state")]
    if not any(flag.startswith("listen") for flag in flags):
        base += ["--listen", "127.0.0.1:0"]
    if not any(flag.startswith("metrics_listen") for flag in flags):
        base += ["--metrics-listen", "127.0.0.1:0"]
    process = ForkedProcess([*base, *options], log)
    assert 78 == process.wait(WAIT_S)
    said = log.read_text()
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not (tmp_path / "state").exists()


def test_a_certificate_is_renewed_while_the_daemon_runs(start: Start, tmp_path: Path) -> None:
    """TLS beyond this machine: new connections see the new one; a broken file changes nothing."""
    ca = authority()
    files = issue(tmp_path / "tls", ca, "127.0.0.1")
    tokens = tmp_path / "tokens.toml"
    made = sage_fed("token", "create", "--account", "arm", "--tokens-file", tokens)
    watcher = sage_fed(
        *("token", "create", "--account", "prometheus", "--role", "monitor"),
        *("--tokens-file", tokens),
    )
    daemon = start(
        *files.flags(),
        *("--set", f"auth.tokens_file={tokens}"),
        *("--listen", "0.0.0.0:0", "--metrics-listen", "0.0.0.0:0"),
        connect=lambda address: open_channel(
            address.replace("0.0.0.0", "127.0.0.1"), files.client()
        ),
    )
    address = daemon.address.replace("0.0.0.0", "127.0.0.1")
    page = daemon.metrics_url.replace("0.0.0.0", "127.0.0.1").replace("http:", "https:")
    token_file = tmp_path / "token"
    token_file.write_text(f"{made['token']}\n")
    reach = ("--address", address, "--tls-ca", files.ca, "--token-file", token_file)
    assert "arm" == sage_fed("budget", *reach)["account"]

    def scrape(token: object | None) -> tuple[int, str]:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(page, headers=headers)
        trust = ssl.create_default_context(cafile=files.ca)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S, context=trust) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    ready = f"metrics on {daemon.metrics_url.replace('http:', 'https:')}"
    until(lambda: ready in daemon.log.read_text())
    assert [401, 401, 403] == [scrape(t)[0] for t in (None, "guessed", made["token"])]
    status, text = scrape(watcher["token"])
    assert 200 == status
    name = "sage_fed_tls_certificate_expiry_timestamp_seconds"
    expiry = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert expiry is not None
    assert float(expiry[1]) > time.time()

    for shown in (address, page.removeprefix("https://").removesuffix("/metrics")):
        assert first_of(files.certificate) == shown_at(shown)
    issue(tmp_path / "tls", ca, "127.0.0.1", common_name="renewed")
    renewed = first_of(files.certificate)
    for shown in (address, page.removeprefix("https://").removesuffix("/metrics")):
        until(lambda shown=shown: renewed == shown_at(shown))
    files.certificate.write_text("no certificate")
    failed = 'sage_fed_reloads_total{file="certificate",outcome="failed"}'
    until(lambda: f"{failed} 0.0" not in scrape(watcher["token"])[1])
    assert renewed == shown_at(address)
    assert "arm" == sage_fed("budget", *reach)["account"]
    assert "what was in force stays: tls.certificate" in daemon.log.read_text()


def test_a_client_certificate_opens_a_real_daemon(start: Start, tmp_path: Path) -> None:
    """The command line binds its name to an account, while the daemon runs, and takes it back."""
    fleet = authority()
    server = issue(tmp_path / "tls", authority(), "127.0.0.1")
    arm, probe = (issue(tmp_path / name, fleet, f"{name}.fleet") for name in ("arm", "probe"))
    daemon = start(
        *server.flags(),
        *("--set", f"tls.client_ca={arm.ca}"),
        connect=lambda address: open_channel(address, server.client(probe)),
    )
    state = ("--state-dir", daemon.state_dir)
    reach = (
        *("--address", daemon.address, "--tls-ca", server.ca),
        *("--tls-cert", arm.certificate, "--tls-key", arm.key),
    )

    def account() -> object:
        done = CliRunner().invoke(build_app(), [*map(str, ("budget", *reach)), "--json"])
        said = json.loads(done.stdout)
        return said.get("account") or said["error"]["reason"]

    assert "UNAUTHENTICATED" == account(), "a loopback address lets in nobody for nothing here"
    sage_fed("token", "create", "--account", "arm", "--certificate", "arm.fleet", *state)
    until(lambda: account() == "arm")
    assert {"held_uatp", "jobs", "tiers"} <= sage_fed("admin", "load", *reach, *state).keys()
    sage_fed("token", "revoke", "arm.fleet", *state)
    until(lambda: account() == "UNAUTHENTICATED")


LIMITS = """
[rate_limits]
requests_per_minute = 1000
concurrent_jobs = 2
[accounts.loud.rate_limits]
requests_per_minute = 5
concurrent_jobs = 0
[budget]
initial_atp = 100000
capacity_atp = 100000
refill_atp_per_s = 0
strategic_floor_atp = 0
[limits]
max_new_tokens = 900
"""


def test_an_account_is_limited_beside_its_budget(start: Start, tmp_path: Path) -> None:
    """Calls a minute and jobs at once, each by account; a refusal holds and charges nothing."""
    config, tokens = tmp_path / "config.toml", tmp_path / "tokens.toml"
    config.write_text(LIMITS)
    loud = sage_fed("token", "create", "--account", "loud", "--tokens-file", tokens)
    daemon = start("--config", str(config), "--set", f"auth.tokens_file={tokens}")
    with Client(daemon.address) as client, Client(daemon.address) as other:
        streams = [
            client.stream("count", tier=Tier.TACTICAL, max_new_tokens=900, ignore_eos=True)
            for _ in range(2)
        ]
        for stream in streams:
            next(stream)
        held = client.budget().held_uatp
        with pytest.raises(RateLimited) as raised:
            other.generate("count", tier=Tier.TACTICAL, max_new_tokens=2)
        assert ("local", "concurrent_jobs", 2) == (
            raised.value.account, raised.value.limit, raised.value.allowed,
        )  # fmt: skip
        assert raised.value.retry_after_s
        assert held == client.budget().held_uatp
        for stream in streams:
            stream.close()
        with Client(daemon.address, daemon.admin_token) as admin:
            until(lambda: not admin.load().jobs)
        other.generate("count", tier=Tier.TACTICAL, max_new_tokens=2)
    with Client(daemon.address, str(loud["token"])) as robot:
        before = robot.budget()
        # Twice the limit: a minute that ends meanwhile lets in one or two more.
        with contextlib.suppress(RateLimited):
            for _ in range(10):
                robot.budget()
        with pytest.raises(RateLimited) as raised:
            robot.generate("count", tier=Tier.TACTICAL, max_new_tokens=2)
    assert ("loud", "requests_per_minute", 5) == (
        raised.value.account, raised.value.limit, raised.value.allowed,
    )  # fmt: skip
    assert 0 == before.held_uatp == before.discharged_uatp
    for reason, count in (("concurrent_jobs", 1), ("requests_per_minute", 2)):
        assert metric(daemon, f'sage_fed_calls_denied_total{{reason="{reason}"}} {count}.0')


MARK = "zebra-crossing-7391"
"""In everything hostile that is sent; no log line may have it."""

FLOOD = f'{MARK}\n\x1b[2J\x1b]0;{MARK}\x07\r{{"level": "CRITICAL", "message": "{MARK}"}}\n'


def hostile(daemon: DaemonProcess) -> str:
    """Everything that a caller can say, with the mark in it; returns a job that ended well."""
    with Client(daemon.address) as client:
        answer = client.generate(FLOOD, tier=Tier.TACTICAL, max_new_tokens=4)
        attempts: tuple[Callable[[], object], ...] = (
            lambda: client.generate(FLOOD, client_request_id=FLOOD),
            lambda: client.generate(FLOOD * 100),
            lambda: client.generate(FLOOD * 9000),
            lambda: client.generate(FLOOD, stop=(FLOOD * 10,)),
            lambda: client.generate(FLOOD, max_cost_uatp=1),
            lambda: client.quote(FLOOD, client_request_id=FLOOD),
            lambda: Client(daemon.address, f"Bearer-{MARK}").status(),
            lambda: Client(daemon.address, daemon.admin_token).adopt_card(FLOOD[:60]),
            lambda: Client(daemon.address, daemon.admin_token).adopt_card(f"../{MARK}"),
            lambda: Client(daemon.address, daemon.admin_token).adopt_quality_card(FLOOD[:60]),
        )
        for attempt in attempts:
            with pytest.raises((InvalidField, Unauthenticated, NotFound, CannotAfford, CallFailed)):
                attempt()
        client.count_tokens(FLOOD)
        with pytest.raises(SageFedError):
            Client(daemon.address, f"sagefed_{MARK}").generate(FLOOD)
    where = daemon.metrics_url.removeprefix("http://").removesuffix("/metrics").rpartition(":")
    for request in (f"GET /{MARK}\x1b[2J HTTP/1.1\r\n\r\n", f"{MARK}\n\n", f"GET / {MARK}\r\n\r\n"):
        with socket.create_connection((where[0], int(where[2])), timeout=WAIT_S) as page:
            page.sendall(request.encode())
            page.shutdown(socket.SHUT_WR)
            page.recv(4096)
    with grpc.insecure_channel(daemon.address) as channel:
        method = f"/{MARK}/{MARK}"
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(method)(MARK.encode(), metadata=(("x-mark", MARK),), timeout=WAIT_S)
    return answer.started.job_id


def test_nothing_that_a_caller_says_gets_into_the_log(start: Start, tmp_path: Path) -> None:
    """Every line is one JSON object of ours, at debug as well: no prompt, token or escape."""
    tokens = tmp_path / "tokens.toml"
    made = sage_fed("token", "create", "--account", "arm", "--tokens-file", tokens)
    daemon = start("--log-level", "debug", "--set", f"auth.tokens_file={tokens}")
    job_id = hostile(daemon)
    with tokens.open("a") as file:
        file.write('[[token]]\n"\\u001b[2J\\nkey" = "Bearer ' + str(made["token"]) + '"\n')
    failed = 'sage_fed_reloads_total{file="tokens",outcome="failed"} 1.0'
    until(lambda: metric(daemon, failed))
    entries = sage_fed("ledger", "--address", daemon.address, "--limit", "50")["entries"]
    assert 0 == daemon.stop(WAIT_S)
    lines = daemon.log.read_text().split("\n")
    assert "" == lines.pop()
    records = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    text = daemon.log.read_text()
    for secret in (MARK, str(made["token"]), daemon.admin_token, "Traceback", "\x1b", "\r"):
        assert secret not in text
    for record in records:
        assert all(str(value).isprintable() for value in record.values()), record
    said = [record["message"] for record in records]
    assert any(re.match(r"denied: unauthenticated, from ipv4:127", line) for line in said)
    ended = [record for record in records if record.get("job_id") == job_id]
    assert ["debug"] == [record["level"].lower() for record in ended]
    assert {"hold", "settle"} <= {
        entry["kind"]
        for entry in entries
        if entry.get("job_id") == job_id  # type: ignore[attr-defined]
    }


def test_pretty_lines_are_for_people(start: Start) -> None:
    """`log_format = "pretty"` in a file or a pipe: time, level, logger and the text."""
    daemon = start("--set", "log_format=pretty", wait_for=())
    assert 0 == daemon.stop(WAIT_S)
    lines = daemon.log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d [\d:,]+ (INFO|WARNING) sage_fed", line) for line in lines)
    assert any("let in: 0 tokens, this machine without a token, as local; plain text" in line
               for line in lines)  # fmt: skip
