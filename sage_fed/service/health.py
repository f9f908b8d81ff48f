"""grpc.health.v1 for load balancers and humans: Check, List and Watch, driven by tier states.

Owns what SERVING means for each name:
"" and the inference service follow the tiers (the first needs the tactical one, the second
either), each tier follows itself, the other services serve until the daemon stops.
While the daemon takes no jobs, because it drains or its ledger takes no entries, everything that
takes jobs is NOT_SERVING. An unknown name is NOT_FOUND
(Check) or SERVICE_UNKNOWN (Watch). Does not know what makes a tier ready.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2

from sage_fed.core import Tier, TierState
from sage_fed.service.catalogue import INFERENCE, SERVICES
from sage_fed.service.edge import Context, Edge
from sage_fed.service.standard import answering, writing

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Health:
    """The health service; NOT_SERVING all over until the first `update`."""

    def __init__(self) -> None:
        self._servicer = health.aio.HealthServicer()  # type: ignore[attr-defined] # stubs lack it

    async def register(self, server: grpc.aio.Server, edge: Edge) -> None:
        """Add the service to a server that has not started."""
        await self._publish(dict.fromkeys(names(), False))
        check, listing = health_pb2.HealthCheckRequest, health_pb2.HealthListRequest
        let_in = {
            name: edge.check(f"/{SERVICE_NAME}/{name}") for name in ("Check", "List", "Watch")
        }
        handlers = {
            "Check": answering(let_in["Check"], check, self._servicer.Check),
            "List": answering(let_in["List"], listing, self._list),
            "Watch": writing(let_in["Watch"], check, self._servicer.Watch),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),)
        )

    async def update(self, states: Mapping[Tier, TierState], *, takes_jobs: bool = True) -> None:
        """Tell every watcher what serves now."""
        await self._publish(serving(states, takes_jobs=takes_jobs))

    async def stop(self) -> None:
        """Say NOT_SERVING under every name, for good: the daemon is about to go."""
        await self._servicer.enter_graceful_shutdown()

    async def _list(self, _: Message, context: Context) -> Message:
        # The servicer of gRPC's package has no List yet; of known names, its Check says the same.
        ask = health_pb2.HealthCheckRequest
        statuses = {
            name: await self._servicer.Check(ask(service=name), context) for name in names()
        }
        reply: Message = health_pb2.HealthListResponse(statuses=statuses)
        return reply

    async def _publish(self, statuses: Mapping[str, bool]) -> None:
        response = health_pb2.HealthCheckResponse
        for name, serves in statuses.items():
            await self._servicer.set(name, response.SERVING if serves else response.NOT_SERVING)


def names() -> Iterable[str]:
    """Return every name that can be asked for."""
    return ("", *SERVICES, *(tier.value for tier in Tier))


def serving(states: Mapping[Tier, TierState], *, takes_jobs: bool) -> dict[str, bool]:
    """Return whether each name serves; a tier without a state does not."""
    ready = {tier: states.get(tier) is TierState.READY and takes_jobs for tier in Tier}
    return {
        **dict.fromkeys(SERVICES, True),
        INFERENCE: any(ready.values()),
        "": ready[Tier.TACTICAL],
        **{tier.value: ready[tier] for tier in Tier},
    }
