"""What recent steps say about speed: device time per token, and bytes read per second.

Owns a sliding window of each tier's steps. Written by the event loop, read by the scraping
thread, under a lock that is held for one append or one copy.

A step that both prefills and decodes is split: least squares over the window say what a token of
each phase costs (seconds = p x prefill tokens + d x decode tokens), and each mixed step's time is
divided in the proportion of its own tokens at those costs. So the phases' times add up to the
device's, whatever the mix, and where no step is mixed they are plain means.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping

from sage_fed.core import TIER_ROLES, Phase, Tier
from sage_fed.steps import StepKind, StepReport

_WINDOW = 512
"""Reports that a figure looks back on, for each tier: some seconds of busy traffic."""

MIN_RATIO_TOKENS = 64
"""Tokens of a phase on each tier, among those, below which there is no ratio."""


class LiveRates:
    """Device seconds per token, by tier and phase, over the recent past."""

    def __init__(self) -> None:
        self._reports: dict[Tier, deque[StepReport]] = {
            tier: deque(maxlen=_WINDOW) for tier in TIER_ROLES
        }
        self._lock = threading.Lock()

    def add(self, report: StepReport) -> None:
        """Takes a report's steps in."""
        if report.out_of_memory or not report.num_steps:
            return
        with self._lock:
            self._reports[report.tier].append(report)

    def ratio_tokens(self) -> Mapping[Phase, int]:
        """Tokens that each phase's ratio rests on: those of the tier that had fewer."""
        recent = {tier: self._recent(tier) for tier in TIER_ROLES}
        return {
            Phase.PREFILL: min(sum(r.num_prefill_tokens for r in of) for of in recent.values()),
            Phase.DECODE: min(sum(r.num_decode_tokens for r in of) for of in recent.values()),
        }

    def seconds_per_token(self, tier: Tier) -> Mapping[Phase, float]:
        """Device seconds per token of the phases that the tier has had traffic in."""
        reports = self._recent(tier)
        prefill_s, decode_s = _phase_seconds(reports)
        rates: dict[Phase, float] = {}
        for phase, seconds, tokens in (
            (Phase.PREFILL, prefill_s, sum(r.num_prefill_tokens for r in reports)),
            (Phase.DECODE, decode_s, sum(r.num_decode_tokens for r in reports)),
        ):
            if seconds > 0 and tokens:
                rates[phase] = seconds / tokens
        return rates

    def cost_ratios(self) -> Mapping[Phase, float]:
        """Strategic over tactical device time per token, of phases in which both had traffic.

        Not of those in which a tier had less than `MIN_RATIO_TOKENS`: that is no figure yet.
        """
        tokens = self.ratio_tokens()
        strategic = self.seconds_per_token(Tier.STRATEGIC)
        tactical = self.seconds_per_token(Tier.TACTICAL)
        return {
            phase: strategic[phase] / tactical[phase]
            for phase in strategic.keys() & tactical
            if tokens[phase] >= MIN_RATIO_TOKENS
        }

    def decode_bytes_per_second(
        self, tier: Tier, *, step_bytes: int, kv_token_bytes: int
    ) -> float | None:
        """Bytes read by recent steps that only decode, over their time; None without any.

        A step reads all the weights, and the keys and values of every token it attends to.
        """
        steps = [r for r in self._recent(tier) if r.kind is StepKind.DECODE]
        seconds = sum(r.elapsed_s for r in steps)
        num_bytes = sum(
            r.num_steps * step_bytes + r.num_context_tokens * kv_token_bytes for r in steps
        )
        return num_bytes / seconds if seconds > 0 else None

    def _recent(self, tier: Tier) -> tuple[StepReport, ...]:
        with self._lock:
            return tuple(self._reports[tier])


def _phase_seconds(reports: Iterable[StepReport]) -> tuple[float, float]:
    """Divide the reports' time between prefill and decode."""
    reports = tuple(reports)
    prefill_cost, decode_cost = _token_costs(reports)
    prefill_s = decode_s = 0.0
    for report in reports:
        prefill = report.num_prefill_tokens * prefill_cost
        decode = report.num_decode_tokens * decode_cost
        if report.kind is not StepKind.MIXED or prefill + decode <= 0:
            prefill, decode = float(report.num_prefill_tokens), float(report.num_decode_tokens)
        if prefill + decode > 0:
            prefill_s += report.elapsed_s * prefill / (prefill + decode)
            decode_s += report.elapsed_s * decode / (prefill + decode)
    return prefill_s, decode_s


def _token_costs(reports: Iterable[StepReport]) -> tuple[float, float]:
    """Least squares, weighted by 1 / time: a long step must not drown the short ones.

    Equal costs, which is a division by tokens, where the steps are all of one mix.
    """
    pp = pd = dd = p = d = 0.0
    for report in reports:
        if report.elapsed_s <= 0:
            continue
        weight = 1 / report.elapsed_s
        prefill, decode = report.num_prefill_tokens, report.num_decode_tokens
        pp += weight * prefill * prefill
        pd += weight * prefill * decode
        dd += weight * decode * decode
        p += prefill
        d += decode
    determinant = pp * dd - pd * pd
    if determinant <= 1e-9 * pp * dd:
        return 1.0, 1.0
    prefill_cost = (p * dd - d * pd) / determinant
    decode_cost = (d * pp - p * pd) / determinant
    if prefill_cost < 0:
        return 0.0, 1.0
    if decode_cost < 0:
        return 1.0, 0.0
    return prefill_cost, decode_cost
