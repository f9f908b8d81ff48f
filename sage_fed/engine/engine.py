"""A loaded model that runs the scheduler's steps.

Owns the device's memory for one tier, and the order of the steps that are launched on it.
Knows nothing of queues, prompts as text, prices or time. Used by one thread at a time.
A step fails with `DeviceOutOfMemory` where the device had no room, and may then be run again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from sage_fed.core import ModelInfo, Sampling, Tier
from sage_fed.engine.batch import ResultCopy, begin
from sage_fed.engine.decoder import Forward, Forwarded, Pass
from sage_fed.engine.sampling import Picked, pick
from sage_fed.errors import DeviceLost, DeviceOutOfMemory
from sage_fed.steps import BLOCK_SIZE, PENDING, Chunk, History, SampledToken, Step
from sage_fed.steps import Engine as AnyEngine


class Engine:
    """A loaded model; built by `load_engine`. Satisfies `sage_fed.steps.Engine`.

    A sequence's random numbers never depend on its company. Its logits do, in the last bits,
    because the order of a product's sums follows the batch size: in fp32 that is about 1e-6
    and changes no token in practice; in half precision near-ties may fall differently.

    With a `newest` (int64 on the device, as many rows as a step can have draws) it is pipelined:
    a launch only queues, and what it draws stays on the device for the launch after it. `forward`
    then takes a token id of -1 - i for `newest[i]`. Without, a launch runs the step to its end.

    Of `num_ids` that it can be fed and has logits for, `unknown_ids` are never drawn.
    """

    def __init__(
        self,
        *,
        info: ModelInfo,
        forward: Forward,
        device: torch.device,
        num_blocks: int,
        max_context_tokens: int,
        num_ids: int,
        eos_token_ids: frozenset[int],
        defaults: Sampling,
        newest: torch.Tensor | None = None,
        unknown_ids: tuple[int, ...] = (),
    ) -> None:
        self.info = info
        self.num_blocks = num_blocks
        self.max_context_tokens = max_context_tokens
        self.num_ids = num_ids
        self.eos_token_ids = eos_token_ids
        self.defaults = defaults
        self._forward: Forward | None = forward
        self._device = device
        self._newest = newest
        self._unknown = torch.tensor(unknown_ids, device=device) if unknown_ids else None
        self._launched: deque[InFlightStep] = deque()
        self._pending: Mapping[int, int] = {}
        """What `PENDING` means for each sequence of the newest step: its token or, pipelined,
        -1 - its row of `newest`."""
        self._broken = False

    @property
    def pipelined(self) -> bool:
        """Whether `launch` returns while the device still works."""
        return self._newest is not None

    @property
    def num_parts(self) -> int:
        """Into how many parts a step can be divided; see `sage_fed.steps.Engine`."""
        return self._forward.num_parts if self._forward and not self.pipelined else 1

    def run(self, step: Step) -> tuple[SampledToken, ...]:
        """Run one forward pass; one `SampledToken` a chunk with a `draw`, in the chunks' order.

        Returns when the device has finished, after one copy of the results to the host.

        Raises:
            DeviceOutOfMemory: the step did not fit; the cache is as good as before.
        """
        return self.launch(step).wait()

    @torch.inference_mode()
    def launch(self, step: Step, pause_after_s: float | None = None) -> InFlightStep:
        """Queue one forward pass, the choice of its tokens and their way to the host.

        Where it can be divided, it may be paused after that time; see `sage_fed.steps.Engine`.

        Raises:
            DeviceOutOfMemory: the step did not fit; the cache is as good as before.
            DeviceLost: the device failed, and with it every engine of this process.
        """
        assert self._forward is not None, "a closed engine was asked to run"
        assert not self._broken, "a broken engine was asked to run"
        assert self.pipelined or not self._launched, "a step has to end before the next"
        if self.num_parts == 1:
            pause_after_s = None
        with _told_as_ours(step):
            begun = begin(self._device)
            under_way = self._forward.begin([self._resolved(chunk) for chunk in step.chunks])
            launched = InFlightStep(self, step, under_way, begun)
            self._advance(launched, pause_after_s)
        self._launched.append(launched)
        return launched

    @torch.inference_mode()
    def resume(self, launched: InFlightStep, pause_after_s: float | None) -> None:
        """Go on with a paused step; fails as `launch` does, and then it is not launched."""
        assert self._forward is not None, "a closed engine was asked to run"
        self._launched.remove(launched)
        with _told_as_ours(launched.step):
            self._advance(launched, pause_after_s)
        self._launched.append(launched)

    def results_of(self, launched: InFlightStep) -> tuple[SampledToken, ...]:
        """What a step sampled; waits for the device, and an exception leaves the engine broken."""
        assert self._launched, "a step is waited for once, and before its engine is closed"
        assert not launched.paused, "a paused step has to be resumed"
        assert self._launched.popleft() is launched, (
            "steps are waited for in the order of their launches"
        )
        try:
            return launched.read()
        except torch.AcceleratorError as error:
            raise _lost(error) from error
        except BaseException:
            self._broken = True
            raise

    def close(self) -> None:
        """Free the device's memory; the engine cannot be used afterwards."""
        self._forward = None
        self._newest = None
        self._launched.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _advance(self, launched: InFlightStep, pause_after_s: float | None) -> None:
        forwarded = launched.advance(pause_after_s)
        if forwarded is None:
            return
        picked = None
        if forwarded.logits is not None:
            best = forwarded.best
            if self._unknown is not None:
                forwarded.logits.index_fill_(1, self._unknown, -torch.inf)
                best = None  # it may have been one of those
            picked = pick(forwarded.logits, forwarded.draws, best, forwarded.kernels)
        launched.arrive(forwarded, picked, self._device)
        if self._newest is None:
            self._pending = {drawn.seq_id: drawn.token_id for drawn in launched.read()}
        else:
            if picked is not None:
                self._newest[: len(launched.seq_ids)].copy_(picked.tokens)
            self._pending = {seq_id: -1 - row for row, seq_id in enumerate(launched.seq_ids)}

    def _resolved(self, chunk: Chunk) -> Chunk:
        """The chunk with what `PENDING` stands for, on the host or on the device."""
        if PENDING not in chunk.token_ids:
            return chunk
        first, *others = chunk.token_ids
        assert first == PENDING, "only a chunk's first token can be pending"
        assert PENDING not in others, "only a chunk's first token can be pending"
        assert chunk.seq_id in self._pending, "no token of the sequence is pending"
        return replace(chunk, token_ids=(self._pending[chunk.seq_id], *others))


