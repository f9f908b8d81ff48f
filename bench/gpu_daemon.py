"""What takes processes of its own in a GPU run: starts from disk, and the daemon through gRPC.

Owns: two starts from safetensors on local disk, seconds beside the disk's own (the first finds no
compiled code, the second that of the first; both find the checkpoint in the page cache or not, as
`dropped` says, and `disk_bytes_per_s` is a plain read before them); a real daemon with both
shapes and the order of what is done to it: mixed loads, cancels, a calibration.

The daemon needs its packages (gRPC, ledger, settings), room on disk, and time; where one of them
is missing the part is skipped, and says which. So what needs them is imported where it is used.

Tokens per second are beside those of the executor alone under the same loads
(`interference.mixed`): what is lost between them is gRPC, the ledger and the event loop.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from gpu_models import Checkpoints, Plan, Shape, Skipped, Written
from interference import mixed
from load_generator import (
    METHOD,
    LeanClient,
    Load,
    Run,
    closed_loop,
    stream_request,
    tokens_of,
    tokens_within,
)

from sage_fed.core import TIER_ROLES, Tier

_START = """
import dataclasses, json, sys, time
began = time.perf_counter()
from sage_fed.engine import EngineOptions, load_engine
folder, kv, device, kernels, context, ids, batch = sys.argv[1:]
options = EngineOptions(folder, int(kv), device, "bf16", kernels=kernels,
    max_context_tokens=int(context), num_valid_ids=int(ids), max_batch=int(batch))
imported = time.perf_counter()
engine = load_engine(options, lambda _: None)
ready = time.perf_counter()
engine.close()
print(json.dumps({"import_s": imported - began, "ready_s": ready - began,
    **dataclasses.asdict(engine.info)}))
"""


def load(
    plan: Plan, device: str, kernels: str, checkpoint: Written, left: Callable[[], float]
) -> dict[str, Any]:
    """Start twice from the strategic shape's checkpoint."""
    if device != "cpu":
        torch.cuda.empty_cache()
    file = checkpoint.weights
    _drop(file)
    rate = _read_rate(file)
    starts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="sage-fed-gpu-") as cache:
        for number in ("first", "second"):
            if left() <= 0:
                break
            dropped = _drop(file)
            start = _start(
                checkpoint.path, Path(cache), plan, device=device, kernels=kernels, left_s=left()
            )
            starts[number] = start | {"dropped": dropped}
    for start in starts.values():
        rest_s = start["load_s"] - start["capture_s"]
        start["share_of_disk"] = checkpoint.nbytes / rest_s / rate
    return {
        "checkpoint_bytes": checkpoint.nbytes,
        "written_s": checkpoint.seconds,
        "disk_bytes_per_s": rate,
        **starts,
    }


