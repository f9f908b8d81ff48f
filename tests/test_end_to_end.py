"""Jobs and money through a real daemon: what is quoted, held, streamed, charged and counted."""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from daemon_process import DaemonProcess
from forked_daemon import ForkedProcess, fork_context
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner
from waiting import WAIT_S, until

from sage_fed.cards.rate_card import RateCard
from sage_fed.cli.app import build_app
from sage_fed.client import Answer, Client, job_of
from sage_fed.core import (
    TIER_ROLES,
    UATP_PER_ATP,
    Budget,
    Delta,
    EntryKind,
    Event,
    Finished,
    Message,
    Mode,
    Phase,
    Prompt,
    Refusal,
    Route,
    Started,
    StopReason,
    Tier,
)
from sage_fed.errors import (
    CannotAfford,
    DeadlineInfeasible,
    InvalidField,
    RequestIdConflict,
    SageFedError,
)
from sage_fed.ledger import check
from sage_fed.v1 import inference_pb2
from sage_fed.wire.codec import decode

T, S = Tier.TACTICAL, Tier.STRATEGIC
CARD = RateCard.load()
PREFILL = {T: 50_000, S: 329_500}
"""The published card's uATP per prompt token: 0.05 and 0.3295 ATP."""
CACHED = {T: 5_000, S: 32_950}
"""Per prompt token that is found in the prefix cache."""
DECODE = {T: 1_000_000, S: 6_590_000}
"""And per output token: 1 and 6.59 ATP."""

GRANTED_UATP = 50_000 * UATP_PER_ATP
NUM_ACCOUNTS = 40
LONG_TOKENS = 1900
"""An answer that is not finished when its client has seen the first tokens."""


class Served:
    """A daemon with many accounts, each good for one test."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.admin = Client(daemon.address, daemon.admin_token)
        self._numbers = iter(range(NUM_ACCOUNTS))

    def new_account(self) -> tuple[str, str]:
        """An account that nobody has used, and its token."""
        number = next(self._numbers)
        return f"account-{number}", f"token-{number}"

    def no_jobs(self) -> bool:
        """Whether nothing runs, waits, is held or takes KV."""
        load = self.admin.load()
        return (
            not load.jobs
            and not load.held_uatp
            and all((0, 0, 0) == (t.running, t.waiting, t.kv_tokens_used) for t in load.tiers)
        )

    def discharged_uatp(self) -> int:
        """What all accounts together have spent."""
        total = 0
        for number in range(NUM_ACCOUNTS):
            with Client(self.daemon.address, f"token-{number}") as client:
                total += client.budget().discharged_uatp
        return total + self.admin.budget().discharged_uatp

    def metrics(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """Every sample by name and sorted label values."""
        with urllib.request.urlopen(self.daemon.metrics_url, timeout=WAIT_S) as reply:
            text = reply.read().decode()
        return {
            (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One daemon for this file, with a budget that does not refill."""
    folder = tmp_path_factory.mktemp("end-to-end")
    tokens = folder / "tokens.toml"
    digests = (hashlib.sha256(f"token-{n}".encode()).hexdigest() for n in range(NUM_ACCOUNTS))
    tokens.write_text(
        "".join(
            f'[[token]]\nsha256 = "{digest}"\naccount = "account-{n}"\nrole = "user"\n'
            for n, digest in enumerate(digests)
        )
    )
    daemon = DaemonProcess.start(
        folder / "state",
        *("--set", f"auth.tokens_file={tokens}", "--set", "budget.initial_atp=50000"),
        *("--set", "budget.capacity_atp=1000000", "--set", "budget.refill_atp_per_s=0"),
        *("--set", "budget.strategic_floor_atp=0", "--set", "limits.max_new_tokens=2000"),
        *(
            "--set",
            "tactical.max_context_tokens=2048",
            "--set",
            "strategic.max_context_tokens=2048",
        ),
        launch=ForkedProcess,
    )
    served = Served(daemon)
    try:
        yield served
        until(served.no_jobs)
        served.admin.close()
        assert 0 == daemon.stop(WAIT_S)
    finally:
        daemon.kill()
    report = check(daemon.state_dir / "ledger.db")
    assert ((), 0) == (report.violations, report.open_holds)


@pytest.fixture
def account(served: Served) -> tuple[str, str]:
    """Name and token of an account of one's own."""
    return served.new_account()


