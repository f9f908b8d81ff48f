"""`sage-fed top`: what two looks at the metrics say, a daemon that leaves and comes back."""

from __future__ import annotations

import io
import json
import ssl
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path

import pytest
import trustme
from daemon_process import DaemonProcess
from rich.console import Console

from sage_fed.cli.drawing import drawn, show_live
from sage_fed.cli.top import Between, Page, Watch, reading_of
from sage_fed.client import Client
from sage_fed.core import (
    TIER_ROLES,
    DraftOrigin,
    Mode,
    Price,
    Tier,
    TierLoad,
    TierState,
    TierStatus,
)
from sage_fed.errors import CannotConnect
from sage_fed.metrics import Metrics, PageAccess, Snapshot
from sage_fed.steps import StepKind, StepReport, VerifiedDrafts

WIDTH = 100


def histogram(*counts: int, name: str = "sage_fed_time_to_first_token_seconds") -> str:
    """A histogram of the tactical tier with bounds 0.1, 0.2 and infinity; counts accumulate."""
    bounds = ("0.1", "0.2", "+Inf")
    return "\n".join(
        f'{name}_bucket{{tier="tactical",le="{bound}"}} {count}'
        for bound, count in zip(bounds, counts, strict=True)
    )


def between(before: str, after: str, seconds: float = 2.0) -> Between:
    return Between(Page.read(before, 10.0), Page.read(after, 10.0 + seconds))


def test_a_rate_is_the_increase_over_the_time() -> None:
    """Counters are summed over the labels that were not asked for."""
    pages = between('x_total{a="1"} 5\nx_total{a="2"} 1\n', 'x_total{a="1"} 9\nx_total{a="2"} 5\n')

    assert 4.0 == pages.rate("x_total")
    assert 2.0 == pages.rate("x_total", a="1")
    assert pages.rate("y_total") is None


def test_a_daemon_that_restarted_counts_from_zero() -> None:
    """No rate is negative because a counter began anew."""
    pages = between(
        "process_start_time_seconds 1\nx_total 100\n", "process_start_time_seconds 2\nx_total 6\n"
    )
    assert 3.0 == pages.rate("x_total")


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.25, 0.05), (0.5, 0.1), (0.75, 0.15), (1.0, 0.2)],
)
def test_a_quantile_is_of_what_is_new(share: float, expected: float) -> None:
    """What was observed before the first look does not count; within a bucket it is linear."""
    pages = between(histogram(100, 100, 100), histogram(110, 120, 120))

    assert pages.quantile(
        share, "sage_fed_time_to_first_token_seconds", tier="tactical"
    ) == pytest.approx(expected)


def test_a_quantile_beyond_the_last_bound_is_that_bound() -> None:
    """The open bucket has no upper end to interpolate to."""
    pages = between(histogram(0, 0, 0), histogram(0, 0, 4))
    assert 0.2 == pages.quantile(0.5, "sage_fed_time_to_first_token_seconds", tier="tactical")


def test_without_observations_there_is_no_quantile() -> None:
    """An idle daemon shows nothing where it has nothing to say."""
    pages = between(histogram(3, 3, 3), histogram(3, 3, 3))
    assert pages.quantile(0.5, "sage_fed_time_to_first_token_seconds") is None
    assert pages.quantile(0.5, "never_seen") is None


def test_a_fresh_daemons_page_can_be_read_and_drawn() -> None:
    """Before any traffic every line is there, with dashes and zeros."""
    page = Metrics(version="1.2.3").exposition().decode()
    reading = reading_of(between(page, page))
    picture = plain(lambda console: console.print(drawn(reading, "host:1", width=WIDTH)))

    assert "1.2.3" in picture
    assert "not ready" in picture
    assert "first token" in picture
    assert "the ledger takes no entries" not in picture


def test_a_ledger_that_takes_nothing_is_in_the_heading() -> None:
    """Every job is refused then, whatever the tiers say."""
    metrics = Metrics(version="1.2.3")
    metrics.ledger_writable(writable=False)
    page = metrics.exposition().decode()
    reading = reading_of(between(page, page))
    picture = plain(lambda console: console.print(drawn(reading, "host:1", width=WIDTH)))

    assert "the ledger takes no entries" in " ".join(picture.split())


