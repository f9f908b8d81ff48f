"""The service on a real systemd: the packaged unit, from the wheel, with the bundled pair.

One machine for all; each test leaves it stopped. What the tests change of the unit are times,
so that a hang is noticed in seconds, by a drop-in of their own.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from systemd_machine import DEADLINE_S, HANG, Machine, booted

pytestmark = pytest.mark.timeout(240)

UNIT = "sage-fed"
SECOND = "sage-fed@second"
STATE = "/var/lib/private/sage-fed"
CONFIGURATION = "/etc/sage-fed/config.toml"
SETTINGS = """
profile = "demo"
[budget]
initial_atp = 100000
capacity_atp = 100000
refill_atp_per_s = 0
strategic_floor_atp = 0
[limits]
max_new_tokens = 2000
[tactical]
max_context_tokens = 2048
[strategic]
max_context_tokens = 2048
"""
HURRIED = """
[Service]
Environment=SAGE_FED_SCHEDULING__STEP_TIMEOUT_S=8
WatchdogSec=4
RestartSec=200ms
"""
"""A hang is one after 8 s, and the watchdog's patience 4 s more."""

STREAM = """
import sys
from sage_fed.client import Client
from sage_fed.core import Delta, Finished, Tier
with Client("127.0.0.1:6590") as client:
    for event in client.stream("count", tier=Tier.STRATEGIC, max_new_tokens=%d, ignore_eos=True):
        if isinstance(event, Delta):
            print("delta", flush=True)
        elif isinstance(event, Finished):
            print(event.stop_reason.value, event.usage.output_tokens, flush=True)
"""
HEALTH = """
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
with grpc.insecure_channel("127.0.0.1:6590") as channel:
    ask = health_pb2.HealthCheckRequest(service="")
    print(health_pb2_grpc.HealthStub(channel).Check(ask, timeout=10).status)
"""
BOTH = "tactical serves; strategic serves"
PROBE = Path(__file__).parent / "systemd_probe.py"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A booted machine on which `sage-fed install-service` was run."""
    for one in booted(tmp_path_factory.mktemp("machine")):
        one.write(CONFIGURATION, SETTINGS)
        one.run("/opt/sage-fed/bin/sage-fed", "install-service", "--machine", "cpu")
        one.write("/etc/systemd/system/sage-fed.service.d/90-test.conf", HURRIED)
        one.run("systemctl", "daemon-reload")
        yield one


@pytest.fixture
def service(machine: Machine) -> Iterator[Machine]:
    """The machine with the service running, and stopped after the test."""
    machine.run("systemctl", "start", UNIT)
    machine.wait(UNIT, StatusText=BOTH)
    yield machine
    machine.end_clients()
    machine.run("rm", "-f", str(HANG))
    machine.run("systemctl", "stop", UNIT, check=False)
    machine.run("systemctl", "reset-failed", check=False)


def streaming(machine: Machine, num_tokens: int) -> subprocess.Popen[str]:
    """A client whose stream has begun."""
    client = machine.client(STREAM % num_tokens)
    assert client.stdout is not None
    first = client.stdout.readline()
    assert "delta\n" == first, client.communicate(timeout=DEADLINE_S)[1]
    return client


def answer(machine: Machine, script: str) -> str:
    """What a client's script prints."""
    client = machine.client(script)
    said, errors = client.communicate(timeout=DEADLINE_S)
    assert 0 == client.returncode, errors
    return said.strip()


def books(machine: Machine) -> None:
    """The ledger of the stopped service balances, and holds nothing."""
    machine.run("systemctl", "stop", UNIT)
    said = machine.run(
        "/opt/sage-fed/bin/sage-fed", "ledger", "check", "--state-dir", STATE, "--json"
    ).stdout
    report = json.loads(said)
    assert ([], 0) == (report["violations"], report["open_holds"]), said


def test_a_start_ends_when_the_daemon_serves(service: Machine) -> None:
    """`systemctl start` returns at READY, and at that moment health says SERVING."""
    assert "1" == answer(service, HEALTH)
    shown = service.show(UNIT, "ActiveState", "StatusText", "NRestarts", "Result")
    assert ("active", "0", "success") == (
        shown["ActiveState"], shown["NRestarts"], shown["Result"],
    )  # fmt: skip
    assert "length 8" == answer(service, STREAM % 8).splitlines()[-1]


def test_an_idle_daemon_lives_and_keeps_its_watchdog_fed(service: Machine) -> None:
    """With nothing to do it outlives the watchdog's patience and the limit of a step."""
    fed = "WatchdogTimestampMonotonic"
    start_us = int(service.show(UNIT, fed)[fed])
    # The manager's own clock: past both limits together, told by the daemon itself.
    while int(service.show(UNIT, fed)[fed]) - start_us < 14_000_000:
        shown = service.show(UNIT, "ActiveState", "NRestarts")
        assert {"ActiveState": "active", "NRestarts": "0"} == shown, service.journal(UNIT)


def test_a_killed_daemon_comes_back_with_balanced_books(service: Machine) -> None:
    """Kill -9 in the middle of an answer: restarted, serving, nobody's money lost."""
    client = streaming(service, 1500)
    service.run("systemctl", "kill", "--signal=KILL", UNIT)
    client.communicate(timeout=DEADLINE_S)
    assert 0 != client.returncode
    service.wait(UNIT, NRestarts="1", ActiveState="active", StatusText=BOTH)
    assert "length 8" == answer(service, STREAM % 8).splitlines()[-1]
    books(service)


