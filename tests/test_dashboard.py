"""The dashboard and the rules on a real Prometheus, over a real daemon that had real traffic."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import yaml
from daemon_process import DaemonProcess
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from real_prometheus import DEPLOY, Prometheus, Traffic, as_asked, panels, run_prometheus
from surroundings import require_tool

from sage_fed.v1 import inference_pb2, inference_pb2_grpc, types_pb2

DASHBOARD = DEPLOY / "grafana" / "dashboards" / "sage-fed.json"
RULES = DEPLOY / "prometheus" / "rules"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"

WITHOUT_POINTS = {
    "GPU power": "the demo daemon serves on the CPU, whose power only root can read",
    "Energy of an output token": "as above: there is no energy to divide",
}
"""Panels that stay empty here, and why; each of them has to."""

SCRAPES = 14
"""So many see traffic: rates need several, and recorded rules one more."""

STRATEGIC = 'sum(rate(sage_fed_decode_seconds_count{tier="strategic"}[5s]))'
SEEN = (
    'sum(sage_fed_queue_seconds_count{tier="strategic"}) > 10',
    f"count_over_time(({STRATEGIC} > 0)[1m:1s]) > 3",
    'sum(sage_fed_speculative_tokens_total{outcome="accepted"}) > 0',
    "sum(sage_fed_cascade_total) > 3",
    "count_over_time(sage_fed:cost_ratio_drift:ratio[1m]) > 1",
)
"""What the panels of rare events need to have happened, besides."""


@dataclass(frozen=True)
class Watched:
    """A Prometheus that has watched a daemon at work, and when."""

    prometheus: Prometheus
    daemon: DaemonProcess
    traffic: Traffic
    start_s: float
    end_s: float

    def points(self, expression: str) -> int:
        """How many numbers an expression has had meanwhile."""
        found = self.prometheus.series(as_asked(expression), self.start_s, self.end_s)
        return sum(len(one["values"]) for one in found)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    daemon = DaemonProcess.start(
        folder / "state",
        *("--set", "metrics.per_account_balance=true"),
        *("--set", "budget.initial_atp=1000000", "--set", "budget.capacity_atp=1000000"),
    )
    start_s = time.time()
    try:
        with run_prometheus(
            require_tool("prometheus"), daemon.metrics_url, folder / "prometheus"
        ) as prometheus:
            traffic = Traffic(daemon.address)
            # The tactical tier alone first: what it is without contention has to show, too.
            traffic.strategic = False
            with traffic.running(clients=2):
                wait_for_scrapes(prometheus, SCRAPES // 2)
            ask_traced(daemon.address)
            # Before another job takes its place in the bucket.
            wait_for_scrapes(prometheus, num_scrapes(prometheus) + 2)
            traffic.strategic = True
            with traffic.running(clients=6):
                wait_for_scrapes(prometheus, num_scrapes(prometheus) + SCRAPES // 2)
                for expression in SEEN:
                    wait_for(prometheus, expression)
            yield Watched(prometheus, daemon, traffic, start_s, time.time())
    finally:
        code = daemon.stop()
    assert 0 == code, daemon.log.read_text()


def wait_for(prometheus: Prometheus, expression: str) -> None:
    """Until an expression has a value: on a busy machine jobs take as long as they take."""
    deadline = time.monotonic() + 120
    while not prometheus.query(expression):
        assert time.monotonic() < deadline, f"there is still no {expression}"
        time.sleep(0.2)


def wait_for_scrapes(prometheus: Prometheus, scrapes: int) -> None:
    """Until Prometheus has seen the daemon so often: it scrapes on its own clock."""
    deadline = time.monotonic() + 60
    while num_scrapes(prometheus) < scrapes:
        assert time.monotonic() < deadline, "Prometheus does not scrape"
        time.sleep(0.2)


def num_scrapes(prometheus: Prometheus) -> int:
    """How often Prometheus has seen the daemon."""
    counts = prometheus.query('count_over_time(up{job="sage-fed"}[10m])')
    return int(counts[0]["value"][1]) if counts else 0


def ask_traced(address: str) -> None:
    """One job of a caller that has a trace."""
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        job = types_pb2.JobSpec(text="What is 1 plus 2?", tier=types_pb2.TIER_TACTICAL)
        stub.Generate(
            inference_pb2.GenerateRequest(job=job),
            metadata=(("traceparent", f"00-{TRACE_ID}-00f067aa0ba902b7-00"),),
            timeout=30,
        )


QUERIES = [
    pytest.param(panel["title"], target["expr"], id=f"{panel['title']}-{target['refId']}")
    for panel in panels()
    for target in panel["targets"]
]


@pytest.mark.parametrize(("title", "expression"), QUERIES)
def test_a_panel_has_points(watched: Watched, title: str, expression: str) -> None:
    """Every query of the dashboard finds numbers after mixed traffic, but for the named panels."""
    if title in WITHOUT_POINTS:
        assert 0 == watched.points(expression), f"{title} is not to be excused any more"
    else:
        assert watched.points(expression) > 0, as_asked(expression)


def test_a_renamed_metric_has_no_points(watched: Watched) -> None:
    """What the test above would see: a name that the daemon does not export finds nothing."""
    assert watched.points("sum(sage_fed_requests_running)") > 0
    assert 0 == watched.points("sum(sage_fed_requests_running_renamed)")


def test_every_metric_that_we_ask_for_exists(watched: Watched) -> None:
    """No rule, alert or panel names a metric, or a label value, that the daemon does not have."""
    known = set(watched.prometheus.get("label/__name__/values"))
    recorded = {
        rule["record"]
        for group in yaml.safe_load((RULES / "recording.yml").read_text())["groups"]
        for rule in group["rules"]
    }
    asked = set(re.findall(r"\bsage_fed_[a-z_]+", everything_asked()))
    absent = {"sage_fed_gpu_power_watts", "sage_fed_energy_joules_total"}

    assert absent == asked - known
    assert recorded <= known
    assert set(re.findall(r"\bsage_fed:[a-z0-9_:]+", everything_asked())) <= recorded


def everything_asked() -> str:
    """All expressions of the rules and the dashboard."""
    texts = [path.read_text() for path in RULES.glob("*.yml")]
    return "\n".join([*texts, *(target["expr"] for p in panels() for target in p["targets"])])


@pytest.mark.parametrize(
    ("label", "metric"),
    [
        ("code", "sage_fed_requests_total"),
        ("outcome", "sage_fed_(requests|speculative_tokens)_total"),
        ("origin", "sage_fed_speculative_tokens_total"),
        ("state", "sage_fed_tier_state|sage_fed_kv_cache_tokens"),
        ("source", "sage_fed_cost_ratio"),
        ("contended", "sage_fed_inter_token_latency_seconds_count"),
        ("le", "sage_fed_(time_to_first_token|ledger_commit)_seconds_bucket"),
    ],
)
def test_every_label_value_that_we_ask_for_exists(
    watched: Watched, label: str, metric: str
) -> None:
    """A selector on a value that no series has would find nothing, and alert nobody."""
    # Whatever there was in the last minutes: on a busy machine the newest scrape may have failed.
    series = f'last_over_time({{__name__=~"{metric}"}}[10m])'
    found = watched.prometheus.query(f"group by ({label}) ({series})")
    known = {one["metric"].get(label, "") for one in found}
    selectors = re.findall(rf'\b{label}=~?"([^"]*)"', everything_asked())

    asked = {value for selector in selectors for value in selector.split("|")}
    assert asked
    assert asked <= known


def test_every_rule_can_be_evaluated(watched: Watched) -> None:
    """Prometheus evaluates all recording and alert rules on real series without an error."""
    groups = watched.prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]

    assert len(rules) >= 30
    assert [] == [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] == "err"]


def test_a_healthy_daemon_fires_nothing(watched: Watched) -> None:
    """Mixed traffic, refusals and cancelled jobs included, is no reason to wake anybody."""
    firing = watched.prometheus.query('ALERTS{alertstate="firing", severity="page"}')
    assert [] == [one["metric"] for one in firing]


def test_a_bucket_leads_to_its_job(watched: Watched) -> None:
    """The exemplars of the first token's buckets are jobs that our clients know."""
    found = watched.prometheus.get(
        "query_exemplars",
        query="sage_fed_time_to_first_token_seconds_bucket",
        start=str(watched.start_s),
        end=str(watched.end_s),
    )
    exemplars = [one["labels"] for series in found for one in series["exemplars"]]

    assert watched.traffic.job_ids & {labels["job_id"] for labels in exemplars}
    assert TRACE_ID in {labels.get("trace_id") for labels in exemplars}


