"""What an installation as a service consists of, and `sage-fed install-service`."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from surroundings import require_tool
from typer.testing import CliRunner

from sage_fed.cli.app import build_app
from sage_fed.settings import load_settings, profile_names
from sage_fed.systemd.unit import (
    UNITS,
    Action,
    Machine,
    installation,
    to_install,
    to_uninstall,
    unreachable,
)

ROOT = Path(__file__).parent.parent
DROP_INS = sorted(path.stem for path in (UNITS / "drop-ins").glob("*.conf"))


def run(*arguments: str) -> tuple[int, str]:
    """Run a command in this process: its exit code and what it said."""
    result = CliRunner().invoke(build_app(), arguments)
    return result.exit_code, result.output


def install(root: Path, *more: str) -> tuple[int, str]:
    return run(
        "install-service", "--root", str(root), "--program", "/opt/sage-fed/bin/sage-fed", *more
    )


def files_under(root: Path) -> set[str]:
    return {f"/{path.relative_to(root)}" for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("machine", "profile", "drop_ins"),
    [
        (Machine.CPU, "demo", {"30-machine.conf"}),
        (Machine.CUDA, "qwen2.5", {"30-machine.conf"}),
        (Machine.JETSON, "jetson-thor", {"30-machine.conf"}),
    ],
)
def test_a_machine_gets_its_own_drop_in_and_profile(
    machine: Machine, profile: str, drop_ins: set[str]
) -> None:
    """The unit itself is the packaged file, byte for byte, whatever the machine."""
    files = {file.path: file for file in installation(machine).files}
    system = Path("/etc/systemd/system")
    assert (UNITS / "sage-fed.service").read_text() == files[system / "sage-fed.service"].content
    assert drop_ins == {path.name for path in files if path.parent.name == "sage-fed.service.d"}
    configuration = files[Path("/etc/sage-fed/config.toml")]
    assert f'profile = "{profile}"' in configuration.content
    assert profile in profile_names()
    assert configuration.operators


def test_the_back_off_goes_only_where_systemd_knows_it() -> None:
    """An older one would complain of RestartSteps at every start."""
    names = [
        {file.path.name for file in installation(Machine.CUDA, systemd_version=version).files}
        for version in (252, 253, 254, 257)
    ]
    assert [False, False, True, True] == ["20-backoff.conf" in found for found in names]


def test_a_further_instance_is_a_template_with_its_own_everything() -> None:
    """Unit, drop-ins, configuration and state have its name; the weights are shared."""
    plan = installation(Machine.JETSON, instance="second")
    assert "sage-fed@second" == plan.unit
    assert {
        "/etc/systemd/system/sage-fed@.service",
        "/etc/systemd/system/sage-fed@second.service.d/30-machine.conf",
        "/etc/systemd/system/sage-fed@second.service.d/40-instance.conf",
        "/etc/sage-fed@second/config.toml",
    } == {str(file.path) for file in plan.files}
    assert Path("/var/cache/sage-fed") in plan.left
    (configuration,) = (file.content for file in plan.files if file.operators)
    assert "systemctl edit sage-fed@second" in configuration
    for line in (
        "#   scheduling.step_timeout_s = 30 (30-machine.conf)",
        "#   listen = 127.0.0.1:6591 (40-instance.conf)",
        "#   metrics_listen = 127.0.0.1:9660 (40-instance.conf)",
    ):
        assert line in configuration.splitlines()


@pytest.mark.parametrize("name", ["../x", "a b", "Second", "-x", "x" * 33, "a@b"])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    """It becomes part of paths and of a unit's name."""
    code, said = install(tmp_path, "--machine", "cpu", "--instance", name)
    assert 2 == code, said
    assert set() == files_under(tmp_path)


def test_another_place_of_the_package_is_a_drop_in() -> None:
    """The program that runs is named by its whole path, quoted, with systemd's % doubled."""
    plan = installation(Machine.CUDA, program=Path("/srv/a b/100%/sage-fed"))
    (location,) = (file for file in plan.files if file.path.name == "10-location.conf")
    assert 'ExecStart=\nExecStart="/srv/a b/100%%/sage-fed" serve\n' in location.content


@pytest.mark.parametrize("name", DROP_INS)
def test_every_packaged_drop_in_is_for_the_service(name: str) -> None:
    """It parses, and says in a comment what it is for."""
    text = (UNITS / "drop-ins" / f"{name}.conf").read_text()
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    assert {"Service"} <= set(parser.sections()) <= {"Unit", "Service"}
    assert text.startswith("# ")


