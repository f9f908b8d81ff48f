"""What a cascade gives for what it costs: accuracy against ATP.

What has to happen: a tactical token costs 1 ATP and a strategic one 6.59 (the shipped card). A
cascade pays the tactical answer always and, where it doubts it, the strategic tier besides; there a
token of the tactical answer that the strategic tier draws too costs its verification alone. So it
is cheaper while it escalates less than 1 - 1/6.59 of its answers, by the more the more of an
answer both agree on, and it is worth it as far as doubt finds the wrong answers: the measure is the
random mixture, which escalates as many by chance.

`humaneval`: 164 problems, code run in a subprocess with limits. Both tiers answer alone, then every
problem is asked of a cascade whose card doubts everything, so that all escalate: answers, usage and
prices are the daemon's. P(wrong) of each tactical answer is cross-fitted in five folds, score and
map chosen without it, by what `sage-fed calibrate --quality` uses. The most doubtful are escalated.

`pair`: the bundled pair and its shipped card, on questions of neither training nor the card, each
job with its task class. On one half `max_error` is chosen: the cheapest at no more than half a
point less accuracy than the strategic tier. On the other half the daemon runs cascades with it.

Prompts are never found again (`prefix_cache = false`), so that the third asking costs what the
first does. Answers are kept, and a run that was interrupted goes on where it stopped.

Run: python bench/cascade.py pair [--tasks 2000]
     python bench/cascade.py humaneval --tactical DIR --strategic DIR --human-eval FILE.jsonl.gz
     [--precision int8] [--tasks 164] [--parallel 4] [--kept FOLDER] [--output FILE]
Writes bench/results/cascade.json, a scene at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import gzip
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import report

sys.path.insert(0, str(Path(__file__).parent / "pair"))

from reliability import line_of
from tasks import FAMILIES, task_at

from sage_fed.calibrate import quality, quality_fit
from sage_fed.calibrate.quality import AnswerFile, Judged, QualityTask
from sage_fed.cards.quality_card import (
    ANY_CLASS,
    QUALITY_FOLDER,
    QualityCard,
    QualityFingerprint,
    quality_card_text,
    quality_cards,
)
from sage_fed.cards.rate_card import RateCard, charge
from sage_fed.cli.demo import DemoDaemon
from sage_fed.client import Client, wait_serving
from sage_fed.core import (
    UATP_PER_ATP,
    CascadeOutcome,
    Mode,
    Phase,
    PhaseTokens,
    Tier,
    Usage,
)

T, S = Tier.TACTICAL, Tier.STRATEGIC
_START_S, _STOP_S = 300.0, 60.0
_BALANCE_ATP = 10_000_000
_PAIR_SEED = 4_018
"""Another than that of the card's own questions."""
_MOST_LOST = 0.005
"""Of accuracy on the half that `max_error` is chosen on; a point is allowed on the other."""


@dataclass(frozen=True, slots=True)
class Cascaded:
    """A cascade's answer to a task, and what it took."""

    text: str
    usage: Usage
    outcome: CascadeOutcome

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Cascaded:
        """Return what `line` wrote."""
        counts = {key: line[key] for key in ("prompt_tokens", "cached_tokens", "output_tokens")}
        by_phase = tuple(
            PhaseTokens(Tier.called(tier), Phase(phase), tokens)
            for tier, phase, tokens in line["usage"]
        )
        outcome = CascadeOutcome(line["outcome"])
        return cls(line["text"], Usage(**counts, by_phase=by_phase), outcome)

    def line(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "text": self.text,
            "prompt_tokens": self.usage.prompt_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "output_tokens": self.usage.output_tokens,
            "usage": [[n.tier.name, n.phase.value, n.tokens] for n in self.usage.by_phase],
            "outcome": self.outcome.value,
        }

    def count(self, tier: Tier, phase: Phase) -> int:
        """Return the tokens of a kind."""
        return sum(n.tokens for n in self.usage.by_phase if (n.tier, n.phase) == (tier, phase))


