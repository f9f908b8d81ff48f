"""How well a calibration repeats: five of them in a row against one daemon.

    python bench/calibrate_repeat.py [--quick] [--runs 5] [--tactical DIR --strategic DIR
        --precision bf16 --device cpu --threads 2] [--address HOST:PORT --token TOKEN]

The physics: a decode step at batch 1 reads every weight once, so its time is the weights over
the memory's bandwidth plus what launching costs, and nothing in it is random; what differs from
run to run is the machine (clocks, interrupts, neighbours). The figure to look at is therefore the
ratio's largest deviation from the runs' median, beside the spread that each run itself states.
To be within 3 % on a quiet machine: close everything else before believing it.

Without an address it starts a daemon of its own with the bundled pair, or with the checkpoints
that are named (`sage-fed dev make-checkpoint --like qwen2.5-0.5b DIR` writes one).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report

from sage_fed.client import Client
from sage_fed.core import TIER_ROLES, CalibrationProgress, CalibrationResult, Phase, Tier, TierState
from sage_fed.errors import SageFedError

START_S = 600.0
TARGET = 0.03


@contextlib.contextmanager
def daemon(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """A daemon of our own, until the block is left: its address and the operator's token."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        address = "127.0.0.1:6591"
        settings = [f"state_dir={state}", f"listen={address}", "metrics_listen=127.0.0.1:0"]
        settings.append(f"device={options.device}")
        if options.threads:
            settings.append(f"cpu_threads={options.threads}")
        for tier, model in ((Tier.TACTICAL, options.tactical), (Tier.STRATEGIC, options.strategic)):
            if model:
                settings.append(f"{tier.name}.model={Path(model).absolute()}")
                settings.append(f"{tier.name}.precision={options.precision}")
                settings.append(f"{tier.name}.kv_cache_bytes={options.kv_cache}")
        arguments = [argument for one in settings for argument in ("--set", one)]
        command = [sys.executable, "-m", "sage_fed.cli", "serve", "--profile", "demo", *arguments]
        log = Path(folder) / "daemon.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            _wait(address, process, log)
            yield address, (state / "admin.token").read_text().strip()
        finally:
            process.terminate()
            process.wait(30)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until both tiers serve."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise SystemExit(f"the daemon died:\n{log.read_text()}")
        with contextlib.suppress(SageFedError), Client(address) as client:
            if all(model.state is TierState.READY for model in client.models()):
                return
        time.sleep(0.2)
    raise SystemExit(f"the daemon did not get ready:\n{log.read_text()}")


def calibrate(client: Client, *, quick: bool) -> CalibrationResult:
    """One calibration; its progress goes to stderr."""
    for event in client.calibrate(quick=quick):
        if isinstance(event, CalibrationResult):
            return event
        assert isinstance(event, CalibrationProgress)
        ratio = "" if event.cost_ratio is None else f"  ratio {event.cost_ratio:.3f}"
        print(f"\r{event.fraction:4.0%} {event.phase}{ratio:20}", end="", file=sys.stderr)
    raise AssertionError("a calibration ends with a result or an error")


def token_s(result: CalibrationResult, tier: Tier, phase: Phase) -> float:
    """Device seconds per token of a tier's first point of a phase."""
    points = (p for p in result.points if p.tier is tier and p.phase is phase)
    return next(points).token_s


def row(result: CalibrationResult) -> dict[str, Any]:
    """What is kept of one run."""
    return {
        "cost_ratio": result.cost_ratio,
        "stated_spread": result.cost_ratio_spread,
        "took_s": result.took_s,
        "load_1min": round(os.getloadavg()[0], 2),
        **{f"{tier.name}_step_s": token_s(result, tier, Phase.DECODE) for tier in TIER_ROLES},
        "prefill_ratio": token_s(result, Tier.STRATEGIC, Phase.PREFILL)
        / token_s(result, Tier.TACTICAL, Phase.PREFILL),
    }


def main() -> None:
    """Calibrate again and again, and say how far the ratios are apart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of a minute a run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tactical", help="checkpoint directory; the bundled one by default")
    parser.add_argument("--strategic", help="checkpoint directory; the bundled one by default")
    parser.add_argument("--precision", default="bf16", help="of the named checkpoints")
    parser.add_argument("--kv-cache", default="512MiB", help="of the named checkpoints")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: the profile's own, which is 1")
    parser.add_argument("--address", help="of a running daemon, instead of one of our own")
    parser.add_argument("--token", default=os.environ.get("SAGE_FED_TOKEN"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        if options.address:
            address, token = options.address, options.token
        else:
            address, token = stack.enter_context(daemon(options))
        client = stack.enter_context(Client(address, token))
        models = [
            f"{model.name} {model.precision} {model.kernels} on {model.device}"
            for model in client.models()
        ]
        for number in range(options.runs):
            rows.append(row(calibrate(client, quick=options.quick)))
            print(
                f"\rrun {number + 1}: ratio {rows[-1]['cost_ratio']:.3f} "
                f"±{rows[-1]['stated_spread']:.1%} in {rows[-1]['took_s']:.0f} s, "
                f"load {rows[-1]['load_1min']}          "
            )
    ratios = [one["cost_ratio"] for one in rows]
    middle = statistics.median(ratios)
    deviation = max(abs(ratio / middle - 1) for ratio in ratios)
    print(f"median {middle:.3f}, largest deviation {deviation:.2%}, target {TARGET:.0%}")
    report.write(
        "calibrate",
        {
            "models": models,
            "quick": options.quick,
            "runs": rows,
            "median_ratio": middle,
            "largest_deviation": deviation,
            "within_target": deviation <= TARGET,
        },
        options.output,
    )


if __name__ == "__main__":
    main()
