"""The forward pass of a decoder over a ragged batch: chunks in, logits of the wanted rows out.

Same arithmetic as `transformers` in fp32; in half precision norms are computed in fp32 and rounded
once. What stands between the cache and the cache (norms, projections, rotation, activation,
residuals) changes nothing that it was given, so it can be compiled; layers of one model share the
code. Rotary embeddings pair element i with i + head_dim / 2, as the weights' layout expects; their
tables are computed in fp32 and stored in the model's type.
Owns `Forward`, what an engine asks of any way to compute a step. Knows nothing of sequences,
sampling or files. Fails with torch's own out-of-memory error.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows

from sage_fed.engine.attention import AttentionGroup, KVCache
from sage_fed.engine.batch import Batch, BatchBuilder
from sage_fed.engine.configuration import ORIGINAL_LENGTH, ModelSpec, RopeSpec
from sage_fed.engine.linear import Linear
from sage_fed.engine.native.library import Library
from sage_fed.engine.weights import LayerWeights, ModelWeights
from sage_fed.steps import Chunk, Draw


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer's arithmetic has to know besides its weights.

    Queries come first, then keys (rotated with them), then values.
    """

    eps: float
    head_dim: int
    num_heads: int
    rotated_heads: int

    @classmethod
    def of(cls, spec: ModelSpec) -> LayerShape:
        """That of one model."""
        return cls(spec.rms_eps, spec.head_dim, spec.num_heads, spec.num_heads + spec.num_kv_heads)


def project(
    layer: LayerWeights, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shape: LayerShape
) -> torch.Tensor:
    """Queries, keys and values of hidden states [tokens, hidden_size], rotated, side by side."""
    qkv = layer.qkv(F.rms_norm(x, x.shape[-1:], layer.input_norm, shape.eps))
    heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
    if layer.q_norm is not None:
        _norm_heads_(heads, layer, shape)
    rotate_(heads[:, : shape.rotated_heads], cos, sin)
    return qkv


def finish(
    layer: LayerWeights, x: torch.Tensor, attended: torch.Tensor, shape: LayerShape
) -> torch.Tensor:
    """The layer's hidden states, from those before it and what its attention found."""
    x = layer.out.add_to(x, attended)
    gate_up = layer.gate_up(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, shape.eps))
    gate, up = gate_up.chunk(2, dim=-1)
    return layer.down.add_to(x, F.silu(gate).mul_(up))


