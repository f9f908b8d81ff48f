"""What Prometheus itself says of the daemon's exposition."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from daemon_process import DaemonProcess
from surroundings import require_tool

from sage_fed.client import Client
from sage_fed.core import Tier

SERIES = (
    "sage_fed_requests_total",
    "sage_fed_time_to_first_token_seconds_count",
    "sage_fed_tokens_total",
    "sage_fed_atp_charged_total",
    "sage_fed_cost_ratio",
    "sage_fed_kv_cache_tokens",
    "sage_fed_tier_state",
)


def scrape(daemon: DaemonProcess) -> bytes:
    with urllib.request.urlopen(daemon.metrics_url, timeout=10) as response:
        body: bytes = response.read()
    return body


def test_promtool_finds_nothing_to_complain_about(demo_daemon: DaemonProcess) -> None:
    """`promtool check metrics` passes on the running daemon after real traffic."""
    promtool = require_tool("promtool")
    with Client(demo_daemon.address) as client:
        client.generate("What is 2 plus 3?", tier=Tier.TACTICAL, max_new_tokens=4)
    verdict = subprocess.run(
        [promtool, "check", "metrics"],
        input=scrape(demo_daemon),
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (0, b"") == (verdict.returncode, verdict.stdout + verdict.stderr)


def test_a_real_prometheus_scrapes_it(demo_daemon: DaemonProcess, tmp_path: Path) -> None:
    """A real Prometheus finds the target up and answers queries for our series."""
    prometheus = require_tool("prometheus")
    with Client(demo_daemon.address) as client:
        client.generate("What is 2 plus 3?", tier=Tier.STRATEGIC, max_new_tokens=4)
    target = urllib.parse.urlsplit(demo_daemon.metrics_url).netloc
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: sage-fed, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            prometheus,
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        missing = set(SERIES)
        # Prometheus scrapes on its own clock: ask again until it has, within the deadline.
        while missing and time.monotonic() < deadline:
            missing = {name for name in missing if not query(port, name)}
            time.sleep(0.2)
        assert set() == missing
        assert ["1"] == [sample["value"][1] for sample in query(port, "up")]
    finally:
        server.terminate()
        server.wait(30)


def query(port: int, expression: str) -> list[dict[str, Any]]:
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expression)}"
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            result: list[dict[str, Any]] = json.load(response)["data"]["result"]
            return result
    except OSError:
        return []
