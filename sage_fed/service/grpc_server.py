"""The gRPC server: our four services, health and reflection, behind one bound port.

Owns the transport's limits, what SERVING means for each name of the health service, and server
reflection (v1 and v1alpha), from which grpcurl and `buf curl` learn our schema.
The server is bound but not started when it is handed back.
Fails with `Occupied` where the address cannot be bound.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import stat
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from sage_fed.auth import Authenticator, Throttle
from sage_fed.core import TIER_ROLES, Address, Tier, TierState, UnixSocket
from sage_fed.errors import ConfigError, NotFound, Occupied, SageFedError
from sage_fed.ledger import Ledger
from sage_fed.service.calls import OpenCalls
from sage_fed.service.connections import Connections
from sage_fed.service.edge import (
    ADMIN_SERVICE,
    BUDGET_SERVICE,
    INFERENCE,
    INFERENCE_SERVICE,
    MODEL_SERVICE,
    SERVICES,
    Edge,
)
from sage_fed.service.services import (
    RULES,
    AdminService,
    BudgetService,
    InferenceService,
    ModelService,
    Operations,
)
from sage_fed.service.tls import LiveCertificate
from sage_fed.settings import LimitSettings
from sage_fed.trusted_files import os_error
from sage_fed.workers import Workers

if TYPE_CHECKING:
    from sage_fed.jobs.broker import Broker
    from sage_fed.metrics import Metrics
    from sage_fed.tracing import Tracing

MAX_METADATA_BYTES = 16 * 1024
"""All headers of one request together; ours fit into a fraction of it."""

WINDOW_BYTES = 16 * 1024
"""What a stream may send before its request is read, and so what one that waits costs. A longer
request takes one round trip more."""

OWN_FILES = 512
"""Descriptors that are kept for all but connections: models, the ledger, metrics, threads."""

KEEPALIVE_S = 30.0
"""A client that vanished without a word is noticed this long after, and its jobs end."""

MIN_PING_INTERVAL_S = 10.0
"""A client that pings more often than this is disconnected."""


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BoundServer:
    """A server that holds its port and awaits `server.start()`."""

    server: grpc.aio.Server
    address: Address | UnixSocket
    health: Health
    calls: OpenCalls


async def build_server(
    listen: Address | UnixSocket,
    *,
    authenticator: Authenticator,
    limits: LimitSettings,
    jobs: Broker,
    ledger: Ledger,
    operations: Operations,
    workers: Workers,
    tiers: Sequence[Tier] = TIER_ROLES,
    throttle: Throttle | None = None,
    certificate: LiveCertificate | None = None,
    on_denied: Callable[[str], None] = lambda _: None,
    metrics: Metrics | None = None,
    tracing: Tracing | None = None,
) -> BoundServer:
    """Build the server and bind it; port 0 takes a free one, named in the answer.

    Without a certificate, and on a Unix socket, it speaks plain text.

    Raises:
        Occupied: the address is taken, not this machine's, or not allowed.
    """
    server = grpc.aio.server(options=server_options(limits, connections_within(limits)))
    connections = Connections(limits.max_connections_per_address)
    calls = OpenCalls(limits, connections, metrics)
    edge = Edge(
        authenticator,
        RULES,
        calls,
        limits,
        throttle=throttle,
        certificates=certificate is not None and certificate.needs_clients,
        on_denied=on_denied,
        tracing=tracing,
        tiers=tiers,
    )
    services: Mapping[ServiceDescriptor, object] = {
        INFERENCE_SERVICE: InferenceService(jobs, limits, workers, tiers),
        BUDGET_SERVICE: BudgetService(ledger, operations),
        MODEL_SERVICE: ModelService(operations),
        ADMIN_SERVICE: AdminService(jobs, ledger, operations, calls),
    }
    server.add_generic_rpc_handlers(
        tuple(edge.handler(service, servicer) for service, servicer in services.items())
    )
    watch = Health(tiers)
    watch.register(server, edge)
    register_reflection(server, edge, (*SERVICES, SERVICE_NAME))
    address = (
        _bind_socket(server, listen)
        if isinstance(listen, UnixSocket)
        else _bind(server, listen, certificate)
    )
    connections.follow(address)
    return BoundServer(server, address, watch, calls)


def connections_within(limits: LimitSettings) -> int:
    """Return how many connections there are descriptors for; asks for as many as it takes.

    Without a descriptor to spare the ledger, the metrics and the next checkpoint could not open
    their files, for as long as clients hold theirs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.max_connections + OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits.max_connections
    room = max(soft - OWN_FILES, soft // 2)
    _log.warning(
        "limits.max_connections is %d, and %d open files (ulimit -n) have room for %d",
        limits.max_connections, soft, room,
    )  # fmt: skip
    return room


def server_options(limits: LimitSettings, max_connections: int) -> tuple[tuple[str, int], ...]:
    """Return gRPC's channel arguments."""
    return (
        # Without it a second daemon would share the port, and steal every other client.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.largest_message_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", limits.max_connection_calls),
        # Fixed: gRPC would widen it to megabytes for a fast client, read or unread.
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", int(limits.receive_timeout_s * 1000)),
        ("grpc.max_connection_idle_ms", int(limits.idle_connection_s * 1000)),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_S * 1000) // 3),
        # Also of the pings that measure a connection: with one of those under way no other is
        # sent, and gRPC would give it a minute.
        ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_S * 1000) // 3),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(MIN_PING_INTERVAL_S * 1000)),
        ("grpc.http2.max_ping_strikes", 2),
    )


