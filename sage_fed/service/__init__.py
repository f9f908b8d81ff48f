"""The gRPC edge: protobuf in, protobuf out.

`edge` admits calls (caller, role, bounds of the request, errors to status) by its table of who
may call what; `services` are the four services; `grpc_server` binds them, with health and
reflection; `calls` and `connections` bound what peers keep open; `tls` is what they are shown.
Import from here.
"""

from sage_fed.service.grpc_server import BoundServer, Health, build_server
from sage_fed.service.services import Operations
from sage_fed.service.tls import LiveCertificate

__all__ = ["BoundServer", "Health", "LiveCertificate", "Operations", "build_server"]
