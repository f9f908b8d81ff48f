"""Real disks that fill up or turn read-only, as root: a small tmpfs, an ext4 in a file."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Disk:
    """A mounted file system that can be filled."""

    path: Path

    @property
    def _filler(self) -> Path:
        return self.path / "somebody-elses-file"

    def fill(self) -> None:
        """Take the space that is left."""
        with self._filler.open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            for size in (65536, 4096, 1):
                with contextlib.suppress(OSError):
                    while filler.write(b"x" * size):
                        pass

    def free(self) -> None:
        """Give it back."""
        self._filler.unlink()

    def remount(self, *options: str) -> None:
        """Change how it is mounted."""
        subprocess.run(
            ["mount", "-o", f"remount,{','.join(options)}", self.path],
            check=True,
        )


@contextlib.contextmanager
def small_tmpfs(path: Path, size: str, *options: str) -> Iterator[Disk]:
    """A disk of `size` at `path`; `nr_inodes=N` bounds the files on it, its root among them."""
    path.mkdir()
    _mount("-t", "tmpfs", "-o", ",".join((f"size={size}", "mode=700", *options)), "tmpfs", path)
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@contextlib.contextmanager
def small_ext4(path: Path, image: Path, *options: str) -> Iterator[Disk]:
    """A journalling file system at `path`, kept in the file `image`, which is made if need be."""
    path.mkdir(exist_ok=True)
    if not image.exists():
        image.touch()
        os.truncate(image, 16 * 2**20)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
    _mount("-t", "ext4", "-o", ",".join(("loop", *options)), image, path)
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", path], check=True)


def _mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        if os.environ.get("REQUIRE_TOOLS"):
            pytest.fail(f"cannot mount, and REQUIRE_TOOLS is set: {done.stderr}")
        pytest.skip(f"cannot mount here: {done.stderr}")