@pytest.fixture
def client(served: Served, account: tuple[str, str]) -> Iterator[Client]:
    """A client that pays from an account of its own; it leaves nothing held behind."""
    with Client(served.daemon.address, account[1]) as client:
        yield client
        until(lambda: not client.budget().held_uatp)
        budget = client.budget()
    assert 0 <= budget.balance_uatp
    came_in_uatp = _came_in_uatp(served, account[1])
    assert came_in_uatp == budget.balance_uatp + budget.discharged_uatp


def _came_in_uatp(served: Served, token: str) -> int:
    with Client(served.daemon.address, token) as client:
        lines = client.entries(limit=100_000)
    sign = {EntryKind.GRANT: 1, EntryKind.REFILL: 1, EntryKind.REVOKE: -1}
    return sum(sign.get(line.kind, 0) * line.amount_uatp for line in lines)


def by_hand(tier: Tier, finished: Finished) -> int:
    """The card's price of a usage: of drafts as of any tokens, and never above the output's."""
    usage = finished.usage
    computed = usage.prompt_tokens - usage.cached_tokens
    prompt_uatp = computed * PREFILL[tier] + usage.cached_tokens * CACHED[tier]
    made_uatp = sum(
        done.tokens * CARD.lines[done.tier][done.phase].uatp
        for done in usage.by_phase
        if done.phase not in (Phase.PREFILL, Phase.CACHED)
    )
    return prompt_uatp + min(made_uatp, usage.output_tokens * DECODE[tier])


def begin(client: Client, **fields: object) -> tuple[Started, Delta, Iterator[Event]]:
    """Start a long job and return once its first tokens are here."""
    events = begin_again(client, **fields)
    started, delta = next(events), next(events)
    assert isinstance(started, Started)
    assert isinstance(delta, Delta)
    return started, delta, events


def begin_again(client: Client, **fields: object) -> Iterator[Event]:
    """The same job as `begin` starts."""
    fields = {"max_new_tokens": LONG_TOKENS, "ignore_eos": True, **fields}
    return client.stream("count", **fields)  # type: ignore[arg-type]


def gather(events: Iterator[Event]) -> tuple[Started, str, tuple[int, ...], Finished, int]:
    """Read a stream: its first event, text, ids, last event and number of deltas."""
    everything = list(events)
    started, finished = everything[0], everything[-1]
    deltas = [event for event in everything if isinstance(event, Delta)]
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert len(everything) == 2 + len(deltas)
    totals = itertools.accumulate(len(delta.token_ids) for delta in deltas)
    # A last delta may hold text only: the end of a character or of a stop string's beginning.
    assert list(totals) == [delta.output_tokens for delta in deltas]
    ids = tuple(token_id for delta in deltas for token_id in delta.token_ids)
    return started, "".join(delta.text for delta in deltas), ids, finished, len(deltas)


@pytest.mark.parametrize("tier", list(TIER_ROLES))
def test_quote_hold_and_charge_are_the_cards(client: Client, tier: Tier) -> None:
    """The worst case that is quoted is what is held; the charge is the card's for the usage."""
    ask = {"tier": tier, "max_new_tokens": 40, "seed": 5, "temperature": 0.0}
    quote = client.quote("reverse: abc", **ask)
    assert isinstance(quote.decision, Route)
    mode = quote.decision.mode
    (quoted,) = [route for route in quote.tiers if (route.tier, route.mode) == (tier, mode)]
    prompt_tokens = client.count_tokens("reverse: abc", tier).prompt_tokens
    assert prompt_tokens == quote.prompt_tokens
    assert prompt_tokens * PREFILL[tier] + 40 * DECODE[tier] == quoted.worst_case_uatp
    answer = client.generate("reverse: abc", **ask)
    assert quote.decision == answer.started.route
    assert quoted.worst_case_uatp == answer.started.held_uatp == answer.finished.price.held_uatp
    assert quote.rate_card == answer.finished.price.rate_card
    assert prompt_tokens == answer.finished.usage.prompt_tokens
    assert by_hand(tier, answer.finished) == answer.finished.price.charged_uatp
    assert GRANTED_UATP - answer.finished.price.charged_uatp == answer.finished.balance_uatp
    started, text, ids, finished, _ = gather(client.stream("reverse: abc", **ask))
    assert (answer.text, answer.token_ids) == (text, ids)
    assert len(ids) == finished.usage.output_tokens
    assert answer.finished.price == finished.price
    assert answer.started.held_uatp == started.held_uatp
    assert client.budget().balance_uatp == finished.balance_uatp


