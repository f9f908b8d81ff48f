"""One job's tokens, on their way from the device to its reader.

Owns the job's sequence from its submission to its ending, what was delivered of it, and what it
was stopped for. Knows no money. Fails as the executor does when it takes no more; what an engine
did to a sequence is in its ending.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from sage_fed.core import Delta, JobSpec, Phase, Started, StopReason, Tier
from sage_fed.device import Ended, Executor, SequenceSpec, TokenStream, TokenWeights
from sage_fed.jobs.admission import Plan
from sage_fed.jobs.mailbox import JobStream
from sage_fed.jobs.output import Output
from sage_fed.metrics import Metrics
from sage_fed.steps import SampledToken

DROPS_OUTPUT = (StopReason.STOP_STRING, StopReason.CANCELLED)
"""What comes after these is not delivered: the text is complete, or its reader has left."""


class Delivery:
    """What the reader of `stream` gets of a job's tokens, and until when."""

    def __init__(
        self,
        seq_id: int,
        spec: JobSpec,
        stream: JobStream,
        *,
        arrived_s: float,
        executor: Executor,
        metrics: Metrics,
        exemplar: Mapping[str, str],
    ) -> None:
        self.stop_reason: StopReason | None = None
        self.contended = False
        """Whether the other tier had work when the first token came."""
        self._seq_id = seq_id
        self._spec = spec
        self._stream = stream
        self._arrived_s = arrived_s
        self._executor = executor
        self._metrics = metrics
        self._exemplar = exemplar
        self._output: Output | None = None
        self._last_push_s = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens delivered so far."""
        return self._output.num_tokens if self._output else 0

    def whole(self) -> Delta | None:
        """Return everything delivered as one delta; None where nothing was ever submitted."""
        return self._output.whole() if self._output else None

    def stop(self, reason: StopReason) -> None:
        """Have it end at the next step; the first reason counts."""
        if self.stop_reason is not None or self._stream.ended:
            return
        self.stop_reason = reason
        if self._output is not None:
            self._executor.cancel(self._seq_id)

    async def run(self, plan: Plan, started: Started) -> Ended | None:
        """Run the sequence and deliver its tokens; None where it was stopped before it began."""
        if self.stop_reason is not None:
            return None
        source = self._executor.submit(_sequence(self._seq_id, self._spec, plan))
        timer = self._deadline()
        try:
            self._output = Output(plan.tokenizer.decoder(), self._spec.sampling.stop)
            self._stream.start(started)
            with self._metrics.at_work(plan.route.tier):
                return await self._deliver(source, self._output, plan.route.tier)
        except BaseException:
            # The device may be well and the bug ours: nobody reads what it would go on making.
            self._executor.cancel(self._seq_id)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _deadline(self) -> asyncio.TimerHandle | None:
        """Have it stopped at the job's deadline, if it has one."""
        deadline_s = self._spec.deadline_s
        if deadline_s is None:
            return None
        left_s = self._arrived_s + deadline_s - time.monotonic()
        loop = asyncio.get_running_loop()
        return loop.call_later(max(left_s, 0.0), self.stop, StopReason.DEADLINE)

    async def _deliver(self, source: TokenStream, output: Output, tier: Tier) -> Ended:
        """Pass on what the client may see, until the sequence has ended."""

        def take(drawn: Sequence[SampledToken]) -> None:
            if self.stop_reason in DROPS_OUTPUT:
                return
            delta, matched = output.push(drawn)
            self._stream.push(delta)
            self._note_gap(tier, len(delta.token_ids))
            if matched:
                # Also where a deadline or an abort came first: the text is complete.
                self.stop_reason = StopReason.STOP_STRING
                self._executor.cancel(self._seq_id)

        ended = await source.deliver(take)
        if self.stop_reason not in DROPS_OUTPUT:
            delta, matched = output.finish()
            if matched:
                self.stop_reason = StopReason.STOP_STRING
            if delta.text:
                self._stream.push(delta)
        return ended

    def _note_gap(self, tier: Tier, num_tokens: int) -> None:
        now, before = time.monotonic(), self._last_push_s
        if before:
            self._metrics.tokens_delivered(tier, num_tokens, now - before, self._exemplar)
        else:
            self.contended = self._metrics.contended(tier)
        self._last_push_s = now


def _sequence(seq_id: int, spec: JobSpec, plan: Plan) -> SequenceSpec:
    rates = plan.card.lines[plan.route.tier]
    return SequenceSpec(
        seq_id=seq_id,
        tier=plan.route.tier,
        prompt=plan.prompt,
        max_new_tokens=plan.offer.max_new_tokens,
        sampling=plan.sampling,
        ignore_eos=spec.sampling.ignore_eos,
        stop_token_ids=plan.stop_token_ids,
        priority=spec.priority,
        account=spec.account,
        # What its tokens count for between accounts: what they cost.
        weights=TokenWeights(
            rates[Phase.PREFILL].uatp, rates[Phase.CACHED].uatp, rates[Phase.DECODE].uatp
        ),
    )
