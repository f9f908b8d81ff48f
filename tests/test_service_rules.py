"""Default-deny: every RPC that the server has is named by a rule, and obeys it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from service_harness import WAIT_S, Harness, serving
from service_harness import token as known

from sage_fed.auth import Register
from sage_fed.core import Caller, Role
from sage_fed.service.edge import OPEN
from sage_fed.service.services import RULES


class Registered:
    """Everything that is registered on a server of grpc.aio, whoever registers it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.methods: set[str] = set()
        server = grpc.aio._server.Server
        generic, named = server.add_generic_rpc_handlers, server.add_registered_method_handlers

        def add_generic(own: object, handlers: Sequence[Any]) -> None:
            handlers = tuple(handlers)
            for handler in handlers:
                # A handler of another kind could answer anything: it has to be looked at first.
                assert type(handler) is grpc._utilities.DictionaryGenericHandler
                self.methods |= handler._method_handlers.keys()
            generic(own, handlers)

        def add_named(own: object, service: str, handlers: dict[str, Any]) -> None:
            self.methods |= {f"/{service}/{name}" for name in handlers}
            named(own, service, handlers)

        monkeypatch.setattr(server, "add_generic_rpc_handlers", add_generic)
        monkeypatch.setattr(server, "add_registered_method_handlers", add_named)


async def codes(
    harness: Harness, paths: Iterable[str], bearer: str | None
) -> dict[str, grpc.StatusCode]:
    """What each method says to bytes that are no message."""
    headers = () if bearer is None else (("authorization", f"Bearer {bearer}"),)
    found = {}
    for path in paths:
        call = harness.channel.stream_stream(path)(
            iter([b"\xff\xff"]), metadata=headers, timeout=WAIT_S
        )
        found[path] = await call.code()
    return found


async def test_every_registered_method_is_named_by_a_rule_and_obeys_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the real server has is exactly what the table names; each role opens what it may."""
    registered = Registered(monkeypatch)
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    nobody = {True: invalid, False: grpc.StatusCode.UNAUTHENTICATED}
    denied = grpc.StatusCode.PERMISSION_DENIED
    monitor = Register((known("eye-token", "eye", Role.MONITOR),))
    async with serving(tmp_path, anonymous=None, register=monitor) as harness:
        assert RULES.keys() == registered.methods
        without = await codes(harness, RULES, None)
        wrong = await codes(harness, RULES, "nobody")
        user = await codes(harness, RULES, "robot-token")
        eye = await codes(harness, RULES, "eye-token")
        admin = await codes(harness, RULES, "admin-token")
    assert {path: nobody[role is OPEN] for path, role in RULES.items()} == without == wrong
    assert {p: invalid if r in (OPEN, Role.USER) else denied for p, r in RULES.items()} == user
    assert {p: invalid if r is OPEN else denied for p, r in RULES.items()} == eye
    assert dict.fromkeys(RULES, invalid) == admin


async def test_a_method_without_a_rule_cannot_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forgetting a rule fails every start, and is no open door."""
    fewer = {path: role for path, role in RULES.items() if not path.endswith("/Quote")}
    monkeypatch.setattr("sage_fed.service.grpc_server.RULES", fewer)
    with pytest.raises(AssertionError, match=r"no rule names .*/Quote"):
        async with serving(tmp_path):
            pass


@pytest.mark.parametrize("bearer", [None, "robot-token", "admin-token"])
async def test_a_method_that_nobody_registered_is_denied_to_everybody(
    tmp_path: Path, bearer: str | None
) -> None:
    """Also one beside ours, and gRPC's own that we do not offer."""
    paths = (
        "/sage_fed.v1.AdminService/Shutdown",
        "/grpc.channelz.v1.Channelz/GetServers",
        "/grpc.health.v1.Health/Set",
    )
    async with serving(tmp_path, anonymous=Caller("local", Role.USER)) as harness:
        said = await codes(harness, paths, bearer)
    assert dict.fromkeys(paths, grpc.StatusCode.UNIMPLEMENTED) == said
