"""Both modes with the bundled pair give what the strategic tier alone gives, through the broker."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from surroundings import MODELS
from tasks import task_at
from test_broker import CARD, GRANTED_UATP, Rig, finished_of, read, rig
from test_modes import doubtful

from sage_fed.cards.rate_card import charge
from sage_fed.core import (
    CascadeOutcome,
    Delta,
    Event,
    JobSpec,
    Message,
    Mode,
    Phase,
    Prompt,
    Revised,
    Sampling,
    SamplingRequest,
    Started,
    Tier,
    TokenOrigin,
    Usage,
)
from sage_fed.engine import Engine, EngineOptions, load_engine

T, S = Tier.TACTICAL, Tier.STRATEGIC
TEMPERATURES = (0.0, 0.8)


def engines(temperature: float) -> dict[Tier, Engine]:
    """The bundled pair, whose tiers' own settings, end tokens and contexts differ."""
    made = {
        tier: load_engine(
            EngineOptions(
                str(MODELS / f"demo-{tier.name}"),
                16 << 20,
                precision="fp32",
                max_context_tokens=context,
            ),
            lambda _: None,
        )
        for tier, context in ((T, 160), (S, 256))
    }
    made[T].defaults = Sampling(temperature, top_k=2, repetition_penalty=1.3)
    made[S].defaults = Sampling(temperature, top_p=0.9, min_p=0.02, frequency_penalty=0.1)
    made[T].eos_token_ids |= {30, 31, 32}
    return made


def asked(chance: Random, index: int) -> JobSpec:
    """A task, or random ids; settings and limits as sent by a client, or left to the tier."""
    prompt = Prompt(messages=(Message("user", task_at(9, index, "test").prompt),))
    if chance.random() < 0.3:
        prompt = Prompt(token_ids=tuple(chance.choices(range(490), k=chance.randint(1, 60))))
    sampling: dict[str, Any] = {
        "seed": chance.getrandbits(60),
        "max_new_tokens": chance.choice([None, 1, 5, 30, 90]),
        "ignore_eos": chance.random() < 0.4,
        "top_logprobs": chance.choice([None, None, 0, 4]),
    }
    if chance.random() < 0.4:
        sampling |= {"top_k": chance.choice([0, 5]), "repetition_penalty": chance.choice([1, 1.2])}
    if chance.random() < 0.3:
        letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ "
        sampling["stop"] = tuple("".join(chance.choices(letters, k=n)) for n in (1, 2))
    if chance.random() < 0.3:
        sampling["stop_token_ids"] = tuple(chance.choices(range(490), k=20))
    return JobSpec(
        "local",
        prompt,
        S,
        mode=Mode.SINGLE,
        sampling=SamplingRequest(**sampling),
        accept_revisions=chance.random() < 0.5,
    )


def told(events: list[Event]) -> dict[str, Any]:
    """What a client has in the end."""
    tokens: list[int] = []
    logprobs: list[Any] = []
    text = ""
    for event in events:
        if isinstance(event, Revised):
            assert 0 == event.from_token
            tokens, logprobs, text = [], [], ""
        elif isinstance(event, Delta):
            tokens += event.token_ids
            logprobs += event.logprobs
            text += event.text
    started, finished = events[0], finished_of(events)
    assert isinstance(started, Started)
    return {
        "tokens": tokens,
        "text": text,
        "logprobs": [
            (one.token_id, round(one.logprob, 3), [token_id for token_id, _ in one.top])
            for one in logprobs
        ],
        "stop_reason": finished.stop_reason,
        "output_tokens": finished.usage.output_tokens,
        "seed": started.seed,
    }


def has_verified(usage: Usage) -> bool:
    """Whether a draft was verified."""
    return any((n.tier, n.phase) == (S, Phase.VERIFY) for n in usage.by_phase)


async def run(r: Rig, specs: list[JobSpec], at_once: int) -> list[list[Event]]:
    """The events of each, so many at once."""
    places = asyncio.Semaphore(at_once)

    async def one(spec: JobSpec) -> list[Event]:
        async with places:
            return await read(await r.submit(spec))

    return await asyncio.gather(*(one(spec) for spec in specs))


@pytest.mark.parametrize("temperature", TEMPERATURES)
async def test_modes_change_no_answer(tmp_path: Path, temperature: float) -> None:
    """Escalated cascades and drafts: tokens, text, log-probabilities and endings are the same."""
    chance = Random(f"{temperature}")
    plain = [asked(chance, index) for index in range(60)]
    escalating = doubtful(0.9)
    fingerprint = replace(escalating.fingerprint, temperature=temperature)
    async with rig(tmp_path, real=engines(temperature), granted_uatp=100 * GRANTED_UATP) as r:
        expected = [told(events) for events in await run(r, plain, 1)]
        drafted = [replace(spec, mode=Mode.SPECULATIVE) for spec in plain]
        assert expected == [told(events) for events in await run(r, drafted, 6)]
        r.broker._admission.use_quality(replace(escalating, fingerprint=fingerprint))
        cascades = [
            replace(spec, mode=Mode.CASCADE, requested=None, max_error=0.1) for spec in plain
        ]
        events_of = await run(r, cascades, 6)
    usages = []
    for alone, events in zip(expected, events_of, strict=True):
        assert alone == told(events)
        finished = finished_of(events)
        assert CascadeOutcome.ESCALATED is finished.cascade
        assert charge(CARD, finished.usage) == finished.price.charged_uatp
        origins = [o for e in events if isinstance(e, Delta) for o in e.origins]
        if not any(isinstance(event, Revised) for event in events):
            assert TokenOrigin.TACTICAL not in origins
        usages.append(finished.usage)
    assert sum(has_verified(usage) for usage in usages) > 30, "answers were drafts"
