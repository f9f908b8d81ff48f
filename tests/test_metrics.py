"""Every series on a fresh registry: what moves it, which labels it may have, what promtool says."""

from __future__ import annotations

import asyncio
import re
import resource
import socket
import ssl
import struct
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from surroundings import require_tool
from waiting import until

from sage_fed import errors
from sage_fed.cards.rate_card import RateCard
from sage_fed.core import (
    TIER_ROLES,
    CascadeOutcome,
    DraftAcceptance,
    DraftOrigin,
    Finished,
    Mode,
    ModelInfo,
    Phase,
    Price,
    Priority,
    Refusal,
    Route,
    RunningJob,
    StageTiming,
    StopReason,
    Tier,
    TierLoad,
    TierState,
    TierStatus,
    Timing,
    Usage,
)
from sage_fed.errors import CallFailed, DeviceOutOfMemory, InvalidField, QueueFull, SageFedError
from sage_fed.metrics import Metrics, MetricsServer, PageAccess, Snapshot, observers
from sage_fed.metrics.collectors import LiveRates, available_memory_bytes
from sage_fed.metrics.page import MAX_ADDRESS_CONNECTIONS, MAX_CONNECTIONS, _Places
from sage_fed.metrics.series import COUNTERS, FAULTS, GAUGES, HISTOGRAMS, REFUSALS, Gauge, Histogram
from sage_fed.routing import possible_decisions
from sage_fed.steps import StepKind, StepReport, VerifiedDrafts

TACTICAL, STRATEGIC = Tier.TACTICAL, Tier.STRATEGIC
ATP = 1_000_000
INFO = ModelInfo(
    name="org/model",
    revision="abc",
    architecture="Qwen2ForCausalLM",
    parameters=10,
    precision="bf16",
    kernels="native",
    device="cpu",
    weight_bytes=1200,
    step_bytes=1000,
    kv_cache_bytes=500,
    kv_token_bytes=8,
    load_s=2.5,
)

DESIGNED = """
requests_total route_decisions_total route_decision_seconds time_to_first_token_seconds
inter_token_latency_seconds queue_seconds prefill_seconds decode_seconds request_duration_seconds
tokens_total prompt_tokens output_tokens requests_running requests_waiting
oldest_running_age_seconds oldest_waiting_age_seconds batch_size atp_held atp_balance
atp_charged_total atp_refunded_total atp_denied_total cost_ratio decode_bytes_per_second
kv_cache_tokens model_memory_bytes memory_available_bytes model_load_seconds tier_state
device_fallback oom_total engine_restarts_total build_info model_info
atp_reserved_total ledger_commit_seconds ledger_group_size ledger_read_seconds ledger_holds_open
ledger_entries_folded_total rate_card_info rate_card_stale device_seconds_total ledger_writable
ledger_recovered_jobs ledger_recovered_atp
event_loop_lag_seconds event_loop_cpu_seconds_total
speculative_tokens_total accepted_draft_tokens speculation_active draft_acceptance_ratio
cascade_total answer_error_probability atp_saved_total atp_extra_total
quality_card_info quality_card_stale quality_card_timestamp_seconds
"""


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="0.1.0", decisions=possible_decisions(TIER_ROLES))


def finished(
    reason: StopReason = StopReason.END_OF_TEXT, output_tokens: int = 5, tier: Tier = TACTICAL
) -> Finished:
    return Finished(
        reason,
        Usage.single(tier, 20, 4, output_tokens),
        Timing(
            queue_s=0.01,
            prefill_s=0.02,
            decode_s=0.4,
            time_to_first_token_s=0.03,
            total_s=0.5,
            stages=(StageTiming(tier, queue_s=0.01, prefill_s=0.02, decode_s=0.4, device_s=0.0),),
        ),
        Price(charged_uatp=6 * ATP, held_uatp=10 * ATP, rate_card="card"),
        balance_uatp=0,
    )


def report(tier: Tier, kind: StepKind, elapsed_s: float, **changes: Any) -> StepReport:  # noqa: ANN401
    values = {"num_steps": 1, "num_prefill_tokens": 0, "num_decode_tokens": 0, "num_sequences": 1}
    return StepReport(tier=tier, kind=kind, elapsed_s=elapsed_s, **{**values, **changes})


def running(tier: Tier, age_s: float, output_tokens: int, held_uatp: int) -> RunningJob:
    return RunningJob("id", "alice", tier, Priority.NORMAL, age_s, 20, output_tokens, held_uatp)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"sage_fed_{name}", labels)


def exercise(metrics: Metrics) -> None:
    """One of everything, so that every series has samples."""
    for tier in TIER_ROLES:
        metrics.tier_changed(TierStatus(tier, TierState.READY, 1.0, INFO, restarts=1))
        metrics.hold_placed({tier: 10 * ATP})
        metrics.hold_settled({tier: 10 * ATP}, {tier: 6 * ATP})
        metrics.hold_settled({tier: ATP}, {})
        metrics.job_finished(tier, finished(tier=tier))
        metrics.tokens_delivered(tier, 2, 0.02)
        metrics.job_replayed(tier)
        for kind in StepKind:
            metrics.step_done(report(tier, kind, 0.01, num_prefill_tokens=3, num_decode_tokens=2))
        metrics.route_decided(tier, Route(tier, "explicit", tier), 0.0001)
    metrics.job_failed(None, InvalidField("job", "bad"), 0.001)
    metrics.balance_changed("alice", 5 * ATP)
    metrics.ledger_committed(3, 0.002)
    metrics.ledger_read(0.001)
    metrics.ledger_folded(3)
    metrics.rate_card("card-1")
    metrics.device_fallback(fallen_back=False)
    card = RateCard.load()
    metrics.cost_ratios("card", {phase: card.cost_ratio(phase) for phase in Phase})


# The exposition as a whole


def test_every_designed_series_is_there(metrics: Metrics) -> None:
    """Each name of the design and of operations is exported, with a help text."""
    exercise(metrics)
    text = metrics.exposition().decode()

    for name in DESIGNED.split():
        assert f"# TYPE sage_fed_{name} " in text
        assert f"# HELP sage_fed_{name} " in text
    assert "_created" not in text


