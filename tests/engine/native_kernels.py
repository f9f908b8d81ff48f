"""The native kernels in tests: there, or skipped for a reason that is the machine's own."""

from __future__ import annotations

import os

import pytest

from sage_fed.engine.native import Library, load_library


def require_native(num_threads: int = 1) -> Library:
    """Load the kernels; skip without them, and fail in CI unless it is the CPU that lacks them."""
    library = load_library(num_threads)
    if isinstance(library, Library):
        return library
    if os.environ.get("REQUIRE_TOOLS") and not library.hardware:
        pytest.fail(f"no native kernels, and REQUIRE_TOOLS is set: {library.reason}")
    pytest.skip(f"no native kernels: {library.reason}")
