"""Writes the Grafana dashboard.

    python deploy/grafana/dashboard.py > deploy/grafana/dashboards/sage-fed.json

Owns what is shown and in which order: the rows answer an operator's questions one after the other.
A test compares the committed file with what this writes, and another one runs every query against
a real Prometheus.
"""

from __future__ import annotations

import itertools
import sys

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    VariableOption,
    VariableRefresh,
)
from panels import (
    AMBER,
    ATP,
    ATP_S,
    BYTES,
    BYTES_S,
    COUNT,
    GREEN,
    HERE,
    JOULES,
    PER_S,
    RATIO,
    RED,
    SECONDS,
    SHARE,
    SOURCE,
    TOKENS_S,
    WATTS,
    Panel,
    Query,
    gauge,
    heat,
    lines,
    number,
    percentiles,
    rate,
    table_of,
)  # fmt: skip


def health() -> list[Panel]:
    """Is it healthy? Green is, red is not."""
    ok = ((None, RED), (1, GREEN))
    return [
        number(
            "Daemon",
            "Whether the last scrape was answered.",
            COUNT,
            Query(f'min(up{{job="sage-fed", {HERE}}})'),
            bounds=ok,
            words={"1": ("UP", GREEN), "0": ("DOWN", RED)},
        ),
        number(
            "Tiers",
            "Whether each tier takes jobs.",
            COUNT,
            gauge("tier_state", "tier", "{{tier}}", 'state="ready"', "min"),
            bounds=ok,
            words={"1": ("READY", GREEN), "0": ("NOT READY", RED)},
        ),
        number(
            "Alerts",
            "Alerts that fire now; each has a section in docs/operations.md.",
            COUNT,
            Query('sum(ALERTS{alertname=~"SageFed.*", alertstate="firing"}) or vector(0)'),
            bounds=((None, GREEN), (1, RED)),
        ),
        number(
            "Errors",
            "Jobs that failed for a reason of ours, of all of the last five minutes; the "
            "promise is at most 0.5 %.",
            SHARE,
            Query(f"max(sage_fed:errors:ratio_rate5m{{{HERE}}})"),
            bounds=((None, GREEN), (0.005, AMBER), (0.05, RED)),
        ),
        number(
            "Longest wait",
            "Age of the oldest job that still waits for its first token.",
            SECONDS,
            gauge("oldest_waiting_age_seconds", "tier", "{{tier}}", how="max"),
            bounds=((None, GREEN), (5, AMBER), (30, RED)),
        ),
        number(
            "First token, p95",
            "Of the last five minutes; the promises are 0.5 s for 99 % of tactical "
            "and 2 s for 95 % of strategic jobs.",
            SECONDS,
            Query(
                "histogram_quantile(0.95, sum by (le, tier) "
                f"(rate(sage_fed_time_to_first_token_seconds_bucket{{{HERE}}}[5m])))",
                "{{tier}}",
            ),
            bounds=((None, GREEN), (0.5, AMBER), (2, RED)),
        ),
        number(
            "Strategic : tactical",
            "What a strategic output token costs in tactical ones: as it is charged "
            "(card), and by the device time of recent tokens (live).",
            RATIO,
            gauge(
                "cost_ratio", "source", "{{source}}", 'phase="decode", source=~"card|live"', "max"
            ),
        ),
        number(
            "Device",
            "1 where another device serves than the one that was asked for.",
            COUNT,
            Query(f"max(sage_fed_device_fallback{{{HERE}}})"),
            bounds=((None, GREEN), (1, RED)),
            words={"0": ("AS ASKED", GREEN), "1": ("FALLBACK", RED)},
        ),
        table_of(
            "Models",
            "What each tier runs, on what, with whose kernels.",
            Query(
                f"max by (tier, name, precision, kernels, device) (sage_fed_model_info{{{HERE}}})",
                instant=True,
            ),
            12,
        ),
        table_of(
            "Prices and version",
            "The rate card in force, and the daemon.",
            Query(
                f'max by (version) (label_replace(sage_fed_rate_card_info{{{HERE}}}, "version", "card $1", "version", "(.*)"))'
                f' or max by (version) (label_replace(sage_fed_build_info{{{HERE}}}, "version", "sage-fed $1", "version", "(.*)"))',
                instant=True,
            ),
            6,
        ),
        number(
            "Up for",
            "Since the daemon's process began.",
            SECONDS,
            Query(f'min(time() - process_start_time_seconds{{job="sage-fed", {HERE}}})'),
        ),
        number(
            "Requests",
            "Jobs that end, refused ones included.",
            PER_S,
            Query(f"sum(rate(sage_fed_requests_total{{{HERE}}}[$__rate_interval]))"),
        ),
    ]


