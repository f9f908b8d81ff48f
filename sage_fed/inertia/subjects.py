"""A model that is loaded to be timed: by the engine, or by the published method.

Owns: how a batch is decoded by each, and what each says of itself. Both compute every token of
the batch, greedily, and no token ends a text.
Fails: `ModelLoadError` from the constructors, `DeviceOutOfMemory` from `generate`.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from sage_fed.core import Sampling, Tier
from sage_fed.engine import EngineOptions, load_engine, locate, read_spec
from sage_fed.engine.reference import ReferenceModel
from sage_fed.inertia.figures import Method, Plan, Run
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step

_GREEDY = Sampling(temperature=0.0)


class Subject(Protocol):
    """A loaded model, whoever runs it."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        """Decode greedily; seconds at which each token of the whole batch came."""

    def describe(self) -> Run:
        """Who it is, without points and measured memory."""

    def close(self) -> None:
        """Free its memory."""


def load(
    plan: Plan, method: Method, precision: str, tier: Tier, progress: Callable[[float], None]
) -> Subject:
    """Load one model; `progress` gets the loaded share where it is known."""
    if method is Method.REFERENCE:
        return ReferenceSubject(plan, precision, tier)
    return EngineSubject(plan, precision, tier, progress)


class ReferenceSubject:
    """`transformers` and its `generate`."""

    def __init__(self, plan: Plan, precision: str, tier: Tier) -> None:
        ref = plan.model(tier)
        self._model = ReferenceModel(ref.model, ref.revision, plan.device, precision)
        self._identity = (Method.REFERENCE, precision, tier)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        """One static batch."""
        return self._model.generate(prompts, new_tokens)

    def describe(self) -> Run:
        """What `transformers` loaded."""
        info = self._model.info
        return Run(
            *self._identity,
            parameters=info.parameters,
            num_layers=info.num_layers,
            weight_bytes=info.weight_bytes,
            step_bytes=info.step_bytes,
            kv_token_bytes=info.kv_token_bytes,
            load_s=info.load_s,
            software=info.software,
        )

    def close(self) -> None:
        """Free its memory."""
        self._model.close()


class EngineSubject:
    """This engine, alone: its steps, without scheduler and daemon."""

    def __init__(
        self, plan: Plan, precision: str, tier: Tier, progress: Callable[[float], None]
    ) -> None:
        ref = plan.model(tier)
        spec = read_spec(locate(ref.model, ref.revision))
        self._blocks_each = -(-(plan.prompt_tokens + plan.new_tokens) // BLOCK_SIZE)
        context = self._blocks_each * BLOCK_SIZE
        itemsize = 4 if precision == "fp32" else 2
        tokens = max(plan.batches) * context
        options = EngineOptions(
            model=ref.model,
            revision=ref.revision,
            kv_cache_bytes=tokens * spec.num_layers * spec.kv_width * itemsize,
            device=plan.device,
            precision=precision,
            max_context_tokens=min(context, spec.max_position),
        )
        self._engine = load_engine(options, progress)
        self._tier = tier
        self._num_layers = spec.num_layers

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        """Every prompt in one step, then one token of each sequence a step."""
        began = time.perf_counter()
        each = self._blocks_each
        blocks = [tuple(range(i * each, (i + 1) * each)) for i in range(len(prompts))]
        fed = [tuple(prompt) for prompt in prompts]
        start = 0
        stamps: list[float] = []
        for index in range(new_tokens):
            draw = Draw(_GREEDY, index)
            chunks = (Chunk(i, start, tokens, blocks[i], draw) for i, tokens in enumerate(fed))
            drawn = self._engine.run(Step(self._tier, tuple(chunks)))
            stamps.append(time.perf_counter() - began)
            start += len(fed[0])
            fed = [(one.token_id,) for one in drawn]
        return stamps

    def describe(self) -> Run:
        """What the engine says of itself."""
        info = self._engine.info
        versions = (f"{name} {importlib.metadata.version(name)}" for name in ("sage-fed", "torch"))
        return Run(
            Method.ENGINE,
            info.precision,
            self._tier,
            parameters=info.parameters,
            num_layers=self._num_layers,
            weight_bytes=info.weight_bytes,
            step_bytes=info.step_bytes,
            kv_token_bytes=info.kv_token_bytes,
            load_s=info.load_s,
            software=f"{', '.join(versions)}, {info.kernels} kernels",
        )

    def close(self) -> None:
        """Free its memory."""
        self._engine.close()
