"""The same checkpoint in the peers' own formats: GGUF for llama.cpp, IR for OpenVINO.

Owns: both conversions, and a note of what each made of the head and the embedding.
Fails: with the converter's own error; nothing half-made is left under its final name.

Runs under the peers' interpreter: python bench/peers_convert.py CHECKPOINT FOLDER llama|openvino
llama.cpp: tensors are written as BF16 (norms and biases FP32) with the `qwen2` architecture's
metadata and no vocabulary, then llama.cpp's own quantiser makes Q8_0 and Q4_0 from that file,
without `--pure`: which type the tied head got is read back from the file.
OpenVINO: exported by optimum-intel, with weights in FP16 (BF16, as the checkpoint has them, is
as fast), and compressed to int8 by nncf (its default: asymmetric, per channel).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def llama(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Write BF16.gguf, Q8_0.gguf and Q4_0.gguf; the types of their tensors."""
    import llama_cpp  # noqa: PLC0415 - a peer that may be absent

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


def openvino(checkpoint: Path, folder: Path) -> dict[str, Any]:
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
    import openvino as ov  # noqa: PLC0415
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
    ov.save_model(encode, target / "openvino_tokenizer.xml")
    ov.save_model(decode, target / "openvino_detokenizer.xml")


def _constants(path: Path) -> dict[str, int]:
    """Bytes of the model's constants by element type."""
    import openvino as ov  # noqa: PLC0415

    sizes: Counter[str] = Counter()
    for node in ov.Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant":
            kind = node.get_element_type()
            sizes[kind.get_type_name()] += int(node.get_byte_size())
    return {kind: size for kind, size in sizes.most_common(4) if size > 2**16}


if __name__ == "__main__":
    given, into, peer = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    into.mkdir(parents=True, exist_ok=True)
    notes = {"llama": llama, "openvino": openvino}[peer](given, into)
    print(f"\n{json.dumps(notes)}")