def _start(
    model: Path, cache: Path, plan: Plan, *, device: str, kernels: str, left_s: float
) -> dict[str, Any]:
    shape = plan.strategic
    kernels = "torch" if device == "cpu" else kernels
    values = (shape.kv_cache_bytes, device, kernels, shape.max_context, shape.valid_ids, 16)
    said = subprocess.run(
        [sys.executable, "-c", _START, str(model), *map(str, values)],
        env={**os.environ, "XDG_CACHE_HOME": str(cache),
             "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=left_s + 60.0, check=False,
    )  # fmt: skip
    if said.returncode:
        raise RuntimeError(said.stderr[-1500:])
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return found


def _drop(file: Path) -> bool:
    """Take the file out of the page cache; False where the system does not let us say."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        try:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
    return True


def _read_rate(file: Path) -> float:
    """Bytes per second of a plain read, in pieces."""
    buffer = bytearray(64 * 2**20)
    began, total = time.perf_counter(), 0
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            total += count
    return total / (time.perf_counter() - began)


if TYPE_CHECKING:
    from sage_fed.cli.demo import Endpoint

NEEDED = (
    "apsw", "google.protobuf", "google.rpc", "grpc", "grpc_health", "grpc_reflection",
    "grpc_status", "huggingface_hub", "jinja2", "limits", "numpy", "prometheus_client", "pydantic",
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
    page = top.Page.read(top.fetch(endpoint.metrics_url), 0.0)
    found["model_memory_bytes"] = {
        tier.name: page.total("sage_fed_model_memory_bytes", tier=tier.name) for tier in TIER_ROLES
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


HISTOGRAMS = {
    "first_token_s": "sage_fed_time_to_first_token_seconds",
    "inter_token_s": "sage_fed_inter_token_latency_seconds",
}
_WARM_UP_SHARE = 0.2
_MOST_REQUESTS = 5000
_CALL_S = 120.0


class Clients:
    """One lean client, in a process of its own, for each tier."""

    def __init__(self, address: str, valid_ids: int) -> None:
        self._lean = {tier: LeanClient(address) for tier in TIER_ROLES}
        self._valid_ids = valid_ids

    def close(self) -> None:
        """End the processes."""
        for client in self._lean.values():
            client.close()

    def run(self, loads: Sequence[Load], seconds: float) -> dict[str, Any]:
        """Keep every load's streams busy for a while; tokens/s by tier, warm-up left out."""
        requests = [list(itertools.islice(self._requests(load), _MOST_REQUESTS)) for load in loads]
        begun = time.perf_counter()
        with ThreadPoolExecutor(len(loads)) as threads:
            runs = list(threads.map(partial(self._one, seconds), loads, requests))
        window = begun + _WARM_UP_SHARE * seconds, begun + seconds
        length_s = window[1] - window[0]
        rows = {
            load.tier.name: {
                "streams": load.streams,
                "requests": len(run.replies),
                "tokens_per_s": sum(tokens_within(r, window) for r in run.replies) / length_s,
            }
            for load, run in zip(loads, runs, strict=True)
        }
        for load, run in zip(loads, runs, strict=True):
            if len(run.replies) == _MOST_REQUESTS:
                raise RuntimeError(f"the {load.tier.name} load ran out of requests")
            if any(tokens_of(reply) != load.new_tokens for reply in run.replies):
                raise RuntimeError(f"a {load.tier.name} request ended before its last token")
        return rows

    def _one(self, seconds: float, load: Load, requests: list[bytes]) -> Run:
        return self._lean[load.tier].run(METHOD, requests, load.streams, seconds)

    def _requests(self, load: Load) -> Iterator[bytes]:
        random = Random(f"{load.tier} {load.streams}")
        while True:
            # A prefix that was seen before would be prefill that the load does not do.
            prompt = [random.randrange(300, self._valid_ids) for _ in range(load.prompt_tokens)]
            request = stream_request(prompt, load.new_tokens, load.tier, temperature=0.0)
            yield request.SerializeToString()


async def cancel_storm(
    address: str, loads: Sequence[Load], valid_ids: int, cancels: int
) -> dict[str, Any]:
    """Streams that are cancelled at a random token, or before the first; how many of each."""
    import grpc  # noqa: PLC0415

    from sage_fed.v1 import inference_pb2_grpc  # noqa: PLC0415

    random = Random(cancels)
    seen = {"cancels": 0, "before_the_first_token": 0, "tokens_read": 0}
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def leave(load: Load, _: int) -> None:
            prompt = [random.randrange(300, valid_ids) for _ in range(load.prompt_tokens)]
            request = stream_request(prompt, load.new_tokens, load.tier, temperature=0.0)
            call = stub.GenerateStream(request, timeout=_CALL_S)
            last, read = random.randrange(load.new_tokens // 2), 0
            if last == 0:
                await asyncio.sleep(random.random() / 50)
            else:
                async for reply in call:
                    read += len(reply.delta.token_ids)
                    if read >= last:
                        break
            call.cancel()
            seen["cancels"] += 1
            seen["before_the_first_token"] += read == 0
            seen["tokens_read"] += read

        clients = [partial(leave, load) for load in loads for _ in range(load.streams)]
        async with asyncio.timeout(_CALL_S):
            await closed_loop(clients, iter(range(cancels)))
    return seen


def percentiles_between(before: str, after: str) -> dict[str, dict[str, Any]]:
    """p50 and p99 of each tier's latencies, as the daemon's histograms have them."""
    from sage_fed.cli import top  # noqa: PLC0415

    pages = top.Between(top.Page.read(before, 0.0), top.Page.read(after, 1.0))
    found: dict[str, dict[str, Any]] = {}
    for tier in TIER_ROLES:
        for name, series in HISTOGRAMS.items():
            if pages.after.total(f"{series}_count", tier=tier.name) is None:
                raise RuntimeError(f"not on the metrics page: {series} of tier {tier.name}")
            found.setdefault(tier.name, {})[name] = {
                f"p{round(100 * share)}": pages.quantile(share, series, tier=tier.name)
                for share in (0.5, 0.99)
            }
    return found


def shares(rows: Mapping[str, Any], alone: Mapping[str, float]) -> dict[str, float]:
    """Tokens/s through the daemon over those of the executor alone, tier by tier and in all."""
    found = {
        tier: row["tokens_per_s"] / alone[tier] for tier, row in rows.items() if alone.get(tier)
    }
    if total := sum(alone.values()):
        found["all"] = sum(row["tokens_per_s"] for row in rows.values()) / total
    return found
