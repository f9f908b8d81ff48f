"""The error table and the contract's promises through the real daemon."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import pytest
from daemon_process import DaemonProcess

from sage_fed.client import Client
from sage_fed.core import Delta, Finished, Prompt, Started, StopReason, Tier
from sage_fed.errors import (
    CannotAfford,
    DeadlineInfeasible,
    Forbidden,
    InvalidField,
    QueueFull,
    RequestIdConflict,
    TierUnavailable,
    Unauthenticated,
)
from sage_fed.v1 import inference_pb2, types_pb2

QUESTION = "What is 2 plus 3?"

CONFIG = """
[budget]
initial_atp = 100000
capacity_atp = 100000
refill_atp_per_s = 0
strategic_floor_atp = 0
[strategic]
max_batch = 1
max_waiting = 1
[auth]
tokens_file = "{tokens}"
[accounts.poor.budget]
initial_atp = 1
capacity_atp = 1000
refill_atp_per_s = 0.01
strategic_floor_atp = 0
"""

TOKENS = f"""
[[token]]
sha256 = "{hashlib.sha256(b"poor-token").hexdigest()}"
account = "poor"
"""


def start(state_dir: Path) -> DaemonProcess:
    state_dir.mkdir(parents=True)
    tokens, config = state_dir / "tokens.toml", state_dir / "config.toml"
    tokens.write_text(TOKENS)
    tokens.chmod(0o600)
    config.write_text(CONFIG.format(tokens=tokens))
    return DaemonProcess.start(state_dir, "--config", str(config))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    daemon = start(tmp_path_factory.mktemp("narrow") / "state")
    yield daemon
    code = daemon.stop()
    assert 0 == code, daemon.log.read_text()
    assert "internal error" not in daemon.log.read_text()


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with Client(daemon.address) as client:
        yield client


def test_a_stream_tells_the_whole_story(client: Client) -> None:
    """Started, Delta..., Finished; the counts, the text and the money agree."""
    started, *deltas, finished = client.stream(
        QUESTION, tier=Tier.TACTICAL, max_new_tokens=5, ignore_eos=True, top_logprobs=2, seed=7
    )
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert (7, 5, Tier.TACTICAL) == (started.seed, started.max_new_tokens, started.route.tier)
    tokens = [token for delta in deltas for token in delta.token_ids]
    logprobs = [entry for delta in deltas for entry in delta.logprobs]
    assert tokens == [entry.token_id for entry in logprobs]
    assert (5, 5, StopReason.LENGTH) == (
        len(tokens), deltas[-1].output_tokens, finished.stop_reason,
    )  # fmt: skip
    assert started.held_uatp == finished.price.held_uatp >= finished.price.charged_uatp > 0


def test_generate_is_the_stream_gathered(client: Client) -> None:
    """The same seed gives the same tokens, streamed or not."""
    fields = {"tier": Tier.STRATEGIC, "max_new_tokens": 6, "ignore_eos": True, "seed": 3}
    answer = client.generate(QUESTION, **fields)
    events = list(client.stream(QUESTION, **fields))
    text = "".join(event.text for event in events if isinstance(event, Delta))
    assert (answer.text, 6) == (text, len(answer.token_ids))


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (Prompt(token_ids=(4_000_000_000,)), "job.token_ids.ids[0]"),
        (Prompt(token_ids=(1,) * 5000), "job.token_ids"),
        ("many words " * 700, "job.text"),
    ],
)
def test_a_prompt_that_no_tier_can_take_is_invalid(
    client: Client, prompt: Prompt | str, field: str
) -> None:
    """Tokens that do not exist and prompts beyond the context are the client's to fix."""
    before = client.budget()
    with pytest.raises(InvalidField) as raised:
        client.generate(prompt, tier=Tier.TACTICAL)
    assert raised.value.field.startswith(("job.prompt", field))
    assert before.held_uatp == client.budget().held_uatp == 0


def test_a_wrong_token_and_a_missing_role_are_refused(daemon: DaemonProcess) -> None:
    """UNAUTHENTICATED and PERMISSION_DENIED; the admin token of the machine opens the door."""
    with Client(daemon.address, token="wrong") as nobody, pytest.raises(Unauthenticated):
        nobody.generate(QUESTION)
    with Client(daemon.address, token="poor-token") as poor, pytest.raises(Forbidden):
        poor.load()
    with Client(daemon.address, token=daemon.admin_token) as admin:
        assert 0 == admin.load().held_uatp


