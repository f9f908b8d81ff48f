"""The last word on the terminal: one table of a GPU run's parts and main figures.

Owns: which figures are shown, and how. Everything else is in the JSON. Without `rich` the same
rows are printed bare.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

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
