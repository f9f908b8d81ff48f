"""Small random checkpoints of every architecture, and what `transformers` says of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Far apart logits: a greedy choice must not hang on the last bit of a sum.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 7,
    "pad_token_id": 0,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2-untied": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen2-yarn": Qwen2Config(
        **SHAPE,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "qwen3-biased": Qwen3Config(**SHAPE, head_dim=12, attention_bias=True),
    "llama": LlamaConfig(**SHAPE),
    "llama-one-kv-head-each": LlamaConfig(**{**SHAPE, "num_key_value_heads": 6}),
    "llama-biased": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-linear": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": MistralConfig(**SHAPE, head_dim=10, sliding_window=None),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, and the same weights in `transformers`, fp32 on the CPU."""

    path: Path
    reference: PreTrainedModel

    def greedy(self, prompt: tuple[int, ...], num_new: int) -> tuple[int, ...]:
        """What `generate` answers, ends of text ignored."""
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            answer = self.reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                do_sample=False,
                eos_token_id=None,
            )
        return tuple(answer[0, len(prompt) :].tolist())

    def logits(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        """Logits [tokens, vocabulary] after each of `token_ids`."""
        with torch.inference_mode():
            return self.reference(torch.tensor([token_ids])).logits[0]


def save_random(config: PretrainedConfig, path: Path, seed: int = 0) -> Checkpoint:
    """Write a model with random weights (norms and biases too) in the Hugging Face layout."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return Checkpoint(path, model.eval())


def edit_json(path: Path, **values: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """`length` random token ids."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(8, 128, (length,), generator=generator).tolist())