def test_who_cannot_pay_is_told_when_they_can(daemon: DaemonProcess) -> None:
    """Nothing is held; the delay is what the refill needs for the worst case."""
    with Client(daemon.address, token="poor-token") as poor:
        with pytest.raises(CannotAfford) as raised:
            poor.generate(QUESTION, tier=Tier.TACTICAL, max_new_tokens=8)
        assert 0 == poor.budget().held_uatp
    assert "poor" == raised.value.account
    assert raised.value.retry_after_s is not None
    assert raised.value.retry_after_s > 1.0


def test_a_job_above_its_own_limit_is_not_retried(client: Client) -> None:
    """Waiting does not make a price lower: no retry delay."""
    with pytest.raises(CannotAfford) as raised:
        client.generate(QUESTION, max_cost_uatp=1)
    assert raised.value.retry_after_s is None


def test_a_full_queue_refuses_the_next(client: Client) -> None:
    """One runs, one waits, the third is refused with a delay; the others are not disturbed."""
    fields = {"tier": Tier.STRATEGIC, "max_new_tokens": 500, "ignore_eos": True}
    with ExitStack() as stack:
        running, waiting = (
            stack.enter_context(closing(client.stream(QUESTION, **fields))) for _ in range(2)
        )
        # Its first token says that it has left the queue.
        assert [Started, Delta] == [type(next(running)), type(next(running))]
        assert Started is type(next(waiting))
        with pytest.raises(QueueFull) as raised:
            client.generate(QUESTION, **fields)
    assert raised.value.retry_after_s is not None


def test_a_deadline_that_cannot_be_met_is_refused_with_the_estimate(client: Client) -> None:
    """Before anything is held, once the tier has been measured."""
    client.generate(QUESTION, tier=Tier.TACTICAL, max_new_tokens=32, ignore_eos=True)
    with pytest.raises(DeadlineInfeasible) as raised:
        client.generate(QUESTION, tier=Tier.TACTICAL, max_new_tokens=256, deadline_s=0.001)
    assert raised.value.estimate_s > 0.001


def test_a_request_id_answers_again_and_conflicts_with_another_job(client: Client) -> None:
    """The same job under the same id is answered once more, free; another one is refused."""
    fields = {"tier": Tier.TACTICAL, "max_new_tokens": 4, "client_request_id": "once"}
    first = client.generate(QUESTION, **fields)
    spent = client.budget().discharged_uatp
    again = client.generate(QUESTION, **fields)
    assert (False, True) == (first.started.replayed, again.started.replayed)
    assert (first.token_ids, spent) == (again.token_ids, client.budget().discharged_uatp)
    with pytest.raises(RequestIdConflict):
        client.generate("Another question?", **fields)


def test_a_retry_under_another_call_deadline_is_the_same_request(daemon: DaemonProcess) -> None:
    """What is left of a call's deadline is no part of the job that is asked for."""
    job = types_pb2.JobSpec(
        text=QUESTION,
        client_request_id="deadline",
        sampling=types_pb2.SamplingParams(max_new_tokens=4),
    )
    request = inference_pb2.GenerateRequest(job=job)
    with grpc.insecure_channel(daemon.address) as channel:
        generate = channel.unary_unary(
            "/sage_fed.v1.InferenceService/Generate",
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )
        replies = [generate(request, timeout=timeout_s) for timeout_s in (50.0, 55.0)]
    assert [False, True] == [reply.started.replayed for reply in replies]


def test_a_client_that_leaves_pays_for_what_was_made_and_no_more(daemon: DaemonProcess) -> None:
    """The job's own task settles after the handler is gone; no hold stays."""
    with Client(daemon.address, token=daemon.admin_token) as client:
        before = client.budget()
        stream = client.stream(QUESTION, tier=Tier.TACTICAL, max_new_tokens=400, ignore_eos=True)
        with closing(stream):
            started = next(stream)
            assert isinstance(started, Started)
            next(stream)
        # The ledger is the event: the job's last entry appears when it has settled.
        while client.budget().held_uatp:
            pass
        spent = client.budget().discharged_uatp - before.discharged_uatp
        assert 0 < spent < started.held_uatp


def test_a_draining_daemon_finishes_its_streams_and_takes_no_more(tmp_path: Path) -> None:
    """UNAVAILABLE for a new job, Finished for the running one, exit code 0."""
    daemon = start(tmp_path / "state")
    try:
        with (
            Client(daemon.address, token=daemon.admin_token) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            stream = client.stream(
                QUESTION, tier=Tier.STRATEGIC, max_new_tokens=500, ignore_eos=True
            )
            next(stream)
            rest = pool.submit(lambda: list(stream))
            assert 1 == client.drain(60.0)
            with pytest.raises(TierUnavailable):
                client.generate(QUESTION)
            last = rest.result(60)[-1]
            assert isinstance(last, Finished)
            assert StopReason.LENGTH is last.stop_reason
        assert 0 == daemon.process.wait(60)
    finally:
        daemon.kill()
