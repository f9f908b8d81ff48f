"""The offline driver: prompts in, tokens out, without a scheduler."""

from __future__ import annotations

import pytest
from engine_driver import Driver
from hypothesis import given
from hypothesis import strategies as st

from sage_fed.core import Sampling
from sage_fed.engine import Engine, EngineOptions, generate, load_engine
from sage_fed.model_files import resolve_model


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = str(resolve_model("bundled:demo-tactical"))
    options = EngineOptions(model, kv_cache_bytes=16 << 20, max_context_tokens=256)
    return load_engine(options, lambda _share: None)


PROMPT = st.lists(st.integers(0, 255), min_size=1, max_size=40)
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.9, seed=7),
    Sampling(repetition_penalty=1.3),
)


@given(
    prompts=st.lists(
        st.lists(st.integers(0, 255), min_size=1, max_size=40), min_size=1, max_size=4
    ),
    sampling=st.sampled_from(SAMPLINGS),
    num_new=st.integers(1, 20),
)
def test_each_prompt_has_the_output_that_it_has_alone(
    engine: Engine, prompts: list[list[int]], sampling: Sampling, num_new: int
) -> None:
    """Whatever it is decoded with; one step a token, each later than the one before."""
    driver = Driver(engine)
    for i, prompt in enumerate(prompts):
        driver.add(i, tuple(prompt), num_new, sampling)
        driver.finish()
    made = generate(engine, prompts, sampling, num_new)
    assert [driver.finished[i].output for i in range(len(prompts))] == list(map(list, made.outputs))
    assert num_new == len(made.at_s)
    assert list(made.at_s) == sorted(made.at_s)


def test_a_sequence_ends_before_an_end_and_the_others_go_on(engine: Engine) -> None:
    """Its end is no output, and the blocks are those that it was told to use."""
    whole = generate(engine, [[5, 6, 7], [9]], Sampling(), 12)
    end = whole.outputs[0][4]
    last = engine.num_blocks - 2
    made = generate(engine, [[5, 6, 7], [9]], Sampling(), 12, ends={end}, first_block=last)
    for output, all_of_it in zip(made.outputs, whole.outputs, strict=True):
        stop = all_of_it.index(end) if end in all_of_it else len(all_of_it)
        assert all_of_it[:stop] == output
