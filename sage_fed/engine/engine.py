"""A loaded model that runs the scheduler's steps.

Owns the device's memory for one tier. Knows nothing of queues, prompts as text, prices or
time. Used by one thread at a time. A step fails with `DeviceOutOfMemory` where the device had
no room, and may then be run again.
"""

from __future__ import annotations

import torch

from sage_fed.core import GenerationDefaults, ModelInfo
from sage_fed.engine.forward import Forward
from sage_fed.engine.sampling import choose
from sage_fed.errors import DeviceOutOfMemory
from sage_fed.steps import Drawn, Step


class Engine:
    """A loaded model; built by `load_engine`. Satisfies `sage_fed.steps.Engine`.

    A sequence's random numbers never depend on its company. Its logits do, in the last bits,
    because the order of a product's sums follows the batch size: in fp32 that is about 1e-6
    and changes no token in practice; in half precision near-ties may fall differently.
    """

    def __init__(
        self,
        *,
        info: ModelInfo,
        forward: Forward,
        device: torch.device,
        num_blocks: int,
        max_context_tokens: int,
        eos_token_ids: frozenset[int],
        defaults: GenerationDefaults,
    ) -> None:
        self.info = info
        self.num_blocks = num_blocks
        self.max_context_tokens = max_context_tokens
        self.eos_token_ids = eos_token_ids
        self.defaults = defaults
        self._forward: Forward | None = forward
        self._device = device

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[Drawn, ...]:
        """Run one forward pass; one `Drawn` a chunk with a `draw`, in the chunks' order.

        Returns when the device has finished, after one copy of the results to the host.

        Raises:
            DeviceOutOfMemory: the step did not fit; the cache is as good as before.
        """
        assert self._forward is not None, "a closed engine was asked to run"
        try:
            return self._run(self._forward, step)
        except torch.OutOfMemoryError as error:
            num_chunks = len(step.chunks)
            raise DeviceOutOfMemory(
                f"the device has no memory for a step of {step.num_tokens} tokens "
                f"in {num_chunks} sequences"
            ) from error

    def close(self) -> None:
        """Free the device's memory; the engine cannot be used afterwards."""
        self._forward = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, forward: Forward, step: Step) -> tuple[Drawn, ...]:
        forwarded = forward.run(step.chunks)
        if forwarded.logits is None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # or the step's time would be a lie
            return ()
        chosen = choose(forwarded.logits, forwarded.draws)
        drawn = sorted(zip(forwarded.drawing, chosen, strict=True), key=lambda pair: pair[0])
        return tuple(
            Drawn(step.chunks[index].seq_id, token_id, logprob)
            for index, (token_id, logprob) in drawn
        )