def test_installing_twice_changes_nothing_and_keeps_what_is_the_operators(tmp_path: Path) -> None:
    """The unit is brought up to date, a drop-in of before goes, the settings stay."""
    before = ("--root", str(tmp_path), "--program", "/srv/sage-fed", "--machine", "cpu")
    assert 0 == run("install-service", *before)[0]
    configuration = tmp_path / "etc/sage-fed/config.toml"
    configuration.write_text('profile = "demo"\n# mine\n')
    (tmp_path / "etc/systemd/system/sage-fed.service").write_text("[Service]\n")
    own = tmp_path / "etc/systemd/system/sage-fed.service.d/override.conf"
    own.write_text("[Service]\nNice=5\n")
    code, said = install(tmp_path, "--machine", "cuda", "--json")
    assert 0 == code, said
    changes = {entry["path"]: entry["action"] for entry in json.loads(said)["files"]}
    assert {
        "/etc/systemd/system/sage-fed.service": "update",
        "/etc/systemd/system/sage-fed.service.d/10-location.conf": "remove",
        "/etc/systemd/system/sage-fed.service.d/30-machine.conf": "update",
        "/etc/sage-fed/config.toml": "keep",
    } == changes
    assert configuration.read_text().endswith("# mine\n")
    assert own.exists()
    plan = installation(Machine.CUDA)
    actions = [change.action for change in to_install(plan, tmp_path)]
    assert [Action.UNCHANGED, Action.UNCHANGED, Action.KEEP] == actions


def test_a_dry_run_shows_every_file_and_writes_none(tmp_path: Path) -> None:
    """What it prints is what the installation then writes."""
    code, said = install(tmp_path, "--machine", "jetson", "--dry-run")
    assert 0 == code, said
    assert set() == files_under(tmp_path)
    for file in installation(Machine.JETSON).files:
        assert f"--- {file.path}\n{file.content.rstrip()}" in said


def test_uninstalling_takes_what_was_installed_and_nothing_else(tmp_path: Path) -> None:
    """Books, settings and the operator's own drop-ins stay, and are named."""
    before = files_under(tmp_path)
    assert 0 == install(tmp_path, "--machine", "cpu")[0]
    code, said = run("uninstall-service", "--root", str(tmp_path))
    assert 0 == code, said
    assert "left as they are: /etc/sage-fed/config.toml, /var/lib/sage-fed" in said
    assert before | {"/etc/sage-fed/config.toml"} == files_under(tmp_path)
    assert not (tmp_path / "etc/systemd/system/sage-fed.service.d").exists()
    assert () == to_uninstall(installation(Machine.CPU), tmp_path)
    code, said = run("uninstall-service", "--root", str(tmp_path))
    assert (0, True) == (code, "not installed" in said), said


def test_a_package_that_a_service_cannot_reach_is_refused(tmp_path: Path) -> None:
    """The sandbox hides homes and /tmp, and its user may not enter a closed directory."""
    closed = tmp_path / "closed" / "bin"
    closed.mkdir(parents=True)
    assert Path("/usr/bin/env") != unreachable([Path("/usr/bin/env")])
    for path in ("/root/venv/bin/python", "/home/me/venv/bin/python", "/tmp/venv/bin/python"):
        assert Path(path) == unreachable([Path("/usr/bin/env"), Path(path)])


