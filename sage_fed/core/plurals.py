"""A number of things, in words."""

from __future__ import annotations


def counted(number: int, one: str, several: str = "") -> str:
    """`1 job`, `1,024 jobs`; `several` where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