def waiting() -> list[Panel]:
    """Who waits, and how long?"""
    return [
        lines(
            "Jobs in the system",
            "Running: in the batch. Waiting: for a place in it.",
            COUNT,
            gauge("requests_running", "tier", "{{tier}} running"),
            gauge("requests_waiting", "tier", "{{tier}} waiting"),
            gauge("requests_waiting_limit", "tier", "{{tier}} refused from here on"),
            logarithmic=True,
        ),
        lines(
            "Oldest job",
            "Age of the oldest job that waits for its first token, and of the oldest that has "
            "one. A job that hangs shows here and in no histogram.",
            SECONDS,
            gauge("oldest_waiting_age_seconds", "tier", "{{tier}} waiting", how="max"),
            gauge("oldest_running_age_seconds", "tier", "{{tier}} running", how="max"),
        ),
        lines(
            "Time in the queue",
            "From admission until the first prefill step.",
            SECONDS,
            *percentiles("queue_seconds", 'tier="tactical"', name="tactical "),
            *percentiles("queue_seconds", 'tier="strategic"', name="strategic "),
        ),
    ]


def latency() -> list[Panel]:
    """How fast are the answers, and does the deep tier slow the fast one down?"""
    panels: list[Panel] = []
    for title, text, metric in (
        (
            "Time to first token",
            "From a request's arrival until its first token.",
            "time_to_first_token_seconds",
        ),
        (
            "Between tokens",
            "Between two tokens of one stream, as handed to the reader.",
            "inter_token_latency_seconds",
        ),
    ):
        for tier in ("tactical", "strategic"):
            panels += [
                lines(
                    f"{title}, {tier}",
                    text,
                    SECONDS,
                    *percentiles(metric, f'tier="{tier}"', exemplars=True),
                    span=6,
                ),
                heat(
                    f"{title}, {tier}: all of them",
                    f"{text} A dot is a job: its id is in the log, in the ledger and in the client's answer.",
                    metric,
                    f'tier="{tier}"',
                ),
            ]
    for title, metric in (
        ("First token", "time_to_first_token_seconds"),
        ("Between tokens", "inter_token_latency_seconds"),
    ):
        panels.append(
            lines(
                f"{title}, tactical, while strategic is busy",
                "The same latency, told apart by whether the strategic tier had work at that moment.",
                SECONDS,
                *percentiles(metric, 'tier="tactical", contended="true"', name="strategic busy "),
                *percentiles(metric, 'tier="tactical", contended="false"', name="alone "),
                span=12,
            )
        )
    return panels


