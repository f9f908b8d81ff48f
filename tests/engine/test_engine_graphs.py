"""Steps over static tensors, as graphs need them, done eagerly: the same answers as ever.

What a GPU adds is the recording; the padding, the copying in and the cutting out are this code.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from engine_driver import Driver, generate
from tiny_models import CONFIGS, Checkpoint, prompt_of

from sage_fed.core import Sampling, Tier
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine.cuda_graphs import (
    Bucket,
    Buckets,
    EagerCapture,
    Function,
    GraphForward,
    compiled_by_rows,
    compiled_directory,
)
from sage_fed.errors import ModelLoadError
from sage_fed.steps import BLOCK_SIZE, PENDING, Chunk, Draw, History, Step

Checkpoints = Callable[[str], Checkpoint]
Engines = Callable[[str], Engine]

T = Tier.TACTICAL
GREEDY = Sampling()
SAMPLINGS = (
    GREEDY,
    Sampling(temperature=1.0, seed=5),
    Sampling(temperature=0.9, seed=4, top_k=20, top_p=0.9),
    Sampling(temperature=0.8, seed=2, repetition_penalty=1.2, frequency_penalty=0.3),
)
MAX_BATCH = 6


@pytest.fixture(scope="module")
def graphs_of(checkpoint: Checkpoints) -> Engines:
    """Engines in fp32 whose small steps go over static tensors, by name."""
    loaded: dict[str, Engine] = {}

    def of(name: str) -> Engine:
        if name not in loaded:
            options = EngineOptions(
                model=str(checkpoint(name).path),
                kv_cache_bytes=1 << 22,
                max_batch=MAX_BATCH,
                verify_tokens=(3,),
                kernels="torch",
            )
            loaded[name] = load_engine(options, lambda _: None, EagerCapture())
        return loaded[name]

    return of


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_steps_give_the_tokens_of_transformers(
    checkpoint: Checkpoints, graphs_of: Engines, name: str
) -> None:
    """Every batch size up to the largest, with contexts across the buckets' borders."""
    engine = graphs_of(name)
    lengths = (1, 15, 16, 17, 100, 240)
    prompts = [prompt_of(length) for length in lengths]
    expected = [checkpoint(name).greedy(prompt, 14) for prompt in prompts]
    for count in range(1, MAX_BATCH + 1):
        driver = Driver(engine)
        for seq_id in range(count):
            driver.add(seq_id, prompts[seq_id], 14, pieces=[64] * 4)
        assert {i: expected[i] for i in range(count)} == driver.finish()


@pytest.mark.parametrize("seed", range(3))
def test_joining_and_leaving_at_random_changes_no_token(
    checkpoint: Checkpoints, graphs_of: Engines, seed: int
) -> None:
    """Padded, plain and mixed steps follow each other on one cache; every answer is its own."""
    rng = random.Random(seed)
    driver = Driver(graphs_of("qwen2-tied"))
    expected: dict[int, tuple[int, ...]] = {}
    waiting = list(range(12))
    while waiting or driver.running:
        while waiting and len(driver.running) < 9 and rng.random() < 0.5:
            seq_id = waiting.pop()
            prompt, num_new = prompt_of(rng.randint(1, 70), seq_id), rng.randint(1, 25)
            pieces = [rng.randint(1, 5) for _ in range(70)]
            driver.add(seq_id, prompt, num_new, pieces=pieces)
            expected[seq_id] = checkpoint("qwen2-tied").greedy(prompt, num_new)
        moving = [i for i in driver.running if rng.random() < 0.8]
        rng.shuffle(moving)
        if moving:
            driver.step(*moving)
    assert expected == {i: tuple(s.output) for i, s in driver.finished.items()}


def test_logits_of_padded_steps_are_those_of_plain_ones(
    engine_of: Engines, graphs_of: Engines
) -> None:
    """The whole distribution agrees, not only its best token; sampled tokens are the same."""
    for sampling in (
        Sampling(top_logprobs=131),
        Sampling(temperature=1.1, seed=8, top_k=20, top_logprobs=131),
        Sampling(temperature=0.9, seed=3, repetition_penalty=1.3, top_logprobs=131),
    ):
        found = []
        for engine in (engine_of("llama"), graphs_of("llama")):
            driver = Driver(engine)
            for seq_id, length in enumerate((3, 40, 17)):
                driver.add(seq_id, prompt_of(length), 12, sampling, pieces=[7] * 6)
            tokens = driver.finish()
            tops = [
                [value for _, value in sorted(logprob.top)]
                for sequence in driver.finished.values()
                for logprob in sequence.logprobs
                if logprob is not None
            ]
            found.append((tokens, torch.tensor(tops)))
        assert found[0][0] == found[1][0]
        torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=0)


