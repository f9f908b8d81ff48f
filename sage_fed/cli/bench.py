"""`sage-fed bench ...`: measurements that need no daemon.

Owns: options to a plan, progress on stderr, where the report is written.
Does not know: how a model is measured or judged (`sage_fed.inertia`); torch until it runs.
Fails: exit codes of `exits.py`; a model that cannot be measured is in the report, with its reason.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.exits import EXIT_CODES_HELP, ExitCode, reported
from sage_fed.cli.render import print_json
from sage_fed.cli.streams import leave_on_interrupt
from sage_fed.core import resolve_model
from sage_fed.errors import CannotWrite

if TYPE_CHECKING:
    from sage_fed.cli.progress import Move
    from sage_fed.inertia import Findings, Plan

_NO_REFERENCE = "none"
_PATHS = ("/", ".", "~")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
REFERENCES = ("fp32", "bf16", "fp16")
"""Of the published method; here, because to ask it takes seconds of imports."""

Tactical = Annotated[
    str,
    typer.Option("--tactical", metavar="MODEL", help="Directory, bundled:NAME, or hub id@commit."),
]
Strategic = Annotated[
    str, typer.Option("--strategic", metavar="MODEL", help="The larger one, likewise.")
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu or cuda:N.")]
Precisions = Annotated[
    str, typer.Option("--precisions", metavar="LIST", help="Of this engine, such as bf16,int4.")
]
Reference = Annotated[
    str,
    typer.Option(
        "--reference",
        metavar="PRECISION",
        help="Precision of transformers' generate: bf16, fp16, fp32; none leaves it out.",
    ),
]
Batches = Annotated[
    str, typer.Option("--batches", metavar="LIST", help="Batch sizes, such as 1,8.")
]
PromptTokens = Annotated[
    int, typer.Option("--prompt-tokens", min=1, metavar="N", help="Random ids of each prompt.")
]
NewTokens = Annotated[
    int, typer.Option("--new-tokens", min=2, metavar="N", help="Decoded after each prompt.")
]
Repeats = Annotated[
    int,
    typer.Option(
        "--repeats",
        min=1,
        metavar="N",
        help="Of each point; the median counts. One leaves the spread unknown: no verdicts.",
    ),
]
Threads = Annotated[
    int, typer.Option("--threads", min=0, metavar="N", help="On the CPU; 0 is torch's choice.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", help="Keep report.md and inertia.json here."),
]


def bench_app() -> typer.Typer:
    """The measurements."""
    app = typer.Typer(
        name="bench",
        invoke_without_command=True,
        callback=options.help_if_bare,
        help="Measure models on this machine; the daemon should not be running.",
        epilog=EXIT_CODES_HELP,
    )
    app.command(epilog=EXIT_CODES_HELP)(inertia)
    return app


def inertia(
    *,
    tactical: Tactical = "bundled:demo-tactical",
    strategic: Strategic = "bundled:demo-strategic",
    device: Device = "cpu",
    precisions: Precisions = "bf16,int8,int4",
    reference: Reference = "bf16",
    batches: Batches = "1,8",
    prompt_tokens: PromptTokens = 32,
    new_tokens: NewTokens = 100,
    repeats: Repeats = 3,
    threads: Threads = 0,
    output: Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure how much slower the larger of two models is, and why.

    By the published method (transformers' generate) and by this engine, at several precisions
    and batch sizes, beside what the memory's bandwidth allows. One model is loaded at a time.
    """
    with leave_on_interrupt():
        # All arguments are read before torch is, which takes seconds.
        from sage_fed.cli.progress import watched_bar, watched_line  # noqa: PLC0415 - rich
        from sage_fed.settings import PRECISIONS  # noqa: PLC0415 - pydantic takes half of one
    names = _names(precisions, PRECISIONS, "--precisions")
    _check(reference, (*REFERENCES, _NO_REFERENCE), "--reference")
    if not _DEVICE.fullmatch(device):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda:N", param_hint="--device")
    sizes = _sizes(batches)
    pair = (_found(tactical, "--tactical"), _found(strategic, "--strategic"))
    watched_line("importing torch and transformers", as_json=as_json)
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
        device=device,
        precisions=names,
        reference_precision=None if reference == _NO_REFERENCE else reference,
        batches=sizes,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
    )
    with reported(as_json=as_json):
        set_cpu_threads(threads)
        with watched_bar(as_json=as_json) as show:
            findings = measure(plan, _Shown(plan, show), lambda so_far: _write(so_far, output))
        analysis = analyse(findings)
        if as_json:
            print_json(record(findings, analysis))
        else:
            typer.echo(markdown(findings, analysis), nl=False)
        if not analysis.slowdowns:
            raise typer.Exit(ExitCode.ERROR)


def _write(findings: Findings, output: Path | None) -> None:
    """After every model: the larger ones take minutes that nobody wants to lose."""
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


class _Shown:
    """The whole measurement as one bar: which run of how many, and what of it."""

    def __init__(self, plan: Plan, show: Move) -> None:
        self._runs = plan.runs
        self._show = show

    def __call__(self, run: int, text: str, share: float | None) -> None:
        method, precision, tier = self._runs[run]
        done = "" if share is None else f" {share:.0%}"
        where = f"{run + 1}/{len(self._runs)} {method.value} {precision} {tier.name}"
        self._show(run / len(self._runs), f"{where}: {text}{done}")


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
    for name in names:
        _check(name, known, option)
    return names


def _check(name: str, known: tuple[str, ...], option: str) -> None:
    if name not in known:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint=option)


def _sizes(given: str) -> tuple[int, ...]:
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in given.split(",")))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise typer.BadParameter(f"{given!r} is not a list such as 1,8", param_hint="--batches")
    return sizes
