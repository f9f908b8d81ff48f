"""A daemon whose disk hangs: health, status, metrics and the log say so, and it goes on after."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest
from daemon_process import TROUBLE, DaemonProcess, launch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from surroundings import require_tool
from waiting import WAIT_S, until

from sage_fed.cli import top
from sage_fed.client import Client
from sage_fed.core import TIER_ROLES, Finished, Tier
from sage_fed.errors import LedgerBlocked
from sage_fed.ledger import check

SERVING = health_pb2.HealthCheckResponse.SERVING
BOUND_S = 0.5
SETTINGS = (
    *("--set", f"ledger.commit_timeout_s={BOUND_S}", "--set", "budget.initial_atp=100000"),
    *("--set", "budget.capacity_atp=100000", "--set", "budget.refill_atp_per_s=0"),
)


@dataclass(frozen=True)
class StuckDisk:
    """A daemon, and the switch of its disk."""

    daemon: DaemonProcess
    switch: Path

    def hang(self) -> None:
        """From now on, no sync returns."""
        self.switch.touch()

    def go_on(self) -> None:
        """Let all of them return."""
        self.switch.unlink(missing_ok=True)

    def health(self) -> set[int]:
        """What the health service says of the daemon, of inference and of both tiers."""
        names = ("", "sage_fed.v1.InferenceService", *(tier.name for tier in TIER_ROLES))
        with grpc.insecure_channel(self.daemon.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            asks = [health_pb2.HealthCheckRequest(service=name) for name in names]
            return {stub.Check(ask, timeout=WAIT_S).status for ask in asks}

    def writable(self) -> float | None:
        """What the metrics say of the ledger."""
        page = top.Page.read(top.fetch(self.daemon.metrics_url), 0.0)
        return page.total("sage_fed_ledger_writable")


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[StuckDisk]:
    library, switch = tmp_path / "stuck_disk.so", tmp_path / "stuck"
    source = Path(__file__).with_name("stuck_disk.c")
    subprocess.run([require_tool("cc"), "-shared", "-fPIC", "-o", library, source], check=True)
    daemon = DaemonProcess.start(
        tmp_path / "state",
        *SETTINGS,
        launch=partial(launch, LD_PRELOAD=str(library), STUCK_WHILE=str(switch)),
    )
    disk = StuckDisk(daemon, switch)
    yield disk
    disk.go_on()
    daemon.kill()


def ask(client: Client) -> Finished:
    return client.generate("count", tier=Tier.TACTICAL, max_new_tokens=2, ignore_eos=True).finished


def test_a_disk_that_hangs_is_noticed_and_passes(stuck: StuckDisk) -> None:
    """Nothing serves and nothing is held until it answers; then all is as it was, and charged."""
    with Client(stuck.daemon.address) as client, ThreadPoolExecutor(1) as threads:
        spent_uatp = ask(client).price.charged_uatp
        assert {SERVING} == stuck.health()
        stuck.hang()
        waiting = threads.submit(ask, client)
        until(lambda: SERVING not in stuck.health(), "health says nothing of the disk")
        assert 0.0 == stuck.writable()
        assert "its disk does not answer" == client.status().ledger_trouble
        with pytest.raises(LedgerBlocked) as refused:
            ask(client)
        assert refused.value.retry_after_s
        assert "/" not in refused.value.message
        assert not waiting.done()
        stuck.go_on()
        spent_uatp += waiting.result(WAIT_S).price.charged_uatp
        until(lambda: {SERVING} == stuck.health(), "health does not recover")
        assert 1.0 == stuck.writable()
        assert "" == client.status().ledger_trouble
        spent_uatp += ask(client).price.charged_uatp
        assert (0, spent_uatp) == (client.budget().held_uatp, client.budget().discharged_uatp)
    assert 0 == stuck.daemon.stop(WAIT_S)
    log = stuck.daemon.log.read_text()
    assert "for its disk, which holds" in log
    assert str(stuck.daemon.state_dir / "ledger.db") in log
    assert "the ledger's disk answers again" in log
    assert not TROUBLE.search(log)
    assert () == check(stuck.daemon.state_dir / "ledger.db").violations
