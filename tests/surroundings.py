"""What tests find around them: the bundled pair, and tools of the system."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

MODELS = Path(__file__).parent.parent / "sage_fed" / "models"


def require_tool(name: str) -> str:
    """Return the path of a system tool; skip where it is missing, fail in CI."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        if os.environ.get("REQUIRE_TOOLS"):
            pytest.fail(f"{name} is not installed, and REQUIRE_TOOLS is set")
        pytest.skip(f"{name} is not installed")
    return path