def test_the_event_loops_lag_and_its_part_of_a_core_are_shown() -> None:
    """Both from what the loop itself counts between two looks."""
    metrics = Metrics(version="1.2.3")
    before = metrics.exposition().decode()
    for _ in range(100):
        metrics._series.observe("event_loop_lag_seconds", 0.02)
    metrics._series.count("event_loop_cpu_seconds_total", 1.0)
    page = metrics.exposition().decode()
    reading = reading_of(between(before, page))
    picture = plain(lambda console: console.print(drawn(reading, "host:1", width=WIDTH)))
    assert (0.025, 0.5) == (pytest.approx(reading.loop_lag_p99_s, abs=0.001), reading.loop_share)
    (line,) = (line for line in picture.splitlines() if "event loop" in line)
    assert "24.9 ms" in line
    assert "50%" in line


def test_drafts_savings_and_cascades_are_shown() -> None:
    """How many of the drafted tokens are accepted, what that saved, and what cascades did."""
    metrics = Metrics(version="1.2.3")
    drafter, deep = DraftOrigin.DRAFTER, Tier.STRATEGIC
    load = TierLoad(deep, TierState.READY, speculating=2)
    metrics.watch(lambda: Snapshot(loads={deep: load}))
    for tier in TIER_ROLES:
        metrics.tier_changed(TierStatus(tier, TierState.READY))
    before = metrics.exposition().decode()
    metrics.step_done(
        StepReport(
            deep, StepKind.DECODE, 1, 0, 4, 4, 0.1,
            num_verify_tokens=16, verified=(VerifiedDrafts(drafter, 3, 16, num_drafts=4),),
        )
    )  # fmt: skip
    metrics.price_compared(Mode.SPECULATIVE, Price(2_000_000, 9_000_000, "card", 6_000_000))
    metrics._series.count("cascade_total", 2, "escalated")
    reading = reading_of(between(before, metrics.exposition().decode()))
    picture = plain(lambda console: console.print(drawn(reading, "host:1", width=WIDTH)))
    strategic = next(tier for tier in reading.tiers if tier.tier == "strategic")

    assert (0.75, 3.0, 2.0) == (
        strategic.accepted_share, strategic.accepted_per_draft, strategic.speculating,
    )  # fmt: skip
    assert 8.0 == strategic.output_tokens_per_s, "four of its own, and twelve accepted, in 2 s"
    for name, shown in (
        ("drafts accepted", "75%, 3.0 each"),
        ("saved by two tiers", "2.0 ATP/s"),
        ("cascades", "escalated 1.0/s"),
    ):
        (line,) = (line for line in picture.splitlines() if name in line)
        assert shown in line


def plain(draw: Callable[[Console], object]) -> str:
    output = io.StringIO()
    draw(Console(file=output, width=WIDTH))
    return output.getvalue()


class Story:
    """A daemon's metrics page at each look; an error is a daemon that is away."""

    def __init__(self, *pages: str | OSError) -> None:
        self._pages: Iterator[str | OSError] = iter(pages)
        self.waited_s: list[float] = []

    def read(self, _url: str) -> str:
        """The next look at the page."""
        page = next(self._pages, None)
        if page is None:
            raise KeyboardInterrupt
        if isinstance(page, OSError):
            raise page
        return page

    def watch(self) -> Watch:
        """Somebody who looks at it."""
        return Watch("host:1", read=self.read, wait=self.waited_s.append)


def test_it_tells_that_the_daemon_is_away_and_finds_it_again() -> None:
    """In the live view its last figures stay, and fresh ones come once it answers again."""
    page = Metrics(version="1.2.3").exposition().decode()
    newer = page.replace("1.2.3", "1.2.4")
    gone = ConnectionRefusedError(111, "Connection refused")
    story = Story(page, page, gone, gone, newer, newer)
    console = Console(file=io.StringIO(), force_terminal=True, width=WIDTH, height=40)

    with pytest.raises(KeyboardInterrupt):
        show_live(console, story.watch(), 2.0)

    output = console.file
    assert isinstance(output, io.StringIO)
    seen = output.getvalue()
    lost, found = seen.index("no answer from host:1: connection refused"), seen.index("1.2.4")
    assert seen.index("1.2.3") < lost < found
    assert 2 == seen.count("no answer from")
    assert "1.2.3" in seen[lost:found]


