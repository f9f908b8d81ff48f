"""Everything that can be checked of the engine on one GPU: one script, one JSON, under 9 minutes.

Physics first. A decode step reads every weight once, whatever the batch, and each sequence's
keys and values once: `bytes = step_bytes + sum(contexts) * kv_bytes`, and it cannot take less
than `bytes / read bandwidth`. In bf16 the Qwen2.5-0.5B shape reads 0.988 GB a step and 12,288 B
of cache a token, the 7B shape 14.14 GB and 57,344 B: at 4 TB/s no less than 0.25 and 3.5 ms, so
at most 4,000 and 280 tokens/s at batch 1, and 14.3 between the tiers. A model that launches its
kernels one by one pays a few microseconds each besides: some hundred of them a step hide the
0.5B's 0.25 ms completely, and the ratio falls. Prefill multiplies matrices instead: about
`2 * parameters * tokens` operations, no faster than `operations / matrix rate`. Both limits are
measured on the device at hand before anything is stated as a share of them.

Parts: environment; correctness against `transformers` in fp32 on the CPU; both real shapes
resident, with random weights made in the device's memory; speed of each tier alone; what the
strategic tier costs the tactical one, and would in two threads or on two streams; every precision,
captured and not, with the ratio of each; `transformers` beside it; loading from disk; the daemon
as a process with both shapes, under mixed loads, cancelled a thousand times, calibrating itself.
All of them share one budget, and a part that has no time left says what it left out; `--only`
and `--keep` give single parts the whole of it, into the same JSON. A part that fails is recorded
with its error and the others run. All but
the daemon need torch, transformers and safetensors only, and no installed sage-fed. Each part
imports what it needs when it runs: a package that is absent costs the parts that need it.

Run: python bench/gpu.py [--shapes real|small] [--device cuda:0|cpu] [--skip daemon ...]
Writes bench/results/gpu.json after every part, a table to stderr, and one line of JSON to
stdout. Exit code 1 where a part failed or something is wrong. On a machine without a GPU,
`--shapes small --device cpu` runs every line that does not ask for CUDA, in seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gpu_models import Checkpoints, Filling, Plan

    from sage_fed.core import Tier
    from sage_fed.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a checkout is enough: nothing has to be installed


MODELS = ROOT / "sage_fed" / "models"
PART_SHARES = {
    "environment": 0.02,
    "correctness": 0.12,
    "resident": 0.07,
    "speed": 0.12,
    "interference": 0.15,
    "precisions": 0.15,
    "peers": 0.10,
    "load": 0.07,
    "daemon": 0.20,
}
"""How the time is shared out; what a part leaves over goes to those after it."""

_GRACE_S = 20.0
"""How long past its time a part that does not look at the clock may go on."""


class PartTimeout(Exception):
    """A part did not end in its time; raised into it."""


def guarded(
    name: str, part: Callable[[Run], dict[str, Any]], run: Run, later: Sequence[str] = ()
) -> dict[str, Any]:
    """One part's record: `ok`, `wrong` (it ran, and something is), `skipped` or `failed`.

    What is left of the run's time is shared between it and the parts that come `later`.
    """
    began = time.perf_counter()
    run.part_until = math.inf
    weight = PART_SHARES[name]
    limit_s = run.left() * weight / (weight + sum(PART_SHARES[one] for one in later))
    run.part_until = began + limit_s
    record: dict[str, Any]
    if run.left() <= 0:
        record = {"status": "skipped", "reason": "the run's time is over"}
    else:
        try:
            with _alarm(min(limit_s, run.left()) + _GRACE_S):
                result = part(run)
            record = {
                "status": "ok" if result.get("ok", True) else "wrong",
                "seconds": 0.0,
                "result": result,
            }
        except Exception as error:  # noqa: BLE001 - the other parts go on, whatever it was
            record = _failure(error)
    return record | {"seconds": round(time.perf_counter() - began, 2)}


def _failure(error: Exception) -> dict[str, Any]:
    if type(error).__name__ == "Skipped":  # of a module that may not even import
        return {"status": "skipped", "reason": str(error)}
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return {
        "status": "failed",
        "error": f"{type(error).__name__}: {error}"[:2000],
        "where": [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames],
    }


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `PartTimeout` into a part that does not end by itself."""

    def ring(*_: object) -> None:
        raise PartTimeout(f"not done in {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def body_of(run: Run, skip: Sequence[str]) -> dict[str, Any]:
    """The JSON as far as the run has come."""
    bad = [name for name, part in run.results.items() if part["status"] in {"failed", "wrong"}]
    return {
        "benchmark": "gpu",
        "ok": not bad,
        "bad": bad,
        "arguments": {
            "shapes": run.shapes, "device": run.device_name,
            "kernels": run.kernels, "budget_s": run.budget_s, "skip": list(skip),
        },
        "seconds": round(time.perf_counter() - run.began, 2),
        "parts": run.results,
    }  # fmt: skip


def plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    """The same without infinities and NaN, which JSON does not have; floats to 6 digits."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def main(
    run: Run, skip: Sequence[str], output: Path, kept: Mapping[str, Any] = MappingProxyType({})
) -> int:
    """Run the parts, write after each, show the table; the exit code.

    Of skipped parts those of an earlier run stand, where they are `kept`.
    """
    import gpu_report  # noqa: PLC0415

    output.parent.mkdir(parents=True, exist_ok=True)
    # One line on stdout, whatever libraries say there.
    with contextlib.redirect_stdout(sys.stderr):
        order = list(PARTS)
        for name, part in PARTS.items():
            if name in skip and name in kept:
                run.results[name] = kept[name]
            elif name in skip:
                run.results[name] = {"status": "skipped", "seconds": 0.0, "reason": "--skip"}
            else:
                print(f"{name} ...", file=sys.stderr, flush=True)
                later = [one for one in order[order.index(name) + 1 :] if one not in skip]
                run.results[name] = guarded(name, part, run, later)
            output.write_text(json.dumps(plain(body_of(run, skip)), indent=1) + "\n")
        with contextlib.suppress(Exception):  # the device may be lost; the figures are not
            run.close()
        body = body_of(run, skip)
        gpu_report.show(body)
    print(json.dumps(plain(body)))
    return 0 if body["ok"] else 1


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
        from gpu_models import PLANS  # noqa: PLC0415

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
        from gpu_models import random_engine  # noqa: PLC0415

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
        from gpu_models import Checkpoints  # noqa: PLC0415

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
    import gpu_speed  # noqa: PLC0415

    return gpu_speed.environment(run.device, run.commit)


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
    import gpu_correctness  # noqa: PLC0415

    return gpu_correctness.resident(run.resident, run.fillings, run.plan, run.device)


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
    import gpu_speed  # noqa: PLC0415

    run.release()
    return gpu_speed.precisions(run.plan, run.device, run.kernels, run.left)


def peers(run: Run) -> dict[str, Any]:
    """`transformers` on the same device and shapes, interleaved with the engine."""
    import gpu_peers  # noqa: PLC0415

    run.release()
    return gpu_peers.peers(run.plan, run.device, run.kernels, run.left)


def load(run: Run) -> dict[str, Any]:
    """From safetensors on disk to a model that serves, in processes of their own."""
    import gpu_daemon  # noqa: PLC0415

    run.release()
    checkpoint = run.checkpoints.of(run.plan.strategic, run.device)
    return gpu_daemon.load(run.plan, str(run.device), run.kernels, checkpoint, run.left)


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", choices=("real", "small"), default="real")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    parser.add_argument("--skip", nargs="*", choices=tuple(PARTS), default=[])
    parser.add_argument("--only", nargs="*", choices=tuple(PARTS), default=[])
    parser.add_argument("--keep", action="store_true", help="the output's other parts stand")
    parser.add_argument("--kernels", choices=("auto", "torch"), default="auto")
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--commit", help="where the files came without their history")
    given = parser.parse_args()
    # Nothing is fetched: every weight is made here.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    skipped = [
        name for name in PARTS if name in given.skip or (given.only and name not in given.only)
    ]
    earlier = json.loads(given.output.read_text())["parts"] if given.keep else {}
    sys.exit(
        main(
            Run(given.shapes, given.device, given.budget_s, given.commit, given.kernels),
            skipped,
            given.output,
            earlier,
        )
    )