class Kept:
    """Cascades' answers by task, one JSON object a line, of this card and `max_error`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.answers: dict[str, Cascaded] = {}
        with contextlib.suppress(FileNotFoundError), path.open() as lines:
            for line in map(json.loads, lines):
                self.answers[line["task"]] = Cascaded.read(line)

    def put(self, task: QualityTask, answer: Cascaded) -> None:
        """Keep an answer; a line is one write, from any thread."""
        self.answers[task.key] = answer
        with self._path.open("a") as file:
            file.write(json.dumps({"task": task.key, **answer.line()}) + "\n")


@contextlib.contextmanager
def serving(flags: Sequence[str]) -> Iterator[tuple[Client, Path]]:
    """A demo daemon with these flags, its operator's client, and its folder."""
    settings = [f"budget.{key}={_BALANCE_ATP}" for key in ("initial_atp", "capacity_atp")]
    settings += [f"{tier.name}.prefix_cache=false" for tier in (T, S)]
    with tempfile.TemporaryDirectory(prefix="sage-fed-cascade-") as folder:
        state_dir = Path(folder)
        words = (word for one in settings for word in ("--set", one))
        daemon = DemoDaemon(state_dir, *words, *flags)
        try:
            endpoint = daemon.endpoint(_START_S)
            for service in ("tactical", "strategic"):
                if not wait_serving(endpoint.listen, service, _START_S):
                    raise SystemExit(f"the {service} tier did not get ready:\n{daemon.log()}")
            token = (state_dir / "admin.token").read_text().strip()
            with Client(endpoint.listen, token) as client:
                yield client, state_dir
        finally:
            daemon.stop(_STOP_S)


def judged_alone(
    client: Client, tasks: Sequence[QualityTask], kept: Path, parallel: int
) -> tuple[tuple[Judged, ...], QualityFingerprint]:
    """Both tiers' own answers, judged, and whose they are."""
    models = {model.tier: model for model in client.models()}
    fingerprint = QualityFingerprint.of(models)
    with AnswerFile.of(kept, fingerprint) as answers:
        judged = quality.collect(
            tasks, (T, S), client.generate, answers,
            temperature=0.0, parallel=parallel, progress=_say,
        )  # fmt: skip
    return judged, fingerprint


def _say(share: float, text: str) -> None:
    print(f"{share:6.1%} {text}", file=sys.stderr, flush=True)


def cascades(
    client: Client, tasks: Sequence[QualityTask], kept: Kept, max_error: float, parallel: int
) -> list[Cascaded]:
    """Ask each task of a cascade, `parallel` at a time; in the order of the tasks."""

    def ask(task: QualityTask) -> Cascaded:
        if task.key not in kept.answers:
            job = replace(
                quality.job_of(task, T, 0.0),
                requested=None,
                mode=Mode.CASCADE,
                max_error=max_error,
                task_class=task.task_class,
            )
            answer = client.generate(job)
            assert answer.finished.cascade is not None, "a cascade says what it did"
            kept.put(task, Cascaded(answer.text, answer.finished.usage, answer.finished.cascade))
            _say(len(kept.answers) / len(tasks), f"cascade: {answer.finished.cascade.value}")
        return kept.answers[task.key]

    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(ask, tasks))


def adopt_doubt(client: Client, state_dir: Path, fingerprint: QualityFingerprint) -> None:
    """Have a card in force by which every tactical answer is wrong, and no strategic one."""
    known = QualityCard.load(quality_cards()[0])
    flat = known.classes[ANY_CLASS]
    flat = replace(
        flat, p_wrong=(0.99,) * len(flat.scores), p_wrong_deepest=(0.0,) * len(flat.scores)
    )
    card = replace(
        known,
        version="doubts-everything",
        fingerprint=fingerprint,
        classes=MappingProxyType({ANY_CLASS: flat}),
    )
    folder = state_dir / "cards" / QUALITY_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{card.version}.toml").write_text(quality_card_text(card))
    client.adopt_quality_card(card.version)


# HumanEval


def humaneval_tasks(file: Path, count: int) -> list[QualityTask]:
    """The first problems, checked by `humaneval_check.py` in a process with limits."""
    checker = Path(__file__).parent / "humaneval_check.py"
    lines = []
    with gzip.open(file, "rt") as problems:
        for problem in map(json.loads, problems):
            prompt = (
                "Complete this Python function. Answer with the whole function in one code "
                f"block.\n```python\n{problem['prompt']}```"
            )
            command = [sys.executable, "-I", str(checker), str(file), problem["task_id"]]
            check = {"command": command, "cpu_s": 10, "memory_mib": 1024, "wall_s": 30.0}
            lines.append({"prompt": prompt, "check": check, "max_new_tokens": 512})
    return _read(lines[:count])


