"""A real model in real language: SmolLM2-135M, where the registry gives it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from real_models import NotHad, checkpoint

from sage_fed.core import TIER_ROLES, Message, Sampling, Tier, TierState
from sage_fed.device import EndReason, Executor, SequenceSpec, TierSetup
from sage_fed.engine import EngineOptions, load_engine
from sage_fed.text import Tokenizer

WAIT_S = 100.0
CACHE = Path.home() / ".cache" / "sage-fed-tests"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The checkpoint, kept beside the checkout's other caches; 98 MB are fetched once."""
    try:
        return checkpoint("smollm2", CACHE)
    except NotHad as why:
        pytest.skip(f"SmolLM2-135M cannot be had here: {why}")


async def test_a_real_model_answers_and_speculation_changes_no_word(smollm2: Path) -> None:
    """It knows a capital; with drafts of itself and of earlier text it says the same, in fp32."""
    tokenizer = Tokenizer.load(smollm2)
    options = EngineOptions(str(smollm2), 256 * 2**20, precision="fp32", max_context_tokens=512)
    executor = Executor(
        {tier: TierSetup(lambda progress: load_engine(options, progress)) for tier in TIER_ROLES}
    )
    await executor.start()
    questions = ("What is the capital of France?", "Count from one to twenty in words.")
    said: dict[tuple[int, bool], list[int]] = {}
    try:
        async with asyncio.timeout(WAIT_S):
            for tier in TIER_ROLES:
                assert TierState.READY is (await executor.loaded(tier)).state
            for index, question in enumerate(questions):
                prompt = tokenizer.encode_messages((Message("user", question),))
                for drafts in (False, True):
                    tokens: list[int] = []
                    spec = SequenceSpec(
                        2 * index + drafts, Tier.STRATEGIC, prompt, 48, Sampling(),
                        speculates=drafts, drafter=Tier.TACTICAL if drafts else None,
                    )  # fmt: skip
                    ended = await executor.submit(
                        spec, lambda new, kept=tokens: kept.extend(one.token_id for one in new)
                    )
                    assert ended.reason in (EndReason.EOS, EndReason.LENGTH)
                    said[index, drafts] = tokens
    finally:
        await executor.stop(0.0)
    assert "Paris" in tokenizer.decode(said[0, False])
    for index in range(len(questions)):
        assert said[index, False] == said[index, True]