def test_promtool_finds_nothing_to_complain_about(metrics: Metrics) -> None:
    """Names, units, suffixes and help texts follow Prometheus' own rules."""
    promtool = require_tool("promtool")
    exercise(metrics)

    verdict = subprocess.run(
        [promtool, "check", "metrics"],
        input=metrics.exposition(),
        capture_output=True,
        timeout=30,
        check=False,
    )

    assert (0, b"") == (verdict.returncode, verdict.stdout + verdict.stderr)


def test_traffic_brings_no_series_that_was_not_there_before() -> None:
    """What can be known in advance starts at zero, so that rates and alerts see the first event."""
    metrics = Metrics(decisions=possible_decisions(TIER_ROLES))
    before = labels_of(metrics)
    learned = {"sage_fed_model_info", "sage_fed_rate_card_info", "sage_fed_cost_ratio"}

    exercise(metrics)

    new = {
        (name, labels)
        for name, labels in labels_of(metrics) - before
        if name.startswith("sage_fed_")
        and name.removesuffix("_total") not in learned
        and name != "sage_fed_decode_bytes_per_second"
    }
    assert set() == new


def labels_of(metrics: Metrics) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def test_labels_are_bounded(metrics: Metrics) -> None:
    """An error that the table does not know becomes "other"; accounts never become labels."""
    exercise(metrics)
    metrics.job_failed(None, CallFailed("strange", status="X"), 0.1)

    class Novel(SageFedError):
        reason = "MADE_UP_0815"

    metrics.job_failed(TACTICAL, Novel("x"), 0.1)
    text = metrics.exposition().decode()

    assert 1 == value(metrics, "requests_total", tier="none", outcome="refused", code="other")
    assert "made_up_0815" not in text
    assert "alice" not in text


def test_balances_are_exported_only_on_request() -> None:
    """Account names are in the metrics where the operator wants them."""
    metrics = Metrics(per_account_balance=True)
    metrics.balance_changed("alice", 5 * ATP // 2)

    assert 2.5 == value(metrics, "atp_balance", account="alice")


def test_two_daemons_in_one_process_do_not_clash() -> None:
    """Each has its own registry and counts for itself; the global registry stays empty of ours."""
    one, other = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    one.hold_placed({TACTICAL: ATP})

    assert 1.0 == value(one, "atp_reserved_total", tier="tactical")
    assert 0.0 == value(other, "atp_reserved_total", tier="tactical")


def test_every_series_of_the_tables_is_recorded_by_its_name() -> None:
    """A name in the recorder is one of the tables', of that kind; none of the tables' is unused."""
    source = Path(observers.__file__).read_text()
    for verb, table in (("count", COUNTERS), ("show", GAUGES), ("observe", HISTOGRAMS)):
        called = re.findall(rf'series\.{verb}\(\s*"(\w+)"', source)
        assert set(called) <= table.keys()
        assert all(f'"{name}"' in source for name in table)


def test_every_code_is_an_errors_reason() -> None:
    """The codes of refusals and faults are those of the error tree."""
    reasons = {kind.reason.lower() for kind in vars(errors).values() if hasattr(kind, "reason")}
    assert {*REFUSALS, *FAULTS} <= reasons


TIERS = (*TIER_ROLES, Tier(2, "deep"))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_series_have_as_many_tiers_as_the_daemon(number: int) -> None:
    """Each of them is there from the start, counts for itself, and contends with the others."""
    tiers = TIERS[:number]
    metrics = Metrics(tiers=tiers)
    metrics.watch(lambda: Snapshot(jobs=tuple(running(tier, 1.0, 1, ATP) for tier in tiers)))
    for tier in tiers:
        metrics.tier_changed(TierStatus(tier, TierState.READY, 1.0, INFO))
        metrics.job_finished(tier, finished())
        metrics.step_done(report(tier, StepKind.DECODE, 1 << tier.rank, num_decode_tokens=64))
        with metrics.at_work(tiers[0]):
            metrics.tokens_delivered(tier, 1, 0.01)
            assert metrics.contended(tier) is (tier != tiers[0])

    names = {tier.name for tier in tiers}
    for family in metrics.registry.collect():
        shown = {sample.labels["tier"] for sample in family.samples if "tier" in sample.labels}
        assert shown in (set(), names, names | {"none"}), family.name
    assert {1.0} == {value(metrics, "atp_held", tier=name) for name in names}
    assert 2 ** (number - 1) == value(metrics, "cost_ratio", source="live", phase="decode")


# Jobs and money


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        (StopReason.END_OF_TEXT, "finished"),
        (StopReason.LENGTH, "finished"),
        (StopReason.STOP_STRING, "finished"),
        (StopReason.DEADLINE, "aborted"),
        (StopReason.ABORTED, "aborted"),
        (StopReason.CANCELLED, "aborted"),
    ],
)
def test_every_ending_counts_its_work(metrics: Metrics, reason: StopReason, outcome: str) -> None:
    """Aborted work is in every figure, under its own outcome."""
    metrics.job_finished(STRATEGIC, finished(reason, tier=STRATEGIC))
    tier = {"tier": "strategic"}

    assert 1 == value(metrics, "requests_total", **tier, outcome=outcome, code=reason.value)
    for kind, tokens in (("prompt", 20), ("cached", 4), ("output", 5)):
        assert tokens == value(metrics, "tokens_total", **tier, type=kind, outcome=outcome)
    assert 0.5 == value(metrics, "request_duration_seconds_sum", **tier, outcome=outcome)
    assert 0.03 == value(metrics, "time_to_first_token_seconds_sum", **tier, contended="false")
    assert 0.01 == value(metrics, "queue_seconds_sum", **tier)
    assert 0.02 == value(metrics, "prefill_seconds_sum", **tier)
    assert 0.4 == value(metrics, "decode_seconds_sum", **tier)
    assert 5 == value(metrics, "output_tokens_sum", **tier)


def test_a_job_without_a_token_has_no_time_to_first_token(metrics: Metrics) -> None:
    """A job cancelled in the queue does not flatter the latency."""
    metrics.job_finished(TACTICAL, finished(StopReason.CANCELLED, output_tokens=0))

    alone = {"tier": "tactical", "contended": "false"}
    assert 0 == value(metrics, "time_to_first_token_seconds_count", **alone)
    assert 1 == value(metrics, "queue_seconds_count", tier="tactical")