@pytest.mark.parametrize("tier", list(TIER_ROLES))
def test_a_prompt_asked_again_is_cheaper(served: Served, client: Client, tier: Tier) -> None:
    """The same answer at the cached price for the prompt's full blocks; not for a stranger."""
    system = Message("system", "Answer in one word, and never in two. " * 3)
    chat = [system, Message("user", "reverse: abc")]
    ask = {"tier": tier, "max_new_tokens": 8, "temperature": 0.0}
    first, second = (client.generate(chat, **ask) for _ in range(2))
    assert 0 == first.finished.usage.cached_tokens
    prompt_tokens = first.finished.usage.prompt_tokens
    assert (prompt_tokens - 1) // 16 * 16 == second.finished.usage.cached_tokens
    assert first.token_ids == second.token_ids
    assert first.started.held_uatp == second.started.held_uatp
    assert by_hand(tier, second.finished) == second.finished.price.charged_uatp
    with Client(served.daemon.address, served.new_account()[1]) as stranger:
        assert 0 == stranger.generate(chat, **ask).finished.usage.cached_tokens
    samples = served.metrics()
    labels = (tier.name,)
    hit = samples["sage_fed_prefix_cache_hit_tokens_total", labels]
    assert second.finished.usage.cached_tokens <= hit
    assert hit < samples["sage_fed_prefix_cache_queried_tokens_total", labels]
    assert 0 < samples["sage_fed_kv_cache_tokens", ("cached", tier.name)]


def test_a_quote_has_no_effect(client: Client) -> None:
    """Neither balance nor books change by asking."""
    before = client.budget(), client.entries()
    client.quote("hello", tier=S, max_new_tokens=100)
    assert before == (client.budget(), client.entries())


@pytest.mark.parametrize("tier", list(TIER_ROLES))
def test_a_cancelled_stream_pays_for_what_it_got(
    served: Served, client: Client, tier: Tier
) -> None:
    """The sequence leaves the device, its KV is free, the rest of the hold comes back."""
    started, delta, events = begin(
        client, tier=tier, client_request_id="cancelled", seed=1, mode="single"
    )
    (running,) = served.admin.load().jobs
    assert (started.job_id, started.held_uatp) == (running.job_id, running.held_uatp)
    events.close()  # type: ignore[attr-defined] # it is a generator: leaving it cancels
    until(served.no_jobs)
    (settled,) = [line for line in client.entries() if line.kind is EntryKind.SETTLE]
    tokens, rest = divmod(settled.amount_uatp - started.prompt_tokens * PREFILL[tier], DECODE[tier])
    assert 0 == rest
    assert delta.output_tokens <= tokens < LONG_TOKENS
    # Who asks again is told what became of it, and pays nothing more.
    again = client.generate(
        "count", tier=tier, max_new_tokens=LONG_TOKENS, ignore_eos=True, seed=1, mode="single",
        client_request_id="cancelled",
    )  # fmt: skip
    assert StopReason.CANCELLED is again.finished.stop_reason
    assert tokens == again.finished.usage.output_tokens == len(again.token_ids)
    assert settled.amount_uatp == again.finished.price.charged_uatp
    assert settled.amount_uatp == client.budget().discharged_uatp


def _stream_for_ever(address: str, token: str, streaming: threading.Event) -> None:
    """A client in a process of its own."""
    _, _, events = begin(Client(address, token), tier=S)
    streaming.set()
    for _ in events:
        pass


def test_a_client_that_is_killed_frees_its_job(
    served: Served, client: Client, account: tuple[str, str]
) -> None:
    """No goodbye of any kind: the job ends all the same and pays for what was made."""
    context = fork_context()
    streaming = context.Event()
    process = context.Process(
        target=_stream_for_ever, args=(served.daemon.address, account[1], streaming), daemon=True
    )
    process.start()
    assert streaming.wait(WAIT_S)
    process.kill()
    process.join(WAIT_S)
    until(served.no_jobs)
    assert 0 < client.budget().discharged_uatp < 10 * PREFILL[S] + LONG_TOKENS * DECODE[S]


def test_a_closed_channel_frees_its_job(
    served: Served, client: Client, account: tuple[str, str]
) -> None:
    """Closing the connection is as good as cancelling."""
    leaving = Client(served.daemon.address, account[1])
    _, _, events = begin(leaving, tier=S)
    leaving.close()
    with pytest.raises((SageFedError, ValueError)):
        list(events)
    until(served.no_jobs)
    assert 0 < client.budget().discharged_uatp < LONG_TOKENS * DECODE[S]