def logits(head: Linear, x: torch.Tensor, norm: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    """Logits [rows, ids] of the last layer's hidden states."""
    return head(F.rms_norm(x, x.shape[-1:], norm, shape.eps))


@dataclass(frozen=True, slots=True)
class Body:
    """The three functions, as they are or compiled."""

    project: Callable[..., torch.Tensor] = field(default=project)
    finish: Callable[..., torch.Tensor] = field(default=finish)
    logits: Callable[..., torch.Tensor] = field(default=logits)


def _norm_heads_(heads: torch.Tensor, layer: LayerWeights, shape: LayerShape) -> None:
    """Normalise each query and key head in place (Qwen3)."""
    assert layer.q_norm is not None
    assert layer.k_norm is not None
    queries = heads[:, : shape.num_heads]
    keys = heads[:, shape.num_heads : shape.rotated_heads]
    queries.copy_(F.rms_norm(queries, (shape.head_dim,), layer.q_norm, shape.eps))
    keys.copy_(F.rms_norm(keys, (shape.head_dim,), layer.k_norm, shape.eps))


class Decoder:
    """Embedding, layers, final norm and head of one model, with its cache.

    `rotary` is `rotary_table` for every position that will be served. `body` are the layers'
    functions.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        cache: KVCache,
        rotary: torch.Tensor,
        body: Body | None = None,
    ) -> None:
        self._weights = weights
        self._cache = cache
        self._rotary = rotary
        self._body = body or Body()
        self._shape = LayerShape.of(spec)
        self._query_width = spec.num_heads * spec.head_dim

    @property
    def num_layers(self) -> int:
        """Layers of the model; at least one."""
        return len(self._weights.layers)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Run every layer, extending the cache; returns hidden states [tokens, hidden_size]."""
        # Only the last is kept: those before it are memory that the next layers need.
        (hidden,) = deque(self.layers(batch), maxlen=1)
        return hidden

    def layers(self, batch: Batch) -> Iterator[torch.Tensor]:
        """Run one layer after the other; yields the hidden states after each."""
        body, shape = self._body, self._shape
        if batch.stale is not None:
            self._cache.clear(batch.stale)
        cos, sin = self._rotary.index_select(0, batch.positions).unbind(1)
        x = self._weights.embedding.lookup(batch.token_ids)
        for index, layer in enumerate(self._weights.layers):
            qkv = body.project(layer, x, cos, sin, shape)
            self._cache.store(index, batch.slots, qkv[:, self._query_width :])
            heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
            x = body.finish(layer, x, self._attend(index, heads, batch.groups), shape)
            yield x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, valid ids] of hidden states [rows, hidden_size], in the model's type."""
        weights = self._weights
        return self._body.logits(weights.head, hidden, weights.norm, self._shape)

    def _attend(
        self, index: int, heads: torch.Tensor, groups: tuple[AttentionGroup, ...]
    ) -> torch.Tensor:
        if len(groups) == 1:
            return groups[0].attend(index, heads, self._cache)
        return torch.cat([group.attend(index, heads, self._cache) for group in groups])


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What a pass over a step's chunks has left to choose from.

    `logits` is [len(draws), valid ids] of a floating type, or None where no chunk has a draw.
    `drawing[i]` is the index, in the step, of the chunk that `draws[i]` belongs to.
    `best`, where the pass has found it already, is the argmax of each row, or `NO_TOKEN` for one
    that is not finite. `kernels`, where it ran on them, can draw from its logits.
    """

    logits: torch.Tensor | None
    draws: tuple[Draw, ...]
    drawing: tuple[int, ...]
    best: torch.Tensor | None = None
    kernels: Library | None = None


class Pass(Protocol):
    """A pass under way."""

    def advance(self, pause_after_s: float | None) -> Forwarded | None:
        """Go on to the end; or pause between two layers, and None.

        With `pause_after_s` it goes on by as many layers as that time is enough for, and by one.
        """


class Forward(Protocol):
    """One model's forward pass and its KV cache, on one device."""

    @property
    def num_parts(self) -> int:
        """Into how many parts a pass can be divided; 1 where it never pauses."""

    def begin(self, chunks: Sequence[Chunk]) -> Pass:
        """Lay out a pass that extends the cache; one that was not finished is forgotten.

        Where it never pauses, `advance` queues or does it; results may still be on their way.
        """


@dataclass(frozen=True, slots=True)
class Queued:
    """A pass that is on the device as a whole."""

    forwarded: Forwarded

    def advance(self, pause_after_s: float | None) -> Forwarded:
        """Return what it leaves; there is nothing to pause between."""
        del pause_after_s
        return self.forwarded


class TorchForward:
    """The pass as torch operations, on whatever device the weights are.

    Where there is a `newest`, int64 on the device, a token id of -1 - i stands for
    `newest[i]`: a token that the host need not have seen yet.
    """

    def __init__(
        self, batches: BatchBuilder, decoder: Decoder, newest: torch.Tensor | None = None
    ) -> None:
        self._batches = batches
        self._decoder = decoder
        self._newest = newest

    @property
    def num_parts(self) -> int:
        """The layers; 1 where a launch only queues, so that the host's clock says nothing."""
        return self._decoder.num_layers if self._newest is None else 1

    def begin(self, chunks: Sequence[Chunk]) -> Pass:
        """Begin; see `Forward`."""
        batch = self._batches.build(chunks)
        if batch.pending:
            assert self._newest is not None
            batch = replace(batch, token_ids=resolved(batch.token_ids, self._newest))
        return TorchPass(self._decoder, batch)