def test_several_tokens_a_sequence_are_verified_in_one_padded_step(
    checkpoint: Checkpoints, graphs_of: Engines
) -> None:
    """Up to three new tokens each, some sequences with fewer, draw what one by one draws."""
    engine = graphs_of("qwen3")
    prompts = [prompt_of(length) for length in (30, 15, 63)]
    answers = [checkpoint("qwen3").greedy(prompt, 5) for prompt in prompts]
    blocks = [tuple(range(i * 8, i * 8 + 8)) for i in range(3)]
    start = [Chunk(i, 0, prompt, blocks[i], (Draw(GREEDY, 0),)) for i, prompt in enumerate(prompts)]
    first = engine.run(Step(T, tuple(start)))
    assert [answer[0] for answer in answers] == [d.token_id for d in first]
    counts = (3, 2, 3)
    chunks = tuple(
        Chunk(i, len(prompts[i]), answers[i][:count], blocks[i], (Draw(GREEDY, count),))
        for i, count in enumerate(counts)
    )
    assert Bucket(4, 3, 16) == _forward(engine)._buckets.fit(chunks)
    drawn = engine.run(Step(T, chunks))
    assert [answers[i][count] for i, count in enumerate(counts)] == [d.token_id for d in drawn]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
@pytest.mark.parametrize("seed", range(2))
def test_drafts_right_and_wrong_are_verified_in_captured_steps(
    checkpoint: Checkpoints, sampling: Sampling, seed: int
) -> None:
    """Up to 16 drafts each and rejections among them leave the tokens of uncaptured single steps.

    Padding is full of NaN, in the scratch block and in the outputs.
    """
    rng = random.Random(seed)
    options = EngineOptions(
        str(checkpoint("qwen2-tied").path), kv_cache_bytes=1 << 22, max_batch=4, kernels="torch"
    )
    plain = load_engine(options, lambda _: None)
    engine = load_engine(options, lambda _: None, EagerCapture())
    forward = _forward(engine)
    buckets, pool = forward._buckets, forward._decoder._cache._pool
    assert buckets is not None
    assert forward._logits is not None
    prompts = {i: prompt_of(rng.randint(1, 60), seed * 10 + i) for i in range(4)}
    expected = {i: generate(plain, prompt, 60, sampling) for i, prompt in prompts.items()}
    blocks = {i: tuple(range(i * 10, i * 10 + 10)) for i in prompts}
    output: dict[int, list[int]] = {}
    for i, prompt in prompts.items():
        step = Step(T, (Chunk(i, 0, prompt, blocks[i], _draws(sampling, prompt, (), ())),))
        output[i] = [drawn.token_id for drawn in engine.run(step)]
    used: set[Bucket] = set()
    while running := [i for i in prompts if len(output[i]) < 60]:
        rng.shuffle(running)
        longest = rng.choice((1, 3, 8, 16))
        chunks = []
        for i in running[: rng.randint(1, 4)]:
            done = output[i]
            draft = list(expected[i][len(done) : len(done) + rng.randint(0, longest)])
            if draft and rng.random() < 0.5:
                wrong = rng.randrange(len(draft))
                draft[wrong] = (draft[wrong] + 1) % 131
            draft = draft[: 60 - len(done) - 1]
            start = len(prompts[i]) + len(done) - 1
            draws = _draws(sampling, prompts[i], tuple(done), tuple(draft))
            chunks.append(Chunk(i, start, (done[-1], *draft), blocks[i], draws))
        bucket = buckets.fit(chunks)
        assert bucket is not None
        used.add(bucket)
        with torch.inference_mode():
            pool[:, engine.num_blocks * BLOCK_SIZE :] = float("nan")
            forward._logits.fill_(float("nan"))
        drawn = engine.run(Step(T, tuple(chunks)))
        assert [c.seq_id for c in chunks for _ in c.draws] == [d.seq_id for d in drawn]
        for chunk in chunks:
            own = [d.token_id for d in drawn if d.seq_id == chunk.seq_id]
            for token, fed in zip(own, (*chunk.token_ids[1:], None), strict=True):
                output[chunk.seq_id].append(token)
                if token != fed:
                    break
    assert expected == {i: tuple(tokens) for i, tokens in output.items()}
    assert {bucket.tokens for bucket in used} > {2, 5, 9, 17}, "drafts of all lengths were verified"


