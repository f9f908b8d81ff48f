"""grpc.health.v1: what serves when, by Check and by Watch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from service_harness import WAIT_S, Harness, serving

from sage_fed.core import TIER_ROLES, Tier, TierState
from sage_fed.service import edge
from sage_fed.service.grpc_server import names
from sage_fed.service.grpc_server import serving as what_serves

Status = health_pb2.HealthCheckResponse
LOADING, READY, FAILED, DRAINING = (
    TierState.LOADING, TierState.READY, TierState.FAILED, TierState.DRAINING,
)  # fmt: skip
OTHERS = set(edge.SERVICES) - {edge.INFERENCE}
INFERENCE = edge.INFERENCE


@pytest.mark.parametrize(
    ("tactical", "strategic", "draining", "expected"),
    [
        (LOADING, LOADING, False, set()),
        (READY, LOADING, False, {"", INFERENCE, "tactical"}),
        (READY, READY, False, {"", INFERENCE, "tactical", "strategic"}),
        (FAILED, READY, False, {INFERENCE, "strategic"}),
        (READY, FAILED, False, {"", INFERENCE, "tactical"}),
        (FAILED, FAILED, False, set()),
        (READY, READY, True, set()),
        (DRAINING, DRAINING, False, set()),
    ],
)
def test_what_serves_in_which_state(
    tactical: TierState, strategic: TierState, draining: bool, expected: set[str]
) -> None:
    """The empty name needs the tactical tier, inference either, each tier itself."""
    states = {Tier.TACTICAL: tactical, Tier.STRATEGIC: strategic}
    verdict = what_serves(TIER_ROLES, states, takes_jobs=not draining)
    assert set(names(TIER_ROLES)) == verdict.keys()
    assert expected | OTHERS == {name for name, serves in verdict.items() if serves}


async def check(harness: Harness, name: str) -> int:
    call = harness.channel.unary_unary("/grpc.health.v1.Health/Check")
    request = health_pb2.HealthCheckRequest(service=name).SerializeToString()
    status: int = Status.FromString(await call(request, timeout=WAIT_S)).status
    return status


def states(tactical: TierState, strategic: TierState) -> Mapping[Tier, TierState]:
    return {Tier.TACTICAL: tactical, Tier.STRATEGIC: strategic}


async def test_check_follows_the_tiers(tmp_path: Path) -> None:
    """NOT_SERVING until told otherwise; then each name for itself; and nothing after stop."""
    async with serving(tmp_path) as harness:
        assert {Status.NOT_SERVING} == {await check(harness, name) for name in names(TIER_ROLES)}
        harness.bound.health.update(states(READY, LOADING))
        assert [Status.SERVING, Status.SERVING, Status.NOT_SERVING] == [
            await check(harness, name) for name in ("", "tactical", "strategic")
        ]
        harness.bound.health.stop()
        harness.bound.health.update(states(READY, READY))
        assert {Status.NOT_SERVING} == {await check(harness, name) for name in names(TIER_ROLES)}


async def test_check_of_an_unknown_name_is_not_found(tmp_path: Path) -> None:
    """A typo in a probe is told from a tier that is down."""
    async with serving(tmp_path) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await check(harness, "strategc")
    assert grpc.StatusCode.NOT_FOUND is raised.value.code()


async def test_list_names_everything_that_can_be_checked(tmp_path: Path) -> None:
    """One call says what Check would say of each name."""
    async with serving(tmp_path) as harness:
        harness.bound.health.update(states(READY, LOADING))
        call = harness.channel.unary_unary("/grpc.health.v1.Health/List")
        listed = health_pb2.HealthListResponse.FromString(await call(b"", timeout=WAIT_S))
        expected = {name: await check(harness, name) for name in names(TIER_ROLES)}
    assert expected == {name: entry.status for name, entry in listed.statuses.items()}


async def test_watch_tells_of_every_change(tmp_path: Path) -> None:
    """A watcher hears the state at once and each change after it."""
    async with serving(tmp_path) as harness:
        watch = harness.channel.unary_stream("/grpc.health.v1.Health/Watch")
        request = health_pb2.HealthCheckRequest(service="strategic").SerializeToString()
        call = watch(request, timeout=WAIT_S)

        async def heard() -> int:
            raw = await asyncio.wait_for(call.read(), WAIT_S)
            status: int = Status.FromString(raw).status
            return status

        assert Status.NOT_SERVING == await heard()
        harness.bound.health.update(states(READY, READY))
        assert Status.SERVING == await heard()
        harness.bound.health.update(states(READY, READY), takes_jobs=False)
        assert Status.NOT_SERVING == await heard()
        call.cancel()


async def test_watch_of_an_unknown_name_stays_open(tmp_path: Path) -> None:
    """As the protocol asks: SERVICE_UNKNOWN, not an error."""
    async with serving(tmp_path) as harness:
        watch = harness.channel.unary_stream("/grpc.health.v1.Health/Watch")
        request = health_pb2.HealthCheckRequest(service="nowhere").SerializeToString()
        call = watch(request, timeout=WAIT_S)
        raw = await asyncio.wait_for(call.read(), WAIT_S)
        assert Status.SERVICE_UNKNOWN == Status.FromString(raw).status
        assert not call.done()
        call.cancel()
