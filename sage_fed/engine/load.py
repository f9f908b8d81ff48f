"""From a checkpoint to a running engine: every check and every allocation, in order.

Owns the choice between native kernels, torch's, and graphs that are captured before READY, and
what each costs in time and memory. The device is the one that was asked for, or loading fails:
there is no silent fallback. Fails with a `ModelLoadError` that names the culprit, and with torch's
out-of-memory error where the graphs do not fit beside the model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sage_fed.core import ModelInfo
from sage_fed.engine.attention import Heads, KVCache, blocks_in_budget, bytes_per_token
from sage_fed.engine.batch import BatchBuilder
from sage_fed.engine.checkpoint import (
    EMBEDDING,
    HEAD,
    left_out,
    load_weights,
    locate,
    shared_table,
    weights_cache,
)
from sage_fed.engine.configuration import ModelSpec, read_generation, read_spec
from sage_fed.engine.cuda_graphs import (
    VERIFIED_TOKENS,
    Buckets,
    CudaCapture,
    GraphCapture,
    GraphForward,
    can_compile,
)
from sage_fed.engine.decoder import Body, Decoder, TorchForward, rotary_table
from sage_fed.engine.engine import Engine
from sage_fed.engine.machine import resolve_device
from sage_fed.engine.native import Library
from sage_fed.engine.native.forward import NativeForward
from sage_fed.engine.precision import choose_formats, precision_of
from sage_fed.engine.weights import ModelWeights, WeightsBuilder
from sage_fed.errors import ModelLoadError
from sage_fed.model_files import resolve_model
from sage_fed.steps import BLOCK_SIZE

_LOG = logging.getLogger(__name__)
_LOADED = 0.9
"""The share of the progress that is the weights'."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What to load and where.

    `model` is as `resolve_model` reads it: a directory written as a path, a bundled model, or a
    hub id, the latter with `revision`, a commit. `name` is what
    the world calls it; "" takes the directory's name or the hub id. `max_context_tokens` None
    takes the model's own. `num_valid_ids` is the length of the tokenizer: ids from it on
    are padding of the vocabulary and are never drawn; None draws from the whole vocabulary.
    `unknown_ids` are those below it that the tokenizer skips, which are not drawn either.
    `end_token_ids` are the tokenizer's, which end a text beside the checkpoint's own.
    `kernels` is "auto", or insists on "native" or "torch" ones. `weights_cache` is where
    quantised weights are kept for the next start: a directory, "auto" or "off"; all of them
    together take at most `weights_cache_bytes`.
    Where steps are captured beforehand, those of up to `max_batch` sequences are, of one new
    token each and, for a bounded number of rows, of each number in `verify_tokens`; larger ones
    run uncaptured.
    """

    model: str
    kv_cache_bytes: int
    device: str = "cpu"
    precision: str = "fp32"
    revision: str = ""
    name: str = ""
    max_context_tokens: int | None = None
    num_valid_ids: int | None = None
    unknown_ids: tuple[int, ...] = ()
    end_token_ids: frozenset[int] = frozenset()
    kernels: str = "auto"
    weights_cache: str = "off"
    weights_cache_bytes: int = 32 * 2**30
    max_batch: int = 16
    verify_tokens: tuple[int, ...] = VERIFIED_TOKENS


@torch.inference_mode()
def load_engine(
    options: EngineOptions,
    progress: Callable[[float], None],
    capture: GraphCapture | None = None,
) -> Engine:
    """Load a model; blocks. `progress` gets the loaded share, rising from 0 to 1.

    `capture` None leaves it to the device whether and how steps are recorded.

    Raises:
        ModelLoadError: anything that keeps the model from being served, by name.
    """
    began = time.monotonic()
    progress(0.0)
    device = resolve_device(options.device)
    precision = precision_of(options.precision, device)
    formats = choose_formats(precision, device, options.kernels)
    compute = precision.compute
    directory = locate(options.model, options.revision)
    name = options.name or _display_name(options.model)
    try:
        spec = read_spec(directory)
        context = _context(spec, options.max_context_tokens)
        num_blocks = blocks_in_budget(spec, compute, options.kv_cache_bytes, context)
        defaults, eos_token_ids, unread = read_generation(directory, spec.end_token_ids)
        if forgotten := sorted(options.end_token_ids - eos_token_ids):
            _LOG.warning(
                "model %s: the tokenizer or its chat template ends a text with %s, which neither "
                "generation_config.json nor config.json names; it ends one here, too",
                name,
                ", ".join(map(str, forgotten)),
            )
        eos_token_ids |= options.end_token_ids
        valid = _valid_ids(spec, options.num_valid_ids)
        shared = shared_table(directory, tied=spec.tied_embeddings)
        for remark in (
            *spec.remarks,
            *unread,
            *_remarks(directory, spec, shared, options.num_valid_ids),
        ):
            _LOG.warning("model %s: %s", name, remark)
        weights = load_weights(
            partial(
                WeightsBuilder,
                spec,
                formats,
                shared_table=shared,
                num_valid_ids=valid,
                compute=compute,
                device=device,
            ),
            directory,
            device,
            # What a checkpoint has is kept already: in the checkpoint.
            weights_cache(options.weights_cache, options.weights_cache_bytes)
            if precision.quantised
            else None,
            made=(formats.layout, valid, shared),
            # The pool and the graphs are still to come, so the weights alone never make it 1.
            progress=lambda share: progress(_LOADED * share),
        )
        capture = capture or capture_for(device, options.kernels)
        # Padding rows of a graph write to a block that no sequence owns.
        cache = KVCache(spec, num_blocks + (1 if capture else 0), compute, device)
        turned = compute if formats.native is None else torch.float32
        rotary = rotary_table(spec.rope, spec.head_dim, context, turned, device)
        began_capture, free = time.monotonic(), _free(device)
        forward = _forward(
            spec,
            weights,
            cache,
            rotary,
            capture,
            options=options,
            native=formats.native,
            widened=precision.quantised,
            num_blocks=num_blocks,
            num_ids=valid,
            progress=lambda share: progress(_LOADED + (0.99 - _LOADED) * share),
        )
        graphs = forward if isinstance(forward, GraphForward) else None
        recorded = f"+{capture.name}" if capture and capture.name else ""
    except ModelLoadError as error:
        raise ModelLoadError(f"model {name}: {error.message}") from error
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"model {name}: {device} has not enough memory for it") from error
    engine = Engine(
        info=ModelInfo(
            name=name,
            revision=options.revision,
            architecture=spec.architecture,
            parameters=weights.parameters,
            precision=options.precision,
            kernels=formats.kernels + recorded,
            device=str(device),
            weight_bytes=weights.nbytes,
            step_bytes=weights.step_nbytes,
            kv_cache_bytes=cache.nbytes,
            kv_token_bytes=bytes_per_token(spec, compute),
            load_s=time.monotonic() - began,
            capture_s=time.monotonic() - began_capture if graphs else 0.0,
            graph_bytes=max(0, free - _free(device)) if graphs else 0,
            end_token_ids=tuple(sorted(eos_token_ids)),
        ),
        forward=forward,
        device=device,
        num_blocks=num_blocks,
        max_context_tokens=context,
        num_ids=weights.embedding.num_ids,
        eos_token_ids=eos_token_ids,
        defaults=defaults,
        newest=graphs.newest if graphs else None,
        unknown_ids=tuple(id_ for id_ in options.unknown_ids if id_ < valid),
    )
    progress(1.0)
    return engine


def _display_name(model: str) -> str:
    source = resolve_model(model)
    return source.resolve().name if isinstance(source, Path) else source


def _context(spec: ModelSpec, asked: int | None) -> int:
    """The longest sequence to serve, which the model must have been built for."""
    context = spec.max_position if asked is None else asked
    if not 0 < context <= spec.max_position:
        raise ModelLoadError(
            f"a context of {context} tokens was asked for; the model has {spec.max_position}"
        )
    constant = spec.rope.constant_up_to
    if constant is not None and context > constant:
        raise ModelLoadError(
            f"rotary scaling {spec.rope.kind!r}, which beyond {constant} tokens depends on how "
            f"long a sequence is, is supported up to there; set max_context_tokens to {constant} "
            "or less"
        )
    if spec.sliding_window is not None and context > spec.sliding_window:
        raise ModelLoadError(
            f"attention over a sliding window of {spec.sliding_window} tokens is not supported; "
            f"set max_context_tokens to {spec.sliding_window} or less"
        )
    return context


def _valid_ids(spec: ModelSpec, num_valid_ids: int | None) -> int:
    """The ids that the tokenizer has a meaning for and the model a row."""
    if num_valid_ids is None:
        return spec.vocab_size
    if num_valid_ids < 1:
        raise ModelLoadError(f"the tokenizer has {num_valid_ids} ids")
    return min(num_valid_ids, spec.vocab_size)


def _remarks(
    directory: Path, spec: ModelSpec, shared: str | None, num_valid_ids: int | None
) -> Iterator[str]:
    """Say where the checkpoint's files disagree, and what is made of it."""
    if num_valid_ids is not None and num_valid_ids > spec.vocab_size:
        first, last = spec.vocab_size, num_valid_ids - 1
        yield (
            f"the tokenizer has {num_valid_ids:,} ids, and the model rows for {first:,}: a prompt "
            f"with an id from {first} to {last} is refused, and none of them is ever drawn"
        )
    if (remark := left_out(directory)) is not None:
        yield remark
    if spec.tied_embeddings and shared is None:
        yield (
            f"config.json ties {HEAD} to {EMBEDDING}, and the weights hold two that differ; "
            "both are used, as transformers does: set tie_word_embeddings to false"
        )
    elif shared == HEAD:
        yield f"the weights hold no {EMBEDDING}; {HEAD} is both, as config.json ties them"


