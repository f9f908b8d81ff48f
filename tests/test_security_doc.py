"""docs/security.md: the tests that its threat table names are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCUMENT = (TESTS.parent / "docs" / "security.md").read_text()
THREATS = DOCUMENT.partition("## Threats")[2]
ROWS = [row for row in THREATS.splitlines() if row.startswith("| ") and "::" in row]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", THREATS)))


def test_every_threat_has_what_stops_it_and_a_test() -> None:
    """The table is read as it is meant, and has no empty promise."""
    rows = [row for row in THREATS.splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 20
    assert rows == ROWS
    assert all(3 == len([cell for cell in row.split("|") if cell.strip()]) for row in rows)


@pytest.mark.parametrize(("file", "name"), NAMED, ids=str)
def test_a_test_that_the_table_names_is_there(file: str, name: str) -> None:
    """A renamed or deleted test takes its row with it."""
    tree = ast.parse((TESTS / file).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, functions)}
