"""What the daemon says to a service manager, on a real socket of one."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sage_fed.core import Tier, TierState, TierStatus
from sage_fed.daemon.readiness import Pulse, status_line
from sage_fed.device import Heartbeat
from sage_fed.systemd.notify import ServiceManager


class Listener:
    """The manager's end: a datagram socket, with a path or an abstract name."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.settimeout(10)
        self.environ = {"NOTIFY_SOCKET": address}

    def heard(self) -> str:
        """The next message."""
        return self._socket.recv(4096).decode()

    def silent(self) -> bool:
        """Whether nothing more was said."""
        self._socket.setblocking(False)
        try:
            self._socket.recv(4096)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    """A manager that listens, in both forms that an address has."""
    abstract = request.param == "abstract"
    listening = Listener(f"@sage-fed-{os.getpid()}-{id(request)}" if abstract else f"{tmp_path}/n")
    yield listening
    listening.close()


def test_every_word_arrives_as_the_protocol_has_it(listener: Listener) -> None:
    """One datagram a call, with the field that sd_notify(3) names; times are microseconds."""
    manager = ServiceManager.of(listener.environ)
    manager.status("tactical serves")
    manager.ready()
    manager.alive()
    manager.extend(1.5)
    manager.stopping(75.0)
    assert [
        "STATUS=tactical serves",
        "READY=1",
        "WATCHDOG=1",
        "EXTEND_TIMEOUT_USEC=1500000",
        "STOPPING=1",
        "EXTEND_TIMEOUT_USEC=75000000",
    ] == [listener.heard() for _ in range(6)]
    assert listener.silent()


def test_a_status_is_one_line_and_said_once(listener: Listener) -> None:
    """A line break in an error's text cannot become a field of the protocol."""
    manager = ServiceManager.of(listener.environ)
    manager.status("2 settings cannot be used:\nREADY=1\n  listen")
    manager.status("2 settings cannot be used: READY=1 listen")
    manager.status("x" * 5000)
    assert "STATUS=2 settings cannot be used: READY=1 listen" == listener.heard()
    assert "STATUS=" + "x" * 400 == listener.heard()
    assert listener.silent()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_a_manager_nothing_is_said(environ: dict[str, str]) -> None:
    """No socket, or one of a kind that no service gets: every call does nothing."""
    manager = ServiceManager.of({**environ, "WATCHDOG_USEC": "1000000"})
    manager.ready()
    manager.stopping(1.0)
    assert manager.watchdog_s is None


def test_a_busy_manager_gets_every_word_but_the_watchdogs(listener: Listener) -> None:
    """Its queue is short: READY waits for room in it, and a lost feeding is followed by others."""
    manager = ServiceManager.of(listener.environ)
    for _ in range(1000):
        manager.alive()
    ready = threading.Thread(target=manager.ready)
    ready.start()
    while (heard := listener.heard()) == "WATCHDOG=1":
        pass
    ready.join()
    assert "READY=1" == heard
    assert listener.silent()


def test_a_manager_that_is_gone_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon serves on, and says it once."""
    manager = ServiceManager.of({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    manager.ready()
    manager.alive()
    assert ["the service manager does not listen: No such file or directory"] == caplog.messages


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_ours_only_if_it_names_us(
    environ: dict[str, str], expected: float | None
) -> None:
    """A variable that a child inherited from a watched parent does not count."""
    assert expected == ServiceManager.of({"NOTIFY_SOCKET": "/n", **environ}).watchdog_s


@pytest.mark.parametrize(
    ("statuses", "line"),
    [
        (
            [
                TierStatus(Tier.STRATEGIC, TierState.LOADING, 0.419),
                TierStatus(Tier.TACTICAL, TierState.READY, 1.0),
            ],
            "tactical serves; strategic: 41 % of the weights",
        ),
        (
            [
                TierStatus(Tier.TACTICAL, TierState.DRAINING),
                TierStatus(Tier.STRATEGIC, TierState.FAILED, message="no config.json"),
            ],
            "tactical drains; strategic failed: no config.json",
        ),
        ([TierStatus(Tier.TACTICAL, TierState.LOADING, 0.999)], "tactical: 99 % of the weights"),
    ],
)
def test_the_status_names_every_tier(statuses: list[TierStatus], line: str) -> None:
    """In the order of depth, with what is loaded rounded down."""
    assert line == status_line(statuses)


LIMIT_S = 10.0

Look = tuple[float, float, bool, int]
"""When we look; when the thread last turned; whether it has work; steps that it has done."""


@pytest.mark.parametrize(
    ("looks", "verdicts"),
    [
        # Idle, and answers every ping: nothing to do is no hang, however long.
        ([(0, 0, False, 0), (4, 1, False, 0), (400, 399, False, 0)], [True, True, True]),
        # Idle, and does not answer: nothing else can tell a dead thread from one without work.
        ([(0, 0, False, 0), (10, -1, False, 0), (11, -1, False, 0)], [True, True, False]),
        # One long step, shorter than the limit; then the next.
        (
            [(0, 0, True, 0), (5, 0.5, True, 0), (10, 0.5, True, 0), (12, 11, True, 1)],
            [True, True, True, True],
        ),
        # A step that never ends.
        (
            [(0, 0, True, 3), (5, 0.5, True, 3), (15, 0.5, True, 3), (16, 0.5, True, 3)],
            [True, True, False, False],
        ),
        # It turns and turns with work to do, and does none of it.
        ([(0, 0, True, 3), (5, 5, True, 3), (11, 11, True, 3)], [True, True, False]),
        # It hung, and came back.
        (
            [(0, 0, True, 3), (20, 0.5, True, 3), (24, 23, True, 4), (28, 27, False, 4)],
            [True, False, True, True],
        ),
        # Work ends and new work comes between two looks.
        ([(0, 0, True, 3), (9, 8, False, 3), (18, 17, True, 3)], [True, True, True]),
    ],
)
def test_what_counts_as_progress(looks: list[Look], verdicts: list[bool]) -> None:
    """The loop turns when it is asked to, and steps end: each within the limit."""
    pulse = Pulse(LIMIT_S)
    judged = [
        pulse.progresses(Heartbeat(steps, turned_s, busy), now_s)
        for now_s, turned_s, busy, steps in looks
    ]
    assert verdicts == judged
