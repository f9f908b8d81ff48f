"""An engine fails inside a real daemon: who is told what, who goes on, what comes back.

Whatever fails, the same things are true afterwards: no client waits, no ATP is held or charged for
what was not delivered whole, no KV block is taken, and both tiers serve.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from daemon_process import DaemonProcess
from faulty_engines import Orders
from grpc_health.v1 import health_pb2, health_pb2_grpc
from waiting import WAIT_S, until

from sage_fed.cli import top
from sage_fed.client import Client
from sage_fed.core import TIER_ROLES, Delta, Event, Finished, Mode, StopReason, Tier
from sage_fed.errors import DeviceOutOfMemory, NotFinite, SageFedError, TierUnavailable
from sage_fed.ledger import check

T, S = Tier.TACTICAL, Tier.STRATEGIC

NOTICED_S = 2.0
"""How soon health has to say it."""

STEP_TIMEOUT_S = 1.0
WHOLE = 300
"""Tokens of a stream that is to end by itself, while others are cut off."""

SETTINGS = (
    *("--set", "budget.initial_atp=1000000", "--set", "budget.capacity_atp=1000000"),
    *("--set", "budget.refill_atp_per_s=0", "--set", "limits.max_new_tokens=900"),
    *("--set", f"scheduling.step_timeout_s={STEP_TIMEOUT_S}"),
)
Serving = health_pb2.HealthCheckResponse.SERVING


class Watch:
    """Follows one name's health in a thread, so that a test can wait for a change in time."""

    def __init__(self, channel: grpc.Channel, service: str) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        self._call = stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
        self._changed = threading.Condition()
        self._serves: list[bool] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.wait(WAIT_S, serves=True)

    def _run(self) -> None:
        try:
            for response in self._call:
                with self._changed:
                    self._serves.append(response.status == Serving)
                    self._changed.notify_all()
        except grpc.RpcError:
            pass  # cancelled below, or the daemon is gone

    def wait(self, within_s: float, *, serves: bool) -> None:
        """Wait until it has said so, from the change that was waited for before."""
        with self._changed:
            assert self._changed.wait_for(lambda: serves in self._serves, within_s), serves
            del self._serves[: self._serves.index(serves)]

    def close(self) -> None:
        """Stop following."""
        self._call.cancel()
        self._thread.join(WAIT_S)


class Desk:
    """A daemon whose engines obey, a client, and what is known of its money."""

    def __init__(self, daemon: DaemonProcess, orders: Orders) -> None:
        self.daemon = daemon
        self.orders = orders
        self.client = Client(daemon.address)
        self.channel = grpc.insecure_channel(daemon.address)
        self.watches = {tier: Watch(self.channel, tier.name) for tier in TIER_ROLES}
        self.threads = ThreadPoolExecutor(16)

    def close(self) -> None:
        """Let go."""
        self.threads.shutdown()
        for watch in self.watches.values():
            watch.close()
        self.channel.close()
        self.client.close()

    def stream(self, tier: Tier, num_tokens: int) -> Iterator[Event]:
        """A stream that has begun to deliver; single, as a drafter's step would take an order."""
        events = self.client.stream(
            "count", tier=tier, mode=Mode.SINGLE, max_new_tokens=num_tokens, ignore_eos=True
        )
        for event in events:
            if isinstance(event, Delta):
                return events
        raise AssertionError("a stream without a token")

    def ending(self, events: Iterator[Event]) -> Future[Finished | SageFedError]:
        """How a stream ends, read on a thread."""

        def read() -> Finished | SageFedError:
            try:
                *_, last = events
            except SageFedError as error:
                return error
            assert isinstance(last, Finished)
            return last

        return self.threads.submit(read)

    def serve(self, tier: Tier) -> Finished:
        """One whole answer of a tier."""
        return self.client.generate("count", tier=tier, max_new_tokens=5, ignore_eos=True).finished

    def metric(self, name: str, **labels: str) -> float:
        """One sample of the metrics page."""
        page = top.Page.read(top.fetch(self.daemon.metrics_url), 0.0)
        (sample,) = page.having(f"sage_fed_{name}", **labels)
        return sample.value

    def assert_well(self, charged_uatp: int) -> None:
        """Nothing is left of anybody, both tiers serve, and the books say what was charged."""
        budget = self.client.budget()
        assert (0, charged_uatp) == (budget.held_uatp, budget.discharged_uatp)
        report = check(self.daemon.state_dir / "ledger.db")
        assert ((), 0) == (report.violations, report.open_holds)
        for tier in TIER_ROLES:
            assert StopReason.LENGTH is self.serve(tier).stop_reason
            assert 0 == self.metric("kv_cache_tokens", tier=tier.name, state="used")
            assert 0 == self.metric("requests_running", tier=tier.name)
            assert 0 == self.metric("requests_waiting", tier=tier.name)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    orders = Orders(tmp_path / "orders")
    daemon = DaemonProcess.start(tmp_path / "state", *SETTINGS, launch=orders.launch)
    desk = Desk(daemon, orders)
    yield desk
    desk.close()
    for tier in TIER_ROLES:
        orders.take_back(tier)
    daemon.stop()


