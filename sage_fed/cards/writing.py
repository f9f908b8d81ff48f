"""A rate card as the text of its file: what `RateCard.load` reads back as the same card."""

from __future__ import annotations

import datetime as dt
import json
import re
from decimal import Decimal

from sage_fed.cards.card import RateCard
from sage_fed.cards.fingerprint import Fingerprint
from sage_fed.cards.measured import Measured
from sage_fed.core import TIER_ROLES, UATP_PER_ATP, MeasuredPoint, Phase

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def card_text(card: RateCard) -> str:
    """Return the TOML of a card."""
    lines = [
        "# A card is never edited: a change is a new file with a new version.",
        *_pairs(
            version=card.version,
            title=card.title,
            created=card.created,
            device=card.device,
            software=card.software,
            provenance=card.provenance,
        ),
    ]
    for tier in TIER_ROLES:
        for phase in Phase:
            rate = card.lines[tier][phase]
            lines += _table(
                f"{tier.name}.{phase.value}",
                price_atp=f"{Decimal(rate.uatp) / UATP_PER_ATP:f}",
                basis=rate.basis.value,
                source=rate.source,
                **({} if rate.spread is None else {"spread": rate.spread}),
            )
    if card.fingerprint is not None:
        lines += _fingerprint(card.fingerprint)
    if card.measured is not None:
        lines += _measured(card.measured)
    return "\n".join(lines) + "\n"


def _fingerprint(fingerprint: Fingerprint) -> list[str]:
    lines = _table(
        "fingerprint",
        id=fingerprint.digest,
        device=fingerprint.device,
        threads=fingerprint.threads,
        engine=fingerprint.engine,
    )
    for tier in TIER_ROLES:
        model = fingerprint.models[tier]
        lines += _table(
            f"fingerprint.{tier.name}",
            architecture=model.architecture,
            parameters=model.parameters,
            step_bytes=model.step_bytes,
            kv_token_bytes=model.kv_token_bytes,
            precision=model.precision,
            kernels=model.kernels,
        )
    return lines


def _measured(measured: Measured) -> list[str]:
    lines = _table(
        "measured",
        at=measured.at,
        took_s=measured.took_s,
        token_s=measured.token_s,
        cost_ratio=measured.cost_ratio,
        spread=measured.spread,
        error=measured.error,
        rounds=measured.rounds,
        read_bandwidth_bytes_per_s=measured.read_bandwidth_bytes_per_s,
        **({"warning": measured.warning} if measured.warning else {}),
    )
    lines += _table(
        "measured.load_s", **{tier.name: seconds for tier, seconds in measured.load_s.items()}
    )
    lines += _table("measured.conditions", **measured.conditions)
    for point in measured.points:
        lines += ["", "[[measured.points]]", *_pairs(**_point(point))]
    return lines


def _point(point: MeasuredPoint) -> dict[str, object]:
    return {
        "tier": point.tier.name,
        "phase": point.phase.value,
        "batch": point.batch,
        "context_tokens": point.context_tokens,
        "tokens": point.tokens,
        "step_s": point.step_s,
        **({} if point.spread is None else {"spread": point.spread}),
        "rounds": point.rounds,
        **({} if point.co_resident_s is None else {"co_resident_s": point.co_resident_s}),
    }


def _table(name: str, **values: object) -> list[str]:
    return ["", f"[{name}]", *_pairs(**values)]


def _pairs(**values: object) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in values.items()]


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _text(key)


def _value(value: object) -> str:
    match value:
        case str():
            return _text(value)
        case dt.date():  # and a datetime, which is one
            return value.isoformat()
        case int() | float():
            return repr(value)
        case _:
            raise AssertionError(f"a card has no {type(value).__name__}")


def _text(text: str) -> str:
    # A TOML basic string takes JSON's escapes, but DEL, which JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
