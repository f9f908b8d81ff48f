"""A step that pauses between layers computes what it computes at once, whatever runs meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from native_kernels import require_native
from tiny_models import Checkpoint, prompt_of

from sage_fed.core import Sampling, Tier
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.steps import Chunk, Draw, SampledToken, Step

Checkpoints = Callable[[str], Checkpoint]
DRAW = Draw(Sampling(), 0)
BLOCKS = tuple(range(8))


def engine(source: Checkpoint, kernels: str, precision: str = "fp32") -> Engine:
    if kernels == "native":
        require_native()
    options = EngineOptions(
        str(source.path), kv_cache_bytes=1 << 20, precision=precision, kernels=kernels
    )
    return load_engine(options, lambda _: None)


def steps_of(tier: Tier) -> list[Step]:
    """A prompt in two pieces, the second with others of which not all draw, and its next token."""
    first, rest = prompt_of(70)[:40], prompt_of(70)[40:]
    beside = (Chunk(2, 0, prompt_of(9), (9,)), Chunk(3, 0, prompt_of(5), (10,), (DRAW,)))
    return [
        Step(tier, (Chunk(1, 0, first, BLOCKS),)),
        Step(tier, (Chunk(1, 40, rest, BLOCKS, (DRAW,)), *beside)),
        Step(tier, (Chunk(1, 70, (17,), BLOCKS, (DRAW,)), Chunk(3, 5, (8,), (10,), (DRAW,)))),
    ]


@pytest.mark.parametrize(
    ("kernels", "precision"), [("torch", "fp32"), ("native", "fp32"), ("native", "bf16")]
)
def test_a_paused_step_draws_what_a_whole_one_draws(
    checkpoint: Checkpoints, kernels: str, precision: str
) -> None:
    """It pauses behind every layer, and another engine's step of another size runs each time."""
    whole = engine(checkpoint("qwen2-tied"), kernels, precision)
    paused = engine(checkpoint("qwen2-tied"), kernels, precision)
    other = engine(checkpoint("llama"), kernels, precision)
    (between,) = steps_of(Tier.TACTICAL)[:1]
    expected = other.run(between)
    for step in steps_of(Tier.STRATEGIC):
        flight = paused.launch(step, 0.0)
        pauses = 0
        while flight.paused:
            pauses += 1
            assert expected == other.run(between)
            flight.resume(0.0)
        assert pauses >= paused.num_parts - 1 > 0
        assert whole.run(step) == flight.wait()


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_a_step_with_time_to_spare_does_not_pause(checkpoint: Checkpoints, kernels: str) -> None:
    """An hour is enough for any; and a paused one goes on to its end where nobody limits it."""
    loaded = engine(checkpoint("qwen2-tied"), kernels)
    first, second, _ = steps_of(Tier.STRATEGIC)
    flight = loaded.launch(first, 3600.0)
    assert not flight.paused
    assert () == flight.wait()
    flight = loaded.launch(second, 0.0)
    assert flight.paused
    flight.resume(None)
    drawn: tuple[SampledToken, ...] = flight.wait()
    assert [1, 3] == [d.seq_id for d in drawn]
