"""Starting and stopping, seen from outside: signals, exit codes, messages, files, health."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import grpc
import pytest
from daemon_process import DaemonProcess, launch, serve_arguments
from forked_daemon import ForkedProcess
from grpc_health.v1 import health_pb2, health_pb2_grpc
from surroundings import MODELS

from sage_fed.cards.rate_card import RateCard, charge
from sage_fed.client import Client, wait_serving
from sage_fed.core import (
    TIER_ROLES,
    UATP_PER_ATP,
    Delta,
    Event,
    Finished,
    Started,
    StopReason,
    Tier,
)
from sage_fed.errors import (
    CannotConnect,
    LedgerBlocked,
    LedgerDown,
    SageFedError,
    TierUnavailable,
)
from sage_fed.ledger import check

WAIT_S = 60.0
"""A deadline that only a hung daemon meets."""

LONG = (
    *("--set", "budget.initial_atp=100000", "--set", "budget.capacity_atp=100000"),
    *("--set", "budget.refill_atp_per_s=0", "--set", "limits.max_new_tokens=2000"),
    *("--set", "tactical.max_context_tokens=2048", "--set", "strategic.max_context_tokens=2048"),
)
"""Answers that take long, and an account that can pay for them."""

Start = Callable[..., DaemonProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start forked daemons, by default on one state directory; none outlives the test."""
    started: list[DaemonProcess] = []

    def start_one(*arguments: str, **how: object) -> DaemonProcess:
        state_dir = tmp_path / "state"
        daemon = DaemonProcess.start(state_dir, *arguments, launch=ForkedProcess, **how)  # type: ignore[arg-type]
        started.append(daemon)
        return daemon

    yield start_one
    for daemon in started:
        daemon.kill()


def refused(tmp_path: Path, *arguments: str, code: int, state_dir: Path | None = None) -> str:
    """Run a daemon that must not start; returns what it said, which is no traceback."""
    log = tmp_path / "refused.log"
    process = ForkedProcess(serve_arguments(state_dir or tmp_path / "refused", *arguments), log)
    try:
        ended = process.wait(WAIT_S)
    finally:
        process.kill()
    said = log.read_text()
    assert code == ended, said
    assert "Traceback" not in said
    return said


class Watch:
    """The health of one service, as a load balancer follows it."""

    def __init__(self, channel: grpc.Channel, service: str) -> None:
        request = health_pb2.HealthCheckRequest(service=service)
        self._call = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=WAIT_S)

    def wait(self, serving: bool) -> None:
        """Wait until the state is as given."""
        response = health_pb2.HealthCheckResponse
        wanted = response.SERVING if serving else response.NOT_SERVING
        assert any(reply.status == wanted for reply in self._call)

    def close(self) -> None:
        """Stop watching."""
        self._call.cancel()


def begin(client: Client, **fields: object) -> tuple[Started, Iterator[Event]]:
    """Start a long job and return once its first tokens are here."""
    events = client.stream("count", max_new_tokens=1500, ignore_eos=True, **fields)  # type: ignore[arg-type]
    started = next(events)
    assert isinstance(started, Started)
    assert isinstance(next(events), Delta)
    return started, events


def ending(events: Iterator[Event]) -> Finished:
    """Read a stream to its end."""
    last = list(events)[-1]
    assert isinstance(last, Finished)
    return last


def books(daemon: DaemonProcess) -> None:
    """The ledger of a stopped daemon balances and holds nothing."""
    report = check(daemon.state_dir / "ledger.db")
    assert () == report.violations
    assert 0 == report.open_holds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_running_streams_finish_and_takes_no_new_ones(
    start: Start, number: signal.Signals
) -> None:
    """From the signal on health is NOT_SERVING, the running stream ends as if nothing was."""
    daemon = start(*LONG)
    with Client(daemon.address) as client, grpc.insecure_channel(daemon.address) as channel:
        watch = Watch(channel, "")
        watch.wait(serving=True)
        _, events = begin(client, tier=Tier.TACTICAL)
        daemon.process.send_signal(number)
        watch.wait(serving=False)
        watch.close()
        with pytest.raises(TierUnavailable) as refusal:
            client.generate("hello")
        assert refusal.value.retry_after_s is not None
        assert client.status().draining
        finished = ending(events)
    assert StopReason.LENGTH is finished.stop_reason
    assert 1500 == finished.usage.output_tokens
    assert 0 == daemon.process.wait(WAIT_S)
    assert not (daemon.state_dir / "endpoint.json").exists()
    books(daemon)


