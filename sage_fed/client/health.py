"""Waiting for a daemon to serve, by the standard health service.

Owns one Watch call. Knows no other server's names for its services: "" is the daemon,
"tactical" and "strategic" its tiers.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sage_fed.client.channel import open_channel
from sage_fed.client.failures import error_of


def wait_serving(address: str, service: str, timeout_s: float) -> bool:
    """Wait until `service` is SERVING; False where it is not in time.

    Raises:
        SageFedError: the server refused the question.
    """
    with open_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=service), timeout=timeout_s, wait_for_ready=True
        )
        try:
            return any(reply.status == health_pb2.HealthCheckResponse.SERVING for reply in watch)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return False
            raise error_of(error, address) from None
        finally:
            watch.cancel()
