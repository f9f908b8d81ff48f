"""Drawing tokens: distributions, filters, seeds, penalties and log-probabilities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from engine_driver import Driver, generate
from tiny_models import Checkpoint, prompt_of
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sage_fed.core import Sampling
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine.sampling import choose
from sage_fed.steps import NO_TOKEN, Draw

Checkpoints = Callable[[str], Checkpoint]
Engines = Callable[[str], Engine]

NUM_DRAWS = 6000
FILTERS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=1.0, top_p=0.01),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=0.8, top_k=8, top_p=0.8),
    Sampling(temperature=1.3, top_k=9, top_p=0.9, min_p=0.15),
    Sampling(temperature=1.5, top_p=0.95, min_p=0.1, repetition_penalty=1.5),
    Sampling(temperature=1.0, repetition_penalty=2.0),
    Sampling(temperature=1.0, repetition_penalty=0.7, top_k=6),
    Sampling(temperature=1.0, presence_penalty=1.5),
    Sampling(temperature=1.0, frequency_penalty=-0.8),
    Sampling(temperature=0.9, presence_penalty=-0.4, frequency_penalty=0.7, top_p=0.9),
    Sampling(temperature=1.0, presence_penalty=0.5, repetition_penalty=1.4, top_k=9),
]
SEEN = (3, 5, 3, 17)
OUTPUT = (5, 3, 3, 99, 7)
"""Of which 99 is no id of the rows below, as a token of a padded vocabulary is."""


def random_logits(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 2


def reference_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What `transformers` would draw from, in double precision.

    Presence and frequency penalties, which it does not have, are the formula of OpenAI's API
    reference: `mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence`.
    """
    logits = logits.double().clone()
    if sampling.repetition_penalty != 1.0:
        scale = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        logits = scale(torch.tensor([SEEN]), logits[None])[0]
    for j in range(logits.shape[0]):
        count = OUTPUT.count(j)
        logits[j] -= count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
    chain = LogitsProcessorList()
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    scores = chain(torch.tensor([SEEN]), logits.double()[None])
    return scores.softmax(-1)[0]


def draw_many(logits: torch.Tensor, sampling: Sampling, count: int = NUM_DRAWS) -> list[int]:
    """`count` draws of one distribution, as one batch of rows with indices 0, 1, ..."""
    seen = SEEN if sampling.repetition_penalty != 1.0 else ()
    counts = tuple(Counter(OUTPUT).items()) if sampling.counts_output else ()
    draws = [Draw(sampling, index, seen, counts) for index in range(count)]
    return [token for token, _ in choose(logits.expand(count, -1), draws)]