def test_the_committed_dashboard_is_what_the_script_writes() -> None:
    """Nobody edits the JSON by hand."""
    written = subprocess.run(
        [sys.executable, str(DEPLOY / "grafana" / "dashboard.py")],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert DASHBOARD.read_text() == written


def test_the_dashboard_is_of_grafanas_schema() -> None:
    """Read by the SDK's own types and written again it is the same."""
    body = json.loads(DASHBOARD.read_text())
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(body)))

    assert body == again


def test_a_panel_says_what_it_shows() -> None:
    """Every panel has a description, and an id of its own."""
    shown = panels()
    assert [] == [panel["title"] for panel in shown if not panel.get("description")]
    assert len(shown) == len({panel["id"] for panel in shown})


def test_excused_panels_exist() -> None:
    """An excuse for a panel that is gone is a leftover."""
    assert WITHOUT_POINTS.keys() <= {panel["title"] for panel in panels()}


def test_grafana_finds_what_we_provision() -> None:
    """The provisioning names the folder and the pace that the other files have."""
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    provider = yaml.safe_load((provisioning / "dashboards" / "sage-fed.yml").read_text())
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    scraping = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    mounted = {
        Path(entry.split(":")[1])
        for entry in compose["services"]["grafana"]["volumes"]
        if entry.startswith("./")
    }

    assert Path(provider["providers"][0]["options"]["path"]) in mounted
    interval = source["datasources"][0]["jsonData"]["timeInterval"]
    assert scraping["global"]["scrape_interval"] == interval
