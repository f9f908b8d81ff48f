"""The noise of draws, its bits in torch and C++, and a million draws for every filter."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_engine_sampling import FILTERS, chi_square, reference_probabilities

from sage_fed.core import DRAW_VERSION, Sampling
from sage_fed.engine.native import Library, load_library
from sage_fed.engine.native.library import DrawRowStruct
from sage_fed.engine.sampling import (
    NOISE_MAX,
    choose,
    draw_key,
    gumbel,
    ids_of,
    noise,
    pick,
    ranks,
    weights,
)
from sage_fed.steps import Draw

NUM_DRAWS = 1_000_000
NUM_IDS = 151_936
LARGEST = (1 << 32) - 1

Tokens = Callable[[torch.Tensor, Sampling, int], torch.Tensor]


@pytest.fixture(scope="module")
def kernels() -> Library:
    """The native kernels, where this machine can have them."""
    library = load_library(2)
    if not isinstance(library, Library):
        pytest.skip(library.reason)
    return library


def edge_counters() -> torch.Tensor:
    """Counters at both ends, around every power of two, and at every mantissa of one octave."""
    powers = torch.tensor([(1 << p) + d for p in range(33) for d in range(-32, 33)])
    low, octave = torch.arange(1 << 16), torch.arange(1 << 22, 1 << 23)
    return torch.cat((powers.clamp(0, LARGEST), low, LARGEST - low, octave, LARGEST - octave))


def counters(count: int, seed: int = 0) -> torch.Tensor:
    """Random 32-bit numbers."""
    return torch.randint(0, 1 << 32, (count,), generator=torch.Generator().manual_seed(seed))


def gumbel_by(kernels: Library, k: torch.Tensor) -> torch.Tensor:
    """The noise of counters, whose number is a multiple of 16, by the kernels."""
    found, given = torch.empty(k.shape[0]), k.to(torch.uint32)
    kernels.gumbel(given.data_ptr(), k.shape[0], found.data_ptr())
    return found


def one_row_draws(kernels: Library, row: torch.Tensor, sampling: Sampling, count: int) -> list[int]:
    """Draws of indices 0, 1, ... of one row of logits, by the kernels in one call."""
    described = torch.empty(count, 4, dtype=torch.int64)
    described[:, 0] = torch.tensor([draw_key(sampling.seed, index) for index in range(count)])
    described[:, 1] = torch.tensor(sampling.top_p, dtype=torch.float64).view(torch.int64)
    described[:, 2] = sampling.top_k
    floor = math.log(sampling.min_p) if sampling.min_p else -math.inf
    described[:, 3] = torch.tensor([sampling.temperature, floor]).view(torch.int64)
    rows = (DrawRowStruct * count).from_address(described.data_ptr())
    tokens = torch.empty(count, dtype=torch.int64)
    kernels.draw(row.data_ptr(), 0, row.shape[0], rows, tokens.data_ptr())
    found: list[int] = tokens.tolist()
    return found


def penalised(row: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The row with the penalties of SEEN and OUTPUT, by the formulas of `transformers` and OpenAI.

    What `reference_probabilities` says of temperature 1 without filters is their log-softmax.
    """
    plain = replace(sampling, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    return reference_probabilities(row, plain).log().float()


def test_the_version_is_of_these_numbers() -> None:
    """Whoever changes a bit of the noise has to give the draws a new version."""
    assert 2 == DRAW_VERSION
    assert 6332618229526065668 == draw_key(42, 0)
    assert draw_key(0, 0) == draw_key(2**64, 0)
    assert draw_key(-1, 7) == draw_key(2**64 - 1, 7)
    keys = torch.tensor([[draw_key(42, 0)], [draw_key(42, 1)]])
    bits = noise(keys, torch.tensor([0, 1, 151_935])).view(torch.int32).tolist()
    assert PINNED == bits


PINNED = [[1060566351, -1083253140, 1073812123], [1079494376, -1094038297, 1080249992]]


def test_the_noise_is_the_double_logarithm() -> None:
    """To 1e-6 of `-log(-log(1 - w))` in double precision, between the bounds that are stated."""
    k = torch.cat((counters(NUM_DRAWS), edge_counters()))
    w = (k.double() + 0.5) * 2.0**-32
    exact = -(-torch.log1p(-w)).log()
    found = gumbel(k)
    assert float(((found - exact).abs() / exact.abs().clamp_min(1.0)).max()) < 1e-6
    assert NOISE_MAX - 0.01 < float(found.max()) < NOISE_MAX
    assert -3.14 < float(found.min()) < -3.12


def test_torch_and_the_kernels_give_the_same_bits(kernels: Library) -> None:
    """Of 8 million counters at the edges, and of a million random ones."""
    k = torch.cat((edge_counters(), counters(NUM_DRAWS, 1)))
    k = k[: k.shape[0] // 16 * 16]
    assert torch.equal(gumbel(k).view(torch.int32), gumbel_by(kernels, k).view(torch.int32))


@pytest.mark.parametrize("along", ["ids", "indices", "seeds"])
def test_the_noise_is_gumbel_distributed(along: str) -> None:
    """Kolmogorov-Smirnov against `exp(-exp(-x))`, along ids, indices and seeds."""
    count = 200_000
    if along == "ids":
        keys, ids = torch.tensor([draw_key(7, 3)]), torch.arange(count)
    else:
        pairs = ((7, i) if along == "indices" else (i, 3) for i in range(count))
        keys, ids = torch.tensor([draw_key(*pair) for pair in pairs]), torch.tensor([5])
    ordered = (-(-noise(keys, ids).double()).exp()).exp().sort().values
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    gap = max(float((ordered - steps[:-1]).max()), float((steps[1:] - ordered).max()))
    assert gap * math.sqrt(count) < 2.23, "less probable than 1e-4"


def test_neighbours_share_no_noise() -> None:
    """The noise of one id tells nothing of the next id's, index's or seed's."""
    keys = torch.tensor([[draw_key(seed, index) for index in range(41)] for seed in range(41)])
    all_ = noise(keys[:, :, None], torch.arange(61))
    for a, b in (
        (all_[1:], all_[:-1]),
        (all_[:, 1:], all_[:, :-1]),
        (all_[:, :, 1:], all_[:, :, :-1]),
    ):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
        assert abs(float(correlation)) * math.sqrt(a.numel()) < 4.0


@pytest.mark.parametrize("sampling", FILTERS, ids=repr)
def test_a_million_draws_follow_the_distribution(kernels: Library, sampling: Sampling) -> None:
    """Chi-square against exact probabilities, and no draw of an id that a filter drops."""
    row = torch.randn(24, generator=torch.Generator().manual_seed(5)) * 2
    expected = reference_probabilities(row, sampling)
    scores = penalised(row, sampling)
    tokens = one_row_draws(kernels, scores, replace(sampling, seed=19), NUM_DRAWS)
    assert all(expected[token] > 0 for token in set(tokens)), "a filtered token was drawn"
    statistic, limit = chi_square(tokens, expected)
    assert statistic < limit


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0), Sampling(temperature=0.8, top_p=0.9), Sampling(1.0, 1.0, 50)],
    ids=repr,
)
def test_draws_of_a_whole_vocabulary_follow_it(kernels: Library, sampling: Sampling) -> None:
    """The same over as many ids as Qwen2.5 has."""
    row = torch.randn(NUM_IDS, generator=torch.Generator().manual_seed(6)) * 2.5
    expected = reference_probabilities(row, sampling)
    tokens = one_row_draws(kernels, row, replace(sampling, seed=4), 50_000)
    assert bool((expected[torch.tensor(tokens)] > 0).all())
    statistic, limit = chi_square(tokens, expected)
    assert statistic < limit


