"""The models of a GPU run: shapes, sizes, engines with random weights, checkpoints on disk.

Owns: the two plans (`real`, `small`), filling an engine without a checkpoint, and the files of
those parts that load a model as a daemon does, written once a run and shape, and their end.
Does not know: what is measured. Fails with `Skipped` where the disk has no room.

Speed does not depend on the values of weights as long as they are ordinary: not zero (a device
draws less power on zeros and clocks higher), not denormal, not infinite.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine.checkpoint import EMBEDDING
from sage_fed.engine.configuration import read_spec
from sage_fed.engine.cuda_graphs import EagerCapture
from sage_fed.engine.precision import PRECISIONS, choose_formats
from sage_fed.engine.weights import Place, WeightsBuilder

MIB, GIB = 2**20, 2**30
_MAX_POSITION = 32768


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2 decoder: `valid_ids` is the length of its tokenizer, `vocab` is padded."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    valid_ids: int
    tied: bool
    kv_cache_bytes: int
    max_context: int

    @property
    def body_parameters(self) -> int:
        """Elements of the layers' matrices."""
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a checkpoint in bf16, norms and biases aside."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return 2 * (self.body_parameters + tables)

    def prefill_flops(self, tokens: int, start: int = 0) -> int:
        """Operations for `tokens` behind `start` cached ones; the head runs on the last only."""
        pairs = tokens * start + tokens * (tokens + 1) // 2
        attention = 4 * self.layers * self.hidden * pairs
        head = 2 * self.valid_ids * self.hidden
        return 2 * self.body_parameters * tokens + attention + head

    def config(self) -> dict[str, Any]:
        """The `config.json` of such a checkpoint; no token ends a text."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": _MAX_POSITION,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": self.tied,
            "use_sliding_window": False,
            "dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": None,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """Every size of a run. Times in seconds; `streams` are closed loops of requests.

    `references` are the models of `gpu_correctness`. `calibration_s` is what a quick calibration
    takes with all that goes before it.
    """

    tactical: Shape
    strategic: Shape
    precision: str
    references: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    chunk_tokens: int
    repeats: int
    point_s: float
    read_bytes: int
    matrix: int
    new_tokens: int
    tactical_streams: int
    strategic_streams: int
    strategic_prompt: int
    scene_s: float
    rounds: int
    mixed_streams: tuple[int, ...]
    mixed_alone_s: float
    daemon_s: float
    daemon_needs_s: float
    cancels: int
    calibration_s: float
    precisions: tuple[str, ...]
    precision_batches: tuple[int, ...]
    peers: tuple[str, ...]
    peer_batches: tuple[int, ...]
    peer_tokens: int


_QWEN_IDS = 151665
QWEN_05B = Shape("qwen2.5-0.5b", 896, 24, 14, 2, 4864, 151936, _QWEN_IDS, True, 2 * GIB, 8192)
QWEN_7B = Shape("qwen2.5-7b", 3584, 28, 28, 4, 18944, 152064, _QWEN_IDS, False, 8 * GIB, 8192)
SMALL_TACTICAL = Shape("small-tactical", 64, 2, 4, 2, 128, 640, 600, True, MIB, 512)
SMALL_STRATEGIC = Shape("small-strategic", 128, 4, 4, 2, 384, 640, 600, False, 4 * MIB, 512)

PLANS: dict[str, Plan] = {
    "real": Plan(
        tactical=QWEN_05B,
        strategic=QWEN_7B,
        precision="bf16",
        references=(
            "qwen2-tied",
            "qwen2-untied",
            "qwen3",
            "llama3-rope",
            "llama-biased",
            "mistral",
            "demo-tactical",
            "demo-strategic",
        ),
        batches=(1, 8, 32, 128),
        contexts=(128, 1024),
        prefills=(128, 512, 4096),
        chunk_tokens=2048,
        repeats=30,
        point_s=1.0,
        read_bytes=4 * GIB,
        matrix=8192,
        new_tokens=64,
        tactical_streams=4,
        strategic_streams=16,
        strategic_prompt=512,
        scene_s=6.0,
        rounds=2,
        mixed_streams=(1, 16, 64, 256),
        mixed_alone_s=5.0,
        daemon_s=15.0,
        daemon_needs_s=60.0,
        cancels=1000,
        calibration_s=25.0,
        # The most wanted first: what time is not left for is listed as cut.
        precisions=("bf16", "int4", "int8", "fp8"),
        precision_batches=(1, 8, 32, 128),
        peers=("eager", "static", "continuous"),
        peer_batches=(1, 8, 32, 128),
        peer_tokens=64,
    ),
    "small": Plan(
        tactical=SMALL_TACTICAL,
        strategic=SMALL_STRATEGIC,
        precision="bf16",
        # The engine's own tests have all of them on the CPU.
        references=("qwen2-tied", "qwen3", "demo-tactical"),
        batches=(1, 2, 4),
        contexts=(16, 64, 128),
        prefills=(16, 48),
        chunk_tokens=48,
        repeats=3,
        point_s=0.1,
        read_bytes=16 * MIB,
        matrix=128,
        new_tokens=8,
        tactical_streams=2,
        strategic_streams=2,
        strategic_prompt=48,
        scene_s=0.4,
        rounds=1,
        mixed_streams=(1, 4),
        mixed_alone_s=0.3,
        daemon_s=0.5,
        daemon_needs_s=10.0,
        cancels=20,
        calibration_s=5.0,
        precisions=("bf16", "int4"),
        precision_batches=(1, 2),
        peers=("eager",),
        peer_batches=(1, 2),
        peer_tokens=4,
    ),
}


def hollow(shape: Shape) -> Shape:
    """As many layers, next to no bytes: what a step of it takes is launches and host work."""
    return Shape(
        f"{shape.name}-hollow", 64, shape.layers, 2, 1, 64, 256, 256, shape.tied, MIB * 4, 512
    )


@dataclass(slots=True)
class Filling:
    """What was put into a model: elements, and how many of them no measurement should meet."""

    elements: int = 0
    not_finite: int = 0
    denormal: int = 0


class RandomWeights:
    """Random tensors by checkpoint name, made on `device`: matrices N(0, 0.02), norms about 1."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self._device = device
        self._dtype = dtype
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor; a checkpoint's own order makes it reproducible."""
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        values = torch.empty(shape, dtype=self._dtype, device=self._device)
        return values.normal_(mean, 0.02, generator=self._generator)


