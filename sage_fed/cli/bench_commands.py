"""Measuring: `calibrate`, `bench inertia`, and `dev make-checkpoint` to measure with.

Owns: options to a plan, progress on stderr, tables of the result, where reports are written.
Does not know: how anything is measured (`sage_fed.calibrate`, in the daemon; `sage_fed.inertia`),
what a checkpoint is made of (`sage_fed.engine`); torch until it runs.
Fails: exit codes of `exits.py`; an interrupted calibration leaves nothing behind; a model that
cannot be measured is in the report, with its reason; a checkpoint that was begun is removed.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import json
import re
import shlex
import time
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sage_fed import __version__
from sage_fed.cli import options
from sage_fed.cli.exits import ExitCode, reported
from sage_fed.cli.options import Operator, OptionGroup, grouped, one_of, option
from sage_fed.cli.render import (
    format_bytes,
    format_seconds,
    print_fields,
    print_json,
    print_table,
)
from sage_fed.cli.streams import leave_on_interrupt
from sage_fed.core import CalibrationProgress, CalibrationResult, MeasuredPoint, Phase, TierState
from sage_fed.errors import CannotWrite, ConfigError, SageFedError, TierUnavailable
from sage_fed.model_files import resolve_model
from sage_fed.trusted_files import give_to_owner_of, make_folder_of

if TYPE_CHECKING:
    from sage_fed.calibrate.quality_fit import Fit
    from sage_fed.cli.drawing import Move
    from sage_fed.client import Client
    from sage_fed.inertia import Findings, Plan

_NO_REFERENCE = "none"
_PATHS = ("/", ".", "~")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
REFERENCES = ("fp32", "bf16", "fp16")
"""Of the published method; here, because to ask it takes seconds of imports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InertiaOptions(OptionGroup):
    """Which models are measured, and how."""

    tactical: str = option(
        "--tactical",
        "Directory, bundled:NAME, or hub id@commit.",
        "MODEL",
        default="bundled:demo-tactical",
    )
    strategic: str = option(
        "--strategic", "The larger one, likewise.", "MODEL", default="bundled:demo-strategic"
    )
    device: str = option("--device", "cpu or cuda:N.", "NAME", default="cpu")
    precisions: str = option(
        "--precisions", "Of this engine, such as bf16,int4.", "LIST", default="bf16,int8,int4"
    )
    reference: str = option(
        "--reference",
        "Precision of transformers' generate: bf16, fp16, fp32; none leaves it out.",
        "PRECISION",
        default="bf16",
    )
    batches: str = option("--batches", "Batch sizes, such as 1,8.", "LIST", default="1,8")
    prompt_tokens: int = option(
        "--prompt-tokens", "Random ids of each prompt.", "N", default=32, min=1
    )
    new_tokens: int = option("--new-tokens", "Decoded after each prompt.", "N", default=100, min=2)
    repeats: int = option(
        "--repeats",
        "Of each point; the median counts. One leaves the spread unknown: no verdicts.",
        "N",
        default=3,
        min=1,
    )
    threads: int = option("--threads", "On the CPU; 0 is torch's choice.", "N", default=0, min=0)
    output: Path | None = option("--output", "Keep report.md and inertia.json here.", "DIR")
    as_json: options.AsJson = False


