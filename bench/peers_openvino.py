"""OpenVINO GenAI's continuous batching pipeline, stepped by hand over raw token ids.

Owns: the engine, and the checkpoint in its format with a note of what its weights are made of.
Fails: with the converter's own error; nothing half-made is left under its final name.

To convert, under the peers' interpreter: python bench/peers_openvino.py CHECKPOINT FOLDER
Exported by optimum-intel, with weights in FP16 (BF16, as the checkpoint has them, is as fast),
and compressed to int8 by nncf (its default: asymmetric, per channel).
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import peers_worker as plan

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


def convert(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Write openvino-fp16/ and openvino-int8/; what the weights are made of."""
    found = {}
    for variant, eight in (("fp16", False), ("int8", True)):
        target, partial = folder / f"openvino-{variant}", folder / f"openvino-{variant}.partial"
        if not target.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            _export(checkpoint, partial, eight=eight)
            partial.rename(target)
        found[variant] = _constants(target / "openvino_model.xml")
    return found


def _export(checkpoint: Path, target: Path, *, eight: bool) -> None:
    import torch  # noqa: PLC0415
    from openvino_tokenizers import convert_tokenizer  # noqa: PLC0415
    from optimum.intel import OVModelForCausalLM  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    model = OVModelForCausalLM.from_pretrained(
        checkpoint,
        export=True,
        compile=False,
        load_in_8bit=eight,
        local_files_only=True,
        dtype=torch.float32,
    )
    if not eight:
        model.half()
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    # The pipeline wants both, though nothing here is ever text.
    encode, decode = convert_tokenizer(tokenizer, with_detokenizer=True)
    openvino.save_model(encode, target / "openvino_tokenizer.xml")
    openvino.save_model(decode, target / "openvino_detokenizer.xml")


def _constants(path: Path) -> dict[str, int]:
    """Bytes of the model's constants by element type."""
    sizes: Counter[str] = Counter()
    for node in openvino.Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant":
            kind = node.get_element_type()
            sizes[kind.get_type_name()] += int(node.get_byte_size())
    return {kind: size for kind, size in sizes.most_common(4) if size > 2**16}


if __name__ == "__main__":
    given, into = Path(sys.argv[1]), Path(sys.argv[2])
    into.mkdir(parents=True, exist_ok=True)
    print(f"\n{json.dumps(convert(given, into))}")
