"""A hand-written engine: real KV bookkeeping, arithmetic instead of a model, time by clock.

Each token that it draws is a hash of every token that its KV blocks hold for the sequence, so
a wrong block, a skipped position or a block owned twice gives other tokens than `reference`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from sage_fed.core import Logprob, ModelInfo, Sampling, Tier
from sage_fed.device import SequenceSpec
from sage_fed.errors import DeviceOutOfMemory
from sage_fed.steps import BLOCK_SIZE, PENDING, Chunk, Draw, SampledToken, Step

EOS = 7
VOCAB = 50
WAIT_S = 20.0
"""A deadline that only a hung test meets."""


def draw(history: list[int], seed: int, index: int) -> int:
    state = seed * 31 + index
    for token_id in history:
        state = (state * 1_000_003 + token_id + 1) % 2_147_483_647
    return state % VOCAB


def sample(history: list[int], seed: int, index: int, wrong: int = 0) -> int:
    """Draw; `wrong` of a hundred tokens, the same ones each time, are others."""
    token_id = draw(history, seed, index)
    luck = draw([*history, token_id], seed + 1, index + 1)
    return (token_id + 1) % VOCAB if luck * 100 < wrong * VOCAB else token_id


def reference(spec: SequenceSpec, wrong: int = 0) -> list[int]:
    """What the sequence has to deliver, computed alone."""
    history = list(spec.prompt)
    output: list[int] = []
    while len(output) < spec.max_new_tokens:
        token_id = sample(history, spec.sampling.seed, len(output), wrong)
        if token_id == EOS and not spec.ignore_eos:
            break
        output.append(token_id)
        history.append(token_id)
    return output


def info() -> ModelInfo:
    return ModelInfo("fake", "", "FakeForCausalLM", 1, "fp32", "torch", "cpu", 1, 1, 1, 1, 0.0)


def _sampled(seq_id: int, token_id: int, top: int | None) -> SampledToken:
    """A token, with log-probabilities that depend on it alone where they are asked for."""
    if top is None:
        return SampledToken(seq_id, token_id)
    value = -0.1 * (1 + token_id % 5)
    best = ((token_id, value), *((VOCAB + other, -5.0 - other) for other in range(10)))
    return SampledToken(seq_id, token_id, Logprob(token_id, value, best[:top]))


class Clock:
    """Monotonic seconds that pass only when the fake device works; called to read them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the seconds."""
        return self.now


@dataclass
class FakeInFlightStep:
    """A launched step of a fake engine; `device_s` None leaves its time to the clock."""

    engine: FakeEngine
    step: Step
    drawn: tuple[SampledToken, ...] | None = None
    device_s: float | None = None
    parts_left: int = 0

    @property
    def paused(self) -> bool:
        """Whether some of the step is left to do."""
        return self.parts_left > 0

    def resume(self, pause_after_s: float | None) -> None:
        """Do more of it."""
        self.engine.resume(self, pause_after_s)

    def wait(self) -> tuple[SampledToken, ...]:
        """Finish it."""
        return self.engine.land(self)


@dataclass
class FakeEngine:
    """`fail(step)` may raise; `gate`, where there is one, lets one step pass a permit.

    Pipelined, a step is only noted when it is launched, and done when it lands. With `num_parts`
    its time passes in so many equal pieces, and its arithmetic is done with the last.
    """

    num_blocks: int = 64
    max_context_tokens: int = 512
    num_ids: int = 1 << 20
    eos_token_ids: frozenset[int] = frozenset({EOS})
    clock: Clock = field(default_factory=Clock)
    step_s: float = 0.01
    token_s: float = 0.0
    fail: Callable[[Step], None] | None = None
    gate: threading.Semaphore | None = None
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    steps: list[Step] = field(default_factory=list)
    pipelined: bool = False
    num_parts: int = 1
    flights: list[FakeInFlightStep] = field(default_factory=list)
    closed: bool = False
    wrong: int = 0
    """Of a hundred tokens, so many are not what `reference` says: a drafter's."""
    period: int = 0
    """Where set, each token is the one so many before it: text that repeats itself."""
    info: ModelInfo = field(default_factory=info)
    defaults: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        self.cache: dict[int, int] = {}
        self.newest: dict[int, int] = {}

    def shut(self) -> None:
        """Let no step pass from now on but those that `let_pass` allows.

        The engine is idle. `entered` forgets the steps before: who waits means one behind the gate.
        """
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def let_pass(self, num_steps: int = 1) -> None:
        """Let so many steps pass the gate."""
        assert self.gate is not None, "this engine has no gate"
        self.gate.release(num_steps)

    def launch(self, step: Step, pause_after_s: float | None = None) -> FakeInFlightStep:
        """Run the step or a part of it, or leave it to its landing."""
        assert self.pipelined or not self.flights, "a flight has to land before the next"
        flight = FakeInFlightStep(self, step, parts_left=0 if self.pipelined else self.num_parts)
        self.flights.append(flight)
        if not self.pipelined:
            self.resume(flight, pause_after_s)
        return flight

    def resume(self, flight: FakeInFlightStep, pause_after_s: float | None) -> None:
        """Go on with a step, by as many parts as there is time for."""
        assert flight.parts_left, "only a paused step is resumed"
        step = flight.step
        part_s = (self.step_s + self.token_s * step.num_tokens) / self.num_parts
        parts = flight.parts_left
        if pause_after_s is not None:
            parts = min(parts, max(int(pause_after_s / part_s + 1e-9), 1))
        if parts < flight.parts_left:
            self.clock.now += parts * part_s
        else:
            try:
                flight.drawn = self.answer(step, parts / self.num_parts)
            except BaseException:
                self.flights.remove(flight)
                raise
        flight.parts_left -= parts

    def run(self, step: Step) -> tuple[SampledToken, ...]:
        """Launch and land."""
        return self.launch(step).wait()

    def land(self, flight: FakeInFlightStep) -> tuple[SampledToken, ...]:
        """Do what has not been done."""
        assert self.flights.pop(0) is flight, "flights land in the order of their launches"
        return self.answer(flight.step) if flight.drawn is None else flight.drawn

    def answer(self, step: Step, share: float = 1.0) -> tuple[SampledToken, ...]:
        """Write the KV, read it back, draw; the last `share` of the step's time passes."""
        self.entered.release()
        if self.gate is not None:
            assert self.gate.acquire(timeout=WAIT_S), "the test forgot to open the gate"
        self.steps.append(step)
        self.clock.now += share * (self.step_s + self.token_s * step.num_tokens)
        if self.fail is not None:
            before, self.newest = self.newest, {}  # what it was to draw, it does not
            self.fail(step)
            self.newest = before
        drawn = tuple(token for chunk in step.chunks for token in self._chunk(chunk))
        self.newest = {d.seq_id: d.token_id for d in drawn}
        return drawn

    def _chunk(self, chunk: Chunk) -> list[SampledToken]:
        assert all(0 <= block < self.num_blocks for block in chunk.blocks)
        if chunk.token_ids[0] == PENDING and chunk.seq_id not in self.newest:
            # Behind a step that came to nothing: nonsense, like a real device's.
            return [SampledToken(chunk.seq_id, 0)] * len(chunk.draws)
        slots = [
            chunk.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for position in range(chunk.start + len(chunk.token_ids))
        ]
        for slot, token_id in zip(slots[chunk.start :], chunk.token_ids, strict=True):
            self.cache[slot] = self.newest[chunk.seq_id] if token_id == PENDING else token_id
        history = [self.cache[slot] for slot in slots]
        first = len(history) - len(chunk.draws) + 1
        return [
            _sampled(
                chunk.seq_id,
                self._drawn(history[: first + row], one),
                one.sampling.top_logprobs,
            )
            for row, one in enumerate(chunk.draws)
        ]

    def _drawn(self, history: list[int], one: Draw) -> int:
        if self.period:
            return history[-self.period]
        return sample(history, one.sampling.seed, one.index, self.wrong)

    def close(self) -> None:
        """Note it."""
        self.closed = True


def spec(
    seq_id: int,
    tier: Tier = Tier.TACTICAL,
    *,
    prompt: int = 5,
    new: int = 4,
    system: int = 0,
    **fields: object,
) -> SequenceSpec:
    """A sequence whose prompt of `prompt` tokens depends on its id; runs to its length.

    All begin with the same `system` tokens, as far as the prompt is that long.
    """
    tokens = tuple((i * 5 if i < system else seq_id * 13 + i * 5) % VOCAB for i in range(prompt))
    values: dict[str, object] = {"ignore_eos": True, **fields}
    return SequenceSpec(seq_id, tier, tokens, new, **values)  # type: ignore[arg-type]


async def entered(engine: FakeEngine) -> None:
    """Wait until the engine is inside a step that nobody has waited for."""
    assert await asyncio.to_thread(engine.entered.acquire, timeout=WAIT_S)


def out_of_memory_once() -> Callable[[Step], None]:
    """A `fail` by which one step does not fit, and all after it do."""
    left = [DeviceOutOfMemory("no room for this job")]

    def fail(_step: Step) -> None:
        if left:
            raise left.pop()

    return fail