def routing() -> list[Panel]:
    """Who answers, and why?"""
    return [
        lines(
            "Routes",
            "Share of the decisions that chose each tier; none is a refusal.",
            SHARE,
            rate("route_decisions_total", "chosen", "{{chosen}}"),
            shares=True,
        ),
        lines(
            "Reasons",
            "Why each decision went as it did.",
            PER_S,
            Query(
                f"sum by (reason) (rate(sage_fed_route_decisions_total{{{HERE}}}[$__rate_interval])) > 0",
                "{{reason}}",
            ),
            stacked=True,
        ),
        lines(
            "Endings",
            "How jobs end: outcome and code.",
            PER_S,
            Query(
                f"sum by (outcome, code) (rate(sage_fed_requests_total{{{HERE}}}[$__rate_interval])) > 0",
                "{{outcome}}: {{code}}",
            ),
            stacked=True,
        ),
        lines(
            "Calls and connections",
            "What is open now, and the replies that have waited for their readers for a second.",
            COUNT,
            gauge("open_calls", "", "calls"),
            gauge("connections", "", "connections"),
            gauge("unread_replies", "", "unread"),
            span=6,
        ),
        lines(
            "Thrown out",
            "Calls refused by their headers, calls ended for a slow peer, connections closed; why.",
            PER_S,
            rate("calls_denied_total", "reason", "denied: {{reason}}"),
            rate("calls_ended_total", "why", "ended: {{why}}"),
            rate("connections_closed_total", "why", "closed: {{why}}"),
            span=6,
        ),
    ]


def modes() -> list[Panel]:
    """Do the two tiers help each other?"""
    drafts = "sage_fed_speculative_tokens_total"
    length = "sage_fed_accepted_draft_tokens"
    window = "[$__rate_interval]"
    return [
        lines(
            "Drafts accepted",
            "By what proposed them: the drafter, a cascade's first answer, or earlier text. Of all "
            "that were verified; and lately of those compared, which leaves out what stood behind "
            "a token that differed.",
            SHARE,
            Query(
                f'sum by (origin) (rate({drafts}{{outcome="accepted", {HERE}}}{window}))'
                f' / sum by (origin) (rate({drafts}{{outcome=~"accepted|rejected", {HERE}}}{window}))',
                "{{origin}}",
            ),
            gauge("draft_acceptance_ratio", "origin", "{{origin}}, compared", how="avg"),
        ),
        lines(
            "Accepted length",
            "Tokens that were accepted of a draft, on average: so many come with one step beside "
            "the model's own.",
            COUNT,
            Query(
                f"sum by (origin) (rate({length}_sum{{{HERE}}}{window}))"
                f" / sum by (origin) (rate({length}_count{{{HERE}}}{window}))",
                "{{origin}}",
            ),
        ),
        lines(
            "Draft tokens",
            "Drafted, and of those that were verified accepted or rejected; and the sequences whose "
            "newest plan has a draft.",
            TOKENS_S,
            rate("speculative_tokens_total", "outcome", "{{outcome}}"),
            gauge("speculation_active", "tier", "{{tier}} sequences with drafts"),
        ),
        lines(
            "ATP saved",
            "What one tier alone would have charged for the same output, less the charge; extra is "
            "what cascades cost more that had to escalate.",
            ATP_S,
            rate("atp_saved_total", "mode", "{{mode}} saved"),
            rate("atp_extra_total", "mode", "{{mode}} extra"),
        ),
        lines(
            "Cascades",
            "What became of the tactical answers: kept, answered again by the strategic tier "
            "(escalated), or delivered because that one was down (unavailable).",
            PER_S,
            rate("cascade_total", "outcome", "{{outcome}}"),
            stacked=True,
        ),
        heat(
            "Doubt",
            "How likely each cascade's tactical answer is wrong, by the quality card. A dot is a job.",
            "answer_error_probability",
            unit=SHARE,
            span=8,
        ),
    ]


