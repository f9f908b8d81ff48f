"""Draft tokens that a sequence is given: verified in one step, kept as far as they are right."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from fake_engine import EOS, FakeEngine, reference, spec
from scheduler_bench import Bench

from sage_fed.core import Sampling
from sage_fed.device import EndReason
from sage_fed.steps import Chunk

WRONG = 1_000_000


def drafting(bench: Bench, *, right: int, wrong: int = 0, **fields: object) -> list[Chunk]:
    """The chunks of a sequence of 12 tokens whose draft is right at its beginning."""
    plain = spec(0, new=12, **fields)  # type: ignore[arg-type]
    draft = (*reference(plain)[:right], *range(WRONG, WRONG + wrong))
    bench.add(spec(0, new=12, speculates=True, draft_tokens=draft, **fields))  # type: ignore[arg-type]
    chunks = []
    while bench.scheduler.has_work:
        chunks += bench.step().chunks
    assert reference(plain) == bench.tokens[0]
    return chunks


def test_a_right_draft_is_verified_in_pieces_that_grow() -> None:
    """The prompt and the first piece are fed together; the model's own token comes on top."""
    bench = Bench()
    first, *others = drafting(bench, right=11)
    assert (5 + 4, 5) == (len(first.token_ids), len(first.draws))
    assert list(range(5)) == [draw.index for draw in first.draws]
    assert len(others) < 7
    ended = bench.ended[0]
    assert (EndReason.LENGTH, 12) == (ended.reason, ended.output_tokens)
    assert ended.verified_tokens == ended.accepted_tokens == 12 - 1 - len(others)


@pytest.mark.parametrize("right", [0, 1, 3])
def test_a_wrong_draft_is_kept_up_to_where_it_is_wrong(right: int) -> None:
    """Then the model's own token, and from there on it decodes as if there had been no draft."""
    bench = Bench()
    chunks = drafting(bench, right=right, wrong=4 - right)
    assert [5, 1] == [len(chunk.draws) for chunk in chunks[:2]]
    assert [5 + right + i for i in range(11 - right)] == [chunk.start for chunk in chunks[1:]]
    ended = bench.ended[0]
    assert 4 <= ended.verified_tokens <= 6
    assert right == ended.accepted_tokens
    assert (0, 16) == bench.kv(), "what was stored of a wrong draft is not found again"


def test_a_draft_longer_than_the_output_may_be_is_cut() -> None:
    """No row is spent on a token that could not be delivered."""
    bench = Bench()
    plain = spec(0, new=3)
    bench.add(replace(plain, speculates=True, draft_tokens=tuple(reference(plain)) * 2))
    (chunk,) = bench.step().chunks
    assert 3 == len(chunk.draws)
    assert reference(plain) == bench.tokens[0]


def test_a_draft_shares_the_steps_limit_of_prompt_tokens() -> None:
    """What is left of it behind the prompt."""
    bench = Bench(prefill_chunk_tokens=4)
    first, second = drafting(bench, right=11)[:2]
    assert [(4, 0), (4, 4)] == [(len(c.token_ids), len(c.draws)) for c in (first, second)]


def test_a_drafted_end_of_text_ends_it() -> None:
    """And what was drafted behind it is not delivered."""
    seed = next(s for s in range(200) if 2 <= len(_until_end(s)) <= 3)
    expected = _until_end(seed)
    bench = Bench()
    bench.scheduler._tiers.clear()
    bench.scheduler.open_tier(bench.tier, bench.limits, frozenset({EOS}))
    asked = spec(
        0,
        new=12,
        ignore_eos=False,
        sampling=Sampling(seed=seed),
        speculates=True,
        draft_tokens=(*expected, EOS, 3, 4),
    )
    bench.add(asked)
    bench.step()
    ended = bench.ended[0]
    assert (EndReason.EOS, expected) == (ended.reason, bench.tokens[0])
    assert len(expected) == ended.accepted_tokens


def _until_end(seed: int) -> list[int]:
    return reference(spec(0, new=12, ignore_eos=False, sampling=Sampling(seed=seed)))


def test_each_row_is_penalised_for_what_stands_before_it() -> None:
    """The accepted tokens and the draft before the row, each id once."""
    bench = Bench()
    plain = spec(0, new=12)
    draft = (*reference(plain)[:3], reference(plain)[0])
    sampling = Sampling(repetition_penalty=1.5)
    bench.add(spec(0, new=12, speculates=True, draft_tokens=draft, sampling=sampling))
    (chunk,) = bench.launch().chunks
    prompt = tuple(dict.fromkeys(plain.prompt))
    for row, draw in enumerate(chunk.draws):
        assert tuple(dict.fromkeys((*prompt, *draft[:row]))) == draw.seen
        assert () == draw.counts


def test_each_row_counts_the_output_before_it_and_no_prompt() -> None:
    """A presence or frequency penalty looks at the output: its tokens, and the draft's."""
    bench = Bench()
    plain = spec(0, new=12)
    draft = (*reference(plain)[:3], reference(plain)[0])
    bench.add(
        spec(
            0, new=12, speculates=True, draft_tokens=draft, sampling=Sampling(frequency_penalty=0.5)
        )
    )
    (chunk,) = bench.step().chunks
    assert [Counter(draft[:row]) for row in range(5)] == [dict(draw.counts) for draw in chunk.draws]
    assert {()} == {draw.seen for draw in chunk.draws}
    while bench.scheduler.has_work:
        (chunk,) = bench.step().chunks
        (draw,) = chunk.draws
        assert Counter(bench.tokens[0][: draw.index]) == dict(draw.counts)


def test_a_draft_waits_for_no_other_sequence() -> None:
    """One verifies in the step in which another decodes; both get their own tokens."""
    bench = Bench()
    bench.add(spec(1, new=20))
    bench.step()
    chunks = drafting(bench, right=5, wrong=2)
    assert [5, 1] == sorted((len(chunk.draws) for chunk in chunks[:2]), reverse=True)
    assert reference(spec(1, new=20)) == bench.tokens[1]


def test_no_step_is_built_behind_a_draft() -> None:
    """How many of it are kept is not known; an earlier piece of the prompt that ends is no news."""
    bench = Bench(prefill_chunk_tokens=10)
    bench.scheduler._tiers.clear()
    bench.scheduler.open_tier(bench.tier, bench.limits, frozenset(), pipelined=True)
    bench.engine = FakeEngine(pipelined=True)
    plain = spec(0, prompt=15, new=9)
    bench.add(replace(plain, speculates=True, draft_tokens=(*reference(plain)[:2], WRONG)))
    first, second = bench.launch(), bench.launch()
    assert [0, 4] == [len(step.chunks[0].draws) for step in (first, second)]
    bench.land(first)
    assert bench.scheduler.next_step(bench.now) is None
    bench.land(second)
    while bench.scheduler.has_work:
        bench.step()
    assert reference(plain) == bench.tokens[0]