def random_engine(
    shape: Shape,
    device: str,
    precision: str,
    seed: int,
    *,
    max_batch: int,
    kernels: str = "auto",
) -> tuple[Engine, Filling]:
    """Load a model by the engine's own path, with only the reading of files replaced.

    On the CPU it takes the path of CUDA all the same, graphs done eagerly.
    """
    filling = Filling()
    dtype = PRECISIONS[precision].compute
    weights = RandomWeights(torch.device(device), dtype, seed)
    tiny = torch.finfo(dtype).tiny

    def fill(
        directory: Path,  # noqa: ARG001 - there is nothing to read
        places: Mapping[str, Place],
        device: torch.device,  # noqa: ARG001 - the weights are made there
        placed: Callable[[int, int], None],
    ) -> None:
        for number, (name, place) in enumerate(places.items(), 1):
            values = weights.tensor(name, place.shape)
            filling.elements += values.numel()
            filling.not_finite += int((~values.isfinite()).sum())
            filling.denormal += int(((values != 0) & (values.abs() < tiny)).sum())
            place.put(values)
            placed(number, len(places))

    with tempfile.TemporaryDirectory(prefix="sage-fed-gpu-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config()))
        reading = importlib.import_module("sage_fed.engine.checkpoint")
        loading = importlib.import_module("sage_fed.engine.load")
        with (
            mock.patch.object(reading, "stream_weights", fill),
            # There are no files to compare embedding and head in: what the shape says holds.
            mock.patch.object(
                loading, "shared_table", lambda _, tied: loading.EMBEDDING if tied else None
            ),
        ):
            options = EngineOptions(
                model=folder,
                kv_cache_bytes=shape.kv_cache_bytes,
                device=device,
                precision=precision,
                name=shape.name,
                max_context_tokens=shape.max_context,
                num_valid_ids=shape.valid_ids,
                max_batch=max_batch,
                kernels="torch" if device == "cpu" else kernels,
            )
            capture = EagerCapture() if device == "cpu" else None
            engine = load_engine(options, lambda _: None, capture)
    return engine, filling


_SLACK_BYTES = 2**28
_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Skipped(Exception):
    """The part cannot be run here; the text says why."""


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint's directory, the bytes of its weights, and the seconds that writing took."""

    path: Path
    nbytes: int
    seconds: float

    @property
    def weights(self) -> Path:
        """The one file of weights."""
        return self.path / "model.safetensors"


class Checkpoints:
    """A temporary directory of checkpoints, one for each shape that somebody asked for."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written: dict[str, Written] = {}

    def of(self, shape: Shape, device: torch.device) -> Written:
        """Return the shape's checkpoint; its bf16 weights are made on `device`, then written.

        Raises:
            Skipped: the disk has no room for it.
        """
        if shape.name not in self._written:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="sage-fed-gpu-")
            folder = Path(self._folder.name)
            needed = shape.weight_bytes * 11 // 10 + _SLACK_BYTES
            if (free := shutil.disk_usage(folder).free) < needed:
                raise Skipped(f"{free} bytes are free on disk, and {shape.name} needs {needed}")
            began = time.perf_counter()
            path = folder / shape.name
            nbytes = _write_weights(shape, path, device)
            _write_tokenizer(shape, path)
            self._written[shape.name] = Written(path, nbytes, time.perf_counter() - began)
        return self._written[shape.name]

    def close(self) -> None:
        """Delete them all."""
        self._written.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _write_weights(shape: Shape, directory: Path, device: torch.device) -> int:
    """Write config and weights; returns the file's bytes."""
    from safetensors.torch import save_file  # noqa: PLC0415

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape.config()))
    meta = torch.device("meta")  # shapes only
    spec = read_spec(directory)
    builder = WeightsBuilder(
        spec,
        choose_formats(PRECISIONS["bf16"], meta),
        shared_table=EMBEDDING if spec.tied_embeddings else None,
        num_valid_ids=shape.vocab,
        compute=torch.bfloat16,
        device=meta,
    )
    weights = RandomWeights(device, torch.bfloat16, seed=shape.layers)
    tensors = {
        name: weights.tensor(name, place.shape).cpu() for name, place in builder.places.items()
    }
    path = directory / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path.stat().st_size


def _write_tokenizer(shape: Shape, directory: Path) -> None:
    """Write a made-up tokenizer of the shape's own length."""
    from tokenizers import pre_tokenizers  # noqa: PLC0415
    from transformers import Qwen2Tokenizer  # noqa: PLC0415

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"w{number:05d}" for number in range(shape.valid_ids - len(words) - len(_SPECIALS))]
    vocab = {word: index for index, word in enumerate([*_SPECIALS, *words])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token=None,
        eos_token=_SPECIALS[2],
        pad_token=_SPECIALS[0],
        extra_special_tokens=[_SPECIALS[1]],
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
