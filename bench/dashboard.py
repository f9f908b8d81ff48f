"""A picture of the Grafana dashboard's data, for people who have no Grafana at hand.

    python bench/dashboard.py [--minutes 6] [--keep data.json] [--output docs/dashboard.png]
    python bench/dashboard.py --redraw data.json

Starts a real daemon with the bundled pair and a real Prometheus with our rules, drives mixed
traffic whose intensity changes, runs the dashboard's own queries through `query_range`, and draws
each panel where Grafana has it. No query and no place is written here: they come from the committed
dashboard. What the picture shows is the bundled pair on the machine that drew it, and no benchmark.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from daemon_process import DaemonProcess  # noqa: E402 - tests hold the harness
from real_prometheus import (  # noqa: E402
    Prometheus,
    Traffic,
    as_asked,
    board,
    run_prometheus,
)
from real_prometheus import panels as shown_panels  # noqa: E402
from surroundings import require_tool  # noqa: E402

BACKGROUND, PANEL, INK, FAINT = "#111217", "#181b1f", "#d8d9da", "#8e9196"
GRAFANA = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#c0d8ff")
NAMED = {"green": "#299c46", "orange": "#d6862c", "red": "#c4162a", "blue": "#1f60c4"}
STEP_S = 2.0
UNIT_INCH = (0.62, 0.27)
"""Of Grafana's grid: 24 units are a row."""

# Minutes of the day, as it were: clients at once, and whether they ask the strategic tier.
ACTS = ((2, False), (4, True), (12, True), (1, True), (24, True), (3, True))


def watch(prometheus: Prometheus, traffic: Traffic, minutes: float) -> tuple[float, float]:
    """Drive the acts; return when they were."""
    start_s = time.time()
    for clients, strategic in ACTS:
        traffic.strategic, traffic.pause_s = strategic, 0.4
        print(f"{clients} clients", flush=True)
        with traffic.running(clients):
            end_s = time.monotonic() + 60 * minutes / len(ACTS)
            while time.monotonic() < end_s:
                time.sleep(1)
    assert prometheus.query("up")
    return start_s, time.time()


def collect(prometheus: Prometheus, start_s: float, end_s: float) -> dict[str, Any]:
    """What every query of the dashboard finds, by the panel's id."""
    return {
        "start_s": start_s,
        "panels": {
            str(panel["id"]): [
                prometheus.series(as_asked(target["expr"], "20s"), start_s, end_s, STEP_S)
                for target in panel["targets"]
            ]
            for panel in shown_panels()
        },
    }


def draw(data: dict[str, Any], until: str) -> Figure:
    """Every panel above the row `until`, at its place."""
    panels = []
    for panel in board()["panels"]:
        if panel["type"] == "row" and panel["title"] == until:
            break
        panels.append(panel)
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(24 * UNIT_INCH[0], height * UNIT_INCH[1]), facecolor=BACKGROUND)
    for panel in panels:
        place = panel["gridPos"]
        box = (
            place["x"] / 24 + 0.002,
            1 - (place["y"] + place["h"]) / height + 0.0015,
            place["w"] / 24 - 0.004,
            place["h"] / height - 0.003,
        )
        if panel["type"] == "row":
            figure.text(0.004, box[1] + box[3] / 2, panel["title"], color=INK, size=11, va="center",
                        weight="bold")  # fmt: skip
            continue
        figure.add_artist(
            plt.Rectangle(
                box[:2], box[2], box[3], transform=figure.transFigure, color=PANEL, zorder=-5
            )
        )
        figure.text(box[0] + 0.004, box[1] + box[3] - 0.0022, panel["title"], color=INK, size=8,
                    va="top", weight="bold")  # fmt: skip
        found = list(zip(panel["targets"], data["panels"][str(panel["id"])], strict=True))
        {"stat": _tile, "table": _words, "timeseries": _lines, "heatmap": _heat}[panel["type"]](
            figure, box, panel, found, data["start_s"]
        )
    return figure


Found = list[tuple[dict[str, Any], list[dict[str, Any]]]]
Box = tuple[float, float, float, float]