def random_case(rng: random.Random) -> tuple[torch.Tensor, list[Draw]]:
    """Four rows of logits, often with equal or impossible ones, and how to draw from them."""
    num_ids = rng.choice([5, 24, 100, 5000, 20_000])
    chance = torch.Generator().manual_seed(rng.getrandbits(32))
    logits = torch.randn(4, num_ids, generator=chance) * rng.choice([0.01, 1.0, 3.0, 6.0])
    if rng.random() < 0.4:
        logits = logits.bfloat16().float()
    if rng.random() < 0.2:
        logits[:, ::3] = -torch.inf
    if rng.random() < 0.1:
        logits[rng.randrange(4), rng.randrange(num_ids)] = rng.choice([math.nan, math.inf])
    sampling = Sampling(
        temperature=rng.choice([0.0, 1e-9, 0.1, 0.7, 1.0, 1.5, 50.0]),
        top_k=rng.choice([0, 0, 1, 5, 50, 3000, num_ids]),
        top_p=rng.choice([1.0, 1.0, 0.999, 0.95, 0.5, 0.01]),
        min_p=rng.choice([0.0, 0.0, 0.05, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.5]),
    )
    seen, counts = (1, 2, 3, num_ids), ((0, 2), (num_ids - 1, 1))
    seeds = [rng.getrandbits(64) for _ in range(4)]
    return logits, [
        Draw(replace(sampling, seed=seed), i, seen, counts) for i, seed in enumerate(seeds)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_torch_and_the_kernels_draw_the_same(kernels: Library, seed: int) -> None:
    """Under any settings and logits; and the kernels leave the logits as they were."""
    rng = random.Random(seed)
    for _ in range(10):
        logits, draws = random_case(rng)
        given = logits.clone()
        found = pick(given, draws, None, kernels).results
        assert pick(logits, draws).results.tolist() == found.tolist(), draws[0]
        assert torch.equal(given.view(torch.int32), logits.view(torch.int32))


def test_a_selection_of_ids_changes_no_draw() -> None:
    """Where only ids that can win get noise, the best of all ids with noise is drawn."""
    chance = torch.Generator().manual_seed(8)
    for scale in (0.1, 2.0, 8.0):
        logits = torch.randn(40, 6000, generator=chance) * scale
        draws = [Draw(Sampling(temperature=0.9, seed=seed), 2) for seed in range(40)]
        keys = torch.tensor([[draw_key(draw.sampling.seed, 2)] for draw in draws])
        relative = (logits - logits.amax(-1, keepdim=True)) / 0.9
        best = (relative + noise(keys, torch.arange(6000))).argmax(-1)
        assert best.tolist() == [token for token, _ in choose(logits, draws)]


def test_of_equal_logits_at_the_edge_of_a_filter_the_lower_ids_stay() -> None:
    """For top_k and for top_p, whatever order a device sorts them in."""
    for num_ids in (12, 6000):
        logits = torch.zeros(400, num_ids)
        logits[:, 7] = 1.0
        three = Sampling(temperature=1.0, top_k=3)
        drawn = [choose(logits, [Draw(replace(three, seed=s), 0) for s in range(400)])]
        mass = (math.e + 1.5) / (math.e + num_ids - 1)  # id 7, id 0, and the half of id 1
        half = Sampling(temperature=1.0, top_p=mass)
        drawn.append(choose(logits, [Draw(replace(half, seed=s), 0) for s in range(400)]))
        assert [{0, 1, 7}] * 2 == [{token for token, _ in choices} for choices in drawn]


def test_ranks_order_scores_and_then_ids() -> None:
    """Higher scores first, of equal ones (0.0 and -0.0 among them) the lower id."""
    scores = torch.tensor([-0.0, 0.0, -3.0, 5.0, -math.inf, 5.0, 1e-40, -1e-40])
    order = ids_of(ranks(scores, torch.arange(8)).sort(descending=True).values)
    assert [3, 5, 6, 0, 1, 7, 2, 4] == order.tolist()


def test_weights_are_the_exponential() -> None:
    """To fp32's precision or one unit, whichever is more, and nothing where it is below one."""
    relative = torch.cat((-torch.rand(100_000) * 40, torch.tensor([0.0, -1e-30, -math.inf])))
    exact = relative.double().exp() * float(1 << 44)
    assert bool(((weights(relative) - exact).abs() <= exact * 3e-7 + 1.0).all())
    assert [1 << 44, 0, 0] == weights(torch.tensor([0.0, -math.inf, -30.6])).tolist()


def inverted(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """What draws of version 1 did: the ids at which the cumulative sums pass numbers [rows, 1]."""
    return torch.searchsorted(probabilities.cumsum(-1), numbers)


def test_the_same_seed_makes_similar_models_agree() -> None:
    """More often than inverting the cumulative sum, and nearly as often as any draws could."""
    chance, count = torch.Generator().manual_seed(2), 3000
    strategic = torch.randn(count, 200, generator=chance) * 3
    tactical = strategic + torch.randn(count, 200, generator=chance) * 0.5
    draws = [Draw(Sampling(temperature=1.0, seed=seed), 9) for seed in range(count)]
    pairs = zip(choose(strategic, draws), choose(tactical, draws), strict=True)
    agreed = sum(a == b for a, b in pairs)
    p, q = strategic.double().softmax(-1), tactical.double().softmax(-1)
    numbers = torch.rand(count, 1, generator=chance, dtype=torch.float64)
    agreed_inverted = int((inverted(p, numbers) == inverted(q, numbers)).sum())
    possible = float(torch.minimum(p, q).sum())
    assert agreed > agreed_inverted + 0.05 * count
    assert agreed > possible - 0.06 * count
