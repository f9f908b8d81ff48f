"""Checkpoints and engines shared by the engine's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from native_kernels import require_native
from tiny_models import CONFIGS, Checkpoint, save_random

from sage_fed.engine import Engine, EngineOptions, load_engine


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Random checkpoints by the name of their configuration, each written once."""
    written: dict[str, Checkpoint] = {}

    def of(name: str) -> Checkpoint:
        if name not in written:
            path = tmp_path_factory.mktemp("models") / name
            written[name] = save_random(CONFIGS[name], path)
        return written[name]

    return of


@pytest.fixture(scope="session", params=["native", "torch"])
def engine_of(
    checkpoint: Callable[[str], Checkpoint], request: pytest.FixtureRequest
) -> Callable[[str], Engine]:
    """Engines in fp32 on the CPU by the name of their configuration, on either's kernels."""
    loaded: dict[str, Engine] = {}
    if request.param == "native":
        require_native()

    def of(name: str) -> Engine:
        if name not in loaded:
            options = EngineOptions(
                model=str(checkpoint(name).path), kv_cache_bytes=1 << 22, kernels=request.param
            )
            loaded[name] = load_engine(options, lambda _: None)
        return loaded[name]

    return of
