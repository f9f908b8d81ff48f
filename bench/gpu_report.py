"""What people read of a GPU run: a table on the terminal, and a picture of the JSON.

Owns: which figures are shown, and how. Everything else is in the JSON. Without `rich` the table's
rows are printed bare. The picture has four panels: how near decoding is to what the device's
memory allows; the ratio between the tiers, by precision and by who runs them; what a busy
strategic tier does to the tactical one; what the daemon keeps of the executor's tokens. A panel
whose part did not run says so.

Run, for the picture: python bench/gpu_report.py [results/gpu.json] [results/gpu.svg]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = tuple[str, str, str]
"""Part, what, figure."""


def show(body: dict[str, Any]) -> None:
    """Print the table on stderr."""
    found = list(rows(body))
    try:
        from rich.console import Console  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
    except ImportError:
        for row in found:
            print(" | ".join(row), file=sys.stderr)
        return
    table = Table("part", "what", "figure", title="bench/gpu.py")
    previous = ""
    for part, what, figure in found:
        if part != previous and previous:
            table.add_section()
        table.add_row(part if part != previous else "", what, figure)
        previous = part
    Console(stderr=True, width=120, markup=False).print(table)


def rows(body: dict[str, Any]) -> Iterator[Row]:
    """Each part's status, then its figures where it has any."""
    figures = {
        "environment": _environment,
        "correctness": _correctness,
        "resident": _resident,
        "speed": _speed,
        "interference": _interference,
        "precisions": _precisions,
        "peers": _peers,
        "load": _load,
        "daemon": _daemon,
    }
    for name, part in body["parts"].items():
        why = part.get("error") or part.get("reason") or ""
        status = f"{part['status']} in {part['seconds']:.1f} s"
        yield name, status, (why.splitlines() or [""])[0][:70]
        if "result" in part and name in figures:
            for what, figure in figures[name](part["result"]):
                yield name, what, figure


