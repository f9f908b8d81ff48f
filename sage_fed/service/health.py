"""grpc.health.v1 for load balancers and humans: Check, List and Watch, driven by tier states.

Owns what SERVING means for each name:
"" and the inference service follow the tiers (the first needs the tactical one, the second
either), each tier follows itself, the other services serve until the daemon stops.
While the daemon takes no jobs, because it drains or its ledger takes no entries, everything that
takes jobs is NOT_SERVING. An unknown name is NOT_FOUND
(Check) or SERVICE_UNKNOWN (Watch). Does not know what makes a tier ready.

The servicer of gRPC's package is not used: a watcher that does not read holds its lock, and with
it every change of a status, the daemon's stop among them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from sage_fed.core import TIER_ROLES, Tier, TierState
from sage_fed.errors import NotFound
from sage_fed.service.catalogue import INFERENCE, SERVICES
from sage_fed.service.edge import Edge

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The health service; NOT_SERVING all over until the first `update`."""

    def __init__(self) -> None:
        self._serving = dict.fromkeys(names(), False)
        self._stopped = False
        self._watchers: set[asyncio.Event] = set()

    def register(self, server: grpc.aio.Server, edge: Edge) -> None:
        """Add the service to a server that has not started."""
        check, listing = health_pb2.HealthCheckRequest, health_pb2.HealthListRequest
        path = f"/{SERVICE_NAME}/"
        handlers = {
            "Check": edge.answering(f"{path}Check", check, self._check),
            "List": edge.answering(f"{path}List", listing, self._list),
            "Watch": edge.streaming(f"{path}Watch", check, self._watch),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),)
        )

    def update(self, states: Mapping[Tier, TierState], *, takes_jobs: bool = True) -> None:
        """Tell every watcher what serves now."""
        if not self._stopped:
            self._publish(serving(states, takes_jobs=takes_jobs))

    def stop(self) -> None:
        """Say NOT_SERVING under every name, for good: the daemon is about to go."""
        self._stopped = True
        self._publish(dict.fromkeys(names(), False))

    async def _check(self, request: health_pb2.HealthCheckRequest, _: None) -> Message:
        if request.service not in self._serving:
            raise NotFound("no service of that name is known here")
        reply: Message = health_pb2.HealthCheckResponse(status=self._status(request.service))
        return reply

    async def _list(self, _: Message, __: None) -> Message:
        statuses = {
            name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in names()
        }
        reply: Message = health_pb2.HealthListResponse(statuses=statuses)
        return reply

    async def _watch(
        self, request: health_pb2.HealthCheckRequest, _: None
    ) -> AsyncGenerator[Message, None]:
        changed, last = asyncio.Event(), None
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                if (status := self._status(request.service)) != last:
                    yield health_pb2.HealthCheckResponse(status=status)
                    last = status
                else:
                    # For as long as the client watches; its connection's keepalive says whether.
                    await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _status(self, name: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        response = health_pb2.HealthCheckResponse
        if name not in self._serving:
            return _UNKNOWN
        return response.SERVING if self._serving[name] else response.NOT_SERVING

    def _publish(self, statuses: Mapping[str, bool]) -> None:
        self._serving = dict(statuses)
        for changed in self._watchers:
            changed.set()


def names() -> Iterable[str]:
    """Return every name that can be asked for."""
    return ("", *SERVICES, *(tier.name for tier in TIER_ROLES))


def serving(states: Mapping[Tier, TierState], *, takes_jobs: bool) -> dict[str, bool]:
    """Return whether each name serves; a tier without a state does not."""
    ready = {tier: states.get(tier) is TierState.READY and takes_jobs for tier in TIER_ROLES}
    return {
        **dict.fromkeys(SERVICES, True),
        INFERENCE: any(ready.values()),
        "": ready[Tier.TACTICAL],
        **{tier.name: ready[tier] for tier in TIER_ROLES},
    }
