"""`transformers`: `generate` over a static batch, and its continuous batching, both in bf16."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from typing import Any

import peers_worker as plan
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation import StoppingCriteria, StoppingCriteriaList

_PAGE_TOKENS = 32
_WAIT_S = 300.0


def load(job: plan.Job, variant: str) -> GenerateSubject | ContinuousSubject:
    """Load in bf16."""
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(
        job.checkpoint, dtype=torch.bfloat16, local_files_only=True
    ).eval()
    return GenerateSubject(model) if variant == "generate" else ContinuousSubject(model, job)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("transformers", "torch")}


class _Clock(StoppingCriteria):
    """Writes down when each token came; stops nothing."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self._began = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ANN401, ARG002
        self.stamps.append(time.perf_counter() - self._began)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class GenerateSubject:
    """`generate`, greedy, with its dynamic cache."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers' own
        self._model = model
        self.versions = _versions()
        self.notes = {"attention": str(model.config._attn_implementation)}  # noqa: SLF001

    @torch.inference_mode()
    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> tuple[plan.Times, list[int]]:
        """One static batch."""
        ids = torch.tensor(prompts)
        clock = _Clock()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return [list(clock.stamps) for _ in prompts], out[0, ids.shape[1] :].tolist()


class ContinuousSubject:
    """Continuous batching with a pool that holds what this benchmark needs."""

    def __init__(self, model: Any, job: plan.Job) -> None:  # noqa: ANN401 - transformers' own
        sizes = plan.SIZES[job.sizes]
        longest = -(-sizes.longest // _PAGE_TOKENS) + 1
        each = -(-(sizes.concurrent_prompt + sizes.concurrent_new) // _PAGE_TOKENS) + 1
        blocks = max(longest, each * max(sizes.concurrent))
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=sizes.new_tokens),
            ContinuousBatchingConfig(
                page_size=_PAGE_TOKENS,
                num_blocks=blocks,
                max_batch_tokens=max(1024, max(sizes.concurrent) * sizes.concurrent_prompt),
                allow_block_sharing=False,
            ),
        )
        self._manager.start()
        self.versions = _versions()
        self.notes = {"attention": str(model.config._attn_implementation)}  # noqa: SLF001

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> tuple[plan.Times, list[int]]:
        """Submit all at once, and collect what they say of their own tokens' times."""
        began = time.perf_counter()
        names = [
            self._manager.add_request(
                list(prompt), max_new_tokens=new_tokens, record_timestamps=True, eos_token_id=-1
            )
            for prompt in prompts
        ]
        done: dict[str, Any] = {}
        while len(done) < len(names):
            result = self._manager.get_result(timeout=_WAIT_S)
            assert result is not None, "continuous batching gave no answer"
            assert result.error is None, result.error
            done[result.request_id] = result
        times = [[stamp - began for stamp in done[name].timestamps] for name in names]
        return times, list(done[names[0]].generated_tokens)
