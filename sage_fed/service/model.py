"""ModelService: which models serve, and the daemon at a glance.

Owns nothing but the translation; what it says is the daemon's. Cannot fail but on the request.
"""

from __future__ import annotations

from collections.abc import Mapping

from sage_fed.errors import InvalidField, NotFound
from sage_fed.service import reports
from sage_fed.service.edge import Call, Method
from sage_fed.service.ports import Operations
from sage_fed.service.requests import parse_tier
from sage_fed.v1 import model_pb2


class ModelService:
    """ListModels, GetModel and GetStatus."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @property
    def methods(self) -> Mapping[str, Method]:
        """The service's RPCs by name."""
        return {
            "ListModels": self.list_models,
            "GetModel": self.get_model,
            "GetStatus": self.get_status,
        }

    async def list_models(
        self,
        request: model_pb2.ListModelsRequest,  # noqa: ARG002 - it is empty
        call: Call,  # noqa: ARG002 - every method has it
    ) -> model_pb2.ListModelsResponse:
        """Return both tiers' models, whatever their state."""
        models = [reports.model_of(model) for model in self._operations.models()]
        return model_pb2.ListModelsResponse(models=models)

    async def get_model(
        self,
        request: model_pb2.GetModelRequest,
        call: Call,  # noqa: ARG002 - every method has it
    ) -> model_pb2.GetModelResponse:
        """Return one tier's model."""
        tier = parse_tier("tier", request.tier)
        if tier is None:
            raise InvalidField("tier", "must be TIER_TACTICAL or TIER_STRATEGIC")
        for model in self._operations.models():
            if model.tier is tier:
                return model_pb2.GetModelResponse(model=reports.model_of(model))
        raise NotFound(f"this daemon has no {tier.name} tier")

    async def get_status(
        self,
        request: model_pb2.GetStatusRequest,  # noqa: ARG002 - it is empty
        call: Call,  # noqa: ARG002 - every method has it
    ) -> model_pb2.GetStatusResponse:
        """Return the daemon at a glance."""
        return reports.status_of(self._operations.status())