def chi_square(tokens: Sequence[int], probabilities: torch.Tensor) -> tuple[float, float]:
    """Statistic, with cells below 5 expected pooled, and its 1 - 1e-4 quantile."""
    counts = Counter(tokens)
    cells, rare = [], [0.0, 0.0]
    for token, p in enumerate(probabilities.tolist()):
        expected = p * len(tokens)
        if expected >= 5:
            cells.append((counts[token], expected))
        else:
            rare = [rare[0] + counts[token], rare[1] + expected]
    if rare[1] >= 1:
        cells.append((rare[0], rare[1]))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = max(len(cells) - 1, 1)
    # Wilson-Hilferty: the cube root of chi-square over its freedom is nearly normal.
    spread = 2 / (9 * freedom)
    return statistic, freedom * (1 - spread + 3.72 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("sampling", FILTERS, ids=repr)
def test_draws_follow_the_filtered_distribution(sampling: Sampling) -> None:
    """Thousands of draws fit the distribution that `transformers` computes, and leave its set."""
    logits = random_logits(1, 24)[0]
    expected = reference_probabilities(logits, sampling)
    tokens = draw_many(logits, replace(sampling, seed=11))
    assert all(expected[token] > 0 for token in set(tokens)), "a filtered token was drawn"
    statistic, limit = chi_square(tokens, expected)
    assert statistic < limit


def test_the_chi_square_check_can_fail() -> None:
    """The check above tells a temperature of 1.0 from one of 1.15."""
    logits = random_logits(1, 24)[0]
    tokens = draw_many(logits, Sampling(temperature=1.15, seed=11))
    statistic, limit = chi_square(tokens, reference_probabilities(logits, FILTERS[0]))
    assert statistic > limit


def test_rows_of_different_settings_do_not_disturb_each_other() -> None:
    """A row draws the same token alone and beside rows of every other kind."""
    logits = random_logits(len(FILTERS) + 2, 40, seed=3)
    settings = [*FILTERS, Sampling(), Sampling(temperature=0.9, top_k=30, top_logprobs=2)]
    for index in range(50):
        draws = [Draw(replace(s, seed=row), index, SEEN) for row, s in enumerate(settings)]
        together = [token for token, _ in choose(logits, draws)]
        alone = [choose(logits[i : i + 1], draws[i : i + 1])[0][0] for i in range(len(draws))]
        assert alone == together


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    """Near zero the best token is certain, and nothing overflows."""
    logits = random_logits(1, 50)[0]
    tokens = draw_many(logits, Sampling(temperature=temperature), 20)
    assert {int(logits.argmax())} == set(tokens)


def test_a_huge_temperature_is_uniform() -> None:
    """Far above, every token is equally likely."""
    tokens = draw_many(random_logits(1, 20)[0], Sampling(temperature=1e9, seed=5))
    statistic, limit = chi_square(tokens, torch.full((20,), 0.05))
    assert statistic < limit


def test_greedy_obeys_the_repetition_penalty() -> None:
    """A penalty moves the greedy choice off a seen token, and only where it was seen."""
    logits = torch.tensor([[4.0, 3.5, -1.0], [4.0, 3.5, -1.0], [-0.5, -0.6, -2.0]])
    sampling = Sampling(repetition_penalty=1.3)
    draws = [Draw(sampling, 0, (0,)), Draw(sampling, 0, (2, 99)), Draw(sampling, 0, (0,))]
    assert [1, 0, 1] == [token for token, _ in choose(logits, draws)]


def test_a_frequency_penalty_counts_and_a_presence_penalty_does_not() -> None:
    """Greedy: what the output has thrice falls behind what it has once, only for the former."""
    logits = torch.tensor([[4.0, 3.9, -1.0]] * 4)
    often = ((0, 3), (1, 1))
    draws = [
        Draw(Sampling(frequency_penalty=0.2), 4, counts=often),
        Draw(Sampling(presence_penalty=0.2), 4, counts=often),
        Draw(Sampling(presence_penalty=0.2), 4, counts=((0, 1),)),
        Draw(Sampling(frequency_penalty=-2.0), 4, counts=((2, 3),)),
    ]
    assert [1, 0, 1, 2] == [token for token, _ in choose(logits, draws)]


@pytest.mark.parametrize("penalty", [5e-324, 1e-38, 1e-300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_beyond_fp32_is_no_fault_of_the_model(penalty: float, temperature: float) -> None:
    """Its row has a token; only a row whose own logits are not finite has none."""
    logits = torch.tensor([[4.0, 3.5, -1.0], [4.0, -3.5, torch.inf], [torch.nan, 1.0, 2.0]])
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty, seed=3)
    found = [token for token, _ in choose(logits, [Draw(sampling, 0, (0, 1, 2))] * 3)]
    assert found[0] in {0, 1, 2}
    assert [NO_TOKEN, NO_TOKEN] == found[1:]


def test_the_same_seed_gives_the_same_tokens_in_any_company(engine_of: Engines) -> None:
    """A sampled answer does not depend on the batch, on chunks or on the blocks it got."""
    engine, prompt = engine_of("qwen2-tied"), prompt_of(30)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=123)
    alone = generate(engine, prompt, 40, sampling)
    driver = Driver(engine)
    for seq_id in range(5):
        other = Sampling(temperature=1.5, top_k=50 * (seq_id % 2), seed=seq_id)
        driver.add(seq_id, prompt_of(11 * seq_id + 1), 20 + 9 * seq_id, other)
    driver.step()
    driver.add(9, prompt, 40, sampling, pieces=[7, 7, 7, 9])
    assert alone == driver.finish()[9]
    assert alone != generate(engine, prompt, 40, replace(sampling, seed=124))


def test_logprobs_are_the_log_softmax_of_the_reference(
    checkpoint: Checkpoints, engine_of: Engines
) -> None:
    """Chosen and best log-probabilities are of the raw logits, whatever the sampling."""
    source, prompt = checkpoint("qwen2-untied"), prompt_of(20)
    sampling = Sampling(temperature=1.4, top_k=20, repetition_penalty=1.2, seed=3, top_logprobs=4)
    driver = Driver(engine_of("qwen2-untied"))
    driver.add(0, prompt, 12, sampling)
    driver.finish()
    output, logprobs = driver.finished[0].output, driver.finished[0].logprobs
    rows = source.logits((*prompt, *output)).log_softmax(-1)[len(prompt) - 1 :]
    for token, logprob, row in zip(output, logprobs, rows, strict=False):
        assert logprob is not None
        assert token == logprob.token_id
        assert logprob.logprob == pytest.approx(row[token].item(), abs=1e-4)
        best = row.topk(4)
        assert best.indices.tolist() == [i for i, _ in logprob.top]
        assert best.values.tolist() == pytest.approx([v for _, v in logprob.top], abs=1e-4)


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (3, 3), (10, 10), (50, 10)])
def test_as_many_logprobs_as_asked(asked: int, given: int) -> None:
    """Zero means the chosen token's only; a small vocabulary bounds the rest."""
    ((token, logprob),) = choose(random_logits(1, 10), [Draw(Sampling(top_logprobs=asked), 0)])
    assert logprob is not None
    assert given == len(logprob.top)
    assert token == logprob.token_id


