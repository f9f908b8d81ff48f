"""Files that are followed: when a change counts."""

from __future__ import annotations

from sage_fed.daemon.access import Followed, Signature

OLD: Signature = ((1, 2, 3, 4), (1, 2, 3, 4))
HALF: Signature = ((9, 2, 3, 4), (1, 2, 3, 4))
NEW: Signature = ((9, 2, 3, 4), (9, 2, 3, 4))
GONE: Signature = (None, None)


async def test_a_change_counts_once_it_has_come_to_rest() -> None:
    """A certificate whose key is written after it is one change, and is told once."""
    looks = iter([OLD, OLD, HALF, NEW, NEW, NEW, GONE, NEW, NEW, GONE, GONE, GONE])
    files = Followed(lambda: next(looks))
    told = [await files.changed() for _ in range(11)]
    assert [False, False, False, True, False, False, False, False, False, True, False] == told
