"""This project's engine, alone: `load_engine` and its steps, no scheduler and no daemon."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the checkout that this file is in, whatever is installed

import peers_plan as plan  # noqa: E402 - after the path

from sage_fed.core import Sampling, Tier  # noqa: E402
from sage_fed.engine import (  # noqa: E402
    PRECISIONS,
    Engine,
    EngineOptions,
    load_engine,
    set_cpu_threads,
)
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step  # noqa: E402

_KV_BYTES = 2**28
_GREEDY = Sampling(temperature=0.0)


def available() -> tuple[str, ...]:
    """The precisions that this version has."""
    return tuple(PRECISIONS)


def load(job: plan.Job, variant: str) -> OurSubject:
    """Load at precision `variant`."""
    set_cpu_threads(job.threads)
    sizes = plan.SIZES[job.sizes]
    context = min(sizes.longest + BLOCK_SIZE, 1024)
    options = EngineOptions(
        model=str(job.checkpoint),
        kv_cache_bytes=_KV_BYTES,
        precision=variant,
        max_context_tokens=context,
    )
    return OurSubject(load_engine(options, lambda _: None))


class OurSubject:
    """An engine and the blocks of its sequences."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.versions = {
            "sage-fed": importlib.metadata.version("sage-fed"),
            "torch": importlib.metadata.version("torch"),
        }
        self.notes = {
            "precision": engine.info.precision,
            "kernels": str(getattr(engine.info, "kernels", "torch")),
            "weight_bytes": str(engine.info.weight_bytes),
        }

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> tuple[plan.Times, list[int]]:
        """Prefill every prompt in one step, then decode all of them together."""
        each = -(-(len(prompts[0]) + new_tokens) // BLOCK_SIZE)
        blocks = [tuple(range(i * each, (i + 1) * each)) for i in range(len(prompts))]
        began = time.perf_counter()
        fed = [tuple(prompt) for prompt in prompts]
        start = [0] * len(prompts)
        times: plan.Times = [[] for _ in prompts]
        first: list[int] = []
        for index in range(new_tokens):
            draw = Draw(_GREEDY, index)
            step = Step(
                Tier.TACTICAL,
                tuple(Chunk(i, start[i], fed[i], blocks[i], (draw,)) for i in range(len(prompts))),
            )
            drawn = self._engine.run(step)
            now = time.perf_counter() - began
            for i, token in enumerate(drawn):
                start[i] += len(fed[i])
                fed[i] = (token.token_id,)
                times[i].append(now)
            first.append(drawn[0].token_id)
        return times, first
