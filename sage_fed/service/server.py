"""The gRPC server: our four services, health and reflection, behind one bound port.

Owns the transport's limits. The server is bound but not started when it is handed back.
Fails with `ConfigError` where the address cannot be bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2  # noqa: F401 - its schema has to be known to reflection

from sage_fed.auth import Authenticator
from sage_fed.core import Role
from sage_fed.errors import ConfigError
from sage_fed.service import catalogue, health
from sage_fed.service.admin import AdminService
from sage_fed.service.budget import BudgetService
from sage_fed.service.edge import Edge
from sage_fed.service.health import Health
from sage_fed.service.inference import InferenceService
from sage_fed.service.model import ModelService
from sage_fed.service.ports import Books, Jobs, Operations
from sage_fed.service.reflection import register_reflection
from sage_fed.settings import Address, LimitSettings

MAX_METADATA_BYTES = 16 * 1024
"""All headers of one request together; ours fit into a fraction of it."""

MAX_CONCURRENT_STREAMS = 1024
"""Of one connection. Jobs are bounded by the broker, with a reason; this bounds everything else."""

KEEPALIVE_S = 30.0
"""A client that vanished without a word is noticed this long after, and its jobs end."""

MIN_PING_INTERVAL_S = 10.0
"""A client that pings more often than this is disconnected."""


@dataclass(frozen=True, slots=True)
class BoundServer:
    """A server that holds its port and awaits `server.start()`."""

    server: grpc.aio.Server
    address: Address
    health: Health


async def build_server(
    listen: Address,
    *,
    authenticator: Authenticator,
    limits: LimitSettings,
    jobs: Jobs,
    books: Books,
    operations: Operations,
) -> BoundServer:
    """Build the server and bind it; port 0 takes a free one, named in the answer.

    Raises:
        ConfigError: the address is taken, not this machine's, or not allowed.
    """
    server = grpc.aio.server(options=server_options(limits))
    edge = Edge(authenticator)
    server.add_generic_rpc_handlers(
        (
            edge.handler(catalogue.INFERENCE_SERVICE, InferenceService(jobs, limits).methods),
            edge.handler(catalogue.BUDGET_SERVICE, BudgetService(books, operations).methods),
            edge.handler(catalogue.MODEL_SERVICE, ModelService(operations).methods),
            edge.handler(
                catalogue.ADMIN_SERVICE,
                AdminService(jobs, books, operations).methods,
                role=Role.ADMIN,
            ),
        )
    )
    watch = Health()
    await watch.register(server)
    register_reflection(server, (*catalogue.SERVICES, health.SERVICE_NAME))
    return BoundServer(server, _bind(server, listen), watch)


def server_options(limits: LimitSettings) -> tuple[tuple[str, int], ...]:
    """Return gRPC's channel arguments."""
    return (
        # Without it a second daemon would share the port, and steal every other client.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_S * 1000) // 3),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(MIN_PING_INTERVAL_S * 1000)),
        ("grpc.http2.max_ping_strikes", 2),
    )


def _bind(server: grpc.aio.Server, listen: Address) -> Address:
    try:
        port = server.add_insecure_port(str(listen))
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(
            f"listen: cannot bind {listen}; another daemon may have it, "
            "or it is not an address of this machine"
        )
    return Address(listen.host, port)
