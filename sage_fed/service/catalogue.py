"""The services that we define, by their descriptors: one list for edge, health and reflection."""

from __future__ import annotations

from google.protobuf.descriptor import ServiceDescriptor

from sage_fed.v1 import admin_pb2, budget_pb2, inference_pb2, model_pb2

INFERENCE_SERVICE: ServiceDescriptor = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
BUDGET_SERVICE: ServiceDescriptor = budget_pb2.DESCRIPTOR.services_by_name["BudgetService"]
MODEL_SERVICE: ServiceDescriptor = model_pb2.DESCRIPTOR.services_by_name["ModelService"]
ADMIN_SERVICE: ServiceDescriptor = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]

INFERENCE: str = INFERENCE_SERVICE.full_name
SERVICES: tuple[str, ...] = tuple(
    service.full_name
    for service in (INFERENCE_SERVICE, BUDGET_SERVICE, MODEL_SERVICE, ADMIN_SERVICE)
)
"""Full names, as gRPC tools ask for them."""
