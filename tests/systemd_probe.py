"""Runs inside the service's sandbox, before the daemon: what can it do there? Prints JSON."""

from __future__ import annotations

import errno
import grp
import json
import os
import tempfile
from pathlib import Path

from sage_fed.settings import load_settings

PRIVATE = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue")
SECRETS = ("/etc/shadow", "/etc/credstore", "/root", "/var/lib/private/sage-fed")


def directories() -> set[Path]:
    """Every mount point, and two levels below the root: whatever could be open by mistake."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    found = {Path(line.split()[4]) for line in lines} | {Path("/")}
    for top in Path("/").iterdir():
        if top.is_dir() and not top.is_symlink() and top.name != "proc":
            found.add(top)
            try:
                found |= {path for path in top.iterdir() if path.is_dir()}
            except OSError:
                continue
    return {path.resolve() for path in found if not path.is_relative_to("/proc")}


def writable(directory: Path) -> bool:
    """Whether a file can be made there."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def readable(path: str) -> bool:
    """Whether something can be listed or read."""
    try:
        list(Path(path).iterdir()) if Path(path).is_dir() else Path(path).read_bytes()
    except OSError:
        return False
    return True


def gpu() -> str:
    """How opening the GPU's node ends."""
    try:
        os.close(os.open("/dev/nvidia0", os.O_RDWR))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "opened"


def groups() -> list[str]:
    """Names of the groups that we are in."""
    return [grp.getgrgid(number).gr_name for number in os.getgroups() if number < 1000]


def origins() -> list[str]:
    """Settings that systemd's credentials decide."""
    found = load_settings({}, os.environ, None).origins
    return [key for key, origin in found.items() if "CREDENTIALS" in origin]


mounts = Path("/proc/self/mountinfo").read_text().splitlines()
places = directories()
open_ = sorted(str(path) for path in places if writable(path))
print(
    json.dumps(
        {
            "probe": 1,
            "writable": open_,
            "shared": [p for p in PRIVATE if list(Path(p).iterdir())],
            "root": os.geteuid() == 0,
            "groups": groups(),
            "gpu": gpu(),
            "secrets": [path for path in SECRETS if readable(path)],
            "origins": origins(),
            "mounts": [line.split()[4:6] for line in mounts if " rw," in line],
        }
    ),
    flush=True,
)