@contextmanager
def _told_as_ours(step: Step) -> Iterator[None]:
    """Tell torch's errors apart: no memory for this step, or no device any more."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise _lost(error) from error
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise DeviceOutOfMemory(
            f"the device has no memory for a step of {step.num_tokens} tokens "
            f"in {len(step.chunks)} sequences"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short; torch's CPU allocator says it in no class of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator: can't allocate memory" in str(error)


def _lost(error: Exception) -> DeviceLost:
    """A CUDA error that is not about memory stays with the process: every later call fails, too."""
    return DeviceLost(f"the device failed: {str(error).splitlines()[0]}")


class InFlightStep:
    """A step on the device; see `sage_fed.steps.InFlightStep`.

    Its engine advances the pass `under_way`, which began at `begun` on the device's clock.
    """

    def __init__(
        self, engine: Engine, step: Step, under_way: Pass, begun: torch.cuda.Event | None
    ) -> None:
        self.step = step
        self.seq_ids: tuple[int, ...] = ()
        """Of the chunks that draw, in the order of the logits' rows."""
        self._engine = engine
        self._under_way: Pass | None = under_way
        self._begun = begun
        self._drawing: tuple[int, ...] = ()
        self._picked: Picked | None = None
        self._copying: ResultCopy | None = None
        self._drawn: tuple[SampledToken, ...] | None = None

    @property
    def paused(self) -> bool:
        """Whether some of the pass is left to do."""
        return self._under_way is not None

    @property
    def device_s(self) -> float | None:
        """Seconds that the device took for the step and what the host queued of it meanwhile."""
        return self._copying.device_s if self._copying else None

    def resume(self, pause_after_s: float | None) -> None:
        """Go on; see `sage_fed.steps.InFlightStep`."""
        self._engine.resume(self, pause_after_s)

    def wait(self) -> tuple[SampledToken, ...]:
        """Wait for the device; an exception leaves the engine broken."""
        return self._engine.results_of(self)

    def advance(self, pause_after_s: float | None) -> Forwarded | None:
        """Go on with the pass; None where it paused."""
        assert self._under_way is not None, "only a paused step can be resumed"
        forwarded = self._under_way.advance(pause_after_s)
        if forwarded is not None:
            self._under_way = None
        return forwarded

    def arrive(self, forwarded: Forwarded, picked: Picked | None, device: torch.device) -> None:
        """Send what was picked on its way; behind the step's work."""
        self._drawing = forwarded.drawing
        self.seq_ids = tuple(self.step.chunks[index].seq_id for index in forwarded.drawing)
        self._picked = picked
        self._copying = ResultCopy(picked.results if picked else None, self._begun, device)

    def read(self) -> tuple[SampledToken, ...]:
        """What was drawn, in the order of the step's chunks; waits for it the first time."""
        if self._drawn is None:
            assert self._copying is not None
            results = self._copying.wait()
            choices = self._picked.choices(results) if self._picked and results is not None else []
            rows = sorted(
                zip(self._drawing, self.seq_ids, choices, strict=True), key=lambda row: row[0]
            )
            self._drawn = tuple(
                SampledToken(seq_id, token_id, logprob) for _, seq_id, (token_id, logprob) in rows
            )
        return self._drawn