def _tile(figure: Figure, box: Box, panel: dict[str, Any], found: Found, _start_s: float) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    values = [
        (_legend(target, one), one["values"][-1][1]) for target, series in found for one in series
    ]
    for index, (name, value) in enumerate(values):
        colour = next(
            step["color"]
            for step in reversed(defaults["thresholds"]["steps"])
            if step["value"] is None or value >= step["value"]
        )
        text = _number(value, defaults["unit"])
        for mapping in defaults.get("mappings", ()):
            known = mapping["options"].get(f"{value:g}")
            if known:
                text, colour = known["text"], known["color"]
        width = box[2] / len(values)
        x = box[0] + index * width
        tile = (x + 0.0015, box[1] + 0.002)
        figure.add_artist(
            plt.Rectangle(tile, width - 0.003, box[3] * 0.66, transform=figure.transFigure,
                          color=NAMED[colour], zorder=-4)
        )  # fmt: skip
        centre = x + width / 2
        figure.text(centre, box[1] + box[3] * 0.40, text, color="white", ha="center", va="center",
                    size=13 if len(values) == 1 else 9.5, weight="bold")  # fmt: skip
        figure.text(centre, box[1] + box[3] * 0.14, name, color="white", ha="center", size=7)


def _words(figure: Figure, box: Box, _panel: dict[str, Any], found: Found, _start_s: float) -> None:
    for target, series in found:
        for index, one in enumerate(series):
            labels = [text for label, text in one["metric"].items() if label != "__name__"]
            figure.text(box[0] + 0.006, box[1] + box[3] * (0.62 - 0.2 * index), "   ".join(labels),
                        color=INK, size=8, va="top")  # fmt: skip
        assert target


