"""The size-inertia report: arithmetic on made-up figures, then a real run of the bundled pair."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sage_fed import engine
from sage_fed.cli.app import build_app
from sage_fed.cli.bench_commands import REFERENCES
from sage_fed.core import TIER_ROLES, Tier
from sage_fed.engine import reference
from sage_fed.errors import ModelLoadError
from sage_fed.inertia import (
    Findings,
    ModelRef,
    Plan,
    Point,
    Run,
    analyse,
    markdown,
    measure,
    record,
)
from sage_fed.inertia.analysis import (
    FAILS,
    HOLDS,
    PARTLY,
    PROVISIONAL,
    UNCERTAIN,
    UNTESTED,
    fit,
)
from sage_fed.inertia.experiment import Method
from sage_fed.model_files import resolve_model
from sage_fed.settings import PRECISIONS

PLAN = Plan(
    tactical=ModelRef("/models/small", "small"),
    strategic=ModelRef("/models/large", "large"),
    device="cuda:0",
    precisions=("bf16", "int4"),
    reference_precision="fp16",
    batches=(1,),
)

PUBLISHED = {Tier.TACTICAL: 2.03, Tier.STRATEGIC: 13.39}
LOADS = {Tier.TACTICAL: 2.99, Tier.STRATEGIC: 272.76}
PARAMETERS = {Tier.TACTICAL: 494_032_768, Tier.STRATEGIC: 7_615_616_512}
STEP_BYTES = {Tier.TACTICAL: 988_000_000, Tier.STRATEGIC: 14_140_000_000}
LAYERS = {Tier.TACTICAL: 24, Tier.STRATEGIC: 28}


def run(
    method: Method, precision: str, tier: Tier, hundred_s: float, spread: float | None = 0.01
) -> Run:
    return Run(
        method,
        precision,
        tier,
        parameters=PARAMETERS[tier],
        num_layers=LAYERS[tier],
        weight_bytes=2 * PARAMETERS[tier],
        step_bytes=STEP_BYTES[tier],
        load_s=LOADS[tier],
        memory_bytes=2 * PARAMETERS[tier],
        bandwidth_bytes_per_s=273e9,
        software="made up",
        points=(Point(1, 100, hundred_s, hundred_s / 100, spread),),
    )


def pair(
    method: Method, precision: str, small_s: float, large_s: float, spread: float | None = 0.01
) -> tuple[Run, Run]:
    return (
        run(method, precision, Tier.TACTICAL, small_s, spread),
        run(method, precision, Tier.STRATEGIC, large_s, spread),
    )


def findings(*pairs: tuple[Run, Run]) -> Findings:
    runs = tuple(one for two in pairs for one in two)
    return Findings(PLAN, "2025-11-05T12:00:00+00:00", "Thor", runs)


NOTE = pair(Method.REFERENCE, "fp16", PUBLISHED[Tier.TACTICAL], PUBLISHED[Tier.STRATEGIC])


def test_the_published_times_give_the_published_figures() -> None:
    """Slowdown 6.60, tokens per second 49.3 and 7.47, and 496 us a layer at 118 GB/s."""
    analysis = analyse(findings(NOTE))
    (row,) = analysis.slowdowns
    assert 6.596 == pytest.approx(row.slowdown, abs=1e-3)
    assert 15.415 == pytest.approx(row.parameter_ratio, abs=1e-3)
    assert row.slowdown / row.parameter_ratio == row.efficiency
    assert [49.26, 7.468] == pytest.approx([r.points[0].tokens_per_s for r in NOTE], rel=1e-3)
    (fitted,) = analysis.fits
    assert 496e-6 == pytest.approx(fitted.overhead_s, rel=0.01)
    assert 118e9 == pytest.approx(fitted.bytes_per_s, rel=0.01)
    assert 0.0 == pytest.approx(fitted.error, abs=1e-9)
    shares = [row.share for row in analysis.rooflines]
    assert [0.178, 0.387] == pytest.approx(shares, abs=2e-3)


@pytest.mark.parametrize(("overhead_s", "bytes_per_s"), [(4e-4, 1e11), (1e-6, 4e10), (0.0, 4e10)])
def test_a_fit_recovers_what_made_the_points(overhead_s: float, bytes_per_s: float) -> None:
    """Of points made by an overhead and a bandwidth it finds both, however many they are."""
    shapes = [(24, 1e9), (28, 14e9), (24, 0.5e9), (28, 7e9), (24, 0.3e9)]
    for count in (2, 4, 5):
        found = fit([(n, b, n * overhead_s + b / bytes_per_s) for n, b in shapes[:count]])
        assert found is not None
        assert overhead_s == pytest.approx(found[0], abs=1e-9)
        assert bytes_per_s == pytest.approx(found[1], rel=1e-6)


def test_a_fit_never_finds_time_below_nothing() -> None:
    """Where the larger model reads more slowly, the overhead is held at 0 and said to be."""
    found = fit([(24, 1e9, 0.030), (28, 14e9, 0.500)])
    assert found is not None
    assert (0.0, True) == (found[0], found[2])
    assert fit([(24, 1e9, 0.03)]) is None
    assert fit([(24, 1e9, 0.03), (48, 2e9, 0.06)]) is None


def test_the_note_bears_out_itself() -> None:
    """Fed with its own figures, every claim that one pair of runs can test holds."""
    found = findings(NOTE)
    verdicts = [c.verdict for c in analyse(found).conclusions]
    assert [HOLDS, HOLDS, UNTESTED, HOLDS, PROVISIONAL] == verdicts
    assert UNTESTED == analyse(found).precision.verdict


def test_claims_fail_on_figures_that_contradict_them() -> None:
    """A pair at the limit of bandwidth is linear, not 6.59, and not the same at every precision."""
    steady = pair(Method.REFERENCE, "fp16", 1.0, 16.0)
    slower = pair(Method.ENGINE, "int4", 0.5, 5.0)
    found = findings(steady, slower)
    verdicts = [c.verdict for c in analyse(found).conclusions]
    assert [PARTLY, FAILS, FAILS, HOLDS, PROVISIONAL] == verdicts


@pytest.mark.parametrize(
    ("bf16", "int4", "spread", "verdict", "says"),
    [
        ((1.0, 14.0), (0.4, 4.0), 0.01, "yes", "falls from bf16 to int4"),
        ((1.0, 10.0), (0.4, 5.0), 0.01, "yes", "rises from bf16 to int4"),
        ((1.0, 10.0), (0.4, 4.1), 0.01, "no", "within"),
        ((1.0, 10.0), (0.4, 5.0), 0.40, UNCERTAIN, "spread"),
        # As far apart as no noise of that size takes two equal ratios.
        ((1.0, 12.0), (0.4, 1.2), 0.40, "yes", "falls from bf16 to int4"),
    ],
)
def test_the_open_question_is_answered_from_the_figures(
    bf16: tuple[float, float], int4: tuple[float, float], spread: float, verdict: str, says: str
) -> None:
    """Yes with a direction, no within the uncertainty, and nothing on a busy machine."""
    pairs = (
        pair(Method.ENGINE, "bf16", *bf16, spread),
        pair(Method.ENGINE, "int4", *int4, spread),
    )
    answer = analyse(findings(*pairs)).precision
    assert verdict == answer.verdict
    assert says in answer.because


def test_one_repeat_gives_figures_and_no_verdict_about_times() -> None:
    """Its spread is unknown, never 0; what is counted, not timed, is judged all the same."""
    found = findings(
        pair(Method.REFERENCE, "fp16", 2.0, 13.2, None),
        pair(Method.ENGINE, "bf16", 1.0, 14.0, None),
        pair(Method.ENGINE, "int4", 0.4, 4.0, None),
    )
    analysis = analyse(found)
    verdicts = [c.verdict for c in analysis.conclusions]
    assert [PROVISIONAL, PROVISIONAL, PROVISIONAL, HOLDS, PROVISIONAL] == verdicts
    assert PROVISIONAL == analysis.precision.verdict
    page = markdown(replace(found, plan=replace(PLAN, repeats=1)), analysis)
    assert "| spread | - | - |" in page
    assert "one repeat, whose spread is unknown" in page
    assert {None} == {row["spread"] for row in record(found, analysis)["slowdowns"]}


@pytest.mark.parametrize(("share", "verdict"), [(0.88, HOLDS), (1.12, HOLDS), (0.7, FAILS)])
def test_memory_grows_with_the_parameters_within_a_tolerance(share: float, verdict: str) -> None:
    """A head of more bits moves the ratio a little; the sentence says what grew how much."""
    small, large = NOTE
    found = findings((small, replace(large, weight_bytes=int(share * large.weight_bytes))))
    memory = analyse(found).conclusions[3]
    assert verdict == memory.verdict
    assert "15.42 times the parameters" in memory.because
    times = large.weight_bytes / small.weight_bytes
    assert f"{share * times:.2f} (reference fp16)" in memory.because


def test_the_report_says_what_its_ratio_belongs_to() -> None:
    """Threads on a CPU, and why the daemon's own measurement may differ."""
    found = replace(findings(NOTE), threads=3)
    page = markdown(found, analyse(found))
    assert "Both methods used 3 threads. `sage-fed calibrate` may find another ratio" in page
    assert "threads. `" not in markdown(findings(NOTE), analyse(findings(NOTE)))


