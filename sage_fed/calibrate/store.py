"""Writes a card and its report where `RateCard.load` finds the card.

A card appears whole or not at all, and never in the place of another. Fails with `ConfigError`
where the directory cannot be written.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sage_fed.cards import RateCard, available_cards, card_text
from sage_fed.errors import ConfigError
from sage_fed.trusted_files import make_directory

_LONGEST_STEM = 48
_FRESH = ".card-"
_BESIDE = (".md", ".svg")


def stem_of(device: str, precisions: str, day: str) -> str:
    """Return what a version begins with: device, precisions and day, in a card's alphabet."""
    tail = f"-{_slug(precisions)}-{day}"
    name = _slug(device)[: _LONGEST_STEM - len(tail)].strip("-.")
    return f"{name or 'device'}{tail}"


def prepare_directory(directory: Path) -> None:
    """Create the directory and see that it can be written; `ConfigError` where it cannot."""
    make_directory("cards_dir", directory)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=_FRESH):
            pass
    except OSError as error:
        raise ConfigError(f"cards_dir: cannot write into {directory}: {error.strerror}") from error


def delete_card(path: Path) -> None:
    """Delete a card and what stands beside it."""
    for suffix in (path.suffix, *_BESIDE):
        path.with_suffix(suffix).unlink(missing_ok=True)


def save_card(
    card: RateCard, directory: Path, extras: Callable[[RateCard], dict[str, str]]
) -> tuple[RateCard, Path]:
    """Write the card under its version, or that with the first free number behind it.

    `extras` gives the texts of files beside it, by suffix (of `_BESIDE`). Returns the card as it
    was named. The directory is there (`prepare_directory`).
    """
    try:
        taken = set(available_cards(directory))
        numbered = (f"{card.version}-{number}" for number in itertools.count(2))
        for version in itertools.chain([card.version], numbered):
            if version in taken:
                continue
            named = replace(card, version=version)
            path = directory / f"{version}.toml"
            if _create(path, card_text(named)):
                for suffix, text in extras(named).items():
                    assert suffix in _BESIDE
                    path.with_suffix(suffix).write_text(text, encoding="utf-8")
                return named, path
    except OSError as error:
        raise ConfigError(f"cards_dir: cannot write into {directory}: {error.strerror}") from error
    raise AssertionError("there is always a free number")


def _create(path: Path, text: str) -> bool:
    """Create the file with its whole text; False where it exists."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=_FRESH
    ) as fresh:
        fresh.write(text)
        fresh.flush()
        os.fsync(fresh.fileno())
        try:
            # A link, not a rename: that would replace what another calibration just wrote.
            os.link(fresh.name, path)
        except FileExistsError:
            return False
    return True


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
