"""The table of a peers' run, and how far ahead or behind this engine is at each cell.

Owns: which figures are shown, and the ratios. A ratio above 1 is ahead of the best peer of as
many bits a weight; for times to the first token it is the peer's time over ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import peers_plan as plan
from rich.console import Console
from rich.table import Table

_SMALLER_IS_BETTER = frozenset({"ttft_s"})
_NOT_COMPARED = frozenset({"all_prefilled_s"})


def figures(engine: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Cell, figure, median."""
    for cell, values in engine.get("cells", {}).items():
        for figure, value in values.items():
            if figure not in _NOT_COMPARED:
                yield cell, figure, value["median"]


def ratios(engines: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each of our cells against the best peer that was measured there."""
    rows = []
    for ours, peers in plan.PRECISION_PEERS.items():
        theirs = {name: engines[name] for name in peers if engines.get(name, {}).get("cells")}
        for cell, figure, value in figures(engines.get(ours, {})):
            rivals = {name: _cell(engine, cell, figure) for name, engine in theirs.items()}
            if not rivals:
                continue
            smaller = figure in _SMALLER_IS_BETTER
            to = {
                name: round(theirs / value if smaller else value / theirs, 3)
                for name, theirs in rivals.items()
            }
            best = min(to, key=lambda name: to[name])
            rows.append(
                {
                    "engine": ours, "cell": cell, "figure": figure, "ours": value,
                    "best_peer": best, "best": rivals[best], "ratio": to[best],
                    "ratio_to_each": to,
                }
            )  # fmt: skip
    return rows


def _cell(engine: Mapping[str, Any], cell: str, figure: str) -> float:
    value: float = engine["cells"][cell][figure]["median"]
    return value


def show(engines: Mapping[str, Mapping[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Two tables on stderr."""
    console = Console(stderr=True, width=150, markup=False)
    cells = next((e["cells"] for e in engines.values() if e.get("cells")), {})
    singles = [cell for cell in cells if cell.startswith("prompt")]
    many = [cell for cell in cells if cell.startswith("concurrent")]
    table = Table("engine", title="medians; decode in tokens/s, first token in ms, RSS in GB")
    for cell in singles:
        for what in ("decode", "first", "prefill/s"):
            table.add_column(f"{what}\n{cell}", justify="right")
    for cell in many:
        table.add_column(cell.replace("concurrent ", "x"), justify="right")
    table.add_column("RSS", justify="right")
    for name, engine in engines.items():
        if not engine.get("cells"):
            table.add_row(name, str(engine["missing"])[:90])
            continue
        row = []
        for cell in singles:
            first_s = _cell(engine, cell, "ttft_s")
            decode = _cell(engine, cell, "decode_tokens_per_s")
            tokens = int(cell.split()[1])
            row += [f"{decode:.1f}", f"{first_s * 1e3:.0f}", f"{tokens / first_s:.0f}"]
        row += [f"{_cell(engine, cell, 'tokens_per_s'):.0f}" for cell in many]
        table.add_row(name, *row, f"{engine['rss_bytes']['median'] / 1e9:.2f}")
    console.print(table)
    versus = Table("ours", "cell", "figure", "ours", "best peer", "theirs", "ratio")
    for r in rows:
        numbers = (f"{r['ours']:.4g}", r["best_peer"], f"{r['best']:.4g}", f"{r['ratio']:.2f}")
        versus.add_row(r["engine"], r["cell"], r["figure"], *numbers)
    console.print(versus)