def _axes(figure: Figure, box: Box, *, legend: bool) -> Axes:
    left, bottom = 0.024, box[3] * (0.31 if legend else 0.13)
    axes = figure.add_axes((box[0] + left, box[1] + bottom, box[2] - left - 0.004,
                            box[3] * (0.56 if legend else 0.74)), facecolor=PANEL)  # fmt: skip
    axes.tick_params(colors=FAINT, labelsize=6, length=0)
    axes.grid(color="#2c3036", linewidth=0.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _lines(figure: Figure, box: Box, panel: dict[str, Any], found: Found, start_s: float) -> None:
    custom = panel["fieldConfig"]["defaults"]["custom"]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    mode = custom.get("stacking", {}).get("mode", "none")
    axes = _axes(figure, box, legend=True)
    drawn = [(_legend(target, one), one["values"]) for target, series in found for one in series]
    if mode == "none":
        for (name, points), colour in zip(drawn, GRAFANA * 4, strict=False):
            minutes = [(at - start_s) / 60 for at, _ in points]
            axes.plot(minutes, [value for _, value in points], color=colour, linewidth=0.9,
                      label=name)  # fmt: skip
    else:
        times = sorted({at for _, points in drawn for at, _ in points})
        table = [[dict(points).get(at, 0.0) for at in times] for _, points in drawn]
        if mode == "percent":
            sums = [sum(column) or 1.0 for column in zip(*table, strict=True)]
            table = [[v / whole for v, whole in zip(row, sums, strict=True)] for row in table]
        if times:
            axes.stackplot([(at - start_s) / 60 for at in times], table, alpha=0.75,
                           labels=[name for name, _ in drawn], colors=GRAFANA * 4,
                           linewidth=0)  # fmt: skip
    if custom.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
    elif panel["fieldConfig"]["defaults"].get("min") == 0:
        axes.set_ylim(bottom=0)
    # A unit of words is in the title; it would not fit beside the axis.
    short = "short" if unit.startswith("suffix:") else unit
    axes.yaxis.set_major_formatter(lambda value, _: _number(value, short))
    axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    if not drawn:
        axes.text(0.5, 0.5, "no such sensor on this machine", color=FAINT, size=8, ha="center",
                  transform=axes.transAxes)  # fmt: skip
        return
    columns = max(1, min(3, int(box[2] / 0.1)))
    axes.legend(loc="upper left", bbox_to_anchor=(-0.06, -0.11), ncols=columns, fontsize=5.8,
                frameon=False, labelcolor=INK, borderaxespad=0, handlelength=1.2,
                columnspacing=1.0)  # fmt: skip


def _heat(figure: Figure, box: Box, panel: dict[str, Any], found: Found, start_s: float) -> None:
    axes = _axes(figure, box, legend=False)
    ((_, series),) = found
    rows = sorted(series, key=lambda one: float(one["metric"]["le"]))
    times = sorted({at for one in rows for at, _ in one["values"]})
    counts = [[dict(one["values"]).get(at, 0.0) for at in times] for one in rows]
    new = [
        [max(c - below, 0.0) for c, below in zip(row, lower, strict=True)]
        for row, lower in zip(counts, [[0.0] * len(times), *counts], strict=False)
    ]
    seen = [index for index, row in enumerate(new) if any(row)]
    low, high = max(min(seen) - 1, 0), min(max(seen) + 2, len(rows))
    shown = [[value or math.nan for value in row] for row in new[low:high]]
    axes.pcolormesh([(at - start_s) / 60 for at in times], range(high - low), shown,
                    cmap="magma", norm=PowerNorm(0.5), shading="nearest")  # fmt: skip
    bounds = [float(one["metric"]["le"]) for one in rows[low:high]]
    ticks = range(0, high - low, max(1, (high - low) // 7))
    axes.set_yticks(list(ticks), [_number(bounds[index], "s") for index in ticks])
    axes.grid(visible=False)
    assert panel


def _legend(target: dict[str, Any], one: dict[str, Any]) -> str:
    text: str = target["legendFormat"]
    for label, value in one["metric"].items():
        text = text.replace(f"{{{{{label}}}}}", value)
    return text


def _number(value: float, unit: str) -> str:
    if math.isinf(value):
        return "more"
    if unit == "s":
        if 0 < abs(value) < 0.9995:
            return f"{value * 1e3:.3g} ms" if abs(value) >= 0.0009995 else f"{value * 1e6:.3g} µs"
        return f"{value:.3g} s" if value < 100 else f"{value / 60:.3g} min"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit in {"bytes", "Bps"}:
        for prefix in ("", "K", "M", "G"):
            if abs(value) < 1000:
                return f"{value:.3g} {prefix}B{'/s' * (unit == 'Bps')}"
            value /= 1024
        return f"{value:.3g} TB"
    tail = {"reqps": "/s", "watt": " W", "joule": " J"}.get(unit, "")
    if unit.startswith("suffix:"):
        tail = f" {unit.removeprefix('suffix:').strip()}"
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g} k{tail}"
    return f"{value:,.0f}{tail}" if abs(value) >= 1000 else f"{value:.3g}{tail}"


def main() -> None:
    """Run, query, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--keep", type=Path, help="where what was found is kept, to draw it again")
    parser.add_argument("--redraw", type=Path, help="draw this again, without a daemon")
    parser.add_argument("--until", default="What does it take of the machine?")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "dashboard.png")
    chosen = parser.parse_args()
    mpl.use("agg")
    data = json.loads(chosen.redraw.read_text()) if chosen.redraw else measure(chosen.minutes)
    if chosen.keep:
        chosen.keep.write_text(json.dumps(data))
    figure = draw(data, chosen.until)
    figure.savefig(chosen.output, dpi=100, facecolor=BACKGROUND)
    # A few colours are all it has: a quarter of the bytes.
    with Image.open(chosen.output) as picture:
        picture.convert("RGB").quantize(96).save(chosen.output, optimize=True)
    print(f"{chosen.output}: {chosen.output.stat().st_size:,} bytes")


def measure(minutes: float) -> dict[str, Any]:
    """Run the daemon, Prometheus and the traffic, and ask."""
    with tempfile.TemporaryDirectory() as folder:
        daemon = DaemonProcess.start(
            Path(folder) / "state",
            *("--set", "metrics.per_account_balance=true"),
            *("--set", "budget.initial_atp=200000", "--set", "budget.capacity_atp=200000"),
        )
        try:
            with run_prometheus(
                require_tool("prometheus"), daemon.metrics_url, Path(folder) / "prometheus", "2s"
            ) as prometheus:
                start_s, end_s = watch(prometheus, Traffic(daemon.address), minutes)
                return collect(prometheus, start_s, end_s)
        finally:
            daemon.stop()


if __name__ == "__main__":
    main()