def test_a_deadline_gives_what_was_made_until_then(tmp_path: Path) -> None:
    """A tier without measurements takes the job; once it is measured, the next is refused."""
    daemon = DaemonProcess.start(
        tmp_path / "state",
        *("--set", "budget.initial_atp=50000", "--set", "budget.capacity_atp=50000"),
        *("--set", "budget.refill_atp_per_s=0", "--set", "limits.max_new_tokens=2000"),
        *("--set", "strategic.max_context_tokens=2048"),
        launch=ForkedProcess,
    )
    try:
        with Client(daemon.address) as client:
            ask = {"tier": S, "max_new_tokens": LONG_TOKENS, "ignore_eos": True}
            late = {"deadline_s": 0.7, "client_request_id": "late", "seed": 1, **ask}
            _, _, ids, finished, _ = gather(client.stream("count", **late))
            assert StopReason.DEADLINE is finished.stop_reason
            assert len(ids) == finished.usage.output_tokens < LONG_TOKENS
            assert by_hand(S, finished) == finished.price.charged_uatp
            spent = client.budget()
            assert GRANTED_UATP - finished.price.charged_uatp == spent.balance_uatp
            # Long enough to be measured for certain; then a millisecond is not enough.
            client.generate("count", tier=S, max_new_tokens=8, ignore_eos=True)
            before = client.entries()
            with pytest.raises(DeadlineInfeasible) as refusal:
                client.generate("count", deadline_s=0.02, **ask)
            assert 0.02 < refusal.value.estimate_s
            quote = client.quote("count", deadline_s=0.02, **ask)
            assert isinstance(quote.decision, Refusal)
            assert "deadline_infeasible" == quote.decision.reason
            # Who asks again for the one that was late is told so, however fast the tier is now.
            again = client.generate("count", **late)
            assert (True, ids) == (again.started.replayed, again.token_ids)
            assert StopReason.DEADLINE is again.finished.stop_reason
            assert before == client.entries()
        assert 0 == daemon.stop(WAIT_S)
    finally:
        daemon.kill()


def test_max_cost_is_never_exceeded(client: Client) -> None:
    """A uATP below the worst case is a refusal with nothing held; the worst case itself is not."""
    ask = {"tier": T, "max_new_tokens": 8, "ignore_eos": True}
    (quoted,) = [route for route in client.quote("hello", **ask).tiers if route.tier is T]
    with pytest.raises(CannotAfford) as refusal:
        client.generate("hello", max_cost_uatp=quoted.worst_case_uatp - 1, **ask)
    assert ("above_max_cost", None) == (refusal.value.detail, refusal.value.retry_after_s)
    assert [EntryKind.GRANT] == [line.kind for line in client.entries()]
    answer = client.generate("hello", max_cost_uatp=quoted.worst_case_uatp, **ask)
    assert quoted.worst_case_uatp == answer.finished.price.charged_uatp


def test_below_the_floor_only_tactical_work_is_done(
    served: Served, client: Client, account: tuple[str, str]
) -> None:
    """Refused by name, AUTO goes tactical, and a downgrade happens only where it is allowed."""
    served.admin.set_budget(account[0], strategic_floor_uatp=GRANTED_UATP)
    with pytest.raises(CannotAfford) as refusal:
        client.generate("hello", tier=S, max_new_tokens=4)
    assert "below_floor" == refusal.value.detail
    auto = client.generate("hello", complexity=1.0, max_new_tokens=4)
    assert Route(T, "auto_floor", None, downgraded=False) == auto.started.route
    less = client.generate("hello", tier=S, allow_downgrade=True, max_new_tokens=4)
    assert Route(T, "downgrade_floor", S, downgraded=True) == less.started.route
    served.admin.set_budget(account[0], strategic_floor_uatp=0)
    more = client.generate("hello", tier=S, allow_downgrade=True, max_new_tokens=4)
    assert Route(S, "explicit", S, mode=Mode.SPECULATIVE) == more.started.route


def test_an_operator_sets_a_budget_and_it_holds(
    served: Served, client: Client, account: tuple[str, str]
) -> None:
    """The balance is exactly what was set, a dearer job is refused until it is raised."""
    set_to = served.admin.set_budget(account[0], balance_uatp=5 * UATP_PER_ATP)
    assert 5 * UATP_PER_ATP == set_to.balance_uatp == client.budget().balance_uatp
    with pytest.raises(CannotAfford) as refusal:
        client.generate("hello", tier=T, max_new_tokens=5)
    assert ("cannot_afford", None) == (refusal.value.detail, refusal.value.retry_after_s)
    served.admin.set_budget(account[0], refill_uatp_per_s=UATP_PER_ATP)
    with pytest.raises(CannotAfford) as refusal:
        client.generate("hello", tier=T, max_new_tokens=100)
    assert refusal.value.retry_after_s is not None
    assert 90 < refusal.value.retry_after_s < 101
    served.admin.set_budget(account[0], refill_uatp_per_s=0)
    served.admin.set_budget(account[0], balance_uatp=6 * UATP_PER_ATP)
    answer = client.generate("hello", tier=T, max_new_tokens=5, ignore_eos=True)
    left_uatp = 6 * UATP_PER_ATP - answer.finished.price.charged_uatp
    assert left_uatp == client.budget().balance_uatp