def test_a_single_reading_of_nobody_is_an_error() -> None:
    """A daemon that is away, or leaves between the two looks, cannot be read once."""
    page = Metrics().exposition().decode()
    gone = ConnectionRefusedError(111, "Connection refused")
    for story in (Story(gone), Story(page, gone)):
        with pytest.raises(CannotConnect, match="no metrics at host:1: connection refused"):
            story.watch().one_reading(1.0)


def run_top(daemon_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    address = urllib.parse.urlsplit(daemon_url).netloc
    return subprocess.run(
        [sys.executable, "-m", "sage_fed.cli", "top", "--metrics", address, *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_once_is_one_reading_of_the_daemon(demo_daemon: DaemonProcess) -> None:
    """Plain text, no control codes, both tiers ready."""
    with Client(demo_daemon.address) as client:
        client.generate("What is 2 plus 3?", tier=Tier.TACTICAL, max_new_tokens=4)
    done = run_top(demo_daemon.metrics_url, "--once", "--interval", "0.2")

    assert (0, "") == (done.returncode, done.stderr)
    assert "\x1b" not in done.stdout
    assert "tactical  ready" in done.stdout
    assert "strategic  ready" in done.stdout


def test_a_pipe_gets_one_reading_without_asking(demo_daemon: DaemonProcess) -> None:
    """Without a terminal nothing is drawn over and over."""
    done = run_top(demo_daemon.metrics_url, "--interval", "0.2")
    assert 0 == done.returncode
    assert 1 == done.stdout.count("sage-fed ")


def test_json_has_what_the_picture_has(demo_daemon: DaemonProcess) -> None:
    """One object with both tiers; what there is nothing to say about is null."""
    done = run_top(demo_daemon.metrics_url, "--once", "--json", "--interval", "0.2")
    reading = json.loads(done.stdout)

    assert ["tactical", "strategic"] == [tier["tier"] for tier in reading["tiers"]]
    assert ["ready", "ready"] == [tier["state"] for tier in reading["tiers"]]
    assert reading["cost_ratio_card"] == pytest.approx(6.59)
    assert reading["gpu_power_watts"] is None


def test_json_goes_on_until_its_reader_leaves(demo_daemon: DaemonProcess) -> None:
    """Without --once there is a line for each interval, and a reader that leaves ends it."""
    address = urllib.parse.urlsplit(demo_daemon.metrics_url).netloc
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "sage_fed.cli", "top", "--json"),
            *("--metrics", address, "--interval", "0.2"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.stdout.close()
        assert 141 == process.wait(30)

    assert [2, 2] == [len(line["tiers"]) for line in lines]


def test_it_looks_where_a_token_and_a_certificate_are_asked_for(tmp_path: Path) -> None:
    """Beyond this machine the page takes a monitor's token, over TLS."""
    authority = trustme.CA()
    ca, bearer = tmp_path / "ca.pem", tmp_path / "token"
    authority.cert_pem.write_to_path(str(ca))
    bearer.write_text("monitors-token\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    def admit(headers: Sequence[str]) -> HTTPStatus:
        return HTTPStatus.OK if headers == ["Bearer monitors-token"] else HTTPStatus.UNAUTHORIZED

    access = PageAccess(admit, lambda: context)
    with Metrics(version="1.2.3").serve("127.0.0.1", 0, access) as server:
        url = f"https://127.0.0.1:{server.port}/metrics"
        arguments = ("--once", "--interval", "0.2", "--metrics", url, "--tls-ca", str(ca))
        let_in = run_top("http://unused", *arguments, "--token-file", str(bearer))
        refused = run_top("http://unused", *arguments)

    assert 0 == let_in.returncode, let_in.stderr
    assert "1.2.3" in let_in.stdout
    assert 1 == refused.returncode
    assert "wants the token of a monitor" in refused.stderr
    assert "--token" in refused.stderr


def test_nobody_there_is_exit_code_4() -> None:
    """One line says who did not answer and what to do."""
    done = run_top("http://127.0.0.1:1/metrics", "--once")

    assert 4 == done.returncode
    assert "" == done.stdout
    assert "no metrics at 127.0.0.1:1: connection refused" in done.stderr
    assert "Traceback" not in done.stderr
