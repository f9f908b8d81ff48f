"""llama.cpp through its C API, as `llama-cpp-python` binds it: batches of many sequences.

Greedy choice is numpy's argmax over the logits where they lie, which is cheaper than
llama.cpp's own sampler chain: the peer is measured without what its sampling would add.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import peers_plan as plan

_CONTEXT = 8192
_BATCH = 2048


def load(job: plan.Job, variant: str) -> LlamaSubject:
    """Open the GGUF file of `variant`."""
    return LlamaSubject(job, variant)


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: Any) -> None:  # noqa: ANN401 - C's
    """Drop llama.cpp's log."""


class LlamaSubject:
    """A model and one context; sequence ids are the batch's."""

    def __init__(self, job: plan.Job, variant: str) -> None:
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path = job.converted / f"{variant}.gguf"
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        assert self._model, f"{path.name} cannot be loaded"
        params = llama_cpp.llama_context_default_params()
        sizes = plan.SIZES[job.sizes]
        params.n_ctx = _CONTEXT
        params.n_batch = _BATCH
        params.n_ubatch = 512
        params.n_seq_max = max(sizes.concurrent)
        params.n_threads = job.threads
        params.n_threads_batch = job.threads
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp made no context"
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._ids = llama_cpp.llama_vocab_n_tokens(vocab)
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self.versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
        self.notes = {"system": llama_cpp.llama_print_system_info().decode()}

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> tuple[plan.Times, list[int]]:
        """All prompts as one batch, then one token of each a step."""
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, True)
        began = time.perf_counter()
        fed: list[Sequence[int]] = list(prompts)
        start = [0] * len(prompts)
        times: plan.Times = [[] for _ in prompts]
        first: list[int] = []
        for _ in range(new_tokens):
            drawn = self._step(fed, start)
            now = time.perf_counter() - began
            for i in range(len(drawn)):
                start[i] += len(fed[i])
                times[i].append(now)
            fed = [(token,) for token in drawn]
            first.append(drawn[0])
        return times, first

    def _step(self, fed: Sequence[Sequence[int]], start: Sequence[int]) -> list[int]:
        batch, n = self._batch, 0
        ends = []
        for i, tokens in enumerate(fed):
            for offset, token in enumerate(tokens):
                batch.token[n] = token
                batch.pos[n] = start[i] + offset
                batch.n_seq_id[n] = 1
                batch.seq_id[n][0] = i
                batch.logits[n] = int(offset == len(tokens) - 1)
                n += 1
            ends.append(n - 1)
        batch.n_tokens = n
        code = llama_cpp.llama_decode(self._context, batch)
        assert code == 0, f"llama_decode returned {code}"
        return [self._argmax(end) for end in ends]

    def _argmax(self, row: int) -> int:
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.argmax(np.ctypeslib.as_array(pointer, shape=(self._ids,))))
