"""This project's engine, alone: `load_engine` and its steps, no scheduler and no daemon."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the checkout that this file is in, whatever is installed

import peers_worker as plan  # noqa: E402 - after the path

from sage_fed.core import Sampling  # noqa: E402
from sage_fed.engine import (  # noqa: E402
    PRECISIONS,
    Engine,
    EngineOptions,
    generate,
    load_engine,
    set_cpu_threads,
)
from sage_fed.steps import BLOCK_SIZE  # noqa: E402

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
        made = generate(self._engine, prompts, _GREEDY, new_tokens)
        return [list(made.at_s) for _ in prompts], list(made.outputs[0])