def test_a_grace_that_is_over_ends_streams_with_what_they_have(start: Start) -> None:
    """A stream that outlives the grace is ABORTED, charged for what it got, and the exit clean."""
    daemon = start(*LONG, "--set", "drain_grace_s=0")
    with Client(daemon.address) as client:
        _, events = begin(client, tier=Tier.STRATEGIC)
        daemon.process.send_signal(signal.SIGTERM)
        finished = ending(events)
    assert StopReason.ABORTED is finished.stop_reason
    assert 0 < finished.usage.output_tokens < 1500
    price = charge(RateCard.load(), finished.usage)
    assert price == finished.price.charged_uatp
    assert 100_000 * UATP_PER_ATP - price == finished.balance_uatp
    assert 0 == daemon.process.wait(WAIT_S)
    books(daemon)


def test_a_second_sigterm_stops_at_once(start: Start) -> None:
    """The exit code is the signal's, the stream has an ending, and the books balance."""
    daemon = start(*LONG, "--set", "drain_grace_s=3600")
    with Client(daemon.address) as client, grpc.insecure_channel(daemon.address) as channel:
        watch = Watch(channel, "")
        _, events = begin(client, tier=Tier.STRATEGIC)
        daemon.process.send_signal(signal.SIGTERM)
        watch.wait(serving=False)
        watch.close()
        daemon.process.send_signal(signal.SIGTERM)
        assert StopReason.ABORTED is ending(events).stop_reason
    assert 128 + signal.SIGTERM == daemon.process.wait(WAIT_S)
    books(daemon)


def test_an_operator_drains_by_rpc_with_a_grace_of_its_own(start: Start) -> None:
    """AdminService.Drain is the same as SIGTERM, and its grace goes before the setting's."""
    daemon = start(*LONG, "--set", "drain_grace_s=3600")
    with Client(daemon.address) as client, Client(daemon.address, daemon.admin_token) as admin:
        _, events = begin(client, tier=Tier.STRATEGIC)
        assert 1 == admin.drain(grace_s=0.0)
        assert StopReason.ABORTED is ending(events).stop_reason
    assert 0 == daemon.process.wait(WAIT_S)
    books(daemon)


def test_tactical_serves_while_strategic_loads(start: Start, tmp_path: Path) -> None:
    """The loading tier refuses with a retry delay, AUTO falls back, then both serve."""
    model = tmp_path / "slow-model"
    shutil.copytree(MODELS / "demo-strategic", model)
    config = model / "config.json"
    kept = config.rename(model / "config.kept")
    # Loading waits inside open() until somebody writes: no timing, no fake.
    os.mkfifo(config)
    daemon = start(
        *("--set", "budget.initial_atp=5000", "--set", f"strategic.model={model}"),
        wait_for=("tactical",),
    )
    with Client(daemon.address) as client:
        tactical = client.generate("hello", tier=Tier.TACTICAL, max_new_tokens=4)
        assert "explicit" == tactical.started.route.reason
        with pytest.raises(TierUnavailable) as refusal:
            client.generate("hello", tier=Tier.STRATEGIC, max_new_tokens=4)
        assert refusal.value.retry_after_s is not None
        auto = client.generate("hello", complexity=1.0, max_new_tokens=4)
        assert (Tier.TACTICAL, "auto_loading", False) == (
            auto.started.route.tier,
            auto.started.route.reason,
            auto.started.route.downgraded,
        )
        pipe = os.open(config, os.O_WRONLY)  # returns now that the loader has it open
        text = kept.read_bytes()
        kept.rename(config)  # for who reads it a second time
        os.write(pipe, text)
        os.close(pipe)
        assert wait_serving(daemon.address, "strategic", WAIT_S)
        strategic = client.generate("hello", tier=Tier.STRATEGIC, max_new_tokens=4)
        assert Tier.STRATEGIC is strategic.started.route.tier
    assert 0 == daemon.stop(WAIT_S)


