"""The parts of a GPU run, and what they share: the sizes, the clock, the resident pair.

Owns: one function a part, which imports what it needs when it runs: a package that is absent
costs the parts that need it and no other. Does not know: how failures are recorded (`gpu`).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gpu_checkpoints import Checkpoints
    from gpu_shapes import Filling, Plan

    from sage_fed.core import Tier
    from sage_fed.engine import Engine

MODELS = Path(__file__).resolve().parent.parent / "sage_fed" / "models"


@dataclass(slots=True)
class Run:
    """One invocation: what was asked for, the clock, and the pair while it is resident."""

    shapes: str
    device_name: str
    budget_s: float
    commit: str | None
    kernels: str = "auto"
    began: float = field(default_factory=time.perf_counter)
    part_until: float = math.inf
    results: dict[str, Any] = field(default_factory=dict)
    pair: dict[Tier, Engine] = field(default_factory=dict)
    fillings: dict[Tier, Filling] = field(default_factory=dict)
    _checkpoints: Checkpoints | None = None

    @property
    def plan(self) -> Plan:
        """Every size of this run."""
        from gpu_shapes import PLANS  # noqa: PLC0415

        return PLANS[self.shapes]

    @property
    def device(self) -> torch.device:
        """The device, which has to be there: no part falls back to another one."""
        from sage_fed.engine.machine import resolve_device  # noqa: PLC0415

        return resolve_device(self.device_name)

    def left(self) -> float:
        """Seconds until the part, or the whole run, should be over."""
        return min(self.part_until, self.began + self.budget_s) - time.perf_counter()

    def resident(self) -> dict[Tier, Engine]:
        """Both engines, built by whoever needs them first."""
        from gpu_shapes import random_engine  # noqa: PLC0415

        from sage_fed.core import Tier  # noqa: PLC0415

        plan = self.plan
        shapes = {Tier.TACTICAL: plan.tactical, Tier.STRATEGIC: plan.strategic}
        for tier, shape in shapes.items():
            if tier not in self.pair:
                self.pair[tier], self.fillings[tier] = random_engine(
                    shape,
                    str(self.device),
                    plan.precision,
                    seed=tier.rank,
                    max_batch=max(plan.batches),
                    kernels=self.kernels,
                )
        return self.pair

    @property
    def checkpoints(self) -> Checkpoints:
        """Where parts that load from disk find their models."""
        from gpu_checkpoints import Checkpoints  # noqa: PLC0415

        if self._checkpoints is None:
            self._checkpoints = Checkpoints()
        return self._checkpoints

    def release(self) -> None:
        """Free the pair's memory."""
        while self.pair:
            self.pair.popitem()[1].close()

    def close(self) -> None:
        """Leave nothing behind, on the device or on disk."""
        if self._checkpoints is not None:
            self._checkpoints.close()
        self.release()


def environment(run: Run) -> dict[str, Any]:
    """Device, driver, versions, commit, clocks."""
    import gpu_env  # noqa: PLC0415

    return gpu_env.environment(run.device, run.commit)


def correctness(run: Run) -> dict[str, Any]:
    """Every architecture and precision against the fp32 reference, with TF32 off."""
    import gpu_correctness as check  # noqa: PLC0415
    import torch  # noqa: PLC0415

    torch.set_float32_matmul_precision("highest")
    device = str(run.device)
    precisions: dict[str, dict[str, Any]] = {}
    cut: list[str] = []
    with tempfile.TemporaryDirectory(prefix="sage-fed-gpu-") as folder:
        models = check.checkpoints(run.plan.references, Path(folder), MODELS)
        for precision in check.precisions(run.device):
            for name, (path, reference) in models.items():
                if run.left() <= 0:
                    cut.append(f"{name} {precision}")
                    continue
                row = check.check(path, reference, device, precision)
                precisions.setdefault(precision, {})[name] = row
    good = all(row["ok"] for models in precisions.values() for row in models.values())
    return {
        "ok": good and not cut,
        "fp32_bound": check.FP32_BOUND,
        "half_bound_in_times_of_transformers": check.HALF_TIMES,
        "precisions": precisions,
        "cut": cut,
    }


def resident(run: Run) -> dict[str, Any]:
    """Both shapes at once with explicit KV budgets: memory, ordinary numbers, valid ids."""
    import gpu_resident  # noqa: PLC0415

    return gpu_resident.resident(run.resident, run.fillings, run.plan, run.device)


def speed(run: Run) -> dict[str, Any]:
    """Decode and prefill of each tier alone, beside the device's limits."""
    import gpu_speed  # noqa: PLC0415

    plan, engines = run.plan, run.resident()
    pair = [
        gpu_speed.fill(tier, shape, engines[tier], plan)
        for tier, shape in zip(engines, (plan.tactical, plan.strategic), strict=True)
    ]
    return gpu_speed.speed(pair, plan, run.device, run.left)


def precisions(run: Run) -> dict[str, Any]:
    """Every precision of both shapes: decode, graphs against eager, loading; the ratio of each."""
    import gpu_precisions  # noqa: PLC0415

    run.release()
    return gpu_precisions.precisions(run.plan, run.device, run.kernels, run.left)


def peers(run: Run) -> dict[str, Any]:
    """`transformers` on the same device and shapes, interleaved with the engine."""
    import gpu_peers  # noqa: PLC0415

    run.release()
    return gpu_peers.peers(run.plan, run.device, run.kernels, run.left)


def load(run: Run) -> dict[str, Any]:
    """From safetensors on disk to a model that serves, in processes of their own."""
    import gpu_load  # noqa: PLC0415

    run.release()
    checkpoint = run.checkpoints.of(run.plan.strategic, run.device)
    return gpu_load.load(run.plan, str(run.device), run.kernels, checkpoint, run.left)


def interference(run: Run) -> dict[str, Any]:
    """The tactical tier alone and beside a busy strategic one."""
    from interference import on_gpu  # noqa: PLC0415

    plan = run.plan
    valid_ids = min(plan.tactical.valid_ids, plan.strategic.valid_ids)
    return on_gpu(run.resident(), plan, valid_ids, run.left)


def daemon(run: Run) -> dict[str, Any]:
    """A real process under load; the pair gives its memory back first."""
    import gpu_daemon  # noqa: PLC0415

    run.release()
    before = run.results.get("interference", {}).get("result", {})
    alone = before.get("mixed_tokens_per_s_by_streams", {})
    return gpu_daemon.daemon(
        run.plan, run.device, run.kernels, run.checkpoints, alone=alone, left=run.left
    )


PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "environment": environment,
    "correctness": correctness,
    "resident": resident,
    "speed": speed,
    "interference": interference,
    "precisions": precisions,
    "peers": peers,
    "load": load,
    "daemon": daemon,
}
