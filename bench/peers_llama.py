"""llama.cpp through its C API, as `llama-cpp-python` binds it: batches of many sequences.

Owns: the engine, and the checkpoint in its format with a note of what became of the head.
Fails: with llama.cpp's own error; nothing half-made is left under its final name.

Greedy choice is numpy's argmax over the logits where they lie, which is cheaper than
llama.cpp's own sampler chain: the peer is measured without what its sampling would add.

To convert, under the peers' interpreter: python bench/peers_llama.py CHECKPOINT FOLDER
Tensors are written as BF16 (norms and biases FP32) with the `qwen2` architecture's metadata and
no vocabulary, then llama.cpp's own quantiser makes Q8_0 and Q4_0 from that file, without
`--pure`: which type the tied head got is read back from the file.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import peers_worker as plan

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


def convert(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Write BF16.gguf, Q8_0.gguf and Q4_0.gguf; the types of their tensors."""
    source = folder / "BF16.gguf"
    if not source.is_file():
        _write_gguf(checkpoint, folder / "BF16.partial")
        (folder / "BF16.partial").rename(source)
    types = {
        "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    }
    for name, ftype in types.items():
        target, partial = folder / f"{name}.gguf", folder / f"{name}.partial"
        if target.is_file():
            continue
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = ftype
        params.nthread = 2
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), params)
        assert code == 0, f"llama_model_quantize returned {code}"
        partial.rename(target)
    return {name: _types(folder / f"{name}.gguf") for name in ("BF16", *types)}


def _write_gguf(checkpoint: Path, path: Path) -> None:
    import gguf  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from safetensors import safe_open  # noqa: PLC0415

    config = json.loads((checkpoint / "config.json").read_text())
    arch = gguf.MODEL_ARCH.QWEN2
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(checkpoint.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    bf16 = gguf.GGMLQuantizationType.BF16
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            tensor = file.get_tensor(name)
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert target is not None, f"{name} has no name in GGUF"
            if tensor.ndim == 1:
                writer.add_tensor(target, tensor.float().numpy())
            else:
                raw = tensor.contiguous().view(torch.uint8).numpy()
                writer.add_tensor(target, raw, raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope_theta(config: dict[str, Any]) -> float:
    """Where this version of `transformers` writes it, or older ones did."""
    theta: float = (config.get("rope_parameters") or config)["rope_theta"]
    return theta


def _types(path: Path) -> dict[str, Any]:
    import gguf  # noqa: PLC0415

    tensors = gguf.GGUFReader(path).tensors
    return {
        "tensors": dict(Counter(tensor.tensor_type.name for tensor in tensors)),
        "token_embd": next(t.tensor_type.name for t in tensors if t.name == "token_embd.weight"),
        "bytes": path.stat().st_size,
    }


if __name__ == "__main__":
    given, into = Path(sys.argv[1]), Path(sys.argv[2])
    into.mkdir(parents=True, exist_ok=True)
    print(f"\n{json.dumps(convert(given, into))}")
