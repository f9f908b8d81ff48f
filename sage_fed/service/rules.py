"""Who may call which RPC: one table, of every method that the server has.

Owns the policy, and nothing of how it is enforced (`edge`). A method that is not named here
cannot be registered, and one that is not registered is UNIMPLEMENTED for everybody.

Health is open to whoever can connect: load balancers and kubelets have no token, and it says
which tiers serve, no names of models, accounts or files. Reflection tells what the public
`proto/` tells, and costs work: it takes a caller, as every service that costs something does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sage_fed.core import Role

OPEN = None
"""No caller is asked for."""

RULES: Mapping[str, Role | None] = MappingProxyType(
    {
        "/sage_fed.v1.InferenceService/Generate": Role.USER,
        "/sage_fed.v1.InferenceService/GenerateStream": Role.USER,
        "/sage_fed.v1.InferenceService/Quote": Role.USER,
        "/sage_fed.v1.InferenceService/CountTokens": Role.USER,
        "/sage_fed.v1.BudgetService/GetBudget": Role.USER,
        "/sage_fed.v1.BudgetService/ListEntries": Role.USER,
        "/sage_fed.v1.ModelService/ListModels": Role.USER,
        "/sage_fed.v1.ModelService/GetModel": Role.USER,
        "/sage_fed.v1.ModelService/GetStatus": Role.USER,
        "/sage_fed.v1.AdminService/Abort": Role.ADMIN,
        "/sage_fed.v1.AdminService/Drain": Role.ADMIN,
        "/sage_fed.v1.AdminService/SetBudget": Role.ADMIN,
        "/sage_fed.v1.AdminService/GetLoad": Role.ADMIN,
        "/sage_fed.v1.AdminService/Calibrate": Role.ADMIN,
        "/sage_fed.v1.AdminService/AdoptRateCard": Role.ADMIN,
        "/grpc.health.v1.Health/Check": OPEN,
        "/grpc.health.v1.Health/List": OPEN,
        "/grpc.health.v1.Health/Watch": OPEN,
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Role.USER,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.USER,
    }
)
"""Full method name -> the role that it takes."""
