"""One caller attacks: how many jobs do the others still get done, and how soon?

Each attack has a real daemon to itself, three processes and rounds of three phases of the same
length: quiet; the attack; and a control, in which the attacker's process burns the CPU that it
burned attacking, and does not call. The last is what tells a daemon that suffers from a machine
that is short of cores. The victims are another account's: four jobs at a time, one of them on a
connection of its own each time, and two scrapes of the metrics a second.

An attack is withstood where the victims get at least half of the control's jobs done, at no more
than five times its latency (99th percentile), with at least half of its scrapes, and where the
daemon takes no more than 256 MiB above the control's peak.

One attack is work that its account pays for, done in the costliest way. The device is shared by
those who pay, so it has a fourth phase, in which the same work is done plainly, and a second
verdict beside that.

What the attackers do is in `attackers.py`. `--tree` measures another checkout of this project, with
its own environment, by the same attackers and victims; its figures stand beside ours in the file.

Run: python bench/attacks.py [--only NAME ...] [--seconds 5] [--rounds 2] [--further]
     [--tree PATH]. Nine minutes.
Exit code 1 where one was not withstood. Writes bench/results/attacks.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import math
import multiprocessing
import re
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from random import Random
from typing import Any

import psutil
import report
from attackers import ATTACKS, FURTHER, Attack, Attacker, Target
from behaviours import Client, Tally
from driven_daemon import START_S, settle, wait_ready
from grpc.aio import AioRpcError
from rich.console import Console
from rich.table import Table

from sage_fed.auth import digest_of, new_token
from sage_fed.cli import top
from sage_fed.cli.demo import DemoDaemon, Endpoint
from sage_fed.cli.options import ledger_file
from sage_fed.errors import SageFedError
from sage_fed.v1 import types_pb2 as types

ALL = ATTACKS | FURTHER
HERE = Path(__file__).parent.parent
PHASES = ("quiet", "attack", "control")
"""Of every attack; one whose work is paid for has a fourth, `paid`, with that work alone."""

LEAST_JOBS, MOST_P99, LEAST_SCRAPES = 0.5, 5.0, 0.5
"""Of the control's."""

MOST_RSS_BYTES = 256 * 2**20
"""Above the control's peak."""

DESCRIPTORS = 1024
"""What a shell or systemd lets the daemon begin with."""

WORKERS = 4
SCRAPES_PER_S = 2.0
SCRAPE_S = 2.0
PAUSE_S = 0.05
"""Of a victim that was refused."""

RECOVER_S = 20.0
LONG_PROMPT = " backwards" * 500
"""5,000 characters that are 500 tokens: it is encoded like the attack's texts, and can be run."""

FLAGS = (
    "--set", "budget.initial_atp=900000000", "--set", "budget.capacity_atp=1000000000",
    "--set", "auth.anonymous_account=", "--set", "limits.max_new_tokens=1000",
    "--set", "limits.max_prompt_chars=200000", "--log-level", "warning",
)  # fmt: skip
_LAG = re.compile(r"sage_fed_\w*loop\w*_bucket")


@dataclass
class Seen:
    """What the victims saw in one phase, and what the daemon took meanwhile."""

    seconds: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)
    job_s: list[float] = field(default_factory=list)
    """Of those that were answered, and of those that were still waiting at the end."""

    connects: Counter[str] = field(default_factory=Counter)
    """How the jobs ended that had a connection of their own."""

    scrapes: Counter[str] = field(default_factory=Counter)
    rss_bytes: int = 0
    num_fds: int = 0
    daemon_cores: float = 0.0
    rows: Counter[str] = field(default_factory=Counter)
    ledger_bytes: int = 0
    lag: Counter[float] = field(default_factory=Counter)
    """Turns of the event loop by the bucket of their lag."""

    def add(self, other: Seen) -> None:
        """Take another round of the same phase into account."""
        self.seconds += other.seconds
        self.job_s += other.job_s
        for mine, theirs in (
            (self.codes, other.codes), (self.connects, other.connects),
            (self.scrapes, other.scrapes), (self.rows, other.rows),
        ):  # fmt: skip
            mine.update(theirs)
        self.lag.update(other.lag)
        self.rss_bytes = max(self.rss_bytes, other.rss_bytes)
        self.num_fds = max(self.num_fds, other.num_fds)
        self.daemon_cores = max(self.daemon_cores, other.daemon_cores)
        self.ledger_bytes += other.ledger_bytes

    def figures(self) -> dict[str, Any]:
        """For the result."""
        return {
            "jobs_per_s": round(self.codes["OK"] / max(self.seconds, 1e-9), 2),
            "job_seconds": report.percentiles(self.job_s),
            "codes": dict(sorted(self.codes.items())),
            "own_connection_codes": dict(sorted(self.connects.items())),
            "scrapes": dict(sorted(self.scrapes.items())),
            "rss_peak_bytes": self.rss_bytes,
            "fds_peak": self.num_fds,
            "daemon_cores": round(self.daemon_cores, 2),
            "ledger_rows": dict(sorted(self.rows.items())),
            "ledger_bytes": self.ledger_bytes,
            "loop_lag_p99_s": _lag_p99(self.lag),
        }