def test_a_busy_machine_proves_nothing() -> None:
    """A spread of half the time leaves the claims about times without a verdict."""
    found = findings(pair(Method.REFERENCE, "fp16", 1.0, 13.2, 0.5))
    verdicts = [c.verdict for c in analyse(found).conclusions]
    assert [UNCERTAIN, UNCERTAIN] == verdicts[:2]


def test_a_difference_beyond_all_noise_is_one_on_a_busy_machine_too() -> None:
    """What repeats leave uncertain is weighed against what is claimed, case by case."""
    found = findings(
        pair(Method.REFERENCE, "fp16", 1.0, 4.0, 0.3), pair(Method.ENGINE, "bf16", 1.0, 13.0, 0.3)
    )
    first, _, same, *_ = analyse(found).conclusions
    assert (PARTLY, FAILS) == (first.verdict, same.verdict)
    assert "below 1 in 1 of 2 cases, too noisy to say in 1" in first.because


def test_another_pair_is_not_held_against_the_notes_ratio() -> None:
    """Two models of other sizes say nothing about 6.59 or the note's load time."""
    small, large = NOTE
    found = findings((small, replace(large, parameters=2 * small.parameters)))
    by_claim = {c.claim: c.verdict for c in analyse(found).conclusions}
    untested = [claim for claim, verdict in by_claim.items() if verdict == UNTESTED]
    assert any("6.59" in claim for claim in untested)
    assert any("to load" in claim for claim in untested)


