"""What the dashboard is built of: a query, and four kinds of panels.

Owns the look (colours, units, legends), so that `dashboard.py` holds only what is shown.
Fails as `grafana-foundation-sdk` does, which knows Grafana's schema.
"""

from __future__ import annotations

from dataclasses import dataclass

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
HERE = 'instance=~"$instance"'
GREEN, AMBER, RED, BLUE = "green", "orange", "red", "blue"

SECONDS, SHARE, BYTES, BYTES_S, WATTS, JOULES = "s", "percentunit", "bytes", "Bps", "watt", "joule"
ATP, ATP_S, PER_S, TOKENS_S, COUNT, RATIO = (
    "suffix: ATP",
    "suffix: ATP/s",
    "reqps",
    "suffix: tok/s",
    "short",
    "suffix: : 1",
)


@dataclass(frozen=True)
class Query:
    """One or several lines of a panel.

    `exemplars` asks for the jobs behind its buckets, too; `buckets` are a heatmap's, and `instant`
    is a table of now.
    """

    expr: str
    legend: str = ""
    exemplars: bool = False
    buckets: bool = False
    instant: bool = False

    def build(self, ref_id: str) -> prometheus.Dataquery:
        """The query as Grafana's builder has it."""
        target = prometheus.Dataquery().expr(self.expr).legend_format(self.legend).ref_id(ref_id)
        target = target.exemplar(self.exemplars).datasource(SOURCE)
        if self.buckets:
            target = target.format(PromQueryFormat.HEATMAP)
        if self.instant:
            return target.instant().format(PromQueryFormat.TABLE)
        return target.range()


Panel = stat.Panel | timeseries.Panel | heatmap.Panel | table.Panel


def _common(
    panel: Panel, title: str, text: str, span: int, height: int, queries: tuple[Query, ...]
) -> Panel:
    panel = panel.title(title).description(text).datasource(SOURCE).span(span).height(height)
    for index, query in enumerate(queries):
        panel = panel.with_target(query.build(chr(ord("A") + index)))
    return panel


def number(
    title: str,
    text: str,
    unit: str,
    *queries: Query,
    bounds: tuple[tuple[float | None, str], ...] = ((None, BLUE),),
    words: dict[str, tuple[str, str]] | None = None,
    span: int = 3,
) -> Panel:
    """The last value, coloured by `bounds` (from which value on, which colour)."""
    panel = stat.Panel().unit(unit).color_mode(BigValueColorMode.BACKGROUND)
    panel = panel.graph_mode(BigValueGraphMode.NONE).reduce_options(
        common.ReduceDataOptions().calcs(["lastNotNull"])
    )
    several = "{{" in queries[0].legend
    panel = panel.text_mode(BigValueTextMode.VALUE_AND_NAME if several else BigValueTextMode.VALUE)
    steps = [Threshold(value=value, color=colour) for value, colour in bounds]
    panel = panel.thresholds(
        dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
    )
    if words:
        results = {
            value: ValueMappingResult(text=word, color=colour)
            for value, (word, colour) in words.items()
        }
        panel = panel.mappings([ValueMap(options=results)])
    return _common(panel, title, text, span, 4, queries)


def lines(
    title: str,
    text: str,
    unit: str,
    *queries: Query,
    span: int = 8,
    stacked: bool = False,
    shares: bool = False,
    logarithmic: bool = False,
    low: float | None = 0,
) -> Panel:
    """Lines over time; `stacked` areas, `shares` of a whole."""
    panel = (
        timeseries.Panel()
        .unit(unit)
        .line_width(1)
        .fill_opacity(40 if stacked or shares else 8)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.TABLE)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if stacked or shares:
        mode = StackingMode.PERCENT if shares else StackingMode.NORMAL
        panel = panel.stacking(common.StackingConfig().mode(mode).group("A"))
    if logarithmic:
        panel = panel.scale_distribution(
            common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10)
        )
    elif low is not None:
        panel = panel.min(low)
    return _common(panel, title, text, span, 8, queries)


def heat(
    title: str, text: str, metric: str, labels: str = "", *, unit: str = SECONDS, span: int = 6
) -> Panel:
    """A histogram over time, a colour for how many; the dots are jobs (exemplars)."""
    buckets = f"sage_fed_{metric}_bucket{{{labels}{', ' if labels else ''}{HERE}}}"
    panel = (
        heatmap.Panel()
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(heatmap.HeatmapColorOptions().scheme("Spectral").exponent(0.5).steps(64))
        .cell_gap(1)
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .exemplars_color("rgba(255,0,255,0.7)")
    )
    query = Query(
        f"sum by (le) (increase({buckets}[$__rate_interval]))",
        "{{le}}",
        exemplars=True,
        buckets=True,
    )
    return _common(panel, title, text, span, 8, (query,))


def table_of(title: str, text: str, query: Query, span: int) -> Panel:
    """A table of what a query returns now."""
    return _common(table.Panel(), title, text, span, 5, (query,))


def percentiles(
    metric: str, labels: str, name: str = "", *, exemplars: bool = False
) -> tuple[Query, ...]:
    """p50, p95 and p99 of a histogram."""
    buckets = f"sage_fed_{metric}_bucket{{{labels}{', ' if labels else ''}{HERE}}}"
    return tuple(
        Query(
            f"histogram_quantile({share}, sum by (le) (rate({buckets}[$__rate_interval])))",
            f"{name}p{round(100 * share)}",
            exemplars=exemplars and share == 0.99,
        )
        for share in (0.5, 0.95, 0.99)
    )


def rate(metric: str, by: str, legend: str, labels: str = "") -> Query:
    """A counter's increase per second, summed by labels."""
    series = f"sage_fed_{metric}{{{labels}{', ' if labels else ''}{HERE}}}"
    return Query(f"sum by ({by}) (rate({series}[$__rate_interval]))", legend)


def gauge(metric: str, by: str, legend: str, labels: str = "", how: str = "sum") -> Query:
    """A gauge, put together by labels."""
    series = f"sage_fed_{metric}{{{labels}{', ' if labels else ''}{HERE}}}"
    return Query(f"{how} by ({by}) ({series})", legend)
