"""Checkpoints of real shapes with random weights: a speed test that needs no download.

Owns the published shapes and the writing of a checkpoint in the Hugging Face layout: sharded
safetensors, index, configuration. Speed does not depend on what weights say, as long as they
are ordinary numbers: matrices are N(0, 0.02), as models are initialised, so activations stay
finite through every layer; norms are about 1; nothing is denormal or infinite.
No token ends a text, so an answer is exactly as long as it was asked to be.
Knows no tokenizer. Fails with `CannotWrite`, which leaves nothing half done behind.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sage_fed.engine.tensor_file import header_bytes
from sage_fed.errors import CannotWrite

_MAX_SHARD_BYTES = 4_000_000_000  # the published 7B comes in four files of just below 4 GB
_CHUNK_ELEMENTS = 4 * 2**20
_GENERATORS = 2  # normal numbers cost more than writing them does
_STD = 0.02
_SINGLE = "model.safetensors"
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WEIGHT_TYPES = tuple(_TYPES)


@dataclass(frozen=True, slots=True)
class Shape:
    """A published Qwen2 decoder; `tokenizer_ids` is the length of its tokenizer.

    The vocabulary is that length, padded.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    tokenizer_ids: int = 151665
    max_position: int = 32768


SHAPES: dict[str, Shape] = {
    # Source of each: config.json of Qwen/Qwen2.5-*-Instruct on the hub.
    "qwen2.5-0.5b": Shape(896, 24, 14, 2, 4864, 151936, tied=True),
    "qwen2.5-1.5b": Shape(1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2.5-3b": Shape(2048, 36, 16, 2, 11008, 151936, tied=True),
    "qwen2.5-7b": Shape(3584, 28, 28, 4, 18944, 152064, tied=False),
    "qwen2.5-14b": Shape(5120, 48, 40, 8, 13824, 152064, tied=False),
}


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """What would be written: tensors by name in the order of the files, one mapping a file."""

    shape: Shape
    weight_type: str
    shards: tuple[dict[str, tuple[int, ...]], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.tensor_bytes(s) for shard in self.shards for s in shard.values())

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return self.num_bytes // _TYPES[self.weight_type].itemsize

    def tensor_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of one tensor."""
        return torch.Size(shape).numel() * _TYPES[self.weight_type].itemsize


def plan_checkpoint(
    shape: Shape,
    *,
    num_layers: int | None = None,
    weight_type: str = "bf16",
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> CheckpointPlan:
    """Lay a checkpoint out; `num_layers` fewer than the real one has make a quick test."""
    shape = replace(shape, layers=num_layers or shape.layers)
    itemsize = _TYPES[weight_type].itemsize
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in _tensors(shape):
        num_bytes = torch.Size(size).numel() * itemsize
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += num_bytes
    return CheckpointPlan(shape, weight_type, tuple(shards))


def write_checkpoint(
    plan: CheckpointPlan,
    directory: Path,
    *,
    seed: int,
    progress: Callable[[int], None],
    complete: Callable[[Path], None],
) -> None:
    """Write the plan's weights and configuration to `directory`, which must not be there.

    `progress` gets the number of bytes written so far; `complete` adds what else belongs to a
    checkpoint to the directory that it is given. The same seed writes the same bytes.
    An interrupted run leaves no `directory`.

    Raises:
        CannotWrite: something is there, or the weights do not fit or cannot be written.
    """
    check_destination(plan, directory)
    partial = directory.with_name(f"{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_shards(plan, partial, seed, progress)
        _write_json(partial / "config.json", _config(plan))
        _write_json(partial / "generation_config.json", {"do_sample": False, "eos_token_id": None})
        complete(partial)
        partial.rename(directory)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CannotWrite(f"{directory} cannot be written: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_destination(plan: CheckpointPlan, directory: Path) -> None:
    """Find out what can be known before anything is written.

    Raises:
        CannotWrite: something is there, or the weights do not fit.
    """
    if directory.exists():
        raise CannotWrite(
            f"{directory} exists, and nothing is overwritten; remove it or name another directory"
        )
    free = free_bytes(directory)
    if free < plan.num_bytes:
        raise CannotWrite(f"{directory} needs {plan.num_bytes:,} bytes, and {free:,} are free")


def free_bytes(directory: Path) -> int:
    """Bytes that can be written under `directory`, or its nearest parent that is there."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a Qwen2 checkpoint, in the order in which published ones hold them."""
    hidden, inter = shape.hidden, shape.intermediate
    kv = shape.kv_heads * (hidden // shape.heads)
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inter)
        yield f"{layer}.mlp.gate_proj.weight", (inter, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inter, hidden)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for name, rows in (("k", kv), ("q", hidden), ("v", kv)):
            yield f"{layer}.self_attn.{name}_proj.bias", (rows,)
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
    yield "model.norm.weight", (hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, hidden)


def _write_shards(
    plan: CheckpointPlan, directory: Path, seed: int, progress: Callable[[int], None]
) -> None:
    count = len(plan.shards)
    weight_map: dict[str, str] = {}
    done = tensors = 0
    for number, shard in enumerate(plan.shards, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else _SINGLE
        weight_map |= dict.fromkeys(shard, name)
        with (directory / name).open("wb") as file:
            dtype = _TYPES[plan.weight_type]
            planned = {n: torch.empty(s, dtype=dtype, device="meta") for n, s in shard.items()}
            file.write(header_bytes(planned, {"format": "pt"}))
            for values in _random_chunks(plan, shard, seed, tensors):
                file.write(values.view(torch.uint8).numpy().data)
                done += values.nbytes
                progress(done)
        tensors += len(shard)
    if count > 1:
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
        _write_json(directory / f"{_SINGLE}.index.json", index)


def _random_chunks(
    plan: CheckpointPlan, shard: dict[str, tuple[int, ...]], seed: int, first_tensor: int
) -> Iterator[torch.Tensor]:
    """The shard's values in order, made some chunks ahead by a few threads.

    A chunk's numbers depend on the seed, its tensor and its place, not on the threads.
    """
    dtype = _TYPES[plan.weight_type]
    waiting: deque[Future[torch.Tensor]] = deque()
    with ThreadPoolExecutor(_GENERATORS, thread_name_prefix="random-weights") as pool:
        for tensor, (name, shape) in enumerate(shard.items(), first_tensor):
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            elements = torch.Size(shape).numel()
            for chunk, start in enumerate(range(0, elements, _CHUNK_ELEMENTS)):
                count = min(_CHUNK_ELEMENTS, elements - start)
                own_seed = (seed * 1_000_003 + tensor * 4096 + chunk) % 2**63
                waiting.append(pool.submit(_normal, count, dtype, mean, own_seed))
                if len(waiting) > 2 * _GENERATORS:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _normal(count: int, dtype: torch.dtype, mean: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count, dtype=dtype).normal_(mean, _STD, generator=generator)


def _config(plan: CheckpointPlan) -> dict[str, Any]:
    """The `config.json` that such a checkpoint is published with."""
    shape = plan.shape
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": str(_TYPES[plan.weight_type]).removeprefix("torch."),
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": _STD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_position,
        "max_window_layers": shape.layers,
        "model_type": "qwen2",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
