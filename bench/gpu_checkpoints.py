"""Checkpoints of random weights on local disk, for whoever loads a model as a user's daemon does.

Owns: the files, written once a run and shape, and their end. Does not know: who reads them.
Fails with `Skipped` where the disk has no room.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_shapes import RandomWeights, Shape

from sage_fed.engine.checkpoint import EMBEDDING
from sage_fed.engine.configuration import read_spec
from sage_fed.engine.precision import PRECISIONS, choose_formats
from sage_fed.engine.weights import WeightsBuilder

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
