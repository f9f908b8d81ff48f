"""A lean Qwen2 forward pass for training on a CPU, and its way into the Hugging Face layout.

Owns: the two shapes, the parameters (float32), the forward pass (matrix products in bfloat16), the
conversion to `Qwen2ForCausalLM`.
Does not know: data, optimisers, files.

Why not train through `transformers`: on a CPU with AVX512-bf16 its autocast path spends the gain of
bfloat16 products on weight casts and on a slow bfloat16 attention backward. Measured on 2 cores,
batch 64 x 40: transformers 3.6k tokens/s for the strategic shape in float32 and 3.6k with autocast;
this file 6.5k. Tactical: 24k, 20k and 52k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

HEAD_DIM = 32
ROPE_THETA = 10_000.0
NORM_EPS = 1e-6
MAX_POSITIONS = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of one model of the pair; head size is `HEAD_DIM` in both."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    tied: bool


SHAPES = {
    "tactical": Shape(512, 96, 4, 3, 1, 256, tied=True),
    "strategic": Shape(640, 256, 8, 8, 2, 768, tied=False),
}


def _matrix(rows: int, cols: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, cols) * (scale * cols**-0.5))


class Layer(nn.Module):
    """One decoder layer with query/key/value and gate/up fused into one product each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, num_qkv = shape.hidden_size, shape.num_heads + 2 * shape.num_kv_heads
        out_scale = (2 * shape.num_layers) ** -0.5
        self.shape = shape
        self.norm_in = nn.Parameter(torch.ones(hidden))
        self.qkv = _matrix(num_qkv * HEAD_DIM, hidden)
        self.qkv_bias = nn.Parameter(torch.zeros(num_qkv * HEAD_DIM))
        self.out = _matrix(hidden, shape.num_heads * HEAD_DIM, out_scale)
        self.norm_mid = nn.Parameter(torch.ones(hidden))
        self.gate_up = _matrix(2 * shape.intermediate_size, hidden)
        self.down = _matrix(hidden, shape.intermediate_size, out_scale)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, places: Tensor | None
    ) -> Tensor:
        """[batch, length, hidden] float32 -> the same, or [num_places, hidden] at `places` only."""
        dtype = mask.dtype
        batch, length, width = hidden.shape
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        group = heads // kv_heads
        normed = F.rms_norm(hidden, (width,), self.norm_in, NORM_EPS).to(dtype)
        qkv = F.linear(normed, self.qkv.to(dtype), self.qkv_bias.to(dtype))
        qkv = qkv.view(batch, length, heads + 2 * kv_heads, HEAD_DIM)
        qk = qkv[:, :, : heads + kv_heads]
        qk = qk * cos + torch.roll(qk, HEAD_DIM // 2, -1) * sin
        q = qk[:, :, :heads].transpose(1, 2).reshape(batch, kv_heads, group * length, HEAD_DIM)
        k = qk[:, :, heads:].transpose(1, 2)
        v = qkv[:, :, heads + kv_heads :].transpose(1, 2)
        # Plain attention: at these lengths it beats the fused kernel, whose bfloat16 backward is
        # five times slower on a CPU.
        scores = (q @ k.transpose(-1, -2)).view(batch, kv_heads, group, length, length)
        weights = torch.softmax(scores * HEAD_DIM**-0.5 + mask, -1)
        mixed = (weights.view(batch, kv_heads, group * length, length) @ v).view(
            batch, heads, length, HEAD_DIM
        )
        mixed = mixed.transpose(1, 2).reshape(batch, length, heads * HEAD_DIM)
        if places is not None:
            hidden, mixed = hidden.flatten(0, 1)[places], mixed.flatten(0, 1)[places]
        hidden = hidden + F.linear(mixed, self.out.to(dtype))
        normed = F.rms_norm(hidden, (width,), self.norm_mid, NORM_EPS).to(dtype)
        gate, up = F.linear(normed, self.gate_up.to(dtype)).chunk(2, -1)
        return hidden + F.linear(F.silu(gate) * up, self.down.to(dtype))


class PairModel(nn.Module):
    """Qwen2 by its arithmetic; names and fusing differ, `to_transformers` translates."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.02)
        self.head = None if shape.tied else _matrix(shape.vocab_size, shape.hidden_size, 0.5)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden_size))
        frequencies = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angles = torch.outer(torch.arange(MAX_POSITIONS).float(), frequencies)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], -1), persistent=False)
        # The first half carries the minus of `rotate_half`, so a plain roll rotates.
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], -1), persistent=False)

    def forward(
        self, token_ids: Tensor, places: Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """Logits [num_places, vocab] float32 at the flat `places` of [batch, length] `token_ids`.

        Rows are padded on the right: under the causal mask padding reaches no real position.
        """
        length = token_ids.shape[1]
        cos, sin = (table[:length, None].to(dtype) for table in (self.cos, self.sin))
        mask = torch.full((length, length), -1e9, dtype=dtype).triu(1)
        hidden = F.embedding(token_ids, self.embedding)
        *lower, last = self.layers
        for layer in lower:
            hidden = layer(hidden, cos, sin, mask, None)
        # Above the last attention only the places with loss matter: about an eighth of them.
        hidden = last(hidden, cos, sin, mask, places)
        hidden = F.rms_norm(hidden, (self.shape.hidden_size,), self.norm, NORM_EPS)
        head = self.embedding if self.head is None else self.head
        return F.linear(hidden, head)


def transformers_config(shape: Shape, eos_token_id: int, pad_token_id: int) -> Qwen2Config:
    """The configuration that `transformers` reads, as near to Qwen2.5's own as the sizes allow."""
    return Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=shape.tied,
        bos_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=shape.num_layers,
    )


def to_transformers(model: PairModel, config: Qwen2Config) -> Qwen2ForCausalLM:
    """The same function as `model`, as a `Qwen2ForCausalLM` in float32."""
    shape = model.shape
    q_rows, kv_rows = shape.num_heads * HEAD_DIM, shape.num_kv_heads * HEAD_DIM
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm,
        "lm_head.weight": model.embedding if model.head is None else model.head,
    }
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        name = f"model.layers.{index}"
        for kind, tensor in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            parts = tensor.split([q_rows, kv_rows, kv_rows])
            for letter, part in zip("qkv", parts, strict=True):
                state[f"{name}.self_attn.{letter}_proj.{kind}"] = part
        gate, up = layer.gate_up.chunk(2)
        state |= {
            f"{name}.self_attn.o_proj.weight": layer.out,
            f"{name}.mlp.gate_proj.weight": gate,
            f"{name}.mlp.up_proj.weight": up,
            f"{name}.mlp.down_proj.weight": layer.down,
            f"{name}.input_layernorm.weight": layer.norm_in,
            f"{name}.post_attention_layernorm.weight": layer.norm_mid,
        }
    exported = Qwen2ForCausalLM(config)
    exported.load_state_dict({key: value.detach().clone() for key, value in state.items()})
    return exported.eval()