def _draws(
    sampling: Sampling, prompt: tuple[int, ...], output: tuple[int, ...], draft: tuple[int, ...]
) -> tuple[Draw, ...]:
    """A draw behind the newest token and one behind each of the draft, as `History` makes them."""
    history = History(sampling, prompt)
    for token in output:
        history.add(token)
    return tuple(history.draw(len(output) + n, draft[:n]) for n in range(len(draft) + 1))


def test_a_cache_full_of_nan_reaches_nobody(checkpoint: Checkpoints) -> None:
    """Neither what strangers left nor the padding's own block touches a row that is read."""
    source = checkpoint("llama")
    options = EngineOptions(
        model=str(source.path), kv_cache_bytes=1 << 20, max_batch=4, kernels="torch"
    )
    engine = load_engine(options, lambda _: None, EagerCapture())
    pool = _forward(engine)._decoder._cache._pool
    with torch.inference_mode():
        pool[:, : engine.num_blocks * BLOCK_SIZE].fill_(float("nan"))
    driver = Driver(engine)
    lengths = (3, 40, 15)
    for seq_id, length in enumerate(lengths):
        driver.add(seq_id, prompt_of(length), 30, Sampling(top_logprobs=1), pieces=[2, 20, 60])
    expected = {i: source.greedy(prompt_of(n), 30) for i, n in enumerate(lengths)}
    assert expected == driver.finish()
    scratch = pool[:, engine.num_blocks * BLOCK_SIZE :]
    assert scratch.isfinite().all()
    assert scratch[:, 1:].eq(0).all(), "padding writes to one slot"


def test_poisoned_padding_never_reaches_a_real_row(
    checkpoint: Checkpoints, graphs_of: Engines
) -> None:
    """Even a scratch block of NaN, with outputs of NaN, leaves the real rows as they are."""
    engine = graphs_of("mistral")
    forward = _forward(engine)
    assert forward._logits is not None
    for count in (1, 3, 5):
        with torch.inference_mode():
            forward._decoder._cache._pool[:, engine.num_blocks * BLOCK_SIZE :] = float("nan")
            forward._logits.fill_(float("nan"))
        driver = Driver(engine)
        for seq_id in range(count):
            driver.add(seq_id, prompt_of(20 + seq_id), 9)
        expected = {i: checkpoint("mistral").greedy(prompt_of(20 + i), 9) for i in range(count)}
        assert expected == driver.finish()
    with torch.inference_mode():
        forward._decoder._cache._pool[:, engine.num_blocks * BLOCK_SIZE :] = 0.0


def test_buckets_are_the_next_size_up() -> None:
    """Batch, tokens and context are rounded up, each on its own; what is too large has none."""
    buckets = Buckets(max_batch=70, max_context_tokens=1000, capacity_blocks=1024, tokens=(1, 4))

    def fit(*sequences: tuple[int, int]) -> Bucket | None:
        return buckets.fit(
            [Chunk(i, start, (1,) * count, ()) for i, (start, count) in enumerate(sequences)]
        )

    assert Bucket(1, 1, 16) == fit((0, 1))
    assert Bucket(1, 1, 16) == fit((255, 1))
    assert Bucket(1, 1, 32) == fit((256, 1))
    assert Bucket(1, 1, 63) == fit((999, 1))
    assert fit((1008, 1)) is None
    assert Bucket(4, 1, 16) == fit(*[(9, 1)] * 3)
    assert Bucket(24, 1, 16) == fit(*[(9, 1)] * 17)
    assert Bucket(64, 1, 16) == fit(*[(9, 1)] * 49)
    assert fit(*[(9, 1)] * 71) is None
    assert Bucket(2, 4, 16) == fit((9, 4), (30, 3))
    assert fit((9, 4), (30, 1), (30, 1), (30, 1)) is None, "more padding than tokens"
    assert fit((9, 5)) is None
    assert fit(*[(9, 1)] * 63, (900, 1)) is None, "tables of more blocks than there are"
    assert {b.batch for b in buckets.all} == {1, 2, 4, 8, 16, 24, 32, 48, 64, 70}