def _environment(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "device", (result.get("gpu") or {}).get("name") or result["machine"]["cpu"]
    versions = result["versions"]
    yield "versions", f"torch {versions['torch']}, sage-fed {versions['sage-fed']}"
    yield "commit", str(result["commit"])


def _correctness(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for precision, models in result["precisions"].items():
        wrong = [name for name, row in models.items() if not row["ok"]]
        error = max(row["relative"] for row in models.values())
        off = sum(row["tokens_off"] for row in models.values())
        total = sum(row["tokens"] for row in models.values())
        verdict = f"WRONG: {', '.join(wrong)}" if wrong else f"{len(models)} models right"
        yield f"{precision}: {verdict}", f"logits off by {error:.1e}, {off} of {total} tokens off"


def _resident(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, model in result["models"].items():
        memory = (model["weight_bytes"] + model["kv_cache_bytes"]) / 2**30
        yield name, f"{model['name']}: {memory:.2f} GiB with its KV cache"
    yield "ordinary numbers, valid ids", str(result["ok"])


def _speed(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    limits = result["limits"]
    read, flops = limits["read_limit_bytes_per_s"], limits["bf16_matrix_flops_per_s"]
    yield "limits", f"{read / 1e9:.0f} GB/s read, {flops / 1e12:.2f} TFLOP/s"
    for row in result["decode"]:
        what = f"decode {row['tier']} {row['batch']} x {row['context']}"
        yield what, f"{_timed(row)}, {row['share_of_read_limit']:.0%} of the read limit"
    for row in result["prefill"]:
        what = f"prefill {row['tier']} {row['cached']}+{row['tokens']}"
        yield what, f"{_timed(row)}, {row['share_of_matrix_rate']:.0%} of the matrix rate"
    for row in result["overhead"]:
        step_ms, layer_us = row["hollow_step"]["median_s"] * 1e3, row["per_layer_s"] * 1e6
        busy = (row.get("kernels") or {}).get("busy_s")
        more = f", kernels busy {busy * 1e3:.2f} ms" if busy else ""
        yield f"launches {row['tier']}", f"{step_ms:.2f} ms a step, {layer_us:.0f} us a layer{more}"
    for row in result["ratio"]:
        keys = ("batch", "context", "cached", "tokens")
        at = " ".join(f"{key} {row[key]}" for key in keys if key in row)
        yield f"ratio {row['phase']}, {at}", f"{row['ratio']:.2f} (work {row['ratio_of_work']:.2f})"
    if result["cut"]:
        yield "cut for want of time", f"{len(result['cut'])} points"


def _timed(row: dict[str, Any]) -> str:
    ms = row["median_s"] * 1e3
    return f"{ms:.2f} ms (spread {row['spread']:.0%}), {row['tokens_per_s']:.0f} tok/s"


def _interference(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for scene in ("tactical_alone", "strategic_alone", "together", "two_threads", "two_streams"):
        if scene not in result:
            continue
        for tier, row in result[scene].items():
            gap = row["inter_token_s"]
            if "p50" in gap:
                gaps = f"{gap['p50'] * 1e3:.2f} / {gap['p99'] * 1e3:.2f} ms (p50 / p99)"
                yield f"{scene}: {tier}", f"{row['tokens_per_s']:.0f} tok/s, token gap {gaps}"
    costs = {"": result["cost"], **result["cost_without_interleaving"]}
    for scene, cost in costs.items():
        for name, value in cost.items():
            yield f"{scene} {name}".strip(), "not seen" if value is None else f"{value:.2f}"


def _precisions(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for precision, tiers in result["precisions"].items():
        for tier in ("tactical", "strategic"):
            row = tiers.get(tier) or {}
            if "error" in row:
                yield f"{precision} {tier}", row["error"][:80]
            for point in row.get("decode", ()):
                share = point["share_in_flight"]
                yield (
                    f"{precision} {tier} {point['batch']}",
                    f"{_timed(point)}, {share:.0%} in flight",
                )
        for row in tiers.get("ratio", ()):
            yield f"{precision} ratio, batch {row['batch']}", f"{row['ratio']:.2f}"
    for precision, tiers in result["speedup_over_bf16"].items():
        for tier, times in tiers.items():
            yield f"{precision} over bf16, {tier}", f"{times:.2f} x"


def _peers(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for tier, rows in result["tiers"].items():
        for row in rows:
            rates = [
                f"{way} {own['tokens_per_s']:.0f}" if isinstance(own, dict) else f"{way}: none"
                for way, own in row.items()
                if way != "batch"
            ]
            yield f"{tier}, {row['batch']} at once, tok/s", ", ".join(rates)


def _load(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for number in ("first", "second"):
        if row := result.get(number):
            figures = f"{row['ready_s']:.1f} s to READY, {row['capture_s']:.1f} s of it capturing"
            yield f"{number} start", f"{figures}, weights at {row['share_of_disk']:.0%} of the disk"


def _daemon(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "ready", f"{result['ready_s']:.1f} s"
    for streams, row in result["mixed"].items():
        rates = ", ".join(
            f"{tier} {row[tier]['tokens_per_s']:.0f} tok/s"
            for tier in ("tactical", "strategic")
            if tier in row
        )
        share = row["share_of_executor_alone"].get("all")
        yield f"mixed, {streams} streams", rates + (f" ({share:.0%})" if share else "")
    cancels, left_over = result["cancels"], result["left_over"]
    verdict = f"WRONG: {', '.join(left_over)}" if left_over else "nothing left over"
    yield f"{cancels['cancels']} cancels", verdict
    if found := result.get("calibration"):
        ratio = f"{found['cost_ratio']:.2f} +-{found['cost_ratio_spread']:.1%}"
        yield "calibration", f"{ratio} in {found['took_s']:.0f} s"
    for what in result["cut"]:
        yield "cut", what


RESULTS = Path(__file__).resolve().parent / "results"
TIERS = ("tactical", "strategic")
COLOURS = {"tactical": "#1f77b4", "strategic": "#d62728"}


def picture(body: dict[str, Any], path: Path) -> None:
    """Draw all panels into one SVG."""
    import matplotlib as mpl  # noqa: PLC0415 - not where a GPU is
    from matplotlib.figure import Figure  # noqa: PLC0415

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


def _interference_panel(axis: Axes, result: dict[str, Any]) -> None:
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


def _daemon_panel(axis: Axes, result: dict[str, Any]) -> None:
    """Tokens/s through gRPC over those of the executor alone."""
    rows = result["mixed"].values()
    shares = [100 * row["share_of_executor_alone"].get("all", 0.0) for row in rows]
    axis.bar(list(result["mixed"]), shares)
    axis.axhline(95.0, color="grey", linewidth=0.8)
    axis.set(xlabel="streams, both tiers", ylabel="% of the executor alone", title="Daemon")


_PANELS = {
    "precisions": _bandwidth,
    "peers": _ratios,
    "interference": _interference_panel,
    "daemon": _daemon_panel,
}

if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "gpu.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".svg")
    picture(json.loads(source.read_text()), target)
