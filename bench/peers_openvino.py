"""OpenVINO GenAI's continuous batching pipeline, stepped by hand over raw token ids."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence

import numpy as np
import openvino
import openvino_genai
import peers_plan as plan

_CACHE_GB = 1


def load(job: plan.Job, variant: str) -> OpenVinoSubject:
    """Compile the converted model of `variant`."""
    return OpenVinoSubject(job, variant)


class OpenVinoSubject:
    """A pipeline; request ids are never used twice."""

    def __init__(self, job: plan.Job, variant: str) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GB
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = max(plan.SIZES[job.sizes].concurrent)
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = True
        folder = job.converted / f"openvino-{variant}"
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": job.threads}
        )
        self._next = 0
        names = ("openvino", "openvino-genai")
        self.versions = {name: importlib.metadata.version(name) for name in names}
        self.notes = {"weights": variant}

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> tuple[plan.Times, list[int]]:
        """Submit all at once, step until none is left, and note when each token came."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        began = time.perf_counter()
        handles = []
        for prompt in prompts:
            ids = openvino.Tensor(np.asarray([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(self._next, ids, config))
            self._next += 1
        times: plan.Times = [[] for _ in prompts]
        first: list[int] = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter() - began
            for i, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        times[i] += [now] * len(output.generated_ids)
                        if i == 0:
                            first += output.generated_ids
        return times, first