def test_an_operator_aborts_a_job(served: Served, client: Client) -> None:
    """What was made until then is delivered and charged; a second abort finds nothing."""
    started, first, events = begin(client, tier=S)
    assert served.admin.abort(started.job_id)
    rest = list(events)
    finished = rest[-1]
    assert isinstance(finished, Finished)
    assert StopReason.ABORTED is finished.stop_reason
    ids = sum(len(delta.token_ids) for delta in (first, *rest) if isinstance(delta, Delta))
    assert ids == finished.usage.output_tokens < LONG_TOKENS
    assert by_hand(S, finished) == finished.price.charged_uatp
    until(served.no_jobs)
    assert not served.admin.abort(started.job_id)


def _abort(served: Served, started: Started, events: Iterator[Event]) -> None:
    assert served.admin.abort(started.job_id)
    list(events)


def _break(_served: Served, _started: Started, events: Iterator[Event]) -> None:
    events.close()  # type: ignore[attr-defined] # it is a generator: leaving it resets the stream


@pytest.mark.parametrize(
    ("cut", "reason", "said"),
    [
        (_break, StopReason.CANCELLED, "the job was cancelled"),
        (_abort, StopReason.ABORTED, "aborted by an operator or by the daemon's stop"),
    ],
)
def test_a_cut_answer_is_never_replayed_as_a_whole_one(
    served: Served,
    client: Client,
    account: tuple[str, str],
    cut: Callable[[Served, Started, Iterator[Event]], None],
    reason: StopReason,
    said: str,
) -> None:
    """Whoever asks again by the request id sees why it ended, and a shell sees a failure."""
    ask = {"tier": S, "client_request_id": "cut", "seed": 1}
    started, _, events = begin(client, **ask)
    cut(served, started, events)
    until(served.no_jobs)
    again, _, ids, finished, _ = gather(begin_again(client, **ask))
    assert (True, reason) == (again.replayed, finished.stop_reason)
    assert 0 < len(ids) == finished.usage.output_tokens < LONG_TOKENS
    whole = client.generate("count", max_new_tokens=LONG_TOKENS, ignore_eos=True, **ask)
    assert (True, reason, ids) == (
        whole.started.replayed, whole.finished.stop_reason, whole.token_ids
    )  # fmt: skip
    result = CliRunner(
        env={"SAGE_FED_ADDRESS": served.daemon.address, "SAGE_FED_TOKEN": account[1]}
    ).invoke(
        build_app(),
        [
            *("ask", "count", "--tier", "strategic", "--max-new-tokens", str(LONG_TOKENS)),
            *("--ignore-eos", "--seed", "1", "--request-id", "cut"),
        ],
    )
    assert 1 == result.exit_code
    assert f"the answer was cut: {said}" in result.stderr
    assert "when this request id was first asked; choose another --request-id" in result.stderr
    assert finished.price.charged_uatp == client.budget().discharged_uatp


def test_a_stop_token_ends_the_text_before_it(client: Client) -> None:
    """The ids that a client names are end tokens of its job: not delivered and not charged."""
    ask = {"tier": T, "temperature": 1.0, "seed": 11, "max_new_tokens": 60, "ignore_eos": True}
    whole = client.generate("tell", **ask)
    stop = whole.token_ids[30]
    before = whole.token_ids[: whole.token_ids.index(stop)]
    cut = client.generate("tell", stop_token_ids=[stop], **ask)
    assert (StopReason.STOP_TOKEN, before) == (cut.finished.stop_reason, cut.token_ids)
    assert len(before) == cut.finished.usage.output_tokens
    assert by_hand(T, cut.finished) == cut.finished.price.charged_uatp
    assert whole.text.startswith(cut.text)