@grouped
def inertia(*, wanted: InertiaOptions) -> None:
    """Measure how much slower the larger of two models is, and why.

    By the published method (transformers' generate) and by this engine, at several precisions
    and batch sizes, beside what the memory's bandwidth allows. One model is loaded at a time.
    """
    with leave_on_interrupt():
        # All arguments are read before torch is, which takes seconds.
        from sage_fed.cli.drawing import watched_bar, watched_line  # noqa: PLC0415 - rich
        from sage_fed.settings import PRECISIONS  # noqa: PLC0415 - pydantic takes half of one
    names = _names(wanted.precisions, PRECISIONS, "--precisions")
    one_of(wanted.reference, (*REFERENCES, _NO_REFERENCE), "--reference")
    if not _DEVICE.fullmatch(wanted.device):
        raise typer.BadParameter(
            f"{wanted.device!r} is neither cpu nor cuda:N", param_hint="--device"
        )
    sizes = _sizes(wanted.batches)
    pair = (_found(wanted.tactical, "--tactical"), _found(wanted.strategic, "--strategic"))
    watched_line("importing torch and transformers", as_json=wanted.as_json)
    with leave_on_interrupt():
        from sage_fed.engine import set_cpu_threads  # noqa: PLC0415 - torch takes seconds
        from sage_fed.inertia import (  # noqa: PLC0415 - transformers, too
            ModelRef,
            Plan,
            analyse,
            markdown,
            measure,
            record,
        )
    plan = Plan(
        tactical=ModelRef(*pair[0]),
        strategic=ModelRef(*pair[1]),
        device=wanted.device,
        precisions=names,
        reference_precision=None if wanted.reference == _NO_REFERENCE else wanted.reference,
        batches=sizes,
        prompt_tokens=wanted.prompt_tokens,
        new_tokens=wanted.new_tokens,
        repeats=wanted.repeats,
    )
    with reported(as_json=wanted.as_json):
        set_cpu_threads(wanted.threads)
        with watched_bar(as_json=wanted.as_json) as show:
            findings = measure(
                plan,
                functools.partial(_show_run, plan, show),
                lambda so_far: _write(so_far, wanted.output),
            )
        analysis = analyse(findings)
        if wanted.as_json:
            print_json(record(findings, analysis))
        else:
            typer.echo(markdown(findings, analysis), nl=False)
        if not analysis.slowdowns:
            raise typer.Exit(ExitCode.ERROR)


def _write(findings: Findings, output: Path | None) -> None:
    """Write what is measured so far, after every model: the larger ones take minutes."""
    from sage_fed.inertia import analyse, markdown, record  # noqa: PLC0415 - as below

    if output is None:
        return
    analysis = analyse(findings)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.md").write_text(markdown(findings, analysis), encoding="utf-8")
        body = json.dumps(record(findings, analysis), indent=2)
        (output / "inertia.json").write_text(f"{body}\n")
    except OSError as error:
        raise CannotWrite(f"{output} cannot be written: {error.strerror}") from error


def _show_run(plan: Plan, show: Move, run: int, text: str, share: float | None) -> None:
    """Show the whole measurement as one bar: which run of how many, and what of it."""
    method, precision, tier = plan.runs[run]
    done = "" if share is None else f" {share:.0%}"
    where = f"{run + 1}/{len(plan.runs)} {method.value} {precision} {tier.name}"
    show(run / len(plan.runs), f"{where}: {text}{done}")


def _found(given: str, option: str) -> tuple[str, str, str]:
    """Where the checkpoint is, its name and its commit."""
    # A directory's name may hold an @; a hub id's cannot.
    name, _, revision = given.partition("@") if not given.startswith(_PATHS) else (given, "", "")
    try:
        source = resolve_model(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
    if isinstance(source, str):
        if not revision:
            raise typer.BadParameter(
                f"{source} is a hub id and needs a commit: {source}@COMMIT; if it is a directory, "
                f"write ./{source}",
                param_hint=option,
            )
        return source, source, revision
    if not source.is_dir():
        raise typer.BadParameter(f"there is no directory {source}", param_hint=option)
    return str(source.absolute()), source.resolve().name, ""


def _names(given: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in given.split(",")))
    return tuple(one_of(name, known, option) for name in names)


