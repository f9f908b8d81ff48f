"""A card's `[measured]`: when, under which conditions, and every point that was timed.

Evidence for the prices, not prices: nothing is charged from it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sage_fed.cards.reading import Reader
from sage_fed.core import TIER_ROLES, MeasuredPoint, Phase, Tier


@dataclass(frozen=True, slots=True)
class Measured:
    """`cost_ratio` is the median over `rounds` paired rounds, `spread` their relative one.

    `spread` is half of the interquartile range over the median; `error` is the standard error
    of the median, relative to it. `token_s` are the device seconds that 1 ATP stands for.
    `conditions` are readings by name, as many as this machine gave. `warning` says which prices
    rest on too few or too uneven rounds, "" where none does.
    """

    at: dt.datetime
    took_s: float
    token_s: float
    cost_ratio: float
    spread: float
    error: float
    rounds: int
    read_bandwidth_bytes_per_s: float
    load_s: Mapping[Tier, float]
    conditions: Mapping[str, str]
    points: tuple[MeasuredPoint, ...]
    warning: str = ""


def read_measured(reader: Reader) -> Measured:
    """Read the table."""
    loads = reader.table("load_s")
    measured = Measured(
        at=reader.instant("at"),
        took_s=reader.number("took_s"),
        token_s=reader.number("token_s"),
        cost_ratio=reader.number("cost_ratio"),
        spread=reader.number("spread"),
        error=reader.number("error"),
        rounds=reader.count("rounds", 1),
        read_bandwidth_bytes_per_s=reader.number("read_bandwidth_bytes_per_s"),
        load_s=MappingProxyType({tier: loads.number(tier.name) for tier in TIER_ROLES}),
        conditions=MappingProxyType(reader.table("conditions").texts()),
        points=tuple(_point(point) for point in reader.tables("points")),
        warning=reader.text("warning") if reader.has("warning") else "",
    )
    loads.finish()
    reader.finish()
    return measured


def _point(reader: Reader) -> MeasuredPoint:
    rounds = reader.count("rounds", 1)
    spread = reader.number("spread") if rounds > 1 or reader.has("spread") else None
    point = MeasuredPoint(
        tier=Tier.named(reader.choice("tier", [tier.name for tier in TIER_ROLES])),
        phase=reader.word("phase", Phase),
        batch=reader.count("batch", 1),
        context_tokens=reader.count("context_tokens"),
        tokens=reader.count("tokens", 1),
        step_s=reader.number("step_s"),
        # Cards of earlier versions say 0 where there was one round.
        spread=spread if rounds > 1 else None,
        rounds=rounds,
        co_resident_s=reader.number("co_resident_s") if reader.has("co_resident_s") else None,
    )
    reader.finish()
    return point
