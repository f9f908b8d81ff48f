"""One tier's scheduler over the fake engine, stepped by hand: what the scheduler's tests share."""

from __future__ import annotations

from fake_engine import FakeEngine, reference

from sage_fed.core import Tier
from sage_fed.device import Ended, Outcome, Scheduler, SequenceSpec, TierLimits
from sage_fed.device.tier_scheduler import TierScheduler
from sage_fed.steps import Step

T = Tier.TACTICAL


class Bench:
    """The tactical tier; each step takes `step_s`. `starts` are in order, later ones too."""

    tier = T

    def __init__(self, num_blocks: int = 64, *, step_s: float = 0.01, **fields: float) -> None:
        self.scheduler = Scheduler()
        self.limits = TierLimits(num_blocks, 512, **fields)  # type: ignore[arg-type]
        self.scheduler.open_tier(T, self.limits, frozenset())
        self.engine = FakeEngine(num_blocks=num_blocks)
        self.step_s = step_s
        self.now = 0.0
        self.busy_s = 0.0
        self.specs: dict[int, SequenceSpec] = {}
        self.starts: list[int] = []
        self.ended: dict[int, Ended] = {}
        self.tokens: dict[int, list[int]] = {}
        self.queried = self.hit = self.preempted = 0

    @property
    def schedule(self) -> TierScheduler:
        """The tier's inside."""
        return self.scheduler._tiers[T]

    @property
    def running(self) -> set[int]:
        """Ids of the sequences that run."""
        return set(self.schedule.running)

    def add(self, *asked: SequenceSpec) -> None:
        """Queue sequences."""
        for spec in asked:
            self.scheduler.add(spec, self.now)
            self.specs[spec.seq_id] = spec
            self.tokens[spec.seq_id] = []

    def launch(self) -> Step:
        """Begin the next step."""
        before = self._interruptions()
        step = self.scheduler.next_step(self.now)
        assert step is not None
        after = self._interruptions()
        ids = [chunk.seq_id for chunk in step.chunks]
        self.starts += [seq_id for seq_id in ids if before.get(seq_id) != after[seq_id]]
        return step

    def _interruptions(self) -> dict[int, int]:
        running = self.schedule.running
        return {seq_id: seq.preemptions for seq_id, seq in running.items()}

    def land(self, step: Step, *, fits: bool = True) -> Outcome:
        """End a step."""
        drawn = self.engine.run(step)
        self.now += self.step_s
        self.busy_s += self.step_s
        if fits:
            outcome = self.scheduler.complete(step, drawn, now=self.now, elapsed_s=self.step_s)
        else:
            outcome = self.scheduler.out_of_memory(step, now=self.now, elapsed_s=self.step_s)
        for d in outcome.tokens:
            self.tokens[d.seq_id].append(d.token_id)
        self.ended |= {e.seq_id: e for e in outcome.ended}
        self.queried += outcome.report.num_queried_tokens
        self.hit += outcome.report.num_hit_tokens
        self.preempted += outcome.report.num_preempted
        return outcome

    def step(self) -> Step:
        """Run the next step."""
        step = self.launch()
        self.land(step)
        return step

    def run(self, *asked: SequenceSpec) -> None:
        """Queue sequences and run until nothing is left; each delivers what it would alone."""
        self.add(*asked)
        while self.scheduler.has_work:
            self.step()
        for spec in asked or self.specs.values():
            assert reference(spec) == self.tokens[spec.seq_id]

    def kv(self) -> tuple[int, int]:
        """Tokens used and cached."""
        load = self.scheduler.load(T)
        assert load is not None
        return load.kv_tokens_used, load.kv_tokens_cached