def _sizes(given: str) -> tuple[int, ...]:
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in given.split(",")))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise typer.BadParameter(f"{given!r} is not a list such as 1,8", param_hint="--batches")
    return sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityOptions(OptionGroup):
    """A user's own tasks, and how they are asked."""

    quality: Path | None = option(
        "--quality", "Measure how often answers are wrong, by these tasks.", "TASKS.jsonl"
    )
    temperature: float = option(
        "--temperature", "Of --quality; 0 is greedy.", "T", default=0.0, min=0.0, max=2.0
    )
    parallel: int = option(
        "--parallel", "Jobs of --quality at once.", "N", default=4, min=1, max=64
    )


@grouped
def calibrate(
    *,
    asked: QualityOptions,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rounds: seconds, not minutes; less exact.")
    ] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Put the new card in force, until the daemon restarts.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Copies of the card, the report, the plot."),
    ] = None,
    daemon: Operator,
) -> None:
    """Measure what a token costs here, and write a rate card.

    The daemon times its own engines while no job runs; jobs that come go first.
    It needs the operator's token, as `sage-fed admin` does.

    With --quality, labelled tasks are asked of both tiers as ordinary jobs, priced as any, and a
    quality card is written. An interrupted run goes on where it stopped.
    """
    if asked.quality is not None:
        if quick:
            raise typer.BadParameter("--quality has no quick form", param_hint="--quick")
        _calibrate_quality(asked, asked.quality, adopt=adopt, output=output, daemon=daemon)
        return
    from sage_fed.cli.drawing import watched_bar  # noqa: PLC0415 - a tenth of a second

    def measure(client: Client) -> Calibrated:
        with watched_bar(as_json=daemon.as_json) as move:
            for event in client.calibrate(quick=quick, adopt=adopt):
                if isinstance(event, CalibrationResult):
                    texts = {".toml": event.card, ".md": event.report, ".svg": event.plot}
                    copies = _copies(event.version, texts, output) if output else []
                    return Calibrated.of(event, copies)
                move(event.fraction, _text(event))
        raise AssertionError("a calibration ends with a result or an error")

    daemon.report(
        measure,
        lambda done: _print_result(done, _adopt_command("adopt-card", done.result.version, daemon)),
        Calibrated.plain,
    )


@dataclass(frozen=True, slots=True)
class QualityCalibrated:
    """A quality card as it was written, and what became of it."""

    fit: Fit
    path: Path
    answers: Path
    copies: list[str]
    adopted: bool
    refused: str
    """Why the daemon did not take it; "" where it did, or was not asked."""

    def plain(self) -> dict[str, object]:
        """Return it for a program: the figures of every class, and where the files are."""
        return {
            "version": self.fit.card.version,
            "path": self.path,
            "answers": self.answers,
            "copies": self.copies,
            "adopted": self.adopted,
            "refused": self.refused,
            "classes": {
                name: {"tasks": c.known.num_tasks, "score": c.score, "evidence": c.known.evidence,
                       "wrong": {t.name: e for t, e in c.known.errors.items()}, "curve": c.curve}
                for name, c in self.fit.classes.items()
            },
            "left_out": dict(self.fit.left_out),
            "held_out": self.fit.held_out,
        }  # fmt: skip