def test_drafts_have_buckets_up_to_a_number_of_rows() -> None:
    """Drafts are padded to the longest of the step; very many rows, and long drafts, have none."""
    options = EngineOptions(model="", kv_cache_bytes=0)
    buckets = Buckets(
        max_batch=70,
        max_context_tokens=500,
        capacity_blocks=512,
        tokens=(1, *options.verify_tokens),
    )

    def fit(*rows: int) -> Bucket | None:
        return buckets.fit(
            [Chunk(i, 9, (1,) * n, (), (Draw(GREEDY, 0),) * n) for i, n in enumerate(rows)]
        )

    assert Bucket(1, 2, 16) == fit(2)
    assert Bucket(1, 9, 16) == fit(6)
    assert Bucket(8, 9, 16) == fit(9, 1, 1, 1, 1, 1), "padding is nearly free"
    assert Bucket(4, 17, 16) == fit(1, 17, 3)
    assert Bucket(32, 2, 16) == fit(*[2] * 30)
    assert fit(18) is None
    assert fit(*[17] * 5) is None
    assert fit(*[2] * 41) is None
    assert max(bucket.rows for bucket in buckets.all if bucket.tokens > 1) <= 80
    assert len(buckets.all) < 100, "each takes time and memory at load"


@pytest.mark.parametrize("graphs", [False, True])
def test_a_pending_token_is_what_the_step_before_drew(
    checkpoint: Checkpoints, engine_of: Engines, graphs_of: Engines, *, graphs: bool
) -> None:
    """Steps that do not wait for each other's tokens draw what those that do draw."""
    engine = (graphs_of if graphs else engine_of)("llama")
    assert graphs == engine.pipelined
    prompts = [prompt_of(length) for length in (5, 33, 16)]
    expected = [checkpoint("llama").greedy(prompt, 8) for prompt in prompts]
    blocks = [tuple(range(i * 4, i * 4 + 4)) for i in range(3)]
    order = [0, 1, 2]
    rng = random.Random(1)
    answers: list[list[int]] = [[], [], []]
    flights = []

    def land() -> None:
        for drawn in flights.pop(0).wait():
            answers[drawn.seq_id].append(drawn.token_id)

    for number in range(8):
        rng.shuffle(order)
        chunks = []
        for i in order:
            if number == 0:
                chunks.append(Chunk(i, 0, prompts[i], blocks[i], (Draw(GREEDY, 0),)))
            else:
                start = len(prompts[i]) + number - 1
                chunks.append(Chunk(i, start, (PENDING,), blocks[i], (Draw(GREEDY, number),)))
        flights.append(engine.launch(Step(T, tuple(chunks))))
        if len(flights) > 1 or not graphs:
            land()
    while flights:
        land()
    assert expected == [tuple(answer) for answer in answers]


def test_two_engines_fly_by_turns(checkpoint: Checkpoints, graphs_of: Engines) -> None:
    """What one launches neither waits for nor disturbs what the other has in flight."""
    names = ("llama", "qwen3")
    prompt = prompt_of(20)
    answers: dict[str, list[int]] = {name: [] for name in names}
    for number in range(6):
        token_ids = prompt if number == 0 else (PENDING,)
        start = 0 if number == 0 else len(prompt) + number - 1
        chunk = Chunk(3, start, token_ids, (7, 1, 4), (Draw(GREEDY, number),))
        flights = {name: graphs_of(name).launch(Step(T, (chunk,))) for name in names}
        for name, flight in flights.items():
            answers[name] += [drawn.token_id for drawn in flight.wait()]
    for name in names:
        assert checkpoint(name).greedy(prompt, 6) == tuple(answers[name])


def test_steps_are_waited_for_once_and_in_order(checkpoint: Checkpoints) -> None:
    """Waiting out of turn, twice, or after the engine was closed is a bug of the caller."""
    options = EngineOptions(
        model=str(checkpoint("llama").path), kv_cache_bytes=1 << 20, kernels="torch"
    )
    engine = load_engine(options, lambda _: None, EagerCapture())
    step = Step(T, (Chunk(0, 0, (5, 6), (0,), (Draw(GREEDY, 0),)),))
    first, second = engine.launch(step), engine.launch(step)
    with pytest.raises(AssertionError, match="in the order of their launches"):
        second.wait()
    plain = load_engine(options, lambda _: None)
    flight = plain.launch(step)
    with pytest.raises(AssertionError, match="has to end before the next"):
        plain.launch(step)
    assert flight.wait()
    with pytest.raises(AssertionError, match="waited for once"):
        flight.wait()
    engine.close()
    with pytest.raises(AssertionError, match="before its engine is closed"):
        first.wait()
    with pytest.raises(AssertionError, match="closed engine"):
        engine.launch(step)