def _read(lines: Sequence[Mapping[str, Any]]) -> list[QualityTask]:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(f"{json.dumps(line)}\n" for line in lines))
        file.flush()
        return list(quality.read_tasks(Path(file.name)))


def humaneval(args: argparse.Namespace, kept: Path) -> dict[str, Any]:
    """Ask, judge, cross-fit; the curve and what an escalated answer costs."""
    own = {
        "cpu_threads": "0",
        "limits.max_new_tokens": "512",
        "tactical.model": args.tactical,
        "strategic.model": args.strategic,
        "tactical.kv_cache_bytes": "512MiB",
        "strategic.kv_cache_bytes": "1GiB",
    }
    for tier in ("tactical", "strategic"):
        own |= {f"{tier}.precision": args.precision, f"{tier}.max_context_tokens": "2048"}
    flags = [word for key, value in own.items() for word in ("--set", f"{key}={value}")]
    tasks = humaneval_tasks(args.human_eval, args.tasks or 164)
    with serving(flags) as (client, state_dir):
        judged, fingerprint = judged_alone(client, tasks, kept, args.parallel)
        adopt_doubt(client, state_dir, fingerprint)
        escalated = cascades(
            client, tasks, Kept(kept / f"cascades-{fingerprint.digest}.jsonl"), 0.01, args.parallel
        )
        models = [asdict(model) for model in fingerprint.models.values()]
    assert {CascadeOutcome.ESCALATED} == {each.outcome for each in escalated}
    return {"models": models, **measured(judged, escalated, RateCard.load())}


def measured(
    judged: Sequence[Judged], escalated: Sequence[Cascaded], card: RateCard
) -> dict[str, Any]:
    """Accuracy, doubt, the curve, and the price of escalated answers against `single`."""
    right = {
        "tactical": np.array([each.right["tactical"] for each in judged]),
        "strategic": np.array([each.right["strategic"] for each in judged]),
        "escalated": np.array(
            [j.task.check.passes(e.text) for j, e in zip(judged, escalated, strict=True)]
        ),
    }
    sample = quality_fit.Sample(
        quality_fit.features_of(judged, "tactical"),
        ~right["tactical"],
        quality_fit.folds_of(judged),
    )
    p_wrong = quality_fit.out_of_fold(sample)
    tactical = np.array([each.answers["tactical"].charged_uatp for each in judged])
    strategic = np.array([each.answers["strategic"].charged_uatp for each in judged])
    whole = np.array([charge(card, each.usage) for each in escalated])
    curve = [
        quality_fit.curve_point(
            share, p_wrong, (right["tactical"], right["escalated"]), (tactical, whole - tactical)
        )
        for share in quality_fit.SHARES
    ]
    doubtful = np.argsort(-p_wrong, kind="stable")[: round(0.3 * len(judged))]
    every = np.arange(len(judged))
    return {
        "tasks": len(judged),
        "rate_card": card.version,
        "right": {name: float(of.mean()) for name, of in right.items()},
        "same_text_as_strategic_alone": float(
            np.mean(
                [j.answers["strategic"].text == e.text
                 for j, e in zip(judged, escalated, strict=True)]
            )
        ),
        "atp_a_task": {
            "tactical": float(tactical.mean()) / UATP_PER_ATP,
            "strategic": float(strategic.mean()) / UATP_PER_ATP,
        },
        "doubt": {
            "auroc": quality_fit.auroc(p_wrong, sample.wrong),
            "calibration_error": quality_fit.calibration_error(p_wrong, sample.wrong),
            "brier": quality_fit.brier(p_wrong, sample.wrong),
            "base_brier": quality_fit.brier(
                np.full(len(p_wrong), sample.wrong.mean()), sample.wrong
            ),
        },
        "escalated_answers": {
            name: {
                "atp_of_strategic_alone": float(whole[rows].sum() / strategic[rows].sum()),
                "strategic_part": float(
                    (whole - tactical)[rows].sum() / strategic[rows].sum()
                ),
                **_kinds([escalated[row] for row in rows]),
            }
            for name, rows in (("all", every), ("most_doubtful_30_percent", doubtful))
        },
        "curve": [asdict(point) for point in curve],
        "above_the_mixture": {
            f"{point.share:.0%}": point.accuracy.value - point.mixture
            for point in curve
            if 0.15 < point.share < 0.45
        },
    }  # fmt: skip


