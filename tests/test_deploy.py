"""What is deployed beside the daemon: Prometheus' rules, the runbook, the containers."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from surroundings import require_tool

from sage_fed.settings import load_settings, profile_names

ROOT = Path(__file__).parents[1]
PROMETHEUS = ROOT / "deploy" / "prometheus"
COMPOSE = ("compose.yaml", "compose.nvidia.yaml")


def read(*path: str) -> Any:  # noqa: ANN401 - YAML
    return yaml.safe_load(ROOT.joinpath("deploy", *path).read_text())


ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in read("prometheus", "rules", "alerts.yml")["groups"]
    for rule in group["rules"]
}
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()


def promtool(*arguments: str | Path) -> None:
    """Run promtool, which has to be content."""
    done = subprocess.run(
        [require_tool("promtool"), *map(str, arguments)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert 0 == done.returncode, done.stdout + done.stderr


def test_prometheus_takes_our_configuration() -> None:
    """`promtool check config` finds nothing wrong with it, nor with the rules it names."""
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


def test_alerts_fire_when_they_should_and_not_before() -> None:
    """`promtool test rules` passes: each alert on series that are its case, and on near misses."""
    promtool("test", "rules", PROMETHEUS / "tests" / "alerts.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_is_tested_firing_and_not(alert: str) -> None:
    """Each has a moment at which it fires for one daemon and is silent for another."""
    group = next(one for one in read("prometheus", "tests", "alerts.yml")["tests"]
                 if one["name"] == alert)  # fmt: skip
    checks = [check for check in group["alert_rule_test"] if check["alertname"] == alert]
    instances = {
        instance
        for series in group["input_series"]
        for instance in re.findall('instance="([^"]*)"', series["series"])
    }
    fired = {found["exp_labels"]["instance"] for c in checks for found in c["exp_alerts"]}

    assert any(not check["exp_alerts"] for check in checks)
    assert fired
    assert instances - fired


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_leads_to_its_section_of_the_runbook(alert: str) -> None:
    """Its link is the anchor of a heading that says what it means and what to do."""
    assert f"docs/operations.md#{alert.lower()}" == ALERTS[alert]["annotations"]["runbook_url"]
    section = re.search(rf"^### {alert}\n(.*?)(?=^##|\Z)", RUNBOOK, re.DOTALL | re.MULTILINE)

    assert section
    assert "**Means**" in section[1]
    assert "**Do**" in section[1]


def test_the_runbook_has_no_alert_that_is_gone() -> None:
    """Every section about an alert is about one that there is."""
    assert set(ALERTS) == set(re.findall(r"^### (SageFed\w+)$", RUNBOOK, re.MULTILINE))


def test_prometheus_scrapes_where_the_daemon_listens() -> None:
    """The shipped target is the default of `metrics_listen`."""
    settings = load_settings({"profile": "demo"}, {}, None).settings
    (job,) = read("prometheus", "prometheus.yml")["scrape_configs"]
    assert [str(settings.metrics_listen)] == job["static_configs"][0]["targets"]


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_names_files_that_exist(name: str) -> None:
    """Every bind mount and the Dockerfile are there, relative to the file."""
    for service in read(name)["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / "deploy" / source).is_dir(), source
            else:
                assert source in read("compose.yaml")["volumes"]
        if "dockerfile" in service.get("build", {}):
            context = (ROOT / "deploy" / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_starts_a_daemon_that_the_settings_allow(name: str) -> None:
    """The command's profile exists, and its variables are settings."""
    service = read("compose.yaml")["services"]["sage-fed"] | read(name)["services"]["sage-fed"]
    verb, flag, profile = service["command"]
    settings = load_settings({"profile": profile}, service["environment"], None).settings

    assert ("serve", "--profile") == (verb, flag)
    assert profile in profile_names()
    assert settings.listen.is_loopback
    grace_s = float(service["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings.drain_grace_s


def test_the_three_containers_find_each_other() -> None:
    """Grafana's Prometheus is where Prometheus listens, and all are on the host's loopback."""
    services = read("compose.yaml")["services"]
    (listen,) = (
        argument.partition("=")[2]
        for argument in services["prometheus"]["command"]
        if argument.startswith("--web.listen-address")
    )
    grafana = services["grafana"]["environment"]

    assert f"http://{listen}" == grafana["PROMETHEUS_URL"]
    assert "127.0.0.1" == grafana["GF_SERVER_HTTP_ADDR"]
    assert {"host"} == {service["network_mode"] for service in services.values()}


def test_compose_is_valid_by_its_own_schema() -> None:
    """`docker-compose config` reads both variants; it needs no Docker for that."""
    compose = require_tool("docker-compose")
    base, more = (ROOT / "deploy" / name for name in COMPOSE)
    for files in ((base,), (base, more)):
        chosen = [argument for file in files for argument in ("-f", str(file))]
        done = subprocess.run(
            [compose, *chosen, "config", "--quiet"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert 0 == done.returncode, done.stderr


def test_the_image_has_what_the_installation_reads() -> None:
    """What the Dockerfile copies is let through by its ignore file, and exists."""
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    copied = {
        source
        for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    }
    ignore = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert copied == {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert project["readme"] in copied
    assert all((ROOT / name).exists() for name in copied)
    assert "otel" in project["optional-dependencies"]