def test_only_who_asks_gets_logprobs() -> None:
    """Rows without the wish have none, in a batch where others do."""
    wishes = (None, 2, None, 0)
    draws = [Draw(Sampling(top_logprobs=wish), 0) for wish in wishes]
    choices = choose(random_logits(4, 10), draws)
    assert [None, 2, None, 0] == [lp and len(lp.top) for _, lp in choices]


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied"])
def test_padding_of_the_vocabulary_is_never_drawn(checkpoint: Checkpoints, name: str) -> None:
    """Ids from the tokenizer's length on appear neither in tokens nor in log-probabilities."""
    source, valid = checkpoint(name), 60
    options = EngineOptions(model=str(source.path), kv_cache_bytes=1 << 22, num_valid_ids=valid)
    engine = load_engine(options, lambda _: None)
    prompt = tuple(token % valid for token in prompt_of(25))
    row = source.logits(prompt)[-1]
    assert row.argmax() >= valid or any(t >= valid for t in source.greedy(prompt, 60))
    driver = Driver(engine)
    driver.add(0, prompt, 60, Sampling(top_logprobs=valid + 5))
    driver.add(1, prompt, 60, Sampling(temperature=50.0, seed=1))
    driver.add(2, prompt, 60, Sampling(temperature=50.0, top_k=131, seed=2))
    driver.add(3, prompt, 60, Sampling(temperature=50.0, top_p=0.99, seed=3))
    outputs = driver.finish()
    assert int(row[:valid].argmax()) == outputs[0][0]
    assert max(max(output) for output in outputs.values()) < valid
    first = driver.finished[0].logprobs[0]
    assert first is not None
    assert set(range(valid)) == {token for token, _ in first.top}
    assert math.fsum(math.exp(value) for _, value in first.top) == pytest.approx(1.0, abs=1e-5)
