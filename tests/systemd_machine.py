"""A machine with a real systemd as PID 1, in namespaces of its own, which forgets everything.

Its files are an overlay of this machine's. sage-fed is installed in /opt/sage-fed from a wheel
that is built here, beside the libraries of the tests' own environment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from surroundings import require_tool

ROOT = Path(__file__).parent.parent
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
UNSHARE = (
    "unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--net", "--cgroup",
    "--propagation", "private", "--kill-child",
)  # fmt: skip
DEADLINE_S = 60.0
"""Only something that hangs meets it."""

HANG = Path("/run/hang")
"""While this file is there, the next step on the device never ends (see SITECUSTOMIZE)."""

SITECUSTOMIZE = '''
"""In the machine's environment only: a device that wedges when a file says so."""
import importlib.machinery, pathlib, sys, threading

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "sage_fed.device.device_thread":
            return None
        spec = super().find_spec(name, path, target)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            launch = module.InFlightSteps.launch
            def wedged_launch(self, engine, step, pause_after_s=None):
                if pathlib.Path("/run/hang").exists():
                    threading.Event().wait()
                return launch(self, engine, step, pause_after_s)
            module.InFlightSteps.launch = wedged_launch
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
'''


def build_wheel(work: Path) -> Path:
    """Build the package's wheel from a copy of the tree, which the build would litter."""
    tree = work / "tree"
    shutil.copytree(ROOT / "sage_fed", tree / "sage_fed", ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(work)],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    shutil.rmtree(tree)
    (wheel,) = work.glob("*.whl")
    return wheel


class Machine:
    """A booted machine; `run` and `popen` work inside it as root."""

    def __init__(self, work: Path) -> None:
        self._log = work / "machine.log"
        self._clients: list[subprocess.Popen[str]] = []
        site = self._site(work)
        root = work / "machine"
        root.mkdir()
        self._cgroup = _own_cgroup()
        enter = '[ -z "$1" ] || echo $$ > "$1/cgroup.procs"; shift; exec "$@"'
        command = (
            "sh", "-c", enter, "-", str(self._cgroup or ""), *UNSHARE,
            "bash", str(Path(__file__).with_suffix(".sh")), str(root), site,
            sys.base_prefix, PYTHON,
        )  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._inside = self._booted()

    def run(
        self, *command: str, check: bool = True, **options: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        done = subprocess.run(
            [*self._inside, *command],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            **options,  # type: ignore[call-overload]
        )
        if check and done.returncode:
            journal = self.run("journalctl", "--no-pager", "-n", "50", check=False).stdout
            raise AssertionError(f"{command}: {done.stdout}{done.stderr}\n{journal}")
        return done

    def client(self, script: str) -> subprocess.Popen[str]:
        """Start a Python script of the tests' own environment on the machine's network."""
        client = subprocess.Popen(
            ["nsenter", f"--net=/proc/{self._pid}/ns/net", sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._clients.append(client)
        return client

    def end_clients(self) -> None:
        """End those that a failed test has left."""
        while self._clients:
            with self._clients.pop() as client:
                client.kill()

    def write(self, path: str, text: str) -> None:
        """Write a file inside, with its directories."""
        self.run("bash", "-c", 'mkdir -p "$(dirname "$1")"; cat > "$1"', "-", path, input=text)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit."""
        said = self.run("systemctl", "show", unit, *(f"--property={name}" for name in properties))
        return dict(line.split("=", 1) for line in said.stdout.splitlines())

    def wait(self, unit: str, **wanted: str) -> dict[str, str]:
        """Wait until the unit's properties are as given."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            found = self.show(unit, *wanted)
            if found == wanted:
                return found
            assert time.monotonic() < deadline, f"{found}, not {wanted}:\n{self.journal(unit)}"
            # systemctl has no command that waits for this.
            time.sleep(0.1)

    def journal(self, unit: str) -> str:
        """Return what a unit has logged, and what systemd said of it."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit).stdout

    def power_off(self) -> None:
        """End the machine and everything in it."""
        self._process.kill()
        self._process.wait(DEADLINE_S)
        if self._cgroup is not None:
            _remove_cgroup(self._cgroup)

    @property
    def _pid(self) -> int:
        """Of the machine's PID 1, out here."""
        return psutil.Process(self._process.pid).children()[0].pid

    def _booted(self) -> tuple[str, ...]:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            assert self._process.poll() is None, f"it did not boot:\n{self._log.read_text()}"
            assert time.monotonic() < deadline, f"it hangs in its boot:\n{self._log.read_text()}"
            with contextlib.suppress(OSError, IndexError, psutil.Error):
                if Path(f"/proc/{self._pid}/exe").readlink().name == "systemd":
                    inside = (
                        "nsenter", f"--target={self._pid}", "--mount", "--pid", "--uts", "--ipc",
                        "--net", "--cgroup", "--root", "--wd",
                    )  # fmt: skip
                    state = subprocess.run(
                        [*inside, "systemctl", "is-system-running"],
                        capture_output=True,
                        text=True,
                        timeout=DEADLINE_S,
                        check=False,
                    ).stdout.strip()
                    if state in ("running", "degraded"):
                        return inside
            time.sleep(0.05)

    def _site(self, work: Path) -> str:
        """The folders of the site-packages: the wheel, over the libraries of the tests."""
        own = work / "site"
        with zipfile.ZipFile(build_wheel(work)) as wheel:
            wheel.extractall(own)
        (own / "sitecustomize.py").write_text(SITECUSTOMIZE)
        # A service may not write there, and would compile everything at each start.
        subprocess.run(
            [sys.executable, "-m", "compileall", "-q", str(own)], check=True, timeout=DEADLINE_S
        )
        for path in own.rglob("*"):
            path.chmod(path.stat().st_mode | 0o444 | (0o111 if path.is_dir() else 0))
        return f"{own}:{sysconfig.get_path('purelib')}"


def _own_cgroup() -> Path | None:
    """A fresh cgroup to become the machine's root, so that it does not touch this machine's."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            path = Path(where) / f"sage-fed-test-{os.getpid()}"
            path.mkdir()
            return path
    return None


def _remove_cgroup(path: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    for directory in [*sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True), path]:
        while True:
            try:
                directory.rmdir()
                break
            except OSError:
                # The killed processes leave it one after the other.
                assert time.monotonic() < deadline, f"{directory} is not empty"
                time.sleep(0.05)


def refusal() -> str:
    """Why this kernel gives nobody namespaces; empty where it does."""
    done = subprocess.run(
        [*UNSHARE, "true"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    if done.returncode == 0:
        return ""
    assert "Operation not permitted" in done.stderr, done.stderr
    return done.stderr.strip()


def booted(work: Path) -> Iterator[Machine]:
    """Boot a machine for as long as a fixture lives."""
    for tool in ("unshare", "nsenter", "systemctl", "journalctl"):
        require_tool(tool)
    if why := refusal():
        if os.environ.get("REQUIRE_TOOLS"):
            pytest.fail(f"no namespaces, and REQUIRE_TOOLS is set: {why}")
        pytest.skip(f"the kernel refuses what a second systemd needs: {why}")
    if not Path("/lib/systemd/systemd").exists():
        pytest.fail("systemctl is here, and /lib/systemd/systemd is not")
    machine = Machine(work)
    try:
        yield machine
    finally:
        machine.power_off()
