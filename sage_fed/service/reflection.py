"""Server reflection, v1 and v1alpha: how grpcurl and `buf curl` learn our schema.

grpcio-reflection ships v1alpha only. v1 is the same protocol byte for byte under another
package name, so the same servicer answers under both; the v1 descriptor is made from the
v1alpha one, so that a tool that describes every listed service finds this one too.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

from sage_fed.service.edge import Edge

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