def _calibrate_quality(
    asked: QualityOptions, tasks_file: Path, *, adopt: bool, output: Path | None, daemon: Operator
) -> None:
    """Ask, check, fit, write, and perhaps adopt."""
    with leave_on_interrupt():
        from sage_fed.calibrate import quality, quality_fit  # noqa: PLC0415 - numpy, pydantic
        from sage_fed.cards.quality_card import QUALITY_FOLDER, QualityFingerprint  # noqa: PLC0415
        from sage_fed.cli.drawing import watched_bar  # noqa: PLC0415 - a tenth of a second
        from sage_fed.cli.serve import effective  # noqa: PLC0415 - pydantic

    def measure(client: Client) -> QualityCalibrated:
        tasks = quality.read_tasks(tasks_file)
        own = effective({"state_dir": daemon.state_dir}, None).settings.own_cards_dir
        folder = own / QUALITY_FOLDER
        make_folder_of(folder, own.parent)
        models = {model.tier: model for model in client.models()}
        for model in models.values():
            if model.state is not TierState.READY:
                raise TierUnavailable(
                    f"the {model.tier.name} tier is {model.state.value}; both tiers are asked"
                )
        tiers = sorted(models)
        fingerprint = QualityFingerprint.of(models, temperature=asked.temperature)
        with (
            quality.AnswerFile.of(folder, fingerprint) as kept,
            watched_bar(as_json=daemon.as_json) as move,
        ):
            judged = quality.collect(
                tasks,
                tiers,
                client.generate,
                kept,
                temperature=asked.temperature,
                parallel=asked.parallel,
                progress=move,
            )
            move(1.0, "fitting")
            fit, path = quality_fit.save(
                quality_fit.fit_card(
                    judged,
                    tiers,
                    fingerprint,
                    tasks_sha256=quality.tasks_sha256(tasks_file),
                    software=f"sage-fed {__version__}",
                    now=dt.datetime.now(dt.UTC).replace(microsecond=0),
                ),
                folder,
            )
        give_to_owner_of(folder, path)
        refused = ""
        if adopt:
            try:
                client.adopt_quality_card(fit.card.version)
            except SageFedError as error:
                # The card is written: what it took to measure it is not lost with a refusal.
                refused = str(error)
        texts = {suffix: path.with_suffix(suffix).read_text("utf-8") for suffix in (".toml", ".md")}
        copies = _copies(fit.card.version, texts, output) if output else []
        return QualityCalibrated(fit, path, kept.path, copies, adopt and not refused, refused)

    def show(made: QualityCalibrated) -> None:
        version = made.fit.card.version
        _print_quality(made, _adopt_command("adopt-quality-card", version, daemon))

    done = daemon.report(measure, show, QualityCalibrated.plain)
    if done.refused:
        raise typer.Exit(ExitCode.ERROR)


def _print_quality(done: QualityCalibrated, command: str) -> None:
    print_table(
        {
            "class": name,
            ">tasks": str(each.known.num_tasks),
            **{
                f">{tier.name} wrong": f"{wrong.value:.1%}"
                for tier, wrong in each.known.errors.items()
            },
            ">AUROC": f"{each.known.evidence.auroc.value:.3f}",
            ">calibration error": f"{each.known.evidence.calibration_error.value:.3f}",
            ">Brier": f"{each.known.evidence.brier.value:.3f}",
            ">base rate's": f"{each.known.evidence.base_brier:.3f}",
            "score": each.score,
        }
        for name, each in done.fit.classes.items()
    )
    typer.echo()
    if done.refused:
        in_force = f"no, the daemon refused it: {done.refused}"
    elif done.adopted:
        in_force = "now, until the daemon restarts; quality_card = auto keeps it"
    else:
        in_force = f"no; `{command}`, or quality_card = auto at a restart"
    left_out = [(f"  {name}", f"read as any: {why}") for name, why in done.fit.left_out.items()]
    held_out = [
        (
            f"held out {each.family}",
            f"{each.num_tasks} tasks, calibration error {each.calibration_error.value:.3f}",
        )
        for each in done.fit.held_out
    ]
    print_fields(
        (
            *left_out,
            *held_out,
            ("quality card", done.fit.card.version),
            ("written to", f"{done.path}, with a report (.md) beside it"),
            ("answers", f"{done.answers}, kept for the next run"),
            *((("copies in", str(Path(done.copies[0]).parent)),) if done.copies else ()),
            ("in force", in_force),
        )
    )


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration's result, and what its card says."""

    result: CalibrationResult
    copies: list[str]
    prices: Mapping[str, Mapping[str, str]]
    """By tier and phase in ATP, as they are written."""
    spreads: Mapping[str, Mapping[str, float | None]]
    """Relative, of each price; None where the card has none."""
    warning: str
    """What the card says of its own measurement."""

    @classmethod
    def of(cls, result: CalibrationResult, copies: list[str]) -> Calibrated:
        """Read the result's card."""
        card = tomllib.loads(result.card)
        tiers = [
            name for name, table in card.items() if isinstance(table, dict) and "decode" in table
        ]
        return cls(
            result,
            copies,
            {t: {p.value: card[t][p.value]["price_atp"] for p in Phase} for t in tiers},
            {t: {p.value: card[t][p.value].get("spread") for p in Phase} for t in tiers},
            str(card.get("measured", {}).get("warning", "")),
        )

    @property
    def sound(self) -> bool:
        """Whether `rate_card = "auto"` would take the card."""
        from sage_fed.cards.rate_card import MAX_SPREAD  # noqa: PLC0415 - pydantic takes half a second

        spreads = [spread for prices in self.spreads.values() for spread in prices.values()]
        spreads.append(self.result.cost_ratio_spread)
        return all((spread or 0.0) <= MAX_SPREAD for spread in spreads)

    def plain(self) -> dict[str, object]:
        """Return it for a program, without the three texts."""
        texts = ("card", "report", "plot")
        names = [field.name for field in dataclasses.fields(self.result) if field.name not in texts]
        return {
            **{name: getattr(self.result, name) for name in names},
            "prices_atp": self.prices,
            "price_spreads": self.spreads,
            "warning": self.warning,
            "sound": self.sound,
            "copies": self.copies,
        }