def budget() -> list[Panel]:
    """What does it cost, who pays, and are the prices right?"""
    return [
        lines(
            "ATP",
            "Held at admission, at worst; charged for what was done; the rest is refunded; denied is "
            "the worst case of jobs that were refused for money.",
            ATP_S,
            rate("atp_reserved_total", "", "held"),
            rate("atp_charged_total", "", "charged"),
            rate("atp_refunded_total", "", "refunded"),
            rate("atp_denied_total", "", "denied"),
            span=6,
        ),
        lines(
            "Held now",
            "ATP of jobs that have not ended.",
            ATP,
            gauge("atp_held", "tier", "{{tier}}"),
            stacked=True,
            span=6,
        ),
        lines(
            "Balances",
            "After each account's last job; needs `metrics.per_account_balance`.",
            ATP,
            gauge("atp_balance", "account", "{{account}}", how="max"),
            span=6,
        ),
        lines(
            "Charged",
            "By tier.",
            ATP_S,
            rate("atp_charged_total", "tier", "{{tier}}"),
            stacked=True,
            span=6,
        ),
        lines(
            "Cost ratio",
            "Strategic over tactical cost of a token: as published, as it is charged, and live, "
            "from the device time of each tier's recent steps.",
            RATIO,
            gauge(
                "cost_ratio",
                "source, phase",
                "{{source}} {{phase}}",
                'phase=~"decode|prefill"',
                "max",
            ),
        ),
        lines(
            "Drift of the price",
            "How far live is from what is charged; above 25 % it is time to calibrate.",
            SHARE,
            Query(f"max(sage_fed:cost_ratio_drift:ratio{{{HERE}}})", "drift"),
            Query(f"max(sage_fed_rate_card_stale{{{HERE}}})", "card is stale"),
        ),
        lines(
            "Ledger",
            "Until a group of operations is durable; a job waits for two of them.",
            SECONDS,
            *percentiles("ledger_commit_seconds", ""),
            logarithmic=True,
        ),
    ]


def engine() -> list[Panel]:
    """What does the device do?"""
    return [
        lines(
            "Tokens",
            "Fed to the models: prompts (prefill) and answers (decode).",
            TOKENS_S,
            rate("engine_tokens_total", "tier, phase", "{{tier}} {{phase}}"),
        ),
        lines(
            "Device time",
            "Share of a second that each tier's steps take.",
            SHARE,
            rate("engine_step_seconds_sum", "tier, kind", "{{tier}} {{kind}}"),
            stacked=True,
        ),
        lines(
            "Memory bandwidth",
            "What decoding reads a second, of what the device can: the limit of decoding. "
            "Above 1 where caches hold what is read.",
            SHARE,
            gauge("decode_bandwidth_ratio", "tier", "{{tier}}", how="max"),
        ),
        lines(
            "Read by decoding",
            "Weights and KV cache, against the measured bandwidth.",
            BYTES_S,
            gauge("decode_bytes_per_second", "tier", "{{tier}}", how="max"),
            Query(f"max(sage_fed_memory_bandwidth_bytes_per_second{{{HERE}}})", "limit"),
            logarithmic=True,
        ),
        lines(
            "Step",
            "Device time of one forward pass.",
            SECONDS,
            *percentiles("engine_step_seconds", 'tier="tactical"', name="tactical "),
            *percentiles("engine_step_seconds", 'tier="strategic"', name="strategic "),
            logarithmic=True,
        ),
        lines(
            "Batch",
            "Sequences in the last step.",
            COUNT,
            gauge("batch_size", "tier", "{{tier}}", how="max"),
        ),
        lines(
            "KV cache, tactical",
            "In tokens: used by jobs, kept for later ones, free.",
            COUNT,
            gauge("kv_cache_tokens", "state", "{{state}}", 'tier="tactical"'),
            stacked=True,
            span=6,
        ),
        lines(
            "KV cache, strategic",
            "In tokens: used by jobs, kept for later ones, free.",
            COUNT,
            gauge("kv_cache_tokens", "state", "{{state}}", 'tier="strategic"'),
            stacked=True,
            span=6,
        ),
        lines(
            "Found in the prefix cache",
            "Prompt tokens that needed no computing, of all.",
            SHARE,
            Query(
                f"sum by (tier) (rate(sage_fed_prefix_cache_hit_tokens_total{{{HERE}}}[$__rate_interval]))"
                f" / sum by (tier) (rate(sage_fed_prefix_cache_queried_tokens_total{{{HERE}}}[$__rate_interval]))",
                "{{tier}}",
            ),
            span=6,
        ),
        lines(
            "Trouble",
            "Steps that did not fit, jobs that were interrupted, models that were loaded again.",
            COUNT,
            Query(
                f"sum by (tier) (increase(sage_fed_oom_total{{{HERE}}}[$__rate_interval]))",
                "{{tier}} out of memory",
            ),
            Query(
                f"sum by (tier) (increase(sage_fed_preemptions_total{{{HERE}}}[$__rate_interval]))",
                "{{tier}} interrupted",
            ),
            Query(
                f"sum by (tier) (increase(sage_fed_engine_restarts_total{{{HERE}}}[$__rate_interval]))",
                "{{tier}} reloaded",
            ),
            span=6,
        ),
    ]


