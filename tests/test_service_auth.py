"""Auth on the wire, before anything is read; who may call what is in test_service_rules."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from service_harness import WAIT_S, Harness, in_thread, serving

from sage_fed.client import Client
from sage_fed.errors import Forbidden, Unauthenticated
from sage_fed.service import edge

METHODS: list[MethodDescriptor] = [
    method
    for service in (
        edge.INFERENCE_SERVICE,
        edge.BUDGET_SERVICE,
        edge.MODEL_SERVICE,
        edge.ADMIN_SERVICE,
    )
    for method in service.methods
]


async def call_status(
    harness: Harness, method: MethodDescriptor, token: str | None, request: bytes = b""
) -> grpc.StatusCode:
    path = f"/{method.containing_service.full_name}/{method.name}"
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    if method.server_streaming:
        call = harness.channel.unary_stream(path)(request, metadata=metadata, timeout=WAIT_S)
    else:
        call = harness.channel.unary_unary(path)(request, metadata=metadata, timeout=WAIT_S)
    code: grpc.StatusCode = await call.code()
    return code


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
async def test_every_rpc_knows_its_caller_before_it_reads_the_request(
    tmp_path: Path, method: MethodDescriptor
) -> None:
    """Without a token, with a wrong one, and with garbage for a request: UNAUTHENTICATED."""
    async with serving(tmp_path, anonymous=None) as harness:
        garbage = b"\xff\xff\xff"
        codes = [
            await call_status(harness, method, None),
            await call_status(harness, method, None, garbage),
            await call_status(harness, method, "nobody", garbage),
        ]
    assert [grpc.StatusCode.UNAUTHENTICATED] * 3 == codes


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
async def test_admin_rpcs_are_for_admins(tmp_path: Path, method: MethodDescriptor) -> None:
    """A user's token opens three services; the fourth says PERMISSION_DENIED."""
    async with serving(tmp_path) as harness:
        garbage = b"\xff\xff\xff"
        user = await call_status(harness, method, "robot-token", garbage)
        admin = await call_status(harness, method, "admin-token", garbage)
    for_admins = method.containing_service is edge.ADMIN_SERVICE
    invalid, denied = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED
    assert (denied if for_admins else invalid, invalid) == (user, admin)


async def test_two_authorization_headers_are_refused(tmp_path: Path) -> None:
    """No guessing which of two callers is meant."""
    async with serving(tmp_path) as harness:
        headers = [("authorization", "Bearer robot-token"), ("authorization", "Bearer admin-token")]
        method = "/sage_fed.v1.AdminService/GetLoad"
        call = harness.channel.unary_unary(method)(b"", metadata=headers, timeout=WAIT_S)
        assert grpc.StatusCode.UNAUTHENTICATED is await call.code()


async def test_health_is_open_and_reflection_takes_a_caller(tmp_path: Path) -> None:
    """Load balancers have no token; tools send theirs, where one is needed at all."""
    async with serving(tmp_path, anonymous=None) as harness:
        health = harness.channel.unary_unary("/grpc.health.v1.Health/Check")
        reply = health_pb2.HealthCheckResponse.FromString(await health(b"", timeout=WAIT_S))
        assert health_pb2.HealthCheckResponse.NOT_SERVING == reply.status
        reflection = harness.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        )
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection([request.SerializeToString()], timeout=WAIT_S)
        assert grpc.StatusCode.UNAUTHENTICATED is await call.code()
        token = (("authorization", "Bearer robot-token"),)
        call = reflection([request.SerializeToString()], metadata=token, timeout=WAIT_S)
        listed = reflection_pb2.ServerReflectionResponse.FromString(await call.read())
        assert "sage_fed.v1.AdminService" in [
            service.name for service in listed.list_services_response.service
        ]


async def test_the_client_sends_its_token(tmp_path: Path) -> None:
    """The token decides who is asked for money, and what may be done."""
    async with serving(tmp_path, anonymous=None) as harness:

        def ask() -> list[str]:
            with Client(harness.address, token="robot-token") as robot:
                robot.generate("hello")
                with pytest.raises(Forbidden):
                    robot.load()
            with Client(harness.address) as nobody, pytest.raises(Unauthenticated):
                nobody.generate("hello")
            return [spec.account for spec in harness.jobs.specs]

        assert ["robot"] == await in_thread(ask)