@pytest.mark.parametrize("tier", TIER_ROLES)
def test_an_engine_that_raises_takes_its_tier_which_comes_back(desk: Desk, tier: Tier) -> None:
    """Its jobs end UNAVAILABLE, health says so, the other tier goes on, a new engine is loaded."""
    (other,) = set(TIER_ROLES) - {tier}
    neighbour = desk.ending(desk.stream(other, WHOLE))
    doomed = [desk.ending(desk.stream(tier, 900)) for _ in range(3)]
    desk.orders.give(tier, "error")
    desk.watches[tier].wait(NOTICED_S, serves=False)
    endings = [future.result(WAIT_S) for future in doomed]
    for ending in endings:
        assert isinstance(ending, TierUnavailable), ending
        assert ending.retry_after_s
        assert "injected" not in ending.message
    desk.watches[tier].wait(WAIT_S, serves=True)
    whole = neighbour.result(WAIT_S)
    assert isinstance(whole, Finished)
    assert (StopReason.LENGTH, WHOLE) == (whole.stop_reason, whole.usage.output_tokens)
    assert 1 == desk.metric("engine_restarts_total", tier=tier.name)
    assert 0 == desk.metric("engine_restarts_total", tier=other.name)
    desk.assert_well(whole.price.charged_uatp)


def test_who_asks_while_a_tier_is_down_is_told_when_to_come_back(desk: Desk) -> None:
    """A job for that tier is refused with a delay, one that may go anywhere goes to the other."""
    doomed = desk.ending(desk.stream(T, 900))
    desk.orders.give(T, "error")
    doomed.result(WAIT_S)
    with pytest.raises(TierUnavailable) as refused:
        desk.serve(T)
    assert refused.value.retry_after_s
    assert (
        StopReason.LENGTH
        is desk.client.generate("count", max_new_tokens=5, ignore_eos=True).finished.stop_reason
    )
    desk.watches[T].wait(NOTICED_S, serves=False)
    desk.watches[T].wait(WAIT_S, serves=True)
    assert StopReason.LENGTH is desk.serve(T).stop_reason


@pytest.mark.parametrize("tier", TIER_ROLES)
def test_a_job_whose_numbers_break_down_fails_alone(desk: Desk, tier: Tier) -> None:
    """It ends DATA_LOSS and is not charged; its tier was never down."""
    sick = desk.ending(desk.stream(tier, 900))
    desk.orders.give(tier, "nan")
    ending = sick.result(WAIT_S)
    assert isinstance(ending, NotFinite), ending
    assert 0 == desk.metric("engine_restarts_total", tier=tier.name)
    assert 1 == desk.metric("requests_total", tier=tier.name, outcome="failed", code="not_finite")
    desk.assert_well(0)


