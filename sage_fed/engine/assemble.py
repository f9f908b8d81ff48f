"""From weights to a forward pass: native, torch's, or graphs that are captured before it serves.

Owns the choice, and what it costs in time and memory. Knows no files. Fails with torch's
out-of-memory error where the graphs do not fit beside the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sage_fed.engine.architecture import ModelSpec
from sage_fed.engine.attention import Heads
from sage_fed.engine.batch import BatchBuilder
from sage_fed.engine.buckets import Buckets
from sage_fed.engine.decoder import Decoder
from sage_fed.engine.forward import Forward, TorchForward
from sage_fed.engine.graph_forward import GraphForward
from sage_fed.engine.graphs import CudaCapture, GraphCapture, can_compile
from sage_fed.engine.kv_cache import KVCache
from sage_fed.engine.layer import Body
from sage_fed.engine.native import Library
from sage_fed.engine.native.forward import NativeForward
from sage_fed.engine.weights import ModelWeights


@dataclass(frozen=True, slots=True)
class Prepared:
    """A forward pass that is ready to serve.

    `newest` is where an engine leaves what it has drawn; None where it runs each step to its
    end. `recorded` names how steps are recorded, "" where they are not. `capture_s` and
    `graph_bytes` are what preparing took, and keeps, of the device.
    """

    forward: Forward
    newest: torch.Tensor | None
    recorded: str = ""
    capture_s: float = 0.0
    graph_bytes: int = 0


def capture_for(device: torch.device, kernels: str) -> GraphCapture | None:
    """How steps are recorded on this device; None where they are not.

    `kernels` "torch" insists on torch's own: nothing is compiled.
    """
    if device.type != "cuda":
        return None
    return CudaCapture(device, compiles=kernels != "torch" and can_compile(device))


def prepare(
    spec: ModelSpec,
    weights: ModelWeights,
    cache: KVCache,
    rotary: torch.Tensor,
    capture: GraphCapture | None,
    *,
    native: Library | None,
    num_blocks: int,
    num_ids: int,
    max_batch: int,
    verify_tokens: Sequence[int],
    widened: bool,
    progress: Callable[[float], None],
) -> Prepared:
    """Build the pass over `weights`; with a `capture`, `cache` has a block beyond `num_blocks`.

    `num_ids` are those that there are logits for, `widened` says that weights are stored narrower
    than they are computed with; `progress` rises to 1. With `native` kernels it is theirs, and
    `rotary` is fp32.
    """
    if native is not None:
        assert capture is None, "native steps are one call already: there is nothing to record"
        return Prepared(
            NativeForward(native, spec, weights, cache, rotary, num_valid_ids=num_ids), None
        )
    context, dtype, device = rotary.shape[0], rotary.dtype, rotary.device
    heads = Heads(spec.num_heads, spec.num_kv_heads)
    batches = BatchBuilder(
        heads,
        vocab_size=weights.embedding.num_ids,
        max_context_tokens=context,
        dtype=dtype,
        device=device,
        pending_rows=num_blocks if capture else 0,
    )
    decoder = Decoder(spec, weights, cache, rotary)
    if capture is None:
        return Prepared(TorchForward(batches, decoder), None)
    began_s, free = time.monotonic(), _free(device)
    # A sequence owns at least a block, so no step has more draws.
    newest = torch.zeros(num_blocks, dtype=torch.int64, device=device)
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
        max_batch=max_batch,
        max_context_tokens=context,
        capacity_blocks=num_blocks,
        tokens=(1, *verify_tokens),
    )
    forward.prepare(buckets, num_ids, progress)
    return Prepared(
        forward,
        newest,
        recorded=capture.name,
        capture_s=time.monotonic() - began_s,
        graph_bytes=max(0, free - _free(device)),
    )


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
