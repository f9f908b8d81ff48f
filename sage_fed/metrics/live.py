"""What recent steps say about speed: device time per token, and bytes read per second.

Owns exponentially fading sums, so that the figures follow the load. Written by the event loop,
read by the scraping thread: each figure is swapped whole.
"""

from __future__ import annotations

from sage_fed.core import Phase, Tier
from sage_fed.steps import StepKind, StepReport

_KEEP = 0.99
"""Weight that a step keeps for each later one: the figures span about a hundred steps."""


class LiveRates:
    """Fading sums of (device seconds, tokens, steps) of the pure steps of each tier and phase.

    Mixed steps are left out: their time cannot be told apart by phase.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[Tier, Phase], tuple[float, float, float]] = {}

    def add(self, report: StepReport) -> None:
        """Takes a report's steps in."""
        if report.kind is StepKind.MIXED or report.out_of_memory or not report.num_steps:
            return
        decoding = report.kind is StepKind.DECODE
        key = (report.tier, Phase.DECODE if decoding else Phase.PREFILL)
        tokens = report.num_decode_tokens if decoding else report.num_prefill_tokens
        seconds, all_tokens, steps = self._sums.get(key, (0.0, 0.0, 0.0))
        keep = _KEEP**report.num_steps
        self._sums[key] = (
            seconds * keep + report.elapsed_s,
            all_tokens * keep + tokens,
            steps * keep + report.num_steps,
        )

    def seconds_per_token(self, tier: Tier, phase: Phase) -> float | None:
        """Device seconds per token; None without traffic."""
        seconds, tokens, _ = self._sums.get((tier, phase), (0.0, 0.0, 0.0))
        return seconds / tokens if tokens and seconds else None

    def cost_ratio(self, phase: Phase) -> float | None:
        """Strategic over tactical device time per token; None until both have had traffic."""
        strategic = self.seconds_per_token(Tier.STRATEGIC, phase)
        tactical = self.seconds_per_token(Tier.TACTICAL, phase)
        return strategic / tactical if strategic and tactical else None

    def decode_steps_per_second(self, tier: Tier) -> float | None:
        """Decode steps per second of device time; None without traffic."""
        seconds, _, steps = self._sums.get((tier, Phase.DECODE), (0.0, 0.0, 0.0))
        return steps / seconds if seconds else None
