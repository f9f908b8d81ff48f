"""What a file is that is not what its name says, as its first bytes tell.

Downloads and clones leave files of the right name and the wrong content: the pointer of a large
file that was never fetched, an error page, nothing at all. A parser's complaint about those
("invalid character", "header too large") leads nowhere; these words do.
Pure: knows no file and no path. Cannot fail.
"""

from __future__ import annotations

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