def _bind(server: grpc.aio.Server, listen: Address, certificate: LiveCertificate | None) -> Address:
    try:
        if certificate is None:
            port = server.add_insecure_port(str(listen))
        else:
            port = server.add_secure_port(str(listen), certificate.credentials())
    except RuntimeError:
        port = 0
    if port == 0:
        raise Occupied(
            f"listen: cannot bind {listen}; another daemon may have it, "
            "or it is not an address of this machine"
        )
    return Address(listen.host, port)


def _bind_socket(server: grpc.aio.Server, listen: UnixSocket) -> UnixSocket:
    """Bind a socket that its owner and its group may connect to (mode 0660)."""
    _require_unused(listen)
    # The file is born with its mode; a chmod after it would leave a moment for everybody.
    mask = os.umask(0o117)
    try:
        bound = server.add_insecure_port(str(listen))
    except RuntimeError:
        bound = 0
    finally:
        os.umask(mask)
    if not bound:
        raise _why_unbound(listen)
    return listen


def _why_unbound(listen: UnixSocket) -> SageFedError:
    """Return why no socket can be made there. gRPC does not say: the kernel is asked again."""
    beside = Path(listen.path).with_name(f".{os.getpid()}")
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(beside))
    except OSError as error:
        return os_error(f"listen: cannot bind {listen}", error)
    finally:
        beside.unlink(missing_ok=True)
    return ConfigError(f"listen: cannot bind {listen}; its directory has to be writable")


def _require_unused(listen: UnixSocket) -> None:
    """Refuse to take a socket from a daemon that serves it; gRPC would replace it silently.

    Raises:
        Occupied: another process listens there.
        ConfigError: it is another kind of file.
    """
    try:
        mode = Path(listen.path).stat().st_mode
    except OSError:
        return  # what is wrong with it, if anything, shows when it is bound
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"listen: {listen.path} is a file, and no socket; remove it")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        # EAGAIN is a listener with a full queue.
        if probe.connect_ex(listen.path) in (0, errno.EAGAIN):
            raise Occupied(f"listen: cannot bind {listen}; another daemon has it")


SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The health service; NOT_SERVING all over until the first `update`."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._tiers = tiers
        self._serving = dict.fromkeys(names(tiers), False)
        self._stopped = False
        self._watchers: set[asyncio.Event] = set()

    def register(self, server: grpc.aio.Server, edge: Edge) -> None:
        """Add the service to a server that has not started."""
        check, listing = health_pb2.HealthCheckRequest, health_pb2.HealthListRequest
        path = f"/{SERVICE_NAME}/"
        handlers = {
            "Check": edge.answering(f"{path}Check", check, self._check),
            "List": edge.answering(f"{path}List", listing, self._list),
            "Watch": edge.answering(f"{path}Watch", check, self._watch, streams=True),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),)
        )

    def update(self, states: Mapping[Tier, TierState], *, takes_jobs: bool = True) -> None:
        """Tell every watcher what serves now."""
        if not self._stopped:
            self._publish(serving(self._tiers, states, takes_jobs=takes_jobs))

    def stop(self) -> None:
        """Say NOT_SERVING under every name, for good: the daemon is about to go."""
        self._stopped = True
        self._publish(dict.fromkeys(names(self._tiers), False))

    async def _check(self, request: health_pb2.HealthCheckRequest, _: None) -> Message:
        if request.service not in self._serving:
            raise NotFound("no service of that name is known here")
        reply: Message = health_pb2.HealthCheckResponse(status=self._status(request.service))
        return reply

    async def _list(self, _: Message, __: None) -> Message:
        statuses = {
            name: health_pb2.HealthCheckResponse(status=self._status(name))
            for name in self._serving
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


def names(tiers: Iterable[Tier]) -> Iterable[str]:
    """Return every name that can be asked for."""
    return ("", *SERVICES, *(tier.name for tier in tiers))


def serving(
    tiers: Sequence[Tier], states: Mapping[Tier, TierState], *, takes_jobs: bool
) -> dict[str, bool]:
    """Return whether each name serves; a tier without a state does not."""
    ready = {tier: states.get(tier) is TierState.READY and takes_jobs for tier in tiers}
    return {
        **dict.fromkeys(SERVICES, True),
        INFERENCE: any(ready.values()),
        "": ready[min(tiers)],
        **{tier.name: ready[tier] for tier in tiers},
    }


V1ALPHA = "grpc.reflection.v1alpha"
V1 = "grpc.reflection.v1"
SERVICE = "ServerReflection"
METHOD = "ServerReflectionInfo"


def register_reflection(server: grpc.aio.Server, edge: Edge, services: Iterable[str]) -> None:
    """Serve the schema of `services` (full names) and of reflection itself."""
    pool = descriptor_pool.Default()
    if not _known(pool, f"{V1}.{SERVICE}"):
        pool.AddSerializedFile(v1_file().SerializeToString())
    names = (*services, f"{V1}.{SERVICE}", f"{V1ALPHA}.{SERVICE}")
    servicer = reflection.aio.ReflectionServicer(names, pool)  # type: ignore[attr-defined] # stubs lack it
    request_class, answer = reflection_pb2.ServerReflectionRequest, servicer.ServerReflectionInfo
    for service in (f"{V1}.{SERVICE}", f"{V1ALPHA}.{SERVICE}"):
        handler = edge.conversing(f"/{service}/{METHOD}", request_class, answer)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {METHOD: handler}),)
        )


def v1_file() -> FileDescriptorProto:
    """Return the v1 schema: the v1alpha one, renamed."""
    file = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = file.name.replace("v1alpha", "v1")
    file.package = V1
    for field in (field for message in file.message_type for field in message.field):
        if field.HasField("type_name"):
            field.type_name = field.type_name.replace(f".{V1ALPHA}.", f".{V1}.")
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(f".{V1ALPHA}.", f".{V1}.")
        method.output_type = method.output_type.replace(f".{V1ALPHA}.", f".{V1}.")
    return file


def _known(pool: descriptor_pool.DescriptorPool, symbol: str) -> bool:
    try:
        pool.FindFileContainingSymbol(symbol)
    except KeyError:
        return False
    return True
