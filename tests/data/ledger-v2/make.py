"""Makes the ledger and the payload hashes beside it, with the code of commit 88c27ee.

That was the last one whose payload hash was of a job's `repr` and had no version. To make them
again: `git worktree add OLD 88c27ee`, `make setup` there, and there `.venv/bin/python` with this
file and an empty directory.
"""

import asyncio
import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

from sage_fed.broker.results import Result, payload_hash
from sage_fed.ledger.clock import Now
from sage_fed.ledger.words import NS_PER_S

from sage_fed.core import (
    Delta,
    Finished,
    JobSpec,
    Message,
    Price,
    Priority,
    Prompt,
    Route,
    SamplingRequest,
    Started,
    StopReason,
    Tier,
    Timing,
    Usage,
)
from sage_fed.ledger import (
    AccountTerms,
    BudgetChange,
    HoldRequest,
    Ledger,
    LedgerOptions,
    Retention,
)

DAY_S = 86_400
RETENTION = Retention(keep_s=DAY_S, entries_s=2 * DAY_S)


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.wall_ns = 1_790_000_000 * NS_PER_S
        self.ns = 1000 * NS_PER_S

    def now(self) -> Now:
        return Now("boot:1", self.ns, self.wall_ns)

    def advance(self, seconds: int) -> None:
        self.ns += seconds * NS_PER_S
        self.wall_ns += seconds * NS_PER_S


def spec_of(text: str, request_id: str) -> JobSpec:
    return JobSpec(
        "ann",
        Prompt(messages=(Message("user", text),)),
        requested=Tier.STRATEGIC,
        client_request_id=request_id,
        sampling=SamplingRequest(temperature=0.5, max_new_tokens=8, stop=("\n",)),
    )


def result_of(spec: JobSpec) -> Result:
    return Result(
        Started(
            job_id=f"job-{spec.client_request_id}",
            route=Route(Tier.STRATEGIC, "explicit", Tier.STRATEGIC),
            held_uatp=100,
            prompt_tokens=5,
            seed=7,
            max_new_tokens=8,
        ),
        Delta("an answer", (1, 2), (), 2),
        Finished(
            StopReason.END_OF_TEXT,
            Usage(5, 0, 2),
            Timing(0.0, 0.1, 0.2, 0.1, 0.3),
            Price(42, 100, "default-1"),
            990,
        ),
    )


async def make_ledger(path: Path) -> None:
    """Old days, holds, settlements, kept results, refill, and two jobs that were left open."""
    clock = Clock()
    ledger = await Ledger.open(path, clock=clock, options=LedgerOptions(retention=RETENTION))
    terms = {
        "ann": AccountTerms(100_000, 0, 10, 100_000),
        "bob": AccountTerms(1000, 3, 0, 500),
        "carl": AccountTerms(50, 0, 0, 50),
    }
    for name, account_terms in terms.items():
        await ledger.ensure_account(name, account_terms)

    async def run(job_id: str, account: str, charged: int, spec: JobSpec | None = None) -> None:
        await ledger.hold(
            HoldRequest(
                job_id, account, 100, "default-1", "strategic", True,
                spec.client_request_id if spec else "", payload_hash(spec) if spec else b"",
            )
        )  # fmt: skip
        result = result_of(spec).to_bytes() if spec else None
        await ledger.settle(job_id, charged, "end_of_text", result)

    for number in range(4):
        await run(f"old-{number}", "ann", 10 + number)
        await run(f"old-bob-{number}", "bob", number)
        clock.advance(DAY_S)
    clock.advance(2 * DAY_S)
    await ledger.tidy()
    await run("forgotten", "ann", 1, spec_of("long ago", "gone"))
    clock.advance(DAY_S + 1)
    await ledger.tidy()
    await run("kept-1", "ann", 42, spec_of("hello", "kept-1"))
    await run("kept-2", "ann", 43, spec_of("how are you?", "kept-2"))
    await run("plain", "bob", 7)
    await ledger.set_budget("carl", BudgetChange(20, 200, 2))
    clock.advance(5)
    await ledger.hold(HoldRequest("given-back", "bob", 5, "default-1", "tactical"))
    await ledger.void("given-back", "refused")
    asked = spec_of("still running", "open")
    await ledger.hold(
        HoldRequest(
            "open", "ann", 60, "default-1", "strategic", True, "open", payload_hash(asked)
        )
    )  # fmt: skip
    await ledger.hold(HoldRequest("open-bob", "bob", 25, "default-1", "tactical"))
    # Closed cleanly, which voids no hold: the next start does.
    await ledger.close()


def specs(number: int) -> list[JobSpec]:
    """Requests that differ in everything that was hashed."""
    rng = random.Random(17)
    texts = ["", "hello", "it's", 'say "hi"', "a\nb\t\\", "größe ☃ 🤖", "\x00\x1f\u200b", "x" * 50]

    def maybe(value: object) -> object:
        return rng.choice([None, value])

    def one() -> JobSpec:
        messages = tuple(
            Message(rng.choice(["system", "user", "assistant"]), rng.choice(texts))
            for _ in range(rng.randrange(4))
        )
        token_ids = tuple(rng.randrange(150_000) for _ in range(rng.randrange(3)))
        return JobSpec(
            rng.choice(["ann", "o'neil", "größe"]),
            Prompt(messages, () if messages else token_ids),
            requested=rng.choice([None, Tier.TACTICAL, Tier.STRATEGIC]),
            allow_downgrade=rng.random() < 0.5,
            max_cost_uatp=maybe(rng.randrange(2**53)),
            complexity=maybe(rng.random()),
            priority=rng.choice(list(Priority)),
            client_request_id=f"r{rng.randrange(9)}",
            sampling=SamplingRequest(
                temperature=maybe(rng.choice([0.0, 0.1, 1e-7, 2.0, rng.random()])),
                top_p=maybe(rng.random()),
                top_k=maybe(rng.randrange(100)),
                min_p=maybe(rng.random()),
                repetition_penalty=maybe(1.0 + rng.random()),
                seed=maybe(rng.randrange(2**63)),
                max_new_tokens=maybe(rng.randrange(1, 1000)),
                stop=tuple(rng.sample(texts[1:], rng.randrange(3))),
                ignore_eos=rng.random() < 0.5,
                top_logprobs=maybe(rng.randrange(20)),
                deadline_s=maybe(rng.choice([1.0, 0.25, 1e9, 30.0])),
                stop_token_ids=tuple(rng.randrange(9) for _ in range(rng.randrange(3))),
            ),
        )

    return [JobSpec("robot", Prompt(token_ids=(1,))), *(one() for _ in range(number - 1))]


def main() -> None:
    folder = Path(sys.argv[1])
    asyncio.run(make_ledger(folder / "ledger.db"))
    vectors = []
    for spec in specs(int(sys.argv[2]) if len(sys.argv) > 2 else 12):
        fields = asdict(replace(spec, requested=None))
        for left_out in ("call_deadline_s", "trace", "one_reply"):
            del fields[left_out]
        fields["requested"] = spec.requested and spec.requested.value
        fields["priority"] = spec.priority.name
        vectors.append({"spec": fields, "hash": payload_hash(spec).hex()})
    lines = ",\n".join(json.dumps(vector) for vector in vectors)
    (folder / "payload-hashes.json").write_text(f"[\n{lines}\n]\n")


main()
