"""The daemon itself on the device: a real process, real streams, tokens per second through gRPC.

Owns: checkpoints of random weights in a temporary directory, the process, its clients.
Needs the daemon's packages (gRPC, ledger, settings), room on disk, and time; where one of them
is missing the part is skipped, and says which.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from gpu_interference import Load, Seen, summary
from gpu_shapes import Plan, RandomWeights, Shape

from sage_fed.core import Tier
from sage_fed.engine.architecture import read_spec
from sage_fed.engine.formats import choose_formats
from sage_fed.engine.precision import PRECISIONS
from sage_fed.engine.weights import WeightsBuilder

if TYPE_CHECKING:
    import grpc

_NEEDED = ("grpc", "grpc_health", "grpc_status", "google.protobuf", "apsw", "pydantic_settings",
           "prometheus_client", "typer", "tokenizers")  # fmt: skip
_START_S = 180.0
_STOP_S = 60.0
_CALL_S = 120.0
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Skipped(Exception):
    """The part cannot be run here; the text says why."""


def daemon(
    plan: Plan, device: str, alone: dict[str, float], left: Callable[[], float]
) -> dict[str, Any]:
    """Loads on the tactical tier alone, then on both; beside `alone`, the executor's tokens/s.

    Raises:
        Skipped: something that a daemon needs is not here.
    """
    if missing := [name for name in _NEEDED if not _is_there(name)]:
        raise Skipped(f"not installed: {', '.join(missing)}")
    if left() < plan.daemon_needs_s:
        raise Skipped(f"{left():.0f} s are left, and it needs {plan.daemon_needs_s:.0f}")
    with tempfile.TemporaryDirectory(prefix="sage-fed-gpu-") as name:
        folder = Path(name)
        shapes = {Tier.TACTICAL: plan.tactical, Tier.STRATEGIC: plan.daemon_strategic}
        needed = sum(shape.weight_bytes for shape in shapes.values()) * 11 // 10 + 2**28
        if (free := shutil.disk_usage(folder).free) < needed:
            raise Skipped(f"{free} bytes are free on disk, and it needs {needed}")
        began = time.perf_counter()
        sizes = {tier.value: _checkpoint(folder, tier, shape, device)
                 for tier, shape in shapes.items()}  # fmt: skip
        written_s = time.perf_counter() - began
        result = _serve(folder, shapes, plan, device, left)
    for streams, tokens_per_s in alone.items():
        row = result["tactical_only"].get(streams)
        if row and tokens_per_s:
            through = row[Tier.TACTICAL.value]["tokens_per_s"]
            row["share_of_executor_alone"] = through / tokens_per_s
    return {"checkpoint_bytes": sizes, "written_s": written_s, **result}


def _serve(
    folder: Path, shapes: dict[Tier, Shape], plan: Plan, device: str, left: Callable[[], float]
) -> dict[str, Any]:
    """Start, load, stop; the daemon has to leave with 0."""
    from sage_fed.cli.demo_daemon import DemoDaemon  # noqa: PLC0415 - needs the daemon's packages

    state = folder / "state"
    state.mkdir()
    began = time.perf_counter()
    process = DemoDaemon(state, *_flags(folder, shapes, plan, device))
    try:
        address = process.endpoint(_START_S).listen
        found = asyncio.run(_load(address, shapes, plan, left, began))
    except Exception as error:
        raise RuntimeError(f"{error}\n{process.log()}") from error
    finally:
        code = process.stop(_STOP_S)
    return {"ok": code == 0, "exit_code": code, **found}


def _flags(folder: Path, shapes: dict[Tier, Shape], plan: Plan, device: str) -> tuple[str, ...]:
    values: dict[str, object] = {
        "budget.initial_atp": 900000000,
        "budget.capacity_atp": 1000000000,
    }
    for tier, shape in shapes.items():
        values |= {
            f"{tier.value}.model": folder / tier.value,
            f"{tier.value}.precision": plan.precision,
            f"{tier.value}.kv_cache_bytes": shape.kv_cache_bytes,
            f"{tier.value}.max_context_tokens": shape.max_context,
            f"{tier.value}.max_batch": 64,
            f"{tier.value}.max_waiting": 256,
            f"{tier.value}.prefill_chunk_tokens": 512,
        }
    settings = (part for key, value in values.items() for part in ("--set", f"{key}={value}"))
    return ("--device", device, "--log-level", "warning", *settings)


async def _load(
    address: str, shapes: dict[Tier, Shape], plan: Plan, left: Callable[[], float], began: float
) -> dict[str, Any]:
    import grpc  # noqa: PLC0415
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    async with grpc.aio.insecure_channel(address) as channel:
        for tier in Tier:
            request = health_pb2.HealthCheckRequest(service=tier.value)
            call = health_pb2_grpc.HealthStub(channel).Watch(
                request, timeout=_START_S, wait_for_ready=True
            )
            async for response in call:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        result: dict[str, Any] = {
            "ready_s": time.perf_counter() - began, "tactical_only": {}, "both": {}
        }  # fmt: skip
        for streams in plan.daemon_concurrency:
            tactical = Load(Tier.TACTICAL, streams, 64, plan.new_tokens)
            strategic = Load(Tier.STRATEGIC, streams, 64, plan.new_tokens)
            for name, loads in (("tactical_only", (tactical,)), ("both", (tactical, strategic))):
                if left() > 2 * plan.daemon_s:
                    seen = await _measure(channel, loads, shapes, plan.daemon_s)
                    result[name][str(streams)] = summary([seen])
    return result


async def _measure(
    channel: grpc.aio.Channel, loads: Sequence[Load], shapes: dict[Tier, Shape], seconds: float
) -> Seen:
    """Closed loops of streamed requests; what a client sees, after a warm-up."""
    now = time.perf_counter()
    seen = Seen(from_s=now + 0.2 * seconds, until_s=now + seconds)
    async with asyncio.timeout(seconds + _CALL_S), asyncio.TaskGroup() as group:
        for load in loads:
            for number in range(load.streams):
                random = Random(f"{load.tier} {number}")
                ids = shapes[load.tier].valid_ids
                group.create_task(_client(channel, load, random, ids, seen))
    return seen


async def _client(
    channel: grpc.aio.Channel, load: Load, random: Random, valid_ids: int, seen: Seen
) -> None:
    from sage_fed.v1 import inference_pb2 as pb  # noqa: PLC0415
    from sage_fed.v1 import inference_pb2_grpc as rpc  # noqa: PLC0415
    from sage_fed.v1 import types_pb2 as types  # noqa: PLC0415

    stub = rpc.InferenceServiceStub(channel)
    wire = {Tier.TACTICAL: types.TIER_TACTICAL, Tier.STRATEGIC: types.TIER_STRATEGIC}[load.tier]
    sampling = types.SamplingParams(
        temperature=0.0, max_new_tokens=load.new_tokens, ignore_eos=True
    )
    while (begun := time.perf_counter()) < seen.until_s:
        prompt = [random.randrange(300, valid_ids) for _ in range(load.prompt_tokens)]
        job = types.JobSpec(token_ids=types.TokenIds(ids=prompt), tier=wire, sampling=sampling)
        last, total = None, 0
        async for response in stub.GenerateStream(
            pb.GenerateStreamRequest(job=job), timeout=_CALL_S
        ):
            if response.WhichOneof("event") != "delta":
                continue
            now, count = time.perf_counter(), len(response.delta.token_ids)
            total += count
            if count and seen.within(now):
                seen.tokens[load.tier] += count
                if last is None:
                    seen.first_s[load.tier].append(now - begun)
                else:
                    seen.gap_s[load.tier] += [(now - last) / count] * count
            last = now
        if total != load.new_tokens:
            raise RuntimeError(f"{total} tokens came of {load.new_tokens}")


def _checkpoint(folder: Path, tier: Tier, shape: Shape, device: str) -> int:
    """Weights and a made-up tokenizer of the shape's own length; bytes of the weights."""
    from tokenizers import pre_tokenizers  # noqa: PLC0415
    from transformers import Qwen2Tokenizer  # noqa: PLC0415

    nbytes = _write_weights(shape, folder / tier.value, device, seed=tier.depth)
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"w{number:05d}" for number in range(shape.valid_ids - len(words) - len(specials))]
    vocab = {word: index for index, word in enumerate([*specials, *words])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token=None,
        eos_token=specials[2],
        pad_token=specials[0],
        extra_special_tokens=[specials[1]],
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder / tier.value)
    return nbytes


def _write_weights(shape: Shape, directory: Path, device: str, seed: int) -> int:
    """Write config and random bf16 weights for a daemon to load; returns the bytes."""
    from safetensors.torch import save_file  # noqa: PLC0415

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape.config()))
    meta = torch.device("meta")  # shapes only
    builder = WeightsBuilder(
        read_spec(directory),
        choose_formats(PRECISIONS["bf16"], meta),
        num_valid_ids=shape.vocab,
        compute=torch.bfloat16,
        device=meta,
    )
    weights = RandomWeights(torch.device(device), torch.bfloat16, seed)
    tensors = {
        name: weights.tensor(name, place.shape).cpu() for name, place in builder.places.items()
    }
    path = directory / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path.stat().st_size


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