def test_a_dry_run_shows_what_a_service_could_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files and a warning that names --program; the installation itself is refused with it."""
    python = tmp_path / "closed" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/usr/bin/env")
    (python.parent / "sage-fed").touch()
    python.parent.parent.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(python))
    root = tmp_path / "image"
    arguments = ("install-service", "--root", str(root), "--machine", "cpu")
    shown = CliRunner().invoke(build_app(), [*arguments, "--dry-run"])
    assert 0 == shown.exit_code, shown.output
    assert f"warning: a service cannot reach {tmp_path}" in shown.stderr
    assert "--program" in shown.stderr
    assert f'ExecStart="{python.parent}/sage-fed" serve' in shown.stdout
    told = json.loads(CliRunner().invoke(build_app(), [*arguments, "--dry-run", "--json"]).stdout)
    assert "--program" in told["warnings"][0]
    code, said = run(*arguments)
    assert (1, True) == (code, "--program" in said), said
    assert not root.exists()


def test_nothing_is_started_in_an_image(tmp_path: Path) -> None:
    """--now with --root is refused before anything is written, with what to do instead."""
    code, said = install(tmp_path, "--machine", "cpu", "--now")
    assert (2, True) == (code, "systemctl --root" in said), said
    assert set() == files_under(tmp_path)


def ports(root: Path, name: str) -> list[str]:
    """What a further instance listens on."""
    drop_in = root / f"etc/systemd/system/sage-fed@{name}.service.d/40-instance.conf"
    lines = drop_in.read_text().splitlines()
    return [line.rpartition(":")[2] for line in lines if line.startswith("Environment=")]


def test_every_further_instance_has_ports_of_its_own(tmp_path: Path) -> None:
    """They are kept when it is installed again, and given anew when it is gone."""
    for name in ("second", "third", "fourth", "second"):
        code, said = install(tmp_path, "--machine", "cpu", "--instance", name)
        assert 0 == code, said
    found = {name: ports(tmp_path, name) for name in ("second", "third", "fourth")}
    assert {
        "second": ["6591", "9660"], "third": ["6592", "9661"], "fourth": ["6593", "9662"],
    } == found  # fmt: skip
    assert 0 == run("uninstall-service", "--root", str(tmp_path), "--instance", "third")[0]
    assert 0 == install(tmp_path, "--machine", "cpu", "--instance", "fifth")[0]
    assert ["6592", "9661"] == ports(tmp_path, "fifth")


def test_the_last_further_instance_takes_the_template_along(tmp_path: Path) -> None:
    """While another needs it, it stays; the first instance has a unit of its own."""
    for more in ((), ("--instance", "a"), ("--instance", "b")):
        assert 0 == install(tmp_path, "--machine", "cpu", *more)[0]
    template = tmp_path / "etc/systemd/system/sage-fed@.service"
    for name, left in (("a", True), ("b", False)):
        code, said = run("uninstall-service", "--root", str(tmp_path), "--instance", name)
        assert 0 == code, said
        assert left is template.exists()
    assert (tmp_path / "etc/systemd/system/sage-fed.service").exists()


def test_a_configuration_that_is_kept_is_told_what_overrules_it(tmp_path: Path) -> None:
    """It may be older than the lines that a new one has; the output says them then."""
    code, first = install(tmp_path, "--machine", "cpu", "--instance", "second")
    assert (0, False) == (code, "wins over it" in first), first
    (tmp_path / "etc/sage-fed@second/config.toml").write_text('profile = "demo"\n')
    code, said = install(tmp_path, "--machine", "cpu", "--instance", "second")
    assert 0 == code, said
    assert "/etc/sage-fed@second/config.toml is kept" in said
    assert "  device = cpu (30-machine.conf)" in said.splitlines()
    assert "  listen = 127.0.0.1:6591 (40-instance.conf)" in said.splitlines()
    code, said = install(tmp_path, "--machine", "cpu", "--instance", "second", "--json")
    assert "listen = 127.0.0.1:6591 (40-instance.conf)" in json.loads(said)["overruled"]


def test_a_profile_or_machine_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    """With exit code 2, the choice, and nothing written."""
    code, said = install(tmp_path, "--machine", "cpu", "--profile", "dmeo")
    assert (2, True) == (code, "demo" in said), said
    code, said = install(tmp_path, "--machine", "tpu")
    assert 2 == code, said
    assert set() == files_under(tmp_path)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """One line, exit code 1."""
    (tmp_path / "etc").write_text("not a directory")
    code, said = install(tmp_path, "--machine", "cpu")
    assert 1 == code
    assert str(tmp_path / "etc") in said
    assert "Traceback" not in said


def test_the_first_configuration_is_one_that_loads(tmp_path: Path) -> None:
    """For every machine, as the service will read it."""
    for machine in Machine:
        root = tmp_path / machine.value
        assert 0 == install(root, "--machine", machine.value)[0]
        environ = {"HOME": "/", "SAGE_FED_CONFIG": str(root / "etc/sage-fed/config.toml")}
        assert "flag" != load_settings({}, environ, None).origins["profile"]


def test_deploy_shows_the_packaged_units() -> None:
    """One file, seen from two places: they cannot differ."""
    assert (ROOT / "deploy/systemd/sage-fed.service").samefile(UNITS / "sage-fed.service")


def analyzed(tmp_path: Path, machine: Machine, version: int) -> Path:
    """An installed unit under a name that `systemd-analyze` accepts, drop-ins beside it."""
    plan = installation(machine, program=Path("/bin/true"), systemd_version=version)
    for file in plan.files:
        if file.path.is_relative_to("/etc/systemd/system"):
            place = tmp_path / file.path.relative_to("/etc/systemd/system")
            place.parent.mkdir(exist_ok=True)
            place.write_text(file.content)
    return tmp_path / "sage-fed.service"


@pytest.mark.parametrize("machine", list(Machine))
def test_systemd_finds_nothing_to_say_about_the_unit(machine: Machine, tmp_path: Path) -> None:
    """`systemd-analyze verify` is silent, for each machine."""
    analyze = require_tool("systemd-analyze")
    unit = analyzed(tmp_path, machine, 0)
    done = subprocess.run(
        [analyze, "verify", "--recursive-errors=no", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr)


@pytest.mark.parametrize("machine", list(Machine))
def test_the_unit_is_hardened_and_still_sees_the_gpu(machine: Machine, tmp_path: Path) -> None:
    """An exposure of 2.0 at most, without any of the switches that would hide a device."""
    analyze = require_tool("systemd-analyze")
    unit = analyzed(tmp_path, machine, 0)
    # Offline it reads the unit alone: what a drop-in changes is put behind it.
    for drop_in in sorted((tmp_path / "sage-fed.service.d").glob("*.conf")):
        with unit.open("a") as whole:
            whole.write(drop_in.read_text())
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=20", "--json=short", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    verdicts = {entry["name"]: entry["set"] for entry in json.loads(done.stdout)}
    for switch in ("PrivateDevices=", "ProtectClock=", "DeviceAllow="):
        assert (machine is Machine.CPU and switch != "ProtectClock=") == verdicts[switch], switch
    assert not verdicts["MemoryDenyWriteExecute="]


def test_the_install_script_is_clean() -> None:
    """Shellcheck has nothing to say."""
    shellcheck = require_tool("shellcheck")
    done = subprocess.run(
        [shellcheck, str(ROOT / "deploy/install.sh")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stdout)
    assert shutil.which("bash") is not None