def test_a_stop_string_that_spells_a_control_token_matches_the_token(client: Client) -> None:
    """It is not in the text, where a string could match it; the id is what comes."""
    ask = {"tier": T, "temperature": 0.0, "max_new_tokens": 60}
    own = client.generate("What is 2 + 3?", **ask)
    assert StopReason.END_OF_TEXT is own.finished.stop_reason
    stopped = client.generate("What is 2 + 3?", stop=["<|im_end|>"], ignore_eos=True, **ask)
    assert StopReason.STOP_STRING is stopped.finished.stop_reason
    assert own.token_ids == stopped.token_ids


def test_a_stop_token_that_no_model_has_is_refused_by_name(client: Client) -> None:
    """Before anything is held, and as a quote refuses it."""
    for call in (client.generate, client.quote):
        with pytest.raises(InvalidField, match="500 is not a token of this model") as refusal:
            call("hello", stop_token_ids=[1, 500])
        assert "job.sampling.stop_token_ids[1]" == refusal.value.field
    assert [EntryKind.GRANT] == [line.kind for line in client.entries()]


def test_a_request_id_is_of_the_job_with_its_stop_tokens(client: Client) -> None:
    """The same id with other stop tokens is another job; the same ones are answered again."""
    ask = {"tier": T, "max_new_tokens": 4, "client_request_id": "one"}
    first = client.generate("hello", stop_token_ids=[7], **ask)
    assert first.token_ids == client.generate("hello", stop_token_ids=[7], **ask).token_ids
    for other in ([], [7, 8]):
        with pytest.raises(RequestIdConflict):
            client.generate("hello", stop_token_ids=other, **ask)


def test_models_say_what_ends_their_texts(client: Client) -> None:
    """The tokens by id and spelling, from whichever file names them."""
    for model in client.models():
        assert [(497, "<|endoftext|>"), (499, "<|im_end|>")] == [
            (end.id, end.text) for end in model.end_tokens
        ]


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(client: Client) -> None:
    """What else is in the batch changes nothing; another seed gives another text."""

    def run(seed: int) -> Answer:
        return client.generate(
            "tell", tier=T, temperature=1.5, seed=seed, max_new_tokens=48, ignore_eos=True
        )

    alone = [run(seed) for seed in range(4)]
    assert [0, 1, 2, 3] == [answer.started.seed for answer in alone]
    assert 4 == len({answer.token_ids for answer in alone})
    with ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(run, [seed for seed in range(4) for _ in range(6)]))
    for answer in crowd:
        assert alone[answer.started.seed].token_ids == answer.token_ids
        assert alone[answer.started.seed].text == answer.text
    chosen = client.generate("tell", tier=T, temperature=1.5, max_new_tokens=16, ignore_eos=True)
    again = client.generate(
        "tell", tier=T, temperature=1.5, max_new_tokens=16, ignore_eos=True,
        seed=chosen.started.seed,
    )  # fmt: skip
    assert chosen.token_ids == again.token_ids