def test_the_report_shows_what_could_not_be_measured() -> None:
    """A model that did not load is named with its reason, and the rest is reported."""
    small, _ = pair(Method.ENGINE, "int4", 0.5, 5.0)
    broken = Run(Method.ENGINE, "int4", Tier.STRATEGIC, failure="no memory for it")
    found = findings(NOTE, (small, broken))
    analysis = analyse(found)
    page = markdown(found, analysis)
    assert "- strategic: not measured: no memory for it" in page
    assert "| seconds per 100 tokens | 2.03 s | 13.39 s |" in page
    assert "slowdown 6.60 of a linear 15.42 (efficiency 43%)" in page
    assert 1 == len(analysis.slowdowns)
    json.dumps(record(found, analysis), allow_nan=False)


def test_what_is_measured_is_handed_out_after_every_model() -> None:
    """An interrupted measurement keeps the models that were done, and can be reported."""
    demo = [ModelRef(str(resolve_model(f"bundled:demo-{t.name}")), t.name) for t in TIER_ROLES]
    plan = replace(PLAN, tactical=demo[0], strategic=demo[1], device="cpu", precisions=("fp32",))
    plan = replace(plan, reference_precision=None, prompt_tokens=4, new_tokens=2, repeats=1)
    seen: list[Findings] = []
    whole = measure(plan, lambda *_: None, seen.append)
    assert [1, 2] == [len(found.runs) for found in seen]
    assert whole == seen[-1]
    assert {None} == {point.spread for run in whole.runs for point in run.points}
    assert {None} == {run.memory_bytes for run in whole.runs}
    assert "## engine, fp32, batch 1" in markdown(seen[0], analyse(seen[0]))
    assert () == analyse(seen[0]).slowdowns
    assert "No pair was measured." in markdown(seen[0], analyse(seen[0]))