@dataclass(frozen=True, slots=True)
class Generated:
    """The output of each prompt, and the seconds from the call to the end of each step."""

    outputs: tuple[tuple[int, ...], ...]
    at_s: tuple[float, ...]


def generate(
    engine: AnyEngine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    num_new: int,
    *,
    tier: Tier = Tier.TACTICAL,
    ends: Container[int] = (),
    first_block: int = 0,
) -> Generated:
    """Decode prompts together, without a scheduler: all of each at once, then a token a step.

    A sequence ends after `num_new` tokens, or before one of `ends`. The KV blocks from
    `first_block` on are used, as many as all sequences' longest need each.

    Raises:
        DeviceOutOfMemory: a step did not fit.
    """
    began = time.perf_counter()
    each = -(-(max(map(len, prompts)) + num_new) // BLOCK_SIZE)
    starts = range(first_block, first_block + each * len(prompts), each)
    blocks = [tuple(range(start, start + each)) for start in starts]
    fed = {i: tuple(prompt) for i, prompt in enumerate(prompts)}
    outputs: list[list[int]] = [[] for _ in prompts]
    histories = [History(sampling, tuple(prompt)) for prompt in prompts]
    at_s: list[float] = []
    while fed and len(at_s) < num_new:
        chunks = []
        for i, tokens in fed.items():
            start = len(prompts[i]) + len(outputs[i]) - len(tokens)
            chunks.append(Chunk(i, start, tokens, blocks[i], (histories[i].draw(len(outputs[i])),)))
        for sampled in engine.run(Step(tier, tuple(chunks))):
            if sampled.token_id in ends:
                del fed[sampled.seq_id]
            else:
                outputs[sampled.seq_id].append(sampled.token_id)
                histories[sampled.seq_id].add(sampled.token_id)
                fed[sampled.seq_id] = (sampled.token_id,)
        at_s.append(time.perf_counter() - began)
    return Generated(tuple(map(tuple, outputs)), tuple(at_s))