def test_preparing_is_part_of_loading_and_is_reported(
    checkpoint: Checkpoints, engine_of: Engines
) -> None:
    """Progress rises to 1 over weights and buckets; the model says how long it took."""
    shares: list[float] = []
    options = EngineOptions(
        model=str(checkpoint("llama").path), kv_cache_bytes=1 << 20, kernels="torch"
    )
    engine = load_engine(options, shares.append, EagerCapture())
    assert sorted(shares) == shares
    assert 1.0 == shares[-1]
    assert len([share for share in shares if 0.9 < share < 1.0]) > 3
    assert 0 < engine.info.capture_s <= engine.info.load_s
    assert "torch" == engine.info.kernels
    assert 0.0 == engine_of("llama").info.capture_s


class TracedCapture(EagerCapture):
    """Traces as compiling does, and runs what was traced."""

    name = "compile"

    def __init__(self) -> None:
        self.traced = 0

    def compile(self, function: Function, *, widened: bool) -> Function:
        """Compile for no device."""

        def backend(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Function:
            self.traced += 1
            return module.forward

        assert widened == self.widened
        return compiled_by_rows(function, backend=backend)

    widened = False


@pytest.mark.parametrize(
    ("name", "precision"),
    [("qwen2-tied", "fp32"), ("qwen3", "fp32"), ("llama", "int8"), ("llama", "int4")],
)
def test_the_body_of_a_layer_can_be_compiled_once_for_all_layers_and_batches(
    checkpoint: Checkpoints, name: str, precision: str
) -> None:
    """It has no break, and makes one graph for one row and one for several, of each function."""
    capture = TracedCapture()
    capture.widened = precision != "fp32"
    options = EngineOptions(
        model=str(checkpoint(name).path),
        kv_cache_bytes=1 << 22,
        precision=precision,
        kernels="torch",
        max_batch=4,
        verify_tokens=(3,),
    )
    engine = load_engine(options, lambda _: None, capture)
    assert 6 == capture.traced
    assert "torch+compile" == engine.info.kernels
    answers = []
    for each in (engine, load_engine(options, lambda _: None)):
        driver = Driver(each)
        for seq_id, length in enumerate((9, 30, 17)):
            driver.add(seq_id, prompt_of(length), 6)
        answers.append(driver.finish())
    if precision == "fp32":
        assert answers[1] == answers[0]
    assert 6 == capture.traced, "nothing is compiled once it serves"


def test_a_prompt_too_long_for_a_bucket_goes_the_plain_way(
    checkpoint: Checkpoints, graphs_of: Engines
) -> None:
    """Prompts, and batches beyond the largest, are answered all the same."""
    engine = graphs_of("llama")
    driver = Driver(engine)
    for seq_id in range(MAX_BATCH + 3):
        driver.add(seq_id, prompt_of(10 + seq_id), 6)
    expected = {i: checkpoint("llama").greedy(prompt_of(10 + i), 6) for i in range(MAX_BATCH + 3)}
    assert expected == driver.finish()
    assert generate(engine, prompt_of(5), 3) == checkpoint("llama").greedy(prompt_of(5), 3)


def _forward(engine: Engine) -> GraphForward:
    assert isinstance(engine._forward, GraphForward)
    return engine._forward


def test_without_a_home_compiling_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service's user may have none; the refusal says what is missing."""

    def unknown(_: int) -> NoReturn:
        raise KeyError("no such user")

    for name in ("HOME", "CACHE_DIRECTORY", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ModelLoadError, match="no directory to keep compiled code in"):
        compiled_directory()


def test_compiled_code_is_kept_where_no_other_user_may_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is found there is run."""
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    assert tmp_path / "inductor" == compiled_directory()
    (tmp_path / "inductor").chmod(0o777)
    with pytest.raises(ModelLoadError, match="closed to others"):
        compiled_directory()
