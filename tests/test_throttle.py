"""Calls a minute, for each account by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from service_harness import WAIT_S, in_thread, serving

from sage_fed.auth import Throttle
from sage_fed.auth.authenticator import CALL_BYTES
from sage_fed.client import Client
from sage_fed.errors import RateLimited

BUDGET = "/sage_fed.v1.BudgetService/GetBudget"


def test_so_many_calls_and_no_more() -> None:
    """The next one is refused, with the account, the limit and when to come again."""
    throttle = Throttle({"robot": 3, "free": 0, "arm": 3}.__getitem__)
    for _ in range(3):
        throttle.count("robot")
    with pytest.raises(RateLimited) as raised:
        throttle.count("robot")
    error = raised.value
    assert ("robot", "requests_per_minute", 3) == (error.account, error.limit, error.allowed)
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= 60
    throttle.count("arm")
    for _ in range(1000):
        throttle.count("free")


def test_a_long_message_is_several_calls() -> None:
    """Each 16 KiB that it has begun counts; what is more than all of them takes all of them."""
    throttle = Throttle({"robot": 5, "arm": 5, "one": 1, "free": 0}.__getitem__)
    throttle.count("robot")
    throttle.count_message("robot", 4 * CALL_BYTES)  # four in all
    throttle.count("robot")
    throttle.count_message("robot", CALL_BYTES)
    with pytest.raises(RateLimited):
        throttle.count("robot")
    throttle.count("arm")
    throttle.count("arm")
    with pytest.raises(RateLimited) as raised:
        throttle.count_message("arm", 5 * CALL_BYTES)
    assert raised.value.retry_after_s is not None
    assert raised.value.retry_after_s > 3 * 60 / 5
    throttle.count_message("arm", 4 * CALL_BYTES)  # what was refused has taken nothing
    throttle.count("one")
    throttle.count_message("one", 2**30)
    throttle.count_message("free", 2**30)


def test_what_costs_more_waits_longer() -> None:
    """Each further call needs a place of its own, and one comes free in a minute's part."""
    throttle = Throttle(lambda _: 6)
    for _ in range(6):
        throttle.count("robot")

    def told_s(refused: Callable[[], None]) -> float:
        with pytest.raises(RateLimited) as raised:
            refused()
        assert raised.value.retry_after_s is not None
        return raised.value.retry_after_s

    item = throttle._items["robot"]
    assert item is not None
    free_s = throttle._limiter.get_window_stats(item, "robot").reset_time - time.time()
    one_s = told_s(lambda: throttle.count("robot"))
    assert abs(one_s - max(free_s, 0.0)) < 5
    four_s = told_s(lambda: throttle.count_message("robot", 5 * CALL_BYTES))
    # The clock goes on between the two, by less than a place.
    assert 3 * 10 - 9 < four_s - one_s <= 3 * 10


async def test_the_size_of_a_message_counts(tmp_path: Path) -> None:
    """200,000 characters are 13 calls, and 20,000 are two."""
    async with serving(tmp_path, throttle=Throttle(lambda _: 14)) as harness:

        def ask() -> None:
            with Client(harness.address) as client:
                client.count_tokens("x" * 200_000)
                with pytest.raises(RateLimited):
                    client.count_tokens("x" * 20_000)

        await in_thread(ask)
        assert ["requests_per_minute"] == harness.denied


async def test_a_call_too_many_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    """RESOURCE_EXHAUSTED with ErrorInfo and RetryInfo; nothing of it reaches a service."""
    async with serving(tmp_path, throttle=Throttle(lambda _: 2)) as harness:

        async def ask() -> grpc.aio.AioRpcError:
            call = harness.channel.unary_unary(BUDGET)
            for _ in range(2):
                await call(b"", timeout=WAIT_S)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(b"\xff\xff", timeout=WAIT_S)
            return raised.value

        error = await asyncio.wait_for(ask(), WAIT_S)
        assert ["requests_per_minute"] == harness.denied
    assert grpc.StatusCode.RESOURCE_EXHAUSTED is error.code()
    status = rpc_status.from_call(error)  # type: ignore[arg-type] # it has what is asked of it
    assert status is not None
    found = {detail.type_url.rpartition(".")[2]: detail.value for detail in status.details}
    info = ErrorInfo.FromString(found["ErrorInfo"])
    limited = {"account": "local", "limit": "requests_per_minute", "allowed": "2"}
    assert ("RATE_LIMITED", limited) == (info.reason, dict(info.metadata))
    delay = RetryInfo.FromString(found["RetryInfo"]).retry_delay
    assert 0 < delay.seconds * 10**9 + delay.nanos <= 60 * 10**9


async def test_operators_and_health_are_not_counted(tmp_path: Path) -> None:
    """Who has to stop a robot that is too loud gets in, and so do load balancers."""
    async with serving(tmp_path, throttle=Throttle(lambda _: 1)) as harness:

        def operate() -> None:
            with Client(harness.address, "admin-token") as client:
                client.status()
                for _ in range(5):
                    client.load()
                with pytest.raises(RateLimited) as raised:
                    client.status()
            assert ("local", "requests_per_minute", 1) == (
                raised.value.account, raised.value.limit, raised.value.allowed,
            )  # fmt: skip

        await in_thread(operate)
        for _ in range(5):
            await harness.channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=WAIT_S)


async def test_each_message_of_a_conversation_is_a_call(tmp_path: Path) -> None:
    """One stream of requests is no way around the limit."""
    async with serving(tmp_path, throttle=Throttle(lambda _: 3)) as harness:
        reflection = harness.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        )
        request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
        talk = reflection(timeout=WAIT_S)
        for _ in range(3):
            await talk.write(request)
            assert await talk.read()
        await talk.write(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await talk.read()
        assert grpc.StatusCode.RESOURCE_EXHAUSTED is caught.value.code()