def _kinds(answers: Sequence[Cascaded]) -> dict[str, float]:
    """Mean tokens of an answer by what was done for them on the strategic tier."""
    totals: Counter[str] = Counter()
    for each in answers:
        totals["drafted_by_tactical"] += each.count(T, Phase.DRAFT)
        totals["verified"] += each.count(S, Phase.VERIFY)
        totals["decoded"] += each.count(S, Phase.DECODE)
        totals["output"] += each.usage.output_tokens
    return {name: total / len(answers) for name, total in totals.items()}


# The bundled pair


def pair_tasks(count: int) -> list[QualityTask]:
    """Questions of all families, no prompt twice, from the test split by a seed of their own."""
    lines: dict[str, dict[str, Any]] = {}
    index = 0
    while len(lines) < count:
        task = task_at(_PAIR_SEED, index, "test", tuple(FAMILIES))
        lines.setdefault(task.prompt, line_of(task, ""))
        index += 1
    return _read(list(lines.values()))


def pair(args: argparse.Namespace, kept: Path) -> dict[str, Any]:
    """Choose `max_error` on one half, and run cascades on the other."""
    tasks = pair_tasks(args.tasks or 2000)
    card = QualityCard.load(quality_cards()[0])
    with serving([]) as (client, _):
        judged, _ = judged_alone(client, tasks, kept, args.parallel)
        half = len(tasks) // 2
        chosen = choose(card, judged[:half])
        file = kept / f"pair-{card.version}-{chosen:g}.jsonl"
        answers = cascades(client, tasks[half:], Kept(file), chosen, args.parallel)
    rates, rest = RateCard.load(), judged[half:]
    right = np.array([j.task.check.passes(a.text) for j, a in zip(rest, answers, strict=True)])
    alone = np.array([each.right["strategic"] for each in rest])
    cost = np.array([charge(rates, each.usage) for each in answers])
    strategic = np.array([each.answers["strategic"].charged_uatp for each in rest])
    gain = (right.astype(float) - alone).mean()
    low, high = quality_fit.interval(
        lambda rows: float((right.astype(float) - alone)[rows].mean()), len(rest)
    )
    share_low, share_high = quality_fit.interval(
        lambda rows: float(cost[rows].sum() / strategic[rows].sum()), len(rest)
    )
    return {
        "quality_card": card.version,
        "rate_card": rates.version,
        "chosen_on": half,
        "tasks": len(rest),
        "max_error": chosen,
        "right": {
            "tactical": float(np.mean([each.right["tactical"] for each in rest])),
            "strategic": float(alone.mean()),
            "cascade": float(right.mean()),
        },
        "accuracy_gain": {"value": float(gain), "low": low, "high": high},
        "escalated": float(np.mean([a.outcome is CascadeOutcome.ESCALATED for a in answers])),
        "atp_of_strategic": {
            "value": float(cost.sum() / strategic.sum()), "low": share_low, "high": share_high,
        },
    }  # fmt: skip


def choose(card: QualityCard, judged: Sequence[Judged]) -> float:
    """Return the largest `max_error` whose cascades would lose half a point at most.

    By the answers of both tiers alone: an escalated answer is the strategic tier's.
    """
    strategic = np.mean([each.right["strategic"] for each in judged])
    for max_error in np.arange(0.9, 0.0, -0.05):
        right = [
            each.right["strategic" if card.escalates(each.task.task_class, features, max_error)
                       else "tactical"]
            for each in judged
            for features in (each.answers["tactical"].features,)
        ]  # fmt: skip
        if np.mean(right) >= strategic - _MOST_LOST:
            return round(float(max_error), 2)
    return 0.0


def main() -> None:
    """Measure a scene, and put it beside the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("scene", choices=("humaneval", "pair"))
    parser.add_argument("--tactical")
    parser.add_argument("--strategic")
    parser.add_argument("--human-eval", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--tasks", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--kept", type=Path, help="where answers are; default: nowhere afterwards")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        kept = args.kept or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kept.mkdir(parents=True, exist_ok=True)
        found = humaneval(args, kept) if args.scene == "humaneval" else pair(args, kept)
    found = {"date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), **found}
    path = args.output or report.RESULTS / "cascade.json"
    scenes = json.loads(path.read_text())["scenes"] if path.exists() else {}
    report.write("cascade", {"scenes": scenes | {args.scene: found}}, path)


if __name__ == "__main__":
    main()
