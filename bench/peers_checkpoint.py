"""A random-weight checkpoint that every engine here can be fed with, written once.

Owns: its directory and its tokenizer, a stand-in because token ids are fed directly.
Does not know: the engines.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the checkout that this file is in, whatever is installed

import json  # noqa: E402 - after the path

import gpu_shapes  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

SHAPES = {
    "qwen2.5-0.5b": gpu_shapes.QWEN_05B,
    "tiny": gpu_shapes.Shape("tiny", 128, 2, 2, 1, 256, 1024, 1024, True, 2**22, 512),
}
_TOKENIZER = ROOT / "sage_fed" / "models" / "demo-tactical"


def make(shape: str, folder: Path) -> Path:
    """The checkpoint of `shape` under `folder`; as it is where it is whole already."""
    directory = folder / shape
    done = directory / "model.safetensors"
    if done.is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[shape].config(), indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_TOKENIZER / name, directory / name)
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        places = AutoModelForCausalLM.from_config(config).state_dict()
    weights = gpu_shapes.RandomWeights(torch.device("cpu"), torch.bfloat16, seed=7)
    tensors = {
        name: weights.tensor(name, tuple(place.shape))
        for name, place in places.items()
        if not (SHAPES[shape].tied and name == "lm_head.weight")
    }
    # A half-written file must not be taken for a checkpoint by the next run.
    partial = directory / "model.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(done)
    return directory