def test_a_model_that_gives_no_numbers_any_more_is_loaded_again(desk: Desk) -> None:
    """Three jobs after each other fail; then the tier does, and comes back with fresh weights."""
    neighbour = desk.ending(desk.stream(S, WHOLE))
    desk.orders.give(T, "nan 1000000")
    for _ in range(3):
        with pytest.raises(NotFinite):
            desk.serve(T)
    desk.watches[T].wait(NOTICED_S, serves=False)
    desk.watches[T].wait(WAIT_S, serves=True)
    whole = neighbour.result(WAIT_S)
    assert isinstance(whole, Finished)
    assert 1 == desk.metric("engine_restarts_total", tier="tactical")
    desk.assert_well(whole.price.charged_uatp)


@pytest.mark.parametrize("tier", TIER_ROLES)
def test_a_job_without_memory_fails_alone(desk: Desk, tier: Tier) -> None:
    """It is tried twice, ends RESOURCE_EXHAUSTED and is not charged; its tier was never down."""
    (other,) = set(TIER_ROLES) - {tier}
    neighbour = desk.ending(desk.stream(other, WHOLE))
    sick = desk.ending(desk.stream(tier, 900))
    desk.orders.give(tier, "memory 2")
    ending = sick.result(WAIT_S)
    assert isinstance(ending, DeviceOutOfMemory), ending
    whole = neighbour.result(WAIT_S)
    assert isinstance(whole, Finished)
    assert 2 == desk.metric("oom_total", tier=tier.name)
    assert 0 == desk.metric("engine_restarts_total", tier=tier.name)
    desk.assert_well(whole.price.charged_uatp)


@pytest.mark.parametrize("tier", TIER_ROLES)
def test_a_device_that_hangs_lets_nobody_wait_and_may_come_back(desk: Desk, tier: Tier) -> None:
    """One thread serves both tiers, so both are down until the step comes back."""
    streams = [desk.ending(desk.stream(each, 900)) for each in (T, S, T)]
    desk.orders.give(tier, "hang")
    for each in TIER_ROLES:
        desk.watches[each].wait(STEP_TIMEOUT_S + NOTICED_S, serves=False)
    for stream in streams:
        ending = stream.result(WAIT_S)
        assert isinstance(ending, TierUnavailable), ending
    with pytest.raises(TierUnavailable) as refused:
        desk.serve(tier)
    assert refused.value.retry_after_s
    desk.orders.take_back(tier)
    for each in TIER_ROLES:
        desk.watches[each].wait(WAIT_S, serves=True)
    desk.assert_well(0)


def test_a_device_that_hangs_for_good_ends_the_daemon(desk: Desk) -> None:
    """Whoever supervises it sees a failure; the books of what it was doing balance afterwards."""
    stream = desk.ending(desk.stream(S, 900))
    desk.orders.give(S, "hang")
    ending = stream.result(WAIT_S)
    assert isinstance(ending, TierUnavailable), ending
    assert 1 == desk.daemon.process.wait(WAIT_S)
    report = check(desk.daemon.state_dir / "ledger.db")
    assert ((), 0) == (report.violations, report.open_holds)


def test_both_engines_at_once_come_back(desk: Desk) -> None:
    """A daemon without any tier waits for its own recovery before it gives up."""
    streams = [desk.ending(desk.stream(tier, 900)) for tier in TIER_ROLES]
    for tier in TIER_ROLES:
        desk.orders.give(tier, "error")
    for stream in streams:
        assert isinstance(stream.result(WAIT_S), TierUnavailable)
    for tier in TIER_ROLES:
        desk.watches[tier].wait(NOTICED_S, serves=False)
        desk.watches[tier].wait(WAIT_S, serves=True)
    desk.assert_well(0)


def test_an_engine_that_breaks_again_and_again_is_loaded_again_each_time(desk: Desk) -> None:
    """Later each time; between its failures it serves."""
    for failures in (1, 2):
        stream = desk.ending(desk.stream(T, 900))
        desk.orders.give(T, "error")
        assert isinstance(stream.result(WAIT_S), TierUnavailable)
        desk.watches[T].wait(NOTICED_S, serves=False)
        desk.watches[T].wait(WAIT_S, serves=True)
        until(
            lambda n=failures: n == desk.metric("engine_restarts_total", tier="tactical"),
            "the restart is not counted",
        )
    desk.assert_well(0)
