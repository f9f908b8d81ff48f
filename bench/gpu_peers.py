"""`transformers` on the same device: as the source note ran it, compiled, and batched.

Owns: a random model of each shape, three ways of generating with it, the engine between them.
Each way is timed by turns with the engine (A B A B), tokens per second over prompt and answer.
A way that this version or device does not have is recorded with its error.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from gpu_models import Plan, Shape, random_engine
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen2Config

from sage_fed.core import Sampling, Tier
from sage_fed.engine import Engine
from sage_fed.steps import BLOCK_SIZE, PENDING, Chunk, Draw, Step

_PROMPT = 32
_ROUNDS = 2
_PAGE = 256
_WAIT_S = 60.0

Prompts = Sequence[tuple[int, ...]]
Generate = Callable[[Prompts, int], None]


def peers(
    plan: Plan, device: torch.device, kernels: str, left: Callable[[], float]
) -> dict[str, Any]:
    """Both shapes, every way and batch that time allows."""
    cut: list[str] = []
    tiers: dict[str, Any] = {}
    for tier, shape in ((Tier.TACTICAL, plan.tactical), (Tier.STRATEGIC, plan.strategic)):
        if left() <= 0:
            cut.append(tier.name)
            continue
        engine, _ = random_engine(
            shape, str(device), "bf16", 1, max_batch=max(plan.peer_batches), kernels=kernels
        )
        model = _model(shape, device)
        try:
            tiers[tier.name] = _tier(engine, model, plan, left, cut)
        finally:
            engine.close()
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {"prompt_tokens": _PROMPT, "new_tokens": plan.peer_tokens, "tiers": tiers, "cut": cut,
            "ratio": _ratios(tiers)}  # fmt: skip


def _tier(
    engine: Engine,
    model: PreTrainedModel,
    plan: Plan,
    left: Callable[[], float],
    cut: list[str],
) -> list[dict[str, Any]]:
    random = Random(3)
    rows: list[dict[str, Any]] = []
    ways: dict[str, Generate] = {"engine": lambda p, n: _engine(engine, p, n)}
    makers = {"eager": _eager, "static": _static, "continuous": _continuous}
    for name in plan.peers:
        ways[name] = makers[name](model)
    for batch in plan.peer_batches:
        prompts = [
            tuple(random.randrange(300, plan.tactical.valid_ids) for _ in range(_PROMPT))
            for _ in range(batch)
        ]
        row: dict[str, Any] = {"batch": batch}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(_ROUNDS + 1):
            for name, generate in ways.items():
                if left() <= 0:
                    cut.append(f"{name} {batch} round {number}")
                    continue
                if f"{name}_error" in row:
                    continue
                try:
                    began = time.perf_counter()
                    generate(prompts, plan.peer_tokens)
                    if number:  # the first warms up, and compiles
                        taken[name].append(time.perf_counter() - began)
                except Exception as error:  # a peer that cannot costs no other
                    if type(error).__name__ == "PartTimeout":  # `gpu`'s own, which is `__main__`
                        raise
                    row[f"{name}_error"] = f"{type(error).__name__}: {error}"[:500]
        for name, seconds in taken.items():
            if seconds:
                row[name] = {
                    "median_s": statistics.median(seconds),
                    "tokens_per_s": batch * plan.peer_tokens / statistics.median(seconds),
                    "n": len(seconds),
                }
        rows.append(row)
    return rows


def _model(shape: Shape, device: torch.device) -> PreTrainedModel:
    known = {
        k: v for k, v in shape.config().items() if k not in {"architectures", "model_type", "dtype"}
    }
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**known), dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval()


def _eager(model: PreTrainedModel) -> Generate:
    return lambda prompts, new: _generate(model, prompts, new)


def _static(model: PreTrainedModel) -> Generate:
    """Its own way of compiling: a cache of fixed size, which makes `generate` compile a step."""
    return lambda prompts, new: _generate(model, prompts, new, cache_implementation="static")


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompts: Prompts, new: int, **how: Any) -> None:  # noqa: ANN401
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(  # type: ignore[operator] # transformers' own
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new,
        max_new_tokens=new, eos_token_id=None, **how,
    )  # fmt: skip
    assert out[:, _PROMPT:].tolist(), "no token came"


def _continuous(model: PreTrainedModel) -> Generate:
    """Continuous batching over its paged cache, with CUDA graphs where it has them."""

    def generate(prompts: Prompts, new: int) -> None:
        config = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=new)
        out = model.generate_batch(  # type: ignore[operator] # transformers' own
            inputs=[list(prompt) for prompt in prompts], generation_config=config
        )
        assert len(out) == len(prompts), "continuous batching lost an answer"

    return generate


def _engine(engine: Engine, prompts: Prompts, new: int) -> None:
    """Prompts in one step each, then decoding with one step in flight behind the other."""
    each = -(-(_PROMPT + new) // BLOCK_SIZE)
    blocks = [tuple(range(i * each, (i + 1) * each)) for i in range(len(prompts))]
    for i, prompt in enumerate(prompts):
        engine.run(_step([Chunk(i, 0, prompt[:-1], blocks[i])]))
    flights = []
    for number in range(new):
        chunks = [
            Chunk(
                i, _PROMPT - 1 + number, (PENDING,) if number else prompt[-1:], blocks[i],
                (Draw(Sampling(), number),),
            )
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        flights.append(engine.launch(_step(chunks)))
        if len(flights) > 1:
            flights.pop(0).wait()
    while flights:
        flights.pop(0).wait()


def _step(chunks: list[Chunk]) -> Step:
    return Step(Tier.TACTICAL, tuple(chunks))


def _ratios(tiers: dict[str, Any]) -> list[dict[str, Any]]:
    """Strategic over tactical time of each way at each batch."""
    fast = {row["batch"]: row for row in tiers.get("tactical", [])}
    found = []
    for row in tiers.get("strategic", []):
        batch = row["batch"]
        for way, own in row.items():
            other = fast.get(batch, {}).get(way)
            if isinstance(own, dict) and isinstance(other, dict):
                ratio = own["median_s"] / other["median_s"]
                found.append({"batch": batch, "way": way, "ratio": ratio})
    return found
