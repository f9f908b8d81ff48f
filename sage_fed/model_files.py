"""How models are named, and what a file is that its name belies.

A model is a directory, a bundled model, or a repository of the hub with a commit. The rule that
tells them apart looks at the text alone: `Qwen/Qwen2.5-7B` is the hub's wherever the daemon runs,
also where the working directory has a folder of that name, because a revision is pinned for the
one and says nothing of the other.
Downloads and clones leave files of the right name and the wrong content: the pointer of a large
file that was never fetched, an error page, nothing at all. A parser's complaint about those
("invalid character", "header too large") leads nowhere; these words do.
Knows no file. Only `resolve_model` fails, with `ValueError`.
"""

from __future__ import annotations

import re
from pathlib import Path

BUNDLED_PREFIX = "bundled:"

_PACKAGE = Path(__file__).parent
_PATHS = ("/", "./", "../", "~")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_BUNDLED_NAME = re.compile(r"[a-z0-9][a-z0-9-]*", re.ASCII)


def resolve_model(name: str | Path) -> Path | str:
    """Where a model's files are: a directory (`Path`) or a hub id (`str`).

    `bundled:NAME` is the directory `models/NAME` of the installed package; text that starts
    with `/`, `./`, `../` or `~`, or is `.` or `..`, is a directory; `OWNER/NAME` is a hub id.
    A `Path` is a directory already.

    Raises:
        ValueError: none of the three; the text says how each is written.
    """
    if isinstance(name, Path):
        return name.expanduser()
    if name.startswith(BUNDLED_PREFIX):
        bundled = name.removeprefix(BUNDLED_PREFIX)
        if _BUNDLED_NAME.fullmatch(bundled):
            return _PACKAGE / "models" / bundled
    elif name.startswith(_PATHS) or name in {".", ".."}:
        try:
            return Path(name).expanduser()
        except RuntimeError as error:
            raise ValueError(f"{name} names no user's home: {error}") from None
    elif _HUB_ID.fullmatch(name):
        return name
    written = f"; if it is a directory, write ./{name}" if name and "\0" not in name else ""
    raise ValueError(
        "expected a hub id (Qwen/Qwen2.5-0.5B-Instruct), a directory that starts with /, ./, ../ "
        f"or ~, or a bundled model (bundled:demo-tactical){written}"
    )


HEAD_BYTES = 256
"""How much of a file `misnomer` wants to see."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head")
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive, which is how torch saves pickles",
    b"\x80\x02": "a pickle, which runs code when it is read",
    b"\x80\x04": "a pickle, which runs code when it is read",
    b"\x80\x05": "a pickle, which runs code when it is read",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
}


def misnomer(head: bytes, *, is_text: bool) -> str | None:
    """Say what a file beginning with `head` is, and what to do; None where nothing is odd.

    `is_text`: the file should hold JSON or other text. An archive's mark is only looked for where
    it cannot be that. An empty `head` is an empty file.
    """
    if not head:
        return "is empty: its download or copy was interrupted; fetch it again"
    if head.startswith(_LFS_POINTER):
        return (
            "is a Git LFS pointer, not the file that it stands for; run `git lfs pull` where the "
            "checkpoint was cloned, or download the file"
        )
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(_PAGES):
        return (
            "is a web page, not the file: its download was answered with an error or a login; "
            "fetch it again"
        )
    if not head.strip(b"\0"):
        return "begins with zeros only: its download or copy was interrupted; fetch it again"
    for mark, kind in _ARCHIVES.items():
        if head.startswith(mark):
            return f"is {kind}; the checkpoint needs the file that its name says"
    if not is_text and start.startswith((b"{", b"[")) and not _has_length(head):
        return "is JSON text, perhaps a server's error; fetch it again"
    return None


def _has_length(head: bytes) -> bool:
    """Whether eight bytes stand before the JSON, as in every safetensors file."""
    return b"\0" in head[:8]
