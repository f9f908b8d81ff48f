"""The daemon itself on the device: a real process, both shapes, through gRPC.

Owns: the process, the order of what is done to it: mixed loads, cancels, a calibration.
Needs the daemon's packages (gRPC, ledger, settings), room on disk, and time; where one of them
is missing the part is skipped, and says which.

Tokens per second are beside those of the executor alone under the same loads
(`interference.mixed`): what is lost between them is gRPC, the ledger and the event loop.
"""

from __future__ import annotations

import asyncio
import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_checkpoints import Checkpoints, Skipped
from gpu_shapes import Plan, Shape
from interference import mixed

from sage_fed.core import TIER_ROLES, Tier

if TYPE_CHECKING:
    from sage_fed.cli.demo import Endpoint

NEEDED = (
    "apsw", "google.protobuf", "google.rpc", "grpc", "grpc_health", "grpc_reflection",
    "grpc_status", "huggingface_hub", "jinja2", "limits", "prometheus_client", "pydantic",
    "pynvml", "pythonjsonlogger", "rich", "safetensors", "tokenizers",
    "tomlkit", "torch", "transformers", "typer", "uvicorn", "uvloop",
)  # fmt: skip
"""What the daemon depends on, as it is imported."""

_START_S = 180.0
_STOP_S = 60.0
_CALIBRATION_S = 45.0
_MAX_STREAMS = 512


def daemon(
    plan: Plan,
    device: torch.device,
    kernels: str,
    checkpoints: Checkpoints,
    *,
    alone: Mapping[str, Mapping[str, float]],
    left: Callable[[], float],
) -> dict[str, Any]:
    """Mixed loads beside `alone` (the executor's tokens/s by streams and tier), and the rest.

    Raises:
        Skipped: something that a daemon needs is not here.
    """
    if missing := [name for name in NEEDED if not _is_there(name)]:
        raise Skipped(f"not installed: {', '.join(missing)}")
    if left() < plan.daemon_needs_s:
        raise Skipped(f"{left():.0f} s are left, and it needs {plan.daemon_needs_s:.0f}")
    from sage_fed.cli.demo import DemoDaemon  # noqa: PLC0415 - needs the daemon's packages

    shapes = {Tier.TACTICAL: plan.tactical, Tier.STRATEGIC: plan.strategic}
    models = {tier: checkpoints.of(shape, device) for tier, shape in shapes.items()}
    with tempfile.TemporaryDirectory(prefix="sage-fed-gpu-") as name:
        state = Path(name)
        paths = {tier: model.path for tier, model in models.items()}
        began = time.perf_counter()
        process = DemoDaemon(state, *_flags(paths, shapes, plan, str(device), kernels))
        try:
            endpoint = process.endpoint(_START_S)
            found = _drive(endpoint, state, plan, alone, left)
            found["ready_s"] = found.pop("ready_at") - began
        except Exception as error:
            raise RuntimeError(f"{error}\n{process.log()}") from error
        finally:
            code = process.stop(_STOP_S)
    found["exit_code"] = code
    found["ok"] = code == 0 and not found["left_over"]
    return found


def _flags(
    paths: Mapping[Tier, Path],
    shapes: Mapping[Tier, Shape],
    plan: Plan,
    device: str,
    kernels: str,
) -> tuple[str, ...]:
    values: dict[str, object] = {
        "budget.initial_atp": 900000000,
        "budget.capacity_atp": 1000000000,
        "limits.max_jobs": _MAX_STREAMS,
        "kernels": kernels,
    }
    for tier, shape in shapes.items():
        values |= {
            f"{tier.name}.model": paths[tier],
            f"{tier.name}.precision": plan.precision,
            f"{tier.name}.kv_cache_bytes": shape.kv_cache_bytes,
            f"{tier.name}.max_context_tokens": shape.max_context,
            f"{tier.name}.max_batch": max(plan.batches),
            f"{tier.name}.max_waiting": _MAX_STREAMS,
            f"{tier.name}.prefill_chunk_tokens": 512,
        }
    settings = (part for key, value in values.items() for part in ("--set", f"{key}={value}"))
    return ("--device", device, "--log-level", "warning", *settings)


def _drive(
    endpoint: Endpoint,
    state: Path,
    plan: Plan,
    alone: Mapping[str, Mapping[str, float]],
    left: Callable[[], float],
) -> dict[str, Any]:
    from driven_daemon import settle  # noqa: PLC0415
    from gpu_clients import Clients, cancel_storm, percentiles_between, shares  # noqa: PLC0415

    from sage_fed.cli import top  # noqa: PLC0415
    from sage_fed.client import wait_serving  # noqa: PLC0415

    for tier in TIER_ROLES:
        if not wait_serving(endpoint.listen, tier.name, _START_S):
            raise RuntimeError(f"the {tier.name} tier does not serve")
    found: dict[str, Any] = {"ready_at": time.perf_counter(), "mixed": {}, "cut": []}
    valid_ids = min(plan.tactical.valid_ids, plan.strategic.valid_ids)
    clients = Clients(endpoint.listen, valid_ids)
    try:
        for streams in plan.mixed_streams:
            if left() < 2 * plan.daemon_s:
                found["cut"].append(f"{streams} streams")
                continue
            before = top.fetch(endpoint.metrics_url)
            rows = clients.run(mixed(streams, plan), plan.daemon_s)
            after = top.fetch(endpoint.metrics_url)
            for tier, seen in percentiles_between(before, after).items():
                if tier in rows:
                    rows[tier]["by_the_daemons_metrics"] = seen
            found["mixed"][str(streams)] = {
                **rows,
                "share_of_executor_alone": shares(rows, alone.get(str(streams), {})),
            }
    finally:
        clients.close()
    loads = mixed(min(64, max(plan.mixed_streams)), plan)
    cancels = cancel_storm(endpoint.listen, loads, valid_ids, plan.cancels)
    found["cancels"] = asyncio.run(cancels)
    found["left_over"] = asyncio.run(settle(endpoint, state))
    page = top.fetch(endpoint.metrics_url)
    found["model_memory_bytes"] = {
        tier.name: top.total(page, "sage_fed_model_memory_bytes", tier=tier.name)
        for tier in TIER_ROLES
    }
    if left() < _CALIBRATION_S and plan.daemon_s > 1.0:
        found["cut"].append("calibration")
    else:
        found["calibration"] = _calibrate(endpoint.listen, state, quick=left() < 4 * _CALIBRATION_S)
    return found


def _calibrate(address: str, state: Path, *, quick: bool) -> dict[str, Any]:
    """The daemon's own calibration: its card as text, to be kept as an example."""
    from sage_fed.client import Client  # noqa: PLC0415
    from sage_fed.core import CalibrationResult  # noqa: PLC0415

    token = (state / "admin.token").read_text().strip()
    with Client(address, token=token) as client:
        *_, result = client.calibrate(quick=quick)
    assert isinstance(result, CalibrationResult)
    return {
        "quick": quick,
        "cost_ratio": result.cost_ratio,
        "cost_ratio_spread": result.cost_ratio_spread,
        "took_s": result.took_s,
        "card": result.card,
        "report": result.report,
    }


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