class TorchPass:
    """A pass that goes on layer by layer."""

    def __init__(self, decoder: Decoder, batch: Batch) -> None:
        self._decoder = decoder
        self._batch = batch
        self._layers = decoder.layers(batch)
        self._hidden: torch.Tensor | None = None

    def advance(self, pause_after_s: float | None) -> Forwarded | None:
        """Go on; see `Pass`."""
        begun_s = layer_begun_s = time.monotonic()
        for hidden in self._layers:
            self._hidden = hidden
            if pause_after_s is None:
                continue
            now = time.monotonic()
            # The next layer is taken to be as long as this one.
            if now + (now - layer_begun_s) - begun_s > pause_after_s:
                return None
            layer_begun_s = now
        return self._forwarded()

    def _forwarded(self) -> Forwarded:
        batch, hidden = self._batch, self._hidden
        if not batch.draws:
            return Forwarded(None, (), ())
        assert hidden is not None
        if batch.rows is not None:
            hidden = hidden.index_select(0, batch.rows)
        return Forwarded(self._decoder.logits(hidden), batch.draws, batch.drawing)


def resolved(token_ids: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
    """`token_ids` with each -1 - i replaced by `newest[i]`."""
    return torch.where(token_ids < 0, newest[(-1 - token_ids).clamp_min(0)], token_ids)


def rotary_table(
    rope: RopeSpec, head_dim: int, positions: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Tabulate cosines and signed sines: [positions, 2, 1, head_dim].

    The sines of the first half are negated, so that rotating is
    `x * cos + roll(x, head_dim / 2) * sin`.
    """
    frequencies, scale = _frequencies(rope, head_dim)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    table = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)), dim=1)
    return table.unsqueeze(2).to(device=device, dtype=dtype)


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate `heads` [tokens, heads, head_dim] in place; cos and sin are [tokens, 1, head_dim]."""
    rolled = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(rolled, sin)


def _frequencies(rope: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, fp32 [head_dim / 2], and the factor of cosines and sines.

    Operation by operation as `transformers` has them, so that the bits are the same: at position
    100,000 the last one of a frequency is a hundredth of a turn.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    scaling = dict(rope.scaling)
    if rope.kind == "linear":
        return plain / scaling["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if rope.kind == "yarn":
        return _yarn(rope.theta, exponents, head_dim, scaling)
    if rope.kind == "longrope":
        return _longrope(rope, exponents)
    # Dynamic scaling begins beyond `max_position`, where nothing is served.
    return plain, 1.0


def _llama3(plain: torch.Tensor, scaling: Mapping[str, float]) -> torch.Tensor:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between."""
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling[ORIGINAL_LENGTH]
    wavelength = 2 * math.pi / plain
    ramp = (context / wavelength - low) / (high - low)
    between = (1 - ramp) * plain / factor + ramp * plain
    scaled = torch.where(wavelength > context / low, plain / factor, plain)
    is_between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(is_between, between, scaled)


def _yarn(
    theta: float, exponents: torch.Tensor, head_dim: int, scaling: Mapping[str, float]
) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolation by wavelength, attention scaled by its factor."""
    factor, context = scaling["factor"], scaling[ORIGINAL_LENGTH]

    def dimension(rotations: float) -> float:
        return (head_dim * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = dimension(scaling.get("beta_fast") or 32.0)
    high = dimension(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp's width must not be zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    wavelengths = theta**exponents
    frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    scale = scaling.get("attention_factor")
    if scale is None:
        mscale, mscale_all = scaling.get("mscale", 0.0), scaling.get("mscale_all_dim", 0.0)
        if mscale and mscale_all:
            scale = _mscale(factor, mscale) / _mscale(factor, mscale_all)
        else:
            scale = _mscale(factor, 1.0)
    return frequencies, scale


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(rope: RopeSpec, exponents: torch.Tensor) -> tuple[torch.Tensor, float]:
    """LongRoPE (arXiv 2402.13753) up to the original length, which its short factors are for."""
    scaling = dict(rope.scaling)
    factor = scaling.get("factor", rope.max_position / scaling[ORIGINAL_LENGTH])
    scale = scaling.get("attention_factor")
    if scale is None:
        scale = 1.0
        if factor > 1:
            scale = math.sqrt(1 + math.log(factor) / math.log(scaling[ORIGINAL_LENGTH]))
    short = torch.tensor(rope.short_factor, dtype=torch.float32)
    return 1.0 / (short * rope.theta**exponents), scale