def capture_for(device: torch.device, kernels: str) -> GraphCapture | None:
    """How steps are recorded on this device; None where they are not.

    `kernels` "torch" insists on torch's own: nothing is compiled.
    """
    if device.type != "cuda":
        return None
    return CudaCapture(device, compiles=kernels != "torch" and can_compile(device))


def _forward(
    spec: ModelSpec,
    weights: ModelWeights,
    cache: KVCache,
    rotary: torch.Tensor,
    capture: GraphCapture | None,
    *,
    options: EngineOptions,
    native: Library | None,
    widened: bool,
    num_blocks: int,
    num_ids: int,
    progress: Callable[[float], None],
) -> NativeForward | TorchForward | GraphForward:
    """Build the pass over `weights`; with a `capture`, `cache` has a block beyond `num_blocks`.

    `num_ids` are those that there are logits for, `widened` says that weights are stored narrower
    than they are computed with; `progress` rises to 1. With `native` kernels it is theirs, and
    `rotary` is fp32.
    """
    if native is not None:
        assert capture is None, "native steps are one call already: there is nothing to record"
        return NativeForward(native, spec, weights, cache, rotary, num_valid_ids=num_ids)
    context, dtype, device = rotary.shape[0], rotary.dtype, rotary.device
    heads = Heads(spec.num_heads, spec.num_kv_heads)
    batches = BatchBuilder(
        heads,
        vocab_size=weights.embedding.num_ids,
        max_context_tokens=context,
        dtype=dtype,
        device=device,
        pending_rows=num_blocks * BLOCK_SIZE if capture else 0,
    )
    decoder = Decoder(spec, weights, cache, rotary)
    if capture is None:
        return TorchForward(batches, decoder)
    # A step draws at most once for each slot of the cache.
    newest = torch.zeros(num_blocks * BLOCK_SIZE, dtype=torch.int64, device=device)
    forward = GraphForward(
        TorchForward(batches, decoder, newest),
        batches,
        Decoder(spec, weights, cache, rotary, _compiled(capture, widened=widened)),
        heads,
        capture,
        newest=newest,
        scratch_block=num_blocks,
        dtype=dtype,
    )
    buckets = Buckets(
        max_batch=options.max_batch,
        max_context_tokens=context,
        capacity_blocks=num_blocks,
        tokens=(1, *options.verify_tokens),
    )
    forward.prepare(buckets, num_ids, progress)
    return forward


def _compiled(capture: GraphCapture, *, widened: bool) -> Body:
    plain = Body()
    return Body(
        project=capture.compile(plain.project, widened=widened),
        finish=capture.compile(plain.finish, widened=widened),
        logits=capture.compile(plain.logits, widened=widened),
    )


def _free(device: torch.device) -> int:
    """Bytes that the device has left; 0 where that is everybody's."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
