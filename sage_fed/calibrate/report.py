"""A measured card as a page that a person reads: Markdown, tables first.

Pure. Says what was measured and what follows; the card itself is the file beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sage_fed.cards import Rate, RateCard
from sage_fed.core import TIER_ROLES, MeasuredPoint, Phase, Tier


def report_of(card: RateCard, left_out: Sequence[str], plot: str) -> str:
    """Return the page; `plot` is the picture's file name, `left_out` points without a figure."""
    measured, fingerprint = card.measured, card.fingerprint
    assert measured is not None, "a report is of a measured card"
    assert fingerprint is not None, "a report is of a measured card"
    lines = [
        f"# Rate card {card.version}",
        "",
        f"{card.title}, measured {measured.at:%Y-%m-%d %H:%M} UTC in {measured.took_s:.0f} s.",
        "",
        (
            f"A strategic output token costs **{card.cost_ratio():.3f}** tactical ones: "
            f"the median of {measured.rounds} paired rounds, spread ±{measured.spread:.1%} "
            f"(half of the interquartile range), standard error ±{measured.error:.2%}."
        ),
        f"1 ATP is {measured.token_s * 1e3:.4g} ms of device time.",
        *(("", f"**Warning**: {measured.warning}.") if measured.warning else ()),
        "",
        f"![step times]({plot})",
        "",
        "## Prices (ATP per token)",
        "",
        *_table(
            ("phase", *(name for tier in TIER_ROLES for name in (tier.name, "spread")), "ratio"),
            [
                (
                    phase.value,
                    *(cell for tier in TIER_ROLES for cell in _price(card.lines[tier][phase])),
                    f"{card.cost_ratio(phase):.2f}",
                )
                for phase in Phase
            ],
        ),
        "",
        "## What was timed",
        "",
        (
            "Alone: the tier's steps one after the other. "
            "Co-resident: a decode step of the other tier before each."
        ),
        (
            "The share is of the measured read bandwidth, "
            f"{measured.read_bandwidth_bytes_per_s / 1e9:.1f} GB/s, weights and KV cache together."
        ),
        "",
        *_table(POINT_HEADINGS, point_rows(card)),
    ]
    if left_out:
        lines += ["", f"Left out, for want of device memory: {', '.join(left_out)}."]
    lines += ["", "## Batches", "", *_table(BATCH_HEADINGS, batch_rows(measured.points))]
    lines += [
        "",
        "## Conditions",
        "",
        *_table(
            ("what", "reading"),
            [
                ("device", fingerprint.device),
                ("threads", str(fingerprint.threads)),
                ("fingerprint", fingerprint.digest),
                *((f"{tier.name} load", f"{measured.load_s[tier]:.2f} s") for tier in TIER_ROLES),
                *measured.conditions.items(),
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


POINT_HEADINGS = (
    "tier", "phase", "batch", "context", "tokens", "step", "tok/s", "share", "co-resident",
    "spread", "rounds",
)  # fmt: skip

BATCH_HEADINGS = ("batch", "tactical tok/s", "strategic tok/s", "ratio")


def point_rows(card: RateCard) -> list[tuple[str, ...]]:
    """Return a row for each point; the columns are `POINT_HEADINGS`."""
    assert card.measured is not None
    return [
        (
            point.tier.name,
            point.phase.value,
            str(point.batch),
            str(point.context_tokens),
            str(point.tokens),
            f"{point.step_s * 1e3:.3f} ms",
            f"{1 / point.token_s:,.0f}",
            f"{_share(card, point):.0%}",
            "" if point.co_resident_s is None else f"{point.co_resident_s / point.step_s:.2f}x",
            spread_text(point.spread),
            str(point.rounds),
        )
        for point in card.measured.points
    ]


def spread_text(spread: float | None) -> str:
    """For a person; one round has none."""
    return "-" if spread is None else f"±{spread:.1%}"


def batch_rows(points: Iterable[MeasuredPoint]) -> list[tuple[str, ...]]:
    """Return a row for each batch size that both tiers decoded at the short context."""
    by_tier: dict[Tier, dict[int, MeasuredPoint]] = {tier: {} for tier in TIER_ROLES}
    for point in points:
        if point.phase is Phase.DECODE:
            known = by_tier[point.tier].get(point.batch)
            if known is None or point.context_tokens < known.context_tokens:
                by_tier[point.tier][point.batch] = point
    tactical, strategic = by_tier[Tier.TACTICAL], by_tier[Tier.STRATEGIC]
    return [
        (
            str(batch),
            f"{1 / tactical[batch].token_s:,.0f}",
            f"{1 / strategic[batch].token_s:,.0f}",
            f"{strategic[batch].token_s / tactical[batch].token_s:.2f}",
        )
        for batch in sorted(tactical.keys() & strategic.keys())
    ]


def _price(rate: Rate) -> tuple[str, str]:
    return f"{rate.uatp / 1e6:.6f}", spread_text(rate.spread)


def _share(card: RateCard, point: MeasuredPoint) -> float:
    assert card.measured is not None
    assert card.fingerprint is not None
    model = card.fingerprint.models[point.tier]
    attended = point.batch * (point.context_tokens + point.tokens)
    num_bytes = model.step_bytes + attended * model.kv_token_bytes
    return num_bytes / point.step_s / card.measured.read_bandwidth_bytes_per_s


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]
