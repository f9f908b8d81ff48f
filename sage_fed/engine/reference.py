"""The method that the published measurement used: `transformers` and its `generate`.

Owns one model that was loaded by `transformers`, and the times of its tokens. It serves no job:
it is here to be measured beside the engine, with the same checkpoint, ids and device.
Not among the engine's own names: importing all of `generate` takes seconds, which no daemon pays.
Fails with a `ModelLoadError` that names the model, or `DeviceOutOfMemory`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sage_fed.engine.attention import bytes_per_token
from sage_fed.engine.checkpoint import locate
from sage_fed.engine.configuration import ModelSpec, read_spec
from sage_fed.engine.machine import host_available_bytes, resolve_device
from sage_fed.errors import DeviceOutOfMemory, ModelLoadError

REFERENCE_PRECISIONS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class ReferenceInfo:
    """What was loaded; `step_bytes` and `kv_token_bytes` as in `ModelInfo`."""

    parameters: int
    num_layers: int
    weight_bytes: int
    step_bytes: int
    kv_token_bytes: int
    load_s: float
    software: str


class ReferenceModel:
    """A model of `transformers` on a device.

    Raises:
        ModelLoadError: no such device or checkpoint, or no memory for it.
    """

    def __init__(self, model: str, revision: str, device: str, precision: str) -> None:
        self._device = resolve_device(device)
        directory = locate(model, revision)
        spec = read_spec(directory)
        dtype = REFERENCE_PRECISIONS.get(precision)
        if dtype is None:
            raise ModelLoadError(
                f"model {model}: the reference has no precision {precision!r}; "
                f"it has {', '.join(REFERENCE_PRECISIONS)}"
            )
        try:
            needed, available = _host_bytes(directory, dtype), host_available_bytes()
            if available is not None and needed > available:
                # Or the kernel would end the process, and with it all that was measured.
                raise ModelLoadError(
                    f"model {model}: the reference needs {needed / 1e9:.1f} GB of the host's "
                    f"memory, and {available / 1e9:.1f} GB are available"
                )
            # Who loads has a progress of their own, and a log wants no bars.
            quiet: Any = transformers.utils.logging.disable_progress_bar  # untyped there
            quiet()
            began = time.monotonic()
            # As the published run did it: on the host, then moved.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, local_files_only=True, trust_remote_code=False
            )
            self._model: Any = loaded.eval().to(self._device)
        except torch.OutOfMemoryError as error:
            raise ModelLoadError(f"model {model}: {device} has not enough memory for it") from error
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"model {model}: transformers cannot load it: {error}") from error
        # Every run is as long as it was asked to be, and greedy whatever the checkpoint prefers.
        greedy: Any = transformers.GenerationConfig
        self._model.generation_config = greedy(do_sample=False)
        self.info = _info(self._model, spec, dtype, time.monotonic() - began)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        """Decode a static batch of prompts of one length; seconds at which each token came.

        Raises:
            DeviceOutOfMemory: the batch did not fit.
        """
        ids = torch.tensor(prompts, device=self._device)
        clock = _Clock(self._device)
        try:
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory(
                f"the device has no memory for {len(prompts)} sequences of the reference"
            ) from error
        assert len(clock.stamps) == new_tokens, "the reference ended early"
        return clock.stamps

    def close(self) -> None:
        """Free the device's memory; the model cannot be used afterwards."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _host_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of the weights on the host.

    Builds the model without any; importing its code on the way is no part of loading it either.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    build: Any = AutoModelForCausalLM.from_config  # untyped there
    with torch.device("meta"):
        hollow = build(config)
    elements: int = sum(tensor.numel() for tensor in hollow.parameters())
    return elements * dtype.itemsize


class _Clock(StoppingCriteria):
    """Writes down when each token came; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.stamps: list[float] = []
        self._device = device
        self._began = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:  # noqa: ARG002 - its signature
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.stamps.append(time.perf_counter() - self._began)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=self._device)


def _info(model: Any, spec: ModelSpec, dtype: torch.dtype, load_s: float) -> ReferenceInfo:  # noqa: ANN401 - transformers' own
    tensors = list(model.parameters())  # a tied head is listed once
    weight_bytes = sum(tensor.nbytes for tensor in tensors)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding = 0 if table is head else table.nbytes
    return ReferenceInfo(
        parameters=sum(tensor.numel() for tensor in tensors),
        num_layers=spec.num_layers,
        weight_bytes=weight_bytes,
        step_bytes=weight_bytes - embedding,
        kv_token_bytes=bytes_per_token(spec, dtype),
        load_s=load_s,
        software=f"transformers {transformers.__version__}, torch {torch.__version__}",
    )