def _text(progress: CalibrationProgress) -> str:
    """What is measured now, and the ratio so far."""
    parts = [progress.phase, progress.point]
    if progress.cost_ratio is not None:
        parts.append(f"ratio {progress.cost_ratio:.2f}")
    return " · ".join(filter(None, parts))


def _copies(version: str, texts: Mapping[str, str], directory: Path) -> list[str]:
    """Write a card's texts, by their suffixes, on this side of the wire."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            (directory / f"{version}{suffix}").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: cannot write into {directory}: {error.strerror}") from None
    return [str(directory / f"{version}{suffix}") for suffix in texts]


def _adopt_command(command: str, version: str, daemon: Operator) -> str:
    """The command that puts the card in force, at the daemon that this one was given."""
    words = ["sage-fed", "admin", command, version]
    if daemon.state_dir is not None:
        words += ["--state-dir", daemon.state_dir]
    return shlex.join([*words, *daemon.arguments()])


def _print_result(done: Calibrated, command: str) -> None:
    result = done.result
    print_table(_row(point) for point in result.points)
    typer.echo()
    rows: list[dict[str, str]] = []
    for tier, prices in done.prices.items():
        shown = {f">{phase}": f"{float(price):.4f}" for phase, price in prices.items()}
        spreads = {f">{phase}": _spread(spread) for phase, spread in done.spreads[tier].items()}
        rows += [{"ATP per token": tier, **shown}, {"ATP per token": "  spread", **spreads}]
    print_table(rows)
    typer.echo()
    ratio = f"{result.cost_ratio:.3f} : 1, spread ±{result.cost_ratio_spread:.1%}"
    in_force = "now, until the daemon restarts" if result.adopted else f"no; `{command}`"
    if not done.sound:
        from sage_fed.cards.rate_card import MAX_SPREAD  # noqa: PLC0415 - as above

        in_force += (
            f"; rate_card = auto does not take it: a spread above {MAX_SPREAD:.0%} is of the "
            "machine's other work; measure again when it idles"
        )
    elif result.adopted:
        in_force += "; rate_card = auto keeps it"
    else:
        in_force += ", or rate_card = auto at a restart"
    print_fields(
        (
            ("strategic : tactical", ratio),
            *((("WARNING", done.warning),) if done.warning else ()),
            ("took", format_seconds(result.took_s)),
            ("rate card", result.version),
            ("written to", f"{result.path}, with a report (.md) and a plot (.svg) beside it"),
            *((("copies in", str(Path(done.copies[0]).parent)),) if done.copies else ()),
            ("in force", in_force),
        )
    )


def _row(point: MeasuredPoint) -> dict[str, str]:
    beside = point.co_resident_s
    return {
        "tier": point.tier.name,
        "phase": point.phase.value,
        ">batch": str(point.batch),
        ">context": str(point.context_tokens),
        ">tokens": str(point.tokens),
        ">step": format_seconds(point.step_s),
        ">tok/s": f"{1 / point.token_s:,.0f}",
        ">beside the other": "-" if beside is None else f"{beside / point.step_s:.2f}x",
        ">±": _spread(point.spread),
    }


def _spread(spread: float | None) -> str:
    """One round has none."""
    return "-" if spread is None else f"±{spread:.1%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions(OptionGroup):
    """Which model's shape, and which weights."""

    like: str = option("--like", "qwen2.5-0.5b, -1.5b, -3b, -7b or -14b.", "SHAPE", default=MISSING)
    layers: int | None = option("--layers", "Fewer layers, for a quick test.", "N", min=1)
    weight_type: str = option(
        "--dtype", "bf16, fp16 or fp32: the type of the weights.", "TYPE", default="bf16"
    )
    seed: int = option("--seed", "Another one, other weights.", "N", default=0, min=0)
    as_json: options.AsJson = False


