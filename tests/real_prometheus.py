"""A real Prometheus over a real daemon, with the rules that we ship, and traffic of every kind.

For the tests of the dashboard and its rules, and for the picture of them in the README.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any, Unpack

import yaml

from sage_fed.client import Client, JobFields
from sage_fed.core import Finished, Mode, Started, Tier
from sage_fed.errors import SageFedError

DEPLOY = Path(__file__).parents[1] / "deploy"
START_DEADLINE_S = 30.0


def shipped_config(target: str, scrape_interval: str) -> dict[str, Any]:
    """Our own configuration of Prometheus, with another target and another pace."""
    folder = DEPLOY / "prometheus"
    config: dict[str, Any] = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] |= {
        "scrape_interval": scrape_interval,
        "scrape_timeout": scrape_interval,
        "evaluation_interval": scrape_interval,
    }
    config["rule_files"] = [str(folder / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    return config


@dataclass(frozen=True)
class Prometheus:
    """Answers queries over HTTP."""

    port: int

    def get(self, path: str, **parameters: str) -> Any:  # noqa: ANN401 - JSON
        """The data of an answer of the API."""
        query = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an expression is now."""
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def series(
        self, expression: str, start_s: float, end_s: float, step_s: float = 1.0
    ) -> list[dict[str, Any]]:
        """What an expression was: each series with its points (time, number), NaN left out."""
        found = self.get(
            "query_range",
            query=expression, start=str(start_s), end=str(end_s), step=str(step_s),
        )["result"]  # fmt: skip
        for one in found:
            one["values"] = [
                (at, float(text)) for at, text in one["values"] if not math.isnan(float(text))
            ]
        return [one for one in found if one["values"]]


@contextlib.contextmanager
def run_prometheus(
    binary: str, metrics_url: str, folder: Path, scrape_interval: str = "1s"
) -> Iterator[Prometheus]:
    """Run it as the shipped configuration says, until the context ends."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "prometheus.yml"
    target = urllib.parse.urlsplit(metrics_url).netloc
    config.write_text(yaml.safe_dump(shipped_config(target, scrape_interval)))
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=output,
            stderr=output,
        )
    prometheus = Prometheus(port)
    try:
        deadline = time.monotonic() + START_DEADLINE_S
        while not _scrapes(prometheus):
            assert process.poll() is None, f"Prometheus died:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"Prometheus hangs:\n{log.read_text()}"
            # It scrapes on its own clock, and tells nobody.
            time.sleep(0.1)
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)


def _scrapes(prometheus: Prometheus) -> bool:
    try:
        return [one["value"][1] for one in prometheus.query("up")] == ["1"]
    except OSError:
        return False


SHORT = ("What is 12 plus 30?", "What is 7 plus 5?", "Write WJQKX backwards.")
LONG = "What is the largest of " + ", ".join(str(n) for n in range(100, 148, 3)) + "?"


@dataclass
class Traffic:
    """Clients of every kind, in threads; `job_ids` are the jobs that finished."""

    address: str
    seed: int = 0
    job_ids: set[str] = field(default_factory=set)
    strategic: bool = True
    pause_s: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self, clients: int) -> Iterator[None]:
        """Keep so many clients busy while the context lasts."""
        self._stop.clear()
        threads = [
            threading.Thread(target=self._ask_on, args=(number,)) for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(60)

    def _ask_on(self, number: int) -> None:
        dice = random.Random(f"{self.seed}-{number}")
        with Client(self.address) as client:
            while not self._stop.wait(self.pause_s * dice.random()):
                with contextlib.suppress(SageFedError):
                    self._ask(client, dice)

    def _ask(self, client: Client, dice: random.Random) -> None:
        chance = dice.random()
        if not self.strategic or chance < 0.45:
            self._read(client, dice.choice(SHORT), tier=Tier.TACTICAL, max_new_tokens=24)
        elif chance < 0.65:
            # Half of them without drafts: the live cost ratio is of steps that have none.
            self._read(
                client, LONG, tier=Tier.STRATEGIC, max_new_tokens=dice.randint(16, 64),
                ignore_eos=True, mode=dice.choice((None, Mode.SINGLE)),
            )  # fmt: skip
        elif chance < 0.73:
            self._read(client, dice.choice(SHORT), complexity=dice.random())
        elif chance < 0.80:
            # Of these, some are sound and some have to be answered again.
            self._read(
                client, dice.choice(SHORT), mode=Mode.CASCADE, max_error=0.05, temperature=0.0
            )
        elif chance < 0.88:
            # Refused: it may not cost that little.
            self._read(client, LONG, tier=Tier.STRATEGIC, max_cost_uatp=1)
        elif chance < 0.94:
            # The reader leaves after its first event, and the job is cancelled.
            stream = client.stream(LONG, tier=Tier.STRATEGIC, max_new_tokens=256, ignore_eos=True)
            next(stream)
            stream.close()
        else:
            self._read(client, LONG, max_new_tokens=8)

    def _read(self, client: Client, prompt: str, **fields: Unpack[JobFields]) -> None:
        job_id = ""
        for event in client.stream(prompt, **fields):
            if isinstance(event, Started):
                job_id = event.job_id
            elif isinstance(event, Finished):
                self.job_ids.add(job_id)


def board() -> dict[str, Any]:
    """The committed dashboard."""
    path = DEPLOY / "grafana" / "dashboards" / "sage-fed.json"
    body: dict[str, Any] = json.loads(path.read_text())
    return body


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels, without the rows' headings."""
    return [panel for panel in board()["panels"] if panel["type"] != "row"]


def as_asked(expression: str, rate_interval: str = "5s") -> str:
    """A panel's expression as Grafana sends it, for every daemon."""
    return expression.replace("$__rate_interval", rate_interval).replace("$instance", ".*")