def test_a_reference_that_the_host_has_no_room_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says how much it needs before it loads: a killed process would report nothing."""
    monkeypatch.setattr(reference, "host_available_bytes", lambda: 1000)
    model = str(resolve_model("bundled:demo-tactical"))
    with pytest.raises(ModelLoadError, match=r"needs 0.0 GB of the host's memory, and 0.0 GB"):
        reference.ReferenceModel(model, "", "cpu", "bf16")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ("bench", "inertia", *arguments))


def test_the_bundled_pair_is_measured_by_both_methods(tmp_path: Path) -> None:
    """One JSON object: every run with its points, and the same in the files of --output."""
    result = bench(
        "--json", "--output", str(tmp_path), "--precisions", "bf16", "--batches", "1,2",
        "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "2",
    )  # fmt: skip
    assert 0 == result.exit_code, result.output
    body = json.loads(result.stdout)
    assert body == json.loads((tmp_path / "inertia.json").read_text())
    assert (tmp_path / "report.md").read_text().startswith("# Size inertia: demo-tactical and")
    kinds = [(r["method"], r["precision"], r["tier"]) for r in body["runs"]]
    methods, tiers = ("reference", "engine"), ("tactical", "strategic")
    assert [(method, "bf16", tier) for method in methods for tier in tiers] == kinds
    assert {""} == {r["failure"] for r in body["runs"]}
    assert [1, 2] * 4 == [point["batch"] for r in body["runs"] for point in r["points"]]
    assert all(
        point["total_s"] > point["step_s"] > 0 for r in body["runs"] for point in r["points"]
    )
    reference, engine = body["runs"][0], body["runs"][2]
    for key in ("parameters", "kv_token_bytes", "num_layers"):
        assert reference[key] == engine[key]
    assert 4 == len(body["slowdowns"])
    assert "" == result.stderr


def test_a_model_that_is_none_is_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    """A directory without a checkpoint, and a name that is nothing, are refused by name."""
    result = bench("--tactical", str(tmp_path), "--json")
    assert 1 == result.exit_code
    assert "config.json" in json.loads(result.stdout)["error"]["message"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--strategic", "neither"),
        ("--strategic", "./nowhere"),
        ("--tactical", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("--precisions", "bf16,int3"),
        ("--reference", "bf16,fp16"),
        ("--reference", "int8"),
        ("--batches", "1,x"),
        ("--device", "tpu"),
    ],
)
def test_a_bad_argument_fails_before_anything_slow_is_imported(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake costs no seconds of waiting for torch, and the option is named."""
    for name in ("sage_fed.engine", "sage_fed.inertia"):
        monkeypatch.setitem(sys.modules, name, None)
    result = bench(option, value)
    assert 2 == result.exit_code, result.output
    assert option in result.stderr


@pytest.mark.parametrize("name", ["Owner/Model", "bare"])
def test_a_folder_is_a_model_only_where_it_is_written_as_a_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder named like a hub id is not measured in its place, and the text says how it is."""
    shutil.copytree(resolve_model("bundled:demo-tactical"), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    few = ("--reference", "none", "--precisions", "fp32", "--new-tokens", "2", "--repeats", "1",
           "--batches", "1")  # fmt: skip

    refused = bench("--tactical", name, *few)
    measured = bench("--tactical", f"./{name}", *few, "--json")

    assert 2 == refused.exit_code
    assert f"./{name}" in "".join(refused.stderr.split("│")).replace("\n", "").replace(" ", "")
    assert 0 == measured.exit_code, measured.output
    assert {""} == {run["failure"] for run in json.loads(measured.stdout)["runs"]}


def test_the_names_known_without_torch_are_the_engines() -> None:
    """Precisions are checked against a list that cannot drift from what there is."""
    assert tuple(engine.PRECISIONS) == PRECISIONS
    assert tuple(reference.REFERENCE_PRECISIONS) == REFERENCES