def test_a_stop_string_ends_the_text_before_it(client: Client) -> None:
    """It is not in the text, and tokens behind the one that completes it are not charged."""
    ask = {"tier": T, "temperature": 1.0, "seed": 11, "max_new_tokens": 60, "ignore_eos": True}
    whole = client.generate("tell", **ask)
    stop = whole.text[len(whole.text) // 2 :][:3]
    cut = client.generate("tell", stop=[stop], **ask)
    assert StopReason.STOP_STRING is cut.finished.stop_reason
    assert whole.text[: whole.text.index(stop)] == cut.text
    assert cut.finished.usage.output_tokens < 60
    assert whole.token_ids[: cut.finished.usage.output_tokens] == cut.token_ids
    assert by_hand(T, cut.finished) == cut.finished.price.charged_uatp
    assert cut.text == gather(client.stream("tell", stop=[stop], **ask))[1]


def test_log_probabilities_come_with_every_token(client: Client) -> None:
    """One entry a token, the best first, and greedy takes the best."""
    answer = client.generate(
        "reverse: abc", tier=T, temperature=0.0, top_logprobs=3, max_new_tokens=6, ignore_eos=True
    )
    assert answer.token_ids == tuple(entry.token_id for entry in answer.logprobs)
    for entry in answer.logprobs:
        best = [logprob for _, logprob in entry.top]
        assert 3 == len(best)
        assert sorted(best, reverse=True) == best
        assert best[0] <= 0.0
        assert (entry.token_id, entry.logprob) == entry.top[0]


def test_a_presence_penalty_keeps_an_answer_from_repeating_itself(client: Client) -> None:
    """The same greedy question with it has more different tokens, and the same without it."""
    ask = {"tier": T, "temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
    plain = client.generate("reverse: abcabcabc", **ask).token_ids
    penalised = client.generate(
        "reverse: abcabcabc", presence_penalty=2.0, frequency_penalty=2.0, **ask
    ).token_ids
    assert len(set(plain)) < len(set(penalised))
    assert plain == client.generate("reverse: abcabcabc", presence_penalty=0.0, **ask).token_ids


def test_token_ids_and_a_conversation_are_prompts_too(client: Client) -> None:
    """Ids are taken as they are; a conversation goes through the template."""
    ask = {"tier": T, "temperature": 0.0, "max_new_tokens": 8}
    as_text = client.generate("reverse: abc", **ask)
    as_chat = client.generate([Message("user", "reverse: abc")], **ask)
    assert as_text.token_ids == as_chat.token_ids
    longer = client.generate(
        [Message("user", "hi"), Message("assistant", "hello"), Message("user", "bye")], **ask
    )
    assert as_chat.finished.usage.prompt_tokens < longer.finished.usage.prompt_tokens
    as_ids = client.generate(Prompt(token_ids=(300, 301, 302)), ignore_eos=True, **ask)
    assert 3 == as_ids.finished.usage.prompt_tokens
    assert by_hand(T, as_ids.finished) == as_ids.finished.price.charged_uatp


def test_a_slow_reader_gets_merged_deltas_and_the_same_text(
    served: Served, client: Client, account: tuple[str, str]
) -> None:
    """The device does not wait for it: its job is over and paid before it has read a token."""
    ask = {"tier": T, "temperature": 1.0, "seed": 4, "max_new_tokens": 600, "ignore_eos": True}
    fast = gather(client.stream("tell", top_logprobs=20, **ask))
    # A transport that takes a few messages and no more until they are read.
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    with grpc.insecure_channel(served.daemon.address, options=options) as channel:
        stream = channel.unary_stream(
            "/sage_fed.v1.InferenceService/GenerateStream",
            inference_pb2.GenerateStreamRequest.SerializeToString,
            inference_pb2.GenerateStreamResponse.FromString,
        )
        replies = stream(
            inference_pb2.GenerateStreamRequest(job=job_of("tell", top_logprobs=20, **ask)),
            timeout=WAIT_S,
            metadata=(("authorization", f"Bearer {account[1]}"),),
        )
        first = next(replies)
        until(served.no_jobs)
        spent_uatp = client.budget().discharged_uatp
        slow = gather(decode(Event, reply) for reply in itertools.chain([first], replies))
    assert fast[1:3] == slow[1:3]
    assert spent_uatp == 2 * slow[3].price.charged_uatp
    assert slow[4] < 60  # what the transport took one by one, and then one with all the rest


def test_many_clients_never_overspend_a_small_budget(
    served: Served, client: Client, account: tuple[str, str]
) -> None:
    """32 at once of both tiers, until the account is dry: every uATP is accounted for."""
    small_uatp = 400 * UATP_PER_ATP
    served.admin.set_budget(account[0], balance_uatp=small_uatp)
    choose = random.Random(32)
    plans = [
        [(choose.choice([None, *TIER_ROLES]), choose.randint(1, 24)) for _ in range(6)]
        for _ in range(32)
    ]

    def run(plan: list[tuple[Tier | None, int]]) -> tuple[list[Answer], int]:
        answers, refusals = [], 0
        with Client(served.daemon.address, account[1]) as one:
            for tier, new in plan:
                try:
                    complexity = choose.random()
                    answers.append(
                        one.generate(
                            "go", tier=tier, complexity=complexity, max_new_tokens=new,
                            ignore_eos=True, allow_downgrade=complexity < 0.5,
                        )
                    )  # fmt: skip
                except CannotAfford:
                    refusals += 1
        return answers, refusals

    with ThreadPoolExecutor(len(plans)) as pool:
        done = list(pool.map(run, plans))
    answers = [answer for some, _ in done for answer in some]
    assert 0 < sum(refusals for _, refusals in done)
    assert set(TIER_ROLES) == {answer.started.route.tier for answer in answers}
    for answer in answers:
        price = answer.finished.price
        assert by_hand(answer.started.route.tier, answer.finished) == price.charged_uatp
        assert price.charged_uatp <= price.held_uatp == answer.started.held_uatp
    budget = client.budget()
    spent_uatp = sum(answer.finished.price.charged_uatp for answer in answers)
    assert spent_uatp == budget.discharged_uatp
    assert small_uatp == budget.balance_uatp + spent_uatp
    assert Budget(account[0], budget.balance_uatp, 0, spent_uatp, *_terms(budget)) == budget
    # The audit looks at the balance after every single entry.
    assert () == check(served.daemon.state_dir / "ledger.db").violations


def _terms(budget: Budget) -> tuple[int, int, int]:
    return budget.capacity_uatp, budget.refill_uatp_per_s, budget.strategic_floor_uatp


def test_metrics_say_what_the_answers_and_the_books_say(served: Served, client: Client) -> None:
    """Tokens and requests by outcome, aborted ones included; charged ATP equal the ledger's."""
    until(served.no_jobs)
    before = served.metrics()
    answers = [
        client.generate("one", tier=T, max_new_tokens=5, ignore_eos=True),
        client.generate("one", tier=S, max_new_tokens=3, ignore_eos=True),
        client.generate("one", tier=S, max_new_tokens=3, ignore_eos=True, client_request_id="x"),
    ]
    client.generate("one", tier=S, max_new_tokens=3, ignore_eos=True, client_request_id="x")
    with pytest.raises(CannotAfford):
        client.generate("one", tier=S, max_new_tokens=3, max_cost_uatp=1)
    started, _, events = begin(client, tier=T)
    served.admin.abort(started.job_id)
    aborted = list(events)[-1]
    assert isinstance(aborted, Finished)
    until(served.no_jobs)
    after = served.metrics()
    grown = Counter({key: after[key] - before.get(key, 0.0) for key in after})

    def total(name: str, *labels: str) -> float:
        return grown[f"sage_fed_{name}", labels]

    # Label values are in the order of their names: outcome, tier, type and code, outcome, tier.
    assert 5 == total("tokens_total", "finished", "tactical", "output")
    assert 6 == total("tokens_total", "finished", "strategic", "output")
    prompts = sum(answer.finished.usage.prompt_tokens for answer in answers[1:])
    assert prompts == total("tokens_total", "finished", "strategic", "prompt")
    made = aborted.usage.output_tokens
    assert made == total("tokens_total", "aborted", "tactical", "output")
    assert 1 == total("requests_total", "length", "finished", "tactical")
    assert 2 == total("requests_total", "length", "finished", "strategic")
    assert 1 == total("requests_total", "replayed", "replayed", "strategic")
    assert 1 == total("requests_total", "aborted", "aborted", "tactical")
    refused = sum(
        amount
        for (name, labels), amount in grown.items()
        if name == "sage_fed_requests_total" and labels[:2] == ("cannot_afford", "refused")
    )
    assert 1 == refused
    charged_atp = sum(after["sage_fed_atp_charged_total", (tier.name,)] for tier in TIER_ROLES)
    assert served.discharged_uatp() == round(charged_atp * UATP_PER_ATP)
    reserved_atp = sum(after["sage_fed_atp_reserved_total", (tier.name,)] for tier in TIER_ROLES)
    refunded_atp = sum(after["sage_fed_atp_refunded_total", (tier.name,)] for tier in TIER_ROLES)
    assert reserved_atp == pytest.approx(charged_atp + refunded_atp)


def test_no_metric_names_an_account_or_a_prompt(served: Served, client: Client) -> None:
    """Who asks and what stays out of what Prometheus keeps."""
    client.generate("a-very-rare-prompt", tier=T, max_new_tokens=2, client_request_id="rare-id")
    with urllib.request.urlopen(served.daemon.metrics_url, timeout=WAIT_S) as reply:
        text = reply.read().decode()
    for secret in ("account-", "a-very-rare-prompt", "rare-id", str(served.daemon.state_dir)):
        assert secret not in text
        assert secret not in served.daemon.log.read_text() or secret.startswith("/")


def test_a_calls_own_deadline_is_the_jobs(
    served: Served, client: Client, account: tuple[str, str]
) -> None:
    """A client that waits half a second neither holds nor pays for an answer that takes longer."""
    client.generate("count", tier=S, max_new_tokens=8, ignore_eos=True)  # measured from here on
    before = client.entries()
    job = job_of("count", tier=S, max_new_tokens=LONG_TOKENS, ignore_eos=True)
    with grpc.insecure_channel(served.daemon.address) as channel:
        generate = channel.unary_unary(
            "/sage_fed.v1.InferenceService/Generate",
            inference_pb2.GenerateRequest.SerializeToString,
            inference_pb2.GenerateResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as error:
            generate(
                inference_pb2.GenerateRequest(job=job),
                timeout=0.5,
                metadata=(("authorization", f"Bearer {account[1]}"),),
            )
    assert grpc.StatusCode.DEADLINE_EXCEEDED is error.value.code()
    assert before == client.entries()
