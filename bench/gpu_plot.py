"""The picture of a GPU run: `results/gpu.json` as `results/gpu.svg`.

Four panels: how near decoding is to what the device's memory allows; the ratio between the tiers,
by precision and by who runs them; what a busy strategic tier does to the tactical one; what the
daemon keeps of the executor's tokens. A panel whose part did not run says so.

Run: python bench/gpu_plot.py [results/gpu.json] [results/gpu.svg]
matplotlib draws it: it is the field's own, and needed by nothing that serves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
TIERS = ("tactical", "strategic")
COLOURS = {"tactical": "#1f77b4", "strategic": "#d62728"}


def picture(body: dict[str, Any], path: Path) -> None:
    """Draw all panels into one SVG."""
    mpl.rcParams.update({"svg.hashsalt": "sage-fed", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    parts = {name: part["result"] for name, part in body["parts"].items() if part.get("result")}
    for axis, (name, draw) in zip(axes.flat, _PANELS.items(), strict=True):
        if name in parts:
            draw(axis, parts[name])
        else:
            axis.text(0.5, 0.5, f"{name}: not measured", ha="center", transform=axis.transAxes)
            axis.set_axis_off()
    figure.suptitle(_title(parts.get("environment", {})))
    figure.savefig(path, metadata={"Date": None})


def _title(environment: dict[str, Any]) -> str:
    gpu = environment.get("gpu") or {}
    versions = environment.get("versions") or {}
    device = gpu.get("name") or environment.get("device", "")
    return f"{device}, torch {versions.get('torch', '?')}, {environment.get('date', '')[:10]}"


def _bandwidth(axis: Axes, result: dict[str, Any]) -> None:
    """Share of the measured read bandwidth by batch; each precision a line."""
    styles = dict(zip(result["precisions"], ("-", "--", ":", "-."), strict=False))
    for precision, rows in result["precisions"].items():
        for tier in TIERS:
            points = (rows.get(tier) or {}).get("decode") or ()
            axis.plot(
                [point["batch"] for point in points],
                [100 * (point["share_in_flight"] or 0) for point in points],
                styles[precision], marker="o", markersize=3, color=COLOURS[tier],
                label=f"{tier} {precision}",
            )  # fmt: skip
    axis.set(xscale="log", xlabel="sequences", ylabel="% of the read bandwidth", title="Decode")
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=7)


def _ratios(axis: Axes, result: dict[str, Any]) -> None:
    """Strategic over tactical time of a token, by batch."""
    ways: dict[str, list[tuple[int, float]]] = {}
    for row in result["ratio"]:
        ways.setdefault(row["way"], []).append((row["batch"], row["ratio"]))
    for way, points in ways.items():
        batches, ratios = zip(*points, strict=True)
        axis.plot(batches, ratios, marker="o", markersize=3, label=way)
    axis.axhline(6.59, color="grey", linewidth=0.8)
    axis.annotate("6.59, as published", (1, 6.59), fontsize=7, color="grey", va="bottom")
    axis.set(xlabel="sequences", ylabel="strategic / tactical", title="Cost ratio of a token")
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=7)


def _interference(axis: Axes, result: dict[str, Any]) -> None:
    """How many times its own latency the tactical tier has beside a busy strategic one."""
    costs = {"interleaved": result["cost"], **result["cost_without_interleaving"]}
    latencies = ("inter_token_s", "first_token_s")
    names = [f"{latency}_{point}" for latency in latencies for point in ("p50", "p99")]
    for index, (way, cost) in enumerate(costs.items()):
        values = [cost.get(f"tactical_{name}_times") or 0.0 for name in names]
        axis.bar([i + index * 0.25 for i in range(len(names))], values, 0.25, label=way)
    axis.axhline(2.0, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(names)), [name.replace("_s_", "\n") for name in names], fontsize=7)
    axis.set(ylabel="times that of alone", title="Tactical latency, strategic busy")
    axis.legend(fontsize=7)


def _daemon(axis: Axes, result: dict[str, Any]) -> None:
    """Tokens/s through gRPC over those of the executor alone."""
    rows = result["mixed"].values()
    shares = [100 * row["share_of_executor_alone"].get("all", 0.0) for row in rows]
    axis.bar(list(result["mixed"]), shares)
    axis.axhline(95.0, color="grey", linewidth=0.8)
    axis.set(xlabel="streams, both tiers", ylabel="% of the executor alone", title="Daemon")


_PANELS = {
    "precisions": _bandwidth,
    "peers": _ratios,
    "interference": _interference,
    "daemon": _daemon,
}

if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "gpu.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".svg")
    picture(json.loads(source.read_text()), target)