@pytest.mark.parametrize(
    ("tier", "error", "usage", "labels"),
    [
        (None, InvalidField("f", "m"), None, ("none", "refused", "invalid_field")),
        (TACTICAL, QueueFull("full"), None, ("tactical", "refused", "queue_full")),
        (STRATEGIC, DeviceOutOfMemory("m"), None, ("strategic", "failed", "device_out_of_memory")),
        (
            TACTICAL,
            QueueFull("late"),
            Usage.single(TACTICAL, 7, 0, 3),
            ("tactical", "failed", "queue_full"),
        ),
    ],
)
def test_refusals_and_failures_are_told_apart(
    metrics: Metrics,
    tier: Tier | None,
    error: SageFedError,
    usage: Usage | None,
    labels: tuple[str, str, str],
) -> None:
    """Our fault, or work that was done for nobody, is a failure; the rest are refusals."""
    metrics.job_failed(tier, error, 0.25, usage)
    name, outcome, code = labels

    assert 1 == value(metrics, "requests_total", tier=name, outcome=outcome, code=code)
    assert 0.25 == value(metrics, "request_duration_seconds_sum", tier=name, outcome=outcome)
    if usage is not None:
        assert 3 == value(metrics, "tokens_total", tier=name, type="output", outcome="failed")


def test_a_drafters_device_time_is_of_its_own_tier(metrics: Metrics) -> None:
    """What a job's sequence and its drafter took is told apart."""
    stage = StageTiming(STRATEGIC, 0.0, 0.1, 0.2, device_s=0.5, drafter=TACTICAL, draft_s=0.25)
    ending = finished(tier=STRATEGIC)
    ending = replace(ending, timing=replace(ending.timing, stages=(stage,)))
    metrics.job_finished(STRATEGIC, ending)
    for tier, device_s in (("strategic", 0.5), ("tactical", 0.25)):
        assert device_s == value(metrics, "device_seconds_total", tier=tier, outcome="finished")


def test_tokens_that_come_together_share_their_gap(metrics: Metrics) -> None:
    """Four tokens in one hand-over after 80 ms are four latencies of 20 ms."""
    metrics.tokens_delivered(TACTICAL, 4, 0.08)

    tier = {"tier": "tactical", "contended": "false"}
    assert 4 == value(metrics, "inter_token_latency_seconds_count", **tier)
    assert 4 == value(metrics, "inter_token_latency_seconds_bucket", **tier, le="0.02")
    assert 0 == value(metrics, "inter_token_latency_seconds_bucket", **tier, le="0.015")


def test_latency_is_told_apart_by_the_other_tiers_work(metrics: Metrics) -> None:
    """What the tactical tier does while the strategic one is busy has a label of its own."""
    alone = {"tier": "tactical", "contended": "false"}
    busy = {"tier": "tactical", "contended": "true"}
    with metrics.at_work(TACTICAL):
        metrics.tokens_delivered(TACTICAL, 1, 0.01)
        with metrics.at_work(STRATEGIC), metrics.at_work(STRATEGIC):
            metrics.tokens_delivered(TACTICAL, 2, 0.04)
            assert metrics.contended(TACTICAL)
        metrics.tokens_delivered(TACTICAL, 1, 0.01)
        assert metrics.contended(STRATEGIC)
        assert not metrics.contended(TACTICAL)
    metrics.job_finished(TACTICAL, finished(), contended=True)

    assert 2 == value(metrics, "inter_token_latency_seconds_count", **alone)
    assert 2 == value(metrics, "inter_token_latency_seconds_count", **busy)
    assert 1 == value(metrics, "time_to_first_token_seconds_count", **busy)


def test_work_ends_with_its_job_however_that_ends(metrics: Metrics) -> None:
    """A job that fails leaves nobody contended for ever."""
    with pytest.raises(QueueFull), metrics.at_work(STRATEGIC):
        raise QueueFull("x")
    assert not metrics.contended(TACTICAL)


def test_a_bucket_names_a_job_that_fell_into_it(metrics: Metrics) -> None:
    """The exemplar of a time is in its own bucket, and only where OpenMetrics is asked for."""
    job = {"job_id": "job-7", "trace_id": "ab" * 16}
    metrics.job_finished(TACTICAL, finished(), exemplar=job)
    lines = openmetrics.generate_latest(metrics.registry).decode().splitlines()
    (named,) = [line for line in lines if "time_to_first" in line and "job-7" in line]

    assert 'le="0.04"' in named
    assert f'# {{job_id="job-7",trace_id="{"ab" * 16}"}} 0.03 ' in named
    assert "job-7" not in metrics.exposition().decode()


def test_only_a_slow_gap_between_tokens_names_its_job(metrics: Metrics) -> None:
    """Tokens are many: those that nobody would ask about are not worth a name."""
    metrics.tokens_delivered(TACTICAL, 1, 0.19, {"job_id": "job-quick"})
    metrics.tokens_delivered(TACTICAL, 1, 0.21, {"job_id": "job-slow"})
    page = openmetrics.generate_latest(metrics.registry).decode()

    assert "job-quick" not in page
    assert 'job_id="job-slow"} 0.21 ' in page