def machine() -> list[Panel]:
    """What does it take of the machine?"""
    return [
        lines(
            "Memory of the models",
            "On their device.",
            BYTES,
            gauge("model_memory_bytes", "tier, kind", "{{tier}} {{kind}}"),
            stacked=True,
            span=6,
        ),
        lines(
            "Memory of the machine",
            "What the kernel could still give out, and what the daemon's process has.",
            BYTES,
            Query(f"min(sage_fed_memory_available_bytes{{{HERE}}})", "available"),
            Query(f'max(process_resident_memory_bytes{{job="sage-fed", {HERE}}})', "daemon"),
            span=6,
        ),
        lines(
            "GPU power",
            "As the driver or the board's sensor says; none without a GPU.",
            WATTS,
            gauge("gpu_power_watts", "sensor", "{{sensor}}"),
            span=6,
        ),
        lines(
            "Energy of an output token",
            "Joules that the GPU used, over the output tokens of both tiers.",
            JOULES,
            Query(
                f"sum(rate(sage_fed_energy_joules_total{{{HERE}}}[$__rate_interval]))"
                f' / sum(rate(sage_fed_engine_tokens_total{{phase="decode", {HERE}}}[$__rate_interval]))',
                "per token",
            ),
            span=6,
        ),
        lines(
            "CPU",
            "Cores that the daemon keeps busy, and of them its event loop, which has one.",
            COUNT,
            Query(
                f'sum(rate(process_cpu_seconds_total{{job="sage-fed", {HERE}}}[$__rate_interval]))',
                "cores",
            ),
            Query(
                f"sum(rate(sage_fed_event_loop_cpu_seconds_total{{{HERE}}}[$__rate_interval]))",
                "event loop",
            ),
            span=8,
        ),
        lines(
            "Event loop",
            "What comes to the event loop waits for its turn; a token does so once, a job a dozen times.",
            SECONDS,
            *percentiles("event_loop_lag_seconds", ""),
            span=8,
            logarithmic=True,
        ),
        lines(
            "Open files",
            "Connections included, against the limit of the process.",
            COUNT,
            Query(f'max(process_open_fds{{job="sage-fed", {HERE}}})', "open"),
            Query(f'max(process_max_fds{{job="sage-fed", {HERE}}})', "limit"),
            span=8,
            logarithmic=True,
        ),
    ]


SECTIONS = (
    ("Is it healthy?", health),
    ("Who waits, and how long?", waiting),
    ("How fast are the answers?", latency),
    ("Who answers, and why?", routing),
    ("Do the two tiers help each other?", modes),
    ("What does it cost?", budget),
    ("What does the device do?", engine),
    ("What does it take of the machine?", machine),
)


def build() -> dashboard.Dashboard:
    """The whole dashboard."""
    board = (
        dashboard.Dashboard("sage-fed")
        .uid("sage-fed")
        .description("Two language models on one device, one budget.")
        .tags(["sage-fed", "generated"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
        )
        .with_variable(
            dashboard.QueryVariable("instance")
            .label("Daemon")
            .datasource(SOURCE)
            .query("label_values(sage_fed_build_info, instance)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(VariableOption(selected=True, text="All", value="$__all"))
        )
    )
    number = itertools.count(1)
    for title, panels in SECTIONS:
        board = board.with_row(dashboard.Row(title).id(next(number)))
        for panel in panels():
            board = board.with_panel(panel.id(next(number)))
    return board


def written() -> str:
    """The file's text."""
    return JSONEncoder(sort_keys=True, indent=1).encode(build().build()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(written())