def _lag_p99(lag: Mapping[float, float]) -> float | None:
    """The bucket that 99 of 100 turns are within; None where the daemon does not tell."""
    total, sum_ = sum(lag.values()), 0.0
    for bound in sorted(lag):
        sum_ += lag[bound]
        if total and sum_ >= 0.99 * total:
            return bound
    return None


class Victims:
    """The victims' process: four jobs at a time while it is told to."""

    def __init__(self, address: str, metrics_url: str, token: str, text: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(address, metrics_url, token, text, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def measure(self, seconds: float) -> Seen:
        """Ask for so long, and say what came of it."""
        self._pipe.send(seconds)
        if not self._pipe.poll(seconds + 60.0):
            raise RuntimeError("the victims say nothing")
        seen: Seen = self._pipe.recv()
        return seen

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join(10.0)


def _serve(address: str, metrics_url: str, token: str, text: str, pipe: Pipe) -> None:
    asyncio.run(_ask_when_told(address, metrics_url, token, text, pipe))


async def _ask_when_told(address: str, metrics_url: str, token: str, text: str, pipe: Pipe) -> None:
    clients = [Client(address, Random(n), Tally(), token) for n in range(WORKERS)]
    sampling = types.SamplingParams(max_new_tokens=8, ignore_eos=True)
    job = types.JobSpec(text=text, tier=types.TIER_TACTICAL, sampling=sampling)
    while True:
        seconds = await asyncio.to_thread(pipe.recv)
        seen = Seen(seconds)
        until = time.monotonic() + seconds
        asking = [_ask(client, job, seen, until, fresh=n == 0) for n, client in enumerate(clients)]
        await asyncio.gather(*asking, _scrape(metrics_url, seen, until))
        pipe.send(seen)


async def _ask(
    client: Client, job: types.JobSpec, seen: Seen, until: float, *, fresh: bool
) -> None:
    """One job after the other; a fresh client connects anew for each."""
    while (begun := time.monotonic()) < until:
        code = "OK"
        call = client.stream(job)
        try:
            async with asyncio.timeout(until - begun):
                async for _ in call:
                    pass
        except TimeoutError:
            call.cancel()
            code = "WAITING"
        except AioRpcError as error:
            code = error.code().name
            await asyncio.sleep(PAUSE_S)
        if code in {"OK", "WAITING"}:
            # One that still waits takes so long at least.
            seen.job_s.append(time.monotonic() - begun)
        seen.codes[code] += 1
        if fresh:
            seen.connects[code] += 1
            await client.drop()


async def _scrape(url: str, seen: Seen, until: float) -> None:
    """Scrapes at a steady pace, as Prometheus makes them."""

    def fetch() -> str:
        try:
            with urllib.request.urlopen(url, timeout=SCRAPE_S) as reply:
                reply.read()
        except (OSError, http.client.HTTPException):
            return "FAILED"
        return "OK"

    while time.monotonic() < until:
        due = time.monotonic() + 1 / SCRAPES_PER_S
        seen.scrapes[await asyncio.to_thread(fetch)] += 1
        await asyncio.sleep(max(due - time.monotonic(), 0.0))


class Scene:
    """A daemon, its victims and its attacker."""

    def __init__(self, name: str, daemon: DemoDaemon, endpoint: Endpoint, tokens: Tokens) -> None:
        self._process = psutil.Process(daemon.pid)
        self._ledger = ledger_file(daemon.state_dir)
        self._metrics_url = endpoint.metrics_url
        text = LONG_PROMPT if name == "count-flood" else "count"
        self._victims = Victims(endpoint.listen, endpoint.metrics_url, tokens.victim, text)
        self._attacker: Attacker | None = None
        target = Target(_address(endpoint.listen), _address(endpoint.metrics), tokens.attacker)
        try:
            self._attacker = Attacker(name, target)
            self._victims.measure(1.0)  # warm
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the attacker and the victims."""
        self._victims.close()
        if self._attacker is not None:
            self._attacker.close()

    def quiet(self, seconds: float) -> Seen:
        """The victims alone."""
        with self._watched() as seen:
            seen.add(self._victims.measure(seconds))
        return seen

    def attack(self, seconds: float, *, paid: bool = False) -> tuple[Seen, dict[str, int], float]:
        """The victims beside the attack; how its calls ended, and the cores that it burned."""
        assert self._attacker is not None
        with self._watched() as seen:
            self._attacker.begin(seconds, paid=paid)
            seen.add(self._victims.measure(seconds))
            endings, cores = self._attacker.end()
        return seen, endings, cores

    def control(self, seconds: float, cores: float) -> tuple[Seen, float]:
        """The victims beside an attacker that burns its CPU and does not call; what it burned."""
        assert self._attacker is not None
        with self._watched() as seen:
            self._attacker.burn(seconds, cores)
            seen.add(self._victims.measure(seconds))
            burned = self._attacker.burned()
        return seen, burned

    def recover(self, usual_s: float) -> float:
        """Seconds until the victims' jobs take at most twice as long as usual."""
        began_s = time.monotonic()
        while (elapsed_s := time.monotonic() - began_s) < RECOVER_S:
            seen = self._victims.measure(0.5)
            if seen.codes["OK"] and _median(seen.job_s) <= 2 * usual_s:
                break
        return elapsed_s

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Seen]:
        """What the daemon takes meanwhile."""
        seen, over = Seen(), threading.Event()

        def watch() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                while not over.wait(0.05):
                    seen.rss_bytes = max(seen.rss_bytes, self._process.memory_info().rss)
                    seen.num_fds = max(seen.num_fds, self._process.num_fds())

        rows, size, lag = _rows(self._ledger), _size(self._ledger), self._lag()
        busy_s, began_s = _busy_s(self._process), time.monotonic()
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield seen
        finally:
            over.set()
            watcher.join()
        elapsed_s = time.monotonic() - began_s
        seen.daemon_cores = (_busy_s(self._process) - busy_s) / elapsed_s
        seen.rows = _rows(self._ledger) - rows
        seen.ledger_bytes = _size(self._ledger) - size
        seen.lag = self._lag() - lag

    def _lag(self) -> Counter[float]:
        """The event loop's turns by the bucket of their lag; none where no page is to be had."""
        lag: Counter[float] = Counter()
        with contextlib.suppress(OSError, http.client.HTTPException):
            with urllib.request.urlopen(self._metrics_url, timeout=SCRAPE_S) as reply:
                page = reply.read().decode()
            below = 0.0
            shown = top.Page.read(page, 0.0).series
            for sample in (s for name in shown if _LAG.fullmatch(name) for s in shown[name]):
                # Buckets are cumulative.
                lag[float(sample.labels["le"])] = sample.value - below
                below = sample.value
        return lag


@dataclass(frozen=True)
class Tokens:
    """Two accounts' bearer tokens."""

    attacker: str = field(default_factory=new_token)
    victim: str = field(default_factory=new_token)

    def write(self, path: Path) -> None:
        """As the daemon reads them."""
        path.write_text(
            "".join(
                f'[[token]]\nsha256 = "{digest_of(token).hex()}"\naccount = "{name}"\n'
                for name, token in (("attacker", self.attacker), ("victim", self.victim))
            )
        )
        path.chmod(0o600)


@dataclass(frozen=True)
class Plan:
    """Which attacks, on which tree, for how long."""

    names: Sequence[str] = tuple(ATTACKS)
    tree: Path = HERE
    seconds: float = 5.0
    rounds: int = 2

    @property
    def label(self) -> str:
        """What the tree is called in the result."""
        return "here" if self.tree == HERE else self.tree.name

    @property
    def interpreter(self) -> str:
        """The tree's own."""
        return sys.executable if self.tree == HERE else str(self.tree / ".venv/bin/python")


def measure(name: str, plan: Plan) -> dict[str, Any]:
    """One attack, with a daemon of its own."""
    tokens = Tokens()
    with tempfile.TemporaryDirectory(prefix="sage-fed-attacks-") as folder:
        state_dir = Path(folder)
        tokens.write(state_dir / "tokens.toml")
        with _few_descriptors():
            daemon = DemoDaemon(state_dir, *FLAGS, interpreter=plan.interpreter)
        violations: list[str] = []
        try:
            endpoint = daemon.endpoint(START_S)
            asyncio.run(wait_ready(endpoint))
            scene = Scene(name, daemon, endpoint, tokens)
            try:
                found = _rounds(scene, plan, ALL[name])
            finally:
                scene.close()
            daemon.check()
            violations += asyncio.run(settle(endpoint, state_dir))
        finally:
            code = daemon.stop(60.0)
        if code != 0:
            violations.append(f"the daemon left with {code}: {daemon.log()}")
    return {**found, "violations": violations}


def _rounds(scene: Scene, plan: Plan, attack: Attack) -> dict[str, Any]:
    phases = {phase: Seen() for phase in PHASES}
    if attack.paid is not None:
        phases["paid"] = Seen()
    endings: Counter[str] = Counter()
    cores: list[float] = []
    control_cores: list[float] = []
    recovered: list[float] = []
    rss_bytes = 0
    for number in range(plan.rounds):
        quiet = scene.quiet(plan.seconds)
        phases["quiet"].add(quiet)
        # Later ones may have what an attack left.
        rss_bytes = rss_bytes if number else quiet.rss_bytes
        attacked, ended, burned = scene.attack(plan.seconds)
        phases["attack"].add(attacked)
        endings.update(ended)
        cores.append(burned)
        recovered.append(scene.recover(_median(phases["quiet"].job_s)))
        control, burned = scene.control(plan.seconds, burned)
        phases["control"].add(control)
        control_cores.append(burned)
        if attack.paid is not None:
            phases["paid"].add(scene.attack(plan.seconds, paid=True)[0])
            scene.recover(_median(phases["quiet"].job_s))
    beside_paid = (
        {"beside_paid": judge(phases["attack"], phases["paid"], rss_bytes)}
        if attack.paid is not None
        else {}
    )
    return {
        "phases": {phase: seen.figures() for phase, seen in phases.items()},
        "attacker": {
            "endings": dict(endings),
            "cores": round(statistics.mean(cores), 2),
            "control_cores": round(statistics.mean(control_cores), 2),
        },
        "recovered_seconds": round(max(recovered), 2),
        "judged": judge(phases["attack"], phases["control"], rss_bytes),
        **beside_paid,
    }


def judge(attack: Seen, control: Seen, rss_bytes: int) -> dict[str, Any]:
    """The attack's figures beside the control's, and which of them are too bad.

    `rss_bytes` is the daemon's peak before the first attack.
    """
    jobs = _share(attack.codes["OK"], control.codes["OK"])
    connects = _share(attack.connects["OK"], control.connects["OK"])
    p99 = _share(_p99(attack.job_s), _p99(control.job_s))
    scrapes = _share(attack.scrapes["OK"], control.scrapes["OK"])
    grown = attack.rss_bytes - rss_bytes
    return {
        "jobs_share": _rounded(jobs),
        "own_connection_jobs_share": _rounded(connects),
        "p99_times": _rounded(p99),
        "scrapes_share": _rounded(scrapes),
        "rss_growth_bytes": grown,
        "failed": [
            name
            for name, bad in (
                ("jobs", not jobs >= LEAST_JOBS),
                ("connections", not connects >= LEAST_JOBS),
                ("p99", not p99 <= MOST_P99),
                ("scrapes", not scrapes >= LEAST_SCRAPES),
                ("memory", grown > MOST_RSS_BYTES),
            )
            if bad
        ],
    }


def _share(part: float, whole: float) -> float:
    """Nothing of nothing is not a number, and fails whatever is asked of it."""
    return part / whole if whole else math.nan


def _rounded(share: float) -> float | None:
    """For JSON, which has no name for what is not a number."""
    return round(share, 3) if math.isfinite(share) else None


def _p99(values: list[float]) -> float:
    return float(report.percentiles(values).get("p99", math.inf))


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.inf


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return host, int(port)


def _busy_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _rows(ledger: Path) -> Counter[str]:
    """The rows of every table, read beside the daemon."""
    with contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as books:
        tables = books.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        return Counter(
            {
                name: books.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
                for (name,) in tables
            }
        )


def _size(ledger: Path) -> int:
    return sum(path.stat().st_size for path in ledger.parent.glob(f"{ledger.name}*"))


@contextlib.contextmanager
def _few_descriptors() -> Iterator[None]:
    """What is begun in here may open as many files as from a shell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def commit(tree: Path) -> str:
    """The tree's commit."""
    described = subprocess.run(
        ["git", "-C", str(tree), "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip()


def main(plan: Plan, output: Path | None) -> int:
    """Attack, judge, report; the exit code."""
    path = output or report.RESULTS / "attacks.json"
    trees = json.loads(path.read_text())["trees"] if path.exists() else {}
    ours = trees.setdefault(plan.label, {})
    console = Console(stderr=True, width=160)
    made = commit(plan.tree)
    for name in plan.names:
        try:
            found = measure(name, plan)
        except (SageFedError, RuntimeError, OSError) as error:
            found = {"judged": {"failed": ["daemon"]}, "error": str(error)}
        ours[name] = {"commit": made, "seconds": plan.seconds, "rounds": plan.rounds, **found}
        console.print(f"{name}: {found['judged']}", highlight=False, markup=False)
    console.print(table(trees))
    # An attack that was judged by other rules is not of this result.
    report.write("attacks", {"trees": trees}, path)
    bad = [name for name in plan.names if ours[name]["judged"]["failed"]]
    return 1 if bad else 0


def table(trees: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every attack, tree by tree."""
    columns = (
        "tree", "jobs/s", "of control", "p99 ms", "scrapes lost", "RSS MiB", "fds", "rows/s",
        "lag ms", "cores", "too bad",
    )  # fmt: skip
    shown = Table("attack", *columns, title="others' jobs: quiet, control, attack")
    for name in ALL:
        for label, attacks in trees.items():
            if name in attacks:
                shown.add_row(name, label, *_cells(attacks[name]))
    return shown


def _cells(found: Mapping[str, Any]) -> Iterator[str]:
    """Figures of the quiet phase, the control and the attack."""
    if "error" in found:
        yield from ("",) * 9
        yield str(found["error"]).splitlines()[0]
        return
    quiet, attack, control = (found["phases"][phase] for phase in PHASES)
    paid = found["phases"].get("paid")
    in_turn, seconds = (quiet, control, attack), found["seconds"] * found["rounds"]
    yield _row(phase["jobs_per_s"] for phase in in_turn)
    yield f"{attack['jobs_per_s'] / max(control['jobs_per_s'], 1e-9):.0%}" + (
        f" ({attack['jobs_per_s'] / max(paid['jobs_per_s'], 1e-9):.0%} of paid)" if paid else ""
    )
    yield _row(phase["job_seconds"].get("p99", math.nan) * 1e3 for phase in in_turn)
    lost, all_ = attack["scrapes"].get("FAILED", 0), sum(attack["scrapes"].values())
    yield f"{lost} of {all_}"
    yield _row(phase["rss_peak_bytes"] / 2**20 for phase in in_turn)
    yield _row(phase["fds_peak"] for phase in in_turn)
    yield _row(sum(phase["ledger_rows"].values()) / seconds for phase in in_turn)
    yield _row((phase["loop_lag_p99_s"] or math.nan) * 1e3 for phase in in_turn)
    yield f"{found['attacker']['cores']:.2f}"
    yield ", ".join((*found["judged"]["failed"], *found["violations"])) or "-"


def _row(figures: Iterable[float]) -> str:
    return " ".join("-" if math.isnan(figure) else f"{figure:.0f}" for figure in figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ALL))
    parser.add_argument("--further", action="store_true", help="the attacks beyond the issue's")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of a phase")
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--tree", type=Path, default=HERE, help="another checkout, with its .venv")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    names = given.only or tuple(FURTHER if given.further else ATTACKS)
    plan = Plan(names, given.tree.absolute(), given.seconds, given.rounds)
    sys.exit(main(plan, given.output))