def test_balance_and_refill_survive_a_restart(start: Start) -> None:
    """What was spent stays spent, and the refill goes on from there."""
    slow = ("--set", "budget.refill_atp_per_s=0")
    daemon = start(*slow)
    with Client(daemon.address) as client:
        spent = client.generate("hello", tier=Tier.TACTICAL, max_new_tokens=8)
        before = client.budget()
    assert spent.finished.balance_uatp == before.balance_uatp
    assert 0 == daemon.stop(WAIT_S)
    again = start(*slow)
    with Client(again.address) as client:
        assert before == client.budget()
    assert 0 == again.stop(WAIT_S)
    refilling = start("--set", "budget.refill_atp_per_s=1000")
    with Client(refilling.address) as client:
        while (balance_uatp := client.budget().balance_uatp) == before.balance_uatp:
            pass  # until the first millionth of an ATP has come in
    assert before.balance_uatp < balance_uatp <= 5000 * UATP_PER_ATP
    assert 0 == refilling.stop(WAIT_S)
    books(refilling)


def test_a_ledger_that_cannot_write_refuses_jobs_until_it_can(start: Start) -> None:
    """New ones are told to come back, a running one ends and is charged, and nobody restarts."""
    daemon = start(*LONG)
    with Client(daemon.address) as client:
        before = client.generate("hello", tier=Tier.TACTICAL, max_new_tokens=4)
        _, events = begin(client, tier=Tier.STRATEGIC)
        # The kernel refuses to write behind this offset from now on, as a full disk would.
        none = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (32768, none[1]))
        with pytest.raises(LedgerBlocked) as refused:
            client.generate("hello", tier=Tier.TACTICAL, max_new_tokens=4)
        assert refused.value.retry_after_s
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, none)
        *_, last = events
        assert isinstance(last, Finished)
        budget = client.budget()
    spent_uatp = before.finished.price.charged_uatp + last.price.charged_uatp
    assert (spent_uatp, 0) == (budget.discharged_uatp, budget.held_uatp)
    assert 0 == daemon.stop(WAIT_S)
    books(daemon)


def test_a_second_daemon_on_the_same_books_is_refused(start: Start, tmp_path: Path) -> None:
    """Exit code 1 and a sentence; the first one serves on and keeps its endpoint file."""
    daemon = start()
    said = refused(tmp_path, state_dir=daemon.state_dir, code=1)
    assert "open in another process" in said
    assert (daemon.state_dir / "endpoint.json").exists()
    with Client(daemon.address) as client:
        assert client.generate("hello", max_new_tokens=1).finished
    assert 0 == daemon.stop(WAIT_S)