@grouped
def make_checkpoint(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to; it must not be there.")
    ],
    *,
    wanted: CheckpointOptions,
) -> None:
    """Write random weights in a real model's shape, for speed tests.

    It can be served like the real one and costs the same: its tokenizer has as many ids, most
    of them invented words. No token ends an answer, and what it says means nothing.
    """
    with leave_on_interrupt():
        from sage_fed.cli.drawing import watched_bar  # noqa: PLC0415 - a tenth of a second
        from sage_fed.engine import (  # noqa: PLC0415 - torch takes seconds to import
            SHAPES,
            WEIGHT_TYPES,
            check_destination,
            free_bytes,
            plan_checkpoint,
            write_checkpoint,
        )
        from sage_fed.text import write_padded_tokenizer  # noqa: PLC0415 - as above
    like = one_of(wanted.like, tuple(SHAPES), "--like")
    one_of(wanted.weight_type, WEIGHT_TYPES, "--dtype")
    shape = SHAPES[like]
    if wanted.layers is not None and wanted.layers > shape.layers:
        raise typer.BadParameter(
            f"{wanted.layers} are more than the {shape.layers} of {like}", param_hint="--layers"
        )
    plan = plan_checkpoint(shape, num_layers=wanted.layers, weight_type=wanted.weight_type)
    tokenizer = Path(__file__).parent.parent / "models" / "demo-tactical"
    with reported(as_json=wanted.as_json):
        check_destination(plan, directory)
        if not wanted.as_json:
            typer.echo(
                f"{like}: {plan.parameters:,} parameters, {format_bytes(plan.num_bytes)} in "
                f"{len(plan.shards)} file(s); {format_bytes(free_bytes(directory))} are free",
                err=True,
            )
        began_s = time.monotonic()
        with watched_bar(as_json=wanted.as_json) as show:
            write_checkpoint(
                plan,
                directory,
                seed=wanted.seed,
                progress=lambda done: show(done / plan.num_bytes, format_bytes(done)),
                complete=lambda made: write_padded_tokenizer(tokenizer, made, shape.tokenizer_ids),
            )
        took_s = time.monotonic() - began_s
    if wanted.as_json:
        print_json(
            {
                "directory": directory,
                "like": like,
                "layers": plan.shape.layers,
                "parameters": plan.parameters,
                "num_bytes": plan.num_bytes,
                "seconds": took_s,
            }
        )
        return
    typer.echo(f"wrote {directory} in {format_seconds(took_s)}")