def test_held_atp_is_either_charged_or_refunded(metrics: Metrics) -> None:
    """Reserved equals charged plus refunded once every hold has ended; in ATP."""
    metrics.hold_placed({TACTICAL: 10 * ATP})
    metrics.hold_placed({TACTICAL: 4 * ATP})
    metrics.hold_settled({TACTICAL: 10 * ATP}, {TACTICAL: 5 * ATP // 2})
    metrics.hold_settled({TACTICAL: 4 * ATP}, {})

    tier = {"tier": "tactical"}
    assert 14.0 == value(metrics, "atp_reserved_total", **tier)
    assert 2.5 == value(metrics, "atp_charged_total", **tier)
    assert 11.5 == value(metrics, "atp_refunded_total", **tier)


def test_decisions_are_counted_with_what_they_denied(metrics: Metrics) -> None:
    """Requested, chosen and reason are labels; a refusal for money adds its worst case."""
    metrics.route_decided(None, Route(TACTICAL, "auto_simple", None), 0.0002)
    metrics.route_decided(
        STRATEGIC, Refusal("cannot_afford", "poor", denied_uatp=670 * ATP), 0.0002
    )

    simple = {"requested": "auto", "chosen": "tactical", "reason": "auto_simple"}
    poor = {"requested": "strategic", "chosen": "none", "reason": "cannot_afford"}
    assert 1 == value(metrics, "route_decisions_total", **simple)
    assert 1 == value(metrics, "route_decisions_total", **poor)
    assert 670.0 == value(metrics, "atp_denied_total", reason="cannot_afford")
    assert 2 == value(metrics, "route_decision_seconds_count")


def test_ledger_groups_are_measured(metrics: Metrics) -> None:
    """The time to durability and the size of each group commit."""
    metrics.ledger_committed(16, 0.004)

    assert 0.004 == value(metrics, "ledger_commit_seconds_sum")
    assert 16 == value(metrics, "ledger_group_size_sum")


def test_folded_entries_are_counted(metrics: Metrics) -> None:
    """An operator sees that the books are tidied."""
    metrics.ledger_folded(256)
    metrics.ledger_folded(3)

    assert 259 == value(metrics, "ledger_entries_folded_total")


def test_reads_of_the_books_are_timed(metrics: Metrics) -> None:
    """Apart from the groups: they do not wait for the writer."""
    metrics.ledger_read(0.003)

    assert 0.003 == value(metrics, "ledger_read_seconds_sum")
    assert 0 == value(metrics, "ledger_commit_seconds_count")


# Engines


async def test_the_loop_counts_what_its_delay_kept_waiting(metrics: Metrics) -> None:
    """A delay is seen as often as it is long, and not once."""
    late_s, now = iter([0.0, 1.0, 0.004]), [100.0]

    async def sleep(seconds: float) -> None:
        late = next(late_s, None)
        if late is None:
            raise asyncio.CancelledError
        now[0] += seconds + late

    with pytest.raises(asyncio.CancelledError):
        await metrics.watch_loop(sleep=sleep, clock=lambda: now[0])

    def seen(bound: str) -> float | None:
        return value(metrics, "event_loop_lag_seconds_bucket", le=bound)

    # 0; 1, 0.95 and so on to 0.05; 0.004
    assert (1, 2, 22) == (seen("0.002"), seen("0.005"), seen("+Inf"))
    assert 22 - 20 * 0.5 == pytest.approx(seen("0.5"), abs=1)


def test_the_tier_state_is_one_of_its_values(metrics: Metrics) -> None:
    """Exactly one state of a tier is 1, and it follows the tier."""
    for state in (TierState.LOADING, TierState.READY):
        metrics.tier_changed(TierStatus(TACTICAL, state, 0.5))
        assert {state.value: 1.0} == {
            other.value: 1.0
            for other in TierState
            if value(metrics, "tier_state", tier="tactical", state=other.value)
        }
    assert 0.5 == value(metrics, "model_load_progress_ratio", tier="tactical")


def test_a_loaded_model_is_described_once(metrics: Metrics) -> None:
    """A reloaded model replaces the old description instead of joining it."""
    metrics.tier_changed(TierStatus(TACTICAL, TierState.READY, 1.0, INFO))
    metrics.tier_changed(TierStatus(STRATEGIC, TierState.READY, 1.0, INFO))
    changed = ModelInfo(
        "new", "", "LlamaForCausalLM", 10, "fp16", "torch", "cpu", 2000, 1900, 600, 8, 3.5
    )
    metrics.tier_changed(TierStatus(TACTICAL, TierState.READY, 1.0, changed))

    described = {
        (sample.labels["tier"], sample.labels["name"])
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "sage_fed_model_info"
    }
    assert {("tactical", "new"), ("strategic", "org/model")} == described
    assert 2000 == value(metrics, "model_memory_bytes", tier="tactical", kind="weights")
    assert 600 == value(metrics, "model_memory_bytes", tier="tactical", kind="kv_cache")
    assert 3.5 == value(metrics, "model_load_seconds", tier="tactical")


def test_merged_steps_count_one_by_one(metrics: Metrics) -> None:
    """A report of four steps is four observations, and its batch size their mean."""
    metrics.step_done(
        report(TACTICAL, StepKind.DECODE, 0.04, num_steps=4, num_decode_tokens=8, num_sequences=8)
    )
    tier = {"tier": "tactical"}

    assert 4 == value(metrics, "engine_step_seconds_count", **tier, kind="decode")
    assert 0.04 == value(metrics, "engine_step_seconds_sum", **tier, kind="decode")
    assert 8 == value(metrics, "engine_tokens_total", **tier, phase="decode")
    assert 2.0 == value(metrics, "batch_size", **tier)


def test_drafts_are_counted_by_what_proposed_them(metrics: Metrics) -> None:
    """A drafter's when it makes them, free ones when they are verified; and each one's length."""
    drafter, answer = DraftOrigin.DRAFTER, DraftOrigin.ANSWER
    draft: dict[str, Any] = {"num_draft_tokens": 9, "drafts_for": STRATEGIC}
    metrics.step_done(report(TACTICAL, StepKind.DRAFT, 0.01, num_prefill_tokens=3, **draft))
    verified = (VerifiedDrafts(drafter, 3, 8, 2), VerifiedDrafts(answer, 0, 4))
    verify: dict[str, Any] = {"num_verify_tokens": 12, "verified": verified}
    metrics.step_done(report(STRATEGIC, StepKind.DECODE, 0.1, num_decode_tokens=3, **verify))

    def tokens(origin: DraftOrigin) -> list[float | None]:
        labels = {"tier": "strategic", "origin": origin.value}
        return [
            value(metrics, "speculative_tokens_total", **labels, outcome=outcome)
            for outcome in ("drafted", "accepted", "rejected")
        ]

    assert [9, 6, 2] == tokens(drafter)
    assert [4, 0, 4] == tokens(answer)
    assert [0, 0, 0] == tokens(DraftOrigin.LOOKUP)
    lengths = {"tier": "strategic", "origin": "drafter"}
    assert 2 == value(metrics, "accepted_draft_tokens_count", **lengths)
    assert 6 == value(metrics, "accepted_draft_tokens_sum", **lengths)
    for tier, phase, count in (
        ("tactical", "draft", 9), ("tactical", "prefill", 3), ("tactical", "decode", 0),
        ("strategic", "verify", 12), ("strategic", "decode", 3),
    ):  # fmt: skip
        assert count == value(metrics, "engine_tokens_total", tier=tier, phase=phase)


def test_steps_with_drafts_say_nothing_of_the_cost_ratio(metrics: Metrics) -> None:
    """A verified row is cheaper than a decoded token, and would look like a cheaper tier."""
    metrics.step_done(report(TACTICAL, StepKind.DECODE, 0.064, num_decode_tokens=64))
    metrics.step_done(report(STRATEGIC, StepKind.DECODE, 0.64, num_decode_tokens=64))
    before = value(metrics, "cost_ratio", source="live", phase="decode")
    draft: dict[str, Any] = {"num_draft_tokens": 64, "drafts_for": STRATEGIC}
    metrics.step_done(report(TACTICAL, StepKind.DRAFT, 0.5, **draft))
    metrics.step_done(
        report(STRATEGIC, StepKind.DECODE, 0.01, num_decode_tokens=64, num_verify_tokens=64)
    )

    assert 10.0 == before == value(metrics, "cost_ratio", source="live", phase="decode")


def test_loads_show_what_speculates(metrics: Metrics) -> None:
    """How many sequences do now, and how much of each source's drafts is accepted."""
    load = TierLoad(
        STRATEGIC,
        TierState.READY,
        speculating=3,
        acceptance=(DraftAcceptance(DraftOrigin.LOOKUP, 0.75),),
    )
    metrics.watch(lambda: Snapshot(loads={STRATEGIC: load}))

    assert 3 == value(metrics, "speculation_active", tier="strategic")
    assert 0 == value(metrics, "speculation_active", tier="tactical")
    labels = {"tier": "strategic", "origin": "lookup"}
    assert 0.75 == value(metrics, "draft_acceptance_ratio", **labels)
    assert value(metrics, "draft_acceptance_ratio", tier="strategic", origin="drafter") is None


def test_cascades_are_counted_with_their_doubt(metrics: Metrics) -> None:
    """By what became of the answer; a job that was none counts nothing."""
    metrics.job_finished(STRATEGIC, finished(tier=STRATEGIC))
    for outcome, doubt in ((CascadeOutcome.KEPT, 0.03), (CascadeOutcome.ESCALATED, 0.6)):
        ended = replace(finished(tier=STRATEGIC), cascade=outcome, error_probability=doubt)
        metrics.job_finished(STRATEGIC, ended)

    for outcome, count in (("kept", 1), ("escalated", 1), ("unavailable", 0)):
        assert count == value(metrics, "cascade_total", outcome=outcome)
    assert 2 == value(metrics, "answer_error_probability_count")
    assert 1 == value(metrics, "answer_error_probability_bucket", le="0.05")


def test_what_two_tiers_save_or_cost_more_is_counted(metrics: Metrics) -> None:
    """Against the price of the same output on one tier; a job of one tier is no comparison."""
    price = Price(charged_uatp=4 * ATP, held_uatp=9 * ATP, rate_card="card", single_uatp=6 * ATP)
    metrics.price_compared(Mode.SINGLE, price)
    metrics.price_compared(Mode.SPECULATIVE, price)
    metrics.price_compared(Mode.CASCADE, replace(price, single_uatp=3 * ATP))

    for mode, saved, extra in (("speculative", 2.0, 0.0), ("cascade", 0.0, 1.0)):
        assert saved == value(metrics, "atp_saved_total", mode=mode)
        assert extra == value(metrics, "atp_extra_total", mode=mode)


def test_the_prefix_cache_is_counted_in_tokens(metrics: Metrics) -> None:
    """How many were looked up, and how many of them were there."""
    for hit in (0, 32):
        metrics.step_done(
            report(TACTICAL, StepKind.PREFILL, 0.1, num_queried_tokens=40, num_hit_tokens=hit)
        )

    assert 80 == value(metrics, "prefix_cache_queried_tokens_total", tier="tactical")
    assert 32 == value(metrics, "prefix_cache_hit_tokens_total", tier="tactical")
    assert 0 == value(metrics, "prefix_cache_hit_tokens_total", tier="strategic")


def test_interruptions_are_counted(metrics: Metrics) -> None:
    """A step may have cost several jobs their place."""
    metrics.step_done(report(STRATEGIC, StepKind.MIXED, 0.1, num_preempted=2))

    assert 2 == value(metrics, "preemptions_total", tier="strategic")
    assert 0 == value(metrics, "preemptions_total", tier="tactical")


def test_steps_that_did_not_fit_are_counted(metrics: Metrics) -> None:
    """Out of memory is a counter of its own."""
    short = StepReport(STRATEGIC, StepKind.PREFILL, 1, 0, 0, 1, 0.1, out_of_memory=True)
    metrics.step_done(short)

    assert 1 == value(metrics, "oom_total", tier="strategic")


def test_the_live_cost_ratio_needs_traffic_on_both_tiers(metrics: Metrics) -> None:
    """Device time per token, strategic over tactical; absent until both had enough tokens."""
    live = {"source": "live", "phase": "decode"}
    metrics.step_done(report(TACTICAL, StepKind.DECODE, 0.128, num_decode_tokens=128))
    assert value(metrics, "cost_ratio", **live) is None
    assert 0 == value(metrics, "cost_ratio_tokens", phase="decode")

    metrics.step_done(report(STRATEGIC, StepKind.DECODE, 0.756, num_decode_tokens=63))
    assert value(metrics, "cost_ratio", **live) is None
    assert 63 == value(metrics, "cost_ratio_tokens", phase="decode")

    metrics.step_done(report(STRATEGIC, StepKind.DECODE, 0.012, num_decode_tokens=1))
    assert pytest.approx(12.0) == value(metrics, "cost_ratio", **live)

    assert value(metrics, "cost_ratio", source="live", phase="prefill") is None


def test_mixed_steps_are_split_by_what_their_tokens_cost(metrics: Metrics) -> None:
    """From steps of many mixes the cost of each phase is found, and no device time is lost."""
    for tier, prefill_s, decode_s in ((TACTICAL, 0.0001, 0.002), (STRATEGIC, 0.0003, 0.012)):
        for prefill, decode in 4 * ((0, 1), (64, 3), (16, 8), (128, 1), (32, 4)):
            kind = StepKind.MIXED if prefill else StepKind.DECODE
            seconds = prefill * prefill_s + decode * decode_s
            counts = {"num_prefill_tokens": prefill, "num_decode_tokens": decode}
            metrics.step_done(report(tier, kind, seconds, **counts))

    assert pytest.approx(6.0) == value(metrics, "cost_ratio", source="live", phase="decode")
    assert pytest.approx(3.0) == value(metrics, "cost_ratio", source="live", phase="prefill")


@given(
    st.lists(
        st.tuples(st.integers(0, 512), st.integers(0, 64), st.floats(1e-5, 10.0)).filter(
            lambda step: step[0] + step[1] > 0
        ),
        min_size=1,
        max_size=30,
    )
)
def test_the_phases_times_add_up_to_the_devices(steps: list[tuple[int, int, float]]) -> None:
    """Whatever was measured: each second belongs to a phase, none to two, none is negative."""
    live = LiveRates(TIER_ROLES)
    for prefill, decode, seconds in steps:
        kind = StepKind.DECODE if not prefill else StepKind.MIXED if decode else StepKind.PREFILL
        counts = {"num_prefill_tokens": prefill, "num_decode_tokens": decode}
        live.add(report(TACTICAL, kind, seconds, **counts))
    rates = live.seconds_per_token(TACTICAL)
    total = rates.get(Phase.PREFILL, 0.0) * sum(p for p, _, _ in steps)
    total += rates.get(Phase.DECODE, 0.0) * sum(d for _, d, _ in steps)

    assert all(rate > 0 for rate in rates.values())
    assert pytest.approx(sum(seconds for _, _, seconds in steps)) == total


def test_the_live_cost_ratio_follows_the_load(metrics: Metrics) -> None:
    """Old steps fade: after a thousand new ones the old speed has no weight."""
    metrics.step_done(report(TACTICAL, StepKind.DECODE, 0.064, num_decode_tokens=64))
    metrics.step_done(report(STRATEGIC, StepKind.DECODE, 1.0, num_decode_tokens=1))
    for _ in range(2000):
        metrics.step_done(report(STRATEGIC, StepKind.DECODE, 0.005, num_decode_tokens=1))

    ratio = value(metrics, "cost_ratio", source="live", phase="decode")
    assert pytest.approx(5.0, rel=1e-3) == ratio


def test_the_cards_cost_ratios_are_shown_by_source(metrics: Metrics) -> None:
    """What is configured and what is in force stand side by side."""
    metrics.cost_ratios("configured", {Phase.DECODE: 6.59})
    metrics.cost_ratios("card", {Phase.DECODE: 12.4})

    assert 6.59 == value(metrics, "cost_ratio", source="configured", phase="decode")
    assert 12.4 == value(metrics, "cost_ratio", source="card", phase="decode")


def test_decode_bandwidth_counts_weights_and_kv_cache(metrics: Metrics) -> None:
    """1000 bytes of weights read 100 times a second are 100 kB/s, and each context token 8 more."""
    metrics.tier_changed(TierStatus(TACTICAL, TierState.READY, 1.0, INFO))
    assert 0.0 == value(metrics, "decode_bytes_per_second", tier="tactical")

    metrics.step_done(report(TACTICAL, StepKind.DECODE, 0.02, num_steps=2, num_decode_tokens=8))
    assert pytest.approx(100_000.0) == value(metrics, "decode_bytes_per_second", tier="tactical")

    # 2000 bytes of weights in the first report, 1000 and 8 x 500 of KV in the second.
    context = {"num_decode_tokens": 1, "num_context_tokens": 500}
    metrics.step_done(report(TACTICAL, StepKind.DECODE, 0.05, **context))
    expected = (2000 + 1000 + 8 * 500) / 0.07
    assert pytest.approx(expected) == value(metrics, "decode_bytes_per_second", tier="tactical")


# At the scrape


def test_decode_bandwidth_is_shown_as_a_share_of_the_measured_one(metrics: Metrics) -> None:
    """100 kB/s of a device that reads 400 kB/s are a quarter; unmeasured, there is no share."""
    metrics.tier_changed(TierStatus(TACTICAL, TierState.READY, 1.0, INFO))
    metrics.step_done(report(TACTICAL, StepKind.DECODE, 0.02, num_steps=2, num_decode_tokens=8))
    assert "decode_bandwidth_ratio" not in metrics.exposition().decode()

    metrics.memory_bandwidth(400e3)
    assert 400e3 == value(metrics, "memory_bandwidth_bytes_per_second")
    assert pytest.approx(0.25) == value(metrics, "decode_bandwidth_ratio", tier="tactical")


def test_gauges_are_read_when_they_are_scraped(metrics: Metrics) -> None:
    """Queues, ages and holds come from the snapshot of that instant."""
    snapshots = [
        Snapshot(),
        Snapshot(
            loads={
                TACTICAL: TierLoad(
                    TACTICAL,
                    TierState.READY,
                    running=3,
                    waiting=2,
                    waiting_limit=8,
                    kv_tokens_used=48,
                    kv_tokens_total=160,
                    kv_tokens_cached=32,
                )
            },
            jobs=(
                running(TACTICAL, 5.0, 1, 2 * ATP),
                running(TACTICAL, 9.0, 4, 3 * ATP),
                running(TACTICAL, 7.0, 0, ATP // 2),
                running(STRATEGIC, 1.0, 0, ATP),
            ),
        ),
    ]
    metrics.watch(lambda: snapshots[-1])
    tier = {"tier": "tactical"}

    assert 3 == value(metrics, "requests_running", **tier)
    assert 2 == value(metrics, "requests_waiting", **tier)
    assert 8 == value(metrics, "requests_waiting_limit", **tier)
    assert 9.0 == value(metrics, "oldest_running_age_seconds", **tier)
    assert 7.0 == value(metrics, "oldest_waiting_age_seconds", **tier)
    assert 48 == value(metrics, "kv_cache_tokens", **tier, state="used")
    assert 32 == value(metrics, "kv_cache_tokens", **tier, state="cached")
    assert 80 == value(metrics, "kv_cache_tokens", **tier, state="free")
    assert 5.5 == value(metrics, "atp_held", **tier)
    assert 3 == value(metrics, "ledger_holds_open", **tier)
    assert 1.0 == value(metrics, "atp_held", tier="strategic")

    snapshots.pop()
    assert 0 == value(metrics, "requests_running", **tier)
    assert 0.0 == value(metrics, "atp_held", **tier)


def test_available_memory_is_the_kernels_figure(tmp_path: Path) -> None:
    """MemAvailable in bytes, and no series where there is no such file."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemFree: 5 kB\nMemAvailable:   64 kB\n")

    assert 65536 == available_memory_bytes(meminfo)
    assert available_memory_bytes(tmp_path / "none") is None


def test_the_endpoint_serves_until_it_is_closed(metrics: Metrics) -> None:
    """A scrape over HTTP gives the registry's exposition; after close nobody listens."""
    metrics.hold_placed({TACTICAL: ATP})
    with metrics.serve("127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            page = response.read().decode()

    assert 'sage_fed_atp_reserved_total{tier="tactical"} 1.0' in page
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=10)


def get(port: int, **headers: str) -> tuple[int, str, str]:
    """Scrape; return the status, the content type and the page."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.status, response.headers["Content-Type"], response.read().decode()


FORMATS = {
    "": "text/plain",
    "text/plain; version=zzz": "text/plain",
    "text/plain; version=1.x": "text/plain",
    "application/openmetrics-text; version=1.0.0": "application/openmetrics-text",
    "application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1": "application/openmetrics-text",
    "application/openmetrics-text; version=9.9": "application/openmetrics-text",
    "application/openmetrics-text; version=zzz": "text/plain",
    "application/openmetrics-text; version=1.zzz": "text/plain",
    "application/openmetrics-text; version=": "text/plain",
    "application/openmetrics-text; version=2.0.0.x": "text/plain",
    "\xff\xfe": "text/plain",
}


def test_every_wish_for_a_format_gets_one(
    metrics: Metrics, capfd: pytest.CaptureFixture[str]
) -> None:
    """A format that the library cannot make is answered with the plain one, and quietly."""
    with metrics.serve("127.0.0.1", 0) as server:
        answers = {accept: get(server.port, Accept=accept) for accept in FORMATS}
    media_types = {
        accept: content_type.partition(";")[0] for accept, (_, content_type, _) in answers.items()
    }
    assert FORMATS == media_types
    assert {200} == {status for status, _, _ in answers.values()}
    assert all("sage_fed_build_info" in page for _, _, page in answers.values())
    assert ("", "") == capfd.readouterr()


def test_a_path_that_is_none_is_a_bad_request(
    metrics: Metrics, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Garbage in the request line is the client's fault, and quiet."""
    with (
        metrics.serve("127.0.0.1", 0) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as client,
    ):
        client.sendall(b"GET http://[ HTTP/1.0\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 400"
    assert ("", "") == capfd.readouterr()
    assert [] == caplog.records


def test_a_path_that_nobody_serves_is_not_found(metrics: Metrics) -> None:
    """A health probe on the wrong path fails, instead of reading a page of metrics as health."""
    with metrics.serve("127.0.0.1", 0) as server:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=10)
        refused.value.close()
        assert 404 == refused.value.code
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as page:
            assert 200 == page.status


def test_only_get_is_answered_with_the_page(metrics: Metrics) -> None:
    """Another method is refused; a header of stray bytes is passed over."""
    with metrics.serve("127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=10)
        refused.value.close()
        assert 405 == refused.value.code
        assert 200 == get(server.port, **{"Accept-Encoding": "\xff"})[0]


def test_a_scrape_that_fails_says_so_in_the_log(
    metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug of ours is a 500 for Prometheus and a story in the log."""

    def broken() -> Snapshot:
        raise RuntimeError("a bug")

    metrics.watch(broken)
    with metrics.serve("127.0.0.1", 0) as server, pytest.raises(urllib.error.HTTPError) as raised:
        get(server.port)
    raised.value.close()
    assert 500 == raised.value.code
    assert ["a bug"] == [str(record.exc_info[1]) for record in caplog.records if record.exc_info]


BROKEN_OFF = (
    b"",
    b"GET /metr",
    b"GET /metrics HTTP/1.0\r\nAccept",
    b"GET /metrics HTTP/1.0\r\n\r\n",
)


def test_clients_that_break_off_are_no_news(
    metrics: Metrics, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A reset before, within and after the request leaves nothing on stderr and in the log."""
    with metrics.serve("127.0.0.1", 0) as server:
        # Fewer than there are places, so that one is left to scrape.
        for sent in BROKEN_OFF:
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
                client.sendall(sent)
                # Closing sends a reset instead of an end.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert 200 == get(server.port)[0]
    assert ("", "") == capfd.readouterr()
    assert [] == caplog.records


def test_a_client_that_says_nothing_is_left(metrics: Metrics) -> None:
    """Its connection is closed once its time is over, and nothing is logged."""
    with (
        MetricsServer(metrics.registry, "127.0.0.1", 0, deadline_s=0.01) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as silent,
    ):
        assert b"" == silent.recv(1)


class Long:
    """A page that no socket's buffers take."""

    SIZE = 32 * 2**20

    def collect(self) -> Iterator[Metric]:
        """One series with a long story."""
        metric = Metric("long", "L" * self.SIZE, "gauge")
        metric.add_sample("long", {}, 1.0)
        yield metric


def receive(client: socket.socket) -> bytes:
    """What comes next; nothing where the connection is gone."""
    try:
        return client.recv(1 << 16)
    except ConnectionError:
        return b""


def is_closed(client: socket.socket, wait_s: float) -> bool:
    """Whether the other side has closed, or closes within the time."""
    client.settimeout(wait_s)
    try:
        return client.recv(1 << 16) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_a_request_has_one_deadline_however_it_drips(metrics: Metrics) -> None:
    """A byte now and then keeps no connection open."""
    with (
        MetricsServer(metrics.registry, "127.0.0.1", 0, deadline_s=0.3) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as drip,
    ):
        drip.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: ")
        for _ in range(1000):
            if is_closed(drip, 0.02):
                return
            with suppress(ConnectionError):
                drip.sendall(b"x")
        raise AssertionError("it is still open")


def test_an_answer_that_is_not_read_has_a_deadline(metrics: Metrics) -> None:
    """Whoever asks and reads nothing is left with what was sent."""
    metrics.registry.register(Long())
    with (
        MetricsServer(metrics.registry, "127.0.0.1", 0, deadline_s=0.3) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as client,
    ):
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        client.recv(1, socket.MSG_PEEK)
        # Data that was never sent is lost with an abort: the page ends before its end.
        until(lambda: not server.num_connections)
        read = sum(map(len, iter(lambda: receive(client), b"")))
        assert 0 < read < Long.SIZE


def crowd(stack: ExitStack, port: int, number: int) -> list[socket.socket]:
    """Connections that have begun to ask, and go no further."""
    clients = []
    for _ in range(number):
        client = socket.create_connection(("127.0.0.1", port), timeout=10)
        stack.enter_context(client)
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
        clients.append(client)
    return clients


def test_slow_connections_give_way_to_new_ones(metrics: Metrics) -> None:
    """However many hold on, a scraper of the same address gets in, each time."""
    with ExitStack() as stack:
        server = stack.enter_context(MetricsServer(metrics.registry, "127.0.0.1", 0, deadline_s=60))
        clients = crowd(stack, server.port, MAX_ADDRESS_CONNECTIONS)
        for _ in range(5):
            assert 200 == get(server.port)[0]
            clients += crowd(stack, server.port, 1)
        assert [b""] * 5 == [receive(client) for client in clients[:5]]
        clients[6].sendall(b" x\r\n\r\n")
        assert clients[6].recv(12) == b"HTTP/1.1 200"


def test_a_handshake_is_part_of_the_deadline(metrics: Metrics) -> None:
    """Who stalls it holds a place like any other, and no longer; others are served meanwhile."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    access = PageAccess(tls=lambda: context)
    with ExitStack() as stack:
        server = stack.enter_context(
            MetricsServer(metrics.registry, "127.0.0.1", 0, deadline_s=3, access=access)
        )
        clients = crowd(stack, server.port, 1)  # plain text is no handshake
        for _ in range(MAX_ADDRESS_CONNECTIONS):
            stalled = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            stack.enter_context(stalled)
            stalled.sendall(b"\x16\x03\x01")
            clients.append(stalled)
        until(lambda: server.num_connections == MAX_ADDRESS_CONNECTIONS)
        url = f"https://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=10, context=trusting) as page:
            assert 200 == page.status
        assert [b""] * len(clients) == [receive(client) for client in clients]
        until(lambda: not server.num_connections)


def test_idle_connections_are_bounded(metrics: Metrics) -> None:
    """No more are held than there are places; the oldest ones go."""
    with ExitStack() as stack:
        server = stack.enter_context(MetricsServer(metrics.registry, "127.0.0.1", 0, deadline_s=60))
        clients = crowd(stack, server.port, MAX_ADDRESS_CONNECTIONS + 5)
        assert [b""] * 5 == [receive(client) for client in clients[:5]]
        assert 200 == get(server.port)[0]


class Held:
    """A connection, as far as places know it."""

    def __init__(self, places: _Places, address: str, *, has_asked: bool = False) -> None:
        self.address, self.has_asked, self.is_open = address, has_asked, True
        self._places = places
        places.enter(self)  # type: ignore[arg-type] # it has what is asked of it

    def abort(self) -> None:
        """Leave."""
        self.is_open = False
        self._places.leave(self)  # type: ignore[arg-type] # as above


def test_an_address_has_no_more_than_its_part_of_the_places() -> None:
    """Who is beyond it displaces one of the same address, the slowest; others keep theirs."""
    places = _Places()
    other = Held(places, "b")
    asked = Held(places, "a", has_asked=True)
    slow = [Held(places, "a") for _ in range(MAX_ADDRESS_CONNECTIONS - 1)]
    Held(places, "a", has_asked=True)
    assert [False] + [True] * (MAX_ADDRESS_CONNECTIONS - 2) == [held.is_open for held in slow]
    assert (True, True) == (asked.is_open, other.is_open)
    for held in slow:
        held.has_asked = True
    Held(places, "a")
    assert not asked.is_open, "the oldest, where none is slow"


def test_all_addresses_together_have_so_many_places() -> None:
    places = _Places()
    held = [Held(places, str(i % 3)) for i in range(MAX_CONNECTIONS)]
    assert all(one.is_open for one in held)
    Held(places, "new")
    assert [False] + [True] * (MAX_CONNECTIONS - 1) == [one.is_open for one in held]
    assert MAX_CONNECTIONS == len(places)


def test_no_file_descriptor_is_no_end(metrics: Metrics) -> None:
    """Where a connection cannot be accepted, it is accepted when there are descriptors again."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (
        metrics.serve("127.0.0.1", 0) as server,
        socket.socket() as client,
    ):
        assert 200 == get(server.port)[0]
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            client.settimeout(10)
            client.connect(("127.0.0.1", server.port))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        client.settimeout(10)
        assert client.recv(12) == b"HTTP/1.1 200"


def test_a_removed_child_is_made_anew() -> None:
    """A kept child that was removed is not counted into any more."""
    registry = CollectorRegistry()
    gauge = Gauge("g", "G.", ["tier"], registry=registry)
    gauge.labels("tactical").set(1)
    assert gauge.labels("tactical") is gauge.labels("tactical")

    gauge.remove("tactical")
    assert registry.get_sample_value("g", {"tier": "tactical"}) is None

    gauge.labels("tactical").set(2)
    assert 2 == registry.get_sample_value("g", {"tier": "tactical"})


def test_an_observation_may_carry_an_exemplar() -> None:
    """It is kept beside the bucket that it counts in."""
    registry = CollectorRegistry()
    Histogram("h", "H.", buckets=(1.0,), registry=registry).observe(0.5, {"job_id": "job-1"})
    (family,) = registry.collect()
    (bucket,) = (s for s in family.samples if s.labels.get("le") == "1.0")
    assert bucket.exemplar is not None
    assert ({"job_id": "job-1"}, 1.0) == (bucket.exemplar.labels, bucket.value)


@given(st.floats(0, 10), st.integers(1, 50))
def test_equal_observations_count_as_if_one_by_one(amount: float, count: int) -> None:
    """The same buckets as the library's own, and the same sum up to rounding."""
    together, single = CollectorRegistry(), CollectorRegistry()
    bounds = (0.5, 1.0, 5.0)
    Histogram("h", "H.", buckets=bounds, registry=together).observe(amount, count=count)
    histogram = prometheus_client.Histogram("h", "H.", buckets=bounds, registry=single)
    for _ in range(count):
        histogram.observe(amount)

    for bound in ("0.5", "1.0", "5.0", "+Inf"):
        one, other = (r.get_sample_value("h_bucket", {"le": bound}) for r in (together, single))
        assert one == other
    assert together.get_sample_value("h_sum") == pytest.approx(single.get_sample_value("h_sum"))
