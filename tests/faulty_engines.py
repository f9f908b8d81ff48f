"""Engines that fail on order, inside a real daemon's own process.

What is wrapped is the model's forward pass, from outside the product: whatever the engine, the
executor and everything above them make of the failure is theirs. An order is a file named after
the model; the model's next step obeys it:

    error     the pass raises, as a driver or a bug does
    memory    the pass runs out of the device's memory
    nan       the pass computes logits that are no numbers, for all its rows
    hang      the pass does not come back as long as the order lies there

A number behind an order is how many steps obey it, of the engine that was loaded when it was
given: one that is loaded later is well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from forked_daemon import ForkedProcess

from sage_fed.core import Tier
from sage_fed.daemon import build
from sage_fed.engine import Engine, EngineOptions
from sage_fed.engine.decoder import Forward, Pass, Queued
from sage_fed.steps import Chunk

PACE_S = 0.002
"""What each pass takes at least, so that an order finds a stream still under way."""

MODELS = {Tier.TACTICAL: "demo-tactical", Tier.STRATEGIC: "demo-strategic"}


class Orders:
    """The test's end: what is to go wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def give(self, tier: Tier, order: str) -> None:
        """Let the tier's next step go wrong."""
        fresh = self.folder / "order.new"
        fresh.write_text(order)
        fresh.replace(self.folder / MODELS[tier])

    def take_back(self, tier: Tier) -> None:
        """Let the tier's steps be well again; a step that hangs goes on."""
        (self.folder / MODELS[tier]).unlink(missing_ok=True)

    def launch(self, arguments: Sequence[str], log: Path) -> ForkedProcess:
        """Start a daemon that takes these orders; what `DaemonProcess.start` calls."""
        return ForkedProcess(arguments, log, partial(install, str(self.folder)))


class FaultyForward:
    """A forward pass that looks for orders before each step."""

    def __init__(self, forward: Forward, order: Path) -> None:
        self._forward = forward
        self._order = order
        self._lasting = ("", 0)

    @property
    def num_parts(self) -> int:
        """As of the pass that it stands before."""
        return self._forward.num_parts

    def begin(self, chunks: Sequence[Chunk]) -> Pass:
        """Obey, or compute."""
        time.sleep(PACE_S)
        match self._next():
            case "error":
                raise RuntimeError("injected: the pass failed")
            case "memory":
                raise torch.OutOfMemoryError("injected: no memory")
            case "nan":
                forwarded = self._forward.begin(chunks).advance(None)
                assert forwarded is not None
                if forwarded.logits is not None:
                    forwarded = replace(forwarded, best=None)
                    assert forwarded.logits is not None
                    forwarded.logits[:, 0] = float("nan")
                return Queued(forwarded)
            case "hang":
                while self._order.exists():
                    time.sleep(0.005)
        return self._forward.begin(chunks)

    def _next(self) -> str:
        order, left = self._lasting
        if left:
            self._lasting = order, left - 1
            return order
        try:
            order, *times = self._order.read_text().split()
        except FileNotFoundError:
            return ""
        if order != "hang":
            self._order.unlink(missing_ok=True)
            self._lasting = order, int(times[0]) - 1 if times else 0
        return order


def install(folder: str) -> None:
    """In the daemon's process, before it starts: wrap whatever is loaded."""
    load: Callable[[EngineOptions, Callable[[float], None]], Engine] = build.load_engine

    def load_faulty(options: EngineOptions, progress: Callable[[float], None]) -> Engine:
        engine = load(options, progress)
        assert engine._forward is not None
        engine._forward = FaultyForward(engine._forward, Path(folder) / options.name)
        return engine

    build.load_engine = load_faulty  # type: ignore[assignment]