@pytest.mark.parametrize("key", ["listen", "metrics_listen"])
def test_a_port_that_is_taken_is_refused_by_name(tmp_path: Path, key: str) -> None:
    """Naming the setting and the address; with exit code 1, because it may pass."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flag = f"--{key.replace('_', '-')}"
        said = refused(tmp_path, flag, address, code=1)
    assert f"{key}: cannot bind {address}" in said


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("tactical.max_batch=0", "tactical.max_batch"),
        ("tactical.max_bach=4", "tactical.max_bach"),
        ("limits.default_new_tokens=4000", "limits.default_new_tokens"),
        ("rate_card=no-such-card", "rate_card"),
        ("device=quantum:0", "device"),
        ("auth.tokens_file=/no/such/file", "auth.tokens_file"),
    ],
)
def test_a_setting_that_cannot_work_is_named(tmp_path: Path, assignment: str, named: str) -> None:
    """Exit code 78, which nobody need try again, and one line with the key."""
    said = refused(tmp_path, "--set", assignment, code=78)
    assert named in said


def test_a_wrong_setting_is_one_line(tmp_path: Path) -> None:
    """A fresh interpreter says what is wrong in a single line, before anything is loaded."""
    command = [sys.executable, "-m", "sage_fed.cli", *serve_arguments(tmp_path / "state")]
    ended = subprocess.run(
        [*command, "--set", "tactical.max_batch=0"],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert 78 == ended.returncode
    assert "" == ended.stdout
    (line,) = ended.stderr.splitlines()
    assert "tactical.max_batch" in line


def test_a_model_directory_that_is_missing_fails_the_start(tmp_path: Path) -> None:
    """Exit code 78, naming the directory."""
    said = refused(tmp_path, "--set", f"tactical.model={tmp_path}/nothing-here", code=78)
    assert "nothing-here" in said


def test_a_start_without_its_models_leaves_nothing_behind(tmp_path: Path) -> None:
    """No ledger and no grant, which another profile on that state directory would inherit."""
    refused(tmp_path, "--set", f"tactical.model={tmp_path}/nothing-here", code=78)
    assert [] == [path.name for path in tmp_path.rglob("ledger.db*")]
    assert [] == [path.name for path in tmp_path.rglob("admin.token")]


def test_an_unknown_architecture_fails_the_start(tmp_path: Path) -> None:
    """Exit code 1, naming tier, model and architecture."""
    model = tmp_path / "odd-model"
    shutil.copytree(MODELS / "demo-tactical", model)
    config = model / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", "OddForCausalLM"))
    said = refused(tmp_path, "--set", f"strategic.model={model}", code=1)
    (line,) = [line for line in said.splitlines() if "OddForCausalLM" in line]
    assert "strategic" in line
    assert "odd-model" in line


def test_weights_that_are_cut_off_fail_the_start(tmp_path: Path) -> None:
    """A half-copied checkpoint is no reason to serve garbage: exit code 1 with its name."""
    model = tmp_path / "half-model"
    shutil.copytree(MODELS / "demo-tactical", model)
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    said = refused(tmp_path, "--set", f"tactical.model={model}", code=1)
    assert "half-model" in said
    assert "model.safetensors" in said


def test_cuda_that_is_not_there_fails_the_start(tmp_path: Path) -> None:
    """It is never a quiet run on the CPU, nor on another device."""
    said = refused(tmp_path, "--device", "cuda:63", code=1)
    assert "cuda:63 was asked for" in said


def test_auto_without_a_gpu_serves_from_the_cpu_and_says_so(tmp_path: Path) -> None:
    """In the log, in `status` and in the metric that an alert reads; never quietly."""
    without_gpus = functools.partial(launch, CUDA_VISIBLE_DEVICES="")
    daemon = DaemonProcess.start(tmp_path / "state", "--device", "auto", launch=without_gpus)
    try:
        with Client(daemon.address) as client:
            status = client.status()
        assert "cpu" == status.device
        assert "sees no CUDA device" in status.device_fallback
        page = urllib.request.urlopen(daemon.metrics_url, timeout=WAIT_S).read().decode()
        assert "sage_fed_device_fallback 1.0" in page
        assert 0 == daemon.stop(WAIT_S)
        assert "serving from the CPU" in daemon.log.read_text()
    finally:
        daemon.kill()


def test_books_that_do_not_balance_fail_the_start(start: Start, tmp_path: Path) -> None:
    """Exit code 1 in the words of the check, and the books stay as they are."""
    daemon = start(wait_for=())
    assert 0 == daemon.stop(WAIT_S)
    ledger = daemon.state_dir / "ledger.db"
    with apsw.Connection(str(ledger)) as db:
        db.execute("UPDATE account SET charged_uatp = charged_uatp + 1")
    db.close()
    (violation,) = check(ledger).violations
    said = refused(tmp_path, state_dir=daemon.state_dir, code=1)
    assert violation in said
    assert (violation,) == check(ledger).violations


def test_a_file_that_is_no_ledger_fails_the_start(tmp_path: Path) -> None:
    """Exit code 1, naming the file."""
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    (state_dir / "ledger.db").write_bytes(b"not a ledger, " * 1000)
    said = refused(tmp_path, state_dir=state_dir, code=1)
    assert "ledger.db is damaged" in said


def test_a_disk_that_takes_no_more_fails_the_start(start: Start) -> None:
    """Exit code 1 and one sentence that names the file, from whatever the start had to write."""
    daemon = start(wait_for=())
    assert 0 == daemon.stop(WAIT_S)
    # The kernel refuses to write behind 32 KiB, as a full disk would: SQLite's index of its log
    # fits, the log of many accounts does not.
    limited = ("sh", "-c", 'ulimit -f 64 && exec "$@"', "sh", sys.executable, "-m", "sage_fed.cli")
    accounts = [f"--set=accounts.account{number}.role=user" for number in range(20)]
    ended = subprocess.run(
        [*limited, *serve_arguments(daemon.state_dir, *accounts)],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert 1 == ended.returncode, ended.stderr
    assert "Traceback" not in ended.stderr
    ledger = daemon.state_dir / "ledger.db"
    assert f"error: the ledger {ledger} cannot be used: disk I/O error" in ended.stderr


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda ledger: ledger.unlink(), "there was one; restore it from a copy"),
        (lambda ledger: os.truncate(ledger, 0), "is empty or damaged; restore it from a copy"),
    ],
    ids=["gone", "empty"],
)
def test_books_that_are_lost_fail_the_start(
    start: Start, tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    """Exit code 1 and what to do; nobody gets a second first grant."""
    daemon = start(wait_for=())
    assert 0 == daemon.stop(WAIT_S)
    harm(daemon.state_dir / "ledger.db")
    assert words in refused(tmp_path, state_dir=daemon.state_dir, code=1)


def test_a_log_that_is_lost_after_a_kill_fails_the_start(start: Start, tmp_path: Path) -> None:
    """The books of a young daemon are nothing but the log: without it they would begin anew."""
    daemon = start(wait_for=())
    daemon.kill()
    (daemon.state_dir / "ledger.db-wal").unlink()
    said = refused(tmp_path, state_dir=daemon.state_dir, code=1)
    assert "ends at entry 0, but entry 1 had been acknowledged: its log ledger.db-wal" in said


def test_books_that_are_lost_under_a_daemon_stop_it(start: Start) -> None:
    """Jobs end UNAVAILABLE, the exit code is 1, and the log says which file, in one line."""
    daemon = start(*LONG)
    with Client(daemon.address) as client:
        (daemon.state_dir / "ledger.db").unlink()
        with pytest.raises((LedgerDown, TierUnavailable, CannotConnect)):
            client.generate("hello", tier=Tier.TACTICAL, max_new_tokens=4)
    assert 1 == daemon.process.wait(WAIT_S)
    said = daemon.log.read_text()
    assert "ledger.db was removed while the daemon had it open" in said
    assert "Traceback" not in said


def test_sigterm_during_the_start_is_a_clean_stop(start: Start) -> None:
    """Nobody has to wait for a model that is not wanted any more."""
    daemon = start(wait_for=())
    assert 0 == daemon.stop(WAIT_S)
    books(daemon)


def test_many_streams_drain_together(start: Start) -> None:
    """Every stream of a busy daemon gets its own ending and its own price."""
    daemon = start(*LONG, "--set", "drain_grace_s=0")
    endings: list[Finished | SageFedError] = []

    def run(tier: Tier) -> None:
        try:
            with Client(daemon.address) as client:
                _, events = begin(client, tier=tier)
                running.release()
                endings.append(ending(events))
        except SageFedError as error:
            endings.append(error)

    running = threading.Semaphore(0)
    threads = [threading.Thread(target=run, args=(tier,)) for tier in TIER_ROLES for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert running.acquire(timeout=WAIT_S)
    assert 0 == daemon.stop(WAIT_S)
    for thread in threads:
        thread.join(WAIT_S)
    finished = [end for end in endings if isinstance(end, Finished)]
    assert 16 == len(finished), endings
    charged = sum(end.price.charged_uatp for end in finished)
    # The last one to settle sees the balance without anybody's hold.
    assert 100_000 * UATP_PER_ATP - charged == max(end.balance_uatp for end in finished)
    books(daemon)
