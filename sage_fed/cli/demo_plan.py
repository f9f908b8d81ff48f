"""What the demo asks, and why: held-out tasks of several families and grades in all three modes.

Owns: the list of requests.
Does not know: the daemon, how answers are shown.
Fails: never; every task is drawn with a fixed seed from the split that no model was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from sage_fed.core import UATP_PER_ATP, JobSpec, Message, Prompt, SamplingRequest, Tier
from sage_fed.tasks import Task, generate

_SEED = 659
_MAX_NEW_TOKENS = 48
_GREEDY = SamplingRequest(temperature=0.0, max_new_tokens=_MAX_NEW_TOKENS)
_SAMPLED = SamplingRequest(temperature=0.7, seed=7, max_new_tokens=_MAX_NEW_TOKENS)


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """One request, and what it is there to show."""

    shows: str
    task: Task
    spec: JobSpec
    expects_refusal: bool = False


def plan() -> tuple[DemoRequest, ...]:
    """The demo's requests, in order."""
    hard_sum = _task("add", 4)
    cheap = _MAX_NEW_TOKENS * 2 * UATP_PER_ATP
    return (
        _request("an easy one for the small model", _task("add", 1), Tier.TACTICAL),
        _request("a hard sum on the small model", hard_sum, Tier.TACTICAL),
        _request("the same sum on the large model", hard_sum, Tier.STRATEGIC),
        _request("the large model, another family", _task("sort", 3), Tier.STRATEGIC),
        _request("the daemon chooses", _task("subtract", 1), None),
        _request("the daemon chooses, a longer prompt", _task("lookup", 4), None),
        _request("the client hints: easy", _task("largest", 2), None, complexity=0.1),
        _request("the client hints: hard", _task("reverse", 3), None, complexity=0.9),
        _request("sampled, seed 7", _task("shift", 2), Tier.TACTICAL, sampling=_SAMPLED),
        _request(
            "a cap that only the small model meets, and leave to use it",
            _task("pick", 3),
            Tier.STRATEGIC,
            allow_downgrade=True,
            max_cost_uatp=cheap,
        ),
        _request(
            "the same cap without that leave",
            _task("pick", 3),
            Tier.STRATEGIC,
            max_cost_uatp=cheap,
            expects_refusal=True,
        ),
    )


def _task(family: str, grade: int) -> Task:
    random = Random(f"{_SEED} {family} {grade}")  # noqa: S311 - a demo, not a secret
    return generate(random, family, grade, "test")


def _request(
    shows: str,
    task: Task,
    tier: Tier | None,
    *,
    complexity: float | None = None,
    allow_downgrade: bool = False,
    max_cost_uatp: int | None = None,
    sampling: SamplingRequest = _GREEDY,
    expects_refusal: bool = False,
) -> DemoRequest:
    spec = JobSpec(
        account="",
        prompt=Prompt(messages=(Message("user", task.prompt),)),
        requested=tier,
        allow_downgrade=allow_downgrade,
        max_cost_uatp=max_cost_uatp,
        complexity=complexity,
        sampling=sampling,
    )
    return DemoRequest(shows, task, spec, expects_refusal)