def test_a_device_that_hangs_gets_the_daemon_restarted(service: Machine) -> None:
    """The watchdog is no longer fed, the stacks go to the journal, the next daemon serves."""
    service.write(str(HANG), "")
    client = service.client(STREAM % 8)
    service.wait(UNIT, NRestarts="1")
    service.run("rm", str(HANG))
    client.communicate(timeout=DEADLINE_S)
    assert 0 != client.returncode
    service.wait(UNIT, ActiveState="active", StatusText=BOTH)
    assert "length 8" == answer(service, STREAM % 8).splitlines()[-1]
    journal = service.journal(UNIT)
    assert "made no progress for 8 s (scheduling.step_timeout_s)" in journal
    assert "Failed with result 'watchdog'" in journal
    assert "wedged_launch" in journal
    books(service)


def test_a_stop_lets_a_running_stream_finish(service: Machine) -> None:
    """`systemctl stop` drains: the client gets its whole answer, the unit a clean end."""
    client = streaming(service, 1500)
    service.run("systemctl", "stop", UNIT)
    said, errors = client.communicate(timeout=DEADLINE_S)
    assert "length 1500" == said.splitlines()[-1], errors
    shown = service.show(UNIT, "ActiveState", "Result", "ExecMainStatus", "NRestarts")
    assert {
        "ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0", "NRestarts": "0",
    } == shown  # fmt: skip
    books(service)


@pytest.mark.parametrize(
    ("mistake", "field"),
    [
        ('\n[routing]\ncomplexity_threshold = "much"\n', "routing.complexity_threshold"),
        ("\n[metrics]\nper_acount_balance = true\n", "metrics.per_acount_balance"),
    ],
)
def test_a_wrong_configuration_fails_once_and_names_the_field(
    machine: Machine, mistake: str, field: str
) -> None:
    """In the journal and in `systemctl status`, with EX_CONFIG, and without another try."""
    machine.write(CONFIGURATION, SETTINGS + mistake)
    try:
        assert 0 != machine.run("systemctl", "start", UNIT, check=False).returncode
        shown = machine.show(
            UNIT, "ActiveState", "SubState", "Result", "ExecMainStatus", "NRestarts", "StatusText"
        )
        status = shown.pop("StatusText")
        assert {
            "ActiveState": "failed", "SubState": "failed", "Result": "exit-code",
            "ExecMainStatus": "78", "NRestarts": "0",
        } == shown  # fmt: skip
        assert f"{field} (file {CONFIGURATION})" in status
        assert f"error: {field} (file {CONFIGURATION})" in machine.journal(UNIT)
    finally:
        machine.write(CONFIGURATION, SETTINGS)
        machine.run("systemctl", "reset-failed", UNIT)


def test_a_second_instance_sees_its_own_things_only(service: Machine) -> None:
    """Beside the first, with the sandbox of a GPU box: what it can write, open and be."""
    service.write(
        f"/etc/{SECOND}/config.toml", 'profile = "demo"\n[tactical]\nprecision = "int8"\n'
    )
    service.run(
        "/opt/sage-fed/bin/sage-fed", "install-service", "--machine", "cuda",
        "--instance", "second",
    )  # fmt: skip
    service.write("/opt/probe.py", PROBE.read_text())
    service.write("/etc/credstore/sage-fed@second.tokens.toml", "")
    service.write(
        f"/etc/systemd/system/{SECOND}.service.d/90-test.conf",
        "[Service]\nExecStartPre=/opt/sage-fed/bin/python /opt/probe.py\n",
    )
    service.run("chmod", "600", "/etc/credstore/sage-fed@second.tokens.toml")
    service.run("systemctl", "daemon-reload")
    service.run("systemctl", "start", SECOND)
    try:
        found = json.loads(re.findall(r'^\{"probe".*', service.journal(SECOND), re.MULTILINE)[0])
        assert {
            "/var/lib/private/sage-fed@second", "/var/cache/private/sage-fed",
            "/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue",
        } == set(found["writable"]), found["mounts"]  # fmt: skip
        assert [] == found["shared"], "a private place shows other people's files"
        assert not found["root"]
        assert {"video", "render"} <= set(found["groups"])
        # No such device: the driver is missing, and nothing was in the way to it.
        assert "ENXIO" == found["gpu"]
        assert [] == found["secrets"]
        # What the manager hands over takes the place of the setting.
        assert "auth.tokens_file" in found["origins"]
        assert "active" == service.show(UNIT, "ActiveState")["ActiveState"]
        assert "weights" in service.run("ls", "/var/cache/private/sage-fed").stdout.split()
        service.run("test", "-s", "/var/lib/private/sage-fed@second/ledger.db")
    finally:
        service.run("systemctl", "stop", SECOND)
    service.run("rm", f"/etc/systemd/system/{SECOND}.service.d/90-test.conf")
    said = service.run(
        "/opt/sage-fed/bin/sage-fed", "uninstall-service", "--instance", "second"
    ).stdout
    assert f"/etc/{SECOND}/config.toml" in said
    assert "" == service.show(SECOND, "DropInPaths")["DropInPaths"]
    assert {"LoadState": "loaded", "ActiveState": "active"} == service.show(
        UNIT, "LoadState", "ActiveState"
    )
